"""Runs a command for another program, the server, in a separate process of low priority.

stdin brings the command's arguments as one line of JSON, and later perhaps `stop`, which acts as Ctrl-C. When
stdin ends, so does the process, since its parent is gone. On stderr, a line that begins with BEGINNING is
progress, as JSON; other lines are for people, and the last of them is the refusal, if there is one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from . import interrupt
from .console import heard_by
from .main import main

BEGINNING = "\x1e"  # begins a line of progress: RFC 7464's record separator
STOP = "stop"
EVERY_SECONDS = 0.2  # between two lines that differ only in their counts
LOWEST = 19
PRIORITY = "LOCALSTEER_NICE"  # environment variable for another priority, 0 to 19


def run() -> None:
    """Never returns."""
    # a script that starts the server with `&` has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = json.loads(sys.stdin.readline() or "[]")
    step_back()
    threading.Thread(target=_obey, daemon=True).start()
    try:
        with heard_by(_Teller()):
            main(words)
    except KeyboardInterrupt:  # Ctrl-C came before or after the code that handles it
        sys.exit(interrupt.EXIT_STATUS)


def step_back() -> None:
    """Lower the priority, so that everything else goes first, and leave the server's terminal, whose Ctrl-C
    is not meant for this process."""
    if not hasattr(os, "setpgid"):  # Windows
        return
    # a group, not a session: Linux may divide the processor between sessions, which makes priorities useless
    with suppress(OSError):
        os.setpgid(0, 0)
    wanted = os.environ.get(PRIORITY, "")
    with suppress(OSError):
        os.nice(min(LOWEST, int(wanted)) if wanted.isdecimal() else LOWEST)


def _obey() -> None:
    for line in sys.stdin:
        if line.strip() == STOP:
            _press()
    os._exit(1)


def _press() -> None:
    """Interrupt the main thread, as Ctrl-C does."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


class _Teller:
    """Write progress as lines. It raises nothing, since callbacks from C may call it."""

    def __init__(self) -> None:
        self._what, self._told = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self._what and now - self._told < EVERY_SECONDS:
            return
        self._what, self._told = what, now
        event = {"what": what, "done": done, "total": total}
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{BEGINNING}{json.dumps(event)}\n")
            sys.stderr.flush()
