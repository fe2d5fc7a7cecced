"""Batch prediction: instances from files, through a model server of its own, into files."""

import csv
import fnmatch
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from google.protobuf.message import Message
from google.rpc import code_pb2

from helpers.local import checks, errors
from helpers.local.background import Control, JobFailed
from helpers.local.endpoints import plain

BATCH_SIZE = 64  # instances of a request, unless the job says otherwise
AT_ONCE = 2  # requests at a time
INPUTS, OUTPUTS = ("jsonl", "csv"), ("jsonl", "csv")
SHORT_MESSAGE = 500  # characters of an error in the errors' file


def check(cloud, location: str, job: Message) -> None:
    """Refuse a batch prediction that cannot run."""
    given, wanted = job.input_config, job.output_config
    for side, format_, known in (
        ("input_config.instances_format", given.instances_format, INPUTS),
        ("output_config.predictions_format", wanted.predictions_format, OUTPUTS),
    ):
        if format_ not in known:
            if format_ in ("bigquery", "tf-record", "tf-record-gzip", "file-list"):
                raise errors.unimplemented(f"Batch prediction with {side} {format_!r}", f"use {' or '.join(known)}")
            raise errors.invalid(f"List of found errors: 1.Field: {side}; Message: {format_!r} is not supported.")
    for uri in (*given.gcs_source.uris, wanted.gcs_destination.output_uri_prefix):
        checks.bucket(uri, location.split("/")[3], cloud.bucket_location)
    model = cloud.services["ModelService"].version(job.model)
    if not model.container_spec.image_uri:
        raise errors.precondition(f"The model {model.name} has no serving container: upload it with one.")
    checks.serving_image(model.container_spec)
    machine = job.dedicated_resources.machine_spec
    if machine.machine_type:
        checks.machine(machine, "dedicated_resources.machine_spec", serving=True)


def run(cloud, name: str, control: Control) -> None:
    """Run a batch prediction job."""
    job = cloud.store.get(name)
    model = cloud.services["ModelService"].version(job.model)
    files = [file for uri in job.input_config.gcs_source.uris for file in matching(cloud, uri)]
    if not files:
        raise JobFailed(f"No files match {', '.join(job.input_config.gcs_source.uris)}.", code_pb2.NOT_FOUND)
    stamp = time.strftime("%Y_%m_%dT%H_%M_%S", time.gmtime()) + f"_{time.time_ns() // 10**6 % 1000:03d}Z"
    prefix = job.output_config.gcs_destination.output_uri_prefix.rstrip("/")
    directory = f"{prefix}/prediction-{re.sub(r'[^A-Za-z0-9_-]', '_', model.display_name)}-{stamp}"
    server = f"batch-{name.rsplit('/', 1)[1]}"
    control.stops.append(lambda: cloud.serving.stop(server))
    try:
        cloud.start_server(server, model, "", job.dedicated_resources.machine_spec)
        with cloud.store.change(name) as changed:
            changed.output_info.gcs_output_directory = directory
        counts = predict_files(cloud, job, server, files, control)
    finally:
        cloud.serving.stop(server)
    with cloud.store.change(name) as changed:
        changed.completion_stats.successful_count, changed.completion_stats.failed_count = counts
    if counts[1] and not counts[0]:
        raise JobFailed(f"None of the {counts[1]} instances could be predicted: see {directory}.")


def matching(cloud, uri: str) -> list[Path]:
    """Return the files of a gs:// URI, which may hold wildcards behind the bucket."""
    bucket, _, pattern = uri.removeprefix("gs://").partition("/")
    if not re.search(r"[*?\[]", pattern):
        path = cloud.path_of(uri)
        return [path] if path.is_file() else []
    root = cloud.path_of(f"gs://{bucket}")
    names = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return [names[name] for name in sorted(fnmatch.filter(names, pattern))]


def predict_files(cloud, job: Message, server: str, files: list[Path], control: Control) -> tuple[int, int]:
    """Write predictions and errors into the output folder; return how many instances went well and how many did not."""
    folder = cloud.path_of(cloud.store.get(job.name).output_info.gcs_output_directory)
    folder.mkdir(parents=True, exist_ok=True)
    size = job.manual_batch_tuning_parameters.batch_size or BATCH_SIZE
    parameters = plain(job.model_parameters)
    as_csv = job.output_config.predictions_format == "csv"
    results = folder / ("prediction.results-00000-of-00001" + (".csv" if as_csv else ""))
    failures = folder / "prediction.errors_stats-00000-of-00001"
    good = bad = 0
    instances = (transformed(instance, job.instance_config) for file in files for instance in read(file, job))

    def ask(group):
        return group, call(cloud, server, group, parameters)

    with results.open("w", newline="") as out, failures.open("w") as errors_file, ThreadPoolExecutor(AT_ONCE) as pool:
        table = csv.writer(out) if as_csv else None
        for group, answers in pool.map(ask, batches(instances, size)):
            if control.cancelled.is_set():
                break
            for instance, (prediction, error) in zip(group, answers, strict=True):
                if error:
                    bad += 1
                    errors_file.write(json.dumps({"instance": instance, "error": error[:SHORT_MESSAGE]}) + "\n")
                    continue
                if not table:
                    out.write(json.dumps({"instance": instance, "prediction": prediction}) + "\n")
                else:
                    if not good:
                        table.writerow([*columns(instance), "prediction"])
                    cells = instance.values() if isinstance(instance, dict) else instance
                    table.writerow([*cells, prediction if isinstance(prediction, str) else json.dumps(prediction)])
                good += 1
    return good, bad


def columns(instance) -> list[str]:
    """Return names for the columns of an instance."""
    return list(instance) if isinstance(instance, dict) else [f"feature_{number}" for number in range(len(instance))]


def read(file: Path, job: Message) -> Iterator:
    """Return the instances of a file: JSON values, or the rows of a CSV file as lists, numbers as numbers."""
    with file.open(newline="", encoding="utf-8") as lines:
        if job.input_config.instances_format == "jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise JobFailed(f"{file.name}, line {number} is not JSON: {error}.") from None
        else:
            names = next(csv.reader(lines), [])
            # As Vertex AI reads it: what has no quotation marks is a number.
            for row in csv.reader(lines):
                cells = dict(zip(names, map(number_or_text, row), strict=False))
                yield select(cells, job.instance_config, as_list=True)


def number_or_text(cell: str):
    """Return the number that a cell holds, or its text."""
    try:
        return float(cell)
    except ValueError:
        return cell


def select(instance: dict, config: Message, as_list: bool = False):
    """Return an instance with the fields that a job's instance_config includes."""
    names = list(config.included_fields) or [name for name in instance if name not in config.excluded_fields]
    names = [name for name in names if name != config.key_field]
    kept = {name: instance[name] for name in names if name in instance}
    return list(kept.values()) if as_list or config.instance_type == "array" else kept


def transformed(instance, config: Message):
    """Return an instance as instance_config wants it sent to the model."""
    return select(instance, config) if isinstance(instance, dict) else instance


def batches(instances: Iterator, size: int) -> Iterator[list]:
    """Cut a stream of instances into lists of a size."""
    group = []
    for instance in instances:
        group.append(instance)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def call(cloud, server: str, group: list, parameters) -> list[tuple]:
    """Return a (prediction, error) for each instance; a request that fails is repeated for each instance alone."""
    body = {"instances": group} | ({"parameters": parameters} if parameters else {})
    status, _, content = cloud.serving.call(server, json.dumps(body).encode(), {"content-type": "application/json"})
    text = content.decode(errors="replace")
    if status == 200:
        try:
            predictions = json.loads(text)["predictions"]
            if len(predictions) == len(group):
                return [(prediction, None) for prediction in predictions]
            text = f"{len(predictions)} predictions for {len(group)} instances; expected one for each."
        except (ValueError, KeyError, TypeError):
            text = f"the answer is not {{'predictions': [...]}}: {text}"
    if len(group) > 1:
        return [answer for instance in group for answer in call(cloud, server, [instance], parameters)]
    return [(None, text)]
