"""The local cloud keeps what it has, through restarts, killed processes and two users at once."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import echo_server
import psutil

from helpers.local import client


def job(command):
    """Return a custom job that runs a command."""
    pool = {
        "machineSpec": {"machineType": "n1-standard-4"},
        "replicaCount": 1,
        "containerSpec": {
            "imageUri": "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest",
            "command": command,
        },
    }
    return {"displayName": "job", "jobSpec": {"workerPoolSpecs": [pool]}}


def wait_until(is_met, seconds=60):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def done(cloud, operation):
    """Wait for a long-running operation and return its response."""
    while not operation.get("done"):
        operation = cloud.call("GET", f"/v1/{operation['name']}").json()
    assert "error" not in operation, operation
    return operation["response"]


def deployed(cloud):
    """Deploy a server of one's own; return the endpoint's path."""
    container = {
        "imageUri": "us-central1-docker.pkg.dev/p/r/own:1",
        "command": [sys.executable, "-c", echo_server.SOURCE],
    }
    model = done(
        cloud, cloud.vertex("POST", "models:upload", json={"model": {"displayName": "m", "containerSpec": container}})
    )
    endpoint = done(cloud, cloud.vertex("POST", "endpoints", json={"displayName": "e"}))["name"].split("/us-central1/")[
        1
    ]
    resources = {"machineSpec": {"machineType": "n1-standard-4"}, "minReplicaCount": 1}
    body = {"deployedModel": {"model": model["model"], "dedicatedResources": resources}, "trafficSplit": {"0": 100}}
    done(cloud, cloud.vertex("POST", f"{endpoint}:deployModel", json=body))
    return endpoint


def test_after_a_kill_everything_finished_is_there_and_what_ran_has_failed_with_the_reason(own_cloud):
    cloud = own_cloud
    host = "storage.googleapis.com"
    cloud.call("POST", "/storage/v1/b?project=local-project", host=host, json={"name": "kept"})
    cloud.call("POST", "/upload/storage/v1/b/kept/o?uploadType=media&name=a/b.txt", host=host, data=b"content")
    finished = cloud.vertex("POST", "customJobs", json=job(["python3", "-c", "pass"]))["name"].rsplit("/", 1)[1]
    wait_until(lambda: cloud.vertex("GET", f"customJobs/{finished}")["state"] == "JOB_STATE_SUCCEEDED")
    endpoint = deployed(cloud)
    running = cloud.vertex("POST", "customJobs", json=job(["python3", "-c", "import time; time.sleep(600)"]))
    running = running["name"].rsplit("/", 1)[1]
    wait_until(lambda: cloud.vertex("GET", f"customJobs/{running}")["state"] == "JOB_STATE_RUNNING")
    wait_until(lambda: (cloud.place / f"jobs/{running}/workerpool0-0.log").exists())
    before = cloud.address
    children = psutil.Process(before["pid"]).children(recursive=True)
    assert children

    os.kill(before["pid"], signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "what the server ran ends with it"
    cloud.start()

    assert cloud.address["port"] == before["port"], "whoever was led there still is"
    assert cloud.vertex("GET", f"customJobs/{finished}")["state"] == "JOB_STATE_SUCCEEDED"
    failed = cloud.vertex("GET", f"customJobs/{running}")
    assert failed["state"] == "JOB_STATE_FAILED"
    assert "the local cloud ended while the job ran" in failed["error"]["message"]
    assert cloud.call("GET", "/storage/v1/b/kept/o/a%2Fb.txt?alt=media", host=host).content == b"content"
    answer = cloud.vertex("POST", f"{endpoint}:predict", json={"instances": [1, 2]})
    assert answer["predictions"] == [1, 2]


def test_an_ordinary_end_keeps_it_as_well(own_cloud):
    endpoint = deployed(own_cloud)
    children = psutil.Process(own_cloud.address["pid"]).children(recursive=True)
    assert client.stop(own_cloud.place)
    assert not client.is_running(own_cloud.place)
    assert not psutil.wait_procs(children, timeout=5)[1]
    own_cloud.start()
    assert own_cloud.vertex("POST", f"{endpoint}:predict", json={"instances": ["x"]})["predictions"] == ["x"]


def test_a_folder_can_be_moved(own_cloud, tmp_path):
    host, path = "storage.googleapis.com", "/storage/v1/b/moved/o/a.txt?alt=media"
    own_cloud.call("POST", "/storage/v1/b?project=local-project", host=host, json={"name": "moved"})
    own_cloud.call("POST", "/upload/storage/v1/b/moved/o?uploadType=media&name=a.txt", host=host, data=b"content")
    endpoint = deployed(own_cloud)
    client.stop(own_cloud.place)
    own_cloud.place = own_cloud.place.rename(tmp_path / "elsewhere")
    own_cloud.start()
    assert own_cloud.call("GET", path, host=host).content == b"content"
    assert own_cloud.vertex("POST", f"{endpoint}:predict", json={"instances": ["x"]})["predictions"] == ["x"]


def test_it_ends_by_itself_when_nothing_is_left_to_do(tmp_path):
    """An hour is a second here, and a job of eight seconds is work."""
    from conftest import OwnCloud

    code = (
        "import pathlib, sys; from helpers.local import server; server.IDLE_SECONDS, server.LOOK_SECONDS = 1, 0.2;"
        "sys.exit(server.serve(pathlib.Path(sys.argv[1]), None))"
    )
    place = tmp_path / "cloud"
    with subprocess.Popen([sys.executable, "-c", code, str(place)], env=client.original()) as process:
        wait_until(lambda: client.address(place))
        cloud = OwnCloud(place)
        assert cloud.address["pid"] == process.pid
        started = time.monotonic()
        cloud.vertex("POST", "customJobs", json=job(["sleep", "8"]))
        assert process.wait(60) == 0
        assert time.monotonic() - started > 8
    again = OwnCloud(place)
    try:
        assert [one["state"] for one in again.vertex("GET", "customJobs")["customJobs"]] == ["JOB_STATE_SUCCEEDED"]
    finally:
        client.reset(place)


def test_whoever_comes_at_the_same_time_shares_one_server(tmp_path):
    code = (
        "import json, pathlib, sys; from helpers.local import client; place = pathlib.Path(sys.argv[1]);"
        "print(json.dumps(client.wait(place, client.start(place))['pid']))"
    )
    place = tmp_path / "cloud"
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            command = [sys.executable, "-c", code, str(place)]
            runs = [pool.submit(subprocess.run, command, capture_output=True, text=True, check=True) for _ in range(3)]
            pids = {run.result().stdout.strip() for run in runs}
        assert len(pids) == 1
        again = subprocess.run([sys.executable, "-m", "helpers.local.server", str(place)], capture_output=True)
        assert again.returncode == 75, "a second server never shares the folder"
    finally:
        client.reset(place)
    assert not place.exists()


def test_two_users_at_once_get_all_that_they_make(own_cloud):
    def make(number):
        return done(own_cloud, own_cloud.vertex("POST", "endpoints", json={"displayName": f"e{number}"}))["name"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(pool.map(make, range(40)))
    assert len(set(names)) == 40
    listed = own_cloud.vertex("GET", "endpoints?pageSize=100")["endpoints"]
    assert {endpoint["name"] for endpoint in listed} == set(names)
    assert len(own_cloud.vertex("GET", "endpoints?pageSize=7")["endpoints"]) == 7


def test_the_command_line_looks_after_it(own_cloud, tmp_path):
    def say(*words):
        return subprocess.run(
            [sys.executable, "-m", "helpers", "cloud", *words],
            env=os.environ | {"LOCAL_CLOUD_FOLDER": str(own_cloud.place)},
            capture_output=True,
            text=True,
        )

    endpoint = deployed(own_cloud)
    failed = own_cloud.vertex(
        "POST", "customJobs", json=job(["python3", "-c", "print('the log'); raise SystemExit(2)"])
    )
    number = failed["name"].rsplit("/", 1)[1]
    wait_until(lambda: own_cloud.vertex("GET", f"customJobs/{number}")["state"] == "JOB_STATE_FAILED")
    status = say("status").stdout
    assert f"process {own_cloud.address['pid']}" in status
    assert "serves m on the endpoint e" in status
    assert "1 customJobs" in status
    assert "the log" in say("logs", number).stdout
    assert say("logs", "no-such-job").returncode == 1
    doctor = say("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "lets no stranger in" in doctor.stdout
    assert "has ended" in say("stop").stdout
    assert "did not run" in say("stop").stdout
    assert endpoint
    assert "is removed" in say("reset").stdout
    assert not own_cloud.place.exists()
    assert say("dance").returncode == 2


def test_a_folder_that_is_not_ours_is_not_removed(tmp_path):
    import pytest

    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(client.CloudError, match="holds no local cloud"):
        client.reset(tmp_path)
    assert (tmp_path / "precious.txt").exists()
