"""What runs, what it costs, and leaving nothing behind: read through the SDK, priced by a dated table.

    costs.endpoint("n1-standard-4")                  # $0.22 an hour, $160 a month, with or without requests
    cleanup = costs.Cleanup()                        # deletes what is added to it, even after the kernel has died
    endpoint = cleanup.add(aiplatform.Endpoint.create(display_name="diamonds"))
    ...
    cleanup.close()                                  # deletes, the last first, and says what
    costs.remaining(project, region, bucket)         # false when nothing is left that is billed

Prices are list prices of one region, each seen on the day that the table names. One that was not seen is unknown.
"""

import atexit
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from helpers import tables

HOURS_A_MONTH = 730
GB = 2**30
ACTIVE = ("PENDING", "RUNNING", "CANCELLING", "UPDATING")  # states in which machines are there, or are being got
MOST_OBJECTS = 10_000  # of a bucket that are looked at
PATIENCE = 600  # seconds in which a cancelled job ends
UNSEEN = "Workbench instances, Colab Enterprise runtimes, Artifact Registry, BigQuery, other buckets"


# Prices


@dataclass(frozen=True)
class Estimate:
    """What machines cost, in US dollars: `hourly` for all of them, and `total` for the hours; None if not known."""

    machines: str
    hours: float
    hourly: float | None
    date: date | None  # of the older price in it

    @property
    def total(self) -> float | None:
        """Return the price of all hours."""
        return None if self.hourly is None else self.hourly * self.hours

    def __repr__(self) -> str:
        """Return the estimate in a sentence, with where it is from."""
        span = "a month" if self.hours == HOURS_A_MONTH else f"{self.hours:g} h"
        prices = tables.read("prices")
        if self.hourly is None:
            return f"{self.machines}, {span}: unknown here; the price stands at {prices['source']}"
        return (
            f"{self.machines}, {span}: ${self.total:,.2f} (${self.hourly:,.4g} an hour; list price in "
            f"{prices['region']} seen on {self.date}, without disks)"
        )


def _prices(machine_type: str, purpose: str, accelerator: str, count: int, region: str) -> list[dict] | None:
    """Return the prices that add up to one machine's, None if one of them is not known."""
    prices = tables.read("prices")
    found = [prices[purpose].get(machine_type)]
    # Google's deployment prices of machines that are made for GPUs include them.
    is_included = purpose == "prediction" and machine_type in tables.read("machines")["gpu"]
    if count and not is_included:
        found += [prices.get(f"{purpose}_accelerator", {}).get(accelerator)] * count
    return None if region != prices["region"] or None in found else found


def hourly(
    machine_type: str,
    purpose: str,
    accelerator: str = "",
    accelerator_count: int = 0,
    count: int = 1,
    region: str = "us-central1",
) -> float | None:
    """Return the price of machines for "training" or "prediction", in US dollars an hour; None if it is not known."""
    found = _prices(machine_type, purpose, accelerator, accelerator_count, region)
    return None if found is None else count * sum(price["usd"] for price in found)


def estimate(
    machine_type: str,
    hours: float,
    purpose: str = "training",
    accelerator: str = "",
    accelerator_count: int = 0,
    replicas: int = 1,
    region: str = "us-central1",
) -> Estimate:
    """Return what `replicas` machines cost for some hours. Raises ValueError for a time or a number that cannot be."""
    tables.known("purpose", purpose, ("training", "prediction"))
    if hours <= 0 or replicas < 1:
        raise ValueError(f"{replicas} machines for {hours} hours cost nothing; expected at least 1, and more than 0 h")
    found = _prices(machine_type, purpose, accelerator, accelerator_count, region)
    gpus = f" with {accelerator_count} x {accelerator}" if accelerator_count else ""
    return Estimate(
        machines=f"{replicas} x {machine_type}{gpus} in {region} for {purpose}",
        hours=hours,
        hourly=hourly(machine_type, purpose, accelerator, accelerator_count, replicas, region),
        date=min(tables.day(price["date"]) for price in found) if found else None,
    )


def endpoint(
    machine_type: str,
    replicas: int = 1,
    accelerator: str = "",
    accelerator_count: int = 0,
    region: str = "us-central1",
) -> Estimate:
    """Return what an endpoint costs a month: it is billed from deployment to undeployment, requests or not."""
    return estimate(machine_type, HOURS_A_MONTH, "prediction", accelerator, accelerator_count, replicas, region)


def workbench(machine_type: str, hours: float = HOURS_A_MONTH, region: str = "us-central1") -> Estimate:
    """Return what a Workbench instance costs for some hours of running: its machine and the fee for managing it.

    Only N1 machines have a price here. The disks of an instance are billed too, also while it is stopped.
    """
    prices, (family, _, size) = tables.read("prices"), machine_type.rpartition("-")
    price = prices["workbench"].get(family.partition("-")[0]) if region == prices["region"] else None
    if price:
        memory_gb = int(size) * tables.read("machines")["cpu"][family]["memory_gb_per_vcpu"]
        hourly = int(size) * price["vcpu"]["usd"] + memory_gb * price["gb"]["usd"]
    return Estimate(
        machines=f"1 x {machine_type} in {region} for Workbench",
        hours=hours,
        hourly=hourly if price else None,
        date=min(tables.day(part["date"]) for part in price.values()) if price else None,
    )


def automl(node_hours: float, kind: str = "tabular", region: str = "us-central1") -> Estimate:
    """Return what AutoML costs that spends its whole budget of node hours. Raises ValueError for less than it takes."""
    prices = tables.read("prices")
    price = prices["automl"][tables.known("kind of AutoML", kind, prices["automl"])]
    if node_hours < price["least_node_hours"]:
        raise ValueError(f"AutoML ({kind}) takes {price['least_node_hours']} node hours or more, not {node_hours}")
    is_known = region == prices["region"]
    return Estimate(
        machines=f"AutoML ({kind}) in {region}, in node hours",
        hours=node_hours,
        hourly=price["usd"] if is_known else None,
        date=tables.day(price["date"]) if is_known else None,
    )


def bigquery(read: int, statement: str = "query") -> float:
    """Return the price, in US dollars, of a statement of BigQuery that reads so many bytes of a table, on demand.

    `statement` is "query", as ML.EVALUATE and ML.PREDICT are, or "CREATE MODEL" of a model that BigQuery trains itself,
    such as linear regression. What Vertex AI trains for it, such as boosted trees, costs a query and that training.
    """
    prices = tables.read("prices")
    price = prices["bigquery_per_tib"][tables.known("statement", statement, prices["bigquery_per_tib"])]
    return price["usd"] * max(read, prices["bigquery_least_mb"] * 2**20) / 2**40


# What runs


@dataclass(frozen=True)
class Running:
    """Something that is billed by the hour as long as it is there."""

    kind: str  # "endpoint", "job", "tuning job", "batch job" or "training pipeline"
    name: str
    machine_type: str
    count: int
    hourly: float | None  # US dollars; None if the table has no price for it
    resource: str = ""  # its full name, which `delete` takes


def _client(service: str, region: str):
    """Return the API's client of a service in a region; a context manager."""
    from google.cloud import aiplatform

    client = getattr(aiplatform.gapic, f"{service}ServiceClient")
    return client(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})


def _list(project: str, region: str, service: str, plural: str, states: str = "") -> list:
    """Return the resources of a kind in a place; with a prefix of `states`, those in one that is ACTIVE."""
    request = {"parent": f"projects/{project}/locations/{region}"}
    if states:
        request["filter"] = " OR ".join(f'state="{states}_{state}"' for state in ACTIVE)
    with _client(service, region) as client:
        return list(getattr(client, f"list_{plural}")(request=request))


def running(project: str, region: str) -> list[Running]:
    """Return what is billed by the hour now in a project and region: deployed models and jobs that have not ended.

    A job that belongs to a training pipeline or to a tuning job's trial is counted once, as a job. Endpoints are
    counted with their smallest number of replicas.
    """
    kinds = (
        ("Endpoint", "endpoints"),
        ("Job", "custom_jobs", "JOB_STATE"),
        ("Job", "hyperparameter_tuning_jobs", "JOB_STATE"),
        ("Job", "batch_prediction_jobs", "JOB_STATE"),
        ("Pipeline", "training_pipelines", "PIPELINE_STATE"),
    )
    with ThreadPoolExecutor(len(kinds)) as pool:
        endpoints, jobs, searches, batches, pipelines = pool.map(lambda kind: _list(project, region, *kind), kinds)

    found = []
    for place in endpoints:
        for deployed in place.deployed_models:
            resources = deployed.dedicated_resources or deployed.automatic_resources
            found.append(_priced("endpoint", place, resources, resources.min_replica_count, "prediction", region))
    for job in jobs:
        for pool in job.job_spec.worker_pool_specs:
            found.append(_priced("job", job, pool, pool.replica_count, "training", region))
    names = {job.name for job in jobs}
    for search in searches:
        trials = [trial for trial in search.trials if trial.state.name in ("ACTIVE", "REQUESTED", "STOPPING")]
        count = sum(trial.custom_job not in names for trial in trials) if trials else search.parallel_trial_count
        for pool in search.trial_job_spec.worker_pool_specs if count else ():
            found.append(_priced("tuning job", search, pool, count * (pool.replica_count or 1), "training", region))
    for batch in batches:
        resources = batch.dedicated_resources
        found.append(_priced("batch job", batch, resources, resources.starting_replica_count, "prediction", region))
    for pipeline in pipelines:
        # One with a custom task is billed through its job, which is found above.
        if not {"workerPoolSpecs", "trialJobSpec"} & set(pipeline.training_task_inputs or ()):
            found.append(Running("training pipeline", pipeline.display_name, "Google's choice", 1, None, pipeline.name))
    return found


def _priced(kind: str, owner, resources, count: int, purpose: str, region: str) -> Running:
    machine = getattr(resources, "machine_spec", None)
    if not machine or not machine.machine_type:
        return Running(kind, owner.display_name, "Google's choice", count or 1, None, owner.name)
    count = count or 1
    accelerator = machine.accelerator_type.name if machine.accelerator_count else ""
    price = hourly(machine.machine_type, purpose, accelerator, machine.accelerator_count, count, region)
    return Running(kind, owner.display_name, machine.machine_type, count, price, owner.name)


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


# What is left


@dataclass(frozen=True)
class Remaining:
    """What is still billed in a project and region: false if it is nothing. It shows itself as a list."""

    project: str
    region: str
    running: tuple[Running, ...]  # billed by the hour
    tensorboards: tuple[str, ...]  # billed by what they hold: full names
    bucket: str  # the gs:// URI that was looked at, empty if none was
    objects: int  # in it
    bytes: int  # of these

    def __bool__(self) -> bool:
        """Say whether anything is left."""
        return bool(self.running or self.tensorboards or self.objects)

    def __repr__(self) -> str:
        """Return a line for each thing that is left, and what was not looked at."""
        monthly = tables.read("prices")["per_gb_month"]
        lines = []
        for item in self.running:
            price = f"${item.hourly:.4g} an hour" if item.hourly is not None else "at a price unknown here"
            lines.append(f"{item.kind} {item.name}: {item.count} x {item.machine_type}, {price}; {item.resource}")
        for name in self.tensorboards:
            lines.append(f"TensorBoard: ${monthly['TensorBoard']['usd']} a GB and month of what it holds; {name}")
        if self.objects:
            price = self.bytes / GB * monthly["Cloud Storage"]["usd"]
            words = f"${price:,.2f} a month" if price >= 0.01 else "less than a cent a month"
            more = " or more" if self.objects == MOST_OBJECTS else ""
            lines.append(f"{self.bucket}: {self.objects:,} objects{more}, {self.bytes / 2**20:,.1f} MB, {words}")
        looked = f"endpoints, jobs, tuning jobs, batch jobs, training pipelines, TensorBoards{', ' * bool(self.bucket)}"
        if not lines:
            lines = [f"Nothing that is billed is left in {self.project}, {self.region}: {looked}{self.bucket}."]
        return "\n".join([*lines, f"Not looked at: {UNSEEN}."])


def remaining(project: str, region: str, bucket: str = "") -> Remaining:
    """Return what is still billed in a project and region, in `bucket` (a gs:// URI) too if it is given."""
    found = running(project, region)
    boards = [board.name for board in _list(project, region, "Tensorboard", "tensorboards")]
    sizes = _sizes(project, bucket) if bucket else []
    return Remaining(project, region, tuple(found), tuple(boards), bucket, len(sizes), sum(sizes))


def _sizes(project: str, bucket: str) -> list[int]:
    from google.api_core.exceptions import NotFound
    from google.cloud import storage

    client = storage.Client(project=project)
    name = bucket.removeprefix("gs://").split("/")[0]
    try:
        blobs = client.list_blobs(name, max_results=MOST_OBJECTS, fields="items(size),nextPageToken")
        return [blob.size or 0 for blob in blobs]
    except NotFound:
        return []


# Deleting

RESOURCES = {
    "endpoints": ("Endpoint", "endpoint"),
    "models": ("Model", "model"),
    "customJobs": ("Job", "custom_job"),
    "hyperparameterTuningJobs": ("Job", "hyperparameter_tuning_job"),
    "batchPredictionJobs": ("Job", "batch_prediction_job"),
    "trainingPipelines": ("Pipeline", "training_pipeline"),
    "tensorboards": ("Tensorboard", "tensorboard"),
    "datasets": ("Dataset", "dataset"),
}
EXPECTED = (
    f"expected projects/PROJECT/locations/REGION/KIND/ID with a KIND of {', '.join(RESOURCES)}, or gs://BUCKET, "
    "gs://BUCKET/FOLDER/, gs://BUCKET/OBJECT, or bq://PROJECT.DATASET"
)


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a name that `delete` takes; ValueError says which names those are."""
    parts = tuple(name.split("/"))
    if name.startswith("gs://") and parts[2]:
        return parts
    if name.startswith("bq://") and name.count(".") == 1:
        return parts
    if len(parts) == 6 and (parts[0], parts[2]) == ("projects", "locations") and parts[4] in RESOURCES:
        return parts
    raise ValueError(f"{name!r} cannot be deleted here; {EXPECTED}")


def delete(name: str) -> str:
    """Delete a resource by its full name or URI, with all that it holds; return "deleted" or "was gone".

    An endpoint is undeployed before, a job that runs is cancelled before.
    """
    from google.api_core.exceptions import NotFound

    parts = _parts(name)
    try:
        if name.startswith("gs://"):
            _delete_objects(parts[2], "/".join(parts[3:]))
        elif name.startswith("bq://"):
            _delete_dataset(name.removeprefix("bq://"))
        elif parts[4] == "endpoints":
            from google.cloud import aiplatform

            aiplatform.Endpoint(name).delete(force=True)
        else:
            _delete_resource(name, *RESOURCES[parts[4]], region=parts[3])
    except NotFound:
        return "was gone"
    return "deleted"


def _delete_resource(name: str, service: str, kind: str, region: str) -> None:
    from google.api_core.exceptions import BadRequest

    with _client(service, region) as client:
        delete = getattr(client, f"delete_{kind}")
        if not hasattr(client, f"cancel_{kind}"):
            delete(name=name).result()
            return
        with contextlib.suppress(BadRequest):  # it has ended
            getattr(client, f"cancel_{kind}")(name=name)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                delete(name=name).result()
                return
            except BadRequest:  # it has not ended
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)


def _delete_objects(bucket: str, path: str) -> None:
    from google.cloud import storage

    place = storage.Client(project="-").bucket(bucket)  # the client wants a project, and objects need none
    folder = f"{path.rstrip('/')}/" if path else ""
    names = [blob.name for blob in place.list_blobs(prefix=path.rstrip("/"))]
    mine = [name for name in names if name.startswith(folder) or name == path]
    place.delete_blobs(mine, on_error=lambda blob: None)  # gone in the meantime
    if not path:
        place.delete()


def _delete_dataset(name: str) -> None:
    from google.cloud import bigquery

    project = name.split(".")[0]
    bigquery.Client(project=project).delete_dataset(name, delete_contents=True)


@dataclass(frozen=True)
class Report:
    """What became of each thing that was to be deleted: `outcomes`, by its name."""

    outcomes: dict[str, str]

    @property
    def failed(self) -> list[str]:
        """Return the names of what is still there."""
        return [name for name, outcome in self.outcomes.items() if outcome.startswith("NOT")]

    def __repr__(self) -> str:
        """Return a line for each."""
        return "\n".join(f"{outcome}: {name}" for name, outcome in self.outcomes.items()) or "nothing to delete"


def delete_all(names: Iterable[str], done=lambda name: None) -> Report:
    """Delete in the reverse order, going on when one fails, and call `done` with each name that is gone.

    What failed is tried again as long as others went: a model, for one, can go only after its endpoint.
    """
    outcomes, waiting = {}, list(reversed(list(names)))
    while waiting:
        failed = []
        for name in waiting:
            try:
                outcomes[name] = delete(name)
                done(name)
            except Exception as error:
                outcomes[name] = f"NOT deleted ({type(error).__name__}: {error})"
                failed.append(name)
        if len(failed) == len(waiting):
            break
        waiting = failed
    return Report(outcomes)


class Cleanup:
    """Deletes what was added to it: at the end of a `with` block, at `close`, or when the process ends.

    However the process ends: as long as something is registered, a second, small process waits for the first one's
    end, and deletes what that one could not. Only the end of the machine ends both.
    """

    _guard: subprocess.Popen | None = None  # one for all, while anything is registered
    _registered: dict[str, None] = {}  # with all, in the order of registration

    def __init__(self):
        """Begin with nothing to delete."""
        self._names: dict[str, None] = {}
        atexit.register(self._at_exit)

    def add(self, resource):
        """Register a resource of the SDK, its full name, or a gs:// or bq:// URI; return what was given.

        Register what costs money as soon as it is there: an endpoint before a model is deployed to it.
        """
        try:
            if hasattr(resource, "wait_for_resource_creation"):  # a job that was started with sync=False
                resource.wait_for_resource_creation()
            name = resource if isinstance(resource, str) else resource.resource_name
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"{resource!r} has no resource name (yet): {error}; {EXPECTED}") from None
        _parts(name)
        self._names[name] = None
        self._tell("+", name)
        return resource

    def close(self) -> Report:
        """Delete all that was added, the last first, and return what became of it; what failed stays registered."""
        return delete_all(self._names, self._forget)

    def _forget(self, name: str) -> None:
        self._names.pop(name, None)
        self._tell("-", name)

    @classmethod
    def _tell(cls, sign: str, name: str) -> None:
        """Keep the second process informed, and running exactly as long as something is registered."""
        if sign == "+":
            cls._registered[name] = None
        else:
            cls._registered.pop(name, None)
        lines = f"{sign}{name}\n"
        if cls._guard is None or cls._guard.poll() is not None:
            if cls._guard is not None:  # somebody ended it
                cls._guard.stdin.close()
            if not cls._registered:
                cls._guard = None
                return
            cls._guard = subprocess.Popen(
                [sys.executable, "-m", "helpers.costs"],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                start_new_session=True,  # out of reach of what is sent to the notebook's processes
                text=True,
            )
            lines = "".join(f"+{name}\n" for name in cls._registered)
        cls._guard.stdin.write(lines)
        cls._guard.stdin.flush()
        if not cls._registered:
            cls._guard.stdin.close()
            cls._guard.wait()
            cls._guard = None

    def _at_exit(self) -> None:
        if self._names:
            print(self.close(), flush=True)

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, *error):
        """Delete, and print what became of it; an error of the block goes on."""
        print(self.close(), flush=True)


def _guard() -> None:
    """Follow on standard input what is registered (+) and gone (-); when its other end closes, delete what is left."""
    names = {}
    for line in sys.stdin:
        name = line[1:].rstrip("\n")
        if line[0] == "+":
            names[name] = None
        else:
            names.pop(name, None)
    if names:
        report = delete_all(names)
        with contextlib.suppress(OSError):  # the reader may have gone with the notebook
            print(f"Left by a process that has ended:\n{report}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _guard()
