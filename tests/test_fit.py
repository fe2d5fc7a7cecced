"""`fit` does what Keras' own does: on the TensorFlow backend and, by one of the tests, on JAX."""

import gc
import os
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest

from helpers import fit as fits
from helpers.fit import fit, order

# Of Keras 3.15 with NumPy 2, wherever it hands out a variable's values.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROWS = 150  # four batches of 32, and one of 22


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 5)).astype(np.float32)
    return x, x @ np.array([1, -2, 0.5, 0, 3], np.float32) + 1


def build(*layers, width=5, **compiled):
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((width,)), keras.layers.Dense(16, "relu"), *layers, keras.layers.Dense(1)])
    options = {"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "metrics": ["mae"]} | compiled
    network.compile(**options)
    return network


def same(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, **tolerance)


def same_history(one, other):
    assert list(one.history) == list(other.history)
    for name, values in one.history.items():
        np.testing.assert_allclose(values, other.history[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"batch_size": 16, "validation_split": 0.2, "validation_batch_size": 7},
        {"sample_weight": np.linspace(0, 2, ROWS), "validation_freq": 3},
        {"initial_epoch": 4, "validation_freq": [5, 10]},
    ],
    ids=["plain", "validation split", "sample weights", "initial epoch"],
)
def test_it_gives_what_keras_gives_after_ten_epochs(rows, choice):
    x, y = rows
    if "validation_freq" in choice:
        choice = choice | {"validation_data": (x[:50], y[:50])}
    ours, plain = build(), build()
    history = fit(ours, x, y, epochs=10, shuffle=False, verbose=0, **choice)
    same_history(history, plain.fit(x, y, epochs=10, shuffle=False, verbose=0, **choice))
    same(ours, plain)


def test_random_layers_moving_averages_and_penalties_are_those_of_keras(rows):
    def layers():
        penalty = keras.regularizers.L2(0.01)
        yield keras.layers.Dropout(0.3, seed=3)
        yield keras.layers.BatchNormalization()
        yield keras.layers.Dense(8, "tanh", kernel_regularizer=penalty)

    optimizer = {"use_ema": True, "ema_momentum": 0.9, "clipnorm": 1.0}
    ours, plain = (build(*layers(), optimizer=keras.optimizers.RMSprop(**optimizer)) for _ in range(2))
    history = fit(ours, *rows, epochs=6, shuffle=False, verbose=0)
    same_history(history, plain.fit(*rows, epochs=6, shuffle=False, verbose=0))
    same(ours, plain)


def test_each_epoch_takes_the_rows_in_the_order_of_its_number_and_the_seed(rows):
    ours, plain, other = build(), build(), build()
    fit(ours, *rows, epochs=4, seed=7, verbose=0)
    for epoch in range(4):
        taken = order(ROWS, epoch, seed=7)
        plain.fit(*(part[taken] for part in rows), shuffle=False, verbose=0)
    same(ours, plain)
    fit(other, *rows, epochs=4, seed=8, verbose=0)
    assert not np.allclose(ours.get_weights()[0], other.get_weights()[0], rtol=1e-3)


def test_an_order_has_every_row_once():
    orders = [tuple(order(20, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert all(sorted(found) == list(range(20)) for found in orders)
    assert len(set(orders)) == 9
    assert order(20, 0).dtype == np.int32


def test_a_training_in_two_parts_is_the_training_in_one(rows):
    whole, parts = build(), build()
    fit(whole, *rows, epochs=6, seed=2, verbose=0)
    fit(parts, *rows, epochs=2, seed=2, verbose=0)
    fit(parts, *rows, epochs=6, initial_epoch=2, seed=2, verbose=0)
    same(whole, parts, rtol=0, atol=0)


def test_callbacks_work_as_they_do_in_keras(rows, tmp_path):
    x, y = rows

    def callbacks(folder):
        yield keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
        yield keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 if epoch < 4 else 1.0)
        yield keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
        yield keras.callbacks.CSVLogger(folder / "log.csv")
        yield keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: heard.append((epoch, sorted(logs))))

    heard, found = [], []
    for name, train in (("ours", fit), ("keras", keras.Model.fit)):
        folder = tmp_path / name
        folder.mkdir()
        network = build()
        options = {"epochs": 30, "shuffle": False, "verbose": 0, "validation_data": (x[:40], y[:40])}
        history = train(network, x, y, callbacks=list(callbacks(folder)), **options)
        found.append((network, history, sorted(path.name for path in folder.iterdir())))
    (ours, our_history, our_files), (plain, history, files) = found
    assert len(history.history["loss"]) < 30
    same_history(our_history, history)
    same(ours, plain)
    assert our_files == files
    assert heard[: len(heard) // 2] == heard[len(heard) // 2 :]


def test_a_backup_resumes_to_the_same_weights(rows, tmp_path):
    def stop(epoch, logs):
        if epoch == 2:
            raise InterruptedError

    whole, first, second = build(), build(), build()
    fit(whole, *rows, epochs=5, verbose=0)
    backup = tmp_path / "backup"
    halfway = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    with pytest.raises(InterruptedError):
        fit(first, *rows, epochs=5, verbose=0, callbacks=[halfway, keras.callbacks.BackupAndRestore(backup)])
    history = fit(second, *rows, epochs=5, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(backup)])
    assert history.epoch == [2, 3, 4]
    same(whole, second, rtol=0, atol=0)


def test_it_shows_its_progress(rows, capsys):
    fit(build(), *rows, epochs=2, verbose=2)
    said = capsys.readouterr().out
    assert "Epoch 1/2" in said
    assert "5/5" in said


def test_models_with_several_inputs_and_outputs(rows):
    x, y = rows

    def network():
        keras.utils.set_random_seed(0)
        inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((3,), name="b")}
        hidden = keras.layers.Dense(8, "relu")(keras.layers.Concatenate()(list(inputs.values())))
        model = keras.Model(inputs, [keras.layers.Dense(1, name="p")(hidden), keras.layers.Dense(1, name="q")(hidden)])
        model.compile("sgd", ["mse", "mae"], loss_weights=[1, 0.5])
        return model

    # In whole batches: Keras' tf.function takes the mean of batch means for the loss of each output.
    x, y = x[:128], y[:128]
    data = {"a": x[:, :2].astype(np.float64), "b": x[:, 2:]}, [y, -y]
    ours, plain = network(), network()
    history = fit(ours, *data, epochs=3, shuffle=False, verbose=0)
    same_history(history, plain.fit(*data, epochs=3, shuffle=False, verbose=0))
    same(ours, plain)


def test_a_dataset_streams_to_the_same_weights_block_after_block(rows, monkeypatch):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(rows).batch(32)
    arrays, whole, blocks = build(), build(), build()
    expected = fit(arrays, *rows, epochs=3, shuffle=False, verbose=0, validation_data=rows)
    same_history(fit(whole, dataset, epochs=3, verbose=0, validation_data=dataset), expected)
    monkeypatch.setattr(fits, "BLOCK", 64 * 6 * 4)  # two batches
    same_history(fit(blocks, dataset, epochs=3, verbose=0, validation_data=dataset), expected)
    same(arrays, whole, rtol=0, atol=0)
    same(arrays, blocks, rtol=0, atol=0)
    small = build()
    fit(small, *rows, epochs=3, shuffle=False, verbose=0)
    same(arrays, small, rtol=0, atol=0)


def test_a_block_takes_whole_batches_and_no_more_memory_than_it_may():
    data = (np.zeros((10, 24), np.float32), np.zeros(10, np.float32))  # 100 bytes a row
    assert fits._block(data, 32) == fits.BLOCK // 3200 * 32
    assert fits._block(data, 10**7) == 10**7, "one batch at least"


def test_xla_changes_the_time_and_not_the_numbers(rows):
    ours, plain = build(jit_compile=True), build()
    fit(ours, *rows, epochs=10, shuffle=False, verbose=0)
    plain.fit(*rows, epochs=10, shuffle=False, verbose=0)
    same(ours, plain)


class Traced(keras.layers.Layer):
    """Counts how often Python comes through here."""

    times = 0

    def call(self, inputs):
        type(self).times += 1
        return inputs


def test_a_second_fit_traces_nothing_and_a_new_compile_does(rows):
    network = build(Traced())
    fit(network, *rows, epochs=1, verbose=0)
    times = Traced.times
    fit(network, *rows, epochs=2, verbose=0)
    assert Traced.times == times
    network.compile("sgd", "mae")
    fit(network, *rows, epochs=1, verbose=0)
    assert Traced.times > times


def test_a_trained_model_can_be_forgotten(rows):
    network = build()
    fit(network, *rows, epochs=1, verbose=0)
    gone = weakref.ref(network)
    del network
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None


class OwnStep(keras.Sequential):
    """A model that trains in a way of its own."""

    def train_step(self, *arguments):
        return super().train_step(*arguments)


def own_step():
    network = OwnStep([keras.Input((5,)), keras.layers.Dense(1)])
    network.compile("sgd", "mse")
    return network


class Words(keras.callbacks.Callback):
    """Wants to hear of each batch."""

    def on_train_batch_end(self, batch, logs=None):
        self.last = batch


@pytest.mark.parametrize(
    ("reason", "network", "choice"),
    [
        ("Words is to hear of each batch", build, {"callbacks": [Words()]}),
        (
            "ModelCheckpoint is to hear",
            build,
            {"callbacks": [keras.callbacks.ModelCheckpoint("a.keras", save_freq=99)]},
        ),
        ("the loop has no class_weight", build, {"class_weight": {0: 1.0, 1: 2.0}}),
        ("the loop has no steps_per_epoch", build, {"steps_per_epoch": 2}),
        ("it is compiled with run_eagerly", lambda: build(run_eagerly=True), {}),
        ("its class has a train_step of its own", own_step, {}),
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else "",
)
def test_what_does_not_fit_goes_to_keras_with_a_word(rows, reason, network, choice):
    x, y = rows
    target = (y > 0).astype(np.int32) if "class_weight" in choice else y
    ours, plain = network(), network()
    ours.set_weights(plain.get_weights())
    with pytest.warns(UserWarning, match=f"Keras' own fit trains this model: {reason}"):
        fit(ours, x, target, epochs=2, shuffle=False, verbose=0, **choice)
    plain.fit(x, target, epochs=2, shuffle=False, verbose=0, **choice)
    same(ours, plain)


class Batches(keras.utils.PyDataset):
    """One batch that Python makes."""

    def __len__(self):
        return 1

    def __getitem__(self, number):
        return np.zeros((4, 5), np.float32), np.zeros(4, np.float32)


def test_data_that_no_loop_takes_goes_to_keras_with_a_word(rows):
    import tensorflow as tf

    with pytest.warns(UserWarning, match=r"a Batches is neither an array nor a tf\.data\.Dataset"):
        fit(build(), Batches(), epochs=1, verbose=0)
    with pytest.warns(UserWarning, match="the loop has no steps_per_epoch"):
        fit(build(), tf.data.Dataset.from_tensors(rows).repeat(), steps_per_epoch=2, shuffle=False, verbose=0)


def test_wrong_data_is_refused_before_anything_is_trained(rows):
    import tensorflow as tf

    x, y = rows
    network = build()
    before = network.get_weights()
    with pytest.raises(ValueError, match=r"found \[150, 149\] rows"):
        fit(network, x, y[1:])
    with pytest.raises(ValueError, match="there are no rows"):
        fit(network, x[:0], y[:0])
    with pytest.raises(ValueError, match="the dataset is empty"):
        fit(network, tf.data.Dataset.from_tensor_slices(rows).batch(32).take(0))
    with pytest.raises(ValueError, match="validation_split needs arrays"):
        fit(network, tf.data.Dataset.from_tensor_slices(rows).batch(32), validation_split=0.5)
    with pytest.raises(ValueError, match="compile the model first"):
        uncompiled = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
        fit(uncompiled, x, y)
    for first, second in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


if keras.backend.backend() == "tensorflow":

    def test_all_of_this_holds_on_jax():
        environment = os.environ | {"KERAS_BACKEND": "jax"}
        run = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:]

    def test_an_operation_that_xla_does_not_know_is_left_to_tensorflow(rows, monkeypatch):
        import tensorflow as tf

        monkeypatch.setattr(fits, "XLA_PAYS", 0)

        def outside(values):
            return tf.ensure_shape(tf.numpy_function(lambda array: array, [values], tf.float32), values.shape)

        @keras.saving.register_keras_serializable("tests")
        class Outside(keras.layers.Layer):
            """Leaves the graph for NumPy and comes back, with a gradient."""

            def call(self, inputs):
                return inputs + tf.stop_gradient(outside(inputs) - inputs)

        ours, plain = build(Outside()), build(Outside(), jit_compile=False)
        fit(ours, *rows, epochs=2, shuffle=False, verbose=0)
        plain.fit(*rows, epochs=2, shuffle=False, verbose=0)
        same(ours, plain)
