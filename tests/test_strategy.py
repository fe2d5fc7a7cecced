"""Strategies: what is chosen where, what is refused, and that the objects train as one device does."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from helpers import hardware, strategy
from helpers.local.runner import free_port

ROOT = Path(__file__).parents[1]
TOLD = ("TF_CONFIG", "CLUSTER_SPEC", "VERTEX_PRODUCT", "COLAB_RELEASE_TAG", "XLA_FLAGS", "KERAS_BACKEND", "AIP_MODE")
IDS = {name: pci for pci, name in hardware.tables.read("machines")["pci"].items()}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that lays out what Linux tells of a machine's GPUs and TPUs, with none before it is called."""
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "PCI", tmp_path / "pci")
    monkeypatch.setattr(hardware, "NVIDIA_FACTS", tmp_path / "nvidia")
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi

    def lay_out(*accelerators):
        for number, name in enumerate(accelerators):
            words = ("0x1ae0", IDS[name], "0x120000") if name in IDS else ("0x10de", "0x1eb8", "0x030200")
            folder = tmp_path / f"pci/0000:00:{number:02}.0"
            folder.mkdir(parents=True)
            for file, word in zip(("vendor", "device", "class"), words, strict=True):
                (folder / file).write_text(word)
            if name not in IDS:
                (tmp_path / f"nvidia/{number}").mkdir(parents=True)
                (tmp_path / f"nvidia/{number}/information").write_text(f"Model: \t\t {name}\n")

    return lay_out


@pytest.fixture
def with_libtpu(tmp_path, monkeypatch):
    """Install what JAX and TensorFlow need for a TPU, as far as one can look without loading it."""
    (tmp_path / "site/libtpu").mkdir(parents=True)
    (tmp_path / "site/libtpu/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture(autouse=True)
def silent_metadata_server(monkeypatch):
    """Be the metadata server: one that accepts and never answers. Nobody may have asked it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"):
            monkeypatch.setenv(name, f"127.0.0.1:{server.getsockname()[1]}")
        yield
        server.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            pytest.fail(f"the metadata server was asked by {server.accept()[1]}")


def run(*programs, **environments):
    """Run Python programs at once, each with variables of its own; return what they printed as JSON."""
    path = {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "import helpers, json\n" + textwrap.dedent(program)],
            env={**os.environ, **path, **environments.get(f"of_{number}", {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, program in enumerate(programs)
    ]
    ends = [process.communicate(timeout=180) for process in started]
    assert all(process.returncode == 0 for process in started), ends
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def cluster(*tasks):
    """Return the TF_CONFIG of each task of a cluster on this machine."""
    roles = {}
    for role, _ in tasks:
        roles.setdefault(role, []).append(f"127.0.0.1:{free_port()}")
    return [json.dumps({"cluster": roles, "task": {"type": role, "index": index}}) for role, index in tasks]


# What is chosen


def test_a_machine_without_accelerators_needs_no_strategy(machine):
    choice = strategy.choose("tensorflow", want="CPU", count=1)
    assert (choice.kind, choice.devices, choice.name, choice.limits) == ("CPU", 1, "none is needed", ())
    assert "n1-standard-4 with 1 T4" in repr(choice)
    assert "laptop" in repr(choice) or "Compute Engine" in repr(choice)
    assert "<table>" in choice._repr_html_()


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ("Workbench", {"VERTEX_PRODUCT": "WORKBENCH_INSTANCE"}),
        ("Colab Enterprise", {"VERTEX_PRODUCT": "COLAB_ENTERPRISE"}),
        ("Colab", {"COLAB_RELEASE_TAG": "release-colab"}),
        ("training job", {"CLOUD_ML_JOB_ID": "1"}),
    ],
)
def test_the_place_is_told_and_claims_no_accelerator(machine, monkeypatch, place, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    choice = strategy.choose("tensorflow")
    assert choice.kind == "CPU"
    assert f"{place}, " in repr(choice)
    assert "no GPU and no TPU" in repr(choice)


def test_colabs_tpu_runtime_has_no_tensorflow(machine, monkeypatch, with_libtpu):
    machine("TPU v5e")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as Python sees a package that is not there
    choice = strategy.choose()
    assert (choice.backend, choice.kind, choice.devices) == ("jax", "TPU", 1)
    assert choice.limits == (strategy.NO_TENSORFLOW,)
    with pytest.raises(strategy.StrategyError, match="TensorFlow is not installed here"):
        strategy.choose("tensorflow")


@pytest.mark.parametrize(("backend", "name"), [("tensorflow", "tf.distribute.TPUStrategy"), ("jax", "DataParallel")])
def test_a_tpu_is_taken_whole(machine, with_libtpu, backend, name):
    machine(*["TPU v5e"] * 4)
    for choice in (strategy.choose(backend), strategy.choose(backend, want="TPU v5e", count=2)):
        assert (choice.kind, choice.devices) == ("TPU", 4)
        assert name in choice.name
    assert "4 TPU chips" in repr(choice)
    assert "with 2x4 TPU v5e" in repr(choice), "what it would need to go further"


def test_what_tensorflow_cannot_use_is_said_and_not_used(machine, with_libtpu):
    machine("TPU v6e")
    choice = strategy.choose("tensorflow")
    assert choice.kind == "CPU"
    assert "TensorFlow cannot use what is here, TPU v6e: from v6e on, TPUs are for JAX" in choice.limits
    with pytest.raises(strategy.StrategyError, match="TPUs are for JAX"):
        strategy.choose("tensorflow", want="TPU")
    assert strategy.choose("jax").kind == "TPU"


def test_a_tpu_without_its_library_is_not_claimed(machine):
    machine("TPU v5e")
    choice = strategy.choose("jax")
    assert choice.kind == "CPU"
    assert "libtpu" in choice.limits[0]


def test_a_gpu_that_the_framework_does_not_find_is_not_claimed(machine):
    machine("Tesla T4")
    choice = strategy.choose("tensorflow")
    assert choice.kind == "CPU"
    assert "TensorFlow cannot use what is here, Tesla T4: look at its driver" in choice.limits[0]
    with pytest.raises(strategy.StrategyError, match=r"tensorflow\[and-cuda\]"):
        strategy.choose("tensorflow", want="GPU")


@pytest.mark.parametrize(("count", "name"), [(1, "none is needed"), (8, "tf.distribute.MirroredStrategy")])
def test_gpus_that_the_framework_finds_are_all_taken(machine, monkeypatch, count, name):
    machine(*["NVIDIA L4"] * count)
    monkeypatch.setattr(strategy, "_gpus_of", lambda backend: count)  # no GPU is here to be found
    choice = strategy.choose("tensorflow", want="L4")
    assert (choice.kind, choice.devices, choice.name) == ("GPU", count, name)
    assert strategy.choose("tensorflow").kind == "GPU"
    assert strategy.choose("tensorflow", count=1).devices == 1
    assert strategy.choose("tensorflow", want="CPU").kind == "CPU"
    assert ("weight" in repr(choice)) == (count > 1), "rows that are shared unevenly"
    with pytest.raises(strategy.StrategyError, match=r"finds no T4 here.*NVIDIA L4.*n1-standard-4 with 1 T4"):
        strategy.choose("tensorflow", want="T4")


@pytest.mark.parametrize("variable", ["TF_CONFIG", "CLUSTER_SPEC"])
def test_a_worker_knows_the_others(machine, monkeypatch, variable):
    roles = {"TF_CONFIG": ("chief", "worker"), "CLUSTER_SPEC": ("workerpool0", "workerpool1")}[variable]
    spec = {"cluster": {role: ["10.0.0.9:2222"] for role in roles}, "task": {"type": roles[1], "index": 0}}
    monkeypatch.setenv(variable, json.dumps(spec))
    choice = strategy.choose("tensorflow")
    assert (choice.name, choice.rank) == ("tf.distribute.MultiWorkerMirroredStrategy", 1)
    assert "64 are 32 for each of 2 devices" in repr(choice)
    assert strategy.NO_FIT in choice.limits
    assert strategy.COPIES in strategy.choose("jax").limits


def test_a_job_of_one_replica_is_one_device(machine, monkeypatch):
    spec = {"cluster": {"workerpool0": ["10.0.0.9:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec))
    assert strategy.choose("tensorflow", want="CPU", count=1).name == "none is needed"


def test_it_takes_milliseconds_and_starts_no_framework(machine):
    """In a process of its own: another test may have imported a framework into this one."""
    program = """
        import sys, time
        from helpers import strategy
        start = time.perf_counter()
        choices = strategy.choose("tensorflow"), strategy.choose("jax")
        shown = repr(choices)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, sorted({"tensorflow", "jax", "keras"} & set(sys.modules))]))
    """
    [(seconds, started)] = run(program)
    assert started == []
    assert seconds < 2, "some milliseconds, on a machine with nothing else to do"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"want": "T4", "count": 2},
            "fewer than 2 T4 here .*no GPU.*machine types that have it: n1-standard-4 with 2 T4",
        ),
        ({"want": "L4", "count": 4}, "g2-standard-48 with 4 L4"),
        ({"want": "GPU", "count": 16}, "a2-megagpu-16g with 16 A100"),
        ({"want": "GPU", "count": 64}, "no machine type of Vertex AI has as many"),
        ({"want": "TPU"}, "ct5lp-hightpu-1t with 1x1 TPU v5e"),
        ({"want": "TPU", "backend": "jax"}, "tpu7x-standard-4t with 2x2x1 TPU7x"),
        ({"want": "TPU v5e", "count": 16}, "ct5lp-hightpu-4t with 4x4 TPU v5e"),
        ({"want": "NVIDIA_H100_80GB"}, "a3-highgpu-1g"),
        ({"want": "CPU", "count": 99}, r"strategy.simulate\(99, 'tensorflow'\)"),
        ({"count": 99, "backend": "jax"}, r"strategy.simulate\(99, 'jax'\)"),
        ({"backend": "torch"}, "there are tensorflow, jax"),
    ],
)
def test_what_is_not_there_is_refused_with_the_machine_that_has_it(machine, arguments, words):
    with pytest.raises(strategy.StrategyError, match=words):
        strategy.choose(**{"backend": "tensorflow", **arguments})


def test_tensorflow_is_not_sent_to_tpus_that_it_cannot_use(machine):
    with pytest.raises(strategy.StrategyError) as refusal:
        strategy.choose("tensorflow", want="TPU")
    assert "v6e" not in str(refusal.value)


def test_an_unknown_accelerator_is_answered_with_the_nearest(machine):
    with pytest.raises(ValueError, match="Did you mean 'T4'"):
        strategy.choose("tensorflow", want="TT4")


# That it trains


TRAIN = """
    import keras, numpy as np
    from helpers import strategy
    strategy.simulate(4)
    strategy.simulate(4)  # again is no mistake

    rows = np.random.default_rng(0).normal(size=(72, 5)).astype("float32")
    losses = []
    for count in (1, 2, 3):
        with strategy.choose(count=count).scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
            model.compile("adam", "mse")
            losses.append(model.fit(rows, rows[:, :1] ** 2, 24, 3, verbose=0, shuffle=False).history["loss"])
    choice = strategy.choose()
    try:
        strategy.simulate(2)
    except strategy.StrategyError as late:
        print(json.dumps([losses, choice.devices, type(choice.strategy).__name__, str(late)]))
"""


@pytest.mark.parametrize(("backend", "name"), [("tensorflow", "MirroredStrategy"), ("jax", "DataParallel")])
def test_logical_devices_train_as_one_does_and_cannot_come_late(machine, backend, name):
    [(losses, devices, found, late)] = run(TRAIN, of_0={"KERAS_BACKEND": backend})
    assert (devices, found) == (4, name)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    assert "Restart the kernel and call strategy.simulate(2)" in late


def test_what_would_do_nothing_is_refused(machine):
    import keras

    assert keras.backend.backend() == "tensorflow"
    with pytest.raises(strategy.StrategyError, match="does nothing on TensorFlow"):
        strategy.choose("jax").strategy  # noqa: B018
    with pytest.raises(strategy.StrategyError, match="A mesh is for JAX"):
        strategy.choose("tensorflow").mesh  # noqa: B018


def test_workers_of_a_job_meet(machine):
    program = """
        import tensorflow as tf
        from helpers import strategy
        choice = strategy.choose("tensorflow")
        parts = choice.strategy.run(lambda: tf.constant(choice.rank + 1.0))
        print(json.dumps([float(choice.strategy.reduce("SUM", parts, axis=None)), choice.shares]))
    """
    first, second = cluster(("chief", 0), ("worker", 0))
    found = run(program, program, of_0={"TF_CONFIG": first}, of_1={"TF_CONFIG": second})
    assert found == [[3, 2], [3, 2]]


def test_processes_of_jax_meet(machine):
    program = """
        from helpers import strategy
        mesh = strategy.choose("jax").mesh
        print(json.dumps(mesh.devices.size))
    """
    first, second = cluster(("chief", 0), ("worker", 0))
    assert run(program, program, of_0={"TF_CONFIG": first}, of_1={"TF_CONFIG": second}) == [2, 2]


def test_it_answers_at_once_beside_a_metadata_server_that_never_does(machine, with_libtpu):
    machine("TPU v5e")
    start = time.perf_counter()
    for backend in strategy.BACKENDS:
        repr(strategy.choose(backend))
        with pytest.raises(strategy.StrategyError):
            strategy.choose(backend, want="T4")
    assert time.perf_counter() - start < 10
