"""The reference arithmetic: what native code and the PyTorch hook must compute. numpy only, float64 inside.

At one block, with x the residual stream of one token, u_i the unit directions and G = U U^T:

    p_i = u_i . x                               the projection now
    t_i = p_i + s_i (target_i - p_i)            where it should be
    a one-sided edit joins only where t_i > p_i
    c   = (G + ridge I)^-1 (t - p)              over the edits that joined: the least-norm change
    c_i <- clip(c_i, -cap_i, cap_i)             the dynamic weights
    x   <- x + sum_i c_i u_i + offset

Source: Stolfo et al., arXiv 2410.12877, section 3 (one vector, s = 1); docs/method.md has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plan import Plan, PositionClass, Program


def apply_program(x: np.ndarray, program: Program | None) -> np.ndarray:
    """x (n_tokens, n_embd) -> a new float32 array; a token that gets nothing keeps its bits."""
    result = np.array(x, dtype=np.float32)
    if program is None:
        return result
    weights = dynamic_weights(x, program)
    delta = weights @ program.units.astype(np.float64)
    if program.offset is not None:
        delta += program.offset
        touched = np.ones(len(result), dtype=bool)
    else:
        touched = (weights != 0).any(axis=1)  # NaN != 0: a broken row stays visibly broken
    result[touched] = result[touched].astype(np.float64) + delta[touched]
    return result


def dynamic_weights(x: np.ndarray, program: Program) -> np.ndarray:
    """c: (n_tokens, k) float64, residual-stream units, capped; 0 where a one-sided edit stays out."""
    units = program.units.astype(np.float64)
    p = np.asarray(x, dtype=np.float64) @ units.T
    wanted = program.strengths * (program.targets - p)  # t - p
    joins = ~program.one_sided | ~(wanted <= 0)  # NaN joins: a broken row stays visibly broken
    gram = units @ units.T + program.ridge * np.eye(len(units))
    weights = np.zeros_like(p)
    for pattern in np.unique(joins, axis=0) if len(units) else ():
        rows = (joins == pattern).all(axis=1)
        k = np.flatnonzero(pattern)
        weights[np.ix_(rows, k)] = np.linalg.solve(gram[np.ix_(k, k)], wanted[np.ix_(rows, k)].T).T
    return np.clip(weights, -program.caps, program.caps)


def steer(x: np.ndarray, plan: Plan, layer: int, classes: Sequence[PositionClass]) -> np.ndarray:
    """The residual stream of one sequence after one block, steered. classes: one per row of x."""
    result = np.array(x, dtype=np.float32)
    classes = np.asarray(classes)
    for cls in PositionClass:
        rows = classes == cls
        if rows.any():
            result[rows] = apply_program(result[rows], plan.program(layer, cls))
    return result
