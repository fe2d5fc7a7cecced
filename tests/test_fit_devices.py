"""However many devices and processes share a batch, `fit` ends with what one device ends with, uneven rows included."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("fit_devices.py")


def start(kind, count, rows, **environment):
    command = [sys.executable, str(SCRIPT), kind, str(count), str(rows)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def result(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.partition("RESULT")[2])


def same(found, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def one():
    """Return what one device of each backend ends with; the backends agree."""
    found = {(kind, rows): result(start(kind, 1, rows)) for kind in ("mirrored", "data") for rows in (337,)}
    same(found["mirrored", 337], found["data", 337])
    return found["mirrored", 337]


@pytest.mark.parametrize(("kind", "count"), [("mirrored", 2), ("mirrored", 4), ("data", 8), ("model", 8)])
def test_devices_that_share_a_batch_end_with_what_one_ends_with(one, kind, count):
    found = result(start(kind, count, 337))  # seven batches of 48, and one row
    assert found.pop("layout", "(None, 'model')").endswith("(None, 'model')")
    same(found, one)


@pytest.mark.parametrize("kind", ["tf-worker", "jax-worker"])
def test_two_workers_end_with_what_one_ends_with(one, kind):
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{bound.getsockname()[1]}" for bound in (first, second)]
    workers = []
    for rank in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        environment = {"RANK": str(rank), "ADDRESSES": ",".join(addresses), "TF_CONFIG": json.dumps(config)}
        workers.append(start(kind, 2, 337, **(environment if kind == "tf-worker" else environment | {"TF_CONFIG": ""})))
    for worker in workers:
        same(result(worker), one)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    process = start("mirrored", 5, 337)
    _, err = process.communicate(timeout=180)
    assert process.returncode
    assert "5 devices cannot share 48 rows equally" in err
