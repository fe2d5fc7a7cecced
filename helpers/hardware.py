"""Machines and accelerators: what fits what, where it is, what a new project may use, and what it costs.

    hardware.check("n1-standard-4", "NVIDIA_TESLA_T4", 1)     # the machine, or Google's refusal and the way round it
    hardware.fits("T4")                                       # the machine types that take it, and how many
    hardware.estimate("n1-standard-4", hours=2)               # before anything runs
    hardware.here()                                           # what this machine has, without a framework

Everything is read from Google's tables, each with its day. Quotas are those of a new project: yours may differ.
"""

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from helpers import costs, tables
from helpers.facts import Facts

PURPOSES = ("training", "prediction")
FRAMEWORKS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
PCI = Path("/sys/bus/pci/devices")
NVIDIA_FACTS = Path("/proc/driver/nvidia/gpus")
NVIDIA, GOOGLE, DISPLAY = "0x10de", "0x1ae0", "0x03"
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
GB = 2**30


class HardwareError(ValueError):
    """What Vertex AI refuses: what to do (`fix`), after its own words (`google`, empty where those are not known)."""

    def __init__(self, fix: str, google: str = ""):
        """Say both."""
        super().__init__(f"{google} {fix}".strip())
        self.google, self.fix = google, fix


@dataclass(frozen=True, repr=False)
class Machine(Facts):
    """What a machine type has. It shows itself with its quota, its price, and what is worth knowing before it runs.

    Attributes: `vcpus` and `memory_gb` (None where Google's pages do not say), `accelerator` and `count` (a machine's
    own, if it is made for them), `quota` of a new project for what is scarce, in `quota_of`, None where the page has
    none; `hourly`, US dollars for the whole machine, None if the table does not know it; `notes`.
    """

    machine_type: str
    purpose: str
    region: str
    vcpus: int | None
    memory_gb: float | None
    accelerator: str
    count: int
    quota_of: str
    quota: int | None
    hourly: float | None
    disk: str
    notes: tuple[str, ...]

    @property
    def new_project_can(self) -> bool | None:
        """Say whether the quota of a new project is enough for one such machine; None if that is not known."""
        return None if self.quota is None else self.quota >= (self.count or self.vcpus or 0)

    def _facts(self) -> list[tuple[str, str]]:
        size = [f"{self.vcpus} vCPUs" if self.vcpus else "vCPUs unknown"]
        size.append(f"{self.memory_gb:g} GB" if self.memory_gb else "memory unknown")
        if self.accelerator:
            size.append(f"{self.count} x {self.accelerator}" if self.count else self.accelerator)
        day = tables.read("quotas")["date"]
        quota = f"Google's page has none for {self.quota_of}"
        if self.quota is not None:
            quota = f"a new project has {self.quota:,} {self.quota_of} in {self.region} (on {day})"
        price = f"${self.hourly:.4g} an hour" if self.hourly is not None else f"see {tables.read('prices')['source']}"
        return [
            ("machine", f"{self.machine_type} for {self.purpose} in {self.region}"),
            ("has", ", ".join(size)),
            *([("disk", self.disk)] if self.disk else []),
            ("quota", quota),
            ("price", price),
            *[("note", note) for note in self.notes],
        ]


# What there is


def _cpu_size(machine_type: str, purpose: str) -> tuple[int, float] | None:
    """Return the vCPUs and the memory in GB of a machine without accelerators of its own; None for any other."""
    table = tables.read("machines")
    family, _, size = machine_type.rpartition("-")
    entry = table["cpu"].get(family)
    if entry is None or not size.isdigit() or int(size) not in entry[purpose]:
        return None
    memory = table["memory_gb"].get(machine_type, round(int(size) * entry["memory_gb_per_vcpu"], 1))
    return int(size), memory


def machine_types(purpose: str = "training") -> list[str]:
    """Return the names of all machine types for a purpose."""
    table = tables.read("machines")
    tables.known("purpose", purpose, PURPOSES)
    cpu = [f"{family}-{size}" for family, entry in table["cpu"].items() for size in entry[purpose]]
    return [*cpu, *table["gpu"], *table["tpu"]]


def _n1_counts(machine_type: str) -> dict[str, list[int]]:
    """Return the GPUs that an N1 machine takes, with their numbers."""
    table = tables.read("machines")["n1_gpu"]
    family, _, rest = machine_type.partition("-")
    return (table.get(rest) or table.get(rest.rpartition("-")[2], {})) if family == "n1" else {}


def _label(accelerator: str) -> str:
    """Return an accelerator's short name on Google's pages, such as "T4"."""
    return tables.read("machines")["accelerators"].get(accelerator, {}).get("label", accelerator)


def fits(accelerator: str, purpose: str = "training") -> dict[str, list]:
    """Return the machine types that take an accelerator, each with the numbers of it, or the topologies of TPUs.

    `accelerator` is a name of the API or of Google's pages: "NVIDIA_TESLA_T4" or "T4", "TPU v5e".
    """
    table = tables.read("machines")
    names = {entry["label"]: name for name, entry in table["accelerators"].items()}
    newer = {entry["kind"] for entry in table["tpu"].values() if "topologies" in entry}
    tables.known("accelerator", accelerator, [*table["accelerators"], *names, *sorted(newer)])
    name = names.get(accelerator, accelerator)
    found = {
        machine: entry["topologies"] if "topologies" in entry else entry["accelerators"][name]
        for machine, entry in table["tpu"].items()
        if entry["kind"] == name or name in entry.get("accelerators", ())
    }
    found |= {machine: [own["count"]] for machine, own in table["gpu"].items() if own["accelerator"] == name}
    n1 = {machine: _n1_counts(machine).get(name) for machine in machine_types(purpose) if machine.startswith("n1-")}
    return found | {machine: counts for machine, counts in n1.items() if counts}


def regions(accelerator: str, purpose: str = "training") -> list[str]:
    """Return the regions in which an accelerator is there for a purpose."""
    label = _label(accelerator)
    return [
        region
        for region, found in tables.read("regions")["accelerators"].items()
        if label in [*found.get("both", ()), *found.get(purpose, ())]
    ]


# Checking


def check(
    machine_type: str,
    accelerator: str | None = None,
    count: int = 0,
    region: str = "us-central1",
    purpose: str = "training",
    disk_gb: int = 100,
    disk_type: str | None = None,
    topology: str | None = None,
    framework: str | None = None,
) -> Machine:
    """Return what a machine has, or raise HardwareError with what Vertex AI says to it and what to do.

    `accelerator` is the API's name, such as "NVIDIA_TESLA_T4"; `topology` is for TPUs from v5e on, such as "2x2";
    `disk_type` is Google's default ("pd-ssd") if none is given; `framework` ("tensorflow", "jax", "torch") is checked
    against what runs on a TPU. Whether your quota and Google's stock are enough is not known before the job asks.
    """
    tables.known("purpose", purpose, PURPOSES, HardwareError)
    tables.known("region", region, tables.read("regions")["accelerators"], HardwareError)
    table = tables.read("machines")
    _check_type(machine_type, purpose)
    _check_pair(accelerator, count)
    if machine_type in table["tpu"]:
        return _tpu(machine_type, accelerator, count, region, purpose, topology, framework)
    own = table["gpu"].get(machine_type)
    if own and not accelerator:
        accelerator, count = own["accelerator"], own["count"]
    if accelerator:
        _check_fit(machine_type, accelerator, count, purpose)
        _check_region(accelerator, region, purpose)
    vcpus, memory = (own["vcpus"], own["memory_gb"]) if own else _cpu_size(machine_type, purpose)
    disk = _check_disk(machine_type, disk_gb, disk_type) if purpose == "training" else ""
    quota_of, quota = _quota(machine_type, accelerator, region, purpose)
    return Machine(
        machine_type=machine_type,
        purpose=purpose,
        region=region,
        vcpus=vcpus,
        memory_gb=memory,
        accelerator=accelerator or "",
        count=count,
        quota_of=quota_of,
        quota=quota,
        hourly=costs.hourly(machine_type, purpose, accelerator or "", count, region=region),
        disk=disk,
        notes=tuple(_notes(machine_type, accelerator, count, region, purpose, quota, disk)),
    )


def _check_type(machine_type: str, purpose: str) -> None:
    table = tables.read("machines")
    if _cpu_size(machine_type, purpose) or machine_type in table["gpu"] or machine_type in table["tpu"]:
        return
    names = machine_types(purpose)
    family = machine_type.rpartition("-")[0]
    siblings = ", ".join(name for name in names if family and name.startswith(f"{family}-"))
    other = PURPOSES[1 - PURPOSES.index(purpose)]
    elsewhere = f" It is there for {other} alone." if _cpu_size(machine_type, other) else ""
    there = f" Of this family there are {siblings}." if siblings else tables.near(machine_type, names)
    raise HardwareError(
        f"See hardware.table({purpose!r}) for all types.{elsewhere}{there}",
        google=f"400 Machine type {machine_type} is not supported.",
    )


def _check_pair(accelerator: str | None, count: int) -> None:
    if bool(accelerator) != (count > 0):
        raise HardwareError(
            f"Found {accelerator or 'no accelerator'} and a count of {count}.",
            google="List of found errors: 1.Field: job_spec.worker_pool_specs[0].machine_spec.accelerator_type; "
            "Message: Both 'accelerator_type' and 'accelerator_count' should be specified or none.",
        )
    names = tables.read("machines")["accelerators"]
    if accelerator and accelerator not in (*names, *tables.read("machines")["without_machine"]):
        # The usual mistakes: a short name, and the prefix of the older GPUs before a newer one.
        short = accelerator.removeprefix("NVIDIA_TESLA_").removeprefix("NVIDIA_")
        meant = next((f" Did you mean {name!r}?" for name in names if _label(name) == short), "")
        raise HardwareError(
            f"There are {', '.join(names)}.{meant or tables.near(accelerator, names)}",
            google=f"Given accelerator_type `{accelerator}` invalid.",
        )


def _check_fit(machine_type: str, accelerator: str, count: int, purpose: str) -> None:
    own = tables.read("machines")["gpu"].get(machine_type)
    counts = [own["count"]] if own and own["accelerator"] == accelerator else _n1_counts(machine_type).get(accelerator)
    if counts and count in counts:
        return
    if counts:
        fix = f"Of these it takes {', '.join(map(str, counts))}, not {count}."
    elif own:
        fix = f"It has its own: {own['count']} x {own['accelerator']}."
    elif accelerator in tables.read("machines")["without_machine"]:
        fix = f"No machine for {purpose} takes it."
    else:
        fix = f"Machines that take it: {', '.join(fits(accelerator, purpose))}."
    raise HardwareError(
        fix, google=f'400 Accelerator "{accelerator}" is not supported for machine type "{machine_type}".'
    )


def _check_region(accelerator: str, region: str, purpose: str) -> None:
    there = regions(accelerator, purpose)
    if region not in there:
        day = tables.read("regions")["date"]
        raise HardwareError(f"{region} has no {accelerator} for {purpose} (on {day}). It is in {', '.join(there)}.")


def _check_disk(machine_type: str, gb: int, disk_type: str | None) -> str:
    disk = tables.read("machines")["disk"]
    default = "hyperdisk-balanced" if machine_type in disk["hyperdisk_default"] else disk["default"]
    disk_type = disk_type or default
    tables.known("disk type", disk_type, disk["types"], HardwareError)
    least, most = disk["gb"]
    if not least <= gb <= most:
        raise HardwareError(f"A boot disk has {least} to {most:,} GB, not {gb}.")
    return f"{gb:,} GB {disk_type}"


def _quota(machine_type: str, accelerator: str | None, region: str, purpose: str) -> tuple[str, int | None]:
    """Return what is counted, and how much of it a new project has in a region."""
    quotas = tables.read("quotas")[purpose]
    if accelerator:
        label = _label(accelerator)
        kind = "cores" if accelerator.startswith("TPU") else "GPUs"
        return f"{label} {kind}", quotas.get(label, {}).get(region)
    family = machine_type.split("-")[0].upper()
    counted = next((name for name in quotas if name.endswith("CPUs") and family in name.split()), "CPUs")
    return counted, quotas.get(counted, {}).get(region)


def _notes(machine_type, accelerator, count, region, purpose, quota, disk):
    """Yield what is worth knowing before the job asks, in Google's words where it has some."""
    entry = tables.read("machines")["accelerators"].get(accelerator, {})
    needed = count or (_cpu_size(machine_type, purpose) or (0,))[0]
    if quota is not None and quota < needed:
        metric = entry.get("quota_metric")
        words = f" ... The following quota metrics exceed quota limits: {metric}" if metric else ""
        other = "take an NVIDIA_TESLA_T4 or CPUs" if accelerator else "take a region with more"
        yield (
            f"a new project has {quota or 'none'}, and one machine needs {needed}. Google then says: 429 "
            f"RESOURCE_EXHAUSTED{words}. Ask for quota of the Agent Platform API (Vertex AI) in {region}, which is not "
            f"Compute Engine's, or {other}"
        )
    if not accelerator:
        return
    yield (
        "a lab or free-trial project may have no GPUs at all: ...machine_spec.accelerator_count; Message: Accelerators "
        "are not supported for this project. Then train on CPUs"
    )
    yield (
        f"even with quota there may be none left: Resources are insufficient in region: {region}. Try a different "
        "region or use a different accelerator. Keep a second choice"
    )
    if (end := tables.day(entry.get("end_of_support"))) and date.today() >= end:
        yield f"{entry['label']} GPUs have had no support since {end}: choose another"
    if "capacity" in entry:
        yield f"to get one: {entry['capacity']}"
    if machine_type in tables.read("machines")["gpu"]:
        yield f"name its GPUs in the job too: accelerator_type={accelerator!r}, accelerator_count={count}"
    if machine_type == "n1-highmem-2":
        yield "a machine as small as this may lose logs when it has a GPU"
    if purpose == "prediction":
        yield "scikit-learn and XGBoost models cannot use a GPU there: only SavedModels and containers of your own can"


def _tpu(machine_type, accelerator, count, region, purpose, topology, framework) -> Machine:
    """Check and return a TPU machine."""
    entry = tables.read("machines")["tpu"][machine_type]
    if "topologies" in entry:
        kind = entry["kind"]
        if accelerator:
            raise HardwareError(f"{machine_type} has its TPUs: give tpu_topology and no accelerator.")
        if topology not in entry["topologies"]:
            raise HardwareError(f"{machine_type} needs a tpu_topology: one of {', '.join(entry['topologies'])}.")
    else:
        kind = _label(accelerator) if accelerator else "TPU v2"
        if accelerator not in entry["accelerators"]:
            names = " or ".join(entry["accelerators"])
            raise HardwareError(f"{machine_type} needs an accelerator: {names}, 8 of them, or a multiple of 32.")
        if count != 8 and (count < 32 or count % 32):
            raise HardwareError(f"{accelerator} are given 8 at a time, or 32 and more, not {count}.")
    _check_region(kind, region, purpose)
    _check_framework(entry, kind, framework)
    quota = tables.read("quotas")[purpose].get(kind, {}).get(region)
    software = ", ".join(f"{FRAMEWORKS[name]} from {version}" for name, version in entry["software"].items() if version)
    notes = [
        "one worker pool with one replica; no hyperparameter tuning",
        f"Google has no image for TPUs that is still available: build one, with {software}",
    ]
    if entry["software"].get("tensorflow"):
        notes.append(
            "TensorFlow finds it with tf.distribute.cluster_resolver.TPUClusterResolver('local'); without 'local': "
            "ValueError: Please provide a TPU Name to connect to."
        )
    else:
        notes.append("starting with TPU v6e, TensorFlow is no longer supported")
    if quota == 0:
        notes.append(f"a new project has none in {region}: ask for quota first")
    return Machine(
        machine_type=machine_type,
        purpose=purpose,
        region=region,
        vcpus=entry.get("vcpus"),
        memory_gb=entry.get("memory_gb"),
        accelerator=f"{kind}, topology {topology}" if topology else accelerator,
        count=0 if topology else count,
        quota_of=f"{kind} cores or chips",
        quota=quota,
        hourly=costs.hourly(machine_type, purpose, region=region),
        disk="",
        notes=tuple(notes),
    )


def _check_framework(entry: dict, kind: str, framework: str | None) -> None:
    if framework is None:
        return
    tables.known("framework", framework, FRAMEWORKS, HardwareError)
    if entry["software"].get(framework) is None:
        runs = " or ".join(FRAMEWORKS[name] for name, version in entry["software"].items() if version)
        raise HardwareError(f"{FRAMEWORKS[framework]} does not run on {kind}: use {runs}.")


def estimate(
    machine_type: str,
    hours: float,
    accelerator: str | None = None,
    count: int = 0,
    replicas: int = 1,
    region: str = "us-central1",
    purpose: str = "training",
    topology: str | None = None,
) -> costs.Estimate:
    """Return what machines cost for some hours, before anything runs. Raises HardwareError for what cannot be."""
    machine = check(machine_type, accelerator, count, region, purpose, topology=topology)
    accelerator = machine.accelerator if machine.count else ""
    return costs.estimate(machine_type, hours, purpose, accelerator, machine.count, replicas, region)


def table(purpose: str = "training", region: str = "us-central1"):
    """Return all machine types for a purpose as a DataFrame, with a new project's quota and the price in a region.

    An N1 machine takes GPUs too, those in its column `takes`; their quota and their price are their own.
    """
    import pandas as pd

    tables.known("region", region, tables.read("regions")["accelerators"])
    machines = tables.read("machines")
    rows = []
    for name in machine_types(purpose):
        own, tpu = machines["gpu"].get(name), machines["tpu"].get(name)
        size = (own["vcpus"], own["memory_gb"]) if own else _cpu_size(name, purpose)
        vcpus, memory = size or (tpu.get("vcpus"), tpu.get("memory_gb"))
        if tpu:
            accelerator = tpu["kind"]
            takes = ", ".join(tpu.get("topologies") or tpu["accelerators"])
            quota = tables.read("quotas")[purpose].get(tpu["kind"], {}).get(region)
        else:
            accelerator = f"{own['count']} x {own['accelerator']}" if own else ""
            takes = ", ".join(_label(gpu) for gpu in _n1_counts(name))
            quota = _quota(name, own["accelerator"] if own else None, region, purpose)[1]
        rows.append(
            {
                "machine_type": name,
                "vcpus": vcpus,
                "memory_gb": memory,
                "accelerator": accelerator,
                "takes": takes,
                "quota": quota,
                "hourly": costs.hourly(name, purpose, region=region),
            }
        )
    return pd.DataFrame(rows).astype({"vcpus": "Int64", "quota": "Int64", "hourly": "float64"})


def strategies():
    """Return the ways in which a job can get its machines (standard, Spot, Flex-start) as a DataFrame."""
    import pandas as pd

    return pd.DataFrame(tables.read("machines")["strategies"])


# This machine


@dataclass(frozen=True)
class Here:
    """What this process can use: cores, memory in GB, the names of the GPUs and of the TPU chips."""

    cores: int
    memory_gb: float | None
    gpus: tuple[str, ...]
    tpus: tuple[str, ...]

    def __repr__(self) -> str:
        """Return it in a line."""
        memory = f"{self.memory_gb:.1f} GB" if self.memory_gb else "memory unknown"
        accelerators = [*self.gpus, *self.tpus]
        return f"{self.cores} cores, {memory}, {', '.join(accelerators) or 'no GPU and no TPU'}"


def here() -> Here:
    """Return what this process can use, in milliseconds: from the system's own files, without a framework.

    A container's limits count, where it has some. A GPU without a driver is named as such: no framework can use it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = _devices()
    tpus = tables.read("machines")["pci"]
    return Here(
        cores=cores,
        memory_gb=_memory(),
        gpus=_gpus(devices),
        tpus=tuple(tpus[device] for vendor, device, _ in devices if vendor == GOOGLE and device in tpus),
    )


def _memory() -> float | None:
    """Return the memory that this process may use, in GB: the machine's, or a container's limit if that is less."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            sizes.append(int(Path(path).read_text()))
    return min(sizes) / GB if sizes else None


def _devices() -> list[tuple[str, str, str]]:
    """Return vendor, device and class of all PCI devices."""
    found = []
    with contextlib.suppress(OSError):
        for folder in sorted(PCI.iterdir()):
            with contextlib.suppress(OSError):
                found.append(tuple((folder / name).read_text().strip() for name in ("vendor", "device", "class")))
    return found


def _gpus(devices: list[tuple[str, str, str]]) -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs: as the driver tells them, else those that are there without one."""
    with contextlib.suppress(OSError):
        names = [
            found[1].strip()
            for path in sorted(NVIDIA_FACTS.glob("*/information"))
            if (found := re.search(r"Model:(.*)", path.read_text(errors="replace")))
        ]
        if names:
            return tuple(names)
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            return tuple(told.splitlines())
    there = sum(vendor == NVIDIA and kind.startswith(DISPLAY) for vendor, _, kind in devices)
    return ("NVIDIA GPU without a driver",) * there
