"""Google's tables as dated data: what its pages list, with their addresses and the days they were read."""

import functools
import json
from pathlib import Path


@functools.cache
def read(name: str) -> dict:
    """Return a table, such as "machines", with its `source` and `date`."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
