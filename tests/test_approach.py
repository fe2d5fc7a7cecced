"""Which way to build: what the rule recommends, that its reasons hold, and that its changes really change it."""

import itertools
from dataclasses import replace
from datetime import date

import pytest

from helpers import approach, tables

TABLE = tables.read("approaches")
TABULAR = {"task": "tabular regression", "rows": 43_711}


def option(**situation):
    """Return what the rule recommends."""
    return approach.choose(**situation).option


# What comes out


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        ({"task": "image classification", "rows": 5000, "api_answers": True}, "pre-trained API"),
        ({"task": "text", "rows": 100, "expertise": "Python", "api_answers": True}, "pre-trained API"),
        ({"task": "video", "rows": 100, "api_answers": True}, "pre-trained API"),
        ({**TABULAR, "expertise": "SQL"}, "BigQuery ML"),
        ({**TABULAR, "expertise": "Python"}, "BigQuery ML"),
        ({"task": "tabular regression", "rows": 268, "data": "files"}, "BigQuery ML"),
        ({"task": "clustering", "rows": 43_711, "data": "files"}, "BigQuery ML"),
        ({**TABULAR, "expertise": "none"}, "AutoML"),
        ({**TABULAR, "data": "files"}, "AutoML"),
        ({"task": "image classification", "rows": 500, "expertise": "none", "data": "files"}, "AutoML"),
        ({**TABULAR, "needs": ["loss"]}, "custom training"),
        ({**TABULAR, "needs": ["hardware"], "expertise": "none"}, "custom training"),
        ({"task": "text", "rows": 5000}, "custom training"),
        ({"task": "another", "rows": 5000}, "custom training"),
        ({"task": "object detection", "rows": 500, "api_answers": True, "serving": "device"}, "custom training"),
    ],
)
def test_recommendations(situation, expected):
    assert option(**situation) == expected


def test_custom_training_is_the_wrong_answer_where_nothing_needs_its_control():
    """Of tables without a need for control, none gets it; with too few rows least of all."""
    for task, rows, expertise, data in itertools.product(
        [task for task, options in TABLE["tasks"].items() if "BigQuery ML" in options],
        (50, 1000, 1_000_000),
        approach.EXPERTISE,
        approach.DATA,
    ):
        found = approach.choose(task, rows, expertise, data)
        assert found.option != "custom training"
        if task in TABLE["automl_rows"]:
            assert any("control" in words for words in found.against["custom training"])


def test_automl_follows_its_limits():
    small = {"task": "tabular regression", "data": "files", "expertise": "none"}
    assert option(rows=1000, **small) == "AutoML"
    assert option(rows=999, **small) != "AutoML"
    assert option(rows=100_000_001, **small) != "AutoML"
    assert option(rows=1999, features=10, **small) == "AutoML"
    assert "2,000 rows for 10 features" in repr(approach.choose(rows=1999, features=10, **small))
    assert option(rows=2000, budget=21.25, **small) != "AutoML"
    assert option(rows=2000, budget=21.26, **small) == "AutoML"


def test_an_option_that_is_recommended_is_never_ruled_out_and_one_always_is():
    for task, api, serving in itertools.product(TABLE["tasks"], (True, False), approach.SERVING):
        for needs in ((), ("export",), ("loss", "hardware")):
            found = approach.choose(task, 5000, needs=needs, serving=serving, api_answers=api)
            assert found.option in TABLE["tasks"][task]
            assert not approach._against(found.option, found.situation)[0]
            assert found.reasons
            if needs == ("loss", "hardware"):
                assert found.option == "custom training"


# Why, and what would change it


@pytest.mark.parametrize(
    "situation",
    [
        TABULAR,
        {"task": "tabular regression", "rows": 268, "data": "files", "features": 6},
        {**TABULAR, "needs": ["loss"], "budget": 5},
        {"task": "image classification", "rows": 500, "expertise": "none"},
        {"task": "text", "rows": 5000, "api_answers": True},
        {"task": "text", "rows": 5000},
    ],
)
def test_changes_are_what_the_rule_says_when_it_is_asked_again(situation):
    found = approach.choose(**situation)
    offered = {(change.words, change.option) for change in found.changes}
    computed = set()
    for field, values in approach._alternatives(found.situation).items():
        for value in values:
            other = replace(found.situation, **{field: value})
            arguments = {name: getattr(other, name) for name in approach.Situation.__dataclass_fields__}
            answer = approach.choose(**arguments).option
            if answer != found.option:
                computed.add((approach._difference(field, found.situation, other), answer))
    assert offered
    assert offered <= computed
    assert {answer for _, answer in offered} == {answer for _, answer in computed}


def test_a_limit_is_found_to_the_row_and_to_the_cent():
    found = approach.choose("tabular regression", 268, data="files", expertise="none")
    assert "1,000 rows instead of 268: AutoML" in repr(found)
    found = approach.choose("tabular regression", 5000, data="files", expertise="none")
    assert "999 rows instead of 5,000: BigQuery ML" in repr(found)
    assert "a budget of $21.25: BigQuery ML" in repr(found)
    assert "no limit to the budget: AutoML" in repr(approach.choose(**TABULAR, data="files", budget=5))


def test_it_shows_itself_with_reasons_for_and_against():
    found = approach.choose("text", 5000, expertise="SQL")
    assert repr(found).startswith("custom training\n  why\n")
    assert "in spite of this: somebody has to write Python" in repr(found)
    assert "AutoML Text ended on 2025-06-15" in repr(found)
    assert "a ready-made model that answers the question: pre-trained API" in repr(found)
    assert "<h4>custom training</h4>" in found._repr_html_()
    assert found._repr_html_().count("<li>") == repr(found).count("    - ")


# What it does not take


@pytest.mark.parametrize(
    ("situation", "words"),
    [
        ({"task": "tabular regressio", "rows": 5}, "Did you mean 'tabular regression'"),
        ({**TABULAR, "expertise": "python"}, "there are none, SQL, Python. Did you mean 'Python'"),
        ({**TABULAR, "data": "Bigquery"}, "Did you mean 'BigQuery'"),
        ({**TABULAR, "serving": "onlin"}, "Did you mean 'online'"),
        ({**TABULAR, "needs": ["los"]}, "Did you mean 'loss'"),
        ({**TABULAR, "needs": "loss"}, r"expected a list, such as \['loss'\]"),
        ({"task": "text", "rows": 0}, "rows is 0; expected a number, 1 or more"),
        ({"task": "text", "rows": None}, "rows is None"),
        ({"task": "text", "rows": 2.5}, "rows is 2.5"),
        ({**TABULAR, "budget": -1}, "budget is -1; expected a number, 0 or more"),
        ({**TABULAR, "budget": float("nan")}, "budget is nan"),
        ({**TABULAR, "features": 0}, "features is 0"),
        ({**TABULAR, "api_answers": "yes"}, "api_answers is 'yes'; expected True or False"),
    ],
)
def test_arguments_are_checked(situation, words):
    with pytest.raises(ValueError, match=words):
        approach.choose(**situation)


# What is gone


def test_retired_says_what_is_gone_on_a_day():
    frame = approach.retired(on=date(2026, 11, 25)).set_index("product")
    assert frame.loc["AutoML Text"].is_gone
    assert frame.loc["AutoML Video"].ends == date(2025, 7, 31)
    assert not frame.loc["Explainable AI"].is_gone
    assert approach.retired(on=date(2027, 3, 16)).set_index("product").loc["Explainable AI"].is_gone
    assert frame.ends.is_monotonic_increasing


def test_what_is_retired_is_not_offered():
    for entry in TABLE["retired"]:
        if entry.get("option") and tables.day(entry["ends"]) <= date.today():
            assert entry["option"] not in TABLE["tasks"][entry["task"]]


# How much work it is


def test_effort_is_that_of_the_cells_before(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    with pytest.raises(RuntimeError, match="none runs here"):
        approach.Effort()
    notebook = InteractiveShell.instance()
    try:
        notebook.user_ns["approach"] = approach
        for cell in (
            "effort = approach.Effort()",
            "# why\nimport time\n\ntime.sleep(0.2)",
            "before = effort.cells[-1]",
            "two_before = effort.cells[-2]",
        ):
            notebook.run_cell(cell)
        found = notebook.user_ns
        assert found["before"] is found["two_before"]
        assert found["before"]["lines"] == 2
        assert found["before"]["seconds"] >= 0.2
        assert "".join(capsys.readouterr()) == "", "no callback of it fails"
    finally:
        InteractiveShell.clear_instance()
