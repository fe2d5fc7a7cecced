"""The training task in JAX: one process, several devices, several processes and a job learn the same."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tasks import SMALL, finish, kill_after, learnt, run_here, start, start_two

from helpers import data, regression
from helpers.trainer import loop, task_jax

MODULE = "helpers.trainer.task_jax"
IMAGE = "us-central1-docker.pkg.dev/local-project/course/trainer:1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_here(task_jax.main, folder), folder


def checkpoint(folder):
    """Return Orbax's manager of a folder with a checkpoint, and what that says of itself."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(folder)
    return manager, manager.metadata(manager.latest_step()).custom_metadata


def arrays(manager):
    """Return the arrays of the last checkpoint, which was written by one process."""
    import jax
    import orbax.checkpoint as ocp

    return jax.tree.leaves(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore()))


def test_it_learns_what_keras_learns_from_the_same_weights_in_the_same_order(undisturbed):
    import keras

    train, validation, _ = data.split("penguins", validation=True)
    features = data.Features("penguins", train)
    x, y = features.arrays(train)
    network = regression.build(features)
    network.set_weights([array for layer in loop.weights(features.width, (64, 64, 1), seed=1) for array in layer])
    network.compile(keras.optimizers.Adam(0.003), "mse")
    expected = {"rmse": [], "val_rmse": []}
    for number in range(12):
        order = regression.order(len(x), number, seed=1)
        network.fit(x[order], y[order], batch_size=31, shuffle=False, verbose=0)
        expected["rmse"].append(network.history.history["loss"][0] ** 0.5)
        expected["val_rmse"].append(regression.rmse(network, *features.arrays(validation)))
    history, _ = undisturbed
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5)


def test_the_model_reads_raw_rows(undisturbed):
    import tensorflow as tf

    history, folder = undisturbed
    train, validation, _ = data.split("penguins", validation=True)
    model = tf.saved_model.load(str(folder / "model_dir"))
    predicted = model.signatures["serving_default"](**data.Features("penguins", train).raw(validation))["output_0"]
    error = np.sqrt(np.mean((predicted.numpy()[:, 0] - validation["body_mass_g"]) ** 2))
    assert error == pytest.approx(history["val_rmse"][-1], rel=1e-5)
    schema = json.loads((folder / "model_dir/assets.extra/instance_schema.json").read_text())
    assert schema["properties"]["sex"] == {"type": "string", "enum": ["FEMALE", "MALE"]}


def test_killed_and_started_again_it_ends_with_the_same_model(undisturbed, tmp_path):
    kill_after(start(MODULE, f"--checkpoint_dir={tmp_path}"), epoch=5)
    lines = finish(start(MODULE, f"--checkpoint_dir={tmp_path}"))
    assert "epochs were done before" in lines[0]["message"]
    assert lines[1]["epoch"] >= 4
    (found, about), (expected, expected_about) = map(checkpoint, (tmp_path, undisturbed[1] / "checkpoint_dir"))
    assert about == expected_about
    for array, value in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_array_equal(array, value)


def test_two_devices_learn_what_one_learns(undisturbed):
    lines = finish(start(MODULE, XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    for name, values in learnt(lines).items():
        np.testing.assert_allclose(values, undisturbed[0][name], rtol=1e-5)


def test_two_processes_learn_what_one_learns(undisturbed, tmp_path):
    arguments = [f"--{name}={tmp_path / name}" for name in ("model_dir", "checkpoint_dir")]
    lines, silent = map(finish, start_two(MODULE, *arguments))
    for name, values in learnt(lines).items():
        np.testing.assert_allclose(values, undisturbed[0][name], rtol=1e-5)
    assert silent == []  # the primary process tells and exports for both
    assert (tmp_path / "model_dir/saved_model.pb").exists()
    # One process alone goes on from what both wrote.
    more = task_jax.main([*SMALL, "--epochs=13", f"--checkpoint_dir={tmp_path / 'checkpoint_dir'}"])
    assert more["rmse"][:12] == learnt(lines)["rmse"]


def test_a_job_of_two_workers_is_preempted_and_goes_on(cloud, undisturbed):
    from google.cloud import aiplatform

    def job(*arguments):
        command = ["python", "-m", MODULE, *SMALL, "--epochs=4", *arguments]
        pool = {
            "machine_spec": {"machine_type": "n1-standard-4"},
            "replica_count": 1,
            "container_spec": {"image_uri": IMAGE, "command": command},
        }
        return aiplatform.CustomJob("jax", [pool, pool], base_output_dir=f"{cloud.bucket}/jax")

    with pytest.raises(RuntimeError, match="exited with a non-zero status"):
        job("--preempt_at_epoch=3").run()
    job("--preempt_at_epoch=3").run()
    buckets = Path(os.environ["LOCAL_CLOUD"]) / "buckets" / cloud.bucket.removeprefix("gs://")
    _, about = checkpoint(buckets / "jax/checkpoints")
    for name, values in undisturbed[0].items():
        np.testing.assert_allclose([errors[name] for errors in about["history"]], values[:4], rtol=1e-5)
    assert (buckets / "jax/model/saved_model.pb").exists()
    assert list((buckets / "jax/logs").iterdir())


def test_a_checkpoint_of_another_training_is_refused(undisturbed):
    with pytest.raises(ValueError, match=r"is of a training with .*'units': 64.*this one has .*'units': 8"):
        task_jax.main([*SMALL, "--units", "8", f"--checkpoint_dir={undisturbed[1] / 'checkpoint_dir'}"])


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"there is no --activation rely in jax\.nn; expected relu, tanh or another"):
        task_jax.main([*SMALL, "--activation", "rely"])
