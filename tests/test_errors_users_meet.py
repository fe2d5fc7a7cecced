"""Errors that everyone meets on Vertex AI, met here: Google's words through the unmodified SDK, and the way out.

helpers/README.md lists all 37, and for each where it is prevented or explained, and where it is tested.
"""

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import echo_server
import pytest

from helpers.local import client

TRAINING = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
SERVING = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
OWN = "us-central1-docker.pkg.dev/p/r/own:1"
MACHINE = {"machine_type": "n1-standard-4", "min_replica_count": 1, "max_replica_count": 1}
README = Path(__file__).parents[1] / "helpers/README.md"


@pytest.fixture
def refuse(cloud):
    """Return a function that makes the cloud a project in which something is missing; it is whole again at the end."""
    file = client.folder() / "refusals.json"
    yield lambda **what: file.write_text(json.dumps(what))
    file.unlink(missing_ok=True)


def job(command=("true",), region=None, **machine):
    """Return a custom job of one machine that runs a command."""
    from google.cloud import aiplatform

    pool = {
        "machine_spec": {"machine_type": "n1-standard-4", **machine},
        "replica_count": 1,
        "container_spec": {"image_uri": TRAINING, "command": list(command)},
    }
    bucket = f"gs://local-project-{region}-course" if region else None
    return aiplatform.CustomJob("a job", [pool], location=region, staging_bucket=bucket)


def python(source):
    """Return the command that runs a piece of Python."""
    return ["python3", "-c", textwrap.dedent(source)]


def failure(command):
    """Run a job that fails, and return its error."""
    with pytest.raises(RuntimeError) as failed:
        job(command).run()
    return str(failed.value)


def script_job(tmp_path, source="pass", **options):
    """Return a training job of a script."""
    from google.cloud import aiplatform

    (tmp_path / "task.py").write_text(source)
    return aiplatform.CustomTrainingJob("script", str(tmp_path / "task.py"), TRAINING, **options)


# Setting up, and who one is


def test_a_job_needs_a_bucket_which_connect_gives_it(cloud, monkeypatch):
    from google.cloud.aiplatform import initializer

    assert initializer.global_config.staging_bucket == cloud.bucket
    monkeypatch.setattr(initializer.global_config, "_staging_bucket", None)
    with pytest.raises(RuntimeError, match="staging_bucket should be passed to CustomJob constructor or"):
        job()


def test_no_project_and_no_such_region(cloud, monkeypatch):
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import aiplatform
    from google.cloud.aiplatform import initializer

    from helpers import hardware

    with pytest.raises(ValueError, match="Unsupported region for Vertex AI, select from"):
        aiplatform.init(location="us-centrall1")
    with pytest.raises(hardware.HardwareError, match="Did you mean 'us-central1'"):
        hardware.check("n1-standard-4", region="us-centrall1")
    for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUD_ML_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    for name in ("_project", "_credentials"):
        monkeypatch.setattr(initializer.global_config, name, None)
    with pytest.raises(GoogleAuthError, match=r"Unable to find your project\. Please provide a project ID by:"):
        assert initializer.global_config.project


def test_an_api_that_is_disabled_and_a_permission_that_is_missing(refuse):
    from google.api_core.exceptions import PermissionDenied

    api = "aiplatform.googleapis.com"
    refuse(disabled_apis=[api])
    with pytest.raises(PermissionDenied) as refused:
        job().run()
    assert "Agent Platform API has not been used in project 123456789012 before or it is disabled. " in str(
        refused.value
    )
    assert f"https://console.developers.google.com/apis/api/{api}/overview?project=123456789012" in str(refused.value)
    assert f"gcloud services enable {api} --project=local-project" in str(refused.value)
    refuse(missing_permissions=["aiplatform.customJobs.create"])
    with pytest.raises(PermissionDenied, match=r"Permission 'aiplatform.customJobs.create' denied on resource '//aip"):
        job().run()
    refuse()
    job().run()


def test_acting_as_a_service_account(refuse):
    from google.api_core.exceptions import PermissionDenied

    refuse(missing_permissions=["iam.serviceAccounts.actAs"])
    with pytest.raises(PermissionDenied) as refused:
        job().run(service_account="trainer@local-project.iam.gserviceaccount.com")
    assert (
        "You do not have permission to act as service account: trainer@local-project.iam.gserviceaccount.com. (or it "
        "may not exist)."
    ) in str(refused.value)
    assert "roles/iam.serviceAccountUser" in str(refused.value)
    job().run()


def test_a_job_that_is_told_no_project_finds_the_one_that_google_runs_it_in(cloud):
    said = failure(python("from google.cloud import bigquery; print(bigquery.Client().query('SELECT 1').result())"))
    assert "Access Denied: Project local-tenant-tp: User does not have bigquery.jobs.create permission" in said
    job(
        python("""
            import os
            from google.cloud import bigquery
            rows = bigquery.Client(project=os.environ["CLOUD_ML_PROJECT_ID"]).query("SELECT 1 AS one").result()
            assert [row.one for row in rows] == [1]
        """)
    ).run()


# Sending a job


def test_an_accelerator_is_given_by_its_name(cloud, tmp_path):
    from google.cloud import aiplatform

    for wrong in ("NVIDIA_TESLA_L4", aiplatform.gapic.AcceleratorType.NVIDIA_L4):
        with pytest.raises(ValueError, match=r"Given accelerator_type `.*` invalid. Choose one of"):
            script_job(tmp_path).run(accelerator_type=wrong, accelerator_count=1, machine_type="g2-standard-4")


@pytest.mark.parametrize(
    ("machine", "metric"),
    [
        (
            {"machine_type": "g2-standard-4", "accelerator_type": "NVIDIA_L4", "accelerator_count": 1},
            "custom_model_training_nvidia_l4_gpus",
        ),
        ({"machine_type": "n1-standard-16"}, "custom_model_training_cpus"),
        ({"machine_type": "n2-standard-4"}, "custom_model_training_n2_cpus"),
    ],
)
def test_too_small_a_quota(refuse, machine, metric):
    from google.api_core.exceptions import ResourceExhausted

    refuse(quotas={metric: 0 if "16" not in machine["machine_type"] else 8})
    with pytest.raises(ResourceExhausted) as refused:
        job(**machine).run()
    assert f"429 The following quota metrics exceed quota limits: aiplatform.googleapis.com/{metric}" in str(
        refused.value
    )
    assert "Ask for quota of the Agent Platform API" in str(refused.value)
    job().run()


def test_a_project_without_accelerators_trains_on_cpus(refuse):
    from google.api_core.exceptions import InvalidArgument

    refuse(no_accelerators=True)
    with pytest.raises(InvalidArgument) as refused:
        job(accelerator_type="NVIDIA_TESLA_T4", accelerator_count=1).run()
    assert (
        "List of found errors: 1.Field: job_spec.worker_pool_specs[0].machine_spec.accelerator_count; Message: "
        "Accelerators are not supported for this project."
    ) in str(refused.value)
    job().run()


def test_a_region_without_capacity_and_the_next_one(refuse):
    from google.cloud import storage

    refuse(no_capacity={"us-central1": ["NVIDIA_TESLA_T4"]})
    storage.Client().create_bucket("local-project-us-east1-course", location="us-east1")
    t4 = {"accelerator_type": "NVIDIA_TESLA_T4", "accelerator_count": 1}
    first = job(**t4)
    with pytest.raises(RuntimeError) as failed:
        first.run()
    words = "Resources are insufficient in region: us-central1. Try a different region or use a different accelerator."
    assert words in str(failed.value)
    assert first.error.code == 8
    job(region="us-east1", **t4).run()
    job().run()


def test_a_trial_that_finds_no_machine_fails_the_tuning_job(refuse):
    from google.cloud import aiplatform
    from google.cloud.aiplatform import hyperparameter_tuning as tuning

    refuse(no_capacity={"us-central1": ["n1-standard-4"]})
    search = aiplatform.HyperparameterTuningJob(
        "no machines",
        job(),
        metric_spec={"loss": "minimize"},
        parameter_spec={"x": tuning.DoubleParameterSpec(0, 1, "linear")},
        max_trial_count=1,
        parallel_trial_count=1,
    )
    with pytest.raises(RuntimeError, match="Resources are insufficient in region: us-central1"):
        search.run()


def test_a_script_that_cannot_be_packaged(cloud, monkeypatch, tmp_path):
    (tmp_path / "setuptools.py").write_text("raise ImportError('no setuptools here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)Packaging of training script failed with code 1.*no setuptools here"):
        script_job(tmp_path).run()


# While it runs


def test_a_module_that_is_missing_is_in_the_last_lines_of_the_error(cloud):
    said = failure(python("import a_module_that_is_missing"))
    assert "The replica workerpool0-0 exited with a non-zero status of 1. Termination reason: Error." in said
    assert re.search(r"ModuleNotFoundError: No module named .*a_module_that_is_missing", said)


def test_a_replica_that_is_killed_ran_out_of_memory(cloud):
    said = failure(python("import os; os.kill(os.getpid(), 9)"))
    assert "The replica workerpool0-0 ran out of memory and exited with a non-zero status of 137." in said


def test_variables_that_are_not_always_there(cloud, monkeypatch):
    """One replica has no TF_CONFIG, and a notebook no AIP_MODEL_DIR: what the trainer expects of both."""
    from helpers.trainer import loop, task

    assert re.search(r"KeyError: .*TF_CONFIG", failure(python("import os; os.environ['TF_CONFIG']")))
    for name in ("TF_CONFIG", "AIP_MODEL_DIR", "CLUSTER_SPEC", "CLOUD_ML_JOB_ID", "CLOUD_ML_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError, match="AIP_MODEL_DIR"):
        assert os.environ["AIP_MODEL_DIR"]
    assert loop.workers() == ([], 0)
    assert task.parse(["--dataset", "penguins"]).model_dir is None


def test_a_model_needs_a_serving_image(cloud, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)model_display_name was provided but\s+model_serving_container_image"):
        script_job(tmp_path).run(model_display_name="a model")


# Uploading and deploying


def test_a_model_below_its_folder_is_not_found(cloud, tmp_path):
    """As TensorFlow Serving wants its versions, in a folder 1/, and Vertex AI does not: of a folder the SDK says so."""
    from google.api_core.exceptions import FailedPrecondition
    from google.cloud import aiplatform, storage

    def upload(uri):
        image = "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"
        aiplatform.Model.upload(display_name="versioned", artifact_uri=uri, serving_container_image_uri=image)

    (tmp_path / "1").mkdir()
    (tmp_path / "1/saved_model.pb").touch()
    with pytest.raises(ValueError, match="artifact_uri directory does not contain any supported model files"):
        upload(str(tmp_path))
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("versioned/1/saved_model.pb").upload_from_string(b"a model")
    with pytest.raises(FailedPrecondition, match=r"which have to be directly in it: saved_model\.pb"):
        upload(f"{cloud.bucket}/versioned")


def test_the_storage_uri_of_a_container_is_no_path(cloud):
    from google.cloud import aiplatform, storage

    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("encoder/ohe.joblib").upload_from_string(b"an encoder")
    model = aiplatform.Model.upload(
        display_name="opens",
        artifact_uri=f"{cloud.bucket}/encoder",
        serving_container_image_uri=OWN,
        serving_container_command=["python3", "-c", "import os; open(os.environ['AIP_STORAGE_URI'] + '/ohe.joblib')"],
    )
    endpoint = aiplatform.Endpoint.create("opens")
    with pytest.raises(Exception, match=r"FileNotFoundError: .*'gs://caip-tenant-.*/ohe.joblib'"):
        model.deploy(endpoint=endpoint, **MACHINE)
    endpoint.delete()
    model.delete()


# Predicting


@pytest.fixture(scope="module")
def endpoint(cloud):
    """Return an endpoint with two models that answer with what they are asked; the first gets all requests."""
    from google.cloud import aiplatform

    model = aiplatform.Model.upload(
        display_name="echo",
        serving_container_image_uri=OWN,
        serving_container_command=[sys.executable, "-c", echo_server.SOURCE],
    )
    endpoint = aiplatform.Endpoint.create("echo")
    model.deploy(endpoint=endpoint, deployed_model_display_name="first", **MACHINE)
    model.deploy(endpoint=endpoint, deployed_model_display_name="second", traffic_percentage=0, **MACHINE)
    yield endpoint
    endpoint.delete(force=True)
    model.delete()


def test_only_python_numbers_travel(endpoint):
    import numpy as np

    row = np.float32([1.5, 2.5])
    with pytest.raises(TypeError, match=r"ndarray|float32"):
        endpoint.predict(instances=[row])
    assert endpoint.predict(instances=[row.tolist()]).predictions == [[1.5, 2.5]]
    body = json.dumps({"instances": [row.tolist()]}).encode()
    assert endpoint.raw_predict(body, {"Content-Type": "application/json"}).json()["predictions"] == [[1.5, 2.5]]


def test_a_dedicated_endpoint_has_its_host_when_a_model_is_there(endpoint):
    """As the SDK reads it before a model is deployed; it is there when the endpoint is read again after that."""
    from google.cloud import aiplatform

    early = aiplatform.Endpoint.create("early", dedicated_endpoint_enabled=True)
    with pytest.raises(ValueError, match=r"Dedicated endpoint DNS is empty\. Please make sure endpoint"):
        early.predict(instances=[1])
    aiplatform.Model(endpoint.list_models()[0].model).deploy(endpoint=early, **MACHINE)
    assert aiplatform.Endpoint(early.resource_name).predict(instances=[1]).predictions == [1]
    early.delete(force=True)


# Traffic


def test_traffic_adds_up_to_100(endpoint):
    from google.cloud import aiplatform

    ids = {deployed.display_name: deployed.id for deployed in endpoint.list_models()}
    endpoint = aiplatform.Endpoint(endpoint.resource_name)
    assert endpoint.traffic_split == {ids["first"]: 100, ids["second"]: 0}
    with pytest.raises(ValueError, match="would leave the remaining traffic split at 0%"):
        endpoint.undeploy(ids["first"])
    with pytest.raises(ValueError, match="Sum of all traffic within traffic split needs to be 100"):
        endpoint.undeploy(ids["first"], traffic_split={ids["second"]: 50})
    assert len(endpoint.list_models()) == 2


# The table


def rows():
    """Return the rows of the table of errors: number, error, what is done about it, tests."""
    lines = [line.split(" | ") for line in README.read_text().splitlines() if re.match(r"\| \d+ \| ", line)]
    return [(int(number.strip("| ")), *(cell.strip("| ") for cell in cells)) for number, *cells in lines]


def test_the_table_has_all_37_errors_each_prevented_or_explained():
    assert [row[0] for row in rows()] == list(range(1, 38))
    for number, error, done, tested in rows():
        assert error, number
        assert re.search(r"`[\w.]+(\(.*?\))?`|[Ll]esson \d", done), number
        assert "::" in tested or tested.startswith("not here: "), number


def test_the_tests_that_the_table_names_are_there():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", README.read_text())
    assert len(named) > 37
    for module, name in named:
        text = (Path(__file__).parent / f"{module}.py").read_text()
        assert f"\ndef {name}(" in text, f"{module}::{name}"


def test_the_functions_that_the_table_names_are_there():
    import importlib

    text = README.read_text()
    for module, name in re.findall(r"`(approach|containers|costs|data|environment|hardware)\.(\w+)", text):
        assert hasattr(importlib.import_module(f"helpers.{module}"), name), f"{module}.{name}"


def test_every_module_has_its_sentence():
    package = README.parent
    modules = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    text = README.read_text()
    for name in [*modules, *folders]:
        assert f"`{name}`" in text, name
