"""The images that jobs and endpoints run in: Google's, with the days they end, and how to build one of your own.

    containers.prebuilt("tensorflow", purpose="prediction")   # its URI, its dates, and a warning where one has passed
    containers.table("training")                              # all of them, with the days that are left
    containers.check(uri, "prediction", "us-central1")        # refuses what Vertex AI refuses, and says what to do
    containers.context("output/trainer")                      # a folder with a Dockerfile, ready to build

Dates are Google's schedule, read on a day that the table names: the page may have moved them since.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from helpers import tables
from helpers.facts import Facts

PURPOSES = ("training", "prediction")
BASE = "docker.io/tensorflow/tensorflow:2.21.0"  # with its registry: podman has no default one
SOON = 90  # days before its end in which an image warns
SOURCE = Path(__file__).parent
NOT_IN_IMAGES = ("local", "course", "__pycache__")  # parts of this package that no job and no endpoint needs
# The package's own ranges (setup.cfg), of what runs in a container. TensorFlow, or PyTorch, comes with the base image.
NEEDS = {
    "training": (
        *("keras>=3.13,<4", "pandas>=2.2,<4", "pyarrow>=18", "cloudml-hypertune>=0.1.0.dev6"),
        "tensorboard>=2.19",  # writes the summaries
        *("jax>=0.7,<0.11.2", "optax>=0.2.5", "orbax-checkpoint>=0.11.30"),  # for helpers.trainer.task_jax
    ),
    "prediction": ("google-cloud-aiplatform[prediction]>=2.7,<3", "starlette>=0.46", "uvicorn>=0.34"),
}
STARTS = {"training": "helpers.trainer.task", "prediction": "helpers.predictor"}
PREBUILT = re.compile(
    r"(?P<location>us|europe|asia)-docker\.pkg\.dev/(?P<repository>vertex-ai(?:-restricted)?)/"
    r"(?P<purpose>training|prediction)/(?P<name>[^:@/]+)(?::(?P<tag>[^@]+))?(?P<digest>@.+)?"
)
REGISTRY = re.compile(r"(?P<location>[a-z0-9-]+)-docker\.pkg\.dev/[^/]+/[^/]+/[^:@]+(?:[:@].+)?")
ENGINES = ("docker", "podman")


class ContainerError(ValueError):
    """An image that Vertex AI would refuse, or a container engine that failed, and what to do about it."""


def _written(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


@dataclass(frozen=True, repr=False)
class Image(Facts):
    """One of Google's prebuilt images. It shows itself with a warning where one of its dates has passed.

    Attributes: `framework`, `version`, `python` (None where Google names none), `accelerator` ("cpu", "gpu", "tpu"),
    `purpose`, `uri`, and the days `end_of_patches` and `end_of_availability`, None for a nightly build.
    """

    framework: str
    version: str
    python: str | None
    accelerator: str
    purpose: str
    uri: str
    end_of_patches: date | None
    end_of_availability: date | None

    def is_available(self, on: date | None = None) -> bool:
        """Say whether Google's schedule has the image on a day, today if none is given."""
        return self.end_of_availability is None or (on or date.today()) <= self.end_of_availability

    def warning(self, on: date | None = None) -> str:
        """Return what its dates mean on a day, and what to do; empty if there is nothing to say."""
        on = on or date.today()
        if self.end_of_availability is None:
            return "A nightly build: it has no dates, and no service level is promised for it."
        own = f"Build an image of your own: containers.dockerfile({self.purpose!r})."
        left = (self.end_of_availability - on).days
        if left < 0:
            return (
                f"Its availability ended on {_written(self.end_of_availability)}, {-left} days ago: by Google's "
                f"schedule it can no longer be downloaded, and new jobs and models with it may be refused. {own}"
            )
        words = []
        if on > self.end_of_patches:
            words.append(f"It has had no security patches since {_written(self.end_of_patches)}.")
        if left <= SOON:
            words.append(f"Its availability ends on {_written(self.end_of_availability)}, in {left} days. {own}")
        return " ".join(words)

    def _facts(self) -> list[tuple[str, str]]:
        python = f", Python {self.python}" if self.python else ""
        return [
            ("image", self.uri),
            ("holds", f"{self.framework} {self.version}{python}, for {self.purpose} on {self.accelerator.upper()}"),
            ("patches", f"until {self.end_of_patches}" if self.end_of_patches else "nightly"),
            ("available", f"until {self.end_of_availability}" if self.end_of_availability else "nightly"),
            *([("warning", words)] if (words := self.warning()) else []),
        ]


def _images(purpose: str, location: str = "us") -> list[Image]:
    """Return Google's images for a purpose, the newest of each framework first."""
    return [
        Image(
            framework=framework,
            version=release["version"],
            python=release["python"],
            accelerator=accelerator,
            purpose=purpose,
            uri=f"{location}-docker.pkg.dev/{entry['repository']}/{purpose}/{name}:latest",
            end_of_patches=tables.day(release["end_of_patches"]),
            end_of_availability=tables.day(release["end_of_availability"]),
        )
        for framework, entry in tables.read("images")[purpose]["frameworks"].items()
        for release in entry["releases"]
        for accelerator, name in release["images"].items()
    ]


def prebuilt(
    framework: str,
    purpose: str = "training",
    accelerator: str = "cpu",
    version: str | None = None,
    region: str = "us",
) -> Image:
    """Return Google's image for a framework: of a version, or the newest.

    `framework` is "tensorflow", "pytorch", "sklearn", "xgboost", for training also "ray", for prediction also
    "tf_opt", the optimised TensorFlow runtime. `region` is that of the job or "us", "europe" or "asia": every copy is
    the same image. An image whose days are over is returned all the same, and says so. Raises ValueError for one that
    Google never listed.
    """
    tables.known("purpose", purpose, PURPOSES)
    locations = tables.read("images")["regions"]
    if region not in locations:
        tables.known("region", region, [*locations, *tables.read("regions")["accelerators"]])
    location = next((location for location in locations if region.startswith(location)), "us")
    if framework == "jax":
        raise ValueError(
            f"Google has no prebuilt image for JAX. Build one of your own: containers.dockerfile({purpose!r}, "
            "base='python:3.12-slim', requirements=['jax', ...])."
        )
    listed = _images(purpose, location)
    tables.known(f"{purpose} image for", framework, dict.fromkeys(image.framework for image in listed))
    listed = [image for image in listed if image.framework == framework]
    tables.known(f"{framework} image for", accelerator, dict.fromkeys(image.accelerator for image in listed))
    listed = [image for image in listed if image.accelerator == accelerator]
    if version is not None:
        versions = dict.fromkeys(image.version for image in listed)
        tables.known(f"{framework} {accelerator} image of version", version, versions)
        listed = [image for image in listed if image.version == version]
    return listed[0]


def table(purpose: str = "training", on: date | None = None):
    """Return Google's images as a DataFrame, those that last longest first, with the days left on a day (today)."""
    import pandas as pd

    tables.known("purpose", purpose, PURPOSES)
    on = on or date.today()
    rows = {}
    for image in _images(purpose):
        end = image.end_of_availability
        key = (image.framework, image.version, image.python, image.end_of_patches, end)
        rows.setdefault(key, []).append(image.accelerator)
    frame = pd.DataFrame(
        [
            {
                "framework": framework,
                "version": version,
                "python": python or "",
                "accelerators": ", ".join(accelerators),
                "end_of_patches": patches,
                "end_of_availability": end,
                "days_left": (end - on).days if end else None,
            }
            for (framework, version, python, patches, end), accelerators in rows.items()
        ]
    ).astype({"days_left": "Int64"})
    return frame.sort_values("days_left", ascending=False, kind="stable").reset_index(drop=True)


def check(uri: str, purpose: str = "training", region: str = "us-central1") -> Image | None:
    """Refuse an image that Vertex AI refuses for a purpose in a region; return Google's image, None for your own.

    Raises ContainerError for a training image that is to serve and the reverse, a prebuilt image that Google does not
    list, whose days are over or whose tag is not :latest, and a registry that the service does not read from.
    """
    tables.known("purpose", purpose, PURPOSES)
    tables.known("region", region, tables.read("regions")["accelerators"])
    if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", uri):
        raise ContainerError(f"{uri!r} is no name of an image; expected REGISTRY/PATH/NAME:TAG.")
    found = PREBUILT.fullmatch(uri)
    return _check_prebuilt(uri, found, purpose) if found else _check_own(uri, purpose, region)


def _check_prebuilt(uri: str, found: re.Match, purpose: str) -> Image:
    use = "deployment" if purpose == "prediction" else "training"
    if found["purpose"] != purpose:
        raise ContainerError(
            f"Invalid image {uri!r} for {use}: it is one of Google's {found['purpose']} images. "
            f"See containers.table({purpose!r}) for those that there are."
        )
    plain = f"{found['location']}-docker.pkg.dev/{found['repository']}/{purpose}/{found['name']}:latest"
    image = next((image for image in _images(purpose, found["location"]) if image.uri == plain), None)
    if image is None:
        raise ContainerError(
            f"Invalid image {uri!r} for {use}. Please use a Model with a valid image: Google lists none of this name. "
            f"See containers.table({purpose!r})."
        )
    if found["digest"] or found["tag"] != "latest":
        raise ContainerError(
            f"{uri!r} does not end with :latest, and Google supports no other tag of its images. Use {plain}"
        )
    if not image.is_available():
        raise ContainerError(f"Invalid image {uri!r} for {use}. {image.warning()}")
    return image


def _check_own(uri: str, purpose: str, region: str) -> None:
    host = uri.split("/")[0]
    is_docker_hub = host == "docker.io" or ("/" not in uri) or ("." not in host and ":" not in host)
    found = REGISTRY.fullmatch(uri)
    here = f"{region}-docker.pkg.dev/PROJECT/REPOSITORY/{uri.rsplit('/', 1)[-1]}"
    if purpose == "training":
        if not found and not is_docker_hub and not host.endswith("gcr.io"):
            raise ContainerError(
                f"A training job takes images from Artifact Registry or Docker Hub, not {host!r}. Push it to {here}"
            )
        return
    if not found:
        raise ContainerError(
            f"An endpoint takes its image from a repository of Artifact Registry in the model's region, and {uri!r} is "
            f"in none. Push it to {here}"
        )
    if found["location"] in tables.read("images")["regions"]:
        raise ContainerError(
            f"The repository of {uri!r} is multi-regional ({found['location']}). An endpoint takes its image from one "
            f"region, the model's. Push it to {here}"
        )
    if found["location"] != region:
        raise ContainerError(
            f"The repository of {uri!r} is in {found['location']}, and the model in {region}: they must be in the same "
            f"region. Push it to {here}"
        )


# An image of your own


def dockerfile(purpose: str = "training", base: str = BASE, requirements: Sequence[str] | None = None) -> str:
    """Return the Dockerfile of a container that trains (`helpers.trainer`) or predicts (`helpers.predictor`).

    `requirements` are what pip installs on top of `base`; without them, what the two need.
    """
    tables.known("purpose", purpose, PURPOSES)
    if requirements is None:
        framework = () if "tensorflow/tensorflow" in base else ("tensorflow>=2.20,<2.22",)
        requirements = (*framework, *NEEDS[purpose])
    install = " ".join(shlex.quote(requirement) for requirement in requirements)
    lines = [
        f"FROM {base}",
        "WORKDIR /app",
        "ENV PYTHONUNBUFFERED=1",
        *([f"RUN python -m pip install --no-cache-dir {install}"] if requirements else []),
        "COPY helpers helpers",
        f"ENTRYPOINT {json.dumps(['python', '-m', STARTS[purpose]])}",
    ]
    return "\n".join(lines) + "\n"


def context(
    folder: str | Path, purpose: str = "training", base: str = BASE, requirements: Sequence[str] | None = None
) -> Path:
    """Write a folder that an engine or Cloud Build can build: a Dockerfile and the code that it copies; return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile(purpose, base, requirements), encoding="utf-8")
    shutil.rmtree(folder / "helpers", ignore_errors=True)
    shutil.copytree(SOURCE, folder / "helpers", ignore=shutil.ignore_patterns(*NOT_IN_IMAGES))
    return folder


def image_uri(project: str, region: str, repository: str, image: str, tag: str) -> str:
    """Return the name of an image in Artifact Registry, in a region that a model there can be served from."""
    uri = f"{region}-docker.pkg.dev/{project}/{repository}/{image}:{tag}"
    check(uri, "prediction", region)
    return uri


def build_commands(
    project: str, region: str, repository: str, image: str, tag: str, folder: str | Path = "."
) -> list[str]:
    """Return the commands that make a repository, let Docker log in, and build a folder with Cloud Build.

    The first is needed once for each repository, the second only where `docker push` is used.
    """
    uri = image_uri(project, region, repository, image, tag)
    commands = (
        ("artifacts", "repositories", "create", repository, "--repository-format=docker", f"--location={region}"),
        ("auth", "configure-docker", f"{region}-docker.pkg.dev", "--quiet"),
        ("builds", "submit", str(folder), f"--tag={uri}", f"--region={region}"),
    )
    return [shlex.join(("gcloud", *command, f"--project={project}")) for command in commands]


def local_engine() -> str | None:
    """Return "docker" or "podman", whichever can start a container on this machine; None if neither can.

    Asked by starting an empty image, which takes about a second: a client that is installed may lack its daemon, and
    an engine that answers may lack the right to start anything.
    """
    return next((engine for engine in ENGINES if not _refusal(engine)), None)


def _refusal(engine: str) -> str:
    """Return what an engine says when it is to start a container; empty if it does start it."""
    if not shutil.which(engine):
        return "is not installed"
    name = "course-probe"
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.tar"
        shutil.make_archive(str(empty.with_suffix("")), "tar", folder, base_dir=".")
        try:
            done = _call(engine, "import", str(empty), name, timeout=10)
            if done.returncode == 0:
                done = _call(engine, "run", "--rm", "--network=none", name, "/nothing", timeout=10)
            # The engine's own statuses: 127 says that all went well until the program was not found in the image.
            return "" if done.returncode == 127 else _last(done, 1) or f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            return "did not answer within 10 seconds"
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _call(engine, "rmi", "--force", name, timeout=10)


def _call(engine: str, *words: str, timeout: float | None) -> subprocess.CompletedProcess:
    return subprocess.run([engine, *words], capture_output=True, text=True, timeout=timeout)


def _last(done: subprocess.CompletedProcess, lines: int) -> str:
    """Return the last lines of what a command said."""
    return "\n".join((done.stderr or done.stdout).strip().splitlines()[-lines:])


def build(folder: str | Path, image: str, engine: str | None = None, seconds: float | None = None) -> str:
    """Build a folder with a Dockerfile into an image on this machine and return its name.

    Raises ContainerError if no engine runs here, with the engine's last lines, or if it takes more than `seconds`.
    """
    _execute(engine, ("build", "--tag", image, str(folder)), seconds)
    return image


def run(
    image: str,
    *words: str,
    environment: Mapping[str, str] | None = None,
    engine: str | None = None,
    seconds: float | None = None,
) -> str:
    """Run a container to its end, with `words` after its entry point, and return what it printed.

    Raises ContainerError if no engine runs here, with the status and the last lines of a container that failed, or if
    it takes more than `seconds`.
    """
    variables = [f"--env={name}={value}" for name, value in (environment or {}).items()]
    return _execute(engine, ("run", "--rm", *variables, image, *words), seconds)


def _execute(engine: str | None, words: Sequence[str], seconds: float | None = None) -> str:
    engine = engine or local_engine()
    if engine is None:
        raise ContainerError(
            "Neither docker nor podman can start a container on this machine. Build with Cloud Build instead: "
            "containers.build_commands(...)."
        )
    try:
        done = _call(engine, *words, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ContainerError(f"{engine} {words[0]} was stopped after {seconds:.0f} seconds: give it more.") from None
    if done.returncode:
        raise ContainerError(f"{engine} {words[0]} ended with status {done.returncode}:\n{_last(done, 8)}")
    return done.stdout


@dataclass(frozen=True, repr=False)
class Rehearsal(Facts):
    """What became of an image that was to be built and run on this machine. It shows itself with what to do next.

    Attributes: `image`; `engine`, "docker" or "podman", empty if neither starts containers here; `worked`, whether the
    container ran and ended well; `said`, what it printed, or why it did not come to that.
    """

    image: str
    engine: str
    worked: bool
    said: str

    def _facts(self) -> list[tuple[str, str]]:
        following = (
            f"push it to a registry, then a job can run it; {self.engine} rmi {self.image} removes it from here"
            if self.worked
            else "build it with Cloud Build, which needs no engine here: containers.build_commands(...)"
        )
        did = "built it and ran it" if self.worked else "did not run it"
        return [
            ("image", self.image),
            ("engine", f"{self.engine} {did}" if self.engine else "none: no container was built or run here"),
            ("said", self.said),
            ("next", following),
        ]


def rehearse(folder: str | Path, image: str, *words: str, seconds: float = 240) -> Rehearsal:
    """Build a folder and run the image to its end with `words` after its entry point, where an engine can do that.

    Returns what became of it, also where there is no engine, no network for the base image, or `seconds` are too few.
    A failure of the container itself is told in the same way.
    """
    refusals = {engine: _refusal(engine) for engine in ENGINES}
    engine = next((engine for engine, words in refusals.items() if not words), None)
    if engine is None:
        return Rehearsal(image, "", False, "\n".join(f"{engine}: {words}" for engine, words in refusals.items()))
    until = time.monotonic() + seconds
    try:
        build(folder, image, engine, seconds)
        said = run(image, *words, engine=engine, seconds=max(until - time.monotonic(), 1))
    except ContainerError as error:
        return Rehearsal(image, engine, False, str(error))
    return Rehearsal(image, engine, True, said.strip())


# What one version of TensorFlow saves and another loads


def version_skew(writer: str = "2.21", reader: str = "2.15"):
    """Return what was measured when one TensorFlow loads what another saved, as a DataFrame with a row for each way.

    Versions are such as "2.21" or "2.21.0". Raises ValueError for a pair that was not measured: TensorFlow promises
    that a newer version reads an older one's files, not the reverse.
    """
    import pandas as pd

    pair = tuple(".".join(str(version).split(".")[:2]) for version in (writer, reader))
    measured = {(entry["writer"], entry["reader"]): entry for entry in tables.read("skew")["measured"]}
    if pair not in measured:
        there = "; ".join(f"{writer} read by {reader}" for writer, reader in measured)
        raise ValueError(
            f"TensorFlow {pair[1]} reading what {pair[0]} saved was not measured; measured are: {there}. TensorFlow "
            "promises that a newer version reads what an older one saved, not the reverse: try it before you deploy."
        )
    entry = measured[pair]
    frame = pd.DataFrame(entry["rows"])
    frame.attrs = {name: entry[name] for name in ("writes_with", "reads_with")} | {"date": tables.read("skew")["date"]}
    return frame
