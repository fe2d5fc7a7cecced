"""AutoML for tables on the local cloud, through the unmodified SDK."""

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def dataset(cloud):
    """Return a managed dataset: a target that depends on a number and on a category."""
    from google.cloud import aiplatform, storage

    random = np.random.default_rng(0)
    frame = pd.DataFrame({"size": random.uniform(0, 10, 1500), "kind": random.choice(["a", "b", "c"], 1500)})
    frame["price"] = 3 * frame["size"] + frame["kind"].map({"a": 0, "b": 20, "c": 50}) + random.normal(0, 0.5, 1500)
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("automl/data.csv").upload_from_string(frame.to_csv(index=False))
    return aiplatform.TabularDataset.create("prices", gcs_source=f"{cloud.bucket}/automl/data.csv")


def test_a_model_is_searched_evaluated_and_served(dataset):
    from google.cloud import aiplatform

    job = aiplatform.AutoMLTabularTrainingJob("prices", optimization_prediction_type="regression")
    model = job.run(dataset, target_column="price", budget_milli_node_hours=1000, model_display_name="automl")
    assert job.state.name == "PIPELINE_STATE_SUCCEEDED"
    metrics = model.list_model_evaluations()[0].metrics
    assert metrics["rSquared"] > 0.98
    assert 0.4 < metrics["rootMeanSquaredError"] < 3

    endpoint = model.deploy(machine_type="n1-standard-4")
    answer = endpoint.predict(instances=[{"size": 1.0, "kind": "a"}, {"size": "9", "kind": "c"}])
    values = [prediction["value"] for prediction in answer.predictions]
    assert values == pytest.approx([3, 77], abs=4)
    with pytest.raises(Exception, match="instance 0 lacks kind"):
        endpoint.predict(instances=[{"size": 1.0}])
    endpoint.delete(force=True)
    model.delete()


def test_only_the_columns_that_are_named_are_used(cloud):
    """A column that gives the answer away, and that nobody named, must not make the model better."""
    from google.cloud import aiplatform, storage

    random = np.random.default_rng(0)
    frame = pd.DataFrame({"size": random.uniform(0, 10, 1200), "noise": random.normal(0, 3, 1200)})
    frame["price"] = 3 * frame["size"] + frame["noise"]
    frame["set"] = ["training"] * 1000 + ["validation", "test"] * 100
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("automl/leak.csv").upload_from_string(frame.to_csv(index=False))
    leaky = aiplatform.TabularDataset.create("leaky", gcs_source=f"{cloud.bucket}/automl/leak.csv")
    job = aiplatform.AutoMLTabularTrainingJob(
        "honest", optimization_prediction_type="regression", column_specs={"size": "auto"}
    )
    model = job.run(leaky, target_column="price", predefined_split_column_name="set")
    assert model.list_model_evaluations()[0].metrics["rootMeanSquaredError"] > 2.5
    model.delete()


def test_what_automl_cannot_do_is_refused(cloud, dataset):
    from google.cloud import aiplatform, storage

    text = aiplatform.AutoMLTabularTrainingJob("x", optimization_prediction_type="regression")
    with pytest.raises(Exception, match="training budget is 10"):
        text.run(dataset, target_column="price", budget_milli_node_hours=10)
    images = aiplatform.AutoMLImageTrainingJob("x")
    with pytest.raises(Exception, match="not part of the local cloud"):
        images.run(dataset=_as_images(dataset))
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("automl/few.csv").upload_from_string("size,price\n" + "1,2\n" * 100)
    few = aiplatform.TabularDataset.create("few", gcs_source=f"{cloud.bucket}/automl/few.csv")
    job = aiplatform.AutoMLTabularTrainingJob("few", optimization_prediction_type="regression")
    with pytest.raises(RuntimeError, match="100 rows; AutoML needs 1000"):
        job.run(few, target_column="price")


def _as_images(dataset):
    """Return an image dataset of the same name: its content does not matter to a refusal."""
    from google.cloud import aiplatform

    return aiplatform.ImageDataset.create("images")
