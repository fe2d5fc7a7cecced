"""All frameworks that are installed take the same steps, and the tolerance that says so would notice another Adam."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers import parity, regression

# Relative, of losses after 22 updates. Later a rounding has grown: after a thousand updates, processors (and PyTorch,
# which corrects the means of Adam in double precision) are up to a percent apart.
LAST_DIGITS = 2e-5
SHORT = {"epochs": 2, "batch_size": 4096}


@pytest.fixture(scope="module")
def losses():
    """The losses of plain JAX, to which the others are held."""
    return parity.run("jax", **SHORT)["losses"]


@pytest.mark.parametrize("name", [name for name in parity.installed() if name != "jax"])
def test_every_framework_has_the_losses_of_plain_jax(name, losses):
    found = parity.run(name, **SHORT)
    np.testing.assert_allclose(found["losses"], losses, rtol=LAST_DIGITS)
    assert [kernel.shape for kernel, _ in found["weights"]] == [(26, 64), (64, 64), (64, 1)]
    assert len(found["seconds"]) == 2
    # The weights are those in the end: they predict better than in the last epoch.
    task = parity.task()
    hidden = task.x
    for kernel, bias in found["weights"][:-1]:
        hidden = np.maximum(hidden @ kernel + bias, 0)
    kernel, bias = found["weights"][-1]
    assert np.mean((hidden @ kernel + bias - task.y) ** 2) < losses[-1]


def test_all_that_the_course_requires_is_compared():
    assert {"tensorflow", "keras-tf", "keras-jax", "flax", "jax"} <= set(parity.installed()) <= set(parity.FRAMEWORKS)


def test_the_last_batch_counts_by_its_rows():
    task = parity.task("penguins", epochs=2, batch_size=100)
    sizes = []

    def update(x, y):
        sizes.append((len(x), len(y)))
        return float(len(x))

    assert task.train(update) == pytest.approx([(100 * 200 + 68 * 68) / 268] * 2)
    assert sizes == [(100, 100), (100, 100), (68, 68)] * 2


def test_an_epoch_takes_the_rows_in_the_order_of_regression():
    task = parity.task("penguins", epochs=2, batch_size=268, seed=5)
    seen = []
    task.train(lambda x, y: seen.append(x) or 0.0)
    for epoch, x in enumerate(seen):
        np.testing.assert_array_equal(x, task.x[regression.order(268, epoch, 5)])


def one_step(optimizer, gradients):
    """The steps that an optimizer of Optax takes for weights of zero."""
    import jax.numpy as jnp

    weights = jnp.zeros(len(gradients))
    return np.asarray(optimizer.update(jnp.asarray(gradients), optimizer.init(weights))[0])


def test_epsilon_stands_where_keras_has_it():
    import keras
    import optax

    gradients = np.array([1.0, 1e-6, 1e-8], np.float32)
    variable = keras.Variable(np.zeros(3, np.float32))
    keras.optimizers.Adam(0.003).apply([keras.ops.convert_to_tensor(gradients)], [variable])
    np.testing.assert_allclose(one_step(parity.adam(0.003), gradients), variable.numpy(), rtol=1e-5)
    # The lesson's other way: epsilon moved to where Optax adds it.
    moved = optax.inject_hyperparams(optax.adam)(0.003, eps=lambda count: 1e-7 / (1 - 0.999 ** (count + 1)) ** 0.5)
    np.testing.assert_allclose(one_step(moved, gradients), variable.numpy(), rtol=1e-4)
    # With a gradient of 1e-8, Optax' default takes half a step, Keras a three-hundredth.
    assert one_step(optax.adam(0.003), gradients)[2] < 100 * variable.numpy()[2] < 0


def test_another_adam_would_be_noticed(losses, monkeypatch):
    import optax

    monkeypatch.setattr(parity, "adam", optax.adam)
    found, _ = parity.plain_jax(parity.task(**SHORT))
    assert abs(found[-1] / losses[-1] - 1) > 10 * LAST_DIGITS


def test_a_process_that_fails_says_why():
    words = r"(?s)^python -m helpers\.parity jax --dataset=nothing ended with status 2:.*invalid choice: 'nothing'"
    with pytest.raises(RuntimeError, match=words):
        parity.run("jax", dataset="nothing")


def test_the_table_has_a_row_for_each_framework_and_a_column_for_each_epoch():
    results = [{"framework": "plain JAX", "losses": [0.5, 0.25]}, {"framework": "PyTorch", "losses": [0.5, 0.125]}]
    table = parity.table(iter(results))
    assert table.loc["PyTorch", "epoch 2"] == 0.125
    assert list(table.columns) == ["epoch 1", "epoch 2"]
    assert list(table.index) == ["plain JAX", "PyTorch"]


def test_the_process_ends_with_a_line_of_json():
    command = [sys.executable, "-m", "helpers.parity", "jax", "--dataset", "penguins", "--epochs", "1"]
    process = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert set(json.loads(process.stdout.splitlines()[-1])) == {"losses", "seconds", "weights"}
    assert process.stderr == ""
