"""The search for good parameters: a study's next trial, the trials to stop early, and the best ones.

Suggestions are Optuna's. Nothing but the trials is kept from one to the next, so a search goes on after a restart as if
nothing had happened, and the same name with the same trials always leads to the same suggestion.
"""

import math
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import space

State = types.Trial.State
StudySpec = types.StudySpec
ENDED = (State.SUCCEEDED, State.INFEASIBLE)

STARTUP_TRIALS = 5  # at random, before the Bayesian search begins: jobs of about ten trials are common here
ATTEMPTS = 5  # to find parameters that no trial had before

# Suggestions


def suggest(spec: Message, trials: Sequence[Message], name: str, fixed: Mapping | None = None) -> dict | None:
    """Return the parameters of the next trial as {id: value}; None if a grid has no point left.

    The random numbers depend on `name`; `fixed` are parameters that must have the values given there.
    """
    fixed = fixed or {}
    tried = [space.values_of(trial) for trial in trials]
    if spec.algorithm == StudySpec.Algorithm.GRID_SEARCH:
        left = (point for point in _grid(spec.parameters) if point not in tried)
        return next((point for point in left if fixed.items() <= point.items()), None)
    number = next_id(trials)
    may_repeat = spec.observation_noise == StudySpec.ObservationNoise.HIGH
    for attempt in range(ATTEMPTS):
        point = _ask(spec, trials, f"{name}/{number}/{attempt}", fixed)
        if may_repeat or point not in tried:
            break
    return point


def next_id(trials: Sequence[Message]) -> int:
    """Return the number of the next trial: 1 for the first."""
    return max((int(trial.id) for trial in trials), default=0) + 1


def _grid(parameters: Sequence[Message]) -> Iterator[dict]:
    """Yield all points of a grid."""
    if not parameters:
        yield {}
        return
    first, *rest = parameters
    domain = space.domain_of(first)
    is_integer = first.HasField("integer_value_spec")
    for value in range(domain.min_value, domain.max_value + 1) if is_integer else domain.values:
        for others in _grid([*space.conditional_on(first, value).values(), *rest]):
            yield {first.parameter_id: value, **others}


def _ask(spec: Message, trials: Sequence[Message], name: str, fixed: Mapping) -> dict:
    """Return a suggestion of Optuna's, which is told all trials that there are."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = zlib.crc32(name.encode())
    if spec.algorithm == StudySpec.Algorithm.RANDOM_SEARCH:
        sampler = optuna.samplers.RandomSampler(seed)
    else:
        sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * len(spec.metrics))
    parameters = dict(space.every(spec.parameters))
    distributions = {key: _distribution(parameter) for key, parameter in parameters.items()}
    # To the sampler, a pruned trial without values is worse than all that have some.
    states = {State.SUCCEEDED: TrialState.COMPLETE, State.INFEASIBLE: TrialState.PRUNED}
    for trial in trials:
        given = space.values_of(trial)
        active = space.active(spec.parameters, lambda _, parameter, given=given: given[parameter.parameter_id])
        study.add_trial(
            optuna.create_trial(
                state=states.get(trial.state, TrialState.RUNNING),
                values=objectives(spec, trial.final_measurement),
                params={key: _inward(parameters[key], value) for key, value in active.items()},
                distributions={key: distributions[key] for key in active},
            )
        )
    known = {key: fixed.get(parameter.parameter_id) for key, parameter in parameters.items()}
    if not trials:
        known = {key: _default(parameters[key]) if value is None else value for key, value in known.items()}
    known = {key: value for key, value in known.items() if space.is_feasible(parameters[key], value)}
    study.enqueue_trial({key: _inward(parameters[key], value) for key, value in known.items()})
    # Conditional parameters are asked for in any case, and left out of the answer if they are not active.
    asked = study.ask(distributions).params
    chosen = space.active(spec.parameters, lambda key, parameter: _outward(parameter, asked[key]))
    return {parameters[key].parameter_id: value for key, value in chosen.items()}


def _default(parameter: Message):
    domain = space.domain_of(parameter)
    return domain.default_value if domain.HasField("default_value") else None


# A sampler's coordinates: the place of a discrete value in its list, and a reversed scale turned round


def _distribution(parameter: Message):
    from optuna import distributions

    domain = space.domain_of(parameter)
    is_log = "LOG" in StudySpec.ParameterSpec.ScaleType(parameter.scale_type).name
    if parameter.HasField("double_value_spec"):
        return distributions.FloatDistribution(domain.min_value, domain.max_value, log=is_log)
    if parameter.HasField("integer_value_spec"):
        return distributions.IntDistribution(domain.min_value, domain.max_value, log=is_log)
    if parameter.HasField("discrete_value_spec"):
        return distributions.IntDistribution(0, len(domain.values) - 1)
    return distributions.CategoricalDistribution(list(domain.values))


def _inward(parameter: Message, value):
    domain = space.domain_of(parameter)
    if parameter.HasField("categorical_value_spec"):
        return value
    if parameter.HasField("discrete_value_spec"):
        return next(place for place, feasible in enumerate(domain.values) if space.is_same(value, feasible))
    return _turned(parameter, int(value) if parameter.HasField("integer_value_spec") else value)


def _outward(parameter: Message, coordinate):
    if parameter.HasField("discrete_value_spec"):
        return space.domain_of(parameter).values[coordinate]
    return coordinate if parameter.HasField("categorical_value_spec") else _turned(parameter, coordinate)


def _turned(parameter: Message, number):
    domain = space.domain_of(parameter)
    if parameter.scale_type == StudySpec.ParameterSpec.ScaleType.UNIT_REVERSE_LOG_SCALE:
        number = domain.min_value + domain.max_value - number
    return min(max(number, domain.min_value), domain.max_value)


# Measurements


def objectives(spec: Message, measurement: Message) -> list[float] | None:
    """Return a measurement's metrics, each so that more is better; None if one is missing."""
    found = {metric.metric_id: metric.value for metric in measurement.metrics}
    if any(not math.isfinite(found.get(metric.metric_id, math.nan)) for metric in spec.metrics):
        return None
    minimize = StudySpec.MetricSpec.GoalType.MINIMIZE
    return [-found[metric.metric_id] if metric.goal == minimize else found[metric.metric_id] for metric in spec.metrics]


def complete(spec: Message, trial: Message, infeasible_reason: str = "") -> None:
    """End a trial, with the measurement that the study selects if it has no final one."""
    whole = [measurement for measurement in trial.measurements if objectives(spec, measurement)]
    if not infeasible_reason and not trial.HasField("final_measurement"):
        if whole:
            is_best = spec.measurement_selection_type == StudySpec.MeasurementSelectionType.BEST_MEASUREMENT
            chosen = max(whole, key=lambda measurement: objectives(spec, measurement)) if is_best else whole[-1]
            trial.final_measurement.CopyFrom(chosen)
        else:
            names = ", ".join(repr(metric.metric_id) for metric in spec.metrics)
            infeasible_reason = f"The trial ended without a measurement of {names}."
    if infeasible_reason:
        trial.ClearField("final_measurement")
        trial.infeasible_reason = infeasible_reason
    trial.state = State.INFEASIBLE if infeasible_reason else State.SUCCEEDED
    trial.end_time.GetCurrentTime()


def add_measurement(trial: Message, measurement: Message) -> None:
    """Add a measurement in the order of steps and times."""
    trial.measurements.append(measurement)
    trial.measurements.sort(key=lambda each: (each.step_count, each.elapsed_duration.ToNanoseconds()))


def should_stop(spec: Message, trials: Sequence[Message], trial: Message) -> bool:
    """Say whether the median rule ends a trial: its best value is worse than the median of the averages of those done.

    The average of each that is done is taken over what it measured up to the trial's last step, or time.
    """
    if not spec.HasField("median_automated_stopping_spec"):
        return False
    by_time = spec.median_automated_stopping_spec.use_elapsed_duration

    def curve(of: Message) -> list[tuple[float, float]]:
        return [
            (each.elapsed_duration.ToNanoseconds() if by_time else each.step_count, value[0])
            for each in of.measurements
            if (value := objectives(spec, each))
        ]

    own = curve(trial)
    if not own:
        return False
    last = max(place for place, _ in own)
    done = [curve(other) for other in trials if other.state == State.SUCCEEDED]
    so_far = [[value for place, value in values if place <= last] for values in done]
    averages = [statistics.mean(values) for values in so_far if values]
    return bool(averages) and max(value for _, value in own) < statistics.median(averages)


def optimal(spec: Message, trials: Sequence[Message]) -> list[Message]:
    """Return the trials than which no other is better in one metric and at least as good in all."""
    done = [(trial, objectives(spec, trial.final_measurement)) for trial in trials if trial.state == State.SUCCEEDED]

    def is_better(values, others):
        return values != others and all(value >= other for value, other in zip(values, others, strict=True))

    return [trial for trial, values in done if not any(is_better(others, values) for _, others in done)]
