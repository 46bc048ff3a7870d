"""The reference arithmetic, which native code and the PyTorch hook must match. numpy only, float64 inside.

There is one kind of edit. At one layer, with x the residual stream of one token:

    g_i = w_i . n_i(x) + b_i                    n_i(x) is x, or x / rms(x)
    a one-sided edit stays out (c_i = 0) where g_i <= 0
    c   = g; (G + ridge I)^-1 g                 for the edits that have a target and act; G_ij = z_i . z_j
    c_i <- clip(c_i, -cap_i, cap_i)             the dynamic weights
    x   <- x + sum_i c_i z_i

`project` on a unit direction u is w = -s u, b = s zbar, z = u, so g is the projection's distance to its
target; `ablate` is the same with zbar = 0; `add` is w = 0, b = s, z = v; a learned gate has all three. The
solve finds the least-norm change after which every projection has its target; for a single edit it is a
division, which the plan has already done.

Source: Stolfo et al., arXiv 2410.12877, section 3 (one vector, s = 1); docs/method.md has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plan import Plan, PositionClass, Program

RMS_EPS = 1e-12  # in rms(x) = sqrt(mean(x^2) + eps), so that a row of zeros is not divided by zero


def apply_program(x: np.ndarray, program: Program | None) -> np.ndarray:
    """x (n_tokens, n_embd) after the edits, as a new float32 array; a token whose weights are 0 keeps its
    bits."""
    result = np.array(x, dtype=np.float32)
    if program is None:
        return result
    weights = dynamic_weights(x, program)
    touched = (weights != 0).any(axis=1)  # NaN != 0: a broken row stays visibly broken
    change = weights[touched] @ program.writers.astype(np.float64)
    result[touched] = result[touched].astype(np.float64) + change
    return result


def dynamic_weights(x: np.ndarray, program: Program) -> np.ndarray:
    """The weights c: (n_tokens, k) float64, in units of the writers, capped; 0 where a one-sided edit stays
    out."""
    x, readers = np.asarray(x, dtype=np.float64), program.readers.astype(np.float64)
    rms = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + RMS_EPS)
    read = x @ readers.T / np.where(program.normalised, rms, 1.0)
    weights = program.biases + np.where(readers.any(axis=1), read, 0.0)
    joins = ~program.one_sided | ~(weights <= 0)  # a NaN acts as well: a broken row stays visibly broken
    weights = np.where(joins, weights, 0.0)
    m = program.n_solved
    weights[:, :m] = _solved(weights[:, :m], joins[:, :m], program)
    return np.clip(weights, -program.caps, program.caps)


def _solved(wanted: np.ndarray, joins: np.ndarray, program: Program) -> np.ndarray:
    """The weights of edits with a target, (n_tokens, n_solved): one solve for each set of edits that act."""
    writers = program.writers[: program.n_solved].astype(np.float64)
    gram = writers @ writers.T + program.ridge * np.eye(len(writers))
    weights = np.zeros_like(wanted)
    for pattern in np.unique(joins, axis=0) if len(writers) else ():
        rows = (joins == pattern).all(axis=1)
        k = np.flatnonzero(pattern)
        weights[np.ix_(rows, k)] = np.linalg.solve(gram[np.ix_(k, k)], wanted[np.ix_(rows, k)].T).T
    return weights


def steer(x: np.ndarray, plan: Plan, layer: int, classes: Sequence[PositionClass]) -> np.ndarray:
    """The steered residual stream of one sequence after one layer. classes: one per row of x."""
    result = np.array(x, dtype=np.float32)
    classes = np.asarray(classes)
    for cls in PositionClass:
        rows = classes == cls
        if rows.any():
            result[rows] = apply_program(result[rows], plan.program(layer, cls))
    return result
