"""The server: one call of the model answers all requests that have come while it worked on those before.

It is made of the SDK's parts for custom prediction routines: `SavedModel` is a Predictor, which says what a model does
with a request; `Handler` brings requests to it; `Server` is the CprModelServer.
"""

import asyncio
import json
import math
import os
import random
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from google.cloud.aiplatform import prediction
from google.cloud.aiplatform.prediction.model_server import CprModelServer
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from helpers.predictor.instances import Instances, Refused

MAX_BYTES = 10 * 1024 * 1024  # of a request: the limit of a dedicated endpoint
MAX_ROWS = 256  # in one call of the model, unless a single request has more
SAMPLE_SECONDS = 5  # until a sampled request is in a file


class SavedModel(prediction.Predictor):
    """A SavedModel, which answers by its signature `serving_default`, several requests at once."""

    def load(self, artifacts_uri: str) -> None:
        """Load the model from a folder, gs:// or not, and let it predict once: a first call takes longer."""
        import tensorflow as tf

        if not artifacts_uri or not tf.io.gfile.exists(f"{artifacts_uri}/saved_model.pb"):
            where = f"there is no saved_model.pb in AIP_STORAGE_URI, which is {artifacts_uri!r}"
            raise FileNotFoundError(f"{where}: the artifact_uri of a model is the folder of model.export(folder)")
        self.error = tf.errors.InvalidArgumentError
        self.model = tf.saved_model.load(artifacts_uri)
        signature = self.model.signatures["serving_default"]
        specs = signature.structured_input_signature[1]
        inputs = {name: (spec.dtype.as_numpy_dtype, tuple(spec.shape[1:])) for name, spec in specs.items()}
        file = f"{artifacts_uri}/assets.extra/instance_schema.json"
        schema = json.loads(tf.io.gfile.GFile(file).read()) if tf.io.gfile.exists(file) else {}
        instances = Instances(inputs, schema)
        groups, self.types, self.preprocess = instances.groups.values(), list(instances.groups), instances.read
        sizes = [[math.prod(shape) for shape in names.values()] for names in groups]

        def unpack(*arrays):
            found = {}
            for names, size, array in zip(groups, sizes, arrays, strict=True):
                parts = zip(names.items(), tf.split(array, size, axis=1), strict=True)
                found |= {name: tf.reshape(part, [-1, *shape]) for (name, shape), part in parts}
            return signature(**found)

        # An array for each type of input, instead of a tensor for each input: a call takes half of the time.
        specs = [tf.TensorSpec([None, sum(size)], dtype) for size, dtype in zip(sizes, self.types, strict=True)]
        self.call = tf.function(unpack).get_concrete_function(*specs)
        self.predict([self.preprocess(json.dumps({"instances": [instances.example]}))])

    def predict(self, requests: list[list], first: int = 0) -> list:
        """Return for each request its list of predictions, or the Refused that it deserves."""
        rows = [row for request in requests for row in request]
        try:
            predictions = iter(self.run(rows))
            return [[next(predictions) for _ in request] for request in requests]
        except self.error as error:
            if len(requests) > 1:  # one of them is to blame, and the others are not
                return [self.predict([request])[0] for request in requests]
            reason = error.message.partition("\n\t [[")[0].splitlines()[-1]
            refused = [Refused(f"instances[{first}] is refused by the model: {reason}")]
            half = len(rows) // 2  # in the first of two halves is the row to blame, or in the second
            parts = [(rows[:half], first), (rows[half:], first + half)] if half else []
            answers = (self.predict([part], start) for part, start in parts)
            return next((answer for answer in answers if isinstance(answer[0], Refused)), refused)

    def run(self, rows: list) -> list:
        """Call the model, and return a prediction for each row."""
        arrays = [np.array(values, dtype) for values, dtype in zip(zip(*rows, strict=True), self.types, strict=True)]
        outputs = {name: values.numpy().tolist() for name, values in self.call(*arrays).items()}
        if any(len(values) != len(rows) for values in outputs.values()):
            raise ValueError(f"the model does not return {len(rows)} predictions for {len(rows)} instances")
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        return [dict(zip(outputs, values, strict=True)) for values in zip(*outputs.values(), strict=True)]

    def postprocess(self, predictions: list) -> str:
        """Return the answer to a request as JSON."""
        try:
            return json.dumps({"predictions": predictions}, allow_nan=False)
        except ValueError:
            raise Refused("The model predicts NaN or infinity, which JSON does not have.", 500) from None


class Handler(prediction.Handler):
    """Answers requests, and those that come together together; the model works in a thread of its own."""

    def __init__(self, artifacts_uri: str, predictor: type[prediction.Predictor]):
        """Load the model."""
        self.predictor = predictor()
        self.predictor.load(artifacts_uri.rstrip("/"))
        self.model = os.environ.get("AIP_DEPLOYED_MODEL_ID") or artifacts_uri
        self.samples = Samples(os.environ.get("SAMPLES_URI", ""), float(os.environ.get("SAMPLING_RATE", "1")))
        self.thread, self.waiting, self.worker = ThreadPoolExecutor(1), deque(), None

    async def handle(self, request: Request) -> Response:
        """Answer a request, and print a line of JSON about it, which Cloud Logging takes apart."""
        started, rows, body = time.perf_counter(), [], bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    raise Refused(f"Request payload size exceeds the limit: {MAX_BYTES} bytes.", 413)
            rows = self.predictor.preprocess(bytes(body))
            predictions = asyncio.get_running_loop().create_future()
            self.waiting.append((rows, predictions))
            self.worker = self.worker or asyncio.create_task(self.work())
            status, answer = 200, self.predictor.postprocess(await predictions)
            self.samples.add(body, answer)
        except (Refused, ClientDisconnect) as refused:
            status, answer = getattr(refused, "status", 400), json.dumps({"error": str(refused)})
        except Exception as error:
            traceback.print_exc()
            status, answer = 500, json.dumps({"error": f"The server failed: {type(error).__name__}: {error}"})
        took = round(1000 * (time.perf_counter() - started), 2)
        severity, message = ("INFO", f"{len(rows)} rows in {took} ms") if status == 200 else ("WARNING", answer)
        facts = {"model": self.model, "rows": len(rows), "ms": took, "status": status}
        print(json.dumps({"severity": severity, "message": message, **facts}), flush=True)
        return Response(answer, status, media_type="application/json")

    async def work(self) -> None:
        """Call the model until nobody waits."""
        while self.waiting:
            await asyncio.sleep(0)  # what is here by now is read first
            batch, room = [], MAX_ROWS
            while self.waiting and (not batch or len(self.waiting[0][0]) <= room):
                batch.append(self.waiting.popleft())
                room -= len(batch[-1][0])
            requests, futures = zip(*batch, strict=True)
            run = asyncio.get_running_loop().run_in_executor
            try:
                results = await run(self.thread, self.predictor.predict, requests)
            except Exception as error:
                results = [error] * len(requests)
            for future, result in zip(futures, results, strict=True):
                if not future.done():  # a client that went away waits no more
                    (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
        self.worker = None


class Samples:
    """A share of the requests with their answers, as lines of JSON in files of a folder, gs:// or not."""

    def __init__(self, folder: str, share: float):
        """Keep a share, from 0 to 1; nothing without a folder."""
        self.folder, self.share, self.lines = folder.rstrip("/"), share if folder else 0, deque()

    def add(self, body: bytes, answer: str) -> None:
        """Keep a request, or not."""
        if random.random() < self.share:
            self.lines.append(json.dumps({"time": time.time(), **json.loads(body), **json.loads(answer)}) + "\n")
            if len(self.lines) == 1:
                loop = asyncio.get_running_loop()
                loop.call_later(SAMPLE_SECONDS, loop.run_in_executor, None, self.write)

    def write(self) -> None:
        """Write what was kept since the last time to a new file."""
        import tensorflow as tf

        if self.lines:
            tf.io.gfile.makedirs(self.folder)
            with tf.io.gfile.GFile(f"{self.folder}/{time.time_ns()}-{os.getpid()}.jsonl", "w") as file:
                file.write("".join(self.lines.popleft() for _ in range(len(self.lines))))


class Server(CprModelServer):
    """The SDK's server, but predictions do not go through FastAPI, which takes as long as all else."""

    async def __call__(self, scope, receive, send):
        """Answer a request, or live through the life of the server."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", self.predict_route):
            answer = await self.handler.handle(Request(scope, receive))
            await answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
        if scope["type"] == "lifespan":
            self.handler.samples.write()


def app() -> Server:
    """Return the server; if its model cannot be loaded, the last line that the process prints says why."""
    os.environ.update(HANDLER_MODULE=__name__, HANDLER_CLASS="Handler")
    if "PREDICTOR_CLASS" not in os.environ:  # which another start has set
        os.environ.update(PREDICTOR_MODULE=__name__, PREDICTOR_CLASS="SavedModel")
    try:
        return Server()
    except Exception as error:
        sys.exit(f"The model could not be loaded: {type(error).__name__}: {error}")
