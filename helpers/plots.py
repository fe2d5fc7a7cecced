"""Figures in the house style, each with a sentence of alt text for a reader who cannot see it.

    figure, axes = plots.figure("Both errors fall together", x="epoch", y="RMSE (USD)")
    axes.plot(history)
    plots.show(figure, "Line chart: ...")

Importing this module sets the style for the kernel: a palette that colour-blind readers can tell apart (Okabe and
Ito), light grids, titles that start at the left and state the finding.
"""

import base64
import io
import itertools

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6B7280",
)  # fmt: skip
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)

mpl.rcParams.update(
    {
        "axes.prop_cycle": mpl.cycler(color=PALETTE),
        "axes.axisbelow": True,
        "axes.edgecolor": "#9CA3AF",
        "axes.grid": True,
        "axes.labelcolor": "#374151",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "figure.dpi": 100,
        "font.size": 10,
        "grid.color": "#E5E7EB",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "xtick.color": "#4B5563",
        "ytick.color": "#4B5563",
    }
)


class Picture:
    """A drawn figure: what a notebook shows as an image with alt text, and a terminal as the alt text alone."""

    def __init__(self, png: bytes, width: int, alt: str):
        """Keep the image as PNG bytes, the width in CSS pixels to show it at, and its alt text."""
        self.png, self.width, self.alt = png, width, alt

    def _repr_html_(self) -> str:
        alt = self.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        image = base64.b64encode(self.png).decode()
        return f'<img alt="{alt}" width="{self.width}" src="data:image/png;base64,{image}">'

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"


def figure(*titles: str, x: str = "", y: str = "", height: float = 3.4, width: float = 8.0, share_y: bool = False):
    """Return a figure and its axes, one for each title, side by side; `x` and `y` label them, units in brackets.

    One title gives the axes themselves, several an array of axes. Sizes are inches. The figure belongs to no
    window or pyplot state, so a cell shows it once, where `show` is called.
    """
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(1, len(titles) or 1, squeeze=False, sharey=share_y)[0]
    for panel, title in zip(axes, titles, strict=False):
        panel.set(title=title, xlabel=x)
    axes[0].set_ylabel(y)
    if not share_y:
        for panel in axes[1:]:
            panel.set_ylabel(y)
    return drawing, axes if len(axes) > 1 else axes[0]


def show(drawing: Figure, alt: str) -> Picture:
    """Return the figure as a picture that carries `alt`: what it shows and what it says, at least 20 characters.

    The PNG has more pixels than its shown size, for sharp screens, and a palette of 128 colours, which makes it a
    third as large. It is the same to the byte on every run.
    """
    if len(alt) < 20:
        raise ValueError(f"alt text {alt!r} has {len(alt)} characters; say in a sentence what the figure shows")
    from PIL import Image

    canvas = io.BytesIO()
    drawing.savefig(canvas, format="png", dpi=150, metadata={"Software": None})
    canvas.seek(0)
    small = io.BytesIO()
    Image.open(canvas).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return Picture(small.getvalue(), round(drawing.get_figwidth() * 90), alt)


def dollars(axis) -> None:
    """Write an axis' numbers as 1,200 rather than 1200."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def learning_curves(axes, history, metric: str, start: int = 1) -> None:
    """Draw a metric of a Keras History, training and validation, against the epoch, from epoch `start` on."""
    for key, label, colour in ((metric, "training rows", BLUE), (f"val_{metric}", "validation rows", VERMILION)):
        values = history.history.get(key, [])
        axes.plot(range(start, len(values) + 1), values[start - 1 :], color=colour, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def predicted_against_true(axes, true, predicted, colour: str = BLUE) -> None:
    """Scatter predictions against the truth (both of shape (rows,)); on the diagonal a prediction is right."""
    limits = [0, float(max(np.max(true), np.max(predicted)))]
    axes.scatter(true, predicted, s=3, alpha=0.25, color=colour, linewidths=0, rasterized=True)
    axes.plot(limits, limits, color=GREY, linewidth=1, linestyle="--")


def network(units: list[int], labels: list[str], title: str):
    """Draw a feed-forward network: a column of circles a layer, `units` of them (at most eight shown), and its labels.

    Returns the figure and its axes; the drawing has no scale, so the axes are switched off.
    """
    drawing, axes = figure(title, height=3.6)
    axes.axis("off")
    columns = []
    for position, count in enumerate(units):
        shown = min(count, 8)
        heights = np.arange(shown) - (shown - 1) / 2
        # A gap in the middle says that there are more units than circles.
        if count > shown:
            heights = heights + np.where(heights > 0, 0.5, -0.5)
            axes.text(position, 0, "⋮", ha="center", va="center", fontsize=14, color="#374151")
        columns.append(heights)
    for position, (left, right) in enumerate(itertools.pairwise(columns)):
        for start in left:
            for end in right:
                axes.plot([position, position + 1], [start, end], color="#D1D5DB", linewidth=0.5, zorder=1)
    for position, (heights, label) in enumerate(zip(columns, labels, strict=True)):
        colour = (GREY, BLUE, BLUE, GREEN)[min(position, 3)] if position < len(columns) - 1 else GREEN
        axes.scatter(np.full(len(heights), position), heights, s=130, color=colour, edgecolor="white", zorder=2)
        axes.text(position, -5.3, label, ha="center", va="top", fontsize=9, color="#111827")
    axes.set(xlim=(-0.5, len(units) - 0.5), ylim=(-7.4, 4.8))
    return drawing, axes
