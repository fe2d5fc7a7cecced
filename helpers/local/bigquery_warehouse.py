"""Where the local BigQuery keeps its tables: one DuckDB file, which reads nothing else but buckets.

A dataset is a schema named PROJECT.DATASET; a query's result is a table of the dataset `_results` for a day. What
DuckDB has no place for (descriptions, labels, models, jobs) is JSON in the table `resources`, written in the same
transaction as the data that it describes.
"""

import contextlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from helpers.local.bigquery_schemas import (
    BigQueryError,
    Name,
    canonical,
    duckdb_type,
    field_of,
    googlesql_type,
    not_found,
    quoted,
    size,
    text,
    wire,
)

PUBLIC = "bigquery-public-data"
RESULTS = "_results"
_RESULTS_SECONDS = 24 * 3600
_PENGUINS = Path(__file__).parents[1] / "datasets" / "penguins.csv"
_COERCED = {("FLOAT", "INTEGER"), ("NUMERIC", "INTEGER"), ("FLOAT", "NUMERIC")}
_KEY = "kind = ? AND parent = ? AND id = ?"


class Warehouse:
    """The tables of the local BigQuery. Every thread works with a cursor of its own."""

    def __init__(self, folder: Path, buckets: Path, project: str):
        """Open FOLDER/bigquery.duckdb or make it; gs://BUCKET/OBJECT is the file `buckets`/BUCKET/OBJECT."""
        import duckdb

        from helpers.local.bigquery_sql import MACROS

        self.buckets, self.project = buckets.resolve(), project
        self.uploads = folder.resolve() / "uploads"  # files on their way in or out
        self.uploads.mkdir(parents=True, exist_ok=True)
        for left in self.uploads.iterdir():
            left.unlink()
        self.locks: dict[Name, threading.Lock] = defaultdict(threading.Lock)  # those who write a table take turns
        config = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        self._connection = duckdb.connect(str(folder / "bigquery.duckdb"), config=config)
        public = Name(PUBLIC, "ml_datasets", "penguins")
        for statement in (
            "SET GLOBAL TimeZone = 'UTC'",
            *(f"CREATE OR REPLACE MACRO {name} AS {body}" for name, body in MACROS.items()),
            "CREATE SCHEMA IF NOT EXISTS _bigquery",
            "CREATE TABLE IF NOT EXISTS _bigquery.resources (kind VARCHAR, parent VARCHAR, id VARCHAR, body JSON, "
            "data BLOB, time TIMESTAMP DEFAULT current_localtimestamp(), PRIMARY KEY (kind, parent, id))",
            f"CREATE SCHEMA IF NOT EXISTS {quoted(public.schema)}",
            f"CREATE SCHEMA IF NOT EXISTS {quoted(f'{project}.{RESULTS}')}",
            f"CREATE TABLE IF NOT EXISTS {public.sql} AS FROM read_csv({text(_PENGUINS)})",
            # From here on, nothing that a query says can read, write or load what lies outside.
            "SET GLOBAL python_enable_replacements = false",
            f"SET GLOBAL allowed_directories = [{text(f'{self.buckets}/')}, {text(f'{self.uploads}/')}]",
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
            with contextlib.suppress(Exception):  # DuckDB may have ended the transaction itself
                cursor.rollback()
            raise

    @contextlib.contextmanager
    def writing(self, name: Name, cursor=None) -> Iterator:
        """Give a cursor that alone writes a table, in one transaction; BigQueryError for tables of others."""
        self.check_writable(name)
        with self.locks[name], self.transaction(cursor) as cursor:
            yield cursor

    def _forget_old_results(self, cursor) -> None:
        old = f"kind = 'job' AND time < current_localtimestamp() - to_seconds({_RESULTS_SECONDS})"
        for (id_,) in cursor.execute(f"SELECT id FROM _bigquery.resources WHERE {old}").fetchall():
            cursor.execute(f"DROP TABLE IF EXISTS {Name(self.project, RESULTS, id_).sql}")
        cursor.execute(f"DELETE FROM _bigquery.resources WHERE {old}")

    # Resources

    def put(self, cursor, kind: str, parent: str, id_: str, body: dict, data: bytes | None = None) -> None:
        """Write a resource, new or changed; without `data`, it keeps what it has."""
        cursor.execute(
            "INSERT INTO _bigquery.resources (kind, parent, id, body, data) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET body = excluded.body, data = coalesce(excluded.data, data)",
            [kind, parent, id_, json.dumps(body), data],
        )

    def get(self, cursor, kind: str, parent: str, id_: str) -> dict | None:
        """Return a resource, or None."""
        row = first(cursor, f"SELECT body FROM _bigquery.resources WHERE {_KEY}", [kind, parent, id_])
        return json.loads(row[0]) if row else None

    def data(self, cursor, kind: str, parent: str, id_: str) -> bytes | None:
        """Return the data of a resource, or None."""
        row = first(cursor, f"SELECT data FROM _bigquery.resources WHERE {_KEY}", [kind, parent, id_])
        return row[0] if row else None

    def resources(self, cursor, kind: str, parent: str) -> dict[str, dict]:
        """Return the resources of one kind below a parent by their names, which are in order."""
        query = "SELECT id, body FROM _bigquery.resources WHERE kind = ? AND parent = ? ORDER BY id"
        return {id_: json.loads(body) for id_, body in cursor.execute(query, [kind, parent]).fetchall()}

    def delete(self, cursor, kind: str, parent: str, id_: str) -> None:
        """Remove a resource."""
        cursor.execute(f"DELETE FROM _bigquery.resources WHERE {_KEY}", [kind, parent, id_])

    # Datasets

    def dataset(self, cursor, project: str, id_: str) -> dict:
        """Return a dataset's resource; BigQueryError if there is none."""
        body = self.get(cursor, "dataset", project, id_)
        if body is None:
            raise not_found("Dataset", f"{project}:{id_}")
        return body

    def create_dataset(self, cursor, id_: str, body: dict, exist_ok: bool = False) -> dict:
        """Make a dataset and return its resource."""
        if not re.fullmatch(r"[A-Za-z0-9_]{1,1024}", id_) or id_ == RESULTS:
            allowed = "must be alphanumeric (plus underscores) and must be at most 1024 characters long"
            raise BigQueryError(f'Invalid dataset ID "{id_}". Dataset IDs {allowed}.', "invalid")
        if existing := self.get(cursor, "dataset", self.project, id_):
            if exist_ok:
                return existing
            raise BigQueryError(f"Already Exists: Dataset {self.project}:{id_}", "duplicate")
        cursor.execute(f"CREATE SCHEMA {quoted(f'{self.project}.{id_}')}")
        body = {"creationTime": now(), "lastModifiedTime": now(), **body}
        self.put(cursor, "dataset", self.project, id_, body)
        return body

    def drop_dataset(self, cursor, id_: str, with_contents: bool, missing_ok: bool = False) -> None:
        """Remove a dataset; one that holds tables or models only `with_contents`."""
        if missing_ok and self.get(cursor, "dataset", self.project, id_) is None:
            return
        self.dataset(cursor, self.project, id_)
        parent = f"{self.project}.{id_}"
        inside = [(kind, name) for kind in ("table", "model") for name in self.resources(cursor, kind, parent)]
        if inside and not with_contents:
            raise BigQueryError(f"Dataset {self.project}:{id_} is still in use", "resourceInUse")
        for kind, name in inside:
            self.delete(cursor, kind, parent, name)
        self.delete(cursor, "dataset", self.project, id_)
        cursor.execute(f"DROP SCHEMA {quoted(parent)} CASCADE")

    # Tables

    def find(self, cursor, name: Name) -> dict | None:
        """Return a table's resource, or None."""
        if name.dataset != RESULTS:
            return self.get(cursor, "table", name.schema, name.id)
        there = "SELECT 1 FROM duckdb_tables() WHERE schema_name = ? AND table_name = ?"
        if not first(cursor, there, [name.schema, name.id]):
            return None
        return {"type": "TABLE", "schema": {"fields": self.columns(cursor, f"FROM {name.sql}")}}

    def table(self, cursor, name: Name) -> dict:
        """Return a table's resource; BigQueryError says what is missing."""
        if body := self.find(cursor, name):
            return body
        if name.project == PUBLIC:
            more = ". Of Google's public data the local BigQuery has ml_datasets.penguins; all else is on Google Cloud."
            raise not_found("Table", name, more)
        if name.project != self.project:
            message = f"User does not have permission to query table {name}, or perhaps it does not exist."
            more = f"The local BigQuery has one project, {self.project}."
            raise BigQueryError(f"Access Denied: Table {name}: {message} {more}", "accessDenied")
        self.dataset(cursor, name.project, name.dataset)
        raise not_found("Table", name)

    def check_writable(self, name: Name) -> None:
        """Raise BigQueryError for tables that belong to others."""
        if name.project != self.project:
            denied = f"Permission bigquery.tables.updateData denied on table {name} (or it may not exist)."
            raise BigQueryError(f"Access Denied: Table {name}: {denied}", "accessDenied")

    def columns(self, cursor, query: str) -> list[dict]:
        """Return the schema of a query without running it."""
        relation = cursor.sql(query)
        return [field_of(*column) for column in zip(relation.columns, relation.types, strict=True)]

    def describe(self, cursor, name: Name, fields: list[dict] = (), **properties) -> None:
        """Write what a table's columns are, in the words of `fields` or as it was, and other properties."""
        body = self.find(cursor, name) or {"type": "TABLE", "creationTime": now()}
        known = {field["name"].lower(): field for field in [*body.get("schema", {}).get("fields", []), *fields]}
        fields = [known.get(field["name"].lower(), field) for field in self.columns(cursor, f"FROM {name.sql}")]
        body |= {"schema": {"fields": fields}, "lastModifiedTime": now(), **properties}
        self.put(cursor, "table", name.schema, name.id, body)

    def check_new(self, cursor, name: Name) -> None:
        """Raise BigQueryError unless a table or model of this name may be made."""
        self.check_writable(name)
        self.dataset(cursor, name.project, name.dataset)
        if not re.fullmatch(r"[\w\- ]{1,1024}", name.id):
            raise BigQueryError(f'Invalid table ID "{name.id}".', "invalid")
        for kind in ("table", "model"):
            if self.get(cursor, kind, name.schema, name.id):
                raise BigQueryError(f"Already Exists: {kind.capitalize()} {name}", "duplicate")

    def create_table(
        self, cursor, name: Name, fields: list[dict], query: str | None = None, replace: bool = False, **properties
    ) -> None:
        """Make a table with a schema, empty or with the rows of a query; `replace` takes away one that is there."""
        if replace and self.find(cursor, name):
            if query:  # it may read the table that goes
                cursor.execute(f"CREATE OR REPLACE TEMP TABLE _replacement AS {query}")
                query = "FROM _replacement"
            self.drop(cursor, name)
        self.check_new(cursor, name)
        fields = [canonical(field) for field in fields]
        if not fields:
            raise BigQueryError("Schema has no fields.", "invalid")
        columns = ", ".join(map(_definition, fields))
        cursor.execute(f"CREATE TABLE {name.sql} ({columns})")
        if query:
            cursor.execute(f"INSERT INTO {name.sql} {query}")
        self.describe(cursor, name, fields, **properties)

    def create_view(
        self, cursor, name: Name, query: str, kind: str, replace: bool = False, fields: list[dict] = (), **properties
    ) -> None:
        """Make a view, or a table of the kind EXTERNAL, whose rows are those of a query."""
        if replace:
            self.drop(cursor, name, missing_ok=True)
        self.check_new(cursor, name)
        cursor.execute(f"CREATE VIEW {name.sql} AS {query}")
        self.describe(cursor, name, fields, type=kind, **properties)

    def change_schema(self, cursor, name: Name, fields: list[dict]) -> None:
        """Give a table a schema that adds columns, allows NULL or says more of columns; nothing else may change."""
        new = {field["name"].lower(): field for field in map(canonical, fields)}
        for field in self.table(cursor, name)["schema"]["fields"]:
            changed = new.pop(field["name"].lower(), None)
            if changed is None or googlesql_type(changed) != googlesql_type(field):
                what = "is missing in new schema" if changed is None else "has changed type"
                problem = f"Provided Schema does not match Table {name}. Field {field['name']} {what}"
                raise BigQueryError(problem, "invalid")
            if (field["mode"], changed["mode"]) == ("REQUIRED", "NULLABLE"):
                cursor.execute(f"ALTER TABLE {name.sql} ALTER COLUMN {quoted(field['name'])} DROP NOT NULL")
        for field in new.values():
            self.add_column(cursor, name, field)
        self.describe(cursor, name, [canonical(field) for field in fields])

    def add_column(self, cursor, name: Name, field: dict) -> None:
        """Add a column, which may be NULL."""
        if field["mode"] == "REQUIRED":
            problem = f"Cannot add required fields to an existing schema. (field: {field['name']})"
            raise BigQueryError(problem, "invalid")
        cursor.execute(f"ALTER TABLE {name.sql} ADD COLUMN {_definition(field)}")

    def drop(self, cursor, name: Name, missing_ok: bool = False, kind: str = "table") -> None:
        """Remove a table, a view or, by the `kind`, a model."""
        self.check_writable(name)
        body = self.get(cursor, kind, name.schema, name.id)
        if body is None and missing_ok:
            return
        if body is None:
            self.dataset(cursor, name.project, name.dataset)
            raise not_found(kind.capitalize(), name)
        if kind == "table":
            cursor.execute(f"DROP {'TABLE' if body['type'] == 'TABLE' else 'VIEW'} {name.sql}")
        self.delete(cursor, kind, name.schema, name.id)

    # Rows

    def count(self, cursor, name: Name) -> int:
        """Return the number of a table's rows."""
        return first(cursor, f"SELECT count(*) FROM {name.sql}")[0]

    def stored_bytes(self, cursor, name: Name, columns: set[str] | None = None) -> int:
        """Return the bytes that BigQuery would read of a table, or of its columns with these names in small letters."""
        fields = self.table(cursor, name)["schema"]["fields"]
        sizes = [size(quoted(f["name"]), f) for f in fields if columns is None or f["name"].lower() in columns]
        total = f"CAST(coalesce(sum({' + '.join(sizes)}), 0) AS BIGINT)"
        return first(cursor, f"SELECT {total} FROM {name.sql}")[0] if sizes else 0

    def rows(self, cursor, name: Name, fields: list[dict], start: int, limit: int, as_int64: bool) -> list[str]:
        """Return rows of a table as BigQuery's JSON, each as a text."""
        cells = ", ".join(f"json_object('v', {wire(quoted(field['name']), field, as_int64)})" for field in fields)
        query = f"SELECT json_object('f', [{cells}]) FROM {name.sql} LIMIT {limit} OFFSET {start}"
        return [row for (row,) in cursor.execute(query).fetchall()]

    def store_results(self, cursor, name: Name, query: str, fields: list[dict]) -> None:
        """Keep the rows of a query for a day, under a name that only its job knows."""
        names = ", ".join(f"c{i}" for i in range(len(fields)))
        casts = (f"CAST(c{i} AS {duckdb_type(field)}) AS {quoted(field['name'])}" for i, field in enumerate(fields))
        cursor.execute(f"CREATE OR REPLACE TABLE {name.sql} AS SELECT {', '.join(casts)} FROM ({query}) AS t({names})")

    def store(self, cursor, name: Name, query: str, fields: list[dict], write: str, create: str | None) -> None:
        """Write a query's rows into a table by BigQuery's dispositions; `fields` is the schema of a new table."""
        existing = self.find(cursor, name)
        if existing is None and create == "CREATE_NEVER":
            self.table(cursor, name)  # says what is missing
        if existing and write == "WRITE_EMPTY" and self.count(cursor, name):
            raise BigQueryError(f"Already Exists: Table {name}", "duplicate")
        if existing and write != "WRITE_TRUNCATE":
            _check_same(name, existing["schema"]["fields"], fields)
            cursor.execute(f"INSERT INTO {name.sql} BY NAME {query}")
            self.describe(cursor, name)
            return
        kept = {key: value for key, value in (existing or {}).items() if key in ("description", "labels")}
        self.create_table(cursor, name, fields, query, replace=True, **kept)


def _definition(field: dict) -> str:
    return f"{quoted(field['name'])} {duckdb_type(field)}" + (" NOT NULL" if field["mode"] == "REQUIRED" else "")


def _check_same(name: Name, table: list[dict], new: list[dict]) -> None:
    known = {field["name"].lower(): field for field in table}
    for field in new:
        there = known.get(field["name"].lower())
        if there is None:
            problem = f"Cannot add fields (field: {field['name']})"
        elif googlesql_type(there) != googlesql_type(field) and (there["type"], field["type"]) not in _COERCED:
            problem = f"Field {field['name']} has changed type from {there['type']} to {field['type']}"
        else:
            continue
        raise BigQueryError(f"Provided Schema does not match Table {name}. {problem}", "invalid")


def first(cursor, query: str, values: list = ()) -> tuple | None:
    """Return the first row of a query, or None; DuckDB wants all to be taken before the next statement."""
    rows = cursor.execute(query, values).fetchall()
    return rows[0] if rows else None


def now() -> str:
    """Return the time in milliseconds, as BigQuery's JSON has it."""
    return str(round(time.time() * 1000))
