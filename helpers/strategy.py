"""Which devices train, and through which object of TensorFlow or JAX: chosen from what is there.

    choice = strategy.choose()                        # what this process has, and what follows from it
    with choice.scope(): ...                          # build, compile and fit in there
    strategy.choose(want="T4", count=2)               # refused, with the machines that have two
    strategy.simulate(4)                              # four logical CPUs, before TensorFlow has started

It looks at the system's own files and at environment variables, asks a framework only about GPUs that are there, and
never asks the network.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from helpers import environment, hardware, tables
from helpers.facts import Facts
from helpers.trainer import loop

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}
WITH_CUDA = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]"}
KINDS = ("TPU", "GPU", "CPU")  # the fastest first
FORCED = re.compile(r"--xla_force_host_platform_device_count=(\d+)")  # XLA's flag for JAX's jax_num_cpu_devices

# The limits that cost people most, each with the way round it.
NO_FIT = "Keras 3's fit refuses this strategy: use regression.fit, or a loop such as helpers.trainer.loop"
UNEVEN = "rows of a batch that divides unevenly get unequal weight in Keras' fit: drop them, or use regression.fit"
COPIES = "each process feeds its own share: with all rows in each, they train on copies of them, and nobody complains"
IDLE = "keras.distribution does nothing on TensorFlow: set KERAS_BACKEND=jax before Keras starts, or use `mesh`"
NO_TENSORFLOW = "TensorFlow is not installed (Colab's TPU runtime has none): set KERAS_BACKEND=jax before Keras starts"


class StrategyError(RuntimeError):
    """What was asked for is not there, or comes too late, and what to do."""


@dataclass(frozen=True, repr=False)
class Choice(Facts):
    """The devices that train, and the object that a framework wants for them.

    Attributes: `backend`, "tensorflow" or "jax"; `kind`, "CPU", "GPU" or "TPU"; `devices` of that kind in this process
    (chips, for TPUs); `addresses` of a job's workers, and the `rank` of this one; `seen`, what the machine has;
    `limits`, in words. `strategy` and `mesh` start the framework when they are first read.
    """

    backend: str
    kind: str
    devices: int
    addresses: tuple[str, ...]
    rank: int
    seen: hardware.Here
    limits: tuple[str, ...]

    @property
    def shares(self) -> int:
        """Return how many devices share each batch, those of all workers together."""
        return self.devices * max(1, len(self.addresses))

    @property
    def name(self) -> str:
        """Return what the framework's documentation calls the strategy."""
        if self.backend == "jax":
            return "keras.distribution.DataParallel"
        if self.kind == "TPU":
            return "tf.distribute.TPUStrategy"
        if len(self.addresses) > 1:
            return "tf.distribute.MultiWorkerMirroredStrategy"
        return "tf.distribute.MirroredStrategy" if self.devices > 1 else "none is needed"

    @property
    def why(self) -> str:
        """Return the reason in a sentence."""
        if len(self.addresses) > 1:
            return f"the job has {len(self.addresses)} workers, and this process is number {self.rank}"
        if self.kind != "CPU":
            return f"{BACKENDS[self.backend]} can use what this machine has"
        if self.devices > 1:
            return f"there are {self.devices} logical CPUs: they prove that a program is right, and are no faster"
        return "there is no accelerator that it can use, and one device shares with nobody"

    def _facts(self) -> list[tuple[str, str]]:
        shares, plural = self.shares, "s" if self.devices > 1 else ""
        noun = {"TPU": "TPU chip", "CPU": "logical CPU" if plural else "CPU"}.get(self.kind, self.kind)
        workers = f"{len(self.addresses)} workers, each with " if len(self.addresses) > 1 else ""
        batch = rate = "as it is"
        if shares > 1:
            batch = f"batch_size counts all rows of an update: {32 * shares} are 32 for each of {shares} devices"
            rate = f"as it is; with {shares} times the rows an update, try {shares**0.5:.2g} to {shares} times it"
        kind, count = ("GPU", 1) if self.kind == "CPU" else (self.kind, self.devices + 1)
        further = [_offers(kind, count, self.backend), "more machines: a job with a second worker pool"]
        return [
            ("place", f"{environment.where_am_i()}, {self.seen}"),
            ("trains", f"{BACKENDS[self.backend]} on {workers}{self.devices} {noun}{plural}"),
            ("strategy", self.name),
            ("why", self.why),
            ("batch", batch),
            ("rate", rate),
            *[("limit", limit) for limit in self.limits],
            ("further", "; or ".join(filter(None, further))),
        ]

    @cached_property
    def strategy(self):
        """Return the tf.distribute.Strategy or the keras.distribution.DataParallel; workers wait for each other."""
        if self.backend == "jax":
            import keras

            if keras.backend.backend() != "jax":
                raise StrategyError(IDLE)
            return keras.distribution.DataParallel(devices=list(self.mesh.devices), auto_shard_dataset=False)
        import tensorflow as tf

        if self.kind == "TPU":
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")  # any other name is looked up
            tf.tpu.experimental.initialize_tpu_system(resolver)
            return tf.distribute.TPUStrategy(resolver)
        if len(self.addresses) > 1:
            return loop.strategy(list(self.addresses), self.rank)
        if self.devices > 1:
            # By default CPUs would sum in collectives, which fail where strategies of two sizes are in one process.
            sums = tf.distribute.ReductionToOneDevice() if self.kind == "CPU" else None
            return tf.distribute.MirroredStrategy([f"{self.kind}:{n}" for n in range(self.devices)], sums)
        passes_by = self.kind == "CPU" and tf.config.list_physical_devices("GPU")
        return tf.distribute.OneDeviceStrategy("CPU:0") if passes_by else tf.distribute.get_strategy()

    @cached_property
    def mesh(self):
        """Return JAX's devices as a jax.sharding.Mesh with the axis "batch"; workers wait for each other."""
        if self.backend != "jax":
            raise StrategyError("A mesh is for JAX: strategy.choose(backend='jax').mesh")
        import jax
        import numpy as np

        if not jax.distributed.is_initialized():
            if len(self.addresses) > 1:
                jax.distributed.initialize(self.addresses[0], len(self.addresses), self.rank)
            elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
                jax.distributed.initialize()  # a slice of several hosts, which find each other by themselves
        devices = jax.devices("cpu") if self.kind == "CPU" else jax.devices()
        if len(devices) < self.shares:
            raise StrategyError(f"JAX started with {len(devices)} devices, not the {self.shares} of this choice.")
        takes_all = self.kind == "TPU" or len(self.addresses) > 1
        return jax.sharding.Mesh(np.array(devices if takes_all else devices[: self.devices]), ("batch",))

    def scope(self):
        """Return the context in which to build, compile and fit."""
        return self.strategy.scope()


def choose(backend: str | None = None, want: str | None = None, count: int | None = None) -> Choice:
    """Return what trains: TPUs before GPUs before CPUs, on all workers of a job.

    `backend` is "tensorflow" or "jax", by default Keras' own. `want` is "CPU", "GPU", "TPU" or an accelerator's name,
    such as "T4"; `count` is how many, by default all. For what is not there, StrategyError names machines that have it.
    """
    backend, limits = _backend(backend)
    addresses, rank = loop.workers()
    is_alone = len(addresses) < 2
    seen = hardware.here()
    kinds = [want] if want in KINDS else ["TPU" if want.startswith("TPU") else "GPU"] if want else KINDS
    for kind in kinds:
        there, remark = _usable(kind, want, backend, seen, is_alone)
        limits += [remark] if remark else []
        if there >= (count or 1):
            devices = count if count and is_alone and kind != "TPU" else there
            limits += [] if is_alone else [COPIES if backend == "jax" else NO_FIT]
            limits += [UNEVEN] if backend == "tensorflow" and (devices > 1 or not is_alone) else []
            return Choice(backend, kind, devices, tuple(addresses), rank, seen, tuple(limits))
    raise StrategyError(". ".join([_missing(want, count or 1, backend, seen), *limits]))


def simulate(devices: int = 4, backend: str | None = None) -> None:
    """Divide this process' CPU into logical devices, on which programs for several devices run as they would on GPUs.

    Raises StrategyError if the backend has computed something already: it is too late then.
    """
    backend, _ = _backend(backend)
    if backend == "tensorflow" and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # or it warns of each data set that devices share
    config = importlib.import_module(backend).config
    try:
        if backend == "tensorflow":
            cpu = config.list_physical_devices("CPU")[0]
            config.set_logical_device_configuration(cpu, [config.LogicalDeviceConfiguration()] * devices)
        else:
            config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # both refuse once they have started, also what they have already
        if (there := _logical_cpus(backend)) != devices:
            raise StrategyError(
                f"{BACKENDS[backend]} has started in this process, and keeps its {there} CPU device(s). Restart the "
                f"kernel and call strategy.simulate({devices}) before anything is computed, or use another process."
            ) from None


# Looking


def _backend(asked: str | None) -> tuple[str, list[str]]:
    """Return the backend, and what there is to say about it."""
    name = tables.known("backend", asked or _keras_backend(), BACKENDS, StrategyError)
    if importlib.util.find_spec(name):
        return name, []
    if not asked and importlib.util.find_spec("jax"):
        return "jax", [NO_TENSORFLOW]
    raise StrategyError(f"{BACKENDS[name]} is not installed here. Install it, or choose the other of {list(BACKENDS)}.")


def _keras_backend() -> str:
    """Return Keras' backend without importing Keras, whose rules these are."""
    if keras := sys.modules.get("keras"):
        return keras.config.backend()
    file = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "keras.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return os.environ.get("KERAS_BACKEND") or json.loads(file.read_text())["backend"]
    return "tensorflow"


def _usable(kind: str, want: str | None, backend: str, seen: hardware.Here, is_alone: bool) -> tuple[int, str]:
    """Return how many devices of a kind the backend can use, and why not those that it cannot."""
    if kind == "CPU":
        return _logical_cpus(backend) if is_alone else 1, ""
    names = [name for name in (seen.gpus if kind == "GPU" else seen.tpus) if want in (None, kind) or _is(want, name)]
    if not names:
        return 0, ""
    cannot = f"{BACKENDS[backend]} cannot use what is here, {names[0]}: "
    if kind == "TPU" and not _runs(backend, names[0]):
        return 0, cannot + "from v6e on, TPUs are for JAX"
    if kind == "TPU" and not importlib.util.find_spec("libtpu"):
        return 0, cannot + "pip install 'jax[tpu]' brings the libtpu that is missing"
    if kind == "TPU" or (backend == "jax" and not is_alone):  # JAX's workers have to meet before it can be asked
        return len(names), ""
    found = min(_gpus_of(backend), len(names))
    return found, "" if found else cannot + f"look at its driver, or pip install '{WITH_CUDA[backend]}'"


def _gpus_of(backend: str) -> int:
    framework = importlib.import_module(backend)
    if backend == "tensorflow":
        return len(framework.config.list_physical_devices("GPU"))
    return sum(device.platform == "gpu" for device in framework.devices())


def _logical_cpus(backend: str) -> int:
    """Return how many CPUs the backend has, or will have when it starts; it is not started."""
    module = sys.modules.get(backend)
    if backend == "tensorflow":
        cpu = module and module.config.list_physical_devices("CPU")[0]
        return len((cpu and module.config.get_logical_device_configuration(cpu)) or [cpu])
    if module and module.config.jax_num_cpu_devices > 0:
        return module.config.jax_num_cpu_devices
    forced = FORCED.search(os.environ.get("XLA_FLAGS", ""))
    return int(forced[1]) if forced else 1


def _is(want: str, name: str) -> bool:
    """Say whether a device that the machine names is what Google's pages call `want`."""
    label = tables.read("machines")["accelerators"].get(want, {}).get("label", want)
    return set(label.split()) - {"TPU", "Mega"} <= set(re.split(r"[\s-]", name))


def _runs(backend: str, tpu: str) -> bool:
    """Say whether Google lists a backend for a TPU; one that is not in its table is given the benefit of the doubt."""
    listed = [entry["software"] for entry in tables.read("machines")["tpu"].values() if entry["kind"] == tpu]
    return not listed or any(software.get(backend) for software in listed)


def _missing(want: str | None, count: int, backend: str, seen: hardware.Here) -> str:
    """Return the words for what is not there, and for where it is."""
    fewer = "no" if count == 1 else f"fewer than {count}"
    offers = "" if want == "CPU" else _offers(want or "GPU", count, backend)
    ways = [f"machine types that have it: {offers}"] if offers else []
    if want in (None, "CPU"):
        ways.append(f"strategy.simulate({count}, {backend!r}), before anything is computed, gives logical CPUs")
    found = f"{BACKENDS[backend]} finds {fewer} {want or 'devices'} here ({seen})"
    return "; ".join([found, *(ways or ["no machine type of Vertex AI has as many"])])


def _offers(want: str, count: int, backend: str) -> str:
    """Return some machine types with at least `count` of an accelerator, or with any of a kind."""
    table = tables.read("machines")
    tpus = {entry["kind"]: None for entry in table["tpu"].values() if "topologies" in entry}
    lasting = [entry["label"] for entry in table["accelerators"].values() if "end_of_support" not in entry]
    names = {"TPU": [kind for kind in tpus if _runs(backend, kind)], "GPU": lasting}.get(want, [want])
    found = []
    for name in names:
        fitting = [
            f"{machine} with {size} {name}"
            for machine, sizes in hardware.fits(name).items()
            for size in [size for size in sizes if math.prod(map(int, str(size).split("x"))) >= count][:1]
        ]
        found += fitting[:1] if len(names) > 1 else fitting
    return ", ".join(found[:4])
