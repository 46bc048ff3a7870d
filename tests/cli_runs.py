"""Running the command line in tests: as a process of its own, or, faster, in this one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """What one run of the program left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def complaint(self) -> str:
        """The one line of a run that was refused."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert self.out == ""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        assert self.err.startswith("localsteer: ")
        return self.err[len("localsteer: ") : -1]


def program(*args: object, input: bytes = b"", **options: Any) -> Run:
    """`localsteer ARGS` as a process. options: as subprocess.run has them."""
    done = subprocess.run(command_line(*args), input=input, capture_output=True, timeout=300, **options)
    return Run(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def command_line(*args: object) -> list[str]:
    return [sys.executable, "-m", "localsteer", *map(str, args)]


def invoke(*args: object, input: str | bytes = "") -> Run:
    """The same in this process."""
    from localsteer.cli import main

    raw = input.encode("utf-8") if isinstance(input, str) else input
    stdin, stdout, stderr = _stream(raw), _stream(), _stream()
    before = sys.stdin
    sys.stdin = stdin
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                main([str(arg) for arg in args])
                status: Any = 0
            except SystemExit as error:
                status = error.code
    finally:
        sys.stdin = before
    return Run(status or 0, _text(stdout), _text(stderr))


def _stream(raw: bytes = b"") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline="")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")


def write_vector(path: Path, *, n_layer: int = 4, n_embd: int = 64, seed: int = 0, **settings: Any) -> Path:
    """A vector of the right size for the tiny models, strong enough to change every reply."""
    from localsteer.vector import ControlVector

    draw = np.random.default_rng(seed)
    directions = draw.standard_normal((n_layer, n_embd)).astype(np.float32)
    means = {
        "mean_with": np.full(n_layer, 30.0), "mean_without": np.zeros(n_layer),
        "std_with": np.full(n_layer, 2.0), "std_without": np.full(n_layer, 3.0),
    }  # fmt: skip
    chosen = {"layers": (2,), "name": path.stem, **settings}
    ControlVector(directions, **{**means, **chosen}).save(path)
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This process's variables with the cache in `folder`."""
    return {**os.environ, "LOCALSTEER_CACHE": str(folder), **more}
