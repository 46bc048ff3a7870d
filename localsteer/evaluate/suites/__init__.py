"""The suites that `localsteer eval` runs, by name; each is a module with NAME, TITLE and these two.

    missing(bench: Bench, **options) -> str    why there is nothing to do; empty: there is
    run(bench: Bench, **options) -> SuiteReport

`missing` asks the model nothing, so that what can't be done is said before anything is. It raises
LocalsteerError for input that is wrong; `run` expects that it was called.

A SuiteReport is one entry of `suites` in results.json.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from localsteer.errors import LocalsteerError

MODULES = {
    "format": "format",
    "length": "length",
    "words": "words",
    "composition": "composition",
    "cross-model": "cross_model",
    "ifeval": "ifeval",
}


def suite(name: str) -> ModuleType:
    """The module of a suite. Raises LocalsteerError for an unknown name."""
    if name not in MODULES:
        raise LocalsteerError(f"unknown suite {name!r}: choose from {', '.join(MODULES)}, or all.")
    return import_module(f"{__name__}.{MODULES[name]}")
