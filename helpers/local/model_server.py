"""What runs in Google's prebuilt prediction images: `python -m helpers.local.model_server FRAMEWORK FOLDER`.

Loads the model in the folder, then listens on 127.0.0.1:AIP_HTTP_PORT and answers AIP_HEALTH_ROUTE and
AIP_PREDICT_ROUTE: TensorFlow as TensorFlow Serving does, scikit-learn and XGBoost as Google's own server does, in their
words. A model that does not load ends the process; the last line that it writes says why.
"""

import importlib.util
import json
import os
import pickle
import sys
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import numpy as np

from helpers.local import json_tensor
from helpers.local.json_tensor import Refusal

# What TensorFlow Serving answers for TensorFlow's codes of invalid arguments, deadlines and so on; for others 500.
HTTP_STATUS = {3: 400, 4: 504, 5: 404, 8: 429, 9: 400, 11: 400, 12: 501, 14: 503}
FORMAT = (
    "The service expects the request to be a valid JSON object with a list-valued attribute called `instances`, i.e. "
    '`{"instances": [...]}`.'
)


class SavedModel:
    """A SavedModel that answers as TensorFlow Serving does."""

    def __init__(self, folder: Path):
        """Load the SavedModel in a folder into a session, as TensorFlow Serving does."""
        if not any((folder / name).exists() for name in ("saved_model.pb", "saved_model.pbtxt")):
            held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {folder}. It holds "
                f"{held}; model.export(folder) writes a SavedModel, which has to lie directly in the folder."
            )
        # The package without its __init__, which imports TensorFlow's whole interface: the session alone starts in a
        # fifth of the time and in half of the memory.
        sys.modules["tensorflow"] = importlib.util.module_from_spec(importlib.util.find_spec("tensorflow"))
        from tensorflow.core.framework.types_pb2 import DataType
        from tensorflow.core.protobuf.config_pb2 import CallableOptions, ConfigProto, GPUOptions, RunOptions
        from tensorflow.python.client.session import Session
        from tensorflow.python.framework import dtypes, errors_impl, ops
        from tensorflow.python.saved_model.loader_impl import SavedModelLoader

        self.error_type = errors_impl.OpError
        # A GPU's memory is for several servers.
        session = Session(graph=ops.Graph(), config=ConfigProto(gpu_options=GPUOptions(allow_growth=True)))
        self.signatures = {}
        for name, signature in SavedModelLoader(str(folder)).load(session, ["serve"]).signature_def.items():
            if not signature.inputs:
                continue  # what initializes the model, which is no signature for clients
            inputs = {}
            for alias, tensor in signature.inputs.items():
                type_name = DataType.Name(tensor.dtype).removeprefix("DT_").lower()
                inputs[alias] = json_tensor.Input(type_name, dtypes.as_dtype(tensor.dtype).as_numpy_dtype)
            options = CallableOptions(
                feed=[tensor.name for tensor in signature.inputs.values()],
                fetch=[tensor.name for tensor in signature.outputs.values()],
                # In the thread that asks: to hand a small graph to another one takes longer than to run it.
                run_options=RunOptions(inter_op_thread_pool=-1),
            )
            # Not Session.run: its checks of shapes would hide the errors that TensorFlow Serving gives.
            self.signatures[name] = inputs, list(signature.outputs), session._make_callable_from_options(options)

    def answer(self, body: bytes) -> dict:
        """Return the answer to a request."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"JSON Parse error: {error}") from None
        if not isinstance(request, dict):
            raise Refusal(f"JSON Value: {json.dumps(request, indent=4)} Is not object")
        name = request.get("signature_name", "serving_default")
        if not isinstance(name, str):
            value = json.dumps(request, indent=4)
            raise Refusal(f"JSON Value: {value} not formatted correctly. 'signature_name' key must be a string value.")
        if name not in self.signatures:
            raise Refusal(f'Serving signature name: "{name}" not found in signature def')
        inputs, outputs, call = self.signatures[name]
        by_row = "instances" in request
        arrays = json_tensor.from_rows(request, inputs) if by_row else json_tensor.from_columns(request, inputs)
        try:
            results = dict(zip(outputs, map(np.asarray, call(*arrays)), strict=True))
        except self.error_type as error:
            raise Refusal(error.message, HTTP_STATUS.get(error.error_code, 500)) from None
        return {"predictions": json_tensor.to_rows(results)} if by_row else {"outputs": json_tensor.to_columns(results)}

    @staticmethod
    def error(message: str) -> str:
        """Return the body for an error."""
        return json.dumps({"error": message}, indent=4)


class Estimator:
    """A scikit-learn model or pipeline that answers as Google's server does."""

    framework = "sklearn"
    kind = "exported sklearn model or pipeline"
    files = ("model.joblib", "model.pkl")

    def __init__(self, folder: Path):
        """Load the first of the framework's files that there is."""
        path = next((folder / name for name in self.files if (folder / name).exists()), None)
        if path is None:
            raise FileNotFoundError(f"Could not find any of {', '.join(self.files)} in {folder}")
        try:
            self.model = self.load(path)
        except Exception as error:
            raise ValueError(f"Could not load the model: {path}. {error}.") from error
        kind = type(self.model)
        if self.framework not in kind.__module__:
            raise TypeError(
                f"Invalid model type detected: {kind.__module__}.{kind.__name__}. Please make sure the model file is "
                f"an {self.kind}."
            )

    def load(self, path: Path):
        """Return the model in a file."""
        import joblib

        return joblib.load(path) if path.suffix == ".joblib" else pickle.loads(path.read_bytes())

    def predict(self, instances: list, **options):
        """Return an array or a list of predictions."""
        return self.model.predict(instances, **options)

    def answer(self, body: bytes) -> dict:
        """Return the answer to a request."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            received = body.decode(errors="replace")
            what = f"The request did not contain valid JSON. {FORMAT} The received request was:\n{received}"
            raise Refusal(what if body.strip() else f"Empty request body. {FORMAT}") from None
        if not isinstance(request, dict) or "instances" not in request:
            received = body.decode(errors="replace")
            raise Refusal(f"Invalid request. {FORMAT} The received request was:\n{received}")
        instances = request.pop("instances")
        request.pop("signature_name", None)
        try:
            # What else the request holds goes to the model, "parameters" too: most models refuse it.
            predictions = self.predict(instances, **request)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(f"Prediction failed: Exception during {self.framework} prediction: {error}") from error
        return {"predictions": predictions.tolist() if isinstance(predictions, np.ndarray) else predictions}

    @staticmethod
    def error(message: str) -> str:
        """Return the body for an error."""
        return json.dumps(message) + "\n"


class Booster(Estimator):
    """An XGBoost model that answers as Google's server does."""

    framework = "xgboost"
    kind = "exported xgboost model"
    files = ("model.joblib", "model.pkl", "model.bst")

    def load(self, path: Path):
        """Return the model in a file."""
        import xgboost

        return xgboost.Booster(model_file=path) if path.suffix == ".bst" else super().load(path)

    def predict(self, instances: list, **options):
        """Return an array of predictions; "NaN" and null stand for what is missing."""
        import xgboost

        try:
            matrix = xgboost.DMatrix(np.array(instances, np.float32))
        except Exception as error:
            raise Refusal(f"Prediction failed: Could not initialize DMatrix from inputs: {error}") from error
        return self.model.predict(matrix, **options)


FRAMEWORKS = {"tensorflow": SavedModel, "sklearn": Estimator, "xgboost": Booster}


class Handler(BaseHTTPRequestHandler):
    """One connection, served by a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer leaves as one packet

    def do_GET(self):
        """Answer a health check: who listens has loaded."""
        self.send(200 if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404, "{}")

    def do_POST(self):
        """Answer a request for predictions."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            return self.send(411, self.server.model.error("The request needs a Content-Length."))
        body = self.rfile.read(int(length))
        if self.path != os.environ["AIP_PREDICT_ROUTE"]:
            return self.send(404, self.server.model.error(f"Malformed request: POST {self.path}"))
        try:
            status, answer = 200, json.dumps(self.server.model.answer(body))
        except Refusal as refusal:
            status, answer = refusal.status, self.server.model.error(str(refusal))
        except Exception as error:
            traceback.print_exc()
            status, answer = 500, self.server.model.error(f"{type(error).__name__}: {error}")
        return self.send(status, answer)

    def send(self, status: int, answer: str):
        """Send an answer in JSON."""
        content = answer.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Keep requests out of the log, which is for what goes wrong."""


class Server(ThreadingTCPServer):
    """Serves one model."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model):
        """Listen, for this machine alone."""
        self.model = model
        super().__init__(("127.0.0.1", int(os.environ["AIP_HTTP_PORT"])), Handler)


def main(framework: str, folder: str):
    """Load a model and serve it until the process is ended."""
    try:
        model = FRAMEWORKS[framework](Path(folder))
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"The model could not be loaded: {type(error).__name__}: {' '.join(str(error).split())}")
    Server(model).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
