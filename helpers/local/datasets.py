"""DatasetService: managed datasets, and the three sets of rows that a training pipeline makes of one."""

import csv
import itertools
import math
import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from google.protobuf.message import Message

from helpers.local import errors
from helpers.local.batch import matching
from helpers.local.service import Service, location_of

SETS = ("training", "validation", "test")
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)
IGNORED = len(SETS)  # the number of a row that belongs to no set
ROWS = 20_000  # in a file at most: as on Vertex AI, a set may be several files
SEED = 0  # the same dataset and fractions give the same sets

ExportDataResponse = types.ExportDataResponse.pb()
DataStats = types.Model.DataStats.pb()


class DatasetService(Service):
    """Tables in Cloud Storage or BigQuery, known by a name."""

    name = "DatasetService"
    resources = {"Dataset": "datasets"}
    instead = {"ImportData": "make a TabularDataset, or let the training code read the files from gs://"}

    def export_data(self, request: Message) -> Message:
        """Write a dataset's rows as CSV files below a gs:// folder, split if that is asked for."""
        config = request.export_config
        files = self._files(self.store.get(request.name))
        if config.HasField("filter_split"):
            raise errors.invalid("A filter_split is supported only for unstructured datasets.")
        is_split = config.HasField("fraction_split") or config.export_use

        def work() -> Message:
            display_name = re.sub(r"[^\w.-]+", "-", self.store.get(request.name).display_name)
            folder = f"{config.gcs_destination.output_uri_prefix.rstrip('/')}/export-data-{display_name}-{_now()}"
            rows = Rows(files)
            sets = _split(rows, config) if is_split else bytearray(sum(1 for _ in rows))
            uris, counts = self._write(folder, rows, sets, SETS if is_split else ("data",))
            answer = ExportDataResponse(exported_files=uris)
            if is_split:
                keys = (f"{name}_data_items_count" for name in SETS)
                answer.data_stats.CopyFrom(DataStats(**dict(zip(keys, counts, strict=True))))
            return answer

        return self.cloud.operations.start(location_of(request.name), work)

    def environment_for(self, config: Message, location: str, base: str) -> dict[str, str]:
        """Split the dataset of an InputDataConfig and return the variables that tell a job where the sets are.

        The sets are written below the config's destination, or `base`, a gs:// folder, if it names none.
        """
        dataset = self.store.get(f"{location}/datasets/{config.dataset_id}")
        base = config.gcs_destination.output_uri_prefix or base
        if not base:
            raise errors.precondition(
                "A job with a dataset needs base_output_dir, a gs:// folder to write the sets to."
            )
        rows = Rows(self._files(dataset))
        folder = f"{base.rstrip('/')}/dataset-{config.dataset_id}-tables-{_now()}"
        self._write(folder, rows, _split(rows, config), SETS)
        uris = {f"AIP_{name.upper()}_DATA_URI": f"{folder}/{name}-*.csv" for name in SETS}
        return {"AIP_DATA_FORMAT": "csv", **uris}

    def _files(self, dataset: Message) -> dict[str, Path]:
        """Return the CSV files of a dataset by their URIs; wildcards are expanded."""
        source = (
            json_format.MessageToDict(dataset.metadata).get("inputConfig") if dataset.HasField("metadata") else None
        )
        if not source:
            raise errors.unimplemented(
                f"The use of {dataset.display_name!r}, which is not a table,",
                "make a TabularDataset, or let the training code read the files from gs://",
            )
        files = {}
        for uri in source.get("gcsSource", {}).get("uri", ()):
            bucket = uri.split("/")[2]
            found = matching(self.cloud, uri)
            if not found:
                raise errors.precondition(
                    f"The dataset's source {uri} matches no object. Upload it, or mend the dataset."
                )
            root = self.cloud.path_of(f"gs://{bucket}")
            files.update({f"gs://{bucket}/{path.relative_to(root)}": path for path in found})
        return files

    def _write(self, folder: str, rows: "Rows", sets: bytearray, names: tuple[str, ...]) -> tuple[list[str], list[int]]:
        """Write each set as files with a header; return their URIs and how many rows each set has."""
        counts = [sets.count(number) for number in range(len(names))]
        place = self.cloud.path_of(folder)
        place.mkdir(parents=True)
        uris = []
        for number, name in enumerate(names):
            chosen = itertools.compress(rows, (one == number for one in sets))
            shards = max(1, math.ceil(counts[number] / ROWS))
            for shard in range(shards):
                file = f"{name}-{shard:05}-of-{shards:05}.csv"
                with (place / file).open("w", encoding="utf-8", newline="") as out:
                    table = csv.writer(out, lineterminator="\n")
                    table.writerow(rows.header)
                    table.writerows(itertools.islice(chosen, ROWS))
                uris.append(f"{folder}/{file}")
        return uris, counts


class Rows:
    """The rows of CSV files with the same header, read anew each time: no table has to fit into memory."""

    def __init__(self, files: dict[str, Path]):
        """Read the header; `files` are known to their owner by URIs."""
        self.files = files
        self.header: list[str] = []
        for uri in files:
            header = next(self._read(uri), [])
            if not header:
                raise errors.precondition(f"{uri} is empty; expected a CSV file whose first line names the columns.")
            if header != (self.header or header):
                raise errors.precondition(
                    f"The columns of {uri} are {header}; those of the files before it {self.header}."
                )
            self.header = header

    def __iter__(self) -> Iterator[list[str]]:
        """Yield the rows, as texts."""
        for uri in self.files:
            for line, row in enumerate(itertools.islice(self._read(uri), 1, None), 2):
                if len(row) != len(self.header):
                    raise errors.precondition(
                        f"Row {line} of {uri} has {len(row)} fields; the header names {len(self.header)} columns."
                    )
                yield row

    def _read(self, uri: str) -> Iterator[list[str]]:
        """Yield the lines of a file that are not empty."""
        try:
            with self.files[uri].open(encoding="utf-8-sig", newline="") as file:
                yield from filter(None, csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise errors.precondition(f"{uri} is not a CSV file in UTF-8: {error}.") from None

    def column(self, name: str) -> Iterator[str]:
        """Yield the values of a column."""
        if name not in self.header:
            raise errors.invalid(f"There is no column {name!r} to split by; the columns are {', '.join(self.header)}.")
        place = self.header.index(name)
        return (row[place] for row in self)


def _split(rows: Rows, config: Message) -> bytearray:
    """Return for each row the number of the set that a config's split puts it into."""
    kind = config.WhichOneof("split") or "fraction_split"
    split = getattr(config, kind)
    if kind == "predefined_split":
        sets = bytearray(SETS.index(value) if value in SETS else IGNORED for value in rows.column(split.key))
    elif kind == "fraction_split":
        order = list(range(sum(1 for _ in rows)))
        random.Random(SEED).shuffle(order)
        sets = _cut(order, len(order), split)
    elif kind == "timestamp_split":
        times = [_time(value) for value in rows.column(split.key)]
        order = sorted((place for place, time in enumerate(times) if time), key=times.__getitem__)
        sets = _cut(order, len(times), split)
    elif kind == "filter_split":
        raise errors.invalid("A split by filters is supported only for datasets of images, text or video.")
    else:
        raise errors.unimplemented(f"A {kind}", "split by fractions, by a column that names the set, or by time")
    if not sets.count(0):
        what = f"no row has 'training' in {split.key!r}" if kind == "predefined_split" else "no row is left for it"
        raise errors.precondition(f"The training set is empty: {what}.")
    return sets


def _cut(order: list[int], count: int, split: Message) -> bytearray:
    """Give the first rows of an order to training, the next to validation, the rest to test, as the fractions say."""
    fractions = [getattr(split, f"{name}_fraction") for name in SETS]
    if any(fraction < 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise errors.invalid(f"The fractions {fractions} must be positive and sum to up to 1.")
    if not any(fractions):
        fractions = DEFAULT_FRACTIONS
    edges = [round(len(order) * part / sum(fractions)) for part in itertools.accumulate(fractions, initial=0)]
    sets = bytearray([IGNORED]) * count
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        for place in order[start:end]:
            sets[place] = number
    return sets


def _time(text: str) -> datetime | None:
    """Return the time that a text in RFC 3339 format tells, or None for any other text, whose row is ignored."""
    try:
        return datetime.fromisoformat(text) if text.endswith("Z") else None
    except ValueError:
        return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
