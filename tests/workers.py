"""How many processes run the tests (pytest-xdist), and the cores that each of them takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MAX_WORKERS = 4  # beyond it the longest tests and what every worker sets up for itself decide
WORKER_BYTES = 2 * 2**30  # torch, a few engines, and the programs that a test starts


def workers_for(config: pytest.Config) -> int:
    """What `-n auto`, the default in pyproject.toml, means: 0 for files, which a start would only delay."""
    named = [Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args]
    if all(path.is_file() for path in named):
        return 0
    return fitting(len(available_cores()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def fitting(n_cores: int, memory: int) -> int:
    """memory: bytes. 0, which is this process, where there would be one."""
    n = min(n_cores, MAX_WORKERS, memory // WORKER_BYTES)
    return n if n > 1 else 0


def take_share_of_cores() -> None:
    """A worker, with llama.cpp, torch and the programs it starts, has as many threads as its share has cores.

    Two programs with a thread for every core bring each other to a halt (docs/development.md, Threads). To be
    called before torch is imported, which counts the cores once.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        # gw0, gw1, ...; a worker that replaces a crashed one counts on
        number, n_workers = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, share(number % n_workers, n_workers, available_cores()))


def share(worker: int, n_workers: int, cores: list[int]) -> list[int]:
    """As many cores for each; where there are fewer than workers, one that others have too."""
    n = len(cores) // n_workers
    return cores[worker * n : (worker + 1) * n] or [cores[worker % len(cores)]]


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
