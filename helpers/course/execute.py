"""Running lessons: one process for each, several at a time, none left behind.

This process starts a worker for each lesson and reads what it reports, a line of JSON at a time. A worker lives as long
as its standard input stays open: closing it, which the operating system does for a parent that was killed, ends the
worker and its kernel at once.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from helpers.course import cores
from helpers.environment import fresh_local_cloud

PLAIN_SECONDS = 30  # between two lines about a running lesson where lines cannot be redrawn


@dataclass
class Run:
    """One lesson's run: how far it is, and in the end what came of it."""

    lesson: object
    order: dict
    cell: int = 0
    cells: int = 0
    seconds: float = 0
    failure: dict | None = None
    started: float = 0
    process: subprocess.Popen | None = field(default=None, repr=False)


def execute(orders, jobs=None):
    """Run lessons, the longest first, at most `jobs` (as many as there are cores) at a time; return their Runs.

    `orders` maps a lesson to the arguments of `helpers.course.worker.work`.
    """
    longest_first = sorted(orders, key=lambda lesson: -(lesson.seconds or float("inf")))
    runs = [Run(lesson, orders[lesson]) for lesson in longest_first]
    waiting, running, reports, screen = list(runs), [], queue.SimpleQueue(), Screen()
    # Lessons that each compute on all cores at once get in each other's way; the numbers are the same either way.
    at_once = max(1, min(jobs or cores(), len(runs)))
    with tempfile.TemporaryDirectory() as scratch, fresh_local_cloud():
        environment = {"TF_NUM_INTRAOP_THREADS": str(max(1, cores() // at_once))} | os.environ
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    run = waiting.pop(0)
                    start(run, Path(scratch), reports, environment)
                    running.append(run)
                    screen.started(run)
                screen.draw(running)
                try:
                    run, report = reports.get(timeout=0.5)
                except queue.Empty:
                    continue
                if report:
                    vars(run).update(report)
                else:
                    running.remove(run)
                    finish(run, Path(scratch))
                    screen.finished(run)
        finally:
            for run in running:
                run.process.stdin.close()
            for run in running:
                run.process.wait()
    return runs


def start(run, scratch, reports, environment):
    """Start the worker of a lesson and the thread that puts its reports, and None at its end, into a queue."""
    run.started = time.monotonic()
    order = run.order | {"scratch": str(scratch / run.lesson.path.name)}
    with (scratch / f"{run.lesson.name}.log").open("w") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the workers in order.
        run.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.course.worker", json.dumps(order)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )

    def listen():
        for line in run.process.stdout:
            reports.put((run, json.loads(line)))
        reports.put((run, None))

    threading.Thread(target=listen, daemon=True).start()


def finish(run, scratch):
    """Note how long a run took, and its failure if its worker ended without a word."""
    run.process.stdin.close()
    run.process.stdout.close()
    status = run.process.wait()
    if status:
        run.seconds = time.monotonic() - run.started
        log = (scratch / f"{run.lesson.name}.log").read_text(errors="replace").strip()
        message = f"the process that ran it ended with status {status}. {log.rpartition(chr(10))[2]}"
        run.failure = {"cell": run.cell, "source": "", "name": "RuntimeError", "message": message}


class Screen:
    """Shows how far the runs are: lines that are redrawn on a terminal, a plain line now and then elsewhere."""

    def __init__(self):
        """Find out what standard output is."""
        self.redraws = sys.stdout.isatty()
        self.drawn = 0
        self.told = {}

    def write(self, text):
        """Write over what was drawn last."""
        print((f"\x1b[{self.drawn}A\x1b[J" if self.drawn else "") + text, end="", flush=True)
        self.drawn = 0

    def started(self, run):
        """Say that a lesson starts, where that cannot be drawn."""
        self.told[run.lesson] = run.started
        if not self.redraws:
            self.write(f"{run.lesson.name}: started\n")

    def draw(self, running):
        """Show all running lessons."""
        if not self.redraws:
            for run in running:
                if time.monotonic() - self.told[run.lesson] >= PLAIN_SECONDS:
                    self.told[run.lesson] = time.monotonic()
                    self.write(f"{run.lesson.name}: {progress(run)}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self.write("".join(f"{f'{run.lesson.name:<40} {progress(run)}'[:width]}\n" for run in running))
        self.drawn = len(running)

    def finished(self, run):
        """Say what came of a lesson; this line stays."""
        outcome = f"failed in cell {run.failure['cell']}" if run.failure else "done"
        self.write(f"{run.lesson.name:<40} {outcome} after {duration(run.seconds)}\n")


def progress(run):
    """Say how far a run is."""
    place = f"cell {run.cell} of {run.cells}" if run.cell else "starting"
    return f"{place}, {duration(time.monotonic() - run.started)}"


def duration(seconds):
    """Say a number of seconds with minutes where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def explain(run):
    """Describe a failed run in the words of its cell and its error."""
    failure = run.failure
    lines = failure["source"].splitlines()
    shown = [f"    {line}" for line in lines[:4]] + (["    ..."] if len(lines) > 4 else [])
    error = f"{failure['name']}: {failure['message']}".rstrip(": ")
    return "\n".join([f"Lesson {run.lesson.name} failed in cell {failure['cell']}:", *shown, error])
