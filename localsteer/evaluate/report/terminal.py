"""The report in the terminal: tables, and heat maps in colour; other plots are in report.html."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.evaluate.report.document import Plot, Section, Suite, Table, document
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
    made = document(results)
    _heading(console, made.title, made.subtitle)
    for suite in made.suites:
        _suite(console, suite)
    for section in made.sections:
        _section(console, section)


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
    for table in (suite.overall, suite.instructions):
        if table is not None:
            console.print()
            print_table(console, table)
    for section in suite.sections:
        _section(console, section)


def _section(console: Console, section: Section) -> None:
    from rich.text import Text

    console.print()
    if section.title:
        _heading(console, section.title)
    for paragraph in section.paragraphs:
        console.print(Text(paragraph))
    for table in section.tables:
        print_table(console, table)
    drawn = [plot for plot in section.plots if _heatmap(console, plot)]
    titles = [plot.title for plot in section.plots if plot.title and plot not in drawn]
    if titles:
        console.print(Text(f"plots in the report: {'; '.join(titles)}", style="dim"))


def _heatmap(console: Console, plot: Plot) -> bool:
    """Whether the plot is a heat map that fits, and is printed now."""
    from rich.measure import Measurement

    from localsteer.heatmap import terminal_heatmap

    spec = plot.spec
    if spec["kind"] != "heatmap" or not (spec["rows"] and spec["columns"]):
        return False
    points = [point for row in spec["values"] for point in row]
    shares = {"low": 0, "high": 1, "form": "{:.0%}"} if is_share(points) else {}
    values = [[value_of(point) for point in row] for row in spec["values"]]
    made = terminal_heatmap(plot.title, spec["rows"], spec["columns"], values, **shares)
    wanted = Measurement.get(console, console.options.update(width=MAX_WIDTH), made).maximum
    fits = wanted <= console.width
    if fits:
        console.print(made)
    return fits


def print_table(console: Console, table: Table) -> None:
    """A table that is too wide for the console in several, each beginning with the first column."""
    for i, columns in enumerate(_parts(table, console.width)):
        if i:
            console.print()
        console.print(_rich(table, columns))


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """Columns that fit beside the first one, in order."""
    widths = [
        max(
            [
                max(map(len, _header(name).split("\n"))),
                *(min(MAX_CELL, len(_text(row[i]).plain)) for row in table.rows),
            ]
        )
        + GAP
        for i, name in enumerate(table.columns)
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


def _rich(table: Table, columns: Sequence[int]) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(table.title, style="bold") if table.title else None
    made = RichTable(box=None, padding=(0, GAP, 0, 0), title=title, title_justify="left", header_style="bold")
    for column in columns:
        number = table.is_number(column)
        made.add_column(
            Text(_header(table.columns[column])),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number,
        )
    for i, row in enumerate(table.rows):
        strong = table.strong_last and i == len(table.rows) - 1
        made.add_row(*(_text(row[column]) for column in columns), style="bold" if strong else None)
    return made


def _text(cell: TableCell) -> Text:
    from rich.text import Text

    text = Text(cell.text)
    return text.append(f" {cell.minor}", style="dim") if cell.minor else text
