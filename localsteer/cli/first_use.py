"""`--instruction json` without a file: extract the vector, pick its settings, and keep it for this model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError, VectorFileError

from .console import note, progress
from .models import model_file, open_engine

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.vector import ControlVector

NOTICE = "notice"  # of the provenance: what its user should know each time


def vector_on_first_use(
    model: str,
    instruction: Instruction,
    catalog: Catalog,
    queries: tuple[Query, ...],
    n_pairs: int | None = None,
    **settings: Any,
) -> ControlVector:
    """The cached vector of this instruction for this very model file, made now if there is none.

    The cache's key is the content: other phrasings, queries or pairs give another vector. settings: of
    open_engine, for the model that it is made with.
    """
    from localsteer.cache import file_hash, vector_path
    from localsteer.extract import build_pairs

    build_pairs(instruction, queries, n_pairs)  # refuses what can't be, before anything is announced
    model_hash = file_hash(model_file(model))
    path = vector_path(model_hash, f"{instruction.id}-{_digest(instruction, queries, n_pairs)}")
    vector = _read(path)
    if vector is None:
        note(f"no vector of {instruction.id!r} for this model yet: making it now, once.")
        with open_engine(model, **settings) as engine:
            vector = _make(engine, instruction, catalog, queries, n_pairs)
        _keep(vector, path)
    if vector.provenance.get(NOTICE):
        note(vector.provenance[NOTICE])
    return vector


def _digest(instruction: Instruction, queries: tuple[Query, ...], n_pairs: int | None) -> str:
    content = [instruction.phrasings, [query.text for query in queries], n_pairs, instruction.verifier]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def _read(path: Path) -> ControlVector | None:
    from localsteer.vector import ControlVector

    if not path.is_file():
        return None
    try:
        return ControlVector.load(path)
    except VectorFileError as error:
        note(f"the cached vector is made again: {error}")
        return None


def _keep(vector: ControlVector, path: Path) -> None:
    from localsteer.cache import cache_folder

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        vector.save(path)
        note(f"kept in {cache_folder()}; `localsteer vectors` lists it.")
    except (OSError, LocalsteerError) as error:
        note(f"the vector could not be kept, and is made again next time: {error}")


def _make(
    engine: Engine,
    instruction: Instruction,
    catalog: Catalog,
    queries: tuple[Query, ...],
    n_pairs: int | None,
) -> ControlVector:
    from localsteer.evaluate.pick import pick
    from localsteer.extract import extract

    with progress(f"extracting {instruction.id}") as on_progress:
        vector = extract(engine, instruction, queries, n_pairs=n_pairs, on_progress=on_progress)
    validation = (instruction.queries or catalog.queries).get("validation", ())
    if instruction.verifier and not validation:
        note(f"{catalog.source} has no validation queries to pick settings with: block {vector.layers[0]}.")
        return vector
    with progress(f"picking settings for {instruction.id}") as on_progress:
        picked = pick(engine, vector, instruction, validation, mode=vector.mode, on_progress=on_progress)
    kept = {"validation": picked.table[:2], NOTICE: picked.notice}
    kept = {key: value for key, value in kept.items() if value}
    return replace(picked.vector, provenance={**picked.vector.provenance, **kept})
