"""Runs a CustomJobSpec: each replica a process with the environment of a Vertex AI training container."""

import json
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import code_pb2

from helpers.local import PROJECT_NUMBER, checks, sandbox
from helpers.local.background import Control, JobFailed

ROLES = ("chief", "worker", "ps", "evaluator")  # what TF_CONFIG calls the worker pools
TRANSIENT = {134: "SIGABRT", 139: "SIGSEGV"}  # ends that Vertex AI tries again
MAX_RETRIES = 3
DEFAULT_TIMEOUT_SECONDS = 7 * 24 * 3600
GRACE_SECONDS = 10  # between asking a replica to end and ending it
LOG_LINES = 12  # of a failed replica, in its job's error


@dataclass
class Replica:
    """One process of a job."""

    pool: int
    index: int
    spec: Message
    address: str
    retries: int = 0
    process: object = None

    @property
    def name(self) -> str:
        """Return its name, such as workerpool0-0."""
        return f"workerpool{self.pool}-{self.index}"


@dataclass(frozen=True)
class Run:
    """One run of a job's specification: a custom job, a training pipeline, or one trial of a tuning job."""

    cloud: object
    job_id: str
    region: str
    spec: Message  # CustomJobSpec
    trial: str = ""
    environment: Mapping[str, str] = ()

    @property
    def folder(self) -> Path:
        """Return the folder that holds the run's processes and logs."""
        folder = self.cloud.folder / "jobs" / self.job_id
        return folder / f"trial-{self.trial}" if self.trial else folder

    @property
    def base(self) -> str:
        """Return the gs:// folder of the run's output, without a slash at its end; empty if it has none."""
        base = self.spec.base_output_directory.output_uri_prefix.rstrip("/")
        return f"{base}/{self.trial}" if base and self.trial else base

    def execute(self, control: Control) -> None:
        """Run all replicas until the primary one ends well; JobFailed tells why it did not."""
        self.cloud.refusals.capacity(self.region, self.spec)
        replicas = [
            Replica(pool, index, spec, f"127.0.0.1:{free_port()}")
            for pool, spec in enumerate(self.spec.worker_pool_specs)
            if spec.HasField("python_package_spec") or spec.HasField("container_spec")
            for index in range(max(1, spec.replica_count))
        ]
        ends: queue.SimpleQueue = queue.SimpleQueue()
        control.stops.append(lambda: [stop(replica) for replica in replicas])
        try:
            for replica in replicas:
                self._start(replica, replicas, ends, control)
            self._watch(replicas, ends, control)
        finally:
            for thread in [threading.Thread(target=stop, args=(replica,)) for replica in replicas]:
                thread.start()
            for replica in replicas:
                if replica.process:
                    replica.process.wait()

    def _watch(self, replicas: list[Replica], ends: queue.SimpleQueue, control: Control) -> None:
        scheduling = self.spec.scheduling
        timeout = scheduling.timeout.seconds or DEFAULT_TIMEOUT_SECONDS
        deadline = time.monotonic() + timeout
        while not control.cancelled.is_set():
            try:
                replica, process, status = ends.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise JobFailed(
                    f"The job did not end within its timeout of {timeout} s (scheduling.timeout).",
                    code_pb2.DEADLINE_EXCEEDED,
                ) from None
            if control.cancelled.is_set():
                return
            if process is not replica.process:
                continue  # it was stopped to be started again
            if status == 0:
                if replica.pool == 0:
                    return
            elif status in TRANSIENT and replica.retries < MAX_RETRIES and not scheduling.disable_retries:
                again = replicas if scheduling.restart_job_on_worker_restart else [replica]
                for other in again:
                    stop(other)
                    other.process.wait()
                    other.retries += 1
                    self._start(other, replicas, ends, control)
            else:
                raise JobFailed(self._words(replica, status))

    def _start(self, replica: Replica, replicas: list[Replica], ends: queue.SimpleQueue, control: Control) -> None:
        spec = replica.spec
        folder = self.folder / replica.name
        folder.mkdir(parents=True, exist_ok=True)
        is_package = spec.HasField("python_package_spec")
        body = spec.python_package_spec if is_package else spec.container_spec
        environment = self.contract(replica, replicas) | {variable.name: variable.value for variable in body.env}
        task = sandbox.Task(
            folder=folder,
            command=["python", "-m", body.python_module, *body.args] if is_package else [*body.command, *body.args],
            environment=environment,
            buckets=self.cloud.buckets,
            log=self.folder / f"{replica.name}.log",
            packages=[self._local(uri) for uri in body.package_uris] if is_package else (),
            image="" if is_package else body.image_uri,
            has_entrypoint=is_package or bool(body.command),
        )
        try:
            process = replica.process = sandbox.start(task)
        except sandbox.CannotStart as error:
            raise JobFailed(f"The replica {replica.name} could not be started: {error}") from None
        if control.cancelled.is_set():
            stop(replica)
        threading.Thread(target=lambda: ends.put((replica, process, process.wait())), daemon=True).start()

    def _local(self, uri: str) -> Path:
        name = uri.removeprefix("gs://")
        path = (self.cloud.buckets / name).resolve()
        if not uri.startswith("gs://") or not path.is_relative_to(self.cloud.buckets.resolve()) or not path.is_file():
            raise JobFailed(f"The Python package {uri!r} is not found.", code_pb2.NOT_FOUND)
        return path

    def contract(self, replica: Replica, replicas: list[Replica]) -> dict[str, str]:
        """Return what Vertex AI sets in the environment of a training container."""
        cluster: dict[str, list[str]] = {}
        roles: dict[str, list[str]] = {}
        for other in replicas:
            cluster.setdefault(f"workerpool{other.pool}", []).append(other.address)
            if ROLES[other.pool] != "evaluator":
                roles.setdefault(ROLES[other.pool], []).append(other.address)
        trial = {"trial": self.trial} if self.trial else {}
        job = json.dumps(json_format.MessageToDict(replica.spec, preserving_proto_field_name=True))
        place = {"index": replica.index, **trial}
        specification = {
            "cluster": cluster,
            "environment": "cloud",
            "task": {"type": f"workerpool{replica.pool}", **place},
            "job": job,
        }
        # As on Vertex AI, google.auth finds the project in which Google runs the job, and not its owner's.
        variables = self.cloud.variables() | {"GOOGLE_APPLICATION_CREDENTIALS": str(self.cloud.identity.tenant_file)}
        del variables["GOOGLE_CLOUD_PROJECT"]
        found = variables | {
            "CLOUD_ML_JOB_ID": self.job_id,
            "CLOUD_ML_PROJECT_ID": PROJECT_NUMBER,
            "CLOUD_ML_REGION": self.region,
            "HOSTNAME": f"cmle-training-workerpool{replica.pool}-{self.job_id[:10]}-{replica.index}",
            "CLUSTER_SPEC": json.dumps(specification),
        }
        if len(replicas) > 1:
            task = {"type": ROLES[replica.pool], **place}
            found["TF_CONFIG"] = json.dumps({"cluster": roles, "task": task, "environment": "cloud", "job": job})
        if self.base:
            found["AIP_MODEL_DIR"] = f"{self.base}/model/"
            found["AIP_CHECKPOINT_DIR"] = f"{self.base}/checkpoints/"
            found["AIP_TENSORBOARD_LOG_DIR"] = f"{self.base}/logs/"
        if self.spec.tensorboard:
            found["AIP_TENSORBOARD_RESOURCE_NAME"] = self.spec.tensorboard
        if self.spec.experiment:
            found["AIP_EXPERIMENT_NAME"] = self.spec.experiment
        if self.spec.experiment_run:
            found["AIP_EXPERIMENT_RUN_NAME"] = self.spec.experiment_run
        return found | dict(self.environment)

    def _words(self, replica: Replica, status: int) -> str:
        if status == 137:
            start = f"The replica {replica.name} ran out of memory and exited with a non-zero status of 137."
        else:
            reason = TRANSIENT.get(status, "Error")
            start = (
                f"The replica {replica.name} exited with a non-zero status of {status}. Termination reason: {reason}."
            )
        where = self.folder / f"{replica.name}.log"
        return (
            f"{start}\nTo find out more about why your job exited please check the logs: "
            f"python3 -m helpers cloud logs {self.job_id}\nThe last lines of {where.name}:\n{tail(where)}"
        )


def stop(replica: Replica) -> None:
    """End a replica's process and all that it started."""
    if replica.process:
        replica.process.terminate(GRACE_SECONDS)


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """Return the last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            return "\n".join(file.read().decode(errors="replace").rstrip().splitlines()[-lines:])
    except OSError:
        return "(no log)"


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check(cloud, location: str, spec: Message, where: str = "job_spec") -> None:
    """Refuse a specification that Vertex AI would refuse before it runs."""
    checks.worker_pools(spec, f"{where}.worker_pool_specs")
    cloud.refusals.job(location, spec, where)
    if spec.base_output_directory.output_uri_prefix:
        checks.bucket(spec.base_output_directory.output_uri_prefix, location, cloud.bucket_location)
