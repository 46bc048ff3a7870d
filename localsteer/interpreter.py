"""How Python code is run in a separate process, with this one's packages."""

from __future__ import annotations

import os
import sys

# os and sys are loaded before any code runs: another module imported first might come from the current folder
_PATH = "import os, sys; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "


def python_command(code: str) -> list[str]:
    """The command line that runs `code`. The process finds the packages that this one finds, but nothing in
    the current folder, whose contents may be anyone's."""
    path = [entry for entry in sys.path if entry]
    return [sys.executable, "-c", _PATH + code, os.pathsep.join(path)]
