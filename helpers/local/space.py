"""The search space of a study: its parameters, conditional ones too, the values they may have, and what is refused."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import errors

Parameter = types.Trial.Parameter.pb()
StudySpec = types.StudySpec

NEAR = 1e-10  # discrete values that differ by less are the same
MAX_VALUES = 1000
REQUIRED = "Required field is not set."
PARENTS = {
    "parent_categorical_values": "categorical_value_spec",
    "parent_discrete_values": "discrete_value_spec",
    "parent_int_values": "integer_value_spec",
}
Problem = tuple[str, str]  # a field and what is wrong with it

# Parameters


def every(parameters: Sequence[Message], above: str = "") -> Iterator[tuple[str, Message]]:
    """Yield all parameters, conditional ones too, each with a key of its own.

    A parameter's id is no key: under conditions that exclude each other it may stand for several parameters.
    """
    for parameter in parameters:
        key = above + parameter.parameter_id
        yield key, parameter
        for number, condition in enumerate(parameter.conditional_parameter_specs):
            yield from every([condition.parameter_spec], f"{key}/{number}/")


def active(parameters: Sequence[Message], choose: Callable[[str, Message], object], above: str = "") -> dict:
    """Return the values, by key, of the parameters whose conditions hold; `choose(key, parameter)` has each value."""
    found = {}
    for parameter in parameters:
        key = above + parameter.parameter_id
        found[key] = choose(key, parameter)
        for number, conditional in conditional_on(parameter, found[key]).items():
            found |= active([conditional], choose, f"{key}/{number}/")
    return found


def conditional_on(parameter: Message, value) -> dict[int, Message]:
    """Return the conditional parameters that a value of their parent makes active, by their numbers."""
    return {
        number: condition.parameter_spec
        for number, condition in enumerate(parameter.conditional_parameter_specs)
        if any(is_same(value, wanted) for wanted in _wanted(condition))
    }


def _wanted(condition: Message) -> list:
    """Return the values of a parent for which a conditional parameter is active."""
    return list(getattr(condition, condition.WhichOneof("parent_value_condition")).values)


def domain_of(parameter: Message) -> Message:
    """Return what a parameter may be: its bounds or its values."""
    return getattr(parameter, parameter.WhichOneof("parameter_value_spec"))


def is_same(value, other) -> bool:
    """Say whether two values of a parameter are the same."""
    if isinstance(value, str) or isinstance(other, str):
        return value == other
    return abs(value - other) < NEAR


def is_feasible(parameter: Message, value) -> bool:
    """Say whether a parameter may have a value."""
    domain = domain_of(parameter)
    if value is None or isinstance(value, str) != parameter.HasField("categorical_value_spec"):
        return False
    if hasattr(domain, "values"):
        return any(is_same(value, feasible) for feasible in domain.values)
    is_right = parameter.HasField("double_value_spec") or float(value).is_integer()
    return is_right and domain.min_value <= value <= domain.max_value


def values_of(holder: Message) -> dict:
    """Return the parameters of a trial or a context as {id: value}; all numbers are floats."""
    found = {parameter.parameter_id: parameter.value for parameter in holder.parameters}
    return {name: getattr(value, value.WhichOneof("kind") or "number_value") for name, value in found.items()}


def as_parameters(values: Mapping) -> list[Message]:
    """Return {id: value} as the parameters of a trial."""
    found = [Parameter(parameter_id=name) for name in values]
    for parameter, value in zip(found, values.values(), strict=True):
        setattr(parameter.value, "string_value" if isinstance(value, str) else "number_value", value)
    return found


# What is refused


def refuse(problems: Iterable[Problem]) -> None:
    """Refuse a request in which fields are wrong, in Vertex AI's words; one without problems passes."""
    words = [f"{number}.Field: {field}; Message: {message}" for number, (field, message) in enumerate(problems, 1)]
    if words:
        raise errors.invalid(f"List of found errors: {' '.join(words)}")


def problems(spec: Message, where: str) -> Iterator[Problem]:
    """Yield what is wrong with the parameters of a StudySpec."""
    if not spec.parameters:
        yield f"{where}.parameters", REQUIRED
    is_grid = spec.algorithm == StudySpec.Algorithm.GRID_SEARCH
    for number, parameter in enumerate(spec.parameters):
        at = f"{where}.parameters[{number}]"
        yield from _of_parameter(parameter, at, is_grid)
        for other in spec.parameters[:number]:
            yield from _of_ids(_ids(parameter) & _ids(other), at)


def _of_parameter(parameter: Message, at: str, is_grid: bool) -> Iterator[Problem]:
    yield from of_id(parameter.parameter_id, f"{at}.parameter_id")
    kind = parameter.WhichOneof("parameter_value_spec")
    if kind is None:
        yield f"{at}.parameter_value_spec", REQUIRED
        return
    found = list(_of_domain(parameter, at, kind, is_grid))
    yield from found
    if not found:  # else conditions could not be judged
        yield from _of_conditions(parameter, at, kind, is_grid)


def _of_conditions(parameter: Message, at: str, kind: str, is_grid: bool) -> Iterator[Problem]:
    for number, condition in enumerate(parameter.conditional_parameter_specs):
        place = f"{at}.conditional_parameter_specs[{number}]"
        field = condition.WhichOneof("parent_value_condition")
        if PARENTS.get(field) != kind:
            yield f"{place}.parent_value_condition", f"It does not fit a parent with {kind}, found {field}."
            return
        wanted = _wanted(condition)
        if not wanted:
            yield f"{place}.{field}.values", REQUIRED
        for value in wanted:
            if not is_feasible(parameter, value):
                yield f"{place}.{field}.values", f"The parent {parameter.parameter_id!r} cannot be {value!r}."
        child = condition.parameter_spec
        yield from _of_parameter(child, f"{place}.parameter_spec", is_grid)
        yield from _of_ids(_ids(child) & {parameter.parameter_id}, f"{place}.parameter_spec")
        for other in parameter.conditional_parameter_specs[:number]:
            if set(wanted) & set(_wanted(other)):
                yield from _of_ids(_ids(child) & _ids(other.parameter_spec), f"{place}.parameter_spec")


def of_id(name: str, at: str) -> Iterator[Problem]:
    """Yield what is wrong with the id of a parameter or a metric."""
    if not name:
        yield at, REQUIRED
    elif re.search(r"\s", name):
        yield at, f"It must not contain whitespaces, found {name!r}."


def _ids(parameter: Message) -> set[str]:
    return {each.parameter_id for _, each in every([parameter])}


def _of_ids(shared: set[str], at: str) -> Iterator[Problem]:
    for name in sorted(shared):
        yield f"{at}.parameter_id", f"It must be unique, found {name!r} twice."


def _of_domain(parameter: Message, at: str, kind: str, is_grid: bool) -> Iterator[Problem]:
    domain = domain_of(parameter)
    is_category = kind == "categorical_value_spec"
    if hasattr(domain, "values"):
        values = list(domain.values)
        if not values:
            yield f"{at}.{kind}.values", REQUIRED
        elif is_category and len(set(values)) < len(values):
            yield f"{at}.{kind}.values", f"They must be unique, found {values}."
        elif not is_category and not all(after - before >= NEAR for before, after in pairwise(values)):
            yield f"{at}.{kind}.values", f"They must be in increasing order and at least 1e-10 apart, found {values}."
        elif not is_category and len(values) > MAX_VALUES:
            yield f"{at}.{kind}.values", f"At most {MAX_VALUES} values, found {len(values)}."
    else:
        values = [domain.min_value, domain.max_value]
        if not (all(map(math.isfinite, values)) and values[0] <= values[1]):
            bounds = f"{values[0]} and {values[1]}"
            yield f"{at}.{kind}.min_value", f"It must not be greater than max_value, found {bounds}."
        if is_grid and kind == "double_value_spec":
            yield f"{at}.{kind}", "To use grid search, all parameters must be INTEGER, CATEGORICAL, or DISCRETE."
    scale = StudySpec.ParameterSpec.ScaleType(parameter.scale_type).name
    if "LOG" in scale and values and (is_category or values[0] <= 0):
        yield f"{at}.scale_type", f"For {scale} the entire feasible space must be strictly positive."
    if domain.HasField("default_value") and not is_feasible(parameter, domain.default_value):
        yield f"{at}.{kind}.default_value", f"It must be feasible, found {domain.default_value!r}."


def check_values(spec: Message, holder: Message, where: str, is_partial: bool = False) -> None:
    """Refuse parameters of a trial that are not those of the study, or of a context that is not a part of them."""
    known: dict[str, list[Message]] = {}
    for _, parameter in every(spec.parameters):
        known.setdefault(parameter.parameter_id, []).append(parameter)
    given = values_of(holder)
    for name, value in given.items():
        if name not in known:
            refuse([(where, f"The study has no parameter {name!r}, only {', '.join(map(repr, known))}.")])
        if not any(is_feasible(parameter, value) for parameter in known[name]):
            refuse([(where, f"The parameter {name!r} cannot be {value!r}.")])
    if is_partial:
        return
    try:
        keys = active(spec.parameters, lambda _, parameter: given[parameter.parameter_id])
    except KeyError as missing:
        refuse([(where, f"The parameter {missing} has no value.")])
    if len(keys) < len(given):
        refuse([(where, f"Not all of {', '.join(map(repr, given))} are active with these values.")])
