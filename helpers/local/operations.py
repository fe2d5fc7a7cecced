"""Long-running operations: started by one call, asked for by others, and not lost when the server is."""

import logging
import threading
from collections.abc import Callable

from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc import StatusCode

from helpers.local import errors
from helpers.local.service import Service, page
from helpers.local.store import new_id

log = logging.getLogger(__name__)

QUICK_SECONDS = 0.5  # an operation that ends within this time is answered as done
PATIENCE_SECONDS = 30  # that a client which asks for one that runs waits for its end
INTERRUPTED = "The local cloud ended while this operation ran. Start the operation again."


class Operations(Service):
    """What other services start, and the RPCs with which clients wait for it."""

    name = "Operations"
    resources = {"Operation": "operations"}

    def restore(self) -> None:
        """Report what a server before this one left unfinished as failed."""
        for operation in self.store.all("operations"):
            if not operation.done:
                operation.done = True
                operation.error.code, operation.error.message = code_pb2.ABORTED, INTERRUPTED
                self.store.put(operation.name, operation)

    def finished(self, parent: str, response: Message) -> operations_pb2.Operation:
        """Return an operation that is done."""
        operation = operations_pb2.Operation(name=f"{parent}/operations/{new_id()}", done=True)
        operation.response.Pack(response)
        self.store.put(operation.name, operation)
        return operation

    def start(
        self, parent: str, work: Callable[[], Message], metadata: Message | None = None
    ) -> operations_pb2.Operation:
        """Start work in the background; return its operation, done already if the work was quick."""
        name = f"{parent}/operations/{new_id()}"
        begun = operations_pb2.Operation(name=name)
        if metadata is not None:
            begun.metadata.Pack(metadata)
        self.store.put(name, begun)
        threading.Thread(target=self._run, args=(begun, work), name=name, daemon=True).start()
        return self._wait(name, QUICK_SECONDS)

    def _run(self, operation: operations_pb2.Operation, work: Callable[[], Message]) -> None:
        operation.done = True
        try:
            operation.response.Pack(work())
        except Exception as error:
            refusal = error if isinstance(error, errors.Refused) else errors.of_system(error)
            if refusal is None:
                log.exception("operation %s failed", operation.name)
                refusal = errors.Refused(StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
            operation.error.CopyFrom(status_pb2.Status(code=refusal.code.value[0], message=refusal.message))
        self.store.put(operation.name, operation)

    def _wait(self, name: str, seconds: float) -> operations_pb2.Operation:
        return self.store.wait(name, lambda operation: operation.done, seconds)

    def get_operation(self, request: Message) -> operations_pb2.Operation:
        """Return an operation; one that runs, when it ends or after a while."""
        return self._wait(request.name, PATIENCE_SECONDS)

    wait_operation = get_operation

    def list_operations(self, request: Message) -> operations_pb2.ListOperationsResponse:
        """Return the operations of a resource."""
        found = self.store.list(request.name.removesuffix("/operations"), "operations")
        return page(found, request, operations_pb2.ListOperationsResponse)

    def delete_operation(self, request: Message) -> Empty:
        """Forget an operation."""
        self.store.delete(request.name)
        return Empty()
