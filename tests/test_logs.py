"""What a job printed can be read from Cloud Logging, whoever printed it and however much."""

import pytest

from helpers import logs

IMAGE = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"


@pytest.fixture
def printed(cloud):
    """Return a function that runs a job of some replicas, all with a shell script, and returns the job."""
    from google.cloud import aiplatform

    def run(script, replicas=1):
        container = {"image_uri": IMAGE, "command": ["sh", "-c", script]}
        pool = {"machine_spec": {"machine_type": "n1-standard-4"}, "replica_count": 1, "container_spec": container}
        job = aiplatform.CustomJob("printing", [pool] * replicas, base_output_dir=f"{cloud.bucket}/printing")
        job.run()
        return job

    return run


def lines(frame):
    """Return the rows of a DataFrame."""
    return list(frame.itertuples(index=False, name=None))


def test_json_becomes_severity_and_message_and_other_lines_stay(printed):
    job = printed("""echo plain; echo '{"severity": "WARNING", "message": "hot", "epoch": 3}'; echo '{"a": 1}' >&2""")
    assert lines(logs.read(job)) == [
        ("workerpool0-0", "DEFAULT", "plain"),
        ("workerpool0-0", "WARNING", "hot"),
        ("workerpool0-0", "DEFAULT", '{"a": 1}'),
    ]


def test_each_replica_has_its_lines(printed):
    job = printed("echo $CLUSTER_SPEC | cut -c1-9; sleep 1", replicas=2)
    assert list(logs.read(job).replica) == ["workerpool0-0", "workerpool1-0"]


def test_a_long_log_comes_whole(printed):
    assert list(logs.read(printed("seq 2500")).message) == [str(number) for number in range(1, 2501)]


def test_a_training_pipeline_logs_through_its_job(cloud, tmp_path):
    from google.cloud import aiplatform

    script = tmp_path / "task.py"
    script.write_text("print('from a pipeline')")
    job = aiplatform.CustomTrainingJob("printing", script_path=str(script), container_uri=IMAGE)
    job.run()
    assert "from a pipeline" in list(logs.read(job).message)


def test_a_filter_that_is_not_known_is_refused_by_name(cloud):
    with pytest.raises(RuntimeError, match=r"severity>=ERROR.* is not part of the local cloud; use resource\.type="):
        list(logs._entries(cloud.project, 'resource.labels.job_id="1" AND severity>=ERROR'))
    with pytest.raises(RuntimeError, match="Permission denied on resource project another"):
        list(logs._entries("another", 'resource.labels.job_id="1"'))
    assert list(logs._entries(cloud.project, 'resource.labels.job_id="1"')) == []
