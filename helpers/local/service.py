"""What all services of Vertex AI share: making, reading, listing, changing and deleting resources by Google's rules.

A service declares its resources as data. What differs from the rules is a method of its own, named as the RPC is, in
snake case: `create_custom_job`. What is neither a rule nor a method is refused with UNIMPLEMENTED.
"""

import functools
import re
from collections.abc import Callable

from google.longrunning import operations_pb2
from google.protobuf import field_mask_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc import StatusCode

from helpers.local import errors, filters
from helpers.local.rpc import Method
from helpers.local.store import Store, new_id

PAGE_SIZE = 1000
LOCATION = re.compile(r"projects/[^/]+(/locations/[^/]+)?")
ID = re.compile(r"[\w.:-]+")
OWN_FIELDS = ("name", "create_time", "update_time", "etag", "state", "error")  # set by the service alone


def snake(name: str) -> str:
    """Return a CamelCase name in snake_case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def location_of(name: str) -> str:
    """Return the projects/PROJECT/locations/REGION that a resource's name begins with."""
    return "/".join(name.split("/")[:4])


class Service:
    """A service of Vertex AI over the store. Methods take a request and return the resource or response."""

    name = ""  # as in the API, such as "JobService"
    resources: dict[str, str] = {}  # a resource's type -> the collection in its names: {"CustomJob": "customJobs"}
    instead: dict[str, str] = {}  # an RPC that is refused -> what to use instead

    def __init__(self, cloud):
        """Serve a cloud: its store, its folder, its other services."""
        self.cloud = cloud
        self.store: Store = cloud.store

    def call(self, method: Method, request: Message) -> Message:
        """Answer an RPC of this service."""
        handler = getattr(self, snake(method.name), None) or self._rule(method)
        if handler is None:
            raise errors.unimplemented(f"{self.name}.{method.name}", self.instead.get(method.name, ""))
        result = handler(request)
        if method.response is operations_pb2.Operation and not isinstance(result, operations_pb2.Operation):
            name = getattr(request, "parent", "") or getattr(request, "name", "") or getattr(result, "name", "")
            return self.cloud.operations.finished(location_of(name), result)
        return result

    def restore(self) -> None:
        """Go on, when the server starts, with what the last one left."""

    def is_busy(self) -> bool:
        """Say whether something runs that an idle server has to wait for."""
        return False

    def close(self) -> None:
        """End what runs."""

    def _rule(self, method: Method) -> Callable | None:
        """Return the rule that answers a method of one of this service's resources, or None."""
        for kind, collection in self.resources.items():
            plural = collection[0].upper() + collection[1:]
            for verb, rule in (
                ("Create", self.create),
                ("Get", self.get),
                ("Update", self.update),
                ("Delete", self.delete),
            ):
                if method.name == verb + kind:
                    return functools.partial(rule, kind)
            if method.name in ("List" + plural, f"List{kind}s", f"List{kind}"):
                return functools.partial(self.list, collection, method.response)
        return None

    # The rules

    def create(self, kind: str, request: Message) -> Message:
        """Make a resource from what a request holds, under the asked id or a new one."""
        field = snake(kind)
        self.check_parent(request.parent)
        wanted = next(
            (value for descriptor, value in request.ListFields() if descriptor.name.endswith("_id") and value), ""
        )
        if wanted and not ID.fullmatch(wanted):
            raise errors.invalid(f"Invalid id {wanted!r}: expected letters, digits, dashes, dots, colons, underscores.")
        name = f"{request.parent}/{self.resources[kind]}/{wanted or new_id()}"
        resource = type(getattr(request, field))()
        resource.CopyFrom(getattr(request, field))
        resource.name = name
        self.stamp(resource, created=True)
        with self.store.transaction():
            if self.store.find(name) is not None:
                raise errors.Refused(StatusCode.ALREADY_EXISTS, f"{kind} {name} already exists.")
            self.created(resource)
            self.store.put(name, resource)
        return resource

    def check_parent(self, parent: str) -> None:
        """Refuse a parent that is neither a location nor a resource that is there."""
        if not LOCATION.fullmatch(parent):
            self.store.get(parent)

    def check_name(self, kind: str, name: str) -> None:
        """Refuse the name of a resource of another kind."""
        if name.split("/")[-2:-1] != [self.resources[kind]]:
            raise errors.not_found(name)

    def created(self, resource: Message) -> None:
        """Complete a new resource before it is stored."""

    @staticmethod
    def stamp(resource: Message, created: bool = False) -> None:
        """Set the times and the etag of a resource that is written now."""
        fields = resource.DESCRIPTOR.fields_by_name
        for field in ("create_time", "update_time") if created else ("update_time",):
            if field in fields:
                getattr(resource, field).GetCurrentTime()
        if "etag" in fields:
            resource.etag = new_id()

    def get(self, kind: str, request: Message) -> Message:
        """Return a resource by its name."""
        self.check_name(kind, request.name)
        return self.store.get(request.name)

    def list(self, collection: str, response: type[Message], request: Message) -> Message:
        """Return a page of a collection, filtered and in the asked order."""
        found = self.store.list(request.parent, collection)
        return page(found, request, response)

    def update(self, kind: str, request: Message) -> Message:
        """Change the fields of a resource that the mask names, all that the request holds without a mask."""
        source = getattr(request, snake(kind))
        self.check_name(kind, source.name)
        mask = request.update_mask if "update_mask" in request.DESCRIPTOR.fields_by_name else None
        with self.store.change(source.name) as resource:
            merge(source, resource, mask)
            self.stamp(resource)
        return self.store.get(source.name)

    def delete(self, kind: str, request: Message) -> Message:
        """Delete a resource and all below it."""
        self.check_name(kind, request.name)
        self.store.delete(request.name)
        return Empty()


def page(
    found: list[Message], request: Message, response: type[Message], functions: dict[str, Callable] | None = None
) -> Message:
    """Return the part of a list that a request asks for by filter, order_by, page_size and page_token.

    `functions` gives calls in the filter a meaning, as filters.select has it.
    """
    found = filters.select(found, getattr(request, "filter", ""), functions)
    found = filters.order(found, getattr(request, "order_by", ""))
    size = getattr(request, "page_size", 0) or PAGE_SIZE
    if size < 0:
        raise errors.invalid(f"The page size is {size}; expected a number above 0.")
    token = getattr(request, "page_token", "")
    if token and not token.isdigit():
        raise errors.invalid(f"The page token {token!r} is not one that this service gave.")
    start = int(token or 0)
    answer = response()
    repeated = next(field.name for field in response.DESCRIPTOR.fields if field.is_repeated and field.message_type)
    getattr(answer, repeated).extend(found[start : start + size])
    if start + size < len(found):
        answer.next_page_token = str(start + size)
    return answer


def merge(source: Message, target: Message, mask: field_mask_pb2.FieldMask | None) -> None:
    """Copy the fields that a mask names, or all that a client may set and has set, from one message to another."""
    paths = [path for path in (mask.paths if mask else []) if path != "*"]
    if not paths:
        paths = [field.name for field, _ in source.ListFields() if field.name not in OWN_FIELDS]
    for path in paths:
        _copy(source, target, [snake(step) for step in path.split(".")], path)


def _copy(source: Message, target: Message, way: list[str], path: str) -> None:
    step, *rest = way
    field = target.DESCRIPTOR.fields_by_name.get(step)
    if field is None:
        raise errors.invalid(f"Invalid update mask: {target.DESCRIPTOR.name} has no field {path!r}.")
    if field.is_repeated or not rest or field.message_type is None or field.message_type.full_name.endswith("Struct"):
        target.ClearField(step)
        value = getattr(source, step)
        if field.is_repeated:
            getattr(target, step).MergeFrom(value)
        elif field.message_type is not None:
            if source.HasField(step):
                getattr(target, step).CopyFrom(value)
        else:
            setattr(target, step, value)
    else:
        _copy(getattr(source, step), getattr(target, step), rest, path)
