"""Every lesson keeps the rules of the course, every rule can fail, and the house is in order."""

import copy
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import rules
from packaging.requirements import Requirement
from rules import ROOT, RULES

from helpers.course import lessons

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_lesson = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


# The lessons


@each_lesson
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_lesson(rule, path):
    short = rule(load(path), path)
    assert not short, "\n".join([f"{path.name}: {rule.__doc__}", *short])


def test_there_are_lessons():
    assert PATHS


def test_numbers_and_titles_are_unique():
    for what in ([path.name[:2] for path in PATHS], [lessons.read(path).title for path in PATHS]):
        assert [name for name, count in Counter(what).items() if count > 1] == []


@each_lesson
def test_generated_cells_are_up_to_date(path):
    """Badges, the fetch cell, the links to the lessons before and after, the time: `refresh` has nothing to write."""
    everything = lessons.find(path.parent)
    lesson = next(lesson for lesson in everything if lesson.path == path)
    stored, synced = load(path), load(path)
    lessons.sync(synced, lesson, everything, lessons.home(ROOT))
    changed = [
        cell["id"]
        for cell in synced["cells"]
        if rules.source(cell) not in [rules.source(old) for old in stored["cells"] if old["id"] == cell["id"]]
    ]
    assert changed == [], f"{path.name}: run `python3 -m helpers refresh`"
    assert [cell["id"] for cell in synced["cells"]] == [cell["id"] for cell in stored["cells"]]


def test_navigation_leads_through_the_course():
    """Computed here from the files' names alone: the order of the course is theirs."""
    for place, path in enumerate(PATHS):
        links = re.findall(r"(Previous|Next): \[[^\]]+\]\(([^)]+)\)", rules.source(load(path)["cells"][-1]))
        around = {"Previous": PATHS[:place][-1:], "Next": PATHS[place + 1 :][:1]}
        assert links == [(word, other.name) for word, there in around.items() for other in there], path.name


# Each rule can fail


def markdown(name, text):
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name, text, count, tags=(), outputs=()):
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "id": name,
        "metadata": metadata,
        "source": text,
        "execution_count": count,
        "outputs": list(outputs),
    }


def shown(**data):
    """An output that shows values; `html` or `png` in place of its MIME type."""
    types = {"plain": "text/plain", "html": "text/html", "png": "image/png"}
    return {"output_type": "display_data", "metadata": {}, "data": {types[name]: text for name, text in data.items()}}


TITLE = """\
# Fit a line

**You will** fit a line.

**Time** 5 minutes, about 10 seconds of computing on two cores.

**Cost on the cloud** nothing.

**Next** you bend it."""
FIGURE = '<img alt="A line that rises from left to right" src="data:image/png;base64,iVBORw0/tmp/x">'
FILE = ROOT / "notebooks/99_fit_line.ipynb"  # need not exist: no rule reads it


@pytest.fixture
def good():
    """A small notebook that keeps every rule."""
    lesson = lessons.Lesson(FILE, "Fit a line", "", {}, None)
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [
            markdown("title", TITLE),
            markdown("open", lessons.badges(lesson, lessons.home(ROOT))),
            code("start", "import helpers", 1),
            code("parameters", "seed = 1", 2, ["parameters"]),
            code("first", "from helpers import data\n\ntrain, test = data.split('penguins')\nlen(test)", 3),
            code("size", "len(train)", 4, ["nbval-check-output"], [shown(plain="268")]),
            code("draw", "train.plot()", 5, ["headline"], [shown(html=FIGURE)]),
            code("hold", "assert len(train) == 268\nassert len(test) == 65", 6),
            markdown("end", "## Summary\n\nA line.\n\n## Questions\n\n1. Why?\n2. How?\n3. Who?"),
            markdown("navigation", "Previous: [all](.)"),
        ],
    }


def edit(name, **changes):
    """A way to break a notebook: other values in the cell called `name`."""

    def breaks(notebook):
        next(cell for cell in notebook["cells"] if cell["id"] == name).update(changes)

    return breaks


def append(name, text):
    """A way to break a notebook: more text in the cell called `name`."""

    def breaks(notebook):
        next(cell for cell in notebook["cells"] if cell["id"] == name)["source"] += text

    return breaks


def swap(first, second):
    """A way to break a notebook: two cells, given by place, the other way round."""

    def breaks(notebook):
        cells = notebook["cells"]
        cells[first], cells[second] = cells[second], cells[first]

    return breaks


def lengthen(notebook):
    for cell in rules.code_cells(notebook)[2:]:
        cell["source"] += "\nseed" * 9


def hide_ml(notebook):
    next(cell for cell in notebook["cells"] if cell["id"] == "first")["source"] = "import pandas\n" * 3
    next(cell for cell in notebook["cells"] if cell["id"] == "size")["source"] = "data.split('penguins')"


BREAKS = {
    "opens_in_order": [
        swap(1, 2),
        lambda notebook: notebook["cells"].insert(3, markdown("early", "A word before the parameters.")),
        edit("title", source=TITLE.replace("# Fit", "## Fit")),
        *[edit("title", source=TITLE.replace(word, "x")) for word in ("**You will", "two cores", "**Cost", "**Next")],
    ],
    "closes_in_order": [
        lambda notebook: notebook["cells"].pop(),
        edit("end", source="## Questions\n\n1. Why?\n2. How?\n3. Who?\n\n## Summary\n\nA line."),
        edit("end", source="## Summary\n\nA line.\n\n## Questions\n\n1. Why?\n2. How?"),
        append("end", "\n4. a\n5. b\n6. c\n7. d"),
    ],
    "names_what_it_does": [edit("title", source=TITLE.replace("# Fit", "# Draw"))],
    "has_valid_ids": [
        edit("size", id="first"),
        edit("size", id="not valid"),
        lambda notebook: notebook.update(nbformat_minor=4),
    ],
    "links_lead_somewhere": [
        append("end", "\n\n[gone](98_gone.ipynb)"),
        append("end", "\n\n![a picture of nothing](images/gone.svg)"),
        append("end", '\n\n<a href="gone.md">gone</a>'),
    ],
    "badges_open_this_file": [
        lambda notebook: edit("open", source=notebook["cells"][1]["source"].replace("99_fit", "98_fit"))(notebook),
        lambda notebook: edit("open", source=notebook["cells"][1]["source"].replace("/main/", "/old/", 1))(notebook),
        edit("open", source=""),
    ],
    "describes_images_in_text": [append("end", "\n\n![it](https://example.org/it.png)")],
    "starts_with_ml": [hide_ml, edit("start", source="seed = 1\n" * 10)],
    "has_short_cells": [append("draw", "\nseed" * 15)],
    "has_a_low_median": [lengthen],
    "imports_public_libraries": [
        append("draw", "\nimport statsmodels.api"),
        append("draw", "\nfrom flask import Flask"),
        append("draw", "\nfrom helpers import course"),
        append("draw", "\nimport helpers.local.vertex"),
        append("draw", "\nfrom helpers.course import lessons"),
    ],
    "shows_values": [append("draw", "\nprint(seed)"), append("draw", "\nif seed:\n    print(seed)")],
    "asserts_its_numbers": [edit("hold", source="assert len(train) == 268")],
    "has_known_tags": [edit("first", metadata={"tags": ["remove-cell"]})],
    "has_a_headline": [edit("draw", metadata={})],
    "compares_exact_outputs": [edit("size", metadata={}), edit("size", outputs=[])],
    "knows_no_tests": [
        append("draw", "\nimport os\nif os.environ.get('CI'):\n    seed = 2"),
        append("draw", "\nIS_TESTING = True"),
        edit("first", metadata={"comment": "nbval-skip"}),
    ],
    "is_one_run": [edit("size", execution_count=7), edit("size", execution_count=None), swap(5, 6)],
    "has_no_red_box": [
        edit("first", outputs=[{"output_type": "stream", "name": "stderr", "text": "oh"}]),
        edit("first", outputs=[{"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}]),
    ],
    "describes_figures": [
        edit("draw", outputs=[shown(png="iVBORw0")]),
        edit("draw", outputs=[shown(html='<img src="data:image/png;base64,iVBORw0">')]),
        edit("draw", outputs=[shown(html=FIGURE.replace("A line that rises from left", ""))]),
        edit("draw", outputs=[shown(html=FIGURE + "<img alt='' src='x.png'>")]),
    ],
    "is_small": [edit("draw", outputs=[shown(html=FIGURE + "x" * 400_000)])],
    "names_no_machine": [
        edit("first", outputs=[shown(plain="'/home/me/course'")]),
        append("draw", "\nopen('/tmp/out')"),
        append("end", "\n\nLook into `/root/.config`."),
    ],
    "holds_no_secrets": [
        edit("first", outputs=[shown(plain="AIza" + "x" * 35)]),
        append("draw", "\nkey = 'ya29." + "x" * 30 + "'"),
    ],
}


def fired(notebook):
    return [rule.__name__ for rule in RULES if rule(notebook, FILE)]


def test_a_good_notebook_keeps_every_rule(good):
    assert fired(good) == []


@pytest.mark.parametrize(
    ("name", "breaks"),
    [pytest.param(name, b, id=f"{name}-{i}") for name, bs in BREAKS.items() for i, b in enumerate(bs)],
)
def test_a_rule_fires_when_it_is_broken_and_no_other_does(name, breaks, good):
    broken = copy.deepcopy(good)
    breaks(broken)
    assert fired(broken) == [name]


def test_every_rule_is_broken_here():
    assert list(BREAKS) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("name", ["9_fit_line.ipynb", "99-fit-line.ipynb", "99_Fit_line.ipynb", "fit_line.ipynb"])
def test_a_wrong_file_name_is_refused(name, good):
    assert rules.names_what_it_does(good, FILE.with_name(name))


# The README


def test_readme_links_to_what_exists():
    readme = ROOT / "README.md"
    assert rules.missing_links(readme.read_text(encoding="utf-8"), readme) == []


@each_lesson
def test_readme_names_each_lesson_with_its_time(path):
    entries = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if path.name in line]
    assert entries, f"README.md does not mention {path.name}"
    assert any(re.search(r"\d+ (seconds|min)", line) for line in entries), f"no time beside {path.name} in README.md"


# The house


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["codespell_lib"]], ids=" ".join)
def test_style(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_top_level_is_what_the_course_needs():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.partition("/")[0] for line in tracked.splitlines()}
    files = {"requirements.txt", "requirements-torch.txt", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == {"notebooks", "helpers", "tests"} | files


def listed():
    """The lines of setup.cfg that name a requirement."""
    settings = rules.settings()
    both = settings["options"]["install_requires"], settings["options.extras_require"]["test"]
    return [line for text in both for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_every_requirement_says_what_it_is_for():
    assert [line for line in listed() if not re.search(r"\S+\s+# \w", line)] == []


def test_the_lock_satisfies_setup_cfg():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "-e ."
    pinned = [Requirement(line) for line in lines[:-1] if not line.startswith("#")]
    assert [str(pin) for pin in pinned if [spec.operator for spec in pin.specifier] != ["=="]] == []
    for wanted in rules.requirements("\n".join(listed())):
        # Each of them, since a package may be locked at one version for each Python.
        versions = [next(iter(pin.specifier)).version for pin in pinned if pin.name == wanted.name]
        assert versions, f"requirements.txt lacks {wanted.name}"
        assert [version for version in versions if version not in wanted.specifier] == [], wanted
