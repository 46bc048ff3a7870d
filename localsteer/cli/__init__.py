"""The command line: one file per command, each with a click command named `command`.

Nothing heavy is imported at the top of a module here, so that every `--help` answers at once. stdout is the
answer, stderr the talk (console.py); errors, Ctrl-C and closed pipes end in one place (main.py).
"""

from __future__ import annotations

try:
    from .main import localsteer, main
except KeyboardInterrupt:  # before main can handle it
    raise SystemExit(130) from None

__all__ = ["localsteer", "main"]
