"""`--instruction json` without a file: extract the vector, pick its settings, and keep it for this model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError, VectorFileError

from . import interrupt
from .console import note, progress
from .models import model_file, open_engine
from .shipped import shipped_vector

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.tune import Tuned
    from localsteer.vector import ControlVector

NOTICE = "notice"  # key of the provenance: what its user should know on every use
N_SEQ_MAX = 32  # sequences in one decode while settings are tried
# Few, since the user waits. More pairs hardly turn the direction (docs/results/pairs.md).
N_PAIRS = 32


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
    """The vector of this instruction that ships for this model, else the cached one for this file, made now
    if there is none.

    The cache's key is the content: other phrasings, queries or pairs give another vector. search: try
    settings on a few questions, which takes longer than the extraction. settings: of open_engine, for the
    model with which the vector is made.
    """
    from localsteer.cache import file_hash, vector_path
    from localsteer.extract import build_pairs

    if search and n_pairs is None:
        shipped = shipped_vector(model, instruction, catalog, queries)
        if shipped is not None:
            return shipped
    n_pairs = n_pairs or min(N_PAIRS, len(queries))
    build_pairs(instruction, queries, n_pairs)  # refuses what can't work, before anything is announced
    model_hash = file_hash(model_file(model))
    digest = _digest([instruction.phrasings, [query.text for query in queries], n_pairs, search])
    path = vector_path(model_hash, f"{instruction.id}-{digest}")
    vector = _read(path)
    if vector is None:
        note(f"no vector of {instruction.id!r} for this model yet: making it now; this happens once.")
        with open_engine(model, **{**settings, "n_seq_max": N_SEQ_MAX}) as engine:
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
    from localsteer.cache import is_intact, is_sealed
    from localsteer.vector import ControlVector

    if not path.is_file():
        return None
    try:
        vector = ControlVector.load(path)
    except VectorFileError as error:
        note(f"the cached vector is made again: {error}")
        return None
    if is_sealed(path) and not is_intact(path):  # a vector of an earlier version has no seal
        note(f"the cached vector is made again: {path} is damaged.")
        return None
    return vector


def _keep(vector: ControlVector, path: Path) -> None:
    from localsteer.cache import cache_folder, seal, unlink_sealed

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unlink_sealed(path)  # never an old seal beside a new file
        vector.save(path)
        seal(path)
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
    """The vector at the settings found, with the figures of the search in its provenance."""
    from localsteer.tune import tune

    validation = (instruction.queries or catalog.queries).get("validation", ())
    if not validation:
        note(
            f"{catalog.source} has no validation queries to find settings with: using layer "
            f"{vector.layers[0]}."
        )
        return vector
    note(
        "finding layer, positions and strength; with a large model this takes minutes, and --layer N "
        "skips it."
    )
    with progress(f"tuning {instruction.id}") as advance:
        tuned = tune(
            engine,
            vector,
            instruction,
            validation,
            report=lambda what, done, total: advance(done, total, what),
        )
    if tuned.stopped:
        interrupt.forgive()  # Ctrl-C ended the search, not the program
    _tell(instruction, tuned)
    # repeated on every use: that nothing is applied
    notice = "" if tuned.helps else " ".join(tuned.advice)
    return replace(
        tuned.vector, provenance={**tuned.vector.provenance, **({NOTICE: notice} if notice else {})}
    )


def _tell(instruction: Instruction, tuned: Tuned) -> None:
    """Report the result once; `inspect` shows it again."""
    from localsteer.verify import can_rewrite

    if not tuned.helps:
        if instruction.verifier is not None and can_rewrite(instruction.verifier):
            note(
                f"`localsteer learn -i {instruction.id} -o {instruction.id}.gguf` learns a vector in some "
                "minutes instead; it needs PyTorch (the extra `torch`)."
            )
        return
    scores = {name: f"{share:.0%}" for name, share in tuned.scores.items() if share is not None}
    if tuned.record["judged_by"] == "verifier" and "steered" in scores:
        note(
            f"{instruction.id}: {tuned.setting}. Of {tuned.record['n']} replies {scores['steered']} follow "
            f"it steered, {scores['none']} plain, {scores['instructed']} told in words."
        )
    for line in tuned.advice:
        note(line)
