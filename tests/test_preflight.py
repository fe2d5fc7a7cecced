"""What is missing in a project is found before a job is sent, and its command named: asked of a cloud that refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import date

import pytest

from helpers import containers, environment, preflight
from helpers.local import client

PROJECT = "--project=local-project"
GRANT = (
    "gcloud projects add-iam-policy-binding local-project "
    "--member=serviceAccount:local@local-project.iam.gserviceaccount.com --role="
)


@pytest.fixture
def refuse(cloud):
    """Return a function that makes the cloud a project in which something is missing; it is whole again at the end."""
    file = client.folder() / "refusals.json"

    def refuse(**what):
        file.write_text(json.dumps(what))

    yield refuse
    file.unlink(missing_ok=True)


def missing(name, region="us-central1"):
    """Return the findings of a name that are missing; fail if the preflight as a whole says that all is well."""
    found = environment.preflight(region=region)
    assert not found
    return [finding for finding in found.missing if finding.name == name]


def test_a_project_that_lacks_nothing_is_true_and_shows_itself(cloud):
    found = environment.preflight()
    assert found
    assert found.missing == []
    assert {finding.name: finding.state for finding in found.findings if finding.state != "note"} == dict.fromkeys(
        ("credentials", "APIs", "permissions", "bucket", "quota, training", "quota, prediction", "setuptools", "disk"),
        "ok",
    )
    for text in (repr(found), found._repr_html_()):
        assert "local-project in us-central1 is ready." in text
        assert cloud.bucket in text


def test_commands_are_shown_in_a_notebook_as_they_are_typed(refuse):
    refuse(missing_permissions=["storage.buckets.create"], quotas={"custom_model_training_cpus": 0})
    found = environment.preflight()
    assert "2 to mend" in repr(found)
    for finding in found.missing:
        assert f"\n        {finding.command}\n" in repr(found)
        assert shlex.split(finding.command)[0] == "gcloud"
    assert "<code>gcloud beta quotas" in found._repr_html_()
    assert "&quot;$(gcloud beta quotas info list" in found._repr_html_()


@pytest.mark.parametrize("api", ["aiplatform.googleapis.com", "bigquery.googleapis.com"])
def test_a_disabled_api(refuse, api):
    refuse(disabled_apis=[api])
    (finding,) = missing("APIs")
    assert finding.text.startswith(f"{api} is disabled")
    assert finding.command == f"gcloud services enable {api} {PROJECT}"


@pytest.mark.parametrize(
    ("api", "name"),
    [
        ("serviceusage.googleapis.com", "APIs"),
        ("cloudresourcemanager.googleapis.com", "permissions"),
        ("storage.googleapis.com", "bucket"),
    ],
)
def test_an_api_without_which_nothing_can_be_asked(refuse, api, name):
    refuse(disabled_apis=[api])
    (finding,) = missing(name)
    assert "has not been used in project 123456789012 before or it is disabled" in finding.text
    assert finding.command == f"gcloud services enable {api} {PROJECT}"


@pytest.mark.parametrize(
    ("permission", "role"),
    [(permission, role) for role, group in preflight.PERMISSIONS.items() for permission in group[:1]]
    + [("iam.serviceAccounts.actAs", "roles/iam.serviceAccountUser")],
)
def test_a_missing_permission(refuse, permission, role):
    refuse(missing_permissions=[permission])
    finding = missing("permissions")[0]
    assert finding.command == GRANT + role
    assert permission in finding.text or permission == "serviceusage.services.use"


def test_a_caller_who_may_not_use_the_project_is_told_the_role(refuse):
    refuse(missing_permissions=["serviceusage.services.use"])
    findings = environment.preflight().missing
    assert {finding.name for finding in findings} == {"APIs", "permissions", "bucket"}
    for finding in findings:
        assert "Caller does not have required permission to use project local-project" in finding.text
        assert finding.command == GRANT + "roles/serviceusage.serviceUsageConsumer"


def test_a_bucket_that_may_not_be_looked_at_or_made(refuse):
    make = f"gcloud storage buckets create gs://local-project-us-west1-course {PROJECT} --location=us-west1"
    refuse(missing_permissions=["storage.buckets.get"])
    assert missing("bucket", "us-west1")[0].command == GRANT + "roles/storage.admin"
    refuse(missing_permissions=["storage.buckets.create"])
    assert missing("bucket", "us-west1")[0].command == make
    refuse()
    finding = next(one for one in environment.preflight(region="us-west1").findings if one.name == "bucket")
    assert finding == preflight.Finding(
        "bucket", "ok", "gs://local-project-us-west1-course is made by environment.connect, in us-west1"
    )


def test_a_bucket_in_another_region_is_not_deleted_with_what_it_holds(cloud):
    from google.cloud import storage

    name = "local-project-europe-west1-course"
    bucket = storage.Client().create_bucket(name, location="us")
    (finding,) = missing("bucket", "europe-west1")
    assert f"gs://{name} is in us, and jobs in europe-west1 need one in europe-west1" in finding.text
    assert finding.command == (
        f"gcloud storage buckets delete gs://{name} && "
        f"gcloud storage buckets create gs://{name} {PROJECT} --location=europe-west1"
    )
    bucket.delete()


def test_too_small_a_quota_of_cpus(refuse):
    refuse(quotas={"custom_model_training_cpus": 2})
    (finding,) = missing("quota, training")
    assert finding.text == "2 CPUs in us-central1, and one n1-standard-4 needs 4"
    assert "--filter=metric=aiplatform.googleapis.com/custom_model_training_cpus" in finding.command
    assert finding.command.endswith("--preferred-value=8 --dimensions=region=us-central1")


def test_gpus_are_not_needed(refuse):
    refuse(quotas={"custom_model_training_nvidia_t4_gpus": 0})
    found = environment.preflight()
    assert found
    assert "the course trains on CPUs" in repr(found)


def test_a_quota_that_cannot_be_read_is_that_of_a_new_project_on_a_day(refuse):
    refuse(missing_permissions=["serviceusage.quotas.get"])
    found = environment.preflight(region="us-west2")
    assert "a new project has 20 N1 and E2 CPUs (on 2026-08-22), one n1-standard-4 needs 4" in repr(found)


def test_an_image_whose_days_are_over_is_replaced_by_ones_own(cloud):
    for purpose in ("training", "prediction"):
        image = containers.prebuilt("tensorflow", purpose)
        finding = next(one for one in environment.preflight().findings if one.name == f"image, {purpose}")
        assert (finding.state == "note") == bool(image.warning(date.today()))
        assert bool(finding.command) == (not image.is_available())
        if finding.command:
            assert re.search(r"gcloud artifacts repositories create .*; gcloud builds submit ", finding.command)


def test_without_setuptools_no_script_is_packaged(cloud, monkeypatch, tmp_path):
    (tmp_path / "setuptools.py").write_text("raise ImportError('none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = missing("setuptools")
    assert finding.command == f"{sys.executable} -m pip install setuptools"


def test_a_full_disk(cloud, monkeypatch):
    monkeypatch.setattr(preflight, "DISK_GB", 10**9)
    (finding,) = missing("disk")
    assert "1000000000 are needed" in finding.text


def test_an_unknown_region_is_answered_with_the_nearest(cloud):
    with pytest.raises(ValueError, match="Did you mean 'us-central1'"):
        environment.preflight(region="us-centrall1")


def alone(code, **variables):
    """Run Python that is led to no local cloud, without credentials, and return what it prints."""
    nobody = {"NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": "/nowhere", "HOME": "/nowhere"}
    outside = {name: value for name, value in client.original().items() if name != "GOOGLE_APPLICATION_CREDENTIALS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=outside | nobody | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_credentials_it_says_how_to_get_some_and_asks_nothing():
    said = alone("from helpers import environment; print(environment.preflight('my-project'))")
    assert "missing credentials       google-auth finds none\n        gcloud auth application-default login" in said
    assert "asked when you are known" in said
    assert "1 to mend" in said


def test_credentials_that_are_not_accepted(cloud, tmp_path):
    """A key that this cloud did not make: its token endpoint refuses it, as Google's would."""
    from helpers.local.identity import Identity

    stranger = Identity(tmp_path / "other", "local-project").account_file
    led = {name: os.environ[name] for name in (*client.PROXY_VARIABLES, *client.CA_VARIABLES)}
    said = alone(
        "import helpers.local; helpers.local.PROJECT = 'another name for the local one';"
        "from helpers import environment; print(environment.preflight('local-project'))",
        GOOGLE_APPLICATION_CREDENTIALS=str(stranger),
        **led,
    )
    assert "those that are there are not accepted" in said
    assert "Invalid JWT Signature" in said
    assert "gcloud auth application-default login" in said


# The aid itself


def test_a_file_of_refusals_that_cannot_be_followed_is_named(refuse):
    from google.api_core.exceptions import GoogleAPICallError
    from google.cloud import aiplatform

    refuse(disabled=["aiplatform.googleapis.com"])
    with pytest.raises(GoogleAPICallError, match=r"refusals\.json holds the unknown keys disabled"):
        aiplatform.Model.list()
    (client.folder() / "refusals.json").write_text("{")
    with pytest.raises(GoogleAPICallError, match=r"refusals\.json is not JSON"):
        aiplatform.Model.list()


def test_a_permission_that_is_missing_is_refused_where_it_is_needed(refuse):
    """What the preflight asks for is what the clients then meet: here some calls of each service."""
    from google.api_core.exceptions import Forbidden
    from google.cloud import aiplatform, bigquery, storage

    name = "local-project-us-central1-course"
    calls = {
        "aiplatform.endpoints.create": lambda: aiplatform.Endpoint.create("refused"),
        "storage.objects.create": lambda: storage.Client().bucket(name).blob("a").upload_from_string("a"),
        "storage.objects.list": lambda: list(storage.Client().list_blobs(name)),
        "storage.buckets.create": lambda: storage.Client().create_bucket("refused-bucket"),
        "bigquery.jobs.create": lambda: bigquery.Client().query("SELECT 1").result(),
        "bigquery.datasets.create": lambda: bigquery.Client().create_dataset("refused"),
    }
    for permission, call in calls.items():
        refuse(missing_permissions=[permission])
        with pytest.raises(Forbidden, match=re.escape(permission)):
            call()
        assert any(permission in group for group in preflight.PERMISSIONS.values())


def test_the_sdk_of_resource_manager_gets_the_same_answer(refuse):
    from google.cloud import resourcemanager_v3

    refuse(missing_permissions=["a.b.c"])
    projects = resourcemanager_v3.ProjectsClient()
    answer = projects.test_iam_permissions(resource="projects/local-project", permissions=["a.b.c", "a.b.d"])
    assert list(answer.permissions) == ["a.b.d"]
    with pytest.raises(Exception, match="Permission denied on resource project other"):
        projects.test_iam_permissions(resource="projects/other", permissions=["a.b.c"])
