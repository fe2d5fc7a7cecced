"""MetadataService: experiments and their runs are contexts, what a run uses and makes artifacts, its steps executions.

Which of them belongs to which context, and which events join two of them, are rows beside the resources.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable

from google.cloud.aiplatform_v1 import types
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc import StatusCode

from helpers.local import PROJECT, PROJECT_NUMBER, errors, filters
from helpers.local.service import Service, merge, page, snake

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS members (context TEXT, member TEXT, UNIQUE (context, member))",
    "CREATE INDEX IF NOT EXISTS contexts_of_member ON members (member)",
    "CREATE TABLE IF NOT EXISTS events (artifact TEXT, execution TEXT, event BLOB, UNIQUE (execution, artifact))",
    "CREATE INDEX IF NOT EXISTS events_of_artifact ON events (artifact)",
)
ID = "[a-z0-9][a-z0-9-]{0,127}"
OUTPUT_ONLY = ("name", "etag", "create_time", "update_time", "parent_contexts")
MOST_PARENTS = 10
SAMPLE = 100  # names that a purge without force shows

Event, Subgraph = types.Event.pb(), types.LineageSubgraph.pb()


class MetadataService(Service):
    """What was tried, with what, and what came of it."""

    name = "MetadataService"
    resources = {
        "MetadataStore": "metadataStores",
        "MetadataSchema": "metadataSchemas",
        "Artifact": "artifacts",
        "Context": "contexts",
        "Execution": "executions",
    }

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        for statement in SCHEMA:
            self.store.sql(statement)

    # Resources

    def create(self, kind: str, request: Message) -> Message:
        """Make a resource in a metadata store that is there; its parents are given by AddContextChildren alone."""
        _check_id(getattr(request, f"{snake(kind)}_id"))
        if kind != "MetadataStore":
            self.store.get(request.parent)
        if kind == "Context":
            request.context.ClearField("parent_contexts")
        return super().create(kind, request)

    @staticmethod
    def stamp(resource: Message, created: bool = False) -> None:
        """Set the times of a resource, and an etag that grows: the SDK compares the one it has with the server's."""
        Service.stamp(resource, created)
        if "etag" in resource.DESCRIPTOR.fields_by_name:
            resource.etag = str(time.time_ns())

    def list(self, collection: str, response: type[Message], request: Message) -> Message:
        """Return a page of a collection."""
        if getattr(request, "filter", ""):
            request.filter = with_number(request.filter)
        return page(self.store.list(request.parent, collection), request, response, self._functions)

    @property
    def _functions(self) -> dict[str, Callable]:
        """Return what the calls in a filter mean."""
        return {"in_context": self._in_context, "child_contexts": self._has_child}

    def _in_context(self, resource: Message, context: str) -> bool:
        pair = (resource.name, context)
        return bool(self.store.sql("SELECT 1 FROM members WHERE member = ? AND context = ?", *pair))

    def _has_child(self, resource: Message, child: str) -> bool:
        found = self.store.find(child)
        return found is not None and resource.name in found.parent_contexts

    def update(self, kind: str, request: Message) -> Message:
        """Change what the mask names, or all that the request holds; what the service alone writes stays as it is."""
        source = getattr(request, snake(kind))
        paths = [path for path in request.update_mask.paths if path != "*"]
        paths = paths or [field.name for field, _ in source.ListFields()]
        paths = [path for path in paths if snake(path) not in OUTPUT_ONLY]
        with self.store.transaction():
            *store, collection, wanted = ["", *source.name.split("/")]
            resource = self.store.find(source.name)
            if collection != self.resources[kind] or not (resource or request.allow_missing):
                raise errors.not_found(source.name)
            if is_new := resource is None:
                self.store.get("/".join(store[1:]))
                _check_id(wanted)
                resource = type(source)(name=source.name)
            elif source.etag and source.etag != resource.etag:
                raise errors.Refused(
                    StatusCode.ABORTED,
                    f"Specified {kind} `etag`: `{source.etag}` does not match server `etag`: `{resource.etag}`",
                )
            if paths:
                merge(source, resource, FieldMask(paths=paths))
            self.stamp(resource, created=is_new)
            self.store.put(resource.name, resource)
        return resource

    def delete(self, kind: str, request: Message) -> Empty:
        """Delete a resource and all that says how it was related to others."""
        with self.store.transaction():
            resource = self.store.get(request.name)
            if getattr(request, "etag", "") not in ("", getattr(resource, "etag", "")):
                raise errors.precondition(f"The etag of {request.name} is {resource.etag}, not {request.etag}.")
            self._delete([request.name])
        return Empty()

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.store.delete(name)
            if "/contexts/" in name:
                for child in self.store.list(name.rsplit("/", 2)[0], "contexts"):
                    self._unlink(name, child)
        here = "(SELECT name FROM resources)"
        self.store.sql(f"DELETE FROM members WHERE context NOT IN {here} OR member NOT IN {here}")
        self.store.sql(f"DELETE FROM events WHERE artifact NOT IN {here} OR execution NOT IN {here}")

    def _unlink(self, parent: str, child: Message) -> None:
        if parent in child.parent_contexts:
            child.parent_contexts.remove(parent)
            self.store.put(child.name, child)

    def _purge(self, collection: str, response: type[Message], request: Message) -> Message:
        """Delete what a filter names, or without force only say what that would be."""
        if not request.filter:
            raise errors.invalid(f'To purge {collection}, give a filter: update_time < "2020-11-19T11:30:00Z".')
        with self.store.transaction():
            found = self.store.list(request.parent, collection)
            found = filters.select(found, with_number(request.filter), self._functions)
            names = [resource.name for resource in found]
            if request.force:
                self._delete(names)
        return response(purge_count=len(names), purge_sample=[] if request.force else names[:SAMPLE])

    purge_artifacts = functools.partialmethod(_purge, "artifacts", types.PurgeArtifactsResponse.pb())
    purge_contexts = functools.partialmethod(_purge, "contexts", types.PurgeContextsResponse.pb())
    purge_executions = functools.partialmethod(_purge, "executions", types.PurgeExecutionsResponse.pb())

    # Relations

    def add_context_artifacts_and_executions(self, request: Message) -> Message:
        """Put artifacts and executions into a context; those that are in it already stay."""
        with self.store.transaction():
            for name in (request.context, *request.artifacts, *request.executions):
                self.store.get(name)
            for name in (*request.artifacts, *request.executions):
                self.store.sql("INSERT OR IGNORE INTO members VALUES (?, ?)", request.context, name)
        return types.AddContextArtifactsAndExecutionsResponse.pb()()

    def add_context_children(self, request: Message) -> Message:
        """Make contexts children of a context; those that are already stay."""
        with self.store.transaction():
            above = self._above(request.context)
            for name in request.child_contexts:
                if name in above:
                    raise errors.invalid(f"{name} cannot be a child of {request.context}: it would be above itself.")
                child = self.store.get(name)
                if request.context in child.parent_contexts:
                    continue
                if len(child.parent_contexts) == MOST_PARENTS:
                    raise errors.invalid(
                        f"{name} has {MOST_PARENTS} parent contexts, the most that a context may have."
                    )
                child.parent_contexts.append(request.context)
                self.store.put(name, child)
        return types.AddContextChildrenResponse.pb()()

    def _above(self, name: str) -> set[str]:
        """Return the names of a context and all contexts above it."""
        above, left = set(), [name]
        while left:
            if (name := left.pop()) not in above:
                above.add(name)
                left.extend(self.store.get(name).parent_contexts)
        return above

    def remove_context_children(self, request: Message) -> Message:
        """End that contexts are children of a context; those that are not stay as they are."""
        with self.store.transaction():
            self.store.get(request.context)
            for name in request.child_contexts:
                self._unlink(request.context, self.store.get(name))
        return types.RemoveContextChildrenResponse.pb()()

    def add_execution_events(self, request: Message) -> Message:
        """Note what an execution took and gave; an artifact that it has an event with already is skipped."""
        with self.store.transaction():
            self.store.get(request.execution)
            for event in request.events:
                self.store.get(event.artifact)
                event.execution = request.execution
                event.event_time.GetCurrentTime()
                row = (event.artifact, event.execution, event.SerializeToString())
                self.store.sql("INSERT OR IGNORE INTO events VALUES (?, ?, ?)", *row)
        return types.AddExecutionEventsResponse.pb()()

    # Lineage

    def query_execution_inputs_and_outputs(self, request: Message) -> Message:
        """Return an execution, its artifacts and the events between them."""
        self.store.get(request.execution)
        return self._subgraph([request.execution], self._events("execution", request.execution))

    def query_context_lineage_subgraph(self, request: Message) -> Message:
        """Return the artifacts and executions of a context and the events between them."""
        self.store.get(request.context)
        rows = self.store.sql("SELECT member FROM members WHERE context = ? ORDER BY rowid", request.context)
        members = dict.fromkeys(name for (name,) in rows)
        found = [event for name in members for event in self._events("execution", name) if event.artifact in members]
        return self._subgraph(members, found)

    def query_artifact_lineage_subgraph(self, request: Message) -> Message:
        """Return all that an artifact came from and went into, as far as max_hops says; 0 for all."""
        self.store.get(request.artifact)
        if request.max_hops < 0:
            raise errors.invalid(f"max_hops is {request.max_hops}; expected a positive number, or none for all.")
        found: dict[tuple, Message] = {}
        seen, edge, hops = [request.artifact], [request.artifact], 0
        while edge and not (request.max_hops and hops == request.max_hops):
            here, there = ("artifact", "execution") if hops % 2 == 0 else ("execution", "artifact")
            events = [event for name in edge for event in self._events(here, name)]
            found.update({(event.artifact, event.execution): event for event in events})
            edge = list(dict.fromkeys(name for event in events if (name := getattr(event, there)) not in seen))
            seen += edge
            hops += 1
        return self._subgraph(seen, list(found.values()), request.filter)

    def _events(self, side: str, name: str) -> Iterable[Message]:
        """Return the events of an artifact or an execution in the order in which they were added."""
        rows = self.store.sql(f"SELECT event FROM events WHERE {side} = ? ORDER BY rowid", name)
        return [Event.FromString(data) for (data,) in rows]

    def _subgraph(self, names: Iterable[str], events: Iterable[Message], expression: str = "") -> Message:
        """Return resources, and those that events join, of which only artifacts that a filter allows."""
        joined = dict.fromkeys(name for event in events for name in (event.artifact, event.execution))
        resources = [self.store.get(name) for name in dict.fromkeys([*names, *joined])]
        artifacts = [resource for resource in resources if "/artifacts/" in resource.name]
        artifacts = filters.select(artifacts, expression)
        kept = {artifact.name for artifact in artifacts}
        return Subgraph(
            artifacts=artifacts,
            executions=[resource for resource in resources if "/executions/" in resource.name],
            events=[event for event in events if event.artifact in kept],
        )


def with_number(expression: str) -> str:
    """Return a filter in which the names of resources hold the project's number, as they are stored."""
    return expression.replace(f'"projects/{PROJECT}/', f'"projects/{PROJECT_NUMBER}/')


def _check_id(wanted: str) -> None:
    """Refuse an id, as the last part of a name, that Vertex AI would refuse; none is always allowed."""
    if wanted and not re.fullmatch(ID, wanted):
        raise errors.invalid(f"User-specified resource ID must match the regular expression '{ID}'; it is {wanted!r}.")
