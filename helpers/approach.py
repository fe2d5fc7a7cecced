"""Which way to build: a pre-trained API, BigQuery ML, AutoML or custom training. A small rule that explains itself.

    approach.choose("tabular regression", rows=43_711, expertise="SQL", data="BigQuery")
    approach.choose("tabular regression", rows=43_711, needs=["loss"])     # only custom training has one of your own
    approach.retired()                                                     # what is gone, and when

The rule: what makes an option impossible rules it out; of those left, the one with the fewest obstacles is chosen, and
of equals the one that takes the least work. What would change the answer is found by asking the rule again, with one
thing changed. It is a rule of thumb for a start: measure the options on your own data where more than one is possible.
"""

import html
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date

from helpers import tables

OPTIONS = ("pre-trained API", "BigQuery ML", "AutoML", "custom training")  # the least work first
EXPERTISE = ("none", "SQL", "Python")
DATA = ("BigQuery", "Cloud Storage", "files")
NEEDS = ("loss", "architecture", "hardware", "export")
SERVING = ("batch", "online", "device")
FEW_ROWS = 1000
# What the course measures on its own data (RMSE on test rows).
DIAMONDS = "diamonds' prices come within 549 USD with AutoML, 561 with boosted trees, 547 to 592 with a plain network"
PENGUINS = "268 penguins are weighed within 291 g by least squares, within 305 to 317 by a network"
ENDPOINT = "an endpoint is billed by the hour from its deployment on, with or without requests"


@dataclass(frozen=True)
class Situation:
    """What the choice depends on; see `choose`."""

    task: str
    rows: int
    expertise: str
    data: str
    needs: tuple[str, ...]
    serving: str
    budget: float | None
    api_answers: bool
    features: int | None

    @property
    def has_something(self) -> list[str]:
        """Return the options that have anything for the task."""
        return tables.read("approaches")["tasks"][self.task]

    @property
    def is_table(self) -> bool:
        """Say whether the examples are rows of a table."""
        return "BigQuery ML" in self.has_something

    @property
    def is_bespoke(self) -> bool:
        """Say whether training itself has to be of one's own."""
        return bool({"loss", "architecture", "hardware"} & set(self.needs))

    @property
    def leaves(self) -> bool:
        """Say whether the model has to run outside Google Cloud."""
        return "export" in self.needs or self.serving == "device"

    @property
    def control(self) -> str:
        """Return what only custom training gives in full, in words; empty if nothing of it is needed."""
        words = [f"{_article(need)} of your own" for need in self.needs]
        return ", ".join(words + ["a model on a device"] * (self.serving == "device"))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _rows(situation: Situation) -> dict:
    """Return AutoML's limits for a task that it has something for, empty for any other."""
    return tables.read("approaches")["automl_rows"].get(situation.task, {})


def _advised_rows(situation: Situation) -> int:
    """Return the rows that Google recommends for AutoML, 0 if that is not known."""
    return _rows(situation).get("for_each_feature", 0) * (situation.features or 0)


def _least_price(situation: Situation) -> float:
    """Return the least that AutoML costs for a task, in US dollars."""
    price = tables.read("prices")["automl"][_rows(situation)["price"]]
    return price["usd"] * price["least_node_hours"]


def _retired(option: str, task: str) -> str:
    """Return when what an option had for a task ended or will end, in words; empty if nothing of it does."""
    for entry in tables.read("approaches")["retired"]:
        if (entry.get("option"), entry.get("task")) == (option, task):
            is_over = date.today() >= tables.day(entry["ends"])
            return f"{entry['product']} {'ended' if is_over else 'ends'} on {entry['ends']}"
    return ""


@dataclass(frozen=True)
class Obstacle:
    """Something that stands against an option: it makes it impossible, or only harder."""

    option: str
    is_fatal: bool
    applies: Callable[[Situation], bool]
    words: Callable[[Situation], str]


FATAL, HARDER = True, False
API, SQL, AUTOML, CUSTOM = OPTIONS
OBSTACLES = (
    Obstacle(API, FATAL, lambda s: not s.api_answers, lambda s: "no ready-made model answers this question"),
    Obstacle(API, FATAL, lambda s: bool(s.control), lambda s: f"you need {s.control}, and it has none"),
    Obstacle(API, HARDER, lambda s: bool(_retired(API, s.task)), lambda s: _retired(API, s.task)),
    Obstacle(SQL, FATAL, lambda s: s.is_bespoke, lambda s: f"you need {s.control}, and it has its own"),
    Obstacle(
        SQL, HARDER, lambda s: s.leaves, lambda s: "it exports a SavedModel or an XGBoost booster, and nothing else"
    ),
    Obstacle(SQL, HARDER, lambda s: s.data != "BigQuery", lambda s: "the data have to be loaded into BigQuery first"),
    Obstacle(SQL, HARDER, lambda s: s.expertise == "none", lambda s: "somebody has to write some lines of SQL"),
    Obstacle(AUTOML, FATAL, lambda s: s.is_bespoke, lambda s: f"you need {s.control}, and it chooses by itself"),
    Obstacle(AUTOML, HARDER, lambda s: s.leaves, lambda s: "the form of an export is Google's choice"),
    Obstacle(
        AUTOML,
        FATAL,
        lambda s: s.rows < _rows(s)["least"],
        lambda s: f"it takes {_rows(s)['least']:,} examples or more, and there are {s.rows:,}",
    ),
    Obstacle(
        AUTOML,
        FATAL,
        lambda s: s.rows > _rows(s)["most"],
        lambda s: f"it takes {_rows(s)['most']:,} examples at most, and there are {s.rows:,}",
    ),
    Obstacle(
        AUTOML,
        HARDER,
        lambda s: s.rows < _advised_rows(s),
        lambda s: f"Google recommends {_advised_rows(s):,} rows for {s.features} features, and there are {s.rows:,}",
    ),
    Obstacle(
        AUTOML,
        FATAL,
        lambda s: s.budget is not None and s.budget < _least_price(s),
        lambda s: f"its smallest training costs ${_least_price(s):.2f}, and the budget is ${s.budget:,.2f}",
    ),
    *(
        Obstacle(
            option, HARDER, lambda s: s.api_answers and not s.control, lambda s: "a ready-made model answers already"
        )
        for option in (AUTOML, CUSTOM)
    ),
    Obstacle(CUSTOM, HARDER, lambda s: s.expertise != "Python", lambda s: "somebody has to write Python"),
    Obstacle(
        CUSTOM, HARDER, lambda s: s.is_table and not s.control, lambda s: f"nothing here needs its control: {DIAMONDS}"
    ),
    Obstacle(
        CUSTOM,
        HARDER,
        lambda s: not s.is_table and not s.control and AUTOML in s.has_something,
        lambda s: "nothing here needs its control",
    ),
    Obstacle(CUSTOM, HARDER, lambda s: s.is_table and s.rows < FEW_ROWS, lambda s: f"there are few rows: {PENGUINS}"),
    *(
        Obstacle(option, HARDER, lambda s: s.serving == "online", lambda s: ENDPOINT)
        for option in (SQL, AUTOML, CUSTOM)
    ),
)
WHY = {
    API: lambda s: "a ready-made model answers the question: nothing to train, to store or to keep up to date",
    SQL: lambda s: "a few lines of SQL train, evaluate and predict where the table is; no machine to choose or to stop",
    AUTOML: lambda s: "it needs no code, and searches models and parameters within a budget that you set",
    CUSTOM: lambda s: f"it gives you {s.control}" if s.control else "nothing else can do it",
}


def _against(option: str, situation: Situation) -> tuple[bool, list[str]]:
    """Return whether an option is impossible, and what stands against it."""
    if option not in situation.has_something:
        return True, [_retired(option, situation.task) or f"it has nothing for {situation.task}"]
    found = [obstacle for obstacle in OBSTACLES if obstacle.option == option and obstacle.applies(situation)]
    return any(obstacle.is_fatal for obstacle in found), [obstacle.words(situation) for obstacle in found]


def _decide(situation: Situation) -> str:
    """Return the option that the rule chooses. Custom training is never impossible, so there is one."""
    possible = []
    for option in OPTIONS:
        is_impossible, words = _against(option, situation)
        if not is_impossible:
            possible.append((len(words), OPTIONS.index(option)))
    return OPTIONS[min(possible)[1]]


@dataclass(frozen=True)
class Change:
    """One thing that, were it different, would change the answer to `option`."""

    words: str
    option: str


@dataclass(frozen=True, repr=False)
class Recommendation:
    """What the rule says: `option`, why (`reasons`), what stands `against` each option, and what would `change` it."""

    option: str
    situation: Situation
    reasons: tuple[str, ...]
    against: dict[str, tuple[str, ...]]
    changes: tuple[Change, ...]

    def _sections(self) -> list[tuple[str, list[str]]]:
        others = [option for option in OPTIONS if option != self.option]
        return [
            ("why", [*self.reasons, *(f"in spite of this: {words}" for words in self.against[self.option])]),
            *((f"not {option}", self.against[option] or ["possible too, with more work"]) for option in others),
            ("what would change it", [f"{change.words}: {change.option}" for change in self.changes]),
        ]

    def __repr__(self) -> str:
        """Return the answer and its reasons as lines."""
        lines = [self.option]
        for title, words in self._sections():
            lines += [f"  {title}", *(f"    - {line}" for line in words or ["nothing that this rule knows"])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def items(words):
            return "".join(f"<li>{html.escape(line)}</li>" for line in words or ["nothing that this rule knows"])

        sections = "".join(
            f"<dt><b>{html.escape(title)}</b></dt><dd><ul>{items(words)}</ul></dd>" for title, words in self._sections()
        )
        return f"<h4>{html.escape(self.option)}</h4><dl>{sections}</dl>"


def choose(
    task: str,
    rows: int,
    expertise: str = "Python",
    data: str = "BigQuery",
    needs: Iterable[str] = (),
    serving: str = "batch",
    budget: float | None = None,
    api_answers: bool = False,
    features: int | None = None,
) -> Recommendation:
    """Return which way to build a model, with reasons, and with what would change the answer.

    `task` is such as "tabular regression", "image classification" or "text"; `rows` counts examples; `expertise` is
    "none", "SQL" or "Python"; `data` are in "BigQuery", "Cloud Storage" or "files"; `needs` are those of your own
    among "loss", "architecture", "hardware" and "export"; `serving` is "batch", "online" or on a "device"; `budget` is
    for one training, in US dollars (None: no limit); `api_answers` says whether a pre-trained model (Vision, Speech,
    Translation, Gemini) already answers the question; `features` is the number of columns that predict. Raises
    ValueError for what is none of these.
    """
    tables.known("task", task, tables.read("approaches")["tasks"])
    if rows is None:
        raise ValueError("rows is None; expected a number, 1 or more")
    tables.known("expertise", expertise, EXPERTISE)
    tables.known("place of data", data, DATA)
    tables.known("serving", serving, SERVING)
    if isinstance(needs, str):
        raise ValueError(f"needs is {needs!r}; expected a list, such as [{needs!r}]")
    needs = tuple(dict.fromkeys(needs))
    for need in needs:
        tables.known("need", need, NEEDS)
    for name, value, least in (("rows", rows, 1), ("budget", budget, 0), ("features", features, 1)):
        kinds = (int, float) if name == "budget" else int
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not value >= least):
            raise ValueError(f"{name} is {value!r}; expected a number, {least} or more")
    if not isinstance(api_answers, bool):
        raise ValueError(f"api_answers is {api_answers!r}; expected True or False")
    situation = Situation(task, rows, expertise, data, needs, serving, budget, api_answers, features)
    option = _decide(situation)
    return Recommendation(
        option=option,
        situation=situation,
        reasons=(WHY[option](situation),),
        against={each: tuple(_against(each, situation)[1]) for each in OPTIONS},
        changes=tuple(_changes(situation, option)),
    )


def _changes(situation: Situation, option: str) -> list[Change]:
    """Return what would change the answer: the rule, asked again with each single thing changed."""
    found = []
    for field, values in _alternatives(situation).items():
        seen = {option}
        for value in values:
            other = replace(situation, **{field: value})
            answer = _decide(other)
            if answer not in seen:
                seen.add(answer)
                found.append(Change(_difference(field, situation, other), answer))
    return found


def _alternatives(situation: Situation) -> dict[str, list]:
    """Return other values for each thing; numbers just on either side of a limit, the nearest first."""
    needs = set(situation.needs)
    limits = _rows(situation)
    rows = {FEW_ROWS, FEW_ROWS - 1}
    if limits:
        rows |= {limits["least"], limits["least"] - 1, limits["most"], limits["most"] + 1}
        rows.add(_advised_rows(situation))
    budgets = [None] if situation.budget is not None else []
    if limits:
        cents = math.ceil(_least_price(situation) * 100)
        budgets += [cents / 100, (cents - 1) / 100]
    return {
        "rows": sorted(rows - {0, situation.rows}, key=lambda value: abs(value - situation.rows)),
        "expertise": [value for value in EXPERTISE if value != situation.expertise],
        "data": [value for value in DATA if value != situation.data],
        "needs": [tuple(need for need in NEEDS if (need in needs) != (need == changed)) for changed in NEEDS],
        "serving": [value for value in SERVING if value != situation.serving],
        "budget": [value for value in budgets if value != situation.budget],
        "api_answers": [not situation.api_answers],
    }


def _difference(field: str, situation: Situation, other: Situation) -> str:
    """Return in words what differs between two situations."""
    new = getattr(other, field)
    if field == "rows":
        return f"{new:,} rows instead of {situation.rows:,}"
    if field == "needs":
        (changed,) = set(new) ^ set(situation.needs)
        return f"{'no need' if changed in situation.needs else 'a need'} for {_article(changed)} of your own"
    if field == "budget":
        return "no limit to the budget" if new is None else f"a budget of ${new:,.2f}"
    if field == "api_answers":
        return "a ready-made model that answers the question" if new else "no ready-made model that answers it"
    return f"{field} {new!r} instead of {getattr(situation, field)!r}"


def retired(on: date | None = None):
    """Return what Google has retired or will, as a DataFrame, with the days since its end on a day (today)."""
    import pandas as pd

    on = on or date.today()
    rows = [
        {
            "product": entry["product"],
            "deprecated": tables.day(entry["deprecated"]),
            "ends": tables.day(entry["ends"]),
            "is_gone": on >= tables.day(entry["ends"]),
            "instead": entry["instead"],
        }
        for entry in tables.read("approaches")["retired"]
    ]
    return pd.DataFrame(rows).sort_values("ends", kind="stable").reset_index(drop=True)


class Effort:
    """Watches a notebook: how many lines each cell has that runs after this, and how many seconds it takes.

    `cells` has an entry for each, the latest last: a cell that asks finds the one before it at the end.
    """

    def __init__(self):
        """Begin to watch. Raises RuntimeError where no notebook runs."""
        from IPython import get_ipython

        notebook = get_ipython()
        if notebook is None:
            raise RuntimeError("Effort watches the cells of a notebook, and none runs here")
        self.cells = []
        self._started = time.perf_counter()  # the end of this very cell is seen too
        notebook.events.register("pre_run_cell", self._begin)
        notebook.events.register("post_run_cell", self._end)

    def _begin(self, info) -> None:
        self._started = time.perf_counter()

    def _end(self, result) -> None:
        lines = [line.strip() for line in result.info.raw_cell.splitlines()]
        code = [line for line in lines if line and not line.startswith(("#", "--"))]  # comments of Python and of SQL
        self.cells.append({"lines": len(code), "seconds": round(time.perf_counter() - self._started, 1)})
