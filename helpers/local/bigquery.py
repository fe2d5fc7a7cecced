"""The local BigQuery's REST API, v2, for the unmodified google-cloud-bigquery client and the %%bigquery magic.

    Starlette(routes=bigquery.routes(bigquery.Api(folder, buckets, "local-project")))

GoogleSQL runs on DuckDB: `bigquery_sql` translates, `bigquery_statements` executes, `bigquery_warehouse` keeps the
tables, `bigquery_files` loads and extracts, `bqml` trains. The first request imports them and opens the data.
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

from helpers.local import PROJECT_NUMBER
from helpers.local.bigquery_schemas import LOCATION, BigQueryError, Name, not_found, unimplemented
from helpers.local.bigquery_warehouse import PUBLIC, RESULTS, Warehouse, now

log = logging.getLogger("helpers.local")

_QUICK_SECONDS = 0.2  # a job that ends so soon is told as done in the answer to its creation
_WAIT_MILLISECONDS = 10_000  # how long a request for results waits for them unless it says otherwise
_CELLS_PER_PAGE = 1_000_000  # about 25 MB
_STATUS = {403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS", 501: "UNIMPLEMENTED"}
# Settings of a query that are read, or that change nothing here; and those of a jobs.query request that are not its.
_QUERY_SETTINGS = {
    *("query", "useLegacySql", "defaultDataset", "queryParameters", "parameterMode", "destinationTable"),
    *("writeDisposition", "createDisposition", "tableDefinitions", "maximumBytesBilled"),
    *("useQueryCache", "priority", "allowLargeResults", "flattenResults", "preserveNulls"),
}
_REQUEST_SETTINGS = {
    *("kind", "maxResults", "timeoutMs", "dryRun", "location", "formatOptions", "labels", "requestId"),
    *("jobCreationMode",),
}
_DESCRIPTIVE = ("description", "friendlyName", "labels")


def routes(api: "Api") -> list[Route]:
    """Return the routes of the REST API."""
    base = "/bigquery/v2/projects/{project}"
    datasets, jobs = f"{base}/datasets", f"{base}/jobs"
    dataset = f"{datasets}/{{dataset}}"
    tables, models = f"{dataset}/tables", f"{dataset}/models"
    table, model, job = f"{tables}/{{table}}", f"{models}/{{model}}", f"{jobs}/{{job}}"
    methods = [
        ("GET", datasets, api.list_datasets),
        ("POST", datasets, api.create_dataset),
        ("GET", dataset, api.get_dataset),
        ("PATCH PUT", dataset, api.update_dataset),
        ("DELETE", dataset, api.delete_dataset),
        ("GET", tables, api.list_tables),
        ("POST", tables, api.create_table),
        ("GET", table, api.get_table),
        ("PATCH PUT", table, api.update_table),
        ("DELETE", table, api.delete_table),
        ("GET", f"{table}/data", api.list_rows),
        ("POST", f"{table}/insertAll", api.insert_rows),
        ("GET", models, api.list_models),
        ("GET", model, api.get_model),
        ("PATCH", model, api.update_model),
        ("DELETE", model, api.delete_model),
        ("GET", jobs, api.list_jobs),
        ("POST", jobs, api.create_job),
        ("GET", job, api.get_job),
        ("POST", f"{job}/cancel", api.cancel_job),
        ("DELETE", f"{job}/delete", api.delete_job),
        ("POST", f"{base}/queries", api.query),
        ("GET", f"{base}/queries/{{job}}", api.get_results),
        ("POST PUT", f"/upload{jobs}", api.upload),
        ("GET POST PUT PATCH DELETE", "/{path:path}", api.refuse),
    ]
    return [Route(path, _answering(method), methods=verbs.split()) for verbs, path, method in methods]


def _answering(method: Callable) -> Callable:
    # An endpoint that gives a method the request and its JSON, and words what it raises as Google does. A method that
    # waits is a coroutine; any other runs in a thread.
    async def endpoint(request: Request) -> Response:
        try:
            if asyncio.iscoroutinefunction(method):
                result = await method(request)
            else:
                result = await run_in_threadpool(method, request, await _json(request))
        except BigQueryError as error:
            return _refusal(error)
        except Exception as error:
            log.exception("%s %s", request.method, request.url.path)
            return _refusal(_failure(error))
        return result if isinstance(result, Response) else JSONResponse(result)

    return endpoint


async def _json(request: Request) -> dict:
    body = await request.body()
    try:
        return json.loads(body) if body else {}
    except ValueError as error:
        raise BigQueryError(f"Parse Error: the request's body is not JSON: {error}", "parseError") from None


def _refusal(error: BigQueryError) -> Response:
    status = _STATUS.get(error.status, "INVALID_ARGUMENT")
    body = {"code": error.status, "message": str(error), "errors": [_problem(error)], "status": status}
    return JSONResponse({"error": body}, error.status)


def _problem(error: BigQueryError) -> dict:
    location = {"location": "q", "locationType": "parameter"} if error.reason == "invalidQuery" else {}
    return {"message": str(error), "domain": "global", "reason": error.reason, **location}


def _failure(error: Exception) -> BigQueryError:
    # Not an internalError: the client would try again for ten minutes.
    return BigQueryError(f"The local BigQuery failed: {type(error).__name__}: {error}", "invalid")


def _page(items: list, parameters) -> tuple[list, dict]:
    start, count = int(parameters.get("pageToken") or 0), int(parameters.get("maxResults") or 1000)
    return items[start : start + count], {"nextPageToken": str(start + count)} if start + count < len(items) else {}


def _patched(resource: dict, changes: dict) -> dict:
    # A resource with changes, where None takes away, also within labels.
    new = {**resource, **changes, "lastModifiedTime": now()}
    if "labels" in changes:
        labels = {**resource.get("labels", {}), **(changes["labels"] or {})}
        new["labels"] = {key: value for key, value in labels.items() if value is not None}
    return {key: value for key, value in new.items() if value is not None}


def _chosen(body: dict, keys=_DESCRIPTIVE) -> dict:
    return {key: body[key] for key in keys if key in body}


class Job:
    """A job that runs: its resource in BigQuery's JSON, and the means to wait for it and to end it."""

    def __init__(self, resource: dict, cursor):
        """Prepare a job to run with a cursor of its own."""
        self.resource, self.cursor = resource, cursor
        self.id: str = resource["jobReference"]["jobId"]
        self.done: concurrent.futures.Future = concurrent.futures.Future()
        self.is_cancelled = threading.Event()

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
    """The methods of the REST API, each with the request and its JSON as arguments."""

    def __init__(self, folder: Path, buckets: Path, project: str):
        """Keep the data in `folder`, opened with the first request; gs://BUCKET/OBJECT is `buckets`/BUCKET/OBJECT."""
        self.folder, self.buckets, self.project = folder, buckets, project
        self.jobs: dict[str, Job] = {}  # that run
        self._lock = threading.RLock()
        self._uploads: dict[str, dict] = {}  # the jobs of resumable uploads that have begun
        self._is_closed = False

    @property
    def warehouse(self) -> Warehouse:
        """Return the tables."""
        with self._lock:
            return self._opened

    @functools.cached_property
    def _opened(self) -> Warehouse:
        warehouse = Warehouse(self.folder, self.buckets, self.project)
        with warehouse.transaction() as cursor:
            for id_, resource in warehouse.resources(cursor, "job", self.project).items():
                if resource["status"]["state"] != "DONE":
                    # With this reason, the client starts a query again by itself.
                    lost = _problem(BigQueryError("The local BigQuery ended while this job ran.", "jobBackendError"))
                    resource["status"] = {"state": "DONE", "errorResult": lost, "errors": [lost]}
                    warehouse.put(cursor, "job", self.project, id_, resource)
        return warehouse

    def is_busy(self) -> bool:
        """Say whether a job runs."""
        return bool(self.jobs)

    def close(self) -> None:
        """End what runs, as the process is about to; the next to open the data says that it was lost."""
        self._is_closed = True
        for job in list(self.jobs.values()):
            job.cancel()

    def refuse(self, request: Request, body: dict) -> None:
        """Answer any method that is not here."""
        raise unimplemented(f"{request.method} {request.url.path}")

    def check_project(self, request: Request, allow_public: bool = False) -> str:
        """Return the project of a request; BigQueryError unless it is the local one, or may be Google's public one."""
        project = request.path_params["project"]
        if project == PROJECT_NUMBER:  # a job knows no other name of its owner's project
            project = self.project
        if project != self.project and not (allow_public and project == PUBLIC):
            denied = f"User does not have bigquery.jobs.create permission in project {project}."
            only = f"The local BigQuery has one project, {self.project}."
            raise BigQueryError(f"Access Denied: Project {project}: {denied} {only}", "accessDenied")
        return project

    def parent(self, request: Request, cursor, allow_public: bool = False) -> tuple[str, str]:
        """Return project and dataset of a request; BigQueryError unless there is such a dataset."""
        project, dataset = self.check_project(request, allow_public), request.path_params["dataset"]
        self.warehouse.dataset(cursor, project, dataset)
        return project, dataset

    # Datasets

    def dataset_resource(self, project: str, id_: str, body: dict) -> dict:
        """Return a dataset in BigQuery's JSON."""
        reference = {"datasetReference": {"projectId": project, "datasetId": id_}}
        return {"location": LOCATION, **body, "kind": "bigquery#dataset", "id": f"{project}:{id_}", **reference}

    def list_datasets(self, request: Request, body: dict) -> dict:
        """datasets.list."""
        project = self.check_project(request, allow_public=True)
        resources = self.warehouse.resources(self.warehouse.cursor(), "dataset", project)
        found, more = _page(list(resources.items()), request.query_params)
        return {"datasets": [self.dataset_resource(project, *entry) for entry in found], **more}

    def create_dataset(self, request: Request, body: dict) -> dict:
        """datasets.insert."""
        project, id_ = self.check_project(request), body["datasetReference"]["datasetId"]
        with self.warehouse.transaction() as cursor:
            return self.dataset_resource(project, id_, self.warehouse.create_dataset(cursor, id_, body))

    def get_dataset(self, request: Request, body: dict) -> dict:
        """datasets.get."""
        project, id_ = self.check_project(request, allow_public=True), request.path_params["dataset"]
        return self.dataset_resource(project, id_, self.warehouse.dataset(self.warehouse.cursor(), project, id_))

    def update_dataset(self, request: Request, body: dict) -> dict:
        """datasets.patch and datasets.update."""
        with self.warehouse.transaction() as cursor:
            project, id_ = self.parent(request, cursor)
            new = _patched(self.warehouse.dataset(cursor, project, id_), body)
            self.warehouse.put(cursor, "dataset", project, id_, new)
        return self.dataset_resource(project, id_, new)

    def delete_dataset(self, request: Request, body: dict) -> Response:
        """datasets.delete."""
        self.check_project(request)
        with_contents = request.query_params.get("deleteContents", "").lower() == "true"
        with self.warehouse.transaction() as cursor:
            self.warehouse.drop_dataset(cursor, request.path_params["dataset"], with_contents)
        return Response(status_code=204)

    # Tables

    def table_name(self, request: Request, allow_public: bool = False) -> Name:
        """Return the name of the table of a request."""
        project = self.check_project(request, allow_public)
        return Name(project, request.path_params["dataset"], request.path_params["table"])

    def table_resource(self, name: Name, body: dict) -> dict:
        """Return a table in BigQuery's JSON."""
        named = {"kind": "bigquery#table", "id": str(name), "tableReference": name.reference}
        return {"location": LOCATION, **body, **named}

    def sized_table(self, cursor, name: Name) -> dict:
        """Return a table in BigQuery's JSON with its size."""
        body = self.warehouse.table(cursor, name)
        if body["type"] == "TABLE":
            body["numRows"] = str(self.warehouse.count(cursor, name))
            body["numBytes"] = str(self.warehouse.stored_bytes(cursor, name))
        return self.table_resource(name, body)

    def list_tables(self, request: Request, body: dict) -> dict:
        """tables.list."""
        cursor = self.warehouse.cursor()
        parent = self.parent(request, cursor, allow_public=True)
        tables = list(self.warehouse.resources(cursor, "table", ".".join(parent)).items())
        found, more = _page(tables, request.query_params)
        shown = [self.table_resource(Name(*parent, id_), entry) for id_, entry in found]
        return {"tables": shown, "totalItems": len(tables), **more}

    def create_table(self, request: Request, body: dict) -> dict:
        """tables.insert."""
        from helpers.local import bigquery_files

        project, dataset = self.check_project(request), request.path_params["dataset"]
        name, warehouse = Name(project, dataset, body["tableReference"]["tableId"]), self.warehouse
        schema = body.get("schema") or {}
        with warehouse.writing(name) as cursor:
            if "view" in body:
                query = self.prepare({"query": {"query": body["view"]["query"]}}, cursor, "view")
                source = query.sql(query.script.statements[0])
                warehouse.create_view(cursor, name, source, "VIEW", view=body["view"], **_chosen(body))
            elif "externalDataConfiguration" in body:
                definition = {"schema": schema, **body["externalDataConfiguration"]}
                bigquery_files.create_external(warehouse, cursor, name, definition)
            elif "materializedView" in body:
                raise unimplemented("A materialized view")
            else:
                warehouse.create_table(cursor, name, schema.get("fields", []), **_chosen(body))
            return self.sized_table(cursor, name)

    def get_table(self, request: Request, body: dict) -> dict:
        """tables.get."""
        return self.sized_table(self.warehouse.cursor(), self.table_name(request, allow_public=True))

    def update_table(self, request: Request, body: dict) -> dict:
        """tables.patch and tables.update."""
        name, warehouse = self.table_name(request), self.warehouse
        with warehouse.writing(name) as cursor:
            warehouse.table(cursor, name)
            if body.get("schema"):
                warehouse.change_schema(cursor, name, body["schema"]["fields"])
            new = _patched(warehouse.table(cursor, name), _chosen(body))
            warehouse.put(cursor, "table", name.schema, name.id, new)
            return self.sized_table(cursor, name)

    def delete_table(self, request: Request, body: dict) -> Response:
        """tables.delete."""
        name = self.table_name(request)
        with self.warehouse.writing(name) as cursor:
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
            fields = [field for field in fields if field["name"].lower() in selected.lower().split(",")]
        return self.rows(cursor, name, fields, request.query_params, {"kind": "bigquery#tableDataList"})

    def rows(self, cursor, name: Name, fields: list[dict], parameters, answer: dict) -> Response:
        """Return an answer with a page of a table's rows, which DuckDB has written as JSON."""
        total = self.warehouse.count(cursor, name)
        start = int(parameters.get("pageToken") or parameters.get("startIndex") or 0)
        count = max(1, _CELLS_PER_PAGE // max(1, len(fields)))
        if parameters.get("maxResults") is not None:
            count = min(count, int(parameters["maxResults"]))
        answer = {**answer, "totalRows": str(total)}
        if count and start + count < total:
            answer["pageToken"] = str(start + count)
        as_int64 = str(parameters.get("formatOptions.useInt64Timestamp")).lower() == "true"
        rows = self.warehouse.rows(cursor, name, fields, start, count, as_int64) if count else []
        if not rows:
            return JSONResponse(answer)
        return Response(f'{json.dumps(answer)[:-1]}, "rows": [{",".join(rows)}]}}', media_type="application/json")

    def insert_rows(self, request: Request, body: dict) -> dict:
        """tabledata.insertAll."""
        from helpers.local import bigquery_files

        name = self.table_name(request)
        if body.get("templateSuffix"):
            raise unimplemented("templateSuffix")
        with self.warehouse.writing(name) as cursor:
            errors = bigquery_files.insert(self.warehouse, cursor, name, body)
        return {"kind": "bigquery#tableDataInsertAllResponse", **({"insertErrors": errors} if errors else {})}

    # Models

    def model_resource(self, cursor, project: str, dataset: str, id_: str) -> dict:
        """Return a model in BigQuery's JSON."""
        body = self.warehouse.get(cursor, "model", f"{project}.{dataset}", id_)
        if body is None:
            raise not_found("Model", Name(project, dataset, id_))
        reference = {"projectId": project, "datasetId": dataset, "modelId": id_}
        return {"location": LOCATION, **body, "modelReference": reference}

    def list_models(self, request: Request, body: dict) -> dict:
        """models.list."""
        cursor = self.warehouse.cursor()
        parent = self.parent(request, cursor)
        names = list(self.warehouse.resources(cursor, "model", ".".join(parent)))
        found, more = _page(names, request.query_params)
        return {"models": [self.model_resource(cursor, *parent, id_) for id_ in found], **more}

    def get_model(self, request: Request, body: dict) -> dict:
        """models.get."""
        cursor = self.warehouse.cursor()
        return self.model_resource(cursor, *self.parent(request, cursor), request.path_params["model"])

    def update_model(self, request: Request, body: dict) -> dict:
        """models.patch."""
        with self.warehouse.transaction() as cursor:
            project, dataset = self.parent(request, cursor)
            id_ = request.path_params["model"]
            new = _patched(self.model_resource(cursor, project, dataset, id_), _chosen(body))
            self.warehouse.put(cursor, "model", f"{project}.{dataset}", id_, new)
            return new

    def delete_model(self, request: Request, body: dict) -> Response:
        """models.delete."""
        name = Name(self.check_project(request), request.path_params["dataset"], request.path_params["model"])
        with self.warehouse.writing(name) as cursor:
            self.warehouse.drop(cursor, name, kind="model")
        return Response(status_code=204)

    # Jobs

    def find_job(self, request: Request) -> dict:
        """Return the resource of the job of a request."""
        self.check_project(request)
        id_ = request.path_params["job"]
        if job := self.jobs.get(id_):
            return job.resource
        resource = self.warehouse.get(self.warehouse.cursor(), "job", self.project, id_)
        if resource is None:
            raise not_found("Job", f"{self.project}:{id_}")
        return resource

    def list_jobs(self, request: Request, body: dict) -> dict:
        """jobs.list, newest first."""
        self.check_project(request)
        known = self.warehouse.resources(self.warehouse.cursor(), "job", self.project)
        known |= {id_: job.resource for id_, job in list(self.jobs.items())}
        states = [state.upper() for state in request.query_params.getlist("stateFilter")]
        jobs = [{**job, **job["status"]} for job in known.values() if not states or job["status"]["state"] in states]
        jobs.sort(key=lambda job: int(job["statistics"]["creationTime"]), reverse=True)
        found, more = _page(jobs, request.query_params)
        return {"jobs": found, **more}

    def get_job(self, request: Request, body: dict) -> dict:
        """jobs.get."""
        return self.find_job(request)

    def cancel_job(self, request: Request, body: dict) -> dict:
        """jobs.cancel."""
        resource = self.find_job(request)
        if job := self.jobs.get(request.path_params["job"]):
            job.cancel()
            resource = job.resource
        return {"kind": "bigquery#jobCancelResponse", "job": resource}

    def delete_job(self, request: Request, body: dict) -> Response:
        """jobs.delete."""
        resource = self.find_job(request)
        if resource["status"]["state"] != "DONE":
            raise BigQueryError(f"Job {resource['jobReference']['jobId']} runs: cancel it first.", "invalid")
        self.warehouse.delete(self.warehouse.cursor(), "job", self.project, request.path_params["job"])
        return Response(status_code=204)

    async def create_job(self, request: Request) -> dict:
        """jobs.insert."""
        self.check_project(request)
        body = await _json(request)
        if body.get("configuration", {}).get("dryRun"):
            return await run_in_threadpool(self.dry_run, body["configuration"])
        return await self.start_and_tell(body)

    async def start_and_tell(self, body: dict, file: Path | None = None) -> dict:
        """Start a job and return its resource: of the job as it ended, if that is soon."""
        job = await run_in_threadpool(self.start, body, file)
        await job.wait(_QUICK_SECONDS)
        return job.resource

    def start(self, body: dict, file: Path | None = None) -> Job:
        """Start a job in a thread of its own; `file` is what an upload brought."""
        configuration, reference = body.get("configuration", {}), body.get("jobReference") or {}
        id_ = reference.get("jobId") or f"job_{secrets.token_urlsafe(21)}"
        kind = next((key for key in ("query", "load", "copy", "extract") if key in configuration), None)
        if kind is None or not re.fullmatch(r"[\w\-]{1,1024}", id_):
            raise BigQueryError("A job needs a good jobId, and one of query, load, copy or extract.", "invalid")
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
        }
        job = Job(resource, self.warehouse.cursor())
        with self._lock:
            if id_ in self.jobs or self.warehouse.get(job.cursor, "job", self.project, id_):
                raise BigQueryError(f"Already Exists: Job {self.project}:{LOCATION}.{id_}", "duplicate")
            self.jobs[id_] = job
        self.warehouse.put(job.cursor, "job", self.project, id_, resource)
        threading.Thread(target=self.run, args=(job, kind, file), name=id_, daemon=True).start()
        return job

    def run(self, job: Job, kind: str, file: Path | None) -> None:
        """Run a job to its end, whatever that is, and keep what came of it."""
        runs = {"query": self.run_query, "load": self.run_load, "copy": self.run_copy, "extract": self.run_extract}
        statistics, status = {}, {"state": "DONE"}
        try:
            statistics = runs[kind](job, file)
        except Exception as error:
            refused = error if isinstance(error, BigQueryError) else _failure(error)
            if job.is_cancelled.is_set():
                refused = BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
            elif refused is not error:
                log.exception("job %s", job.id)
            status |= {"errorResult": _problem(refused), "errors": [_problem(refused)]}
        if file:
            file.unlink(missing_ok=True)
        statistics = {**job.resource["statistics"], **statistics, "endTime": now()}
        job.resource = {**job.resource, "statistics": statistics, "status": status}
        if not (self._is_closed and "errorResult" in status):
            self.warehouse.put(self.warehouse.cursor(), "job", self.project, job.id, job.resource)
        self.jobs.pop(job.id)
        job.done.set_result(None)

    # Queries

    def prepare(self, configuration: dict, cursor, id_: str, should_stop: Callable[[], bool] = lambda: False):
        """Return the query of a job's configuration, ready to run."""
        from helpers.local.bigquery_sql import Script
        from helpers.local.bigquery_statements import Query

        settings = configuration["query"]
        if settings.get("useLegacySql"):
            raise unimplemented("Legacy SQL", "write GoogleSQL")
        if unknown := sorted(key for key, value in settings.items() if value and key not in _QUERY_SETTINGS):
            raise unimplemented(f"The setting {unknown[0]} of a query")
        dataset = settings.get("defaultDataset", {})
        default = dataset.get("projectId") or self.project, dataset.get("datasetId")
        script = Script(settings["query"], self.project, default, settings.get("queryParameters", ()))
        results = Name(self.project, RESULTS, id_)
        return Query(self.warehouse, cursor, script, configuration, results, should_stop)

    def run_query(self, job: Job, file: None) -> dict:
        """Run a query, and return its statistics."""
        query = self.prepare(job.resource["configuration"], job.cursor, job.id, job.is_cancelled.is_set)
        statistics = query.run()
        if query.destination:
            settings = {**job.resource["configuration"]["query"], "destinationTable": query.destination.reference}
            job.resource = {**job.resource, "configuration": {**job.resource["configuration"], "query": settings}}
        return {"query": statistics, "totalBytesProcessed": statistics["totalBytesProcessed"]}

    def dry_run(self, configuration: dict) -> dict:
        """Return the job that a query would be, without running it."""
        if "query" not in configuration:
            raise unimplemented("A dry run of anything but a query")
        statistics = self.prepare(configuration, self.warehouse.cursor(), "dry_run").run()
        processed = {"totalBytesProcessed": statistics["totalBytesProcessed"]}
        return {
            "kind": "bigquery#job",
            "jobReference": {"projectId": self.project, "location": LOCATION},
            "configuration": {**configuration, "jobType": "QUERY"},
            "status": {"state": "DONE"},
            "statistics": {"creationTime": now(), "query": statistics, **processed},
        }

    async def query(self, request: Request) -> dict | Response:
        """jobs.query: start a query, and answer with its first rows if it ends in time."""
        self.check_project(request)
        body = await _json(request)
        settings = {key: value for key, value in body.items() if key not in _REQUEST_SETTINGS}
        configuration = {"query": settings, **_chosen(body, ("dryRun", "labels"))}
        if body.get("dryRun"):
            job = await run_in_threadpool(self.dry_run, configuration)
            told = _chosen(job["statistics"]["query"], ("schema", "totalBytesProcessed", "cacheHit"))
            return {"kind": "bigquery#queryResponse", "jobReference": job["jobReference"], "jobComplete": True, **told}
        reference = {"location": body.get("location")}
        job = await run_in_threadpool(self.start, {"configuration": configuration, "jobReference": reference})
        await job.wait(int(body.get("timeoutMs", _WAIT_MILLISECONDS)) / 1000)
        parameters = {f"formatOptions.{key}": value for key, value in body.get("formatOptions", {}).items()}
        parameters["maxResults"] = body.get("maxResults")
        return await run_in_threadpool(self.results, job.resource, parameters, "bigquery#queryResponse")

    async def get_results(self, request: Request) -> dict | Response:
        """jobs.getQueryResults: wait for a query, and answer with a page of its rows."""
        parameters = request.query_params
        if job := self.jobs.get(request.path_params["job"]):
            await job.wait(int(parameters.get("timeoutMs", _WAIT_MILLISECONDS)) / 1000)
        resource = await run_in_threadpool(self.find_job, request)
        return await run_in_threadpool(self.results, resource, parameters, "bigquery#getQueryResultsResponse")

    def results(self, job: dict, parameters, kind: str) -> dict | Response:
        """Return what came of a query, with a page of its rows."""
        answer = {"kind": kind, "jobReference": job["jobReference"], "jobComplete": job["status"]["state"] == "DONE"}
        if not answer["jobComplete"]:
            return answer
        if error := job["status"].get("errorResult"):
            raise BigQueryError(error["message"], error["reason"])
        told = ("schema", "totalBytesProcessed", "cacheHit", "numDmlAffectedRows", "dmlStats", "statementType")
        answer |= _chosen(job["statistics"]["query"], told)
        answer |= _chosen(job["statistics"], ("creationTime", "startTime", "endTime")) | {"location": LOCATION}
        destination = job["configuration"]["query"].get("destinationTable")
        if "schema" not in answer or not destination:
            return answer
        return self.rows(self.warehouse.cursor(), Name.of(destination), answer["schema"]["fields"], parameters, answer)

    # Files

    def run_load(self, job: Job, file: Path | None) -> dict:
        """Load files into a table, and return the statistics."""
        import duckdb

        from helpers.local import bigquery_files

        settings, warehouse = job.resource["configuration"]["load"], self.warehouse
        name, write = Name.of(settings["destinationTable"]), settings.get("writeDisposition") or "WRITE_APPEND"
        files = [file] if file else bigquery_files.files_of(warehouse, settings.get("sourceUris", []))
        with warehouse.writing(name, job.cursor) as cursor:
            is_more = write == "WRITE_APPEND" and warehouse.find(cursor, name)
            before = warehouse.count(cursor, name) if is_more else 0
            try:
                known = warehouse.table(cursor, name)["schema"]["fields"] if is_more else None
                query, fields = bigquery_files.read(cursor, settings, files, known)
                warehouse.store(cursor, name, query, fields, write, settings.get("createDisposition"))
            except duckdb.Error as error:
                raise bigquery_files.unreadable(error) from None
            if properties := _chosen(settings.get("destinationTableProperties") or {}):
                warehouse.describe(cursor, name, **properties)
            rows, size = warehouse.count(cursor, name) - before, warehouse.stored_bytes(cursor, name)
        read = {"inputFiles": str(len(files)), "inputFileBytes": str(sum(path.stat().st_size for path in files))}
        return {"load": {**read, "outputRows": str(rows), "outputBytes": str(size), "badRecords": "0"}}

    def run_copy(self, job: Job, file: None) -> dict:
        """Copy tables into one, and return the statistics."""
        settings, warehouse = job.resource["configuration"]["copy"], self.warehouse
        if settings.get("operationType", "COPY") not in ("COPY", "CLONE"):
            raise unimplemented(f"Copying with operationType {settings['operationType']}")
        name, write = Name.of(settings["destinationTable"]), settings.get("writeDisposition") or "WRITE_EMPTY"
        copied = 0
        with warehouse.writing(name, job.cursor) as cursor:
            for source in map(Name.of, settings.get("sourceTables") or [settings["sourceTable"]]):
                fields = warehouse.table(cursor, source)["schema"]["fields"]
                warehouse.store(cursor, name, f"FROM {source.sql}", fields, write, settings.get("createDisposition"))
                copied, write = copied + warehouse.count(cursor, source), "WRITE_APPEND"
        return {"copy": {"copiedRows": str(copied)}}

    def run_extract(self, job: Job, file: None) -> dict:
        """Write a table to a bucket, and return the statistics."""
        from helpers.local import bigquery_files

        settings, warehouse = job.resource["configuration"]["extract"], self.warehouse
        if "sourceModel" in settings:
            raise unimplemented("Exporting a model")
        name = Name.of(settings["sourceTable"])
        fields = warehouse.table(job.cursor, name)["schema"]["fields"]
        nested = [field["name"] for field in fields if field["type"] == "RECORD" or field["mode"] == "REPEATED"]
        if nested and settings.get("destinationFormat", "CSV") == "CSV":
            raise BigQueryError(f"Operation cannot be performed on a nested schema. Field: {nested[0]}", "invalid")
        count = bigquery_files.write(warehouse, job.cursor, f"FROM {name.sql}", settings)
        return {"extract": {"destinationUriFileCounts": ["1"] * count}}

    # Uploads

    async def upload(self, request: Request) -> dict | Response:
        """jobs.insert with the file to load: in one request, or as a resumable upload in several."""
        self.check_project(request)
        kind = request.query_params.get("uploadType")
        if request.query_params.get("upload_id"):
            return await self.resume(request)
        path = self.warehouse.uploads / secrets.token_hex(16)
        if kind == "multipart":
            body, content = _parts(request.headers.get("content-type", ""), await request.body())
            path.write_bytes(content)
            return await self.start_and_tell(body, path)
        if kind != "resumable":
            raise unimplemented(f"uploadType={kind}", "use multipart or resumable")
        self._uploads[path.name] = await _json(request)
        path.touch()
        url = request.url.replace_query_params(uploadType="resumable", upload_id=path.name)
        return Response(headers={"Location": str(url)})

    async def resume(self, request: Request) -> dict | Response:
        """Take a piece of a resumable upload, or say how much there is."""
        id_ = request.query_params["upload_id"]
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", request.headers.get("content-range", ""))
        if id_ not in self._uploads or not match:
            raise not_found("Upload", id_)
        path = self.warehouse.uploads / id_
        with path.open("r+b") as file:
            file.seek(int(match[1] or path.stat().st_size))
            async for piece in request.stream():
                file.write(piece)
        size = path.stat().st_size
        if match[2] == str(size):
            return await self.start_and_tell(self._uploads.pop(id_), path)
        return Response(status_code=308, headers={"Range": f"bytes=0-{size - 1}"} if size else {})


def _parts(content_type: str, body: bytes) -> tuple[dict, bytes]:
    # The JSON and the file of a multipart upload.
    match = re.search(r'boundary="?([^";]+)', content_type)
    pieces = body.split(b"--" + match[1].encode()) if match else []
    if len(pieces) < 4:
        raise BigQueryError("A multipart upload needs two parts: JSON and the file.", "invalid")
    first, second = (piece.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for piece in pieces[1:3])
    return json.loads(first), second
