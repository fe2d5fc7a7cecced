"""DatasetService: managed datasets, and the three sets of rows that a training pipeline makes of one."""

import csv
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import PROJECT, PROJECT_NUMBER, checks, errors
from helpers.local.batch import matching
from helpers.local.bigquery_schemas import BigQueryError, Name
from helpers.local.service import Service, location_of

SETS = ("training", "validation", "test")
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)
IGNORED = len(SETS)  # the number of a row that belongs to no set
ROWS = 20_000  # in a file at most: as on Vertex AI, a set may be several files
SEED = 0  # the same dataset and fractions give the same sets

ExportDataResponse, DataStats = types.ExportDataResponse.pb(), types.Model.DataStats.pb()


class DatasetService(Service):
    """Tables in Cloud Storage or BigQuery, known by a name."""

    name = "DatasetService"
    resources = {"Dataset": "datasets"}
    instead = {"ImportData": "make a TabularDataset, or let the training code read the files from gs://"}

    def export_data(self, request: Message) -> Message:
        """Write a dataset's rows as CSV files below a gs:// folder, split if that is asked for."""
        config = request.export_config
        dataset = self.store.get(request.name)
        files = self._files(dataset)
        self._check_bucket(config.gcs_destination.output_uri_prefix, request.name)
        display_name = re.sub(r"[^\w.-]+", "-", dataset.display_name)
        folder = f"{config.gcs_destination.output_uri_prefix.rstrip('/')}/export-data-{display_name}-{_now()}"

        def work() -> Message:
            rows = Rows(files)
            if not (config.WhichOneof("split") or config.export_use):
                uris, _ = self._write(folder, rows, bytearray(sum(1 for _ in rows)), ["data"])
                return ExportDataResponse(exported_files=uris)
            uris, counts = self._write(folder, rows, split(rows, config), SETS)
            stats = DataStats(**{f"{name}_data_items_count": count for name, count in zip(SETS, counts, strict=True)})
            return ExportDataResponse(exported_files=uris, data_stats=stats)

        return self.cloud.operations.start(location_of(request.name), work)

    def environment_for(self, config: Message, location: str, base: str) -> dict[str, str]:
        """Split the dataset of an InputDataConfig and return the variables that tell a job where the sets are.

        The sets are written to the config's destination, or below `base`, a gs:// folder, if it names none.
        """
        dataset = self.store.get(f"{location}/datasets/{config.dataset_id}")
        _, table = _sources(dataset)
        name = f"dataset-{config.dataset_id}-tables-{_now()}"
        base = config.gcs_destination.output_uri_prefix or base
        if config.HasField("bigquery_destination"):
            if not table:
                raise errors.invalid("Only a dataset from BigQuery can be split into tables of BigQuery.")
            destination = config.bigquery_destination.output_uri.removeprefix("bq://")
            if destination not in (PROJECT, PROJECT_NUMBER):
                raise errors.invalid(f"bigquery_destination is {destination!r}; expected a project: bq://{PROJECT}.")
            made = self._split_table(table, config, name)
            uris = [f"bq://{PROJECT}.{made}.{part}" for part in SETS]
        else:
            self._check_bucket(base, location)
            folder = f"{base.rstrip('/')}/{name}"
            uris = [f"{folder}/{part}-*.csv" for part in SETS]
            if table:
                made = self._split_table(table, config, name)
                for part, uri in zip(SETS, uris, strict=True):
                    self._query(f"EXPORT DATA OPTIONS (uri='{uri}', format='CSV') AS SELECT * FROM {made}.{part}")
                self._query(f"DROP SCHEMA {made} CASCADE")
            else:
                rows = Rows(self._files(dataset))
                self._write(folder, rows, split(rows, config), SETS)
        variables = {f"AIP_{part.upper()}_DATA_URI": uri for part, uri in zip(SETS, uris, strict=True)}
        return {"AIP_DATA_FORMAT": "bigquery" if uris[0].startswith("bq://") else "csv", **variables}

    def _check_bucket(self, uri: str, name: str) -> None:
        """Refuse to write to a bucket that is not there, or not in the location of a resource."""
        checks.bucket(uri, name.split("/")[3], self.cloud.bucket_location)

    # CSV files in Cloud Storage

    def _files(self, dataset: Message) -> dict[str, Path]:
        """Return the CSV files of a dataset by their URIs; wildcards are expanded."""
        sources, table = _sources(dataset)
        if table:
            raise errors.unimplemented("The export of a dataset from BigQuery", "use BigQuery's own EXPORT DATA")
        files = {}
        for uri in sources:
            found = matching(self.cloud, uri)
            if not found:
                raise errors.precondition(
                    f"The dataset's source {uri} matches no object. Upload it, or mend the dataset."
                )
            files.update({f"gs://{path.relative_to(self.cloud.buckets.resolve())}": path for path in found})
        return files

    def _write(self, folder: str, rows: "Rows", sets: bytearray, names: Iterable[str]) -> tuple[list[str], list[int]]:
        """Write each set as files with a header; return their URIs and how many rows each set has."""
        place = self.cloud.path_of(folder)
        place.mkdir(parents=True)
        uris, counts = [], []
        for number, name in enumerate(names):
            counts.append(sets.count(number))
            chosen = itertools.compress(rows, (one == number for one in sets))
            shards = max(1, math.ceil(counts[-1] / ROWS))
            for shard in range(shards):
                file = f"{name}-{shard:05}-of-{shards:05}.csv"
                with (place / file).open("w", encoding="utf-8", newline="") as out:
                    table = csv.writer(out, lineterminator="\n")
                    table.writerow(rows.header)
                    table.writerows(itertools.islice(chosen, ROWS))
                uris.append(f"{folder}/{file}")
        return uris, counts

    # Tables of BigQuery

    def _split_table(self, table: str, config: Message, name: str) -> str:
        """Make a BigQuery dataset with a table for each set and return its id."""
        dataset = re.sub(r"\W", "_", name)
        queries = zip(SETS, split_queries(table, config), strict=True)
        tables = [f"CREATE TABLE {dataset}.{part} AS {query}" for part, query in queries]
        try:
            self._query(";\n".join([f"CREATE SCHEMA {dataset}", *tables]))
            warehouse = self.cloud.bigquery.warehouse
            if not warehouse.count(warehouse.cursor(), Name(PROJECT, dataset, "training")):
                raise empty_training_set(config)
        except errors.Refused:
            self._query(f"DROP SCHEMA IF EXISTS {dataset} CASCADE")
            raise
        return dataset

    def _query(self, sql: str) -> None:
        api = self.cloud.bigquery
        try:
            api.prepare({"query": {"query": sql}}, api.warehouse.cursor(), "split").run()
        except BigQueryError as error:
            raise errors.precondition(str(error)) from None


def _sources(dataset: Message) -> tuple[list[str], str]:
    """Return the gs:// URIs and the BigQuery table of a tabular dataset, of which one is empty."""
    source = dataset.metadata.struct_value.fields["inputConfig"].struct_value.fields
    uris = [uri.string_value for uri in source["gcsSource"].struct_value.fields["uri"].list_value.values]
    table = source["bigquerySource"].struct_value.fields["uri"].string_value
    if not uris and not table:
        raise errors.unimplemented(
            f"The use of {dataset.display_name!r}, which is not a table,",
            "make a TabularDataset, or let the training code read the files from gs://",
        )
    return uris, table.removeprefix("bq://").replace(":", ".")


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
                    f"The columns of {uri} are {header}; those of the files before: {self.header}."
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


# The split: by fractions at random, by a column that names the set, or by time, the past for training


def split(rows: Rows, config: Message) -> bytearray:
    """Return for each row the number of the set that a config's split puts it into."""
    kind, key = kind_of_split(config)
    if kind == "predefined_split":
        sets = bytearray(SETS.index(value) if value in SETS else IGNORED for value in rows.column(key))
    else:
        if kind == "fraction_split":
            order = list(range(sum(1 for _ in rows)))
            count = len(order)
            random.Random(SEED).shuffle(order)
        else:
            times = [_time(value) for value in rows.column(key)]
            order = sorted((place for place, time in enumerate(times) if time), key=times.__getitem__)
            count = len(times)
        sets = bytearray([IGNORED]) * count
        for number, (start, end) in enumerate(itertools.pairwise(edges(config))):
            for place in order[round(start * len(order)) : round(end * len(order))]:
                sets[place] = number
    if not sets.count(0):
        raise empty_training_set(config)
    return sets


def split_queries(table: str, config: Message) -> list[str]:
    """Return for each set the query in GoogleSQL that selects its rows from a table."""
    kind, key = kind_of_split(config)
    if kind == "predefined_split":
        return [f"SELECT * FROM `{table}` WHERE `{key}` = '{part}'" for part in SETS]
    order, condition = (f"`{key}`", f"`{key}` IS NOT NULL") if key else ("TO_HEX(MD5(TO_JSON_STRING(t)))", "TRUE")
    share = f"(ROW_NUMBER() OVER (ORDER BY {order}) - 0.5) / COUNT(*) OVER ()"
    placed = f"(SELECT *, {share} AS share_of_rows FROM `{table}` AS t WHERE {condition})"
    return [
        f"SELECT * EXCEPT (share_of_rows) FROM {placed} WHERE share_of_rows >= {start} AND share_of_rows < {end}"
        for start, end in itertools.pairwise(edges(config))
    ]


def kind_of_split(config: Message) -> tuple[str, str]:
    """Return the kind of a config's split, and the column that it looks at; refuse kinds that are not here."""
    kind = config.WhichOneof("split") or "fraction_split"
    key = getattr(getattr(config, kind), "key", "")
    if kind == "filter_split":
        raise errors.invalid("A filter_split is supported only for datasets of images, text or video.")
    if kind == "stratified_split":
        raise errors.unimplemented(f"A {kind}", "split by fractions, by a column that names the set, or by time")
    if "`" in key:
        raise errors.invalid(f"{key!r} is not the name of a column.")
    return kind, key


def edges(config: Message) -> list[float]:
    """Return where the sets begin and end among ordered rows, as shares of them: [0, 0.8, 0.9, 1]."""
    chosen = getattr(config, config.WhichOneof("split") or "fraction_split")
    fractions = [getattr(chosen, f"{part}_fraction") for part in SETS]
    if any(fraction < 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise errors.invalid(f"The fractions {fractions} must be positive and sum to up to 1.")
    if not any(fractions):
        fractions = DEFAULT_FRACTIONS
    return [sum_of / sum(fractions) for sum_of in itertools.accumulate(fractions, initial=0)]


def empty_training_set(config: Message) -> errors.Refused:
    """Refuse a split that leaves nothing to train on."""
    kind, key = kind_of_split(config)
    why = f"no row has 'training' in {key!r}" if kind == "predefined_split" else "no row is left for it"
    return errors.precondition(f"The training set is empty: {why}.")


def _time(text: str) -> datetime | None:
    """Return the time that a text in RFC 3339 format tells, or None for any other text, whose row is ignored."""
    try:
        return datetime.fromisoformat(text) if text.endswith("Z") else None
    except ValueError:
        return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
