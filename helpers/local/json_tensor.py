"""JSON to tensors and back by the REST rules of TensorFlow Serving, with its words for what is wrong.

`inputs` are the inputs of a signature by name, an `Input` each, and arrays are NumPy's.
"""

import base64
import json
import math

import numpy as np

JSON_TYPES = {str: "String", int: "Number", float: "Number", list: "Array", dict: "Object", type(None): "Null"}


class Refusal(Exception):  # noqa: N818 - it is an answer, not an accident
    """A request that cannot be predicted, with words for the client and an HTTP status."""

    def __init__(self, message: str, status: int = 400):
        """Refuse a request."""
        super().__init__(message)
        self.status = status


class Input:
    """What an input takes from JSON: types, and from which to which number it surely holds the same number."""

    def __init__(self, type_name: str, array_type):
        """Describe an input by its type's name in TensorFlow's protocol buffers, such as "float", and in NumPy."""
        self.type = type_name
        self.array_type = np.dtype(array_type)
        self.low = self.high = None
        if self.array_type.kind in "iu":
            self.json_types, limits = {int}, np.iinfo(self.array_type)
            self.low, self.high = limits.min, limits.max
        elif type_name in ("float", "double"):
            self.json_types = {int, float}
            self.high = 2 ** (np.finfo(self.array_type).nmant + 1) - 1
            self.low = -self.high
        else:
            self.json_types = {"string": {str}, "bool": {bool}}.get(type_name, set())

    def collect(self, value, shape: list[int], values: list, level: int = 0) -> None:
        """Check a JSON value, lists in lists of a shape or a single one, and append all that it holds to `values`."""
        if not isinstance(value, list):
            if level != len(shape):
                place = f"found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {len(shape)}"
                raise Refusal(f"JSON Value: {_show(value)} {place}")
            values.append(self._converted(value))
        elif level >= len(shape):
            raise Refusal(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        elif len(value) != shape[level]:
            place = f"at level: {level} expected size: {shape[level]}"
            raise Refusal(f"Encountered list at unexpected size: {len(value)} {place}")
        elif level == len(shape) - 1 and self._holds(value):
            values.extend(value)
        else:
            for element in value:
                self.collect(element, shape, values, level + 1)

    def array(self, values: list, shape: list[int]) -> np.ndarray:
        """Return what was collected as an array."""
        return np.array(values, self.array_type).reshape(shape)

    def _holds(self, values: list) -> bool:
        # Fast, and never wrong when it says yes: no value in the list needs a look of its own.
        if not values or not set(map(type, values)) <= self.json_types:
            return False
        return self.low is None or (self.low <= min(values) and max(values) <= self.high)

    def _converted(self, value):
        if isinstance(value, dict) and self.type == "string":
            return _decoded(value)
        if not self.json_types:
            raise Refusal(f"Conversion of JSON Value: {_show(value)} to type: {self.type}", 501)
        if type(value) in self.json_types:
            if self.low is None or self.low <= value <= self.high:
                return value
            if isinstance(value, float) and (not math.isfinite(value) or abs(value) <= np.finfo(self.array_type).max):
                return value
            if float in self.json_types:
                raise Refusal(f"Cannot convert JSON value: {value} to {self.type} without loss of precision.")
        kind = JSON_TYPES.get(type(value), str(value))  # true and false are types of their own: True and False
        raise Refusal(f"JSON Value: {_show(value)} Type: {kind} is not of expected type: {self.type}")


def from_rows(request: dict, inputs: dict[str, Input]) -> list[np.ndarray]:
    """Return the arrays for all inputs from "instances": rows that are values, or objects with one for each input."""
    instances = request["instances"]
    if "inputs" in request:
        only_one = "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        raise Refusal(f"JSON Value: {_show(request)} {only_one}")
    if not isinstance(instances, list):
        raise Refusal(f"JSON Value: {_show(request)} Excepting 'instances' to be an list/array")
    if not instances:
        raise Refusal(f"JSON Value: {_show(request)} No values in 'instances' array")
    if not isinstance(instances[0], dict) and len(inputs) > 1:
        raise Refusal(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    by_name = _is_object(instances[0])
    values, shapes = {name: [] for name in inputs}, {}
    for number, instance in enumerate(instances):
        if _is_object(instance) != by_name:
            expected, got = ("object", "list") if by_name else ("value/list", "object")
            raise Refusal(f"Expecting {expected} but got {got} at item {number} of input list")
        for name, value in instance.items() if by_name else ((next(iter(inputs)), instance),):
            try:
                _add(name, value, inputs, values, shapes)
            except Refusal as refusal:
                place = f"{number} key: {name}" if by_name else number
                error = f"{'UNIMPLEMENTED' if refusal.status == 501 else 'INVALID_ARGUMENT'}: {refusal}"
                raise Refusal(f"Failed to process element: {place} of 'instances' list. Error: {error}") from None
        if by_name and instance.keys() != inputs.keys():
            expected = f"JSON object: {_show(instance)} keys must be equal to: {','.join(sorted(inputs))}"
            raise Refusal(f"Failed to process element: {number} of 'instances' list. {expected}")
    return [each.array(values[name], [len(instances), *shapes[name]]) for name, each in inputs.items()]


def _add(name: str, value, inputs: dict[str, Input], values: dict[str, list], shapes: dict[str, list[int]]) -> None:
    if name not in inputs:
        raise Refusal(f"JSON object: does not have named input: {name}")
    shape = _shape(value)
    inputs[name].collect(value, shape, values[name])
    expected = shapes.setdefault(name, shape)
    if math.prod(expected) != math.prod(shape):
        raise Refusal(f"Expecting tensor size: {math.prod(expected)} but got: {math.prod(shape)}")
    if expected != shape:
        raise Refusal(f"Expecting shape {_brackets(expected)} but got: {_brackets(shape)}")


def from_columns(request: dict, inputs: dict[str, Input]) -> list[np.ndarray]:
    """Return the arrays for all inputs from "inputs": the tensor of the only one, or an object with one for each."""
    if "inputs" not in request:
        raise Refusal("Missing 'inputs' or 'instances' key")
    tensors = request["inputs"]
    if not _is_object(tensors):
        if len(inputs) > 1:
            raise Refusal(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        tensors = {next(iter(inputs)): tensors}
    arrays = []
    for name, each in inputs.items():
        if name not in tensors:
            raise Refusal(f"Missing named input: {name} in 'inputs' object.")
        values, shape = [], _shape(tensors[name])
        each.collect(tensors[name], shape, values)
        arrays.append(each.array(values, shape))
    return arrays


def to_rows(outputs: dict[str, np.ndarray]) -> list:
    """Return a value for each row of an only output, or an object with one of each output."""
    size = None
    for name, array in outputs.items():
        if not array.shape:
            raise Refusal(f"Tensor name: {name} has no shape information ")
        size = size or len(array)
        if len(array) != size:
            raise Refusal(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {size}")
    columns = [_json(name, array) for name, array in outputs.items()]
    if len(columns) == 1:
        return columns[0]
    return [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)]


def to_columns(outputs: dict[str, np.ndarray]):
    """Return the only output, or an object of all."""
    columns = {name: _json(name, array) for name, array in outputs.items()}
    return columns if len(columns) > 1 else next(iter(columns.values()))


def _json(name: str, array: np.ndarray):
    if array.dtype.kind in "OS":
        text = _encoded if name.endswith("_bytes") else lambda value: value.decode(errors="replace")
        array = np.fromiter(map(text, array.ravel()), object, array.size).reshape(array.shape)
    elif array.dtype.kind not in "iufb" or array.dtype == np.float16:
        raise Refusal(f"Failed to write JSON value for tensor type: {array.dtype.name}")
    elif array.dtype == np.float32:
        # 0.2, not 0.20000000298023224: six digits where they name the same number, else nine, which always do.
        short = np.char.mod("%.6g", array).astype(np.float64)
        array = np.where(short.astype(np.float32) == array, short, np.char.mod("%.9g", array).astype(np.float64))
    return array.tolist()


def _shape(value) -> list[int]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return shape


def _is_base64(value) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _is_object(value) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _decoded(value: dict) -> bytes:
    if not _is_base64(value):
        raise Refusal(f"JSON Value: {_show(value)} not formatted correctly for base64 data")
    try:
        return base64.b64decode(value["b64"] + "=" * (-len(value["b64"]) % 4), validate=True)
    except ValueError:
        raise Refusal("Unable to base64 decode") from None


def _encoded(value: bytes) -> dict:
    return {"b64": base64.b64encode(value).decode()}


def _show(value) -> str:
    return json.dumps(value, indent=4)


def _brackets(shape: list[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
