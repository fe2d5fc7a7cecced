"""Where this code runs, and which cloud it talks to: the one line that decides it.

    cloud = environment.connect()                     # the local cloud on this machine, no account needed
    cloud = environment.connect(project="my-project") # Google Cloud

After that the SDKs are used as Google documents them: plain `aiplatform`, `storage`, `bigquery` and TensorFlow's
`gs://` paths, here, in subprocesses and in jobs.
"""

import contextlib
import html
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import costs, tables

# The order matters: the most telling sign first. Names and signs: docs.cloud.google.com and the SDK's own detection.
PLACES = (
    ("prediction container", lambda env: env.get("AIP_MODE") == "PREDICTION"),
    (
        "training job",
        lambda env: any(env.get(name) for name in ("CLOUD_ML_JOB_ID", "CLUSTER_SPEC", "CLOUD_ML_PROJECT_ID")),
    ),
    ("Colab Enterprise", lambda env: env.get("VERTEX_PRODUCT") == "COLAB_ENTERPRISE"),
    ("Workbench", lambda env: env.get("VERTEX_PRODUCT", "").startswith("WORKBENCH")),
    ("Colab", lambda env: "COLAB_RELEASE_TAG" in env),
    (
        "Cloud Shell",
        lambda env: "true" in (env.get("CLOUD_SHELL"), env.get("GOOGLE_CLOUD_SHELL")) or "DEVSHELL_PROJECT_ID" in env,
    ),
)
MACHINE_NAME = Path("/sys/class/dmi/id/product_name")


class ConnectError(RuntimeError):
    """The cloud that was asked for cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Cloud:
    """The cloud that this process talks to. It shows itself with what runs there and what that costs.

    Attributes: `is_local`; `project`, its id; `region`; `bucket`, a gs:// URI for what jobs read and write.
    """

    is_local: bool
    project: str
    region: str
    bucket: str

    @property
    def where(self) -> str:
        """Return what the cloud is, in words."""
        return "the local cloud on this machine" if self.is_local else "Google Cloud"

    def _facts(self) -> list[tuple[str, str]]:
        running = costs.running(self.project, self.region)
        lines = [("cloud", self.where), ("project", self.project), ("region", self.region), ("bucket", self.bucket)]
        return [*lines, ("running", costs.summary(running, self.is_local))]

    def __repr__(self) -> str:
        """Return the facts as lines."""
        return "\n".join(f"{name:8} {value}" for name, value in self._facts())

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in self._facts()
        )
        return f"<table>{rows}</table>"


def where_am_i() -> str:
    """Return what kind of place this code runs in, in well under a millisecond and without asking the network.

    One of "prediction container", "training job", "Colab Enterprise", "Workbench", "Colab", "Cloud Shell",
    "Compute Engine", "laptop" (which stands for any other machine).
    """
    for place, is_here in PLACES:
        if is_here(os.environ):
            return place
    try:
        is_google = MACHINE_NAME.read_text().startswith("Google")
    except OSError:
        is_google = False
    return "Compute Engine" if is_google else "laptop"


def notebooks():
    """Return where Google Cloud runs a notebook, Colab Enterprise or Workbench, as a DataFrame: a row for each need.

    The column `better` names the one that serves a need better; it is empty where neither does.
    """
    import pandas as pd

    return pd.DataFrame(tables.read("notebooks")["needs"]).set_index("need")


def connect(project: str | None = None, region: str = "us-central1") -> Cloud:
    """Lead this process to a cloud and return it: Google Cloud with a `project`, else the local one.

    The SDK is initialised with the project, the region and a bucket in that region, which is made if it is not there.
    Raises ConnectError if there are no credentials for the project, or the local cloud cannot start.
    """
    project, is_local = _choose(project, region)
    return _initialise(project, region, is_local)


def preflight(project: str | None = None, region: str = "us-central1"):
    """Return what jobs in a project and region would miss, each with the command that mends it: see helpers.preflight.

    It is true if nothing is missing, and shows itself as a table. Nothing is changed. Without a project it looks at
    the local cloud.
    """
    from helpers import preflight

    project, _ = _choose(project, region)
    return preflight.check(project, region, _bucket_name(project, region))


def _bucket_name(project: str, region: str) -> str:
    return f"{project}-{region}-course"


def _choose(project: str | None, region: str) -> tuple[str, bool]:
    """Lead this process to the cloud of a project, or to the local one; return its project, and whether it is local."""
    from helpers.local import PROJECT, client

    if project and project != PROJECT:
        disconnect()
        return project, False
    if client.MARK in os.environ and os.environ[client.MARK] != str(client.folder()):
        disconnect()
    place = client.folder()
    try:
        process = client.start(place)
        _import_sdk()  # takes as long as the server's start: side by side
        port = client.wait(place, process)["port"]
        _lead_to(client.variables(place, port) | {"GOOGLE_CLOUD_REGION": region})
    except client.CloudError as error:
        raise ConnectError(str(error)) from None
    return PROJECT, True


def disconnect() -> None:
    """Undo what `connect` did to this process: its environment variables and the SDK's settings are as before."""
    from helpers.local import client

    if client.MARK not in os.environ:
        return
    for name, value in json.loads(os.environ.pop(f"{client.MARK}_BEFORE")).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if "google.cloud.aiplatform" in sys.modules:
        from google.cloud.aiplatform import initializer

        initializer.global_config.__init__()


@contextlib.contextmanager
def fresh_local_cloud() -> Iterator[Path]:
    """Give what runs inside, in this process or in others, a local cloud with nothing in it; it is gone at the end.

    Where LOCAL_CLOUD_FOLDER is set, that local cloud is used instead, and stays.
    """
    from helpers.local import client

    if "LOCAL_CLOUD_FOLDER" in os.environ:
        yield client.folder()
        return
    with tempfile.TemporaryDirectory(prefix="local-cloud-", ignore_cleanup_errors=True) as scratch:
        os.environ["LOCAL_CLOUD_FOLDER"] = str(Path(scratch) / "cloud")
        try:
            yield client.folder()
        finally:
            client.reset(client.folder())
            del os.environ["LOCAL_CLOUD_FOLDER"]


def _lead_to(variables: dict[str, str]) -> None:
    """Set environment variables, remembering in one more what they were."""
    from helpers.local import client

    before = json.loads(os.environ.get(f"{client.MARK}_BEFORE", "{}"))
    for name in variables:
        before.setdefault(name, os.environ.get(name))
    os.environ.update(variables)
    os.environ[f"{client.MARK}_BEFORE"] = json.dumps(before)


def _import_sdk():
    sdk = "google.cloud.aiplatform"
    if sdk not in sys.modules:
        # It tells of every step of every call, unless its logger has a handler already: this one shows warnings.
        handler = logging.StreamHandler(sys.stdout)
        handler.setLevel(logging.WARNING)
        logging.getLogger(sdk).addHandler(handler)
    from google.cloud import aiplatform

    return aiplatform


def _initialise(project: str, region: str, is_local: bool) -> Cloud:
    import google.auth
    from google.api_core import exceptions
    from google.cloud import storage

    aiplatform = _import_sdk()
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        raise ConnectError(
            f"There are no credentials for the project {project!r}. Run\n    gcloud auth application-default login\n"
            "and connect again, or leave the project away: connect() needs no account."
        ) from None
    name = _bucket_name(project, region)
    client = storage.Client(project=project)
    try:
        bucket = client.lookup_bucket(name)
        if bucket is None:
            if not is_local:
                print(
                    f"Making the bucket gs://{name} in {region} for what jobs read and write; it is billed by its size."
                )
            bucket = client.create_bucket(name, location=region)
    except exceptions.GoogleAPIError as error:
        raise ConnectError(f"The bucket gs://{name} cannot be used: {error}") from None
    if bucket.location.lower() != region:
        raise ConnectError(
            f"The bucket gs://{name} is in {bucket.location.lower()}, and jobs in {region} need one in {region}. "
            "Delete it, or connect to its region."
        )
    aiplatform.init(project=project, location=region, staging_bucket=f"gs://{name}")
    return Cloud(is_local, project, region, f"gs://{name}")
