"""Model servers: started, watched, asked and ended, each under the prediction contract of Vertex AI.

A server's port is one that is free on this machine: AIP_HTTP_PORT tells it which. Google's prebuilt images are
played by `helpers.local.model_server`; the command of any other image runs as it does for a training job.
"""

import http.client
import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpc import StatusCode

from helpers.local import PROJECT_NUMBER, errors, sandbox
from helpers.local.runner import free_port, tail

log = logging.getLogger(__name__)

READY_SECONDS = 600  # in which a server has to become healthy, unless its deployment says otherwise
ANSWER_SECONDS = 60  # in which a shared endpoint wants its answer
HEALTH_SECONDS = 10  # in which a health check has to be answered
MAX_FAILED_CHECKS = 4  # in a row; a server that does not listen yet, or answers 503, is loading
LOOK_SECONDS = 0.03  # between looks at a server that does not listen yet
CHECK_SECONDS = 0.5  # between health checks of one that does
PAUSES = (1, 60)  # seconds before a server that ended is started again: at first, doubling, at most
STEADY_SECONDS = 60  # after which a server that ends begins with the first pause again
GRACE_SECONDS = 10  # between asking a server to end and ending it


class ServingError(errors.Refused):
    """A model server that never became ready, in Google's words."""

    def __init__(self, message: str):
        """Fail a deployment."""
        super().__init__(StatusCode.FAILED_PRECONDITION, message)


@dataclass(frozen=True)
class Deployment:
    """A deployed model: the container that serves it, and what Vertex AI tells that container."""

    id: str
    endpoint: str = ""  # the number that its name ends with
    image: str = ""
    framework: str = ""  # of a prebuilt image: tensorflow, sklearn or xgboost
    artifacts: Path | None = None  # a folder in the buckets
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    predict_route: str = ""
    health_route: str = ""
    machine_type: str = ""
    accelerator_type: str = ""
    ready_seconds: float = READY_SECONDS

    def contract(self, port: int, buckets: Path) -> dict[str, str]:
        """Return what Vertex AI sets in the environment of a prediction container."""
        route = f"/v1/endpoints/{self.endpoint}/deployedModels/{self.id}"
        return {
            "AIP_ACCELERATOR_TYPE": self.accelerator_type,
            "AIP_DEPLOYED_MODEL_ID": self.id,
            "AIP_ENDPOINT_ID": self.endpoint,
            "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
            "AIP_HEALTH_ROUTE": self.health_route or route,
            "AIP_HTTP_PORT": str(port),
            "AIP_MACHINE_TYPE": self.machine_type,
            "AIP_MODE": "PREDICTION",
            "AIP_MODE_VERSION": "1.0.0",
            "AIP_MODEL_NAME": self.endpoint,
            "AIP_PREDICT_ROUTE": self.predict_route or f"{route}:predict",
            "AIP_PROJECT_NUMBER": PROJECT_NUMBER,
            "AIP_STORAGE_URI": f"gs://{self.artifacts.relative_to(buckets)}" if self.artifacts else "",
            "AIP_VERSION_NAME": self.id,
        }


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with each $(NAME) replaced by that variable, if there is one; $$(NAME) gives $(NAME)."""
    return re.sub(r"\$\$|\$\(([\w.-]+)\)", lambda found: variables.get(found[1], found[0]) if found[1] else "$", text)


class Serving:
    """All model servers, by the id of what they serve."""

    def __init__(self, folder: Path, buckets: Path, environment: Callable[[], Mapping[str, str]]):
        """Keep logs in a folder; `environment()` gives the variables that lead a container to the local cloud."""
        self.folder, self.buckets, self.environment = folder, buckets, environment
        for left in folder.glob("*/"):
            shutil.rmtree(left, ignore_errors=True)  # by servers of models that a killed process served
        folder.mkdir(parents=True, exist_ok=True)
        self._servers: dict[str, ModelServer] = {}

    def start(self, deployment: Deployment) -> None:
        """Start a server; return once it is healthy. ServingError says why it never became so."""
        server = self._servers[deployment.id] = ModelServer(deployment, self)
        try:
            server.wait()
        except Exception:
            self.stop(deployment.id)
            raise

    def call(
        self, name: str, body: bytes, headers: Mapping[str, str], route: str = "", seconds: float = ANSWER_SECONDS
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return the status, headers and body that a server answers to a POST, by default to its predict route."""
        server = self._servers.get(name)
        if server is None:
            raise errors.not_found(f"DeployedModel {name}")
        return server.call(body, headers, route, seconds)

    def stop(self, name: str) -> None:
        """End a server, if there is one; its log stays."""
        if server := self._servers.pop(name, None):
            server.stop()

    def close(self) -> None:
        """End all servers."""
        threads = [threading.Thread(target=self.stop, args=(name,)) for name in list(self._servers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class ModelServer:
    """One server: its process, and the thread that starts it again whenever it ends."""

    def __init__(self, deployment: Deployment, serving: Serving):
        """Start the process in the background."""
        self.deployment, self.serving = deployment, serving
        self.log = serving.folder / f"{deployment.id}.log"
        self._contract: dict[str, str] = {}
        self._process: sandbox.Process | None = None
        self._connections: Connections | None = None  # while it is healthy
        self._failure: Exception | None = None
        self._settled, self._stopping, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name=f"model server {deployment.id}", daemon=True)
        self._keeper.start()

    def wait(self) -> None:
        """Return once the server is healthy for the first time; raise what kept it from that."""
        self._settled.wait()
        if self._failure:
            raise self._failure

    def call(self, body: bytes, headers: Mapping[str, str], route: str, seconds: float):
        """Return the status, headers and body that the server answers to a POST."""
        connections = self._connections
        try:
            if connections is None:
                raise ConnectionError
            return connections.post(route or self._contract["AIP_PREDICT_ROUTE"], body, headers, seconds)
        except TimeoutError:
            where = f"endpoint_id: {self.deployment.endpoint}, deployed_model_id: {self.deployment.id}"
            words = f"Took too long to respond when processing {where}: more than {seconds} s."
        except (OSError, http.client.IncompleteRead):
            words = (
                f"The service is currently unavailable: the model server ended and is started again. {self._where()}"
            )
        except http.client.HTTPException as error:
            words = f"The model server did not answer in HTTP: {type(error).__name__} {error}. {self._where()}"
        raise errors.Refused(StatusCode.UNAVAILABLE, words)

    def stop(self) -> None:
        """End the server for good."""
        with self._lock:
            self._stopping.set()
            if self._process:
                self._process.terminate(GRACE_SECONDS)
        self._keeper.join()
        shutil.rmtree(self.serving.folder / self.deployment.id, ignore_errors=True)

    def _keep(self) -> None:
        pause = PAUSES[0]
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._start()
            except Exception as failure:
                unexpected = not isinstance(failure, errors.Refused)
                log.warning("the server of %s did not start: %s", self.deployment.id, failure, exc_info=unexpected)
                self._end()
                if not self._settled.is_set():
                    self._failure = failure
                    break
            else:
                self._settled.set()
                status = self._process.wait()
                connections, self._connections = self._connections, None
                connections.close()
                if not self._stopping.is_set():
                    log.warning("the server of %s ended with status %s", self.deployment.id, status)
            pause = PAUSES[0] if time.monotonic() - began > STEADY_SECONDS else pause
            self._stopping.wait(pause)
            pause = min(2 * pause, PAUSES[1])
        self._settled.set()

    def _start(self) -> None:
        """Start the process and return once it is healthy."""
        port = free_port()
        self._contract = self.deployment.contract(port, self.serving.buckets)
        with self._lock:
            if self._stopping.is_set():
                raise ServingError("The model was undeployed before its server became ready.")
            try:
                self._process = sandbox.start(self._task())
            except sandbox.CannotStart as error:
                raise ServingError(f"The model server could not be started: {error}") from None
        self._await_health(port)
        self._connections = Connections(port)

    def _task(self) -> sandbox.Task:
        deployment = self.deployment
        command, args, environment = deployment.command, deployment.args, dict(self._contract)
        for name, value in deployment.environment.items():
            environment.setdefault(name, expand(value, environment))
        if deployment.framework:
            folder = f"/gcs/{deployment.artifacts.relative_to(self.serving.buckets)}"
            command, args = ("python", "-m", "helpers.local.model_server", deployment.framework, folder), ()
        else:
            # Uvicorn, with which many servers are made, listens where this says, unless its server says otherwise.
            environment = {"UVICORN_HOST": "127.0.0.1", **self.serving.environment(), **environment}
        return sandbox.Task(
            folder=self.serving.folder / deployment.id,
            command=[expand(word, environment) for word in (*command, *args)],
            environment=environment,
            buckets=self.serving.buckets,
            log=self.log,
            image="" if deployment.framework else deployment.image,
            has_entrypoint=bool(command),
        )

    def _await_health(self, port: int) -> None:
        route, deadline, failed = (
            self._contract["AIP_HEALTH_ROUTE"],
            time.monotonic() + self.deployment.ready_seconds,
            0,
        )
        while (found := check(port, route)) != "200":
            failed = 0 if found in ("", "503") else failed + 1
            if failed == MAX_FAILED_CHECKS or time.monotonic() > deadline:
                hint = f"GET {route} got {found}, {failed} times in a row" if found else "Nothing listened on it"
                raise ServingError(
                    "Model server never became ready. Please validate that your model file or container configuration "
                    f"are valid. {self._where()} The server has to listen on port $AIP_HTTP_PORT, here {port}. {hint}."
                )
            try:
                status = self._process.wait(CHECK_SECONDS if found else LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            raise ServingError(
                f"Model server terminated: model server container terminated: exit_code: {status}. {self._where()} "
                f"Its last line is:\n{tail(self.log, 1)}"
            )

    def _where(self) -> str:
        return f"Model server logs can be found at {self.log}."

    def _end(self) -> None:
        if self._process:
            self._process.terminate(GRACE_SECONDS)
            self._process.wait()


def check(port: int, route: str) -> str:
    """Return the status of a health check, or the name of its error; nothing if nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", route)
        return str(connection.getresponse().status)
    except ConnectionRefusedError:
        return ""
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


class Connections:
    """Connections to one port of this machine, kept open: to open one takes longer than a prediction."""

    def __init__(self, port: int):
        """Begin with none."""
        self._port, self._open = port, True
        self._idle: list[http.client.HTTPConnection] = []

    def post(self, route: str, body: bytes, headers: Mapping[str, str], seconds: float):
        """Return the status, headers and body of the answer, each part of which may take some seconds."""
        try:
            connection = self._idle.pop()
            connection.sock.settimeout(seconds)
            is_new = False
        except IndexError:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
            is_new = True
        try:
            connection.request("POST", route, body, dict(headers))
            response = connection.getresponse()
            answer = response.status, response.headers, response.read()
        except BaseException as error:
            connection.close()
            if isinstance(error, ConnectionError) and not is_new:
                return self.post(route, body, headers, seconds)  # a server may close what is idle at any moment
            raise
        if connection.sock:
            self._idle.append(connection)
            if not self._open:
                self.close()
        return answer

    def close(self) -> None:
        """Close what is idle now, and the others after their answers."""
        self._open = False
        while self._idle:
            self._idle.pop().close()
