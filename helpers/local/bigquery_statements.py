"""What each statement of GoogleSQL does to the warehouse.

query = Query(warehouse, cursor, Script(...), configuration, results)
statistics = query.run()           # BigQuery's JSON; the rows are in the table query.destination
"""

from collections.abc import Callable

import duckdb
import pyarrow as pa
from sqlglot import exp

from helpers.local import bigquery_files, bqml
from helpers.local.bigquery_schemas import (
    LOCATION,
    BigQueryError,
    Name,
    canonical,
    duckdb_type,
    googlesql_type,
    quoted,
    unimplemented,
)
from helpers.local.bigquery_sql import MLFunction, Script, kind
from helpers.local.bigquery_warehouse import Warehouse, first, now

_MEGABYTE = 1 << 20
_TABLE_OPTIONS = {"description": "description", "friendly_name": "friendlyName", "labels": "labels"}
_COUNTS = {"INSERT": "insertedRowCount", "UPDATE": "updatedRowCount", "DELETE": "deletedRowCount"}
_EXPORT = {
    **{"uri": "destinationUris", "format": "destinationFormat", "header": "printHeader"},
    **{"compression": "compression", "field_delimiter": "fieldDelimiter", "overwrite": "overwrite"},
}
# What the views of INFORMATION_SCHEMA show.
_VIEWS = {
    "SCHEMATA": ("catalog_name", "schema_name", "location"),
    "TABLES": ("table_catalog", "table_schema", "table_name", "table_type"),
    "COLUMNS": (
        "table_catalog",
        "table_schema",
        "table_name",
        "column_name",
        "ordinal_position",
        "is_nullable",
        "data_type",
    ),
}


class Query:
    """One run of a script; a dry run finds the errors, the schema and the bytes, and changes nothing."""

    def __init__(
        self,
        warehouse: Warehouse,
        cursor,
        script: Script,
        configuration: dict,
        results: Name,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """Prepare a run; `configuration` is a job's in BigQuery's JSON, `results` the table for unclaimed rows."""
        self.warehouse, self.cursor, self.script, self.should_stop = warehouse, cursor, script, should_stop
        self.settings, self.is_dry = configuration["query"], configuration.get("dryRun", False)
        self.results, self.destination = results, None
        self.fields: list[dict] = []  # the schema of the rows
        self.read: dict[Name, int] = {}  # what was read, in bytes
        self._names: set[str] | None = None  # that stand in the present statement; None: those of all columns
        self._registered = 0

    def run(self) -> dict:
        """Run all statements and return what BigQuery's JSON has as `statistics.query`."""
        for id_, definition in self.settings.get("tableDefinitions", {}).items():
            files = bigquery_files.files_of(self.warehouse, definition["sourceUris"])
            self.cursor.execute(
                f"CREATE TEMP VIEW {quoted(id_)} AS {bigquery_files.read(self.cursor, definition, files)[0]}"
            )
            self.script.temporary.add(id_.lower())
        statistics = {}
        for tree in self.script.statements:
            if self.should_stop():
                raise BigQueryError("Job execution was cancelled: User requested cancellation", "stopped")
            stars = (star for star in tree.find_all(exp.Star) if not isinstance(star.parent, exp.Count))
            names = {identifier.name.lower() for identifier in tree.find_all(exp.Identifier)}
            self._names, self.destination, self.fields = None if any(stars) else names, None, []
            type_ = kind(tree)
            try:
                statistics = {"statementType": type_, **getattr(self, _METHODS[type_])(tree)}
            except duckdb.Error as error:
                raise self.script.reword(error, tree) from None
        if len(self.script.statements) > 1:
            statistics["statementType"] = "SCRIPT"
        return {
            **statistics,
            **({"schema": {"fields": self.fields}} if self.fields else {}),
            "cacheHit": False,
            "totalBytesProcessed": str(sum(self.read.values())),
            "totalBytesBilled": "0" if self.is_dry else str(self.billed()),
            "referencedTables": [name.reference for name in self.read],
        }

    def billed(self) -> int:
        """Return the bytes that BigQuery would bill: whole megabytes, and ten at least for each table."""
        return sum(max(10 * _MEGABYTE, -(-size // _MEGABYTE) * _MEGABYTE) for size in self.read.values())

    def sql(self, tree: exp.Expression) -> str:
        """Return a statement or a part of one in DuckDB's SQL, once it is known to cost no more than allowed."""
        statement = self.script.duckdb(tree, self.place)
        limit = int(self.settings.get("maximumBytesBilled") or 0)
        if limit and self.billed() > limit:
            problem = f"Query exceeded limit for bytes billed: {limit}. {self.billed()} or higher required."
            raise BigQueryError(problem, "bytesBilledLimitExceeded")
        return statement

    def value(self, expression: exp.Expression):
        """Return what a constant expression is worth in Python."""
        return first(self.cursor, f"SELECT {self.sql(expression)}")[0]

    # What stands in a FROM clause

    def place(self, table: exp.Table, name: Name | None) -> exp.Table:
        """Return what stands in DuckDB for a table or a function of a statement."""
        if name is None:
            return self.ml_function(table.this)
        if name.id.upper().startswith("INFORMATION_SCHEMA."):
            return self.information_schema(name)
        if name.id.endswith("*"):
            raise unimplemented("A wildcard table", "name the tables and join them with UNION ALL")
        body = self.warehouse.table(self.cursor, name)
        if body["type"] == "VIEW":
            view = Script(body["view"]["query"], self.warehouse.project)
            view.duckdb(view.statements[0], self.place)  # counts what the view reads
        else:
            size = self.warehouse.stored_bytes(self.cursor, name, self._names)
            self.read[name] = max(self.read.get(name, 0), size)
        return exp.table_(name.id, db=name.schema, quoted=True)

    def register(self, table: pa.Table) -> exp.Table:
        """Return an Arrow table as a part of the query."""
        self._registered += 1
        self.cursor.register(f"_registered_{self._registered}", table)
        return exp.table_(f"_registered_{self._registered}", quoted=True)

    def ml_function(self, call: MLFunction) -> exp.Table:
        """Return the rows of an ML function."""
        if not call.args.get("model"):
            raise BigQueryError(f"ML.{call.name} needs a model: ML.{call.name}(MODEL `dataset.model`, ...)")
        model = bqml.load(self.warehouse, self.cursor, self.script.name(call.args["model"]))
        rows = None
        if call.args.get("input"):
            query = self.sql(self.script.input(call))
            rows = self.cursor.sql(f"FROM ({query}) LIMIT 0" if self.is_dry else query).to_arrow_table()
        settings = self.value(call.args["settings"]) if call.args.get("settings") else {}
        return self.register(bqml.call(model, call.name, rows, settings))

    def information_schema(self, name: Name) -> exp.Table:
        """Return what a view of INFORMATION_SCHEMA shows."""
        view = name.id.split(".")[1].upper()
        if view not in _VIEWS:
            raise unimplemented(f"INFORMATION_SCHEMA.{view}", f"it has {', '.join(_VIEWS)}")
        datasets = [name.dataset]
        if view == "SCHEMATA" or name.dataset.lower().startswith("region-"):
            datasets = list(self.warehouse.resources(self.cursor, "dataset", name.project))
        rows = []
        for dataset in datasets:
            self.warehouse.dataset(self.cursor, name.project, dataset)
            rows += [(name.project, dataset, LOCATION)] if view == "SCHEMATA" else []
            tables = self.warehouse.resources(self.cursor, "table", f"{name.project}.{dataset}")
            for id_, body in tables.items() if view != "SCHEMATA" else ():
                table = (name.project, dataset, id_)
                if view == "TABLES":
                    rows.append((*table, "BASE TABLE" if body["type"] == "TABLE" else body["type"]))
                    continue
                for i, field in enumerate(body["schema"]["fields"], 1):
                    nullable = "NO" if field["mode"] == "REQUIRED" else "YES"
                    rows.append((*table, field["name"], i, nullable, googlesql_type(field)))
        types = [pa.int64() if column == "ordinal_position" else pa.string() for column in _VIEWS[view]]
        columns = zip(*rows, strict=True) if rows else [()] * len(types)
        arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
        return self.register(pa.table(arrays, names=_VIEWS[view]))

    # Queries and changes of rows

    def select(self, tree: exp.Query) -> dict:
        """Run a query into its destination."""
        query = self.sql(tree)
        fields = self.warehouse.columns(self.cursor, query)
        reference = self.settings.get("destinationTable")
        self.fields = unique(fields) if reference else renamed(fields)
        if self.is_dry:
            return {}
        self.destination = Name.of(reference) if reference else self.results
        if not reference:
            self.warehouse.store_results(self.cursor, self.results, query, self.fields)
            return {}
        write, create = self.settings.get("writeDisposition"), self.settings.get("createDisposition")
        with self.warehouse.writing(self.destination, self.cursor) as cursor:
            self.warehouse.store(cursor, self.destination, query, fields, write or "WRITE_EMPTY", create)
        return {}

    def change(self, tree: exp.Expression) -> dict:
        """Insert, update, delete, merge or truncate."""
        target = tree.expressions[0] if isinstance(tree, exp.TruncateTable) else tree.this
        target = target.this if isinstance(target, exp.Schema) else target
        statement = self.sql(tree)
        if self.is_dry:
            first(self.cursor, f"EXPLAIN {statement}")
            return {}
        if self.script.is_local(target):
            count = first(self.cursor, statement)[0]
        else:
            name = self.script.name(target)
            with self.warehouse.writing(name, self.cursor) as cursor:
                count = first(cursor, statement)[0]
                self.warehouse.describe(cursor, name)
        counts = {"dmlStats": {_COUNTS[kind(tree)]: str(count)}} if kind(tree) in _COUNTS else {}
        return {"numDmlAffectedRows": str(count), **counts}

    # Definitions

    def options(self, tree: exp.Expression) -> dict:
        """Return the OPTIONS of a statement, by their names in small letters."""
        properties = tree.find(exp.Properties)
        found = {}
        for property_ in properties.expressions if properties else ():
            if isinstance(property_, exp.FileFormatProperty | exp.LocationProperty):
                found["format" if isinstance(property_, exp.FileFormatProperty) else "location"] = property_.name
            elif type(property_) is exp.Property:
                found[property_.name.lower()] = self.value(property_.args["value"])
        return found

    def table_options(self, tree: exp.Expression) -> dict:
        """Return the OPTIONS of a table as properties of its resource."""
        options = self.options(tree)
        if unknown := sorted(options.keys() - _TABLE_OPTIONS):
            raise unimplemented(f"The option {unknown[0]} of a table")
        if "labels" in options:
            pairs = [pair.values() if isinstance(pair, dict) else pair for pair in options["labels"]]
            options["labels"] = dict(map(tuple, pairs))
        return {_TABLE_OPTIONS[key]: value for key, value in options.items()}

    def create_table(self, tree: exp.Create) -> dict:
        """Create a table: empty, from a query, or as another is."""
        table = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
        fields = self.columns_of(tree)
        query = self.sql(tree.expression) if tree.expression else None
        if source := tree.args.get("clone") or tree.find(exp.LikeProperty):
            name = self.script.name(source.this)
            fields = self.warehouse.table(self.cursor, name)["schema"]["fields"]
            query = f"FROM {name.sql}" if tree.args.get("clone") else None
        fields = fields or unique(self.warehouse.columns(self.cursor, query) if query else [])
        if self.is_dry:
            self.fields = fields
            return {}
        if tree.find(exp.TemporaryProperty):
            columns = ", ".join(f"{quoted(field['name'])} {duckdb_type(canonical(field))}" for field in fields)
            self.cursor.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(table.name)} ({columns})")
            first(self.cursor, f"INSERT INTO {quoted(table.name)} {query or 'SELECT NULL LIMIT 0'}")
            self.script.temporary.add(table.name.lower())
            return {"ddlOperationPerformed": "CREATE"}
        name, replace, properties = self.script.name(table), bool(tree.args.get("replace")), self.table_options(tree)
        return self.define(
            tree, name, lambda cursor: self.warehouse.create_table(cursor, name, fields, query, replace, **properties)
        )

    def define(self, tree: exp.Create, name: Name, create: Callable) -> dict:
        """Let `create` make a table or view, unless it is there and may stay; return the statistics."""
        with self.warehouse.writing(name, self.cursor) as cursor:
            exists = self.warehouse.find(cursor, name) is not None
            operation = "REPLACE" if exists else "CREATE"
            if exists and tree.args.get("exists"):
                operation = "SKIP"
            else:
                create(cursor)
        return {"ddlOperationPerformed": operation, "ddlTargetTable": name.reference}

    def columns_of(self, tree: exp.Create) -> list[dict]:
        """Return the schema that a CREATE TABLE spells out, or nothing."""
        columns = tree.this.expressions if isinstance(tree.this, exp.Schema) else ()
        return [self.field(column) for column in columns if isinstance(column, exp.ColumnDef)]

    def field(self, column: exp.ColumnDef) -> dict:
        """Return the field of BigQuery's schema for a column of a CREATE TABLE."""
        new = field_of(column.name, column.args["kind"])
        for constraint in column.args.get("constraints", []):
            what = constraint.args["kind"]
            if isinstance(what, exp.NotNullColumnConstraint):
                new["mode"] = "REQUIRED"
            elif isinstance(what, exp.Properties):
                new |= {property_.name: property_.args["value"].name for property_ in what.expressions}
            else:
                raise unimplemented(f"{constraint.sql('bigquery')} in a column")
        return new

    def create_external_table(self, tree: exp.Create) -> dict:
        """Create a table whose rows stay in the files of a bucket."""
        fields, options = self.columns_of(tree), self.options(tree)
        name = self.script.name(tree.this.this if isinstance(tree.this, exp.Schema) else tree.this)
        definition = {"sourceFormat": options.pop("format", "CSV"), "sourceUris": options.pop("uris", [])}
        definition |= {bqml.camel_case(key): value for key, value in options.items()}
        definition |= {"schema": {"fields": fields}} if fields else {"autodetect": True}
        if self.is_dry:
            return {}
        return self.define(
            tree,
            name,
            lambda cursor: bigquery_files.create_external(
                self.warehouse, cursor, name, definition, bool(tree.args.get("replace"))
            ),
        )

    def create_view(self, tree: exp.Create) -> dict:
        """Create a view."""
        if tree.expression.find(MLFunction):
            raise unimplemented("A view that calls an ML function", "create a table from the query")
        query, name = self.sql(tree.expression), self.script.name(tree.this)
        self.warehouse.columns(self.cursor, query)
        if self.is_dry:
            return {}
        properties = {
            "view": {"query": tree.expression.sql("bigquery"), "useLegacySql": False},
            **self.table_options(tree),
        }
        return self.define(
            tree,
            name,
            lambda cursor: self.warehouse.create_view(
                cursor, name, query, "VIEW", bool(tree.args.get("replace")), **properties
            ),
        )

    def create_schema(self, tree: exp.Create) -> dict:
        """Create a dataset."""
        body = {key: value for key, value in self.options(tree).items() if key in ("description", "location")}
        self.check_dataset(tree.this)
        if not self.is_dry:
            with self.warehouse.transaction(self.cursor) as cursor:
                self.warehouse.create_dataset(cursor, tree.this.db, body, bool(tree.args.get("exists")))
        return {"ddlOperationPerformed": "CREATE"}

    def check_dataset(self, dataset: exp.Table) -> None:
        """Raise BigQueryError for a dataset of another project."""
        self.warehouse.check_writable(Name(dataset.catalog or self.warehouse.project, dataset.db, "*"))

    def create_function(self, tree: exp.Create) -> dict:
        """Create a function of SQL that lives as long as the script."""
        if not isinstance(tree.expression, exp.Expression) or tree.find(exp.LanguageProperty):
            raise unimplemented("A function in JavaScript", "write it in SQL")
        name = tree.this.this.name
        arguments = ", ".join(quoted(argument.name) for argument in tree.this.expressions)
        self.cursor.execute(f"CREATE OR REPLACE TEMP MACRO {quoted(name)}({arguments}) AS {self.sql(tree.expression)}")
        self.script.temporary.add(name.lower())
        return {"ddlOperationPerformed": "CREATE"}

    def alter_table(self, tree: exp.Alter) -> dict:
        """Add, drop or rename columns, or change what is said of a table."""
        name = self.script.name(tree.this)
        fields = self.warehouse.table(self.cursor, name)["schema"]["fields"]
        if self.is_dry:
            return {}
        with self.warehouse.writing(name, self.cursor) as cursor:
            properties = {}
            for action in tree.args["actions"]:
                if isinstance(action, exp.ColumnDef):
                    fields.append(canonical(self.field(action)))
                    self.warehouse.add_column(cursor, name, fields[-1])
                elif isinstance(action, exp.Drop) and action.args["kind"] == "COLUMN":
                    cursor.execute(f"ALTER TABLE {name.sql} DROP COLUMN {quoted(action.args['tables'][0].name)}")
                elif isinstance(action, exp.RenameColumn):
                    old, new = action.this.name, action.args["to"].name
                    cursor.execute(f"ALTER TABLE {name.sql} RENAME COLUMN {quoted(old)} TO {quoted(new)}")
                    fields += [{**field, "name": new} for field in fields if field["name"].lower() == old.lower()]
                elif isinstance(action, exp.AlterSet):
                    properties |= self.table_options(action)
                else:
                    raise unimplemented(f"ALTER TABLE ... {action.sql('bigquery')}")
            self.warehouse.describe(cursor, name, fields, **properties)
        return {"ddlOperationPerformed": "ALTER", "ddlTargetTable": name.reference}

    def drop(self, tree: exp.Drop) -> dict:
        """Remove a table, a view, a model or a dataset."""
        table, missing_ok = tree.args["tables"][0], bool(tree.args.get("exists"))
        if self.is_dry:
            return {}
        if tree.kind == "SCHEMA":
            self.check_dataset(table)
            with self.warehouse.transaction(self.cursor) as cursor:
                self.warehouse.drop_dataset(cursor, table.db, bool(tree.args.get("cascade")), missing_ok)
        elif self.script.is_local(table):
            self.cursor.execute(f"DROP TABLE {quoted(table.name)}")
            self.script.temporary.discard(table.name.lower())
        else:
            name = self.script.name(table)
            with self.warehouse.writing(name, self.cursor) as cursor:
                self.warehouse.drop(cursor, name, missing_ok, "model" if tree.kind == "MODEL" else "table")
        return {"ddlOperationPerformed": "DROP"}

    # Models

    def create_model(self, tree: exp.Create) -> dict:
        """Train a model."""
        name, options = self.script.name(tree.this), self.options(tree)
        if tree.find(exp.TransformModelProperty):
            raise unimplemented("TRANSFORM", "compute the features in the query, for training and for prediction")
        if not isinstance(tree.expression, exp.Query):
            raise unimplemented("CREATE MODEL without a query")
        exists = self.warehouse.get(self.cursor, "model", name.schema, name.id) is not None
        if exists and tree.args.get("exists"):
            return {"ddlOperationPerformed": "SKIP"}
        if not (exists and tree.args.get("replace")):
            self.warehouse.check_new(self.cursor, name)
        query = self.sql(tree.expression)
        plan = bqml.plan(options, self.warehouse.columns(self.cursor, query))
        if not self.is_dry:
            body, data = bqml.train(plan, self.cursor.sql(query).to_arrow_table(), self.should_stop)
            with self.warehouse.writing(name, self.cursor) as cursor:
                body |= {"creationTime": now(), "lastModifiedTime": now()}
                self.warehouse.put(cursor, "model", name.schema, name.id, body, data)
        return {"ddlOperationPerformed": "REPLACE" if exists else "CREATE"}

    # Files and variables

    def export_data(self, tree: exp.Export) -> dict:
        """Write a query's rows to a bucket."""
        options = self.options(tree)
        if unknown := sorted(options.keys() - _EXPORT):
            raise unimplemented(f"The option {unknown[0]} of EXPORT DATA")
        if "*" not in options.get("uri", ""):
            raise BigQueryError("Option 'uri' value must be a wildcard URI.")
        query = self.sql(tree.this)
        if not self.is_dry:
            settings = {_EXPORT[key]: value for key, value in {**options, "uri": [options["uri"]]}.items()}
            bigquery_files.write(self.warehouse, self.cursor, query, settings)
        return {}

    def declare(self, tree: exp.Declare) -> dict:
        """Declare variables, which have a value from then on."""
        for item in tree.expressions:
            value = item.args.get("default") or exp.null()
            value = exp.cast(value, item.args["kind"]) if item.args.get("kind") else value
            for variable in item.this if isinstance(item.this, list) else [item.this]:
                self.assign(variable.name, value)
        return {}

    def set_variables(self, tree: exp.Set) -> dict:
        """Give variables new values."""
        for item in tree.expressions:
            left, right = item.this.this, item.this.expression
            is_tuple = isinstance(left, exp.Tuple)
            for target, value in zip(left.expressions, right.expressions, strict=True) if is_tuple else [(left, right)]:
                if target.name.lower() not in self.script.variables:
                    raise BigQueryError(f"Undeclared variable: {target.name}{self.script.at(target.this)}")
                self.assign(target.name, value)
        return {}

    def assign(self, name: str, value: exp.Expression) -> None:
        """Keep a value under a name, as a literal with its type."""
        type_, text = first(self.cursor, f"SELECT typeof(v), CAST(v AS VARCHAR) FROM (SELECT {self.sql(value)} AS v)")
        literal = exp.null() if text is None else exp.Literal.string(text)
        type_ = exp.DataType.build("BIGINT" if type_ == '"NULL"' else type_, dialect="duckdb")
        self.script.variables[name.lower()] = exp.cast(literal, type_)


_METHODS = {
    "SELECT": "select",
    **dict.fromkeys(("INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE_TABLE"), "change"),
    **dict.fromkeys(("CREATE_TABLE", "CREATE_TABLE_AS_SELECT"), "create_table"),
    **dict.fromkeys(("DROP_TABLE", "DROP_VIEW", "DROP_MODEL", "DROP_SCHEMA"), "drop"),
    "CREATE_EXTERNAL_TABLE": "create_external_table",
    "CREATE_VIEW": "create_view",
    "CREATE_SCHEMA": "create_schema",
    "CREATE_FUNCTION": "create_function",
    "CREATE_MODEL": "create_model",
    "ALTER_TABLE": "alter_table",
    "EXPORT_DATA": "export_data",
    "DECLARE": "declare",
    "SET": "set_variables",
}


def field_of(name: str, type_: exp.DataType) -> dict:
    """Return the field of BigQuery's schema for a name and a type of GoogleSQL."""
    if type_.is_type(exp.DType.ARRAY):
        return {**field_of(name, type_.expressions[0]), "mode": "REPEATED"}
    if type_.is_type(exp.DType.STRUCT):
        children = [field_of(child.name, child.args["kind"]) for child in type_.expressions]
        return {"name": name, "type": "RECORD", "mode": "NULLABLE", "fields": children}
    return {"name": name, "type": type_.sql("bigquery").partition("(")[0], "mode": "NULLABLE"}


def unique(fields: list[dict]) -> list[dict]:
    """Return the schema of a query whose rows a table is to hold; BigQueryError if two columns have one name."""
    names = [field["name"].lower() for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BigQueryError(
            "Duplicate column names in the result are not supported when a destination table is present. "
            f"Found duplicate(s): {', '.join(twice)}"
        )
    return fields


def renamed(fields: list[dict]) -> list[dict]:
    """Return the schema of a query's result, where a name that comes again gets a number."""
    seen: dict[str, int] = {}
    new = []
    for field in fields:
        count = seen[field["name"].lower()] = seen.get(field["name"].lower(), -1) + 1
        new.append({**field, "name": f"{field['name']}_{count}"} if count else field)
    return new
