"""What `python3 -m helpers` can do.

Each command first reads its arguments, with the standard library alone, and returns the call that does the work: a
wrong call is answered before anything is installed, and the work starts inside the environment.
"""

import argparse
import difflib
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.course import CourseError, cores, lessons

HELP = """\
Custom training on Google Cloud: a course of notebooks in which everything runs.

    python3 -m helpers COMMAND [--here] [--with torch]

Commands:
    lab        read and run the lessons in JupyterLab
    course     run lessons, and write a page with what they found: output/index.html
    test       run the tests, and check every lesson
    refresh    run lessons, and store their new outputs in them
    kernel     offer the course's environment to a JupyterLab that already runs
    cloud      look after the local cloud: status, stop, reset, logs, doctor
    bench      measure the course

The first command makes the course's environment in .venv, which takes a few minutes; later ones start at once.
With --here, a command uses the environment it is called in, as in Colab Enterprise or Workbench.
With --with torch, the environment gets PyTorch too, and keeps it.

Examples:
    python3 -m helpers lab
    python3 -m helpers course 4                  one lesson, by its number or a part of its name
    python3 -m helpers course 4 5 -p epochs 50   two lessons, with a parameter changed
    python3 -m helpers test -k regression        what follows test is for pytest"""


def prepare(root, words):
    """Return the call that does what the words of a command line ask of the course in the folder `root`."""
    command, *rest = words or ["help"]
    if command in ("help", "-h", "--help"):
        return show_help
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise CourseError(
            f"There is no command {command}."
            + (f" Did you mean {near[0]}?" if near else "")
            + f" The commands are {', '.join(COMMANDS)}; python3 -m helpers says what they do.",
            status=2,
        )
    return COMMANDS[command](root, rest)


def show_help():
    """Print what the commands are."""
    print(HELP)
    return 0


def course(root, words):
    """Run lessons side by side, and write a page for each and one for all."""
    parser = Parser(prog="python3 -m helpers course", description=course.__doc__, allow_abbrev=False)
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="a number or a part of a name; all without one")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter to change, repeatable"
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="how many lessons to run at a time")
    asked = parser.parse_intermixed_args(words)
    everything = lessons.find(root / "notebooks")
    chosen = lessons.choose(everything, asked.lessons)
    settings = lessons.settings_for(chosen, asked.p)
    return functools.partial(run_course, root, everything, settings, asked.jobs)


def run_course(root, everything, settings, jobs):
    """Run the lessons that `settings` maps to parameters, show what came of them, and return the exit status."""
    from helpers.course import execute, report

    output = root / "output"
    make_folder(output)
    for name in dict.fromkeys(name for values in settings.values() for name in values):
        if without := [lesson.name for lesson in settings if name not in settings[lesson]]:
            print(f"{name} is changed where it exists, which is not in {', '.join(without)}.")
    started = time.monotonic()
    runs = execute.execute(
        {
            lesson: {
                "notebook": str(lesson.path),
                "folder": str(lesson.path.parent),
                "result": str(output / lesson.path.name),
                "parameters": values,
                "page": str(output / f"{lesson.name}.html"),
            }
            for lesson, values in settings.items()
        },
        jobs,
    )
    seconds = time.monotonic() - started
    index = report.write_index(output, everything, runs, seconds)
    failed = show_failures(runs, lambda lesson: f"The lesson as it ran: {output / lesson.name}.html")
    print(
        f"{counted(len(runs), 'lesson')} in {execute.duration(seconds)}, "
        f"one after another {execute.duration(sum(run.seconds for run in runs))}"
        + (f"; {failed} failed" if failed else "")
        + f".\nOpen {index}\n     {index.as_uri()}"
    )
    return 1 if failed else 0


def refresh(root, words):
    """Run lessons, and store their outputs, links and times in them."""
    parser = Parser(prog="python3 -m helpers refresh", description=refresh.__doc__, allow_abbrev=False)
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="a number or a part of a name; all without one")
    everything = lessons.find(root / "notebooks")
    chosen = lessons.choose(everything, parser.parse_args(words).lessons)
    return functools.partial(run_refresh, root, everything, chosen)


def run_refresh(root, everything, chosen):
    """Run the chosen lessons, write those that succeed and every lesson's generated parts; return the exit status."""
    import nbformat

    from helpers.course import execute

    url = lessons.home(root)

    def synced(lesson, path):
        notebook = nbformat.read(path, 4)
        lessons.sync(notebook, lesson, everything, url)
        return nbformat.from_dict(notebook)

    with tempfile.TemporaryDirectory() as scratch:
        orders, notebooks = {}, {}
        for lesson in chosen:
            copy = Path(scratch, lesson.path.name)
            nbformat.write(synced(lesson, lesson.path), copy)
            orders[lesson] = {"notebook": str(copy), "folder": str(lesson.path.parent), "result": str(copy)}
        runs = execute.execute(orders)
        for run in runs:
            if not run.failure:
                executed = nbformat.read(orders[run.lesson]["result"], 4)
                keep_close(executed.metadata.course, run.lesson.seconds)
                lessons.sync(executed, run.lesson, everything, url)
                notebooks[run.lesson] = executed
    for lesson in everything:
        if lesson not in chosen:  # read only now: its author may have written while the others ran
            notebooks[lesson] = synced(lesson, lesson.path)
        elif lesson not in notebooks:
            continue
        text = nbformat.writes(notebooks[lesson]) + "\n"
        if text != lesson.path.read_text(encoding="utf-8"):
            lesson.path.write_text(text, encoding="utf-8")
            print(f"{lesson.name}: written")
    return 1 if show_failures(runs, lambda lesson: f"{lesson.path} is as it was.") else 0


def keep_close(timing, before):
    """Keep the time that was stored before if the new one is like it, so that a notebook changes only where it must."""
    now = timing["seconds"]
    if before and (before / 1.5 <= now <= before * 1.5 or abs(now - before) < 3):
        timing["seconds"] = before


def show_failures(runs, where):
    """Explain each failed run on standard error, ending with where to look on, and return how many there are."""
    from helpers.course import execute

    failed = [run for run in runs if run.failure]
    for run in failed:
        print(execute.explain(run), where(run.lesson), sep="\n", end="\n\n", file=sys.stderr)
    return len(failed)


def test(root, words):
    """Run the tests and all lessons with pytest."""
    lessons_options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]
    options = [*lessons_options, "-p", "helpers.course.fresh", "--dist=loadfile", f"-n{cores()}"]
    return functools.partial(become, root, "pytest", *options, *words)


def lab(root, words):
    """Start JupyterLab on the course."""
    options = [f"--ServerApp.root_dir={root}", "--LabApp.default_url=/lab/tree/notebooks"]
    return functools.partial(become, root, "jupyterlab", *options, *words)


def become(root, module, *words):
    """Go on as another program, which then gets signals and gives the exit status itself."""
    os.chdir(root)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *words])


def kernel(root, words):
    """Offer the environment to a JupyterLab of this user that already runs."""
    Parser(prog="python3 -m helpers kernel", description=kernel.__doc__).parse_args(words)
    return register_kernel


def register_kernel():
    """Write the kernel's description to the user's Jupyter folder."""
    names = ["--user", "--name", "custom-training", "--display-name", "Custom training course"]
    done = subprocess.run([sys.executable, "-m", "ipykernel", "install", *names], capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"The kernel could not be registered: {done.stderr.strip().rpartition(chr(10))[2]}")
    print(
        "JupyterLab now offers the kernel 'Custom training course'.\n"
        "Open a lesson, click the kernel's name at its top right, and choose it. Reload the page if it is not listed."
    )
    return 0


def cloud(root, words):
    """Look after the local cloud on this machine."""
    parser = Parser(prog="python3 -m helpers cloud", description=cloud.__doc__, allow_abbrev=False)
    actions = ("status", "stop", "reset", "logs", "doctor")
    parser.add_argument("action", nargs="?", choices=actions, default="status", help="what to do")
    parser.add_argument("name", nargs="?", help="for logs: the id of a job or of a deployed model")
    asked = parser.parse_args(words)

    def call():
        from helpers.local import caretaker

        try:
            return getattr(caretaker, asked.action)(asked.name)
        except caretaker.client.CloudError as error:
            raise CourseError(str(error)) from None

    return call


def bench(root, words):
    """Measure the course."""

    def call():
        from helpers.course import bench

        return bench.main(words)

    return call


COMMANDS = {call.__name__: call for call in (lab, course, test, refresh, kernel, cloud, bench)}


class Parser(argparse.ArgumentParser):
    """Reads arguments, and answers a wrong call in the course's own way."""

    def error(self, message):
        """Say what is wrong and how to call it."""
        raise CourseError(f"{message[0].upper()}{message[1:]}.\n{self.format_usage().strip()}", status=2)


def positive(text):
    """Read a number of lessons to run at a time."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on, such as {cores()}")
    return int(text)


def make_folder(folder):
    """Make a folder if it is not there."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CourseError(
            f"Results cannot be written to {folder} ({error.strerror}). Copy the course elsewhere."
        ) from None


def counted(count, noun):
    """Say how many there are of something."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
