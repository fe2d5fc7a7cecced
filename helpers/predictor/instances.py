"""What a request holds: checked against the model's own signature, and refused in words that help its sender."""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

SHOWN = 200  # characters of a value or an example in an error
EXAMPLES = {"f": 0.5, "i": 1, "u": 1, "b": True, "O": "text"}  # by NumPy's letters for kinds of types


class Refused(Exception):  # noqa: N818 - it is an answer, not an accident
    """A request that is answered with an error: why, and the HTTP status, which says whose fault it is."""

    def __init__(self, message: str, status: int = 400):
        """Refuse a request."""
        super().__init__(message)
        self.status = status


class Instances:
    """The inputs of a model, and the instances that it takes.

    Attributes: `example`, an instance; `groups`, the names and shapes of the inputs of each type.
    """

    def __init__(self, inputs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], schema: Mapping):
        """Know the inputs by name, each with type and shape; `schema` is the OpenAPI schema of an instance, or {}."""
        self.groups: dict[np.dtype, dict[str, tuple[int, ...]]] = {}
        made, hints = {}, {}
        for name, (dtype, shape) in inputs.items():
            self.groups.setdefault(np.dtype(dtype), {})[name] = shape
            made[name] = np.full(shape, EXAMPLES[np.dtype(dtype).kind], dtype).tolist()
            hints[name] = hint(np.dtype(dtype), shape, schema.get("properties", {}).get(name, {}).get("enum"))
        self.example = schema.get("example", made)
        instance = TypedDict("Instance", hints)
        instance.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
        if len(hints) == 1:  # the only input may go without its name
            named = BeforeValidator(lambda value: value if type(value) is dict else dict.fromkeys(hints, value))
            instance = Annotated[instance, named]
        nothing = NotRequired[Annotated[dict, Field(max_length=0)] | None]  # the model takes no parameters
        request = {"instances": Annotated[list[instance], Field(min_length=1)], "parameters": nothing}
        self.request = TypeAdapter(TypedDict("Request", request))

    def read(self, body: bytes | str) -> list[list[list]]:
        """Return the rows of a request, each with a list of values for each group; Refused says what is wrong where."""
        try:
            instances = self.request.validate_json(body)["instances"]
        except ValidationError as error:
            raise Refused(self.words(error.errors(include_url=False)[0])) from None
        return [[flat(instance, names) for names in self.groups.values()] for instance in instances]

    def words(self, error: Mapping[str, Any]) -> str:
        """Return what is wrong, where, and an example of what is right."""
        # Beyond the name of a field come places in its list, and the names of types that were tried.
        place = [part for depth, part in enumerate(error["loc"]) if depth < 3 or type(part) is int]
        where = "".join(f"[{part}]" if type(part) is int else f".{part}" for part in place)[1:] or "the request"
        found = "" if error["type"] in ("missing", "json_invalid") else f" is {shown(error['input'])}"
        example = self.example if len(place) > 1 else {"instances": [self.example]}
        example = example.get(place[2], example) if len(place) > 2 else example
        return f"{where}{found}: {error['msg']}. For example: {shown(example)}"


def hint(dtype: np.dtype, shape: tuple[int, ...], choices: list[str] | None):
    """Return the type hint by which the value of an input is checked; one of size 1 needs no brackets."""
    one = {"b": bool, "O": Literal[tuple(choices)] if choices else str}.get(dtype.kind)
    if dtype.kind in "fiu":
        kind, limits = (float, np.finfo(dtype)) if dtype.kind == "f" else (int, np.iinfo(dtype))
        one = Annotated[kind, Field(ge=kind(limits.min), le=kind(limits.max), allow_inf_nan=False)]
    if math.prod(shape) == 1:
        return one | Annotated[list[one], Field(min_length=1, max_length=1)]
    for length in reversed(shape):
        one = Annotated[list[one], Field(min_length=length, max_length=length)]
    return one


def flat(instance: Mapping, names: Mapping[str, tuple[int, ...]]) -> list:
    """Return the values of some inputs as one list without lists in it."""
    values = []
    for name, shape in names.items():
        value = instance[name]
        if type(value) is list:
            values += np.reshape(np.array(value, object), math.prod(shape)).tolist()
        else:
            values.append(value)
    return values


def shown(value) -> str:
    """Return a value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
