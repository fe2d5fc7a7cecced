"""Train one network on devices of some kind, and print what came of it: `python fit_devices.py KIND COUNT ROWS`.

KIND is "mirrored" (TensorFlow), "data" or "model" (JAX) with so many devices made of this machine's processor, or
"tf-worker" or "jax-worker" with COUNT processes, where RANK and ADDRESSES are in the environment.
"""

import contextlib
import json
import os
import sys

kind, count, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.environ["KERAS_BACKEND"] = "tensorflow" if kind in ("mirrored", "tf-worker") else "jax"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={1 if kind.endswith('worker') else count}"

import numpy as np  # noqa: E402

import helpers  # noqa: E402,F401

scope = contextlib.nullcontext()
if kind == "mirrored":
    import tensorflow as tf

    parts = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    scope = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(count)]).scope()
elif kind == "tf-worker":
    import tensorflow as tf

    scope = tf.distribute.MultiWorkerMirroredStrategy().scope()

import keras  # noqa: E402

if kind == "jax-worker":
    keras.distribution.initialize(os.environ["ADDRESSES"], count, int(os.environ["RANK"]))
if kind in ("data", "jax-worker"):
    keras.distribution.set_distribution(keras.distribution.DataParallel())
if kind == "model":
    mesh = keras.distribution.DeviceMesh((2, count // 2), ["batch", "model"], keras.distribution.list_devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*wide.*kernel"], layout[".*wide.*bias"] = (None, "model"), ("model",)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))

from helpers.fit import fit  # noqa: E402

random = np.random.default_rng(0)
x = random.normal(size=(rows, 5)).astype(np.float32)
y = x @ np.array([1, -2, 0.5, 0, 3], np.float32)
# The same first weights on both backends.
weights = [random.normal(scale=0.3, size=size).astype(np.float32) for size in [(5, 16), (16,), (16, 1), (1,)]]
with scope:
    layers = [keras.layers.Dense(16, "relu", name="wide"), keras.layers.Dense(1)]
    network = keras.Sequential([keras.Input((5,)), *layers])
    network.set_weights(weights)
    network.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
history = fit(network, x, y, batch_size=48, epochs=3, verbose=0, validation_data=(x[:53], y[:53])).history
if kind == "model":
    history["layout"] = str(network.weights[0].value.sharding.spec)
print("RESULT", json.dumps(history))
