"""A miniature of the course for tests of its front door: the same helpers, lessons of a few lines."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

COURSE = Path(__file__).parents[1]


def make(root, **lessons):
    """Make a course in the folder `root`: a lesson `a_b=[...]` of code cells becomes notebooks/01_a_b.ipynb."""
    (root / "notebooks").mkdir(parents=True)
    shutil.copytree(COURSE / "helpers", root / "helpers", ignore=shutil.ignore_patterns("datasets", "__pycache__"))
    shutil.copytree(COURSE / "notebooks/images", root / "notebooks/images")
    shutil.copy(COURSE / "setup.cfg", root)
    (root / "requirements.txt").touch()
    for number, (name, cells) in enumerate(lessons.items(), 1):
        title = (
            f"# {number}. {name.replace('_', ' ').capitalize()}\n\n**You will** see `it` work.\n\n**Time** 5 minutes."
        )
        notebook = {
            "cells": [markdown("title", title), *(code(place, cell) for place, cell in enumerate(cells))],
            "metadata": {},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (root / f"notebooks/{number:02}_{name}.ipynb").write_text(json.dumps(notebook))
    return root


def markdown(name, text):
    """Return a cell of text."""
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(place, text):
    """Return a cell of code; what a comment `# tags:` at its start names are its tags."""
    first = text.partition("\n")[0]
    tags = first.removeprefix("# tags:").split() if first.startswith("# tags:") else []
    cell = {"cell_type": "code", "id": f"cell-{place}", "metadata": {"tags": tags}, "source": text}
    return cell | {"execution_count": None, "outputs": []}


def command(*words, python=sys.executable):
    """Return the command line that calls the front door."""
    return [str(python), "-m", "helpers", *words]


def call(root, *words, python=sys.executable, **environment):
    """Call the front door of a course and return what came of it."""
    # A kernel that finds itself inside pytest would not show what is written to its standard error.
    outside = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return subprocess.run(
        command(*words, python=python), cwd=root, capture_output=True, text=True, env=outside | environment
    )


def path_with_uv():
    """Return a PATH on which uv is found: it lies in the environment that it made."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
