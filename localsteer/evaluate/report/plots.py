"""Pictures of the plots of a page: lines, bars, heat maps. matplotlib is loaded here alone.

    draw(Lines(title="Words", x=[0, 1], series={"steered": [3, 4]}), "words.png")

Values are numbers, None for a gap, or a `Share`: then the axis is in per cents, and intervals are drawn.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from textwrap import fill
from typing import IO, TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError
from localsteer.evaluate.page import AnyPlot, Bars, Heatmap, Label, Lines, Point, Share
from localsteer.evaluate.report.figures import is_share, known, number, percent, showable, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = 'pip install "localsteer[plot]"'
INK, LINE, PAPER = "#1f2329", "#d0d6de", "#fdfefe"  # also found again in the SVG, so used for nothing else
# The same colour for the same condition everywhere; all are readable on white and on black.
COLOURS = {
    "none": "#8b949e",
    "steered": "#2f81d6",
    "instructed": "#dd8a14",
    "both": "#2ea373",
    "random": "#b58ad6",
    "other": "#c9727f",
}
CYCLE = ("#2f81d6", "#dd8a14", "#2ea373", "#cf4f5b", "#8f6bc9", "#8a6d53", "#3bb0c0", "#8b949e")
WIDTH = 10.9  # inches: 785 points, the width of the page
BAR = 0.095  # inches
TWO_PANELS = 14  # more rows of bars than this stand in two columns
MAX_LABEL, MAX_AXIS_LABEL = 34, 60  # characters
TITLE_CHARACTERS = 10  # in an inch
LINE_WIDTH, WIDER = 1.6, 1.2  # points; wider for each later line that lies on this one
MAX_UPRIGHT = 10  # characters over a cell of a heat map
MAX_ANNOTATED = 400  # cells of a heat map that carry their figure
MAX_VECTOR_CELLS = 4000  # above this a heat map's cells are pixels, or the file grows too large

logger = logging.getLogger("localsteer")


def available() -> bool:
    """Whether matplotlib is there. Says so once, in the log, when it is not."""
    if not _has_matplotlib():
        _say_once()
        return False
    return True


@cache
def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _say_once() -> None:
    logger.warning("the report has no plots, since matplotlib is not installed: %s adds it.", INSTALL)


def draw(plot: AnyPlot, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Into a file whose suffix says how (svg, png, pdf), or as SVG into an open binary file.

    Raises LocalsteerError without matplotlib, and for a file that can't be written.
    """
    _save(plot, file, None if isinstance(file, (str, os.PathLike)) else "svg", titled=True)


def svg(plot: AnyPlot, salt: str = "") -> str:
    """An <svg> element for an HTML page: it takes the page's colours and fonts, and has no title of its own.

    salt: another one for each plot of a page, so that their inner ids differ.
    """
    buffer = BytesIO()
    _save(plot, buffer, "svg", titled=False, salt=salt)
    return _inline(buffer.getvalue().decode("utf-8"))


def _inline(text: str) -> str:
    text = text[text.index("<svg") :].strip()
    for colour, wanted in ((INK, "currentColor"), (LINE, "var(--line)"), (PAPER, "none")):
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: {wanted}", text)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)


def _save(plot: AnyPlot, file: Any, format: str | None, *, titled: bool, salt: str = "") -> None:
    if not _has_matplotlib():
        raise LocalsteerError(f"plots need matplotlib: {INSTALL}.")
    # without a date: the same file each time
    metadata = {"Date": None} if format == "svg" or str(file).endswith(".svg") else {}
    with _style(salt):
        drawn = figure(plot, titled=titled)
        try:
            drawn.savefig(file, format=format, dpi=150, metadata=metadata)
        except ValueError as error:  # an ending that is no picture format
            raise LocalsteerError(f"{file} can't be drawn: {error}.") from None
        except OSError as error:
            raise LocalsteerError(f"{file} can't be written: {error.strerror or error}.") from error


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    style = {
        "svg.fonttype": "none",  # text stays text: small files, any script, can be searched
        "svg.hashsalt": f"localsteer {salt}",
        "text.parse_math": False,  # a dollar in an instruction's name is a dollar
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), LINE),
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), PAPER),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # a glyph that the measuring font lacks is drawn by the reader's own fonts
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied")
        yield


def figure(plot: AnyPlot, *, titled: bool = True) -> Figure:
    """matplotlib's Figure of a plot."""
    canvas = {Lines: _lines, Bars: _bars, Heatmap: _heatmap}[type(plot)](plot)
    if titled and plot.title:
        # over the axes, not the figure: constrained layout would lay a figure's title on the legend
        title = fill(showable(plot.title), int(TITLE_CHARACTERS * (canvas.get_figwidth() - 1.0)))
        canvas.axes[0].set_title(title, fontsize=10, fontweight="bold", loc="left")
    return canvas


# --- points ------------------------------------------------------------------------------------------------


def _whiskers(points: Sequence[Point]) -> list[list[float]] | None:
    """How far below and above its value each interval reaches; None where no point has one."""
    pairs = [_reach(point) for point in points]
    if not any(below or above for below, above in pairs):
        return None
    return [[below for below, _ in pairs], [above for _, above in pairs]]


def _reach(point: Point) -> tuple[float, float]:
    if not isinstance(point, Share) or not all(map(known, (point.share, point.low, point.high))):
        return 0.0, 0.0
    return max(0.0, point.share - point.low), max(0.0, point.high - point.share)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Those of known conditions; else in turn, none of them twice before all are used."""
    if all(name in COLOURS for name in names):
        return {name: COLOURS[name] for name in names}
    return {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}


def _short(label: Label, longest: int = MAX_LABEL) -> str:
    text = showable(label) if isinstance(label, str) else f"{label:g}"
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    # matplotlib leaves labels out that start with an underscore
    return "\u200b" + text if text.startswith("_") else text


def _value_axis(axis: Any, shares: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    if shares:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def _legend(canvas: Figure, axes: Axes, n: int) -> None:
    """Above the plot, in one row where it fits."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        canvas.legend(
            handles, labels, loc="outside upper left", ncols=min(n, 6), fontsize=9, handlelength=1.2
        )


# --- kinds -------------------------------------------------------------------------------------------------


def _lines(plot: Lines) -> Figure:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = canvas.subplots()
    x, series = plot.x, plot.series
    numeric = all(map(known, x))
    at = list(map(float, x)) if numeric else list(range(len(x)))
    widths = _widths(list(series.values()))
    for (name, colour), width in zip(_colours(list(series)).items(), widths, strict=True):
        _line(axes, at, series[name], colour, width, _short(name))
    if not numeric:
        axes.set_xticks(
            at,
            list(map(_short, x)),
            rotation=30 if _is_long(x) else 0,
            ha="right" if _is_long(x) else "center",
        )
    elif len(set(at)) <= 12:
        axes.set_xticks(sorted(set(at)), [f"{value:g}" for value in sorted(set(at))])
    shares = is_share(plot.points())
    if shares:
        axes.set_ylim(-0.03, 1.03)
    _value_axis(axes.yaxis, shares)
    axes.grid(axis="y", linewidth=0.6)
    axes.set(
        xlabel=_short(plot.x_label or "", MAX_AXIS_LABEL), ylabel=_short(plot.y_label or "", MAX_AXIS_LABEL)
    )
    _legend(canvas, axes, len(series))
    return canvas


def _is_long(labels: Sequence[Label]) -> bool:
    return sum(len(_short(label)) for label in labels) > 90


def _widths(series: Sequence[Sequence[Point]]) -> list[float]:
    """Wider where later lines lie on a line, so that none is hidden."""
    values = [[value_of(point) for point in points] for points in series]
    return [
        LINE_WIDTH + WIDER * sum(_coincide(line, later) for later in values[i + 1 :])
        for i, line in enumerate(values)
    ]


def _coincide(a: Sequence[float], b: Sequence[float]) -> bool:
    """At half of the points or more."""
    return 2 * sum(abs(x - y) < 0.01 * max(abs(x), abs(y), 1e-9) for x, y in zip(a, b, strict=True)) > len(a)


def _line(
    axes: Axes, at: Sequence[float], points: Sequence[Point], colour: str, width: float, label: str
) -> None:
    values = [value_of(point) for point in points]
    axes.plot(at, values, color=colour, marker="o", markersize=3.5, linewidth=width, label=label)
    reach = _whiskers(points)
    if reach is not None:
        low = [value - below for value, below in zip(values, reach[0], strict=True)]
        high = [value + above for value, above in zip(values, reach[1], strict=True)]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _bars(plot: Bars) -> Figure:
    """Lying bars, so that long names can be read; many rows stand in two columns."""
    from matplotlib.figure import Figure

    x, series = plot.x, plot.series
    n_panels = 2 if len(x) > TWO_PANELS else 1
    per_panel = max(1, math.ceil(len(x) / n_panels))
    height = per_panel * (BAR * max(2, len(series)) + 0.09) + 0.9
    canvas = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = canvas.subplots(1, n_panels, squeeze=False)[0]
    limits = _limits(plot.points())
    for k, axes in enumerate(panels):
        part = slice(k * per_panel, (k + 1) * per_panel)
        _panel(axes, x[part], {name: points[part] for name, points in series.items()}, per_panel)
        # the names stand on the upright axis: the labels change places
        axes.set(
            xlim=limits,
            xlabel=_short(plot.y_label or "", MAX_AXIS_LABEL),
            ylabel="" if k else _short(plot.x_label or "", int(9 * height)),
        )
        _value_axis(axes.xaxis, is_share(plot.points()))
    _legend(canvas, panels[0], len(series))
    return canvas


def _limits(points: Sequence[Point]) -> tuple[float, float]:
    """From 0, and all of 0 to 1 for shares: bars that do not begin at nothing mislead."""
    values = [value for value in map(value_of, points) if math.isfinite(value)]
    low, high = min([0.0, *values]), max([0.0, *values])
    if is_share(points) or low == high:
        return 0.0, 1.02
    room = 0.05 * (high - low) or 1.0
    return (low - room if low < 0 else 0.0), (high + room if high > 0 else 0.0)


def _panel(axes: Axes, labels: Sequence[Label], series: Mapping[str, Sequence[Point]], n_rows: int) -> None:
    height = 0.82 / max(1, len(series))
    for i, (name, colour) in enumerate(_colours(list(series)).items()):
        at = [row + (i - (len(series) - 1) / 2) * height for row in range(len(labels))]
        points = series[name]
        axes.barh(at, [value_of(point) for point in points], height * 0.9, color=colour, label=_short(name))
        reach = _whiskers(points)
        if reach is not None:
            values = [value_of(point) for point in points]
            axes.errorbar(values, at, xerr=reach, fmt="none", ecolor=INK, elinewidth=0.6, alpha=0.6)
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.set_ylim(n_rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.6)


def _heatmap(plot: Heatmap) -> Figure:
    from matplotlib.figure import Figure

    rows, columns = plot.rows, plot.columns
    values = [[value_of(point) for point in row] for row in plot.values]
    shares = is_share(plot.points())
    longest = max((len(_short(row)) for row in rows), default=0)
    width = min(WIDTH, 1.6 + 0.06 * longest + 0.62 * max(1, len(columns)))
    canvas = Figure(figsize=(max(3.6, width), 1.1 + 0.27 * max(1, len(rows))), layout="constrained")
    axes = canvas.subplots()
    if rows and columns:
        _mesh(canvas, axes, values, shares)
    long = max((len(_short(column)) for column in columns), default=0) > MAX_UPRIGHT
    axes.set_xticks(
        range(len(columns)),
        list(map(_short, columns)),
        rotation=40 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_yticks(range(len(rows)), list(map(_short, rows)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(
        xlabel=_short(plot.x_label or "", MAX_AXIS_LABEL), ylabel=_short(plot.y_label or "", MAX_AXIS_LABEL)
    )
    return canvas


def _mesh(canvas: Figure, axes: Axes, values: list[list[float]], shares: bool) -> None:
    """Cells in colour, each with its figure where there is room. A gap shows the page."""
    import numpy as np

    grid = np.ma.masked_invalid(np.array(values, np.float64))
    low, high = (float(grid.min()), float(grid.max())) if grid.count() else (0.0, 1.0)
    if shares:
        colours, low, high = "viridis", 0.0, 1.0
    elif low < 0:  # no effect is the middle of the colours
        colours, high = "RdBu_r", max(-low, high)
        low = -high
    else:
        colours = "viridis"
    if high <= low:
        high = low + 1.0
    mesh = axes.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5, np.arange(grid.shape[0] + 1) - 0.5, grid,
        cmap=colours, vmin=low, vmax=high, rasterized=grid.size > MAX_VECTOR_CELLS,
    )  # fmt: skip
    axes.invert_yaxis()
    bar = canvas.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    _value_axis(bar.ax.yaxis, shares)
    if grid.size <= MAX_ANNOTATED:
        _annotate(axes, grid, mesh, shares)


def _annotate(axes: Axes, grid: Any, mesh: Any, shares: bool) -> None:
    for (row, column), value in _known_cells(grid):
        red, green, blue, _ = mesh.cmap(mesh.norm(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
        text = percent(value) if shares else number(value)
        axes.text(
            column, row, text, ha="center", va="center", fontsize=7.5, color="#000000" if light else "#ffffff"
        )


def _known_cells(grid: Any) -> Iterator[tuple[tuple[int, int], float]]:
    import numpy as np

    for place, value in np.ndenumerate(grid.filled(math.nan)):
        if math.isfinite(value):
            yield place, float(value)
