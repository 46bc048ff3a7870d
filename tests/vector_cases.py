"""Control vectors for the tests: exact small ones, and hypothesis strategies for random ones."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st

from localsteer.vector import STATISTICS, ControlVector

# how long an example takes says nothing on a machine that does other work as well
settings.register_profile("localsteer", deadline=None)
settings.load_profile("localsteer")

PROBES = [["<|user|>Tell me about foxes.<|end|>", [1, 5, 300, 2]], ["Füchse 🦊", [7, 8]], ["", []]]
PROVENANCE = {
    "instruction_id": "json", "instruction": "Answer in JSON format.", "n_pairs": 50, "architecture": "llama",
    "model_name": "tiny", "method": "difference in means", "quantized": True,
    "validation": {"accuracy": 0.9375, "blocks": [1, 2]}, "seconds": 1.5, "probes": PROBES,
}  # fmt: skip


def exact_directions(n_layer: int = 4, n_embd: int = 8) -> np.ndarray:
    """Multiples of 1/64, no random generator behind them: the same bytes everywhere and forever."""
    steps = np.arange(n_layer * n_embd) * 37 % 101 - 50
    return (steps.reshape(n_layer, n_embd) / 64).astype(np.float32)


def exact_vector(n_layer: int = 4, n_embd: int = 8, **changed) -> ControlVector:
    column = np.arange(n_layer) / 8
    given = {"layers": (n_layer // 2,), "name": "json", "provenance": PROVENANCE} | changed
    return ControlVector(
        exact_directions(n_layer, n_embd), column + 1, column - 1, column / 2, column, **given
    )


def imported_vector(**changed) -> ControlVector:
    given = {"layers": (2,), "mode": "add", "name": "plain"} | changed
    return ControlVector(exact_directions(), None, None, None, None, **given)


def gated_vector(**changed) -> ControlVector:
    """Gates at layers 1 and 2 of 4, the second chosen; exact as `exact_vector`."""
    readers = exact_directions(4, 8)[::-1].copy()
    readers[[0, 3]] = 0
    given = {
        "layers": (2,), "mode": "gate", "name": "gated", "readers": readers, "biases": [0, 0.5, -0.25, 0],
        "directions": exact_directions(), **dict.fromkeys(STATISTICS),
    }  # fmt: skip
    return ControlVector(**given | changed)


def axis_vectors(n: int) -> list[ControlVector]:
    """Projecting vectors at layer 2, along the first axes."""
    rows = [np.tile(row, (4, 1)) for row in np.eye(8)[:n]]
    return [
        ControlVector(row, np.ones(4), None, None, None, (2,), name=f"axis-{i}") for i, row in enumerate(rows)
    ]


def vector_along(direction, target: float = 0.0, **changed) -> ControlVector:
    """One layer that projects on the given direction."""
    rows = np.array([direction], dtype=np.float32)
    return ControlVector(rows, np.array([target]), None, None, None, **{"layers": (0,)} | changed)


def same(a: ControlVector, b: ControlVector) -> bool:
    """Equal to the last bit, negative zeros included."""
    arrays = ("directions", *STATISTICS, "readers", "biases")
    plain = ("layers", "mode", "positions", "strength", "one_sided", "cap", "name")
    for key in arrays:
        x, y = getattr(a, key), getattr(b, key)
        if (x is None) != (y is None) or (x is not None and x.tobytes() != y.tobytes()):
            return False
    return all(getattr(a, key) == getattr(b, key) for key in plain)


def floats32(bound: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, width=32)


@st.composite
def problems(draw, max_k: int = 4, n_embd: int = 12):
    """(x, vectors): tokens, and k projecting vectors at layer 0 that depend little on each other.

    Directions come from a seeded generator: hypothesis' own floats would all lie on the axes.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, n_tokens = draw(st.integers(1, max_k)), draw(st.integers(1, 5))
    x = rng.normal(size=(n_tokens, n_embd)).astype(np.float32)
    rows = rng.normal(size=(k, n_embd)) * rng.uniform(0.1, 30, size=(k, 1))
    targets = [draw(floats32()) for _ in range(k)]
    vectors = [
        vector_along(row, t, name=f"v{i}") for i, (row, t) in enumerate(zip(rows, targets, strict=True))
    ]
    units = np.stack([vector.unit(0) for vector in vectors]).astype(np.float64)
    assume(np.linalg.eigvalsh(units @ units.T)[0] > 0.05)
    return x, vectors
