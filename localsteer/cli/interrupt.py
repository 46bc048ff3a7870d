"""Ctrl-C ends the program with status 130 and leaves the terminal as it was, whenever it is pressed.

llama.cpp calls back into Python while it loads a model, and an exception can't pass through C: Python drops
it there and continues. A press is therefore remembered, and sent again until it reaches localsteer's own
code.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_STATUS = 130  # 128 + SIGINT, as in shells
PATIENCE = 3  # presses; the last one ends a process that does not respond
_SEND_AGAIN_SECONDS = 0.05
_STUCK_SECONDS = 2.0  # within which a press reaches Python code, unless llama.cpp waits for a host (--rpc)
_SHOW_CURSOR = b"\x1b[?25h"

_presses = 0
_handled = 0  # calls of _on_press
_sent_again = threading.Event()


def pressed() -> bool:
    """Whether Ctrl-C has been pressed since the program began; callbacks from C then stop their work."""
    return _presses > 0


def forgive() -> None:
    """Start counting presses again: one that stopped a reply in a chat is not meant for the program."""
    global _presses
    _presses = 0


@contextmanager
def handled() -> Iterator[None]:
    """Take over SIGINT, unless it is ignored (nohup, a shell's `&`) or this is not the main thread."""
    global _presses
    _presses = 0
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    handler, hook = signal.signal(signal.SIGINT, _on_press), sys.unraisablehook
    sys.unraisablehook = _on_swallowed
    try:
        with _watched():
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook


@contextmanager
def _watched() -> Iterator[None]:
    """A thread that learns of signals at once, even while the main thread is inside llama.cpp."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, _handled), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread


def _watch(reader: socket.socket, heard: int) -> None:
    """Wait for presses, and have each looked after by `_let_go`. heard: presses so far."""
    if hasattr(signal, "pthread_sigmask"):  # a signal must end the waiting of the main thread, not of another
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with reader:
        while number := reader.recv(1):
            if number[0] != signal.SIGINT:
                continue
            heard += 1
            timer = threading.Timer(_STUCK_SECONDS, _let_go, (heard,))
            timer.daemon = True
            timer.start()


def _let_go(heard: int) -> None:
    """Let go of the hosts that llama.cpp waits for, unless this press has been handled."""
    hosts = sys.modules.get("localsteer.runtime.rpc.hosts")
    if _handled < heard and hosts:
        hosts.abandon_all()


def _on_press(_signal: int, _frame: FrameType | None) -> None:
    global _presses, _handled
    _handled += 1
    if _sent_again.is_set():
        _sent_again.clear()
    else:
        _presses += 1
    if _presses >= PATIENCE:
        if sys.stderr.isatty():
            os.write(2, _SHOW_CURSOR)
        os._exit(EXIT_STATUS)
    raise KeyboardInterrupt


def _on_swallowed(unraisable: Any) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(_SEND_AGAIN_SECONDS, _send_again)
    timer.daemon = True
    timer.start()


def _send_again() -> None:
    _sent_again.set()
    signal.raise_signal(signal.SIGINT)
