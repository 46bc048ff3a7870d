"""report.md: the same as report.html, for a repository or a terminal; its plots are files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from localsteer.evaluate.report import plots
from localsteer.evaluate.report.document import Document, Grid, Passage, Picture, Suite, document, spans
from localsteer.evaluate.report.figures import TableCell

# what Markdown, or GitHub's maths, would take for its own; an underscore inside a word is left alone
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
_LINE_START = re.compile(r"^(\s*)(?:(?=[#>+-])|(\d+)(?=[.)](?:\s|$)))")  # 12.5 begins no list


def render(results: Any, *, pictures: str | None = None) -> str:
    """The page. pictures: the folder, as seen from it, that holds the plots as NAME.svg; None: no plots.

    Raises LocalsteerError for results that are broken or of a newer format.
    """
    return "\n\n".join(_page(document(results), pictures)) + "\n"


def all_plots(page: Document) -> Iterator[Picture]:
    """Every plot of a report, whose names are those of its picture files."""
    for suite in page.suites:
        yield from [suite.plot] if suite.plot else []
        for section in suite.sections:
            yield from section.plots
    for section in page.sections:
        yield from section.plots


def _page(page: Document, pictures: str | None) -> Iterator[str]:
    yield f"# {escape(page.title)}"
    if page.subtitle:
        yield prose(page.subtitle)
    if len(page.suites) > 1:
        yield "\n".join(f"- **{escape(suite.title)}**: {prose(suite.headline)}" for suite in page.suites)
    for suite in page.suites:
        yield from _suite(suite, pictures)
    for section in page.sections:
        yield from _section(section, pictures, "##")
    if page.columns:
        yield from _legend(page)
    if page.appendix:
        yield from _details("Settings, files and versions", page.appendix)
    if pictures is None and any(True for _ in all_plots(page)):
        yield f"Plots are left out; they need matplotlib (`{plots.INSTALL}`)."


def _suite(suite: Suite, pictures: str | None) -> Iterator[str]:
    yield f"## {escape(suite.title)}"
    yield prose(suite.summary)
    if suite.overall:
        yield _table(suite.overall)
    if suite.plot:
        yield from _picture(suite.plot, pictures)
    if suite.instructions:
        yield _table(suite.instructions)
    if suite.details:
        title = "Both rules and the quality of the replies, for each instruction and condition"
        yield from _details(title, [suite.details])
    for section in suite.sections:
        yield from _section(section, pictures, "###")


def _section(section: Passage, pictures: str | None, level: str) -> Iterator[str]:
    if section.title:
        yield f"{level} {prose(section.title)}"
    yield from map(prose, section.paragraphs)
    for plot in section.plots:
        yield from _picture(plot, pictures)
    yield from map(_table, section.tables)


def _picture(plot: Picture, pictures: str | None) -> Iterator[str]:
    if pictures is not None:
        yield f"![{escape(plot.title or 'plot')}]({pictures}/{plot.name}.svg)"


def _legend(page: Document) -> Iterator[str]:
    yield "## How to read this"
    rows = [*page.conditions, *page.columns]
    yield "\n".join(f"- **{name}**: {text}" for name, text in rows)


def _details(title: str, tables: Sequence[Grid]) -> Iterator[str]:
    """GitHub folds it; elsewhere it is text like all the rest."""
    yield f"<details><summary>{title}</summary>"
    yield from map(_table, tables)
    yield "</details>"


def _table(grid: Grid) -> str:
    columns = range(len(grid.columns))
    lines = [
        _line([escape(name) for name in grid.columns]),
        _line(["---:" if grid.is_number(column) else "---" for column in columns]),
    ]
    for i, row in enumerate(grid.rows):
        strong = grid.strong_last and i == len(grid.rows) - 1
        lines.append(_line([_cell(cell, strong) for cell in row]))
    return "\n".join([*([f"**{escape(grid.title)}**", ""] if grid.title else []), *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: TableCell, strong: bool) -> str:
    text = escape(cell.text)
    text = f"**{text}**" if strong and text else text
    return f"{text} ({cell.minor})" if cell.minor else text


def prose(text: str) -> str:
    """A paragraph: names between backticks as they are, its first character no list or heading."""
    text = "".join(f"`{piece}`" if is_name else escape(piece) for piece, is_name in spans(text))
    return _LINE_START.sub(r"\1\2\\", text)


def escape(text: str) -> str:
    """As one line that Markdown shows as it is, HTML in it too."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", text)
