"""Where the local BigQuery keeps its tables: one DuckDB file that reads nothing but buckets, and BigQuery's JSON for it.

A dataset is a schema named PROJECT.DATASET, and a query's result a table of the dataset `_results`, as BigQuery keeps
it for a day. What DuckDB has no place for (descriptions, labels, models, jobs) is JSON in the table `resources`, written
in the same transaction as the data that it describes.
"""

import contextlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PUBLIC = "bigquery-public-data"
RESULTS = "_results"
RESULTS_SECONDS = 24 * 3600
LOCATION = "US"
CELLS_PER_PAGE = 300_000  # about 10 MB, as BigQuery limits a page
PENGUINS = Path(__file__).parents[1] / "datasets" / "penguins.csv"


class BigQueryError(Exception):
    """A refusal in BigQuery's words, with its `reason` and the HTTP `status` that goes with it."""

    STATUS = {"notFound": 404, "duplicate": 409, "accessDenied": 403, "notImplemented": 501}  # noqa: RUF012

    def __init__(self, message: str, reason: str = "invalidQuery"):
        """Refuse with a message for the user and BigQuery's word for the reason."""
        super().__init__(message)
        self.reason = reason
        self.status = self.STATUS.get(reason, 400)


def unimplemented(what: str, instead: str = "it needs BigQuery on Google Cloud") -> BigQueryError:
    """Refuse what only Google's BigQuery does."""
    return BigQueryError(f"{what} is not part of the local BigQuery; {instead}.", "notImplemented")


# Names


@dataclass(frozen=True)
class Name:
    """The name of a table or model; as text it is what BigQuery's messages say."""

    project: str
    dataset: str
    id: str

    def __str__(self):
        return f"{self.project}:{self.dataset}.{self.id}"

    @classmethod
    def of(cls, reference: dict, id_: str = "tableId") -> "Name":
        """Return the name in a reference of BigQuery's JSON."""
        return cls(reference["projectId"], reference["datasetId"], reference[id_])

    @property
    def schema(self) -> str:
        """Return DuckDB's name of the dataset."""
        return f"{self.project}.{self.dataset}"

    @property
    def sql(self) -> str:
        """Return the name in DuckDB's SQL."""
        return f"{quoted(self.schema)}.{quoted(self.id)}"

    @property
    def reference(self) -> dict:
        """Return the name as a table's reference in BigQuery's JSON."""
        return {"projectId": self.project, "datasetId": self.dataset, "tableId": self.id}


def quoted(identifier: str) -> str:
    """Return a name as DuckDB's SQL writes it."""
    return '"' + identifier.replace('"', '""') + '"'


def text(value: str) -> str:
    """Return a literal of DuckDB's SQL."""
    return "'" + str(value).replace("'", "''") + "'"


# Types: BigQuery's schemas and DuckDB's

_DUCKDB = {
    "STRING": "VARCHAR",
    "INTEGER": "BIGINT",
    "FLOAT": "DOUBLE",
    "BOOLEAN": "BOOLEAN",
    "BYTES": "BLOB",
    "TIMESTAMP": "TIMESTAMP WITH TIME ZONE",
    "DATETIME": "TIMESTAMP",
    "DATE": "DATE",
    "TIME": "TIME",
    "NUMERIC": "DECIMAL(38,9)",
    "JSON": "JSON",
}
_LEGACY = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN", "STRUCT": "RECORD", "DECIMAL": "NUMERIC"}
_STANDARD = {name: new for new, name in _LEGACY.items()}
_OF_DUCKDB = {duckdb.lower(): name for name, duckdb in _DUCKDB.items()} | {
    "decimal": "NUMERIC",
    "float": "FLOAT",
    "uuid": "STRING",
    "enum": "STRING",
    "null": "INTEGER",
    "timestamp_s": "DATETIME",
    "timestamp_ms": "DATETIME",
    "timestamp_ns": "DATETIME",
    **dict.fromkeys("tinyint smallint integer hugeint utinyint usmallint uinteger ubigint uhugeint".split(), "INTEGER"),
}


def canonical(field: dict) -> dict:
    """Return a field of a client's schema with the names of types and the mode that BigQuery answers with."""
    type_ = _LEGACY.get(field["type"].upper(), field["type"].upper())
    if type_ != "RECORD" and type_ not in _DUCKDB:
        raise unimplemented(f"The type {type_}")
    new = {**field, "type": type_, "mode": (field.get("mode") or "NULLABLE").upper()}
    if type_ == "RECORD":
        new["fields"] = [canonical(child) for child in field["fields"]]
    return new


def field_of(name: str, type_) -> dict:
    """Return the field of BigQuery's schema for a column with one of DuckDB's types."""
    if type_.id in ("list", "array"):
        element = field_of(name, type_.children[0][1])
        if element["mode"] == "REPEATED":
            raise BigQueryError("Cannot construct array with element type ARRAY; use ARRAY<STRUCT<ARRAY<...>>> instead")
        return {**element, "mode": "REPEATED"}
    if type_.id == "struct":
        children = [field_of(child, child_type) for child, child_type in type_.children]
        return {"name": name, "type": "RECORD", "mode": "NULLABLE", "fields": children}
    known = "JSON" if str(type_) == "JSON" else _OF_DUCKDB.get(type_.id)
    if known is None:
        raise unimplemented(f"The type {type_} of column {name}")
    return {"name": name, "type": known, "mode": "NULLABLE"}


def type_of(field: dict, is_repeated: bool | None = None) -> str:
    """Return DuckDB's type for a field of BigQuery's schema."""
    if field["mode"] == "REPEATED" if is_repeated is None else is_repeated:
        return type_of(field, False) + "[]"
    if field["type"] == "RECORD":
        return f"STRUCT({', '.join(quoted(child['name']) + ' ' + type_of(child) for child in field['fields'])})"
    return _DUCKDB[field["type"]]


def standard_type(field: dict) -> dict:
    """Return a field's type as models and routines name it."""
    if field["mode"] == "REPEATED":
        return {"typeKind": "ARRAY", "arrayElementType": standard_type({**field, "mode": "NULLABLE"})}
    return {"typeKind": _STANDARD.get(field["type"], field["type"])}


def data_type(field: dict) -> str:
    """Return a field's type in GoogleSQL, as INFORMATION_SCHEMA and messages write it."""
    if field["mode"] == "REPEATED":
        return f"ARRAY<{data_type({**field, 'mode': 'NULLABLE'})}>"
    if field["type"] == "RECORD":
        return "STRUCT<" + ", ".join(f"{child['name']} {data_type(child)}" for child in field["fields"]) + ">"
    return _STANDARD.get(field["type"], field["type"])


# Rows as BigQuery's JSON, made by DuckDB: no value passes through Python


def wire(value: str, field: dict, as_int64: bool, depth: int = 0) -> str:
    """Return the SQL expression of a column's value as it travels: a text, {"f": [...]} or a list of {"v": ...}."""
    if field["mode"] == "REPEATED":
        item = wire(f"e{depth}", {**field, "mode": "NULLABLE"}, as_int64, depth + 1)
        return f"coalesce(list_transform({value}, lambda e{depth}: json_object('v', {item})), [])"
    if field["type"] == "RECORD":
        children = (wire(f"({value}).{quoted(child['name'])}", child, as_int64, depth) for child in field["fields"])
        cells = ", ".join(f"json_object('v', {child})" for child in children)
        return f"CASE WHEN {value} IS NOT NULL THEN json_object('f', [{cells}]) END"
    if field["type"] == "TIMESTAMP":
        return f"CAST(epoch_us({value}){'' if as_int64 else ' / 1e6'} AS VARCHAR)"
    if field["type"] == "DATETIME":
        return f"replace(strftime({value}, '%Y-%m-%dT%H:%M:%S.%f'), '.000000', '')"
    if field["type"] == "TIME":
        time_text = f"CAST({value} AS VARCHAR)"
        return f"CASE WHEN len({time_text}) > 8 THEN rpad({time_text}, 15, '0') ELSE {time_text} END"
    return f"to_base64({value})" if field["type"] == "BYTES" else f"CAST({value} AS VARCHAR)"


def size(field: dict, value: str) -> str:
    """Return the SQL expression of a value's size in bytes, by BigQuery's table of data type sizes."""
    if field["mode"] == "REPEATED":
        return f"coalesce(list_sum(list_transform({value}, lambda e: {size({**field, 'mode': 'NULLABLE'}, 'e')})), 0)"
    if field["type"] == "RECORD":
        return "(" + " + ".join(size(child, f"({value}).{quoted(child['name'])}") for child in field["fields"]) + ")"
    if field["type"] in ("STRING", "JSON", "BYTES"):
        length = "octet_length" if field["type"] == "BYTES" else "strlen"
        return f"coalesce(2 + {length}({value}), 0)"
    return f"CASE WHEN {value} IS NULL THEN 0 ELSE {_SIZES.get(field['type'], 8)} END"


_SIZES = {"BOOLEAN": 1, "NUMERIC": 16}


# The store


class Warehouse:
    """The tables of the local BigQuery, in FOLDER/bigquery.duckdb; every thread works with a cursor of its own."""

    def __init__(self, folder: Path, buckets: Path, project: str):
        """Open the file or make it; gs://BUCKET/OBJECT is `buckets`/BUCKET/OBJECT."""
        import duckdb

        from helpers.local.googlesql import MACROS

        self.folder, self.buckets, self.project = folder, buckets.resolve(), project
        self.uploads = folder / "uploads"  # files on their way in or out
        self.uploads.mkdir(parents=True, exist_ok=True)
        for stale in self.uploads.iterdir():
            stale.unlink()
        self.locks: dict[Name, threading.Lock] = defaultdict(threading.Lock)  # writers of a table take turns
        config = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        self._connection = duckdb.connect(str(folder / "bigquery.duckdb"), config=config)
        directories = ", ".join(text(f"{directory}/") for directory in (self.buckets, self.uploads.resolve()))
        public = Name(PUBLIC, "ml_datasets", "penguins")
        for statement in (
            "SET GLOBAL TimeZone = 'UTC'",
            *(f"CREATE OR REPLACE MACRO {name} AS {body}" for name, body in MACROS.items()),
            "CREATE SCHEMA IF NOT EXISTS _bigquery",
            "CREATE TABLE IF NOT EXISTS _bigquery.resources (kind VARCHAR, parent VARCHAR, id VARCHAR, body JSON, "
            "data BLOB, time TIMESTAMP DEFAULT current_localtimestamp(), PRIMARY KEY (kind, parent, id))",
            f"CREATE SCHEMA IF NOT EXISTS {quoted(public.schema)}",
            f"CREATE SCHEMA IF NOT EXISTS {quoted(f'{project}.{RESULTS}')}",
            f"CREATE TABLE IF NOT EXISTS {public.sql} AS FROM read_csv({text(PENGUINS)})",
            # From here on, nothing that a query says can read, write or load what lies outside.
            "SET GLOBAL python_enable_replacements = false",
            f"SET GLOBAL allowed_directories = [{directories}]",
            "SET GLOBAL enable_external_access = false",
            "SET GLOBAL lock_configuration = true",
        ):
            self._connection.execute(statement)
        with self.transaction() as cursor:
            if not self.find(cursor, public):
                self.put(cursor, "dataset", PUBLIC, public.dataset, {})
                self.describe(cursor, public)
            self._forget_old_results(cursor)

    def cursor(self):
        """Return a connection for one thread."""
        return self._connection.cursor()

    @contextlib.contextmanager
    def transaction(self, cursor=None) -> Iterator:
        """Give a cursor whose work is written whole at the end, or not at all after an exception."""
        cursor = cursor or self.cursor()
        cursor.begin()
        try:
            yield cursor
            cursor.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # DuckDB may have given up the transaction itself
                cursor.rollback()
            raise

    def _forget_old_results(self, cursor) -> None:
        old = "kind = 'job' AND time < current_localtimestamp() - to_seconds(?)"
        rows = cursor.execute(f"SELECT id FROM _bigquery.resources WHERE {old}", [RESULTS_SECONDS]).fetchall()
        for (id_,) in rows:
            self.drop(cursor, Name(self.project, RESULTS, id_), missing_ok=True)
        cursor.execute(f"DELETE FROM _bigquery.resources WHERE {old}", [RESULTS_SECONDS])

    # Resources

    def put(self, cursor, kind: str, parent: str, id_: str, body: dict, data: bytes | None = None) -> None:
        """Write a resource, new or changed."""
        cursor.execute(
            "INSERT OR REPLACE INTO _bigquery.resources (kind, parent, id, body, data) VALUES (?, ?, ?, ?, ?)",
            [kind, parent, id_, json.dumps(body), data],
        )

    def get(self, cursor, kind: str, parent: str, id_: str) -> dict | None:
        """Return a resource, or None."""
        where = "WHERE kind = ? AND parent = ? AND id = ?"
        row = cursor.execute(f"SELECT body FROM _bigquery.resources {where}", [kind, parent, id_]).fetchone()
        return json.loads(row[0]) if row else None

    def resources(self, cursor, kind: str, parent: str) -> list[tuple[str, dict]]:
        """Return the names and resources of one kind below a parent, by name."""
        query = "SELECT id, body FROM _bigquery.resources WHERE kind = ? AND parent = ? ORDER BY id"
        return [(id_, json.loads(body)) for id_, body in cursor.execute(query, [kind, parent]).fetchall()]

    def delete(self, cursor, kind: str, parent: str, id_: str) -> None:
        """Remove a resource."""
        where = "WHERE kind = ? AND parent = ? AND id = ?"
        cursor.execute(f"DELETE FROM _bigquery.resources {where}", [kind, parent, id_])

    # Datasets

    def dataset(self, cursor, project: str, id_: str) -> dict:
        """Return a dataset's resource; BigQueryError if there is none."""
        body = self.get(cursor, "dataset", project, id_)
        if body is None and not (project == self.project and id_ == RESULTS):
            raise BigQueryError(f"Not found: Dataset {project}:{id_} was not found in location {LOCATION}", "notFound")
        return body or {}

    def create_dataset(self, cursor, id_: str, body: dict, exist_ok: bool = False) -> None:
        """Make a dataset."""
        if not re.fullmatch(r"[A-Za-z0-9_]{1,1024}", id_):
            raise BigQueryError(
                f'Invalid dataset ID "{id_}". Dataset IDs must be alphanumeric (plus underscores) and must be at most '
                "1024 characters long.",
                "invalid",
            )
        if self.get(cursor, "dataset", self.project, id_) is not None:
            if exist_ok:
                return
            raise BigQueryError(f"Already Exists: Dataset {self.project}:{id_}", "duplicate")
        cursor.execute(f"CREATE SCHEMA {quoted(f'{self.project}.{id_}')}")
        self.put(cursor, "dataset", self.project, id_, {"creationTime": now(), "lastModifiedTime": now(), **body})

    def drop_dataset(self, cursor, id_: str, with_contents: bool, missing_ok: bool = False) -> None:
        """Remove a dataset; one that holds tables or models only `with_contents`."""
        if missing_ok and self.get(cursor, "dataset", self.project, id_) is None:
            return
        self.dataset(cursor, self.project, id_)
        parent = f"{self.project}.{id_}"
        inside = [(kind, name) for kind in ("table", "model") for name, _ in self.resources(cursor, kind, parent)]
        if inside and not with_contents:
            raise BigQueryError(f"Dataset {self.project}:{id_} is still in use", "resourceInUse")
        for kind, name in inside:
            self.delete(cursor, kind, parent, name)
        self.delete(cursor, "dataset", self.project, id_)
        cursor.execute(f"DROP SCHEMA {quoted(parent)} CASCADE")

    # Tables

    def find(self, cursor, name: Name) -> dict | None:
        """Return a table's resource, or None."""
        return self.get(cursor, "table", name.schema, name.id)

    def table(self, cursor, name: Name) -> dict:
        """Return a table's resource; BigQueryError says what is missing."""
        if body := self.find(cursor, name):
            return body
        if name.project not in (self.project, PUBLIC):
            raise BigQueryError(
                f"Access Denied: Table {name}: User does not have permission to query table {name}, or perhaps it does "
                f"not exist. The local BigQuery has one project, {self.project}.",
                "accessDenied",
            )
        if name.project == PUBLIC:
            raise BigQueryError(
                f"Not found: Table {name} was not found in location {LOCATION}. Of Google's public data the local "
                "BigQuery has ml_datasets.penguins alone; the rest needs BigQuery on Google Cloud.",
                "notFound",
            )
        self.dataset(cursor, name.project, name.dataset)
        raise BigQueryError(f"Not found: Table {name} was not found in location {LOCATION}", "notFound")

    def check_writable(self, name: Name) -> None:
        """Raise BigQueryError for tables that belong to others."""
        if name.project != self.project:
            raise BigQueryError(
                f"Access Denied: Table {name}: Permission bigquery.tables.updateData denied on table {name} "
                "(or it may not exist).",
                "accessDenied",
            )

    def describe(self, cursor, name: Name, **properties) -> dict:
        """Write what DuckDB says of a table's columns, and other properties, into its resource; return it."""
        body = self.find(cursor, name) or {"type": "TABLE", "creationTime": now()}
        known = {field["name"].lower(): field for field in body.get("schema", {}).get("fields", [])}
        fields = [known.get(field["name"].lower(), field) for field in self.columns(cursor, f"FROM {name.sql}")]
        body |= {"schema": {"fields": fields}, "lastModifiedTime": now(), **properties}
        self.put(cursor, "table", name.schema, name.id, body)
        return body

    def columns(self, cursor, query: str) -> list[dict]:
        """Return the schema of a query without running it."""
        relation = cursor.sql(query)
        return [field_of(name, type_) for name, type_ in zip(relation.columns, relation.types, strict=True)]

    def create_table(self, cursor, name: Name, fields: list[dict], **properties) -> None:
        """Make an empty table with a schema."""
        self.new_table(cursor, name)
        fields = [canonical(field) for field in fields]
        if not fields:
            raise BigQueryError("Schema has no fields.", "invalid")
        columns = (
            quoted(field["name"])
            + f" {type_of(field)}"
            + (f" DEFAULT {field['defaultValueExpression']}" if field.get("defaultValueExpression") else "")
            + (" NOT NULL" if field["mode"] == "REQUIRED" else "")
            for field in fields
        )
        cursor.execute(f"CREATE TABLE {name.sql} ({', '.join(columns)})")
        self.describe(cursor, name, schema={"fields": fields}, **properties)

    def create_view(self, cursor, name: Name, query: str, kind: str, **properties) -> None:
        """Make a view, or a table of the kind EXTERNAL, whose rows are those of a query."""
        self.new_table(cursor, name)
        cursor.execute(f"CREATE VIEW {name.sql} AS {query}")
        self.describe(cursor, name, type=kind, **properties)

    def drop_model(self, cursor, name: Name, missing_ok: bool = False) -> None:
        """Remove a model."""
        self.check_writable(name)
        if self.get(cursor, "model", name.schema, name.id) is None and not missing_ok:
            self.dataset(cursor, name.project, name.dataset)
            raise BigQueryError(f"Not found: Model {name}", "notFound")
        self.delete(cursor, "model", name.schema, name.id)

    def new_table(self, cursor, name: Name) -> None:
        """Check that a table of this name may be made."""
        self.check_writable(name)
        self.dataset(cursor, name.project, name.dataset)
        if not re.fullmatch(r"[\w\- ]{1,1024}", name.id):
            raise BigQueryError(f'Invalid table ID "{name.id}".', "invalid")
        if self.find(cursor, name) or self.get(cursor, "model", name.schema, name.id):
            raise BigQueryError(f"Already Exists: Table {name}", "duplicate")

    def drop(self, cursor, name: Name, missing_ok: bool = False) -> None:
        """Remove a table or view."""
        self.check_writable(name)
        if missing_ok and not self.find(cursor, name):
            return
        body = self.table(cursor, name)
        cursor.execute(f"DROP {'TABLE' if body['type'] == 'TABLE' else 'VIEW'} {name.sql}")
        self.delete(cursor, "table", name.schema, name.id)

    def count(self, cursor, name: Name) -> int:
        """Return the number of a table's rows."""
        return cursor.execute(f"SELECT count(*) FROM {name.sql}").fetchone()[0]

    def stored_bytes(self, cursor, name: Name, columns: set[str] | None = None) -> int:
        """Return what BigQuery would count for reading a table, or only the columns with these names in small letters."""
        fields = self.table(cursor, name)["schema"]["fields"]
        sizes = [size(field, quoted(field["name"])) for field in fields if columns is None or field["name"].lower() in columns]
        if not sizes:
            return 0
        return cursor.execute(f"SELECT CAST(coalesce(sum({' + '.join(sizes)}), 0) AS BIGINT) FROM {name.sql}").fetchone()[0]

    def rows(self, cursor, name: Name, fields: list[dict], start: int, limit: int, as_int64: bool = True) -> list[str]:
        """Return rows of a table as BigQuery's JSON, each as a text."""
        cells = ", ".join(f"json_object('v', {wire(quoted(field['name']), field, as_int64)})" for field in fields)
        query = f"SELECT json_object('f', [{cells}]) FROM {name.sql} LIMIT {limit} OFFSET {start}"
        return [row for (row,) in cursor.execute(query).fetchall()]

    def store(
        self, cursor, name: Name, query: str, fields: list[dict], write: str, create: str = "CREATE_IF_NEEDED"
    ) -> None:
        """Write a query's rows into a table by BigQuery's dispositions; `fields` is the schema of a new table."""
        existing = self.find(cursor, name)
        if existing is None and create == "CREATE_NEVER":
            self.table(cursor, name)  # says what is missing
        if existing and write == "WRITE_EMPTY" and self.count(cursor, name):
            raise BigQueryError(f"Already Exists: Table {name}", "duplicate")
        if existing and write == "WRITE_TRUNCATE":
            self.drop(cursor, name)
        if existing and write != "WRITE_TRUNCATE":
            self.check_writable(name)
            _check_same(name, existing["schema"]["fields"], fields)
        else:
            kept = {key: (existing or {})[key] for key in ("description", "labels") if key in (existing or {})}
            self.create_table(cursor, name, fields, **kept)
        by_name = " BY NAME" if existing and write != "WRITE_TRUNCATE" else ""
        cursor.execute(f"INSERT INTO {name.sql}{by_name} {query}")
        if by_name:
            self.describe(cursor, name)


def _check_same(name: Name, table: list[dict], new: list[dict]) -> None:
    known = {field["name"].lower(): field for field in table}
    for field in new:
        there = known.get(field["name"].lower())
        if there is None:
            problem = f"Cannot add fields (field: {field['name']})"
        elif data_type(there) != data_type(field) and (there["type"], field["type"]) not in _COERCED:
            problem = f"Field {field['name']} has changed type from {there['type']} to {field['type']}"
        else:
            continue
        raise BigQueryError(f"Provided Schema does not match Table {name}. {problem}", "invalid")


_COERCED = {("FLOAT", "INTEGER"), ("NUMERIC", "INTEGER"), ("FLOAT", "NUMERIC")}


def now() -> str:
    """Return the time in milliseconds, as BigQuery's JSON has it."""
    return str(round(time.time() * 1000))
