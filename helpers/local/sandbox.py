"""Runs a training task, which can change neither the course's environment nor this machine.

On Vertex AI a task runs in a container. Here the course's environment plays the image: every task has a virtual
environment of its own over it, a home and temporary files of its own, and, where bubblewrap works, a root of its own
too, in which it finds the system, read-only, and its buckets as /gcs. Elsewhere /gcs/ in its arguments and variables
becomes the path of the buckets. A custom image that a container engine holds is run by that engine.

Whatever a task is, a guard runs it (see guard.py), so that nothing of it outlives this process. What it leaves on its
own disk goes when it ends, as with a container; its buckets and its log stay.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import uuid
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.local import checks

HELPERS = Path(__file__).parents[1]
GUARD = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
# What a task keeps of this process's environment: language, devices, threads, and where packages come from.
KEPT = ("CUDA_", "JAX_", "LANG", "LC_", "LD_LIBRARY_PATH", "NVIDIA_", "OMP_", "OPENBLAS_", "PIP_", "TF_", "TZ", "XLA_")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as in most images
SYSTEM = ("bin", "etc", "lib*", "nix", "opt", "sbin", "sys", "usr")  # what bubblewrap shows of the root
DEVICES = ("accel*", "dri", "dxg", "kfd", "nvidia*", "vfio")  # accelerators, as they are called in /dev
PIP_SETTINGS = (".config/pip/pip.conf", ".pip/pip.conf", "Library/Application Support/pip/pip.conf")
GCS = re.compile(r"(?<![\w./-])/gcs/")  # where a path begins; gs://bucket/gcs/ is none
PROBE_SECONDS = 10


class CannotStart(Exception):  # noqa: N818 - it is an answer, not an accident
    """A task that cannot be started: why, and what to do."""


@dataclass(frozen=True)
class Task:
    """One replica of a job, or a server of models: what a container would run."""

    folder: Path  # its own: environment, home and temporary files
    command: Sequence[str]  # with its arguments
    environment: Mapping[str, str]  # what Vertex AI sets, and the job
    buckets: Path  # /gcs; beside this folder a task sees only its own, and files that its environment names
    log: Path  # gets what it prints
    packages: Sequence[Path] = ()  # files in the buckets, which pip installs before the command
    image: str = ""  # a custom image is run by a container engine that holds it
    has_entrypoint: bool = True  # False: the command is only the arguments of the image's own entry point

    @property
    def home(self) -> Path:
        """Return the folder in which it starts."""
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        """Return the folder of its temporary files, which bubblewrap shows as /tmp."""
        return self.folder / "tmp"

    @property
    def venv(self) -> Path:
        """Return the folder of its virtual environment."""
        return self.folder / "venv"

    @property
    def disk(self) -> tuple[Path, ...]:
        """Return the folders that a container would keep on its own disk."""
        return self.home, self.temporary, self.venv

    @property
    def state(self) -> Path:
        """Return the folder that holds the buckets and all else of the local cloud."""
        return self.buckets.parent

    @property
    def files(self) -> list[Path]:
        """Return the files of the local cloud that its environment names: certificates and credentials."""
        named = [Path(value) for value in self.environment.values() if Path(value).is_relative_to(self.state)]
        return [path for path in named if path.is_file() and not path.is_relative_to(self.folder)]


class Process:
    """A task that runs. Its end is the end of all that it started."""

    def __init__(self, process: subprocess.Popen):
        """Hold the process of a guard and the pipe on which its life depends."""
        self._process = process
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Return the id of the process from which all others of the task descend."""
        return self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status: 128 + n after signal n, 127 if the command was not found."""
        status = self._process.wait(timeout)
        with self._lock:
            self._process.stdin.close()
        return status if status >= 0 else 128 - status

    def terminate(self, grace: float) -> None:
        """Ask the task to end (SIGTERM) and end what is left of it after `grace` seconds. Does not wait for that."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            if not self._process.stdin.closed:
                self._process.stdin.write(f"{grace}\n".encode())

    def kill(self) -> None:
        """End the task at once."""
        self.terminate(0)


def start(task: Task) -> Process:
    """Start a task on an empty disk. CannotStart says why it cannot be."""
    is_custom = task.image and not checks.prebuilt(task.image)
    engine = engine_with(task.image) if is_custom else None
    if not (engine or task.has_entrypoint):
        raise CannotStart(
            f"the job has no command, and what the image {task.image} runs by itself is not known here. Give the job a "
            f"command{', or build or pull the image with Docker or Podman' if is_custom else ''}."
        )
    for folder in task.disk:
        shutil.rmtree(folder, ignore_errors=True)
    task.home.mkdir(parents=True, exist_ok=True)
    task.temporary.mkdir(exist_ok=True)
    if engine:
        return _launch(task, *_in_container(task, engine))
    if is_custom:
        note = f"No container engine here holds the image {task.image}: its command runs in the course's environment.\n"
        with task.log.open("a", encoding="utf-8") as log:
            log.write(note)
    _make_environment(task)
    return _launch(task, *_in_sandbox(task))


def _launch(task: Task, command: list[str], environment: dict[str, str]) -> Process:
    with task.log.open("ab") as log:
        try:
            process = subprocess.Popen(
                command,
                bufsize=0,
                cwd=task.home,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CannotStart(f"the system refused it: {error.strerror}.") from None
    return Process(process)


# The environment


def _make_environment(task: Task) -> None:
    """Make an empty virtual environment over the course's own, in which pip installs before that and never into it."""
    if importlib.util.find_spec("pip") is None:
        raise CannotStart(f"the course's environment, {sys.prefix}, has no pip, which a task needs. Install pip there.")
    try:
        # The machine's own packages stay out (see below); without the permission pip has no --user.
        venv.create(task.venv, system_site_packages=True, symlinks=True)
    except ValueError as error:
        raise CannotStart(f"{error} Keep the local cloud in another folder.") from None
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(task.venv)}))
    shutil.copytree(HELPERS / "local/task_pip", packages / "pip", ignore=shutil.ignore_patterns("__pycache__"))
    # Python runs these lines, maybe twice, with this environment's packages on its path and nothing behind them yet.
    own = "site.check_enableusersite() and site.addsitedir(site.getusersitepackages())"
    lines = ["import site, sys; site.PREFIXES[:] = [sys.prefix]"]  # no packages of the machine's own Python
    lines += [f"import site, sys; site.getusersitepackages() in sys.path or {own}"]
    for folder in (str(HELPERS.parent), *course_packages()):
        lines += [f"import site, sys; {folder!a} in sys.path or site.addsitedir({folder!a})"]
    (packages / "course.pth").write_text("\n".join(lines) + "\n")
    for name in ("pip", "pip3", f"pip3.{sys.version_info.minor}"):
        script = task.venv / "bin" / name
        script.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -P -m pip "$@"\n')
        script.chmod(0o755)


def course_packages() -> list[str]:
    """Return the folders with the packages of the course's environment, in Python's order."""
    return ([site.getusersitepackages()] if site.ENABLE_USER_SITE else []) + site.getsitepackages()


def _environment(task: Task) -> dict[str, str]:
    """Return the variables of a task, of which those that protect the machine cannot be changed by a job."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    if (settings := pip_settings()) is not None:
        kept["PIP_CONFIG_FILE"] = str(settings)
    path = f"{task.venv}/bin:{task.environment.get('PATH', PATH)}"
    for name in ("python", "python3", "pip", "pip3"):
        if shutil.which(name, path=path) != f"{task.venv}/bin/{name}":
            raise CannotStart(
                f"{name} cannot be run from {task.venv}/bin, and that of this machine must not be. "
                "Keep the local cloud in a folder that may hold programs."
            )
    return {
        **kept,
        **task.environment,
        "HOME": str(task.home),
        "PATH": path,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUSERBASE": str(task.home / ".local"),
        "TMPDIR": str(task.temporary),
        "VIRTUAL_ENV": str(task.venv),
    }


def pip_settings() -> Path | None:
    """Return the file with this user's settings of pip, such as a company's index, if there is one."""
    if "PIP_CONFIG_FILE" in os.environ:
        return Path(os.environ["PIP_CONFIG_FILE"])
    return next((path for name in PIP_SETTINGS if (path := Path.home() / name).is_file()), None)


# The sandbox


def _in_sandbox(task: Task) -> tuple[list[str], dict[str, str]]:
    """Return the guard's command and variables for a task over the course's environment."""
    environment, command = _environment(task), list(task.command)
    if task.packages:
        # As the SDK itself does it in a custom container.
        files = [f"/gcs/{path.resolve().relative_to(task.buckets.resolve())}" for path in task.packages]
        install = shlex.join(["pip3", "install", "--quiet", "--user", *files])
        command = ["sh", "-c", f"{install} && exec {shlex.join(command)}"]
    clean = ["/bin/rm", "-rf", *map(str, task.disk)]
    if bubblewrap_works():
        return [*_bubble(task), *GUARD, *clean, "--", *command], environment | {"TMPDIR": "/tmp"}
    buckets = f"{one_word(task.buckets)}/"
    environment |= {name: GCS.sub(lambda _: buckets, environment[name]) for name in task.environment}
    return [*GUARD, *clean, "--", *(GCS.sub(lambda _: buckets, word) for word in command)], environment


@functools.cache
def bubblewrap_works() -> bool:
    """Say whether bubblewrap is there and can run this Python, which it may not on every system."""
    if not shutil.which("bwrap"):
        return False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = Task(folder / "task", [], {}, folder / "buckets", folder / "log")
        for path in (task.buckets, task.temporary):
            path.mkdir(parents=True)
        return _answers([*_bubble(task), sys.executable, "-c", "import ssl"])


def _bubble(task: Task) -> list[str]:
    """Return bubblewrap's words for a root in which a task finds the system, Python, its folder and its buckets."""
    mounts = {
        Path("/proc"): ["--proc"],
        Path("/dev"): ["--dev"],
        Path("/tmp"): ["--bind", task.temporary],
        Path("/gcs"): ["--bind", task.buckets],
        task.state: ["--tmpfs"],
        task.folder: ["--bind", task.folder],
    }
    for path in (path for name in SYSTEM for path in Path("/").glob(name)):
        mounts[path] = ["--symlink", path.readlink()] if path.is_symlink() else ["--ro-bind", path]
    for path in (path for name in DEVICES for path in Path("/dev").glob(name)):
        mounts[path] = ["--dev-bind", path]
    python = [sys.prefix, sys.base_prefix, *course_packages(), HELPERS]
    # Some systems keep the addresses of name servers in /run, and a Python's prefix may be a link.
    needed = [*python, *map(os.path.realpath, (*python, "/etc/resolv.conf")), pip_settings(), *task.files]
    for path in map(Path, filter(None, needed)):
        if path.is_dir() or path.is_file():
            mounts.setdefault(path, ["--ro-bind", path])
    # Parents before what lies in them.
    words = [str(word) for path in sorted(mounts) for word in (*mounts[path], path)]
    alone = ["--unshare-pid", "--unshare-ipc", "--as-pid-1", "--cap-drop", "ALL"]
    return [shutil.which("bwrap"), *alone, *words, "--remount-ro", str(task.state), "--remount-ro", "/"]


@functools.cache
def one_word(folder: Path) -> Path:
    """Return a path of a folder that a shell takes for one word, whatever characters are in the folder's own."""
    if shlex.quote(str(folder)) == str(folder):
        return folder
    place = tempfile.TemporaryDirectory(prefix="gcs-")
    atexit.register(place.cleanup)
    link = Path(place.name) / "gcs"
    link.symlink_to(folder)
    return link


# Containers


def _in_container(task: Task, engine: str) -> tuple[list[str], dict[str, str]]:
    """Return the guard's command and variables for a task that a container engine runs."""
    name = f"task-{uuid.uuid4().hex}"
    volumes = [f"{task.buckets}:/gcs", f"{task.folder}:{task.folder}", *(f"{file}:{file}:ro" for file in task.files)]
    options = ["--rm", "--name", name, "--network", "host", "--security-opt", "label=disable"]
    options += [word for volume in volumes for word in ("--volume", volume)]
    options += [word for variable in task.environment for word in ("--env", variable)]
    words = [task.image, *task.command]
    if task.has_entrypoint:
        words = ["--entrypoint", task.command[0], task.image, *task.command[1:]]
    # The engine would keep a container whose client was killed.
    clean = [engine, "rm", "--force", name]
    return [*GUARD, *clean, "--", engine, "run", *options, *words], os.environ | task.environment


def engine_with(image: str) -> str | None:
    """Return the path of a container engine that runs and holds an image. None is fetched: that may take long."""
    engines = filter(None, map(shutil.which, ("podman", "docker")))
    return next((path for path in engines if _answers([path, "image", "inspect", image])), None)


def _answers(command: Sequence[str]) -> bool:
    """Say whether a command succeeds, within PROBE_SECONDS."""
    try:
        return subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
