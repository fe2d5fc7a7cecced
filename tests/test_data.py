"""The data sets hold what the lessons say, split the same way for everyone, and reach a network unchanged."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import data

NAMES = list(data.DATASETS)


@pytest.fixture(scope="module")
def parts():
    """Each data set as (train, test)."""
    return {name: data.split(name) for name in NAMES}


@pytest.fixture(scope="module")
def features(parts):
    """What each data set's network reads, learnt from the training rows."""
    return {name: data.Features(name, train) for name, (train, _) in parts.items()}


def python(code, cwd=None):
    """Run `code` in an interpreter of its own and return what it printed."""
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# What the files hold


@pytest.mark.parametrize(("name", "rows", "complete"), [("penguins", 344, 333), ("diamonds", 53917, 53917)])
def test_rows_of_small_data_sets(name, rows, complete):
    frame = data.load(name)
    assert (len(frame), len(data.complete(name, frame))) == (rows, complete)


def test_rows_of_flights():
    assert len(data.load("flights")) == 327346


def test_penguins_are_the_table_that_google_published_an_evaluation_of():
    """BigQuery ML's linear_reg is least squares, so its published evaluation is a fingerprint of the table.

    NULL and '.' are sexes of their own, AUTO_SPLIT keeps all rows where there are fewer than 500, and the median is
    the lower of the two middle values.
    """
    published = {
        "mean_absolute_error": 227.01223667447218,
        "mean_squared_error": 81838.159892168921676,
        "mean_squared_log_error": 0.0050704473735013,
        "median_absolute_error": 173.08081641661738,
        "r2_score": 0.8723772534253441,
        "explained_variance": 0.8723772534253442,
    }
    frame = data.load("penguins").dropna(subset="body_mass_g")
    assert len(frame) == 342
    inputs = frame.drop(columns="body_mass_g")
    inputs["sex"] = inputs["sex"].cat.add_categories("NULL").fillna("NULL")
    x = pd.get_dummies(inputs, dtype=float).to_numpy()
    y = frame["body_mass_g"].to_numpy(float)
    predicted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    error = predicted - y
    assert published == pytest.approx(
        {
            "mean_absolute_error": np.abs(error).mean(),
            "mean_squared_error": (error**2).mean(),
            "mean_squared_log_error": ((np.log1p(predicted) - np.log1p(y)) ** 2).mean(),
            "median_absolute_error": np.sort(np.abs(error))[(len(y) - 1) // 2],
            "r2_score": 1 - (error**2).mean() / y.var(),
            "explained_variance": 1 - error.var() / y.var(),
        },
        rel=1e-9,
    )


# The split


def test_split_sizes(parts):
    assert {name: tuple(map(len, both)) for name, both in parts.items() if name != "flights"} == {
        "penguins": (268, 65),
        "diamonds": (43711, 10206),
    }


def test_flights_are_split_by_day(parts):
    train, test = (set(zip(part["month"], part["day"], strict=True)) for part in parts["flights"])
    assert train and test and not train & test
    assert len(train | test) == 365


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_taken_out_of_train_and_test_is_unchanged(name, parts):
    train, test = parts[name]
    smaller, validation, same = data.split(name, validation=True)
    assert same.equals(test)
    assert train.loc[smaller.index].equals(smaller)
    assert train.loc[validation.index].equals(validation)
    assert smaller.index.union(validation.index).equals(train.index)
    assert len(train) == len(smaller) + len(validation)
    assert 0 < len(validation) < len(smaller)


def test_md5_fold_is_the_first_hex_digit_of_the_md5():
    texts = ["", "a", "53939", "Dream|395|178|3750", "2013-01-31", "Übung", "a"]
    assert data.md5_fold(texts).tolist() == [int(hashlib.md5(text.encode()).hexdigest()[0], 16) for text in texts]


@pytest.mark.parametrize("name", ["diamonds", "flights"])
def test_the_stored_fold_is_that_of_the_key_for_every_row(name):
    frame = data.load(name)
    keys = data.DATASETS[name].key(frame)
    digits = {key: int(hashlib.md5(key.encode()).hexdigest()[0], 16) for key in keys.unique()}
    assert (keys.map(digits) == frame["fold"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_keeps_its_side_in_any_order_and_any_subset(name, parts):
    some = data.complete(name, data.load(name)).drop(columns="fold", errors="ignore").sample(frac=0.3, random_state=1)
    train, test = data.split(name, some)
    assert len(train) + len(test) == len(some)
    assert set(train.index) <= set(parts[name][0].index)
    assert set(test.index) <= set(parts[name][1].index)


# The baselines that every lesson is measured against


def rmse(error):
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


@pytest.mark.parametrize(
    ("name", "mean", "linear"),
    [("penguins", "744", "291.1"), ("diamonds", "3968", "1150"), ("flights", "93.3", "11.85")],
)
def test_baselines_on_the_test_rows(name, mean, linear, parts, features):
    (x, y), (x_test, y_test) = (features[name].arrays(part) for part in parts[name])
    # The normal equations: their rank is one short for each category, which lstsq allows for.
    x, x_test = np.float64(x), np.float64(x_test)
    weights = np.linalg.lstsq(x.T @ x, x.T @ np.float64(y), rcond=1e-12)[0]
    error = x_test @ weights - y_test

    def shown(value, like):
        return f"{value:.{len(like.partition('.')[2])}f}"

    assert shown(rmse(np.mean(y, dtype=np.float64) - y_test), mean) == mean
    assert shown(rmse(error), linear) == linear
    if name == "penguins":
        assert 1 - np.mean(error**2) / np.var(y_test, dtype=np.float64) == pytest.approx(0.847, abs=5e-4)


# What a network reads


@pytest.mark.parametrize(("name", "width"), [("penguins", 11), ("diamonds", 26), ("flights", 126)])
def test_encode_agrees_with_get_dummies(name, width, parts, features):
    train, test = parts[name]
    numeric, categorical = list(features[name].dataset.numeric), list(features[name].dataset.categorical)
    scaled = (test[numeric] - train[numeric].mean()) / train[numeric].std(ddof=0)
    plain = pd.get_dummies(scaled.join(test[categorical]), prefix_sep="=", dtype=float)
    assert features[name].columns == list(plain)
    assert features[name].width == width
    encoded = features[name].encode(test)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, plain.to_numpy(), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_encode_reads_plain_text_and_one_row_alike(name, parts, features):
    rows = parts[name][1].iloc[[3]]
    text = rows.astype(dict.fromkeys(features[name].vocabulary, object))
    np.testing.assert_array_equal(features[name].encode(text), features[name].encode(parts[name][1])[[3]])


def test_a_constant_column_does_not_divide_by_zero(parts):
    train = parts["penguins"][0].assign(culmen_depth_mm=17.0)
    assert (data.Features("penguins", train).encode(train)[:, 1] == 0).all()


# Keras 3.15 reads its own variables in a way that NumPy 2 announces the end of; nothing that the course could mend.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_attach_agrees_with_encode_before_and_after_it_is_stored(name, parts, features, tmp_path):
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input((features[name].width,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    )
    rows = parts[name][1].iloc[::50]
    expected = network(features[name].encode(rows)).numpy()
    raw = features[name].raw(rows)

    model = features[name].attach(network)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "export", verbose=False)
    exported = tf.saved_model.load(tmp_path / "export")  # its functions live as long as it does
    routes = {
        "attached": model,
        "saved": keras.models.load_model(tmp_path / "model.keras"),
        "exported": exported.serve,
    }
    for route, predict in routes.items():
        np.testing.assert_allclose(predict(raw), expected, atol=1e-5, err_msg=route)


def test_an_attached_model_refuses_an_unknown_category(parts, features):
    import keras
    import tensorflow as tf

    network = keras.Sequential([keras.Input((26,)), keras.layers.Dense(1)])
    row = features["diamonds"].raw(parts["diamonds"][1].iloc[[0]])
    row["cut"] = tf.constant([["Emerald"]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Emerald"):
        features["diamonds"].attach(network)(row)


# The input pipeline


def epoch(pipeline):
    """One epoch as (x, y, the size of each batch)."""
    x, y = zip(*pipeline.as_numpy_iterator(), strict=True)
    return np.concatenate(x), np.concatenate(y), [len(batch) for batch in y]


@pytest.mark.parametrize(("part", "side"), [("train", 0), ("test", 1)])
def test_pipeline_gives_the_rows_of_arrays_in_order(part, side, parts, features):
    x, y = features["flights"].arrays(parts["flights"][side])
    found_x, found_y, sizes = epoch(features["flights"].pipeline(4096, part))
    np.testing.assert_array_equal(found_x, x)
    np.testing.assert_array_equal(found_y, y)
    assert set(sizes[:-1]) == {4096}
    assert sizes[-1] == len(y) % 4096


def fingerprints(batches):
    """A number for each row of (x, y) batches, in their order: enough to compare rows, as a list or as a multiset."""
    return np.concatenate([np.float64(x) @ np.sqrt(np.arange(2, x.shape[1] + 2)) + y for x, y in batches]).round(6)


def test_pipeline_with_a_seed_shuffles_each_epoch_anew_and_the_same_for_all(features):
    expected = fingerprints(features["flights"].pipeline(4096).as_numpy_iterator())
    pipeline, again = (features["flights"].pipeline(4096, seed=7) for _ in range(2))
    first, second = (fingerprints(pipeline.as_numpy_iterator()) for _ in range(2))
    for shuffled in (first, second):
        np.testing.assert_array_equal(np.sort(shuffled), np.sort(expected))
        assert np.mean(shuffled == expected) < 0.01
        np.testing.assert_array_equal(fingerprints(again.as_numpy_iterator()), shuffled)
    assert np.mean(first == second) < 0.01
    other = fingerprints(features["flights"].pipeline(4096, seed=8).take(3).as_numpy_iterator())
    assert np.mean(other == first[: len(other)]) < 0.01


@pytest.mark.parametrize("batch_size", [1000, 100_000])
def test_pipeline_of_diamonds_at_any_batch_size(batch_size, parts, features):
    x, y = features["diamonds"].arrays(parts["diamonds"][0])
    found_x, found_y, sizes = epoch(features["diamonds"].pipeline(batch_size))
    np.testing.assert_array_equal(found_x, x)
    np.testing.assert_array_equal(found_y, y)
    assert sizes == [batch_size] * (len(y) // batch_size) + [len(y) % batch_size]


def test_penguins_are_too_few_for_a_pipeline(features):
    with pytest.raises(ValueError, match=r"penguins.*arrays"):
        features["penguins"].pipeline(32)


# Errors say what was wrong, what was expected and what to do


def test_unknown_data_set_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no data set 'penguin'.*penguins, diamonds, flights.*mean 'penguins'"):
        data.load("penguin")
    with pytest.raises(ValueError, match=r"no data set 'wine'; there are penguins, diamonds, flights\.$"):
        data.split("wine")


def test_missing_column(parts, features):
    lacking = parts["diamonds"][1].drop(columns=["carat", "cut"])
    for use in (features["diamonds"].encode, features["diamonds"].raw):
        with pytest.raises(ValueError, match=r"the rows lack 'carat', 'cut'; they have id, color"):
            use(lacking)
    with pytest.raises(ValueError, match="the rows lack 'price'"):
        features["diamonds"].arrays(parts["diamonds"][1].drop(columns="price"))
    with pytest.raises(ValueError, match="the rows lack 'carat', 'cut'"):
        data.split("diamonds", lacking)


def test_unknown_category(parts, features):
    rows = parts["diamonds"][1].astype({"cut": object})
    rows.iloc[5, rows.columns.get_loc("cut")] = "Emerald"
    with pytest.raises(ValueError, match=r"column 'cut' has 'Emerald'; expected one of Fair, Good, Very Good"):
        features["diamonds"].encode(rows)


def test_missing_category(features):
    rows = data.load("penguins").dropna(subset="body_mass_g")
    with pytest.raises(ValueError, match=r"column 'sex' has nan; expected one of FEMALE, MALE"):
        features["penguins"].encode(rows)


def test_missing_number(parts, features):
    rows = parts["diamonds"][1].copy()
    rows.iloc[5, rows.columns.get_loc("depth")] = np.nan
    with pytest.raises(ValueError, match=r"column 'depth' has rows without a number.*data\.complete"):
        features["diamonds"].encode(rows)
    assert len(data.complete("diamonds", rows)) == len(rows) - 1


def test_wrong_part(features):
    with pytest.raises(ValueError, match="part is 'validation'; expected 'train' or 'test'"):
        features["flights"].pipeline(32, part="validation")


def test_no_rows(parts):
    with pytest.raises(ValueError, match="no training rows of 'penguins'"):
        data.Features("penguins", parts["penguins"][0].iloc[:0])


@pytest.fixture
def copy(tmp_path):
    """A copy of the package that a test may damage."""
    shutil.copytree(Path(data.__file__).parent, tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


LOAD = """
from helpers import data
try:
    data.load("penguins")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_file_that_is_gone(copy):
    (copy / "helpers/datasets/penguins.csv").unlink()
    said = python(LOAD, copy)
    assert said.startswith("FileNotFoundError the file of 'penguins' cannot be read")
    assert "git checkout penguins.csv" in said


def test_a_file_with_one_changed_byte(copy):
    path = copy / "helpers/datasets/penguins.csv"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    said = python(LOAD, copy)
    assert said.startswith("ValueError")
    assert "is not the file that came with the course" in said
    assert f"expected {data.source('penguins')['sha256'][:12]}" in said


# Light and offline


@pytest.mark.parametrize("module", ["helpers", "helpers.data"])
def test_import_brings_no_tensorflow(module):
    assert python(f"import sys, {module}; print('tensorflow' in sys.modules, 'keras' in sys.modules)") == "False False"


OFFLINE = """
import socket, sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise PermissionError(event)

sys.addaudithook(refuse)
try:
    socket.create_connection(("127.0.0.1", 9))
except PermissionError:
    from helpers import data
    print([len(part) for name in data.DATASETS for part in data.split(name)])
"""


def test_no_network_is_needed(parts):
    assert python(OFFLINE) == str([len(part) for both in parts.values() for part in both])
