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
import pyarrow.compute as pc

from helpers.local.warehouse import BigQueryError, Name, Warehouse, first, standard_type, unimplemented

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
        raise unimplemented(
            "L1_REG and L2_REG of linear models", "leave them out or train a boosted tree, which has both"
        )
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
                new.categories[name] = sorted(_texts(column).unique().to_pylist())
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
                codes = pc.index_in(_texts(column), pa.array(self.categories[name], pa.string()))
                parts.append(codes.to_numpy()[:, None] == np.arange(len(self.categories[name])))
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
    return column.cast(pa.float64()).to_numpy().astype(np.float64)


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()).fill_null(NULL_CATEGORY)


# Training


class Progress:
    """The loss of each iteration, and whether it is time to stop."""

    def __init__(self, options: dict, should_stop: Callable[[], bool]):
        """Start the clock."""
        self.options, self.should_stop = options, should_stop
        self.iterations: list[dict] = []
        self._watched: list[float] = []
        self._started = time.monotonic()

    def step(self, loss: float, eval_loss: float | None = None) -> bool:
        """Note an iteration and return whether it was the last."""
        if self.should_stop():
            raise BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
        duration, self._started = time.monotonic() - self._started, time.monotonic()
        entry = {"index": len(self.iterations), "trainingLoss": float(loss), "durationMs": str(round(1000 * duration))}
        if eval_loss is not None:
            entry["evalLoss"] = float(eval_loss)
        if "learn_rate" in self.options and not self.options.get("learn_rate_strategy"):
            entry["learnRate"] = self.options["learn_rate"]
        self.iterations.append(entry)
        self._watched.append(float(loss if eval_loss is None else eval_loss))
        *_, before, last = [np.inf, *self._watched]
        return bool(self.options.get("early_stop")) and before - last < self.options["min_rel_progress"] * abs(before)


@dataclass
class Split:
    """Encoded rows: inputs and targets (numbers, or the numbers of classes) to train on and to evaluate with."""

    x: np.ndarray
    y: np.ndarray
    eval_x: np.ndarray
    eval_y: np.ndarray
    has_eval: bool  # whether the rows to evaluate with are others

    def evaluation(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the rows to evaluate with, if training has not seen them."""
        return (self.eval_x, self.eval_y) if self.has_eval else None


def train(plan: Plan, rows: pa.Table, should_stop: Callable[[], bool] = lambda: False) -> tuple[dict, bytes]:
    """Train a model; return its resource in BigQuery's JSON, and what it learnt."""
    started = time.time()
    rows = rows.filter(rows[plan.label["name"]].is_valid())
    if not rows.num_rows:
        raise BigQueryError("The training data is empty: no row has a label.")
    is_eval = _split(plan.options, rows)
    has_eval = is_eval is not None
    training = rows.filter(pa.array(~is_eval)) if has_eval else rows
    evaluation = rows.filter(pa.array(is_eval)) if has_eval else rows
    if not training.num_rows or not evaluation.num_rows:
        raise BigQueryError("The split of the data leaves no rows for training or for evaluation.")
    features = Features.learn(training, plan.features)
    classes = None
    if plan.is_classifier:
        classes = sorted(set(rows[plan.label["name"]].to_pylist()))
        if len(classes) < 2:
            raise BigQueryError(f"The label column {plan.label['name']} has one value; a classifier needs two or more.")
    y, eval_y = (_targets(part[plan.label["name"]], classes) for part in (training, evaluation))
    split = Split(features.encode(training), y, features.encode(evaluation), eval_y, has_eval)
    progress = Progress(plan.options, should_stop)
    learnt = _FIT[_family(plan.type)](plan, features, split, len(classes or ()), progress)
    specification = {
        "type": plan.type,
        "options": plan.options,
        "label": plan.label,
        "classes": classes,
        "features": vars(features),
        "iterations": progress.iterations,
    }
    model = Model(specification, learnt)
    learnt["eval_y"], learnt["eval_scores"] = split.eval_y, model.scores(split.eval_x)
    if plan.options["enable_global_explain"] and _family(plan.type) != "DNN":
        _, attributions = model.attributions(split.eval_x)
        specification["global"] = np.abs(attributions).mean(axis=0).tolist()
    return model.resource(plan, started), model.dump()


def _split(options: dict, rows: pa.Table) -> np.ndarray | None:
    # Which rows are for evaluation alone; None: all are for both.
    n, method = rows.num_rows, options["data_split_method"].upper()
    count = round(n * options["data_split_eval_fraction"])
    if method == "AUTO_SPLIT":
        method = "NO_SPLIT" if n < 500 else "RANDOM"
        count = round(0.2 * n) if n <= 50_000 else 10_000
    if method == "NO_SPLIT":
        return None
    if method == "CUSTOM":
        column = rows[options["data_split_col"]]
        if not pa.types.is_boolean(column.type):
            raise BigQueryError("DATA_SPLIT_COL must be of type BOOL with DATA_SPLIT_METHOD = 'CUSTOM'.")
        return column.fill_null(False).to_numpy()
    if method == "SEQ":  # the largest values are for evaluation
        order = np.argsort(_texts_or_numbers(rows[options["data_split_col"]]), kind="stable")
    else:
        order = np.random.default_rng(0).permutation(n)  # the same in each run, as in BigQuery
    is_eval = np.zeros(n, bool)
    is_eval[order[n - count :]] = True
    return is_eval


def _texts_or_numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _targets(column: pa.ChunkedArray, classes: list | None) -> np.ndarray:
    if classes is None:
        return _numbers(column)
    numbers = {value: i for i, value in enumerate(classes)}
    return np.array([numbers.get(value, -1) for value in column.to_pylist()])


def _family(type_: str) -> str:
    return {"LINEAR_REG": "LINEAR", "LOGISTIC_REG": "LOGISTIC"}.get(type_, type_.partition("_")[0])


def _fit_linear(plan: Plan, features: Features, split: Split, classes: int, progress: Progress) -> dict:
    # One-hot inputs and an intercept leave the weights undetermined: these are the shortest, and the predictions are
    # the same for all. Standardised, no number is lost to the scale of a feature.
    shift, scale = features.scaling
    design = np.column_stack([np.ones(len(split.x)), (split.x - shift) / scale])
    (bias, *weights), *_ = np.linalg.lstsq(design, split.y, rcond=None)
    weights = np.array(weights) / scale
    learnt = {"weights": weights[None], "bias": np.array([bias - weights @ shift])}
    losses = [np.mean((x @ weights + learnt["bias"] - y) ** 2) for x, y in _parts(split)]
    progress.step(*losses)
    return learnt


def _parts(split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(split.x, split.y), *filter(None, [split.evaluation()])]


def _fit_logistic(plan: Plan, features: Features, split: Split, classes: int, progress: Progress) -> dict:
    from scipy.optimize import minimize

    shift, scale = features.scaling
    k = 1 if classes == 2 else classes
    weight = _class_weights(plan, split.y, classes)

    def loss(flat: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray):
        matrix = flat.reshape(k, -1)
        scores = _with_bias(x) @ matrix.T
        logits = np.column_stack([np.zeros(len(x)), scores]) if k == 1 else scores
        probabilities = _softmax(logits)
        picked = probabilities[np.arange(len(y)), y]
        error = (probabilities - np.eye(classes)[y]) * (weight / weight.sum())[:, None]
        gradient = error[:, -k:].T @ _with_bias(x)
        return -(weight * np.log(np.maximum(picked, 1e-300))).sum() / weight.sum(), gradient.ravel()

    parts = [((x - shift) / scale, y) for x, y in _parts(split)]
    weights = [weight, *(np.ones(len(y)) for _, y in parts[1:])]

    def after(flat: np.ndarray) -> None:
        if progress.step(*(loss(flat, *part, w)[0] for part, w in zip(parts, weights, strict=True))):
            raise StopIteration

    start, limit = np.zeros(k * (split.x.shape[1] + 1)), {"maxiter": int(plan.options["max_iterations"])}
    found = minimize(loss, start, (*parts[0], weight), "L-BFGS-B", jac=True, callback=after, options=limit)
    matrix = found.x.reshape(k, -1)
    raw = matrix[:, 1:] / scale
    return {"weights": raw, "bias": matrix[:, 0] - raw @ shift}


def _with_bias(x: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(x)), x])


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _class_weights(plan: Plan, y: np.ndarray, classes: int) -> np.ndarray:
    if not plan.options.get("auto_class_weights"):
        return np.ones(len(y))
    return (len(y) / classes / np.maximum(np.bincount(y, minlength=classes), 1))[y]


def _fit_trees(plan: Plan, features: Features, split: Split, classes: int, progress: Progress) -> dict:
    import xgboost

    options, is_forest = plan.options, plan.type.startswith("RANDOM")
    objective = "reg:squarederror" if not classes else "binary:logistic" if classes == 2 else "multi:softprob"
    parameters = {
        "objective": objective,
        "base_score": 0.5,  # as in the XGBoost that BigQuery uses
        "eta": 1.0 if is_forest else options["learn_rate"],
        "max_depth": options["max_tree_depth"],
        "gamma": options["min_split_loss"],
        "min_child_weight": options["min_tree_child_weight"],
        "alpha": options["l1_reg"],
        "lambda": options["l2_reg"],
        "tree_method": options["tree_method"].lower(),
        "seed": 0,
        **{key: options[key] for key in ("subsample", "num_parallel_tree")},
        **{key: options[key] for key in ("colsample_bytree", "colsample_bylevel", "colsample_bynode")},
        **({"num_class": classes} if classes > 2 else {}),
    }
    names = [f"f{i}" for i in range(split.x.shape[1])]
    weights = [_class_weights(plan, split.y, classes), None]
    matrices = [xgboost.DMatrix(x, y, weight=w, feature_names=names) for (x, y), w in zip(_parts(split), weights)]

    class Report(xgboost.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            losses = [values[-1] for metrics in evals_log.values() for values in metrics.values()]
            return progress.step(*(loss**2 if not classes else loss for loss in losses))

    booster = xgboost.train(
        parameters,
        matrices[0],
        1 if is_forest else int(options["max_iterations"]),
        evals=list(zip(matrices, ("train", "eval"), strict=False)),
        verbose_eval=False,
        callbacks=[Report()],
    )
    return {"booster": np.frombuffer(booster.save_raw("ubj"), np.uint8)}


def _fit_network(plan: Plan, features: Features, split: Split, classes: int, progress: Progress) -> dict:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    options, (n, inputs) = plan.options, split.x.shape
    hidden = options["hidden_units"] or [max(1, min(128, n // (2 * (inputs + max(classes, 1)))))]
    activation = {"RELU": "relu", "TANH": "tanh", "SIGMOID": "logistic"}[options["activation_fn"].upper()]
    network = (MLPClassifier if classes else MLPRegressor)(
        hidden_layer_sizes=tuple(int(units) for units in hidden),
        activation=activation,
        solver=options["optimizer"].lower(),
        learning_rate_init=options["learn_rate"],
        batch_size=int(min(n, options["batch_size"] or 1024)),
        alpha=0,
        random_state=0,
    )
    # Standardised, the label too, which BigQuery leaves as it is: its networks need many more iterations for grams.
    center, spread = (0.0, 1.0) if classes else (float(split.y.mean()), float(split.y.std()) or 1.0)
    parts = [(features.scale(x), (y - center) / spread if not classes else y) for x, y in _parts(split)]
    known = {"classes": np.arange(classes)} if classes else {}

    def loss(x: np.ndarray, y: np.ndarray) -> float:
        if classes:
            return float(-np.log(np.maximum(network.predict_proba(x)[np.arange(len(y)), y], 1e-15)).mean())
        return float(np.mean((network.predict(x) - y) ** 2)) * spread**2

    for _ in range(int(options["max_iterations"])):
        network.partial_fit(*parts[0], **known)
        if progress.step(*(loss(*part) for part in parts)):
            break
    layers = {f"layer{i}": weights for i, weights in enumerate(network.coefs_)}
    layers |= {f"bias{i}": bias for i, bias in enumerate(network.intercepts_)}
    return {**layers, "target": np.array([center, spread]), "activation": np.array(activation)}


_FIT = {
    "LINEAR": _fit_linear,
    "LOGISTIC": _fit_logistic,
    "BOOSTED": _fit_trees,
    "RANDOM": _fit_trees,
    "DNN": _fit_network,
}


# What a model can do


class Model:
    """A trained model: a specification, which is JSON, and arrays."""

    def __init__(self, specification: dict, arrays: dict[str, np.ndarray]):
        """Keep what training found."""
        self.specification, self.arrays = specification, arrays
        self.features = Features(**specification["features"])
        self.family = _family(specification["type"])
        self.classes: list | None = specification["classes"]
        self.label: str = specification["label"]["name"]

    def dump(self) -> bytes:
        """Return the model as bytes, for `Model.parse`."""
        buffer = io.BytesIO()
        np.savez(buffer, specification=np.array(json.dumps(self.specification)), **self.arrays)
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes) -> "Model":
        """Return the model that was dumped."""
        arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
        return cls(json.loads(str(arrays.pop("specification"))), arrays)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Return predictions of shape (rows,), or for a classifier probabilities of shape (rows, classes)."""
        if self.family in ("BOOSTED", "RANDOM"):
            scores = self.booster.predict(self.matrix(x)).astype(np.float64)
            return np.column_stack([1 - scores, scores]) if scores.ndim == 1 and self.classes else scores
        scores = self.network(x) if self.family == "DNN" else x @ self.arrays["weights"].T + self.arrays["bias"]
        if not self.classes:
            return scores[:, 0]
        return _softmax(np.column_stack([np.zeros(len(x)), scores]) if scores.shape[1] == 1 else scores)

    def network(self, x: np.ndarray) -> np.ndarray:
        """Return what the last layer of a network computes."""
        activations = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh, "logistic": lambda z: 1 / (1 + np.exp(-z))}
        hidden, layers = self.features.scale(x), sum(name.startswith("layer") for name in self.arrays)
        for i in range(layers):
            hidden = hidden @ self.arrays[f"layer{i}"] + self.arrays[f"bias{i}"]
            if i < layers - 1:
                hidden = activations[str(self.arrays["activation"])](hidden)
        center, spread = self.arrays["target"]
        return hidden * spread + center

    @property
    def booster(self):
        """Return the trees."""
        import xgboost

        return xgboost.Booster(model_file=bytearray(self.arrays["booster"].tobytes()))

    def matrix(self, x: np.ndarray):
        """Return inputs as XGBoost takes them."""
        import xgboost

        return xgboost.DMatrix(x, feature_names=[f"f{i}" for i in range(x.shape[1])])

    def attributions(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a baseline for each row, and how much each feature moves the prediction from there (Shapley values)."""
        if self.family == "DNN" or len(self.classes or ()) > 2:
            raise unimplemented("The explanation of networks and of more than two classes")
        if self.family in ("BOOSTED", "RANDOM"):
            values = self.booster.predict(self.matrix(x), pred_contribs=True).astype(np.float64)
            return values[:, -1], self.features.by_feature(values[:, :-1])[1]
        shift, _ = self.features.scaling
        weights = self.arrays["weights"][0]
        baseline = np.full(len(x), self.arrays["bias"][0] + weights @ shift)
        return baseline, self.features.by_feature((x - shift) * weights)[1]

    def resource(self, plan: Plan, started: float) -> dict:
        """Return the model in BigQuery's JSON."""
        options = plan.options
        shown = {"inputLabelCols": [self.label], "dataSplitMethod": options["data_split_method"].upper()}
        for option, key in (
            ("max_iterations", "maxIterations"),
            ("learn_rate", "learnRate"),
            ("early_stop", "earlyStop"),
        ):
            if option in options and self.family != "LINEAR":
                shown[key] = str(options[option]) if option == "max_iterations" else options[option]
        names = {"LINEAR_REG": "LINEAR_REGRESSION", "LOGISTIC_REG": "LOGISTIC_REGRESSION"}
        metrics = {_camel_case(key): value for key, value in self.evaluate({}).to_pylist()[0].items()}
        if self.classes:
            kind = "binaryClassificationMetrics" if len(self.classes) == 2 else "multiClassClassificationMetrics"
            metrics = {kind: {"aggregateClassificationMetrics": metrics}}
        else:
            metrics = {"regressionMetrics": metrics}
        run = {
            "trainingOptions": shown,
            "startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "results": self.specification["iterations"],
            "evaluationMetrics": metrics,
        }
        return {
            "modelType": names.get(plan.type, plan.type),
            "trainingRuns": [run],
            "featureColumns": [{"name": column["name"], "type": standard_type(column)} for column in plan.features],
            "labelColumns": [{"name": f"predicted_{self.label}", "type": standard_type(plan.label)}],
        }

    # The ML functions: each returns a table

    def judged(self, rows: pa.Table | None, function: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels of rows, or of those kept from training, and the model's scores for them."""
        if rows is None:
            return self.arrays["eval_y"], self.arrays["eval_scores"]
        names = {name.lower(): name for name in rows.column_names}
        if self.label.lower() not in names:
            raise BigQueryError(f"Column {self.label} is not found in the input data to the {function} function.")
        rows = rows.filter(rows[names[self.label.lower()]].is_valid())
        labels = _targets(rows[names[self.label.lower()]], self.classes)
        return labels, self.scores(self.features.encode(rows, function))

    def evaluate(self, settings: dict, rows: pa.Table | None = None) -> pa.Table:
        """ML.EVALUATE."""
        y, scores = self.judged(rows, "EVALUATE")
        metrics = _classification(y, scores, settings) if self.classes else _regression(y, scores)
        return pa.table({key: pa.array([value], pa.float64()) for key, value in metrics.items()})

    def predict(self, settings: dict, rows: pa.Table) -> pa.Table:
        """ML.PREDICT."""
        scores = self.scores(self.features.encode(rows))
        columns = self.predicted(scores, settings)
        kept = zip(rows.column_names, rows.columns, strict=True) if settings.get("keep_original_columns", True) else ()
        return pa.table(columns | {name: column for name, column in kept if name not in columns})

    def predicted(self, scores: np.ndarray, settings: dict) -> dict[str, pa.Array]:
        """Return the columns that a prediction adds."""
        name = f"predicted_{self.label}"
        if not self.classes:
            return {name: pa.array(scores, pa.float64())}
        labels = pa.array(self.classes)
        # BigQuery lists the classes from the last to the first.
        k = len(self.classes)
        flat = pa.StructArray.from_arrays(
            [labels.take(pa.array(np.tile(np.arange(k)[::-1], len(scores)))), pa.array(scores[:, ::-1].ravel())],
            ["label", "prob"],
        )
        probabilities = pa.ListArray.from_arrays(pa.array(np.arange(len(scores) + 1) * k, pa.int32()), flat)
        return {name: labels.take(pa.array(_decide(scores, settings))), f"{name}_probs": probabilities}

    def explain_predict(self, settings: dict, rows: pa.Table) -> pa.Table:
        """ML.EXPLAIN_PREDICT."""
        x = self.features.encode(rows, "EXPLAIN_PREDICT")
        scores = self.scores(x)
        baseline, attributions = self.attributions(x)
        names = [*self.features.means, *self.features.categories]
        top = np.argsort(-np.abs(attributions), axis=1)[:, : int(settings.get("top_k_features", 5))]
        columns = self.predicted(scores, settings)
        columns.pop(f"predicted_{self.label}_probs", None)
        if self.classes:
            columns["probability"] = pa.array(scores[np.arange(len(x)), _decide(scores, settings)])
        columns["top_feature_attributions"] = pa.array(
            [
                [{"feature": names[i], "attribution": row[i]} for i in best]
                for row, best in zip(attributions, top, strict=True)
            ],
            pa.list_(pa.struct([("feature", pa.string()), ("attribution", pa.float64())])),
        )
        columns["baseline_prediction_value"] = pa.array(baseline)
        columns["prediction_value"] = pa.array(baseline + attributions.sum(axis=1))
        columns["approximation_error"] = pa.array(np.zeros(len(x)))
        kept = zip(rows.column_names, rows.columns, strict=True)
        return pa.table(columns | {name: column for name, column in kept if name not in columns})

    def global_explain(self, settings: dict) -> pa.Table:
        """ML.GLOBAL_EXPLAIN."""
        if "global" not in self.specification:
            raise BigQueryError("ML.GLOBAL_EXPLAIN needs a model that was trained with ENABLE_GLOBAL_EXPLAIN = TRUE.")
        names = [*self.features.means, *self.features.categories]
        pairs = sorted(zip(self.specification["global"], names, strict=True), reverse=True)
        return pa.table({"feature": [name for _, name in pairs], "attribution": [value for value, _ in pairs]})

    def weights(self, settings: dict) -> pa.Table:
        """ML.WEIGHTS."""
        if self.family not in ("LINEAR", "LOGISTIC"):
            raise BigQueryError(f"ML.WEIGHTS does not support models of type {self.specification['type']}.")
        rows, category = [], pa.struct([("category", pa.string()), ("weight", pa.float64())])
        per_class = list(zip(self.arrays["weights"], self.arrays["bias"], strict=True))
        for class_, (weights, bias) in enumerate(per_class):
            label = {"class_label": str(self.classes[class_])} if len(per_class) > 1 else {}
            pairs = list(zip(self.features.inputs, weights, strict=True))
            for name in self.features.means:
                weight = next(w for (feature, _), w in pairs if feature == name)
                rows.append({**label, "processed_input": name, "weight": weight, "category_weights": []})
            for name in self.features.categories:
                weights_ = [{"category": value, "weight": w} for (feature, value), w in pairs if feature == name]
                rows.append({**label, "processed_input": name, "weight": None, "category_weights": weights_})
            rows.append({**label, "processed_input": INTERCEPT, "weight": bias, "category_weights": []})
        schema = [("processed_input", pa.string()), ("weight", pa.float64()), ("category_weights", pa.list_(category))]
        return pa.Table.from_pylist(rows, pa.schema([("class_label", pa.string())] * (len(per_class) > 1) + schema))

    def training_info(self, settings: dict) -> pa.Table:
        """ML.TRAINING_INFO."""
        iterations = self.specification["iterations"]
        columns = {"loss": "trainingLoss", "eval_loss": "evalLoss", "learning_rate": "learnRate"}
        return pa.table(
            {
                "training_run": pa.array([0] * len(iterations), pa.int64()),
                "iteration": pa.array([entry["index"] for entry in iterations], pa.int64()),
                **{name: pa.array([it.get(key) for it in iterations], pa.float64()) for name, key in columns.items()},
                "duration_ms": pa.array([int(entry["durationMs"]) for entry in iterations], pa.int64()),
            }
        )

    def feature_info(self, settings: dict) -> pa.Table:
        """ML.FEATURE_INFO."""
        numbers = [(key, pa.float64()) for key in ("min", "max", "mean", "median", "stddev")]
        counts = [(key, pa.int64()) for key in ("category_count", "null_count", "dimension")]
        return pa.Table.from_pylist(self.features.info, pa.schema([("input", pa.string()), *numbers, *counts]))

    def feature_importance(self, settings: dict) -> pa.Table:
        """ML.FEATURE_IMPORTANCE."""
        if self.family not in ("BOOSTED", "RANDOM"):
            raise BigQueryError(f"ML.FEATURE_IMPORTANCE does not support models of type {self.specification['type']}.")
        booster, columns = self.booster, {}
        for kind in ("weight", "total_gain", "total_cover"):
            found = booster.get_score(importance_type=kind)
            values = np.array([[found.get(f"f{i}", 0.0) for i in range(len(self.features.inputs))]])
            names, by_feature = self.features.by_feature(values)
            columns[kind] = by_feature[0]
        weight = np.maximum(columns["weight"], 1)
        return pa.table(
            {
                "feature": names,
                "importance_weight": pa.array(columns["weight"].astype(np.int64)),
                "importance_gain": columns["total_gain"] / weight,
                "importance_cover": columns["total_cover"] / weight,
            }
        )

    def confusion_matrix(self, settings: dict, rows: pa.Table | None = None) -> pa.Table:
        """ML.CONFUSION_MATRIX."""
        self.require_classes("CONFUSION_MATRIX")
        y, scores = self.judged(rows, "CONFUSION_MATRIX")
        k, known = len(self.classes), y >= 0
        counts = np.zeros((k, k), np.int64)
        np.add.at(counts, (y[known], _decide(scores, settings)[known]), 1)
        names = [str(value) for value in self.classes]
        columns = [name if name[:1].isalpha() else f"_{name}" for name in names]
        return pa.table({"expected_label": pa.array(self.classes), **dict(zip(columns, counts.T, strict=True))})

    def roc_curve(self, settings: dict, rows: pa.Table | None = None) -> pa.Table:
        """ML.ROC_CURVE."""
        if len(self.classes or ()) != 2:
            raise BigQueryError("ML.ROC_CURVE needs a classifier of two classes.")
        y, scores = self.judged(rows, "ROC_CURVE")
        thresholds = np.unique(np.quantile(scores[:, 1], np.linspace(0, 1, 101), method="nearest"))[::-1]
        positive = scores[:, 1][None] >= thresholds[:, None]
        true, false = (positive & (y == class_)[None] for class_ in (1, 0))
        tp, fp, p, n = true.sum(axis=1), false.sum(axis=1), (y == 1).sum(), (y == 0).sum()
        rates = {"threshold": thresholds, "recall": tp / p, "false_positive_rate": fp / n}
        return pa.table(
            rates | {"true_positives": tp, "false_positives": fp, "true_negatives": n - fp, "false_negatives": p - tp}
        )

    def require_classes(self, function: str) -> None:
        """Raise BigQueryError for a regressor."""
        if not self.classes:
            raise BigQueryError(f"ML.{function} does not support models of type {self.specification['type']}.")


def _decide(scores: np.ndarray, settings: dict) -> np.ndarray:
    # The number of the class that is predicted; a threshold is for the second of two.
    if "threshold" in settings and scores.shape[1] == 2:
        return (scores[:, 1] >= settings["threshold"]).astype(int)
    return scores.argmax(axis=1)


def _regression(y: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    error, variance = y - predicted, np.mean((y - y.mean()) ** 2)
    positive = (y > -1).all() and (predicted > -1).all()
    return {
        "mean_absolute_error": np.abs(error).mean(),
        "mean_squared_error": np.mean(error**2),
        "mean_squared_log_error": np.mean((np.log1p(y) - np.log1p(predicted)) ** 2) if positive else None,
        "median_absolute_error": np.sort(np.abs(error))[(len(y) - 1) // 2],  # the lower of two middle values
        "r2_score": 1 - np.mean(error**2) / variance if variance else None,
        "explained_variance": 1 - error.var() / variance if variance else None,
    }


def _classification(y: np.ndarray, scores: np.ndarray, settings: dict) -> dict[str, float]:
    from sklearn import metrics

    known = y >= 0  # a label that training did not show cannot be right
    decided, k = _decide(scores, settings), scores.shape[1]
    average = {"average": "binary" if k == 2 else "macro", "zero_division": 0, "labels": None if k == 2 else range(k)}
    y_known, scores_known = y[known], scores[known]
    areas = [
        metrics.roc_auc_score(y_known == class_, scores_known[:, class_])
        for class_ in ([1] if k == 2 else range(k))
        if 0 < (y_known == class_).sum() < len(y_known)
    ]
    return {
        "precision": metrics.precision_score(y_known, decided[known], **average),
        "recall": metrics.recall_score(y_known, decided[known], **average),
        "accuracy": float((decided == y).mean()),
        "f1_score": metrics.f1_score(y_known, decided[known], **average),
        "log_loss": metrics.log_loss(y_known, scores_known, labels=range(k)),
        "roc_auc": float(np.mean(areas)) if areas else None,
    }


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


# Functions by name: the method, whether rows are needed (None: they may be left away), and the settings that they take.
_FUNCTIONS = {
    "EVALUATE": (Model.evaluate, None, {"threshold"}),
    "PREDICT": (Model.predict, True, {"threshold", "keep_original_columns"}),
    "EXPLAIN_PREDICT": (Model.explain_predict, True, {"threshold", "top_k_features"}),
    "CONFUSION_MATRIX": (Model.confusion_matrix, None, {"threshold"}),
    "ROC_CURVE": (Model.roc_curve, None, set()),
    "GLOBAL_EXPLAIN": (Model.global_explain, False, set()),
    "WEIGHTS": (Model.weights, False, set()),
    "TRAINING_INFO": (Model.training_info, False, set()),
    "FEATURE_INFO": (Model.feature_info, False, set()),
    "FEATURE_IMPORTANCE": (Model.feature_importance, False, set()),
}


def load(warehouse: Warehouse, cursor, name: Name) -> Model:
    """Return a model of the warehouse; BigQueryError if there is none."""
    query = "SELECT data FROM _bigquery.resources WHERE kind = 'model' AND parent = ? AND id = ?"
    row = first(cursor, query, [name.schema, name.id])
    if row is None:
        warehouse.dataset(cursor, name.project, name.dataset)
        raise BigQueryError(f"Not found: Model {name}", "notFound")
    return Model.parse(row[0])


def call(model: Model, function: str, rows: pa.Table | None, settings: dict) -> pa.Table:
    """Return the rows of ML.function(MODEL model, rows, settings)."""
    if function not in _FUNCTIONS:
        raise unimplemented(f"ML.{function}", f"it has ML.{', ML.'.join(_FUNCTIONS)}")
    method, needs_rows, known = _FUNCTIONS[function]
    if needs_rows and rows is None:
        raise BigQueryError(f"ML.{function} needs rows: a query or TABLE after the model.")
    if needs_rows is False and rows is not None:
        raise BigQueryError(f"ML.{function} takes no rows.")
    if not isinstance(settings, dict) or (unknown := sorted(settings.keys() - known)):
        asked = unknown[0] if isinstance(settings, dict) else settings
        raise unimplemented(f"The argument {asked} of ML.{function}", f"it takes {', '.join(sorted(known)) or 'none'}")
    return method(model, settings, *([] if needs_rows is False else [rows]))
