"""Training jobs on the local cloud, through the unmodified SDK: the contract, the ends they come to, what is kept."""

import json
import textwrap
import time

import pytest

IMAGE = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
MACHINE = "n1-standard-4"


def pool(command, replicas=1, image=IMAGE, **machine):
    """Return a worker pool that runs a command."""
    return {
        "machine_spec": {"machine_type": MACHINE, **machine},
        "replica_count": replicas,
        "container_spec": {"image_uri": image, "command": command},
    }


def python(source):
    """Return the command that runs a piece of Python."""
    return ["python3", "-c", textwrap.dedent(source)]


@pytest.fixture
def job(cloud):
    """Return a function that makes a custom job of worker pools."""
    from google.cloud import aiplatform

    return lambda *pools, **options: aiplatform.CustomJob("a job", list(pools), **options)


def written(cloud, name):
    """Return a JSON object of the bucket."""
    from google.cloud import storage

    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    return json.loads(bucket.blob(name).download_as_text())


CONTRACT = """
    import json, os, pathlib
    keys = [key for key in os.environ if key.startswith(("AIP_", "CLOUD_ML_", "TF_CONFIG", "CLUSTER_SPEC"))]
    spec = json.loads(os.environ["CLUSTER_SPEC"])
    place = f"{spec['task']['type']}-{spec['task']['index']}"
    folder = pathlib.Path(os.environ["AIP_MODEL_DIR"].replace("gs://", "/gcs/"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{place}.json").write_text(json.dumps({key: os.environ[key] for key in keys}))
"""


def test_one_replica_gets_the_environment_of_a_training_container(cloud, job):
    made = job(pool(python(CONTRACT)), base_output_dir=f"{cloud.bucket}/one", labels={"team": "a"})
    made.run()
    found = written(cloud, "one/model/workerpool0-0.json")
    assert found["AIP_MODEL_DIR"] == f"{cloud.bucket}/one/model/"
    assert found["AIP_CHECKPOINT_DIR"] == f"{cloud.bucket}/one/checkpoints/"
    assert found["AIP_TENSORBOARD_LOG_DIR"] == f"{cloud.bucket}/one/logs/"
    assert found["CLOUD_ML_JOB_ID"] == made.name
    assert found["CLOUD_ML_PROJECT_ID"].isdigit()
    assert found["CLOUD_ML_REGION"] == cloud.region
    assert "TF_CONFIG" not in found
    assert made.labels == {"team": "a"}
    assert made.state.name == "JOB_STATE_SUCCEEDED"
    assert made.start_time <= made.end_time


def test_several_replicas_find_each_other(cloud, job):
    pools = [pool(python(CONTRACT)), pool(python(CONTRACT), replicas=2), {}, pool(python(CONTRACT))]
    pools[0]["container_spec"]["command"] = python(CONTRACT + "    import time; time.sleep(2)\n")
    job(*pools, base_output_dir=f"{cloud.bucket}/several").run()
    found = {
        name: written(cloud, f"several/model/{name}.json")
        for name in ("workerpool0-0", "workerpool1-0", "workerpool1-1", "workerpool3-0")
    }
    configs = {name: json.loads(values["TF_CONFIG"]) for name, values in found.items()}
    assert configs["workerpool1-1"]["task"] == {"type": "worker", "index": 1}
    assert configs["workerpool3-0"]["task"]["type"] == "evaluator"
    clusters = [config["cluster"] for config in configs.values()]
    assert all(cluster == clusters[0] for cluster in clusters)
    assert {role: len(hosts) for role, hosts in clusters[0].items()} == {"chief": 1, "worker": 2}
    spec = json.loads(found["workerpool0-0"]["CLUSTER_SPEC"])
    assert set(spec["cluster"]) == {"workerpool0", "workerpool1", "workerpool3"}
    assert spec["environment"] == "cloud"


def test_the_exit_status_of_a_replica_is_in_the_error(job):
    made = job(pool(python("import sys; print('the last words'); sys.exit(3)")))
    with pytest.raises(RuntimeError, match="The replica workerpool0-0 exited with a non-zero status of 3") as failure:
        made.run()
    assert "the last words" in str(failure.value)
    assert made.state.name == "JOB_STATE_FAILED"


def test_the_end_of_a_worker_ends_the_job(job):
    made = job(pool(python("import time; time.sleep(60)")), pool(python("raise SystemExit(7)")))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="The replica workerpool1-0 exited with a non-zero status of 7"):
        made.run()
    assert time.monotonic() - started < 30


def test_the_primary_replica_decides_when_the_job_has_succeeded(job):
    made = job(pool(python("pass")), pool(python("import time; time.sleep(60)")))
    started = time.monotonic()
    made.run()
    assert made.state.name == "JOB_STATE_SUCCEEDED"
    assert time.monotonic() - started < 30


def test_a_crash_is_tried_again_and_finds_its_checkpoint(cloud, job):
    source = """
        import os, pathlib
        path = pathlib.Path(os.environ["AIP_CHECKPOINT_DIR"].replace("gs://", "/gcs/")) / "starts"
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = len(path.read_text()) if path.exists() else 0
        path.write_text("x" * (starts + 1))
        if starts < 2:
            os.abort()
    """
    made = job(pool(python(source)), base_output_dir=f"{cloud.bucket}/crash")
    made.run()
    again = job(pool(python("import os; os.abort()")))
    with pytest.raises(RuntimeError, match="non-zero status of 134"):
        again.run(disable_retries=True)


def test_a_job_that_outlasts_its_timeout_fails(job):
    made = job(pool(python("import time; time.sleep(60)")))
    with pytest.raises(RuntimeError, match="timeout of 1 s"):
        made.run(timeout=1)


def test_cancelling_ends_a_job_with_all_that_it_started(cloud, job):
    source = """
        import os, pathlib, subprocess, sys
        folder = pathlib.Path(os.environ["AIP_MODEL_DIR"].replace("gs://", "/gcs/"))
        folder.mkdir(parents=True)
        alive = str(folder / "alive")
        code = f"import pathlib, time\\nwhile True: pathlib.Path({alive!r}).write_text('x'); time.sleep(.1)"
        subprocess.run([sys.executable, "-c", code])
    """
    from google.cloud import storage

    made = job(pool(python(source)), base_output_dir=f"{cloud.bucket}/cancel")
    made.submit()
    blob = storage.Client().bucket(cloud.bucket.removeprefix("gs://")).blob("cancel/model/alive")
    wait_until(blob.exists)
    made.cancel()
    wait_until(lambda: made.state.name == "JOB_STATE_CANCELLED")
    blob.delete()
    time.sleep(0.5)
    assert not blob.exists()
    assert made.error.code == 1


def test_looking_at_a_running_job_does_not_wait_for_it(job):
    made = job(pool(python("import time; time.sleep(30)")))
    made.submit()
    time.sleep(1)
    started = time.monotonic()
    assert made.state.name in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING")
    assert time.monotonic() - started < 2
    made.cancel()
    wait_until(made.done)


def test_jobs_are_listed_filtered_and_deleted(job):
    from google.cloud import aiplatform

    made = job(pool(python("pass")), labels={"which": "listed"})
    made.run()
    assert [found.name for found in aiplatform.CustomJob.list(filter='labels.which="listed"')] == [made.name]
    assert made.name in {found.name for found in aiplatform.CustomJob.list(filter='state="JOB_STATE_SUCCEEDED"')}
    made.delete()
    assert aiplatform.CustomJob.list(filter='labels.which="listed"') == []


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ([pool(["true"], replicas=2)], "Chief spec replica count cannot be greater than 1|exactly one replica"),
        (
            [{**pool(["true"]), "machine_spec": {"machine_type": "n1-standard-2"}}],
            "Machine type n1-standard-2 is not supported",
        ),
        ([pool(["true"], accelerator_type="NVIDIA_L4", accelerator_count=1)], 'Accelerator "NVIDIA_L4".*not supported'),
        ([pool(["true"], accelerator_type="NVIDIA_TESLA_T4")], "'accelerator_count' should be specified or none"),
        ([{**pool(["true"]), "disk_spec": {"boot_disk_size_gb": 50}}], "boot_disk_size_gb"),
        ([pool(["true"], image="us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest")], "a prediction image"),
    ],
)
def test_what_google_has_no_machine_for_is_refused_before_it_runs(job, pools, words):
    from google.api_core.exceptions import InvalidArgument

    with pytest.raises((InvalidArgument, ValueError), match=words):
        job(*pools).run()


def test_a_gpu_on_a_machine_that_takes_it_is_accepted(job):
    job(pool(["true"], accelerator_type="NVIDIA_TESLA_T4", accelerator_count=1)).run()


def test_the_output_has_to_be_in_the_region_of_the_job(cloud, job):
    from google.api_core.exceptions import FailedPrecondition
    from google.cloud import storage

    storage.Client().create_bucket("far-away", location="us")
    with pytest.raises(FailedPrecondition, match=r"is in location 'us'\. It must be in the same regional location"):
        job(pool(["true"]), base_output_dir="gs://far-away/x").run()
    with pytest.raises(FailedPrecondition, match="does not exist"):
        job(pool(["true"]), base_output_dir="gs://not-there-at-all/x").run()


def test_an_image_without_a_command_needs_a_container_engine(job):
    made = job(pool([], image="us-central1-docker.pkg.dev/p/r/unknown:1"))
    with pytest.raises(RuntimeError, match="has no command"):
        made.run()


def test_a_script_becomes_a_model(cloud, tmp_path):
    from google.cloud import aiplatform

    script = tmp_path / "task.py"
    script.write_text(
        textwrap.dedent("""
            import argparse, os, pathlib, numpy, joblib
            from sklearn.linear_model import LinearRegression
            parser = argparse.ArgumentParser()
            parser.add_argument("--slope", type=float)
            slope = parser.parse_args().slope
            x = numpy.arange(10.0).reshape(-1, 1)
            folder = pathlib.Path(os.environ["AIP_MODEL_DIR"].replace("gs://", "/gcs/"))
            folder.mkdir(parents=True)
            joblib.dump(LinearRegression().fit(x, slope * x[:, 0]), folder / "model.joblib")
            assert os.environ["HELLO"] == "world"
        """)
    )
    made = aiplatform.CustomTrainingJob(
        display_name="script",
        script_path=str(script),
        container_uri=IMAGE,
        requirements=["scikit-learn"],
        model_serving_container_image_uri="us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest",
    )
    model = made.run(args=["--slope", "3"], environment_variables={"HELLO": "world"}, model_display_name="by script")
    assert model.display_name == "by script"
    assert model.uri.endswith("/model")
    assert made.state.name == "PIPELINE_STATE_SUCCEEDED"
    assert made.get_model().resource_name == model.resource_name
    backing = aiplatform.CustomJob.list(filter='display_name="script-custom-job"')
    assert [job.state.name for job in backing] == ["JOB_STATE_SUCCEEDED"]
    model.delete()


def test_a_training_that_saves_its_model_elsewhere_says_so(tmp_path):
    from google.cloud import aiplatform

    script = tmp_path / "task.py"
    script.write_text("open('model.joblib', 'w').write('here')")
    made = aiplatform.CustomTrainingJob(
        display_name="elsewhere",
        script_path=str(script),
        container_uri=IMAGE,
        model_serving_container_image_uri="us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest",
    )
    with pytest.raises(RuntimeError, match="There are no files under"):
        made.run(model_display_name="nothing")


def test_a_custom_container_job_installs_its_package_by_pip(cloud, tmp_path, caplog):
    """The SDK wraps a script for an image of one's own in `pip install --upgrade pip && pip3 install --user ...`."""
    from google.cloud import aiplatform

    script = tmp_path / "task.py"
    script.write_text("import sys; print('prefix', sys.prefix); assert 'venv' in sys.prefix")
    made = aiplatform.CustomTrainingJob(
        display_name="own image", script_path=str(script), container_uri="us-central1-docker.pkg.dev/p/r/own:1"
    )
    assert made.run() is None
    assert "Training did not produce a Managed Model returning None." in caplog.text
    assert "Create the Training Pipeline with model_serving_container_image_uri and model_display_name" in caplog.text
    assert made.state.name == "PIPELINE_STATE_SUCCEEDED"


def wait_until(is_met, seconds=30):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
