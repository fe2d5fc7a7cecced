"""Where code runs, and the one line that decides which cloud it talks to."""

import json
import os
import subprocess
import sys

import pytest

from helpers import environment

SIGNS = (
    *("CLOUD_ML_JOB_ID", "CLUSTER_SPEC", "CLOUD_ML_PROJECT_ID", "AIP_MODE", "VERTEX_PRODUCT"),
    *("COLAB_RELEASE_TAG", "CLOUD_SHELL", "GOOGLE_CLOUD_SHELL", "DEVSHELL_PROJECT_ID"),
)


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ("prediction container", {"AIP_MODE": "PREDICTION", "CLOUD_ML_PROJECT_ID": "1"}),
        ("training job", {"CLOUD_ML_JOB_ID": "1", "VERTEX_PRODUCT": "COLAB_ENTERPRISE"}),
        ("training job", {"CLUSTER_SPEC": "{}"}),
        ("Colab Enterprise", {"VERTEX_PRODUCT": "COLAB_ENTERPRISE", "COLAB_RELEASE_TAG": "release"}),
        ("Workbench", {"VERTEX_PRODUCT": "WORKBENCH_INSTANCE"}),
        ("Workbench", {"VERTEX_PRODUCT": "WORKBENCH_CUSTOM_CONTAINER"}),
        ("Colab", {"COLAB_RELEASE_TAG": "release"}),
        ("Cloud Shell", {"CLOUD_SHELL": "true"}),
        ("Cloud Shell", {"DEVSHELL_PROJECT_ID": "p"}),
    ],
)
def test_places_are_told_apart(monkeypatch, place, variables):
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.where_am_i() == place


@pytest.mark.parametrize(("machine", "place"), [("Google Compute Engine\n", "Compute Engine"), ("Other", "laptop")])
def test_a_machine_tells_who_made_it(monkeypatch, tmp_path, machine, place):
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "product_name").write_text(machine)
    monkeypatch.setattr(environment, "MACHINE_NAME", tmp_path / "product_name")
    assert environment.where_am_i() == place
    monkeypatch.setattr(environment, "MACHINE_NAME", tmp_path / "nothing")
    assert environment.where_am_i() == "laptop"


def run(code, **variables):
    """Run Python in a process of its own and return the JSON value that it prints last."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_each_place_for_notebooks_serves_some_needs_better():
    frame = environment.notebooks()
    places = {"Colab Enterprise", "Workbench"}
    assert set(frame.columns) == places | {"better"}
    assert set(frame.better) == places | {""}
    assert frame.index.is_unique
    assert frame[list(places)].map(bool).all(axis=None)


def test_connecting_shows_the_cloud_and_what_runs_there(cloud):
    assert cloud.is_local
    assert cloud.bucket == f"gs://{cloud.project}-{cloud.region}-course"
    for text in (repr(cloud), cloud._repr_html_()):
        assert "the local cloud on this machine" in text
        assert cloud.project in text
        assert cloud.bucket in text


def test_what_runs_is_shown_with_its_price(cloud):
    from google.cloud import aiplatform

    from helpers import costs

    pool = {
        "machine_spec": {"machine_type": "n1-standard-4"},
        "replica_count": 1,
        "container_spec": {
            "image_uri": "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest",
            "command": ["sleep", "600"],
        },
    }
    job = aiplatform.CustomJob(display_name="priced", worker_pool_specs=[pool])
    job.submit()
    assert "priced" in repr(cloud)
    assert "would cost" in repr(cloud)
    assert any(item.name == "priced" and item.hourly > 0 for item in costs.running(cloud.project, cloud.region))
    job.cancel()


def test_subprocesses_are_led_to_the_same_cloud(cloud):
    from google.cloud import storage

    storage.Client().bucket(cloud.bucket.removeprefix("gs://")).blob("from-the-parent").upload_from_string("hello")
    code = f"""
import json
from google.cloud import storage
print(json.dumps(storage.Client().bucket({cloud.bucket.removeprefix("gs://")!r}).blob("from-the-parent").download_as_text()))
"""
    assert run(code) == "hello"


def test_tensorflow_reads_and_writes_the_buckets(cloud):
    code = f"""
import json
import helpers
import tensorflow as tf
folder = {cloud.bucket!r} + "/from-tensorflow"
path = folder + "/a.txt"
tf.io.gfile.makedirs(folder)
with tf.io.gfile.GFile(path, "w") as file:
    file.write("hello " * 1000)
import keras
network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
network.export(folder + "/export", verbose=False)
loaded = tf.saved_model.load(folder + "/export")
same = float(abs(loaded.serve(tf.ones((1, 2))) - network(tf.ones((1, 2))))[0, 0])
print(json.dumps([len(tf.io.gfile.GFile(path).read()), sorted(tf.io.gfile.listdir(folder)), same]))
"""
    length, names, difference = run(code)
    assert length == 6000
    assert names == ["a.txt", "export/"]
    assert difference < 1e-6


def test_disconnecting_leaves_the_process_as_it_was(cloud):
    """In a process of its own, which starts outside of the cloud."""
    from helpers.local import client

    code = """
import json, os
before = dict(os.environ)
from helpers import environment
environment.connect()
during = dict(os.environ)
environment.connect()
environment.disconnect()
from google.cloud.aiplatform import initializer
print(json.dumps([before == dict(os.environ), before == during, initializer.global_config._project]))
"""
    outside = client.original() | {"LOCAL_CLOUD_FOLDER": os.environ["LOCAL_CLOUD_FOLDER"]}
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, None]


def test_with_a_project_the_credentials_bucket_and_region_of_google_cloud_are_used(cloud):
    """The way to Google Cloud, walked with everything but Google: the variables lead here, and nothing says so."""
    code = """
import json, os
from helpers import environment
from helpers.local import client
for name in (client.MARK, client.MARK + "_BEFORE"):
    os.environ.pop(name)
import helpers.local
helpers.local.PROJECT = "another name for the local one"
cloud = environment.connect(project="local-project", region="europe-west4")
from google.cloud import storage
from google.cloud.aiplatform import initializer
print(json.dumps([cloud.is_local, cloud.bucket, storage.Client().get_bucket(cloud.bucket[5:]).location,
    initializer.global_config.location, initializer.global_config.staging_bucket]))
"""
    bucket = "gs://local-project-europe-west4-course"
    assert run(code) == [False, bucket, "EUROPE-WEST4", "europe-west4", bucket]


def test_without_credentials_it_says_how_to_get_some(tmp_path):
    code = """
import json
from helpers import environment
try:
    environment.connect(project="my-project")
except environment.ConnectError as error:
    print(json.dumps(str(error)))
"""
    from helpers.local import client

    empty = client.original() | {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
    empty.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    done = subprocess.run([sys.executable, "-c", code], env=empty, capture_output=True, text=True)
    assert "gcloud auth application-default login" in done.stdout, done.stderr


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code = """
import json
from helpers import environment
try:
    environment.connect()
except environment.ConnectError as error:
    print(json.dumps(str(error)))
"""
    said = run(code, LOCAL_CLOUD_FOLDER=str(tmp_path / "file" / "cloud"))
    assert "LOCAL_CLOUD_FOLDER" in said
