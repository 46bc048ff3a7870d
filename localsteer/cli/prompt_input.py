"""The prompt of a command: an argument, standard input, or both."""

from __future__ import annotations

import os
import select
import sys

import click

from .console import note

WAIT_SECONDS = 2  # before a silent pipe causes a notice about what is awaited


def read_prompt(argument: str | None) -> str:
    """The argument, the piped text, or both with the piped text first. `-` means standard input only.

    Raises click.UsageError when there is neither, and for bytes that are not UTF-8 text.
    """
    if argument == "-":
        return _standard_input()
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _standard_input()
    parts = [part for part in (piped, argument) if part]
    if not parts and argument is None:
        raise click.UsageError("there is no prompt: pass one as an argument, or pipe one in.")
    return "\n\n".join(parts)


def _standard_input() -> str:
    """All of it, without the newline at its end."""
    _say_what_is_waited_for()
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8 text (byte {error.start}).") from None


def _say_what_is_waited_for() -> None:
    try:
        if os.name == "posix" and not select.select([sys.stdin], [], [], WAIT_SECONDS)[0]:
            note("reading the prompt from standard input; end it with Ctrl-D, or use < /dev/null for none.")
    except (OSError, ValueError):
        pass  # not a real file: nothing to wait for
