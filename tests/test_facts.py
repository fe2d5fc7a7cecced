"""How facts and texts show themselves, in a notebook and in a terminal."""

import pandas as pd

from helpers.facts import Facts, InFull, Source


class Two(Facts):
    """Two facts, one of them in two lines."""

    def _facts(self):
        return [("a", "1 < 2"), ("name", "first\nsecond")]


def test_facts_stand_below_each_other_and_are_escaped():
    assert repr(Two()) == "a    1 < 2\nname first\n     second"
    page = Two()._repr_html_()
    assert "1 &lt; 2" in page
    assert "white-space:pre-line" in page  # so that a page keeps the two lines


def test_a_table_of_texts_cuts_nothing():
    text = "word " * 100 + "end"
    shown = InFull(pd.DataFrame({"what": [text, "<b>"]}))
    for whole in (repr(shown), shown._repr_html_()):
        assert text in whole
    assert "&lt;b&gt;" in shown._repr_html_()
    assert "<td>" not in shown._repr_html_()  # each has its own style, or a page would align it to the right


def test_a_source_is_shown_as_it_stands_in_its_file():
    def double(number):
        return number * 2  # a comment stays

    assert repr(Source(double)) == "    def double(number):\n        return number * 2  # a comment stays"
