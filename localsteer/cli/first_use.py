"""`--instruction json` without a file: extract the vector, pick its settings, and keep it for this model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from localsteer.errors import LocalsteerError, VectorFileError

from .console import note, progress

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.vector import ControlVector


def vector_on_first_use(
    engine: Engine,
    instruction: Instruction,
    catalog: Catalog,
    queries: tuple[Query, ...],
    n_pairs: int | None = None,
) -> ControlVector:
    """The cached vector of this instruction for this very model file, made now if there is none.

    The cache's key is the content: other phrasings, queries or pairs give another vector.
    """
    from localsteer.cache import cache_folder, file_hash, vector_path
    from localsteer.extract import build_pairs

    path = vector_path(file_hash(engine.path), f"{instruction.id}-{_digest(instruction, queries, n_pairs)}")
    cached = _read(path)
    if cached is not None:
        return cached
    build_pairs(instruction, queries, n_pairs)  # refuses what can't be, before anything is announced
    note(f"no vector of {instruction.id!r} for {engine.path.name} yet: making it now, for once.")
    vector = _make(engine, instruction, catalog, queries, n_pairs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        vector.save(path)
        note(f"kept in {cache_folder()} (`localsteer vectors` lists it).")
    except (OSError, LocalsteerError) as error:
        note(f"the vector could not be kept: {error}")
    return vector


def _read(path: Path) -> ControlVector | None:
    from localsteer.vector import ControlVector

    if not path.is_file():
        return None
    try:
        return ControlVector.load(path)
    except VectorFileError as error:
        note(f"the cached vector is made again: {error}")
        return None


def _digest(instruction: Instruction, queries: tuple[Query, ...], n_pairs: int | None) -> str:
    content = [instruction.phrasings, [query.text for query in queries], n_pairs, instruction.verifier]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def _make(
    engine: Engine,
    instruction: Instruction,
    catalog: Catalog,
    queries: tuple[Query, ...],
    n_pairs: int | None,
) -> ControlVector:
    from localsteer.extract import extract

    with progress(f"extracting {instruction.id}") as on_progress:
        vector = extract(engine, instruction, queries, n_pairs=n_pairs, on_progress=on_progress)
    return vector
