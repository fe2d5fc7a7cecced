"""BigQuery ML: CREATE MODEL and the ML functions, on Arrow tables.

    body, data = train(plan(options, fields), rows)      # the model in BigQuery's JSON, and what it learnt
    call(load(warehouse, cursor, name), "PREDICT", rows, {})

linear_reg is exact: least squares, as BigQuery's NORMAL_EQUATION, with the digits that Google publishes. Boosted trees
and random forests are XGBoost's, as BigQuery's are. logistic_reg is fitted with L-BFGS and dnn_* with scikit-learn,
where BigQuery takes gradient descent and TensorFlow: models of the same kind with other digits.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.local.bigquery_schemas import BigQueryError, Name, googlesql_type, not_found, unimplemented
from helpers.local.bigquery_warehouse import Warehouse

_NULL = "_null_filler"  # ML.WEIGHTS' name of the category that a missing value is
_NUMERIC = ("INTEGER", "FLOAT", "NUMERIC")

# The options of each type of model with BigQuery's defaults; None: there is none. All other options are refused.
_COMMON = {
    **{"input_label_cols": None, "enable_global_explain": False, "data_split_col": None},
    **{"data_split_method": "AUTO_SPLIT", "data_split_eval_fraction": 0.2},
}
_ITERATIVE = {"max_iterations": 20, "early_stop": True, "min_rel_progress": 0.01}
_DESCENT = {  # which neither an exact solution nor L-BFGS needs
    **{"learn_rate_strategy": "LINE_SEARCH", "learn_rate": 0.1, "ls_init_learn_rate": 0.1},
    "category_encoding_method": "ONE_HOT_ENCODING",
}
_TREES = {
    **{"max_tree_depth": 6, "min_tree_child_weight": 1, "min_split_loss": 0.0, "l1_reg": 0.0, "l2_reg": 1.0},
    **{"subsample": 1.0, "colsample_bytree": 1.0, "colsample_bylevel": 1.0, "colsample_bynode": 1.0},
    **{"num_parallel_tree": 1, "tree_method": "AUTO", "booster_type": "GBTREE", "auto_class_weights": False},
}
_BOOSTED = {**_ITERATIVE, **_TREES, "learn_rate": 0.3}
_FOREST = {**_TREES, "num_parallel_tree": 100, "max_tree_depth": 15, "subsample": 0.8, "colsample_bynode": 0.8}
_NETWORK = {
    **{**_ITERATIVE, "learn_rate": 0.001, "batch_size": None, "hidden_units": None},
    **{"activation_fn": "RELU", "optimizer": "ADAM", "dropout": 0.0},
}
_MODELS = {
    "LINEAR_REG": {**_ITERATIVE, **_DESCENT, "optimize_strategy": "AUTO_STRATEGY"},
    "LOGISTIC_REG": {**_ITERATIVE, **_DESCENT, "auto_class_weights": False},
    **dict.fromkeys(("BOOSTED_TREE_REGRESSOR", "BOOSTED_TREE_CLASSIFIER"), _BOOSTED),
    **dict.fromkeys(("RANDOM_FOREST_REGRESSOR", "RANDOM_FOREST_CLASSIFIER"), _FOREST),
    **dict.fromkeys(("DNN_REGRESSOR", "DNN_CLASSIFIER"), _NETWORK),
}
# Options that take fewer values here than in BigQuery.
_VALUES = {
    "booster_type": ("GBTREE",),
    "category_encoding_method": ("ONE_HOT_ENCODING",),
    "optimize_strategy": ("AUTO_STRATEGY", "NORMAL_EQUATION"),
    "dropout": (0,),
    "activation_fn": ("RELU", "TANH", "SIGMOID"),
    "optimizer": ("ADAM", "SGD"),
    "data_split_method": ("AUTO_SPLIT", "NO_SPLIT", "RANDOM", "CUSTOM", "SEQ"),
}


@dataclass
class Plan:
    """A CREATE MODEL that makes sense: the type of model, all options, the label and the features as fields."""

    type: str
    options: dict
    label: dict
    features: list[dict]

    @property
    def is_classifier(self) -> bool:
        """Say whether the label is a class."""
        return self.type == "LOGISTIC_REG" or self.type.endswith("CLASSIFIER")


def plan(options: dict, fields: list[dict]) -> Plan:
    """Return the plan for the OPTIONS of a CREATE MODEL and the schema of its query; BigQueryError if it makes none."""
    options = dict(options)
    type_ = str(options.pop("model_type", "")).upper().replace("REGRESSION", "REG")
    if type_ not in _MODELS:
        raise unimplemented(
            f"MODEL_TYPE {type_ or 'nothing'}", f"it has {', '.join(_MODELS)}; others need Google Cloud"
        )
    known = _COMMON | _MODELS[type_]
    for name in {"l1_reg", "l2_reg"} - known.keys():
        if options.pop(name, 0):
            raise unimplemented(f"{name.upper()} of {type_}", "leave it out, or train a boosted tree, which has it")
    if unknown := sorted(options.keys() - known):
        raise unimplemented(f"The option {unknown[0].upper()} of {type_}", f"it has {', '.join(sorted(known)).upper()}")
    options = known | options
    for name, allowed in _VALUES.items():
        value = options.get(name, allowed[0])
        if (value.upper() if isinstance(value, str) else value) not in allowed:
            raise unimplemented(f"{name.upper()} = {value!r}", f"it takes {' or '.join(map(repr, allowed))}")
    columns = {column["name"].lower(): column for column in fields}

    def take(name: str, why: str) -> dict:
        if name.lower() not in columns:
            there = ", ".join(column["name"] for column in fields)
            raise BigQueryError(f"There is no column {name} for {why} in the query; it has {there}.")
        return columns.pop(name.lower())

    labels = options.pop("input_label_cols") or ["label"]
    if len(labels) != 1:
        raise unimplemented("More than one column in INPUT_LABEL_COLS")
    new = Plan(type_, options, take(labels[0], "INPUT_LABEL_COLS"), [])
    if options["data_split_method"].upper() in ("CUSTOM", "SEQ"):
        take(options["data_split_col"] or "", "DATA_SPLIT_COL")
    if not new.is_classifier and new.label["type"] not in _NUMERIC:
        raise BigQueryError(f"The label {labels[0]} of {type_} must be a number; it is {googlesql_type(new.label)}.")
    new.features = list(columns.values())
    for column in new.features:
        if googlesql_type(column) not in ("INT64", "FLOAT64", "NUMERIC", "STRING", "BOOL"):
            instead = "features are numbers, STRING or BOOL"
            raise unimplemented(f"The feature {column['name']} of type {googlesql_type(column)}", instead)
    if not new.features:
        raise BigQueryError("There are no feature columns beside the label.")
    return new


# Features


@dataclass
class Features:
    """How rows become inputs: missing numbers are the mean, and each category is an input of its own."""

    means: dict[str, float]
    deviations: dict[str, float]
    categories: dict[str, list[str]]
    info: list[dict] = field(default_factory=list)  # the rows of ML.FEATURE_INFO

    @classmethod
    def learn(cls, rows: pa.Table, features: list[dict]) -> "Features":
        """Return what training rows show of each feature."""
        new = cls({}, {}, {})
        for name, type_ in ((column["name"], column["type"]) for column in features):
            column, info = rows[name], {"input": name}
            if type_ in _NUMERIC:
                values = _numbers(column.drop_null())
                if not len(values):
                    raise BigQueryError(f"The feature {name} has no values.")
                new.means[name], new.deviations[name] = float(values.mean()), float(values.std()) or 1.0
                info |= {key: float(getattr(np, key)(values)) for key in ("min", "max", "mean", "median")}
                info["stddev"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            else:
                new.categories[name] = sorted(_texts(column).unique().to_pylist())
                info["category_count"] = len(new.categories[name])
            new.info.append({**info, "null_count": column.null_count})
        return new

    @property
    def names(self) -> list[str]:
        """Return the features: numbers, then categories."""
        return [*self.means, *self.categories]

    @property
    def inputs(self) -> list[tuple[str, str | None]]:
        """Return the inputs as pairs of feature and category, which numbers do not have."""
        ones = [(name, value) for name, values in self.categories.items() for value in values]
        return [(name, None) for name in self.means] + ones

    def encode(self, rows: pa.Table, function: str = "PREDICT") -> np.ndarray:
        """Return rows as inputs, float64 of shape (rows, inputs); categories that training did not show are zeros."""
        parts = []
        for name in self.names:
            column = _column(rows, name, function)
            if name in self.means:
                values = _numbers(column)
                parts.append(np.where(np.isnan(values), self.means[name], values)[:, None])
            else:
                codes = pc.index_in(_texts(column), pa.array(self.categories[name], pa.string()))
                parts.append(codes.to_numpy()[:, None] == np.arange(len(self.categories[name])))
        return np.concatenate(parts, axis=1, dtype=np.float64)

    @property
    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the deviation of each input; those of categories stay as they are."""
        rest = len(self.inputs) - len(self.means)
        return np.array([*self.means.values()] + [0.0] * rest), np.array([*self.deviations.values()] + [1.0] * rest)

    def by_feature(self, values: np.ndarray) -> np.ndarray:
        """Return values of inputs summed by feature, of shape (rows, features)."""
        groups = np.array([self.names.index(name) for name, _ in self.inputs])
        return np.stack([values[:, groups == i].sum(axis=1) for i in range(len(self.names))], axis=1)


def _column(rows: pa.Table, name: str, function: str) -> pa.ChunkedArray:
    for i, there in enumerate(rows.column_names):
        if there.lower() == name.lower():
            return rows.column(i)
    raise BigQueryError(f"Column {name} is not found in the input data to the {function} function.")


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        raise BigQueryError(f"A column of numbers is expected, not one of type {column.type}.") from None


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()).fill_null(_NULL)


# Training: each function learns from parts, which are inputs and targets to train on and, if there are others, to
# evaluate with. Targets are numbers, or the numbers of classes.


class Progress:
    """The loss of each iteration, and whether it is time to stop."""

    def __init__(self, options: dict, should_stop: Callable[[], bool]):
        """Start the clock."""
        self.options, self.should_stop = options, should_stop
        self.iterations: list[dict] = []
        self._watched, self._started = np.inf, time.monotonic()

    def step(self, loss: float, eval_loss: float | None = None) -> bool:
        """Note an iteration and return whether it was the last."""
        if self.should_stop():
            raise BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
        duration, self._started = time.monotonic() - self._started, time.monotonic()
        entry = {"index": len(self.iterations), "trainingLoss": float(loss), "durationMs": str(round(1000 * duration))}
        if eval_loss is not None:
            entry["evalLoss"] = float(eval_loss)
        if "learn_rate" in self.options and "learn_rate_strategy" not in self.options:
            entry["learnRate"] = self.options["learn_rate"]
        self.iterations.append(entry)
        before, self._watched = self._watched, entry.get("evalLoss", entry["trainingLoss"])
        is_slow = before - self._watched < self.options.get("min_rel_progress", 0) * abs(before)
        return bool(self.options.get("early_stop")) and is_slow


def train(plan: Plan, rows: pa.Table, should_stop: Callable[[], bool] = lambda: False) -> tuple[dict, bytes]:
    """Train a model; return its resource in BigQuery's JSON, and what it learnt."""
    started, label = time.gmtime(), plan.label["name"]
    rows = rows.filter(rows[label].is_valid())
    is_eval = _split(plan.options, rows)
    tables = [rows] if is_eval is None else [rows.filter(pa.array(mask)) for mask in (~is_eval, is_eval)]
    if not all(table.num_rows for table in tables):
        raise BigQueryError("There are no rows with a label to train on, or none to evaluate with.")
    classes = sorted(set(rows[label].to_pylist())) if plan.is_classifier else None
    if classes and len(classes) < 2:
        raise BigQueryError(f"The label {label} has a single value; a classifier needs two or more.")
    features = Features.learn(tables[0], plan.features)
    parts = [(features.encode(table), _targets(table[label], classes)) for table in tables]
    progress, family = Progress(plan.options, should_stop), plan.type.partition("_")[0]
    if plan.options["enable_global_explain"]:
        _check_explainable(family == "DNN", classes)
    learnt = _FIT[family](plan, features, parts, len(classes or ()), progress)
    learnt |= {"eval_y": parts[-1][1]}
    given = {"features_given": plan.features, "features": vars(features)}
    model = Model({**vars(plan), **given, "classes": classes}, learnt)
    learnt["eval_scores"] = model.scores(parts[-1][0])
    if plan.options["enable_global_explain"]:
        learnt["global"] = np.abs(model.attributions(parts[-1][0])[1]).mean(axis=0)
    model.specification["iterations"] = progress.iterations
    return model.resource(time.strftime("%Y-%m-%dT%H:%M:%SZ", started)), model.dump()


def _split(options: dict, rows: pa.Table) -> np.ndarray | None:
    # Which rows are to evaluate with; None: all are for both.
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
    if method == "SEQ":  # the largest values are to evaluate with
        column = rows[options["data_split_col"]]
        order = np.roll(pc.sort_indices(column).to_numpy(), column.null_count)  # where NULL comes last
    else:
        order = np.random.default_rng(0).permutation(n)  # the same in each run, as in BigQuery
    is_eval = np.zeros(n, bool)
    is_eval[order[n - count :]] = True
    return is_eval


def _targets(column: pa.ChunkedArray, classes: list | None) -> np.ndarray:
    if classes is None:
        return _numbers(column)
    numbers = {value: i for i, value in enumerate(classes)}
    return np.array([numbers.get(value, -1) for value in column.to_pylist()])


def _fit_linear(plan: Plan, features: Features, parts: list, classes: int, progress: Progress) -> dict:
    # One-hot inputs and an intercept leave the weights undetermined: these are the shortest, with the predictions that
    # all have. Standardised, no digit is lost to the scale of a feature.
    shift, scale = features.scaling
    (bias, *weights), *_ = np.linalg.lstsq(_with_bias((parts[0][0] - shift) / scale), parts[0][1], rcond=None)
    weights = np.array(weights) / scale
    bias -= weights @ shift
    progress.step(*(np.mean((x @ weights + bias - y) ** 2) for x, y in parts))
    return {"weights": weights[None], "bias": np.array([bias])}


def _with_bias(x: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(x)), x])


def _fit_logistic(plan: Plan, features: Features, parts: list, classes: int, progress: Progress) -> dict:
    from scipy.optimize import minimize

    shift, scale = features.scaling
    parts = [(_with_bias((x - shift) / scale), y) for x, y in parts]
    weights = [_row_weights(plan, parts[0][1], classes), *(np.ones(len(y)) for _, y in parts[1:])]
    k = 1 if classes == 2 else classes  # of two classes, the first needs no weights

    def loss(flat: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        probabilities = _probabilities(x @ flat.reshape(k, -1).T)
        share = weight / weight.sum()
        error = (probabilities - np.eye(classes)[y]) * share[:, None]
        surprise = -np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-300))
        return share @ surprise, (error[:, -k:].T @ x).ravel()

    def after(flat: np.ndarray) -> None:
        if progress.step(*(loss(flat, *part, weight)[0] for part, weight in zip(parts, weights, strict=True))):
            raise StopIteration

    start, limit = np.zeros(k * parts[0][0].shape[1]), {"maxiter": int(plan.options["max_iterations"])}
    found = minimize(loss, start, (*parts[0], weights[0]), "L-BFGS-B", jac=True, callback=after, options=limit)
    bias, matrix = np.split(found.x.reshape(k, -1), [1], axis=1)
    matrix /= scale
    return {"weights": matrix, "bias": bias[:, 0] - matrix @ shift}


def _probabilities(scores: np.ndarray) -> np.ndarray:
    if scores.shape[1] == 1:
        scores = np.column_stack([np.zeros(len(scores)), scores])
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _row_weights(plan: Plan, y: np.ndarray, classes: int) -> np.ndarray:
    if not plan.options.get("auto_class_weights"):
        return np.ones(len(y))
    return (len(y) / classes / np.maximum(np.bincount(y, minlength=classes), 1))[y]


def _fit_trees(plan: Plan, features: Features, parts: list, classes: int, progress: Progress) -> dict:
    import xgboost

    options = plan.options
    parameters = {
        "objective": ("reg:squarederror", "binary:logistic", "multi:softprob")[min(max(classes - 1, 0), 2)],
        "base_score": 0.5,  # as in the XGBoost that BigQuery uses
        "eta": options.get("learn_rate", 1.0),
        "tree_method": options["tree_method"].lower(),
        "seed": 0,
        "nthread": 1 if len(parts[0][1]) < 10_000 else 0,  # threads that wait for each other cost more than they bring
        **{"max_depth": options["max_tree_depth"], "min_child_weight": options["min_tree_child_weight"]},
        **{"gamma": options["min_split_loss"], "alpha": options["l1_reg"], "lambda": options["l2_reg"]},
        **{key: options[key] for key in _TREES if key.startswith(("colsample", "subsample", "num_parallel"))},
        **({"num_class": classes} if classes > 2 else {}),
    }
    matrices = [xgboost.DMatrix(x, y) for x, y in parts]
    matrices[0].set_weight(_row_weights(plan, parts[0][1], classes))

    class Report(xgboost.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            losses = [values[-1] for metrics in evals_log.values() for values in metrics.values()]
            return progress.step(*(loss if classes else loss**2 for loss in losses))

    booster = xgboost.train(
        parameters,
        matrices[0],
        int(options.get("max_iterations", 1)),
        evals=list(zip(matrices, ("train", "eval"), strict=False)),
        verbose_eval=False,
        callbacks=[Report()],
    )
    return {"booster": np.frombuffer(booster.save_raw("ubj"), np.uint8)}


def _fit_network(plan: Plan, features: Features, parts: list, classes: int, progress: Progress) -> dict:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    options, (n, inputs), (shift, scale) = plan.options, parts[0][0].shape, features.scaling
    hidden = options["hidden_units"] or [max(1, min(128, n // (2 * (inputs + max(classes, 1)))))]
    network = (MLPClassifier if classes else MLPRegressor)(
        hidden_layer_sizes=tuple(map(int, hidden)),
        activation={"RELU": "relu", "TANH": "tanh", "SIGMOID": "logistic"}[options["activation_fn"].upper()],
        solver=options["optimizer"].lower(),
        learning_rate_init=options["learn_rate"],
        batch_size=int(min(n, options["batch_size"] or 1024)),
        alpha=0,
        random_state=0,
    )
    # Standardised, the label too, which BigQuery leaves as it is: a label in grams takes its networks long to reach.
    center, spread = (0.0, 1.0) if classes else (parts[0][1].mean(), parts[0][1].std() or 1.0)
    parts = [((x - shift) / scale, y if classes else (y - center) / spread) for x, y in parts]
    known = {"classes": np.arange(classes)} if classes else {}

    def loss(x: np.ndarray, y: np.ndarray) -> float:
        if classes:
            return -np.log(np.maximum(network.predict_proba(x)[np.arange(len(y)), y], 1e-300)).mean()
        return np.mean((network.predict(x) - y) ** 2) * spread**2

    for _ in range(int(options["max_iterations"])):
        network.partial_fit(*parts[0], **known)
        if progress.step(*(loss(*part) for part in parts)):
            break
    layers = {f"layer{i}": weights for i, weights in enumerate(network.coefs_)}
    layers |= {f"bias{i}": bias for i, bias in enumerate(network.intercepts_)}
    return {**layers, "target": np.array([center, spread])}


_FIT = {
    **{"LINEAR": _fit_linear, "LOGISTIC": _fit_logistic, "DNN": _fit_network},
    **{"BOOSTED": _fit_trees, "RANDOM": _fit_trees},
}
_ACTIVATIONS = {"RELU": lambda z: np.maximum(z, 0), "TANH": np.tanh, "SIGMOID": lambda z: 1 / (1 + np.exp(-z))}


# What a model can do


class Model:
    """A trained model: a specification, which is JSON, and arrays. Its ML functions return tables."""

    def __init__(self, specification: dict, arrays: dict[str, np.ndarray]):
        """Keep what training found."""
        self.specification, self.arrays = specification, arrays
        self.type: str = specification["type"]
        self.features = Features(**specification["features"])
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

    def resource(self, started: str) -> dict:
        """Return the model in BigQuery's JSON."""
        specification, options = self.specification, self.specification["options"]
        told = ("data_split_method", "max_iterations", "learn_rate", "early_stop", "hidden_units", "max_tree_depth")
        shown = {camel_case(key): options[key] for key in told if options.get(key) is not None}
        metrics = {camel_case(key): value for key, value in self.evaluate({}).to_pylist()[0].items()}
        if self.classes:
            kind = "binaryClassificationMetrics" if len(self.classes) == 2 else "multiClassClassificationMetrics"
            metrics = {kind: {"aggregateClassificationMetrics": metrics}}
        else:
            metrics = {"regressionMetrics": metrics}

        def typed(name: str, column: dict) -> dict:
            return {"name": name, "type": {"typeKind": googlesql_type(column)}}

        return {
            "modelType": self.type.replace("_REG", "_REGRESSION") if self.type.endswith("_REG") else self.type,
            "trainingRuns": [
                {
                    "trainingOptions": {"inputLabelCols": [self.label], **shown},
                    "startTime": started,
                    "results": specification["iterations"],
                    "evaluationMetrics": metrics,
                }
            ],
            "featureColumns": [typed(column["name"], column) for column in specification["features_given"]],
            "labelColumns": [typed(f"predicted_{self.label}", specification["label"])],
        }

    # Predictions

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Return predictions of shape (rows,), or for a classifier probabilities of shape (rows, classes)."""
        if "booster" in self.arrays:
            scores = self.boosted(x)
            if not self.classes:
                return scores
            if scores.ndim == 1:
                return np.column_stack([1 - scores, scores])
            return scores / scores.sum(axis=1, keepdims=True)  # 32 bits do not add up to one
        scores = self.network(x) if "layer0" in self.arrays else x @ self.arrays["weights"].T + self.arrays["bias"]
        return _probabilities(scores) if self.classes else scores[:, 0]

    def boosted(self, x: np.ndarray, **kwargs) -> np.ndarray:
        """Return what the trees say of inputs."""
        import xgboost

        booster = xgboost.Booster(model_file=bytearray(self.arrays["booster"].tobytes()))
        return booster.predict(xgboost.DMatrix(x), **kwargs).astype(np.float64)

    def network(self, x: np.ndarray) -> np.ndarray:
        """Return what the last layer of a network computes."""
        shift, scale = self.features.scaling
        hidden, count = (x - shift) / scale, sum(name.startswith("layer") for name in self.arrays)
        for i in range(count):
            hidden = hidden @ self.arrays[f"layer{i}"] + self.arrays[f"bias{i}"]
            if i < count - 1:
                hidden = _ACTIVATIONS[self.specification["options"]["activation_fn"].upper()](hidden)
        center, spread = self.arrays["target"]
        return hidden * spread + center

    def attributions(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a baseline for each row, and how far each feature moves the prediction from it (Shapley values)."""
        _check_explainable("layer0" in self.arrays, self.classes)
        if "booster" in self.arrays:
            values = self.boosted(x, pred_contribs=True)
            return values[:, -1], self.features.by_feature(values[:, :-1])
        shift, _ = self.features.scaling
        weights = self.arrays["weights"][0]
        baseline = np.full(len(x), self.arrays["bias"][0] + weights @ shift)
        return baseline, self.features.by_feature((x - shift) * weights)

    def judged(self, rows: pa.Table | None, function: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels of rows, or of those that training kept, and the model's scores for them."""
        if rows is None:
            return self.arrays["eval_y"], self.arrays["eval_scores"]
        rows = rows.filter(_column(rows, self.label, function).is_valid())
        return _targets(_column(rows, self.label, function), self.classes), self.scores(
            self.features.encode(rows, function)
        )

    def predicted(self, scores: np.ndarray, settings: dict) -> dict[str, pa.Array]:
        """Return the columns that a prediction adds."""
        name = f"predicted_{self.label}"
        if not self.classes:
            return {name: pa.array(scores)}
        k, labels = len(self.classes), pa.array(self.classes)
        backwards = labels.take(pa.array(np.tile(np.arange(k)[::-1], len(scores))))  # as BigQuery lists classes
        pairs = pa.StructArray.from_arrays([backwards, pa.array(scores[:, ::-1].ravel())], ["label", "prob"])
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(scores) + 1) * k, pa.int32()), pairs)
        return {name: labels.take(pa.array(_decide(scores, settings))), f"{name}_probs": lists}

    # The ML functions

    def evaluate(self, settings: dict, rows: pa.Table | None = None) -> pa.Table:
        """ML.EVALUATE."""
        y, scores = self.judged(rows, "EVALUATE")
        metrics = _classification(y, scores, settings) if self.classes else _regression(y, scores)
        return pa.table({key: pa.array([value], pa.float64()) for key, value in metrics.items()})

    def predict(self, settings: dict, rows: pa.Table) -> pa.Table:
        """ML.PREDICT."""
        columns = self.predicted(self.scores(self.features.encode(rows)), settings)
        return _beside(columns, rows) if settings.get("keep_original_columns", True) else pa.table(columns)

    def explain_predict(self, settings: dict, rows: pa.Table) -> pa.Table:
        """ML.EXPLAIN_PREDICT."""
        x = self.features.encode(rows, "EXPLAIN_PREDICT")
        scores, names = self.scores(x), self.features.names
        baseline, attributions = self.attributions(x)
        columns = self.predicted(scores, settings)
        if self.classes:
            del columns[f"predicted_{self.label}_probs"]
            columns["probability"] = pa.array(scores[np.arange(len(x)), _decide(scores, settings)])
        top = np.argsort(-np.abs(attributions), axis=1)[:, : int(settings.get("top_k_features", 5))]
        pair = pa.struct([("feature", pa.string()), ("attribution", pa.float64())])
        listed = [[(names[i], row[i]) for i in best] for row, best in zip(attributions, top, strict=True)]
        columns["top_feature_attributions"] = pa.array(listed, pa.list_(pair))
        columns["baseline_prediction_value"] = pa.array(baseline)
        columns["prediction_value"] = pa.array(baseline + attributions.sum(axis=1))
        columns["approximation_error"] = pa.array(np.zeros(len(x)))
        return _beside(columns, rows)

    def global_explain(self, settings: dict) -> pa.Table:
        """ML.GLOBAL_EXPLAIN."""
        if "global" not in self.arrays:
            raise BigQueryError("ML.GLOBAL_EXPLAIN needs a model that was trained with ENABLE_GLOBAL_EXPLAIN = TRUE.")
        order = np.argsort(-self.arrays["global"])
        names = [self.features.names[i] for i in order]
        return pa.table({"feature": pa.array(names), "attribution": pa.array(self.arrays["global"][order])})

    def weights(self, settings: dict) -> pa.Table:
        """ML.WEIGHTS."""
        if "weights" not in self.arrays:
            raise BigQueryError(f"ML.WEIGHTS does not support models of type {self.type}.")
        rows, is_many = [], len(self.arrays["weights"]) > 1
        for i, (weights, bias) in enumerate(zip(self.arrays["weights"], self.arrays["bias"], strict=True)):
            label = {"class_label": str(self.classes[i])} if is_many else {}
            found = list(zip(self.features.inputs, weights, strict=True))
            for name in self.features.names:
                own = [{"category": value, "weight": w} for (feature, value), w in found if feature == name]
                is_number = name in self.features.means
                weight = {"weight": own[0]["weight"]} if is_number else {"category_weights": own}
                rows.append({**label, "processed_input": name, "category_weights": [], **weight})
            rows.append({**label, "processed_input": "__INTERCEPT__", "weight": bias, "category_weights": []})
        category = pa.struct([("category", pa.string()), ("weight", pa.float64())])
        schema = [("processed_input", pa.string()), ("weight", pa.float64()), ("category_weights", pa.list_(category))]
        return pa.Table.from_pylist(rows, pa.schema(([("class_label", pa.string())] if is_many else []) + schema))

    def training_info(self, settings: dict) -> pa.Table:
        """ML.TRAINING_INFO."""
        numbers = {"loss": "trainingLoss", "eval_loss": "evalLoss", "learning_rate": "learnRate"}
        rows = [
            {name: entry.get(key) for name, key in numbers.items()}
            | {"training_run": 0, "iteration": entry["index"], "duration_ms": int(entry["durationMs"])}
            for entry in self.specification["iterations"]
        ]
        whole = [(name, pa.int64()) for name in ("training_run", "iteration", "duration_ms")]
        schema = [*whole[:2], *((name, pa.float64()) for name in numbers), whole[2]]
        return pa.Table.from_pylist(rows, pa.schema(schema))

    def feature_info(self, settings: dict) -> pa.Table:
        """ML.FEATURE_INFO."""
        numbers = [(key, pa.float64()) for key in ("min", "max", "mean", "median", "stddev")]
        counts = [(key, pa.int64()) for key in ("category_count", "null_count", "dimension")]
        return pa.Table.from_pylist(self.features.info, pa.schema([("input", pa.string()), *numbers, *counts]))

    def confusion_matrix(self, settings: dict, rows: pa.Table | None = None) -> pa.Table:
        """ML.CONFUSION_MATRIX."""
        if not self.classes:
            raise BigQueryError(f"ML.CONFUSION_MATRIX does not support models of type {self.type}.")
        y, scores = self.judged(rows, "CONFUSION_MATRIX")
        k, is_known = len(self.classes), y >= 0
        counts = np.zeros((k, k), np.int64)
        np.add.at(counts, (y[is_known], _decide(scores, settings)[is_known]), 1)
        names = [str(value) if str(value)[:1].isalpha() else f"_{value}" for value in self.classes]
        return pa.table({"expected_label": pa.array(self.classes), **dict(zip(names, counts.T, strict=True))})


def _check_explainable(is_network: bool, classes: list | None) -> None:
    if is_network or len(classes or ()) > 2:
        raise unimplemented("The explanation of networks and of more than two classes")


def _beside(columns: dict[str, pa.Array], rows: pa.Table) -> pa.Table:
    kept = zip(rows.column_names, rows.columns, strict=True)
    return pa.table(columns | {name: column for name, column in kept if name not in columns})


def _decide(scores: np.ndarray, settings: dict) -> np.ndarray:
    # The number of the class that is predicted; a threshold is for the second of two.
    if "threshold" in settings and scores.shape[1] == 2:
        return (scores[:, 1] >= settings["threshold"]).astype(int)
    return scores.argmax(axis=1)


def _regression(y: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    error, variance = y - predicted, y.var()
    has_logarithm = min(y.min(), predicted.min()) > -1
    return {
        "mean_absolute_error": np.abs(error).mean(),
        "mean_squared_error": np.mean(error**2),
        "mean_squared_log_error": np.mean((np.log1p(y) - np.log1p(predicted)) ** 2) if has_logarithm else None,
        "median_absolute_error": np.sort(np.abs(error))[(len(y) - 1) // 2],  # the lower of two middle values
        "r2_score": 1 - np.mean(error**2) / variance if variance else None,
        "explained_variance": 1 - error.var() / variance if variance else None,
    }


def _classification(y: np.ndarray, scores: np.ndarray, settings: dict) -> dict[str, float | None]:
    from sklearn import metrics

    is_known = y >= 0  # a label that training did not show
    y, scores = y[is_known], scores[is_known]
    decided, k = _decide(scores, settings), scores.shape[1]
    average = {"average": "binary" if k == 2 else "macro", "zero_division": 0}
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(y, decided, **average)
    areas = [
        metrics.roc_auc_score(y == i, scores[:, i]) for i in range(k == 2, k) if 0 < np.count_nonzero(y == i) < len(y)
    ]
    return {
        "precision": precision,
        "recall": recall,
        "accuracy": (decided == y).mean(),
        "f1_score": f1,
        "log_loss": metrics.log_loss(y, scores, labels=range(k)),
        "roc_auc": np.mean(areas) if areas else None,
    }


def camel_case(name: str) -> str:
    """Return the name that BigQuery's JSON has for an option or a metric."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


# Functions by name: the method, whether rows are needed (None: they may be left out), and the settings it takes.
_FUNCTIONS = {
    "EVALUATE": (Model.evaluate, None, {"threshold"}),
    "PREDICT": (Model.predict, True, {"threshold", "keep_original_columns"}),
    "EXPLAIN_PREDICT": (Model.explain_predict, True, {"threshold", "top_k_features"}),
    "CONFUSION_MATRIX": (Model.confusion_matrix, None, {"threshold"}),
    "GLOBAL_EXPLAIN": (Model.global_explain, False, set()),
    "WEIGHTS": (Model.weights, False, set()),
    "TRAINING_INFO": (Model.training_info, False, set()),
    "FEATURE_INFO": (Model.feature_info, False, set()),
}


def load(warehouse: Warehouse, cursor, name: Name) -> Model:
    """Return a model of the warehouse; BigQueryError if there is none."""
    data = warehouse.data(cursor, "model", name.schema, name.id)
    if data is None:
        warehouse.dataset(cursor, name.project, name.dataset)
        raise not_found("Model", name)
    return Model.parse(data)


def call(model: Model, function: str, rows: pa.Table | None, settings: dict) -> pa.Table:
    """Return the rows of ML.function(MODEL model, rows, settings)."""
    if function not in _FUNCTIONS:
        raise unimplemented(f"ML.{function}", f"it has ML.{', ML.'.join(_FUNCTIONS)}")
    method, needs_rows, known = _FUNCTIONS[function]
    if needs_rows is not None and needs_rows != (rows is not None):
        raise BigQueryError(f"ML.{function} takes {'rows: a query or a TABLE' if needs_rows else 'no rows'}.")
    if not isinstance(settings, dict) or settings.keys() - known:
        raise unimplemented(f"{settings} in ML.{function}", f"it takes {', '.join(sorted(known)) or 'no settings'}")
    return method(model, settings, *([] if needs_rows is False else [rows]))
