"""Training tasks as processes, small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.local.runner import free_port
from helpers.trainer import task

ROOT = Path(__file__).parents[1]
# 218 rows: 7 batches that two devices cannot share evenly, and one of a single row.
SMALL = ["--dataset", "penguins", "--batch_size", "31", "--epochs", "12"]


def run_here(main, folder):
    """Run a task in this process, as in a notebook, with all that it writes in a folder; return its history."""
    return main([*SMALL, *(f"--{name}={folder / name}" for name in task.FOLDERS)])


def start(module, *arguments, path=ROOT, **environment):
    """Start a task as a process, with the helpers of a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *SMALL, *arguments],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(module, *arguments):
    """Start a task as two processes that share the work, the primary one first."""
    cluster = {"chief": [f"127.0.0.1:{free_port()}"], "worker": [f"127.0.0.1:{free_port()}"]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}}) for role in cluster]
    return [start(module, *arguments, TF_CONFIG=config) for config in configs]


def finish(process):
    """Return the lines that a task logged, once it has ended well."""
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]  # Gloo says a word too


def kill_after(process, epoch):
    """Kill a process when it has told of an epoch: while it writes a checkpoint of it, or just before or after."""
    for line in process.stdout:
        if json.loads(line)["epoch"] == epoch:
            break
    process.kill()
    process.communicate()


def learnt(lines):
    """Return the errors of each epoch that the lines of a log tell."""
    return {name: [line[name] for line in lines if "epoch" in line] for name in ("rmse", "val_rmse")}
