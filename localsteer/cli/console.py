"""Where words go: the answer to stdout, the talk to stderr. rich is imported by the first table or bar."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click

from . import interrupt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 120
QUIET_SECONDS = 0.5  # a bar for less than this would only flicker
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def prepare_streams() -> None:
    """What a terminal's encoding lacks is shown as `?`: a reply must not end in UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@lru_cache(maxsize=1)
def _consoles() -> tuple[Console, Console]:
    from rich.console import Console

    plain = {"highlight": False, "markup": False, "emoji": False}
    # in a pipe there is no width to fit: a table should not be squeezed into 80 columns there
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(width=width, **plain), Console(stderr=True, **plain)


def answer() -> Console:
    """rich's console on stdout."""
    return _consoles()[0]


def talk() -> Console:
    """rich's console on stderr."""
    return _consoles()[1]


def note(message: str) -> None:
    """One line of talk, above a progress bar if there is one."""
    talk().print(f"localsteer: {message}", soft_wrap=True)


class NoticeHandler(logging.Handler):
    """The package's notices (logger `localsteer`), as one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def print_json(document: Any) -> None:
    """The one document of a `--json` command. NaN and infinity, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def shown(text: str) -> str:
    """Model text for the terminal: control characters, which could drive it, are shown as U+FFFD.

    A pipe or a file gets the text as it is.
    """
    return _CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text


def table(*columns: str, numbers: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table in the house style; the columns named in `numbers` are aligned to the right."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", header_style="bold")
    for name in columns:
        number = name in numbers
        made.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return made


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while the block runs, if that is a terminal: call it with (done, total).

    It appears once the work has taken half a second. One at a time.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=talk(), transient=True, disable=not talk().is_terminal)
    task = bar.add_task(what, total=None)
    ended, starting = threading.Event(), threading.Lock()

    def start_later() -> None:
        if not ended.wait(QUIET_SECONDS):
            with starting:
                if not ended.is_set():
                    bar.start()

    threading.Thread(target=start_later, daemon=True).start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        ended.set()
        with starting:
            bar.stop()


@contextmanager
def loading(what: str) -> Iterator[Callable[[float], bool]]:
    """The same for a load that reports 0.0 to 1.0 from C: answers False, which ends it, after Ctrl-C."""
    with progress(what) as advance:

        def report(part: float) -> bool:
            advance(round(100 * part), 100)
            return not interrupt.pressed()

        yield report
