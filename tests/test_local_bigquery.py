"""The local BigQuery: the unmodified client, the magic and Google's own tutorial against it, on loopback."""

import datetime
import decimal
import io
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import uvicorn
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.bigquery import SchemaField
from starlette.applications import Starlette

from helpers import data
from helpers.local import bigquery as local_bigquery

# What Google's client says of itself, on Google Cloud too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(Retrieving|Loading) DataFrames via:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Loading pandas DataFrame into BigQuery will require:FutureWarning"),
]

PROJECT = "local-project"
PENGUINS = "`bigquery-public-data.ml_datasets.penguins`"
TWICE = "OPTIONS(model_type='linear_reg') AS SELECT x, 2 * x AS label FROM UNNEST([1, 2]) AS x"
MANY = "UNNEST(GENERATE_ARRAY(1, 100000))"
LONG = f"SELECT COUNT(*) FROM {MANY} AS a, {MANY} AS b WHERE a * b = 7"  # tens of seconds, unless it is cancelled


class Server:
    """The routes under a server of their own, in a thread."""

    def __init__(self, folder: Path):
        self.folder, self.buckets = folder, folder / "buckets"
        (self.buckets / "bucket").mkdir(parents=True)
        self.api = local_bigquery.Api(folder / "bigquery", self.buckets, PROJECT)
        app = Starlette(routes=local_bigquery.routes(self.api))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.api.close()


def client_of(port: int, project: str = PROJECT) -> bigquery.Client:
    options = {"api_endpoint": f"http://127.0.0.1:{port}"}
    return bigquery.Client(project=project, credentials=AnonymousCredentials(), client_options=options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("bigquery"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    with client_of(server.port) as made:
        made.create_dataset("d")
        with (data.FOLDER / "diamonds.parquet").open("rb") as file:
            config = bigquery.LoadJobConfig(source_format="PARQUET")
            assert made.load_table_from_file(file, "d.diamonds", job_config=config).result().output_rows == 53_917
        yield made


def rows(client, sql, **config):
    """Return what a query gives, as tuples."""
    job_config = bigquery.QueryJobConfig(**config)
    return [tuple(row) for row in client.query_and_wait(sql, job_config=job_config)]


def value(client, sql, **config):
    """Return the only value that a query gives."""
    ((only,),) = rows(client, sql, **config)
    return only


def refusal(client, sql, kind=exceptions.BadRequest, **config):
    """Return the words with which a query is refused."""
    with pytest.raises(kind) as caught:
        rows(client, sql, **config)
    return caught.value.errors[0]["message"]


# BigQuery ML


def test_googles_tutorial_gives_googles_digits(client):
    """As published for this very statement: all six metrics, three predictions, and what each number contributes."""
    client.query_and_wait(
        "CREATE MODEL `d.my_model` OPTIONS (model_type='linear_reg', input_label_cols=['body_mass_g'], "
        f"enable_global_explain=TRUE) AS SELECT * FROM {PENGUINS} WHERE body_mass_g IS NOT NULL"
    )
    published = {
        "mean_absolute_error": 227.01223667447218,
        "mean_squared_error": 81838.15989216768,
        "mean_squared_log_error": 0.0050704473735013,
        "median_absolute_error": 173.08081641661738,
        "r2_score": 0.8723772534253441,
        "explained_variance": 0.8723772534253442,
    }
    (kept,) = client.query_and_wait("SELECT * FROM ML.EVALUATE(MODEL `d.my_model`)")
    on_rows = f"SELECT * FROM ML.EVALUATE(MODEL `d.my_model`, (SELECT * FROM {PENGUINS} WHERE body_mass_g IS NOT NULL))"
    (again,) = client.query_and_wait(on_rows)
    assert dict(kept) == pytest.approx(published, rel=1e-9)
    assert list(kept.keys()) == list(published)
    assert dict(again) == pytest.approx(published, rel=1e-9)

    predicted = client.query_and_wait(
        f"SELECT * FROM ML.PREDICT(MODEL `d.my_model`, (SELECT * FROM {PENGUINS} WHERE island = 'Biscoe'))"
    ).to_dataframe()
    assert predicted.columns[0] == "predicted_body_mass_g"
    # The first has no measurements at all: the mean stands for each, and an unknown sex is a sex of its own.
    for depth, length, expected in ((None, None, 4681.782896), (14.4, 46.2, 4740.7907), (14.3, 44.5, 4731.310452)):
        found = predicted[predicted["culmen_depth_mm"].eq(depth) & predicted["culmen_length_mm"].eq(length)]
        found = predicted[predicted["body_mass_g"].isna()] if depth is None else found
        assert found["predicted_body_mass_g"].tolist() == pytest.approx([expected], abs=1e-6)

    explained = dict(rows(client, "SELECT feature, attribution FROM ML.GLOBAL_EXPLAIN(MODEL `d.my_model`)"))
    measured = {"flipper_length_mm": 193.612051, "culmen_depth_mm": 117.084944, "culmen_length_mm": 94.366793}
    assert {name: explained[name] for name in measured} == pytest.approx(measured, abs=1e-6)

    for row in client.query_and_wait(
        f"SELECT * FROM ML.EXPLAIN_PREDICT(MODEL d.my_model, (SELECT * FROM {PENGUINS}), STRUCT(6 AS top_k_features))"
    ):
        parts = sum(part["attribution"] for part in row.top_feature_attributions)
        assert row.baseline_prediction_value + parts == pytest.approx(row.predicted_body_mass_g)


@pytest.mark.parametrize(
    ("model", "published", "tolerance"),
    [("boosted_tree_regressor", 109.016973, 0.05), ("random_forest_regressor", 319.239235, 0.01)],
)
def test_trees_come_close_to_what_google_publishes(client, model, published, tolerance):
    options = f"model_type='{model}', data_split_method='NO_SPLIT', input_label_cols=['body_mass_g']"
    client.query_and_wait(
        f"CREATE OR REPLACE MODEL d.trees OPTIONS({options}) AS SELECT * FROM {PENGUINS} WHERE body_mass_g IS NOT NULL"
    )
    error = value(client, "SELECT mean_absolute_error FROM ML.EVALUATE(MODEL d.trees)")
    assert error == pytest.approx(published, rel=tolerance)


def test_ordinary_regression_on_diamonds_has_its_known_error(client):
    client.query_and_wait(
        "CREATE MODEL d.price OPTIONS(model_type='LINEAR_REG', input_label_cols=['price'], "
        "data_split_method='CUSTOM', data_split_col='is_test') AS "
        "SELECT * EXCEPT(id, fold), fold IN (0, 1, 2) AS is_test FROM d.diamonds"
    )
    error = value(client, "SELECT SQRT(mean_squared_error) FROM ML.EVALUATE(MODEL d.price)")
    assert error == pytest.approx(1150, abs=1)
    # A prediction is the sum of what ML.WEIGHTS lists.
    weights = {row.processed_input: row for row in client.query_and_wait("SELECT * FROM ML.WEIGHTS(MODEL d.price)")}
    (row,) = client.query_and_wait("SELECT * FROM ML.PREDICT(MODEL d.price, (SELECT * FROM d.diamonds WHERE id = 7))")
    total = weights["__INTERCEPT__"].weight
    for name in ("carat", "depth", "table", "x", "y", "z"):
        total += weights[name].weight * row[name]
    for name in ("cut", "color", "clarity"):
        total += {pair["category"]: pair["weight"] for pair in weights[name].category_weights}[row[name]]
    assert total == pytest.approx(row.predicted_price)


def test_a_network_learns_and_tells_of_each_iteration(client):
    client.query_and_wait(
        "CREATE MODEL d.network OPTIONS(model_type='dnn_regressor', input_label_cols=['price'], hidden_units=[32, 32], "
        "batch_size=64, max_iterations=3, early_stop=FALSE) AS SELECT * EXCEPT(id, fold) FROM d.diamonds LIMIT 20000"
    )
    info = rows(client, "SELECT iteration, loss, eval_loss FROM ML.TRAINING_INFO(MODEL d.network) ORDER BY iteration")
    assert [iteration for iteration, _, _ in info] == [0, 1, 2]
    assert info[2][1] < info[0][1]
    assert info[2][2] == pytest.approx(value(client, "SELECT mean_squared_error FROM ML.EVALUATE(MODEL d.network)"))


@pytest.mark.parametrize("model", ["logistic_reg'", "boosted_tree_classifier'", "dnn_classifier', batch_size=16"])
def test_classifiers_give_classes_and_probabilities(client, model):
    source = f"SELECT * FROM {PENGUINS} WHERE sex IN ('MALE', 'FEMALE')"
    client.query_and_wait(
        f"CREATE OR REPLACE MODEL d.sex OPTIONS(model_type='{model}, input_label_cols=['sex'], max_iterations=50, "
        f"min_rel_progress=0.0001) AS {source}"
    )
    metrics = client.query_and_wait("SELECT * FROM ML.EVALUATE(MODEL d.sex)").to_dataframe()
    assert list(metrics) == ["precision", "recall", "accuracy", "f1_score", "log_loss", "roc_auc"]
    assert metrics["accuracy"][0] > 0.85
    found = client.query_and_wait(f"SELECT * FROM ML.PREDICT(MODEL d.sex, ({source}))").to_dataframe()
    assert list(found)[:2] == ["predicted_sex", "predicted_sex_probs"]
    for predicted, pairs in zip(found["predicted_sex"], found["predicted_sex_probs"], strict=True):
        assert [pair["label"] for pair in pairs] == ["MALE", "FEMALE"]  # from the last to the first
        assert sum(pair["prob"] for pair in pairs) == pytest.approx(1)
        assert predicted == max(pairs, key=lambda pair: pair["prob"])["label"]
    matrix = rows(client, "SELECT expected_label, FEMALE, MALE FROM ML.CONFUSION_MATRIX(MODEL d.sex)")
    right = sum(counts[label == "MALE"] for label, *counts in matrix)
    assert right / 333 == pytest.approx(metrics["accuracy"][0])
    # With a threshold that nothing reaches, all are of the other class; and an array without an alias can be queried.
    all_female = f"SELECT DISTINCT predicted_sex FROM ML.PREDICT(MODEL d.sex, ({source}), STRUCT(1.1 AS threshold))"
    assert rows(client, all_female) == [("FEMALE",)]
    males = "SELECT (SELECT prob FROM UNNEST(predicted_sex_probs) WHERE label = 'MALE')"
    probabilities = rows(client, f"{males} FROM ML.PREDICT(MODEL d.sex, ({source}))")
    assert probabilities == [(pairs[0]["prob"],) for pairs in found["predicted_sex_probs"]]


def test_more_than_two_classes(client):
    options = "model_type='logistic_reg', input_label_cols=['species']"
    client.query_and_wait(f"CREATE MODEL d.species OPTIONS({options}) AS SELECT * FROM {PENGUINS}")
    assert value(client, "SELECT accuracy FROM ML.EVALUATE(MODEL d.species)") > 0.98
    assert value(client, "SELECT COUNT(DISTINCT class_label) FROM ML.WEIGHTS(MODEL d.species)") == 3


@pytest.mark.parametrize(
    ("options", "count", "held"),
    [
        ("data_split_method='AUTO_SPLIT'", 499, 499),  # all for both
        ("data_split_method='AUTO_SPLIT'", 1000, 200),
        ("data_split_method='NO_SPLIT'", 1000, 1000),
        ("data_split_method='RANDOM', data_split_eval_fraction=0.3", 1000, 300),
        ("data_split_method='SEQ', data_split_col='id', data_split_eval_fraction=0.1", 1000, 100),
        ("data_split_method='CUSTOM', data_split_col='held'", 1000, 250),
    ],
)
def test_splits_hold_back_what_bigquery_would(client, options, count, held):
    client.query_and_wait(
        f"CREATE OR REPLACE MODEL d.split OPTIONS(model_type='logistic_reg', input_label_cols=['odd'], {options}) AS "
        f"SELECT n AS id, MOD(n, 4) = 0 AS held, n / 7 AS x, MOD(n, 2) AS odd FROM UNNEST(GENERATE_ARRAY(1, {count})) n"
    )
    assert value(client, "SELECT SUM(_0 + _1) FROM ML.CONFUSION_MATRIX(MODEL d.split)") == held


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("model_type='automl_regressor'", "MODEL_TYPE AUTOML_REGRESSOR is not part of the local BigQuery"),
        ("model_type='linear_reg', learning_rate=1", "The option LEARNING_RATE of LINEAR_REG"),
        ("model_type='linear_reg', l2_reg=0.1", "L2_REG of LINEAR_REG"),
        ("model_type='dnn_regressor', dropout=0.5", "DROPOUT = "),
        ("model_type='dnn_regressor', optimizer='FTRL'", "OPTIMIZER = 'FTRL'"),
    ],
)
def test_what_only_google_trains_is_refused_in_words(client, options, words):
    sql = f"CREATE MODEL d.no OPTIONS({options}) AS SELECT 1.0 AS x, 2.0 AS label"
    assert words in refusal(client, sql, exceptions.MethodNotImplemented)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("CREATE MODEL d.no OPTIONS(model_type='linear_reg') AS SELECT 1 AS x", "There is no column label"),
        ("CREATE MODEL d.no OPTIONS(model_type='linear_reg') AS SELECT 1 AS x, 'a' AS label", "must be a number"),
        (
            "CREATE MODEL d.my_model OPTIONS(model_type='linear_reg') AS SELECT 1 AS x, 2 AS label",
            "Already Exists: Model",
        ),
        (
            "SELECT * FROM ML.PREDICT(MODEL d.my_model, (SELECT 1 AS x))",
            "is not found in the input data to the PREDICT",
        ),
        ("SELECT * FROM ML.PREDICT(MODEL d.nowhere, (SELECT 1 AS x))", "Not found: Model local-project:d.nowhere"),
        ("SELECT * FROM ML.FORECAST(MODEL d.known)", "ML.FORECAST is not part of the local BigQuery"),
        ("SELECT * FROM ML.PREDICT(MODEL d.known)", "ML.PREDICT takes rows"),
        ("SELECT * FROM ML.EVALUATE(MODEL d.known, STRUCT(1 AS sigma))", "it takes threshold"),
    ],
)
def test_errors_of_models_say_what_is_wrong(client, sql, words):
    client.query_and_wait(f"CREATE MODEL IF NOT EXISTS d.known {TWICE}")
    assert words in refusal(client, sql, exceptions.GoogleAPICallError)


def test_models_are_resources(client):
    client.query_and_wait(f"CREATE MODEL d.listed {TWICE}")
    model = client.get_model("d.listed")
    assert model.model_type == "LINEAR_REGRESSION"
    assert [column.name for column in model.feature_columns + model.label_columns] == ["x", "predicted_label"]
    assert "listed" in [found.model_id for found in client.list_models("d")]
    model.description = "twice"
    client.update_model(model, ["description"])
    assert client.get_model("d.listed").description == "twice"
    predict = "SELECT predicted_label FROM ML.PREDICT(MODEL d.listed, (SELECT 21 AS x))"
    assert value(client, predict) == pytest.approx(42)
    client.delete_model("d.listed")
    with pytest.raises(exceptions.NotFound, match="Not found: Model local-project:d"):
        client.get_model("d.listed")


# GoogleSQL

date, stamp, utc = datetime.date, datetime.datetime, datetime.UTC
EXPRESSIONS = [  # with what BigQuery's reference says they are worth
    ("7 / 2", 3.5),
    ("DIV(-7, 2)", -3),
    ("MOD(-7, 3)", -1),
    ("SAFE_DIVIDE(1, 0)", None),
    ("IEEE_DIVIDE(1, 0)", math.inf),
    ("2.5", 2.5),
    ("ROUND(2.5)", 3.0),
    ("ROUND(-2.5)", -3.0),
    ("ROUND(1234.5, -2)", 1200.0),
    ("CAST(2.5 AS INT64)", 3),
    ("CAST(-2.5 AS INT64)", -3),
    ("CAST('0x1A' AS INT64)", 26),
    ("SAFE_CAST('2.5' AS INT64)", None),
    ("CAST(1.0 AS STRING)", "1.0"),
    ("2000000000 + 2000000000", 4_000_000_000),
    ("SAFE_ADD(9223372036854775807, 1)", None),
    ("SAFE.LN(0)", None),
    ("LOG(100, 10)", 2.0),
    ("FORMAT('%s|%d|%02d', 'a', -3, 1)", "a|-3|01"),
    ('FORMAT("%\'d", 1234567)', "1,234,567"),
    ("FORMAT('%.2f%%', 3.14159)", "3.14%"),
    ("FORMAT('%t', DATE '2020-01-02')", "2020-01-02"),
    ("FORMAT('%d', NULL)", None),
    ("TO_HEX(MD5('a'))", "0cc175b9c0f1b6a831c399e269772661"),
    ("TO_BASE64(SHA256('a'))", "ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs="),
    ("SUBSTR('apple', -3, 2)", "pl"),
    ("CONCAT('a', NULL)", None),
    ("INITCAP('hello world-all')", "Hello World-All"),
    ("REGEXP_EXTRACT('foo@bar.com', r'@(\\w+)')", "bar"),
    ("REGEXP_EXTRACT('foo', r'x')", None),
    ("SPLIT('a,b')", ["a", "b"]),
    ("LENGTH('héllo') + BYTE_LENGTH('héllo')", 11),
    ("DATE_ADD(DATE '2020-01-31', INTERVAL 1 MONTH)", date(2020, 2, 29)),
    ("DATE_DIFF(DATE '2017-10-15', DATE '2017-10-14', WEEK)", 1),
    ("DATE_TRUNC(DATE '2017-11-05', WEEK)", date(2017, 11, 5)),
    ("DATE_TRUNC(DATE '2017-11-05', ISOWEEK)", date(2017, 10, 30)),
    ("EXTRACT(DAYOFWEEK FROM DATE '2020-05-17')", 1),
    ("EXTRACT(WEEK FROM DATE '2017-11-05')", 45),
    ("EXTRACT(DATE FROM TIMESTAMP '2020-02-03 04:05:06+00')", date(2020, 2, 3)),
    ("LAST_DAY(DATE '2008-11-25')", date(2008, 11, 30)),
    ("PARSE_DATE('%Y%m%d', '20081225')", date(2008, 12, 25)),
    ("TIMESTAMP_DIFF(TIMESTAMP '2001-02-01 01:00:00', TIMESTAMP '2001-02-01 00:00:01', HOUR)", 0),
    ("DATETIME_DIFF(DATETIME '2017-10-15 00:00:00', DATETIME '2017-10-14 23:59:59', DAY)", 1),
    ("TIMESTAMP_MILLIS(1230219000000)", stamp(2008, 12, 25, 15, 30, tzinfo=utc)),
    ("TIMESTAMP '2020-01-01 00:00:00 America/New_York'", stamp(2020, 1, 1, 5, tzinfo=utc)),
    ("FORMAT_TIMESTAMP('%F %T', TIMESTAMP '2008-12-25 15:30:00+00', 'Asia/Tokyo')", "2008-12-26 00:30:00"),
    ("UNIX_SECONDS(TIMESTAMP '2008-12-25 15:30:00+00')", 1230219000),
    ("GENERATE_ARRAY(10, 0, -3)", [10, 7, 4, 1]),
    ("GENERATE_ARRAY(0.0, 1.0, 0.5)", [0.0, 0.5, 1.0]),
    ("GENERATE_DATE_ARRAY('2016-10-05', '2016-10-06')", [date(2016, 10, 5), date(2016, 10, 6)]),
    ("[10, 20][OFFSET(1)] + [10, 20][ORDINAL(1)]", 30),
    ("[10, 20][SAFE_OFFSET(9)]", None),
    ("ARRAY(SELECT x * 2 FROM UNNEST([1, 2, 3]) AS x ORDER BY x DESC)", [6, 4, 2]),
    ("(SELECT ARRAY_AGG(off ORDER BY off) FROM UNNEST(['a', 'b']) AS x WITH OFFSET AS off)", [0, 1]),
    ("(SELECT ARRAY_AGG(x IGNORE NULLS ORDER BY x DESC LIMIT 2) FROM UNNEST([1, NULL, 3, 2]) AS x)", [3, 2]),
    ("(SELECT STRING_AGG(x, '|' ORDER BY x) FROM UNNEST(['b', 'a']) AS x)", "a|b"),
    ("(SELECT COUNTIF(x > 1) FROM UNNEST([1, 2, 3]) AS x)", 2),
    ("(SELECT APPROX_QUANTILES(x, 2) FROM UNNEST([1, 1, 1, 4, 5, 6, 7, 8, 9, 10]) AS x)", [1, 5, 10]),
    ("(SELECT STDDEV(x) FROM UNNEST([10, 14, 18]) AS x)", 4.0),
    ("(SELECT CORR(x, x) FROM UNNEST([1.0, 5.0, 9.0]) AS x)", 1.0),
    ("(SELECT PERCENTILE_CONT(x, 0.5) OVER() FROM UNNEST([0, 3, 1, 2]) AS x LIMIT 1)", 1.5),
    ("(SELECT x FROM UNNEST([3, 1, 2]) AS x WHERE TRUE QUALIFY RANK() OVER(ORDER BY x) = 1)", 1),
    ("(SELECT MAX_BY(x, y) FROM UNNEST([STRUCT('a' AS x, 1 AS y), STRUCT('b', 2)]))", "b"),
    ("(SELECT AS STRUCT 1 AS a, 'b' AS b)", {"a": 1, "b": "b"}),
    ("STRUCT(1, 'b')", {"_field_1": 1, "_field_2": "b"}),
    ("(WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT SUM(n) FROM r)", 6),
    ("2 IN UNNEST([1, 2])", True),
    ("IF(1 < 2, 'a', 'b')", "a"),
    ("GREATEST(1, NULL)", None),
    ("NUMERIC '1.5'", decimal.Decimal("1.5")),
    ("b'abc'", b"abc"),
    ("TO_JSON_STRING(STRUCT(1 AS a, [1, 2] AS b))", '{"a":1,"b":[1,2]}'),
    ('JSON_VALUE(\'{"a": {"b": "x"}}\', \'$.a.b\')', "x"),
    ("RANGE_BUCKET(20, [0, 10, 20, 30])", 3),
]


def is_same(ours, expected):
    is_close = isinstance(ours, float) and math.isclose(ours, expected)
    return type(ours) is type(expected) and (ours == expected or is_close)


def test_expressions_are_worth_what_bigquerys_reference_says(client):
    columns = ", ".join(f"{expression} AS c{i}" for i, (expression, _) in enumerate(EXPRESSIONS))
    ((*found,),) = rows(client, f"SELECT {columns}")
    pairs = zip(found, EXPRESSIONS, strict=True)
    wrong = [(sql, ours, expected) for ours, (sql, expected) in pairs if not is_same(ours, expected)]
    assert not wrong


def test_statements_mean_what_they_mean_in_bigquery(client):
    assert rows(client, "SELECT * EXCEPT(a) REPLACE(b + 1 AS b) FROM (SELECT 1 AS a, 2 AS b, 3 AS c)") == [(3, 3)]
    assert rows(client, "SELECT x FROM UNNEST([2, NULL, 1]) AS x ORDER BY x") == [(None,), (1,), (2,)]  # NULL first
    assert list(client.query_and_wait("SELECT 1, 2 AS b, 3").schema) == [
        SchemaField("f0_", "INTEGER", "NULLABLE"),
        SchemaField("b", "INTEGER", "NULLABLE"),
        SchemaField("f1_", "INTEGER", "NULLABLE"),
    ]
    assert rows(client, "SELECT table FROM d.diamonds WHERE id = 0") == [(55.0,)]  # no reserved word there
    with_two = "SELECT * FROM (SELECT 1 AS id) AS a JOIN (SELECT 1 AS id) AS b ON a.id = b.id"
    assert [field.name for field in client.query_and_wait(with_two).schema] == ["id", "id_1"]
    tables = (PENGUINS, "bigquery-public-data.ml_datasets.penguins", "`bigquery-public-data`.ml_datasets.`penguins`")
    assert {value(client, f"SELECT COUNT(*) FROM {table}") for table in tables} == {344}
    assert value(client, "SELECT COUNT(*) FROM diamonds", default_dataset=f"{PROJECT}.d") == 53_917
    pivoted = "SELECT * FROM (SELECT 'a' AS k, 1 AS v) PIVOT(SUM(v) FOR k IN ('a', 'b'))"
    assert rows(client, pivoted) == [(1, None)]


@pytest.mark.parametrize("name", ["penguins", "diamonds"])
def test_sql_splits_as_python_does(client, name):
    """Each row, not a share of them: the same rule in both languages."""
    dataset = data.describe(name)
    digit = f"SUBSTR(TO_HEX(MD5({dataset.key_sql})), 1, 1)"
    if name == "diamonds":
        assert value(client, f"SELECT COUNTIF(CAST(CONCAT('0x', {digit}) AS INT64) <> fold) FROM d.diamonds") == 0
        return
    where = f"sex IN ('MALE', 'FEMALE') AND body_mass_g IS NOT NULL AND {digit} IN ('0', '1', '2')"
    test = client.query_and_wait(f"SELECT * FROM {PENGUINS} WHERE {where}").to_dataframe()
    _, expected = data.split(name)
    order = ["culmen_length_mm", "culmen_depth_mm", "flipper_length_mm", "body_mass_g"]
    pd.testing.assert_frame_equal(
        test.sort_values(order, ignore_index=True),
        expected.sort_values(order, ignore_index=True).astype(dict.fromkeys(dataset.categorical, "str")),
        check_dtype=False,
    )


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("CHOOSE 1", 'Syntax error: Unexpected identifier "CHOOSE" at [1:1]'),
        ("SELECT 1 FROM", "Syntax error: Unexpected end of script at [1:14]"),
        ("SELECT\n  a,\n  b c d\nFROM x.y", 'Syntax error: Expected end of input but got identifier "d" at [3:7]'),
        ("SELECT 'abc", "Syntax error: Unclosed string literal at [1:8]"),
        (f"SELECT speces FROM {PENGUINS}", "Unrecognized name: speces at [1:8]"),
        ("SELECT p.xx FROM d.diamonds AS p", "Name xx not found inside p at [1:10]"),
        ("SELECT cut, COUNT(*) FROM d.diamonds",
         "SELECT list expression references column cut which is neither grouped nor aggregated at [1:8]"),
        ("SELECT 1 / 0", "division by zero: 1 / 0"),
        ("SELECT CAST('apple' AS INT64)", "Bad int64 value: apple"),
        ("SELECT [1][OFFSET(5)]", "Array index 5 is out of bounds"),
        ("SELECT 9223372036854775807 + 1", "int64 overflow: 9223372036854775807 + 1"),
        ("SELECT LIST_SORT([1])", "Function not found: LIST_SORT at [1:8]"),
        ("SELECT * FROM t", 'Table "t" must be qualified with a dataset (e.g. dataset.table).'),
        ("DELETE FROM d.diamonds", "DELETE must have a WHERE clause at [1:1]"),
        ("SELECT @x", "Query parameter 'x' not found"),
        ("CREATE TABLE d.twice AS SELECT 1 AS a, 2 AS a", "Found duplicate(s): a"),
    ],
)  # fmt: skip
def test_errors_have_bigquerys_words(client, sql, words):
    assert words in refusal(client, sql)


@pytest.mark.parametrize(
    ("sql", "kind", "words"),
    [
        ("SELECT * FROM d.x", exceptions.NotFound, "Not found: Table local-project:d.x was not found in location US"),
        ("SELECT * FROM x.x", exceptions.NotFound, "Not found: Dataset local-project:x was not found in location US"),
        ("CREATE TABLE d.diamonds (x INT64)", exceptions.Conflict, "Already Exists: Table local-project:d.diamonds"),
        ("SELECT * FROM `bigquery-public-data.samples.shakespeare`", exceptions.NotFound, "on Google Cloud"),
        (f"DELETE FROM {PENGUINS} WHERE TRUE", exceptions.Forbidden, "Access Denied: Table bigquery-public-data:"),
        ("SELECT * FROM elsewhere.d.t", exceptions.Forbidden, "The local BigQuery has one project, local-project"),
        ("SELECT FARM_FINGERPRINT('a')", exceptions.MethodNotImplemented, "split by TO_HEX(MD5(...))"),
        ("SELECT * FROM `d.dia*`", exceptions.MethodNotImplemented, "A wildcard table"),
        ("CREATE MATERIALIZED VIEW d.v AS SELECT 1 AS x", exceptions.MethodNotImplemented, "CREATE MATERIALIZED VIEW"),
    ],
)  # fmt: skip
def test_refusals_have_bigquerys_reasons(client, sql, kind, words):
    assert words in refusal(client, sql, kind)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM `/etc/passwd`",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM _bigquery.resources",
        "SELECT * FROM `information_schema`.tables",
        "SELECT getenv('HOME')",
        "SELECT current_setting('home_directory')",
        "SELECT (SELECT content FROM read_text('/etc/passwd'))",
        "COPY (SELECT 1) TO '/tmp/stolen.csv'",
        "ATTACH '/tmp/other.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "SET enable_external_access = TRUE",
        "CALL pragma_version()",
        "EXPORT DATABASE '/tmp/stolen'",
        "EXPORT DATA OPTIONS(uri='/tmp/stolen-*.csv') AS SELECT 1 AS x",
        "EXPORT DATA OPTIONS(uri='gs://bucket/../../stolen-*.csv') AS SELECT 1 AS x",
        "CREATE EXTERNAL TABLE d.stolen OPTIONS(format='CSV', uris=['/etc/passwd'])",
        "CREATE EXTERNAL TABLE d.stolen OPTIONS(format='CSV', uris=['gs://bucket/link'])",
        "CREATE TEMP FUNCTION f() AS (getenv('HOME')); SELECT f()",
        "SELECT 1; DROP TABLE _bigquery.resources",
        "SELECT 'a'' || (SELECT 1) || '",
    ],
)
def test_no_query_reaches_beyond_the_tables(client, server, sql):
    link = server.buckets / "bucket" / "link"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    refusal(client, sql, exceptions.GoogleAPICallError)
    assert not list(Path("/tmp").glob("stolen*"))


def test_duckdb_itself_refuses_what_the_translation_might_let_through(tmp_path):
    """The second wall: nothing outside is read, written, loaded or opened, and the wall cannot be taken down."""
    import duckdb

    from helpers.local.bigquery_warehouse import Warehouse

    (tmp_path / "buckets").mkdir()
    cursor = Warehouse(tmp_path / "bigquery", tmp_path / "buckets", PROJECT).cursor()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        f"SELECT * FROM read_csv('{tmp_path}/buckets/../secret.csv')",
        f"COPY (SELECT 1) TO '{tmp_path}/stolen.csv'",
        f"ATTACH '{tmp_path}/other.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "SET threads = 1",
    ):
        with pytest.raises(duckdb.Error):
            cursor.execute(sql).fetchall()


# Queries


def test_every_type_arrives_as_it_is(client):
    ((*found,),) = rows(
        client,
        "SELECT 1, 2.5, 'a', TRUE, NULL, b'\\x00\\xff', DATE '2020-01-02', TIME '03:04:05.5', NUMERIC '1.25', "
        "DATETIME '2020-01-02 03:04:05.000006', TIMESTAMP '1969-12-31 23:59:59.5+00', [1, 2], ARRAY<STRING>[], "
        "STRUCT(1 AS a, ['x'] AS b), [STRUCT(STRUCT(DATE '2020-01-01' AS q) AS p)], 0/1 + CAST('inf' AS FLOAT64)",
    )
    assert found == [
        *(1, 2.5, "a", True, None, b"\x00\xff", date(2020, 1, 2), datetime.time(3, 4, 5, 500_000)),
        *(decimal.Decimal("1.25"), stamp(2020, 1, 2, 3, 4, 5, 6)),
        *(stamp(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=utc), [1, 2], []),
        *({"a": 1, "b": ["x"]}, [{"p": {"q": date(2020, 1, 1)}}], math.inf),
    ]


def test_parameters_by_name_and_by_place(client):
    named = [
        bigquery.ScalarQueryParameter("n", "INT64", 5),
        bigquery.ScalarQueryParameter("day", "DATE", date(2020, 1, 1)),
        bigquery.ScalarQueryParameter("raw", "BYTES", b"\x00x"),
        bigquery.ScalarQueryParameter("none", "STRING", None),
        bigquery.ArrayQueryParameter("list", "STRING", ["it's", 'a "quote"']),
        bigquery.StructQueryParameter("s", bigquery.ScalarQueryParameter("x", "FLOAT64", 1.5)),
    ]
    found = rows(client, "SELECT @n + 1, @day, @raw, @none, @list, @s.x, @N", query_parameters=named)
    assert found == [(6, date(2020, 1, 1), b"\x00x", None, ["it's", 'a "quote"'], 1.5, 5)]
    placed = [bigquery.ScalarQueryParameter(None, "INT64", i) for i in (1, 2, 3)]
    sql = "WITH a AS (SELECT ? AS x) SELECT x, '?', ? FROM a WHERE x < ?"
    assert rows(client, sql, query_parameters=placed) == [(1, "?", 2)]
    assert "more positional parameters" in refusal(client, "SELECT ?, ?", query_parameters=placed[:1])


def test_results_come_in_pages_in_their_order(client):
    result = client.query("SELECT x FROM UNNEST(GENERATE_ARRAY(1, 1000)) AS x ORDER BY x DESC").result(page_size=300)
    pages = [[row.x for row in page] for page in result.pages]
    assert [len(page) for page in pages] == [300, 300, 300, 100]
    assert [x for page in pages for x in page] == list(range(1000, 0, -1))
    assert result.total_rows == 1000
    assert [row.id for row in client.list_rows("d.diamonds", max_results=3, start_index=10)] == [10, 11, 12]
    assert len(client.query_and_wait("SELECT * FROM d.diamonds").to_dataframe()) == 53_917
    job = client.query("SELECT 42 AS x")
    job.result()
    assert [tuple(row) for row in client.list_rows(job.destination)] == [(42,)]


def test_a_dry_run_costs_nothing_and_says_what_a_run_would_read(client):
    def bytes_of(sql):
        job = client.query(sql, job_config=bigquery.QueryJobConfig(dry_run=True))
        return job.total_bytes_processed

    assert bytes_of("SELECT price FROM d.diamonds") == 53_917 * 8
    assert bytes_of("SELECT COUNT(*) FROM d.diamonds") == 0
    assert bytes_of("SELECT * FROM d.diamonds") == client.get_table("d.diamonds").num_bytes
    assert bytes_of("DELETE FROM d.diamonds WHERE price > 0") == 53_917 * 8
    assert client.get_table("d.diamonds").num_rows == 53_917
    job = client.query("SELECT price FROM d.diamonds")
    job.result()
    assert (job.total_bytes_processed, job.total_bytes_billed, job.cache_hit) == (53_917 * 8, 10 << 20, False)
    words = refusal(client, "SELECT price FROM d.diamonds", exceptions.GoogleAPICallError, maximum_bytes_billed=1000)
    assert words == "Query exceeded limit for bytes billed: 1000. 10485760 or higher required."


def test_destinations_are_written_as_their_disposition_says(client):
    def write(sql, disposition=None):
        return rows(client, sql, destination=f"{PROJECT}.d.written", write_disposition=disposition)

    assert write("SELECT 1 AS x") == [(1,)]
    with pytest.raises(exceptions.Conflict, match="Already Exists: Table local-project:d"):
        write("SELECT 2 AS x")
    write("SELECT 2 AS x", "WRITE_APPEND")
    assert sorted(rows(client, "SELECT * FROM d.written")) == [(1,), (2,)]
    write("SELECT x * 10 AS x FROM d.written", "WRITE_TRUNCATE")  # reads what it replaces
    assert sorted(rows(client, "SELECT * FROM d.written")) == [(10,), (20,)]
    with pytest.raises(exceptions.BadRequest, match="Cannot add fields"):
        write("SELECT 1 AS x, 2 AS y", "WRITE_APPEND")


# Definitions and changes


def test_tables_are_defined_changed_and_dropped_by_sql(client):
    def run(sql):
        job = client.query(sql)
        job.result()
        return job.statement_type, job.num_dml_affected_rows

    assert run("CREATE SCHEMA s") == ("CREATE_SCHEMA", None)
    create = "CREATE TABLE s.t (a INT64 NOT NULL OPTIONS(description='first'), b STRING, c ARRAY<STRUCT<d FLOAT64>>)"
    layout = "PARTITION BY RANGE_BUCKET(a, GENERATE_ARRAY(0, 9)) CLUSTER BY b"
    assert run(f"{create} {layout} OPTIONS(description='all')") == ("CREATE_TABLE", None)
    table = client.get_table("s.t")
    assert table.description == "all"
    assert [(field.name, field.field_type, field.mode, field.description) for field in table.schema] == [
        ("a", "INTEGER", "REQUIRED", "first"),
        ("b", "STRING", "NULLABLE", None),
        ("c", "RECORD", "REPEATED", None),
    ]
    assert run("INSERT INTO s.t (a, b, c) VALUES (1, 'x', [STRUCT(1.5)]), (2, 'y', [])") == ("INSERT", 2)
    assert run("UPDATE s.t SET b = UPPER(b) WHERE a = 1") == ("UPDATE", 1)
    assert run(
        "MERGE s.t AS t USING (SELECT 2 AS a, 'm' AS b UNION ALL SELECT 3, 'n') AS s ON t.a = s.a "
        "WHEN MATCHED THEN UPDATE SET b = s.b WHEN NOT MATCHED THEN INSERT (a, b) VALUES (s.a, s.b)"
    ) == ("MERGE", 2)
    assert run("DELETE s.t WHERE a = 3") == ("DELETE", 1)
    assert rows(client, "SELECT a, b, c FROM s.t ORDER BY a") == [(1, "X", [{"d": 1.5}]), (2, "m", [])]
    assert "Required field a cannot be null" in refusal(client, "INSERT INTO s.t (b) VALUES ('z')")
    run("ALTER TABLE s.t ADD COLUMN e DATE")
    run("ALTER TABLE s.t DROP COLUMN c")
    assert [field.name for field in client.get_table("s.t").schema] == ["a", "b", "e"]
    run("CREATE OR REPLACE TABLE s.t AS SELECT * FROM s.t WHERE a = 1")  # reads what it replaces
    run("CREATE VIEW s.v AS SELECT COUNT(*) AS n FROM s.t")
    run("CREATE TABLE s.clone CLONE s.t")
    assert rows(client, "SELECT n FROM s.v") == [(1,)]
    found = "SELECT table_name, table_type FROM s.INFORMATION_SCHEMA.TABLES ORDER BY table_name"
    assert rows(client, found) == [("clone", "BASE TABLE"), ("t", "BASE TABLE"), ("v", "VIEW")]
    assert run("TRUNCATE TABLE s.t")[0] == "TRUNCATE_TABLE"
    assert rows(client, "SELECT n FROM s.v") == [(0,)]
    assert "is still in use" in refusal(client, "DROP SCHEMA s")
    run("DROP VIEW s.v")
    run("DROP TABLE IF EXISTS s.nothing")
    run("DROP SCHEMA s CASCADE")
    assert "s" not in [dataset.dataset_id for dataset in client.list_datasets()]


def test_a_script_has_variables_tables_and_functions_of_its_own(client):
    job = client.query(
        "DECLARE n INT64 DEFAULT 3; DECLARE label STRING; SET label = CONCAT('x', n); "
        "CREATE TEMP FUNCTION twice(v INT64) AS (v * 2); "
        "CREATE TEMP TABLE numbers AS SELECT n AS v; INSERT INTO numbers (v) VALUES (10); "
        "SELECT SUM(twice(v)) AS total, label FROM numbers GROUP BY label"
    )
    assert [tuple(row) for row in job.result()] == [(26, "x3")]
    assert job.statement_type == "SCRIPT"
    assert 'Table "numbers" must be qualified' in refusal(client, "SELECT * FROM numbers")


def test_datasets_and_tables_are_resources(client):
    with pytest.raises(exceptions.Conflict, match="Already Exists: Dataset local-project:d"):
        client.create_dataset("d")
    client.create_dataset("d", exists_ok=True)
    dataset = client.get_dataset("d")
    dataset.description, dataset.labels = "all", {"a": "b"}
    client.update_dataset(dataset, ["description", "labels"])
    assert (client.get_dataset("d").description, client.get_dataset("d").labels) == ("all", {"a": "b"})
    nested = SchemaField("r", "RECORD", "REPEATED", fields=[SchemaField("y", "STRING")])
    made = bigquery.Table(f"{PROJECT}.d.made", [SchemaField("x", "INTEGER", "REQUIRED", description="key"), nested])
    table = client.create_table(made)
    assert table.schema == made.schema
    table.schema, table.description = [*table.schema, SchemaField("z", "DATE")], "mine"
    client.update_table(table, ["schema", "description"])
    assert [field.name for field in client.get_table("d.made").schema] == ["x", "r", "z"]
    table.schema = [SchemaField("x", "STRING"), *table.schema[1:]]
    with pytest.raises(exceptions.BadRequest, match="Field x has changed type"):
        client.update_table(table, ["schema"])
    assert {"diamonds", "made"} <= {item.table_id for item in client.list_tables("d")}
    client.delete_table("d.made")
    with pytest.raises(exceptions.NotFound):
        client.get_table("d.made")
    assert client.get_table("bigquery-public-data.ml_datasets.penguins").num_rows == 344
    client.create_dataset("full")
    client.query_and_wait("CREATE TABLE full.t AS SELECT 1 AS x")
    with pytest.raises(exceptions.BadRequest, match="is still in use"):
        client.delete_dataset("full")
    client.delete_dataset("full", delete_contents=True)


# Files and rows

FRAME = pd.DataFrame(
    {
        "i": pd.array([1, 2, None], "Int64"),
        "f": [0.5, None, 1.5],
        "s": ["a", None, "ü"],
        "b": [True, False, True],
        "t": pd.to_datetime(["2020-01-01", "2021-01-01", "2022-01-01"], utc=True).as_unit("us"),
        "d": [date(2020, 1, 1)] * 3,
        "l": [[1, 2], [], [3]],
    }
)


def test_frames_go_in_and_come_out(client):
    client.load_table_from_dataframe(FRAME, "d.frame").result()
    types = {field.name: (field.field_type, field.mode) for field in client.get_table("d.frame").schema}
    assert types == {
        **{"i": ("INTEGER", "NULLABLE"), "f": ("FLOAT", "NULLABLE"), "s": ("STRING", "NULLABLE")},
        **{"b": ("BOOLEAN", "NULLABLE"), "t": ("TIMESTAMP", "NULLABLE"), "d": ("DATE", "NULLABLE")},
        "l": ("INTEGER", "REPEATED"),
    }
    found = client.query_and_wait("SELECT * FROM d.frame ORDER BY t").to_dataframe()
    assert found["l"].map(list).tolist() == FRAME["l"].tolist()
    assert found["t"].tolist() == FRAME["t"].tolist()
    assert found["s"].isna().tolist() == [False, True, False]
    client.load_table_from_dataframe(FRAME.head(1), "d.frame").result()  # appends
    assert client.get_table("d.frame").num_rows == 4


def test_files_are_loaded_by_what_they_show_or_by_a_schema(client):
    def load(content, table, **config):
        job = client.load_table_from_file(io.BytesIO(content), table, job_config=bigquery.LoadJobConfig(**config))
        return job.result().output_rows

    csv = b"id,when,word,blob\n1,2020-01-01,,eA==\n2,,two,\n"
    assert load(csv, "d.shown", source_format="CSV", autodetect=True) == 2
    assert [field.field_type for field in client.get_table("d.shown").schema] == ["INTEGER", "DATE", "STRING", "STRING"]
    # No text is an empty text, and no date is none.
    assert rows(client, "SELECT word, `when` FROM d.shown ORDER BY id") == [("", date(2020, 1, 1)), ("two", None)]
    types = {"id": "FLOAT", "when": "STRING", "word": "STRING", "blob": "BYTES"}
    schema = [SchemaField(name, type_) for name, type_ in types.items()]
    options = {"source_format": "CSV", "schema": schema, "skip_leading_rows": 1, "null_marker": ""}
    assert load(csv, "d.told", **options) == 2
    assert rows(client, "SELECT id, word, blob FROM d.told ORDER BY id") == [(1.0, None, b"x"), (2.0, "two", None)]
    lines = b'{"a": 1, "n": {"m": [1, 2]}}\n{"a": 2}\n'
    assert load(lines, "d.lines", source_format="NEWLINE_DELIMITED_JSON", autodetect=True) == 2
    assert rows(client, "SELECT a, n FROM d.lines ORDER BY a") == [(1, {"m": [1, 2]}), (2, None)]
    with pytest.raises(exceptions.BadRequest, match="No such field: z"):
        load(b'{"z": 1}\n', "d.lines", source_format="NEWLINE_DELIMITED_JSON")
    with pytest.raises(exceptions.BadRequest, match="Error while reading data, error message: Bad int64 value: x"):
        load(b"x\n", "d.bad", source_format="CSV", schema=[SchemaField("n", "INTEGER")])
    with pytest.raises(exceptions.NotFound):
        client.get_table("d.bad")
    with pytest.raises(exceptions.BadRequest, match="No schema specified on job or table"):
        load(b"1\n", "d.bad", source_format="CSV")
    with pytest.raises(exceptions.MethodNotImplemented, match="AVRO"):
        load(b"", "d.bad", source_format="AVRO")


@pytest.mark.parametrize("kind", ["CSV", "NEWLINE_DELIMITED_JSON", "PARQUET"])
def test_tables_travel_through_buckets(client, server, kind):
    address = f"gs://bucket/out/{kind}-*"
    config = bigquery.ExtractJobConfig(destination_format=kind)
    client.extract_table("d.diamonds", address, job_config=config).result()
    assert (server.buckets / "bucket" / "out" / f"{kind}-000000000000").is_file()
    detect = None if kind == "PARQUET" else True
    config = bigquery.LoadJobConfig(source_format=kind, autodetect=detect, write_disposition="WRITE_TRUNCATE")
    assert client.load_table_from_uri(address, "d.back", job_config=config).result().output_rows == 53_917
    assert rows(client, "SELECT * FROM d.diamonds EXCEPT DISTINCT SELECT * FROM d.back") == []
    definition = f"CREATE OR REPLACE EXTERNAL TABLE d.outside OPTIONS(format='{kind}', uris=['{address}'])"
    client.query_and_wait(definition)
    assert value(client, "SELECT SUM(price) FROM d.outside") == value(client, "SELECT SUM(price) FROM d.diamonds")


def test_addresses_do_not_leave_their_buckets(client, server):
    (server.folder / "secret.csv").write_text("1\n")
    (server.buckets / "bucket" / "hidden.csv").symlink_to(server.folder / "secret.csv")
    (server.buckets / "bucket" / "away").symlink_to(server.folder)
    schema = [SchemaField("x", "INTEGER")]
    outside = ("gs://bucket/../secret.csv", "gs://../secret.csv", "gs://bucket/hidden.csv", "gs://bucket/h*.csv")
    for uri in (*outside, "/etc/passwd"):
        with pytest.raises(exceptions.GoogleAPICallError):
            client.load_table_from_uri(uri, "d.stolen", job_config=bigquery.LoadJobConfig(schema=schema)).result()
    for uri in ("gs://bucket/../stolen.csv", "gs://bucket/away/stolen.csv", "gs://nowhere/stolen.csv"):
        with pytest.raises(exceptions.GoogleAPICallError):
            client.extract_table("d.diamonds", uri).result()
    assert not list(server.folder.rglob("stolen.csv"))


def test_tables_are_copied(client):
    client.copy_table(["d.diamonds", "d.diamonds"], "d.doubled").result()
    assert client.get_table("d.doubled").num_rows == 2 * 53_917
    with pytest.raises(exceptions.Conflict):
        client.copy_table("d.diamonds", "d.doubled").result()
    client.delete_table("d.doubled")
    with pytest.raises(exceptions.NotFound, match="Not found: Table local-project:d"):
        client.copy_table(["d.diamonds", "d.nothing"], "d.half").result()
    with pytest.raises(exceptions.NotFound):
        client.get_table("d.half")


def test_rows_are_streamed_in_all_or_none(client):
    nested = SchemaField("r", "RECORD", fields=[SchemaField("y", "FLOAT")])
    fields = [SchemaField("a", "INTEGER", "REQUIRED"), SchemaField("t", "TIMESTAMP"), SchemaField("x", "BYTES"), nested]
    table = client.create_table(bigquery.Table(f"{PROJECT}.d.streamed", fields))
    moment = stamp(2020, 1, 1, tzinfo=utc)
    assert client.insert_rows(table, [{"a": 1, "t": moment, "x": b"\x00", "r": {"y": 1}}, {"a": 2}]) == []
    both = [(1, moment, b"\x00", {"y": 1.0}), (2, None, None, None)]
    assert rows(client, "SELECT * FROM d.streamed ORDER BY a") == both
    errors = client.insert_rows_json("d.streamed", [{"a": 3}, {"a": "three"}, {"a": 4, "z": 1}, {}])
    assert [(error["index"], error["errors"][0]["reason"]) for error in errors] == [
        (0, "stopped"), (1, "invalid"), (2, "invalid"), (3, "invalid"),
    ]  # fmt: skip
    assert errors[2]["errors"][0]["message"] == "no such field: z."
    assert client.get_table("d.streamed").num_rows == 2
    client.insert_rows_json("d.streamed", [{"a": 3}, {"a": "three"}], skip_invalid_rows=True)
    assert client.get_table("d.streamed").num_rows == 3


# The server


def test_two_clients_work_at_once_and_a_long_query_is_cancelled(client, server):
    job = client.query(LONG)
    client.query_and_wait("CREATE TABLE d.shared (k INT64)")

    def work(number):
        with client_of(server.port) as other:
            for i in range(5):
                other.query_and_wait(f"INSERT INTO d.shared (k) VALUES ({number * 10 + i})")
                other.query_and_wait(f"CREATE OR REPLACE TABLE d.contested AS SELECT {number} AS k")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert value(client, "SELECT COUNT(DISTINCT k) FROM d.shared") == 15
    assert client.get_job(job.job_id).state == "RUNNING"
    client.cancel_job(job.job_id)
    with pytest.raises(exceptions.GoogleAPICallError, match="Job execution was cancelled: User requested cancellation"):
        job.result(timeout=60)
    assert client.get_job(job.job_id).error_result["reason"] == "stopped"
    assert job.job_id in [found.job_id for found in client.list_jobs(state_filter="done")]


def test_training_is_cancelled(client):
    job = client.query(
        "CREATE MODEL d.endless OPTIONS(model_type='dnn_regressor', input_label_cols=['price'], max_iterations=100000, "
        "early_stop=FALSE) AS SELECT price, carat FROM d.diamonds"
    )
    client.cancel_job(job.job_id)
    with pytest.raises(exceptions.GoogleAPICallError, match="Job execution was cancelled"):
        job.result(timeout=60)
    assert "endless" not in [model.model_id for model in client.list_models("d")]


SERVER = """
import sys
from pathlib import Path
import uvicorn
from starlette.applications import Starlette
from helpers.local import bigquery
folder = Path(sys.argv[1])
api = bigquery.Api(folder / "bigquery", folder / "buckets", "local-project")
uvicorn.run(Starlette(routes=bigquery.routes(api)), port=int(sys.argv[2]), log_level="error", ws="none")
"""


def test_what_was_finished_outlives_a_kill(tmp_path):
    (tmp_path / "buckets").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start():
        process = subprocess.Popen([sys.executable, "-c", SERVER, tmp_path, str(port)], cwd=Path(__file__).parents[1])
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    process = start()
    try:
        with client_of(port) as client:
            client.create_dataset("d")
            client.query_and_wait("CREATE TABLE d.t AS SELECT 1 AS x, [STRUCT('a' AS y)] AS z")
            client.query_and_wait(f"CREATE MODEL d.m {TWICE}")
            done = client.query("SELECT 42 AS x")
            done.result()
            lost = client.query(LONG)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start()
            assert rows(client, "SELECT * FROM d.t") == [(1, [{"y": "a"}])]
            predict = "SELECT predicted_label FROM ML.PREDICT(MODEL d.m, (SELECT 5 AS x))"
            assert value(client, predict) == pytest.approx(10)
            assert [tuple(row) for row in client.get_job(done.job_id).result()] == [(42,)]
            assert client.get_job(lost.job_id).error_result["message"] == "The local BigQuery ended while this job ran."
    finally:
        process.kill()
        process.wait()


def test_other_projects_and_methods_are_refused_in_words(client, server):
    denied = pytest.raises(exceptions.Forbidden, match="Access Denied: Project other")
    with client_of(server.port, "other") as other, denied:
        other.query_and_wait("SELECT 1")
    with pytest.raises(exceptions.MethodNotImplemented, match="routines is not part of the local BigQuery"):
        list(client.list_routines("d"))
    with pytest.raises(exceptions.MethodNotImplemented, match="Legacy SQL"):
        rows(client, "SELECT 1", use_legacy_sql=True)
    with pytest.raises(exceptions.NotFound, match="Not found: Job local-project:nothing"):
        client.get_job("nothing")


def test_the_magic_works_in_a_notebook(client, server, monkeypatch):
    import bigquery_magics
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    context = bigquery_magics.context
    endpoint = {"api_endpoint": f"http://127.0.0.1:{server.port}"}
    settings = {"_credentials": AnonymousCredentials(), "_project": PROJECT, "progress_bar_type": None}
    for name, setting in {**settings, "bigquery_client_options": endpoint}.items():
        monkeypatch.setattr(context, name, setting)
    shell = InteractiveShell.instance()

    def magic(line, cell):
        with capture_output() as output:
            result = shell.run_cell_magic("bigquery", line, cell)
        return result, output

    try:
        shell.extension_manager.load_extension("bigquery_magics")
        shown, output = magic("", f"SELECT island, COUNT(*) AS n FROM {PENGUINS} GROUP BY island ORDER BY n")
        assert shown["n"].tolist() == [52, 124, 168]
        assert output.stderr == ""
        magic('frame --params {"limit": 3}', f"SELECT * FROM {PENGUINS} WHERE culmen_length_mm > 40 LIMIT @limit")
        assert len(shell.user_ns["frame"]) == 3
        magic("--project local-project --destination_table made.magic", "SELECT 1 AS x")
        assert value(client, "SELECT x FROM made.magic") == 1
        _, output = magic("--dry_run", f"SELECT * FROM {PENGUINS}")
        assert "This query will process 28947 bytes." in output.stdout
        _, output = magic("", f"SELECT nothing FROM {PENGUINS}")
        assert "Unrecognized name: nothing at [1:8]" in output.stderr
    finally:
        InteractiveShell.clear_instance()


def test_nothing_heavy_is_imported_before_the_first_request():
    code = "import sys, helpers.local.bigquery; print(*{'duckdb', 'sqlglot', 'numpy', 'xgboost'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
