"""The three-layer network and its baseline: right shapes, right units, the same numbers for the same seed."""

import numpy as np
import pytest

from helpers import data, regression


@pytest.fixture(scope="module")
def penguins():
    train, test = data.split("penguins")
    features = data.Features("penguins", train)
    return features, features.arrays(train), features.arrays(test)


def test_linear_finds_the_plane_that_the_targets_lie_on():
    x = np.random.default_rng(0).normal(size=(50, 3))
    predict = regression.linear(x, x @ [1.0, -2.0, 0.5] + 7)
    np.testing.assert_allclose(predict(np.eye(3)), [8.0, 5.0, 7.5])


def test_rmse_takes_a_number_a_function_and_a_network(penguins):
    features, (x, y), _ = penguins
    assert regression.rmse(0.0, np.zeros((2, 1)), np.array([3.0, 4.0])) == pytest.approx(np.sqrt(12.5))
    assert regression.rmse(lambda rows: rows[:, 0] + 1, np.ones((4, 1)), np.ones(4)) == pytest.approx(1)
    # Untrained, the network answers with about the mean: its output is in grams, not in deviations.
    untrained = regression.rmse(regression.build(features), x, y)
    assert 0.5 < untrained / regression.rmse(y.mean(), x, y) < 2


def test_rmse_refuses_predictions_that_do_not_match():
    with pytest.raises(ValueError, match="3 predictions for 2 targets"):
        regression.rmse(lambda rows: np.zeros(3), np.zeros((2, 1)), np.zeros(2))


def test_build_makes_three_layers_with_the_same_first_weights_for_the_same_seed(penguins):
    features, _, _ = penguins
    network, twin, other = (regression.build(features, seed=seed) for seed in (1, 1, 2))
    assert [layer.units for layer in network.layers if layer.weights] == [64, 64, 1]
    assert network.count_params() == 64 * features.width + 64 + 64 * 64 + 64 + 64 + 1
    for ours, same in zip(network.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, same)
    assert not np.array_equal(network.get_weights()[0], other.get_weights()[0])


def test_train_learns_and_repeats_itself(penguins):
    features, train, test = penguins

    def trained():
        network = regression.build(features, seed=1)
        history = regression.train(network, *train, epochs=8, validation=test, batch_size=32, seed=1)
        return history.history, network.get_weights()

    (history, weights), (again, same) = trained(), trained()
    assert set(history) == {"loss", "rmse", "val_loss", "val_rmse"}
    assert history["rmse"][-1] < 0.6 * history["rmse"][0]
    assert history["val_rmse"][-1] < 450
    assert history == again
    for first, second in zip(weights, same, strict=True):
        np.testing.assert_array_equal(first, second)


def test_train_changes_nothing_but_the_time_against_plain_keras(penguins):
    import keras

    features, (x, y), _ = penguins
    ours, plain = regression.build(features, seed=1), regression.build(features, seed=1)
    regression.train(ours, x, y, epochs=3, batch_size=32, seed=5)
    plain.compile(optimizer=keras.optimizers.Adam(0.003), loss="mse")
    for epoch in range(3):
        taken = regression.order(len(x), epoch, seed=5)
        plain.fit(x[taken], y[taken], batch_size=32, shuffle=False, verbose=0)
    for first, second in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_keras_3_saves_a_folder_by_export_alone(tmp_path):
    import keras

    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"(?s)Invalid filepath extension for saving.*Use `model.export"):
        network.save(tmp_path / "model")


def test_code_for_a_tpu_needs_one(monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(ValueError, match=r"Please provide a TPU Name to connect to\."):
        tf.distribute.cluster_resolver.TPUClusterResolver()
