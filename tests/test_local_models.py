"""The model registry and the endpoints of the local cloud, through the unmodified SDK."""

import contextlib
import json
import re
import sys
import time

import pytest

IMAGE = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
OWN_IMAGE = "us-central1-docker.pkg.dev/p/r/own:1"
MACHINE = {"machine_type": "n1-standard-4", "min_replica_count": 1, "max_replica_count": 1}

# A prediction server of one's own in the standard library: it answers with what it was told to answer.
OWN_SERVER = """
import http.server, json, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200 if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        instances = body["instances"]
        if instances == ["die"]:
            os._exit(1)
        if instances == ["status"]:
            return self.answer(body["parameters"]["status"], {"error": "as you like"})
        if instances == ["environment"]:
            told = ("AIP_", "OWN_", "UVICORN_")
            instances = [{key: value for key, value in os.environ.items() if key.startswith(told)}]
        self.answer(200, {"predictions": [[os.environ.get("OWN_NAME", ""), instance] for instance in instances]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["AIP_HTTP_PORT"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def artifacts(cloud):
    """Return the gs:// folder of a linear model with two inputs."""
    import io

    import joblib
    import numpy as np
    from google.cloud import storage
    from sklearn.linear_model import LinearRegression

    x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    content = io.BytesIO()
    joblib.dump(LinearRegression().fit(x, x @ [2.0, 3.0] + 1), content)
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    bucket.blob("linear/model.joblib").upload_from_string(content.getvalue())
    return f"{cloud.bucket}/linear"


def upload_own(name, **options):
    """Register a model that a server of one's own serves."""
    from google.cloud import aiplatform

    return aiplatform.Model.upload(
        display_name=name,
        serving_container_image_uri=OWN_IMAGE,
        serving_container_command=[sys.executable, "-c", OWN_SERVER],
        serving_container_environment_variables={"OWN_NAME": name},
        serving_container_predict_route="/predict",
        serving_container_health_route="/health",
        **options,
    )


@pytest.fixture(scope="module")
def served(cloud, artifacts):
    """Return an endpoint that serves the linear model."""
    from google.cloud import aiplatform

    model = aiplatform.Model.upload(
        display_name="linear", artifact_uri=artifacts, serving_container_image_uri=IMAGE, labels={"a": "b"}
    )
    return model.deploy(endpoint=aiplatform.Endpoint.create("served"), **MACHINE)


# The registry


def test_versions_and_aliases(cloud):
    from google.cloud import aiplatform

    first = upload_own("versions", model_id="versions", version_description="the first")
    assert (first.version_id, first.version_aliases) == ("1", ["default"])
    second = upload_own("versions", parent_model="versions", is_default_version=False, version_aliases=["next"])
    assert (second.version_id, second.version_aliases) == ("2", ["next"])
    registry = first.versioning_registry
    assert [version.version_id for version in registry.list_versions()] == ["1", "2"]
    assert aiplatform.Model("versions").version_id == "1"
    assert aiplatform.Model("versions@next").version_id == "2"

    registry.add_version_aliases(["default", "good"], version="2")
    assert aiplatform.Model("versions").version_id == "2"
    assert sorted(aiplatform.Model("versions@2").version_aliases) == ["default", "good", "next"]
    assert aiplatform.Model("versions@1").version_aliases == []
    registry.remove_version_aliases(["next"], version="2")
    assert sorted(aiplatform.Model("versions@2").version_aliases) == ["default", "good"]

    registry.delete_version("1")
    third = upload_own("versions", parent_model="versions", is_default_version=False)
    assert third.version_id == "3", "a number is never given twice"
    with pytest.raises(Exception, match="default version"):
        registry.delete_version("2")
    assert [model.name for model in aiplatform.Model.list(filter='display_name="versions"')] == ["versions"]
    first.delete()
    assert aiplatform.Model.list(filter='display_name="versions"') == []


def test_an_update_changes_only_what_it_names(cloud):
    from google.cloud import aiplatform

    model = upload_own("update", labels={"keep": "me"})
    model.update(display_name="updated", description="new")
    again = aiplatform.Model(model.resource_name)
    assert (again.display_name, again.description, again.labels) == ("updated", "new", {"keep": "me"})
    assert again.container_spec.predict_route == "/predict"
    assert again.version_aliases == ["default"]
    model.delete()


def test_a_model_keeps_a_copy_of_its_artifacts(cloud, artifacts):
    from google.cloud import aiplatform, storage

    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    source = bucket.blob("linear/model.joblib")
    bucket.copy_blob(source, bucket, "gone/model.joblib")
    model = aiplatform.Model.upload(
        display_name="copy", artifact_uri=f"{cloud.bucket}/gone", serving_container_image_uri=IMAGE
    )
    bucket.blob("gone/model.joblib").delete()
    model.export_model(export_format_id="custom-trained", artifact_destination=f"{cloud.bucket}/export")
    exported = [blob.name for blob in bucket.list_blobs(prefix="export/")]
    assert [name.rsplit("/", 1)[1] for name in exported] == ["model.joblib"]
    assert "caip-tenant-local" not in [bucket.name for bucket in storage.Client().list_buckets()]
    model.delete()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest", "it is a training image"),
        ("us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-21:latest", "Please use a Model with a valid image"),
        ("us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest", "saved_model.pb"),
    ],
)
def test_what_a_prebuilt_image_cannot_serve_is_refused(artifacts, image, words):
    from google.cloud import aiplatform

    with pytest.raises(Exception, match=re.escape(words)):
        aiplatform.Model.upload(display_name="refused", artifact_uri=artifacts, serving_container_image_uri=image)
    assert aiplatform.Model.list(filter='display_name="refused"') == []


def test_a_folder_without_a_file_is_no_model(cloud):
    from google.cloud import aiplatform

    with pytest.raises(Exception, match="There are no files under"):
        aiplatform.Model.upload(
            display_name="empty", artifact_uri=f"{cloud.bucket}/nothing-here", serving_container_image_uri=IMAGE
        )


# Endpoints


def test_a_deployed_model_predicts(served):
    answer = served.predict(instances=[[1.0, 1.0], [2.0, 0.0]])
    assert answer.predictions == pytest.approx([6.0, 5.0])
    deployed = served.list_models()[0]
    assert answer.deployed_model_id == deployed.id
    assert answer.model_version_id == "1"
    assert answer.model_resource_name == deployed.model
    raw = served.raw_predict(json.dumps({"instances": [[0, 0]]}).encode(), {"Content-Type": "application/json"})
    assert raw.json()["predictions"] == pytest.approx([1.0])
    assert raw.headers["X-Vertex-AI-Deployed-Model-Id"] == deployed.id


def test_an_asynchronous_prediction(served):
    import asyncio

    answer = asyncio.run(served.predict_async(instances=[[0.0, 0.0]]))
    assert answer.predictions == pytest.approx([1.0])


def test_a_wrong_request_gets_an_error_and_the_endpoint_goes_on(served):
    from google.api_core.exceptions import GoogleAPICallError, InvalidArgument

    with pytest.raises(GoogleAPICallError, match="sklearn"):
        served.predict(instances=[{"a": 1}])
    with pytest.raises(InvalidArgument, match="Request payload size exceeds the limit: 1572864 bytes"):
        served.predict(instances=[[0.5, 0.5]] * 200_000)
    broken = served.raw_predict(b"{", {"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert served.predict(instances=[[0.0, 0.0]]).predictions == pytest.approx([1.0])


def test_traffic_is_split_promoted_and_rolled_back(cloud):
    from google.cloud import aiplatform

    endpoint = aiplatform.Endpoint.create("split")
    old, new = upload_own("old"), upload_own("new")
    old.deploy(endpoint=endpoint, **MACHINE)
    new.deploy(endpoint=endpoint, traffic_percentage=30, **MACHINE)
    ids = {deployed.display_name: deployed.id for deployed in endpoint.list_models()}
    assert aiplatform.Endpoint(endpoint.name).traffic_split == {ids["old"]: 70, ids["new"]: 30}
    names = [endpoint.predict(instances=[1]).predictions[0][0] for _ in range(100)]
    assert 10 < names.count("new") < 55

    endpoint.update(traffic_split={ids["old"]: 0, ids["new"]: 100})
    assert {endpoint.predict(instances=[1]).predictions[0][0] for _ in range(10)} == {"new"}
    endpoint.update(traffic_split={ids["old"]: 100, ids["new"]: 0})
    assert {endpoint.predict(instances=[1]).predictions[0][0] for _ in range(10)} == {"old"}
    with pytest.raises(Exception, match="needs to be 100"):
        endpoint.update(traffic_split={ids["old"]: 50, ids["new"]: 0})
    assert aiplatform.Endpoint(endpoint.name).traffic_split == {ids["old"]: 100, ids["new"]: 0}

    endpoint.undeploy(deployed_model_id=ids["new"])
    assert [deployed.display_name for deployed in endpoint.list_models()] == ["old"]
    with pytest.raises(Exception, match="deployed"):
        old.delete()
    with pytest.raises(Exception, match="Undeploy first"):
        endpoint.delete()
    endpoint.delete(force=True)
    old.delete()
    new.delete()


def test_a_server_of_ones_own_gets_the_environment_of_a_prediction_container(cloud, artifacts):
    from google.cloud import aiplatform

    endpoint = aiplatform.Endpoint.create("own")
    model = upload_own("own", artifact_uri=artifacts)
    model.deploy(endpoint=endpoint, **MACHINE)
    name, found = endpoint.predict(instances=["environment"]).predictions[0]
    assert name == found["OWN_NAME"] == "own"
    assert found["AIP_MODE"] == "PREDICTION"
    assert found["UVICORN_HOST"] == "127.0.0.1", "a server that asks it listens to this machine alone"
    assert found["AIP_PREDICT_ROUTE"] == "/predict"
    assert found["AIP_HEALTH_ROUTE"] == "/health"
    assert found["AIP_ENDPOINT_ID"] == endpoint.name
    assert found["AIP_DEPLOYED_MODEL_ID"] == endpoint.list_models()[0].id
    assert found["AIP_STORAGE_URI"].startswith("gs://")
    assert found["AIP_STORAGE_URI"].rstrip("/") != artifacts, "it serves a copy"
    assert found["AIP_MACHINE_TYPE"] == "n1-standard-4"
    endpoint.delete(force=True)
    model.delete()


def test_the_status_of_a_model_server_reaches_the_client(cloud):
    from google.api_core import exceptions
    from google.cloud import aiplatform

    model = upload_own("status")
    endpoint = model.deploy(endpoint=aiplatform.Endpoint.create("status"), **MACHINE)
    for status, error in (
        (400, exceptions.InvalidArgument),
        (404, exceptions.NotFound),
        (429, exceptions.ResourceExhausted),
        (500, exceptions.InternalServerError),
    ):
        with pytest.raises(error, match="as you like"):
            endpoint.predict(instances=["status"], parameters={"status": status})
    with pytest.raises(exceptions.ServiceUnavailable):
        endpoint.predict(instances=["die"])
    deadline = time.monotonic() + 30
    while True:  # the server is started again
        try:
            assert endpoint.predict(instances=[5]).predictions == [["status", 5]]
            break
        except exceptions.ServiceUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    endpoint.delete(force=True)
    model.delete()


def test_a_server_that_ends_at_once_fails_the_deployment_alone(cloud, served):
    from google.cloud import aiplatform

    model = aiplatform.Model.upload(
        display_name="broken",
        serving_container_image_uri=OWN_IMAGE,
        serving_container_command=["python3", "-c", "raise SystemExit('no weights')"],
    )
    endpoint = aiplatform.Endpoint.create("broken")
    with pytest.raises(Exception, match=r"(?s)Model server .*no weights"):
        model.deploy(endpoint=endpoint, **MACHINE)
    assert aiplatform.Endpoint(endpoint.name).list_models() == []
    assert served.predict(instances=[[0.0, 0.0]]).predictions == pytest.approx([1.0])
    endpoint.delete()
    model.delete()


def test_a_dedicated_endpoint_has_a_host_of_its_own(cloud):
    from google.cloud import aiplatform

    endpoint = aiplatform.Endpoint.create("dedicated", dedicated_endpoint_enabled=True)
    model = upload_own("dedicated")
    model.deploy(endpoint=endpoint, **MACHINE)
    endpoint = aiplatform.Endpoint(endpoint.name)
    assert endpoint.dedicated_endpoint_dns.endswith(".prediction.vertexai.goog")
    assert endpoint.predict(instances=[7], use_dedicated_endpoint=True).predictions == [["dedicated", 7]]
    address = {"api_endpoint": f"{cloud.region}-aiplatform.googleapis.com"}
    shared = aiplatform.gapic.PredictionServiceClient(client_options=address)
    with pytest.raises(Exception, match="dedicated dns name"):
        shared.predict(endpoint=endpoint.resource_name, instances=[7])
    endpoint.delete(force=True)
    model.delete()


def test_requests_and_answers_are_logged_in_a_table(cloud):
    from google.api_core.exceptions import BadRequest, NotFound
    from google.cloud import aiplatform, bigquery

    table = f"{cloud.project}.logs.requests"
    logging = {"enable_request_response_logging": True, "request_response_logging_sampling_rate": 1.0}
    for wrong in ("", "gs://bucket/requests", "bq://someone-elses.logs.requests"):
        with pytest.raises(BadRequest, match="BigQuery"):
            aiplatform.Endpoint.create("no", request_response_logging_bq_destination_table=wrong, **logging)
    endpoint = aiplatform.Endpoint.create(
        "logged", request_response_logging_bq_destination_table=f"bq://{table}", **logging
    )
    model = upload_own("logged")
    model.deploy(endpoint=endpoint, **MACHINE)
    for instances in ([{"a": 1}, {"a": 2.5}], [["text", None]]):
        endpoint.predict(instances=instances)
    with pytest.raises(BadRequest):
        endpoint.predict(instances=["status"], parameters={"status": 400})  # no answer, no row
    client, rows, deadline = bigquery.Client(project=cloud.project), [], time.monotonic() + 30
    while len(rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(NotFound):  # the first row makes the table
            rows = list(client.query_and_wait(f"SELECT * FROM `{table}` ORDER BY logging_time"))
    assert [[json.loads(text) for text in row.request_payload] for row in rows] == [
        [{"a": 1}, {"a": 2.5}],
        [["text", None]],
    ]
    assert json.loads(rows[1].response_payload[0]) == ["logged", ["text", None]]
    assert {(row.endpoint, row.deployed_model_id) for row in rows} == {(endpoint.name, endpoint.list_models()[0].id)}
    assert abs(rows[0].logging_time.timestamp() - time.time()) < 60

    endpoint.predict(instances=[1])
    endpoint.delete(force=True)
    model.delete()
    client.delete_dataset("logs", delete_contents=True)
    time.sleep(1)
    assert "logs" not in {dataset.dataset_id for dataset in client.list_datasets()}


def test_what_only_google_can_do_says_so(served):
    from google.api_core.exceptions import MethodNotImplemented

    with pytest.raises(MethodNotImplemented, match=r"PredictionService\.Explain is not part of the local cloud"):
        served.explain(instances=[[0.0, 0.0]])


# Batch prediction


def test_batch_prediction_of_lines_and_tables(cloud, artifacts):
    from google.cloud import aiplatform, storage

    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    model = aiplatform.Model.upload(display_name="batch", artifact_uri=artifacts, serving_container_image_uri=IMAGE)
    rows = [[float(row), 0.0] for row in range(150)]
    lines = [json.dumps(row) for row in rows]
    lines[100] = json.dumps({"not": "a row"})
    bucket.blob("batch/in/1.jsonl").upload_from_string("\n".join(lines[:80]) + "\n")
    bucket.blob("batch/in/2.jsonl").upload_from_string("\n".join(lines[80:]))
    done = model.batch_predict(
        job_display_name="lines",
        gcs_source=f"{cloud.bucket}/batch/in/*.jsonl",
        gcs_destination_prefix=f"{cloud.bucket}/batch/out",
        machine_type="n1-standard-4",
    )
    assert done.state.name == "JOB_STATE_SUCCEEDED"
    assert (done.completion_stats.successful_count, done.completion_stats.failed_count) == (149, 1)
    texts = {blob.name.rsplit("/", 1)[1]: blob.download_as_text() for blob in done.iter_outputs()}
    assert set(texts) == {"prediction.results-00000-of-00001", "prediction.errors_stats-00000-of-00001"}
    results = [json.loads(line) for line in texts["prediction.results-00000-of-00001"].splitlines()]
    assert [result["instance"] for result in results] == rows[:100] + rows[101:]
    assert [result["prediction"] for result in results] == pytest.approx(
        [2 * row[0] + 1 for row in rows[:100] + rows[101:]]
    )
    assert "/batch/out/prediction-batch-" in done.output_info.gcs_output_directory

    bucket.blob("batch/in.csv").upload_from_string("a,b\n1,1\n2,0\n")
    table = model.batch_predict(
        job_display_name="table",
        gcs_source=f"{cloud.bucket}/batch/in.csv",
        instances_format="csv",
        predictions_format="csv",
        gcs_destination_prefix=f"{cloud.bucket}/batch/out",
        machine_type="n1-standard-4",
    )
    text = next(blob.download_as_text() for blob in table.iter_outputs() if "results" in blob.name)
    assert text.splitlines()[0].endswith("prediction")
    assert [float(line.rsplit(",", 1)[1]) for line in text.splitlines()[1:]] == pytest.approx([6.0, 5.0])
    model.delete()


def test_a_batch_prediction_without_input_fails_in_words(cloud, artifacts):
    from google.cloud import aiplatform

    model = aiplatform.Model.upload(display_name="none", artifact_uri=artifacts, serving_container_image_uri=IMAGE)
    with pytest.raises(RuntimeError, match="No files match"):
        model.batch_predict(
            job_display_name="none",
            gcs_source=f"{cloud.bucket}/not/there.jsonl",
            gcs_destination_prefix=f"{cloud.bucket}/batch/out",
            machine_type="n1-standard-4",
        )
    model.delete()
