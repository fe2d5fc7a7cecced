"""`helpers.fit` beside loops written by hand, beside Keras' own `fit`, and on ever more rows.

Each backend is measured in a process of its own: `python -m helpers.course.bench_fit tensorflow` prints seconds.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import time

from helpers.course import bench

ROWS, INPUTS, RATE = 307_200, 17, 0.001
TARGETS = {32: 1.3, 1024: 1.2}  # times the loop by hand, for each batch size
STREAMED = 300_000, 3_000_000, 30_000_000


def ladder() -> list[bench.Row]:
    """Return an epoch of each way to train, in ratios to the loop by hand on the same backend."""
    found = []
    for backend in ("tensorflow", "jax"):
        for batch_size, target in TARGETS.items():
            seconds = measure(backend, "ladder", batch_size)
            by_hand = seconds.pop("loop by hand")
            for what, took in seconds.items():
                ratio = took / by_hand
                goal = (f"<= {target}", bench.verdict(ratio <= target)) if what == "helpers.fit" else ("-", "-")
                label = f"{backend}, batch {batch_size}: {what} / loop by hand"
                found.append(bench.Row(label, bench.duration(took), bench.duration(by_hand), f"{ratio:.2f}", *goal))
    return found


def stream() -> list[bench.Row]:
    """Return the seconds and the memory of ever more flights, streamed, in ratios to a tenth of them."""
    found = [(rows, measure("tensorflow", "stream", rows)) for rows in STREAMED]
    lines = []
    for (_, less), (rows, more) in itertools.pairwise(found):
        ratio = more["seconds"] / less["seconds"]
        grown = more["megabytes"] - less["megabytes"]
        what = f"stream {rows:,} flights / a tenth ({more['megabytes']:.0f} MB, {grown:+.0f} MB)"
        met = ratio <= 11 and grown <= 50
        seconds = bench.duration(more["seconds"]), bench.duration(less["seconds"])
        lines.append(bench.Row(what, *seconds, f"{ratio:.2f}", "<= 11, 50 MB", bench.verdict(met)))
    return lines


def measure(backend: str, *what) -> dict[str, float]:
    """Return what a process with a Keras backend of its own has measured."""
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = backend
    try:
        return json.loads(bench.run([sys.executable, "-m", __name__, *map(str, what)]).splitlines()[-1])
    finally:
        os.environ.pop("KERAS_BACKEND") if before is None else os.environ.update(KERAS_BACKEND=before)


# In the process of a backend


def climb(batch_size: int) -> dict[str, float]:
    """Return the seconds of an epoch for each way to train the three-layer network: the same rows, the same order."""
    import keras
    import numpy as np

    from helpers.fit import fit

    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, INPUTS)).astype(np.float32)
    y = np.tanh(x @ random.normal(size=INPUTS)).astype(np.float32)
    is_tensorflow = keras.backend.backend() == "tensorflow"

    def network(**choice):
        keras.utils.set_random_seed(0)
        layers = [*(keras.layers.Dense(64, "relu") for _ in range(2)), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((INPUTS,)), *layers])
        model.compile(keras.optimizers.Adam(RATE), "mse", **choice)
        return model

    def keras_fit(rows=(x, y), **choice):
        model = network(**choice)
        size = {"batch_size": batch_size} if len(rows) == 2 and isinstance(rows, tuple) else {}
        rows = rows if isinstance(rows, tuple) else (rows,)
        return lambda: model.fit(*rows, **size, shuffle=False, verbose=0).history["loss"][0]

    ours = network(jit_compile=True)
    by_hand = (tensorflow_loop if is_tensorflow else jax_loop)(network().get_weights(), x, y, batch_size)
    ways = {"Keras fit": keras_fit()}
    steps = ROWS // batch_size
    if is_tensorflow:
        import tensorflow as tf

        def dataset():
            return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).prefetch(4)

        ways["Keras fit, tf.data"] = keras_fit(dataset())
        ways["Keras fit, tf.data, steps_per_execution"] = keras_fit(dataset(), steps_per_execution=steps)
        choice = {"steps_per_execution": steps, "jit_compile": True}
        ways["Keras fit, tf.data, steps_per_execution, XLA"] = keras_fit(dataset(), **choice)
    else:
        ways["Keras fit, steps_per_execution"] = keras_fit(steps_per_execution=steps)
    fast = {
        "helpers.fit": lambda: fit(ours, x, y, batch_size, shuffle=False, verbose=0).history["loss"][0],
        "loop by hand": by_hand,
    }
    # The first epoch compiles, and shows that all ways do the same.
    losses = np.array([way() for way in (ways | fast).values()])
    bench.require_equal([losses], [np.full(len(losses), losses[0])])
    turns = {name: [] for name in fast}
    for _ in range(7):
        for name, way in fast.items():
            turns[name].append(timed(way))
    return {name: timed(way) for name, way in ways.items()} | {
        name: statistics.median(took) for name, took in turns.items()
    }


def timed(way) -> float:
    """Return the seconds that an epoch takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def tensorflow_loop(weights, x, y, batch_size: int):
    """Return an epoch in plain TensorFlow, which returns its mean loss: one XLA loop, Adam written out."""
    import tensorflow as tf

    w = [tf.Variable(weight) for weight in weights]
    mean, square = ([tf.Variable(tf.zeros_like(weight)) for weight in weights] for _ in range(2))
    count = tf.Variable(0.0)

    @tf.function(jit_compile=True)
    def epoch(x, y):
        total = 0.0
        for number in tf.range(len(x) // batch_size):
            start = number * batch_size
            rows = tf.slice(x, [start, 0], [batch_size, INPUTS])
            with tf.GradientTape() as tape:
                hidden = tf.nn.relu(rows @ w[0] + w[1])
                hidden = tf.nn.relu(hidden @ w[2] + w[3])
                loss = tf.reduce_mean(((hidden @ w[4] + w[5])[:, 0] - tf.slice(y, [start], [batch_size])) ** 2)
            count.assign_add(1.0)
            rate = RATE * tf.sqrt(1 - 0.999**count) / (1 - 0.9**count)
            for weight, m, v, gradient in zip(w, mean, square, tape.gradient(loss, w), strict=True):
                m.assign_add((gradient - m) * 0.1)
                v.assign_add((gradient**2 - v) * 0.001)
                weight.assign_sub(rate * m / (tf.sqrt(v) + 1e-7))
            total += loss
        return total / tf.cast(len(x) // batch_size, tf.float32)

    x, y = tf.constant(x), tf.constant(y)
    return lambda: float(epoch(x, y))


def jax_loop(weights, x, y, batch_size: int):
    """Return an epoch in plain JAX, which returns its mean loss: one lax.scan, Adam written out."""
    import jax
    from jax import numpy as jnp

    def mean_square(w, x, y):
        hidden = jax.nn.relu(x @ w[0] + w[1])
        hidden = jax.nn.relu(hidden @ w[2] + w[3])
        return jnp.mean(((hidden @ w[4] + w[5])[:, 0] - y) ** 2)

    def update(state, rows):
        w, mean, square, count = state
        loss, gradients = jax.value_and_grad(mean_square)(w, *rows)
        count += 1
        rate = RATE * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        mean = [m + (g - m) * 0.1 for m, g in zip(mean, gradients, strict=True)]
        square = [v + (g**2 - v) * 0.001 for v, g in zip(square, gradients, strict=True)]
        w = [p - rate * m / (jnp.sqrt(v) + 1e-7) for p, m, v in zip(w, mean, square, strict=True)]
        return (w, mean, square, count), loss

    @jax.jit
    def epoch(state, x, y):
        rows = x.reshape(-1, batch_size, INPUTS), y.reshape(-1, batch_size)
        state, losses = jax.lax.scan(update, state, rows)
        return state, losses.mean()

    zeros = [jnp.zeros_like(weight) for weight in weights]
    kept = {"state": ([jnp.asarray(weight) for weight in weights], zeros, zeros, jnp.float32(0))}
    x, y = jnp.asarray(x), jnp.asarray(y)

    def run():
        kept["state"], loss = epoch(kept["state"], x, y)
        return float(loss)

    return run


def flow(rows: int) -> dict[str, float]:
    """Return the seconds and the most memory of one epoch over flights, repeated until there are enough of them."""
    import keras

    from helpers import data, regression

    features = data.Features("flights", data.split("flights")[0])
    network = regression.build(features)
    network.compile("adam", "mse")
    batch_size = 1024
    flights = features.pipeline(batch_size).repeat()
    warm = flights.take(200)
    regression.fit(network, warm, verbose=0)
    started = time.perf_counter()
    history = regression.fit(network, flights.take(rows // batch_size), verbose=0)
    seconds = time.perf_counter() - started
    assert keras.ops.isfinite(history.history["loss"][0])
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


BENCHMARKS = {"fit": ladder, "stream": stream}

if __name__ == "__main__":
    kind, number = sys.argv[1:]
    print(json.dumps({"ladder": climb, "stream": flow}[kind](int(number))))
