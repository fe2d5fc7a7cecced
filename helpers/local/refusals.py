"""Being a project in which something is missing, as a new one is: an aid for teaching and for tests.

What FOLDER/refusals.json names is refused, in Google's words. It is read at each request, so that a project can be
broken and mended while it is in use; without the file nothing is refused. All of its keys:

    {"disabled_apis": ["aiplatform.googleapis.com"],
     "missing_permissions": ["aiplatform.customJobs.create", "storage.buckets.create", "iam.serviceAccounts.actAs"],
     "quotas": {"custom_model_training_nvidia_l4_gpus": 0},
     "no_accelerators": true,
     "no_capacity": {"us-central1": ["NVIDIA_TESLA_T4"]}}
"""

import json
import re
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message
from google.rpc import code_pb2
from grpc import StatusCode

from helpers.local import PROJECT, PROJECT_NUMBER
from helpers.local.background import JobFailed
from helpers.local.errors import Refused, invalid, precondition
from helpers.tables import read

FILE = "refusals.json"
KEYS = ("disabled_apis", "missing_permissions", "quotas", "no_accelerators", "no_capacity")
TITLES = {
    "aiplatform.googleapis.com": "Agent Platform API",
    "bigquery.googleapis.com": "BigQuery API",
    "cloudresourcemanager.googleapis.com": "Cloud Resource Manager API",
    "logging.googleapis.com": "Cloud Logging API",
    "serviceusage.googleapis.com": "Service Usage API",
    "storage.googleapis.com": "Cloud Storage API",
}
VERTEX = "aiplatform.googleapis.com"
# What a request of the REST APIs needs; what no line matches needs nothing here.
PERMISSIONS = (
    ("GET", r"/storage/v1/b", "storage.buckets.list"),
    ("POST", r"/storage/v1/b", "storage.buckets.create"),
    ("GET", r"/storage/v1/b/[^/]+", "storage.buckets.get"),
    ("DELETE", r"/storage/v1/b/[^/]+", "storage.buckets.delete"),
    ("GET", r"/storage/v1/b/[^/]+/o", "storage.objects.list"),
    ("GET", r"(/download)?/storage/v1/b/[^/]+/o/.+", "storage.objects.get"),
    ("POST", r"/upload/storage/v1/b/[^/]+/o", "storage.objects.create"),
    ("DELETE", r"/storage/v1/b/[^/]+/o/.+", "storage.objects.delete"),
    ("POST", r"(/upload)?/bigquery/v2/projects/[^/]+/(jobs|queries)", "bigquery.jobs.create"),
    ("POST", r"/bigquery/v2/projects/[^/]+/datasets", "bigquery.datasets.create"),
    ("POST", r"/v2/entries:list", "logging.logEntries.list"),
    ("GET", r"/v1/projects/[^/]+/services.*", "serviceusage.services.get"),
    ("GET", r"/v1beta1/projects/[^/]+/services/.+/consumerQuotaMetrics/.+", "serviceusage.quotas.get"),
    ("POST", r"/v1(beta1)?/.+/endpoints/[^/]+:(raw|streamRaw)Predict", "aiplatform.endpoints.predict"),
)
RPC_PERMISSIONS = {  # of RPCs that are not named as VERB + KIND of their own service's resource
    "DeployModel": "aiplatform.endpoints.deploy",
    "UndeployModel": "aiplatform.endpoints.undeploy",
    "Predict": "aiplatform.endpoints.predict",
    "GetProject": "resourcemanager.projects.get",
}


def api_of(host: str) -> str:
    """Return the name of the API that a host serves, empty if it is none that can be disabled here."""
    if host.endswith(".prediction.vertexai.goog"):
        return VERTEX
    if host == "www.googleapis.com":
        return "storage.googleapis.com"
    return next((api for api in TITLES if host == api or host.endswith((f"-{api}", f".{api}"))), "")


def permission_of(name: str, resources: dict[str, str]) -> str:
    """Return the permission that an RPC of Vertex AI needs, by its name and its service's resources; "" if unknown."""
    found = re.match(r"[A-Z][a-z]+", name)
    kind = name[found.end() :]
    collection = next((way for one, way in resources.items() if kind in (one, way[0].upper() + way[1:])), "")
    by_rule = f"aiplatform.{collection}.{found[0].lower()}" if collection else ""
    return RPC_PERMISSIONS.get(name, by_rule)


class Refusals:
    """What the file in a folder refuses. Each method raises Refused for what it names, and returns nothing."""

    def __init__(self, folder: Path, email: str):
        """Follow the file of a folder; `email` is the account that asks."""
        self.path, self.email = folder / FILE, email

    def read(self) -> dict:
        """Return what the file says now. Raises Refused for one that cannot be followed."""
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise precondition(f"{self.path} is not JSON: {error}") from None
        if not isinstance(found, dict) or (unknown := set(found) - set(KEYS)):
            what = f"the unknown keys {', '.join(sorted(unknown))}" if isinstance(found, dict) else "no JSON object"
            raise precondition(f"{self.path} holds {what}; it may have {', '.join(KEYS)}.")
        return found

    def rest(self, host: str, verb: str, path: str, pays: bool) -> None:
        """Refuse a REST request; `pays` says that it names the project that it counts for."""
        if not (said := self.read()) or not (api := api_of(host)):
            return
        if pays:
            self._permission(said, "serviceusage.services.use", "serviceusage.googleapis.com")
        self._api(said, api)
        for allowed, pattern, permission in PERMISSIONS:
            if verb == allowed and re.fullmatch(pattern, path):
                self._permission(said, permission, api)
                return

    def rpc(self, service: str, name: str, resources: dict[str, str], request: Message) -> None:
        """Refuse an RPC, whichever way it came."""
        if said := self.read():
            api = "cloudresourcemanager.googleapis.com" if service == "Projects" else VERTEX
            self._api(said, api)
            resource = next(filter(None, (getattr(request, key, "") for key in ("parent", "name", "endpoint"))), "")
            self._permission(said, permission_of(name, resources), api, resource)

    def account(self, name: str) -> None:
        """Refuse to run something as a service account."""
        if name and "iam.serviceAccounts.actAs" in self.read().get("missing_permissions", ()):
            raise Refused(
                StatusCode.PERMISSION_DENIED,
                f"You do not have permission to act as service account: {name}. (or it may not exist). Grant "
                f"{self.email} the role roles/iam.serviceAccountUser.",
            )

    def job(self, region: str, spec: Message, where: str) -> None:
        """Refuse a CustomJobSpec that the project's quota is too small for, or that may not run as it asks."""
        self.account(spec.service_account)
        said, needed = self.read(), {}
        for number, pool in enumerate(spec.worker_pool_specs):
            machine = pool.machine_spec
            if machine.accelerator_count and said.get("no_accelerators"):
                raise invalid(
                    f"List of found errors: 1.Field: {where}.worker_pool_specs[{number}].machine_spec."
                    "accelerator_count; Message: Accelerators are not supported for this project. Train on CPUs: leave "
                    "accelerator_type and accelerator_count away."
                )
            for metric, count in metrics(machine).items():
                needed[metric] = needed.get(metric, 0) + count * max(1, pool.replica_count)
        limits = said.get("quotas", {})
        if over := [metric for metric, count in needed.items() if count > limits.get(metric, count)]:
            names = ", ".join(f"{VERTEX}/{metric}" for metric in over)
            raise Refused(
                StatusCode.RESOURCE_EXHAUSTED,
                f"The following quota metrics exceed quota limits: {names}. Ask for quota of the Agent Platform API "
                f"(Vertex AI) in {region}, which is not Compute Engine's, or use another machine.",
            )

    def capacity(self, region: str, spec: Message) -> None:
        """Fail a job (JobFailed) in a region that has none of its machines left."""
        gone = self.read().get("no_capacity", {}).get(region, ())
        for pool in spec.worker_pool_specs:
            if {pool.machine_spec.machine_type, accelerator(pool.machine_spec)} & set(gone):
                raise JobFailed(
                    f"Resources are insufficient in region: {region}. Try a different region or use a different "
                    "accelerator. All zones of the region have been tried.",
                    code_pb2.RESOURCE_EXHAUSTED,
                )

    def _api(self, said: dict, api: str) -> None:
        if api in said.get("disabled_apis", ()):
            raise Refused(
                StatusCode.PERMISSION_DENIED,
                f"{TITLES[api]} has not been used in project {PROJECT_NUMBER} before or it is disabled. Enable it by "
                f"visiting https://console.developers.google.com/apis/api/{api}/overview?project={PROJECT_NUMBER} then "
                "retry. If you enabled this API recently, wait a few minutes for the action to propagate to our "
                f"systems and retry. Or: gcloud services enable {api} --project={PROJECT}",
            )

    def _permission(self, said: dict, permission: str, api: str, resource: str = f"projects/{PROJECT_NUMBER}") -> None:
        if permission not in said.get("missing_permissions", ()):
            return
        service, kind, verb = permission.split(".")
        denied = f"Permission '{permission}' denied on resource"
        if permission == "serviceusage.services.use":
            words = (
                f"Caller does not have required permission to use project {PROJECT}. Grant the caller the "
                "roles/serviceusage.serviceUsageConsumer role, or a custom role with the serviceusage.services.use "
                "permission, by visiting https://console.developers.google.com/iam-admin/iam/project?project="
                f"{PROJECT} and then retry. Propagation of the new permission may take a few minutes."
            )
        elif service == "storage":
            whole = {"create": "project", "list": "project"}.get(verb, "Storage bucket")
            what = "Storage object" if kind == "objects" else whole
            words = (
                f"{self.email} does not have {permission} access to the Google Cloud {what}. {denied} (or it may not "
                "exist)."
            )
        elif service == "bigquery":
            words = (
                f"Access Denied: Project {PROJECT}: User does not have {permission} permission in project {PROJECT}."
            )
        else:
            words = f"{denied} '//{api}/{resource}' (or it may not exist)."
        raise Refused(StatusCode.PERMISSION_DENIED, words)


def accelerator(machine: Message) -> str:
    """Return the name of a machine's accelerator, empty if it asks for none."""
    return types.AcceleratorType(machine.accelerator_type).name if machine.accelerator_count else ""


def metrics(machine: Message) -> dict[str, int]:
    """Return what one machine uses of each quota of custom training, by the last part of Google's metric."""
    used = {}
    family, size = machine.machine_type.split("-")[0], machine.machine_type.rpartition("-")[2]
    if size.isdigit():
        shared = "" if family in ("n1", "e2") else f"{family}_"
        used[f"custom_model_training_{shared}cpus"] = int(size)
    if name := accelerator(machine):
        known = read("machines")["accelerators"].get(name, {}).get("quota_metric")
        by_rule = name.lower().replace("nvidia_tesla", "nvidia")
        used[known.rpartition("/")[2] if known else f"custom_model_training_{by_rule}_gpus"] = machine.accelerator_count
    return used
