"""Static export: what stock llama.cpp can do with a vector, which is to add it everywhere."""

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
    """The vector's chosen blocks multiplied by the strength, zero elsewhere: mode add, positions all.

    Stock llama.cpp adds it at every position whatever the vector's own mode and positions were, so a
    projecting vector becomes an adding one, and its strength may want another value. Raises PlanError.
    """
    chosen = vector.at(layer=layer, strength=strength)
    if 0 in chosen.layers:
        raise PlanError("stock llama.cpp can't steer block 0 (it rejects direction.0): choose a later block.")
    if chosen.strength == 0:
        raise PlanError("strength 0 leaves nothing to export: choose another strength.")
    directions = np.zeros((vector.n_layer, vector.n_embd))
    for il in chosen.layers:
        directions[il] = chosen.strength * chosen.directions[il].astype(np.float64)
    made = {
        "static_mode": vector.mode,
        "static_positions": vector.positions,
        "static_strength": chosen.strength,
    }
    return ControlVector(
        directions, None, None, None, None, chosen.layers, mode="add", name=vector.name,
        provenance={**vector.provenance, **made},
    )  # fmt: skip


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
