"""GoogleSQL for DuckDB: parsed, its names resolved, rewritten where DuckDB differs, its errors worded as BigQuery's.

    script = Script("SELECT species FROM `bigquery-public-data.ml_datasets.penguins`", "my-project")
    for statement in script.statements:
        print(kind(statement), script.duckdb(statement, place))

sqlglot does most of the translation. This module adds what its DuckDB dialect leaves different: `MACROS`, functions
that BigQuery has and DuckDB lacks, and the transforms of a generator. A function that neither knows is refused.
"""

import logging
import re
from collections.abc import Callable
from difflib import get_close_matches

from sqlglot import exp
from sqlglot.dialects.bigquery import BigQuery
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.errors import ErrorLevel, ParseError, TokenError, UnsupportedError
from sqlglot.generators.duckdb import DuckDBGenerator
from sqlglot.parsers.bigquery import BigQueryParser
from sqlglot.tokens import TokenType

from helpers.local.bigquery_schemas import BigQueryError, Name, unimplemented

# What DuckDB lacks

MACROS = {
    # DuckDB's own error() may not stand inside TRY, which SAFE. needs; a cast that cannot succeed may.
    "bq_fail(message)": "CAST('!' || message AS BIGINT)",
    "bq_divide(a, b)": "CASE WHEN b = 0 THEN bq_fail('division by zero: ' || a || ' / ' || b) ELSE a / b END",
    "bq_mod(a, b)": "CASE WHEN b = 0 THEN bq_fail('division by zero: MOD(' || a || ', 0)') ELSE a % b END",
    "bq_div(a, b)": "CASE WHEN b = 0 THEN bq_fail('division by zero: DIV(' || a || ', 0)') ELSE a // b END",
    "bq_ln(x)": "CASE WHEN x <= 0 THEN bq_fail('Floating point error in function: LN(' || x || ')') ELSE ln(x) END",
    "bq_sqrt(x)": "CASE WHEN x < 0 THEN bq_fail('Argument to SQRT cannot be negative: ' || x) ELSE sqrt(x) END",
    "bq_at(list, n)": "CASE WHEN n BETWEEN 1 AND len(list) THEN list[n] "
    "ELSE list[bq_fail('Array index ' || (n - 1) || ' is out of bounds')] END",
    "bq_is_whole(x)": r"regexp_full_match(CAST(x AS VARCHAR), '\s*[+-]?(\d+|0[xX][0-9a-fA-F]+)\s*')",
    # Halves are rounded away from zero, and a text with a fraction is no integer.
    "bq_int64(x)": "CASE WHEN typeof(x) = 'VARCHAR' AND NOT bq_is_whole(x) THEN bq_fail('Bad int64 value: ' || x) "
    "WHEN typeof(x) IN ('DOUBLE', 'FLOAT') THEN CAST(round(CAST(x AS DOUBLE)) AS BIGINT) ELSE CAST(x AS BIGINT) END",
    "bq_byte_length(x)": "CASE WHEN typeof(x) = 'BLOB' THEN octet_length(CAST(x AS BLOB)) "
    "ELSE strlen(CAST(x AS VARCHAR)) END",
    "bq_range_bucket(x, bounds)": "len(list_filter(bounds, lambda bound: bound <= x))",
    "ieee_divide(a, b)": "CAST(a AS DOUBLE) / CAST(b AS DOUBLE)",
    "nullifzero(x)": "nullif(x, 0)",
    "zeroifnull(x)": "coalesce(x, 0)",
    "array_first(list)": "bq_at(list, 1)",
    "array_last(list)": "bq_at(list, len(list))",
    "array_includes(list, x)": "list_contains(list, x)",
    "array_is_distinct(list)": "len(list) = len(list_distinct(list))",
}

# Functions that sqlglot does not know and DuckDB has.
_CALLABLE = {name.partition("(")[0] for name in MACROS if not name.startswith("bq_")} | {"error"}


# Parsing


class MLFunction(exp.Expression):
    """ML.NAME(MODEL model, input, settings) in a FROM clause; `this` is the name in capitals, without ML."""

    arg_types = {"this": True, "model": True, "input": False, "settings": False}


class _Parser(BigQueryParser):
    def _parse_table(self, *args, **kwargs):
        function = [token.text.upper() for token in self._tokens[self._index : self._index + 4]]
        if len(function) < 4 or function[:2] != ["ML", "."] or function[3] != "(":
            return super()._parse_table(*args, **kwargs)
        self._advance(4)
        call = MLFunction(this=function[2])
        while not self._match(TokenType.R_PAREN):
            if self._match_text_seq("MODEL"):
                call.set("model", super()._parse_table())
            elif self._match_text_seq("TABLE") or self._match(TokenType.L_PAREN, advance=False):
                call.set("input", super()._parse_table())
            else:
                call.set("settings", self._parse_assignment())
            if not self._match(TokenType.COMMA) and self._curr and self._curr.token_type != TokenType.R_PAREN:
                self.raise_error("Expecting )")
            if not self._curr:
                self.raise_error("Expecting )")
        return self.expression(exp.Table(this=call, alias=self._parse_table_alias()))


logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns of statements that are refused here anyway


class _GoogleSQL(BigQuery):
    Parser = _Parser


def parse(text: str) -> list[exp.Expression]:
    """Return the statements of a script; BigQueryError says where the syntax is wrong."""
    dialect = _GoogleSQL()
    try:
        tokens = dialect.tokenize(text)
        trees = dialect.parser(error_level=ErrorLevel.IMMEDIATE).parse(tokens, text)
    except TokenError:
        raise BigQueryError(f"Syntax error: Unclosed string literal at {_unclosed(text)}") from None
    except ParseError as error:
        raise _syntax_error(text, tokens, error.errors[0]) from None
    statements = [tree for tree in trees if tree is not None]
    for delete in statements:
        if isinstance(delete, exp.Delete) and not delete.this:  # DELETE without FROM
            delete.set("this", delete.args["tables"][0])
            delete.set("tables", None)
    if not statements:
        raise BigQueryError("Syntax error: Unexpected end of statement at [1:1]")
    for tree in statements:
        kind(tree, tokens)
        for select in tree.find_all(exp.Select):
            if not select.expressions:
                raise BigQueryError("Syntax error: SELECT list must not be empty at [1:1]")
    return statements


def _syntax_error(text: str, tokens: list, error: dict) -> BigQueryError:
    if tokens and tokens[0].text.upper().split()[0] not in _STATEMENTS:
        return BigQueryError(f"Syntax error: Unexpected {_describe(tokens[0])} at {_position(text, tokens[0].start)}")
    # sqlglot names the last character of a token, counted from 1 in its line.
    at = next((i for i, token in enumerate(tokens) if (token.line, token.col) == (error["line"], error["col"])), -1)
    is_last = at in (-1, len(tokens) - 1)
    if is_last and error["description"].startswith(("Expect", "Required")):
        return BigQueryError(f"Syntax error: Unexpected end of script at {_position(text, len(text.rstrip()))}")
    expected = 'Expected ")"' if error["description"] == "Expecting )" else "Expected end of input"
    token = tokens[at]
    return BigQueryError(f"Syntax error: {expected} but got {_describe(token)} at {_position(text, token.start)}")


def _describe(token) -> str:
    if token.token_type == TokenType.NUMBER:
        return f'{"integer" if token.text.isdigit() else "floating point"} literal "{token.text}"'
    if token.token_type == TokenType.STRING:
        return f'string literal "{token.text}"'
    if token.token_type in (TokenType.VAR, TokenType.IDENTIFIER):
        return f'identifier "{token.text}"'
    return f"keyword {token.text.upper()}" if token.text.isalpha() else f'"{token.text}"'


def _position(text: str, start: int) -> str:
    before = text[:start].split("\n")
    return f"[{len(before)}:{len(before[-1]) + 1}]"


def _unclosed(text: str) -> str:
    quotes = re.compile(r"'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"")
    return _position(text, min((i for i in map(quotes.sub("", text).find, "'\"`") if i >= 0), default=0))


# Kinds of statements

_STATEMENTS = {
    *("SELECT", "WITH", "FROM", "(", "INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "CREATE", "DROP", "ALTER"),
    *("EXPORT", "LOAD", "DECLARE", "SET", "BEGIN", "COMMIT", "ROLLBACK", "IF", "CASE", "WHILE", "LOOP", "REPEAT"),
    *("FOR", "CALL", "EXECUTE", "GRANT", "REVOKE", "ASSERT", "RAISE"),
}
_CREATE = {"TABLE": "CREATE_TABLE", "VIEW": "CREATE_VIEW", "SCHEMA": "CREATE_SCHEMA", "MODEL": "CREATE_MODEL"}


def kind(tree: exp.Expression, tokens: list = ()) -> str:
    """Return BigQuery's `statementType` of a statement; BigQueryError if the local BigQuery has no such statement."""
    if isinstance(tree, exp.Query):
        return "SELECT"
    if isinstance(tree, exp.Create) and tree.kind in _CREATE and not tree.find(exp.MaterializedProperty):
        external = tree.find(exp.ExternalProperty)
        as_select = tree.kind == "TABLE" and isinstance(tree.expression, exp.Query)
        return "CREATE_EXTERNAL_TABLE" if external else _CREATE[tree.kind] + ("_AS_SELECT" if as_select else "")
    if isinstance(tree, exp.Create) and tree.kind == "FUNCTION" and tree.find(exp.TemporaryProperty):
        return "CREATE_FUNCTION"
    if isinstance(tree, exp.Drop) and tree.kind in _CREATE:
        return f"DROP_{tree.kind}"
    if isinstance(tree, exp.Alter) and tree.args["kind"] == "TABLE":
        return "ALTER_TABLE"
    for type_, name in _KINDS.items():
        if isinstance(tree, type_):
            return name
    first = tokens[0] if tokens else None
    if first and first.text.upper().split()[0] not in _STATEMENTS:
        raise BigQueryError(f"Syntax error: Unexpected {_describe(first)} at [1:1]")
    raise unimplemented(f"The statement {tree.sql('bigquery')[:60]!r}")


_KINDS = {
    exp.Insert: "INSERT",
    exp.Update: "UPDATE",
    exp.Delete: "DELETE",
    exp.Merge: "MERGE",
    exp.TruncateTable: "TRUNCATE_TABLE",
    exp.Export: "EXPORT_DATA",
    exp.Declare: "DECLARE",
    exp.Set: "SET",
}


# Generating

_inherited = DuckDBGenerator.TRANSFORMS


def _call(name: str, *keys: str) -> Callable:
    return lambda self, e: self.func(name, *(e.args[key] for key in keys or ("this", "expression")))


def _as(type_: str, inherited: Callable) -> Callable:
    return lambda self, e: f"CAST({inherited(self, e)} AS {type_})"


def _refuse(what: str, *instead: str) -> Callable:
    def refuse(self, e):
        raise unimplemented(what, *instead)

    return refuse


def _literal(self, e: exp.Literal) -> str:
    # 2.5 is a FLOAT64 in GoogleSQL and a DECIMAL in DuckDB.
    if not e.is_string and "." in e.name and "e" not in e.name.lower():
        return f"{e.name}e0"
    is_operand = isinstance(e.parent, exp.Add | exp.Sub | exp.Mul)
    if is_operand and all(isinstance(side, exp.Literal) and side.is_int for side in e.parent.iter_expressions()):
        return f"CAST({e.name} AS BIGINT)"  # DuckDB would compute in 32 bits
    return self.literal_sql(e)


def _cast(self, e: exp.Cast) -> str:
    if e.args.get("format"):
        raise unimplemented("CAST ... FORMAT")
    is_safe = isinstance(e, exp.TryCast)
    if e.to.is_type(exp.DType.BIGINT) and not (isinstance(e.this, exp.Literal) and e.this.is_int):
        number = self.func("bq_int64", e.this)
        return f"TRY({number})" if is_safe else number
    if e.to.is_type(exp.DType.BINARY) and isinstance(e.this, exp.Literal):
        return self.func("ENCODE", e.this)
    return self.trycast_sql(e) if is_safe else self.cast_sql(e)


def _datatype(self, e: exp.DataType) -> str:
    if e.this == exp.DType.DECIMAL and not e.expressions:
        return "DECIMAL(38, 9)"
    if e.this in (exp.DType.BIGDECIMAL, exp.DType.GEOGRAPHY, exp.DType.INTERVAL):
        raise unimplemented(f"The type {e.sql('bigquery')}")
    return self.datatype_sql(e)


_FORMAT = re.compile(r"%(?P<flags>['\-+ #0]*)(?P<width>\d*)(?P<precision>\.\d+)?(?P<type>[a-zA-Z%])")


def _format(self, e: exp.Format) -> str:
    if not (isinstance(e.this, exp.Literal) and e.this.is_string):
        raise unimplemented("FORMAT with a format that is not a literal")
    values, args = iter(e.expressions), []

    def convert(match: re.Match) -> str:
        specifier = match["type"]
        if specifier == "%":
            return "%%"
        value = self.sql(next(values, exp.null()))
        if specifier in "diouxX":
            args.append(f"CAST({value} AS BIGINT)")
        elif specifier in "eEfFgG":
            args.append(f"CAST({value} AS DOUBLE)")
        elif specifier in "st":
            args.append(f"COALESCE(CAST({value} AS VARCHAR), 'NULL')" if specifier == "t" else value)
            specifier = "s"
        else:
            raise unimplemented(f"%{specifier} in FORMAT")
        return f"%{match['flags'].replace(chr(39), ',')}{match['width']}{match['precision'] or ''}{specifier}"

    pattern = _FORMAT.sub(convert, e.this.name)
    return f"PRINTF({', '.join([self.sql(exp.Literal.string(pattern)), *args])})"


def _extract(self, e: exp.Extract) -> str:
    part, value = e.name.upper(), self.sql(e, "expression")
    if part == "DAYOFWEEK":  # Sunday is 1, in DuckDB 0
        return f"(EXTRACT(DAYOFWEEK FROM {value}) + 1)"
    if part == "WEEK":  # weeks begin on Sundays, and the days before the first one are week 0
        return f"CAST(STRFTIME({value}, '%U') AS BIGINT)"
    if part in ("DATE", "TIME"):
        return f"CAST({value} AS {part})"
    return f"EXTRACT({'WEEK' if part == 'ISOWEEK' else part} FROM {value})"


_WEEKDAYS = ["MONDAY", "SUNDAY", "SATURDAY", "FRIDAY", "THURSDAY", "WEDNESDAY", "TUESDAY"]


def _start(value: str, unit: exp.Expression, type_: str) -> str:
    # The start of the unit that a date or time is in; weeks begin on Sunday unless another day is named.
    unit = unit.sql("bigquery").strip("'").upper()
    if not unit.startswith(("WEEK", "ISOWEEK")):
        return f"CAST(DATE_TRUNC('{unit}', {value}) AS {type_})"
    day = "MONDAY" if unit == "ISOWEEK" else unit[5:-1] or "SUNDAY"
    shift = f"INTERVAL {_WEEKDAYS.index(day)} DAY"
    return f"CAST(DATE_TRUNC('WEEK', {value} + {shift}) - {shift} AS {type_})"


def _truncate(type_: str) -> Callable:
    def truncate(self, e) -> str:
        if e.args.get("zone"):
            raise unimplemented("A time zone in TIMESTAMP_TRUNC")
        return _start(self.sql(e, "this"), e.args["unit"], type_)

    return truncate


def _difference(self, e: exp.DateDiff | exp.DatetimeDiff) -> str:
    unit = e.args.get("unit") or exp.var("DAY")
    later, earlier = (f"CAST({self.sql(side)} AS TIMESTAMP)" for side in (e.this, e.expression))
    if "WEEK" in unit.sql("bigquery"):
        return f"(DATE_DIFF('DAY', {_start(earlier, unit, 'DATE')}, {_start(later, unit, 'DATE')}) // 7)"
    return f"DATE_DIFF('{unit.sql('bigquery')}', {earlier}, {later})"


def _time_to_str(self, e: exp.TimeToStr) -> str:
    if zone := e.args.get("zone"):
        instant = exp.cast(e.this, exp.DType.TIMESTAMPTZ)
        e = exp.TimeToStr(this=exp.AtTimeZone(this=instant, zone=zone), format=e.args["format"])
    return _inherited[exp.TimeToStr](self, e)


def _generate_array(self, e: exp.GenerateSeries) -> str:
    ends = [self.sql(e, key) for key in ("start", "end")]
    step = self.sql(e, "step") or "1"
    if not any("e0" in value for value in (*ends, step)):
        return f"GENERATE_SERIES({', '.join([*ends, step])})"
    first, last = ends  # DuckDB has no series of floating point numbers
    count = f"CAST(FLOOR(({last} - {first}) / {step} + 1e-9) AS BIGINT)"
    return f"LIST_TRANSFORM(GENERATE_SERIES(0, {count}), LAMBDA i : {first} + i * {step})"


def _quantiles(self, e: exp.ApproxQuantiles) -> str:
    count = int(self.sql(e, "expression"))
    return f"QUANTILE_DISC({self.sql(e, 'this')}, [{', '.join(f'{i / count}e0' for i in range(count + 1))}])"


def _unnest(self, e: exp.Unnest) -> str:
    # Structs in the array become columns, as in BigQuery, and the offset counts from 0.
    if len(e.expressions) != 1:
        raise unimplemented("UNNEST of several arrays")
    array, alias, offset = self.sql(e.expressions[0]), e.args.get("alias"), e.args.get("offset")
    name = alias and (alias.columns[0] if alias.columns else alias.this)
    column = self.sql(name) if name else "f0_"
    columns = [f"UNNEST({array}, max_depth := 2) AS {column}"]
    if offset:
        position = self.sql(offset) if isinstance(offset, exp.Identifier) else '"offset"'
        columns.append(f"GENERATE_SUBSCRIPTS({array}, 1) - 1 AS {position}")
    return f"(SELECT {', '.join(columns)})" + (f" AS {column}" if name else "")


def _array_agg(self, e: exp.ArrayAgg) -> str:
    if not isinstance(e.this, exp.Limit):
        return self.arrayagg_sql(e)
    whole = exp.ArrayAgg(**{**e.args, "this": e.this.this})
    return f"({self.sql(whole)})[:{self.sql(e.this, 'expression')}]"


def _ignore_nulls(self, e: exp.IgnoreNulls) -> str:
    if isinstance(e.this, exp.ArrayAgg):
        value = e.this.this
        while isinstance(value, exp.Limit | exp.Order):
            value = value.this
        aggregate = self.sql(e.this)
        filtered = f" FILTER (WHERE {self.sql(value)} IS NOT NULL)"
        return aggregate.replace(")[:", f"{filtered})[:") if aggregate.startswith("(") else aggregate + filtered
    return self.ignorenulls_sql(e)


def _bracket(self, e: exp.Bracket) -> str:
    index = e.expressions[0] if len(e.expressions) == 1 else None
    if index is None or e.args.get("safe") or index.is_string or e.args.get("offset") is None:
        return self.bracket_sql(e)
    first = e.args["offset"]
    return f"bq_at({self.sql(e, 'this')}, {self.sql(index)}{'' if first else ' + 1'})"


def _byte_string(self, e: exp.ByteString) -> str:
    # The tokenizer has read the escapes: what is below 256 is meant as a byte.
    value = e.name.encode("latin-1" if max(map(ord, e.name), default=0) < 256 else "utf-8")
    return f"UNHEX('{value.hex()}')"


def _struct(self, e: exp.Struct) -> str:
    # Without names, a struct becomes by position what a column wants.
    is_named = any(isinstance(field, exp.PropertyEQ | exp.Column) for field in e.expressions)
    return _inherited[exp.Struct](self, e) if is_named else self.func("ROW", *e.expressions)


def _string_agg(self, e: exp.GroupConcat) -> str:
    if e.find(exp.Limit):
        raise unimplemented("LIMIT in STRING_AGG", "use ARRAY_TO_STRING(ARRAY_AGG(... LIMIT n), ',')")
    return _inherited[exp.GroupConcat](self, e)


class _Generator(DuckDBGenerator):
    TRANSFORMS = {
        **_inherited,
        exp.Literal: _literal,
        exp.Cast: _cast,
        exp.TryCast: _cast,
        exp.DataType: _datatype,
        exp.Format: _format,
        exp.Extract: _extract,
        exp.Unnest: _unnest,
        exp.ArrayAgg: _array_agg,
        exp.IgnoreNulls: _ignore_nulls,
        exp.Bracket: _bracket,
        exp.ByteString: _byte_string,
        exp.Struct: _struct,
        exp.Div: _call("bq_divide"),
        exp.Mod: _call("bq_mod"),
        exp.IntDiv: _call("bq_div"),
        exp.Ln: _call("bq_ln", "this"),
        exp.Sqrt: _call("bq_sqrt", "this"),
        exp.RangeBucket: _call("bq_range_bucket"),
        exp.SafeFunc: lambda self, e: f"TRY({self.sql(e, 'this')})",
        exp.SafeAdd: lambda self, e: f"TRY({self.sql(e, 'this')} + {self.sql(e, 'expression')})",
        exp.SafeSubtract: lambda self, e: f"TRY({self.sql(e, 'this')} - {self.sql(e, 'expression')})",
        exp.SafeMultiply: lambda self, e: f"TRY({self.sql(e, 'this')} * {self.sql(e, 'expression')})",
        exp.DateAdd: _as("DATE", _inherited[exp.DateAdd]),
        exp.DateSub: _as("DATE", _inherited[exp.DateSub]),
        exp.DateTrunc: _truncate("DATE"),
        exp.TimestampTrunc: _truncate("TIMESTAMPTZ"),
        exp.DatetimeTrunc: _truncate("TIMESTAMP"),
        exp.DateDiff: _difference,
        exp.DatetimeDiff: _difference,
        exp.TimeToStr: _time_to_str,
        exp.GenerateSeries: _generate_array,
        exp.ApproxQuantiles: _quantiles,
        exp.ByteLength: _call("bq_byte_length", "this"),
        exp.StrToTime: _as("TIMESTAMPTZ", DuckDBGenerator.strtotime_sql),
        exp.UnixToTime: _as("TIMESTAMPTZ", _inherited[exp.UnixToTime]),
        exp.TimestampDiff: lambda self, e: self.func(  # whole units, not the boundaries between
            "DATESUB", exp.Literal.string(e.text("unit")), e.expression, e.this
        ),
        exp.CurrentDatetime: lambda self, e: "CURRENT_LOCALTIMESTAMP()",
        exp.FarmFingerprint: _refuse("FARM_FINGERPRINT", "split by TO_HEX(MD5(...)), which Python has too"),
        exp.GroupConcat: _string_agg,
    }


class _Target(DuckDB):
    Generator = _Generator


# Resolving


class Script:
    """The statements of one query, with all that their names may mean."""

    def __init__(
        self, text: str, project: str, default: tuple[str, str | None] = ("", None), parameters: list[dict] = ()
    ):
        """Parse a query.

        `default` is the project and the dataset of names that have neither; `parameters` are BigQuery's JSON.
        """
        is_positional = any("name" not in parameter for parameter in parameters)
        self.text, self.project, self.default = _number(text) if is_positional else text, project, default
        self.statements = parse(self.text)
        self.temporary: set[str] = set()  # tables and functions that live as long as the script
        self.variables: dict[str, exp.Expression] = {}
        self.parameters = {
            parameter.get("name", f"_{i}").lower(): literal(parameter["parameterType"], parameter["parameterValue"])
            for i, parameter in enumerate(parameters)
        }

    def name(self, table: exp.Table) -> Name:
        """Return the full name of a table or model of the script."""
        if table.db:
            return Name(table.catalog or self.project, table.db, table.name)
        project, dataset = self.default
        if not dataset:
            raise BigQueryError(f'Table "{table.name}" must be qualified with a dataset (e.g. dataset.table).')
        return Name(project, dataset, table.name)

    def is_local(self, table: exp.Table) -> bool:
        """Say whether a table is a common table expression or lives as long as the script."""
        if table.db or not isinstance(table.this, exp.Identifier):
            return False
        name = table.name.lower()
        return name in self.temporary or any(cte.alias.lower() == name for cte in _visible(table))

    def duckdb(self, tree: exp.Expression, place: Callable[[exp.Table, Name | None], exp.Expression]) -> str:
        """Return a statement in DuckDB's SQL.

        `place` returns what stands in DuckDB for each table that is no local one; a function has no name.
        """
        tree = tree.copy()
        self._substitute(tree)
        for select in tree.find_all(exp.Select):
            _name_columns(select)
        for table in list(tree.find_all(exp.Table)):
            if not table.meta.get("placed") and not table.find_ancestor(MLFunction) and not self.is_local(table):
                self._place(table, place)
        self._check(tree)
        try:
            # Quoted, since DuckDB reserves words that GoogleSQL does not.
            return tree.sql(_Target, identify=True, unsupported_level=ErrorLevel.RAISE, comments=False)
        except UnsupportedError as error:
            raise unimplemented(str(error).strip()) from None

    def input(self, call: MLFunction) -> exp.Query:
        """Return the query that an ML function reads, with the common table expressions that it may name."""
        source = call.args["input"]
        query = source.unnest() if isinstance(source, exp.Subquery) else exp.select("*").from_(source.copy())
        query = query.copy()
        for cte in _visible(call):
            query = query.with_(cte.args["alias"].copy(), as_=cte.this.copy(), copy=False)
        return query

    def _place(self, table: exp.Table, place: Callable) -> None:
        for key, what in (("version", "FOR SYSTEM_TIME AS OF"), ("changes", "CHANGES")):
            if table.args.get(key):
                raise unimplemented(what)
        if isinstance(table.this, exp.Identifier):
            new = place(table, self.name(table))
        elif isinstance(table.this, MLFunction):
            new = place(table, None)
        else:
            function = table.this.sql_name() if isinstance(table.this, exp.Func) else table.this.sql("bigquery")
            if isinstance(table.this, exp.Anonymous):
                function = table.this.name
            raise BigQueryError(f"Table-valued function not found: {function.lower()}{self.at(table.this)}")
        alias = table.args.get("alias") or exp.TableAlias(this=exp.to_identifier(table.name, quoted=True))
        if isinstance(table.this, exp.Identifier) or table.args.get("alias"):
            new.set("alias", alias.copy())
        for key in ("pivots", "sample", "joins"):
            if table.args.get(key):
                new.set(key, table.args[key])
        new.meta["placed"] = True  # what an ML function reads is copied, and comes here again
        table.replace(new)

    def _substitute(self, tree: exp.Expression) -> None:
        for node in list(tree.find_all(exp.Parameter, exp.Placeholder, exp.SessionParameter)):
            if isinstance(node, exp.SessionParameter):
                raise unimplemented(f"The system variable {node.sql('bigquery')}")
            if node.name.startswith(("_", "?")) and node.name not in self.parameters:
                raise BigQueryError(f"Query has more positional parameters than the {len(self.parameters)} given")
            if node.name.lower() not in self.parameters:
                raise BigQueryError(f"Query parameter '{node.name}' not found{self.at(node.this)}")
            node.replace(self.parameters[node.name.lower()].copy())
        for column in list(tree.find_all(exp.Column)) if self.variables else ():
            if not column.table and column.name.lower() in self.variables:
                column.replace(self.variables[column.name.lower()].copy())

    def _check(self, tree: exp.Expression) -> None:
        if tree.find(exp.Lateral):
            raise BigQueryError("Syntax error: Unexpected keyword LATERAL")
        for function in tree.find_all(exp.Anonymous):
            name = function.name.lower()
            if isinstance(function.parent, exp.Dot):
                raise BigQueryError(f"Function not found: {function.parent.sql('bigquery').split('(')[0]}")
            if name not in _CALLABLE and name not in self.temporary:
                near = get_close_matches(name, [*_CALLABLE, *_functions()], n=1, cutoff=0.8)
                hint = f"; Did you mean {near[0]}?" if near else ""
                raise BigQueryError(f"Function not found: {function.name}{hint}{self.at(function)}")
        for type_ in (exp.Update, exp.Delete):
            if isinstance(tree, type_) and not tree.args.get("where"):
                raise BigQueryError(f"{type_.__name__.upper()} must have a WHERE clause at [1:1]")

    def at(self, node: exp.Expression | None) -> str:
        """Return " at [line:column]" of a node, as BigQuery ends its messages; nothing if it is not known."""
        start = node.meta.get("start") if isinstance(node, exp.Expression) else None
        return f" at {_position(self.text, start)}" if start is not None else ""

    def reword(self, error: Exception, tree: exp.Expression) -> BigQueryError:
        """Return DuckDB's error for a statement in BigQuery's words."""
        text = str(error)
        for pattern, words in _WORDS:
            if match := re.search(pattern, text):
                name = match.groupdict().get("name")
                nodes = (node for node in tree.find_all(exp.Identifier) if node.name.lower() == (name or "").lower())
                return BigQueryError(words.format(**match.groupdict("")) + self.at(next(nodes, None)))
        return BigQueryError(text.partition("\n\nLINE")[0].partition("Error: ")[2] or text)


def _number(text: str) -> str:
    # Give the parameters that are question marks names: the order of the tree is not that of the text.
    marks = [token for token in _GoogleSQL().tokenize(text) if token.token_type == TokenType.PLACEHOLDER]
    for i, mark in reversed(list(enumerate(marks))):
        text = f"{text[: mark.start]}@_{i}{text[mark.end + 1 :]}"
    return text


def _functions() -> list[str]:
    return [name.lower() for function in exp.ALL_FUNCTIONS for name in function.sql_names()]


def _visible(node: exp.Expression) -> list[exp.CTE]:
    # The common table expressions that a node may name: those of its scopes that do not follow it, and one that
    # contains it if that is recursive.
    found, inside = [], [node]
    while node := node.parent:
        inside.append(node)
        scope = node.args.get("with_")
        for cte in scope.expressions if scope else ():
            is_around = any(cte is outer for outer in inside)
            if not is_around or scope.recursive:
                found.append(cte)
            if is_around:
                break
    return found


def _name_columns(select: exp.Select) -> None:
    # Unnamed columns are f0_, f1_, ... in BigQuery.
    unnamed = 0
    for column in select.expressions:
        if isinstance(column, exp.Alias | exp.Star) or column.is_star or select.args.get("kind"):
            continue
        if isinstance(column, exp.Column):
            continue
        name = column.name if isinstance(column, exp.Dot) else f"f{unnamed}_"
        unnamed += not isinstance(column, exp.Dot)
        column.replace(exp.alias_(column.copy(), name, quoted=True))


def literal(type_: dict, value: dict) -> exp.Expression:
    """Return the expression of a query parameter, from BigQuery's JSON of its type and value."""
    if type_["type"] == "ARRAY":
        items = [literal(type_["arrayType"], item) for item in value.get("arrayValues", [])]
        return exp.cast(exp.Array(expressions=items), sql_type(type_), dialect="bigquery")
    if type_["type"] == "STRUCT":
        values = value.get("structValues", {})
        fields = [
            exp.PropertyEQ(
                this=exp.to_identifier(field["name"]), expression=literal(field["type"], values[field["name"]])
            )
            for field in type_["structTypes"]
        ]
        return exp.Struct(expressions=fields)
    if (text := value.get("value")) is None:
        return exp.cast(exp.null(), type_["type"], dialect="bigquery")
    if type_["type"] == "BYTES":
        return exp.FromBase64(this=exp.Literal.string(text))
    return exp.cast(exp.Literal.string(text), type_["type"], dialect="bigquery")


def sql_type(type_: dict) -> str:
    """Return the type of a query parameter in GoogleSQL."""
    if type_["type"] == "ARRAY":
        return f"ARRAY<{sql_type(type_['arrayType'])}>"
    if type_["type"] == "STRUCT":
        fields = (f"{field['name']} {sql_type(field['type'])}" for field in type_["structTypes"])
        return f"STRUCT<{', '.join(fields)}>"
    return type_["type"]


# DuckDB's errors and BigQuery's. The first that matches is told.
_WORDS = [
    (r"string '!(?P<message>.*)' to INT64", "{message}"),
    (r"string '(?P<value>.*)' to INT", "Bad int64 value: {value}"),
    (r"string '(?P<value>.*)' to DOUBLE", "Bad double value: {value}"),
    (r"string '(?P<value>.*)' to BOOL", "Bad bool value: {value}"),
    (r"invalid (?P<type>date|timestamp) field format: \"(?P<value>[^\"]*)\"", "Invalid {type}: '{value}'"),
    (
        r"column \"(?P<name>[^\"]*)\" must appear in the GROUP BY clause",
        "SELECT list expression references column {name} which is neither grouped nor aggregated",
    ),
    (r"Referenced column \"(?P<name>[^\"]*)\" not found", "Unrecognized name: {name}"),
    (r"Referenced column \"(?P<name>[^\"]*)\" was not found", "Unrecognized name: {name}"),
    (
        r"Table \"(?P<table>[^\"]*)\" does not have a column named \"(?P<name>[^\"]*)\"",
        "Name {name} not found inside {table}",
    ),
    (r"Referenced table \"(?P<name>[^\"]*)\" not found", "Unrecognized name: {name}"),
    (
        r"Function with name (?P<name>\w+) does not exist",
        "Function not found: {name} (the local BigQuery does not have it, Google's may)",
    ),
    (
        r"No function matches .* '(?P<name>[^(]+)\((?P<types>.*?)\)'",
        "No matching signature for {name} for argument types: {types}",
    ),
    (
        r"best candidate function for the function call \"(?P<name>[^(]+)\((?P<types>.*?)\)\"",
        "No matching signature for {name} for argument types: {types}",
    ),
    (r"Overflow in \w+ of INT\d+ \((?P<what>.*)\)", "int64 overflow: {what}"),
    (r"NOT NULL constraint failed: .*\.(?P<column>\w+)", "Required field {column} cannot be null"),
    (r"More than one row returned by a subquery", "Scalar subquery produced more than one element"),
    (
        r"table \"?(?P<table>[^\" ]*)\"? has (?P<n>\d+) columns but (?P<m>\d+) values were supplied",
        "Inserted row has wrong column count; Has {m}, expected {n}",
    ),
    (r"Invalid Input Error: (?P<message>.*)", "{message}"),
]
