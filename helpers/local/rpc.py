"""Google's RPCs, served over gRPC and REST from one table of methods.

The table is made from the SDK's own transports: asked for their stubs, they tell each method's path, its messages and
its REST routes. So what the SDK can call and what this server can read never differ, and there is no generated code.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import parse_qsl

import grpc
from google.cloud.location import locations_pb2
from google.iam.v1 import iam_policy_pb2
from google.protobuf import json_format
from google.protobuf.message import Message

from helpers.local.errors import HTTP_STATUS, NO_CREDENTIALS, Refused, invalid, of_system, unimplemented

log = logging.getLogger(__name__)

# SDK modules whose transports are asked. v1beta1 clients are answered by v1: their messages differ in the package's
# name, which does not travel, and in fields that v1 does not know, which are left out.
TRANSPORTS = {
    "google.cloud.aiplatform_v1.services": (
        "dataset_service",
        "endpoint_service",
        "job_service",
        "metadata_service",
        "model_service",
        "pipeline_service",
        "prediction_service",
        "tensorboard_service",
        "vizier_service",
    ),
    "google.cloud.resourcemanager_v3.services": ("projects",),
}
PLAIN = (iam_policy_pb2, locations_pb2)  # whose messages the transports use as they are
VERSION = re.compile(r"^/(?:v1beta1|ui)/")  # the SDK's REST client asks for operations under /ui
THREADS = 96  # calls at a time, most of which wait: for a job to change, or for a model to answer


@dataclass(frozen=True)
class Method:
    """One RPC: where it belongs, what it takes and gives, and the REST routes that reach it."""

    service: str  # such as "JobService"
    name: str  # such as "CreateCustomJob"
    request: type[Message]
    response: type[Message]
    streams: bool  # whether the answer is a stream
    routes: tuple[dict, ...]  # google.api.http rules


class _Recorder:
    """Stands where a transport expects its channel, and notes the stubs that it makes."""

    def __init__(self):
        self.calls = {}

    def _note(self, kind):
        def stub(path, request_serializer, response_deserializer, **_):
            if path.startswith("/google.cloud.") and kind in ("unary_unary", "unary_stream"):
                self.calls[path] = kind, _message_of(request_serializer), _message_of(response_deserializer)

        return stub

    def __getattr__(self, kind):
        return self._note(kind)


def _message_of(function: Callable) -> type[Message]:
    """Return the raw protobuf message whose (de)serializer a function is."""
    owner = getattr(function, "__objclass__", None) or function.__self__
    return owner.pb() if hasattr(owner, "pb") else owner


def methods() -> dict[str, Method]:
    """Return every unary or answer-streaming method of the TRANSPORTS by its gRPC path, /PACKAGE.SERVICE/METHOD."""
    table = {}
    for package, services in TRANSPORTS.items():
        for service in services:
            transports = importlib.import_module(f"{package}.{service}.transports.grpc")
            rest = importlib.import_module(f"{package}.{service}.transports.rest_base")
            transport = _only_class(transports, "GrpcTransport")
            routes = _only_class(rest, "RestTransport")
            recorder = _Recorder()
            asked = transport.__new__(transport)
            asked._stubs, asked._logged_channel = {}, recorder
            for stub in (value for value in vars(transport).values() if isinstance(value, property)):
                if stub.fget.__name__ not in ("grpc_channel", "operations_client", "kind"):
                    stub.fget(asked)
            for path, (kind, request, response) in recorder.calls.items():
                owner, name = re.search(r"(\w+)/(\w+)$", path).groups()
                if not hasattr(request, "DESCRIPTOR"):  # the serializer of a plain message does not tell whose it is
                    request = next(vars(pb)[f"{name}Request"] for pb in PLAIN if f"{name}Request" in vars(pb))
                rules = getattr(routes, f"_Base{name}", None)
                http = rules._get_http_options() if hasattr(rules, "_get_http_options") else ()
                table[path] = Method(owner, name, request, response, kind == "unary_stream", tuple(http))
    return table | _operations()


def _only_class(module, ending):
    """Return the class of a transport module: the one whose name says more than its ending does."""
    return next(value for name, value in vars(module).items() if name.endswith(ending) and name.strip("_") != ending)


def _operations() -> dict[str, Method]:
    """Return the methods of long-running operations, which all of Google's services share."""
    from google.longrunning import operations_pb2 as pb
    from google.protobuf.empty_pb2 import Empty

    shapes = {
        "GetOperation": (pb.GetOperationRequest, pb.Operation, "get", ""),
        "ListOperations": (pb.ListOperationsRequest, pb.ListOperationsResponse, "get", "s"),
        "CancelOperation": (pb.CancelOperationRequest, Empty, "post", ":cancel"),
        "DeleteOperation": (pb.DeleteOperationRequest, Empty, "delete", ""),
        "WaitOperation": (pb.WaitOperationRequest, pb.Operation, "post", ":wait"),
    }
    table = {}
    for name, (request, response, verb, ending) in shapes.items():
        uri = "/v1/{name=projects/**}/operations" if ending == "s" else f"/v1/{{name=projects/**/operations/*}}{ending}"
        rule = {"method": verb, "uri": uri}
        table[f"/google.longrunning.Operations/{name}"] = Method("Operations", name, request, response, False, (rule,))
    return table


class Rpc:
    """Answers calls of all methods by a function of (method, request)."""

    def __init__(self, answer: Callable[[Method, Message], Message | Iterator], is_allowed: Callable[[str], bool]):
        """`is_allowed` says whether an Authorization header is good enough."""
        self._answer = answer
        self._is_allowed = is_allowed
        self.table = methods()
        self._routes = [
            (rule["method"].upper(), *_pattern(rule["uri"]), rule.get("body"), method)
            for method in self.table.values()
            for rule in method.routes
        ]

    def answer(self, method: Method, request: Message) -> Message | Iterator:
        """Answer one call; whatever goes wrong in it is a Refused."""
        try:
            result = self._answer(method, request)
            # A stream is read whole here, where what goes wrong in it becomes an answer; none is long.
            return list(result) if method.streams else result
        except Refused:
            raise
        except Exception as error:
            if refusal := of_system(error):
                raise refusal from error
            log.exception("%s.%s failed", method.service, method.name)
            message = f"{method.service}.{method.name} failed in the local cloud ({type(error).__name__}: {error})."
            raise Refused(
                grpc.StatusCode.INTERNAL, f"{message} Its log tells more: python3 -m helpers cloud logs"
            ) from error

    # gRPC

    def serve_grpc(self, key: bytes, chain: bytes) -> tuple[grpc.Server, int]:
        """Start a gRPC server with TLS on a free port of this machine; return it and the port."""
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="rpc")
        server = grpc.server(pool, handlers=(self._handlers(),), options=options)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        server.start()
        return server, port

    def _handlers(self) -> grpc.GenericRpcHandler:
        rpc = self

        class Handlers(grpc.GenericRpcHandler):
            def service(self, details):
                return rpc._handler(details.method, dict(details.invocation_metadata).get("authorization", ""))

        return Handlers()

    def _handler(self, path: str, authorization: str) -> grpc.RpcMethodHandler:
        method = self.table.get(path.replace(".v1beta1.", ".v1."))
        if not self._is_allowed(authorization):
            return _refusing(Refused(grpc.StatusCode.UNAUTHENTICATED, NO_CREDENTIALS))
        if method is None:
            return _refusing(unimplemented(path.strip("/").rpartition(".")[2].replace("/", ".")))

        def call(request, context):
            try:
                result = self.answer(method, request)
                return iter(result) if method.streams else result
            except Refused as refusal:
                return context.abort(refusal.code, refusal.message)

        wire = (method.request.FromString, method.response.SerializeToString)
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(call, *wire)
        return grpc.unary_unary_rpc_method_handler(call, *wire)

    # REST

    def rest(self, verb: str, path: str, query: str, body: bytes, content_type: str) -> tuple[int, str, bytes]:
        """Answer a REST call; return the HTTP status, the type of the content, and the content."""
        try:
            method, request = self._read_rest(verb, VERSION.sub("/v1/", path), query, body)
            if method.name.endswith("RawPredict"):
                request.http_body.content_type = content_type
            result = self.answer(method, request)
        except Refused as refusal:
            return refusal_as_rest(refusal)
        if method.response.DESCRIPTOR.full_name == "google.api.HttpBody":
            parts = result if method.streams else [result]
            return 200, parts[0].content_type, b"".join(part.data for part in parts)
        if method.streams:
            text = f"[{','.join(map(json_format.MessageToJson, result))}]"
        else:
            text = json_format.MessageToJson(result)
        return 200, "application/json; charset=UTF-8", text.encode()

    def _read_rest(self, verb: str, path: str, query: str, body: bytes) -> tuple[Method, Message]:
        for route_verb, pattern, fields, body_field, method in self._routes:
            if route_verb == verb and (found := pattern.fullmatch(path)):
                request = method.request()
                try:
                    if body and body_field:
                        target = request if body_field == "*" else getattr(request, body_field)
                        if method.name.endswith("RawPredict"):  # any bytes, whatever their format
                            request.http_body.data = body
                        else:
                            json_format.Parse(body, target, ignore_unknown_fields=True)
                    json_format.ParseDict(_nested(query, request), request, ignore_unknown_fields=True)
                except (json_format.ParseError, UnicodeDecodeError) as error:
                    raise invalid(f"Invalid JSON payload received. {error}") from None
                for field, value in zip(fields, found.groups(), strict=True):
                    *way, last = field.split(".")
                    target = request
                    for step in way:
                        target = getattr(target, step)
                    setattr(target, last, value)
                return method, request
        raise unimplemented(f"{verb} {path}")


def _pattern(uri: str) -> tuple[re.Pattern, list[str]]:
    """Return the expression that a URI template stands for, and the fields that its groups fill."""
    fields = []
    expression = ""
    for text, field, shape in re.findall(r"([^{]*)(?:\{([\w.]+)(?:=([^}]*))?\})?", uri):
        expression += re.escape(text)
        if field:
            fields.append(field)
            expression += "(" + re.escape(shape or "*").replace(r"\*\*", ".+").replace(r"\*", "[^/:]+") + ")"
    return re.compile(expression), fields


def _nested(query: str, request: Message) -> dict:
    """Return the fields that a query string sets, `a.b=1` as {"a": {"b": "1"}}."""
    found: dict = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        *way, last = [re.sub(r"[A-Z]", lambda letter: "_" + letter[0].lower(), step) for step in key.split(".")]
        target = found
        for step in way:
            target = target.setdefault(step, {})
        field = None if way else request.DESCRIPTOR.fields_by_name.get(last)
        if field is not None and field.is_repeated:
            target.setdefault(last, []).append(value)
        elif not key.startswith("$") and key not in ("alt", "key"):
            target[last] = value
    return found


def refusal_as_rest(refusal: Refused) -> tuple[int, str, bytes]:
    """Return a refusal as Google's REST services write it."""
    import json

    status = HTTP_STATUS.get(refusal.code, 500)
    error = {"code": status, "message": refusal.message, "status": refusal.code.name}
    return status, "application/json; charset=UTF-8", json.dumps({"error": error}).encode()


def _refusing(refusal: Refused) -> grpc.RpcMethodHandler:
    """Return a handler that gives every call the same refusal."""
    return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(refusal.code, refusal.message))
