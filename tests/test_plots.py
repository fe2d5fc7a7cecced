"""Figures: seen by everyone, the same on every run, and small."""

import io

import pytest
from PIL import Image

from helpers import plots

ALT = "A line that rises from left to right."


def picture(alt=ALT):
    figure, axes = plots.figure("It rises", x="time (s)", y="way (m)")
    axes.plot([0, 1], [0, 2])
    return plots.show(figure, alt)


def test_a_picture_carries_its_alt_text_everywhere():
    shown = picture('Rises by more than <1 & less than "3".')
    assert 'alt="Rises by more than &lt;1 &amp; less than &quot;3&quot;."' in shown._repr_html_()
    assert repr(shown) == 'Figure: Rises by more than <1 & less than "3".'


def test_a_picture_without_a_sentence_is_refused():
    with pytest.raises(ValueError, match="say in a sentence what the figure shows"):
        picture("a plot")


def test_a_picture_is_sharp_small_and_the_same_each_time():
    shown = picture()
    assert shown.png == picture().png
    assert len(shown.png) < 30_000
    image = Image.open(io.BytesIO(shown.png))
    assert image.mode == "P"
    assert image.width > 1.5 * shown.width


def test_figure_labels_every_panel():
    _, axes = plots.figure("left", "right", x="epoch", y="error (USD)")
    assert [panel.get_title(loc="left") for panel in axes] == ["left", "right"]
    assert {(panel.get_xlabel(), panel.get_ylabel()) for panel in axes} == {("epoch", "error (USD)")}


def test_network_shows_at_most_eight_units_of_a_layer():
    _, axes = plots.network([26, 64, 1], ["in", "hidden", "out"], "a network")
    assert [len(layer.get_offsets()) for layer in axes.collections] == [8, 8, 1]
