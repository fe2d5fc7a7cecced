"""The training task: what a job runs on Vertex AI, and what a notebook or a terminal runs too.

    python -m helpers.trainer.task --dataset diamonds --epochs 20 --model_dir model

Its arguments are named as the hyperparameters that a tuning job tries. It writes where Vertex AI says (AIP_MODEL_DIR
and its sisters), unless an argument says otherwise. Killed at any moment and started again, it ends with the same
model; several workers of a job share each batch, and end with that model too.
"""

import argparse
import importlib.util
import io
import json
import math
import os
import re
import signal
from collections.abc import Callable

from helpers import data, regression
from helpers.trainer import files, loop

FOLDERS = {
    "model_dir": ("AIP_MODEL_DIR", "for the model, which reads raw rows"),
    "checkpoint_dir": ("AIP_CHECKPOINT_DIR", "for what a task that was killed goes on from"),
    "log_dir": ("AIP_TENSORBOARD_LOG_DIR", "for TensorBoard"),
}
FREE = ("epochs", "preempt_at_epoch")  # what may change when a task is started again
LASTING = ("gs://", "/gcs/", "/mnt/")  # what is still there when the machine of a job is gone
JOB = ("CLOUD_ML_JOB_ID", "CLOUD_ML_PROJECT_ID", "CLUSTER_SPEC")  # any of them is set in every job


def main(arguments: list[str] | None = None):
    """Train, save, and return Keras' History with "rmse" and "val_rmse" of each epoch, in the target's unit."""
    asked = parse(arguments)
    addresses, rank = loop.workers()
    strategy = loop.strategy(addresses, rank)
    import keras

    # The rows, and the network that learns from them.
    train, validation = read(asked)
    features = data.Features(asked.dataset, train)
    x, y = features.arrays(train)
    x_validation, y_validation = features.arrays(validation)
    with strategy.scope():
        network = regression.build(features, (asked.units, asked.units), asked.activation, asked.seed)
        optimizer = keras.optimizers.Adam(asked.learning_rate)
        optimizer.build(network.trainable_variables)

    # Epoch after epoch, from where a killed task was.
    variables = [*network.variables, *optimizer.variables]
    history = train_epochs(
        asked,
        features.dataset.unit,
        loop.Checkpoint(asked.checkpoint_dir, variables, settings(asked), rank),
        loop.epoch(network, optimizer, x, y, asked.batch_size, asked.seed, strategy),
        lambda: regression.rmse(network, x_validation, y_validation),
        rank,
    )
    save(asked, rank, lambda folder: export(network, features, train, folder))
    result = keras.callbacks.History()
    result.history = history
    return result


def settings(asked: argparse.Namespace) -> dict:
    """Return the arguments that decide what is learnt: with others, a checkpoint is of another training."""
    return {name: value for name, value in vars(asked).items() if name not in (*FREE, *FOLDERS)}


def train_epochs(
    asked: argparse.Namespace,
    unit: str,
    checkpoint,
    run: Callable[[int], float],
    validate: Callable[[], float],
    rank: int,
) -> dict[str, list[float]]:
    """Train epoch after epoch, from where a killed task was; return "rmse" and "val_rmse" of each, in a unit.

    `run` trains for the epoch of a number and returns its error, `validate` returns the one on the validation rows,
    `checkpoint` restores and saves the history with the training's state. The worker of rank 0 reports for all.
    """
    history = checkpoint.restore()
    is_new = not history
    report = reporter(asked, unit) if rank == 0 else lambda history: None
    if history:
        log(f"{len(history)} epochs were done before, says {checkpoint.file}")
        report(history)
    for number in range(len(history), asked.epochs):
        errors = {"rmse": run(number), "val_rmse": validate()}
        if not math.isfinite(sum(errors.values())):
            raise FloatingPointError(f"epoch {number + 1} ends with {errors}: try a smaller --learning_rate")
        history.append(errors)
        report(history)
        if is_new and len(history) == asked.preempt_at_epoch:
            os.kill(os.getpid(), signal.SIGKILL)  # before the checkpoint is written: this epoch is lost
            os._exit(128 + signal.SIGKILL)  # the first process of a container is safe from its own signals
        checkpoint.save(history)
    return {name: [errors[name] for errors in history] for name in ("rmse", "val_rmse")}


def save(asked: argparse.Namespace, rank: int, export: Callable[[str], None]) -> None:
    """Let the worker of rank 0 export the model into the folder for it, and log where that is."""
    if rank == 0 and asked.model_dir:
        export(asked.model_dir)
        log(f"The model is in {asked.model_dir}")
    elif rank == 0:
        log("The model is not saved: there is neither --model_dir nor AIP_MODEL_DIR.", "WARNING")


def parse(arguments: list[str] | None, module: str = "task") -> argparse.Namespace:
    """Return a task's arguments; a wrong one ends the process with status 2 and says what is wrong."""
    name = f"python -m helpers.trainer.{module}"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--dataset", choices=("penguins", "diamonds"), default="diamonds")
    add("--data", default=os.environ.get("AIP_TRAINING_DATA_URI"), help="its rows in CSV files: gs://bucket/rows-*.csv")
    add("--validation_data", default=os.environ.get("AIP_VALIDATION_DATA_URI"), help="without it, data is split")
    add("--epochs", type=whole, default=20)
    add("--batch_size", type=whole, default=128, help="rows for one update, by all workers together")
    add("--learning_rate", type=float, default=0.003)
    add("--units", type=whole, default=64, help="of each of the two hidden layers")
    add("--activation", default="relu")
    add("--seed", type=whole, default=1)
    add("--preempt_at_epoch", type=whole, help="die there as a Spot VM does, unless a checkpoint was gone on from")
    for name, (variable, use) in FOLDERS.items():
        add(f"--{name}", default=os.environ.get(variable), help=f"{use}; by default {variable}")
    asked = parser.parse_args(arguments)

    if any(name in os.environ for name in JOB):
        if not asked.model_dir:
            parser.error("there is no place for the model: a job with a base_output_dir gets one in AIP_MODEL_DIR")
        for name in FOLDERS:
            folder = getattr(asked, name) or LASTING[0]
            if not folder.startswith(LASTING):
                parser.error(f"--{name} {folder} is on the job's own disk, and is gone with it: give gs:// or /gcs/")
    if (asked.data or "").startswith("bq://"):
        parser.error(f"{asked.data} is a table, and this task reads CSV files: make the data set from gs:// files")
    if importlib.util.find_spec("tensorflow") is None:  # what reads gs:// elsewhere; a job has its buckets as /gcs too
        for name, value in vars(asked).items():
            if isinstance(value, str):
                setattr(asked, name, re.sub("^gs://", "/gcs/", value))
    return asked


def whole(text: str) -> int:
    """Return the whole number in a text, also in 64.0, as a tuning job may write it."""
    if float(text) < 1 or float(text) % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(float(text))


def log(message: str, severity: str = "INFO", **facts) -> None:
    """Print a line of JSON, which Cloud Logging shows as a message with its facts."""
    print(json.dumps({"severity": severity, "message": message, **facts}), flush=True)


def reporter(asked: argparse.Namespace, unit: str):
    """Return a function that tells of the last epoch of a history: to the log, TensorBoard, and a tuning job."""
    import hypertune
    from tensorboard.summary import Writer

    board = Writer(asked.log_dir) if asked.log_dir else None
    trial = hypertune.HyperTune() if "CLOUD_ML_TRIAL_ID" in os.environ else None

    def report(history):
        number, errors = len(history), history[-1]
        log(f"Epoch {number} of {asked.epochs}: val_rmse {errors['val_rmse']:.2f} {unit}", epoch=number, **errors)
        if board:
            for name, value in errors.items():
                board.add_scalar(name, value, number)
            board.flush()
        if trial:
            trial.report_hyperparameter_tuning_metric("val_rmse", errors["val_rmse"], global_step=number)

    return report


def read(asked: argparse.Namespace):
    """Return the training rows and the validation rows: those of the course, or those of the files that were given."""
    if not asked.data:
        return data.split(asked.dataset, validation=True)[:2]
    import pandas as pd

    parts = []
    for pattern in filter(None, (asked.data, asked.validation_data)):
        names = files.find(pattern)
        if not names:
            raise FileNotFoundError(f"there is no file {pattern}")
        parts.append(pd.concat([pd.read_csv(io.BytesIO(files.read(name))) for name in names]))
    rows = pd.concat(parts, keys=range(len(parts)))  # together, so that both parts know all categories
    rows = rows.astype(dict.fromkeys(data.describe(asked.dataset).categorical, "category"))
    rows = data.complete(asked.dataset, rows)
    return (rows.loc[0], rows.loc[1]) if len(parts) == 2 else data.split(asked.dataset, rows, validation=True)[:2]


def export(network, features: data.Features, train, folder: str) -> None:
    """Write a SavedModel that reads raw rows; `network` is a Keras model or layer."""
    features.attach(network).export(folder, verbose=False)
    describe(features, train, folder)


def describe(features: data.Features, train, folder: str) -> None:
    """Write the OpenAPI schema of a raw row into the assets.extra of a model."""
    properties = {column: {"type": "number"} for column in features.scale}
    properties |= {column: {"type": "string", "enum": values} for column, values in features.vocabulary.items()}
    example = json.loads(train[list(properties)].iloc[0].to_json())
    schema = {"type": "object", "properties": properties, "required": list(properties), "example": example}
    files.write(f"{folder.rstrip('/')}/assets.extra/instance_schema.json", json.dumps(schema, indent=1).encode())


if __name__ == "__main__":
    main()
