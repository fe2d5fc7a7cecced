"""Looking after the local cloud from the command line: `python3 -m helpers cloud status|stop|reset|logs|doctor`."""

import os
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.local import client

NEEDED_BYTES = 2e9
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
LOG_LINES = 200


def status(name: str | None = None) -> int:
    """Print whether the local cloud runs, and what it holds."""
    place = client.folder()
    found = client.address(place)
    if found:
        minutes = (time.time() - found["started"]) / 60
        print(f"The local cloud runs: process {found['pid']}, port {found['port']}, for {minutes:.0f} min.")
    else:
        print("The local cloud does not run. environment.connect() starts it.")
    print(
        f"Its folder is {place}" + (f", {size_of(place) / 1e6:.0f} MB." if place.exists() else ", which is not there.")
    )
    if (place / "state.sqlite").exists():
        for line in contents(place):
            print(f"  {line}")
    return 0


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def contents(place: Path) -> Iterator[str]:
    """Return lines about what the local cloud holds: what runs first, then how much there is of each kind."""
    from google.cloud.aiplatform_v1 import types

    from helpers.local.store import Store

    store = Store(place / "state.sqlite")
    try:
        for endpoint in store.all("endpoints"):
            for deployed in endpoint.deployed_models:
                yield f"serves {deployed.display_name} on the endpoint {endpoint.display_name} (id {deployed.id})"
        for collection, states in (
            ("customJobs", types.JobState),
            ("trainingPipelines", types.PipelineState),
            ("hyperparameterTuningJobs", types.JobState),
            ("batchPredictionJobs", types.JobState),
        ):
            for job in store.all(collection):
                state = states(job.state).name.rpartition("_STATE_")[2]
                if state not in ENDED:
                    yield f"runs {collection[:-1]} {job.display_name} (id {job.name.rsplit('/', 1)[1]}), {state}"
        rows = store.sql("SELECT collection, count(*) FROM resources GROUP BY collection ORDER BY collection")
        kinds = [f"{count} {collection}" for collection, count in rows if collection != "operations"]
        buckets = [path.name for path in sorted((place / "buckets").iterdir()) if path.is_dir()]
        yield "holds " + (", ".join(kinds) or "no resources") + f"; buckets: {', '.join(buckets) or 'none'}"
    finally:
        store.close()


def stop(name: str | None = None) -> int:
    """End the server; what it holds stays."""
    print("The local cloud has ended." if client.stop(client.folder()) else "The local cloud did not run.")
    return 0


def reset(name: str | None = None) -> int:
    """End the server and remove all that it holds."""
    place = client.folder()
    client.reset(place)
    print(f"The local cloud is empty: {place} is removed.")
    return 0


def logs(name: str | None = None) -> int:
    """Print the end of the server's log, or the logs of the job or the model server whose id begins with `name`."""
    place = client.folder()
    if name is None:
        found = [place / "server.log"]
    else:
        found = [
            path
            for folder in ("jobs", "serving")
            for path in sorted((place / folder).rglob("*.log"))
            if name in (path.stem, *path.relative_to(place).parts[1:2]) or path.stem.startswith(name)
        ]
    found = [path for path in found if path.is_file()]
    if not found:
        print(f"There is no log of {name!r} in {place}: give the id of a job or of a deployed model, as status has it.")
        return 1
    for path in found:
        if len(found) > 1:
            print(f"== {path.relative_to(place)}")
        lines = path.read_text(errors="replace").splitlines()
        print("\n".join(lines[-LOG_LINES:] if name is None else lines))
    return 0


def doctor(name: str | None = None) -> int:
    """Check what the local cloud needs; print a line for each, and what to do about what is wrong."""
    place = client.folder()
    failed = 0
    for check in (check_folder, check_disk, check_pip, check_isolation, check_server):
        good, words = check(place)
        failed += not good
        print(f"{'ok  ' if good else 'FIX '} {words}")
    return 1 if failed else 0


def check_folder(place: Path) -> tuple[bool, str]:
    """Say whether the folder can be written to."""
    there = place if place.exists() else place.parent
    if os.access(there, os.W_OK):
        return True, f"the folder {place} can be written to"
    return False, f"{there} cannot be written to: set LOCAL_CLOUD_FOLDER to a folder of yours"


def check_disk(place: Path) -> tuple[bool, str]:
    """Say whether the disk has room."""
    free = shutil.disk_usage(place if place.exists() else place.parent).free
    words = f"the disk has {free / 1e9:.1f} GB left"
    return free >= NEEDED_BYTES, words if free >= NEEDED_BYTES else f"{words}: free {NEEDED_BYTES / 1e9:.0f} GB"


def check_pip(place: Path) -> tuple[bool, str]:
    """Say whether jobs can install packages."""
    import importlib.util

    if importlib.util.find_spec("pip"):
        return True, "jobs can install packages (pip is there)"
    return False, "the environment has no pip, which jobs need: run python3 -m helpers course once, it updates .venv"


def check_isolation(place: Path) -> tuple[bool, str]:
    """Say how jobs are kept apart from the machine."""
    from helpers.local import sandbox

    if sandbox.bubblewrap_works():
        return True, "bubblewrap confines jobs: they see /gcs, and the machine read-only"
    return (
        True,
        "jobs have their own environment and home (with bubblewrap installed they would see less of the machine)",
    )


def check_server(place: Path) -> tuple[bool, str]:
    """Say whether a server that has the folder answers."""
    if not client.is_running(place):
        return True, "no server runs; environment.connect() starts one"
    found = client.address(place)
    if found is None:
        return False, f"a server has the folder and has not started within its time: see {place / 'server.log'}"
    try:
        with socket.create_connection(("127.0.0.1", found["port"]), timeout=5) as connection:
            connection.sendall(b"CONNECT storage.googleapis.com:443 HTTP/1.1\r\n\r\n")
            connection.recv(1024)
            trusted = ssl.create_default_context(cafile=str(place / "identity/ca.pem"))
            with trusted.wrap_socket(connection, server_hostname="storage.googleapis.com") as secure:
                secure.sendall(
                    b"GET /storage/v1/b HTTP/1.1\r\nHost: storage.googleapis.com\r\nConnection: close\r\n\r\n"
                )
                answer = secure.recv(1024)
    except OSError as error:
        return False, f"the server (process {found['pid']}) does not answer ({error}): python3 -m helpers cloud stop"
    if b" 401 " not in answer.split(b"\r\n", 1)[0]:
        return False, f"the server answers a stranger with {answer[:60]!r}: python3 -m helpers cloud stop"
    return True, f"the server answers on port {found['port']}, and lets no stranger in"
