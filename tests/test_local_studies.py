"""Vizier's studies on the local cloud: suggestions, measurements, early stops and the best trials, over the API."""

import math

import pytest


@pytest.fixture(scope="module")
def v1(cloud):
    """Return the types of the API."""
    from google.cloud import aiplatform_v1

    return aiplatform_v1


@pytest.fixture
def vizier(cloud, v1):
    """Return a client; studies are deleted at the end."""
    client = v1.VizierServiceClient(client_options={"api_endpoint": f"{cloud.region}-aiplatform.googleapis.com"})
    yield client
    for study in client.list_studies(parent=parent(cloud)):
        client.delete_study(name=study.name)


def parent(cloud):
    """Return the name of the location."""
    return f"projects/{cloud.project}/locations/{cloud.region}"


def double(name, low, high, **more):
    """Return a parameter with numbers between bounds."""
    return {"parameter_id": name, "double_value_spec": {"min_value": low, "max_value": high}, **more}


def integer(name, low, high, **more):
    """Return a parameter with whole numbers between bounds."""
    return {"parameter_id": name, "integer_value_spec": {"min_value": low, "max_value": high}, **more}


def category(name, *values, **more):
    """Return a parameter that is one of some words."""
    return {"parameter_id": name, "categorical_value_spec": {"values": values}, **more}


def discrete(name, *values, **more):
    """Return a parameter that is one of some numbers."""
    return {"parameter_id": name, "discrete_value_spec": {"values": values}, **more}


def with_default(parameter, value):
    """Return a discrete parameter with a default value."""
    return parameter | {"discrete_value_spec": parameter["discrete_value_spec"] | {"default_value": value}}


def under(parameter, value):
    """Return a parameter that is there if its categorical parent has a value."""
    return {"parent_categorical_values": {"values": [value]}, "parameter_spec": parameter}


@pytest.fixture
def create(cloud, vizier):
    """Return a function that makes a study."""

    def make(*parameters, name="study", metrics=(("score", "MAXIMIZE"),), **spec):
        goals = [{"metric_id": metric, "goal": goal} for metric, goal in metrics]
        spec = {"metrics": goals, "parameters": list(parameters), **spec}
        return vizier.create_study(parent=parent(cloud), study={"display_name": name, "study_spec": spec})

    return make


@pytest.fixture
def suggest(vizier):
    """Return a function that asks for trials of a study."""

    def ask(study, count=1, client="me", **more):
        request = {"parent": study.name, "suggestion_count": count, "client_id": client, **more}
        return vizier.suggest_trials(request).result()

    return ask


def values(trial):
    """Return a trial's parameters."""
    return {parameter.parameter_id: parameter.value for parameter in trial.parameters}


def measurement(step=0, **metrics):
    """Return a measurement."""
    return {"step_count": step, "metrics": [{"metric_id": name, "value": value} for name, value in metrics.items()]}


def searched(vizier, suggest, study, count, objective):
    """Return the parameters of trials that were suggested, measured and completed one after another."""
    found = []
    for _ in range(count):
        (trial,) = suggest(study).trials
        found.append(values(trial))
        vizier.complete_trial({"name": trial.name, "final_measurement": measurement(score=objective(found[-1]))})
    return found


def test_the_search_finds_the_optimum_and_repeats_itself(vizier, create, suggest):
    def objective(point):
        return -((math.log10(point["rate"]) + 2) ** 2) - ((point["units"] - 40) / 40) ** 2 - (point["kind"] != "b")

    parameters = [
        double("rate", 1e-5, 1.0, scale_type="UNIT_LOG_SCALE"),
        integer("units", 1, 100),
        category("kind", "a", "b", "c"),
    ]
    bayesian = create(*parameters)
    first = searched(vizier, suggest, bayesian, 30, objective)
    assert max(map(objective, first)) > -0.2
    (best,) = vizier.list_optimal_trials({"parent": bayesian.name}).optimal_trials
    assert objective(values(best)) == max(map(objective, first)) == best.final_measurement.metrics[0].value
    vizier.delete_study(name=bayesian.name)
    again = create(*parameters)
    assert searched(vizier, suggest, again, 8, objective) == first[:8]
    # Later trials learn from those before them: at random, as many find less.
    at_random = searched(vizier, suggest, create(*parameters, name="random", algorithm="RANDOM_SEARCH"), 30, objective)
    assert sum(map(objective, first[10:])) > sum(map(objective, at_random[10:])) + 10


def test_scales_and_kinds_of_parameters_are_kept(create, suggest):
    study = create(
        double("log", 1e-6, 1.0, scale_type="UNIT_LOG_SCALE"),
        double("reverse", 1.0, 1000.0, scale_type="UNIT_REVERSE_LOG_SCALE"),
        integer("whole", 8, 9),
        discrete("some", 0.5, 2, 100),
        algorithm="RANDOM_SEARCH",
    )
    points = [values(trial) for trial in suggest(study, count=60).trials]
    below = {name: sorted(point[name] for point in points) for name in points[0]}
    assert below["log"][30] < 0.05  # on a linear scale the median would be 0.5
    assert below["reverse"][30] > 900
    assert 1 <= below["reverse"][0] <= below["reverse"][-1] <= 1000
    assert set(below["whole"]) == {8, 9}
    assert set(below["some"]) == {0.5, 2, 100}


def test_a_grid_is_walked_once_and_then_the_study_is_completed(v1, vizier, create, suggest):
    momentum = under(discrete("momentum", 0.5, 0.9), "sgd")
    grid = create(
        category("optimizer", "sgd", "adam", conditional_parameter_specs=[momentum]),
        integer("layers", 1, 2),
        algorithm="GRID_SEARCH",
    )
    response = suggest(grid, count=10)
    points = [tuple(sorted(values(trial).items())) for trial in response.trials]
    assert len(points) == len(set(points)) == 6
    assert {("momentum" in dict(point), dict(point)["optimizer"]) for point in points} == {
        (True, "sgd"),
        (False, "adam"),
    }
    assert response.study_state == v1.Study.State.COMPLETED
    assert vizier.get_study(name=grid.name).state == v1.Study.State.COMPLETED


def test_conditional_parameters_are_there_only_under_their_condition(vizier, create, suggest):
    rates = [under(double("rate", 0, 1), "a"), under(double("rate", 10, 11), "b")]
    study = create(category("kind", "a", "b", "c", conditional_parameter_specs=rates))
    points = searched(vizier, suggest, study, 12, lambda point: point.get("rate", 0))
    assert {point["kind"] for point in points} == {"a", "b", "c"}
    for point in points:
        low = {"a": 0, "b": 10}.get(point["kind"])
        assert ("rate" in point) == (low is not None)
        assert low is None or low <= point["rate"] <= low + 1


def test_a_client_is_given_its_trial_again_until_it_has_completed_it(v1, vizier, create, suggest):
    study = create(double("x", 0, 1))
    (mine,) = suggest(study, client="me").trials
    (yours,) = suggest(study, client="you").trials
    assert (mine.id, yours.id) == ("1", "2")
    assert [trial.id for trial in suggest(study, client="me").trials] == ["1"]
    assert mine.state == v1.Trial.State.ACTIVE
    done = vizier.complete_trial({"name": mine.name, "final_measurement": measurement(score=1)})
    assert done.state == v1.Trial.State.SUCCEEDED
    assert done.end_time >= done.start_time
    assert [trial.id for trial in suggest(study, client="me").trials] == ["3"]


def test_trials_of_a_clients_own_are_suggested_first_and_learnt_from(v1, vizier, create, suggest):
    study = create(double("x", 0, 1), category("kind", "a", "b"))
    own = [{"parameter_id": "x", "value": 0.25}, {"parameter_id": "kind", "value": "b"}]
    run = vizier.create_trial(parent=study.name, trial={"parameters": own, "final_measurement": measurement(score=5)})
    assert run.state == v1.Trial.State.SUCCEEDED
    requested = vizier.create_trial(parent=study.name, trial={"parameters": own})
    assert requested.state == v1.Trial.State.REQUESTED
    context = {"parameters": [{"parameter_id": "kind", "value": "a"}]}
    (other,) = suggest(study, contexts=[context]).trials
    assert values(other)["kind"] == "a"
    vizier.complete_trial({"name": other.name, "final_measurement": measurement(score=1)})
    (first,) = suggest(study).trials
    assert (first.id, values(first)) == (requested.id, {"x": 0.25, "kind": "b"})
    assert [trial.id for trial in vizier.list_optimal_trials({"parent": study.name}).optimal_trials] == [run.id]


def test_the_first_suggestion_is_the_default(create, suggest):
    x = {"parameter_id": "x", "double_value_spec": {"min_value": 0, "max_value": 1, "default_value": 0.125}}
    study = create(x, category("kind", "a", "b"))
    first, second = suggest(study, count=2).trials
    assert values(first)["x"] == 0.125 != values(second)["x"]


@pytest.mark.parametrize(("selection", "final"), [("BEST_MEASUREMENT", 1), ("LAST_MEASUREMENT", 3)])
def test_a_trial_that_is_completed_without_a_final_measurement_gets_one(vizier, create, suggest, selection, final):
    study = create(double("x", 0, 1), metrics=[("loss", "MINIMIZE")], measurement_selection_type=selection)
    (trial,) = suggest(study).trials
    for step, loss in [(20, 3), (10, 1)]:
        vizier.add_trial_measurement({"trial_name": trial.name, "measurement": measurement(step, loss=loss)})
    done = vizier.complete_trial({"name": trial.name})
    assert [each.step_count for each in done.measurements] == [10, 20]
    assert done.final_measurement.metrics[0].value == final


def test_infeasible_trials_are_told_apart(v1, vizier, create, suggest):
    study = create(double("x", 0, 1))
    silent, told = suggest(study, count=2).trials
    done = vizier.complete_trial({"name": told.name, "trial_infeasible": True, "infeasible_reason": "too hot"})
    assert (done.state, done.infeasible_reason) == (v1.Trial.State.INFEASIBLE, "too hot")
    done = vizier.complete_trial({"name": silent.name})
    assert done.state == v1.Trial.State.INFEASIBLE
    assert "without a measurement of 'score'" in done.infeasible_reason
    assert not vizier.list_optimal_trials({"parent": study.name}).optimal_trials


def test_several_metrics_have_a_front_of_optimal_trials(vizier, create, suggest):
    study = create(double("x", 0, 1), metrics=[("accuracy", "MAXIMIZE"), ("latency", "MINIMIZE")])
    results = [(0.9, 10), (0.8, 5), (0.7, 7), (0.9, 12)]
    for trial, (accuracy, latency) in zip(suggest(study, count=4).trials, results, strict=True):
        final = measurement(accuracy=accuracy, latency=latency)
        vizier.complete_trial({"name": trial.name, "final_measurement": final})
    optimal = vizier.list_optimal_trials({"parent": study.name}).optimal_trials
    assert [trial.id for trial in optimal] == ["1", "2"]
    assert suggest(study).trials[0].id == "5"


def test_the_median_rule_says_when_a_trial_should_stop(v1, vizier, create, suggest):
    study = create(double("x", 0, 1), median_automated_stopping_spec={})
    done, good, bad = suggest(study, count=3).trials

    def should_stop(trial, *curve):
        for step, score in curve:
            vizier.add_trial_measurement({"trial_name": trial.name, "measurement": measurement(step, score=score)})
        return vizier.check_trial_early_stopping_state({"trial_name": trial.name}).result().should_stop

    assert not should_stop(done, (1, 2), (2, 4), (3, 90))  # nothing to compare it with
    vizier.complete_trial({"name": done.name})
    assert not should_stop(good, (1, 1), (2, 3))  # its best is 3; the other's average up to step 2 was 3
    assert should_stop(bad, (1, 1), (2, 2.9))
    assert vizier.get_trial(name=bad.name).state == v1.Trial.State.STOPPING
    assert vizier.stop_trial({"name": good.name}).state == v1.Trial.State.STOPPING
    assert should_stop(good)


def test_a_display_name_belongs_to_one_study(cloud, vizier, create):
    from google.api_core import exceptions

    study = create(double("x", 0, 1))
    with pytest.raises(exceptions.AlreadyExists, match=study.name):
        create(double("x", 0, 1))
    assert vizier.lookup_study({"parent": parent(cloud), "display_name": "study"}) == study
    with pytest.raises(exceptions.NotFound):
        vizier.lookup_study({"parent": parent(cloud), "display_name": "another"})


def test_trials_are_deleted_alone_and_with_their_study(vizier, create, suggest):
    from google.api_core import exceptions

    study = create(double("x", 0, 1))
    first, second = suggest(study, count=2).trials
    vizier.delete_trial(name=first.name)
    assert [trial.id for trial in vizier.list_trials(parent=study.name)] == ["2"]
    vizier.delete_study(name=study.name)
    with pytest.raises(exceptions.NotFound):
        vizier.get_trial(name=second.name)


X = double("x", 0, 1)
WRONG_STUDIES = [
    (r"1.Field: study.study_spec.metrics; Message: Required field is not set", [X], {"metrics": ()}),
    (r"metrics\[1\].metric_id; Message: It must be unique", [X], {"metrics": [("a", "MAXIMIZE")] * 2}),
    (r"must not contain whitespaces, found 'a b'", [X], {"metrics": [("a b", "MAXIMIZE")]}),
    (r"study_spec.parameters; Message: Required field is not set", [], {}),
    (r"parameters\[1\].parameter_id; Message: It must be unique, found 'x' twice", [X, X], {}),
    (r"parameter_value_spec; Message: Required field is not set", [{"parameter_id": "x"}], {}),
    (
        r"must not be greater than max_value, found 1.0 and 0.0. 2.Field: .*\[1\]",
        [double("x", 1, 0), category("y")],
        {},
    ),
    (r"must be strictly positive", [double("x", 0, 1, scale_type="UNIT_LOG_SCALE")], {}),
    (r"categorical_value_spec.values; Message: Required field is not set", [category("x")], {}),
    (r"must be in increasing order", [discrete("x", 2, 1)], {}),
    (r"At most 1000 values", [discrete("x", *range(1001))], {}),
    (r"default_value; Message: It must be feasible", [with_default(discrete("x", 1, 2), 3)], {}),
    (r"all parameters must be INTEGER, CATEGORICAL, or DISCRETE", [X], {"algorithm": "GRID_SEARCH"}),
    (r"The parent 'y' cannot be 'b'", [category("y", "a", conditional_parameter_specs=[under(X, "b")])], {}),
    (r"does not fit a parent with integer", [integer("y", 0, 1, conditional_parameter_specs=[under(X, "0")])], {}),
    (r"found 'x' twice", [category("y", "a", conditional_parameter_specs=[under(X, "a"), under(X, "a")])], {}),
    (r"It needs a study with one metric", [X], {"metrics": [("a", 1), ("b", 1)], "median_automated_stopping_spec": {}}),
]


@pytest.mark.parametrize(("message", "parameters", "spec"), WRONG_STUDIES)
def test_a_study_that_cannot_be_is_refused(create, message, parameters, spec):
    from google.api_core import exceptions

    with pytest.raises(exceptions.InvalidArgument, match=message):
        create(*parameters, **spec)


def test_what_only_google_can_do_is_refused_with_what_to_use_instead(create):
    from google.api_core import exceptions

    for spec, instead in {
        "convex_automated_stopping_spec": "use median_automated_stopping_spec",
        "decay_curve_stopping_spec": "use median_automated_stopping_spec",
        "study_stopping_config": "limit the number of trials",
    }.items():
        with pytest.raises(exceptions.MethodNotImplemented, match=f"{spec}.*{instead}"):
            create(X, **{spec: {}})


def test_requests_that_do_not_fit_their_study_are_refused(vizier, create, suggest):
    from google.api_core import exceptions

    study = create(X, category("kind", "a", conditional_parameter_specs=[under(integer("n", 1, 3), "a")]))
    (trial,) = suggest(study).trials

    def own(**given):
        parameters = [{"parameter_id": name, "value": value} for name, value in given.items()]
        vizier.create_trial(parent=study.name, trial={"parameters": parameters})

    def measured(**metrics):
        vizier.add_trial_measurement({"trial_name": trial.name, "measurement": measurement(**metrics)})

    def completed(**metrics):
        vizier.complete_trial({"name": trial.name, "final_measurement": measurement(**metrics)})

    refused = {
        "client_id; Message: Required field is not set": lambda: suggest(study, client=""),
        "suggestion_count; Message: It must be positive": lambda: suggest(study, count=0),
        "contexts; Message: Expected none or 1": lambda: suggest(study, contexts=[{}, {}]),
        "The study has no parameter 'y', only 'x', 'kind', 'n'": lambda: own(y=1),
        "The parameter 'x' cannot be 2.0": lambda: own(x=2, kind="a", n=1),
        "The parameter 'n' cannot be 1.5": lambda: own(x=1, kind="a", n=1.5),
        "The parameter 'n' has no value": lambda: own(x=1, kind="a"),
        "The study has no metric 'loss', only 'score'": lambda: measured(loss=1),
        "measurement.metrics; Message: Required field is not set": lambda: measured(),
        "must not be negative": lambda: measured(step=-1, score=1),
        "holds a number for each of 'score'": lambda: completed(score=math.nan),
    }
    for message, call in refused.items():
        with pytest.raises(exceptions.InvalidArgument, match=message):
            call()
    completed(score=1)
    with pytest.raises(exceptions.FailedPrecondition, match="has ended: its state is SUCCEEDED"):
        measured(score=1)
    for call in (
        lambda: vizier.complete_trial({"name": study.name}),
        lambda: vizier.create_trial(parent=trial.name, trial={}),
        lambda: vizier.list_optimal_trials({"parent": trial.name}),
    ):
        with pytest.raises(exceptions.NotFound):
            call()
