"""The prediction server: right answers for many at once, and clear words for what it cannot answer."""

import asyncio
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers import data
from helpers.local.runner import free_port
from helpers.predictor.instances import Instances, Refused

CONTRACT = {
    "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
    "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    "AIP_DEPLOYED_MODEL_ID": "2",
    "UVICORN_HOST": "127.0.0.1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model of the penguins."""
    from helpers.trainer import task

    folder = tmp_path_factory.mktemp("model")
    task.main(["--dataset", "penguins", "--epochs", "3", f"--model_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def penguins(model):
    """Instances, and what the model predicts for each when it is asked alone."""
    import tensorflow as tf

    rows = data.split("penguins")[1]
    names = json.loads((model / "assets.extra/instance_schema.json").read_text())["required"]
    instances = json.loads(rows[names].to_json(orient="records"))
    inputs = data.Features("penguins", data.split("penguins")[0]).raw(rows)
    predict = tf.saved_model.load(str(model)).signatures["serving_default"]
    expected = [predict(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(len(rows))]
    return instances, [outputs["output_0"].numpy()[0].tolist() for outputs in expected]


class Client:
    """A client with a connection of its own."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def send(self, body, method="POST", route=CONTRACT["AIP_PREDICT_ROUTE"]):
        """Return the status and the answer."""
        self.connection.request(method, route, body)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def predict(self, *instances, **more):
        return self.send(json.dumps({"instances": instances, **more}))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server as Vertex AI starts it: its port, its process, its log and the folder of its samples."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    variables = {"AIP_STORAGE_URI": f"{model}/", "AIP_HTTP_PORT": str(port), "SAMPLES_URI": str(folder / "samples")}
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "helpers.predictor"]
        process = subprocess.Popen(command, env=os.environ | CONTRACT | variables, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while True:
        try:
            with Client(port) as client:
                assert client.send(None, "GET", CONTRACT["AIP_HEALTH_ROUTE"]) == (200, {})
            break
        except ConnectionRefusedError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
    yield port, process, folder / "log", folder / "samples"
    process.kill()
    process.wait()


@pytest.fixture
def client(server):
    with Client(server[0]) as client:
        yield client


def test_instances_get_one_prediction_each(client, penguins):
    instances, expected = penguins
    status, answer = client.predict(*instances, parameters=None)
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], expected, rtol=1e-5)


def test_64_clients_at_once_get_right_answers_and_only_those_who_err_are_refused(server, penguins):
    instances, expected = penguins

    def visit(number):
        right = 0
        with Client(server[0]) as client:
            for turn in range(10):
                first = (7 * number + turn) % (len(instances) - 3)
                asked = instances[first : first + 3]
                if (number + turn) % 4 == 0:
                    status, answer = client.predict(asked[0], {**asked[1], "sex": "unknown"}, asked[2])
                    assert (status, answer["error"][:16]) == (400, "instances[1].sex")
                else:
                    status, answer = client.predict(*asked)
                    assert status == 200
                    np.testing.assert_allclose(answer["predictions"], expected[first : first + 3], rtol=1e-5)
                    right += 1
        return right

    with ThreadPoolExecutor(64) as clients:
        assert sum(clients.map(visit, range(64))) == 480


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sex": None}, "instances[1].sex is null: Input should be 'FEMALE' or 'MALE'. For example: "),
        ({"sex": "male"}, "instances[1].sex is \"male\": Input should be 'FEMALE' or 'MALE'. For example: "),
        ({"flipper_length_mm": "190"}, 'instances[1].flipper_length_mm is "190": Input should be a valid number.'),
        ({"flipper_length_mm": True}, "instances[1].flipper_length_mm is true: Input should be a valid number."),
        ({"flipper_length_mm": [1, 2]}, "instances[1].flipper_length_mm is [1, 2]: Input should be a valid number."),
        ({"flipper_length_mm": float("nan")}, "instances[1].flipper_length_mm is NaN: Input should be a finite number"),
        ({"flipper_length_mm": 1e39}, "instances[1].flipper_length_mm is 1e+39: Input should be less than or equal"),
        ({"flipper": 190}, "instances[1].flipper is 190: Extra inputs are not permitted. For example: {"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_an_example(client, penguins, change, words):
    first, second = penguins[0][:2]
    status, answer = client.predict(first, {**second, **change})
    assert status == 400
    assert answer["error"].startswith(words)
    assert "predictions" not in answer


def test_a_missing_field_is_named(client, penguins):
    lacking = {name: value for name, value in penguins[0][0].items() if name != "island"}
    status, answer = client.predict(lacking)
    assert status == 400
    assert answer["error"].startswith('instances[0].island: Field required. For example: "')


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the request: Invalid JSON: EOF"),
        (b'{"instances": [', "the request: Invalid JSON: EOF"),
        (b"\xff", "the request: Invalid JSON"),
        (b"[" * 10000, "the request: Invalid JSON: recursion limit"),
        (b"[1]", "the request is [1]: Input should be an object. For example: {"),
        (b'{"inputs": []}', 'instances: Field required. For example: {"instances": ['),
        (b'{"instances": []}', "instances is []: List should have at least 1 item"),
        (b'{"instances": [[39.5, 17.4]]}', "instances[0] is [39.5, 17.4]: Input should be an object"),
    ],
)
def test_what_is_no_request_is_refused_with_one_that_is(client, body, words):
    status, answer = client.send(body)
    assert status == 400
    assert answer["error"].startswith(words)


def test_parameters_are_refused_since_the_model_has_none(client, penguins):
    status, answer = client.predict(penguins[0][0], parameters={"confidence": 0.5})
    assert (status, answer["error"][:27]) == (400, 'parameters is {"confidence"')


def test_a_request_that_is_too_large_is_refused_and_the_next_one_answered(client, penguins):
    status, answer = client.send(b" " * (10 * 1024 * 1024 + 1))
    assert (status, answer["error"]) == (413, "Request payload size exceeds the limit: 10485760 bytes.")
    client.connection.close()  # HTTP does not let a connection go on whose request was not read to its end
    assert client.predict(penguins[0][0])[0] == 200


def test_each_request_is_one_line_of_json_in_the_log(server, client, penguins):
    client.predict(*penguins[0][:3])
    client.predict({})
    good, bad = [json.loads(line) for line in server[2].read_text().splitlines()[-2:]]
    assert (good["severity"], good["model"], good["rows"], good["status"]) == ("INFO", "2", 3, 200)
    assert 0 < good["ms"] < 60_000
    assert (bad["severity"], bad["rows"], bad["status"]) == ("WARNING", 0, 400)
    assert "Field required" in bad["message"]


def test_samples_are_written_before_the_server_ends(server, client, penguins):
    """Ends the server: the last of its tests."""
    _, process, _, folder = server
    client.predict(penguins[0][1])
    client.connection.close()
    process.terminate()
    process.wait(timeout=30)
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    last = json.loads(lines[-1])
    assert last["instances"] == [penguins[0][1]]
    np.testing.assert_allclose(last["predictions"], [penguins[1][1]], rtol=1e-5)


def test_a_server_without_a_model_ends_and_says_why(tmp_path):
    variables = os.environ | CONTRACT | {"AIP_STORAGE_URI": str(tmp_path), "AIP_HTTP_PORT": str(free_port())}
    run = subprocess.run([sys.executable, "-m", "helpers.predictor"], env=variables, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"there is no saved_model.pb in AIP_STORAGE_URI, which is '{tmp_path}'" in run.stderr.splitlines()[-1]


def test_the_model_itself_may_refuse_a_row_which_is_found_and_named(model, penguins, tmp_path):
    """A model without a schema does not tell which categories it knows."""
    from helpers.predictor.server import SavedModel

    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/assets.extra")
    predictor = SavedModel()
    predictor.load(str(tmp_path / "model"))
    instances, expected = penguins
    good, bad = list(instances[:9]), list(instances[:9])
    bad[6] = {**bad[6], "island": "Elephant"}
    rows = [predictor.preprocess(json.dumps({"instances": request})) for request in (good, bad, good[:1])]
    first, second, third = predictor.predict(rows)
    np.testing.assert_allclose(first, expected[:9], rtol=1e-5)
    np.testing.assert_allclose(third, expected[:1], rtol=1e-5)
    assert str(second).startswith("instances[6] is refused by the model:")
    assert "Elephant" in str(second)


def test_nan_is_no_prediction():
    from helpers.predictor.server import SavedModel

    with pytest.raises(Refused, match="predicts NaN or infinity") as refusal:
        SavedModel().postprocess([[float("nan")]])
    assert refusal.value.status == 500


def test_requests_that_come_while_the_model_works_share_the_next_call():
    from google.cloud.aiplatform.prediction import Predictor
    from starlette.requests import Request

    from helpers.predictor import server

    class Doubler(Predictor):
        """Doubles numbers, slowly, and remembers how many at a time."""

        def load(self, artifacts_uri):
            self.calls = []

        def preprocess(self, body):
            return json.loads(body)

        def predict(self, requests):
            time.sleep(0.05)
            self.calls.append([len(rows) for rows in requests])
            if [0] in requests:
                raise ZeroDivisionError("zero")
            return [[2 * row for row in rows] for rows in requests]

        def postprocess(self, predictions):
            return json.dumps(predictions)

    async def ask(handler, rows):
        async def receive():
            return {"type": "http.request", "body": json.dumps(rows).encode()}

        return await handler.handle(Request({"type": "http", "method": "POST", "headers": []}, receive))

    async def visit(asked):
        handler = server.Handler("", Doubler)
        answers = await asyncio.gather(*(ask(handler, rows) for rows in asked))
        return handler.predictor.calls, [(answer.status_code, json.loads(answer.body)) for answer in answers]

    asked = [[number, number + 1] for number in range(1, 65)]
    calls, answers = asyncio.run(visit(asked))
    assert calls == [[2] * 64]
    assert answers == [(200, [2 * row for row in rows]) for rows in asked]

    asked = [[1] * 200, [2] * 100, [3] * 300, [4]]
    calls, answers = asyncio.run(visit(asked))
    assert calls == [[200], [100], [300], [1]]  # at most 256, unless one request has more
    assert [len(rows) for _, rows in answers] == [200, 100, 300, 1]

    calls, answers = asyncio.run(visit([[0]]))
    assert answers == [(500, {"error": "The server failed: ZeroDivisionError: zero"})]


def test_inputs_of_other_types_and_shapes():
    image = Instances({"pixels": (np.float32, (2, 3))}, {})
    rows = [[[1, 2, 3], [4, 5, 6]]]
    for instance in (rows[0], {"pixels": rows[0]}):  # the only input may go without its name
        assert image.read(json.dumps({"instances": [instance]})) == [[[1, 2, 3, 4, 5, 6]]]
    with pytest.raises(Refused, match=r"instances\[0\]\.pixels\[1\] is \[4\]: List should have at least 3 items"):
        image.read('{"instances": [[[1, 2, 3], [4]]]}')

    mixed = Instances({"a": (np.int32, ()), "b": (np.bool_, ()), "c": (object, (1,)), "d": (np.int32, ())}, {})
    one, other = {"a": 1, "b": True, "c": "x", "d": 2}, {"a": 3, "b": False, "c": ["y"], "d": 4}
    assert mixed.read(json.dumps({"instances": [one, other]})) == [[[1, 2], [True], ["x"]], [[3, 4], [False], ["y"]]]
    for wrong in ({"a": 1.5}, {"a": 2**31}, {"b": 1}, {"c": 1}, {"c": ["x", "y"]}):
        with pytest.raises(Refused, match=rf"instances\[0\]\.{next(iter(wrong))} is "):
            mixed.read(json.dumps({"instances": [one | wrong]}))
