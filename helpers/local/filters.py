"""Google's list filters and orders (AIP-160 and AIP-132), as the SDK writes them."""

import operator
import re
from collections.abc import Callable
from datetime import UTC, datetime

from google.protobuf.message import Message

from helpers.local.errors import invalid

TOKEN = re.compile(
    r"""\s*(?:
    (?P<word>AND|OR|NOT)\b | (?P<open>\() | (?P<close>\)) | (?P<comma>,) | (?P<operator>>=|<=|!=|=|:|>|<)
    | "(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>(?:[^'\\]|\\.)*)'
    | (?P<text>\d{4}-\d\d-\d\dT[\d:.Z+-]+|(?:\."[^"]*"|[^\s()=!<>:,"'])+)
    )""",
    re.VERBOSE,
)
COMPARISONS = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
DEPTH = 50  # parentheses and NOTs within each other; more are an attack on the stack
Test = Callable[[Message], bool]


def select(resources: list, expression: str, functions: dict[str, Callable] | None = None) -> list:
    """Return the resources for which a filter holds; `functions` gives a meaning to what is not a field.

    Such are calls, in_context("..."), and memberships, child_contexts:"...".
    """
    if not expression.strip():
        return resources
    is_met = _Parser(expression, functions or {}).parse()
    return [resource for resource in resources if is_met(resource)]


def order(resources: list, expression: str) -> list:
    """Return resources in the order that `order_by` asks for, such as "create_time desc, display_name"."""
    for part in reversed([part.split() for part in expression.split(",") if part.strip()]):
        field, direction = part[0], (part[1:] or ["asc"])[0].lower()
        if direction not in ("asc", "desc") or len(part) > 2:
            raise invalid(f"Invalid order_by {expression!r}: expected FIELD or FIELD desc.")
        try:
            resources = sorted(resources, key=_key_of(field), reverse=direction == "desc")
        except TypeError:
            raise invalid(f"Invalid order_by {expression!r}: the values of {field!r} have no order.") from None
    return resources


def _key_of(field: str) -> Callable:
    def key(resource):
        value = read(resource, field)
        return (value is not None, value)

    return key


def read(resource: Message, path: str):
    """Return the value at a path such as labels.team or metadata.rmse.number_value; None where there is none.

    Times are given as datetimes, enumerations by the names of their values.
    """
    value = resource
    for step in re.findall(r'"[^"]*"|[^."]+', path):
        value = _step(value, step.strip('"'))
        if value is None:
            return None
    return value


def _step(value, step: str):
    if not isinstance(value, Message):
        return value.get(step) if hasattr(value, "get") else None
    kind = value.DESCRIPTOR.full_name
    if kind == "google.protobuf.Struct":
        return value.fields.get(step)
    if kind == "google.protobuf.Value":
        if step.endswith("_value"):
            return getattr(value, step) if value.WhichOneof("kind") == step else None
        return _step(value.struct_value, step)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", step).lower()
    field = value.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        raise invalid(f"Invalid filter or order: {value.DESCRIPTOR.name} has no field {step!r}.")
    if field.message_type and not field.is_repeated:
        if not value.HasField(name):
            return None
        inner = getattr(value, name)
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return inner.ToDatetime(tzinfo=UTC)
        return inner
    found = getattr(value, name)
    return field.enum_type.values_by_number[found].name if field.enum_type and not field.is_repeated else found


class _Parser:
    """Reads a filter by recursive descent: OR binds closer than AND, as AIP-160 wants; a space means AND."""

    def __init__(self, expression: str, functions: dict[str, Callable]):
        self.expression, self.functions = expression, functions
        self.tokens, place, self.depth = [], 0, 0
        while expression[place:].strip():
            found = TOKEN.match(expression, place)
            if not found:
                raise self.error()
            kind = found.lastgroup
            text = re.sub(r"\\(.)", r"\1", found[kind]) if kind in ("double", "single") else found[kind]
            self.tokens.append(("value" if kind in ("double", "single") else kind, text))
            place = found.end()
        self.tokens.append(("end", ""))
        self.tokens.reverse()

    def error(self):
        return invalid(f"Invalid filter: {self.expression!r}.")

    def peek(self):
        return self.tokens[-1]

    def next(self, *kinds):
        kind, text = self.tokens.pop()
        if kinds and kind not in kinds:
            raise self.error()
        return text

    def parse(self) -> Test:
        test = self.conjunction()
        self.next("end")
        return test

    def conjunction(self) -> Test:
        tests = [self.disjunction()]
        while self.peek()[0] not in ("end", "close"):
            if self.peek() == ("word", "AND"):
                self.next()
            tests.append(self.disjunction())
        return lambda resource: all(test(resource) for test in tests)

    def disjunction(self) -> Test:
        tests = [self.term()]
        while self.peek() == ("word", "OR"):
            self.next()
            tests.append(self.term())
        return lambda resource: any(test(resource) for test in tests)

    def term(self) -> Test:
        self.depth += 1
        if self.depth > DEPTH:
            raise self.error()
        try:
            return self.nested_term()
        finally:
            self.depth -= 1

    def nested_term(self) -> Test:
        if self.peek() == ("word", "NOT"):
            self.next()
            test = self.term()
            return lambda resource: not test(resource)
        if self.peek()[0] == "open":
            self.next()
            test = self.conjunction()
            self.next("close")
            return test
        name = self.next("text", "value")
        if self.peek()[0] == "open":
            return self.function(name)
        relation = self.next("operator")
        wanted = self.next("text", "value")
        if relation == ":" and name in self.functions:
            return lambda resource: self.functions[name](resource, wanted)
        return lambda resource: _compare(read(resource, name), relation, wanted)

    def function(self, name: str) -> Test:
        if name not in self.functions:
            raise invalid(f"Invalid filter: there is no function {name!r}.")
        self.next("open")
        arguments = []
        while self.peek()[0] != "close":
            arguments.append(self.next("text", "value"))
            if self.peek()[0] == "comma":
                self.next()
        self.next("close")
        return lambda resource: self.functions[name](resource, *arguments)


def _compare(value, relation: str, wanted: str) -> bool:
    if isinstance(value, Message) and value.DESCRIPTOR.full_name == "google.protobuf.Value":
        value = getattr(value, value.WhichOneof("kind") or "null_value")
    if relation == ":" and wanted == "*":
        return value is not None and (isinstance(value, Message | datetime) or bool(value))
    if value is None:
        return relation == "!="
    if relation == ":" and not isinstance(value, bool | int | float | datetime | Message):
        return wanted in value  # in a text, or among the items of a list or the keys of a map
    if isinstance(value, str) and relation in ("=", "!=") and "*" in wanted:
        pattern = ".*".join(re.escape(part) for part in wanted.split("*"))
        return bool(re.fullmatch(pattern, value, re.DOTALL)) == (relation == "=")
    value, wanted = _comparable(value, wanted)
    return COMPARISONS["=" if relation == ":" else relation](value, wanted)


def _comparable(value, wanted: str) -> tuple:
    """Return a value and the text of a filter as things that can be compared."""
    if isinstance(value, bool):
        return str(value).lower(), wanted.lower()
    if isinstance(value, str):
        return value, wanted
    kinds = {int: (float, "a number"), float: (float, "a number"), datetime: (_time, "a time in RFC 3339 format")}
    if type(value) not in kinds:
        raise invalid(f"Invalid filter: a field that holds fields cannot be compared with {wanted!r}.")
    convert, what = kinds[type(value)]
    try:
        return value, convert(wanted)
    except ValueError:
        raise invalid(f"Invalid filter: {wanted!r} is compared with {what}.") from None


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
