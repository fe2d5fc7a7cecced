"""Model servers: the prediction contract kept by real processes, with Google's words for what goes wrong."""

import base64
import contextlib
import json
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from grpc import StatusCode

from helpers.local import errors
from helpers.local.serving import Deployment, Serving, ServingError, expand

IMAGE = "us-docker.pkg.dev/vertex-ai/prediction/{}:latest"
JSON = {"content-type": "application/json"}
SERVER = """\
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 0.5  # after which an idle connection is closed

    def do_GET(self):
        self.answer(200 if self.path == os.environ["HEALTHY"] else 404, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if body == "sleep":
            time.sleep(60)
        self.answer(200, {"path": self.path, "body": body, "arguments": sys.argv[1:], "environment": dict(os.environ)})

    def answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


print("starting")
ThreadingHTTPServer(("127.0.0.1", int(os.environ[os.environ["PORT_NAME"]])), Handler).serve_forever()
"""
CUSTOM = {
    "image": "us-central1-docker.pkg.dev/local-project/course/server:1",
    "command": ("python", "/gcs/code/server.py"),
    "environment": {"HEALTHY": "/health", "PORT_NAME": "AIP_HTTP_PORT"},
    "health_route": "/health",
    "predict_route": "/predict",
}


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cloud") / "buckets"
    (folder / "code").mkdir(parents=True)
    (folder / "code/server.py").write_text(SERVER)
    return folder


@pytest.fixture(scope="module")
def serving(buckets):
    with_processes = Serving(buckets.parent / "serving", buckets, dict)
    yield with_processes
    with_processes.close()


def start(serving, name, **container):
    serving.start(Deployment(id=name, endpoint="42", **container))


def post(serving, name, request, **options):
    """Return the status and the text that a server answers."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    status, _, content = serving.call(name, body, JSON, **options)
    return status, content.decode()


def predictions(serving, name, instances, **more):
    status, text = post(serving, name, {"instances": instances, **more})
    assert status == 200, text
    return json.loads(text)["predictions"]


def error(serving, name, request):
    """Return the words with which TensorFlow Serving would refuse a request."""
    status, text = post(serving, name, request)
    assert status == 400
    return json.loads(text)["error"]


# TensorFlow


@pytest.fixture(scope="module")
def networks(serving, buckets):
    """A network with an unnamed input and one with named inputs and outputs, each with its server."""
    import keras

    keras.utils.set_random_seed(1)
    rows = keras.Input((6,))
    hidden = keras.layers.Dense(64, activation="relu")(keras.layers.Dense(64, activation="relu")(rows))
    plain = keras.Model(rows, keras.layers.Dense(1)(hidden))
    size, kind = keras.Input((2,), name="size"), keras.Input((), name="kind", dtype="string")
    one_hot = keras.layers.StringLookup(vocabulary=["fair", "ideal"], output_mode="one_hot")(kind)
    both = keras.layers.Concatenate()([size, one_hot])
    outputs = {"price": keras.layers.Dense(1)(both), "scores": keras.layers.Dense(3)(both)}
    named = keras.Model({"size": size, "kind": kind}, outputs)
    for name, network in {"plain": plain, "named": named}.items():
        network.export(buckets / name, verbose=False)
        start(serving, name, image=IMAGE.format("tf2-cpu.2-15"), framework="tensorflow", artifacts=buckets / name)
    return plain, named


@pytest.fixture(scope="module")
def types(serving, buckets):
    """The server of a SavedModel whose signatures have inputs of other types."""
    import tensorflow as tf

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
        def measure(self, image_bytes):
            return {"length": tf.strings.length(image_bytes), "image_bytes": image_bytes, "text": image_bytes}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
        def echo(self, x):
            return {"x": x}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, "x"), tf.TensorSpec([None], tf.bool, "y")])
        def choose(self, x, y):
            return {"x": tf.where(y, x, -x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
        def total(self, x):
            return {"sum": tf.reduce_sum(x)}

    module = Module()
    signatures = {
        "serving_default": module.measure,
        "echo": module.echo,
        "choose": module.choose,
        "total": module.total,
    }
    tf.saved_model.save(module, str(buckets / "types"), signatures)
    start(serving, "types", image=IMAGE.format("tf2-cpu.2-15"), framework="tensorflow", artifacts=buckets / "types")
    return "types"


def test_rows_become_one_prediction_each(serving, networks):
    rows = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    expected = np.asarray(networks[0](rows))
    found = predictions(serving, "plain", rows.tolist(), parameters={"ignored": 1})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    by_name = [{"keras_tensor": row} for row in rows.tolist()]
    assert predictions(serving, "plain", by_name) == found
    status, text = post(serving, "plain", {"inputs": rows.tolist()})
    assert (status, json.loads(text)) == (200, {"outputs": found})


def test_named_inputs_become_named_outputs(serving, networks):
    import tensorflow as tf

    size, kind = np.float32([[1, 2], [0.5, -1]]), ["ideal", "unknown"]
    expected = networks[1]({"size": tf.constant(size), "kind": tf.constant(kind)})
    instances = [{"size": row, "kind": word} for row, word in zip(size.tolist(), kind, strict=True)]
    found = predictions(serving, "named", instances)
    for name, shape in {"price": (2, 1), "scores": (2, 3)}.items():
        column = np.array([row[name] for row in found])
        assert column.shape == shape
        np.testing.assert_allclose(column, expected[name], rtol=1e-5, atol=1e-6)


def test_bytes_travel_in_base64(serving, types):
    pixels = bytes(range(256))
    packed = {"b64": base64.b64encode(pixels).decode()}
    assert predictions(serving, types, [{"image_bytes": packed}])[0] | {"text": ""} == {
        "length": 256,
        "image_bytes": packed,
        "text": "",
    }
    assert (
        predictions(serving, types, [{"b64": "w7w"}, "ü"])
        == [{"length": 2, "image_bytes": {"b64": "w7w="}, "text": "ü"}] * 2
    )


def test_a_signature_can_be_chosen(serving, types):
    assert predictions(serving, types, [{"x": 3, "y": True}, {"x": 4, "y": False}], signature_name="choose") == [3, -4]
    assert error(serving, types, {"instances": [1], "signature_name": "other"}) == (
        'Serving signature name: "other" not found in signature def'
    )


def test_numbers_are_written_as_short_as_they_are(serving, types):
    status, text = post(serving, types, {"instances": [0.2, 1, 1e-7, 16777216.5], "signature_name": "echo"})
    assert (status, text) == (200, '{"predictions": [0.2, 1.0, 1e-07, 16777216.0]}')


INSTANCES = "Failed to process element: {} of 'instances' list. Error: INVALID_ARGUMENT: "
REFUSED = [
    ("plain", [{"x": [1] * 6}], INSTANCES.format("0 key: x") + "JSON object: does not have named input: x"),
    ("plain", [[1, 2]], "Matrix size-incompatible: In[0]: [1,2], In[1]: [6,64]"),
    ("plain", [[[1] * 6]], "In[0] and In[1] has different ndims: [1,1,6] vs. [6,64]"),
    ("plain", [[1] * 6, [1, 2]], INSTANCES.format(1) + "Expecting tensor size: 6 but got: 2"),
    ("plain", [[1] * 6, [[1] * 3] * 2], INSTANCES.format(1) + "Expecting shape [6] but got: [2,3]"),
    ("plain", [[1, [2]]], INSTANCES.format(0) + "Encountered list at unexpected level: 1 expected < 1"),
    (
        "plain",
        [[[1, 2], [1]]],
        INSTANCES.format(0) + "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    ("plain", [[1] * 5 + ["a"]], INSTANCES.format(0) + 'JSON Value: "a" Type: String is not of expected type: float'),
    ("plain", [[1] * 5 + [True]], INSTANCES.format(0) + "JSON Value: true Type: True is not of expected type: float"),
    ("plain", [[1] * 5 + [None]], INSTANCES.format(0) + "JSON Value: null Type: Null is not of expected type: float"),
    (
        "plain",
        [[2**24 + 1] * 6],
        INSTANCES.format(0) + "Cannot convert JSON value: 16777217 to float without loss of precision.",
    ),
    (
        "plain",
        [[1e39] * 6],
        INSTANCES.format(0) + "Cannot convert JSON value: 1e+39 to float without loss of precision.",
    ),
    ("plain", [[1] * 6, {"keras_tensor": [1] * 6}], "Expecting value/list but got object at item 1 of input list"),
    ("plain", [], "No values in 'instances' array"),
    ("plain", 5, "Excepting 'instances' to be an list/array"),
    ("named", [[1, 2]], "instances is a plain list, but expecting list of objects as multiple input tensors required"),
    ("named", [{"size": [1, 2]}], "keys must be equal to: kind,size"),
    ("named", [{"size": [1, 2], "kind": 3}], "JSON Value: 3 Type: Number is not of expected type: string"),
    ("named", [{"size": [1, 2], "kind": {"b64": "a"}}], "Unable to base64 decode"),
]


@pytest.mark.parametrize(("name", "instances", "words"), REFUSED)
def test_a_wrong_instance_is_named_in_the_words_of_tensorflow_serving(serving, networks, name, instances, words):
    assert words in error(serving, name, {"instances": instances})


def test_whole_numbers_alone_are_integers(serving, types):
    request = {"instances": [{"x": 1.5, "y": True}], "signature_name": "choose"}
    assert error(serving, types, request).endswith("JSON Value: 1.5 Type: Number is not of expected type: int64")
    request = {"instances": [{"x": 2**63, "y": True}], "signature_name": "choose"}
    assert error(serving, types, request).endswith(f"JSON Value: {2**63} Type: Number is not of expected type: int64")


def test_an_output_without_rows_is_refused(serving, types):
    request = {"instances": [1, 2], "signature_name": "total"}
    assert error(serving, types, request) == "Tensor name: sum has no shape information "


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON Parse error"),
        (b'{"instances": [[1, 2', "JSON Parse error"),
        (b"\xff", "JSON Parse error"),
        (b"[" * 100_000, "JSON Parse error"),
        (b"[1]", "Is not object"),
        (b"{}", "Missing 'inputs' or 'instances' key"),
        (b'{"instances": [1], "inputs": [1]}', "expecting only one of 'inputs' or 'instances' keys"),
    ],
)
def test_a_broken_request_is_refused_and_the_server_goes_on(serving, networks, body, words):
    assert words in error(serving, "plain", body)
    assert len(predictions(serving, "plain", [[0] * 6])) == 1


def test_a_request_may_be_as_large_as_an_endpoint_takes(serving, networks):
    rows = [[row + column / 7 for column in range(6)] for row in range(15_000)]
    assert len(json.dumps({"instances": rows})) > 1_572_864
    found = predictions(serving, "plain", rows)
    np.testing.assert_allclose(found, networks[0](np.float32(rows)), rtol=1e-4, atol=1e-4)


def test_callers_at_the_same_time_get_their_own_answers(serving, types):
    def ask(caller):
        return [predictions(serving, types, [caller, turn], signature_name="echo") for turn in range(20)]

    with ThreadPoolExecutor(32) as pool:
        for caller, answers in enumerate(pool.map(ask, range(32))):
            assert answers == [[caller, turn] for turn in range(20)]


# scikit-learn and XGBoost


def test_a_scikit_learn_model_is_served(serving, buckets):
    import joblib
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    x, y = [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], ["small", "medium", "large"]
    (buckets / "tree").mkdir()
    joblib.dump(make_pipeline(StandardScaler(), DecisionTreeClassifier()).fit(x, y), buckets / "tree/model.joblib")
    start(serving, "tree", image=IMAGE.format("sklearn-cpu.1-6"), framework="sklearn", artifacts=buckets / "tree")
    assert predictions(serving, "tree", x) == y
    for request, words in (
        ({"instances": [{"a": 1}]}, "float() argument must be a string or a real number, not 'dict'"),
        ({"instances": x, "parameters": {}}, "got an unexpected keyword argument 'parameters'"),
    ):
        status, text = post(serving, "tree", request)
        assert status == 400
        assert json.loads(text).startswith("Prediction failed: Exception during sklearn prediction: ")
        assert words in text
    for body, words in ((b"{", "did not contain valid JSON"), (b"{}", "Invalid request"), (b"", "Empty request body")):
        status, text = post(serving, "tree", body)
        assert status == 400
        assert words in text
    assert predictions(serving, "tree", x) == y


def test_an_xgboost_model_is_served_and_nan_stands_for_what_is_missing(serving, buckets):
    import xgboost

    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[::5, 0] = np.nan
    booster = xgboost.train({"max_depth": 2}, xgboost.DMatrix(x, x[:, 1]), 5)
    (buckets / "trees").mkdir()
    with xgboost.config_context(verbosity=0):  # it would warn that the format is not in the file's name
        booster.save_model(buckets / "trees/model.bst")
    start(serving, "trees", image=IMAGE.format("xgboost-cpu.2-1"), framework="xgboost", artifacts=buckets / "trees")
    rows = [["NaN" if value != value else value for value in row] for row in x.tolist()]
    np.testing.assert_allclose(predictions(serving, "trees", rows), booster.predict(xgboost.DMatrix(x)), rtol=1e-6)
    status, text = post(serving, "trees", {"instances": [["a", 1, 2]]})
    assert status == 400
    assert "Could not initialize DMatrix from inputs: could not convert string to float" in text


@pytest.mark.parametrize(
    ("framework", "file", "content", "words"),
    [
        ("tensorflow", "model.keras", b"", "Could not find SavedModel .pb or .pbtxt"),
        ("tensorflow", "saved_model.pb", b"no protocol buffer", "The model could not be loaded: "),
        ("sklearn", "other.joblib", b"", "Could not find any of model.joblib, model.pkl in"),
        ("sklearn", "model.pkl", b"no pickle", "Could not load the model: "),
        ("sklearn", "model.pkl", pickle.dumps({}), "Invalid model type detected: builtins.dict."),
        ("xgboost", "model.bst", b"no trees", "Could not load the model: "),
    ],
)
def test_what_cannot_be_loaded_is_not_deployed(serving, buckets, tmp_path, framework, file, content, words):
    folder = buckets / tmp_path.name
    folder.mkdir()
    (folder / file).write_bytes(content)
    with pytest.raises(ServingError) as failure:
        start(serving, tmp_path.name, image=IMAGE.format("any"), framework=framework, artifacts=folder)
    said = str(failure.value)
    assert said.startswith("Model server terminated: model server container terminated: exit_code: 1.")
    assert words in said.splitlines()[-1]
    assert failure.value.code == StatusCode.FAILED_PRECONDITION


# Containers of one's own


def test_a_container_is_told_what_vertex_ai_tells_it(serving, buckets):
    (buckets / "caip-tenant/copy").mkdir(parents=True)
    start(
        serving,
        "told",
        image=CUSTOM["image"],
        command=CUSTOM["command"],
        args=("--port=$(AIP_HTTP_PORT)", "$(GREETING) $$(GREETING) $(NOBODY)"),
        environment=CUSTOM["environment"]
        | {
            "HEALTHY": "/v1/endpoints/42/deployedModels/told",
            "NAME": "Ada",
            "GREETING": "hi $(NAME)",
            "AIP_MODE": "mine",
        },
        artifacts=buckets / "caip-tenant/copy",
        machine_type="n1-standard-4",
    )
    told = json.loads(post(serving, "told", b"text")[1])
    port = told["environment"]["AIP_HTTP_PORT"]
    assert told["arguments"] == [f"--port={port}", "hi Ada $(GREETING) $(NOBODY)"]
    assert (told["path"], told["body"]) == ("/v1/endpoints/42/deployedModels/told:predict", "text")
    assert {name: value for name, value in told["environment"].items() if name.startswith("AIP_")} == {
        "AIP_ACCELERATOR_TYPE": "",
        "AIP_DEPLOYED_MODEL_ID": "told",
        "AIP_ENDPOINT_ID": "42",
        "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
        "AIP_HEALTH_ROUTE": "/v1/endpoints/42/deployedModels/told",
        "AIP_HTTP_PORT": port,
        "AIP_MACHINE_TYPE": "n1-standard-4",
        "AIP_MODE": "PREDICTION",
        "AIP_MODE_VERSION": "1.0.0",
        "AIP_MODEL_NAME": "42",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/42/deployedModels/told:predict",
        "AIP_PROJECT_NUMBER": "123456789012",
        "AIP_STORAGE_URI": "gs://caip-tenant/copy",
        "AIP_VERSION_NAME": "told",
    }
    assert json.loads(post(serving, "told", b"", route="/other")[1])["path"] == "/other"
    serving.stop("told")
    with pytest.raises(errors.Refused, match="told"):
        post(serving, "told", b"")


def test_variables_are_expanded_as_kubernetes_does():
    assert expand("$(A)/$(B) $$(A) $A $(A", {"A": "1"}) == "1/$(B) $(A) $A $(A"


def members(name, owner=None):
    """Return the processes of a model's server, the oldest first."""
    found = []
    for process in (owner or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("AIP_DEPLOYED_MODEL_ID") == name:
                found.append(process)
    return found


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def answers(serving, name):
    try:
        return post(serving, name, b"")[0] == 200
    except errors.Refused as refusal:
        assert refusal.code == StatusCode.UNAVAILABLE
        assert str(serving.folder / f"{name}.log") in refusal.message
        return False


def test_a_server_that_crashes_is_started_again(serving):
    start(serving, "crashes", **CUSTOM)
    start(serving, "stays", **CUSTOM)
    assert answers(serving, "crashes")
    members("crashes")[-1].kill()
    wait_for(lambda: not members("crashes"))
    assert not answers(serving, "crashes")
    assert answers(serving, "stays")
    wait_for(lambda: answers(serving, "crashes"))
    assert (serving.folder / "crashes.log").read_text().count("starting\n") == 2
    for name in ("crashes", "stays"):
        assert members(name)
        serving.stop(name)
        assert not members(name)


def test_a_connection_that_a_server_closed_is_opened_again(serving):
    start(serving, "closes", **CUSTOM)
    assert answers(serving, "closes")
    time.sleep(1)
    assert answers(serving, "closes")


def test_a_server_that_hangs_does_not_keep_its_callers_or_others(serving):
    start(serving, "hangs", **CUSTOM)
    assert answers(serving, "hangs")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, serving, "hangs", b"sleep", seconds=1)
        assert answers(serving, "hangs")
        with pytest.raises(errors.Refused) as refusal:
            waiting.result()
    assert refusal.value.code == StatusCode.UNAVAILABLE
    assert "Took too long to respond when processing endpoint_id: 42, deployed_model_id: hangs" in refusal.value.message
    assert answers(serving, "hangs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"health_route": "/other", "ready_seconds": 60}, "GET /other got 404, 4 times in a row."),
        ({"environment": CUSTOM["environment"] | {"PORT_NAME": "MINE", "MINE": "0"}}, "Nothing listened on it."),
        ({"command": ("sleep", "60")}, "Nothing listened on it."),
    ],
)
def test_a_server_that_is_never_healthy_is_not_deployed(serving, change, words):
    with pytest.raises(ServingError) as failure:
        start(serving, "never", **CUSTOM | {"ready_seconds": 1} | change)
    said = str(failure.value)
    assert said.startswith(
        "Model server never became ready. Please validate that your model file or container configuration are valid. "
        f"Model server logs can be found at {serving.folder / 'never.log'}. "
    )
    assert said.endswith(words)
    assert not members("never")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ("sh", "-c", "echo no model; exit 7"),
            "exit_code: 7. Model server logs can be found at {}. Its last line is:\nno model",
        ),
        (("no-such-program",), "exit_code: 127. "),
        ((), "no command"),
    ],
)
def test_a_server_that_ends_at_once_is_not_deployed(serving, command, words):
    with pytest.raises(ServingError) as failure:
        start(serving, "ends", **CUSTOM | {"command": command})
    assert words.format(serving.folder / "ends.log") in str(failure.value)


def test_a_deployment_can_be_stopped_before_it_is_ready(serving):
    stopper = threading.Timer(0.5, serving.stop, ["early"])
    stopper.start()
    with pytest.raises(ServingError):
        start(serving, "early", **CUSTOM | {"command": ("sleep", "60")})
    stopper.join()


def test_nothing_outlives_the_server_of_the_cloud(buckets, tmp_path):
    """A process that serves two models is killed; its model servers end, and what they left is removed later."""
    code = (
        "import time; from pathlib import Path; from helpers.local.serving import *\n"
        f"serving = Serving(Path({str(tmp_path / 'serving')!r}), Path({str(buckets)!r}), dict)\n"
        f"serving.start(Deployment(id='left', **{CUSTOM!r}))\n"
        "print(flush=True); time.sleep(60)"
    )
    owner = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    owner.stdout.readline()
    processes = members("left", owner)
    assert processes
    assert (tmp_path / "serving/left").is_dir()
    owner.kill()
    owner.communicate()
    assert not psutil.wait_procs(processes, timeout=20)[1]
    Serving(tmp_path / "serving", buckets, dict).close()
    assert [path.name for path in (tmp_path / "serving").iterdir()] == ["left.log"]
