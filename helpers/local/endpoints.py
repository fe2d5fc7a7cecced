"""EndpointService and PredictionService: deploying models, splitting traffic, and passing requests to model servers."""

import json
import logging
import random
import threading
from concurrent.futures import Future
from contextvars import ContextVar

from google.api.httpbody_pb2 import HttpBody
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format, struct_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc import StatusCode

from helpers.local import PROJECT_NUMBER, checks, errors, request_logs
from helpers.local.service import Service
from helpers.local.store import new_id

log = logging.getLogger(__name__)

DeployedModel, DeployedModelRef = types.DeployedModel.pb(), types.DeployedModelRef.pb()
DeployModelResponse = types.DeployModelResponse.pb()
UndeployModelResponse = types.UndeployModelResponse.pb()
MutateDeployedModelResponse = types.MutateDeployedModelResponse.pb()
PredictResponse = types.PredictResponse.pb()

SHARED_LIMIT, DEDICATED_LIMIT = 1_572_864, 10_485_760  # bytes of a request
SHARED_SECONDS, DEDICATED_SECONDS = 60, 3600  # within which an answer has to come
CODES = {  # of a model server's answer that is not 200
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    413: StatusCode.INVALID_ARGUMENT,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
NAME_OF_DEDICATED = ContextVar("the dedicated host name that a request was sent to", default="")


class EndpointService(Service):
    """Endpoints. A deployed model is served by a process; the store says which ones have to run."""

    name = "EndpointService"
    resources = {"Endpoint": "endpoints"}

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self.started: dict[str, Future] = {}  # by the deployed model's id; done when its server answers, or cannot

    def restore(self) -> None:
        """Serve again what was deployed."""
        for endpoint in self.store.all("endpoints"):
            for deployed in endpoint.deployed_models:
                self._start(endpoint, deployed)

    def created(self, endpoint: Message) -> None:
        """Begin with no model and no host name, and refuse to log requests where that is not possible."""
        del endpoint.deployed_models[:]
        endpoint.dedicated_endpoint_dns = ""  # it is there with the first model
        if endpoint.predict_request_response_logging_config.enabled:
            request_logs.destination(endpoint)

    def deploy_model(self, request: Message) -> Message:
        """Start serving a model; done when its server is healthy."""
        endpoint = self.store.get(request.endpoint)
        deployed = DeployedModel()
        deployed.CopyFrom(request.deployed_model)
        self.cloud.refusals.account(deployed.service_account)
        model = self.cloud.services["ModelService"].version(deployed.model)
        if not model.container_spec.image_uri:
            raise errors.precondition(f"The model {model.name} has no serving container: upload it with one.")
        checks.serving_image(model.container_spec)
        resources = deployed.dedicated_resources
        checks.machine(resources.machine_spec, "deployed_model.dedicated_resources.machine_spec", serving=True)
        if resources.min_replica_count < 1:
            raise errors.invalid("List of found errors: 1.Field: min_replica_count; Message: It must be at least 1.")
        deployed.id = deployed.id or new_id()
        if any(deployed.id == other.id for other in endpoint.deployed_models):
            raise errors.invalid(f"A deployed model with the id {deployed.id} is on this endpoint already.")
        deployed.model, deployed.model_version_id = model.name, model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        deployed.create_time.GetCurrentTime()
        split = {(deployed.id if key == "0" else key): share for key, share in request.traffic_split.items()}
        check_split(split, [other.id for other in endpoint.deployed_models] + [deployed.id])

        def work():
            try:
                self._start(endpoint, deployed).result()
            except errors.Refused:
                self._stop(deployed.id)
                raise
            try:
                with self.store.transaction():
                    self._refer(deployed, request.endpoint)
                    with self.store.change(request.endpoint) as changed:
                        changed.deployed_models.append(deployed)
                        if changed.dedicated_endpoint_enabled:
                            region, number = changed.name.split("/")[3], changed.name.rsplit("/", 1)[1]
                            host = f"{number}.{region}-{PROJECT_NUMBER}.prediction.vertexai.goog"
                            changed.dedicated_endpoint_dns = host
                        if split:
                            changed.traffic_split.clear()
                            changed.traffic_split.update(split)
                        self.stamp(changed)
            except BaseException:
                self._stop(deployed.id)
                raise
            return DeployModelResponse(deployed_model=deployed)

        return self.cloud.operations.start(request.endpoint, work)

    def _start(self, endpoint: Message, deployed: Message) -> Future:
        """Start a deployed model's server in the background; the future tells when it answers, or why it does not."""
        future = self.started[deployed.id] = Future()

        def run():
            try:
                models = self.cloud.services["ModelService"]
                model = models.version(f"{deployed.model}@{deployed.model_version_id}")
                self.cloud.start_server(deployed.id, model, endpoint.name, deployed.dedicated_resources.machine_spec)
                future.set_result(None)
            except errors.Refused as refusal:
                future.set_exception(refusal)
            except Exception as error:
                log.exception("the server of deployed model %s did not start", deployed.id)
                future.set_exception(errors.of_system(error) or errors.Refused(StatusCode.INTERNAL, str(error)))

        threading.Thread(target=run, name=f"start {deployed.id}", daemon=True).start()
        return future

    def _stop(self, deployed_id: str) -> None:
        self.started.pop(deployed_id, None)
        self.cloud.serving.stop(deployed_id)

    def _refer(self, deployed: Message, endpoint: str = "") -> None:
        """Note in the model's version that an endpoint serves it, or with no endpoint that it does no longer."""
        name = f"{deployed.model}/versions/{deployed.model_version_id}"
        if self.store.find(name) is None:
            return
        with self.store.change(name) as version:
            kept = [other for other in version.deployed_models if other.deployed_model_id != deployed.id]
            new = [DeployedModelRef(endpoint=endpoint, deployed_model_id=deployed.id)] if endpoint else []
            del version.deployed_models[:]
            version.deployed_models.extend([*kept, *new])

    def undeploy_model(self, request: Message) -> Message:
        """Stop serving a model."""
        with self.store.transaction(), self.store.change(request.endpoint) as endpoint:
            deployed = find_deployed(endpoint, request.deployed_model_id)
            kept = [other for other in endpoint.deployed_models if other.id != deployed.id]
            split = dict(request.traffic_split) or {
                key: share for key, share in endpoint.traffic_split.items() if key != deployed.id
            }
            if not kept or not any(split.values()):
                split = {}
            check_split(split, [other.id for other in kept])
            del endpoint.deployed_models[:]
            endpoint.deployed_models.extend(kept)
            endpoint.traffic_split.clear()
            endpoint.traffic_split.update(split)
            self.stamp(endpoint)
            self._refer(deployed)
        self._stop(deployed.id)
        return self.cloud.operations.finished(request.endpoint, UndeployModelResponse())

    def mutate_deployed_model(self, request: Message) -> Message:
        """Change how many replicas serve a model; there is one process here, whatever the number."""
        with self.store.change(request.endpoint) as endpoint:
            deployed = find_deployed(endpoint, request.deployed_model.id)
            deployed.dedicated_resources.MergeFrom(request.deployed_model.dedicated_resources)
            self.stamp(endpoint)
        return self.cloud.operations.finished(request.endpoint, MutateDeployedModelResponse(deployed_model=deployed))

    def update_endpoint(self, request: Message) -> Message:
        """Change what the mask names: names, labels, the traffic split."""
        with self.store.transaction():
            changed = self.update("Endpoint", request)
            check_split(dict(changed.traffic_split), [deployed.id for deployed in changed.deployed_models])
        return changed

    def delete_endpoint(self, request: Message) -> Empty:
        """Delete an endpoint that serves nothing."""
        with self.store.transaction():
            if deployed := self.store.get(request.name).deployed_models:
                names = ", ".join(model.id for model in deployed)
                raise errors.precondition(
                    f"Endpoint {request.name} has deployed or being-deployed DeployedModel(s): {names}. Undeploy "
                    "first: endpoint.undeploy_all(), or endpoint.delete(force=True)."
                )
            self.store.delete(request.name)
        return Empty()


def find_deployed(endpoint: Message, deployed_id: str) -> Message:
    """Return a model that an endpoint serves."""
    for deployed in endpoint.deployed_models:
        if deployed.id == deployed_id:
            return deployed
    raise errors.not_found(f"{endpoint.name} has no deployed model {deployed_id!r}; DeployedModel {deployed_id}")


def check_split(split: dict[str, int], deployed: list[str]) -> None:
    """Refuse a traffic split that does not add up, or names a model that is not there."""
    if split and sum(split.values()) != 100:
        raise errors.invalid("Sum of all traffic within traffic split needs to be 100.")
    if unknown := [key for key in split if key not in deployed]:
        raise errors.invalid(f"The traffic split names {', '.join(unknown)}, which the endpoint does not serve.")


class PredictionService(Service):
    """Passes requests to the servers of deployed models."""

    name = "PredictionService"
    instead = {
        "Explain": "Google shuts Explainable AI down on 2027-03-16; compute attributions in a notebook",
        "DirectPredict": "use predict or raw_predict",
        "DirectRawPredict": "use raw_predict",
        "GenerateContent": "the local cloud holds no Gemini; use a project on Google Cloud",
    }

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self.logs = request_logs.RequestLogs(cloud)

    def predict(self, request: Message) -> Message:
        """Return the predictions for instances."""
        body: dict = {"instances": [plain(instance) for instance in request.instances]}
        if request.HasField("parameters"):
            body["parameters"] = plain(request.parameters)
        deployed, status, _, content = self.pass_on(
            request.endpoint, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        text = content.decode(errors="replace")
        if status != 200:
            other = StatusCode.INTERNAL if status >= 500 else StatusCode.INVALID_ARGUMENT
            raise errors.Refused(CODES.get(status, other), text)
        response = PredictResponse(
            deployed_model_id=deployed.id,
            model=deployed.model,
            model_version_id=deployed.model_version_id,
            model_display_name=deployed.display_name,
        )
        try:
            answer = json.loads(text)
            predictions = answer["predictions"]
            for prediction in predictions:
                fill(response.predictions.add(), prediction)
            if "metadata" in answer:
                fill(response.metadata, answer["metadata"])
        except (ValueError, KeyError, TypeError, json_format.ParseError):
            raise errors.Refused(
                StatusCode.INTERNAL,
                "The model server's answer is not what the prediction contract wants, a JSON object "
                f'{{"predictions": [...]}}: {text[:200]}',
            ) from None
        self.logs.add(self.store.get(request.endpoint), deployed.id, body["instances"], predictions)
        return response

    def raw(self, endpoint: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Pass any body on; return the model server's own status, headers and body."""
        deployed, status, answered, content = self.pass_on(endpoint, body, headers)
        return (
            status,
            {
                "content-type": answered.get("content-type", "application/json"),
                "X-Vertex-AI-Endpoint-Id": endpoint.rsplit("/", 1)[1],
                "X-Vertex-AI-Deployed-Model-Id": deployed.id,
                "X-Vertex-AI-Model": deployed.model,
                "X-Vertex-AI-Model-Version-Id": deployed.model_version_id,
            },
            content,
        )

    def raw_predict(self, request: Message) -> HttpBody:
        """Pass any body on, over gRPC."""
        headers = {"content-type": request.http_body.content_type or "application/json"}
        status, answered, content = self.raw(request.endpoint, request.http_body.data, headers)
        if status != 200:
            raise errors.Refused(CODES.get(status, StatusCode.INTERNAL), content.decode(errors="replace"))
        return HttpBody(content_type=answered["content-type"], data=content)

    def stream_raw_predict(self, request: Message):
        """Pass any body on, and give the answer as a stream of one part."""
        return iter([self.raw_predict(request)])

    def pass_on(self, name: str, body: bytes, headers: dict[str, str]):
        """Choose a deployed model by the traffic split and call its server; return it and what the server answered."""
        endpoint = self.store.get(name)
        if not endpoint.deployed_models:
            raise errors.precondition(f"Endpoint {name} doesn't have any deployed model: model.deploy(endpoint) first.")
        dedicated = endpoint.dedicated_endpoint_dns
        if dedicated and NAME_OF_DEDICATED.get() != dedicated:
            raise errors.invalid(
                "Dedicated Endpoint cannot be accessed through the shared Vertex AI domain aiplatform.googleapis.com. "
                f"Please access the endpoint using its dedicated dns name {dedicated!r}."
            )
        limit = DEDICATED_LIMIT if dedicated else SHARED_LIMIT
        if len(body) > limit:
            raise errors.invalid(f"Request payload size exceeds the limit: {limit} bytes.")
        deployed = choose(endpoint)
        starting = self.cloud.services["EndpointService"].started.get(deployed.id)
        if starting:
            starting.result()
        seconds = DEDICATED_SECONDS if dedicated else SHARED_SECONDS
        status, answered, content = self.cloud.serving.call(deployed.id, body, headers, seconds=seconds)
        return deployed, status, answered, content


def choose(endpoint: Message) -> Message:
    """Return one of an endpoint's deployed models, each as often as its share of the traffic says."""
    models = list(endpoint.deployed_models)
    shares = [endpoint.traffic_split.get(model.id, 0) for model in models]
    return random.choices(models, shares)[0] if any(shares) else models[0]


def plain(value: struct_pb2.Value):
    """Return the Python object that a protobuf Value stands for; whole numbers are ints, as JSON has them."""
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind == "string_value":
        return value.string_value
    if kind == "list_value":
        return [plain(item) for item in value.list_value.values]
    if kind == "struct_value":
        return {key: plain(item) for key, item in value.struct_value.fields.items()}
    if kind == "bool_value":
        return value.bool_value
    return None


def fill(value: struct_pb2.Value, content) -> None:
    """Make a protobuf Value stand for a Python object."""
    if content is None:
        value.null_value = struct_pb2.NULL_VALUE
    elif isinstance(content, bool):
        value.bool_value = content
    elif isinstance(content, int | float):
        value.number_value = content
    elif isinstance(content, str):
        value.string_value = content
    elif isinstance(content, list):
        value.list_value.SetInParent()
        for item in content:
            fill(value.list_value.values.add(), item)
    else:
        value.struct_value.SetInParent()
        for key, item in content.items():
            fill(value.struct_value.fields[key], item)
