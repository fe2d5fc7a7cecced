"""Service Usage: which APIs a project has enabled, and the quotas that it has."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helpers.local import PROJECT, PROJECT_NUMBER
from helpers.local.errors import Refused, other_project, unimplemented
from helpers.local.refusals import VERTEX, Refusals
from helpers.local.rpc import refusal_as_rest

UNLIMITED = "-1"  # as Google writes it


def routes(refusals: Refusals) -> list[Route]:
    """Return the routes of serviceusage.googleapis.com for a project in which something may be refused."""
    api = ServiceUsage(refusals)
    services = "/v1/projects/{project}/services"
    metric = f"/v1beta1/projects/{{project}}/services/{VERTEX}/consumerQuotaMetrics/{{metric:path}}"
    return [
        Route(f"{services}:batchGet", answering(api.batch_get)),
        Route(f"{services}/{{name}}", answering(api.get)),
        Route(metric, answering(api.get_quota)),
        Route("/{path:path}", answering(api.refuse), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def answering(method):
    """Return the endpoint that gives a method the request, and words what it refuses as Google does."""

    def endpoint(request: Request) -> Response:
        try:
            if request.path_params.get("project", PROJECT) not in (PROJECT, PROJECT_NUMBER):
                raise other_project(request.path_params["project"])
            return JSONResponse(method(request))
        except Refused as refusal:
            status, kind, content = refusal_as_rest(refusal)
            return Response(content, status, media_type=kind)

    return endpoint


class ServiceUsage:
    """The APIs of the one project: all are enabled, and without a limit, but for what is refused."""

    def __init__(self, refusals: Refusals):
        """Answer for a project in which something may be refused."""
        self.refusals = refusals

    def _service(self, name: str) -> dict:
        is_disabled = name in self.refusals.read().get("disabled_apis", ())
        return {
            "name": f"projects/{PROJECT_NUMBER}/services/{name}",
            "config": {"name": name},
            "state": "DISABLED" if is_disabled else "ENABLED",
            "parent": f"projects/{PROJECT_NUMBER}",
        }

    def get(self, request: Request) -> dict:
        """Return an API's state."""
        return self._service(request.path_params["name"])

    def batch_get(self, request: Request) -> dict:
        """Return the states of the APIs that a request names, as projects/PROJECT/services/NAME."""
        return {"services": [self._service(name.rpartition("/")[2]) for name in request.query_params.getlist("names")]}

    def get_quota(self, request: Request) -> dict:
        """Return the limit of a quota of Vertex AI, the same in every region."""
        metric = request.path_params["metric"]
        limit = str(self.refusals.read().get("quotas", {}).get(metric.rpartition("/")[2], UNLIMITED))
        bucket = {"effectiveLimit": limit, "defaultLimit": UNLIMITED}
        return {
            "name": f"projects/{PROJECT_NUMBER}/services/{VERTEX}/consumerQuotaMetrics/{metric.replace('/', '%2F')}",
            "metric": metric,
            "consumerQuotaLimits": [{"metric": metric, "unit": "1/{project}/{region}", "quotaBuckets": [bucket]}],
        }

    def refuse(self, request: Request) -> dict:
        """Answer any method that is not here."""
        raise unimplemented(f"{request.method} {request.url.path}")
