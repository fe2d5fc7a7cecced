"""Hyperparameter tuning jobs: trials, some at a time, each a custom job with parameters that the search suggests."""

import contextlib
import json
import math
import threading
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import runner, search, space, studies
from helpers.local.background import Control, JobFailed
from helpers.local.search import ENDED, State
from helpers.local.service import Service, location_of
from helpers.local.space import REQUIRED, refuse
from helpers.local.store import Store, new_id
from helpers.tables import read

CustomJob, CustomJobSpec = types.CustomJob.pb(), types.CustomJobSpec.pb()
Measurement, Trial = types.Measurement.pb(), types.Trial.pb()

READ_SECONDS = 0.5  # between two looks at what the trials have measured
REPORT = {"checkpoint_path", "global_step", "timestamp", "trial"}  # what hypertune writes beside a metric
STOPPED = "The trial was stopped because its job ended."
INTERRUPTED = "The local cloud ended while the trial ran."


def check(job: Message) -> None:
    """Refuse a tuning job that Vertex AI refuses before it starts."""
    where = "hyperparameter_tuning_job"
    if not job.display_name:
        refuse([(f"{where}.display_name", REQUIRED)])
    if job.max_trial_count < 1:
        refuse([(f"{where}.max_trial_count", f"It must be positive, found {job.max_trial_count}.")])
    if not 1 <= job.parallel_trial_count <= job.max_trial_count:
        allowed = f"Expected 1 to {job.max_trial_count} (max_trial_count), found {job.parallel_trial_count}."
        refuse([(f"{where}.parallel_trial_count", allowed)])
    if job.max_failed_trial_count < 0:
        refuse([(f"{where}.max_failed_trial_count", f"It must not be negative, found {job.max_failed_trial_count}.")])
    studies.check(job.study_spec, f"{where}.study_spec")
    for number, pool in enumerate(job.trial_job_spec.worker_pool_specs):
        machine = pool.machine_spec
        kind = types.AcceleratorType(machine.accelerator_type).name
        if machine.machine_type in read("machines")["tpu"] or kind.startswith("TPU"):
            at = f"{where}.trial_job_spec.worker_pool_specs[{number}].machine_spec"
            refuse([(at, "TPUs are not supported for hyperparameter tuning: use CPUs or GPUs.")])


def run(cloud, name: str, control: Control) -> None:
    """Run a tuning job to its end; JobFailed tells why it ended early."""
    tuning = Tuning(cloud, name)
    control.stops.append(tuning.stop)
    if control.cancelled.is_set():
        return
    count = cloud.store.get(name).parallel_trial_count
    workers = [threading.Thread(target=tuning.work, name=f"{name}/{number}", daemon=True) for number in range(count)]
    for worker in workers:
        worker.start()
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(READ_SECONDS)
        try:
            tuning.look()
        except Exception as error:
            tuning.fail(error)
    if tuning.failure:
        raise tuning.failure


def interrupt(store: Store) -> None:
    """End the trials that a killed server left running; those that had ended stay as they were."""
    for job in store.all("hyperparameterTuningJobs"):
        if any(trial.state not in ENDED for trial in job.trials):
            with store.change(job.name) as changed:
                for trial in changed.trials:
                    if trial.state not in ENDED:
                        search.complete(changed.study_spec, trial, INTERRUPTED)


@dataclass(frozen=True)
class TrialRun(runner.Run):
    """The run of a trial, whose replicas are told its number and where to report."""

    def reports(self, replica: str = "workerpool0-0") -> Path:
        """Return the file into which a replica reports; what counts is that of the primary one."""
        return self.folder / replica / "hypertune.metrics"

    def contract(self, replica: runner.Replica, replicas: list[runner.Replica]) -> dict[str, str]:
        """Return what Vertex AI sets in the environment of a trial."""
        own = {"CLOUD_ML_TRIAL_ID": self.trial, "CLOUD_ML_HP_METRIC_FILE": str(self.reports(replica.name))}
        return super().contract(replica, replicas) | own


@dataclass
class Running:
    """A trial while it runs: how to stop it, and what it has reported so far."""

    run: TrialRun
    control: Control = field(default_factory=Control)
    lines: set[str] = field(default_factory=set)  # of its reports, that were read

    def reports(self) -> list[dict]:
        """Return what was reported since the last call."""
        # hypertune writes the file anew for each report, with the last hundred of them.
        found = []
        file = self.run.reports()
        try:
            lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        except OSError:
            lines = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that is just being written
                if line not in self.lines and isinstance(report := json.loads(line), dict):
                    self.lines.add(line)
                    found.append(report)
        return found

    def tags(self) -> list[str]:
        """Return the names of all metrics that were reported."""
        return sorted({name for line in self.lines for name in json.loads(line)} - REPORT)


@dataclass
class Tuning:
    """A tuning job while it runs."""

    cloud: object
    name: str
    failure: Exception | None = None
    is_over: bool = False  # whether no more trials are begun
    running: dict[str, Running] = field(default_factory=dict)  # by the ids of the trials
    lock: threading.RLock = field(default_factory=threading.RLock)

    def stop(self) -> None:
        """Begin no more trials, and stop those that run."""
        with self.lock:
            self.is_over = True
            for trial in self.running.values():
                trial.control.cancel()

    def fail(self, failure: Exception) -> None:
        """End the job because of a failure, the first one."""
        with self.lock:
            self.failure = self.failure or failure
            self.stop()

    def work(self) -> None:
        """Run one trial after another, as many as there are."""
        try:
            while trial := self.begin():
                self.end(trial.id, self.execute(trial))
        except Exception as error:
            self.fail(error)

    def begin(self) -> Message | None:
        """Return the next trial, kept as running; None if there is none."""
        with self.lock:
            job = self.cloud.store.get(self.name)
            if self.is_over or len(job.trials) == job.max_trial_count:
                return None
            values = search.suggest(job.study_spec, job.trials, job.display_name)
            if values is None:
                return None
            trial = Trial(id=str(search.next_id(job.trials)), state=State.ACTIVE)
            trial.parameters.extend(space.as_parameters(values))
            trial.custom_job = f"{location_of(self.name)}/customJobs/{new_id()}"
            trial.start_time.GetCurrentTime()
            spec = CustomJobSpec()
            spec.CopyFrom(job.trial_job_spec)
            for pool in spec.worker_pool_specs:
                if task := pool.WhichOneof("task"):
                    getattr(pool, task).args.extend(arguments(trial))
            _, _, _, region, _, number = self.name.split("/")
            self.running[trial.id] = Running(TrialRun(self.cloud, number, region, spec, trial.id))
            with self.cloud.store.change(self.name) as job:
                job.trials.append(trial)
            return trial

    def execute(self, trial: Message) -> str:
        """Run a trial as a custom job; return why it failed, empty if it did not."""
        tuning, running = self.cloud.store.get(self.name), self.running[trial.id]
        name = f"{tuning.display_name}-trial-{trial.id}"
        job = CustomJob(name=trial.custom_job, display_name=name, job_spec=running.run.spec, labels=tuning.labels)
        Service.stamp(job, created=True)
        background = self.cloud.services["JobService"].background
        try:
            background.run_inside(job, lambda: running.run.execute(running.control), running.control)
        except JobFailed as failure:
            return str(failure)
        return ""

    def end(self, number: str, reason: str) -> None:
        """Keep how a trial ended, and judge whether the job goes on."""
        with self.lock:
            running = self.running.pop(number)
            with self.cloud.store.change(self.name) as job:
                trial = job.trials[int(number) - 1]
                for report in running.reports():
                    measure(job.study_spec, trial, report)
                if running.control.cancelled.is_set():
                    reason = "" if trial.state == State.STOPPING else STOPPED
                search.complete(job.study_spec, trial, reason)
                if trial.state == State.INFEASIBLE and not reason:
                    told = ", ".join(map(repr, running.tags())) or "nothing"
                    trial.infeasible_reason += f" It reported {told}; hyperparameter_metric_tag must be a metric_id."
            if trial.state == State.INFEASIBLE and not self.is_over and (words := too_many_failed(job, trial)):
                self.fail(JobFailed(words))

    def look(self) -> None:
        """Read what the trials measured since the last look, and stop those that are not worth going on."""
        with self.lock:
            found = {number: reports for number, trial in self.running.items() if (reports := trial.reports())}
            if not found:
                return
            stopping = []
            with self.cloud.store.change(self.name) as job:
                for number, reports in found.items():
                    trial = job.trials[int(number) - 1]
                    for report in reports:
                        measure(job.study_spec, trial, report)
                    if trial.state == State.ACTIVE and search.should_stop(job.study_spec, job.trials, trial):
                        trial.state = State.STOPPING
                        stopping.append(self.running[number])
            for running in stopping:
                running.control.cancel()


def measure(spec: Message, trial: Message, report: dict) -> None:
    """Add a report to a trial's measurements: metrics that are reported one by one at a step belong together."""
    for name in (metric.metric_id for metric in spec.metrics if metric.metric_id in report):
        try:
            measurement = Measurement(step_count=int(report.get("global_step", 0)))
            metric = measurement.metrics.add(metric_id=name, value=float(report[name]))
            moment = int(float(report["timestamp"]) * 1e9) - trial.start_time.ToNanoseconds()
            measurement.elapsed_duration.FromNanoseconds(max(0, moment))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # not of hypertune's
        if not math.isfinite(metric.value):
            continue
        for other in trial.measurements:
            if other.step_count == measurement.step_count and name not in {each.metric_id for each in other.metrics}:
                other.metrics.append(metric)
                break
        else:
            search.add_measurement(trial, measurement)


def arguments(trial: Message) -> list[str]:
    """Return the command-line arguments of a trial, as Google documents them: `--id value`."""
    words = []
    for name, value in space.values_of(trial).items():
        # Whole numbers without a point, as int() wants them, and no exponents, which argparse takes for an option.
        words += [f"--{name}", value if isinstance(value, str) else f"{Decimal(repr(value)).normalize():f}"]
    return words


def too_many_failed(job: Message, trial: Message) -> str:
    """Return why a job ends, now that a trial failed; empty if it goes on.

    Without max_failed_trial_count, a trial that fails while none has succeeded ends it.
    """
    states = [each.state for each in job.trials]
    failed, limit = states.count(State.INFEASIBLE), job.max_failed_trial_count
    this = f"Hyperparameter Tuning Trial #{trial.id}"
    if not limit and State.SUCCEEDED not in states:
        start = f"{this} failed before any other successful trials were completed."
    elif limit and failed >= limit:
        start = f"{failed} trials failed (max_failed_trial_count is {limit}), at last {this}."
    else:
        return ""
    return (
        f"{start} It had the arguments {' '.join(arguments(trial))}. Its error message was: {trial.infeasible_reason}"
    )
