"""Managed datasets of the local cloud: made through the SDK, and split for a training job as Vertex AI splits them."""

import csv
import io
import itertools

import pytest
from google.api_core import exceptions
from google.cloud import aiplatform, bigquery, storage
from google.cloud.aiplatform_v1 import types

from helpers.local import PROJECT, PROJECT_NUMBER, errors
from helpers.local.bigquery_schemas import Name
from helpers.local.store import new_id

InputDataConfig, Dataset = types.InputDataConfig.pb(), types.Dataset.pb()
LOCATION = f"projects/{PROJECT_NUMBER}/locations/us-central1"
HEADER = ["id", "species", "set", "seen"]
IMAGE = "us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest"
SETS = ("training", "validation", "test")


def table(start, count):
    """Return rows as CSV: a set by turns, quoted texts, and times that run backwards."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(HEADER)
    for number in range(start, start + count):
        species = f'Adélie, "{number}"\nof two lines'
        rows.writerow([f"{number:05}", species, (*SETS, "")[number % 4], f"2026-01-{31 - number % 31:02}T00:00:00Z"])
    return text.getvalue()


# Through the SDK


@pytest.fixture
def source(cloud, request):
    """Two objects with 60 and 40 rows; return their wildcard."""
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    for name, (start, count) in {"a": (0, 60), "b": (60, 40)}.items():
        bucket.blob(f"{request.node.name}/part-{name}.csv").upload_from_string(table(start, count), "text/csv")
    return f"{cloud.bucket}/{request.node.name}/part-*.csv"


def download(cloud, uris):
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    texts = [bucket.blob(uri.removeprefix(f"{cloud.bucket}/")).download_as_text() for uri in uris]
    return [list(csv.reader(io.StringIO(text))) for text in texts]


def test_tabular_dataset_lives(cloud, source):
    dataset = aiplatform.TabularDataset.create("seen", gcs_source=source.replace("*", "a"), labels={"team": "red"})
    assert set(dataset.column_names) == set(HEADER)
    assert [found.name for found in aiplatform.TabularDataset.list(filter="labels.team=red")] == [dataset.name]
    dataset.update(display_name="seen again", description="Birds")
    again = aiplatform.TabularDataset(dataset.resource_name)
    assert (again.display_name, again.gca_resource.description, again.labels) == (
        "seen again",
        "Birds",
        {"team": "red"},
    )
    assert set(again.column_names) == set(HEADER)
    dataset.delete()
    with pytest.raises(exceptions.NotFound):
        aiplatform.TabularDataset(dataset.resource_name)


def test_exported_rows_are_the_rows(cloud, source):
    dataset = aiplatform.TabularDataset.create("all/of it", gcs_source=[source])
    (uri,) = dataset.export_data(f"{cloud.bucket}/exported")
    assert uri.startswith(f"{cloud.bucket}/exported/export-data-all-of-it-20")
    ((header, *rows),) = download(cloud, [uri])
    assert header == HEADER
    assert rows == [row for text in (table(0, 60), table(60, 40)) for row in list(csv.reader(io.StringIO(text)))[1:]]


def test_export_for_training_splits(cloud, source):
    dataset = aiplatform.TabularDataset.create("split", gcs_source=source)
    fractions = {"training_fraction": 0.6, "validation_fraction": 0.3, "test_fraction": 0.1}
    answer = dataset.export_data_for_custom_training(f"{cloud.bucket}/split/", split=fractions)
    assert answer["dataStats"] == {
        "trainingDataItemsCount": "60",
        "validationDataItemsCount": "30",
        "testDataItemsCount": "10",
    }
    assert [uri.rsplit("/", 1)[1] for uri in answer["exportedFiles"]] == [f"{name}-00000-of-00001.csv" for name in SETS]


def test_labelled_data_is_refused_with_advice(cloud):
    text = aiplatform.TextDataset.create("text")
    with pytest.raises(exceptions.MethodNotImplemented, match="TabularDataset"):
        text.import_data(f"{cloud.bucket}/t.jsonl", aiplatform.schema.dataset.ioformat.text.single_label_classification)
    with pytest.raises(exceptions.MethodNotImplemented, match="not a table"):
        text.export_data(f"{cloud.bucket}/exported")


# The sets of a training job

COUNTING = """
import glob, os
counts = []
for name in ("TRAINING", "VALIDATION", "TEST"):
    files = glob.glob(os.environ[f"AIP_{name}_DATA_URI"].replace("gs://", "/gcs/"))
    counts.append(sum(file.read().count("of two lines") for file in map(open, files)))
folder = os.environ["AIP_MODEL_DIR"].replace("gs://", "/gcs/")
os.makedirs(folder)
with open(folder + "counts", "w") as out:
    print(os.environ["AIP_DATA_FORMAT"], *counts, file=out)
"""


def test_training_job_finds_its_sets(cloud, source):
    dataset = aiplatform.TabularDataset.create("counted", gcs_source=source)
    job = aiplatform.CustomContainerTrainingJob("count", IMAGE, command=["python3", "-c", COUNTING])
    job.run(dataset, base_output_dir=f"{cloud.bucket}/counted", machine_type="n1-standard-4")
    bucket = storage.Client().bucket(cloud.bucket.removeprefix("gs://"))
    assert bucket.blob("counted/model/counts").download_as_text().split() == ["csv", "80", "10", "10"]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The service of a cloud that listens to nobody, with a bucket."""
    from helpers.local.server import Cloud

    cloud = Cloud(tmp_path_factory.mktemp("cloud"), None)
    cloud.objects.create("data", "US-CENTRAL1", {})
    yield cloud.services["DatasetService"]
    cloud.close()


@pytest.fixture
def make(service):
    """A function that makes a dataset of CSV files and returns its id."""

    def make(**files):
        dataset_id = new_id()
        folder = service.cloud.buckets / "data" / dataset_id
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.csv").write_bytes(content.encode())
        dataset = Dataset(name=f"{LOCATION}/datasets/{dataset_id}", display_name="made here")
        source = {"gcsSource": {"uri": [f"gs://data/{dataset_id}/*.csv"]}}
        dataset.metadata.struct_value.update({"inputConfig": source})
        service.store.put(dataset.name, dataset)
        return dataset_id

    return make


def split(service, dataset_id, **config):
    """Split a dataset; return the ids in each set, and the number of rows in each file of it."""
    config = InputDataConfig(dataset_id=dataset_id, **config)
    environment = service.environment_for(config, LOCATION, "gs://data/out")
    assert environment.pop("AIP_DATA_FORMAT") == "csv"
    base = config.gcs_destination.output_uri_prefix or "gs://data/out"
    ids, sizes = [], []
    for name, (variable, uri) in zip(SETS, environment.items(), strict=True):
        assert variable == f"AIP_{name.upper()}_DATA_URI"
        assert uri.startswith(f"{base}/dataset-{dataset_id}-tables-20") and uri.endswith(f"/{name}-*.csv")
        folder = service.cloud.path_of(uri.rpartition("/")[0])
        files = {}
        for file in sorted(folder.glob(f"{name}-*.csv")):
            header, *rows = csv.reader(io.StringIO(file.read_bytes().decode()))
            assert header == HEADER
            files[file.name] = [int(row[0]) for row in rows]
        ids.append(list(itertools.chain(*files.values())))
        sizes.append({name: len(rows) for name, rows in files.items()})
    return ids, sizes


def test_split_is_80_10_10_by_default_and_always_the_same(service, make):
    dataset = make(a=table(0, 60), b=table(60, 40))
    ids, sizes = split(service, dataset)
    assert sizes == [{f"{name}-00000-of-00001.csv": count} for name, count in zip(SETS, (80, 10, 10), strict=True)]
    assert sorted(itertools.chain(*ids)) == list(range(100))
    assert ids[0] != list(range(80))
    assert split(service, dataset, gcs_destination={"output_uri_prefix": "gs://data/elsewhere"}) == (ids, sizes)


@pytest.mark.parametrize(
    ("fractions", "counts"),
    [
        ((0.7, 0.2, 0.1), [70, 20, 10]),
        ((0.5, 0.5, 0), [50, 50, 0]),
        ((0.4, 0.1, 0), [80, 20, 0]),
        ((1, 0, 0), [100, 0, 0]),
    ],
)
def test_split_follows_fractions(service, make, fractions, counts):
    keys = ("training_fraction", "validation_fraction", "test_fraction")
    ids, _ = split(service, make(a=table(0, 100)), fraction_split=dict(zip(keys, fractions, strict=True)))
    assert [len(found) for found in ids] == counts


def test_split_by_a_column_ignores_rows_without_a_set(service, make):
    ids, _ = split(service, make(a=table(0, 40)), predefined_split={"key": "set"})
    assert ids == [list(range(0, 40, 4)), list(range(1, 40, 4)), list(range(2, 40, 4))]


def test_split_by_time_trains_on_the_past(service, make):
    text = table(0, 20) + "99999,Gentoo,,yesterday\n"
    fractions = {"training_fraction": 0.5, "validation_fraction": 0.25, "test_fraction": 0.25}
    ids, _ = split(service, make(a=text), timestamp_split={"key": "seen", **fractions})
    assert ids == [list(range(10, 20)), list(range(5, 10)), list(range(5))]


def test_large_sets_are_several_files(service, make, monkeypatch):
    monkeypatch.setattr("helpers.local.datasets.ROWS", 30)
    ids, sizes = split(service, make(a=table(0, 100)))
    assert sizes[0] == {f"training-{n:05}-of-00003.csv": rows for n, rows in enumerate((30, 30, 20))}
    assert sorted(itertools.chain(*ids)) == list(range(100))


# Tables of BigQuery


def test_table_of_bigquery_is_a_dataset(cloud):
    table = f"{cloud.project}.birds.seen"
    client = bigquery.Client()
    client.create_dataset("birds", exists_ok=True)
    client.query_and_wait("CREATE OR REPLACE TABLE birds.seen AS SELECT 1 AS id, STRUCT(2 AS wing, 3 AS bill) AS size")
    dataset = aiplatform.TabularDataset.create("birds", bq_source=f"bq://{table}")
    assert set(dataset.column_names) == {"id", "size.wing", "size.bill"}
    with pytest.raises(exceptions.MethodNotImplemented, match="EXPORT DATA"):
        dataset.export_data(f"{cloud.bucket}/exported")


@pytest.fixture(scope="module")
def birds(service):
    """The id of a dataset whose source is a table with 40 rows."""
    service._query("CREATE SCHEMA nest")
    service._query(
        "CREATE TABLE nest.birds AS SELECT id, ['training', 'validation', 'test', NULL][OFFSET(MOD(id, 4))] AS role, "
        "IF(id = 0, NULL, TIMESTAMP_ADD(TIMESTAMP '2026-01-01', INTERVAL id DAY)) AS seen "
        "FROM UNNEST(GENERATE_ARRAY(0, 39)) AS id"
    )
    dataset = Dataset(name=f"{LOCATION}/datasets/{new_id()}", display_name="birds")
    source = {"bigquerySource": {"uri": f"bq://{PROJECT}.nest.birds"}}
    dataset.metadata.struct_value.update({"inputConfig": source})
    service.store.put(dataset.name, dataset)
    return dataset.name.rsplit("/", 1)[1]


def split_table(service, dataset_id, **config):
    """Split a dataset from BigQuery into tables; return the ids in each."""
    config = InputDataConfig(dataset_id=dataset_id, bigquery_destination={"output_uri": f"bq://{PROJECT}"}, **config)
    environment = service.environment_for(config, LOCATION, "gs://data/out")
    assert environment.pop("AIP_DATA_FORMAT") == "bigquery"
    found = []
    for name, (variable, uri) in zip(SETS, environment.items(), strict=True):
        assert variable == f"AIP_{name.upper()}_DATA_URI"
        assert uri.startswith(f"bq://{PROJECT}.dataset_{dataset_id}_tables_20") and uri.endswith(f"Z.{name}")
        project, dataset, table = uri.removeprefix("bq://").split(".")
        cursor = service.cloud.bigquery.warehouse.cursor()
        rows = cursor.execute(f"SELECT id FROM {Name(project, dataset, table).sql} ORDER BY id").fetchall()
        found.append([id_ for (id_,) in rows])
    return found


def test_table_is_split_into_tables(service, birds):
    sets = split_table(service, birds)
    assert [len(found) for found in sets] == [32, 4, 4]
    assert sorted(itertools.chain(*sets)) == list(range(40))
    assert split_table(service, birds) == sets
    by_role = split_table(service, birds, predefined_split={"key": "role"})
    assert by_role == [list(range(0, 40, 4)), list(range(1, 40, 4)), list(range(2, 40, 4))]
    fractions = {"training_fraction": 1 / 3, "validation_fraction": 1 / 3, "test_fraction": 1 / 3}
    by_time = split_table(service, birds, timestamp_split={"key": "seen", **fractions})
    assert by_time == [list(range(1, 14)), list(range(14, 27)), list(range(27, 40))]


def test_table_is_split_into_files(service, birds):
    config = InputDataConfig(dataset_id=birds, predefined_split={"key": "role"})
    environment = service.environment_for(config, LOCATION, "gs://data/out")
    assert environment["AIP_DATA_FORMAT"] == "csv"
    folder, _, pattern = environment["AIP_VALIDATION_DATA_URI"].rpartition("/")
    (file,) = service.cloud.path_of(folder).glob(pattern)
    header, *rows = csv.reader(io.StringIO(file.read_text()))
    assert header == ["id", "role", "seen"]
    assert [(int(row[0]), row[1]) for row in rows] == [(id_, "validation") for id_ in range(1, 40, 4)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"predefined_split": {"key": "colour"}}, "Unrecognized name: colour"),
        ({"predefined_split": {"key": "seen`; DROP TABLE nest.birds"}}, "not the name of a column"),
        ({"fraction_split": {"test_fraction": 1}}, "training set is empty"),
    ],
)
def test_wrong_split_of_a_table_is_refused_and_leaves_nothing(service, birds, config, words):
    cursor = service.cloud.bigquery.warehouse.cursor()
    before = cursor.execute("SELECT schema_name FROM information_schema.schemata ORDER BY 1").fetchall()
    with pytest.raises(errors.Refused, match=words):
        split_table(service, birds, **config)
    assert cursor.execute("SELECT schema_name FROM information_schema.schemata ORDER BY 1").fetchall() == before


# Refusals


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"predefined_split": {"key": "colour"}}, "no column 'colour'.*id, species, set, seen"),
        ({"predefined_split": {"key": "species"}}, "training set is empty.*'training' in 'species'"),
        ({"fraction_split": {"training_fraction": 0.9, "test_fraction": 0.2}}, "sum to up to 1"),
        ({"fraction_split": {"training_fraction": -1}}, "positive"),
        ({"fraction_split": {"test_fraction": 1}}, "training set is empty"),
        ({"filter_split": {"training_filter": "-"}}, "only for datasets of images"),
        ({"stratified_split": {"key": "species"}}, "stratified_split is not part of the local cloud"),
        ({"bigquery_destination": {"output_uri": "bq://local-project"}}, "BigQuery"),
        ({"gcs_destination": {"output_uri_prefix": "gs://data/../../etc"}}, "out of its bucket"),
        ({"gcs_destination": {"output_uri_prefix": "gs://missing/out"}}, "bucket of 'gs://missing/out' does not exist"),
    ],
)
def test_wrong_split_is_refused_in_words(service, make, config, words):
    with pytest.raises(errors.Refused, match=words):
        split(service, make(a=table(0, 10)), **config)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "matches no object"),
        ({"a": ""}, "is empty"),
        ({"a": "id\n1\n", "b": "other\n1\n"}, "columns of gs://data/.*b.csv"),
        ({"a": "id,set\n1,training\n2\n"}, "Row 3 of gs://data/.*a.csv has 1 fields"),
        ({"a": "id\n"}, "training set is empty"),
    ],
)
def test_source_that_is_no_table_is_refused_in_words(service, make, files, words):
    with pytest.raises(errors.Refused, match=words):
        split(service, make(**files))
