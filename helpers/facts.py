"""Things that show themselves as named facts: as lines in a terminal, as a table in a notebook."""

import html
import inspect


class Facts:
    """Give a class the two ways to show itself; the class gives `_facts`, pairs of a name and a text.

    A dataclass needs `repr=False` for it, or it makes one of its own.
    """

    def _facts(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return a line for each fact, their texts below each other."""
        facts = self._facts()
        width = max(len(name) for name, _ in facts)
        margin = "\n" + " " * (width + 1)
        return "\n".join(f"{name:{width}} " + text.replace("\n", margin) for name, text in facts)

    def _repr_html_(self) -> str:
        left = 'style="text-align:left;white-space:pre-line"'
        rows = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(text)}</td></tr>"
            for name, text in self._facts()
        )
        return f"<table>{rows}</table>"


class InFull:
    """A DataFrame of texts, shown in full and from the left, where pandas cuts them and shows them from the right."""

    def __init__(self, frame):
        """Show a DataFrame."""
        self.frame = frame

    def __repr__(self) -> str:
        """Return it as text."""
        return self.frame.to_string()

    def _repr_html_(self) -> str:
        import pandas as pd

        with pd.option_context("display.max_colwidth", None):
            table = self.frame.to_html(border=0)
        for tag in ("td", "th"):
            table = table.replace(f"<{tag}>", f'<{tag} style="text-align:left;vertical-align:top">')
        return table


class Source:
    """A function or a class, shown as it stands in its file."""

    def __init__(self, described):
        """Show a function or a class."""
        self.described = described

    def __repr__(self) -> str:
        """Return its source."""
        return inspect.getsource(self.described).rstrip()
