"""Directions, mean projections and spreads from a stream of states. numpy only, float64 inside.

    v_l     = mean(h_l with) - mean(h_l without)        the direction
    zbar_l  = mean(h_l with . u_l) = mean(h_l with) . u_l,   u_l = v_l / |v_l|

Means only need sums, so memory does not grow with the number of pairs. A spread needs the unit direction
before the first state is seen; second moments would give it afterwards, but take n_embd x n_embd numbers per
layer and side (8 GB for a 7B model). States are therefore read twice: the second time from memory if there
are few (up to KEPT_STATES, a fixed limit), and otherwise from the model again.
"""

from __future__ import annotations

import numpy as np

KEPT_STATES = 128  # 64 pairs: 64 MiB for 32 layers of 4,096


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows (..., n_embd) scaled to length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


class RunningMeans:
    """Running means of the last-token states, with and without the instruction, each (n_layer, n_embd)."""

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self._sums = np.zeros((2, n_layer, n_embd))
        self._counts = np.zeros(2, dtype=np.int64)

    def add(self, states: np.ndarray, instructed: np.ndarray) -> None:
        """Take in a batch. states: (n, n_layer, n_embd); instructed: (n,) bool, which of them saw the
        instruction."""
        for side in (0, 1):
            chosen = states[np.asarray(instructed, dtype=bool) == bool(side)]
            self._sums[side] += chosen.sum(axis=0, dtype=np.float64)
            self._counts[side] += len(chosen)

    @property
    def means(self) -> np.ndarray:
        """The means without and with, (2, n_layer, n_embd) float64."""
        return self._sums / self._counts[:, None, None]

    @property
    def directions(self) -> np.ndarray:
        """The directions v, (n_layer, n_embd) float64, unnormalised."""
        without, instructed = self.means
        return instructed - without

    @property
    def units(self) -> np.ndarray:
        """The unit directions u, (n_layer, n_embd) float64; a row of zeros where the instruction changes
        nothing."""
        return unit_rows(self.directions)

    @property
    def projections(self) -> np.ndarray:
        """The mean projections on the unit directions, without and with: (2, n_layer) float64."""
        return np.einsum("sle,le->sl", self.means, self.units)


class ProjectionSpread:
    """Population standard deviations of the projections around known means."""

    def __init__(self, means: RunningMeans) -> None:
        self._units, self._centres = means.units, means.projections
        self._squares = np.zeros_like(self._centres)
        self._counts = np.zeros(2, dtype=np.int64)

    def add(self, states: np.ndarray, instructed: np.ndarray) -> None:
        """Take in the states that made up the means, in any order."""
        projections = np.einsum("nle,le->nl", states.astype(np.float64), self._units)
        for side in (0, 1):
            chosen = projections[np.asarray(instructed, dtype=bool) == bool(side)]
            self._squares[side] += ((chosen - self._centres[side]) ** 2).sum(axis=0)
            self._counts[side] += len(chosen)

    @property
    def deviations(self) -> np.ndarray:
        """The standard deviations without and with, (2, n_layer) float64."""
        return np.sqrt(self._squares / self._counts[:, None])
