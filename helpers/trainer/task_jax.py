"""The training task in JAX: the network, the arguments and the reports of `helpers.trainer.task`.

    python -m helpers.trainer.task_jax --dataset diamonds --epochs 20 --model_dir model

An epoch is one call: a scan over its updates, compiled. Every process of a job holds all rows and takes its share of
each batch; JAX adds up what they find, so that they learn what one device learns, to float32's precision. Orbax keeps
the checkpoints: killed at any moment and started again, the task ends with the same model.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from helpers import data, regression
from helpers.trainer import loop, task


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train, save, and return "rmse" and "val_rmse" of each epoch, in the target's unit."""
    asked = task.parse(arguments, "task_jax")
    addresses, rank = loop.workers()
    if len(addresses) > 1:
        jax.distributed.initialize(addresses[0], len(addresses), rank)

    # The rows, and the network that learns from them: its weights, the same on all devices.
    train, validation = task.read(asked)
    features = data.Features(asked.dataset, train)
    predict = network(asked.activation, *features.target_scale)
    params = loop.weights(features.width, (asked.units, asked.units, 1), asked.seed)
    optimizer = optax.adam(asked.learning_rate, eps=1e-7)
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    state = put({"params": params, "optimizer": optimizer.init(params)}, mesh)

    # Epoch after epoch, from where a killed task was.
    checkpoint = Checkpoint(asked.checkpoint_dir, state, task.settings(asked))
    run_epoch = epoch(predict, optimizer, *features.arrays(train), asked.batch_size, asked.seed, mesh)
    x_validation, y_validation = features.arrays(validation)

    def run(number):
        checkpoint.state, rmse = run_epoch(checkpoint.state, number)
        return float(rmse)

    def learnt():
        return jax.tree.map(np.asarray, checkpoint.state["params"])

    def validate():
        return regression.rmse(functools.partial(predict, learnt()), x_validation, y_validation)

    history = task.train_epochs(asked, features.dataset.unit, checkpoint, run, validate, rank)
    task.save(asked, rank, lambda folder: export(predict, learnt(), features, train, folder))
    return history


def network(activation: str, mean: float, deviation: float) -> Callable:
    """Return the network's function of (params, inputs), which predicts in the target's unit, shape (rows, 1).

    `activation` is a function of jax.nn, by name.
    """
    hidden = getattr(jax.nn, activation, None)
    if hidden is None:
        raise ValueError(
            f"there is no --activation {activation} in jax.nn; expected relu, tanh or another of its names"
        )

    def predict(params, inputs):
        for kernel, bias in params[:-1]:
            inputs = hidden(inputs @ kernel + bias)
        kernel, bias = params[-1]
        return (inputs @ kernel + bias) * deviation + mean

    return predict


def put(tree, mesh, *axes):
    """Return arrays as they lie on the devices of a mesh: divided along `axes`, or whole on each of them."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    arrays = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), arrays)


def epoch(predict: Callable, optimizer, x, y, batch_size: int, seed: int, mesh) -> Callable:
    """Return a function that trains for one epoch: of a state and a number it makes the next state and an RMSE.

    The order of rows depends on the seed and the number alone. `batch_size` rows make one update, on however many
    devices; a batch of fewer rows has empty places, which count for nothing.
    """
    x, y = put((x, y), mesh)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, batches, x, y):
        def update(state, rows):
            def loss(params):
                errors = jnp.where(rows < 0, 0, predict(params, x[rows])[:, 0] - y[rows])
                squares = jnp.sum(errors**2)
                return squares / jnp.sum(rows >= 0), squares

            gradients, squares = jax.grad(loss, has_aux=True)(state["params"])
            steps, moments = optimizer.update(gradients, state["optimizer"])
            return {"params": optax.apply_updates(state["params"], steps), "optimizer": moments}, squares

        state, squares = jax.lax.scan(update, state, batches)
        return state, jnp.sqrt(jnp.sum(squares) / len(x))

    def call(state, number):
        batches = table(regression.order(len(x), number, seed), batch_size, mesh.size)
        return run(state, put(batches, mesh, None, "batch"), x, y)

    return call


def table(rows: np.ndarray, batch_size: int, devices: int) -> np.ndarray:
    """Return the rows of an epoch, a batch in each line, with as many places for each device; -1 are empty places."""
    batches = np.full((math.ceil(len(rows) / batch_size), batch_size), -1, np.int32)
    batches.flat[: len(rows)] = rows
    return np.pad(batches, ((0, 0), (0, -batch_size % devices)), constant_values=-1)


def export(predict: Callable, params, features: data.Features, train, folder: str) -> None:
    """Write a SavedModel that reads raw rows: for Keras, the network is a layer that calls JAX."""
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever it is elsewhere: only there are layers that read text
    import keras
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow was in use before
        tf.config.set_visible_devices([], "GPU")  # their memory is JAX's
    task.export(keras.layers.JaxLayer(predict, params=params), features, train, folder)


class Checkpoint:
    """Orbax's checkpoint of a training in a folder, gs:// or not, which all its processes write together.

    Attributes: `state`, what a training needs to go on: a tree of arrays; `file`, the folder.
    """

    def __init__(self, folder: str | None, state, settings: Mapping):
        """Keep the state in a folder, if there is one; a checkpoint from other settings is refused."""
        self.state, self.settings = state, settings
        self.file = folder if not folder or folder.startswith("gs://") else str(Path(folder).absolute())
        if self.file:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, cleanup_tmp_directories=True, enable_async_checkpointing=False
            )
            self.manager = ocp.CheckpointManager(self.file, options=options)

    def restore(self) -> list[dict]:
        """Set the state to what the folder holds, and return the history that it holds; [] if there is none."""
        step = self.manager.latest_step() if self.file else None
        if step is None:
            return []
        about = self.manager.metadata(step).custom_metadata
        loop.check(self.settings, about["settings"], self.file)
        self.state = self.manager.restore(step, args=ocp.args.StandardRestore(self.state))
        return about["history"]

    def save(self, history: list[dict]) -> None:
        """Write the state and the history."""
        if self.file:
            about = {"settings": self.settings, "history": history}
            self.manager.save(len(history), args=ocp.args.StandardSave(self.state), custom_metadata=about)


if __name__ == "__main__":
    main()
