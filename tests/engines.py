"""What the tests of the engine share: engines on tiny models, random vectors, greedy settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import localsteer
from localsteer.runtime.sampling import Sampling

GREEDY = Sampling(temp=0.0)


def open_engine(path: Path, **options) -> localsteer.Engine:
    """One thread, and exact (no flash attention, no 16-bit cache), so that batching changes no token."""
    return localsteer.Engine(path, **{"n_threads": 1, "exact": True, "n_seq_max": 4, **options})


def random_vector(engine: localsteer.Engine, seed: int = 0, **settings) -> localsteer.ControlVector:
    """Directions of the size of the residual stream, so that steering by them shows."""
    draw = np.random.default_rng(seed)
    n_layer, n_embd = engine.model.n_layer, engine.model.n_embd
    return localsteer.ControlVector(
        directions=draw.normal(size=(n_layer, n_embd)),
        mean_with=draw.normal(3.0, 1.0, size=n_layer),
        mean_without=np.zeros(n_layer),
        std_with=None,
        std_without=None,
        **{"layers": (1,), "name": f"random-{seed}", **settings},
    )
