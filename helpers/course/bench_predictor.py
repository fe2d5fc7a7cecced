"""The prediction server beside the SDK's own server with the same model: both run, and are asked in turns."""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import uvloop
from google.cloud.aiplatform.prediction import Predictor

from helpers.course.bench import Row, duration, require_equal, verdict

TURNS, SECONDS = 5, 1.5
OURS = ["helpers.predictor"]
# As the SDK starts it, a process for each core, but for this machine alone.
REFERENCE = ["uvicorn", "--factory", "google.cloud.aiplatform.prediction.model_server:CprModelServer"]
CONTRACT = {"AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/predict", "UVICORN_HOST": "127.0.0.1"}
HANDLER = {
    "HANDLER_MODULE": "google.cloud.aiplatform.prediction.handler",
    "HANDLER_CLASS": "PredictionHandler",
    "PREDICTOR_MODULE": __name__,
    "PREDICTOR_CLASS": "PlainSavedModel",
}


class PlainSavedModel(Predictor):
    """What one writes first: the signature, called for each request."""

    def load(self, artifacts_uri):
        """Load the model."""
        import tensorflow as tf

        self.model, self.constant = tf.saved_model.load(artifacts_uri), tf.constant
        self.signature = self.model.signatures["serving_default"]
        self.inputs = self.signature.structured_input_signature[1]

    def predict(self, instances):
        """Return the predictions for a request."""
        rows = instances["instances"]
        inputs = {name: self.constant([[row[name]] for row in rows], spec.dtype) for name, spec in self.inputs.items()}
        return {"predictions": self.signature(**inputs)["output_0"].numpy().tolist()}


def rows():
    """Return the lines of the table."""
    from helpers.local.runner import free_port
    from helpers.predictor.server import SavedModel
    from helpers.trainer import task

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        with contextlib.redirect_stdout(None):
            task.main(["--epochs", "1", "--model_dir", folder])
        schema = json.loads((Path(folder) / "assets.extra/instance_schema.json").read_text())
        body = json.dumps({"instances": [schema["example"]]}).encode()
        ours, reference = SavedModel(), PlainSavedModel()
        for predictor in (ours, reference):
            predictor.load(folder)
        floor = in_process([lambda: ours.predict([ours.preprocess(body)]), lambda: reference.predict(json.loads(body))])

        ports = [free_port(), free_port()]
        workers = ["--host", "127.0.0.1", "--port", str(ports[1]), "--workers", str(max(2, os.cpu_count()))]
        for port, command in zip(ports, [OURS, [*REFERENCE, *workers]], strict=True):
            variables = {**os.environ, **CONTRACT, **HANDLER, "AIP_STORAGE_URI": folder, "AIP_HTTP_PORT": str(port)}
            servers.enter_context(serving(command, variables))
        for port in ports:
            wait(port)
        require_equal(*([ask(port, body)] for port in ports))
        measured = {clients: ([], []) for clients in (1, 8, 64)}
        for _ in range(TURNS):
            for clients, results in measured.items():
                for port, result in zip(ports, results, strict=True):
                    result.append(uvloop.run(one_round(port, clients, body)))
    lines = [line("one row in this process / the signature", *floor, 1)]
    for clients, results in measured.items():
        (_, ours), (_, reference) = (map(statistics.median, zip(*result, strict=True)) for result in results)
        lines.append(line(f"{clients} clients, median / the SDK's server", ours, reference, 1))
    (ours, _), (reference, _) = (map(statistics.median, zip(*result, strict=True)) for result in results)
    rates = [f"{rate:,.0f}/s" for rate in (ours, reference)]
    ratio = ours / reference
    return [*lines, Row(f"{clients} clients, requests", *rates, f"{ratio:.2f}", ">= 3", verdict(ratio >= 3))]


def line(what, ours, reference, target):
    """Return the row for two times, of which ours may be at most `target` times the other."""
    ratio = ours / reference
    return Row(what, duration(ours), duration(reference), f"{ratio:.2f}", f"<= {target}", verdict(ratio <= target))


def in_process(functions):
    """Return the median seconds of each function, called in turns."""
    times = [[] for _ in functions]
    for _ in range(1000):
        for function, results in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            results.append(time.perf_counter() - started)
    return map(statistics.median, times)


@contextlib.contextmanager
def serving(module, variables):
    """Run a server."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait(port):
    """Return when the server on a port is healthy."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return
        time.sleep(0.2)


def ask(port, body):
    """Return the predictions for a request."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["predictions"]


class Client(asyncio.Protocol):
    """A connection that sends its request again as soon as it is answered, as cheaply as Python can."""

    def __init__(self, body, until):
        """Send a request until a time."""
        head = "POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json"
        head = "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""])
        self.request, self.until, self.times = head.encode() + body, until, []
        self.end, self.answer = asyncio.get_running_loop().create_future(), b""

    def connection_made(self, transport):
        """Begin."""
        self.transport = transport
        self.send()

    def send(self):
        """Send the request."""
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data):
        """Take a part of the answer."""
        self.answer += data
        head, _, body = self.answer.partition(b"\r\n\r\n")
        if not body or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        assert head.startswith(b"HTTP/1.1 200"), self.answer
        self.answer = b""
        now = time.perf_counter()
        self.times.append(now - self.started)
        if now < self.until:
            self.send()
        else:
            self.end.set_result(None)


async def one_round(port, clients, body):
    """Return the requests a second of some clients, and the median seconds of a request."""
    loop, until = asyncio.get_running_loop(), time.perf_counter() + SECONDS
    made = [(await loop.create_connection(lambda: Client(body, until), "127.0.0.1", port))[1] for _ in range(clients)]
    await asyncio.gather(*(client.end for client in made))
    times = [seconds for client in made for seconds in client.times]
    return len(times) / SECONDS, statistics.median(times)
