"""AutoML for tables, by FLAML: `python -m helpers.local.automl train|serve`, as a training task and as a model server.

Where Vertex AI searches among its own models for node-hours, FLAML searches among gradient-boosted trees (LightGBM and
XGBoost) for a number of trials: TRIALS for each node-hour of the budget, so that the same call gives the same model.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from google.protobuf.message import Message

from helpers.local import MANAGED_BUCKET, errors

DEFINITION = "/automl_tabular_1.0.0.yaml"
IMAGE = "us-docker.pkg.dev/local-cloud/automl-tabular/flaml:latest"
SCHEMA = "gs://google-cloud-aiplatform/schema/modelevaluation/{}_metrics_1.0.0.yaml"
BUCKETS = "LOCAL_CLOUD_BUCKETS"  # the variable that tells a task where its buckets are
TRIALS = 15  # for each node-hour
MIN_BUDGET, MAX_BUDGET = 1000, 72_000  # thousandths of a node-hour
MIN_ROWS = 1000
METRICS = {  # Vertex AI's objectives in FLAML's words
    "regression": {
        "": "rmse",
        "minimize-rmse": "rmse",
        "minimize-mae": "mae",
    },
    "classification": {
        "": "log_loss",
        "minimize-log-loss": "log_loss",
        "maximize-au-roc": "roc_auc",
    },
}


def read_inputs(inputs: Message) -> dict:
    """Return what a training pipeline asks of AutoML; refuse what the local engine cannot do or Google refuses."""
    asked = json_format.MessageToDict(inputs)
    kind = asked.get("predictionType", "")
    if kind not in METRICS:
        raise errors.unimplemented(f"AutoML with the prediction type {kind!r}", "use regression or classification")
    objective = asked.get("optimizationObjective", "") or ""
    if objective not in METRICS[kind]:
        known = ", ".join(filter(None, METRICS[kind]))
        raise errors.unimplemented(f"AutoML with the objective {objective!r}", f"use {known}")
    if asked.get("weightColumnName"):
        raise errors.unimplemented("AutoML with a weight column", "leave weight_column away")
    budget = int(asked.get("trainBudgetMilliNodeHours", MIN_BUDGET))
    if not MIN_BUDGET <= budget <= MAX_BUDGET:
        raise errors.invalid(
            f"The training budget is {budget}; expected {MIN_BUDGET} to {MAX_BUDGET} milli node hours."
        )
    # The SDK writes column_name, Google's schema columnName: the service takes both.
    specs = [next(iter(one.values())) for one in asked.get("transformations", [])]
    columns = [spec.get("columnName") or spec.get("column_name") for spec in specs]
    if not all(columns):
        raise errors.invalid("A transformation names no column; expected {'auto': {'columnName': ...}} for each.")
    return {
        "target": asked.get("targetColumn", ""),
        "kind": kind,
        "metric": METRICS[kind][objective],
        "trials": TRIALS * budget // 1000,
        "columns": columns,
    }


def job_spec(settings: dict, run: str) -> Message:
    """Return the job that searches, with its output in the bucket that users do not see."""
    spec = types.CustomJobSpec.pb()()
    pool = spec.worker_pool_specs.add(replica_count=1)
    pool.machine_spec.machine_type = "n1-standard-4"
    pool.container_spec.image_uri = IMAGE
    command = ["python3", "-m", "helpers.local.automl", "train", "--settings", json.dumps(settings)]
    pool.container_spec.command.extend(command)
    pool.container_spec.env.add(name=BUCKETS, value="/gcs/")
    spec.base_output_directory.output_uri_prefix = f"gs://{MANAGED_BUCKET}/automl/{run}"
    return spec


def serving_container() -> Message:
    """Return the container that serves what the job saves."""
    container = types.ModelContainerSpec.pb()(image_uri=IMAGE)
    container.command.extend(["python3", "-m", "helpers.local.automl", "serve"])
    container.env.add(name=BUCKETS, value="/gcs/")
    return container


def evaluation(folder: Path, inputs: Message) -> Message:
    """Return the evaluation that the job left in a folder, as the model registry shows it."""
    kind = json_format.MessageToDict(inputs)["predictionType"]
    found = types.ModelEvaluation.pb()(metrics_schema_uri=SCHEMA.format(kind))
    json_format.ParseDict(json.loads((folder / "evaluation.json").read_text()), found.metrics)
    return found


def train(settings: dict, folder: Path, sets: dict[str, list[Path]]) -> dict:
    """Search for a model, save it in a folder with its evaluation on the test rows, and return the evaluation."""
    import joblib
    import pandas as pd
    from flaml import AutoML

    tables = {name: pd.concat([pd.read_csv(file) for file in files]) for name, files in sets.items()}
    rows = sum(map(len, tables.values()))
    if rows < MIN_ROWS:
        sys.exit(f"The dataset has {rows} rows; AutoML needs {MIN_ROWS}. Use BigQuery ML or custom training.")
    target = settings["target"]
    if target not in tables["training"]:
        sys.exit(f"The dataset has no column {target!r}; it has {', '.join(tables['training'])}.")
    columns = settings["columns"] or [column for column in tables["training"] if column != target]
    text = [column for column in columns if not pd.api.types.is_numeric_dtype(tables["training"][column])]
    categories = {column: sorted(tables["training"][column].dropna().unique()) for column in text}
    x = {name: as_features(table, columns, categories) for name, table in tables.items()}
    y = {name: table[target].to_numpy() for name, table in tables.items()}
    search = AutoML()
    search.fit(
        x["training"],
        y["training"],
        X_val=x["validation"],
        y_val=y["validation"],
        task=settings["kind"],
        metric=settings["metric"],
        estimator_list=["lgbm", "xgboost"],
        eval_method="holdout",
        max_iter=settings["trials"],
        time_budget=-1,
        seed=1,
        verbose=1,
        n_jobs=os.cpu_count(),
    )
    print(f"The best of {settings['trials']} trials: {search.best_estimator} with {search.best_config}")
    evaluation = evaluate(settings["kind"], search, x["test"], y["test"])
    model = {"search": search, "columns": columns, "categories": categories, "kind": settings["kind"]}
    folder.mkdir(parents=True, exist_ok=True)
    joblib.dump(model, folder / "model.joblib")
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def as_features(table, columns: list[str], categories: dict[str, list]):
    """Return the columns of a table as FLAML wants them: numbers, and categories in their order."""
    import pandas as pd

    return pd.DataFrame(
        {
            column: pd.Categorical(table[column].astype(object), categories[column])
            if column in categories
            else pd.to_numeric(table[column])
            for column in columns
        }
    )


def evaluate(kind: str, search, x, y) -> dict:
    """Return the metrics that Vertex AI shows for a model, computed on the test rows."""
    import numpy as np
    from sklearn import metrics

    if kind == "regression":
        predicted = np.asarray(search.predict(x), float)
        positive = (y > -1).all() and (predicted > -1).all()
        return {
            "rootMeanSquaredError": float(metrics.root_mean_squared_error(y, predicted)),
            "meanAbsoluteError": float(metrics.mean_absolute_error(y, predicted)),
            "meanAbsolutePercentageError": 100 * float(metrics.mean_absolute_percentage_error(y, predicted)),
            "rSquared": float(metrics.r2_score(y, predicted)),
        } | ({"rootMeanSquaredLogError": float(metrics.root_mean_squared_log_error(y, predicted))} if positive else {})
    scores = search.predict_proba(x)
    classes = list(search.classes_)
    labels = [classes.index(label) for label in y]
    one_hot = np.eye(len(classes))[labels]
    return {
        "logLoss": float(metrics.log_loss(labels, scores, labels=range(len(classes)))),
        "auRoc": float(metrics.roc_auc_score(one_hot, scores, average="micro")),
        "auPrc": float(metrics.average_precision_score(one_hot, scores, average="micro")),
        "accuracy": float(np.mean(scores.argmax(axis=1) == labels)),
    }


def predict(model: dict, instances: list) -> list:
    """Return AutoML's predictions: a value for regression, classes with their scores for classification."""
    import pandas as pd

    for number, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise ValueError(f"instance {number} is {instance!r}; expected an object with a value for each column")
        if missing := [column for column in model["columns"] if column not in instance]:
            raise ValueError(f"instance {number} lacks {', '.join(missing)}; expected {', '.join(model['columns'])}")
    x = as_features(pd.DataFrame(instances), model["columns"], model["categories"])
    if model["kind"] == "regression":
        return [{"value": float(value)} for value in model["search"].predict(x)]
    classes = [str(label) for label in model["search"].classes_]
    return [{"classes": classes, "scores": list(map(float, scores))} for scores in model["search"].predict_proba(x)]


def serve() -> None:
    """Serve the model at AIP_STORAGE_URI under the prediction contract."""
    import joblib
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    model = joblib.load(local(os.environ["AIP_STORAGE_URI"]) / "model.joblib")

    async def answer(request: Request) -> JSONResponse:
        try:
            instances = (await request.json())["instances"]
            return JSONResponse({"predictions": await run_in_threadpool(predict, model, instances)})
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": f"The prediction failed: {error}"}, 400)

    routes = [
        Route(os.environ["AIP_PREDICT_ROUTE"], answer, methods=["POST"]),
        Route(os.environ["AIP_HEALTH_ROUTE"], lambda _: JSONResponse({})),
    ]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=int(os.environ["AIP_HTTP_PORT"]), log_level="warning")


def local(uri: str) -> Path:
    """Return the path of a gs:// URI in the buckets of this task."""
    return Path(os.environ[BUCKETS]) / uri.removeprefix("gs://")


def main(arguments: list[str]) -> None:
    """Train with the settings of the command line and the sets that the environment names, or serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "serve"))
    parser.add_argument("--settings", type=json.loads)
    asked = parser.parse_args(arguments)
    if asked.what == "serve":
        return serve()
    sets = {}
    for name in ("training", "validation", "test"):
        pattern = local(os.environ[f"AIP_{name.upper()}_DATA_URI"])
        sets[name] = sorted(pattern.parent.glob(pattern.name))
    print(json.dumps(train(asked.settings, local(os.environ["AIP_MODEL_DIR"]), sets)))
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
