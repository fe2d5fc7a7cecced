"""How a process finds the local cloud: starting or joining its server, and the variables that lead the SDKs there.

Nothing here imports an SDK: the front door and the jobs use it too.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.local import PROJECT

START_SECONDS = 60
STOP_SECONDS = 15
LOG_BYTES = 5_000_000  # of the server's log before it is begun anew
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "PIP_CERT")
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "HTTPS_PROXY")
NOT_PROXIED = "127.0.0.1,localhost,::1"
MARK = "LOCAL_CLOUD"  # the folder of the local cloud that a process is led to
STARTED: list[subprocess.Popen] = []  # kept, since a process must wait for its children in the end


class CloudError(RuntimeError):
    """The local cloud cannot do what was asked, and why."""


def folder() -> Path:
    """Return the folder of the local cloud: LOCAL_CLOUD_FOLDER if it is set, else `.local-cloud` in the course's."""
    chosen = os.environ.get("LOCAL_CLOUD_FOLDER")
    return Path(chosen).expanduser().resolve() if chosen else Path(__file__).parents[2] / ".local-cloud"


def is_running(place: Path) -> bool:
    """Say whether a server has the folder."""
    try:
        lock = (place / "server.lock").open("r+")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def address(place: Path) -> dict | None:
    """Return the port, the process id and the start of the server that has the folder; None if it has none."""
    if not is_running(place):
        return None
    with contextlib.suppress(OSError, ValueError):
        return json.loads((place / "server.json").read_text())
    return None


def start(place: Path) -> subprocess.Popen | None:
    """Begin to start a server if none has the folder; return its process. `wait` says when it is there."""
    if is_running(place):
        return None
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = place / "server.log"
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        output = path.open("ab")
    except OSError as error:
        raise CloudError(
            f"The local cloud keeps its state in {place}, which cannot be written to ({error.strerror}). "
            "Set LOCAL_CLOUD_FOLDER to a folder of yours."
        ) from None
    before = original()
    proxy = next((before[name] for name in ("https_proxy", "HTTPS_PROXY") if before.get(name)), "")
    with output:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.local.server", str(place), *([proxy] if proxy else [])],
            cwd=Path(__file__).parents[2],
            env=before,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # it outlives the notebook that started it
        )
    STARTED.append(process)
    return process


def wait(place: Path, process: subprocess.Popen | None) -> dict:
    """Return the address of the server as soon as it is there."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := address(place):
            return found
        if process is None and not is_running(place):
            process = start(place)  # the server that was there has just ended
        if process and process.poll() not in (None, 75):  # 75: another start was faster
            log = place / "server.log"
            raise CloudError(f"The local cloud could not start. The last lines of {log}:\n{last_lines(place)}")
        time.sleep(0.02)
    raise CloudError(f"The local cloud did not start within {START_SECONDS} s. See {place / 'server.log'}.")


def last_lines(place: Path, count: int = 8) -> str:
    """Return the end of the server's log."""
    with contextlib.suppress(OSError):
        return "\n".join((place / "server.log").read_text(errors="replace").splitlines()[-count:])
    return "(no log)"


def original() -> dict[str, str]:
    """Return this process's environment as it was before it was led to a local cloud."""
    environment = dict(os.environ)
    saved = json.loads(environment.pop(f"{MARK}_BEFORE", "{}"))
    if environment.pop(MARK, None):
        for name, value in saved.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
    return environment


def variables(place: Path, port: int) -> dict[str, str]:
    """Return the environment variables that lead the SDKs of a process to the server of a folder, at its port.

    The certificates that this process trusts stay trusted.
    """
    base = original()
    keys = place / "identity"
    bundle = keys / "bundle.pem"
    trusted = next((base[name] for name in CA_VARIABLES if Path(base.get(name) or "/nowhere").is_file()), None)
    if trusted is None:
        import certifi

        trusted = certifi.where()
    content = Path(trusted).read_bytes().rstrip() + b"\n" + (keys / "ca.pem").read_bytes()
    if not bundle.exists() or bundle.read_bytes() != content:
        partial = bundle.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(bundle)
    proxy = f"http://127.0.0.1:{port}"
    not_proxied = ",".join(filter(None, [NOT_PROXIED, base.get("no_proxy") or base.get("NO_PROXY")]))
    return {
        **dict.fromkeys(CA_VARIABLES, str(bundle)),
        **dict.fromkeys(PROXY_VARIABLES, proxy),
        "no_proxy": not_proxied,
        "NO_PROXY": not_proxied,
        "GOOGLE_APPLICATION_CREDENTIALS": str(keys / "service-account.json"),
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "NO_GCE_CHECK": "true",  # no credentials are looked for at a metadata server
        MARK: str(place),
    }


def stop(place: Path) -> bool:
    """End the server that has the folder, with its jobs and model servers; say whether there was one."""
    found = address(place)
    if found is None:
        return False
    os.kill(found["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while is_running(place):
        if time.monotonic() > deadline:
            os.kill(found["pid"], signal.SIGKILL)
        time.sleep(0.05)
    for process in STARTED:
        process.poll()
    return True


def reset(place: Path) -> None:
    """End the server and remove all that the local cloud holds."""
    stop(place)
    if place.exists() and not (place / "server.lock").exists() and any(place.iterdir()):
        raise CloudError(f"{place} holds no local cloud, and is left as it is.")
    shutil.rmtree(place, ignore_errors=True)
