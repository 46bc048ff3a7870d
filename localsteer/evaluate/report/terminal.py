"""The report in the terminal: tables, and heat maps in colour; other plots are in report.html."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.evaluate.page import AnyPlot, Heatmap
from localsteer.evaluate.report.document import Grid, Passage, Suite, document
from localsteer.evaluate.report.figures import TableCell, is_share, value_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

GAP = 2  # blanks between columns
MAX_WIDTH = 10_000  # wider than anything
MAX_CELL = 40  # characters that a cell counts for when columns are laid out; longer ones are folded


def print_report(results: Any, console: Console | None = None) -> None:
    """Summaries and tables, the width of the console; the details are left to report.md and report.html.

    Raises LocalsteerError for results that are broken or of a newer format.
    """
    from rich.console import Console

    console = console or Console(highlight=False, markup=False, emoji=False)
    page = document(results)
    _heading(console, page.title, page.subtitle)
    for suite in page.suites:
        _suite(console, suite)
    for passage in page.sections:
        _passage(console, passage)


def _heading(console: Console, title: str, subtitle: str = "") -> None:
    from rich.text import Text

    console.print(Text(title, style="bold"))
    if subtitle:
        console.print(Text(subtitle, style="dim"))


def _suite(console: Console, suite: Suite) -> None:
    from rich.text import Text

    console.print()
    _heading(console, suite.title)
    console.print(Text(suite.summary))
    for grid in (suite.overall, suite.instructions):
        if grid is not None:
            console.print()
            print_table(console, grid)
    for passage in suite.sections:
        _passage(console, passage)


def _passage(console: Console, passage: Passage) -> None:
    from rich.text import Text

    console.print()
    if passage.title:
        _heading(console, passage.title)
    for paragraph in passage.paragraphs:
        console.print(Text(paragraph))
    for grid in passage.tables:
        print_table(console, grid)
    left = [picture.title for picture in passage.plots if not _heatmap(console, picture.plot)]
    if any(left):
        console.print(Text(f"plots in the report: {'; '.join(filter(None, left))}", style="dim"))


def _heatmap(console: Console, plot: AnyPlot) -> bool:
    """Whether the plot is a heat map that fits, and is printed now."""
    from rich.measure import Measurement

    from localsteer.heatmap import terminal_heatmap

    if not isinstance(plot, Heatmap) or not (plot.rows and plot.columns):
        return False
    shares = {"low": 0, "high": 1, "form": "{:.0%}"} if is_share(plot.points()) else {}
    values = [[value_of(point) for point in row] for row in plot.values]
    heatmap = terminal_heatmap(plot.title or "", plot.rows, plot.columns, values, **shares)
    wanted = Measurement.get(console, console.options.update(width=MAX_WIDTH), heatmap).maximum
    fits = wanted <= console.width
    if fits:
        console.print(heatmap)
    return fits


def print_table(console: Console, grid: Grid) -> None:
    """A table that is too wide for the console in several, each beginning with the first column."""
    for i, columns in enumerate(_parts(grid, console.width)):
        if i:
            console.print()
        console.print(_rich(grid, columns))


def _parts(grid: Grid, width: int) -> Iterator[list[int]]:
    """Columns that fit beside the first one, in order."""
    widths = [
        max(
            [
                max(map(len, _header(name).split("\n"))),
                *(min(MAX_CELL, len(_text(row[i]).plain)) for row in grid.rows),
            ]
        )
        + GAP
        for i, name in enumerate(grid.columns)
    ]
    part, used = [0], widths[0] if widths else 0
    for column in range(1, len(widths)):
        if len(part) > 1 and used + widths[column] > width:
            yield part
            part, used = [0], widths[0]
        part.append(column)
        used += widths[column]
    if widths:
        yield part


def _header(name: str) -> str:
    """`perplexity, steered` in two lines."""
    return name.replace(", ", ",\n")


def _rich(grid: Grid, columns: Sequence[int]) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(grid.title, style="bold") if grid.title else None
    table = RichTable(
        box=None, padding=(0, GAP, 0, 0), title=title, title_justify="left", header_style="bold"
    )
    for column in columns:
        number = grid.is_number(column)
        table.add_column(
            Text(_header(grid.columns[column])),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number,
        )
    for i, row in enumerate(grid.rows):
        strong = grid.strong_last and i == len(grid.rows) - 1
        table.add_row(*(_text(row[column]) for column in columns), style="bold" if strong else None)
    return table


def _text(cell: TableCell) -> Text:
    from rich.text import Text

    text = Text(cell.text)
    return text.append(f" {cell.minor}", style="dim") if cell.minor else text
