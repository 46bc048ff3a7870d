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
N_SEQ_MAX = 16  # sequences in one decode while settings are tried
# Quick, since somebody waits: `tune` and `demo` look closer. (settings that come into the round, queries)
ROUNDS = ((10**6, 2), (4, 8))
MAX_TOKENS = 320  # a reply cut short fails many verifiers, JSON's first of all
FEW_BLOCKS = 12  # so many are all tried; of a deeper model, SPREAD_BLOCKS from the middle half
SPREAD_BLOCKS = 6


def vector_on_first_use(
    model: str,
    instruction: Instruction,
    catalog: Catalog,
    queries: tuple[Query, ...],
    n_pairs: int | None = None,
    *,
    search: bool = True,
    **settings: Any,
) -> ControlVector:
    """The cached vector of this instruction for this very model file, made now if there is none.

    The cache's key is the content: other phrasings, queries or pairs give another vector. search: try
    settings on a few questions, which takes longer than the extraction. settings: of open_engine, for the
    model that it is made with.
    """
    from localsteer.cache import file_hash, vector_path
    from localsteer.extract import build_pairs

    build_pairs(instruction, queries, n_pairs)  # refuses what can't be, before anything is announced
    model_hash = file_hash(model_file(model))
    digest = _digest([instruction.phrasings, [query.text for query in queries], n_pairs, search])
    path = vector_path(model_hash, f"{instruction.id}-{digest}")
    vector = _read(path)
    if vector is None:
        note(f"no vector of {instruction.id!r} for this model yet: making it now, once.")
        with open_engine(model, **settings, n_seq_max=N_SEQ_MAX) as engine:
            vector = _extract(engine, instruction, queries, n_pairs)
            if search:
                vector = _with_settings(engine, vector, instruction, catalog)
        _keep(vector, path)
    if vector.provenance.get(NOTICE):
        note(vector.provenance[NOTICE])
    return vector


def _digest(content: Any) -> str:
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
        reason = getattr(error, "strerror", None) or error
        note(f"the vector could not be kept, and is made again next time: {reason}")


def _extract(
    engine: Engine, instruction: Instruction, queries: tuple[Query, ...], n_pairs: int | None
) -> ControlVector:
    from localsteer.extract import extract

    with progress(f"extracting {instruction.id}") as on_progress:
        return extract(engine, instruction, queries, n_pairs=n_pairs, on_progress=on_progress)


def _with_settings(
    engine: Engine, vector: ControlVector, instruction: Instruction, catalog: Catalog
) -> ControlVector:
    """The vector at the best of a few settings, with the figures of that choice in its provenance."""
    from localsteer.evaluate.pick import Round, pick

    validation = (instruction.queries or catalog.queries).get("validation", ())
    if instruction.verifier and not validation:
        note(f"{catalog.source} has no validation queries to pick settings with: block {vector.layers[0]}.")
        return vector
    if instruction.verifier:
        note("trying blocks and positions; with a large model this takes minutes, and --layer N skips it.")
    with progress(f"picking settings for {instruction.id}") as on_progress:
        picked = pick(
            engine,
            vector,
            instruction,
            validation,
            blocks=blocks_to_try(vector.n_layer),
            mode=vector.mode,
            rounds=[Round(*each) for each in ROUNDS],
            max_tokens=MAX_TOKENS,
            on_progress=on_progress,
        )
    kept = {"validation": picked.table[:2], NOTICE: picked.notice}
    kept = {key: value for key, value in kept.items() if value}
    return replace(picked.vector, provenance={**picked.vector.provenance, **kept})


def blocks_to_try(n_layer: int) -> list[int]:
    """All of a shallow model; of a deep one some at equal distances from 25% to 75% of its depth."""
    if n_layer <= FEW_BLOCKS:
        return list(range(n_layer))
    first, last = n_layer // 4, 3 * n_layer // 4
    return [first + i * (last - first) // (SPREAD_BLOCKS - 1) for i in range(SPREAD_BLOCKS)]
