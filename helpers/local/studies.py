"""VizierService: studies, whose trials are suggested here and run by whoever asks for them; and what a study may be."""

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message
from grpc import StatusCode

from helpers.local import errors, search, space
from helpers.local.search import ENDED, State
from helpers.local.service import Service, location_of
from helpers.local.space import REQUIRED, Problem, refuse

Trial = types.Trial.pb()
SuggestTrialsResponse = types.SuggestTrialsResponse.pb()
CheckTrialEarlyStoppingStateResponse = types.CheckTrialEarlyStoppingStateResponse.pb()
ListOptimalTrialsResponse = types.ListOptimalTrialsResponse.pb()

UNSUPPORTED = {
    "convex_automated_stopping_spec": "use median_automated_stopping_spec",
    "decay_curve_stopping_spec": "use median_automated_stopping_spec",
    "study_stopping_config": "limit the number of trials",
}


class VizierService(Service):
    """Studies and their trials."""

    name = "VizierService"
    resources = {"Study": "studies", "Trial": "trials"}

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self._suggesting = threading.Lock()

    # Studies

    def create_study(self, request: Message) -> Message:
        """Make a study; its display name is its own in its location."""
        study = request.study
        if not study.display_name:
            refuse([("study.display_name", REQUIRED)])
        check(study.study_spec, "study.study_spec")
        with self.store.transaction():
            if found := self._named(request.parent, study.display_name):
                message = f"There is a study with the display name {study.display_name!r} already: {found.name}."
                raise errors.Refused(StatusCode.ALREADY_EXISTS, message)
            study.state = types.Study.State.ACTIVE
            return self.create("Study", request)

    def lookup_study(self, request: Message) -> Message:
        """Return the study that has a display name."""
        if found := self._named(request.parent, request.display_name):
            return found
        raise errors.not_found(f"{request.parent}/studies with the display name {request.display_name!r}")

    def _study(self, name: str) -> Message:
        if not re.fullmatch(r".+/studies/[^/]+", name):
            raise errors.not_found(name)
        return self.store.get(name)

    def _named(self, parent: str, display_name: str) -> Message | None:
        studies = self.store.list(parent, "studies")
        return next((study for study in studies if study.display_name == display_name), None)

    def list_optimal_trials(self, request: Message) -> Message:
        """Return the best trial of a study, or the Pareto-optimal ones if it has several metrics."""
        spec = self._study(request.parent).study_spec
        return ListOptimalTrialsResponse(optimal_trials=search.optimal(spec, self._trials(request.parent)))

    # Trials

    def _trials(self, study: str) -> list[Message]:
        return self.store.list(study, "trials")

    def create_trial(self, request: Message) -> Message:
        """Add a trial of the client's own: one to be suggested, or one that was run if it has a final measurement."""
        trial = Trial(parameters=request.trial.parameters)
        with self.store.transaction():
            spec = self._study(request.parent).study_spec
            space.check_values(spec, trial, "trial.parameters")
            if request.trial.HasField("final_measurement"):
                check_measurement(spec, request.trial.final_measurement, "trial.final_measurement", is_final=True)
                trial.final_measurement.CopyFrom(request.trial.final_measurement)
                trial.start_time.GetCurrentTime()
                search.complete(spec, trial)
            else:
                trial.state = State.REQUESTED
            return self._add(request.parent, trial)

    def _add(self, study: str, trial: Message) -> Message:
        trial.id = str(search.next_id(self._trials(study)))
        trial.name = f"{study}/trials/{trial.id}"
        self.store.put(trial.name, trial)
        return trial

    def suggest_trials(self, request: Message) -> Message:
        """Give a client the trials that it has not completed, then those that were requested, then new ones."""
        response = SuggestTrialsResponse()
        response.start_time.GetCurrentTime()
        spec = self._study(request.parent).study_spec
        count, contexts = request.suggestion_count, list(request.contexts) or [Trial()] * request.suggestion_count
        if not request.client_id:
            refuse([("client_id", REQUIRED)])
        if count < 1:
            refuse([("suggestion_count", f"It must be positive, found {count}.")])
        if len(contexts) != count:
            refuse([("contexts", f"Expected none or {count} (suggestion_count), found {len(contexts)}.")])
        for number, context in enumerate(contexts):
            space.check_values(spec, context, f"contexts[{number}].parameters", is_partial=True)
        with self._suggesting:
            for context in contexts:
                trial = self._next(request.parent, space.values_of(context), request.client_id, response.trials)
                if trial is None:
                    break
                response.trials.append(trial)
        response.study_state = self.store.get(request.parent).state
        response.end_time.GetCurrentTime()
        return response

    def _next(self, name: str, fixed: Mapping, client: str, given: Sequence[Message]) -> Message | None:
        """Return one trial for a client, besides those that it was given just now; None if the study has no more."""
        with self.store.transaction():
            study, trials = self.store.get(name), self._trials(name)
            waiting = [trial for trial in trials if trial.state == State.ACTIVE and trial.client_id == client]
            waiting += [trial for trial in trials if trial.state == State.REQUESTED]
            for trial in waiting:
                if trial not in given and fixed.items() <= space.values_of(trial).items():
                    self.store.put(trial.name, _assigned(trial, client))
                    return trial
        values = search.suggest(study.study_spec, trials, study.display_name, fixed)
        with self.store.change(name) as study:
            if values is not None:
                return self._add(name, _assigned(Trial(parameters=space.as_parameters(values)), client))
            study.state = types.Study.State.COMPLETED
        return None

    @contextlib.contextmanager
    def _running(self, name: str) -> Iterator[tuple[Message, Message]]:
        """Give the specification of a study and one of its trials that has not ended, to be changed alone."""
        if "/trials/" not in name:
            raise errors.not_found(name)
        study = self._study(name.rpartition("/trials/")[0])
        with self.store.change(name) as trial:
            if trial.state in ENDED:
                raise errors.precondition(f"The trial {name} has ended: its state is {State(trial.state).name}.")
            yield study.study_spec, trial

    def add_trial_measurement(self, request: Message) -> Message:
        """Add what a client measured while a trial runs."""
        with self._running(request.trial_name) as (spec, trial):
            check_measurement(spec, request.measurement, "measurement")
            search.add_measurement(trial, request.measurement)
            return trial

    def complete_trial(self, request: Message) -> Message:
        """End a trial, well or as infeasible."""
        with self._running(request.name) as (spec, trial):
            reason = request.infeasible_reason or "The client gave no reason."
            if request.HasField("final_measurement") and not request.trial_infeasible:
                check_measurement(spec, request.final_measurement, "final_measurement", is_final=True)
                trial.final_measurement.CopyFrom(request.final_measurement)
            search.complete(spec, trial, reason if request.trial_infeasible else "")
            return trial

    def stop_trial(self, request: Message) -> Message:
        """Ask whoever runs a trial to stop it."""
        with self._running(request.name) as (_, trial):
            trial.state = State.STOPPING
            return trial

    def check_trial_early_stopping_state(self, request: Message) -> Message:
        """Say whether a trial should stop, by the study's rule or because it was asked to."""
        with self._running(request.trial_name) as (spec, trial):
            others = self._trials(request.trial_name.rpartition("/trials/")[0])
            if search.should_stop(spec, others, trial):
                trial.state = State.STOPPING
            response = CheckTrialEarlyStoppingStateResponse(should_stop=trial.state == State.STOPPING)
        return self.cloud.operations.finished(location_of(request.trial_name), response)


def _assigned(trial: Message, client: str) -> Message:
    """Return a trial that a client runs from now on, if it does not already."""
    if trial.state != State.ACTIVE:
        trial.state = State.ACTIVE
        trial.client_id = client
        trial.start_time.GetCurrentTime()
    return trial


# What is refused


def check(spec: Message, where: str) -> None:
    """Refuse a StudySpec that Vertex AI refuses, or that needs algorithms which are Google's alone."""
    for field, instead in UNSUPPORTED.items():
        if spec.HasField(field):
            raise errors.unimplemented(f"{where}.{field}", instead)
    if any(metric.HasField("safety_config") for metric in spec.metrics):
        raise errors.unimplemented(f"{where}.metrics.safety_config", "end unsafe trials as infeasible")
    refuse([*_metric_problems(spec, where), *space.problems(spec, where)])


def _metric_problems(spec: Message, where: str) -> Iterator[Problem]:
    if not spec.metrics:
        yield f"{where}.metrics", REQUIRED
    ids = [metric.metric_id for metric in spec.metrics]
    for number, name in enumerate(ids):
        at = f"{where}.metrics[{number}].metric_id"
        yield from space.of_id(name, at)
        if name in ids[:number]:
            yield at, f"It must be unique, found {name!r} twice."
    if spec.HasField("median_automated_stopping_spec") and len(ids) > 1:
        yield f"{where}.median_automated_stopping_spec", f"It needs a study with one metric, found {len(ids)}."


def check_measurement(spec: Message, measurement: Message, where: str, is_final: bool = False) -> None:
    """Refuse a measurement of metrics that the study does not have; a final one has to hold them all."""
    ids = [metric.metric_id for metric in spec.metrics]
    found = [metric.metric_id for metric in measurement.metrics]
    at = f"{where}.metrics"
    for name in found:
        if name not in ids:
            refuse([(at, f"The study has no metric {name!r}, only {', '.join(map(repr, ids))}.")])
    if not found:
        refuse([(at, REQUIRED)])
    if len(set(found)) < len(found):
        refuse([(at, f"Each metric has one value, found {found}.")])
    if is_final and search.objectives(spec, measurement) is None:
        refuse([(at, f"A final measurement holds a number for each of {', '.join(map(repr, ids))}.")])
    if measurement.step_count < 0:
        refuse([(f"{where}.step_count", f"It must not be negative, found {measurement.step_count}.")])
