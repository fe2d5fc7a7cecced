"""What runs and what it costs: read through the SDK, priced by a dated table."""

from dataclasses import dataclass

from helpers import tables

HOURS_A_MONTH = 730


@dataclass(frozen=True)
class Running:
    """Something that is billed by the hour as long as it is there."""

    kind: str  # "endpoint" or "job"
    name: str
    machine_type: str
    count: int
    hourly: float | None  # US dollars; None if the table has no price for it


def hourly(
    machine_type: str, purpose: str, accelerator: str = "", accelerator_count: int = 0, count: int = 1
) -> float | None:
    """Return the price of machines for "training" or "prediction", in US dollars an hour; None if it is not known."""
    prices = tables.read("prices")
    machine = prices[purpose].get(machine_type)
    gpu = prices["accelerator"].get(accelerator) if accelerator_count else 0.0
    if machine is None or gpu is None:
        return None
    return count * (machine + gpu * accelerator_count)


def running(project: str, region: str) -> list[Running]:
    """Return what is billed by the hour now in a project and region: deployed models and jobs that have not ended."""
    from google.cloud import aiplatform

    found = []
    place = {"project": project, "location": region}
    for endpoint in aiplatform.Endpoint.list(**place):
        for deployed in endpoint.gca_resource.deployed_models:
            resources = deployed.dedicated_resources
            count = resources.min_replica_count
            found.append(_priced("endpoint", endpoint.display_name, resources, count, "prediction"))
    for job in aiplatform.CustomJob.list(filter='state="JOB_STATE_RUNNING" OR state="JOB_STATE_PENDING"', **place):
        for pool in job.gca_resource.job_spec.worker_pool_specs:
            found.append(_priced("job", job.display_name, pool, pool.replica_count, "training"))
    return found


def _priced(kind: str, name: str, resources, count: int, purpose: str) -> Running:
    machine = resources.machine_spec
    count = count or 1
    accelerator = machine.accelerator_type.name if machine.accelerator_count else ""
    price = hourly(machine.machine_type, purpose, accelerator, machine.accelerator_count, count)
    return Running(kind, name, machine.machine_type, count, price)


def summary(found: list[Running], is_local: bool) -> str:
    """Return one line about what runs and what it costs an hour, or would cost if it ran on Google Cloud."""
    if not found:
        return "nothing that is billed by the hour"
    names = ", ".join(f"{item.kind} {item.name} ({item.count} x {item.machine_type})" for item in found)
    known = sum(item.hourly or 0 for item in found)
    unknown = sum(item.hourly is None for item in found)
    price = f"{'it would cost' if is_local else 'it costs'} ${known:.2f} an hour, ${known * HOURS_A_MONTH:.0f} a month"
    missing = f", and {unknown} of unknown price: {tables.read('prices')['source']}" if unknown else ""
    return f"{names}; {price}{missing}"
