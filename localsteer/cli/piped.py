"""A command of this program for another program, the server: in a process of its own, of low priority.

On stdin its words come as one line of JSON, then `stop`, which is Ctrl-C. Where stdin ends, so does the
process: whoever started it is gone. On stderr a line that begins with BEGINNING is progress, as JSON; the
others are for people, and a refusal is the last of them.
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

BEGINNING = "\x1e"  # of a line of progress: RFC 7464's record separator
STOP = "stop"
EVERY_SECONDS = 0.2  # between two lines that say the same with another count
LOWEST = 19
PRIORITY = "LOCALSTEER_NICE"  # of the environment: another one, 0 to 19


def run() -> None:
    """Never returns."""
    # a script that starts the server by `&` has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = json.loads(sys.stdin.readline() or "[]")
    step_back()
    threading.Thread(target=_obey, daemon=True).start()
    try:
        with heard_by(_Teller()):
            main(words)
    except KeyboardInterrupt:  # before or behind what takes it
        sys.exit(interrupt.EXIT_STATUS)


def step_back() -> None:
    """Compute only where nobody else does. Ctrl-C in the terminal of the server is not meant for this."""
    if not hasattr(os, "setpgid"):  # Windows
        return
    # a group, no session: Linux may share the processor out between sessions, and then no priority counts
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
    """As Ctrl-C does: the main thread is the one that hears of it."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


class _Teller:
    """Progress as lines. Callbacks of C may call it, so it raises nothing."""

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
