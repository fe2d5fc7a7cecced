"""Machines: what fits, what is refused in Google's words, what is said of quotas and prices, what this machine has."""

import os
import subprocess
import sys
from datetime import date

import pytest

from helpers import hardware, tables

MACHINES, QUOTAS, REGIONS = tables.read("machines"), tables.read("quotas"), tables.read("regions")["accelerators"]
LABELS = {entry["label"] for entry in MACHINES["accelerators"].values()} | {"TPU v5e", "TPU v6e", "TPU7x"}

# The tables


def test_accelerators_have_the_names_of_the_api():
    from google.cloud.aiplatform_v1.types import AcceleratorType

    ours = {*MACHINES["accelerators"], *MACHINES["without_machine"]}
    assert ours == {kind.name for kind in AcceleratorType} - {"ACCELERATOR_TYPE_UNSPECIFIED"}


def test_every_accelerator_fits_a_machine_and_is_in_a_region():
    for name in MACHINES["accelerators"]:
        assert hardware.fits(name) == hardware.fits(hardware._label(name))
        assert hardware.fits(name)
        assert hardware.regions(name)


def test_regions_and_quotas_speak_of_the_same_things():
    assert {label for found in REGIONS.values() for group in found.values() for label in group} == LABELS
    for purpose in hardware.PURPOSES:
        for counted, found in QUOTAS[purpose].items():
            assert counted in LABELS or counted.endswith(("CPUs", "GB"))
            assert set(found) <= set(REGIONS)
            assert all(isinstance(number, int) and number >= 0 for number in found.values())


def test_all_tables_have_a_source_and_a_day():
    for name in ("images", "machines", "regions", "quotas", "prices", "skew", "approaches"):
        table = tables.read(name)
        assert table["source"]
        assert date(2026, 1, 1) < tables.day(table["date"]) <= date.today()


# What fits


def test_fits_tells_machines_and_numbers():
    assert hardware.fits("T4")["n1-standard-4"] == [1, 2, 4]
    assert hardware.fits("T4")["n1-standard-32"] == [2, 4]
    assert hardware.fits("NVIDIA_L4")["g2-standard-24"] == [2]
    assert list(hardware.fits("P100")).count("n1-highcpu-64") == 1
    assert "n1-standard-64" not in hardware.fits("P100")
    assert "16x16" in hardware.fits("TPU v5e")["ct5lp-hightpu-4t"]
    assert "n1-standard-2" in hardware.fits("T4", "prediction")
    with pytest.raises(ValueError, match="Did you mean 'T4'"):
        hardware.fits("TT4")


def test_check_describes_a_machine():
    machine = hardware.check("n1-standard-4")
    assert (machine.vcpus, machine.memory_gb, machine.disk) == (4, 15, "100 GB pd-ssd")
    assert (machine.quota, machine.new_project_can) == (2200, True)
    assert machine.hourly == 0.21849885
    assert "$0.2185 an hour" in repr(machine)
    assert "4 vCPUs, 15 GB" in machine._repr_html_()
    assert hardware.check("a4-highgpu-8g").disk == "100 GB hyperdisk-balanced"
    assert hardware.check("n1-standard-4", region="us-west2").hourly is None
    assert hardware.check("n1-standard-2", purpose="prediction").memory_gb == 7.5


def test_check_warns_of_what_a_new_project_cannot_have():
    machine = hardware.check("g2-standard-4")
    assert (machine.accelerator, machine.count, machine.quota, machine.new_project_can) == ("NVIDIA_L4", 1, 0, False)
    notes = " ".join(machine.notes)
    assert "429 RESOURCE_EXHAUSTED" in notes
    assert "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus" in notes
    assert "Accelerators are not supported for this project." in notes
    assert "Resources are insufficient in region: us-central1." in notes
    assert hardware.check("n1-standard-4", "NVIDIA_TESLA_T4", 1).new_project_can
    assert "since 2026-09-15" in repr(hardware.check("n1-standard-4", "NVIDIA_TESLA_P100", 1))
    assert hardware.check("n1-standard-32", region="us-west2").new_project_can is False
    assert "pricing" in repr(machine)


@pytest.mark.parametrize(
    ("arguments", "google", "fix"),
    [
        (("n1-standard-2",), "400 Machine type n1-standard-2 is not supported.", "for prediction alone.*n1-standard-4"),
        (("n1-standrad-4",), "400 Machine type n1-standrad-4 is not supported.", "Did you mean 'n1-standard-4'"),
        (("custom-4-8192",), "400 Machine type custom-4-8192 is not supported.", "hardware.table"),
        (
            ("n1-standard-4", "NVIDIA_TESLA_K80", 1),
            '400 Accelerator "NVIDIA_TESLA_K80" is not supported for machine type "n1-standard-4".',
            "No machine for training takes it",
        ),
        (
            ("n1-standard-4", "NVIDIA_L4", 1),
            '400 Accelerator "NVIDIA_L4" is not supported for machine type "n1-standard-4".',
            "Machines that take it: g2-standard-4",
        ),
        (
            ("e2-standard-4", "NVIDIA_TESLA_T4", 1),
            '400 Accelerator "NVIDIA_TESLA_T4" is not supported for machine type "e2-standard-4".',
            "n1-standard-4",
        ),
        (
            ("n1-standard-4", "NVIDIA_TESLA_T4", 3),
            '400 Accelerator "NVIDIA_TESLA_T4" is not supported for machine type "n1-standard-4".',
            "takes 1, 2, 4, not 3",
        ),
        (
            ("g2-standard-4", "NVIDIA_TESLA_T4", 1),
            '400 Accelerator "NVIDIA_TESLA_T4" is not supported for machine type "g2-standard-4".',
            "its own: 1 x NVIDIA_L4",
        ),
        (("n1-standard-4", "NVIDIA_TESLA_L4", 1), "Given accelerator_type `NVIDIA_TESLA_L4` invalid.", "'NVIDIA_L4'"),
        (("n1-standard-4", "T4", 1), "Given accelerator_type `T4` invalid.", "Did you mean 'NVIDIA_TESLA_T4'"),
        (
            ("n1-standard-4", "NVIDIA_TESLA_T4", 0),
            "List of found errors: 1.Field: job_spec.worker_pool_specs[0].machine_spec.accelerator_type; Message: Both "
            "'accelerator_type' and 'accelerator_count' should be specified or none.",
            "a count of 0",
        ),
        (
            ("n1-standard-4", None, 1),
            "List of found errors: 1.Field: job_spec.worker_pool_specs[0].machine_spec.accelerator_type; Message: Both "
            "'accelerator_type' and 'accelerator_count' should be specified or none.",
            "no accelerator and a count of 1",
        ),
    ],
)
def test_what_google_refuses_is_refused_in_its_words_with_a_way_out(arguments, google, fix):
    with pytest.raises(hardware.HardwareError, match=fix) as refusal:
        hardware.check(*arguments)
    assert refusal.value.google == google
    assert str(refusal.value) == f"{google} {refusal.value.fix}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"region": "us-centrall1"}, "Did you mean 'us-central1'"),
        ({"purpose": "serving"}, "there are training, prediction"),
        ({"disk_gb": 50}, "has 100 to 64,000 GB, not 50"),
        ({"disk_type": "ssd"}, "there are pd-standard, pd-ssd, hyperdisk-balanced"),
        (
            {"accelerator": "NVIDIA_TESLA_T4", "count": 1, "region": "us-west3"},
            "no NVIDIA_TESLA_T4.*in .*us-west4",
        ),
        ({"accelerator": "NVIDIA_TESLA_T4", "count": 1, "region": "me-west1"}, "me-west1 has no NVIDIA_TESLA_T4"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(hardware.HardwareError, match=words):
        hardware.check("n1-standard-4", **options)


def test_a_gpu_may_serve_where_it_does_not_train():
    assert hardware.check("g2-standard-4", region="asia-east1", purpose="prediction").quota == 28
    with pytest.raises(hardware.HardwareError, match="asia-east1 has no NVIDIA_L4 for training"):
        hardware.check("g2-standard-4", region="asia-east1")


# TPUs


def test_tpus_have_topologies_and_software():
    machine = hardware.check("ct5lp-hightpu-4t", topology="2x2", framework="tensorflow")
    assert (machine.vcpus, machine.memory_gb, machine.quota) == (112, 192, None)
    assert "Please provide a TPU Name to connect to." in repr(machine)
    assert hardware.check("ct6e-standard-1t", topology="1x1", framework="jax").accelerator == "TPU v6e, topology 1x1"
    assert hardware.check("cloud-tpu", "TPU_V2", 8).quota == 0


@pytest.mark.parametrize(
    ("machine", "options", "words"),
    [
        (
            "ct6e-standard-1t",
            {"topology": "1x1", "framework": "tensorflow"},
            "TensorFlow does not run on TPU v6e",
        ),
        ("tpu7x-standard-4t", {"topology": "2x2x1", "framework": "tensorflow"}, "TensorFlow does not run on TPU7x"),
        ("ct5lp-hightpu-4t", {}, "needs a tpu_topology: one of 2x2"),
        ("ct5lp-hightpu-4t", {"topology": "1x1"}, "needs a tpu_topology"),
        ("ct5lp-hightpu-4t", {"topology": "2x2", "accelerator": "TPU_V3", "count": 8}, "no accelerator"),
        ("ct5lp-hightpu-4t", {"topology": "2x2", "region": "europe-west4"}, "europe-west4 has no TPU v5e for training"),
        ("cloud-tpu", {}, "needs an accelerator: TPU_V2 or TPU_V3"),
        ("cloud-tpu", {"accelerator": "TPU_V2", "count": 4}, "8 at a time"),
        ("ct5lp-hightpu-4t", {"topology": "2x2", "framework": "keras"}, "there are tensorflow, jax, torch"),
    ],
)
def test_what_a_tpu_cannot_do_is_refused(machine, options, words):
    with pytest.raises(hardware.HardwareError, match=words):
        hardware.check(machine, **options)


# All of them, and prices


def test_table_lists_all_machines_that_check_accepts():
    for purpose in hardware.PURPOSES:
        frame = hardware.table(purpose)
        assert list(frame.machine_type) == hardware.machine_types(purpose)
        plain = frame[~frame.machine_type.isin(MACHINES["tpu"])]
        for row in plain.itertuples():
            machine = hardware.check(row.machine_type, purpose=purpose)
            assert (machine.vcpus, machine.memory_gb) == (row.vcpus, row.memory_gb)
    row = hardware.table().set_index("machine_type").loc["n1-standard-8"]
    assert (row.memory_gb, row.takes, row.quota) == (30, "P4, P100, T4, V100", 2200)


def test_the_local_cloud_accepts_and_refuses_the_same_machines():
    from google.cloud.aiplatform_v1.types import MachineSpec

    from helpers.local import checks
    from helpers.local.errors import Refused

    for purpose in hardware.PURPOSES:
        for name in hardware.machine_types(purpose):
            checks.machine(MachineSpec.pb(MachineSpec(machine_type=name)), "here", serving=purpose == "prediction")
    for name in ("n1-standard-2", "n2d-standard-4", "c3-highcpu-4"):
        spec = MachineSpec.pb(MachineSpec(machine_type=name))
        checks.machine(spec, "here", serving=True)
        with pytest.raises(Refused, match="not supported"):
            checks.machine(spec, "here")
    p100 = MachineSpec(machine_type="n1-highcpu-64", accelerator_type="NVIDIA_TESLA_P100", accelerator_count=4)
    checks.machine(MachineSpec.pb(p100), "here")


def test_estimates_are_prices_times_hours_or_unknown():
    assert hardware.estimate("n1-standard-4", 2, replicas=3).total == pytest.approx(6 * 0.21849885)
    unknown = hardware.estimate("n1-standard-4", 2, "NVIDIA_TESLA_T4", 1)
    assert unknown.total is None
    assert "unknown here; the price stands at https://" in repr(unknown)
    assert hardware.estimate("g2-standard-4", 1, purpose="prediction").hourly == 0.8129
    with pytest.raises(hardware.HardwareError, match="not supported"):
        hardware.estimate("n1-standard-3", 1)


def test_strategies_are_named_as_in_the_api():
    from google.cloud.aiplatform_v1.types import Scheduling

    assert {row.strategy for row in hardware.strategies().itertuples()} <= {kind.name for kind in Scheduling.Strategy}


# This machine


def test_here_agrees_with_the_system():
    here = hardware.here()
    assert here.cores == len(os.sched_getaffinity(0))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0 < here.memory_gb <= total
    assert "cores" in repr(here)


def test_here_is_quick_and_imports_no_framework():
    code = (
        "import sys, time; start = time.perf_counter(); from helpers import hardware, containers, approach, costs; "
        "hardware.here(); print(time.perf_counter() - start); "
        "heavy = {'tensorflow', 'jax', 'torch', 'pandas', 'google.cloud.aiplatform'}; print(heavy & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = run.stdout.splitlines()
    assert float(seconds) < 5
    assert modules == "set()"


def test_here_reads_what_pci_and_the_driver_tell(tmp_path, monkeypatch):
    """The machine's files, laid out as Linux does for two TPU chips, Google's network card and a GPU."""
    tpu, gpu = ("0x1ae0", "0x0063", "0x120000"), ("0x10de", "0x1eb8", "0x030200")
    network = ("0x1ae0", "0x0042", "0x020000")
    for number, words in enumerate([tpu, tpu, network, gpu]):
        folder = tmp_path / "pci" / f"0000:00:0{number}.0"
        folder.mkdir(parents=True)
        for name, word in zip(("vendor", "device", "class"), words, strict=True):
            (folder / name).write_text(f"{word}\n")
    monkeypatch.setattr(hardware, "PCI", tmp_path / "pci")
    monkeypatch.setattr(hardware, "NVIDIA_FACTS", tmp_path / "gpus")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.here().tpus == ("TPU v5e", "TPU v5e")
    assert hardware.here().gpus == ("NVIDIA GPU without a driver",)
    facts = tmp_path / "gpus" / "0000:00:03.0" / "information"
    facts.parent.mkdir(parents=True)
    facts.write_text("Model: \t\t Tesla T4\nIRQ: 33\n")
    assert hardware.here().gpus == ("Tesla T4",)
    assert "Tesla T4, TPU v5e" in repr(hardware.here())
