"""Files into and out of the local BigQuery: CSV, lines of JSON and Parquet, from buckets and from uploads."""

import json
import os
import re
from pathlib import Path

from helpers.local.warehouse import (
    BigQueryError,
    Name,
    Warehouse,
    canonical,
    field_of,
    quoted,
    text,
    type_of,
    unimplemented,
)

# What DuckDB calls the options of a load from CSV.
_CSV = {"fieldDelimiter": "delim", "quote": "quote", "nullMarker": "nullstr"}
# The settings of a load that are read here, belong to its destination, or say how Google is to lay a table out.
_SETTINGS = {
    *("sourceUris", "sourceFormat", "schema", "autodetect", "skipLeadingRows", "ignoreUnknownValues", "csvOptions"),
    *("destinationTable", "writeDisposition", "createDisposition", "destinationTableProperties"),
    *("allowQuotedNewlines", "parquetOptions", "timePartitioning", "clustering", *_CSV),
}


# Where files lie


def path_of(warehouse: Warehouse, uri: str) -> Path:
    """Return where an object lies; BigQueryError for an address that leaves its bucket."""
    match = re.fullmatch(r"gs://([^/*]+)/([^\0]+)", uri)
    if not match or {"..", ".", ""} & {match[1], *match[2].split("/")}:
        raise BigQueryError(f"Invalid URI {uri!r}: expected gs://BUCKET/OBJECT", "invalid")
    bucket = warehouse.buckets / match[1]
    path = bucket / match[2]
    if not bucket.is_dir() or not path.resolve().is_relative_to(bucket):
        raise BigQueryError(f"Not found: URI {uri}", "notFound")
    return path


def files_of(warehouse: Warehouse, uris: list[str]) -> list[Path]:
    """Return the files that addresses name, with a * or without; BigQueryError if one names none."""
    found = []
    for uri in uris:
        path = path_of(warehouse, uri)
        parents = list(path.relative_to(warehouse.buckets).parts)
        files = [path] if "*" not in uri else sorted((warehouse.buckets / parents[0]).glob("/".join(parents[1:])))
        inside = [file for file in files if file.is_file() and file.resolve().is_relative_to(warehouse.buckets)]
        if not inside:
            raise BigQueryError(f"Not found: URI {uri}", "notFound")
        found += inside
    return found


# Reading


def read(
    warehouse: Warehouse, cursor, settings: dict, files: list[Path], known: list[dict] | None
) -> tuple[str, list[dict]]:
    """Return the query that reads files, and the schema of what it reads.

    `settings` are those of a load job; without a schema of theirs, `known` holds, and without that what the files show.
    """
    kind = settings.get("sourceFormat", "CSV")
    if kind not in _READERS:
        raise unimplemented(f"The format {kind}", "use CSV, NEWLINE_DELIMITED_JSON or PARQUET")
    settings = {**settings, **settings.get("csvOptions", {})}
    if settings.get("encoding", "UTF-8") == "UTF-8":
        settings.pop("encoding", None)
    if unknown := sorted(key for key, value in settings.items() if value and key not in _SETTINGS):
        raise unimplemented(f"The setting {unknown[0]} of a load")
    given = settings.get("schema", {}).get("fields") or (None if settings.get("autodetect") else known)
    fields = given and [canonical(field) for field in given]
    paths = "[" + ", ".join(text(file) for file in files) + "]"
    return _READERS[kind](cursor, settings, paths, fields)


def _read_csv(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    options = [f"{name} = {text(settings[key])}" for key, name in _CSV.items() if settings.get(key) is not None]
    skipped = int(settings.get("skipLeadingRows") or 0)
    if fields is None:
        if not settings.get("autodetect"):
            raise BigQueryError("No schema specified on job or table.", "invalid")
        # The first row that is not skipped holds the names, unless it looks like all others.
        header = [f"skip = {skipped - 1}", "header = true"] if skipped else []
        source = f"read_csv({', '.join([paths, *options, *header])})"
        relation = cursor.sql(f"FROM {source}")
        fields = [_detected(*column) for column in zip(relation.columns, relation.types, strict=True)]
        source = source[:-1] + ", all_varchar = true)"
    else:
        names = ", ".join(f"{text(field['name'])}: 'VARCHAR'" for field in fields)
        options += [f"columns = {{{names}}}", "auto_detect = false", "header = false", f"skip = {skipped}"]
        options += ["delim = ','"] if "fieldDelimiter" not in settings else []
        source = f"read_csv({', '.join([paths, *options])})"
    return f"SELECT {', '.join(_from_text(field, settings) for field in fields)} FROM {source}", fields


def _detected(name: str, type_) -> dict:
    field = field_of(re.sub(r"\W", "_", name), type_)
    return {**field, "type": "TIMESTAMP"} if field["type"] == "DATETIME" else field


def _from_text(field: dict, settings: dict) -> str:
    name = quoted(field["name"])
    if field["mode"] == "REPEATED" or field["type"] == "RECORD":
        raise BigQueryError(f"Field {field['name']} is of a type that CSV cannot hold", "invalid")
    if field["type"] == "STRING":  # no text is an empty text, unless a marker says what NULL is
        return name if settings.get("nullMarker") else f"coalesce({name}, '') AS {name}"
    value = f"from_base64({name})" if field["type"] == "BYTES" else name
    convert = f"bq_int64({value})" if field["type"] == "INTEGER" else f"CAST({value} AS {type_of(field)})"
    return f"{convert} AS {name}"


def _read_json(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    detected = f"read_json({paths}, format = 'newline_delimited')"
    if fields is None:
        relation = cursor.sql(f"FROM {detected}")
        fields = [_detected(*column) for column in zip(relation.columns, relation.types, strict=True)]
    elif not settings.get("ignoreUnknownValues"):
        known = {field["name"].lower() for field in fields}
        for name in cursor.sql(f"FROM {detected}").columns:
            if name.lower() not in known:
                raise BigQueryError(f"Error while reading data, error message: JSON parsing error: No such field: {name}.", "invalid")
    columns = ", ".join(f"{text(field['name'])}: {text(json_type(field))}" for field in fields)
    source = f"read_json({paths}, format = 'newline_delimited', columns = {{{columns}}})"
    return f"SELECT {', '.join(from_json(field) for field in fields)} FROM {source}", fields


def json_type(field: dict) -> str:
    """Return DuckDB's type to read a field of JSON with: bytes travel as text."""
    return "VARCHAR" if field["type"] == "BYTES" else type_of(field)


def from_json(field: dict) -> str:
    """Return the column of a query for a field that was read with `json_type`."""
    name = quoted(field["name"])
    return f"from_base64({name}) AS {name}" if field["type"] == "BYTES" else name


def _read_parquet(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    relation = cursor.sql(f"FROM read_parquet({paths})")
    found = [field_of(*column) for column in zip(relation.columns, relation.types, strict=True)]
    wanted = {field["name"]: field for field in fields or ()}
    fields = [wanted.get(field["name"], field) for field in found]
    columns = (f"CAST({quoted(field['name'])} AS {type_of(field)}) AS {quoted(field['name'])}" for field in fields)
    return f"SELECT {', '.join(columns)} FROM read_parquet({paths})", fields


_READERS = {"CSV": _read_csv, "NEWLINE_DELIMITED_JSON": _read_json, "PARQUET": _read_parquet}


def create_external(warehouse: Warehouse, cursor, name: Name, definition: dict, replace: bool = False) -> None:
    """Make a table whose rows stay in the files of a bucket."""
    if replace and warehouse.find(cursor, name):
        warehouse.drop(cursor, name)
    query, fields = read(warehouse, cursor, definition, files_of(warehouse, definition["sourceUris"]), None)
    properties = {"externalDataConfiguration": definition, "schema": {"fields": fields}}
    warehouse.create_view(cursor, name, query, "EXTERNAL", **properties)


def add_columns(fields: list[dict]) -> list[str]:
    """Return the changes of a table that add columns."""
    fields = [canonical(field) for field in fields]
    if required := [field["name"] for field in fields if field["mode"] == "REQUIRED"]:
        raise BigQueryError(f"Cannot add required fields to an existing schema. (field: {required[0]})", "invalid")
    return [f"ADD COLUMN {quoted(field['name'])} {type_of(field)}" for field in fields]


# Writing

_FORMATS = {"CSV": "csv", "NEWLINE_DELIMITED_JSON": "json", "JSON": "json", "PARQUET": "parquet"}


def write(warehouse: Warehouse, cursor, query: str, settings: dict) -> list[int]:
    """Write a query's rows to each address of an extract job's settings; return how many files each became."""
    kind = settings.get("destinationFormat", "CSV").upper()
    if kind not in _FORMATS:
        raise unimplemented(f"The format {kind}", "use CSV, NEWLINE_DELIMITED_JSON or PARQUET")
    options = [f"FORMAT {_FORMATS[kind]}"]
    if settings.get("compression", "NONE") != "NONE":
        options.append(f"COMPRESSION {settings['compression'].lower()}")
    if kind == "CSV":
        options += [f"HEADER {str(settings.get('printHeader', True)).lower()}"]
        options += [f"DELIMITER {text(settings['fieldDelimiter'])}"] if settings.get("fieldDelimiter") else []
    uris = settings.get("destinationUris") or [settings["destinationUri"]]
    for uri in uris:
        # A star stands for the number of a shard; here one shard holds all.
        path = path_of(warehouse, uri.replace("*", "000000000000"))
        partial = warehouse.uploads / f"{os.getpid()}-{id(cursor)}"
        cursor.execute(f"COPY ({query}) TO {text(partial)} ({', '.join(options)})")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
    return [1] * len(uris)


# Rows that a client sends one by one


def insert(warehouse: Warehouse, cursor, name: Name, request: dict) -> list[dict]:
    """Add rows of JSON to a table, all or none unless invalid ones are to be skipped; return the errors, by row."""
    fields = warehouse.table(cursor, name)["schema"]["fields"]
    columns = ", ".join(f"{quoted(field['name'])} {json_type(field)}" for field in fields)
    selected = ", ".join(from_json(field) for field in fields)
    query = f"SELECT {selected} FROM (SELECT unnest(CAST(CAST(? AS JSON) AS STRUCT({columns})[]), max_depth := 2))"
    known = {field["name"].lower(): field["mode"] == "REQUIRED" for field in fields}
    rows = [row["json"] for row in request.get("rows", [])]
    problems = {}
    for i, row in enumerate(rows):
        given = {key.lower() for key, value in row.items() if value is not None}
        unknown = () if request.get("ignoreUnknownValues") else sorted(given - known.keys())
        missing = [column for column, is_required in known.items() if is_required and column not in given]
        if unknown or missing:
            word = "no such field" if unknown else "Missing required field"
            problems[i] = {"location": [*unknown, *missing][0], "message": f"{word}: {[*unknown, *missing][0]}."}
    good = [row for i, row in enumerate(rows) if i not in problems]
    if _fault(cursor, query, good):
        for i, row in enumerate(rows):
            if i not in problems and (fault := _fault(cursor, query, [row])):
                problems[i] = {"location": "", "message": fault}
    errors = {i: [{"reason": "invalid", "debugInfo": "", **problem}] for i, problem in problems.items()}
    if errors and not request.get("skipInvalidRows"):
        errors |= {i: [{"reason": "stopped", "message": ""}] for i in range(len(rows)) if i not in errors}
    else:
        good = [row for i, row in enumerate(rows) if i not in errors]
        cursor.execute(f"INSERT INTO {name.sql} {query}", [json.dumps(good)])
    return [{"index": i, "errors": errors[i]} for i in sorted(errors)]


def _fault(cursor, query: str, rows: list[dict]) -> str | None:
    import duckdb

    try:
        cursor.execute(f"SELECT count(COLUMNS(*)) FROM ({query})", [json.dumps(rows)])
    except duckdb.Error as error:
        return str(error).partition("\n")[0].partition("Error: ")[2]
    return None
