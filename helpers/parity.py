"""The three-layer network, trained in each framework from the same weights, on the same batches: the same losses.

    parity.run("keras-jax", epochs=3)             # in a process of its own, since Keras has one backend in a process
    parity.table(parity.run(name) for name in parity.installed())
    python -m helpers.parity keras-jax --epochs 3 # the process: it trains, and ends with a line of JSON

Each function named in FRAMEWORKS is a whole training, to be read beside the others. None of them draws a random number:
NumPy draws the first weights (`loop.weights`) and the order of the rows (`regression.order`). All take the steps of
Keras' Adam.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from helpers import data, regression
from helpers.trainer import loop

UNITS = (64, 64, 1)
B1, B2, EPSILON = 0.9, 0.999, 1e-7  # of Keras' Adam
Weights = list[tuple[np.ndarray, np.ndarray]]  # for each layer a kernel of shape (inputs, units) and a bias


@dataclass(frozen=True)
class Task:
    """What every framework is given. `x` is (rows, inputs), `y` is (rows, 1) in standard deviations: both float32."""

    features: data.Features
    x: np.ndarray
    y: np.ndarray
    weights: Weights
    epochs: int
    batch_size: int
    seed: int
    learning_rate: float = 0.003
    seconds: list[float] = field(default_factory=list)  # that each epoch took

    def orders(self) -> Iterator[np.ndarray]:
        """Yield for each epoch the order of its rows; note how long the epoch took."""
        for epoch in range(self.epochs):
            started = time.perf_counter()
            yield regression.order(len(self.x), epoch, self.seed)
            self.seconds.append(time.perf_counter() - started)

    def train(self, update: Callable) -> list[float]:
        """Call `update(x, y)`, which returns the batch's loss, for each batch; return each epoch's mean over its rows.

        The last batch of an epoch holds the rows that are left over.
        """
        losses = []
        for order in self.orders():
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
            total = sum(float(update(self.x[rows], self.y[rows])) * len(rows) for rows in batches)
            losses.append(total / len(order))
        return losses


def task(dataset: str = "diamonds", epochs: int = 3, batch_size: int = 128, seed: int = 1) -> Task:
    """Return the task of learning a data set's training rows; the seed draws the first weights and the orders."""
    train, _ = data.split(dataset)
    features = data.Features(dataset, train)
    x, y = features.arrays(train)
    mean, deviation = features.target_scale
    y = ((y - mean) / deviation)[:, None]
    return Task(features, x, y, loop.weights(features.width, UNITS, seed), epochs, batch_size, seed)


# The frameworks


def low_level_tensorflow(task: Task) -> tuple[list[float], Weights]:
    """Train with TensorFlow's variables and tape, and an Adam written out."""
    import tensorflow as tf

    layers = [(tf.Variable(kernel), tf.Variable(bias)) for kernel, bias in task.weights]
    variables = tf.nest.flatten(layers)
    means, squares = ([tf.Variable(tf.zeros_like(variable)) for variable in variables] for _ in range(2))
    count = tf.Variable(0.0)

    @tf.function
    def update(x, y):
        with tf.GradientTape() as tape:
            for kernel, bias in layers[:-1]:
                x = tf.nn.relu(x @ kernel + bias)
            loss = tf.reduce_mean((x @ layers[-1][0] + layers[-1][1] - y) ** 2)
        count.assign_add(1)
        rate = task.learning_rate * tf.sqrt(1 - B2**count) / (1 - B1**count)
        for variable, m, s, g in zip(variables, means, squares, tape.gradient(loss, variables), strict=True):
            m.assign_add((g - m) * (1 - B1))
            s.assign_add((g * g - s) * (1 - B2))
            variable.assign_sub(rate * m / (tf.sqrt(s) + EPSILON))
        return loss

    losses = task.train(update)
    return losses, [(kernel.numpy(), bias.numpy()) for kernel, bias in layers]


def keras_fit(task: Task) -> tuple[list[float], Weights]:
    """Train with Keras' own `fit`, on the backend that KERAS_BACKEND names."""
    import keras

    hidden = [keras.layers.Dense(units, activation="relu") for units in UNITS[:-1]]
    network = keras.Sequential([keras.Input(task.x.shape[1:]), *hidden, keras.layers.Dense(UNITS[-1])])
    network.set_weights([array for layer in task.weights for array in layer])
    network.compile(optimizer=keras.optimizers.Adam(task.learning_rate), loss="mse")
    losses = []
    for order in task.orders():
        history = network.fit(task.x[order], task.y[order], task.batch_size, shuffle=False, verbose=0)
        losses += history.history["loss"]
    arrays = network.get_weights()
    return losses, list(zip(arrays[::2], arrays[1::2], strict=True))


def adam(learning_rate: float):
    """Return Keras' Adam for Optax, whose own adds epsilon to the corrected second moment instead of the raw one."""
    import jax
    import jax.numpy as jnp
    import optax

    def init(weights):
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return jnp.zeros((), int), zeros, zeros

    def update(gradients, state, weights=None):
        count, mean, square = state
        count = count + 1
        mean = jax.tree.map(lambda m, g: m + (g - m) * (1 - B1), mean, gradients)
        square = jax.tree.map(lambda s, g: s + (g * g - s) * (1 - B2), square, gradients)
        rate = learning_rate * jnp.sqrt(1 - B2**count) / (1 - B1**count)
        steps = jax.tree.map(lambda m, s: -rate * m / (jnp.sqrt(s) + EPSILON), mean, square)
        return steps, (count, mean, square)

    return optax.GradientTransformation(init, update)


def plain_jax(task: Task) -> tuple[list[float], Weights]:
    """Train with functions of arrays: weights and optimizer state go in, new ones come out."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = adam(task.learning_rate)

    def loss(weights, x, y):
        for kernel, bias in weights[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        kernel, bias = weights[-1]
        return jnp.mean((x @ kernel + bias - y) ** 2)

    @jax.jit
    def step(weights, state, x, y):
        value, gradients = jax.value_and_grad(loss)(weights, x, y)
        steps, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, steps), state, value

    weights = jax.tree.map(jnp.asarray, task.weights)
    state = optimizer.init(weights)

    def update(x, y):
        nonlocal weights, state
        weights, state, value = step(weights, state, x, y)
        return value

    losses = task.train(update)
    return losses, jax.tree.map(np.asarray, weights)


def flax_nnx(task: Task) -> tuple[list[float], Weights]:
    """Train with Flax NNX: objects that hold their weights, and transformations that know of them."""
    import jax.numpy as jnp
    from flax import nnx

    sizes = zip((task.x.shape[1], *UNITS), UNITS, strict=False)
    layers = [nnx.Linear(inputs, units, rngs=nnx.Rngs(task.seed)) for inputs, units in sizes]
    for layer, (kernel, bias) in zip(layers, task.weights, strict=True):
        layer.kernel[...], layer.bias[...] = kernel, bias
    network = nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])
    optimizer = nnx.Optimizer(network, adam(task.learning_rate), wrt=nnx.Param)

    @nnx.jit
    def update(network, optimizer, x, y):
        loss, gradients = nnx.value_and_grad(lambda network: jnp.mean((network(x) - y) ** 2))(network)
        optimizer.update(network, gradients)
        return loss

    losses = task.train(lambda x, y: update(network, optimizer, x, y))
    return losses, [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in layers]


def pytorch(task: Task) -> tuple[list[float], Weights]:
    """Train with PyTorch, whose Adam has its epsilon where Optax has it: one line moves it, before each step."""
    import torch

    torch.set_num_threads(1)  # batches this small are slower on several
    sizes = zip((task.x.shape[1], *UNITS), UNITS, strict=False)
    layers = [torch.nn.Linear(inputs, units) for inputs, units in sizes]
    with torch.no_grad():
        for layer, (kernel, bias) in zip(layers, task.weights, strict=True):
            layer.weight.copy_(torch.from_numpy(kernel.T))
            layer.bias.copy_(torch.from_numpy(bias))
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(network.parameters(), task.learning_rate, (B1, B2))
    count = 0

    def update(x, y):
        nonlocal count
        count += 1
        optimizer.param_groups[0]["eps"] = EPSILON / math.sqrt(1 - B2**count)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(network(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        return loss

    losses = task.train(update)
    return losses, [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]


@dataclass(frozen=True)
class Framework:
    """A way to train, the module that it needs, and the backend that it wants of Keras."""

    title: str
    train: Callable[[Task], tuple[list[float], Weights]]
    module: str
    backend: str = ""


FRAMEWORKS = {
    "tensorflow": Framework("TensorFlow, low level", low_level_tensorflow, "tensorflow"),
    "keras-tf": Framework("Keras on TensorFlow", keras_fit, "tensorflow", "tensorflow"),
    "keras-jax": Framework("Keras on JAX", keras_fit, "jax", "jax"),
    "flax": Framework("Flax NNX", flax_nnx, "flax"),
    "jax": Framework("plain JAX", plain_jax, "jax"),
    "torch": Framework("PyTorch", pytorch, "torch"),
}


# Running them


def installed() -> list[str]:
    """Return the names of the frameworks that are installed here; PyTorch is an extra of the course."""
    return [name for name, framework in FRAMEWORKS.items() if importlib.util.find_spec(framework.module)]


def run(name: str, **options) -> dict:
    """Train in one framework, in a process of its own, on the CPU; `options` are the arguments of `task`.

    Returns "framework" (its title), "losses" and "seconds" of each epoch, and the "weights" in the end. Raises
    RuntimeError with the last words of a process that failed.
    """
    # On the CPU, where all frameworks multiply float32 as float32.
    settings = {"KERAS_BACKEND": FRAMEWORKS[name].backend, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    words = [f"--{option}={value}" for option, value in options.items()]
    command = [sys.executable, "-m", "helpers.parity", name, *words]
    process = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if process.returncode:
        said = f"python {' '.join(command[1:])} ended with status {process.returncode}:\n{process.stderr[-2000:]}"
        raise RuntimeError(said)
    result = json.loads(process.stdout.splitlines()[-1])
    result["weights"] = [tuple(np.array(array, np.float32) for array in layer) for layer in result["weights"]]
    return {"framework": FRAMEWORKS[name].title, **result}


def table(results: Iterable[dict]):
    """Return what `run` returned as a DataFrame: a row for each framework, a column for the loss of each epoch."""
    import pandas as pd

    rows = {result["framework"]: result["losses"] for result in results}
    frame = pd.DataFrame(rows).T.rename_axis("framework")
    return frame.rename(columns=lambda epoch: f"epoch {epoch + 1}")


def main(arguments: list[str] | None = None) -> None:
    """Train as the arguments say, and print a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m helpers.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--dataset", choices=("penguins", "diamonds"), default="diamonds")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    asked = vars(parser.parse_args(arguments))
    train = FRAMEWORKS[asked.pop("framework")].train
    given = task(**asked)
    losses, weights = train(given)
    arrays = [[array.tolist() for array in layer] for layer in weights]
    print(json.dumps({"losses": losses, "seconds": given.seconds, "weights": arrays}))


if __name__ == "__main__":
    main()
