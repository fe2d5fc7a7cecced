"""What lesson 9 builds on: the locked JAX and TensorFlow fit, and training does not depend on the number of devices."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers import data, parity

SOME = data.split("diamonds")[1].head(5)  # which both models are asked for

EXPORT = """
import sys

import helpers
import keras

from helpers import parity
from helpers.trainer import task_jax

task = parity.task()
predict = task_jax.network("relu", *task.features.target_scale)
task.features.attach(keras.layers.JaxLayer(predict, params=task.weights)).export(sys.argv[1], verbose=False)
"""
LOAD = """
import json, sys

import helpers
import tensorflow as tf

from helpers import data, parity

served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
(predicted,) = served(**parity.task().features.raw(data.split("diamonds")[1].head(5))).values()
assert "jax2tf" not in " ".join(sys.modules), "this process knows JAX itself"
print(json.dumps(predicted.numpy().tolist()))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a JAX function in a process; return the folder, and what the function predicts by NumPy."""
    folder = tmp_path_factory.mktemp("jax") / "model"
    python(EXPORT, folder)
    task = parity.task()
    hidden = task.features.encode(SOME)
    for kernel, bias in task.weights[:-1]:
        hidden = np.maximum(hidden @ kernel + bias, 0)
    kernel, bias = task.weights[-1]
    mean, deviation = task.features.target_scale
    return folder, (hidden @ kernel + bias) * deviation + mean


def python(code, *arguments, **environment):
    """Run code in a process of its own; return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


# The pair of versions in the lock: what one exports, the other runs


def test_tensorflow_runs_in_another_process_what_jax_exported(exported):
    folder, expected = exported
    np.testing.assert_allclose(json.loads(python(LOAD, folder).splitlines()[-1]), expected, rtol=1e-5)


def test_an_endpoint_serves_what_jax_exported(exported, cloud):
    """With the server that stands for Google's image of TensorFlow, and with the course's own container."""
    import tensorflow as tf
    from google.cloud import aiplatform

    from helpers import containers

    folder, expected = exported
    for path in (path for path in folder.rglob("*") if path.is_file()):
        tf.io.gfile.copy(str(path), f"{cloud.bucket}/test-jax/{path.relative_to(folder)}", overwrite=True)
    columns = [*data.DATASETS["diamonds"].numeric, *data.DATASETS["diamonds"].categorical]
    stones = json.loads(SOME[columns].to_json(orient="records"))
    instances = [{name: [value] for name, value in stone.items()} for stone in stones]
    own = containers.image_uri(cloud.project, region=cloud.region, repository="course", image="predictor", tag="1")
    containers_of = {
        "google": {"serving_container_image_uri": containers.prebuilt("tensorflow", "prediction").uri},
        "own": {
            "serving_container_image_uri": own,
            "serving_container_command": ["python3", "-m", "helpers.predictor"],
        },
    }
    for name, container in containers_of.items():
        model = aiplatform.Model.upload(display_name=name, artifact_uri=f"{cloud.bucket}/test-jax", **container)
        endpoint = model.deploy(machine_type="n1-standard-4")
        np.testing.assert_allclose(endpoint.predict(instances).predictions, expected, rtol=1e-5)
        endpoint.delete(force=True)
        model.delete()


# Devices and kills: 218 rows in batches of 31, so that neither a batch nor the rows divide by eight

TRAIN = ["helpers.trainer.task_jax", "--dataset=penguins", "--batch_size=31", "--epochs=4"]


def train(folder, *more, devices=1):
    """Run the training task on some logical devices; return its exit status and its errors, epoch by epoch."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", *TRAIN, f"--checkpoint_dir={folder}", *more]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return process.returncode, [line["val_rmse"] for line in lines if "val_rmse" in line]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The errors of a training on one device that nothing disturbed."""
    status, found = train(tmp_path_factory.mktemp("one"))
    assert (status, len(found)) == (0, 4)
    return found


def test_eight_devices_learn_what_one_learns(errors, tmp_path):
    status, found = train(tmp_path, devices=8)
    assert status == 0
    np.testing.assert_allclose(found, errors, rtol=1e-4)


def test_killed_on_eight_devices_it_goes_on_on_one(errors, tmp_path):
    status, _ = train(tmp_path, "--preempt_at_epoch=3", devices=8)
    assert status == -signal.SIGKILL
    status, after = train(tmp_path)
    assert status == 0
    np.testing.assert_allclose(after[-2:], errors[2:], rtol=1e-4)
