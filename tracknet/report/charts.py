"""The report's charts, drawn by matplotlib as SVG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tracknet.report.history import Series

SIZE_INCHES = (4.4, 2.7)  # small, so that 9 point letters stay readable where a telephone shows the chart 340 px wide
POINTS = 600  # of a line; more are averaged in groups, so that a page of a run of days stays small
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a929c",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "tracknet",  # the same run gives the same page
}
COLOURS = ("#1f6feb", "#d1602d", "#2a8f5b", "#8250df", "#b3276b", "#6b7683", "#b08800", "#0e7c86")
ERROR_MARKS = {"FP1": ("#ffb000", "x"), "FP2": ("#ff3b30", "+"), "FN": ("#00c2ff", "o")}


@dataclass(frozen=True)
class ErrorMap:
    """Where the errors of one game lie.

    Attributes:
        game: its name.
        picture: RGB (H, W, 3), the game's court.
        size_wh: of the pictures in which the positions are.
        positions: (n, 2) px by kind of error: FP1 and FP2 where the detection is, FN where the label is.
    """

    game: str
    picture: NDArray[np.uint8]
    size_wh: tuple[int, int]
    positions: Mapping[str, NDArray[np.float64]]


def line_chart(title: str, lines: Mapping[str, Series], *, log_scale: bool = False, steps: bool = False, from_zero: bool = False) -> str:
    """A chart of metrics over the steps.

    Args:
        title: with the unit.
        lines: by name; a legend names them where there are several.
        log_scale: of the vertical axis, where all values are above 0.
        steps: values hold until the next one.
        from_zero: the vertical axis begins at 0.

    Returns:
        The SVG's text.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for (name, series), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            thin = _thinned(series) if not steps else series
            marker = "o" if len(thin) <= 20 and not steps else None
            style = "steps-post" if steps else "default"
            axes.plot(thin.step, thin.value, color=colour, label=name, linewidth=1.4, marker=marker, markersize=3, drawstyle=style)
        positive = all(len(series) == 0 or series.value.min() > 0 for series in lines.values())
        if log_scale and positive:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.0) if steps else None)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(title=title, xlabel="step")
        if len(lines) > 1:
            axes.legend(ncols=2 if len(lines) > 3 else 1)
        return _svg(figure)


def error_map(errors: ErrorMap) -> str:
    """The positions of a game's errors over its court. Returns the SVG's text."""
    with rc_context(STYLE | {"axes.grid": False}):
        width, height = errors.size_wh
        figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[0] * height / width + 0.55), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(errors.picture // 2 + 64, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        for kind, xy_px in errors.positions.items():
            _mark(axes, xy_px, kind)
        axes.set(title=errors.game, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_axis_off()
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure)


def _mark(axes: Axes, xy_px: NDArray[np.float64], kind: str) -> None:
    colour, marker = ERROR_MARKS[kind]
    label = f"{kind} ({len(xy_px)})"
    axes.plot(xy_px[:, 0], xy_px[:, 1], marker, color=colour, markerfacecolor="none", markersize=5.5, markeredgewidth=1.2, label=label)


def _thinned(series: Series) -> Series:
    """The mean of neighbours, in as many groups as a line has points."""
    if len(series) <= POINTS:
        return series
    edges = np.linspace(0, len(series), POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(series)))
    return Series(np.add.reduceat(series.step, edges) // counts, np.add.reduceat(series.value, edges) / counts)


def _colours(count: int) -> Sequence[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
