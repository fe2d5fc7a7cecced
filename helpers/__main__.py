"""The front door: `python3 -m helpers`.

Written so that a Python too old for the course can read it and say so; the rest is imported after that check.
"""

import os
import re
import signal
import sys
from pathlib import Path

from helpers.course import CourseError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments):
    """Run the command in the arguments and return the exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        require_python(sys.version_info[:2], ROOT)
        status = run(arguments)
        sys.stdout.flush()
        return status
    except CourseError as error:
        print(error, file=sys.stderr)
        return error.status
    except KeyboardInterrupt as error:
        print("Stopped.", file=sys.stderr)
        return 128 + error.args[0]
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does: say no more, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"The course could not go on, because the system refused this: {error}", file=sys.stderr)
        return 1


def stop(signum, frame):
    """Turn a signal into an exception that tells which one it was."""
    raise KeyboardInterrupt(signum)


def require_python(version, root):
    """Raise a CourseError unless the setup.cfg in `root` allows a Python version, given as (major, minor)."""
    try:
        setup = (root / "setup.cfg").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CourseError(
            f"The course runs in a folder that holds all of it, and {root} has no setup.cfg.\n"
            "Get the course with git clone, and run python3 -m helpers in its folder."
        ) from None
    first, behind = map(int, re.search(r"python_requires = >=3\.(\d+),<3\.(\d+)", setup).groups())
    if not (3, first) <= version < (3, behind):
        newer = "TensorFlow has no release for a newer one yet.\n" if version >= (3, behind) else ""
        raise CourseError(
            f"This is Python {version[0]}.{version[1]}, and the course needs Python 3.{first} to 3.{behind - 1}.\n"
            f"{newer}If you have one of those, call it by its name, for example: python3.{behind - 2} -m helpers"
        )


def run(arguments):
    """Check the call, see that the environment stands, and run the command in it."""
    from helpers.course import commands, install

    here, extras, words = False, [], []
    rest = iter(arguments)
    for word in rest:
        if word == "--here":
            here = True
        elif word == "--with":
            extras.append(next(rest, ""))
            install.lock_of(ROOT, extras[-1])
        else:
            words.append(word)
    call = commands.prepare(ROOT, words)
    if here:
        install.here(ROOT, [*extras, "test"] if words[:1] == ["test"] else extras)
    elif call is not commands.show_help and not install.inside(ROOT, extras):
        python = install.ready(ROOT, extras)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, the helpers load faster in every kernel
        os.execv(str(python), [str(python), "-m", "helpers", *arguments])
    return call()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
