"""How sure a share is: bootstrap over the queries, whose subjects are what a figure should generalise to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

N_BOOTSTRAP = 2000
LEVEL = 0.95
_CELLS_AT_ONCE = 1 << 22  # drawn indices held in memory together


def interval(values: np.ndarray | Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% of the mean of (n_rows, n_queries) values; queries are drawn again, for all rows alike.

    NaN for no values, and for no queries.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return float("nan"), float("nan")
    return clustered(values.sum(axis=0), np.full(values.shape[1], values.shape[0]), seed)


def clustered(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The same where queries have different numbers of values: their sum and their count by query."""
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    n = len(sums)
    if not n:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(0, n, (N_BOOTSTRAP, n))
    rows = max(1, _CELLS_AT_ONCE // n)
    parts = [drawn[start : start + rows] for start in range(0, N_BOOTSTRAP, rows)]
    means = np.concatenate([sums[part].sum(axis=1) / counts[part].sum(axis=1) for part in parts])
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
