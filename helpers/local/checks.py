"""What Vertex AI refuses before anything runs, in its words, each with what to do about it."""

import re
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import MANAGED_BUCKET
from helpers.local.errors import invalid, precondition
from helpers.tables import read

PREBUILT = re.compile(
    r"(?:(?:us|europe|asia)-docker\.pkg\.dev/vertex-ai(?:-restricted)?|(?:\w+\.)?gcr\.io/cloud-aiplatform)/"
    r"(?P<purpose>training|prediction)/(?P<name>[^:@]+)"
)
MAX_ENVIRONMENT = 100
MAX_ARGUMENTS = 100_000
BOOT_DISK_GB = (100, 64_000)


def prebuilt(image: str) -> tuple[str, str] | None:
    """Return the purpose, training or prediction, and the name of a prebuilt image of Google's; None for any other."""
    found = PREBUILT.match(image)
    return (found["purpose"], found["name"]) if found else None


def machine(spec: Message, where: str, serving: bool = False) -> None:
    """Refuse a MachineSpec that Google has no machine for."""
    name, count = spec.machine_type, spec.accelerator_count
    kind = types.AcceleratorType(spec.accelerator_type).name if spec.accelerator_type else ""
    table = read("machines")
    family, _, size = name.rpartition("-")
    purpose = "prediction" if serving else "training"
    is_cpu = size.isdigit() and family in table["cpu"] and int(size) in table["cpu"][family][purpose]
    if not is_cpu and name not in table["gpu"] and name not in table["tpu"]:
        raise invalid(f"Machine type {name} is not supported. See {table['source']} for the types that there are.")
    if bool(kind) != bool(count):
        raise invalid(
            f"List of found errors: 1.Field: {where}.accelerator_type; Message: Both 'accelerator_type' and "
            "'accelerator_count' should be specified or none."
        )
    if name in table["tpu"] or not kind:
        return
    if name in table["gpu"]:
        own = table["gpu"][name]
        fits = (kind, count) == (own["accelerator"], own["count"])
        allowed = f"{own['count']} of {own['accelerator']}"
    else:
        n1 = table["n1_gpu"].get(name.removeprefix("n1-")) or table["n1_gpu"].get(size, {})
        counts = n1.get(kind, []) if family.startswith("n1-") else []
        fits, allowed = count in counts, f"{counts} of it" if counts else ""
    if not fits:
        advice = f"it takes {allowed}" if allowed else "GPUs go with n1, g2, g4, a2, a3 and a4 machines, each its own"
        raise invalid(f'Accelerator "{kind}" is not supported for machine type "{name}": found {count}, and {advice}.')


def worker_pools(spec: Message, where: str = "job_spec.worker_pool_specs") -> None:
    """Refuse a CustomJobSpec whose worker pools no job can have."""
    pools = spec.worker_pool_specs
    if not pools or not _has_task(pools[0]):
        raise invalid(f"List of found errors: 1.Field: {where}[0]; Message: Required field is not set.")
    if len(pools) > 4:
        raise invalid(f"List of found errors: 1.Field: {where}; Message: At most 4 worker pools, found {len(pools)}.")
    if pools[0].replica_count > 1:
        raise invalid(
            f"List of found errors: 1.Field: {where}[0].replica_count; Message: The primary worker pool has exactly "
            "one replica."
        )
    for number, pool in enumerate(pools):
        if not _has_task(pool):
            continue
        at = f"{where}[{number}]"
        machine(pool.machine_spec, f"{at}.machine_spec")
        disk = pool.disk_spec.boot_disk_size_gb
        if disk and not BOOT_DISK_GB[0] <= disk <= BOOT_DISK_GB[1]:
            raise invalid(
                f"List of found errors: 1.Field: {at}.disk_spec.boot_disk_size_gb; Message: Expected "
                f"{BOOT_DISK_GB[0]} to {BOOT_DISK_GB[1]} GB, found {disk}."
            )
        task = pool.python_package_spec if pool.HasField("python_package_spec") else pool.container_spec
        image = getattr(task, "executor_image_uri", "") or getattr(task, "image_uri", "")
        if not image:
            raise invalid(f"List of found errors: 1.Field: {at}; Message: The image URI is not set.")
        if (known := prebuilt(image)) and known[0] == "prediction":
            raise invalid(
                f"Invalid image {image!r} for training: it is a prediction image. Use one of Google's training images, "
                "or your own."
            )
        if len(task.env) > MAX_ENVIRONMENT:
            raise invalid(
                f"List of found errors: 1.Field: {at}.env; Message: At most {MAX_ENVIRONMENT} variables, found "
                f"{len(task.env)}."
            )
        if sum(map(len, task.args)) > MAX_ARGUMENTS:
            raise invalid(f"List of found errors: 1.Field: {at}.args; Message: At most {MAX_ARGUMENTS} characters.")


def _has_task(pool: Message) -> bool:
    return pool.HasField("python_package_spec") or pool.HasField("container_spec")


def bucket(uri: str, location: str, location_of_bucket) -> None:
    """Refuse a gs:// URI whose bucket is not there, or not in the region of a job."""
    found = re.fullmatch(r"gs://([^/]+)(/.*)?", uri)
    if not found:
        raise invalid(f"{uri!r} is not a Cloud Storage URI: expected gs://BUCKET/PATH.")
    if found[1] == MANAGED_BUCKET:
        return
    region = location_of_bucket(found[1])
    if region is None:
        raise precondition(
            f"The Cloud Storage bucket of {uri!r} does not exist. Make it in the job's region: "
            f"storage.Client().create_bucket({found[1]!r}, location={location!r})."
        )
    if region.lower() != location:
        raise precondition(
            f"The Cloud Storage bucket of {uri!r} is in location {region.lower()!r}. It must be in the same regional "
            f"location as the service location {location!r}."
        )


def serving_image(container: Message) -> str | None:
    """Return the framework of a prebuilt prediction image, None for an image of one's own; refuse what cannot serve."""
    image = container.image_uri
    known = prebuilt(image)
    if known is None:
        return None
    purpose, name = known
    if purpose == "training":
        raise invalid(
            f"Invalid image {image!r} for deployment: it is a training image. Use one of Google's prediction images, "
            "such as us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest, or your own."
        )
    for framework, entry in read("images")["prediction"]["frameworks"].items():
        if any(name in release["images"].values() for release in entry["releases"]):
            return entry.get("runtime_of", framework)
    raise invalid(f"Invalid image {image!r} for deployment. Please use a Model with a valid image.")


def artifacts(framework: str, folder: Path, uri: str) -> None:
    """Refuse a model whose artifacts a prebuilt image cannot load, by their names alone."""
    names = read("images")["prediction"]["frameworks"][framework]["files"]
    if not any((folder / name).is_file() for name in names):
        raise precondition(
            f"The directory {uri!r} holds none of the files that a prebuilt {framework} image loads, which have to be "
            f"directly in it: {', '.join(names)}."
        )


def files(folder: Path, uri: str) -> None:
    """Refuse an artifact folder without a file, as after a training that saved its model elsewhere."""
    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise precondition(
            f'There are no files under "{uri}" to copy. A training task saves its model to os.environ["AIP_MODEL_DIR"].'
        )
