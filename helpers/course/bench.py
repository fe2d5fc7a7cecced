"""What the course's own machinery costs beside the plain way to do the same: `python3 -m helpers bench`.

Both ways run side by side in one process or one after the other, in turns, so that a busy machine slows both; medians
are compared. A missed target is printed as missed and is no error.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from helpers.course import CourseError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One line of the table, as it is printed."""

    what: str
    ours: str
    reference: str
    ratio: str
    target: str
    verdict: str


def compare(what, ours, reference, target, turns, higher=False):
    """Time two functions in turns; return their row. With `higher`, each returns a count and their rates compare."""
    times = {ours: [], reference: []}
    for _ in range(turns):
        for function, results in times.items():
            started = time.perf_counter()
            count = function()
            seconds = time.perf_counter() - started
            results.append(count / seconds if higher else seconds)
    first, second = (statistics.median(results) for results in times.values())
    met = first / second >= target if higher else first / second <= target
    shown = (lambda rate: f"{rate / 1e6:.2f} M rows/s") if higher else duration
    sign = ">=" if higher else "<="
    return Row(what, shown(first), shown(second), f"{first / second:.2f}", f"{sign} {target}", verdict(met))


def duration(seconds):
    """Return a duration in the unit that suits it."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def verdict(met):
    """Return the last word on a target."""
    return "met" if met else "missed"


# The benchmarks, by the name that selects them


def bench_import():
    """Importing `helpers`, less what Python itself takes to start."""
    times = {"import helpers": [], "pass": []}
    for _ in range(15):
        for code, results in times.items():
            started = time.perf_counter()
            run([sys.executable, "-c", code])
            results.append(time.perf_counter() - started)
    both, bare = (statistics.median(results) for results in times.values())
    light = run([sys.executable, "-c", "import sys, helpers; print('tensorflow' not in sys.modules)"]).strip() == "True"
    met = both - bare <= 0.05 and light
    what = "import helpers" if light else "import helpers, which brings TensorFlow"
    return [Row(what, duration(both - bare), f"{duration(bare)} to start", "-", "<= 50 ms", verdict(met))]


def bench_load():
    """Diamonds ready to train, split and standardised, against only reading the table and one-hot encoding it."""
    import numpy as np
    import pyarrow.parquet as pq

    from helpers import data

    dataset = data.describe("diamonds")

    def ours():
        train, test = data.split("diamonds")
        features = data.Features("diamonds", train)
        return features.arrays(train), features.arrays(test)

    def reference():
        table = pq.read_table(data.FOLDER / "diamonds.parquet")
        numbers = [table[column].to_numpy().astype(np.float32) for column in dataset.numeric]
        categories = [table[column].combine_chunks() for column in dataset.categorical]
        ones = [np.eye(len(values.dictionary), dtype=np.float32)[values.indices.to_numpy()] for values in categories]
        return np.column_stack([*numbers, *ones]), table[dataset.target].to_numpy().astype(np.float32)

    inputs = len(dataset.numeric)
    ones = np.concatenate([x[:, inputs:] for x, _ in ours()]).sum(axis=0)
    require_equal([ones], [reference()[0][:, inputs:].sum(axis=0)])
    return [compare("load diamonds / only read and one-hot", ours, reference, 2, turns=25)]


def bench_pipeline():
    """Three epochs of flights through tf.data, against the fastest plain loop that gives the same batches."""
    import numpy as np
    import pyarrow.parquet as pq

    from helpers import data

    batch_size, epochs = 4096, 3
    features = data.Features("flights", data.split("flights")[0])
    pipeline = features.pipeline(batch_size)
    target = features.dataset.target

    def encode(table):
        keep = table["fold"].to_numpy() > max(data.TEST_FOLDS)
        x = np.zeros((keep.sum(), features.width), np.float32)
        for place, (column, (mean, deviation)) in enumerate(features.scale.items()):
            x[:, place] = (table[column].to_numpy()[keep] - mean) / deviation
        start = len(features.scale)
        for column, values in features.vocabulary.items():
            x[np.arange(len(x)), start + table[column].combine_chunks().indices.to_numpy()[keep]] = 1
            start += len(values)
        return x, table[target].to_numpy()[keep].astype(np.float32)

    def plain():
        file = pq.ParquetFile(data.FOLDER / "flights.parquet")
        x, y = np.empty((0, features.width), np.float32), np.empty(0, np.float32)
        for group in range(file.num_row_groups):
            more_x, more_y = encode(file.read_row_group(group, [*features.scale, *features.vocabulary, target, "fold"]))
            # Only the batch across two groups is copied; all others are views.
            missing = batch_size - len(y)
            yield np.concatenate([x, more_x[:missing]]), np.concatenate([y, more_y[:missing]])
            whole = missing + (len(more_y) - missing) // batch_size * batch_size
            for start in range(missing, whole, batch_size):
                yield more_x[start : start + batch_size], more_y[start : start + batch_size]
            x, y = more_x[whole:], more_y[whole:]
        yield x, y

    def rows(batches):
        return sum(len(y) for _ in range(epochs) for _, y in batches())

    for ours, reference in zip(pipeline.as_numpy_iterator(), plain(), strict=True):
        require_equal(ours, reference)
    what = f"{epochs} epochs of flights / a plain loop"
    return [compare(what, lambda: rows(lambda: pipeline), lambda: rows(plain), 0.8, turns=9, higher=True)]


def bench_setup():
    """The course's environment from nothing, against uv alone on the same lock; uv's cache is warm for both."""
    with tempfile.TemporaryDirectory() as scratch:
        root = copy_of_course(Path(scratch))
        folder = root / ".venv"
        install = "from pathlib import Path; from helpers.course import install; install.ready(Path.cwd())"

        def ours():
            shutil.rmtree(folder, ignore_errors=True)
            run([sys._base_executable, "-c", install], root)

        def reference():
            shutil.rmtree(folder, ignore_errors=True)
            uv = [sys.executable, "-m", "uv"]
            run([*uv, "venv", "--python", sys._base_executable, folder], root)
            options = ["--python", folder / "bin/python", "--compile-bytecode"]
            run([*uv, "pip", "install", *options, "-r", "requirements.txt"], root)

        reference()  # fills the cache
        return [compare("set up from nothing / uv alone", ours, reference, 1.5, turns=1)]


def bench_course():
    """All lessons side by side, with their pages, against `jupyter execute` on one after another."""
    with tempfile.TemporaryDirectory() as scratch:
        root = copy_of_course(Path(scratch))
        notebooks = sorted(root.glob("notebooks/*.ipynb"))

        def ours():
            run([sys.executable, "-m", "helpers", "course", "--here"], root)

        def reference():
            run([sys.executable, "-m", "jupyter", "execute", *notebooks], root)

        return [compare("all lessons / jupyter execute", ours, reference, 0.65, turns=1)]


def bench_predictor():
    """The course's prediction server against the SDK's own, at 1, 8 and 64 clients."""
    from helpers.course import bench_predictor

    return bench_predictor.rows()


BENCHMARKS = {
    "import": bench_import,
    "load": bench_load,
    "pipeline": bench_pipeline,
    "setup": bench_setup,
    "course": bench_course,
    "predictor": bench_predictor,
}


def main(args):
    """Run the named benchmarks, all without a name; print their table and return the exit status."""
    from helpers.course import bench_cloud, bench_fit  # here, since they use what is above

    benchmarks = BENCHMARKS | bench_fit.BENCHMARKS | bench_cloud.BENCHMARKS
    if unknown := [name for name in args if name not in benchmarks]:
        raise CourseError(f"There is no benchmark {unknown[0]}; there are {', '.join(benchmarks)}.", status=2)
    rows = []
    for name in args or benchmarks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += benchmarks[name]()
    print(table(rows))
    return 0


def table(rows):
    """Return rows as lines of aligned columns under their names."""
    cells = [tuple(Row.__dataclass_fields__), *map(astuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def require_equal(ours, reference):
    """Raise unless both ways gave the same arrays: otherwise their times say nothing."""
    import numpy as np

    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def run(command, folder=None):
    """Run a command that has to succeed, with the course of `folder` if there is one; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if folder:
        environment["PYTHONPATH"] = str(folder)  # the copy, not the course that is installed
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def copy_of_course(folder):
    """Copy the course, without what runs leave behind, into a folder that may be written to; return its root."""
    left = shutil.ignore_patterns(".git", ".venv*", "output", "build", "__pycache__", "*.egg-info", ".*_cache")
    return shutil.copytree(ROOT, folder / "course", ignore=left)
