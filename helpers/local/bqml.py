"""BigQuery ML: CREATE MODEL and the ML functions, on Arrow tables.

    body, data = train(plan(options, fields), rows)      # the model as BigQuery's JSON, and what it learnt
    call(load(warehouse, cursor, name), "PREDICT", rows, {})

linear_reg is exact: least squares, as BigQuery's NORMAL_EQUATION, and reproduces what Google publishes. Boosted trees
and random forests are XGBoost's, as BigQuery's are. logistic_reg is fitted with L-BFGS and dnn_* with scikit-learn, where
BigQuery takes gradient descent and TensorFlow: models of the same kind with other digits.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from helpers.local.warehouse import BigQueryError, Name, Warehouse, standard_type, unimplemented

NULL_CATEGORY = "_null_filler"  # how ML.WEIGHTS calls a missing value, which is a category of its own
INTERCEPT = "__INTERCEPT__"

# Options by the models that take them; None: no default. What is not here is refused by name.
_COMMON = {
    "input_label_cols": None,
    "data_split_method": "AUTO_SPLIT",
    "data_split_eval_fraction": 0.2,
    "data_split_col": None,
    "enable_global_explain": False,
}
_ITERATIVE = {"max_iterations": 20, "early_stop": True, "min_rel_progress": 0.01}
_TREES = {
    "max_tree_depth": 6,
    "subsample": 1.0,
    "colsample_bytree": 1.0,
    "colsample_bylevel": 1.0,
    "colsample_bynode": 1.0,
    "min_split_loss": 0.0,
    "min_tree_child_weight": 1,
    "l1_reg": 0.0,
    "l2_reg": 1.0,
    "num_parallel_tree": 1,
    "tree_method": "AUTO",
    "booster_type": "GBTREE",
    "auto_class_weights": False,
}
_LINEAR = {
    # These steer a descent that an exact solution does not need.
    **_ITERATIVE,
    "learn_rate_strategy": "LINE_SEARCH",
    "learn_rate": 0.1,
    "ls_init_learn_rate": 0.1,
}
_NETWORK = {
    "hidden_units": None,
    "activation_fn": "RELU",
    "optimizer": "ADAM",
    "batch_size": None,
    "dropout": 0.0,
    "learn_rate": 0.001,
}
# The one value that an option may have here, where BigQuery has more.
_ONLY = {
    "booster_type": ("GBTREE",),
    "optimize_strategy": ("AUTO_STRATEGY", "NORMAL_EQUATION"),
    "category_encoding_method": ("ONE_HOT_ENCODING",),
    "dropout": (0,),
    "activation_fn": ("RELU", "TANH", "SIGMOID"),
    "optimizer": ("ADAM", "SGD"),
    "data_split_method": ("AUTO_SPLIT", "NO_SPLIT", "RANDOM", "CUSTOM", "SEQ"),
    "tree_method": ("AUTO", "EXACT", "APPROX", "HIST"),
}
_FOREST = {"num_parallel_tree": 100, "max_tree_depth": 15, "subsample": 0.8, "colsample_bynode": 0.8}

MODELS = {
    "LINEAR_REG": {**_LINEAR, "optimize_strategy": "AUTO_STRATEGY", "category_encoding_method": "ONE_HOT_ENCODING"},
    "LOGISTIC_REG": {**_LINEAR, "auto_class_weights": False, "category_encoding_method": "ONE_HOT_ENCODING"},
    "BOOSTED_TREE_REGRESSOR": {**_ITERATIVE, **_TREES, "learn_rate": 0.3},
    "BOOSTED_TREE_CLASSIFIER": {**_ITERATIVE, **_TREES, "learn_rate": 0.3},
    "RANDOM_FOREST_REGRESSOR": {**_TREES, **_FOREST},
    "RANDOM_FOREST_CLASSIFIER": {**_TREES, **_FOREST},
    "DNN_REGRESSOR": {**_ITERATIVE, **_NETWORK},
    "DNN_CLASSIFIER": {**_ITERATIVE, **_NETWORK},
}


@dataclass
class Plan:
    """A CREATE MODEL that makes sense: the kind of model, all options, the label, and the features by their type."""

    type: str
    options: dict
    label: dict
    features: list[dict]

    @property
    def is_classifier(self) -> bool:
        """Say whether the label is a class."""
        return self.type.endswith(("CLASSIFIER", "LOGISTIC_REG"))


def plan(options: dict, fields: list[dict]) -> Plan:
    """Return the plan for the OPTIONS of a CREATE MODEL and the schema of its query; BigQueryError says what is wrong."""
    options = dict(options)
    type_ = str(options.pop("model_type", "")).upper().replace("LINEAR_REGRESSION", "LINEAR_REG")
    type_ = type_.replace("LOGISTIC_REGRESSION", "LOGISTIC_REG")
    if type_ not in MODELS:
        models = ", ".join(MODELS)
        if not type_:
            raise BigQueryError(f"MODEL_TYPE is a required option. The local BigQuery ML has {models}.")
        raise unimplemented(f"MODEL_TYPE {type_}", f"it has {models}; other types need BigQuery ML on Google Cloud")
    known = _COMMON | MODELS[type_]
    if type_.endswith("_REG") and (options.pop("l1_reg", 0) or options.pop("l2_reg", 0)):
        raise unimplemented("L1_REG and L2_REG of linear models", "leave them out or train a boosted tree, which has both")
    if unknown := sorted(options.keys() - known):
        raise unimplemented(f"The option {unknown[0].upper()} of {type_}", f"it has {', '.join(sorted(known)).upper()}")
    options = known | options
    for name, allowed in _ONLY.items():
        value = options.get(name, allowed[0])
        if (value.upper() if isinstance(value, str) else value) not in allowed:
            raise unimplemented(f"{name.upper()} = {value!r}", f"it takes {' or '.join(map(repr, allowed))}")
    labels = options.pop("input_label_cols") or ["label"]
    by_name = {column["name"].lower(): column for column in fields}
    if len(labels) != 1 or labels[0].lower() not in by_name:
        raise BigQueryError(
            f"Unable to identify the label column {', '.join(labels)}. Name one column of the query in INPUT_LABEL_COLS, "
            f"or call it label; the query has {', '.join(column['name'] for column in fields)}."
        )
    label = by_name.pop(labels[0].lower())
    new = Plan(type_, options, label, [])
    if not new.is_classifier and label["type"] not in _NUMERIC:
        raise BigQueryError(f"The label column {label['name']} of {type_} must be numeric; it is {label['type']}.")
    if split := _split_column(options):
        if split.lower() not in by_name:
            raise BigQueryError(f"DATA_SPLIT_COL {split} is not a column of the query.")
        by_name.pop(split.lower())
    for column in by_name.values():
        if column["mode"] == "REPEATED" or column["type"] not in (*_NUMERIC, "STRING", "BOOLEAN"):
            raise unimplemented(
                f"The feature {column['name']} of type {column['type']}", "features are numbers, STRING or BOOL"
            )
    new.features = list(by_name.values())
    if not new.features:
        raise BigQueryError("At least one feature column is needed besides the label.")
    return new


_NUMERIC = ("INTEGER", "FLOAT", "NUMERIC")


def _split_column(options: dict) -> str | None:
    needs = options["data_split_method"].upper() in ("CUSTOM", "SEQ")
    if needs and not options["data_split_col"]:
        raise BigQueryError(f"DATA_SPLIT_COL is needed with DATA_SPLIT_METHOD = {options['data_split_method']!r}.")
    return options["data_split_col"] if needs else None


# Features


@dataclass
class Features:
    """How rows become numbers: missing numbers are the mean, and each category is an input of its own."""

    means: dict[str, float]
    deviations: dict[str, float]
    categories: dict[str, list[str]]
    info: list[dict] = field(default_factory=list)  # the rows of ML.FEATURE_INFO

    @classmethod
    def learn(cls, rows: pa.Table, features: list[dict]) -> "Features":
        """Return what training rows show of each feature."""
        new = cls({}, {}, {})
        for name, type_ in ((column["name"], column["type"]) for column in features):
            column = rows[name]
            info = dict.fromkeys(("min", "max", "mean", "median", "stddev", "category_count")) | {"input": name}
            if type_ in _NUMERIC:
                values = _numbers(column)
                present = values[~np.isnan(values)]
                if not len(present):
                    raise BigQueryError(f"The feature {name} has no values.")
                new.means[name], new.deviations[name] = float(present.mean()), float(present.std()) or 1.0
                statistics = ("min", np.min), ("max", np.max), ("mean", np.mean), ("median", np.median)
                info |= {key: float(function(present)) for key, function in statistics}
                info["stddev"] = float(present.std(ddof=1)) if len(present) > 1 else 0.0
            else:
                new.categories[name] = sorted(set(_texts(column)))
                info["category_count"] = len(new.categories[name])
            new.info.append(info | {"null_count": column.null_count, "dimension": None})
        return new

    @property
    def inputs(self) -> list[tuple[str, str | None]]:
        """Return the inputs of a model: (feature, category), without a category for a number."""
        numbers = [(name, None) for name in self.means]
        return numbers + [(name, value) for name, values in self.categories.items() for value in values]

    def encode(self, rows: pa.Table, function: str = "PREDICT") -> np.ndarray:
        """Return rows as inputs, float64 of shape (rows, inputs); a category that training did not show is all zeros."""
        columns = {name.lower(): i for i, name in enumerate(rows.column_names)}
        parts = []
        for name in (*self.means, *self.categories):
            if name.lower() not in columns:
                raise BigQueryError(f"Column {name} is not found in the input data to the {function} function.")
            column = rows.column(columns[name.lower()])
            if name in self.means:
                values = _numbers(column)
                parts.append(np.where(np.isnan(values), self.means[name], values)[:, None])
            else:
                parts.append(np.array(_texts(column), object)[:, None] == np.array(self.categories[name], object))
        return np.concatenate(parts, axis=1, dtype=np.float64)

    def scale(self, x: np.ndarray) -> np.ndarray:
        """Return inputs with numbers standardised."""
        shift, by = self.scaling
        return (x - shift) / by

    @property
    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the deviation of each input; 0 and 1 for categories."""
        rest = len(self.inputs) - len(self.means)
        return np.array([*self.means.values()] + [0.0] * rest), np.array([*self.deviations.values()] + [1.0] * rest)

    def by_feature(self, values: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the features, and values of inputs summed by feature, of shape (rows, features)."""
        names = [*self.means, *self.categories]
        groups = np.array([names.index(name) for name, _ in self.inputs])
        return names, np.stack([values[:, groups == i].sum(axis=1) for i in range(len(names))], axis=1)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        raise BigQueryError(f"A numeric column is expected, not one of type {column.type}.")
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _texts(column: pa.ChunkedArray) -> list[str]:
    return [NULL_CATEGORY if value is None else value for value in column.cast(pa.string()).to_pylist()]


# Training


class Progress:
    """The losses of each iteration, and whether it is time to stop."""

    def __init__(self, options: dict, should_stop: Callable[[], bool]):
        """Start the clock."""
        self.options, self.should_stop = options, should_stop
        self.iterations: list[dict] = []
        self._started = time.monotonic()

    def step(self, loss: float, eval_loss: float | None = None, learn_rate: float | None = None) -> bool:
        """Note an iteration and return whether it was the last."""
        if self.should_stop():
            raise BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
        now = time.monotonic()
        entry = {"index": len(self.iterations), "trainingLoss": float(loss), "learnRate": learn_rate}
        entry |= {"evalLoss": eval_loss, "durationMs": str(round(1000 * (now - self._started)))}
        self._started = now
        watched = [it["trainingLoss"] if it["evalLoss"] is None else it["evalLoss"] for it in (*self.iterations, entry)]
        self.iterations.append({key: value for key, value in entry.items() if value is not None})
        for iteration in self.iterations:
            iteration.setdefault("evalLoss", None)
        enough = len(watched) > 1 and watched[-2] - watched[-1] < self.options["min_rel_progress"] * abs(watched[-2])
        return bool(self.options["early_stop"] and enough)
