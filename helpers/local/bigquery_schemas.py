"""BigQuery's refusals, names and types: in its JSON, in GoogleSQL, and as DuckDB has them."""

import re
from dataclasses import dataclass

LOCATION = "US"


class BigQueryError(Exception):
    """A refusal in BigQuery's words, with its `reason` and the HTTP `status` that goes with it."""

    STATUS = {"notFound": 404, "duplicate": 409, "accessDenied": 403, "notImplemented": 501}

    def __init__(self, message: str, reason: str = "invalidQuery"):
        """Refuse with a message for the user and BigQuery's word for the reason."""
        super().__init__(message)
        self.reason = reason
        self.status = self.STATUS.get(reason, 400)


def unimplemented(what: str, instead: str = "it needs BigQuery on Google Cloud") -> BigQueryError:
    """Refuse what only Google's BigQuery does."""
    return BigQueryError(f"{what} is not part of the local BigQuery; {instead}.", "notImplemented")


def not_found(kind: str, name: object, more: str = "") -> BigQueryError:
    """Refuse what is not there."""
    place = f" was not found in location {LOCATION}" if kind in ("Table", "Dataset") else ""
    return BigQueryError(f"Not found: {kind} {name}{place}{more}", "notFound")


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
    def of(cls, reference: dict) -> "Name":
        """Return the name in a reference to a table or model in BigQuery's JSON."""
        return cls(reference["projectId"], reference["datasetId"], reference.get("tableId") or reference["modelId"])

    @property
    def reference(self) -> dict:
        """Return the name as a reference to a table in BigQuery's JSON."""
        return {"projectId": self.project, "datasetId": self.dataset, "tableId": self.id}

    @property
    def schema(self) -> str:
        """Return the schema that the dataset is in DuckDB."""
        return f"{self.project}.{self.dataset}"

    @property
    def sql(self) -> str:
        """Return the name in DuckDB's SQL."""
        return f"{quoted(self.schema)}.{quoted(self.id)}"


def quoted(identifier: str) -> str:
    """Return a name as DuckDB's SQL writes it."""
    return '"' + identifier.replace('"', '""') + '"'


def text(value: object) -> str:
    """Return a literal of DuckDB's SQL."""
    return "'" + str(value).replace("'", "''") + "'"


# Types

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
_BIGQUERY = {
    **{duckdb.lower(): name for name, duckdb in _DUCKDB.items()},
    **dict.fromkeys(("tinyint", "smallint", "integer", "hugeint"), "INTEGER"),
    **dict.fromkeys(("utinyint", "usmallint", "uinteger", "ubigint", "uhugeint"), "INTEGER"),
    **dict.fromkeys(("timestamp_s", "timestamp_ms", "timestamp_ns"), "DATETIME"),
    **{"decimal": "NUMERIC", "float": "FLOAT", "uuid": "STRING", "enum": "STRING", "null": "INTEGER"},
}
# GoogleSQL's names of types that BigQuery's JSON calls otherwise.
_GOOGLESQL = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL", "RECORD": "STRUCT"}
_JSON = {new: old for old, new in _GOOGLESQL.items()} | {"DECIMAL": "NUMERIC"}


def canonical(field: dict) -> dict:
    """Return a field of a client's schema with the names of types and the mode that BigQuery answers with."""
    type_ = _JSON.get(field["type"].upper(), field["type"].upper())
    if type_ != "RECORD" and type_ not in _DUCKDB:
        raise unimplemented(f"The type {type_}")
    if not re.fullmatch(r"\w[\w \-]{0,299}", field["name"]):
        raise BigQueryError(f'Invalid field name "{field["name"]}".', "invalid")
    if field.get("defaultValueExpression"):
        raise unimplemented("The default value of a column")
    new = {**field, "type": type_, "mode": (field.get("mode") or "NULLABLE").upper()}
    return {**new, "fields": [canonical(child) for child in field["fields"]]} if type_ == "RECORD" else new


def field_of(name: str, type_) -> dict:
    """Return the field of BigQuery's schema for a column with one of DuckDB's types."""
    if type_.id == "list":
        element = field_of(name, type_.children[0][1])
        if element["mode"] == "REPEATED":
            raise BigQueryError(
                "Cannot construct array with element type ARRAY because nested arrays are not supported"
            )
        return {**element, "mode": "REPEATED"}
    if type_.id in ("struct", "tuple"):
        children = [field_of(child or f"_field_{i}", kind) for i, (child, kind) in enumerate(type_.children, 1)]
        return {"name": name, "type": "RECORD", "mode": "NULLABLE", "fields": children}
    known = "JSON" if str(type_) == "JSON" else _BIGQUERY.get(type_.id)
    if known is None:
        raise unimplemented(f"The type {type_} of column {name}")
    return {"name": name, "type": known, "mode": "NULLABLE"}


def element_of(field: dict) -> dict:
    """Return the field of one value of a repeated field."""
    return {**field, "mode": "NULLABLE"}


def duckdb_type(field: dict) -> str:
    """Return DuckDB's type for a field of BigQuery's schema."""
    if field["mode"] == "REPEATED":
        return duckdb_type(element_of(field)) + "[]"
    if field["type"] == "RECORD":
        return f"STRUCT({', '.join(quoted(child['name']) + ' ' + duckdb_type(child) for child in field['fields'])})"
    return _DUCKDB[field["type"]]


def googlesql_type(field: dict) -> str:
    """Return a field's type in GoogleSQL, as INFORMATION_SCHEMA and messages write it."""
    if field["mode"] == "REPEATED":
        return f"ARRAY<{googlesql_type(element_of(field))}>"
    if field["type"] == "RECORD":
        return f"STRUCT<{', '.join(child['name'] + ' ' + googlesql_type(child) for child in field['fields'])}>"
    return _GOOGLESQL.get(field["type"], field["type"])


# Rows as BigQuery's JSON: SQL that lets DuckDB write them, since no loop in Python is as fast


def wire(value: str, field: dict, as_int64: bool, depth: int = 0) -> str:
    """Return the SQL of a value as it travels: a text, {"f": [...]} for a struct, or a list of {"v": ...}.

    Timestamps are microseconds with `as_int64` and else seconds.
    """
    if field["mode"] == "REPEATED":
        item = wire(f"e{depth}", element_of(field), as_int64, depth + 1)
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
        time = f"CAST({value} AS VARCHAR)"
        return f"CASE WHEN len({time}) > 8 THEN rpad({time}, 15, '0') ELSE {time} END"
    return f"to_base64({value})" if field["type"] == "BYTES" else f"CAST({value} AS VARCHAR)"


def size(value: str, field: dict) -> str:
    """Return the SQL of a value's size in bytes, as BigQuery counts what it reads."""
    if field["mode"] == "REPEATED":
        return f"coalesce(list_sum(list_transform({value}, lambda e: {size('e', element_of(field))})), 0)"
    if field["type"] == "RECORD":
        return " + ".join(size(f"({value}).{quoted(child['name'])}", child) for child in field["fields"])
    if field["type"] in ("STRING", "JSON", "BYTES"):
        return f"coalesce(2 + {'octet_length' if field['type'] == 'BYTES' else 'strlen'}({value}), 0)"
    return f"CASE WHEN {value} IS NULL THEN 0 ELSE { {'BOOLEAN': 1, 'NUMERIC': 16}.get(field['type'], 8) } END"
