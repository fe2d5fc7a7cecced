"""Images: Google's table with its dates, what is refused in which words, and images of one's own."""

import ast
import configparser
import contextlib
import re
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import containers, tables

ROOT = Path(__file__).parents[1]
READ_ON = date(2026, 11, 25)
SERVING = "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"
TRAINING = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
HERE = "us-central1-docker.pkg.dev/project/repository/image:v1"


def releases():
    """Yield purpose, framework and release of the whole table."""
    for purpose in containers.PURPOSES:
        for framework, entry in tables.read("images")[purpose]["frameworks"].items():
            for release in entry["releases"]:
                yield purpose, framework, release


# The table


def test_every_image_that_the_sdk_names_for_prediction_is_in_the_table():
    from google.cloud.aiplatform.constants import prediction

    ours = {image.uri for image in containers._images("prediction")}
    theirs = {uri for uri in vars(prediction).values() if isinstance(uri, str)}
    theirs |= {
        uri
        for group in vars(prediction).values()
        if isinstance(group, list)
        for uri in group
        if isinstance(uri, str) and uri.startswith("us-docker")
    }
    missing = {uri for uri in theirs if uri.startswith("us-docker")} - ours
    assert len(theirs) > 40
    assert not missing


def test_dates_are_dates_in_the_right_order_and_images_have_one_name_each():
    names = []
    for purpose, _, release in releases():
        patches, end = tables.day(release["end_of_patches"]), tables.day(release["end_of_availability"])
        assert (patches is None) == (end is None) == (release["version"] == "nightly")
        assert patches is None or patches < end
        assert set(release["images"]) <= {"cpu", "gpu", "tpu"}
        names += [f"{purpose}/{name}" for name in release["images"].values()]
    assert len(names) == len(set(names))
    assert tables.day(tables.read("images")["date"]) <= READ_ON


def test_names_hold_their_version():
    for _, _, release in releases():
        for name in release["images"].values():
            assert release["version"].replace(".", "-") in name


def test_table_counts_the_days_that_are_left():
    frame = containers.table("prediction", on=READ_ON)
    row = frame[(frame.framework == "tensorflow") & (frame.version == "2.15")].iloc[0]
    assert (row.accelerators, row.days_left) == ("cpu, gpu", 50)
    assert row.end_of_availability == date(2027, 1, 14)
    assert frame.days_left.dropna().is_monotonic_decreasing
    assert containers.table("training", on=READ_ON).query("framework != 'ray' and days_left >= 0").empty


# One image


def test_prebuilt_is_the_newest_in_the_region():
    image = containers.prebuilt("tensorflow", purpose="prediction", region="europe-west4")
    assert image.uri == "europe-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"
    assert (image.version, image.python) == ("2.15", None)
    assert (image.end_of_patches, image.end_of_availability) == (date(2026, 7, 14), date(2027, 1, 14))
    assert containers.prebuilt("tensorflow").uri == TRAINING
    assert containers.prebuilt("tensorflow", region="me-west1").uri == TRAINING
    assert containers.prebuilt("pytorch", accelerator="gpu", version="2.2").python == "3.10"


def test_an_image_tells_what_its_dates_mean():
    image = containers.prebuilt("tensorflow", purpose="prediction")
    assert image.warning(on=date(2026, 7, 1)) == ""
    assert image.warning(on=date(2026, 8, 1)) == "It has had no security patches since 14 July 2026."
    assert "ends on 14 January 2027, in 50 days" in image.warning(on=READ_ON)
    assert image.is_available(on=date(2027, 1, 14))
    assert not image.is_available(on=date(2027, 1, 15))
    late = image.warning(on=date(2027, 1, 15))
    assert "ended on 14 January 2027, 1 days ago" in late
    assert "containers.dockerfile('prediction')" in late


def test_an_image_whose_days_are_over_is_shown_with_a_warning():
    image = containers.prebuilt("tensorflow", version="2.11")
    assert not image.is_available()
    assert "ended on 15 November 2024" in repr(image)
    assert "ended on 15 November 2024" in image._repr_html_()
    assert "no service level" in repr(containers.prebuilt("tf_opt", "prediction"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("jax",), "no prebuilt image for JAX.*containers.dockerfile"),
        (("tensorflo",), "there are tensorflow, pytorch.*Did you mean 'tensorflow'"),
        (("ray", "prediction"), "no prediction image for 'ray'"),
        (("sklearn", "prediction", "gpu"), "no sklearn image for 'gpu'; there are cpu"),
        (("tensorflow", "training", "cpu", "2.18"), "of version '2.18'; there are 2.17, 2.16"),
        (("tensorflow", "serving"), "no purpose 'serving'; there are training, prediction"),
        (("tensorflow", "training", "cpu", None, "us-centrall1"), "no region.*Did you mean 'us-central1'"),
    ],
)
def test_what_google_never_listed_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        containers.prebuilt(*arguments)


# What Vertex AI refuses


def test_check_returns_googles_image_and_accepts_your_own():
    assert containers.check(SERVING, "prediction").version == "2.15"
    assert containers.check(HERE, "prediction") is None
    for uri in (HERE, "us-docker.pkg.dev/p/r/i:v1", "python:3.12-slim", "tensorflow/tensorflow:2.21.0"):
        assert containers.check(uri, "training") is None


@pytest.mark.parametrize(
    ("uri", "purpose", "words"),
    [
        (TRAINING, "prediction", "Invalid image .* for deployment: it is one of Google's training images"),
        (SERVING, "training", "Invalid image .* for training: it is one of Google's prediction images"),
        (SERVING.replace("latest", "v1"), "prediction", f"supports no other tag.* Use {SERVING}"),
        (SERVING.removesuffix(":latest"), "prediction", "does not end with :latest"),
        (SERVING.replace("2-15", "2-21"), "prediction", "Please use a Model with a valid image: Google lists none"),
        (SERVING.replace("2-15", "2-9"), "prediction", "ended on 15 November 2024"),
        ("us-docker.pkg.dev/p/r/i:v1", "prediction", "multi-regional.*us-central1-docker.pkg.dev/PROJECT/REPOSITORY/i"),
        ("europe-west4-docker.pkg.dev/p/r/i:v1", "prediction", "in europe-west4, and the model in us-central1"),
        ("tensorflow/serving:2.19", "prediction", "in the model's region, and .* is in none"),
        ("ghcr.io/a/b:1", "training", "Artifact Registry or Docker Hub, not 'ghcr.io'"),
        ("a b", "training", "no name of an image"),
    ],
)
def test_check_refuses_in_words_that_say_what_to_do(uri, purpose, words):
    with pytest.raises(containers.ContainerError, match=words):
        containers.check(uri, purpose)


# An image of one's own


def test_dockerfile_starts_the_trainer_and_the_predictor():
    training = containers.dockerfile()
    assert training.startswith("FROM docker.io/tensorflow/tensorflow:2.21.0\n")
    assert training.endswith('ENTRYPOINT ["python", "-m", "helpers.trainer.task"]\n')
    assert "cloudml-hypertune" in training
    serving = containers.dockerfile("prediction", base="python:3.12-slim")
    assert 'ENTRYPOINT ["python", "-m", "helpers.predictor"]' in serving
    assert "'tensorflow>=2.20,<2.22'" in serving
    assert "RUN python -m pip install --no-cache-dir jax==0.10.2" in containers.dockerfile(requirements=["jax==0.10.2"])
    assert "RUN" not in containers.dockerfile(requirements=[])


def test_what_a_container_installs_is_what_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ranges = {line.split("#")[0].strip() for line in setup["options"]["install_requires"].splitlines()}
    needed = {need for needs in containers.NEEDS.values() for need in needs} | {"tensorflow>=2.20,<2.22"}
    assert needed <= ranges


def imported(module):
    """Return the modules that a file of the package imports, of the package and of others, anywhere in it."""
    file = ROOT / Path(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def with_dependencies(requirements):
    """Return the names of packages with those of all that they need."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in found:
            continue
        found.add((name, *requirement.extras))
        with contextlib.suppress(metadata.PackageNotFoundError):
            for text in metadata.requires(name) or ():
                needed = Requirement(text)
                extras = ({"extra": extra} for extra in (*requirement.extras, ""))
                if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                    waiting.append(needed)
    return {name for name, *_ in found}


@pytest.mark.parametrize("purpose", containers.PURPOSES)
def test_what_a_container_runs_finds_all_that_it_imports(purpose):
    start = containers.STARTS[purpose]
    package = ROOT / Path(*start.split(".")[:2])
    waiting = [f"helpers.{package.name}", *(f"helpers.{package.name}.{file.stem}" for file in package.glob("*.py"))]
    seen, others = set(), set()
    while waiting:
        module = waiting.pop()
        path = ROOT / Path(*module.split("."))
        if module in seen or not (path.is_dir() or path.with_suffix(".py").exists()):
            continue
        seen.add(module)
        names = imported(module)
        waiting += [name for name in names if name.startswith("helpers")]
        others |= {name for name in names if name.split(".")[0] not in {"helpers", *sys.stdlib_module_names}}
    assert start in seen
    installed = with_dependencies(["tensorflow", "torch", *containers.NEEDS[purpose]])
    providers = metadata.packages_distributions()
    for name in others:
        top = name.split(".")[0]
        # Many packages share the name google; those of Google Cloud are called as their modules are.
        found = ["-".join(name.split(".")[:3])] if top == "google" else providers.get(top, [top])
        if name.count(".") >= 2 or top != "google":
            assert {canonicalize_name(provider) for provider in found} & installed, name


def test_context_holds_all_that_the_dockerfile_copies_and_nothing_of_the_local_cloud(tmp_path):
    folder = containers.context(tmp_path / "image", requirements=["numpy"])
    assert (folder / "Dockerfile").read_text() == containers.dockerfile(requirements=["numpy"])
    assert (folder / "helpers" / "regression.py").exists()
    assert not list(folder.rglob("__pycache__"))
    assert not (folder / "helpers" / "local").exists()
    code = "from helpers import data; print(len(data.load('penguins')))"
    run = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], cwd=folder,
                         capture_output=True, text=True)  # fmt: skip
    assert run.stdout == "344\n", run.stderr


def test_build_commands_name_the_image_that_an_endpoint_accepts():
    commands = containers.build_commands("my-project", "europe-west4", "course", "trainer", "v1", "output/a b")
    assert [command.split()[1] for command in commands] == ["artifacts", "auth", "builds"]
    assert all(command.endswith("--project=my-project") for command in commands)
    assert "'output/a b'" in commands[2]
    uri = re.search(r"--tag=([^ ']+)", containers.build_commands("p", "europe-west4", "r", "i", "v1")[2])[1]
    assert containers.check(uri, "prediction", "europe-west4") is None
    with pytest.raises(ValueError, match="no region 'us'"):
        containers.build_commands("p", "us", "r", "i", "v1")


def answers(engine):
    """Say whether an engine can build here, without an image from elsewhere."""
    try:
        return subprocess.run([engine, "info"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture(params=containers.ENGINES)
def engine(request):
    """Return each engine that answers here."""
    if not answers(request.param):
        pytest.skip(f"{request.param} does not answer here")
    return request.param


def test_an_engine_builds_a_folder_and_says_why_it_could_not(engine, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    assert containers.build(tmp_path, "course-test-image", engine) == "course-test-image"
    try:
        with pytest.raises(containers.ContainerError, match=f"{engine} run ended with status 12[5-7]"):
            containers.run("course-test-image", "/nothing", engine=engine)
    finally:
        subprocess.run([engine, "rmi", "--force", "course-test-image"], capture_output=True)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY missing /\n")
    with pytest.raises(containers.ContainerError, match=r"(?s)build ended with status.*missing"):
        containers.build(tmp_path, "course-test-image", engine)


def test_local_engine_is_one_that_starts_containers():
    engine = containers.local_engine()
    assert engine in (None, *containers.ENGINES)
    if engine is None:
        with pytest.raises(containers.ContainerError, match=r"Cloud Build instead: containers.build_commands"):
            containers.run("anything")
    else:
        assert answers(engine)


def test_a_rehearsal_tells_what_the_container_said_or_why_there_is_none(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY missing /\n")
    tried = containers.rehearse(tmp_path, "course-test-image")
    assert not tried.worked
    if tried.engine:
        assert re.search(rf"(?s){tried.engine} build ended with status.*missing", tried.said)
    else:
        assert [line.partition(":")[0] for line in tried.said.splitlines()] == list(containers.ENGINES)
        assert "no container was built or run here" in repr(tried)
    assert "Cloud Build" in repr(tried)


def test_what_takes_too_long_is_stopped():
    with pytest.raises(containers.ContainerError, match="sleep 60 was stopped after 1 seconds: give it more"):
        containers._execute("sleep", ["60"], seconds=1)


# Version skew


def test_version_skew_tells_what_was_measured_and_refuses_to_guess():
    frame = containers.version_skew("2.21.0", "2.15.1")
    works = dict(zip(frame.artefact, frame.works, strict=True))
    assert works["model.export(folder), TensorFlow backend"]
    assert not works["model.export(folder), JAX backend"]
    assert frame[~frame.works].result.str.contains("Cannot deserialize computation|Unrecognized keyword").all()
    assert frame.attrs["writes_with"].startswith("TensorFlow 2.21.0")
    with pytest.raises(ValueError, match=r"2\.17 reading what 2\.21 saved was not measured.*2\.21 read by 2\.15"):
        containers.version_skew("2.21", "2.17")
