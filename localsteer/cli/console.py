"""Output: answers go to stdout, notices and progress to stderr. The first table or bar imports rich."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click

from localsteer.jsonable import finite

from . import interrupt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 120
QUIET_SECONDS = 0.5  # a bar for less than this would only flicker
LONGEST_NAME = 24  # a word in a cell of at most this many characters is never folded
PACE_SECONDS = 60.0  # of the latest work, from which the time left is estimated
# Characters that control a terminal, except tab and line break, and those that reorder a line
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_HARMLESS = "\ufffd"
LONGEST_MESSAGE = 2000  # characters of an error
_listener: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("listener", default=None)


def prepare_streams() -> None:
    """Show characters that the terminal's encoding lacks as `?`, lest a reply end in UnicodeEncodeError.

    A stream that was closed (`>&-`) becomes the null device; otherwise a model file could get its descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@lru_cache(maxsize=1)
def _consoles() -> tuple[Console, Console]:
    from rich.console import Console
    from rich.segment import Segment

    class Harmless(Console):
        """A stream that makes all output harmless, tables and bars included: texts may come from anyone's
        files."""

        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                is_text = segment.control is None  # else one of rich's own sequences, which moves the cursor
                yield Segment(harmless(segment.text), segment.style) if is_text else segment

    class Uncropped(Harmless):
        """A console in which long lines run over: a number that is cut off is another number."""

        def print(self, *objects: Any, crop: bool = False, **options: Any) -> None:
            super().print(*objects, crop=crop, **options)

    plain = {"highlight": False, "markup": False, "emoji": False}
    # in a pipe there is no width to fit: a table should not be squeezed into 80 columns there
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Uncropped(width=width, **plain), Harmless(stderr=True, **plain)


def answer() -> Console:
    """rich's console on stdout."""
    return _consoles()[0]


def talk() -> Console:
    """rich's console on stderr."""
    return _consoles()[1]


def note(message: str) -> None:
    """Print a one-line notice on stderr, above a progress bar if there is one."""
    talk().print(f"localsteer: {message}", soft_wrap=True)


class NoticeHandler(logging.Handler):
    """Print the package's notices (logger `localsteer`) on stderr, one line each and none twice."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._told:
            self._told.add(message)
            note(message)


def print_json(document: Any) -> None:
    """Print the document of a `--json` command. NaN and infinity, which JSON lacks, become null.

    Control characters are escaped (\\u009b), which means the same and can't control a terminal.
    """
    written = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    click.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written))


def harmless(text: str) -> str:
    """The text with U+FFFD for every control character, since these could control a terminal."""
    return _CONTROL.sub(_HARMLESS, text)


def in_one_line(message: object) -> str:
    """An error for people. It may quote anything, and a file's name may hold line breaks: those are gone,
    with control characters, and of a long message the middle is left out: the end says what to do."""
    text = harmless(" ".join(str(message).split()))
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


def shown(text: str) -> str:
    """A model's reply for stdout, harmless in a terminal. A pipe or a file gets it unchanged."""
    return harmless(text) if sys.stdout.isatty() else text


def table(*columns: str, numbers: tuple[str, ...] = (), title: str | None = None, gap: int = 2) -> Table:
    """An empty table in the house style; the columns named in `numbers` are aligned to the right.

    If it is too wide, texts and headers are folded between words, while numbers and names stay whole and
    their lines run over. gap: blanks between columns.
    """
    from rich.cells import cell_len
    from rich.table import Table

    class WholeWords(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*cells, **options)
            for column, cell in zip(self.columns, cells, strict=False):
                text = str(cell)
                is_name = len(text) <= LONGEST_NAME and not any(map(str.isspace, text))
                if column.justify == "right" or is_name:
                    column.min_width = max(column.min_width, cell_len(text))

    empty = WholeWords(
        box=None, padding=(0, gap, 0, 0), title=title, title_justify="left", header_style="bold"
    )
    for name in columns:
        empty.add_column(
            name,
            justify="right" if name in numbers else "left",
            overflow="fold",
            min_width=max((cell_len(word) for word in name.split() if len(word) <= LONGEST_NAME), default=1),
        )
    return empty


@contextmanager
def heard_by(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Report progress within the `with` block to a program too, as (what, done, total); see `progress`.

    Only in this thread. An exception of the listener ends the work.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr for the `with` block, if that is a terminal: call it with (done, total), total 0 if the
    end is not known, and with what is being done if that changes.

    It appears once the work has taken half a second, and shows the time left. One bar at a time.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    pace = Pace()
    shown = (*columns, _time_left_column(pace))
    bar = Progress(*shown, console=talk(), transient=True, disable=not talk().is_terminal)
    task = bar.add_task(what, total=None)
    ended, starting = threading.Event(), threading.Lock()

    def start_later() -> None:
        if not ended.wait(QUIET_SECONDS):
            with starting:
                if not ended.is_set():
                    bar.start()

    listener = _listener.get()

    def advance(done: int, total: int, now: str | None = None) -> None:
        if listener is not None:
            listener(now or what, done, total)
        if total:
            pace.add(time.monotonic(), done, total)
        bar.update(task, completed=done, total=total or None, description=now or what)

    threading.Thread(target=start_later, daemon=True).start()
    try:
        yield advance
    finally:
        ended.set()
        with starting:
            bar.stop()


class Pace:
    """Estimates the time left from the latest minute of work: what a journal already holds passes at once,
    and would make a mean over the whole run far too optimistic."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, now: float, done: int, total: int) -> None:
        """now: seconds of any clock that never goes back."""
        # a slow piece may last longer than the window: two points always stay
        while len(self._seen) > 1 and self._seen[1][0] <= now - PACE_SECONDS:
            self._seen.popleft()
        self._seen.append((now, done))
        self._total = total

    def left(self, now: float) -> float | None:
        """Seconds, or None while there is nothing to go by."""
        if len(self._seen) < 2:
            return None
        (start, before), (latest, done) = self._seen[0], self._seen[-1]
        if done <= before or latest <= start:
            return None
        return max(0.0, (self._total - done) * (latest - start) / (done - before) - (now - latest))


def _time_left_column(pace: Pace) -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: Any) -> Text:
            left = None if task.finished else pace.left(time.monotonic())
            return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")

    return TimeLeft()


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def loading(what: str) -> Iterator[Callable[[float], bool]]:
    """The same for a load that reports 0.0 to 1.0 from C: returns False after Ctrl-C, which ends the load."""
    with progress(what) as advance:

        def report(part: float) -> bool:
            try:
                advance(round(100 * part), 100)
            except Exception:  # raised by a listener to end the work: no exception can pass through C
                return False
            return not interrupt.pressed()

        yield report
