"""Google's tables as dated data: what its pages list, with their addresses and the days they were read."""

import functools
import json
from collections.abc import Iterable
from datetime import date
from difflib import get_close_matches
from pathlib import Path


@functools.cache
def read(name: str) -> dict:
    """Return a table, such as "machines", with its `source` and `date`."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def day(text: str | None) -> date | None:
    """Return a table's day, such as "2026-08-22"; None for one that it does not know."""
    return date.fromisoformat(text) if text else None


def near(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the one of `names` that is most like `name`; empty if none is."""
    found = get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def known(kind: str, name: str, names: Iterable[str], error: type[Exception] = ValueError) -> str:
    """Return `name` if it is one of `names`; raise `error`, which says what there is and what may be meant."""
    names = list(names)
    if name in names:
        return name
    raise error(f"there is no {kind} {name!r}; there are {', '.join(map(str, names))}.{near(name, names)}")
