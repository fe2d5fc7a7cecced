"""Running lessons: what they found is shown, what failed is explained, and nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import miniature
import nbformat
import psutil
import pytest

from helpers.course import CourseError, lessons

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = "# tags: headline\nimport pandas as pd\npd.DataFrame({'error': [2.5]}, index=['the <mean>'])"
FIGURE = f"""# tags: headline
from IPython.display import HTML, display
display(HTML('<img alt="Two curves" src="data:image/png;base64,{PIXEL}">'))
print("epochs", epochs)"""
FAILING = "first = 1\nsecond = 2\nthird = 3\nfourth = 4\nraise ValueError('no <luck>')"


def output(root, name):
    """Return a file of a course's output as text."""
    return (root / "output" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A course that ran, and what was said: two lessons that work, one that fails and one whose kernel dies."""
    root = miniature.make(
        tmp_path_factory.mktemp("ran") / "root",
        show_a_figure=["# tags: parameters\nepochs = 5", FIGURE],
        show_a_table=[TABLE, "import os; os.getcwd()"],
        fail=["1", FAILING, "print('never')"],
        die=["import os\nos.kill(os.getpid(), 9)"],
    )
    return root, miniature.call(root, "course", "--here", "-p", "epochs", "7")


def test_a_course_says_how_it_went_and_what_to_open(ran):
    root, result = ran
    assert result.returncode == 1
    assert "epochs is changed where it exists, which is not in 02_show_a_table, 03_fail, 04_die." in result.stdout
    for line in (r"01_show_a_figure +done", r"02_show_a_table +done", r"03_fail +failed in cell 3", r"04_die +failed"):
        assert re.search(line, result.stdout)
    assert re.search(r"4 lessons in \d+ s, one after another \d+ s; 2 failed", result.stdout)
    assert result.stdout.endswith(f"{root}/output/index.html\n     {(root / 'output/index.html').as_uri()}\n")


def test_a_failed_cell_is_explained_without_a_traceback(ran):
    root, result = ran
    assert "Traceback" not in result.stdout + result.stderr
    assert (
        "Lesson 03_fail failed in cell 3:\n    first = 1\n    second = 2\n    third = 3\n    fourth = 4\n    ...\n"
        f"ValueError: no <luck>\nThe lesson as it ran: {root}/output/03_fail.html\n"
    ) in result.stderr
    assert "ValueError" in output(root, "03_fail.ipynb")


def test_a_kernel_that_died_is_explained(ran):
    _, result = ran
    assert "The kernel died: it ended by signal 9, most often because the machine's memory was used up" in result.stderr


def test_lessons_run_in_their_folder_with_the_parameters_given(ran):
    root, _ = ran
    assert f"{root}/notebooks" in output(root, "02_show_a_table.ipynb")
    assert "epochs 7" in output(root, "01_show_a_figure.ipynb")


def test_the_page_shows_what_each_lesson_found(ran):
    page = output(ran[0], "index.html")
    assert 'alt="Two curves"' in page
    assert "epochs 7" in page
    assert "with <code>epochs = 7</code>" in page
    assert "<td>2.5</td>" in page
    assert "see <code>it</code> work" in page
    assert "the &lt;mean&gt;" in page
    assert "ValueError: no &lt;luck&gt;" in page
    assert 'href="03_fail.html#papermill-error-cell"' in page
    assert "4 of 4" in page
    assert f"Python {sys.version.split()[0]}" in page
    # Its own style for tables, in both themes.
    assert "<style scoped" not in page
    assert 'border="1"' not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_is_in_order_for_a_reader_who_listens(ran):
    page = output(ran[0], "index.html")
    assert re.findall(r"<h(\d)", page) == ["1", "2", "2", "2", "2"]
    assert all(f"<{landmark}" in page for landmark in ("header", "nav", "main", "footer"))
    assert '<html lang="en">' in page
    assert not re.search(r"<img(?![^>]*\balt=)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


@pytest.mark.parametrize("name", ["index.html", "01_show_a_figure.html", "03_fail.html"])
def test_a_page_needs_no_network(ran, name):
    page = output(ran[0], name)
    assert "<script" not in page
    assert not re.search(r"""(src|srcset)=["'](?!data:)""", page)
    assert not re.search(r"""<link\b|@import|url\(["']?https?:""", page)


def test_lessons_that_ran_before_stay_on_the_page(ran):
    root, _ = ran
    result = miniature.call(root, "course", "2", "--here")
    assert result.returncode == 0, result.stderr
    page = output(root, "index.html")
    assert page.count("<section") == 4
    assert "(the 1 run last)" in page
    assert "with <code>epochs = 7</code>" in page


def test_lessons_run_side_by_side_or_one_by_one(tmp_path):
    rendezvous = """import pathlib, time
pathlib.Path("{me}").touch()
for _ in range(50):
    time.sleep(0.1)
    if pathlib.Path("{other}").exists():
        break
else:
    raise TimeoutError("alone")"""
    root = miniature.make(
        tmp_path / "root",
        one=[rendezvous.format(me="one", other="two")],
        two=[rendezvous.format(me="two", other="one")],
    )
    result = miniature.call(root, "course", "--here", "--jobs", "2")
    assert result.returncode == 0, result.stderr


def left(process):
    """Return the processes that a process has started, and theirs."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(condition, seconds=30):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_course_leaves_nothing_behind(tmp_path, signum):
    sleep = "import pathlib, subprocess, time\nsubprocess.Popen(['sleep', '60'])\n"
    sleep += "pathlib.Path('asleep').touch()\ntime.sleep(60)"
    root = miniature.make(tmp_path / "root", sleep=[sleep])
    process = subprocess.Popen(
        miniature.command("course", "--here"),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for((root / "notebooks/asleep").exists)
    family = left(process)
    assert len(family) >= 3  # the worker, its kernel, and what the kernel started
    process.send_signal(signum)
    started = time.monotonic()
    _, said = process.communicate(timeout=10)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert time.monotonic() - started < 3
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum
        assert said == "Stopped.\n"
    assert not list((root / "output").iterdir())


def test_a_worker_that_was_killed_is_explained_and_its_kernel_ends(tmp_path):
    killing = "import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\nos.kill(os.getppid(), 9)"
    root = miniature.make(tmp_path / "root", kill=[killing])
    result = miniature.call(root, "course", "--here")
    assert result.returncode == 1
    assert "RuntimeError: the process that ran it ended with status -9" in result.stderr
    assert "Traceback" not in result.stderr
    wait_for(lambda: not psutil.pid_exists(int((root / "notebooks/pid").read_text())))


def test_progress_is_redrawn_on_a_terminal(tmp_path):
    root = miniature.make(tmp_path / "root", wait=["import time; time.sleep(1.2)"])
    ours, theirs = os.openpty()
    process = subprocess.Popen(miniature.command("course", "--here"), cwd=root, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"cell 2 of 2" in seen
    assert b"\x1b[1A\x1b[J" in seen


# Lessons and their generated parts


def test_refresh_stores_outputs_and_writes_nothing_twice(tmp_path):
    root = miniature.make(
        tmp_path / "root", print_lines=["print(1)\nprint(2, flush=True)\nprint(3)", "4"], fail=["1 / 0"], rest=["5"]
    )
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    before = paths[1].read_text()
    result = miniature.call(root, "refresh", "--here", "1", "2")
    assert result.returncode == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert paths[1].read_text() == before

    text = paths[0].read_text()
    notebook = nbformat.reads(text, 4)
    assert text == nbformat.writes(notebook) + "\n"
    assert [cell.id for cell in notebook.cells] == ["title", "open", "start", "cell-0", "cell-1", "navigation"]
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert [output.text for output in notebook.cells[3].outputs] == ["1\n2\n3\n"]
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata.language_info) == {"name", "file_extension", "mimetype", "pygments_lexer"}
    assert notebook.metadata.course.seconds > 0
    assert "5 minutes, about 10 seconds of computing on two cores." in notebook.cells[0].source
    # The lesson that was not chosen got its links, and no outputs.
    rest = nbformat.reads(paths[2].read_text(), 4)
    assert rest.cells[-1].source == "Previous: [Fail](02_fail.ipynb)"
    assert rest.cells[3].outputs == []

    said = miniature.call(root, "refresh", "--here", "1").stdout
    assert "01_print_lines: written" not in said
    assert paths[0].read_text() == text


def test_refresh_keeps_what_is_written_to_other_lessons_meanwhile(tmp_path):
    edit = "import pathlib; two = pathlib.Path('02_two.ipynb'); two.write_text(two.read_text().replace('old', 'new'))"
    root = miniature.make(tmp_path / "root", one=[edit], two=["'old'"])
    assert miniature.call(root, "refresh", "--here", "1").returncode == 0
    two = nbformat.read(root / "notebooks/02_two.ipynb", 4)
    assert [cell.source for cell in two.cells if cell.id in ("cell-0", "navigation")] == [
        "'new'",
        "Previous: [One](01_one.ipynb)",
    ]


@pytest.fixture
def three(tmp_path):
    """The lessons of a course of three, and the notebook of the second."""
    root = miniature.make(tmp_path / "root", one=["1"], two=["2"], three=["3"])
    everything = lessons.find(root / "notebooks")
    return everything, json.loads(everything[1].path.read_text())


def test_generated_parts_come_from_one_setting_and_do_not_grow(three):
    everything, notebook = three
    notebook["metadata"]["course"] = {"seconds": 100}
    lessons.sync(notebook, everything[1], everything, "https://github.com/someone/course")
    once = json.dumps(notebook)
    cells = {cell["id"]: cell["source"] for cell in notebook["cells"]}
    assert list(cells) == ["title", "open", "start", "cell-0", "navigation"]
    assert "(https://colab.research.google.com/github/someone/course/blob/main/notebooks/02_two.ipynb)" in cells["open"]
    raw = "https%3A%2F%2Fraw.githubusercontent.com%2Fsomeone%2Fcourse%2Fmain%2Fnotebooks%2F02_two.ipynb"
    assert f"(https://console.cloud.google.com/vertex-ai/colab/import/{raw})" in cells["open"]
    assert "deploy-notebook?download_url=https://raw.githubusercontent.com/someone/course/main/" in cells["open"]
    assert cells["navigation"] == "Previous: [One](01_one.ipynb) · Next: [Three](03_three.ipynb)"
    assert "**Time** 5 minutes, about 2 minutes of computing on two cores." in cells["title"]
    for image in re.findall(r"images/[\w-]+\.svg", cells["open"]):
        assert (miniature.COURSE / "notebooks" / image).exists()

    lessons.sync(notebook, everything[1], everything, "https://github.com/someone/course")
    assert json.dumps(notebook) == once

    notebook["metadata"]["course"] = {"seconds": 31}
    lessons.sync(notebook, everything[1], everything, "https://github.com/other/course")
    assert "someone" not in json.dumps(notebook)
    assert "about 30 seconds of computing" in notebook["cells"][0]["source"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "about 10 seconds"), (24, "about 20 seconds"), (55, "about 1 minute"), (100, "about 2 minutes")],
)
def test_times_are_friendly(seconds, said):
    assert lessons.friendly(seconds) == said


@pytest.mark.parametrize("word", ["2", "02", "02_two", "two", "TW", "notebooks/02_two.ipynb"])
def test_a_lesson_goes_by_many_names(three, word):
    everything, _ = three
    assert lessons.choose(everything, [word]) == [everything[1]]


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 5, 3),
        ("-3", 5, -3),
        ("3", 0.5, 3),
        ("1e-3", 0.5, 1e-3),
        ("False", True, False),
        ("007", "adam", "007"),
        ("[1, 2]", [], [1, 2]),
        ("many", None, "many"),
        ("2", lessons.COMPUTED, 2),
    ],
)
def test_a_parameter_takes_the_type_of_its_default(text, default, value):
    assert lessons.value_like("it", text, default) == value


@pytest.mark.parametrize(
    ("text", "default"), [("many", 5), ("1.5", 5), ("True", 5), ("x", 0.5), ("1", True), ("1", [])]
)
def test_a_parameter_refuses_another_type(text, default):
    with pytest.raises(CourseError, match="it takes a value such as"):
        lessons.value_like("it", text, default)


# The first cell


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository with the course's helpers, and the settings that make git take it for the one on GitHub."""
    repository = miniature.make(tmp_path_factory.mktemp("origin") / "course.git", one=["1"])
    git = ["git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-C", repository]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "The course"]):
        subprocess.run([*git, *words], check=True)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/someone/course",
    }


def run_first_cell(folder, **environment):
    """Run the cell in a folder of its own, by a Python that knows no helpers, and show where they came from."""
    script = lessons.START.format(url="https://github.com/someone/course") + "\nprint(helpers.__file__)"
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
    )


def test_a_notebook_opened_on_its_own_fetches_the_course(tmp_path, origin):
    result = run_first_cell(tmp_path, **origin)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{tmp_path}/helpers/__init__.py"
    # The second time there is nothing to fetch.
    assert run_first_cell(tmp_path, GIT_CONFIG_COUNT="0").returncode == 0


def test_a_course_out_of_reach_is_said_by_git(tmp_path, origin):
    missing = origin | {"GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/missing.insteadOf"}
    result = run_first_cell(tmp_path, **missing)
    assert result.returncode == 1
    assert "fatal: " in result.stderr
    assert "'git clone --depth 1" in result.stderr


def test_tensorflow_starts_without_a_red_box(tmp_path):
    cells = [
        "import helpers",
        "import tensorflow as tf\nimport keras\ntf.constant(1) + 1\nkeras.layers.Dense(3)(tf.ones((2, 2)))",
    ]
    cells += ["import os\nos.write(2, b'still heard')", "os.environ['TF_ENABLE_ONEDNN_OPTS']"]
    root = miniature.make(tmp_path / "root", start=cells)
    assert miniature.call(root, "course", "--here").returncode == 0
    notebook = nbformat.reads(output(root, "01_start.ipynb"), 4)
    heard = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert heard == ["still heard"]
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "'0'"
