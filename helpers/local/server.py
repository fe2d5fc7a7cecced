"""The server of the local cloud: `python -m helpers.local.server FOLDER`, started by `helpers.local.client`.

It owns its folder: a lock keeps a second server out, and what the folder holds when it starts is the cloud as it was.
"""

import fcntl
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message
from grpc import StatusCode
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Host, Route, Router

from helpers.local import (
    PROJECT,
    PROJECT_NUMBER,
    bigquery,
    checks,
    client,
    errors,
    job_logs,
    relay,
    serviceusage,
    storage,
)
from helpers.local.buckets import Buckets, NoSuchBucket
from helpers.local.door import Door
from helpers.local.endpoints import NAME_OF_DEDICATED
from helpers.local.identity import Identity
from helpers.local.refusals import Refusals
from helpers.local.rpc import Method, Rpc, refusal_as_rest
from helpers.local.service import Service
from helpers.local.serving import READY_SECONDS, Deployment, Serving
from helpers.local.storage_transfers import Http
from helpers.local.store import Store

log = logging.getLogger("helpers.local")

IDLE_SECONDS = 3600
LOOK_SECONDS = 5  # between two looks whether there is work
SERVICES = (  # the modules with the services of Vertex AI, and of what goes with it
    "datasets",
    "endpoints",
    "jobs",
    "metadata",
    "models",
    "operations",
    "pipelines",
    "projects",
    "studies",
    "tensorboards",
)
OCCUPIED = 75  # the exit status of a server whose folder another one has


class Cloud:
    """All parts of the local cloud, put together; services find each other here by the names of the API."""

    def __init__(self, folder: Path, proxy: str | None):
        """Open what the folder holds; `proxy` is the URL of the proxy that leads outside, if one is needed."""
        self.folder = folder
        self.buckets = folder / "buckets"
        self.buckets.mkdir(exist_ok=True)
        self.identity = Identity(folder / "identity", PROJECT)
        self.refusals = Refusals(folder, self.identity.email)
        self.store = Store(folder / "state.sqlite")
        self.serving = Serving(folder / "serving", self.buckets, self.variables)
        self.port = 0  # of the door, as soon as it is open
        self.last_work = time.monotonic()
        self.rpc = Rpc(self.answer, self.identity.allows)
        self.services: dict[str, Service] = {}
        for name in SERVICES:
            module = importlib.import_module(f"helpers.local.{name}")
            for service in filter(lambda value: _is_service(value, module), vars(module).values()):
                self.services[service.name] = service(self)
        self.operations = self.services["Operations"]
        self.objects = Buckets(self.buckets, folder / "storage.sqlite")
        self.storage_routes = storage.routes(self.objects, relay.through(proxy))
        self.bigquery = bigquery.Api(folder / "bigquery", self.buckets, PROJECT)
        self.bigquery_routes = bigquery.routes(self.bigquery)
        self.log_routes = job_logs.routes(folder / "jobs")
        self.serviceusage_routes = serviceusage.routes(self.refusals)

    # What services share

    def variables(self) -> dict[str, str]:
        """Return the environment variables that lead the SDKs of a job or a model server to this cloud."""
        return client.variables(self.folder, self.port)

    def path_of(self, uri: str) -> Path:
        """Return the path of a gs://BUCKET/OBJECT, there or not; nothing outside of the bucket has one."""
        bucket, _, name = uri.removeprefix("gs://").partition("/")
        if not uri.startswith("gs://") or not bucket or bucket.startswith(".") or "\0" in uri:
            raise errors.invalid(f"{uri!r} is not a Cloud Storage URI: expected gs://BUCKET/PATH.")
        root = self.buckets / bucket
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise errors.invalid(f"{uri!r} leads out of its bucket.")
        return path

    def bucket_location(self, name: str) -> str | None:
        """Return the location of a bucket, None if there is no such bucket."""
        try:
            return self.objects.bucket(name)["location"]
        except NoSuchBucket:
            return None

    def start_server(self, server_id: str, model: Message, endpoint: str, machine: Message) -> None:
        """Start the model server of a version, and return when it is healthy."""
        container = model.container_spec
        artifacts = self.services["ModelService"].artifacts_of(model)
        accelerator = types.AcceleratorType(machine.accelerator_type).name if machine.accelerator_count else ""
        deployment = Deployment(
            id=server_id,
            endpoint=endpoint.rsplit("/", 1)[-1],
            image=container.image_uri,
            framework=checks.serving_image(container),
            artifacts=artifacts if artifacts.is_dir() else None,
            command=tuple(container.command),
            args=tuple(container.args),
            environment={variable.name: variable.value for variable in container.env},
            predict_route=container.predict_route,
            health_route=container.health_route,
            machine_type=machine.machine_type,
            accelerator_type=accelerator,
            ready_seconds=container.deployment_timeout.seconds or READY_SECONDS,
        )
        self.serving.start(deployment)

    # RPCs

    def answer(self, method: Method, request: Message):
        """Answer an RPC by the service that it belongs to."""
        self.last_work = time.monotonic()
        service = self.services.get(method.service)
        if service is None:
            raise errors.unimplemented(f"{method.service}.{method.name}")
        use_project_number(request)
        self.refusals.rpc(method.service, method.name, service.resources, request)
        return service.call(method, request)

    # REST

    def app(self) -> Starlette:
        """Return everything that is served over REST, by host."""
        return Starlette(
            routes=[
                Host("oauth2.googleapis.com", Router([Route("/token", self.exchange_token, methods=["POST"])])),
                Host("storage.googleapis.com", Router(self.storage_routes)),
                Host("{bucket}.storage.googleapis.com", Router(self.storage_routes)),
                Host("bigquery.googleapis.com", Router(self.bigquery_routes)),
                Host("logging.googleapis.com", Router(self.log_routes)),
                Host("serviceusage.googleapis.com", Router(self.serviceusage_routes)),
                Host(
                    "{host}.prediction.vertexai.goog", Router([Route("/{path:path}", self.call_rest, methods=["POST"])])
                ),
                Host(
                    "www.googleapis.com",
                    Router(
                        [
                            Route("/oauth2/{version}/token", self.exchange_token, methods=["POST"]),
                            *self.storage_routes,
                        ]
                    ),
                ),
                Route("/{path:path}", self.call_rest, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            ],
            exception_handlers={Exception: answer_error},
        )

    async def exchange_token(self, request: Request) -> Response:
        """Answer as Google's token endpoint: a token for an assertion that the service account's key signed."""
        form = parse_qs((await request.body()).decode(errors="replace"))
        token = self.identity.exchange(form.get("assertion", [""])[0])
        if token is None:
            error = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
            return JSONResponse(error, 400)
        return JSONResponse(token)

    async def call_rest(self, request: Request) -> Response:
        """Answer an RPC that arrives over REST."""
        body = await request.body()
        NAME_OF_DEDICATED.set(request.url.hostname if request.url.hostname.endswith(".goog") else "")
        content_type = request.headers.get("content-type", "application/json")
        path, query = request.scope["path"], request.url.query
        if raw := re.fullmatch(r"/v1(?:beta1)?/(.+/endpoints/[^/:]+):(?:raw|streamRaw)Predict", path):
            return await run_in_threadpool(self.predict_raw, raw[1], body, {"content-type": content_type})
        status, kind, content = await run_in_threadpool(self.rpc.rest, request.method, path, query, body, content_type)
        return Response(content, status, media_type=kind)

    def predict_raw(self, endpoint: str, body: bytes, headers: dict[str, str]) -> Response:
        """Answer rawPredict as the model's server does, with its status and headers."""
        try:
            name = endpoint.replace(f"projects/{PROJECT}/", f"projects/{PROJECT_NUMBER}/", 1)
            status, answered, content = self.services["PredictionService"].raw(name, body, headers)
            return Response(content, status, answered)
        except errors.Refused as refusal:
            status, kind, content = refusal_as_rest(refusal)
            return Response(content, status, media_type=kind)

    # Life

    def restore(self) -> None:
        """Go on with what the last server left: report its jobs as failed, serve its models again."""
        for service in self.services.values():
            service.restore()

    def is_busy(self) -> bool:
        """Say whether a job runs."""
        return self.bigquery.is_busy() or any(service.is_busy() for service in self.services.values())

    def close(self) -> None:
        """End what runs, in order; what has to go on is started again by the next server."""
        for service in self.services.values():
            service.close()
        self.bigquery.close()
        self.serving.close()
        self.store.close()


def answer_error(request: Request, error: Exception) -> Response:
    """Answer what went wrong in a REST call that nobody caught."""
    refusal = error if isinstance(error, errors.Refused) else errors.of_system(error)
    if refusal is None:
        message = f"{request.method} {request.url.path} failed in the local cloud ({type(error).__name__}: {error})."
        refusal = errors.Refused(StatusCode.INTERNAL, f"{message} Its log tells more: python3 -m helpers cloud logs")
    status, kind, content = refusal_as_rest(refusal)
    return Response(content, status, media_type=kind)


def _is_service(value, module) -> bool:
    return isinstance(value, type) and issubclass(value, Service) and value.__module__ == module.__name__ and value.name


def use_project_number(message: Message, top: bool = True) -> None:
    """Write every name in a request with the project's number, as Google does; other projects are refused."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            if field.is_repeated:
                value[:] = [_with_number(text, field.name, top) for text in value]
            elif value.startswith("projects/"):
                setattr(message, field.name, _with_number(value, field.name, top))
        elif field.message_type and not field.message_type.full_name.startswith("google.protobuf."):
            if field.message_type.GetOptions().map_entry:
                continue
            for part in value if field.is_repeated else [value]:
                use_project_number(part, False)


def _with_number(text: str, field: str, top: bool) -> str:
    if not text.startswith("projects/"):
        return text
    project, slash, rest = text.removeprefix("projects/").partition("/")
    if project in (PROJECT, PROJECT_NUMBER, "-"):
        return f"projects/{PROJECT_NUMBER}{slash}{rest}"
    if top and field in ("name", "parent", "endpoint"):
        raise errors.other_project(project)
    return text


class Authorization:
    """ASGI middleware: only a request with a good token comes further, and none that the project refuses."""

    OPEN_PATHS = ("/token", "/oauth2/v3/token", "/oauth2/v4/token")

    def __init__(self, app, cloud: Cloud):
        """Guard an ASGI app."""
        self.app, self.cloud = app, cloud

    async def __call__(self, scope, receive, send):
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.cloud.last_work = time.monotonic()
        request = Request(scope)
        try:
            if request.url.path not in self.OPEN_PATHS:
                if not self.cloud.identity.allows(request.headers.get("authorization", "")):
                    raise errors.Refused(StatusCode.UNAUTHENTICATED, errors.NO_CREDENTIALS)
                pays = "x-goog-user-project" in request.headers
                self.cloud.refusals.rest(request.url.hostname or "", request.method, scope["path"], pays)
        except errors.Refused as refusal:
            status, kind, content = refusal_as_rest(refusal)
            await Response(content, status, media_type=kind)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def serve(folder: Path, proxy: str | None) -> int:
    """Serve the cloud in a folder until a signal or an hour without work; return the exit status."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = (folder / "server.lock").open("a+")
    if not take(lock):
        return OCCUPIED
    address = folder / "server.json"
    before = json.loads(address.read_text())["port"] if address.exists() else 0
    address.unlink(missing_ok=True)

    cloud = Cloud(folder, proxy)
    grpc_server, grpc_port = cloud.rpc.serve_grpc(*cloud.identity.certificate("*.googleapis.com", "localhost"))
    config = uvicorn.Config(
        Authorization(cloud.app(), cloud),
        http=Http,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    config.load()
    config.ssl = cloud.identity.tls()
    rest = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    door = open_door(before, grpc_port, listening.getsockname()[1], proxy)
    cloud.port = door.server_address[1]
    cloud.restore()
    threading.Thread(target=door.serve_forever, name="door", daemon=True).start()
    threading.Thread(target=end_when_idle, args=(cloud, rest), name="idle", daemon=True).start()
    partial = address.with_suffix(".partial")
    partial.write_text(json.dumps({"port": door.server_address[1], "pid": os.getpid(), "started": time.time()}))
    partial.replace(address)
    log.info("the local cloud of %s listens on port %d", folder, door.server_address[1])
    rest.run(sockets=[listening])
    log.info("the local cloud ends")
    door.shutdown()
    grpc_server.stop(grace=1)
    cloud.close()
    return 0


def take(lock) -> bool:
    """Take the lock of the folder for the life of this process; say whether that worked.

    Clients that look whether there is a server hold it too, for a moment: so this tries a few times.
    """
    for _ in range(25):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def open_door(port: int, grpc_port: int, rest_port: int, proxy: str | None) -> Door:
    """Listen on the port that the last server had, so that clients find this one, or on another if it is taken."""
    try:
        return Door(port, grpc_port, rest_port, proxy)
    except OSError:
        return Door(0, grpc_port, rest_port, proxy)


def end_when_idle(cloud: Cloud, rest: uvicorn.Server) -> None:
    """End the server after an hour in which no request came and no job ran."""
    while not rest.should_exit:
        time.sleep(LOOK_SECONDS)
        if cloud.is_busy():
            cloud.last_work = time.monotonic()
        if time.monotonic() - cloud.last_work > IDLE_SECONDS:
            log.info("an hour without work")
            rest.should_exit = True


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
