"""Hyperparameter tuning on the local cloud: what a trial is given, what it reports, and what the job makes of it."""

import os
import signal
import textwrap
import time

import psutil
import pytest

IMAGE = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
PATIENCE = 120  # seconds in which any job here ends
SCRIPT = """
    import argparse, os, sys, time
    import hypertune
    parser = argparse.ArgumentParser()
    for name, kind in {"x": float, "units": int, "batch": int, "kind": str}.items():
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args()
    def report(value, step=0, tag="score"):
        hypertune.HyperTune.report_hyperparameter_tuning_metric(tuner, tag, value, step)
    tuner = hypertune.HyperTune()
"""


@pytest.fixture
def tune(cloud):
    """Return a function that starts a job, whose trials run a script once their arguments are read."""
    from google.cloud import aiplatform

    started = []

    def start(script, parameters, metrics=None, trials=4, parallel=1, spec=None, machine="n1-standard-4", **options):
        source = textwrap.dedent(SCRIPT) + textwrap.dedent(script)
        container = {"image_uri": IMAGE, "command": ["python3", "-c", source]}
        pool = {"machine_spec": {"machine_type": machine}, "replica_count": 1, "container_spec": container}
        job = aiplatform.HyperparameterTuningJob(
            display_name="search",
            custom_job=aiplatform.CustomJob("trial", [pool], base_output_dir=f"{cloud.bucket}/tuning"),
            metric_spec=metrics or {"score": "maximize"},
            parameter_spec=parameters,
            max_trial_count=trials,
            parallel_trial_count=parallel,
            **options,
        )
        message = job._gca_resource  # the class knows nothing of early stopping
        for name, value in (spec or {}).items():
            setattr(message.study_spec, name, value)
        created = job.api_client.create_hyperparameter_tuning_job(
            parent=f"projects/{cloud.project}/locations/{cloud.region}", hyperparameter_tuning_job=message
        )
        started.append((job.api_client, created.name))
        return started[-1]

    yield start
    for client, name in started:
        client.cancel_hyperparameter_tuning_job(name=name)


def when(job, is_awaited):
    """Return a job as soon as something holds of it."""
    client, name = job
    deadline = time.monotonic() + PATIENCE
    while not is_awaited(found := client.get_hyperparameter_tuning_job(name=name)):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def ended(job):
    """Return a job that has ended."""
    return when(job, lambda found: found.end_time)


def given(trial):
    """Return a trial's parameters."""
    return {parameter.parameter_id: parameter.value for parameter in trial.parameters}


def measured(measurement):
    """Return a measurement's metrics."""
    return {metric.metric_id: metric.value for metric in measurement.metrics}


def states(job):
    """Return the names of the states of a job's trials."""
    return [trial.state.name for trial in job.trials]


@pytest.fixture(scope="module")
def parameter():
    """Return the SDK's module of parameters."""
    from google.cloud.aiplatform import hyperparameter_tuning

    return hyperparameter_tuning


def choice(parameter, *values):
    """Return a categorical parameter."""
    return {"kind": parameter.CategoricalParameterSpec(values=values)}


def test_a_trial_is_a_custom_job_with_the_parameters_as_arguments(cloud, tune, parameter):
    from google.cloud import aiplatform

    parameters = {
        "x": parameter.DoubleParameterSpec(min=1e-6, max=1e-3, scale="log"),
        "units": parameter.IntegerParameterSpec(min=8, max=64, scale="linear"),
        "batch": parameter.DiscreteParameterSpec(values=[16, 32], scale=None),
        **choice(parameter, "a", "b"),
    }
    script = """
        assert os.environ["AIP_MODEL_DIR"].endswith(f"/tuning/{os.environ['CLOUD_ML_TRIAL_ID']}/model/")
        time.sleep(1)
        report(args.x * args.units + args.batch + (args.kind == "b"))
    """
    job = ended(tune(script, parameters, trials=3, parallel=2))
    assert job.state.name == "JOB_STATE_SUCCEEDED"
    assert [trial.id for trial in job.trials] == ["1", "2", "3"]
    assert states(job) == ["SUCCEEDED"] * 3
    for trial in job.trials:
        values = given(trial)
        assert set(values) == {"x", "units", "batch", "kind"}
        assert 1e-6 <= values["x"] <= 1e-3
        expected = values["x"] * values["units"] + values["batch"] + (values["kind"] == "b")
        assert measured(trial.final_measurement)["score"] == pytest.approx(expected)
        custom_job = aiplatform.CustomJob.get(trial.custom_job)
        assert custom_job.state.name == "JOB_STATE_SUCCEEDED"
        assert f"{cloud.bucket}/tuning" in custom_job.job_spec.base_output_directory.output_uri_prefix
    first, second, third = job.trials
    assert max(first.start_time, second.start_time) < min(first.end_time, second.end_time)
    assert min(first.end_time, second.end_time) <= third.start_time


def test_the_study_selects_the_final_measurement_from_a_trials_curve(tune, parameter):
    script = """
        for step, (score, loss) in enumerate([(0.1, 3), (0.9, 2), (0.5, 1)], 1):
            report(score, step)
            report(loss, step, "loss")
            report(7, step, "another")
    """
    metrics = {"score": "maximize", "loss": "minimize"}
    jobs = {
        selection: tune(script, choice(parameter, "a"), metrics, trials=1, measurement_selection=selection)
        for selection in ("best", "last")
    }
    found = {selection: ended(job).trials[0] for selection, job in jobs.items()}
    for trial in found.values():
        assert [measurement.step_count for measurement in trial.measurements] == [1, 2, 3]
        assert [measured(each)["loss"] for each in trial.measurements] == [3, 2, 1]
    assert measured(found["best"].final_measurement) == {"score": 0.9, "loss": 2}
    assert measured(found["last"].final_measurement) == {"score": 0.5, "loss": 1}


def test_a_grid_is_tried_once_and_the_median_rule_stops_what_is_worse(tune, parameter):
    script = """
        values = {"good": 1.0, "bad": 0.5}
        report(values[args.kind], 1)
        time.sleep(600 * (args.kind == "bad"))
    """
    spec = {"median_automated_stopping_spec": {}}
    job = ended(tune(script, choice(parameter, "good", "bad"), trials=9, spec=spec, search_algorithm="grid"))
    assert job.state.name == "JOB_STATE_SUCCEEDED"
    assert [given(trial)["kind"] for trial in job.trials] == ["good", "bad"]
    assert states(job) == ["SUCCEEDED", "SUCCEEDED"]
    assert measured(job.trials[1].final_measurement) == {"score": 0.5}


def test_the_first_trial_that_fails_ends_the_job(tune, parameter):
    job = ended(tune("sys.exit(3)", choice(parameter, "a"), trials=5))
    assert job.state.name == "JOB_STATE_FAILED"
    assert "Trial #1 failed before any other successful trials were completed" in job.error.message
    assert "--kind a" in job.error.message
    assert "exited with a non-zero status of 3" in job.error.message
    assert states(job) == ["INFEASIBLE"]


def test_a_job_bears_as_many_failures_as_it_was_told(tune, parameter):
    script = """
        if args.kind == "b":
            sys.exit(1)
        report(1)
    """
    kinds = choice(parameter, "a", "b")
    borne = tune(script, kinds, trials=2, search_algorithm="grid", max_failed_trial_count=2)
    ended_early = tune(script, choice(parameter, "b", "a"), trials=2, search_algorithm="grid", max_failed_trial_count=1)
    job = ended(borne)
    assert (job.state.name, states(job)) == ("JOB_STATE_SUCCEEDED", ["SUCCEEDED", "INFEASIBLE"])
    job = ended(ended_early)
    assert (job.state.name, states(job)) == ("JOB_STATE_FAILED", ["INFEASIBLE"])
    assert "max_failed_trial_count is 1" in job.error.message


def test_a_trial_without_the_metric_is_infeasible_and_says_what_it_reported(tune, parameter):
    job = ended(tune("report(1, tag='scor')\nreport(float('nan'))", choice(parameter, "a"), trials=1))
    assert states(job) == ["INFEASIBLE"]
    assert not job.trials[0].measurements
    reason = job.trials[0].infeasible_reason
    assert "without a measurement of 'score'" in reason
    assert "'scor'" in reason
    assert reason in job.error.message


def test_a_trial_that_is_tried_again_may_report_again(tune, parameter):
    script = """
        folder = os.environ["AIP_CHECKPOINT_DIR"].replace("gs://", "/gcs/")
        report(1, 1)
        if not os.path.exists(folder):
            os.makedirs(folder)
            os.abort()
        report(2, 2)
    """
    job = ended(tune(script, choice(parameter, "a"), trials=1))
    assert states(job) == ["SUCCEEDED"], job.trials
    assert measured(job.trials[0].final_measurement) == {"score": 2}


def test_every_replica_of_a_trial_may_report_and_the_primary_one_counts(tune, parameter, cloud):
    from google.cloud import aiplatform

    script = """
        import json
        role = json.loads(os.environ["CLUSTER_SPEC"])["task"]["type"]
        report({"workerpool0": 1, "workerpool1": 2}[role])
        time.sleep(1)
    """
    source = textwrap.dedent(SCRIPT) + textwrap.dedent(script)
    container = {"image_uri": IMAGE, "command": ["python3", "-c", source]}
    pool = {"machine_spec": {"machine_type": "n1-standard-4"}, "replica_count": 1, "container_spec": container}
    custom_job = aiplatform.CustomJob("trial", [pool, pool], base_output_dir=f"{cloud.bucket}/tuning")
    job = aiplatform.HyperparameterTuningJob(
        "search", custom_job, {"score": "maximize"}, choice(parameter, "a"), max_trial_count=1, parallel_trial_count=1
    )
    job.run()
    assert measured(job.trials[0].final_measurement) == {"score": 1}


def test_cancelling_a_job_ends_its_trials(tune, parameter):
    mark = "'the trials to cancel'"
    script = f"{mark}\nreport(1)\ntime.sleep(600)"
    client, name = job = tune(script, choice(parameter, "a", "b"), parallel=2)
    when(job, lambda found: [len(trial.measurements) for trial in found.trials] == [1, 1])
    client.cancel_hyperparameter_tuning_job(name=name)
    found = ended(job)
    assert found.state.name == "JOB_STATE_CANCELLED"
    assert states(found) == ["INFEASIBLE", "INFEASIBLE"]
    assert not [process for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])]


def test_what_ended_before_the_server_was_killed_is_kept(cloud, tune, parameter):
    from helpers import environment
    from helpers.local import client

    script = """
        report({"a": 1, "b": 2}[args.kind])
        time.sleep(600 * (args.kind == "b"))
    """
    job = tune(script, choice(parameter, "a", "b"), search_algorithm="grid")
    when(job, lambda found: states(found) == ["SUCCEEDED", "ACTIVE"])
    os.kill(client.address(client.folder())["pid"], signal.SIGKILL)
    while client.is_running(client.folder()):
        time.sleep(0.01)
    environment.connect()
    found = ended(job)
    assert found.state.name == "JOB_STATE_FAILED"
    assert states(found) == ["SUCCEEDED", "INFEASIBLE"]
    assert measured(found.trials[0].final_measurement) == {"score": 1}


def test_what_no_job_can_be_is_refused_before_it_runs(tune, parameter):
    from google.api_core import exceptions

    double = {"x": parameter.DoubleParameterSpec(min=0, max=1, scale="linear")}
    kinds = choice(parameter, "a")
    refused = {
        r"parallel_trial_count; Message: Expected 1 to 4": {"parameters": kinds, "parallel": 5},
        r"max_trial_count; Message: It must be positive": {"parameters": kinds, "trials": 0},
        r"parameters; Message: Required field": {"parameters": {}},
        r"To use grid search, all parameters must be": {"parameters": double, "search_algorithm": "grid"},
        r"TPUs are not supported for hyperparameter tuning": {"parameters": kinds, "machine": "ct5lp-hightpu-1t"},
        r"Machine type n1-standard-3 is not supported": {"parameters": kinds, "machine": "n1-standard-3"},
    }
    for message, options in refused.items():
        with pytest.raises(exceptions.InvalidArgument, match=message):
            tune("", **options)
    with pytest.raises(exceptions.MethodNotImplemented, match="use median_automated_stopping_spec"):
        tune("", kinds, spec={"decay_curve_stopping_spec": {}})
