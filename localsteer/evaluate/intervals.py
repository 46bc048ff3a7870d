"""How sure a share is: bootstrap over the queries, whose subjects are what a figure should generalise to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from localsteer.evaluate.page import Figures

N_BOOTSTRAP = 2000
LEVEL = 0.95
_Z = 1.959964  # of the normal distribution at this level
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


def wilson(n_true: int, n: int) -> tuple[float, float]:
    """95% of a share by Wilson's score interval, which holds for few values and for shares of 0 and 1 too;
    NaN for no values. (Wilson 1927, J. Am. Stat. Assoc. 22:209.)"""
    if not n:
        return float("nan"), float("nan")
    share, z2 = n_true / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def certain(figures: Figures | None, rule: str) -> tuple[float, float] | None:
    """The interval that a claim may rest on; None where it is unknown.

    Where all replies are alike the bootstrap is a point: there the exact bound stands in, 1 - 0.05^(1/n).
    """
    if figures is None:
        return None
    low, high, n = figures.rule(rule).low, figures.rule(rule).high, figures.n
    if low is None or high is None:
        return None
    if low == high and n and n > 0:
        reach = 1.0 - (1.0 - LEVEL) ** (1.0 / n)
        return max(0.0, low - reach) if high >= 1.0 else low, min(1.0, high + reach) if low <= 0.0 else high
    return low, high
