"""Can a layer's state tell whether an instruction stood in the prompt? A linear and a non-linear probe.

Both are least-squares classifiers in kernel form (kernel ridge, targets -1 and 1), so that some dozens of
states in thousands of dimensions cost a matrix of their own number: the linear kernel x.y, and the Gaussian
exp(-|x-y|^2 / 2 w^2), which can draw any boundary. Ridge and width are chosen on the training part alone, by
the leave-one-out error, which has a closed form. A third, `means`, looks along the difference of the two
classes' means alone, the direction that steering uses. numpy only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

MEANS, LINEAR, GAUSSIAN = "means", "linear", "gaussian"
PROBES = (MEANS, LINEAR, GAUSSIAN)
N_FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean eigenvalue of the kernel matrix
WIDTHS = (0.5, 1.0, 2.0)  # times the median distance of two training states


def accuracy(
    states: np.ndarray,
    labels: Sequence[bool] | np.ndarray,
    groups: Sequence[Hashable],
    probe: str = LINEAR,
    *,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> float:
    """Balanced accuracy on folds that the probe was not trained on: 0.5 is chance, 1 perfect.

    states: (n, d). groups: states of one group are in one fold together, so that nothing of a test state's
    query (or wording) is known from training. Raises ValueError unless both labels are there, and at least
    two groups.
    """
    labels = np.asarray(labels, dtype=bool)
    folds = folds_of(groups, n_folds, seed)
    if labels.all() or not labels.any() or folds.max() < 1:
        raise ValueError("a probe needs both labels and at least two groups")
    right = np.zeros(len(labels), dtype=bool)
    for fold in range(folds.max() + 1):
        test = folds == fold
        train = ~test
        if labels[train].all() or not labels[train].any():
            raise ValueError("a fold's training part holds one label only")
        right[test] = _predict(states[train], labels[train], states[test], probe) == labels[test]
    return float((right[labels].mean() + right[~labels].mean()) / 2)


def folds_of(groups: Sequence[Hashable], n_folds: int = N_FOLDS, seed: int = 0) -> np.ndarray:
    """(n,) the fold of each state; the groups are dealt out in random order."""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[i]: k % n_folds for k, i in enumerate(order)}
    return np.array([fold[group] for group in groups])


def _predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, probe: str) -> np.ndarray:
    """(n_test,) bool."""
    centre, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = np.inf  # a constant dimension says nothing
    if probe == MEANS:
        return _nearer_mean(train.astype(np.float64), labels, test.astype(np.float64))
    known, asked = (train - centre) / scale, (test - centre) / scale
    signs = np.where(labels, 1.0, -1.0)
    fits = [_fit(kernel, signs, k) for k, kernel in enumerate(_kernels(known, known, probe))]
    best = min(fits, key=lambda fit: fit.error)
    kernel = _kernels(known, asked, probe, reference=known)[best.index]
    return best.predict(kernel) > best.threshold


def _nearer_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    means = train[labels].mean(axis=0), train[~labels].mean(axis=0)
    return (test - (means[0] + means[1]) / 2) @ (means[0] - means[1]) > 0


class _Fit(NamedTuple):
    """One kernel with the best of its ridges. error: leave-one-out. index: which of the kernels."""

    error: float
    index: int
    weights: np.ndarray  # (n_train,)
    means: np.ndarray  # (n_train,) of the training kernel's columns
    mean: float  # of the training targets
    threshold: float

    def predict(self, kernel: np.ndarray) -> np.ndarray:
        """kernel: (n_train, n_test) between training and asked states."""
        centred = kernel - self.means[:, None] - kernel.mean(axis=0) + self.means.mean()
        return self.weights @ centred + self.mean


def _fit(kernel: np.ndarray, signs: np.ndarray, index: int) -> _Fit:
    """Ridge in the centred feature space. The threshold lies between the leave-one-out predictions of the
    two classes: with unequal classes 0 would favour the larger."""
    n, means, mean = len(signs), kernel.mean(axis=1), float(signs.mean())
    values, vectors = np.linalg.eigh(kernel - means[:, None] - means + means.mean())
    values = np.maximum(values, 0.0)
    rotated = vectors.T @ (signs - mean)
    fits = []
    for ridge in RIDGES:
        shrunk = values / (values + ridge * max(values.mean(), 1e-30))
        leverage = vectors**2 @ shrunk + 1 / n
        residuals = (signs - mean - vectors @ (shrunk * rotated)) / np.maximum(1 - leverage, 1e-9)
        left_out = signs - residuals
        threshold = (left_out[signs > 0].mean() + left_out[signs < 0].mean()) / 2
        weights = vectors @ (rotated / (values + ridge * max(values.mean(), 1e-30)))
        fits.append(_Fit(float((residuals**2).mean()), index, weights, means, mean, float(threshold)))
    return min(fits, key=lambda fit: fit.error)


def _kernels(
    a: np.ndarray, b: np.ndarray, probe: str, reference: np.ndarray | None = None
) -> list[np.ndarray]:
    """(len(a), len(b)) each. reference: states whose distances give the widths (default: a)."""
    if probe == LINEAR:
        return [a @ b.T]
    if probe != GAUSSIAN:
        raise ValueError(f"unknown probe {probe!r}: one of {', '.join(PROBES)}")
    squares = _squared_distances(a, b)
    within = squares if reference is None else _squared_distances(reference, reference)
    typical = max(float(np.median(within[np.triu_indices(len(within), 1)])), 1e-30)
    return [np.exp(-squares / (2 * width**2 * typical)) for width in WIDTHS]


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.maximum(squares, 0.0)
