"""Vectors of the bundled model, extracted at a fixed layer: what the tests of ensure and chat steer with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from localsteer import ControlVector, Engine, Sampling, bundled
from localsteer.catalog import load_catalog
from localsteer.extract import extract

GREEDY = Sampling(temp=0.0)
LAYER, POSITIONS = 2, "prompt"
N_PAIRS = 12


def open_bundled(**options) -> Engine:
    """Exact, and F32, so that a reply is the same whatever runs beside it and however its prompt was read."""
    return Engine(
        bundled.gguf_path("instruct", "F32"), **{"n_threads": 1, "n_seq_max": 4, "exact": True, **options}
    )


def bundled_vectors(engine: Engine, ids: Sequence[str]) -> dict[str, ControlVector]:
    catalog = load_catalog(bundled.CATALOG)
    found = {}
    for name in ids:
        instruction = catalog.get(name)
        queries = catalog.queries_for(instruction, "extraction")
        vector = extract(engine, instruction, queries, n_pairs=N_PAIRS, mode="project")
        found[name] = vector.at(layer=LAYER, positions=POSITIONS)
    return found


def judged_by(vector: ControlVector, verifier: str, **kwargs) -> ControlVector:
    """The same directions with another verifier."""
    return replace(vector, provenance={**vector.provenance, "verifier": verifier, "kwargs": kwargs})
