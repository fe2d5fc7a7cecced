"""The front door answers a wrong call in words, and its environment is whole or not there."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import miniature
import pytest

from helpers.__main__ import require_python
from helpers.course import CourseError, install

LESSONS = {
    "climb_the_stack": ["# tags: parameters\nepochs = 5\nrate = 0.1\nname = 'adam'"],
    "create_a_model": ["# tags: parameters\nlayers = [64, 64]\nseed = None"],
    "create_a_job": ["1 + 1"],
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    return miniature.make(tmp_path_factory.mktemp("course") / "root", **LESSONS)


def refused(result, status=2):
    """Return the one message of a call that was refused before it did anything."""
    assert result.returncode == status, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


# Calls


def test_without_a_command_it_explains_itself(course):
    result = miniature.call(course)
    assert result.returncode == 0
    assert result.stderr == ""
    for name in ("lab", "course", "test", "refresh", "kernel", "bench", "--here"):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["curse"], ["no command curse", "Did you mean course?", "refresh"]),
        (["course", "climp"], ["no lesson climp", "Did you mean climb?", "02_create_a_model"]),
        (["course", "7"], ["no lesson 7", "03_create_a_job"]),
        (["course", "create"], ["create fits 2 lessons", "02_create_a_model", "03_create_a_job"]),
        (["refresh", "9"], ["no lesson 9"]),
        (["course", "-p", "epoch", "3"], ["parameter epoch", "Did you mean epochs?", "layers"]),
        (["course", "3", "-p", "epochs", "3"], ["parameter epochs", "no parameters"]),
        (["course", "-p", "epochs", "many"], ["epochs", "int", "'many'", "-p epochs 5"]),
        (["course", "-p", "epochs", "2.5"], ["epochs", "int", "'2.5'"]),
        (["course", "-p", "rate", "True"], ["rate", "float", "'True'"]),
        (["course", "-p", "layers", "64"], ["layers", "list", "-p layers [64,64]"]),
        (["course", "-p", "epochs"], ["expected 2 arguments", "NAME VALUE"]),
        (["course", "--jobs", "0"], ["--jobs", "0 is not a whole number from 1 on"]),
        (["course", "--fast"], ["--fast", "usage"]),
    ],
)
def test_a_wrong_call_is_refused_before_anything_happens(course, words, said):
    message = refused(miniature.call(course, *words))
    assert all(part in message for part in said), message
    assert not (course / ".venv").exists()
    assert not (course / "output").exists()


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    root = miniature.make(tmp_path / "root", good=["1"], bad=["1"])
    (root / "notebooks/02_bad.ipynb").write_text('{"cells": [')
    message = refused(miniature.call(root, "course", "--here"), status=1)
    assert "02_bad.ipynb is not a notebook" in message
    assert "line 1" in message


def test_a_reader_that_leaves_early_gets_no_traceback(course):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(miniature.command(), cwd=course, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 128 + signal.SIGPIPE
    assert result.stderr == ""


# Pythons


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 14), (4, 0)])
def test_an_unsupported_version_is_named_with_the_supported_range(version):
    with pytest.raises(CourseError, match=r"Python 3\.11 to 3\.13") as caught:
        require_python(version, miniature.COURSE)
    assert f"This is Python {version[0]}.{version[1]}," in str(caught.value)
    assert ("no release for a newer one" in str(caught.value)) == (version >= (3, 14))


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_supported_version_passes(version):
    require_python(version, miniature.COURSE)


def other_pythons():
    """Find interpreters that the course does not support, among those of this machine."""
    found = [shutil.which(f"python3.{minor}") for minor in (6, 7, 8, 9, 10, 14, 15)]
    managed = Path.home().glob(".pyenv/versions/3.*/bin/python")
    found += [str(path) for path in managed if int(path.parts[-3].split(".")[1]) not in (11, 12, 13)]
    return [path for path in found if path and install.version_of(path)] or [None]


@pytest.mark.parametrize("python", other_pythons())
def test_an_unsupported_python_gets_a_message_it_can_print(course, python):
    if python is None:
        pytest.skip("every Python of this machine is supported")
    message = refused(miniature.call(course, "course", python=python), status=1)
    assert "the course needs Python 3.11 to 3.13" in message
    assert "python3.12 -m helpers" in message


def test_a_folder_without_the_rest_of_the_course_is_refused(tmp_path):
    root = miniature.make(tmp_path / "root", good=["1"])
    (root / "setup.cfg").unlink()
    assert "git clone" in refused(miniature.call(root, "course"), status=1)


# The environment


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that has no packages, and answers only when it may."""

    asked, answers = threading.Event(), threading.Event()

    def do_GET(self):
        self.asked.set()
        self.answers.wait(30)
        self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def index():
    """A slow index, the only one that uv is to ask."""
    Index.asked.clear()
    Index.answers.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "PATH": miniature.path_with_uv(),
            "UV_NO_CONFIG": "1",
            "UV_HTTP_RETRIES": "0",
            "UV_DEFAULT_INDEX": f"http://127.0.0.1:{server.server_port}/simple",
        }
        Index.answers.set()
        server.shutdown()


@pytest.fixture
def project(tmp_path):
    """A folder whose requirements.txt asks for one small package, which lies beside it."""
    root = tmp_path / "a project"
    root.mkdir()
    with zipfile.ZipFile(root / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "answer = 42")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    (root / "requirements.txt").write_text("--find-links .\ntiny\n")
    return root


def set_up(root, environment, python=sys.executable, before="pass"):
    """Start a process that makes the environment of a folder, after a line of Python."""
    script = (
        "import sys; from pathlib import Path\n"
        "from helpers.course import CourseError, install\n"
        f"{before}\n"
        "try: print(install.ready(Path(sys.argv[1])))\n"
        "except CourseError as error: sys.exit(str(error))\n"
    )
    return subprocess.Popen(
        [python, "-c", script, str(root)],
        cwd=miniature.COURSE,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """Return the exit status and what was said."""
    out, said = process.communicate(timeout=60)
    return process.returncode, out.strip(), said


def answer(python):
    """Ask the environment for what its package holds."""
    return subprocess.run([python, "-c", "import tiny; print(tiny.answer)"], capture_output=True, text=True).stdout


def test_the_environment_is_made_once_and_updated_when_the_lock_changes(project, index):
    Index.answers.set()
    status, python, said = finished(set_up(project, index))
    assert status == 0, said
    assert answer(python) == "42\n"
    assert list(project.glob(".venv/lib/*/site-packages/__pycache__/tiny.*.pyc"))
    assert re.search(r"Ready after \d+ seconds", said)

    assert finished(set_up(project, index)) == (0, python, "")

    with (project / "requirements.txt").open("a") as lock:
        lock.write("# changed\n")
    status, _, said = finished(set_up(project, index))
    assert status == 0
    assert "Updating" in said
    assert finished(set_up(project, index)) == (0, python, "")

    # A folder that was moved, and a Python that is gone.
    moved = project.rename(project.with_name("moved"))
    status, python, said = finished(set_up(moved, index))
    assert (status, python) == (0, str(moved / ".venv/bin/python"))
    (moved / ".venv/bin/python").unlink()
    (moved / ".venv/bin/python").symlink_to("/nowhere/python3")
    status, python, said = finished(set_up(moved, index))
    assert status == 0, said
    assert "Setting up" in said
    assert answer(python) == "42\n"


def test_without_uv_on_the_path_the_environment_gets_its_own(project):
    environment = {"PATH": "/usr/bin:/bin", "UV_OFFLINE": "1"}
    status, python, said = finished(set_up(project, environment))
    assert status == 0, said
    assert "installing uv" in said
    assert answer(python) == "42\n"


def test_a_second_start_waits_and_a_killed_one_is_made_anew(project, index):
    first = set_up(project, index)
    assert Index.asked.wait(30)
    half = project / ".venv/half"
    half.touch()
    first.kill()
    first.communicate()
    # What the killed one started still runs: nobody may touch the folder until it has ended.
    second = set_up(project, index)
    assert second.stderr.readline() == "Another start is setting up .venv; waiting until it has finished.\n"
    third = set_up(project, index)
    assert "waiting" in third.stderr.readline()
    assert half.exists()
    Index.answers.set()
    results = [finished(second), finished(third)]
    assert [status for status, _, _ in results] == [0, 0], results
    assert not half.exists()
    assert answer(project / ".venv/bin/python") == "42\n"
    # Only one of the two had to do the work.
    assert sorted("Ready after" in said for _, _, said in results) == [False, True]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_set_up_can_be_stopped(course, index, signum):
    (course / "requirements.txt").write_text("tiny\n")
    process = subprocess.Popen(
        miniature.command("lab"), cwd=course, env={**os.environ, **index}, stderr=subprocess.PIPE, text=True
    )
    assert Index.asked.wait(30)
    process.send_signal(signum)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 128 + signum
    assert said.splitlines()[-1] == "Stopped."
    assert not install.is_complete(course)
    shutil.rmtree(course / ".venv")


def test_an_index_out_of_reach_is_said_with_the_tools_own_words(course):
    (course / "requirements.txt").write_text("tiny\n")
    unreachable = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_NO_CONFIG": "1", "UV_HTTP_RETRIES": "0"}
    result = miniature.call(course, "lab", PATH=miniature.path_with_uv(), **unreachable)
    message = refused(result, status=1)
    assert "package index that this machine can reach" in message
    assert "127.0.0.1:9" in message
    shutil.rmtree(course / ".venv")


def test_a_command_goes_on_inside_the_environment(course, index):
    (course / "requirements.txt").write_text("")
    Index.answers.set()
    result = miniature.call(course, "lab", **index)
    # This environment is empty, and its Python is the one that says so.
    assert f"{course}/.venv/bin/python: No module named jupyterlab" in result.stderr
    shutil.rmtree(course / ".venv")


def test_a_python_without_ensurepip_says_what_to_install(project):
    process = set_up(project, {"PATH": "/usr/bin:/bin"}, before="sys.modules['ensurepip'] = None")
    status, _, said = finished(process)
    assert status == 1
    assert "no module ensurepip" in said
    assert "sudo apt install python3-venv" in said


def test_too_small_a_disk_is_said_with_both_sizes(tmp_path):
    with pytest.raises(CourseError, match=r"about 10{9} GB.* has \d+\.\d GB left") as caught:
        install.check_disk(tmp_path, 1e18)
    assert str(tmp_path) in str(caught.value)
    install.check_disk(tmp_path, 1)


def test_a_folder_that_cannot_be_written_to_is_said():
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        # The superuser may write anywhere, so the test becomes somebody else once everything is imported.
        status, _, said = finished(set_up(name, {}, before="import os; os.geteuid() or os.setuid(65534)"))
        assert status == 1
        assert f"{name} cannot be written to: Permission denied" in said
        assert "Traceback" not in said


def test_here_installs_nothing_where_nothing_is_missing(course):
    result = miniature.call(course, "--here", "test", "--version")
    assert result.returncode == 0, result.stderr
    assert "pytest" in result.stdout + result.stderr
    assert "Installing" not in result.stderr
    assert not (course / ".venv").exists()


@pytest.mark.parametrize(("cell", "status", "said"), [("assert True", 0, "3 passed"), ("assert False", 1, "1 failed")])
def test_test_runs_tests_and_lessons_together(tmp_path, cell, status, said):
    root = miniature.make(tmp_path / "root", check=[cell])
    (root / "tests").mkdir()
    (root / "tests/test_it.py").write_text("def test_it():\n    pass\n\ndef test_too():\n    pass\n")
    result = miniature.call(root, "test", "--here")
    assert result.returncode == status
    assert said in result.stdout.splitlines()[-1]
    # What follows goes to pytest.
    assert "1 passed" in miniature.call(root, "test", "-k", "test_too", "--here").stdout


def test_here_says_when_it_can_install_nothing(course, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    result = miniature.call(course, "course", "--here", python=tmp_path / "bare/bin/python")
    message = refused(result, status=1)
    assert "lacks custom-training-on-google-cloud, tensorflow, keras" in message
    assert "Leave --here away" in message


def test_kernel_is_offered_to_a_running_jupyterlab(course, tmp_path):
    result = miniature.call(course, "kernel", "--here", JUPYTER_DATA_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    described = json.loads((tmp_path / "kernels/custom-training/kernel.json").read_text())
    assert described["display_name"] == "Custom training course"
    assert described["argv"][0] == sys.executable
    assert "click" in result.stdout


def test_import_is_instant_and_brings_no_tensorflow():
    script = (
        "import sys, time; start = time.perf_counter(); import helpers; print(time.perf_counter() - start)\n"
        "print('tensorflow' in sys.modules, 'matplotlib' in sys.modules)"
    )
    best = min(
        (
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, cwd=miniature.COURSE
            ).stdout.split()
            for _ in range(3)
        ),
        key=lambda words: float(words[0]),
    )
    assert float(best[0]) < 0.05
    assert best[1:] == ["False", "False"]
