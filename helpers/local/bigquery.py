"""The local BigQuery's REST API, v2, for the unmodified google-cloud-bigquery client and the %%bigquery magic.

    Starlette(routes=bigquery.routes(folder, buckets, "local-project"))

It runs GoogleSQL on DuckDB: `warehouse` keeps the tables, `googlesql` translates, `statements` executes, `transfers`
loads and extracts, `bqml` trains. They and their libraries are imported with the first request.
"""

import asyncio
import concurrent.futures
import functools
import json
import logging
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helpers.local.warehouse import (
    CELLS_PER_PAGE,
    LOCATION,
    PUBLIC,
    RESULTS,
    BigQueryError,
    Name,
    Warehouse,
    canonical,
    now,
    unimplemented,
)

log = logging.getLogger("helpers.local")

_QUICK_SECONDS = 0.2  # a job that ends so soon is told as done in the answer to its creation
_WAIT_SECONDS = 10  # how long a request for results waits for them unless it says otherwise
_STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    501: "UNIMPLEMENTED",
}


def routes(folder: Path, buckets: Path, project: str) -> list[Route]:
    """Return the routes of a BigQuery whose data is in `folder`; gs://BUCKET/OBJECT is `buckets`/BUCKET/OBJECT."""
    api = Api(folder, buckets, project)
    base = "/bigquery/v2/projects/{project}"
    dataset, table = f"{base}/datasets/{{dataset}}", f"{base}/datasets/{{dataset}}/tables/{{table}}"
    model = f"{base}/datasets/{{dataset}}/models/{{model}}"
    table_of = [
        ("GET", f"{base}/datasets", api.list_datasets),
        ("POST", f"{base}/datasets", api.create_dataset),
        ("GET", dataset, api.get_dataset),
        ("PATCH PUT", dataset, api.update_dataset),
        ("DELETE", dataset, api.delete_dataset),
        ("GET", f"{dataset}/tables", api.list_tables),
        ("POST", f"{dataset}/tables", api.create_table),
        ("GET", table, api.get_table),
        ("PATCH PUT", table, api.update_table),
        ("DELETE", table, api.delete_table),
        ("GET", f"{table}/data", api.list_rows),
        ("POST", f"{table}/insertAll", api.insert_rows),
        ("GET", f"{dataset}/models", api.list_models),
        ("GET", model, api.get_model),
        ("PATCH", model, api.update_model),
        ("DELETE", model, api.delete_model),
        ("GET", f"{base}/jobs", api.list_jobs),
        ("POST", f"{base}/jobs", api.create_job),
        ("GET", f"{base}/jobs/{{job}}", api.get_job),
        ("POST", f"{base}/jobs/{{job}}/cancel", api.cancel_job),
        ("DELETE", f"{base}/jobs/{{job}}/delete", api.delete_job),
        ("POST", f"{base}/queries", api.query),
        ("GET", f"{base}/queries/{{job}}", api.get_results),
        ("POST PUT", f"/upload{base}/jobs", api.upload),
        ("GET POST PUT PATCH DELETE", "/{path:path}", api.refuse),
    ]
    return [Route(path, answering(method), methods=verbs.split()) for verbs, path, method in table_of]


def answering(method: Callable) -> Callable:
    """Return an endpoint that gives a method the request and its JSON, and words what it raises as Google does.

    A method that waits is a coroutine; any other runs in a thread.
    """

    async def endpoint(request: Request) -> Response:
        try:
            if asyncio.iscoroutinefunction(method):
                result = await method(request)
            else:
                result = await run_in_threadpool(method, request, await json_of(request))
        except BigQueryError as error:
            return refusal(error)
        return result if isinstance(result, Response) else JSONResponse(result)

    return endpoint


async def json_of(request: Request) -> dict:
    """Return the JSON of a request's body."""
    body = await request.body()
    try:
        return json.loads(body) if body else {}
    except ValueError as error:
        raise BigQueryError(f"Parse Error: the request's body is not JSON: {error}", "parseError") from None


def refusal(error: BigQueryError) -> Response:
    """Return the answer for a refusal."""
    status = _STATUS.get(error.status, "INVALID_ARGUMENT")
    body = {"code": error.status, "message": str(error), "errors": [problem(error)], "status": status}
    return JSONResponse({"error": body}, error.status)


def problem(error: BigQueryError) -> dict:
    """Return a refusal as jobs and answers list it."""
    location = {"location": "q", "locationType": "parameter"} if error.reason == "invalidQuery" else {}
    return {"message": str(error), "domain": "global", "reason": error.reason, **location}


def page(items: list, parameters) -> tuple[list, dict]:
    """Return the part of a list that a request asks for, and the token of the next."""
    start, count = int(parameters.get("pageToken") or 0), int(parameters.get("maxResults") or 1000)
    more = {"nextPageToken": str(start + count)} if start + count < len(items) else {}
    return items[start : start + count], more


class Job:
    """A job: its resource in BigQuery's JSON, and while it runs the means to wait for it and to end it."""

    def __init__(self, resource: dict, cursor):
        """Prepare a job to run with a cursor of its own."""
        self.resource, self.cursor = resource, cursor
        self.done: concurrent.futures.Future = concurrent.futures.Future()
        self.is_cancelled = threading.Event()

    @property
    def id(self) -> str:
        """Return the last part of the job's name."""
        return self.resource["jobReference"]["jobId"]

    async def wait(self, seconds: float) -> None:
        """Wait until the job ends, or for some seconds, without a thread."""
        await asyncio.wait([asyncio.wrap_future(self.done)], timeout=seconds)

    def cancel(self) -> None:
        """End what the job does, as soon as it lets itself be ended."""
        self.is_cancelled.set()
        for _ in range(20):
            self.cursor.interrupt()  # reaches only a statement that runs at this moment
            if concurrent.futures.wait([self.done], timeout=0.05).done:
                break


class Api:
    """The methods of the REST API."""

    def __init__(self, folder: Path, buckets: Path, project: str):
        """Keep where the data is; it is opened with the first request."""
        self.folder, self.buckets, self.project = folder, buckets, project
        self.jobs: dict[str, Job] = {}  # that run
        self._lock = threading.Lock()
        self._uploads: dict[str, dict] = {}

    @functools.cached_property
    def _opened(self) -> Warehouse:
        warehouse = Warehouse(self.folder, self.buckets, self.project)
        with warehouse.transaction() as cursor:
            for id_, resource in warehouse.resources(cursor, "job", self.project):
                if resource["status"]["state"] != "DONE":
                    # With this reason, the client starts a query again by itself.
                    lost = BigQueryError("The local BigQuery ended while this job ran.", "jobBackendError")
                    resource["status"] = {"state": "DONE", "errorResult": problem(lost), "errors": [problem(lost)]}
                    warehouse.put(cursor, "job", self.project, id_, resource)
        return warehouse

    @property
    def warehouse(self) -> Warehouse:
        """Return the tables."""
        with self._lock:
            return self._opened

    def refuse(self, request: Request, body: dict) -> None:
        """Answer any method that is not here."""
        raise unimplemented(f"{request.method} {request.url.path}")

    def check_project(self, request: Request, allow_public: bool = False) -> str:
        """Return the project of a request; BigQueryError unless it is the local one, or may be Google's public one."""
        project = request.path_params["project"]
        if project != self.project and not (allow_public and project == PUBLIC):
            raise BigQueryError(
                f"Access Denied: Project {project}: User does not have permission to use project {project}. "
                f"The local BigQuery has one project, {self.project}.",
                "accessDenied",
            )
        return project

    # Datasets

    def dataset_resource(self, project: str, id_: str, body: dict) -> dict:
        """Return a dataset in BigQuery's JSON."""
        reference = {"projectId": project, "datasetId": id_}
        named = {"kind": "bigquery#dataset", "id": f"{project}:{id_}", "datasetReference": reference}
        return {"location": LOCATION, **body, **named}

    def list_datasets(self, request: Request, body: dict) -> dict:
        """datasets.list."""
        project = self.check_project(request, allow_public=True)
        found, more = page(self.warehouse.resources(self.warehouse.cursor(), "dataset", project), request.query_params)
        return {
            "kind": "bigquery#datasetList",
            "datasets": [self.dataset_resource(project, *entry) for entry in found],
            **more,
        }

    def create_dataset(self, request: Request, body: dict) -> dict:
        """datasets.insert."""
        project, id_ = self.check_project(request), body.get("datasetReference", {}).get("datasetId", "")
        with self.warehouse.transaction() as cursor:
            self.warehouse.create_dataset(cursor, id_, body)
            return self.dataset_resource(project, id_, self.warehouse.dataset(cursor, project, id_))

    def get_dataset(self, request: Request, body: dict) -> dict:
        """datasets.get."""
        project, id_ = self.check_project(request, allow_public=True), request.path_params["dataset"]
        return self.dataset_resource(project, id_, self.warehouse.dataset(self.warehouse.cursor(), project, id_))

    def update_dataset(self, request: Request, body: dict) -> dict:
        """datasets.patch and datasets.update."""
        project, id_ = self.check_project(request), request.path_params["dataset"]
        with self.warehouse.transaction() as cursor:
            new = patched(self.warehouse.dataset(cursor, project, id_), body)
            self.warehouse.put(cursor, "dataset", project, id_, new)
        return self.dataset_resource(project, id_, new)

    def delete_dataset(self, request: Request, body: dict) -> Response:
        """datasets.delete."""
        self.check_project(request)
        with_contents = request.query_params.get("deleteContents", "false").lower() == "true"
        with self.warehouse.transaction() as cursor:
            self.warehouse.drop_dataset(cursor, request.path_params["dataset"], with_contents)
        return Response(status_code=204)

    # Tables

    def table_name(self, request: Request, allow_public: bool = False) -> Name:
        """Return the name of the table of a request."""
        project = self.check_project(request, allow_public)
        return Name(project, request.path_params["dataset"], request.path_params["table"])

    def table_resource(self, name: Name, body: dict) -> dict:
        """Return a table in BigQuery's JSON, as lists have it."""
        named = {"kind": "bigquery#table", "id": str(name).replace(":", ":", 1), "tableReference": name.reference}
        return {"location": LOCATION, **body, **named}

    def full_table(self, cursor, name: Name) -> dict:
        """Return a table in BigQuery's JSON with its size."""
        body = self.warehouse.table(cursor, name)
        size = {}
        if body["type"] == "TABLE":
            size = {
                "numRows": str(self.warehouse.count(cursor, name)),
                "numBytes": str(self.warehouse.stored_bytes(cursor, name)),
            }
        return self.table_resource(name, body | size)

    def list_tables(self, request: Request, body: dict) -> dict:
        """tables.list."""
        project, dataset = self.check_project(request, allow_public=True), request.path_params["dataset"]
        cursor = self.warehouse.cursor()
        self.warehouse.dataset(cursor, project, dataset)
        tables = self.warehouse.resources(cursor, "table", f"{project}.{dataset}")
        found, more = page(tables, request.query_params)
        shown = [self.table_resource(Name(project, dataset, id_), entry) for id_, entry in found]
        return {"kind": "bigquery#tableList", "tables": shown, "totalItems": len(tables), **more}

    def create_table(self, request: Request, body: dict) -> dict:
        """tables.insert."""
        from helpers.local import transfers
        from helpers.local.googlesql import Script
        from helpers.local.statements import Query

        project, dataset = self.check_project(request), request.path_params["dataset"]
        name = Name(project, dataset, body["tableReference"]["tableId"])
        kept = {key: body[key] for key in ("description", "friendlyName", "labels") if key in body}
        warehouse = self.warehouse
        with warehouse.locks[name], warehouse.transaction() as cursor:
            if "view" in body:
                script = Script(body["view"]["query"], self.project)
                query = Query(warehouse, cursor, script, {"query": {}}, name).sql(script.statements[0])
                warehouse.create_view(cursor, name, query, "VIEW", view=body["view"], **kept)
            elif "externalDataConfiguration" in body:
                transfers.create_external(
                    warehouse, cursor, name, body["externalDataConfiguration"] | {"schema": body.get("schema", {})}
                )
            elif "materializedView" in body:
                raise unimplemented("A materialized view")
            else:
                warehouse.create_table(cursor, name, body.get("schema", {}).get("fields", []), **kept)
            return self.full_table(cursor, name)

    def get_table(self, request: Request, body: dict) -> dict:
        """tables.get."""
        return self.full_table(self.warehouse.cursor(), self.table_name(request, allow_public=True))

    def update_table(self, request: Request, body: dict) -> dict:
        """tables.patch and tables.update."""
        name = self.table_name(request)
        with self.warehouse.locks[name], self.warehouse.transaction() as cursor:
            old = self.warehouse.table(cursor, name)
            if "schema" in body and body["schema"] is not None:
                self.warehouse.change_schema(cursor, name, [canonical(field) for field in body["schema"]["fields"]])
            kept = {key: body[key] for key in ("description", "friendlyName", "labels") if key in body}
            new = patched(self.warehouse.table(cursor, name), kept)
            self.warehouse.put(cursor, "table", name.schema, name.id, new)
            return self.full_table(cursor, name) if old else {}

    def delete_table(self, request: Request, body: dict) -> Response:
        """tables.delete."""
        name = self.table_name(request)
        with self.warehouse.locks[name], self.warehouse.transaction() as cursor:
            self.warehouse.drop(cursor, name)
        return Response(status_code=204)

    def list_rows(self, request: Request, body: dict) -> Response:
        """tabledata.list."""
        name, cursor = self.table_name(request, allow_public=True), self.warehouse.cursor()
        table = self.warehouse.table(cursor, name)
        if table["type"] != "TABLE":
            raise BigQueryError(f"Cannot list a table of type {table['type']}.", "invalid")
        fields = table["schema"]["fields"]
        if selected := request.query_params.get("selectedFields"):
            wanted = selected.lower().split(",")
            fields = [field for field in fields if field["name"].lower() in wanted]
        return self.rows(cursor, name, fields, request.query_params, {"kind": "bigquery#tableDataList"}, "pageToken")

    def rows(self, cursor, name: Name, fields: list[dict], parameters, answer: dict, token: str) -> Response:
        """Return an answer with a page of a table's rows, which DuckDB has written as JSON."""
        total = self.warehouse.count(cursor, name)
        start = int(parameters.get("pageToken") or parameters.get("startIndex") or 0)
        fit = max(1, CELLS_PER_PAGE // max(1, len(fields)))
        count = min(fit, int(parameters["maxResults"])) if parameters.get("maxResults") is not None else fit
        as_int64 = str(parameters.get("formatOptions.useInt64Timestamp", "false")).lower() == "true"
        answer = {**answer, "totalRows": str(total)}
        if count and start + count < total:
            answer[token] = str(start + count)
        rows = self.warehouse.rows(cursor, name, fields, start, count, as_int64) if count else []
        if rows:
            answer["rows"] = []
            return Response(json.dumps(answer)[:-3] + f"[{','.join(rows)}]}}", media_type="application/json")
        return JSONResponse(answer)

    def insert_rows(self, request: Request, body: dict) -> dict:
        """tabledata.insertAll."""
        from helpers.local import transfers

        name = self.table_name(request)
        if body.get("templateSuffix"):
            raise unimplemented("templateSuffix")
        with self.warehouse.locks[name], self.warehouse.transaction() as cursor:
            errors = transfers.insert(self.warehouse, cursor, name, body)
        return {"kind": "bigquery#tableDataInsertAllResponse", **({"insertErrors": errors} if errors else {})}

    # Models

    def model_resource(self, request: Request, cursor, id_: str | None = None) -> dict:
        """Return a model in BigQuery's JSON."""
        project, dataset = self.check_project(request), request.path_params["dataset"]
        id_ = id_ or request.path_params["model"]
        self.warehouse.dataset(cursor, project, dataset)
        body = self.warehouse.get(cursor, "model", f"{project}.{dataset}", id_)
        if body is None:
            raise BigQueryError(f"Not found: Model {project}:{dataset}.{id_}", "notFound")
        reference = {"projectId": project, "datasetId": dataset, "modelId": id_}
        return {"location": LOCATION, **body, "modelReference": reference}

    def list_models(self, request: Request, body: dict) -> dict:
        """models.list."""
        project, dataset = self.check_project(request), request.path_params["dataset"]
        cursor = self.warehouse.cursor()
        self.warehouse.dataset(cursor, project, dataset)
        models = self.warehouse.resources(cursor, "model", f"{project}.{dataset}")
        found, more = page(models, request.query_params)
        return {"models": [self.model_resource(request, cursor, id_) for id_, _ in found], **more}

    def get_model(self, request: Request, body: dict) -> dict:
        """models.get."""
        return self.model_resource(request, self.warehouse.cursor())

    def update_model(self, request: Request, body: dict) -> dict:
        """models.patch."""
        with self.warehouse.transaction() as cursor:
            resource = self.model_resource(request, cursor)
            kept = {key: body[key] for key in ("description", "friendlyName", "labels") if key in body}
            self.warehouse.change_model(cursor, Name.of(resource["modelReference"], "modelId"), patched(resource, kept))
            return self.model_resource(request, cursor)

    def delete_model(self, request: Request, body: dict) -> Response:
        """models.delete."""
        self.check_project(request)
        with self.warehouse.transaction() as cursor:
            reference = self.model_resource(request, cursor)["modelReference"]
            self.warehouse.drop_model(cursor, Name.of(reference, "modelId"))
        return Response(status_code=204)

    # Jobs

    def find_job(self, id_: str) -> dict:
        """Return a job's resource."""
        if job := self.jobs.get(id_):
            return job.resource
        resource = self.warehouse.get(self.warehouse.cursor(), "job", self.project, id_)
        if resource is None:
            raise BigQueryError(f"Not found: Job {self.project}:{id_}", "notFound")
        return resource

    def list_jobs(self, request: Request, body: dict) -> dict:
        """jobs.list, newest first."""
        self.check_project(request)
        known = dict(self.warehouse.resources(self.warehouse.cursor(), "job", self.project))
        known |= {id_: job.resource for id_, job in list(self.jobs.items())}
        states = [state.upper() for state in request.query_params.getlist("stateFilter")]
        jobs = [job for job in known.values() if not states or job["status"]["state"] in states]
        jobs.sort(key=lambda job: int(job["statistics"]["creationTime"]), reverse=True)
        found, more = page(jobs, request.query_params)
        shown = [
            {**job, "state": job["status"]["state"], "errorResult": job["status"].get("errorResult")} for job in found
        ]
        return {"kind": "bigquery#jobList", "jobs": shown, **more}

    def get_job(self, request: Request, body: dict) -> dict:
        """jobs.get."""
        self.check_project(request)
        return self.find_job(request.path_params["job"])

    def cancel_job(self, request: Request, body: dict) -> dict:
        """jobs.cancel."""
        self.check_project(request)
        resource = self.find_job(request.path_params["job"])
        if job := self.jobs.get(request.path_params["job"]):
            job.cancel()
            resource = job.resource
        return {"kind": "bigquery#jobCancelResponse", "job": resource}

    def delete_job(self, request: Request, body: dict) -> Response:
        """jobs.delete."""
        self.check_project(request)
        id_ = request.path_params["job"]
        if self.find_job(id_)["status"]["state"] != "DONE":
            raise BigQueryError(f"Cannot delete job {id_}: it has not ended.", "invalid")
        with self.warehouse.transaction() as cursor:
            self.warehouse.delete(cursor, "job", self.project, id_)
        return Response(status_code=204)

    async def create_job(self, request: Request) -> dict:
        """jobs.insert."""
        self.check_project(request)
        body = await json_of(request)
        if body.get("configuration", {}).get("dryRun"):
            return await run_in_threadpool(self.dry_run, body)
        job = await run_in_threadpool(self.start, body)
        await job.wait(_QUICK_SECONDS)
        return job.resource

    def start(self, body: dict, file: Path | None = None) -> Job:
        """Start a job in a thread of its own; `file` is what an upload brought."""
        reference = body.get("jobReference") or {}
        id_ = reference.get("jobId") or f"job_{secrets.token_urlsafe(21)}"
        if not re.fullmatch(r"[\w\-]{1,1024}", id_):
            raise BigQueryError(f"Invalid job ID {id_!r}", "invalid")
        configuration = {**body["configuration"]}
        kind = next((key for key in ("query", "load", "copy", "extract") if key in configuration), None)
        if kind is None:
            raise BigQueryError(
                "Job configuration must contain exactly one job-specific configuration object", "invalid"
            )
        resource = {
            "kind": "bigquery#job",
            "id": f"{self.project}:{LOCATION}.{id_}",
            "jobReference": {
                "projectId": self.project,
                "jobId": id_,
                "location": reference.get("location") or LOCATION,
            },
            "configuration": {**configuration, "jobType": kind.upper()},
            "status": {"state": "RUNNING"},
            "statistics": {"creationTime": now(), "startTime": now()},
            "user_email": f"local@{self.project}.iam.gserviceaccount.com",
        }
        job = Job(resource, self.warehouse.cursor())
        with self._lock:
            exists = id_ in self.jobs or self._opened.get(job.cursor, "job", self.project, id_)
            if exists:
                raise BigQueryError(f"Already Exists: Job {self.project}:{LOCATION}.{id_}", "duplicate")
            self.jobs[id_] = job
        self.warehouse.put(job.cursor, "job", self.project, id_, resource)
        threading.Thread(target=self.run, args=(job, kind, file), name=f"job {id_}", daemon=True).start()
        return job

    def run(self, job: Job, kind: str, file: Path | None) -> None:
        """Run a job to its end, whatever that is, and keep what came of it."""
        import duckdb

        statistics, status = {}, {"state": "DONE"}
        try:
            if kind == "query":
                statistics = self.run_query(job)
            elif kind == "load":
                statistics = self.run_load(job, file)
            else:
                statistics = self.run_copy(job) if kind == "copy" else self.run_extract(job)
        except Exception as error:
            if job.is_cancelled.is_set():
                refused = BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
            elif isinstance(error, BigQueryError):
                refused = error
            elif isinstance(error, duckdb.Error):
                refused = BigQueryError(str(error).partition("\n\nLINE")[0], "invalid")
            else:
                log.exception("job %s", job.id)
                refused = BigQueryError(f"The local BigQuery failed: {error!r}", "invalid")
            status |= {"errorResult": problem(refused), "errors": [problem(refused)]}
        finally:
            if file:
                file.unlink(missing_ok=True)
        ended = {"statistics": {**job.resource["statistics"], **statistics, "endTime": now()}, "status": status}
        job.resource = {**job.resource, **ended}
        self.warehouse.put(self.warehouse.cursor(), "job", self.project, job.id, job.resource)
        self.jobs.pop(job.id, None)
        job.cursor.close()
        job.done.set_result(None)

    # Queries

    def prepare(self, configuration: dict, cursor, id_: str, should_stop: Callable[[], bool]):
        """Return the query of a job's configuration, ready to run."""
        from helpers.local.googlesql import Script
        from helpers.local.statements import Query

        settings = configuration["query"]
        if unknown := sorted(key for key, value in settings.items() if value and key not in _QUERY_SETTINGS):
            raise unimplemented(f"The setting {unknown[0]} of a query")
        default = settings.get("defaultDataset", {})
        project, dataset = default.get("projectId") or self.project, default.get("datasetId")
        script = Script(settings["query"], project, dataset, settings.get("queryParameters", ()))
        results = Name(self.project, RESULTS, id_)
        return Query(self.warehouse, cursor, script, configuration, results, should_stop)

    def run_query(self, job: Job) -> dict:
        """Run a query, and return its statistics."""
        query = self.prepare(job.resource["configuration"], job.cursor, job.id, job.is_cancelled.is_set)
        statistics = query.run()
        if query.destination:
            settings = {**job.resource["configuration"]["query"], "destinationTable": query.destination.reference}
            job.resource = {**job.resource, "configuration": {**job.resource["configuration"], "query": settings}}
        return {"query": statistics, "totalBytesProcessed": statistics["totalBytesProcessed"]}

    def dry_run(self, body: dict) -> dict:
        """Return the job that a query would be, without running it."""
        import duckdb

        configuration = body["configuration"]
        if "query" not in configuration:
            raise unimplemented("A dry run of anything but a query")
        try:
            query = self.prepare(configuration, self.warehouse.cursor(), "dry_run", lambda: False)
            statistics = query.run()
        except duckdb.Error as error:
            raise BigQueryError(str(error)) from None
        return {
            "kind": "bigquery#job",
            "jobReference": {"projectId": self.project, "location": LOCATION},
            "configuration": {**configuration, "jobType": "QUERY"},
            "status": {"state": "DONE"},
            "statistics": {
                "creationTime": now(),
                "query": statistics,
                "totalBytesProcessed": statistics["totalBytesProcessed"],
            },
        }

    async def query(self, request: Request) -> dict | Response:
        """jobs.query: start a query and answer with its first rows if it ends in time."""
        self.check_project(request)
        body = await json_of(request)
        settings = {key: value for key, value in body.items() if key not in _REQUEST_SETTINGS}
        configuration = {"query": settings, "dryRun": body.get("dryRun", False), "labels": body.get("labels", {})}
        if body.get("dryRun"):
            job = await run_in_threadpool(self.dry_run, {"configuration": configuration})
            statistics = job["statistics"]["query"]
            shown = {key: statistics[key] for key in ("schema", "totalBytesProcessed", "cacheHit") if key in statistics}
            return {"kind": "bigquery#queryResponse", "jobReference": job["jobReference"], "jobComplete": True, **shown}
        reference = {"location": body.get("location")}
        job = await run_in_threadpool(self.start, {"configuration": configuration, "jobReference": reference})
        await job.wait(int(body.get("timeoutMs") or 1000 * _WAIT_SECONDS) / 1000)
        parameters = {"maxResults": body.get("maxResults"), **flat("formatOptions", body.get("formatOptions", {}))}
        return await run_in_threadpool(self.results, job.id, parameters, "bigquery#queryResponse")

    async def get_results(self, request: Request) -> dict | Response:
        """jobs.getQueryResults: wait for a query, and answer with a page of its rows."""
        self.check_project(request)
        parameters, id_ = request.query_params, request.path_params["job"]
        if job := self.jobs.get(id_):
            await job.wait(int(parameters.get("timeoutMs") or 1000 * _WAIT_SECONDS) / 1000)
        return await run_in_threadpool(self.results, id_, parameters, "bigquery#getQueryResultsResponse")

    def results(self, id_: str, parameters, kind: str) -> dict | Response:
        """Return what came of a query, with a page of its rows."""
        job = self.find_job(id_)
        answer = {"kind": kind, "jobReference": job["jobReference"], "jobComplete": job["status"]["state"] == "DONE"}
        if not answer["jobComplete"]:
            return answer
        if error := job["status"].get("errorResult"):
            raise BigQueryError(error["message"], error["reason"])
        if "query" not in job["statistics"]:
            raise BigQueryError(f"Job {id_} is not a query.", "invalid")
        told = ("schema", "totalBytesProcessed", "cacheHit", "numDmlAffectedRows", "dmlStats", "statementType")
        answer |= {key: job["statistics"]["query"][key] for key in told if key in job["statistics"]["query"]}
        times = ("creationTime", "startTime", "endTime")
        answer |= {"location": LOCATION, **{key: job["statistics"][key] for key in times}}
        destination = job["configuration"]["query"].get("destinationTable")
        if "schema" not in answer or not destination:
            return answer
        fields = answer["schema"]["fields"]
        return self.rows(self.warehouse.cursor(), Name.of(destination), fields, parameters, answer, "pageToken")

    # Files

    def run_load(self, job: Job, file: Path | None) -> dict:
        """Load files into a table, and return the statistics."""
        import duckdb

        from helpers.local import transfers

        settings, warehouse = job.resource["configuration"]["load"], self.warehouse
        name = Name.of(settings["destinationTable"])
        warehouse.check_writable(name)
        files = [file] if file else transfers.files_of(warehouse, settings.get("sourceUris", []))
        write = settings.get("writeDisposition") or "WRITE_APPEND"
        with warehouse.locks[name], warehouse.transaction(job.cursor) as cursor:
            existing = warehouse.find(cursor, name)
            before = warehouse.count(cursor, name) if existing and write == "WRITE_APPEND" else 0
            known = existing["schema"]["fields"] if existing and write != "WRITE_TRUNCATE" else None
            try:
                query, fields = transfers.read(warehouse, cursor, settings, files, known)
                create = settings.get("createDisposition") or "CREATE_IF_NEEDED"
                warehouse.store(cursor, name, query, fields, write, create)
            except duckdb.Error as error:
                raise transfers.unreadable(error) from None
            told = settings.get("destinationTableProperties") or {}
            warehouse.describe(
                cursor, name, **{key: value for key, value in told.items() if key in ("description", "labels")}
            )
            loaded = {
                "inputFiles": str(len(files)),
                "inputFileBytes": str(sum(path.stat().st_size for path in files)),
                "outputRows": str(warehouse.count(cursor, name) - before),
                "outputBytes": str(warehouse.stored_bytes(cursor, name)),
                "badRecords": "0",
            }
        return {"load": loaded}

    def run_copy(self, job: Job) -> dict:
        """Copy tables into one, and return the statistics."""
        settings, warehouse = job.resource["configuration"]["copy"], self.warehouse
        if settings.get("operationType", "COPY") not in ("COPY", "CLONE"):
            raise unimplemented(f"Copying with operationType {settings['operationType']}")
        name = Name.of(settings["destinationTable"])
        write = settings.get("writeDisposition") or "WRITE_EMPTY"
        copied = 0
        with warehouse.locks[name], warehouse.transaction(job.cursor) as cursor:
            for source in map(Name.of, settings.get("sourceTables") or [settings["sourceTable"]]):
                fields = warehouse.table(cursor, source)["schema"]["fields"]
                warehouse.store(
                    cursor, name, f"FROM {source.sql}", fields, write, settings.get("createDisposition", "")
                )
                copied, write = copied + warehouse.count(cursor, source), "WRITE_APPEND"
        return {"copy": {"copiedRows": str(copied)}}

    def run_extract(self, job: Job) -> dict:
        """Write a table to a bucket, and return the statistics."""
        from helpers.local import transfers

        settings, warehouse = job.resource["configuration"]["extract"], self.warehouse
        if "sourceModel" in settings:
            raise unimplemented("Exporting a model")
        name = Name.of(settings["sourceTable"])
        fields = warehouse.table(job.cursor, name)["schema"]["fields"]
        nested = [field["name"] for field in fields if field["type"] == "RECORD" or field["mode"] == "REPEATED"]
        if nested and settings.get("destinationFormat", "CSV") == "CSV":
            raise BigQueryError(f"Operation cannot be performed on a nested schema. Field: {nested[0]}", "invalid")
        counts = transfers.write(warehouse, job.cursor, f"FROM {name.sql}", settings)
        size = str(warehouse.stored_bytes(job.cursor, name))
        return {"extract": {"destinationUriFileCounts": list(map(str, counts)), "inputBytes": size}}

    # Uploads

    async def upload(self, request: Request) -> dict | Response:
        """jobs.insert with the file to load: in one request, or as a resumable upload in several."""
        self.check_project(request)
        if request.query_params.get("upload_id"):
            return await self.resume(request)
        kind = request.query_params.get("uploadType")
        path = self.warehouse.uploads / secrets.token_hex(16)
        if kind == "multipart":
            body, content = parts(request.headers.get("content-type", ""), await request.body())
            path.write_bytes(content)
            return await self.load(body, path)
        if kind != "resumable":
            raise unimplemented(f"uploadType={kind}", "use multipart or resumable")
        self._uploads[path.name] = await json_of(request)
        path.touch()
        url = request.url.replace_query_params(uploadType="resumable", upload_id=path.name)
        return Response(headers={"Location": str(url), "X-GUploader-UploadID": path.name})

    async def resume(self, request: Request) -> dict | Response:
        """Take a piece of a resumable upload, or say how much there is."""
        id_ = request.query_params["upload_id"]
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", request.headers.get("content-range", "bytes */*"))
        if id_ not in self._uploads or not match:
            raise BigQueryError(f"Not found: Upload {id_}", "notFound")
        path = self.warehouse.uploads / id_
        with path.open("r+b") as file:
            file.seek(int(match[1] or path.stat().st_size))
            async for piece in request.stream():
                file.write(piece)
        size = path.stat().st_size
        if match[2] == str(size):
            return await self.load(self._uploads.pop(id_), path)
        return Response(status_code=308, headers={"Range": f"bytes=0-{size - 1}"} if size else {})

    async def load(self, body: dict, path: Path) -> dict:
        """Start the job that loads an uploaded file."""
        job = await run_in_threadpool(self.start, body, path)
        await job.wait(_QUICK_SECONDS)
        return job.resource


# Settings of a query that are read, or that change nothing here; in a jobs.query request also those of the answer.
_QUERY_SETTINGS = {
    *("query", "useLegacySql", "defaultDataset", "queryParameters", "parameterMode", "destinationTable"),
    *("writeDisposition", "createDisposition", "tableDefinitions", "maximumBytesBilled"),
    *("useQueryCache", "priority", "allowLargeResults", "flattenResults", "preserveNulls"),
}
_REQUEST_SETTINGS = {
    *("kind", "maxResults", "timeoutMs", "dryRun", "location", "formatOptions", "labels", "requestId"),
    *("jobCreationMode",),
}


def patched(resource: dict, changes: dict) -> dict:
    """Return a resource with changes, where None takes away, also within labels."""
    labels = {**resource.get("labels", {}), **(changes.get("labels") or {})}
    new = {**resource, **changes, "lastModifiedTime": now()}
    if "labels" in changes:
        new["labels"] = {key: value for key, value in labels.items() if value is not None}
    return {key: value for key, value in new.items() if value is not None}


def flat(prefix: str, options: dict) -> dict:
    """Return options of a body as those of a query string."""
    return {f"{prefix}.{key}": str(value) for key, value in options.items()}


def parts(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """Return the JSON and the file of a multipart upload."""
    match = re.search(r'boundary="?([^";]+)', content_type)
    pieces = body.split(b"--" + match[1].encode()) if match else []
    if len(pieces) < 4:
        raise BigQueryError("A multipart upload needs two parts: JSON and the file.", "invalid")
    first, second = (piece.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for piece in pieces[1:3])
    return json.loads(first), second
