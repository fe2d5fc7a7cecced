"""What the JSON API of Cloud Storage says of buckets and objects: resources, preconditions, the pages of a list."""

import base64
import json
import re
from datetime import UTC, datetime
from email.utils import formatdate
from types import SimpleNamespace
from urllib.parse import quote

from starlette.datastructures import Headers, QueryParams

from helpers.local import PROJECT_NUMBER, errors
from helpers.local.buckets import Check, Object, StorageError, no_such_object

# What to use instead of what is refused, by a word of the path, of the query or of a resource.
NO_ACL = "use IAM on the bucket: all buckets here have uniform bucket-level access"
NO_VERSIONS = "use copies under other names: an object has one version here, and what is deleted is gone"
NO_KEYS = "use no key: objects are plain files here"
INSTEAD = {
    **dict.fromkeys(("acl", "defaultObjectAcl", "predefinedAcl", "predefinedDefaultObjectAcl"), NO_ACL),
    **dict.fromkeys(("versioning", "softDeletePolicy", "softDeleted", "restore"), NO_VERSIONS),
    **dict.fromkeys(("encryption", "hmacKeys", "kmsKeyName"), NO_KEYS),
}

# The fields that a client may set. Those of objects, but for `metadata`, are headers of a download too.
FIELD_HEADERS = {
    "contentType": "Content-Type",
    "contentEncoding": "Content-Encoding",
    "contentDisposition": "Content-Disposition",
    "contentLanguage": "Content-Language",
    "cacheControl": "Cache-Control",
    "storageClass": "X-Goog-Storage-Class",
    "customTime": "X-Goog-Custom-Time",
}
OBJECT_FIELDS = {*FIELD_HEADERS, "metadata"}
BUCKET_FIELDS = {"labels", "storageClass", "iamConfiguration"}
# The fields that are the server's: a client may send them as it got them.
OWN_FIELDS = {
    *("kind", "id", "selfLink", "mediaLink", "name", "bucket", "generation", "metageneration", "size", "md5Hash"),
    *("crc32c", "etag", "timeCreated", "updated", "timeStorageClassUpdated", "componentCount", "projectNumber"),
    *("location", "locationType"),
}


def unimplemented(what: str, word: str) -> StorageError:
    """Refuse what is not done here, with what to use instead as far as INSTEAD knows the word."""
    return StorageError(501, "notImplemented", errors.unimplemented(what, INSTEAD.get(word, "")).message)


def refuse_parameters(query: QueryParams, headers: Headers) -> None:
    """Raise when a call asks for what is not done here."""
    for parameter in ("predefinedAcl", "predefinedDefaultObjectAcl", "softDeleted", "kmsKeyName"):
        if query.get(parameter, "false").lower() not in ("", "false"):
            raise unimplemented(f"The parameter {parameter}", parameter)
    if "x-goog-encryption-algorithm" in headers:
        raise unimplemented("Encryption with a key of the client's own", "encryption")


def parse(body: bytes) -> dict:
    """Return a JSON object."""
    try:
        value = json.loads(body or b"{}")
        # What cannot be sent back must not come in: NaN, and halves of characters.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise StorageError(400, "parseError", "Parse Error: expected a JSON object.")
    return value


def of_kind(kind: type, value, field: str):
    """Return a value if it is of a kind, an empty one for None."""
    if not isinstance(value, kind | None):
        raise StorageError(400, "invalid", f"Invalid value for field {field}: {value!r}")
    return kind() if value is None else value


# Resources


def etag(found: Object | SimpleNamespace) -> str:
    """Return the tag of a version of the data and metadata of an object or a bucket."""
    return base64.b64encode(f"{getattr(found, 'generation', 0)}/{found.metageneration}".encode()).decode()


def timestamp(microseconds: int) -> str:
    """Return a time as RFC 3339 has it, the nearest that it has: the time of a file may be any."""
    inside = min(max(microseconds, 0), 253_402_300_799_000_000)
    return datetime.fromtimestamp(inside / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bucket_resource(bucket: str, known: dict, base: str) -> dict:
    """Return a bucket as the JSON API shows it."""
    location = known["location"]
    kind = "dual-region" if re.fullmatch(r"(NAM|EUR|ASIA)\d+", location) else "region"
    return {
        "kind": "storage#bucket",
        "id": bucket,
        "selfLink": f"{base}/storage/v1/b/{bucket}",
        "name": bucket,
        "projectNumber": PROJECT_NUMBER,
        "metageneration": str(known["metageneration"]),
        "location": location,
        "locationType": "multi-region" if location in ("US", "EU", "ASIA") else kind,
        "storageClass": "STANDARD",
        "iamConfiguration": {"uniformBucketLevelAccess": {"enabled": True}, "publicAccessPrevention": "inherited"},
        "etag": etag(SimpleNamespace(**known)),
        "timeCreated": timestamp(known["created"]),
        "updated": timestamp(known["updated"]),
        **known["resource"],
    }


def object_resource(found: Object, base: str) -> dict:
    """Return an object as the JSON API shows it."""
    path = f"storage/v1/b/{found.bucket}/o/{quote(found.name, safe='')}"
    created = timestamp(found.generation)
    checksums = {"crc32c": found.crc32c, "md5Hash": found.md5}
    return {
        "kind": "storage#object",
        "id": f"{found.bucket}/{found.name}/{found.generation}",
        "selfLink": f"{base}/{path}",
        "mediaLink": f"{base}/download/{path}?generation={found.generation}&alt=media",
        "name": found.name,
        "bucket": found.bucket,
        "generation": str(found.generation),
        "metageneration": str(found.metageneration),
        "size": str(found.size),
        "etag": etag(found),
        "storageClass": "STANDARD",
        "timeCreated": created,
        "timeStorageClassUpdated": created,
        "updated": timestamp(found.updated),
        **{field: value for field, value in checksums.items() if value},
        **found.resource,
    }


def download_headers(found: Object) -> dict[str, str]:
    """Return the headers that come with the content of an object."""
    fields = {"storageClass": "STANDARD"} | found.resource
    checksums = {"crc32c": found.crc32c, "md5": found.md5}
    headers = {
        **{header: fields[field] for field, header in FIELD_HEADERS.items() if field in fields},
        "ETag": etag(found),
        "Last-Modified": formatdate(max(found.updated, 0) / 1e6, usegmt=True),
        "X-Goog-Generation": str(found.generation),
        "X-Goog-Metageneration": str(found.metageneration),
        "X-Goog-Hash": ",".join(f"{kind}={value}" for kind, value in checksums.items() if value),
        "X-Goog-Stored-Content-Encoding": fields.get("contentEncoding", "identity"),
        "X-Goog-Stored-Content-Length": str(found.size),
    }
    # Headers are bytes: UTF-8 goes through as it is.
    return {header: value.encode().decode("latin-1") for header, value in headers.items() if value}


def settable(body: dict, fields: set[str]) -> dict:
    """Return the fields of a resource that a client may set; others are the server's, or refused."""
    for field, value in body.items():
        if field not in fields | OWN_FIELDS and value not in (None, False, "", [], {}):
            raise unimplemented(f"The field {field}", field)
        if field in FIELD_HEADERS and not (value is None or (isinstance(value, str) and value.isprintable())):
            raise StorageError(400, "invalid", f"Invalid value for field {field}: {value!r}; expected printable text.")
        if field in ("metadata", "labels") and value is not None:
            values = value.values() if isinstance(value, dict) else [0]
            if not all(isinstance(text, str | None) for text in values):
                raise StorageError(
                    400, "invalid", f"Invalid value for field {field}: {value!r}; expected pairs of strings."
                )
    return {field: value for field, value in body.items() if field in fields}


def new_resource(body: dict) -> dict:
    """Return the resource of an object that is made."""
    return {"contentType": "application/octet-stream"} | merged({}, settable(body, OBJECT_FIELDS))


def merged(old: dict, change: dict) -> dict:
    """Return a resource changed by a patch, in which None removes a field (RFC 7396)."""
    result = dict(old)
    for field, value in change.items():
        if value is None:
            result.pop(field, None)
        elif isinstance(value, dict):
            result[field] = merged(result.get(field) or {}, value)
        else:
            result[field] = value
    return result


def object_name(query: QueryParams, body: dict) -> str:
    """Return the name that the request for an upload gives."""
    name = query.get("name") or body.get("name")
    if not isinstance(name, str):
        raise StorageError(400, "required", "Required parameter: name")
    return name


# Preconditions


def number(query: QueryParams, parameter: str) -> int | None:
    """Return a parameter of the query as a number, None if it is not given."""
    value = query.get(parameter)
    if value is None:
        return None
    if not re.fullmatch(r"\d{1,18}", value):
        raise StorageError(400, "invalid", f"Invalid value for parameter {parameter}: {value!r}; expected a number.")
    return int(value)


def condition(query: QueryParams, prefix: str = "if", reads: bool = False) -> Check:
    """Return a function that raises when an object, a bucket, or None, does not meet the preconditions in a query."""

    def check(current):
        for kind in ("Generation", "Metageneration"):
            actual = getattr(current, kind.lower(), 0)
            wanted, unwanted = number(query, f"{prefix}{kind}Match"), number(query, f"{prefix}{kind}NotMatch")
            if wanted not in (None, actual) or unwanted == actual:
                message = "At least one of the pre-conditions you specified did not hold."
                raise StorageError(304 if reads and unwanted == actual else 412, "conditionNotMet", message)

    return check


def existing(query: QueryParams, bucket: str, name: str, prefix: str = "if", reads: bool = False) -> Check:
    """Return a function that raises when an object is not there, is of another generation, or fails a precondition."""
    meets = condition(query, prefix, reads)
    generation = number(query, "generation" if prefix == "if" else "sourceGeneration")

    def check(current):
        if current is None or generation not in (None, current.generation):
            raise no_such_object(bucket, name)
        meets(current)

    return check


def check_etag(headers: Headers, found: Object) -> None:
    """Raise when a client that reads wants another version, or has this one already."""
    for header, is_wanted, status in (("if-match", True, 412), ("if-none-match", False, 304)):
        tags = re.findall(r'[^\s",]+', headers.get(header, ""))
        if tags and (etag(found) in tags) is not is_wanted:
            message = "At least one of the pre-conditions you specified did not hold."
            raise StorageError(status, "conditionNotMet", message)


def compose_source(source: dict) -> tuple[str, QueryParams]:
    """Return the name of an object that is to be joined, and its preconditions as those of a query."""
    name = of_kind(str, of_kind(dict, source, "sourceObjects").get("name"), "name")
    wanted = {"generation": source.get("generation")}
    wanted |= of_kind(dict, source.get("objectPreconditions"), "objectPreconditions")
    return name, QueryParams({parameter: str(value) for parameter, value in wanted.items() if value is not None})


# Lists


def to_token(name: str) -> str:
    """Return the token of the page that starts at a name."""
    return base64.urlsafe_b64encode(name.encode()).decode()


def from_token(token: str | None) -> str:
    """Return the name at which a page starts."""
    try:
        return base64.b64decode(token or "", b"-_", validate=True).decode()
    except ValueError:
        raise StorageError(400, "invalid", f"Invalid page token: {token!r}; expected one of an earlier page.") from None


def glob(pattern: str) -> re.Pattern:
    """Return the regular expression of a glob: only `**` matches slashes too, `{a,b}` is a choice."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}
    text, depth = "", 0
    for token in re.findall(r"\*\*/|\*\*|\[[^\]]+\]|.", pattern, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if token == "," and depth > 0:
            text += "|"
        elif len(token) > 2 and token[0] == "[":
            text += token.replace("\\", "\\\\").replace("[!", "[^")
        else:
            text += tokens.get(token) or re.escape(token)
    try:
        return re.compile(text, re.DOTALL)
    except re.error:
        raise StorageError(400, "invalid", f"Invalid glob pattern: {pattern!r}") from None
