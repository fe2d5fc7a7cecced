"""The three-layer network, its linear baseline and its error: what the lessons share.

network = regression.build(features)                         # 64, 64, 1, and back to the target's unit
history = regression.train(network, x, y, epochs=20, seed=1)
regression.rmse(network, x_test, y_test)

`regression.fit` is Keras' `fit` at the speed of the machine; `regression.order` is the order in which it takes rows.
"""

from collections.abc import Callable, Sequence

import numpy as np

from helpers.data import Features
from helpers.fit import fit, order

__all__ = ["build", "fit", "linear", "order", "rmse", "train"]


def linear(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit ordinary least squares on x (rows, inputs) and y (rows,); return a function that predicts.

    One-hot columns of one category add up to 1, as the intercept does; `numpy.linalg.lstsq` takes the shortest of
    the many equal solutions.
    """
    with_intercept = np.column_stack([x, np.ones(len(x))])
    weights = np.linalg.lstsq(with_intercept, y, rcond=None)[0]
    return lambda rows: rows @ weights[:-1] + weights[-1]


def rmse(model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the root of the mean squared error, in the target's unit.

    `model` is a Keras model or another function of x, or a number that is predicted for every row.
    """
    # Calling a Keras model costs less than `predict`, which traces a graph anew for each model it meets.
    predicted = model(x) if callable(model) else np.full(len(y), model)
    predicted = np.asarray(predicted, np.float64).reshape(-1)
    if predicted.shape != np.shape(y):
        raise ValueError(f"{len(predicted)} predictions for {len(y)} targets; expected one for each")
    return float(np.sqrt(np.mean((predicted - y) ** 2)))


def build(features: Features, units: Sequence[int] = (64, 64), activation: str | None = "relu", seed: int = 0):
    """Return the untrained network for `features`: a dense layer for each of `units`, then one output.

    Two hidden layers and the output layer make three layers with weights. The output is standardised inside and
    rescaled to the target's unit by a last layer without weights, so that predictions are grams or dollars while the
    weights stay of the size that optimizers expect. The same seed gives the same initial weights.
    """
    import keras

    keras.utils.set_random_seed(seed)
    mean, deviation = features.target_scale
    return keras.Sequential(
        [
            keras.Input((features.width,)),
            *[keras.layers.Dense(count, activation=activation) for count in units],
            keras.layers.Dense(1),
            keras.layers.Rescaling(scale=deviation, offset=mean),
        ]
    )


def train(
    network,
    x: np.ndarray,
    y: np.ndarray,
    epochs: int,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    optimizer=None,
    loss="mse",
    batch_size: int = 128,
    callbacks: Sequence = (),
    seed: int = 0,
):
    """Compile and fit `network`; return Keras' History with "rmse" (and "val_rmse"), in the target's unit, per epoch.

    `optimizer` (Adam with a learning rate of 0.003 if none is given) and `loss` are what `compile` takes. The epochs
    run on the device (see `helpers.fit`), and take the rows in the orders that the seed stands for.
    """
    import keras

    metric = keras.metrics.RootMeanSquaredError("rmse")
    network.compile(optimizer=optimizer or keras.optimizers.Adam(0.003), loss=loss, metrics=[metric])
    return fit(
        network,
        x,
        y,
        batch_size,
        epochs,
        verbose=0,
        callbacks=list(callbacks),
        validation_data=validation,
        validation_batch_size=8192,
        seed=seed,
    )
