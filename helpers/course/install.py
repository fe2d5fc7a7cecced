"""The course's environment: `.venv` in its folder, made once, whole or not at all.

`ready` returns when the environment stands. A stamp, written last, says that it is whole; what has no stamp was
interrupted and is made anew. Everything here is the standard library, since nothing else is there yet.
"""

import configparser
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

from helpers.course import CourseError

NEEDED_BYTES = 5e9
EXTRA_BYTES = 5e9


def ready(root, extras=()):
    """Return the environment's Python, after making or updating the environment in the folder `root` if needed.

    `extras` are those of setup.cfg that it is to hold beside what it holds.
    """
    if not is_complete(root, extras):
        check_disk(root, NEEDED_BYTES)
        with only_one(root):
            # Another start may have finished the work while this one waited.
            if not is_complete(root, extras):
                build(root, extras)
    return python_of(root)


def inside(root, extras=()):
    """Say whether this Python is the environment's own, and the environment is whole."""
    return sys.prefix == str(root / ".venv") and is_complete(root, extras)


def python_of(root):
    """Return the path of the environment's Python, there or not."""
    return root / ".venv/bin/python"


def is_complete(root, extras=()):
    """Say whether the environment is whole, made here, and holds what its locks ask for today, with the extras."""
    stamp, held = root / ".venv/complete.json", extras_of(root)
    return stamp.exists() and held >= set(extras) and stamp.read_text() == fingerprint(root, held)


def extras_of(root):
    """Return the extras that an environment holds beside what requirements.txt lists, as its stamp tells."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # no stamp, or half of one
        return set(json.loads((root / ".venv/complete.json").read_text())["extras"])
    return set()


def lock_of(root, extra):
    """Return the file with the exact versions of an extra; raise a CourseError if the course has none of that name."""
    locks = {path.stem.removeprefix("requirements-"): path for path in root.glob("requirements-*.txt")}
    if extra not in locks:
        raise CourseError(f"--with {extra}: nothing of that name can be added; there is {', '.join(locks)}.", status=2)
    return locks[extra]


def fingerprint(root, extras=()):
    """Return what the stamp of a whole environment holds; a change in any part of it means an update."""
    locks = [root / "requirements.txt", *(lock_of(root, extra) for extra in sorted(extras))]
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    about = {"requirements": digest, "python": version_of(python_of(root)), "folder": str(root)}
    return json.dumps(about | {"extras": sorted(extras)}, indent=1)


def version_of(python):
    """Return the version of a Python that runs, None of one that does not (its base was removed or replaced)."""
    code = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def build(root, extras=()):
    """Make the environment, or bring a whole one up to date, and stamp it. An extra that it holds stays."""
    started = time.monotonic()
    extras = extras_of(root).union(extras)
    folder, python, stamp = root / ".venv", python_of(root), root / ".venv/complete.json"
    uv = shutil.which("uv")
    if stamp.exists() and version_of(python):
        say("Updating the environment in .venv, because the course changed or moved.")
    else:
        say("Setting up the course in .venv: once, a few minutes, most of them to fetch TensorFlow.")
        if folder.exists():
            say("  removing what an unfinished set-up left there")
            remove(folder)
        make_venv(folder, with_pip=not uv)
    # From here on until the new stamp an interruption leaves an environment that the next start replaces.
    stamp.unlink(missing_ok=True)
    if not uv:
        uv = folder / "bin/uv"
        if not uv.exists():
            say("  installing uv, which installs the rest")
            attempt([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], root)
    say("  installing what requirements.txt lists")
    # Without compiled bytecode the first kernels would compile TensorFlow: 16 seconds instead of 5, in each of them.
    install = [uv, "pip", "install", "--python", python, "--compile-bytecode", "-r", "requirements.txt"]
    if extras:
        install_with(extras, install, root)
    else:
        attempt(install, root)
    stamp.write_text(fingerprint(root, extras))
    say(f"Ready after {time.monotonic() - started:.0f} seconds.")


def install_with(extras, install, root):
    """Run the command that installs the course so that it installs extras too, in the versions of their locks."""
    install = [*install, "--override", "helpers/course/overrides.txt"]
    for extra in sorted(extras):
        say(f"  and with {extra}, what {lock_of(root, extra).name} lists")
        install = [*install, "--constraint", lock_of(root, extra), *wanted_by(root, extra)]
    try:
        attempt(install, root, UV_TORCH_BACKEND="cpu")
    except CourseError:
        say("  PyTorch's own index, which has builds for CPUs, does not serve; the usual build takes 4 GB")
        check_disk(root, EXTRA_BYTES)
        attempt(install, root)


def make_venv(folder, with_pip):
    """Make an empty virtual environment."""
    needed = ["venv", "ensurepip"] if with_pip else ["venv"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise CourseError(
            f"This Python ({sys.executable}) has no module {missing[0]}, with which the course makes its environment.\n"
            "On Debian and Ubuntu install it with\n"
            "    sudo apt install python3-venv\n"
            "and then run the same command again."
        )
    say(f"  making an environment of Python {'.'.join(map(str, sys.version_info[:3]))}")
    command = [sys.executable, "-m", "venv", folder]
    attempt(command if with_pip else [*command, "--without-pip"], folder.parent)


def attempt(command, root, **settings):
    """Run one step of the set-up; if it fails, raise a CourseError that ends with the tool's own last words.

    `settings` are variables for the tool, where they are not set already.
    """
    environment = settings | {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # The lock travels with the step: if this process is killed, the next one waits until the step has ended.
    run = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, errors="replace", close_fds=False
    )
    if run.returncode:
        lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        raise CourseError(
            "The set-up stopped because this step failed:\n"
            f"    {' '.join(map(str, command))}\n"
            "It needs a package index that this machine can reach: check the network, a proxy, or your own settings\n"
            "of pip and uv, and then run the same command again. The step's last words:\n"
            + "\n".join(f"    {line}" for line in lines[-4:])
        )


def remove(folder):
    """Remove a folder with all that is in it."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CourseError(
            f"{folder} could not be removed ({error}). Remove it, and then run the same command again."
        ) from None


def check_disk(folder, needed):
    """Raise a CourseError if the disk of a folder has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CourseError(
            f"The course's environment needs about {needed / 1e9:.0f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left.\nFree some space, or move the course's folder to a larger disk."
        )


@contextlib.contextmanager
def only_one(root):
    """Hold the lock on the set-up in a folder, waiting for another start that holds it."""
    try:
        lock = (root / ".venv.lock").open("w")
    except OSError as error:
        raise CourseError(
            f"The course makes its environment in its own folder, and {root} cannot be written to: {error.strerror}.\n"
            "Copy the course to a folder of yours, or use the environment that you have with --here."
        ) from None
    with lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another start is setting up .venv; waiting until it has finished.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def here(root, extras=()):
    """Make the environment that this Python runs in fit for the course and for `extras` of setup.cfg."""
    # Kernels and jobs find this folder's helpers, even if the course is installed from another folder as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = settings_of(root)
    wanted = [settings["metadata"]["name"], *requirements(settings["options"]["install_requires"])]
    for extra in extras:
        wanted += wanted_by(root, extra)
    if not (missing := [name for name in wanted if not is_installed(name)]):
        return
    target = f"{root}[{','.join(extras)}]" if extras else str(root)
    say(f"Installing the course where you are, because this is missing: {', '.join(missing)}.")
    try:
        attempt([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", target], root)
    except CourseError as error:
        raise CourseError(
            f"--here uses the environment of {sys.executable}, which lacks {', '.join(missing)}.\n"
            f"Leave --here away, and the course makes an environment of its own. {error}"
        ) from None


def wanted_by(root, extra):
    """Return the names of the distributions that an extra of setup.cfg asks for."""
    return requirements(settings_of(root)["options.extras_require"][extra])


def settings_of(root):
    """Return what setup.cfg says."""
    settings = configparser.ConfigParser()
    settings.read(root / "setup.cfg")
    return settings


def requirements(text):
    """Return the names of the distributions in a list of requirements as setup.cfg holds it."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [re.match(r"[\w.-]+", line).group() for line in lines if line]


def is_installed(name):
    """Say whether a distribution is installed in the environment of this Python."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def say(line):
    """Tell how the set-up goes, apart from what a command itself prints."""
    print(line, file=sys.stderr, flush=True)
