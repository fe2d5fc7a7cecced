"""Prices that are seen or unknown, what runs, what is left, and a clean-up that outlives what it cleans up after."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from helpers import costs, environment, tables
from helpers.local import client

IMAGE = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
SERVING = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
PATIENCE = 120  # seconds in which anything here ends
SLEEP = ["python3", "-c", "import time; time.sleep(300)"]


@pytest.fixture(scope="module")
def cloud(cloud):
    """Return the shared local cloud with nothing in it: only its keys and its port stay."""
    place = client.folder()
    client.stop(place)
    for path in place.iterdir():
        if path.is_dir() and path.name != "identity":
            shutil.rmtree(path)
        elif path.name not in ("identity", "server.json", "server.lock"):
            path.unlink()
    return environment.connect()


def pool(command=SLEEP, machine="n1-standard-4", replicas=1):
    """Return a worker pool that runs a command."""
    container = {"image_uri": IMAGE, "command": command}
    return {"machine_spec": {"machine_type": machine}, "replica_count": replicas, "container_spec": container}


def objects(cloud):
    """Return the names of all objects in the cloud's bucket."""
    from google.cloud import storage

    return [blob.name for blob in storage.Client().list_blobs(cloud.bucket.removeprefix("gs://"))]


def write(cloud, name, text="text"):
    """Write an object into the cloud's bucket."""
    from google.cloud import storage

    storage.Client().bucket(cloud.bucket.removeprefix("gs://")).blob(name).upload_from_string(text)


def eventually(condition):
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def left(cloud):
    """Return what is left in the cloud."""
    return costs.remaining(cloud.project, cloud.region, cloud.bucket)


# Prices


def test_a_workbench_instance_costs_its_machine_and_the_fee():
    instance = costs.workbench("n1-standard-4", hours=10)
    assert instance.total == pytest.approx(10 * (4 * 0.0442554 + 15 * 0.0059318))
    assert instance.hourly > costs.hourly("n1-standard-4", "training")
    assert costs.workbench("n1-standard-4", region="europe-west4").total is None
    assert "unknown here" in repr(costs.workbench("e2-standard-4"))


def test_automl_costs_its_budget():
    assert costs.automl(2).total == pytest.approx(42.504)
    assert "2 h: $42.50" in repr(costs.automl(2))
    assert costs.automl(8, "image classification").total == pytest.approx(27.72)
    assert costs.automl(1, region="europe-west4").total is None
    with pytest.raises(ValueError, match="takes 1 node hours or more"):
        costs.automl(0.5)
    with pytest.raises(ValueError, match="Did you mean 'tabular'"):
        costs.automl(1, "tabula")


def test_bigquery_costs_what_it_reads_and_10_mb_at_least():
    assert costs.bigquery(2**40) == 6.25
    assert costs.bigquery(2**40, "CREATE MODEL") == 312.5
    assert costs.bigquery(1) == costs.bigquery(10 * 2**20) < costs.bigquery(11 * 2**20)


def test_all_prices_have_a_day_and_a_machine():
    prices, machines = tables.read("prices"), tables.read("machines")
    names = ("training", "training_accelerator", "prediction", "automl", "bigquery_per_tib", "per_gb_month")
    kinds = [prices[name] for name in names]
    for price in (price for kind in kinds for price in kind.values()):
        assert price["usd"] > 0
        assert tables.day(price["date"]) <= tables.day(prices["date"])
    for purpose in ("training", "prediction"):
        for name in prices[purpose]:
            family, _, size = name.rpartition("-")
            assert name in machines["gpu"] or int(size) in machines["cpu"][family][purpose]
    assert set(prices["training_accelerator"]) <= set(machines["accelerators"])


def test_what_is_known_is_multiplied_and_what_is_not_is_unknown():
    assert costs.hourly("n1-standard-4", "training", count=3) == pytest.approx(3 * 0.21849885)
    assert costs.hourly("n1-standard-4", "training", "NVIDIA_TESLA_T4", 1) is None
    assert costs.hourly("n1-standard-96", "training") is None
    assert costs.hourly("n1-standard-4", "training", region="europe-west4") is None
    # Google's deployment prices of machines that are made for GPUs include them.
    assert costs.hourly("g2-standard-24", "prediction", "NVIDIA_L4", 2) == 2.3014
    monthly = costs.endpoint("n1-standard-4")
    assert monthly.total == pytest.approx(0.219 * 730)
    assert "a month: $159.87" in repr(monthly)
    assert "seen on 2026-09-08" in repr(monthly)
    unknown = costs.estimate("n1-standard-8", 1)
    assert (unknown.total, unknown.date) == (None, None)
    assert f"unknown here; the price stands at {tables.read('prices')['source']}" in repr(unknown)
    with pytest.raises(ValueError, match="more than 0 h"):
        costs.estimate("n1-standard-4", 0)


# What runs


def test_running_counts_each_job_once(cloud):
    """A pipeline's job and a tuning job's trial are jobs too, and would be counted twice by adding all lists."""
    from google.cloud import aiplatform
    from google.cloud.aiplatform import hyperparameter_tuning as tuning

    place = {"location": cloud.region, "project": cloud.project}
    with costs.Cleanup() as cleanup:
        job = aiplatform.CustomJob("alone", [pool(), pool(replicas=2)], base_output_dir=f"{cloud.bucket}/a", **place)
        job.submit()
        cleanup.add(job)
        pipeline = aiplatform.CustomContainerTrainingJob("in a pipeline", IMAGE, command=SLEEP)
        pipeline.submit(machine_type="n1-standard-4", base_output_dir=f"{cloud.bucket}/b", sync=False)
        cleanup.add(pipeline)
        search = aiplatform.HyperparameterTuningJob(
            display_name="search",
            custom_job=aiplatform.CustomJob("trial", [pool()], base_output_dir=f"{cloud.bucket}/c"),
            metric_spec={"score": "maximize"},
            parameter_spec={"x": tuning.DoubleParameterSpec(min=0, max=1, scale="linear")},
            max_trial_count=2,
            parallel_trial_count=2,
        )
        search.run(sync=False)
        cleanup.add(search)

        def found():
            return sorted((item.kind, item.name, item.count) for item in costs.running(cloud.project, cloud.region))

        trials = [("job", "search-trial-1", 1), ("job", "search-trial-2", 1)]
        expected = [("job", "alone", 1), ("job", "alone", 2), ("job", "in a pipeline-custom-job", 1), *trials]
        eventually(lambda: found() == expected)
        running = costs.running(cloud.project, cloud.region)
        assert sum(item.hourly for item in running) == pytest.approx(6 * 0.21849885)
        assert "it would cost $1.31 an hour, $957 a month" in costs.summary(running, is_local=True)
        assert "job alone: 2 x n1-standard-4, $0.437 an hour" in repr(left(cloud))
    assert costs.running(cloud.project, cloud.region) == []
    assert costs.summary([], is_local=True) == "nothing that is billed by the hour"


def test_a_whole_deployment_is_priced_and_leaves_nothing(cloud, tmp_path, capsys):
    import joblib
    from google.cloud import aiplatform
    from sklearn.linear_model import LinearRegression

    joblib.dump(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]), tmp_path / "model.joblib")
    folder = f"{cloud.bucket}/deployment"
    write(cloud, "deployment/model.joblib", (tmp_path / "model.joblib").read_bytes())
    write(cloud, "deployment-of-others/kept", "kept")
    with costs.Cleanup() as cleanup:
        cleanup.add(folder)
        endpoint = cleanup.add(aiplatform.Endpoint.create(display_name="priced"))
        # Last in, first out would be too early for the model: it goes after its endpoint, in a second round.
        model = cleanup.add(aiplatform.Model.upload(artifact_uri=folder, serving_container_image_uri=SERVING))
        cleanup.add(aiplatform.Tensorboard.create(display_name="board"))
        model.deploy(endpoint=endpoint, machine_type="n1-standard-4")
        (item,) = costs.running(cloud.project, cloud.region)
        assert (item.kind, item.name, item.count, item.hourly) == ("endpoint", "priced", 1, 0.219)
        assert item.resource == endpoint.resource_name.replace(endpoint.project, item.resource.split("/")[1])
        remaining = left(cloud)
        assert remaining
        assert "endpoint priced: 1 x n1-standard-4, $0.219 an hour" in repr(remaining)
        assert "TensorBoard: $10 a GB and month" in repr(remaining)
        assert f"{cloud.bucket}: 2 objects, 0.0 MB, less than a cent a month" in repr(remaining)
    said = capsys.readouterr().out
    for name in (folder, endpoint.resource_name, model.resource_name):
        assert f"deleted: {name}\n" in said
    assert "NOT" not in said
    assert objects(cloud) == ["deployment-of-others/kept"]
    costs.delete(f"{cloud.bucket}/deployment-of-others/kept")
    assert not left(cloud)
    assert repr(left(cloud)).startswith(
        f"Nothing that is billed is left in {cloud.project}, us-central1: endpoints, jobs"
    )
    assert "Not looked at: Workbench instances" in repr(left(cloud))


# Cleaning up


def test_cleaning_up_goes_on_after_a_failure_and_after_an_error_in_the_block(cloud, capsys):
    place = f"projects/{cloud.project}/locations/{cloud.region}"
    elsewhere = f"projects/someone-elses/locations/{cloud.region}/tensorboards/1"
    write(cloud, "first/object")
    write(cloud, "second/object")
    with pytest.raises(ZeroDivisionError), costs.Cleanup() as cleanup:
        cleanup.add(f"{cloud.bucket}/first/")
        cleanup.add("gs://a-bucket-that-was-never-made")
        cleanup.add(elsewhere)
        cleanup.add(f"{place}/models/1234567890")
        cleanup.add(f"{cloud.bucket}/second/object")
        raise ZeroDivisionError
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"deleted: {cloud.bucket}/second/object"
    assert lines[1] == f"was gone: {place}/models/1234567890"
    assert lines[2].startswith("NOT deleted (PermissionDenied: 403")
    assert lines[3:] == ["was gone: gs://a-bucket-that-was-never-made", f"deleted: {cloud.bucket}/first/"]
    assert objects(cloud) == []
    report = cleanup.close()
    assert report.failed == [elsewhere]
    cleanup._forget(elsewhere)
    assert repr(cleanup.close()) == "nothing to delete"


def test_cleaning_up_removes_a_table_of_bigquery_and_a_whole_bucket(cloud):
    from google.cloud import bigquery, storage

    client = bigquery.Client(project=cloud.project)
    client.create_dataset("left_over")
    storage.Client().create_bucket("left-over-bucket", location=cloud.region).blob("x/y").upload_from_string("z")
    cleanup = costs.Cleanup()
    cleanup.add(f"bq://{cloud.project}.left_over")
    cleanup.add("gs://left-over-bucket")
    assert set(cleanup.close().outcomes.values()) == {"deleted"}
    assert "left_over" not in {found.dataset_id for found in client.list_datasets()}
    assert storage.Client().lookup_bucket("left-over-bucket") is None


@pytest.mark.parametrize("name", ["an-endpoint", "gs://", "bq://project", "projects/p/locations/r/experiments/e", ""])
def test_only_what_can_be_deleted_is_registered(name):
    with pytest.raises(ValueError, match="cannot be deleted here; expected projects/PROJECT"):
        costs.Cleanup().add(name)


def test_a_resource_without_a_name_is_refused(cloud):
    from google.cloud import aiplatform

    job = aiplatform.CustomJob("not yet there", [pool()], base_output_dir=f"{cloud.bucket}/x")
    with pytest.raises(ValueError, match=r"has no resource name \(yet\)"):
        costs.Cleanup().add(job)


NOTEBOOK = """
    import json, sys, time
    from helpers import environment, costs
    cloud = environment.connect()
    from google.cloud import aiplatform, storage
    cleanup = costs.Cleanup()
    storage.Client().bucket(cloud.bucket[5:]).blob("halfway/object").upload_from_string("text")
    cleanup.add(cloud.bucket + "/halfway")
    cleanup.add(aiplatform.Endpoint.create(display_name="halfway"))
    kept = cleanup.add(aiplatform.Tensorboard.create(display_name="halfway"))
    print(json.dumps(costs.Cleanup._guard.pid), file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(("end", "is_heard"), [(signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_what_was_registered_is_deleted_even_if_the_process_is_killed(cloud, end, is_heard):
    """Whether anybody hears of it or not: with a kernel, the reader of its output dies too."""
    from google.cloud import aiplatform

    source = textwrap.dedent(NOTEBOOK) + "time.sleep(300)"
    with subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        guard = json.loads(process.stderr.readline())
        assert len(aiplatform.Endpoint.list()) == 1
        if not is_heard:
            process.stderr.close()
        process.send_signal(end)
        assert process.wait() == -end
        if is_heard:
            said = process.stderr.read()  # until the second process has ended too
            assert said.count("deleted: ") == 3
            assert "NOT" not in said
    eventually(lambda: not left(cloud) and not aiplatform.Endpoint.list())
    eventually(lambda: not psutil.pid_exists(guard) or psutil.Process(guard).status() == psutil.STATUS_ZOMBIE)


def test_what_was_registered_is_deleted_when_the_process_ends_by_an_error(cloud):
    source = textwrap.dedent(NOTEBOOK) + "raise RuntimeError('a cell fails')"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE)
    assert "RuntimeError: a cell fails" in run.stderr
    assert run.stdout.count("deleted: ") == 3
    assert not left(cloud)


def test_the_second_process_is_there_only_while_something_is_registered(cloud):
    first, second = costs.Cleanup(), costs.Cleanup()
    write(cloud, "one")
    write(cloud, "two")
    first.add(f"{cloud.bucket}/one")
    guard = costs.Cleanup._guard
    second.add(f"{cloud.bucket}/two")
    assert costs.Cleanup._guard is guard
    first.close()
    assert guard.poll() is None
    guard.kill()  # another one takes its place, with all that is registered
    guard.wait()
    second.add(f"{cloud.bucket}/one")
    assert costs.Cleanup._guard is not guard
    second.close()
    assert costs.Cleanup._guard is None
    assert not left(cloud)
