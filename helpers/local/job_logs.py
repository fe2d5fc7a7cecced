"""Cloud Logging's entries.list, over what the replicas of jobs print."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from helpers.local import PROJECT, PROJECT_NUMBER, errors

COMPARISON = re.compile(r'\s*resource\.(type|labels\.job_id|labels\.task_name)\s*=\s*"([\w-]*)"\s*')
OURS = {f"projects/{PROJECT}", f"projects/{PROJECT_NUMBER}"}
PAGE = 50  # entries, if a request does not say


def routes(folder: Path) -> list[Route]:
    """Return the routes that read the logs of the jobs in a folder, one folder for each."""

    async def list_entries(request: Request) -> JSONResponse:
        return JSONResponse(await run_in_threadpool(answer, folder, await request.json()))

    return [Route("/v2/entries:list", list_entries, methods=["POST"])]


def answer(folder: Path, request: dict) -> dict:
    """Return a page of the log of the one job that a request's filter names, in the order in which it was printed."""
    names = request.get("resourceNames", [])
    if other := [name for name in names if name not in OURS]:
        raise errors.other_project(other[0].removeprefix("projects/"))
    wanted = {}
    for part in re.split(r"\bAND\b|\n", request.get("filter", "").strip()):
        if (found := COMPARISON.fullmatch(part)) is None:
            raise errors.unimplemented(
                f"The filter {part.strip()!r}",
                'use resource.type="ml_job" AND resource.labels.job_id="..." AND resource.labels.task_name="..."',
            )
        wanted[found[1]] = found[2]
    if not wanted.get("labels.job_id"):
        raise errors.unimplemented("A log without a job", 'give resource.labels.job_id="..."')
    is_job = wanted.get("type", "ml_job") == "ml_job"
    found = list(entries(folder, wanted["labels.job_id"], wanted.get("labels.task_name"))) if is_job else []
    if request.get("orderBy", "").endswith("desc"):
        found.reverse()
    start = int(request.get("pageToken") or 0)
    end = start + (request.get("pageSize") or PAGE)
    return {"entries": found[start:end]} | ({"nextPageToken": str(end)} if end < len(found) else {})


def entries(folder: Path, job: str, replica: str | None) -> Iterator[dict]:
    """Yield the LogEntries of a job; a line that is a JSON object becomes one with its fields, as on Google Cloud.

    They have no time: replicas only print, and follow each other here.
    """
    for path in sorted((folder / job).rglob(f"{replica or '*'}.log")):
        labels = {"job_id": job, "task_name": path.stem, "project_id": PROJECT}
        for number, line in enumerate(path.read_text(errors="replace").splitlines()):
            entry = {
                "logName": f"projects/{PROJECT}/logs/{path.stem}",
                "resource": {"type": "ml_job", "labels": labels},
                "insertId": f"{path.stem}-{number}",
                "severity": "DEFAULT",
            }
            fields = as_object(line)
            if fields is None:
                yield entry | {"textPayload": line}
            else:
                yield entry | {"severity": str(fields.pop("severity", "DEFAULT")), "jsonPayload": fields}


def as_object(line: str) -> dict | None:
    """Return the JSON object that a line is, if it is one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
