"""Puts what `localsteer demo` prints between the marks in README.md: python docs/record_demo.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
COLUMNS = "80"  # of a usual terminal
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"


def recorded(readme: str, output: str) -> str:
    """The README with this output of the demo in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README.name} has no {BEGIN} ... {END}")
    text = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    text = text.replace(str(Path.home()), "~")
    return f"{before}{BEGIN}\n```text\n$ localsteer demo\n{text}\n```\n{END}{after}"


def main() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "localsteer", "demo"],
        env={**os.environ, "COLUMNS": COLUMNS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    readme = README.read_text(encoding="utf-8")
    README.write_text(recorded(readme, done.stdout.decode("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
