"""Three data sets with true stories, split by a rule that SQL shares, made ready to train on.

    train, test = data.split("diamonds")              # DataFrames, split by the MD5 of each row's key
    features = data.Features("diamonds", train)       # means, deviations and categories of the training rows
    x, y = features.arrays(train)                     # float32, standardised and one-hot
    model = features.attach(network)                  # the same preprocessing as layers: a model for raw rows

Penguins are small, and a line of SQL beats the network there; on diamonds the network earns its keep; flights are for
input pipelines. The files come with the package, so nothing here needs a network. Where each is from, its licence and
its checksum stand in `datasets/sources.json`.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

FOLDER = Path(__file__).parent / "datasets"
TEST_FOLDS = (0, 1, 2)  # 3 of 16: about 19 % of the rows
VALIDATION_FOLDS = (3, 4)  # taken out of the training rows where a choice has to be made


def _penguin_key(frame: pd.DataFrame) -> pd.Series:
    tenths = (frame[["culmen_length_mm", "culmen_depth_mm"]] * 10).round().astype(int).astype(str)
    mass = frame["body_mass_g"].astype(int).astype(str)
    return frame["island"].astype(str) + "|" + tenths.iloc[:, 0] + "|" + tenths.iloc[:, 1] + "|" + mass


def _flight_key(frame: pd.DataFrame) -> pd.Series:
    return "2013-" + frame["month"].astype(str).str.zfill(2) + "-" + frame["day"].astype(str).str.zfill(2)


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set: the columns a model reads, the one it predicts, and the key that splits it."""

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    target: str
    unit: str
    key: Callable[[pd.DataFrame], pd.Series]  # the text whose MD5 decides about train and test
    key_sql: str  # the same text in GoogleSQL


DATASETS = {
    "penguins": Dataset(
        numeric=("culmen_length_mm", "culmen_depth_mm", "flipper_length_mm"),
        categorical=("species", "island", "sex"),
        target="body_mass_g",
        unit="g",
        key=_penguin_key,
        key_sql="FORMAT('%s|%d|%d|%d', island, CAST(ROUND(culmen_length_mm * 10) AS INT64), "
        "CAST(ROUND(culmen_depth_mm * 10) AS INT64), CAST(body_mass_g AS INT64))",
    ),
    "diamonds": Dataset(
        numeric=("carat", "depth", "table", "x", "y", "z"),
        categorical=("cut", "color", "clarity"),
        target="price",
        unit="USD",
        key=lambda frame: frame["id"].astype(str),
        key_sql="CAST(id AS STRING)",
    ),
    "flights": Dataset(
        numeric=("distance", "hour", "month"),
        categorical=("carrier", "origin", "dest"),
        target="air_time",
        unit="min",
        key=_flight_key,  # by day: random rows would leak each day's wind into the test
        key_sql="FORMAT('2013-%02d-%02d', month, day)",
    ),
}


def describe(name: str) -> Dataset:
    """Return what is known of the data set `name`, or say which names there are."""
    try:
        return DATASETS[name]
    except (KeyError, TypeError):
        near = get_close_matches(str(name), DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}.{hint}") from None


def source(name: str) -> dict:
    """Return where a data set is from: title, package, licence, origin, rows and SHA-256 of its file."""
    describe(name)
    return json.loads((FOLDER / "sources.json").read_text(encoding="utf-8"))[name]


def _verified_bytes(name: str) -> bytes:
    record = source(name)
    path = FOLDER / record["file"]
    remedy = f"restore it with `git checkout {path.name}` in {path.parent}, or `python -m helpers.datasets.make`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"the file of {name!r} cannot be read: {error}; {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"{path} is not the file that came with the course: its SHA-256 is {found[:12]}..., "
            f"expected {record['sha256'][:12]}...; {remedy}"
        )
    return content


def load(name: str) -> pd.DataFrame:
    """Return a data set as it was published, text columns as categories.

    One row an example: penguins 344, of which 333 are complete; diamonds 53,917; flights 327,346. Raises ValueError
    for an unknown name and for a file that was changed, FileNotFoundError for one that is gone.
    """
    content = _verified_bytes(name)
    if source(name)["file"].endswith(".csv"):
        frame = pd.read_csv(io.BytesIO(content))
        return frame.astype(dict.fromkeys(describe(name).categorical, "category"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(content)).to_pandas()


def md5_fold(keys: Iterable[str]) -> np.ndarray:
    """Return the first hex digit, 0 to 15, of the MD5 of each text: the same in Python and in SQL.

    In GoogleSQL: ``SUBSTR(TO_HEX(MD5(key)), 1, 1)``. A row keeps its side of the split however often, wherever and in
    whatever order it is read, which no random seed can promise.
    """
    keys = pd.Series(keys)
    digits = {key: hashlib.md5(key.encode(), usedforsecurity=False).digest()[0] >> 4 for key in keys.unique()}
    return keys.map(digits).to_numpy(np.uint8)


def complete(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that have a value in every column a model needs (of the penguins 333, their sex known)."""
    dataset = describe(name)
    columns = [*dataset.numeric, *dataset.categorical, dataset.target]
    _require(frame, columns)
    keep = np.ones(len(frame), bool)
    for column in columns:
        keep &= frame[column].notna().to_numpy()
    if name == "penguins":
        keep &= frame["sex"].isin(["MALE", "FEMALE"]).to_numpy()
    if keep.all():
        return frame
    frame = frame[keep].copy()
    for column in dataset.categorical:
        frame[column] = frame[column].astype("category").cat.remove_unused_categories()
    return frame


def split(name: str, frame: pd.DataFrame | None = None, validation: bool = False) -> tuple[pd.DataFrame, ...]:
    """Split the complete rows of a data set into (train, test), or (train, validation, test).

    The first hex digit of the MD5 of a row's key decides: 0 to 2 is test; with `validation`, 3 and 4 are taken out of
    the training rows. Test is the same either way. Raises ValueError for an unknown name or a missing column.
    """
    frame = complete(name, load(name) if frame is None else frame)
    fold = frame["fold"].to_numpy() if "fold" in frame else md5_fold(describe(name).key(frame))
    test = _is_in(fold, TEST_FOLDS)
    if not validation:
        return frame[~test], frame[test]
    held = _is_in(fold, VALIDATION_FOLDS)
    return frame[~test & ~held], frame[held], frame[test]


def _is_in(fold: np.ndarray, folds: Iterable[int]) -> np.ndarray:
    return np.isin(np.arange(16), folds)[
        fold
    ]  # sixteen answers, looked up: a third of the time of np.isin on every row


def _require(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"the rows lack {', '.join(map(repr, missing))}; they have {', '.join(map(str, frame))}")


def _mean_and_deviation(column: pd.Series) -> tuple[float, float]:
    values = column.to_numpy(np.float64)
    return float(values.mean()), float(values.std()) or 1.0  # a constant column must not divide by zero


class Features:
    """What a network reads: each number standardised, each category one-hot, both learnt from training rows.

    The same preprocessing comes in two forms that agree to float32: as NumPy (`encode`, `arrays`, `pipeline`), fast
    and done once, for training; and as Keras layers (`attach`), for a model that travels with it.

    Attributes: `scale`, a mean and a standard deviation for each numeric column; `target_scale`, the same for the
    target, in its unit; `vocabulary`, the categories of each categorical column in their order; `columns`, the names
    of the `width` inputs, such as "carat" and "cut=Ideal".
    """

    def __init__(self, name: str, train: pd.DataFrame):
        """Learn means, deviations and categories of the data set `name` from its training rows."""
        self.dataset = describe(name)
        self.name = name
        _require(train, [*self.dataset.numeric, *self.dataset.categorical, self.dataset.target])
        if train.empty:
            raise ValueError(f"no training rows of {name!r}: means and categories are learnt from at least two")
        self.scale = {column: _mean_and_deviation(train[column]) for column in self.dataset.numeric}
        self.target_scale = _mean_and_deviation(train[self.dataset.target])
        # The categories of the whole data set: one that only test rows have keeps its place, and leaks no target.
        self.vocabulary = {
            column: tuple(pd.Categorical(train[column]).categories) for column in self.dataset.categorical
        }
        self.columns = list(self.scale) + [
            f"{column}={value}" for column, values in self.vocabulary.items() for value in values
        ]
        self.width = len(self.columns)

    def _compact(self, number: Callable, category: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Return rows in few bytes: standardised numbers, float32, and for each category the input that is 1, int64.

        `number` gives a column's values, `category` a column's codes and the values that they stand for.
        """
        columns = [(number(column) - mean) / deviation for column, (mean, deviation) in self.scale.items()]
        numbers = np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")
        if np.isnan(numbers).any():
            column = self.columns[int(np.isnan(numbers).any(axis=0).argmax())]
            raise ValueError(f"column {column!r} has rows without a number; drop them first (data.complete)")
        inputs = {name: number for number, name in enumerate(self.columns)}
        hot = np.empty((len(numbers), len(self.vocabulary)), np.int64)
        for position, (column, expected) in enumerate(self.vocabulary.items()):
            codes, values = category(column)
            # From these codes to the inputs; a missing value has the code -1, which finds the last entry.
            places = np.array([inputs.get(f"{column}={value}", -1) for value in values] + [-1])
            hot[:, position] = places[codes]
            if (hot[:, position] < 0).any():
                code = codes[int(hot[:, position].argmin())]
                value = values[code] if code >= 0 else np.nan
                raise ValueError(f"column {column!r} has {value!r}; expected one of {', '.join(map(str, expected))}")
        return numbers, hot

    def encode(self, rows: pd.DataFrame) -> np.ndarray:
        """Return rows as float32 of shape (rows, width); ValueError names what is missing or unknown."""
        _require(rows, [*self.scale, *self.vocabulary])

        def category(column):
            values = pd.Categorical(rows[column])
            return values.codes, values.categories

        numbers, hot = self._compact(lambda column: rows[column].to_numpy(np.float64), category)
        x = np.zeros((len(rows), self.width), np.float32)
        x[:, : numbers.shape[1]] = numbers
        starts = np.arange(0, x.size, self.width)
        for ones in hot.T:
            x.reshape(-1)[starts + ones] = 1
        return x

    def arrays(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return (x, y): inputs of shape (rows, width) and targets of shape (rows,), both float32."""
        _require(rows, [self.dataset.target])
        return self.encode(rows), rows[self.dataset.target].to_numpy(np.float32)

    def pipeline(self, batch_size: int, part: str = "train", seed: int | None = None):
        """Return a tf.data.Dataset of (x, y) batches that reads the file a block at a time, in constant memory.

        `part` is "train" or "test". With a `seed`, every epoch has an order of its own: blocks are shuffled, and the
        rows within each. The last batch holds what is left over.
        """
        if part not in ("train", "test"):
            raise ValueError(f"part is {part!r}; expected 'train' or 'test'")
        if not source(self.name)["file"].endswith(".parquet"):
            raise ValueError(f"{self.name!r} is too small for a pipeline that reads in blocks; use arrays")
        import pyarrow as pa
        import pyarrow.parquet as pq
        import tensorflow as tf

        content = pa.py_buffer(_verified_bytes(self.name))
        metadata = pq.read_metadata(pa.BufferReader(content))
        columns = [*self.scale, *self.vocabulary, self.dataset.target, "fold"]
        widths = [len(values) for values in self.vocabulary.values()]
        starts = np.cumsum([len(self.scale), *widths])[:-1]
        shapes = (None, len(self.scale)), (None, len(self.vocabulary)), (None,)

        def read(group, order):
            file = pq.ParquetFile(pa.BufferReader(content), metadata=metadata)  # its own: two blocks may overlap
            table = file.read_row_group(int(group), columns)

            def category(column):
                values = table[column].combine_chunks()
                return values.indices.to_numpy(), values.dictionary.to_pylist()

            kept = np.flatnonzero(_is_in(table["fold"].to_numpy(), TEST_FOLDS) == (part == "test"))
            if seed is not None:
                kept = np.random.default_rng(order).permutation(kept)
            numbers, hot = self._compact(lambda column: table[column].to_numpy(), category)
            return numbers[kept], hot[kept], table[self.dataset.target].to_numpy()[kept].astype(np.float32)

        def block(group, order):
            values = tf.numpy_function(read, [group, order], [tf.float32, tf.int64, tf.float32], stateful=False)
            return tuple(map(tf.ensure_shape, values, shapes))

        def expand(numbers, hot, y):
            ones = [tf.one_hot(hot[:, i] - start, widths[i]) for i, start in enumerate(starts)]
            return tf.concat([numbers, *ones], axis=1), y

        groups = tf.data.Dataset.range(metadata.num_row_groups)
        if seed is not None:
            groups = groups.shuffle(metadata.num_row_groups, seed)
        orders = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
        # Rows travel compact and grow to `width` inputs only in the batch that needs them. A map over blocks, because
        # Dataset.from_generator takes twice as long.
        return (
            tf.data.Dataset.zip(groups, orders)
            .map(block, num_parallel_calls=2)
            .rebatch(batch_size)
            .map(expand, num_parallel_calls=2)
            .prefetch(4)
        )

    def raw(self, rows: pd.DataFrame) -> dict:
        """Return rows as the inputs of an attached model: a dictionary of tensors, each of shape (rows, 1)."""
        import tensorflow as tf

        _require(rows, [*self.scale, *self.vocabulary])
        numbers = {column: tf.constant(rows[column].to_numpy(np.float32)[:, None]) for column in self.scale}
        texts = {column: tf.constant(rows[column].to_numpy(object)[:, None]) for column in self.vocabulary}
        return numbers | texts

    def attach(self, network):
        """Return `network`, which reads encoded rows, with this preprocessing in front: a Keras model for raw rows.

        Its inputs are a dictionary of columns, each of shape (rows, 1): float32 for numbers, strings for categories,
        as `raw` makes them. A category that is not in the vocabulary is refused, by the exported model too.
        """
        import keras

        inputs, encoded = {}, []
        for column, (mean, deviation) in self.scale.items():
            inputs[column] = keras.Input((1,), name=column)
            encoded.append(keras.layers.Normalization(mean=mean, variance=deviation**2)(inputs[column]))
        for column, values in self.vocabulary.items():
            inputs[column] = keras.Input((1,), name=column, dtype="string")
            # No place for the unknown: the layer then raises, and names the value, instead of guessing a price.
            lookup = keras.layers.StringLookup(vocabulary=list(values), num_oov_indices=0, output_mode="one_hot")
            encoded.append(lookup(inputs[column]))
        return keras.Model(inputs, network(keras.layers.Concatenate()(encoded)))
