"""What each statement of GoogleSQL does to the warehouse.

    query = Query(warehouse, cursor, Script(...), configuration, results)
    statistics = query.run()           # BigQuery's JSON; the rows are in the table query.destination
"""

from collections.abc import Callable

import duckdb
from sqlglot import exp

from helpers.local import bqml, transfers
from helpers.local.googlesql import MLFunction, Script, kind
from helpers.local.warehouse import BigQueryError, Name, Warehouse, data_type, now, quoted, type_of, unimplemented

_MEGABYTE = 1 << 20
_BILLED_AT_LEAST = 10 * _MEGABYTE  # for each table that a query reads
_TABLE_OPTIONS = {"description": "description", "friendly_name": "friendlyName", "labels": "labels"}
_COUNTED = {"INSERT": "insertedRowCount", "UPDATE": "updatedRowCount", "DELETE": "deletedRowCount"}


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
        self.settings = configuration["query"]
        self.is_dry = configuration.get("dryRun", False)
        self.results = results
        self.destination: Name | None = None
        self.fields: list[dict] = []
        self.read: dict[Name, int] = {}  # what was read, in bytes
        self.names: set[str] | None = None  # that stand in the present statement; None: all columns
        self.registered = 0
        for id_, definition in self.settings.get("tableDefinitions", {}).items():
            files = transfers.files_of(warehouse, definition["sourceUris"])
            source, _ = transfers.read(warehouse, cursor, definition, files, None)
            cursor.execute(f"CREATE TEMP VIEW {quoted(id_)} AS {source}")
            script.temporary.add(id_.lower())

    def run(self) -> dict:
        """Run all statements and return what BigQuery's JSON has as `statistics.query`."""
        statistics = {}
        for tree in self.script.statements:
            stars = (star for star in tree.find_all(exp.Star) if not isinstance(star.parent, exp.Count))
            identifiers = {identifier.name.lower() for identifier in tree.find_all(exp.Identifier)}
            self.names = None if any(stars) else identifiers
            self.destination, self.fields = None, []
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
        """Return the bytes that BigQuery would bill: whole megabytes, for each table ten at least."""
        return sum(max(_BILLED_AT_LEAST, -(-size // _MEGABYTE) * _MEGABYTE) for size in self.read.values())

    def sql(self, tree: exp.Expression) -> str:
        """Return a statement or a part of one in DuckDB's SQL, once it is known to cost no more than allowed."""
        statement = self.script.duckdb(tree, self.place)
        limit = int(self.settings.get("maximumBytesBilled") or 0)
        if limit and self.billed() > limit:
            raise BigQueryError(
                f"Query exceeded limit for bytes billed: {limit}. {self.billed()} or higher required.",
                "bytesBilledLimitExceeded",
            )
        return statement

    def value(self, expression: exp.Expression):
        """Return what a constant expression is worth in Python."""
        return self.cursor.execute(f"SELECT {self.sql(expression)}").fetchone()[0]

    # What stands in a FROM clause

    def place(self, table: exp.Table, name: Name | None) -> exp.Table:
        """Return what stands in DuckDB for a table or a function of a statement."""
        if name is None:
            return self.ml_function(table.this)
        if name.id.upper().startswith("INFORMATION_SCHEMA."):
            return self.information_schema(name)
        self.warehouse.table(self.cursor, name)
        self.read[name] = max(self.read.get(name, 0), self.warehouse.stored_bytes(self.cursor, name, self.names))
        return exp.table_(name.id, db=name.schema, quoted=True)

    def register(self, table) -> exp.Table:
        """Return an Arrow table as a part of the query."""
        self.registered += 1
        self.cursor.register(f"_registered_{self.registered}", table)
        return exp.table_(f"_registered_{self.registered}", quoted=True)

    def ml_function(self, call: MLFunction) -> exp.Table:
        """Return the rows of an ML function."""
        if not call.args.get("model"):
            raise BigQueryError(f"ML.{call.name} needs a model: ML.{call.name}(MODEL `dataset.model`, ...)")
        model = bqml.load(self.warehouse, self.cursor, self.script.name(call.args["model"]))
        rows = None
        if call.args.get("input"):
            query = self.sql(self.script.input(call))
            # A dry run needs the columns alone.
            rows = self.cursor.execute(f"FROM ({query}) LIMIT 0" if self.is_dry else query).to_arrow_table()
        settings = self.value(call.args["settings"]) if call.args.get("settings") else {}
        return self.register(bqml.call(model, call.name, rows, settings))

    def information_schema(self, name: Name) -> exp.Table:
        """Return what a view of INFORMATION_SCHEMA shows."""
        import pyarrow as pa

        view = name.id.split(".")[1].upper()
        parents = [name.dataset]
        if view == "SCHEMATA" or name.dataset.lower().startswith("region-"):
            parents = [id_ for id_, _ in self.warehouse.resources(self.cursor, "dataset", name.project)]
        rows = []
        for parent in parents:
            self.warehouse.dataset(self.cursor, name.project, parent)
            first = {"catalog_name": name.project, "schema_name": parent}
            if view == "SCHEMATA":
                rows.append({**first, "location": "US"})
                continue
            for id_, body in self.warehouse.resources(self.cursor, "table", f"{name.project}.{parent}"):
                table = {"table_catalog": name.project, "table_schema": parent, "table_name": id_}
                if view == "TABLES":
                    rows.append({**table, "table_type": "BASE TABLE" if body["type"] == "TABLE" else body["type"]})
                for position, field in enumerate(body["schema"]["fields"], 1) if view == "COLUMNS" else ():
                    column = {"column_name": field["name"], "ordinal_position": position}
                    nullable = "NO" if field["mode"] == "REQUIRED" else "YES"
                    rows.append({**table, **column, "is_nullable": nullable, "data_type": data_type(field)})
        if view not in _VIEWS:
            raise unimplemented(f"INFORMATION_SCHEMA.{view}", f"it has {', '.join(_VIEWS)}")
        schema = pa.schema([(column, pa.int64() if column == "ordinal_position" else pa.string()) for column in _VIEWS[view]])
        return self.register(pa.Table.from_pylist(rows, schema))

    # Queries and changes of rows

    def select(self, tree: exp.Query) -> dict:
        """Run a query into its destination."""
        query = self.sql(tree)
        self.fields = self.warehouse.columns(self.cursor, query)
        if not self.is_dry:
            reference = self.settings.get("destinationTable")
            self.destination = Name.of(reference) if reference else self.results
            write = self.settings.get("writeDisposition") or "WRITE_EMPTY"
            self.store(self.destination, query, write if reference else "WRITE_TRUNCATE")
        return {}

    def store(self, name: Name, query: str, write: str) -> None:
        """Write a query's rows into a table, in one step."""
        create = self.settings.get("createDisposition") or "CREATE_IF_NEEDED"
        with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
            self.warehouse.store(self.cursor, name, query, self.fields, write, create)

    def change(self, tree: exp.Expression) -> dict:
        """Insert, update, delete, merge or truncate."""
        target = tree.expressions[0] if isinstance(tree, exp.TruncateTable) else tree.this
        target = target.this if isinstance(target, exp.Schema) else target
        statement = self.sql(tree)
        if self.is_dry:
            self.cursor.execute(f"EXPLAIN {statement}")
            return {}
        if self.script.is_local(target):
            return self.changed(tree, self.cursor.execute(statement).fetchone()[0])
        name = self.script.name(target)
        self.warehouse.check_writable(name)
        with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
            count = self.cursor.execute(statement).fetchone()[0]
            self.warehouse.describe(self.cursor, name)
        return self.changed(tree, count)

    def changed(self, tree: exp.Expression, count: int) -> dict:
        """Return the statistics of a change of rows."""
        counted = {_COUNTED[kind(tree)]: str(count)} if kind(tree) in _COUNTED else {}
        return {"numDmlAffectedRows": str(count), **({"dmlStats": counted} if counted else {})}

    # Definitions

    def defined(self, operation: str, name: Name, key: str = "ddlTargetTable") -> dict:
        """Return the statistics of a definition."""
        return {"ddlOperationPerformed": operation, key: name.reference}

    def options(self, tree: exp.Expression) -> dict:
        """Return the OPTIONS of a statement, by their names in small letters."""
        properties = tree.find(exp.Properties)
        found = {}
        for property_ in properties.expressions if properties else ():
            if isinstance(property_, exp.FileFormatProperty | exp.LocationProperty):
                found["format" if isinstance(property_, exp.FileFormatProperty) else "location"] = property_.name
            elif type(property_) is exp.Property:
                key = property_.name.lower()
                if property_.args["value"].find(exp.Anonymous):
                    raise unimplemented(f"{property_.args['value'].sql('bigquery')} in the option {key}")
                found[key] = self.value(property_.args["value"])
        return found

    def table_options(self, tree: exp.Expression) -> dict:
        """Return the OPTIONS of a table as properties of its resource."""
        options = self.options(tree)
        if unknown := sorted(options.keys() - _TABLE_OPTIONS):
            raise unimplemented(f"The option {unknown[0]} of a table")
        if "labels" in options:
            options["labels"] = dict(map(_pair, options["labels"]))
        return {_TABLE_OPTIONS[key]: value for key, value in options.items()}

    def create_table(self, tree: exp.Create) -> dict:
        """Create a table: empty, from a query, or as a copy."""
        schema = tree.this if isinstance(tree.this, exp.Schema) else None
        table = schema.this if schema else tree.this
        columns = [column for column in schema.expressions if isinstance(column, exp.ColumnDef)] if schema else []
        fields = [self.field(column) for column in columns]
        source = tree.args.get("clone") or tree.find(exp.LikeProperty)
        query = self.sql(tree.expression) if tree.expression else None
        if source:
            name = self.script.name(source.this)
            fields = self.warehouse.table(self.cursor, name)["schema"]["fields"]
            query = f"FROM {name.sql}" if tree.args.get("clone") else None
        if query and not fields:
            fields = self.warehouse.columns(self.cursor, query)
            names = [field["name"].lower() for field in fields]
            if twice := sorted({column for column in names if names.count(column) > 1}):
                raise BigQueryError(
                    "Duplicate column names in the result are not supported when a destination table is present. "
                    f"Found duplicate(s): {', '.join(twice)}"
                )
        self.fields = fields
        if self.is_dry:
            return {}
        if tree.find(exp.TemporaryProperty):
            return self.create_temporary(table, fields, query)
        name = self.script.name(table)
        with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
            exists = self.warehouse.find(self.cursor, name) is not None
            if exists and tree.args.get("exists"):
                return self.defined("SKIP", name)
            if exists and tree.args.get("replace"):
                self.warehouse.drop(self.cursor, name)
            self.warehouse.create_table(self.cursor, name, fields, **self.table_options(tree))
            if query:
                self.cursor.execute(f"INSERT INTO {name.sql} {query}")
        self.fields = []
        return self.defined("REPLACE" if exists else "CREATE", name)

    def create_temporary(self, table: exp.Table, fields: list[dict], query: str | None) -> dict:
        """Create a table that lives as long as the script."""
        columns = ", ".join(f"{quoted(field['name'])} {type_of(field)}" for field in fields)
        self.cursor.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(table.name)} ({columns})")
        if query:
            self.cursor.execute(f"INSERT INTO {quoted(table.name)} {query}")
        self.script.temporary.add(table.name.lower())
        self.fields = []
        return {"ddlOperationPerformed": "CREATE"}

    def field(self, column: exp.ColumnDef) -> dict:
        """Return the field of BigQuery's schema for a column of a CREATE TABLE."""
        new = field_of(column.name, column.args["kind"])
        for constraint in column.args.get("constraints", []):
            what = constraint.args["kind"]
            if isinstance(what, exp.NotNullColumnConstraint):
                new["mode"] = "REQUIRED"
            elif isinstance(what, exp.DefaultColumnConstraint):
                new["defaultValueExpression"] = self.sql(what.this)
            elif isinstance(what, exp.Properties):
                new |= {"description": property_.args["value"].name for property_ in what.expressions}
            else:
                raise unimplemented(f"{constraint.sql('bigquery')} in a column")
        return new

    def create_external_table(self, tree: exp.Create) -> dict:
        """Create a table whose rows stay in the files of a bucket."""
        fields = [self.field(column) for column in tree.this.expressions] if isinstance(tree.this, exp.Schema) else []
        name = self.script.name(tree.this.this if fields else tree.this)
        options = self.options(tree)
        definition = {"sourceFormat": options.pop("format", "CSV"), "sourceUris": options.pop("uris", [])}
        definition |= {camel_case(key): value for key, value in options.items()}
        definition |= {"schema": {"fields": fields}} if fields else {"autodetect": True}
        if not self.is_dry:
            with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
                transfers.create_external(self.warehouse, self.cursor, name, definition, bool(tree.args.get("replace")))
        return self.defined("CREATE", name)

    def create_view(self, tree: exp.Create) -> dict:
        """Create a view."""
        if tree.expression.find(MLFunction):
            raise unimplemented("A view that calls an ML function", "create a table from the query")
        query, name = self.sql(tree.expression), self.script.name(tree.this)
        self.warehouse.columns(self.cursor, query)
        if self.is_dry:
            return {}
        with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
            exists = self.warehouse.find(self.cursor, name) is not None
            if exists and tree.args.get("exists"):
                return self.defined("SKIP", name)
            if exists and tree.args.get("replace"):
                self.warehouse.drop(self.cursor, name)
            source = {"query": tree.expression.sql("bigquery"), "useLegacySql": False}
            self.warehouse.create_view(self.cursor, name, query, "VIEW", view=source, **self.table_options(tree))
        return self.defined("REPLACE" if exists else "CREATE", name)

    def create_schema(self, tree: exp.Create) -> dict:
        """Create a dataset."""
        options = self.options(tree)
        body = {key: options[key] for key in ("description", "location") if key in options}
        if not self.is_dry:
            with self.warehouse.transaction(self.cursor):
                self.warehouse.create_dataset(self.cursor, tree.this.db, body, bool(tree.args.get("exists")))
        return {"ddlOperationPerformed": "CREATE"}

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
        self.warehouse.check_writable(name)
        fields = {field["name"].lower(): field for field in self.warehouse.table(self.cursor, name)["schema"]["fields"]}
        changes, properties = [], {}
        for action in tree.args["actions"]:
            if isinstance(action, exp.ColumnDef):
                field = self.field(action)
                changes += transfers.add_columns([field])
                fields[field["name"].lower()] = field
            elif isinstance(action, exp.Drop) and action.args["kind"] == "COLUMN":
                changes.append(f"DROP COLUMN {quoted(action.args['tables'][0].name)}")
            elif isinstance(action, exp.RenameColumn):
                old, new = action.this.name, action.args["to"].name
                changes.append(f"RENAME COLUMN {quoted(old)} TO {quoted(new)}")
                fields[new.lower()] = {**fields.get(old.lower(), {}), "name": new}
            elif isinstance(action, exp.AlterSet):
                properties |= self.table_options(action)
            else:
                raise unimplemented(f"ALTER TABLE ... {action.sql('bigquery')}")
        if not self.is_dry:
            with self.warehouse.locks[name], self.warehouse.transaction(self.cursor):
                for change in changes:
                    self.cursor.execute(f"ALTER TABLE {name.sql} {change}")
                schema = {"fields": list(fields.values())}
                self.warehouse.describe(self.cursor, name, schema=schema, **properties)
        return self.defined("ALTER", name)

    def drop(self, tree: exp.Drop) -> dict:
        """Remove a table, a view, a model or a dataset."""
        table, missing_ok = tree.args["tables"][0], bool(tree.args.get("exists")) or self.is_dry
        with self.warehouse.transaction(self.cursor):
            if tree.kind == "SCHEMA":
                if not self.is_dry:
                    self.warehouse.drop_dataset(self.cursor, table.db, bool(tree.args.get("cascade")), missing_ok)
                return {"ddlOperationPerformed": "DROP"}
            if self.script.is_local(table):
                self.cursor.execute(f"DROP TABLE {quoted(table.name)}")
                self.script.temporary.discard(table.name.lower())
                return {"ddlOperationPerformed": "DROP"}
            name = self.script.name(table)
            if not self.is_dry:
                drop = self.warehouse.drop_model if tree.kind == "MODEL" else self.warehouse.drop
                drop(self.cursor, name, missing_ok)
        return self.defined("DROP", name)

    # Models

    def create_model(self, tree: exp.Create) -> dict:
        """Train a model."""
        name, options = self.script.name(tree.this), self.options(tree)
        if tree.find(exp.TransformModelProperty):
            raise unimplemented("TRANSFORM", "compute the features in the query, for training and for prediction")
        if not isinstance(tree.expression, exp.Query):
            raise unimplemented("CREATE MODEL without a query")
        self.warehouse.check_writable(name)
        self.warehouse.dataset(self.cursor, name.project, name.dataset)
        exists = self.warehouse.get(self.cursor, "model", name.schema, name.id) is not None
        if exists and tree.args.get("exists"):
            return self.defined("SKIP", name)
        if exists and not tree.args.get("replace"):
            raise BigQueryError(f"Already Exists: Model {name}", "duplicate")
        if self.warehouse.find(self.cursor, name):
            raise BigQueryError(f"Already Exists: Table {name}", "duplicate")
        query = self.sql(tree.expression)
        fields = self.warehouse.columns(self.cursor, query)
        plan = bqml.plan(options, fields)
        if not self.is_dry:
            rows = self.cursor.execute(query).to_arrow_table()
            body, data = bqml.train(plan, rows, self.should_stop)
            with self.warehouse.transaction(self.cursor):
                body |= {"creationTime": now(), "lastModifiedTime": now()}
                self.warehouse.put(self.cursor, "model", name.schema, name.id, body, data)
        return self.defined("REPLACE" if exists else "CREATE", name)

    # Files and variables

    def export_data(self, tree: exp.Export) -> dict:
        """Write a query's rows to a bucket."""
        options = self.options(tree)
        known = {"uri": "destinationUri", "format": "destinationFormat", "header": "printHeader"}
        known |= {"compression": "compression", "field_delimiter": "fieldDelimiter", "overwrite": "overwrite"}
        if unknown := sorted(options.keys() - known):
            raise unimplemented(f"The option {unknown[0]} of EXPORT DATA")
        if "*" not in options.get("uri", ""):
            raise BigQueryError("Option 'uri' value must be a wildcard URI.")
        query = self.sql(tree.this)
        if not self.is_dry:
            transfers.write(self.warehouse, self.cursor, query, {known[key]: value for key, value in options.items()})
        return {}

    def declare(self, tree: exp.Declare) -> dict:
        """Declare variables, which have a value from then on."""
        for item in tree.expressions:
            default = item.args.get("default") or exp.null()
            kind_ = item.args.get("kind")
            for variable in item.this if isinstance(item.this, list) else [item.this]:
                self.assign(variable.name, exp.cast(default.copy(), kind_) if kind_ else default)
        return {}

    def set_(self, tree: exp.Set) -> dict:
        """Give variables new values."""
        for item in tree.expressions:
            left, right = item.this.this, item.this.expression
            targets = left.expressions if isinstance(left, exp.Tuple) else [left]
            values = right.expressions if isinstance(left, exp.Tuple) else [right]
            for target, value in zip(targets, values, strict=True):
                if target.name.lower() not in self.script.variables:
                    raise BigQueryError(f"Undeclared variable: {target.name}{self.script.at(target.this)}")
                self.assign(target.name, value)
        return {}

    def assign(self, name: str, value: exp.Expression) -> None:
        """Keep a value under a name, as a literal with its type."""
        query = f"SELECT typeof(v), CAST(v AS VARCHAR) FROM (SELECT {self.sql(value)} AS v)"
        type_, value_text = self.cursor.execute(query).fetchone()
        literal = exp.null() if value_text is None else exp.Literal.string(value_text)
        type_ = "BIGINT" if type_ == '"NULL"' else type_
        self.script.variables[name.lower()] = exp.cast(literal, exp.DataType.build(type_, dialect="duckdb"))


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
    "SET": "set_",
}

_VIEWS = {
    "SCHEMATA": ("catalog_name", "schema_name", "location"),
    "TABLES": ("table_catalog", "table_schema", "table_name", "table_type"),
    "COLUMNS": (
        *("table_catalog", "table_schema", "table_name", "column_name", "ordinal_position", "is_nullable", "data_type"),
    ),
}


def field_of(name: str, type_: exp.DataType) -> dict:
    """Return the field of BigQuery's schema for a name and a type of GoogleSQL."""
    if type_.is_type(exp.DType.ARRAY):
        return {**field_of(name, type_.expressions[0]), "mode": "REPEATED"}
    field = {"name": name, "type": type_.this.name, "mode": "NULLABLE"}
    if type_.is_type(exp.DType.STRUCT):
        children = [field_of(child.name, child.args["kind"]) for child in type_.expressions]
        return {**field, "type": "RECORD", "fields": children}
    return {**field, "type": type_.sql("bigquery").partition("(")[0]}


def camel_case(name: str) -> str:
    """Return the name that BigQuery's JSON has for an option of GoogleSQL."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _pair(value: dict | tuple) -> list:
    return list(value.values() if isinstance(value, dict) else value)
