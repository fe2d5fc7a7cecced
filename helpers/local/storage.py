"""Cloud Storage over HTTP: the JSON API, and the way of the XML API to read an object.

One table names the calls that are answered; all others are refused. A call is matched on the path as it was sent, since
an object's name may hold slashes, which are quoted there. Uploads stream into drafts, downloads from open files.
"""

import asyncio
import re
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from email.message import Message
from email.parser import BytesParser
from http import HTTPStatus
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes, urlsplit
from xml.sax.saxutils import escape

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from helpers.local import MANAGED_BUCKET, PROJECT, PROJECT_NUMBER, errors
from helpers.local import storage_resources as resources
from helpers.local import storage_transfers as transfers
from helpers.local.buckets import Buckets, Draft, NoSuchBucket, Object, StorageError

PAGE_SIZE = 1000

# The calls by method and path, each with the method of `Storage` that answers it.
CALLS = {
    "GET storage/v1/b": "list_buckets",
    "POST storage/v1/b": "insert_bucket",
    "GET storage/v1/b/{bucket}": "get_bucket",
    "PATCH storage/v1/b/{bucket}": "change_bucket",
    "PUT storage/v1/b/{bucket}": "change_bucket",
    "DELETE storage/v1/b/{bucket}": "delete_bucket",
    "GET storage/v1/b/{bucket}/iam": "get_policy",
    "PUT storage/v1/b/{bucket}/iam": "set_policy",
    "GET storage/v1/b/{bucket}/iam/testPermissions": "test_permissions",
    "GET storage/v1/b/{bucket}/storageLayout": "get_layout",
    "GET storage/v1/projects/{project}/serviceAccount": "get_service_account",
    "GET storage/v1/b/{bucket}/o": "list_objects",
    "GET storage/v1/b/{bucket}/o/{name}": "get_object",
    "PATCH storage/v1/b/{bucket}/o/{name}": "change_object",
    "PUT storage/v1/b/{bucket}/o/{name}": "change_object",
    "DELETE storage/v1/b/{bucket}/o/{name}": "delete_object",
    "POST storage/v1/b/{bucket}/o/{name}/compose": "compose",
    "POST storage/v1/b/{bucket}/o/{name}/copyTo/b/{to_bucket}/o/{to_name}": "copy",
    "POST storage/v1/b/{bucket}/o/{name}/rewriteTo/b/{to_bucket}/o/{to_name}": "rewrite",
    "POST storage/v1/b/{bucket}/o/{name}/moveTo/o/{to_name}": "move",
    "GET download/storage/v1/b/{bucket}/o/{name}": "download",
    "POST upload/storage/v1/b/{bucket}/o": "upload",
    "PUT upload/storage/v1/b/{bucket}/o": "resume",
    "DELETE upload/storage/v1/b/{bucket}/o": "cancel",
    "POST batch/storage/v1": "batch",
}
PATTERNS = {re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", call)): function for call, function in CALLS.items()}
STREAMING = ("upload", "resume", "cancel")  # the calls that read their bodies themselves
READING = ("list_objects", "get_object", "download")  # the calls that are relayed for buckets that are elsewhere
BATCHED = {function for call, function in CALLS.items() if " storage/v1/" in call}


def routes(buckets: Buckets, relay: Callable[[Request], Response]) -> list[Route]:
    """Return what serves the hosts of Cloud Storage.

    `relay` is called, in a thread, for a request that reads objects of a bucket which is not here.
    """
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    return [Route("/{path:path}", Storage(buckets, relay).answer, methods=methods)]


@dataclass(frozen=True)
class Call:
    """One request, of HTTP or of those inside a batch; `base` is the scheme and host for links."""

    method: str
    query: QueryParams
    headers: Headers
    base: str
    body: bytes = b""
    request: Request | None = None

    def json(self) -> dict:
        """Return the resource in the body: an empty one for an empty body."""
        return resources.parse(self.body)


def find_call(method: str, path: str) -> tuple[str, dict[str, str]]:
    """Return the method of `Storage` that answers a call of the JSON API, and its arguments."""
    for pattern, function in PATTERNS.items():
        if found := pattern.fullmatch(f"{method} {path}"):
            return function, unquoted(found.groupdict())
    word = next((part for part in path.split("/") if part in resources.INSTEAD), "")
    raise resources.unimplemented(f"{method} /{path}", word)


def find_xml_call(method: str, path: str, bucket: str | None) -> tuple[str, dict[str, str]]:
    """Return the same for the XML API, where a bucket may be named by the host."""
    if bucket is None:
        bucket, _, path = path.partition("/")
    if method != "GET" or not path:
        raise resources.unimplemented(f"{method} /{path} of the XML API", "")
    return "download", unquoted({"bucket": bucket, "name": path})


def unquoted(names: dict[str, str]) -> dict[str, str]:
    """Return parts of a path as they were before they were quoted."""
    try:
        return {part: unquote_to_bytes(name).decode() for part, name in names.items()}
    except UnicodeDecodeError:
        raise StorageError(400, "invalid", "The names of buckets and objects must be valid UTF-8.") from None


# Refusals


def refusal(error: Exception, as_xml: bool = False) -> Response:
    """Return the answer for an error that a client can understand; raise any other."""
    if isinstance(error, OSError | sqlite3.OperationalError):
        if full := errors.of_system(error):
            error = StorageError(507, "insufficientStorage", full.message)
        else:
            error = StorageError(403, "forbidden", f"The local Cloud Storage cannot use its own files: {error}.")
    if not isinstance(error, StorageError):
        raise error
    if error.status == 304:
        return Response(status_code=304)
    if as_xml:
        codes = {400: "InvalidArgument", 404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange"}
        code = "NoSuchBucket" if isinstance(error, NoSuchBucket) else codes.get(error.status, "NotImplemented")
        text = f"<Error><Code>{code}</Code><Message>{escape(str(error))}</Message></Error>"
        content = f"<?xml version='1.0' encoding='UTF-8'?>{text}"
        return Response(content, error.status, error.headers, "application/xml; charset=UTF-8")
    details = {"message": str(error), "domain": "global", "reason": error.reason}
    content = {"error": {"code": error.status, "message": str(error), "errors": [details]}}
    return JSONResponse(content, error.status, error.headers)


class Storage:
    """Answers the calls in `CALLS`, in a thread where their bodies do not stream."""

    def __init__(self, buckets: Buckets, relay: Callable[[Request], Response]):
        """Serve buckets; see `routes`."""
        self.buckets = buckets
        self.relay = relay
        # The drafts of uploads under way, with their turns: a client may be back before its old connection has ended.
        self.drafts: dict[str, tuple[Draft, asyncio.Lock]] = {}

    async def answer(self, request: Request) -> Response:
        """Answer a request, or refuse it."""
        method = "GET" if request.method == "HEAD" else request.method
        path = request.scope["raw_path"].decode("latin-1").lstrip("/")
        as_xml = not re.match(r"(storage/v1|upload|download|batch)(/|$)", path)
        base = f"{request.url.scheme}://{request.headers.get('host', '')}"
        function = ""
        try:
            if as_xml:
                function, names = find_xml_call(method, path, request.path_params.get("bucket"))
            else:
                function, names = find_call(method, path)
            body = b"" if function in STREAMING else await request.body()
            call = Call(method, request.query_params, request.headers, base, body, request)
            resources.refuse_parameters(call.query, call.headers)
            if function in STREAMING:
                return await getattr(self, function)(call, **names)
            return await run_in_threadpool(self.perform, function, call, names)
        except NoSuchBucket as error:
            if function in READING:
                return await run_in_threadpool(self.relay, request)
            return refusal(error, as_xml)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return refusal(error, as_xml)

    def perform(self, function: str, call: Call, names: dict[str, str]) -> Response:
        """Answer a call by the method of this name, which returns a response, a resource or nothing."""
        result = getattr(self, function)(call, **names)
        if isinstance(result, Response):
            return result
        return Response(status_code=204) if result is None else JSONResponse(result)

    def batch(self, call: Call) -> Response:
        """Answer the calls in a multipart/mixed body, in their order."""
        kind = f"Content-Type: {call.headers.get('content-type')}\r\n\r\n".encode()
        message = BytesParser().parsebytes(kind + call.body)
        if not message.is_multipart():
            raise StorageError(400, "badRequest", "Malformed batch: expected multipart/mixed with calls in its parts.")
        boundary = uuid.uuid4().hex
        parts = [f"--{boundary}\r\n".encode() + self.answer_part(part, call.base) for part in message.get_payload()]
        body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
        return Response(body, media_type=f"multipart/mixed; boundary={boundary}")

    def answer_part(self, part: Message, base: str) -> bytes:
        """Return the part that answers one part of a batch."""
        head, body = re.split(rb"\r?\n\r?\n", part.get_payload(decode=True) + b"\n\n", maxsplit=1)
        line, _, fields = head.decode().partition("\n")
        try:
            method, url, _ = line.split(" ", 2)
            where = urlsplit(url)
            function, names = find_call(method, where.path.lstrip("/"))
            if function not in BATCHED or "alt=media" in where.query:
                raise StorageError(400, "badRequest", "A batch cannot hold uploads, downloads or batches.")
            headers = Headers(dict(BytesParser().parsebytes(fields.encode()).items()))
            call = Call(method, QueryParams(where.query), headers, base, body.strip())
            resources.refuse_parameters(call.query, call.headers)
            response = self.perform(function, call, names)
        except Exception as error:
            response = refusal(error)
        identity = str(part.get("content-id", "<1>")).replace("<", "<response-", 1)
        heading = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}"
        lines = ["Content-Type: application/http", f"Content-ID: {identity}", "", heading]
        lines += [f"{name.title()}: {value}" for name, value in response.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + response.body

    # Buckets

    def shown_bucket(self, call: Call, bucket: str) -> dict:
        """Return a bucket as the JSON API shows it."""
        return resources.bucket_resource(bucket, self.buckets.bucket(bucket), call.base)

    def known_bucket(self, call: Call, bucket: str) -> dict:
        """Return what is known of a bucket that meets the preconditions of a call."""
        known = self.buckets.bucket(bucket)
        resources.condition(call.query, reads=call.method == "GET")(SimpleNamespace(**known))
        return known

    def list_buckets(self, call: Call) -> dict:
        """List the buckets: all belong to the one project, except the one that is Vertex AI's own."""
        prefix, start = call.query.get("prefix", ""), resources.from_token(call.query.get("pageToken"))
        limit = min(resources.number(call.query, "maxResults") or PAGE_SIZE, PAGE_SIZE)
        names = [name for name in self.buckets.buckets() if name != MANAGED_BUCKET]
        names = [name for name in names if name.startswith(prefix) and name >= start]
        items = [self.shown_bucket(call, name) for name in names[:limit]]
        following = {"nextPageToken": resources.to_token(names[limit])} if len(names) > limit else {}
        return {"kind": "storage#buckets", "items": items} | following

    def insert_bucket(self, call: Call) -> dict:
        """Make a bucket."""
        body = call.json()
        bucket, location = str(body.get("name", "")), str(body.get("location") or "US").upper()
        self.buckets.create(bucket, location, resources.merged({}, resources.settable(body, resources.BUCKET_FIELDS)))
        return self.shown_bucket(call, bucket)

    def get_bucket(self, call: Call, bucket: str) -> dict:
        """Describe a bucket."""
        self.known_bucket(call, bucket)
        return self.shown_bucket(call, bucket)

    def change_bucket(self, call: Call, bucket: str) -> dict:
        """Change the fields that are given (PATCH), or all that can be set (PUT)."""
        change = resources.settable(call.json(), resources.BUCKET_FIELDS)
        with self.buckets.lock:
            known = self.known_bucket(call, bucket)
            resource = resources.merged(known["resource"] if call.method == "PATCH" else {}, change)
            self.buckets.change_bucket(bucket, known | {"resource": resource})
        return self.shown_bucket(call, bucket)

    def delete_bucket(self, call: Call, bucket: str) -> None:
        """Delete an empty bucket."""
        with self.buckets.lock:
            self.known_bucket(call, bucket)
            self.buckets.delete(bucket)

    def get_layout(self, call: Call, bucket: str) -> dict:
        """Say where a bucket is, and that its namespace is flat."""
        shown = self.shown_bucket(call, bucket)
        layout = {"kind": "storage#storageLayout", "bucket": bucket, "hierarchicalNamespace": {"enabled": False}}
        return layout | {field: shown[field] for field in ("location", "locationType")}

    def get_policy(self, call: Call, bucket: str) -> dict:
        """Return the policy of a bucket. It is kept, but nobody is kept out: who has a token may do everything."""
        known = self.buckets.bucket(bucket)
        owners = [f"projectEditor:{PROJECT}", f"projectOwner:{PROJECT}"]
        policy = {"version": 1, "bindings": [{"role": "roles/storage.legacyBucketOwner", "members": owners}]}
        names = {"kind": "storage#policy", "resourceId": f"projects/_/buckets/{bucket}"}
        return names | (known["policy"] or policy) | {"etag": resources.etag(SimpleNamespace(**known))}

    def set_policy(self, call: Call, bucket: str) -> dict:
        """Replace the policy of a bucket, unless it has changed since the client read it."""
        policy = call.json()
        with self.buckets.lock:
            known = self.buckets.bucket(bucket)
            if policy.pop("etag", None) not in (None, "", resources.etag(SimpleNamespace(**known))):
                raise StorageError(412, "conditionNotMet", "The policy has changed since it was read: read it again.")
            self.buckets.change_bucket(bucket, known | {"policy": policy})
        return self.get_policy(call, bucket)

    def test_permissions(self, call: Call, bucket: str) -> dict:
        """Grant what is asked for."""
        self.buckets.folder(bucket)
        return {"kind": "storage#testIamPermissionsResponse", "permissions": call.query.getlist("permissions")}

    def get_service_account(self, call: Call, project: str) -> dict:
        """Return the account that Cloud Storage itself has in a project."""
        address = f"service-{PROJECT_NUMBER}@gs-project-accounts.iam.gserviceaccount.com"
        return {"kind": "storage#serviceAccount", "email_address": address}

    # Objects

    def list_objects(self, call: Call, bucket: str) -> dict:
        """List a page of objects; a file that a job wrote shows its checksum once it has been read."""
        query = call.query
        objects, prefixes, following = self.buckets.page(
            bucket,
            limit=min(resources.number(query, "maxResults") or PAGE_SIZE, PAGE_SIZE),
            start=max(query.get("startOffset", ""), resources.from_token(query.get("pageToken"))),
            end=query.get("endOffset", ""),
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            with_marks=query.get("includeTrailingDelimiter", "").lower() == "true",
            matches=resources.glob(query["matchGlob"]).fullmatch if query.get("matchGlob") else None,
        )
        answer = {
            "items": [resources.object_resource(found, call.base) for found in objects],
            "prefixes": prefixes,
            "nextPageToken": following and resources.to_token(following),
        }
        return {"kind": "storage#objects"} | {field: value for field, value in answer.items() if value}

    def get_object(self, call: Call, bucket: str, name: str) -> dict | Response:
        """Describe an object, or download it with `alt=media`."""
        if call.query.get("alt") == "media":
            return self.download(call, bucket, name)
        found = self.buckets.find(bucket, name)
        resources.existing(call.query, bucket, name, reads=True)(found)
        resources.check_etag(call.headers, found)
        # A checksum may cost reading the file: not for TensorFlow, which asks for the size alone, and often.
        if re.search(r"crc32c|\*|^$", call.query.get("fields", "")):
            found = self.buckets.checked(found)
        return resources.object_resource(found, call.base)

    def download(self, call: Call, bucket: str, name: str) -> Response:
        """Stream an object or a range of it, unzipped if it was stored as gzip and the client does not take that."""
        found, file = self.buckets.open(bucket, name)
        with ExitStack() as unless_streamed:
            unless_streamed.enter_context(file)
            resources.existing(call.query, bucket, name, reads=True)(found)
            resources.check_etag(call.headers, found)
            unzip = (
                found.resource.get("contentEncoding") == "gzip"
                and "gzip" not in call.headers.get("accept-encoding", "")
                and "no-transform" not in found.resource.get("cacheControl", "")
            )
            span = None if unzip else transfers.byte_range(call.headers.get("range"), found.size)
            start, end = span or (0, found.size)
            headers = resources.download_headers(found if span else self.buckets.checked(found))
            if unzip:
                headers.pop("Content-Encoding")
            else:
                headers |= {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
            if span:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
            status = 206 if span else 200
            if call.request.method == "HEAD":
                return Response(None, status, headers)
            unless_streamed.pop_all()
        content = transfers.pieces(file, start, float("inf") if unzip else end - start, unzip)
        return StreamingResponse(content, status, headers)

    def change_object(self, call: Call, bucket: str, name: str) -> dict:
        """Change the metadata that is given (PATCH), or all that can be set (PUT)."""
        change = resources.settable(call.json(), resources.OBJECT_FIELDS)

        def resource_of(old):
            if call.method == "PUT":
                old = {field: old[field] for field in old.keys() - resources.OBJECT_FIELDS}
            return resources.merged(old, change)

        found = self.buckets.change(bucket, name, resources.existing(call.query, bucket, name), resource_of)
        return resources.object_resource(self.buckets.checked(found), call.base)

    def delete_object(self, call: Call, bucket: str, name: str) -> None:
        """Delete an object."""
        self.buckets.remove(bucket, name, resources.existing(call.query, bucket, name))

    def compose(self, call: Call, bucket: str, name: str) -> dict:
        """Join up to 32 objects of a bucket into one, which has no MD5, as in Google's."""
        body = call.json()
        sources = resources.of_kind(list, body.get("sourceObjects"), "sourceObjects")
        if not 1 <= len(sources) <= 32:
            message = f"The number of source components provided ({len(sources)}) is not between 1 and the maximum (32)"
            raise StorageError(400, "invalid", message)
        resource = resources.new_resource(resources.of_kind(dict, body.get("destination"), "destination"))
        components, parts = 0, set()
        with self.buckets.draft() as draft:
            for source in sources:
                part, wanted = resources.compose_source(source)
                found, file = self.buckets.open(bucket, part)
                with file:
                    resources.existing(wanted, bucket, part)(found)
                    draft.append(file)
                components += found.resource.get("componentCount", 1)
                parts.add(part)
            resource["componentCount"] = components
            checksums = draft.checksums() | {"md5": None}
            made = self.buckets.put(bucket, name, draft, resource, resources.condition(call.query), checksums)
        if body.get("deleteSourceObjects"):
            for part in parts - {name}:
                self.buckets.remove(bucket, part, lambda current: None)
        return resources.object_resource(made, call.base)

    def copied(self, call: Call, bucket: str, name: str, to_bucket: str, to_name: str) -> Object:
        """Copy an object with its metadata, except what a call gives anew."""
        found, file = self.buckets.open(bucket, name)
        with file, self.buckets.draft() as draft:
            resources.existing(call.query, bucket, name, "ifSource")(found)
            change = resources.merged({}, resources.settable(call.json(), resources.OBJECT_FIELDS))
            draft.append(file)
            checksums = draft.checksums() | {"md5": found.md5}
            check = resources.condition(call.query)
            return self.buckets.put(to_bucket, to_name, draft, found.resource | change, check, checksums)

    def copy(self, call: Call, **names: str) -> dict:
        """Copy an object."""
        return resources.object_resource(self.copied(call, **names), call.base)

    def rewrite(self, call: Call, **names: str) -> dict:
        """Copy an object of any size in one call."""
        made = self.copied(call, **names)
        sizes = {"totalBytesRewritten": str(made.size), "objectSize": str(made.size)}
        resource = resources.object_resource(made, call.base)
        return {"kind": "storage#rewriteResponse", "done": True, "resource": resource} | sizes

    def move(self, call: Call, bucket: str, name: str, to_name: str) -> dict:
        """Copy an object inside its bucket, then delete it under its old name."""
        made = self.copied(call, bucket, name, bucket, to_name)
        if name != to_name:
            self.buckets.remove(bucket, name, lambda current: None)
        return resources.object_resource(made, call.base)

    # Uploads

    async def upload(self, call: Call, bucket: str) -> Response:
        """Take an object in one request, or begin to take it in several."""
        kind = call.query.get("uploadType")
        if kind == "resumable":
            body = {"contentType": call.headers.get("x-upload-content-type")}
            body |= resources.parse(await call.request.body())
            return await run_in_threadpool(self.begin, call, bucket, body)
        with self.buckets.draft() as draft:
            if kind == "multipart":
                content = transfers.related(call.request)
                body = await anext(content)
            elif kind == "media":
                content = transfers.blocks(call.request)
                body = {"contentType": call.headers.get("content-type")}
            else:
                raise StorageError(400, "invalid", f"Invalid uploadType: {kind!r}")
            async for data in content:
                await run_in_threadpool(draft.write, data)
            return await run_in_threadpool(self.finish, call, bucket, call.query, body, draft)

    def finish(self, call: Call, bucket: str, query: QueryParams, body: dict, draft: Draft) -> Response:
        """Make a draft the object that the query and the body of the first request describe."""
        transfers.verify(draft, body, call.headers)
        encoding = {"contentEncoding": query["contentEncoding"]} if "contentEncoding" in query else {}
        resource, name = resources.new_resource(body | encoding), resources.object_name(query, body)
        made = self.buckets.put(bucket, name, draft, resource, resources.condition(query), draft.checksums())
        return JSONResponse(resources.object_resource(made, call.base))

    def begin(self, call: Call, bucket: str, body: dict) -> Response:
        """Begin an upload that would be allowed now, and say where to send it."""
        resources.new_resource(body)
        resources.condition(call.query)(self.buckets.find(bucket, resources.object_name(call.query, body)))
        upload = self.buckets.begin_upload(bucket, {"query": dict(call.query), "body": body})
        where = f"{call.base}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
        return transfers.bare(200, {"Location": where, "X-GUploader-UploadID": upload})

    async def resume(self, call: Call, bucket: str) -> Response:
        """Take a part of an upload, or none, and say how much has come; what completes it makes it an object."""
        upload = call.query.get("upload_id", "")
        first, total, is_end = transfers.content_range(call.headers.get("content-range"))
        request = await run_in_threadpool(self.buckets.upload, bucket, upload)
        query, body = QueryParams(request["query"]), request["body"]
        draft, turn = self.drafts.setdefault(upload, (self.buckets.draft(upload), asyncio.Lock()))
        async with turn:
            try:
                await run_in_threadpool(draft.catch_up)
            except FileNotFoundError:
                # It is an object already, and the client has missed the answer.
                names = {"bucket": bucket, "name": resources.object_name(query, body)}
                return await run_in_threadpool(self.perform, "get_object", replace(call, query=QueryParams()), names)
            if first is not None and first > draft.size:
                limit = f"which exceeds already uploaded size of {draft.size} byte(s)"
                message = f"According to the Content-Range header, the upload offset is {first} byte(s), {limit}."
                raise StorageError(400, "invalid", message)
            try:
                if first is not None:
                    await transfers.take(call.request, draft, first)
                if not is_end and (total is None or draft.size < total):
                    return transfers.bare(308, {"Range": f"bytes=0-{draft.size - 1}"} if draft.size else {})
                if total is not None and draft.size > total:
                    raise StorageError(400, "invalid", f"{draft.size} bytes came for an upload of {total} bytes.")
                answer = await run_in_threadpool(self.finish, call, bucket, query, body, draft)
            except (StorageError, OSError, sqlite3.OperationalError):
                await self.cancel(call, bucket)
                raise
            self.drafts.pop(upload, None)
            return answer

    async def cancel(self, call: Call, bucket: str) -> Response:
        """Forget an upload."""
        upload = call.query.get("upload_id", "")
        await run_in_threadpool(self.buckets.upload, bucket, upload)
        await run_in_threadpool(self.buckets.cancel_upload, upload)
        self.drafts.pop(upload, None)
        return Response(status_code=499)
