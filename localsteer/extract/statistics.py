"""Directions, mean projections and spreads from states that pass by once. numpy only, float64 inside.

    v_l     = mean(h_l with) - mean(h_l without)        the direction
    zbar_l  = mean(h_l with . u_l) = mean(h_l with) . u_l,   u_l = v_l / |v_l|

Means need sums alone, so memory does not grow with the number of pairs. A spread needs the unit direction
before the first state is seen; second moments would give it afterwards, but cost n_embd x n_embd numbers per
layer and side (8 GB for a 7B model). So states pass by a second time: from memory when they are few (up to
KEPT_STATES, a fixed bound), and otherwise from the model again.
"""

from __future__ import annotations

import numpy as np

KEPT_STATES = 128  # 64 pairs: 64 MiB for 32 layers of 4,096


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """(..., n_embd) -> the same at length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


class RunningMeans:
    """Means of the last-token states, (n_layer, n_embd) each, with the instruction and without it."""

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self._sums = np.zeros((2, n_layer, n_embd))
        self._counts = np.zeros(2, dtype=np.int64)

    def add(self, states: np.ndarray, instructed: np.ndarray) -> None:
        """states: (n, n_layer, n_embd); instructed: (n,) bool, which of them saw the instruction."""
        for side in (0, 1):
            chosen = states[np.asarray(instructed, dtype=bool) == bool(side)]
            self._sums[side] += chosen.sum(axis=0, dtype=np.float64)
            self._counts[side] += len(chosen)

    @property
    def means(self) -> np.ndarray:
        """(2, n_layer, n_embd) float64: without, with."""
        return self._sums / self._counts[:, None, None]

    @property
    def directions(self) -> np.ndarray:
        """v: (n_layer, n_embd) float64, unnormalised."""
        without, instructed = self.means
        return instructed - without

    @property
    def units(self) -> np.ndarray:
        """u: (n_layer, n_embd) float64; a row of zeros where the instruction changes nothing."""
        return unit_rows(self.directions)

    @property
    def projections(self) -> np.ndarray:
        """(2, n_layer) float64: mean projection on the unit directions, without and with."""
        return np.einsum("sle,le->sl", self.means, self.units)


class ProjectionSpread:
    """Standard deviations (of the population) of the projections around means that are known already."""

    def __init__(self, means: RunningMeans) -> None:
        self._units, self._centres = means.units, means.projections
        self._squares = np.zeros_like(self._centres)
        self._counts = np.zeros(2, dtype=np.int64)

    def add(self, states: np.ndarray, instructed: np.ndarray) -> None:
        """The same states that the means were made of, in any order."""
        projections = np.einsum("nle,le->nl", states.astype(np.float64), self._units)
        for side in (0, 1):
            chosen = projections[np.asarray(instructed, dtype=bool) == bool(side)]
            self._squares[side] += ((chosen - self._centres[side]) ** 2).sum(axis=0)
            self._counts[side] += len(chosen)

    @property
    def deviations(self) -> np.ndarray:
        """(2, n_layer) float64: without, with."""
        return np.sqrt(self._squares / self._counts[:, None])
