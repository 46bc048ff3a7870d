"""Static export: what stock llama.cpp can do with a vector, namely add it everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from localsteer.errors import PlanError
from localsteer.vector import ControlVector

from .write import write_vector


def static_vector(
    vector: ControlVector, layer: int | Sequence[int] | None = None, strength: float | None = None
) -> ControlVector:
    """The vector's chosen layers multiplied by the strength, zero elsewhere: mode add, positions all.

    Stock llama.cpp adds it at every position whatever the vector's own mode and positions were, so a
    projecting vector becomes an adding one, and its strength may want another value. Raises PlanError.
    """
    chosen = vector.at(layer=layer, strength=strength)
    if 0 in chosen.layers:
        raise PlanError("stock llama.cpp can't steer layer 0 (it rejects direction.0): choose a later layer.")
    directions = np.zeros((vector.n_layer, vector.n_embd), np.float32)
    for il, row in constant_rows(chosen).items():
        directions[il] = row
    settings = {
        "static_mode": vector.mode,
        "static_positions": vector.positions,
        "static_strength": chosen.strength,
    }
    return ControlVector(
        directions, None, None, None, None, chosen.layers, mode="add", name=vector.name,
        provenance={**vector.provenance, **settings},
    )  # fmt: skip


def constant_rows(vector: ControlVector) -> dict[int, np.ndarray]:
    """The chosen layers' directions, (n_embd,) float32, times the strength.

    Raises PlanError for a strength of 0, and for one that overflows.
    """
    if vector.strength == 0:
        raise PlanError("strength 0 leaves nothing to export: choose another strength.")
    rows = {il: vector.strength * vector.directions[il].astype(np.float64) for il in vector.layers}
    with np.errstate(over="ignore"):
        small = {il: row.astype(np.float32) for il, row in rows.items()}
    if not all(np.isfinite(row).all() for row in small.values()):
        raise PlanError(f"strength {vector.strength:g} is too large to be multiplied into a direction.")
    return small


def export_static(
    vector: ControlVector,
    path: str | os.PathLike[str],
    layer: int | Sequence[int] | None = None,
    strength: float | None = None,
) -> ControlVector:
    """Write `static_vector(...)` for `llama-cli --control-vector FILE` at scale 1, and return it."""
    static = static_vector(vector, layer, strength)
    write_vector(static, path)
    return static
