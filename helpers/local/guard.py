"""Runs a command so that nothing of it outlives its owner: python guard.py [CLEANUP...] -- COMMAND...

The owner keeps a pipe open to this process's standard input. A line with a number of seconds ends the command, and all
that it started: SIGTERM, and after that time SIGKILL. The end of the pipe, which comes when the owner was killed too,
does the same with GRACE_SECONDS. When the command ends by itself, what it left running ends with it, as in a container.
Then CLEANUP runs, if there is one.

What the command prints comes through a pipe, as in a container: a task that opens /dev/stderr anew must not empty the
owner's log.

The exit status is the command's; 128 + n if signal n ended it, 127 if it was not found, 126 if it could not be run.
It is started for every task, so it needs the standard library alone, and it works alike as process 1 of a sandbox.
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 2
LOOK_SECONDS = 0.02  # between two looks at what still runs
LAST_SECONDS = 5  # for what even SIGKILL does not end, as a process that waits for a broken disk
CLEANUP_SECONDS = 30
PR_SET_CHILD_SUBREAPER = 36
TOLD = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main(cleanup, command):
    """Run the command, then the cleanup; return the exit status."""
    news, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    for signum in (signal.SIGCHLD, *TOLD):
        signal.signal(signum, lambda *_: None)  # it arrives as a byte in `news`
    adopt_orphans()
    output, prints = os.pipe()
    streams = {"stdin": subprocess.DEVNULL, "stdout": prints, "stderr": prints}
    try:
        child = subprocess.Popen(command, start_new_session=True, **streams)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        status = 127 if isinstance(error, FileNotFoundError) else 126
    else:
        os.close(prints)
        status = watch(child.pid, news, output)
        child.returncode = status  # reaped here, behind the back of subprocess
    if cleanup:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(cleanup, timeout=CLEANUP_SECONDS, **quiet)
    return status


def watch(child, news, output):
    """Wait until the child and all other descendants have ended, by themselves or because the owner says so."""
    owner = sys.stdin.fileno()
    sources = [owner, news, output]
    status, deadline = None, math.inf
    while True:
        ready, _, _ = select.select(sources, [], [], None if deadline == math.inf else LOOK_SECONDS)
        grace = math.inf
        if output in ready and not copy(output):
            sources.remove(output)
        if news in ready and any(signum in TOLD for signum in os.read(news, 4096)):
            grace = GRACE_SECONDS
        if owner in ready:
            word = os.read(owner, 4096)
            grace = float(word.split()[-1]) if word else GRACE_SECONDS
            if not word:
                sources.remove(owner)
        status = reap(child, status)
        now = time.monotonic()
        if grace < math.inf:
            deadline = min(deadline, now + grace)
        elif deadline == math.inf:
            if status is None:
                continue
            deadline = now
        members = descendants()
        if grace < math.inf:
            send(signal.SIGTERM, members)
        if now >= deadline:
            send(signal.SIGKILL, members)
        if not members or now > deadline + LAST_SECONDS:
            status = reap(child, status)
            os.set_blocking(output, False)
            with contextlib.suppress(BlockingIOError):
                while copy(output):
                    pass
            return 128 + signal.SIGKILL if status is None else status


def copy(output):
    """Write out what the command has printed, or drop it where that cannot be written; return it, empty at the end."""
    printed = os.read(output, 65536)
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), printed)
    return printed


def adopt_orphans():
    """Become the parent of every descendant whose own parent ends. Only Linux can do that for us; process 1 is it."""
    if sys.platform == "linux" and os.getpid() != 1:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(child, status):
    """Collect all that has ended; return the child's exit status if it is among them, otherwise `status`."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(ended)
                status = code if code >= 0 else 128 - code
    return status


def descendants():
    """Return the process ids of this process's living descendants."""
    parents = dict(processes())
    found, generation = set(), {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def processes():
    """Yield each living process with its parent, as process ids."""
    if sys.platform == "linux":
        for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib is slow to import
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:  # noqa: PTH123
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
                if state != b"Z":
                    yield int(name), int(parent)
    else:
        ps = subprocess.Popen(["/bin/ps", "-axo", "pid=,ppid=,stat="], stdout=subprocess.PIPE)
        for line in ps.communicate()[0].splitlines():
            pid, parent, state = line.split()
            if not state.startswith(b"Z") and int(pid) != ps.pid:
                yield int(pid), int(parent)


def send(signum, pids):
    """Send a signal to processes; those that have just ended, or run as somebody else, do not get it."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


if __name__ == "__main__":
    cut = sys.argv.index("--")
    sys.exit(main(sys.argv[1:cut], sys.argv[cut + 1 :]))
