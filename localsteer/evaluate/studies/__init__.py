"""Questions that a table of conditions does not answer, each a module with NAME, TITLE and `run(job)`.

    job = Job(catalog, Path("out"), bundled.gguf_path("instruct", "Q8_0"), BUNDLED_LIMITS)
    document = run_study("pairs", job)

Replies are kept in OUT, so that a study that was stopped is started again and goes on where it was.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from localsteer.errors import LocalsteerError

NAMES = ("quantization", "pairs", "compound", "linear", "layers")


def study(name: str) -> ModuleType:
    """The module of a study. Raises LocalsteerError for an unknown name."""
    if name not in NAMES:
        raise LocalsteerError(f"unknown study {name!r}: choose one of {', '.join(NAMES)}.")
    return import_module(f"{__name__}.{name}")
