"""The life that all kinds of jobs share: pending, running, and an end that is kept whatever happens."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import code_pb2

from helpers.local import errors
from helpers.local.service import Service
from helpers.local.store import Store

log = logging.getLogger(__name__)

INTERRUPTED = (
    "Internal error occurred for the current attempt: the local cloud ended while the job ran. Start the job again."
)
# The SDK reads a job's state, sleeps for 5 s, and reads again. A reading that follows the last one by just that time is
# such a poll, and waits for the job to change; any other reading, such as `job.state` in a cell, is answered at once.
POLL_SECONDS = (4.9, 6.0)
PATIENCE_SECONDS = 60
QUICK_SECONDS = 3.0


class JobFailed(Exception):  # noqa: N818 - an outcome
    """The end of a job that did not succeed: one of google.rpc.Code and words for its owner."""

    def __init__(self, message: str, code: int = code_pb2.INVALID_ARGUMENT):
        """Fail a job."""
        super().__init__(message)
        self.code = code


@dataclass
class Control:
    """What the work of a running job looks at and leaves: whether to stop, and how to stop it now."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    stops: list[Callable[[], None]] = field(default_factory=list)

    def cancel(self) -> None:
        """Ask the work to stop, and stop what it has running."""
        self.cancelled.set()
        for stop in list(self.stops):
            stop()


class Background:
    """Runs the work of jobs, each in a thread, and keeps their states in the store as Vertex AI does."""

    def __init__(self, store: Store, states, prefix: str):
        """Use an enumeration of states whose names begin with a prefix: JOB_STATE_ or PIPELINE_STATE_."""
        self.store = store
        self.controls: dict[str, Control] = {}
        self._number = {state.name.removeprefix(prefix): int(state) for state in states}
        self.ended = {self._number[name] for name in ("SUCCEEDED", "FAILED", "CANCELLED")}
        self._read: dict[str, float] = {}
        self._closing = False

    def start(self, job: Message, work: Callable[[Control], None]) -> None:
        """Store a job as pending and start its work, which returns, or raises JobFailed."""
        job.state = self._number["PENDING"]
        self.store.put(job.name, job)
        control = self.controls[job.name] = Control()
        threading.Thread(target=self._run, args=(job.name, work, control), name=job.name, daemon=True).start()
        self._read[job.name] = time.monotonic()

    def _run(self, name: str, work: Callable[[Control], None], control: Control) -> None:
        def begin_and_work():
            self._begin(name)
            work(control)

        outcome, failure = _outcome(begin_and_work, name)
        if self._closing:
            return  # the next server reports it, as it does after a server that was killed
        if control.cancelled.is_set():
            outcome, failure = "CANCELLED", (code_pb2.CANCELLED, "CANCELED")
        self._end(name, outcome, failure)
        self.controls.pop(name, None)

    def run_inside(self, job: Message, work: Callable[[], None], control: Control) -> None:
        """Run a job that is a part of another one, in this thread; JobFailed if it does not succeed."""
        self.store.put(job.name, job)
        self._begin(job.name)
        outcome, failure = _outcome(work, job.name)
        if self._closing:
            return
        self._end(job.name, "CANCELLED" if control.cancelled.is_set() else outcome, failure)
        if failure:
            raise JobFailed(failure[1], failure[0])

    def _begin(self, name: str) -> None:
        with self.store.change(name) as job:
            job.state = self._number["RUNNING"]
            job.start_time.GetCurrentTime()
            job.update_time.GetCurrentTime()

    def _end(self, name: str, outcome: str, failure: tuple[int, str] | None) -> None:
        while True:
            try:
                with self.store.transaction():
                    if (job := self.store.find(name)) is None:
                        return  # deleted while it ended
                    job.state = self._number[outcome]
                    if failure:
                        job.error.code, job.error.message = failure
                    job.end_time.GetCurrentTime()
                    job.update_time.GetCurrentTime()
                    self.store.put(name, job)
                return
            except Exception as error:
                # A job must not be lost because the disk was full when it ended.
                if errors.of_system(error) is None:
                    raise
                time.sleep(1)

    def read(self, name: str) -> Message:
        """Return a job; to a client that polls for its end, only when there is something new or time is up."""
        since = time.monotonic() - self._read.get(name, 0)
        is_poll = POLL_SECONDS[0] <= since <= POLL_SECONDS[1]
        patience = PATIENCE_SECONDS if is_poll else QUICK_SECONDS if since < 0.5 else 0
        before = self.store.get(name).state
        job = self.store.wait(name, lambda now: now.state != before or now.state in self.ended, patience)
        self._read[name] = time.monotonic()
        return job

    def cancel(self, name: str) -> None:
        """Cancel a job; one that has ended stays as it is."""
        self.store.get(name)
        control = self.controls.get(name)
        if control:
            with self.store.change(name) as job:
                if job.state not in self.ended:
                    job.state = self._number["CANCELLING"]
            control.cancel()

    def delete(self, name: str) -> Empty:
        """Delete a job that has ended."""
        if self.store.get(name).state not in self.ended:
            raise errors.precondition(f"The job {name} has not ended: cancel it before you delete it.")
        self.store.delete(name)
        return Empty()

    def interrupt(self, collection: str) -> None:
        """Report the jobs that a killed server left running as failed."""
        for job in self.store.all(collection):
            if job.state not in self.ended:
                self._end(job.name, "FAILED", (code_pb2.INTERNAL, INTERRUPTED))

    def close(self) -> None:
        """Stop all work."""
        self._closing = True
        for control in list(self.controls.values()):
            control.cancel()


class BackgroundService(Service):
    """A service whose resources are jobs of one kind of life."""

    states = None  # the enumeration of their states
    prefix = ""  # with which the names of the states begin

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self.background = Background(self.store, self.states, self.prefix)

    def restore(self) -> None:
        """Report what a killed server left running."""
        for collection in self.resources.values():
            self.background.interrupt(collection)

    def is_busy(self) -> bool:
        """Say whether a job runs."""
        return bool(self.background.controls)

    def close(self) -> None:
        """Stop all jobs."""
        self.background.close()

    def get(self, kind: str, request: Message) -> Message:
        """Return a job, waiting a little for a client that polls."""
        self.check_name(kind, request.name)
        return self.background.read(request.name)

    def delete(self, kind: str, request: Message) -> Empty:
        """Delete a job that has ended."""
        self.check_name(kind, request.name)
        return self.background.delete(request.name)

    def cancel(self, request: Message) -> Empty:
        """Cancel a job."""
        self.background.cancel(request.name)
        return Empty()


def _outcome(work: Callable[[], None], name: str) -> tuple[str, tuple[int, str] | None]:
    """Do the work of a job; return how it ended and, if it failed, a code and words."""
    try:
        work()
    except JobFailed as error:
        return "FAILED", (error.code, str(error))
    except errors.Refused as error:
        return "FAILED", (error.code.value[0], error.message)
    except Exception as error:
        log.exception("%s failed", name)
        if refusal := errors.of_system(error):
            return "FAILED", (refusal.code.value[0], refusal.message)
        message = f"Internal error occurred for the current attempt ({type(error).__name__}: {error})."
        return "FAILED", (code_pb2.INTERNAL, message)
    return "SUCCEEDED", None
