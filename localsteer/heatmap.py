"""A table of figures as colours: in the terminal (rich) and as a picture (matplotlib, the extra `plot`).

    console.print(terminal_heatmap("score", layers, positions, values, mark=(2, 0), low=0, high=1))
    png_heatmap("score.png", "score", layers, positions, values, mark=(2, 0), low=0, high=1)

Both libraries are imported at the first picture: a command that draws none loads neither.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.cache import atomic_path, require_folder
from localsteer.errors import LocalsteerError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

Values = Sequence[Sequence[float | None]]
Cell = tuple[int, int]
Mark = Cell | Collection[Cell] | None

# From low to high: dark to light, so that it can also be read in grey and by the colour-blind.
COLOURS = ((36, 30, 78), (44, 92, 134), (62, 156, 130), (172, 204, 84), (252, 232, 120))
MAX_NUMBERS = 600  # cells of a picture; with more, the numbers would be too small to read
DPI = 120


@dataclass(frozen=True)
class Colouring:
    """How values become colours. low, high: the ends of the scale (None: those of the values). form: the
    format of a figure."""

    low: float | None = None
    high: float | None = None
    form: str = "{:.2f}"


def terminal_heatmap(
    title: str,
    row_labels: Sequence[object],
    col_labels: Sequence[object],
    values: Values,
    mark: Mark = None,
    *,
    corner: str = "",
    **colouring: Any,
) -> RenderableType:
    """A table whose cells show the figure on its colour; marked ones are in brackets.

    Without colours (in a pipe) the figures remain; columns that do not fit go below. values: one row for each
    of row_labels; None or NaN leaves a cell empty. mark: (row, column) of a cell, or several of these.
    corner: what the row labels mean. colouring: arguments of Colouring.
    """
    from rich.text import Text

    _check_shape(row_labels, col_labels, values)
    chosen = Colouring(**colouring)
    marked, scale = _marked(mark), _Scale(values, chosen.low, chosen.high)
    rows = []
    for i, (label, row) in enumerate(zip(row_labels, values, strict=True)):
        cells = []
        for j, value in enumerate(row):
            if not _is_known(value):
                cells.append(Text("·", justify="center"))
                continue
            shown = chosen.form.format(value)
            text = f"[{shown}]" if (i, j) in marked else f" {shown} "
            width = max(len(text), len(f" {col_labels[j]} "))
            cells.append(Text(text.center(width), style=_style(scale.of(value), (i, j) in marked)))
        rows.append([Text(f"{label} "), *cells])
    return _TerminalHeatmap(title, [Text(corner), *(Text(f" {label} ") for label in col_labels)], rows)


class _TerminalHeatmap:
    """As many columns as fit into the console, the others below: a figure that is cut off would be wrong."""

    def __init__(self, title: str, header: list[Text], rows: list[list[Text]]) -> None:
        self._title, self._rows = title, [header, *rows]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement.get(console, options, self._table(range(1, len(self._rows[0]))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        # a table's own title would be folded to its width, which is small
        if self._title:
            yield Text(self._title, style="bold")
        for columns in self._parts(options.max_width):
            yield self._table(columns)

    def _parts(self, width: int) -> Iterator[list[int]]:
        widths = [max(row[j].cell_len for row in self._rows) for j in range(len(self._rows[0]))]
        part: list[int] = []
        for j in range(1, len(widths)):
            if part and widths[0] + sum(widths[i] for i in part) + widths[j] > width:
                yield part
                part = []
            part.append(j)
        yield part

    def _table(self, columns: Iterable[int]) -> Table:
        from rich.table import Table

        columns = list(columns)
        table = Table(box=None, padding=0)
        table.add_column(self._rows[0][0], justify="right")
        for j in columns:
            table.add_column(self._rows[0][j], justify="center", no_wrap=True)
        for row in self._rows[1:]:
            table.add_row(row[0], *(row[j] for j in columns))
        return table


def png_heatmap(
    path: str | os.PathLike[str],
    title: str,
    row_labels: Sequence[object],
    col_labels: Sequence[object],
    values: Values,
    mark: Mark = None,
    *,
    x_label: str = "",
    y_label: str = "",
    **colouring: Any,
) -> None:
    """The same as a picture; the file's ending chooses its kind (.png, .svg, .pdf).

    Raises LocalsteerError without matplotlib, for an unknown ending, and for a file that can't be written.
    """
    _check_shape(row_labels, col_labels, values)
    width = 2.5 + max(0.75 * len(col_labels), 3.0)
    figure = new_figure(width, 1.6 + max(0.32 * len(row_labels), 1.5))
    axes = figure.subplots()
    draw_heatmap(axes, row_labels, col_labels, values, mark, **colouring)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    save_figure(figure, path)


def draw_heatmap(
    axes: Any,
    row_labels: Sequence[object],
    col_labels: Sequence[object],
    values: Values,
    mark: Mark = None,
    **colouring: Any,
) -> None:
    """Draw it into matplotlib axes, for pictures with several parts. colouring: arguments of Colouring."""
    from matplotlib.colors import LinearSegmentedColormap

    chosen = Colouring(**colouring)
    scale = _Scale(values, chosen.low, chosen.high)
    colours = LinearSegmentedColormap.from_list("localsteer", [_unit(colour) for colour in COLOURS])
    filled = [[value if _is_known(value) else math.nan for value in row] for row in values]
    image = axes.imshow(filled, cmap=colours, vmin=scale.low, vmax=scale.high, aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    axes.set_xticks(range(len(col_labels)), [str(label) for label in col_labels], rotation=_tilt(col_labels))
    axes.set_yticks(range(len(row_labels)), [str(label) for label in row_labels])
    if len(row_labels) * len(col_labels) <= MAX_NUMBERS:
        _write_numbers(axes, values, scale, chosen.form)
    for i, j in _marked(mark):
        _frame(axes, i, j)


def check_picture(path: str | os.PathLike[str], what: str = "--plot") -> None:
    """Raise LocalsteerError now for what would go wrong after the work: no matplotlib, an unknown ending, no
    such folder."""
    known = new_figure(1, 1, what).canvas.get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in known:
        raise LocalsteerError(f"{path} can't be drawn: its ending must be one of {', '.join(sorted(known))}.")
    require_folder(path)


def new_figure(width: float, height: float, what: str = "--plot") -> Figure:
    """An empty picture of this size in inches. what: the option that needs it, for the message.

    Raises LocalsteerError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LocalsteerError(f'{what} needs matplotlib: pip install "localsteer[plot]".') from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture. Raises LocalsteerError for an unknown ending, and for a file that can't be written,
    which is left unchanged."""
    require_folder(path)
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format=Path(path).suffix.lstrip(".").lower())
    except ValueError as error:  # an ending that is not a picture format
        raise LocalsteerError(f"{os.fspath(path)} can't be drawn: {error}.") from None


class _Scale:
    """Where a value lies between the ends, 0 to 1; the middle if the ends are equal."""

    def __init__(self, values: Values, low: float | None, high: float | None) -> None:
        known = [value for row in values for value in row if _is_known(value)]
        self.low = min(known, default=0.0) if low is None else low
        self.high = max(known, default=1.0) if high is None else high

    def of(self, value: float) -> float:
        if self.high <= self.low:
            return 0.5
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def colour(part: float) -> tuple[int, int, int]:
    """Red, green and blue at a point of the scale, 0 to 1."""
    place = part * (len(COLOURS) - 1)
    i = min(int(place), len(COLOURS) - 2)
    low, high = COLOURS[i], COLOURS[i + 1]
    return tuple(round(a + (place - i) * (b - a)) for a, b in zip(low, high, strict=True))


def _is_dark(part: float) -> bool:
    red, green, blue = colour(part)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128  # luma of Rec. 601


def _style(part: float, marked: bool) -> str:
    text = "#ffffff" if _is_dark(part) else "#000000"
    return f"{'bold ' if marked else ''}{text} on rgb({','.join(map(str, colour(part)))})"


def _write_numbers(axes: Any, values: Values, scale: _Scale, form: str) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if _is_known(value):
                text = "white" if _is_dark(scale.of(value)) else "black"
                axes.text(j, i, form.format(value), ha="center", va="center", color=text, fontsize=8)


def _frame(axes: Any, i: int, j: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))


def _tilt(labels: Sequence[object]) -> int:
    """Degrees by which to turn labels, since long ones side by side would overlap."""
    return 40 if max((len(str(label)) for label in labels), default=0) > 8 and len(labels) > 3 else 0


def _unit(rgb: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in rgb)


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _marked(mark: Mark) -> set[Cell]:
    if mark is None:
        return set()
    cells = list(mark)
    return {(cells[0], cells[1])} if cells and isinstance(cells[0], int) else set(cells)


def _check_shape(row_labels: Sequence[object], col_labels: Sequence[object], values: Values) -> None:
    assert len(values) == len(row_labels), (len(values), len(row_labels))
    assert all(len(row) == len(col_labels) for row in values), col_labels
