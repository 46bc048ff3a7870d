"""The vectors that ship for a model (localsteer/packs), offered beside those of the folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from localsteer.errors import LocalsteerError
from localsteer.packs import match_quietly

from .loaded import Loaded

logger = logging.getLogger("localsteer")


def shipped_vectors(model: Path) -> Mapping[str, Loaded]:
    """By name, those that help. A damaged file is left out, with a warning."""
    match = match_quietly(model)
    found: dict[str, Loaded] = {}
    for entry in match.pack.instructions.values() if match else ():
        if not entry.helps:
            continue
        try:
            vector = match.pack.vector(entry.id)
        except LocalsteerError as error:
            logger.warning("%s is not offered: %s", entry.id, error)
            continue
        size = match.pack.path(entry.id).stat().st_size
        found[entry.id] = Loaded(entry.id, entry.sha256 or "", size, vector, ships_for=match.pack.title)
    return found
