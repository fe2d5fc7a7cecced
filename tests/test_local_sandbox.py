"""A task of the local cloud runs on this machine without being able to touch it, and ends when it has to."""

import base64
import contextlib
import functools
import hashlib
import http.server
import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import threading
import time
import uuid
import zipfile
from pathlib import Path

import psutil
import pytest

from helpers.local import sandbox

NOWHERE = "http://127.0.0.1:9/simple"  # an index that cannot be reached: whoever asks it fails
MACHINE = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})  # the packages of the machine's own Python
DAEMON = "import os, sys, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
BUBBLEWRAP = pytest.param("bubblewrap", marks=pytest.mark.skipif(not sandbox.bubblewrap_works(), reason="none here"))
confined = pytest.mark.parametrize("kind", [BUBBLEWRAP], indirect=True)
plain = pytest.mark.parametrize("kind", ["plain"], indirect=True)


def listing(folder):
    """Return what is in a folder, with times and sizes, but for what Python itself caches."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            status = os.lstat(f"{path}/{name}")
            found.add((f"{path}/{name}", status.st_mtime_ns, status.st_size))
    return found


@pytest.fixture(scope="module", autouse=True)
def machine():
    """Check that after all tests the course's environment and the machine's Python are as they were before."""
    folders = [*sandbox.course_packages(), MACHINE, str(Path(sys.prefix) / "bin")]
    before = [listing(folder) for folder in folders]
    yield
    for folder, was in zip(folders, before, strict=True):
        assert listing(folder) ^ was == set()


class Cloud:
    """A folder as the local cloud has it, and tasks that run in it."""

    def __init__(self, folder):
        self.buckets, self.tasks = folder / "buckets", folder / "jobs"
        self.bucket = self.buckets / "bucket"
        self.bucket.mkdir(parents=True)
        self.tasks.mkdir()
        (folder / "state.sqlite").touch()

    def task(self, *command, **fields):
        name = uuid.uuid4().hex[:8]
        given = {"environment": {}, "log": self.tasks / f"{name}.log"} | fields
        return sandbox.Task(self.tasks / name, command, buckets=self.buckets, **given)

    def run(self, *command, **fields):
        """Run a task to its end; return its exit status and what it printed."""
        task = self.task(*command, **fields)
        status = sandbox.start(task).wait(timeout=120)
        return status, task.log.read_text(errors="replace")

    def python(self, source, **fields):
        """Run Python code to its end; return what it printed."""
        status, said = self.run("python3", "-c", textwrap.dedent(source), **fields)
        assert status == 0, said
        return said.strip()


@pytest.fixture(params=[BUBBLEWRAP, "plain"])
def kind(request, monkeypatch):
    """Run a test with bubblewrap where it works, and always without: it is then not on the path."""
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    sandbox.bubblewrap_works.cache_clear()
    if request.param == "plain":
        monkeypatch.setenv("PATH", "/nowhere")
    yield request.param
    sandbox.bubblewrap_works.cache_clear()


@pytest.fixture
def cloud(kind, tmp_path):
    return Cloud(tmp_path)


def wheel(folder, name, version="1.0", **files):
    """Write a wheel; return its path."""
    files = {f"{module}.py": text for module, text in files.items()} or {f"{name}.py": f"__version__ = '{version}'"}
    info = f"{name}-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digests = {file: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()) for file, text in files.items()}
    record = [f"{file},sha256={digest.decode().rstrip('=')}," for file, digest in digests.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def source(folder, name, **files):
    """Write a source archive; return its path."""
    path = folder / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, text in files.items():
            info = tarfile.TarInfo(f"{name}/{file}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def index(cloud, tmp_path, monkeypatch):
    """Return the folder of a package index that tasks reach."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    folder = tmp_path / "index"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


def left_of(text):
    """Return the running processes with a text on their command line, after waiting for them to end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if text in " ".join(process.cmdline()):
                    found.append(process)
        if not found:
            break
        time.sleep(0.05)
    return found


def until(condition):
    """Wait for a condition to hold."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Packages


def test_however_pip_is_called_it_installs_into_the_task_alone(cloud):
    for number in range(6):
        wheel(cloud.bucket, f"tiny{number}")
    said = cloud.python(
        f"""
        import os, subprocess, sys
        file = "/gcs/bucket/tiny{{}}-1.0-py3-none-any.whl".format
        subprocess.run(["pip", "install", "-q", file(0)], check=True)
        subprocess.run(["pip3", "install", "-q", "--user", file(1)], check=True)
        subprocess.run(["python", "-m", "pip", "install", "-q", file(2)], check=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--user", file(3)], check=True)
        assert os.system("python3 -m pip install -q " + file(4)) == 0
        # The machine's own Python, by its path: that pip refuses.
        other = [{sys._base_executable!r}, "-m", "pip", "install", "--user", "--break-system-packages", file(5)]
        print(subprocess.run(other, capture_output=True, text=True))
        code = "import importlib; [print(importlib.import_module('tiny%d' % n).__file__) for n in range(5)]"
        subprocess.run(["python3", "-c", code], check=True)
        """
    )
    refusal, *places = said.splitlines()
    assert re.search("activated virtualenv|No module named pip", refusal), refusal
    assert [str(cloud.tasks) in place for place in places] == [True] * 5
    assert ["/home/.local/" in place for place in places] == [False, True, False, True, False]


def trainer(folder, requirements):
    """Write the source archive that the SDK makes of a script; return its path."""
    from google.cloud.aiplatform.utils import source_utils

    script = folder / "script.py"
    script.write_text("import sys; import six; print('trained', six.__name__, sys.argv[1:], __file__)")
    return source_utils._TrainingScriptPythonPackager(str(script), requirements=requirements).make_package(str(folder))


def test_the_sdks_command_for_custom_containers_needs_no_network(cloud, tmp_path):
    shutil.copy(trainer(tmp_path, ["six", "numpy>1"]), cloud.bucket / "trainer-0.1.tar.gz")
    status, said = cloud.run(
        "sh",
        "-c",
        "pip install --upgrade pip && pip3 install -q --user /gcs/bucket/trainer-0.1.tar.gz && "
        "python3 -m aiplatform_custom_trainer_script.task --epochs=3",
        image="us-central1-docker.pkg.dev/project/repository/trainer",
    )
    assert status == 0, said
    assert "keeps its own pip" in said
    assert "Retrying" not in said
    assert re.search(r"trained six \['--epochs=3'\] .*/home/\.local/.*task\.py", said)


def test_packages_are_installed_before_the_command(cloud):
    code = "from setuptools import setup; setup(name='job', version='1', py_modules=['job'], install_requires=['six'])"
    job = source(cloud.bucket, "job-1", **{"setup.py": code, "job.py": "import other; print('here is', __file__)"})
    packages = [job, wheel(cloud.bucket, "other")]
    status, said = cloud.run("python3", "-m", "job", packages=packages)
    assert (status, said.count("here is")) == (0, 1), said
    source(cloud.bucket, "job-1", **{"setup.py": "raise SystemExit('no colour is chosen')"})
    status, said = cloud.run("python3", "-m", "job", packages=packages)
    assert (status, said.count("here is"), said.count("no colour is chosen")) == (1, 0, 1), said


def test_what_is_missing_comes_from_the_index(cloud, index):
    wheel(index / "tiny", "tiny")
    wheel(index / "backend", "backend", backend=BACKEND)
    project = "[build-system]\nrequires = ['backend']\nbuild-backend = 'backend'\n"
    source(cloud.bucket, "built-1.0", **{"pyproject.toml": project})
    status, said = cloud.run(
        "sh", "-c", "pip install tiny /gcs/bucket/built-1.0.tar.gz && python3 -c 'import tiny, built; import backend'"
    )
    assert "Successfully installed built-1.0 tiny-1.0" in said
    # What a package is built with stays out of the environment, as ever.
    assert "No module named 'backend'" in said
    assert status == 1


BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(folder + "/built-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("built.py", "")
        wheel.writestr("built-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n")
        wheel.writestr("built-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("built-1.0.dist-info/RECORD", "")
    return "built-1.0-py3-none-any.whl"
"""


@plain
@pytest.mark.parametrize("user", ["", "--user"])
def test_another_version_of_a_package_wins_in_the_task(cloud, user):
    wheel(cloud.bucket, "six", "0.1")
    command = f"pip install -q --no-deps {user} /gcs/bucket/six-0.1-py3-none-any.whl"
    status, said = cloud.run("sh", "-c", f"{command}; python3 -c 'import six; print(six.__version__)'")
    assert (status, said.split()[-1]) == (0, "0.1"), said
    assert cloud.python("import six; print(six.__version__)") != "0.1"


@plain
def test_sources_replace_an_installed_package_of_the_same_version(cloud):
    setup = "from setuptools import setup; setup(name='job', version='1', py_modules=['job'])"
    said = ""
    for number in range(2):
        source(cloud.bucket, f"job-1-{number}", **{"setup.py": setup, "job.py": f"print('job', {number})"})
        said += f"pip install -q --no-build-isolation /gcs/bucket/job-1-{number}.tar.gz && python3 -m job && "
    assert cloud.run("sh", "-c", f"{said} true") == (0, "job 0\njob 1\n")


@plain
def test_the_rest_of_pip_is_as_ever(cloud):
    wheel(cloud.bucket, "tiny")
    said = cloud.python(
        """
        import subprocess, sys
        import pip
        from pip._internal.cli.main import main
        assert main(["install", "-q", "/gcs/bucket/tiny-1.0-py3-none-any.whl"]) == 0
        for words in ("--version", "list", "show -f tiny", "uninstall -y tiny", "uninstall -y six", "check --help"):
            print(words, subprocess.run(["pip", *words.split()], check=True, capture_output=True, text=True).stdout)
        print("this is", pip.__version__)
        """
    )
    version = importlib.metadata.version("pip")
    assert f"--version pip {version} from" in said
    assert f"this is {version}" in said
    assert re.search(r"^numpy +\d", said, re.MULTILINE)
    assert "Successfully uninstalled tiny-1.0" in said
    assert "Can't uninstall 'six'" in said


# What a task finds


def test_a_task_has_an_environment_of_its_own(cloud, monkeypatch):
    monkeypatch.setenv("SECRET", "of this machine")
    monkeypatch.setenv("LANG", "C.UTF-8")
    task = cloud.task("python3", "-c", "import os, sys; print(repr([dict(os.environ), sys.path, os.getcwd()]))")
    job = {"HOME": "/root", "PATH": "/opt/conda/bin", "PIP_REQUIRE_VIRTUALENV": "0", "AIP_MODEL_DIR": "gs://b/model/"}
    sandbox.start(task := cloud.task(*task.command, environment=job)).wait()
    found, path, folder = eval(task.log.read_text())
    assert found["AIP_MODEL_DIR"] == "gs://b/model/"
    assert found["LANG"] == "C.UTF-8"
    assert "SECRET" not in found
    # What protects the machine is not the job's to change.
    assert found["PIP_REQUIRE_VIRTUALENV"] == "1"
    assert found["PATH"] == f"{task.venv}/bin:/opt/conda/bin"
    assert found["HOME"] == folder == str(task.home)
    assert found["PYTHONUSERBASE"].startswith(str(task.home))
    # Its own packages, the user's, the course's, and none of the machine's.
    assert MACHINE not in path
    own, user, *rest = [entry for entry in path if entry and not entry.startswith(sys.base_prefix)]
    assert own.startswith(str(task.venv))
    assert user.startswith(str(task.home))
    assert rest == [str(sandbox.HELPERS.parent), *sandbox.course_packages()]


def test_the_courses_helpers_can_be_imported(cloud):
    said = cloud.python("import helpers.data; import numpy; print(helpers.__file__, numpy.__file__)")
    assert said.startswith(str(sandbox.HELPERS))
    assert sys.prefix in said


def test_a_bucket_is_a_folder_of_gcs_in_arguments_and_variables(kind, tmp_path):
    cloud = Cloud(tmp_path / "a folder; with $igns")
    (cloud.bucket / "in.txt").write_text("42")
    script = 'cat /gcs/bucket/in.txt > /gcs/bucket/out.txt; cat "$WHERE"; echo " $MODEL $LIST"'
    job = {"WHERE": "/gcs/bucket/in.txt", "MODEL": "gs://bucket/gcs/model", "LIST": '["/gcs/bucket"]'}
    status, said = cloud.run("sh", "-c", script, environment=job)
    assert status == 0, said
    assert said.startswith("42 gs://bucket/gcs/model [")
    assert (cloud.bucket / "out.txt").read_text() == "42"


@confined
def test_bubblewrap_shows_a_task_the_system_and_what_is_its_own(cloud, tmp_path):
    secret, certificates = tmp_path / "key.json", tmp_path / "ca.pem"
    secret.write_text("key")
    certificates.write_text("certificates")
    (cloud.bucket / "in").touch()
    other = cloud.task("true")
    assert sandbox.start(other).wait() == 0
    said = cloud.python(
        f"""
        import os, pathlib, subprocess
        print(pathlib.Path({str(certificates)!r}).read_text())
        print(sorted(os.listdir({str(tmp_path)!r})), os.listdir({str(cloud.tasks)!r}))
        print(os.path.exists({str(Path.home())!r} + "/.bashrc"), os.listdir("/gcs/bucket"), sorted(os.listdir("/tmp")))
        print([name for name in os.listdir("/proc") if name.isdigit()][:3])
        print([line.split()[1].strip("0") for line in open("/proc/self/status") if line.startswith("CapEff")])
        pathlib.Path("/tmp/mine").touch()
        pathlib.Path("/gcs/bucket/out").touch()
        for folder in ("/", "/usr/bin", "/etc", {sys.prefix!r}, {str(sandbox.HELPERS)!r}, {str(tmp_path)!r}):
            try:
                pathlib.Path(folder, "written").touch()
                print("wrote to", folder)
            except OSError as error:
                pass
        """,
        environment={"SSL_CERT_FILE": str(certificates), "NAME": "key.json"},
    ).splitlines()
    assert said[0] == "certificates"
    assert re.fullmatch(r"\['ca.pem', 'jobs'\] \['\w+'\]", said[1])  # one of the two tasks
    # Of /tmp only the ways to what a task needs: its own folder, and the course, wherever they are.
    needed = (tmp_path, Path(sys.prefix), Path(sys.base_prefix), sandbox.HELPERS)
    ways = sorted({path.parts[2] for path in needed if path.parts[1] == "tmp"})
    assert said[2] == f"False ['in'] {ways}"
    assert said[3] == "['1', '2']"
    assert said[4:] == ["['']"]
    assert (cloud.bucket / "out").exists()


@confined
def test_the_rest_of_the_clouds_folder_is_hidden_wherever_it_lies(cloud, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SYSTEM", (*sandbox.SYSTEM, tmp_path.parts[1]))
    said = cloud.python(f"import os; print(os.listdir({str(tmp_path.parent)!r}), os.listdir({str(tmp_path)!r}))")
    assert tmp_path.name in said
    assert said.endswith("['jobs']")


# Ends


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", 139), ("kill -KILL $$", 137), ("exec no-such-command", 127)],
)
def test_the_exit_status_is_the_commands(cloud, script, status):
    assert cloud.run("sh", "-c", script)[0] == status


def test_a_command_that_is_not_there_is_named(cloud):
    assert cloud.run("no-such-command") == (127, "no-such-command: No such file or directory\n")


def test_what_a_task_leaves_running_or_on_its_disk_goes_with_it(cloud):
    task = cloud.task("sh", "-c", f'python3 -c "{DAEMON}" {cloud.tasks} & sleep 600 & sleep 1; date > made; exit 4')
    assert sandbox.start(task).wait(timeout=60) == 4
    assert left_of(str(cloud.tasks)) == []
    assert not task.venv.exists()
    assert not task.home.exists()


def test_a_task_may_use_its_grace_to_save_what_it_has(cloud):
    code = """
        import pathlib, signal, sys, time
        def save(*_):
            time.sleep(0.5)
            pathlib.Path("/gcs/bucket/saved").touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        pathlib.Path("/gcs/bucket/ready").touch()
        time.sleep(600)
    """
    process = sandbox.start(cloud.task("python3", "-c", textwrap.dedent(code)))
    until((cloud.bucket / "ready").exists)
    process.terminate(30)
    assert process.wait(timeout=20) == 0
    assert (cloud.bucket / "saved").exists()
    process.terminate(1)  # nothing is left to end, and that is no error


STUBBORN = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run([sys.executable, "-c", {DAEMON!r}, sys.argv[1]])
subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; while :; do sleep 600; done", sys.argv[1]])
pathlib.Path("/gcs/bucket/ready").touch()
while True:
    pass
"""


@pytest.mark.parametrize("end", [lambda process: process.terminate(0.5), lambda process: process.kill()])
def test_a_stubborn_task_with_daemons_is_ended(cloud, end):
    process = sandbox.start(cloud.task("python3", "-c", STUBBORN, str(cloud.tasks)))
    until((cloud.bucket / "ready").exists)
    process.terminate(600)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    end(process)
    assert process.wait(timeout=20) == 137
    assert left_of(str(cloud.tasks)) == []


def test_nothing_outlives_a_server_that_is_killed(cloud):
    server = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from helpers.local import sandbox
folder = Path(sys.argv[1])
command = ["python3", "-c", sys.argv[2], str(folder)]
sandbox.start(sandbox.Task(folder / "jobs/1", command, {{}}, folder / "buckets", folder / "jobs/1.log")).wait()
"""
    root = sandbox.HELPERS.parent
    folder = cloud.buckets.parent
    process = subprocess.Popen([sys.executable, "-c", server, str(folder), STUBBORN], cwd=root)
    until((cloud.bucket / "ready").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_of(str(cloud.tasks)) == []


def test_a_task_cannot_empty_its_log(cloud):
    script = "echo one; echo two > /dev/stderr; echo three > /dev/stdout"
    assert cloud.run("sh", "-c", script) == (0, "one\ntwo\nthree\n")


def test_noise_and_silence_do_not_matter(cloud):
    noise = "head -c 100000000 /dev/zero; head -c 1000000 /dev/urandom; exec >&- 2>&-; echo lost; exit 5"
    task = cloud.task("sh", "-c", noise)
    assert sandbox.start(task).wait(timeout=60) == 5
    assert task.log.stat().st_size == 101_000_000


# Refusals


def test_a_folder_that_no_path_can_name_is_refused(kind, tmp_path):
    with pytest.raises(sandbox.CannotStart, match="another folder"):
        Cloud(tmp_path / "a:b").run("true")


def test_an_environment_without_pip_is_refused(cloud, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(sandbox.CannotStart, match=re.escape(sys.prefix) + ".* has no pip"):
        cloud.run("true")


def test_an_image_without_a_command_is_refused_where_no_engine_holds_it(cloud):
    with pytest.raises(sandbox.CannotStart, match=r"no command.*a/b:1.*build or pull"):
        cloud.run("--epochs=3", image="a/b:1", has_entrypoint=False)
    with pytest.raises(sandbox.CannotStart, match="no command") as caught:
        cloud.run(image="europe-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest", has_entrypoint=False)
    assert "pull" not in str(caught.value)


def test_the_log_says_that_no_engine_holds_an_image(cloud):
    status, said = cloud.run("echo", "done", image="a/b:1")
    assert status == 0
    assert said.splitlines()[0].startswith("No container engine here holds the image a/b:1")
    assert "done" in said
    assert cloud.run("echo", "done", image="gcr.io/cloud-aiplatform/training/tf:1")[1] == "done\n"


# Containers


def answers(*command):
    """Say whether a command succeeds."""
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def image(tmp_path):
    """Return the name of an image that holds a shell, whose entry point is that, where an engine runs."""
    root = tmp_path / "root"
    libraries = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True).stdout
    for file in ["/bin/sh", *re.findall(r"(/\S+) \(0x", libraries)]:
        (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file[1:])
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(root, "/")
    name = f"localhost/course-test:{uuid.uuid4().hex}"
    for engine in filter(None, map(shutil.which, ("podman", "docker"))):
        change = ["--change", 'ENTRYPOINT ["/bin/sh", "-c"]']
        runs = ["run", "--rm", "--network", "host", name, "exit 0"]
        made = [answers(engine, *words) for words in (["import", *change, str(tmp_path / "root.tar"), name], runs)]
        if all(made):
            yield name
        if any(made):
            assert answers(engine, "rmi", "--force", name)
        if all(made):
            return
    pytest.skip("no container engine runs here")


def test_an_engine_runs_the_image_that_it_holds(image, tmp_path):
    cloud, key = Cloud(tmp_path / "cloud"), tmp_path / "cloud/key.json"
    key.write_text("the key\n")
    (cloud.bucket / "in.txt").write_text("42\n")
    script = 'read a < /gcs/bucket/in.txt; read b < "$KEY"; echo "$a $b $TEXT" > /gcs/bucket/out.txt; exit 6'
    job = {"KEY": str(key), "TEXT": "two\nlines"}
    for command, has_entrypoint in ([["/bin/sh", "-c", script], True], [[script], False]):
        status, said = cloud.run(*command, image=image, has_entrypoint=has_entrypoint, environment=job)
        assert (status, said) == (6, "")
        assert (cloud.bucket / "out.txt").read_text() == "42 the key two\nlines\n"
        (cloud.bucket / "out.txt").unlink()


def test_a_container_is_ended_too(image, tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    script = "trap '' TERM; echo > /gcs/bucket/ready; while :; do :; done"
    process = sandbox.start(cloud.task("/bin/sh", "-c", script, image=image))
    until((cloud.bucket / "ready").exists)
    process.terminate(0.5)
    assert process.wait(timeout=60) == 137
    assert left_of("/gcs/bucket/ready") == []
    engine = sandbox.engine_with(image)
    listed = subprocess.run([engine, "ps", "--all", "--quiet", "--filter", f"ancestor={image}"], capture_output=True)
    assert listed.stdout == b""
