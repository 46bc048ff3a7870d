"""Models that other programs have on this machine, by name: where they are, and what those programs record
about them.

    find("ollama:llama3.2:1b").path     find("hf:ORG/REPO:Q4_K_M", download=True)     everything()

    hub.py        Hugging Face's cache (`hf:`); download.py fills it
    ollama.py     Ollama's manifests (`ollama:`)
    lmstudio.py   LM Studio's folder (`lmstudio:`)
    llama_cpp.py  llama.cpp's own cache (`llama.cpp:`)
    stored.py     what they have in common          folders.py   walking through them

Nothing in those folders is written to or trusted: a name becomes a path only after it was found in a listing,
and a damaged model is one entry with the reason. Only `hub` downloads, and only when told to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from localsteer.errors import ModelFileError

from . import folders, hub, llama_cpp, lmstudio, ollama
from .download import find as find_or_fetch
from .stored import StoredModel

__all__ = [
    "PREFIXES",
    "StoredModel",
    "everything",
    "find",
    "is_stored_name",
    "parts_of",
    "store_of",
    "title_of",
    "within",
]

# (name of the file, bytes present, bytes in total)
Progress = Callable[[str, int, int], None]

STORES = {store.PREFIX: store for store in (hub, ollama, lmstudio, llama_cpp)}
PREFIXES = tuple(STORES)


def store_of(name: str) -> str | None:
    """The prefix of a name in one of these stores, or None for any other text."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)


def is_stored_name(name: str) -> bool:
    return store_of(name) is not None


def title_of(prefix: str) -> str:
    """The name of the program that owns the store: `Ollama`."""
    return STORES[prefix].TITLE


def find(name: str, *, download: bool = False, on_progress: Progress | None = None) -> StoredModel:
    """The model of a name with its prefix. download: fetch a missing model, if the store can.

    Raises ModelFileError, one line with the nearest names, for a name that means no model or several, and for
    a model that is damaged or incomplete.
    """
    prefix = store_of(name)
    if prefix is None:
        raise ModelFileError(
            f"{name!r:.80} is not the name of a store: they begin with {', '.join(PREFIXES)}."
        )
    rest = name[len(prefix) :]
    if prefix == hub.PREFIX:
        model = find_or_fetch(rest, allowed=download, on_progress=on_progress)
    else:
        model = STORES[prefix].find(rest)
    if model.fault:
        raise ModelFileError(f"{model.name} can't be used: {model.fault}.")
    return model


def parts_of(path: Path) -> list[Path]:
    """All files of a model. path: the first, or the only one."""
    return [path.with_name(part) for part in folders.parts(path.name)]


def everything() -> list[StoredModel]:
    """All models of the four stores on this machine, including damaged ones. No header is read."""
    return [model for store in STORES.values() for model in store.one_by_one()]


def within(seconds: float) -> tuple[list[StoredModel], bool]:
    """Returns (what of `everything` was found in about this time, whether that is all). The hub's cache comes
    last, since it may hold much that is not a GGUF."""
    until = time.monotonic() + seconds
    small = (ollama.one_by_one(), lmstudio.one_by_one(), llama_cpp.one_by_one())
    seen = []
    for model in chain(*small, hub.one_by_one(until)):
        seen.append(model)
        if time.monotonic() > until:
            break
    return seen, time.monotonic() <= until
