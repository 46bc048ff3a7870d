"""A run's results.json as something to read: in the terminal, as Markdown, as one HTML page.

    from localsteer.evaluate import report
    report.write(results, folder)            # report.md, report.html and plots/
    report.terminal.print_report(results)

Each of these takes `Results`, or what results.json holds, and raises LocalsteerError for one that is broken
or of a newer format. They show whatever sections a suite has written, and know nothing of any suite.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from localsteer.cache import atomic_path
from localsteer.evaluate.report import html, markdown, plots, terminal
from localsteer.evaluate.report.document import document

__all__ = ["html", "markdown", "plots", "terminal", "write"]

PICTURES = "plots"  # the folder beside report.md


def write(results: Any, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """report.md, with its plots in a folder beside it, and report.html, which holds its own.

    Each file replaces the one before as a whole, after both texts are made: what can't be shown leaves an
    earlier report as it is. Raises LocalsteerError for such results, and for a folder that can't be written.
    """
    folder = Path(folder)
    shown = list(markdown.all_plots(document(results)))
    pictures = PICTURES if shown and plots.available() else None
    texts = {
        "report.md": markdown.render(results, pictures=pictures),
        "report.html": html.render(results),
    }
    for picture in shown if pictures else ():
        plots.draw(picture.plot, buffer := BytesIO())
        _write(folder / PICTURES / f"{picture.name}.svg", buffer.getvalue())
    return tuple(_write(folder / name, text.encode("utf-8")) for name, text in texts.items())


def _write(path: Path, content: bytes) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path
