"""Files into and out of the local BigQuery: CSV, lines of JSON and Parquet, from buckets and from uploads."""

import json
import re
import secrets
from pathlib import Path

from helpers.local.bigquery_schemas import (
    BigQueryError,
    Name,
    canonical,
    duckdb_type,
    element_of,
    field_of,
    not_found,
    quoted,
    text,
    unimplemented,
)
from helpers.local.bigquery_warehouse import Warehouse

# What DuckDB calls the settings of a load from CSV.
_CSV = {"fieldDelimiter": "delim", "quote": "quote", "nullMarker": "nullstr"}
# The settings of a load that are read here, are for its destination, or only say how Google is to lay a table out.
_SETTINGS = {
    *("sourceUris", "sourceFormat", "schema", "autodetect", "skipLeadingRows", "ignoreUnknownValues", "csvOptions"),
    *("destinationTable", "writeDisposition", "createDisposition", "destinationTableProperties"),
    *("allowQuotedNewlines", "parquetOptions", "timePartitioning", "clustering", *_CSV),
}
_FORMATS = {"CSV": "csv", "NEWLINE_DELIMITED_JSON": "json", "JSON": "json", "PARQUET": "parquet"}


# Where files lie


def path_of(warehouse: Warehouse, uri: str) -> Path:
    """Return where an object lies; BigQueryError for an address that leaves its bucket."""
    match = re.fullmatch(r"gs://([^/*]+)/([^\0]+)", uri)
    if not match or {"..", ".", ""} & {match[1], *match[2].split("/")}:
        raise BigQueryError(f"Invalid URI {uri!r}: expected gs://BUCKET/OBJECT", "invalid")
    bucket = warehouse.buckets / match[1]
    path = bucket / match[2]
    if not bucket.is_dir() or not path.resolve().is_relative_to(bucket):
        raise not_found("URI", uri)
    return path


def files_of(warehouse: Warehouse, uris: list[str]) -> list[Path]:
    """Return the files that addresses name, with a * or without; BigQueryError if one names none."""
    found = []
    for uri in uris:
        path = path_of(warehouse, uri)
        bucket, *pattern = path.relative_to(warehouse.buckets).parts
        files = [path] if "*" not in uri else sorted((warehouse.buckets / bucket).glob("/".join(pattern)))
        files = [file for file in files if file.is_file() and file.resolve().is_relative_to(warehouse.buckets)]
        if not files:
            raise not_found("URI", uri)
        found += files
    return found


# Reading


def read(cursor, settings: dict, files: list[Path], known: list[dict] | None = None) -> tuple[str, list[dict]]:
    """Return the query that reads files, and the schema of what it reads.

    `settings` are those of a load job; the schema is theirs, else `known`, else what the files show.
    """
    settings = {**settings, **settings.get("csvOptions", {})}
    if settings.get("encoding", "UTF-8") == "UTF-8":
        settings.pop("encoding", None)
    if unknown := sorted(key for key, value in settings.items() if value and key not in _SETTINGS):
        raise unimplemented(f"The setting {unknown[0]} of a load")
    kind = settings.get("sourceFormat") or "CSV"
    readers = {"CSV": _read_csv, "NEWLINE_DELIMITED_JSON": _read_json, "PARQUET": _read_parquet}
    if kind not in readers:
        raise unimplemented(f"The format {kind}", f"use {' or '.join(readers)}")
    given = settings.get("schema", {}).get("fields") or (None if settings.get("autodetect") else known)
    paths = "[" + ", ".join(map(text, files)) + "]"
    return readers[kind](cursor, settings, paths, given and [canonical(field) for field in given])


def _read_csv(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    options = [f"{name} = {text(settings[key])}" for key, name in _CSV.items() if settings.get(key) is not None]
    skipped = int(settings.get("skipLeadingRows") or 0)
    if fields:
        names = ", ".join(f"{text(field['name'])}: 'VARCHAR'" for field in fields)
        options += [f"columns = {{{names}}}", "auto_detect = false", "header = false", f"skip = {skipped}"]
        options += [] if settings.get("fieldDelimiter") else ["delim = ','"]
    elif settings.get("autodetect"):
        # The last row that is skipped holds the names, or the first of all if it looks like names.
        options += [f"skip = {skipped - 1}", "header = true"] if skipped else []
        fields = _detected(cursor, f"FROM read_csv({', '.join([paths, *options])})")
        options.append("all_varchar = true")
    else:
        raise BigQueryError("No schema specified on job or table.", "invalid")
    columns = ", ".join(_from_text(field, "nullMarker" in settings) for field in fields)
    return f"SELECT {columns} FROM read_csv({', '.join([paths, *options])})", fields


def _detected(cursor, query: str) -> list[dict]:
    relation = cursor.sql(query)
    columns = zip(relation.columns, relation.types, strict=True)
    fields = [field_of(re.sub(r"\W", "_", name), type_) for name, type_ in columns]
    return [{**field, "type": "TIMESTAMP"} if field["type"] == "DATETIME" else field for field in fields]


def _from_text(field: dict, has_marker: bool) -> str:
    name = quoted(field["name"])
    if field["mode"] == "REPEATED" or field["type"] == "RECORD":
        raise BigQueryError(f"Field {field['name']} is of a type that CSV cannot hold.", "invalid")
    if field["type"] == "STRING":  # no text is an empty text, unless a marker says what NULL is
        return name if has_marker else f"coalesce({name}, '') AS {name}"
    convert = {"BYTES": f"from_base64({name})", "INTEGER": f"bq_int64({name})"}
    return f"{convert.get(field['type'], f'CAST({name} AS {duckdb_type(field)})')} AS {name}"


def _read_json(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    detected = f"FROM read_json({paths}, format = 'newline_delimited')"
    if fields is None:
        fields = _detected(cursor, detected)
    elif not settings.get("ignoreUnknownValues"):
        known = {field["name"].lower() for field in fields}
        if unknown := [name for name in cursor.sql(detected).columns if name.lower() not in known]:
            problem = f"JSON parsing error: No such field: {unknown[0]}."
            raise BigQueryError(f"Error while reading data, error message: {problem}", "invalid")
    columns = ", ".join(f"{text(field['name'])}: {text(_json_type(field))}" for field in fields)
    source = f"read_json({paths}, format = 'newline_delimited', columns = {{{columns}}})"
    return f"SELECT {', '.join(map(_from_json, fields))} FROM {source}", fields


def _json_type(field: dict) -> str:
    return "VARCHAR" if field["type"] == "BYTES" else duckdb_type(field)  # bytes travel as text


def _from_json(field: dict) -> str:
    name = quoted(field["name"])
    return f"from_base64({name}) AS {name}" if field["type"] == "BYTES" else name


def _read_parquet(cursor, settings: dict, paths: str, fields: list[dict] | None) -> tuple[str, list[dict]]:
    relation = cursor.sql(f"FROM read_parquet({paths})")
    found = [field_of(*column) for column in zip(relation.columns, relation.types, strict=True)]
    wanted = {field["name"]: field for field in fields or ()}
    fields = [wanted.get(field["name"], field) for field in found]
    columns = (f"CAST({quoted(field['name'])} AS {duckdb_type(field)}) AS {quoted(field['name'])}" for field in fields)
    return f"SELECT {', '.join(columns)} FROM read_parquet({paths})", fields


def create_external(warehouse: Warehouse, cursor, name: Name, definition: dict, replace: bool = False) -> None:
    """Make a table whose rows stay in the files of a bucket."""
    query, fields = read(cursor, definition, files_of(warehouse, definition["sourceUris"]))
    warehouse.create_view(cursor, name, query, "EXTERNAL", replace, fields, externalDataConfiguration=definition)


def unreadable(error: Exception) -> BigQueryError:
    """Return DuckDB's error about a file in BigQuery's words."""
    what = str(error).partition("\n")[0].partition("Error: ")[2]
    what = re.sub(r"Could not convert string '!(.*)' to \w+", r"\1", what)
    return BigQueryError(f"Error while reading data, error message: {what}", "invalid")


# Writing


def write(warehouse: Warehouse, cursor, query: str, settings: dict) -> int:
    """Write a query's rows to each address of an extract job's settings; return how many files there are."""
    kind = settings.get("destinationFormat", "CSV").upper()
    if kind not in _FORMATS:
        raise unimplemented(f"The format {kind}", f"use {' or '.join(_FORMATS)}")
    options = [f"FORMAT {_FORMATS[kind]}"]
    if settings.get("compression", "NONE") != "NONE":
        options.append(f"COMPRESSION {text(settings['compression'].lower())}")
    if kind == "CSV":
        options.append(f"HEADER {str(settings.get('printHeader', True)).lower()}")
        options.append(f"DELIMITER {text(settings.get('fieldDelimiter', ','))}")
    for uri in settings["destinationUris"]:
        path = path_of(warehouse, uri.replace("*", "000000000000"))  # the number of a shard: one holds all
        partial = warehouse.uploads / secrets.token_hex(16)
        cursor.execute(f"COPY ({query}) TO {text(partial)} ({', '.join(options)})")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
    return len(settings["destinationUris"])


# Rows that a client sends one by one


def insert(warehouse: Warehouse, cursor, name: Name, request: dict) -> list[dict]:
    """Add rows of JSON to a table, all or none unless invalid ones are to be skipped; return the errors, by row."""
    fields = warehouse.table(cursor, name)["schema"]["fields"]
    columns = ", ".join(f"{quoted(field['name'])} {_json_type(field)}" for field in fields)
    source = f"(SELECT unnest(CAST(CAST(? AS JSON) AS STRUCT({columns})[]), max_depth := 2))"
    query = f"SELECT {', '.join(map(_from_json, fields))} FROM {source}"
    trial = warehouse.cursor()  # its errors do not end the transaction
    rows, errors = [row["json"] for row in request.get("rows", [])], {}
    for i, row in enumerate(rows):
        try:
            rows[i] = _complete(row, fields, bool(request.get("ignoreUnknownValues")))
        except BigQueryError as error:
            errors[i] = error
    if _problem(trial, query, [row for i, row in enumerate(rows) if i not in errors]):
        errors |= {
            i: error for i, row in enumerate(rows) if i not in errors and (error := _problem(trial, query, [row]))
        }
    listed = {i: {"reason": "invalid", "location": "", "message": str(error)} for i, error in errors.items()}
    if errors and not request.get("skipInvalidRows"):
        listed = {i: listed.get(i, {"reason": "stopped", "message": ""}) for i in range(len(rows))}
    elif good := [row for i, row in enumerate(rows) if i not in errors]:
        cursor.execute(f"INSERT INTO {name.sql} {query}", [json.dumps(good)])
    return [{"index": i, "errors": [listed[i]]} for i in sorted(listed)]


def _complete(value: object, fields: list[dict], ignore_unknown: bool) -> dict:
    # DuckDB wants a struct to have all its keys.
    if not isinstance(value, dict):
        raise BigQueryError(f"This field is not a record: {value!r}.")
    given = {key.lower(): item for key, item in value.items()}
    if not ignore_unknown and (unknown := sorted(given.keys() - {field["name"].lower() for field in fields})):
        raise BigQueryError(f"no such field: {unknown[0]}.")
    new = {}
    for field in fields:
        item = given.get(field["name"].lower())
        if field["mode"] == "REQUIRED" and item is None:
            raise BigQueryError(f"Missing required field: {field['name']}.")
        if field["mode"] == "REPEATED":
            item = [
                _complete({"_": one}, [{**element_of(field), "name": "_"}], ignore_unknown)["_"] for one in item or ()
            ]
        elif field["type"] == "RECORD" and item is not None:
            item = _complete(item, field["fields"], ignore_unknown)
        new[field["name"]] = item
    return new


def _problem(cursor, query: str, rows: list[dict]) -> str | None:
    import duckdb

    try:
        cursor.execute(f"SELECT count(COLUMNS(*)) FROM ({query})", [json.dumps(rows)]).fetchall()
    except duckdb.Error as error:
        return str(error).partition("\n")[0].partition("Error: ")[2]
    return None
