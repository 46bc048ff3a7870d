"""Which of many candidates fails least often, without asking each of them everything: best first.

What a candidate has failed so far bounds what it can end with. One that can no longer beat the best of those
that are finished is left where it is, so that the winner is the one that all pairs would have shown. The
better the best is, the less is asked. Where nothing is good, a few go on and the rest is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

FRONTS, STEP = 4, 2  # candidates of one call, and queries of each: fewer waste less, more fill a batch
# Where nothing is good, nothing can be left out: from this share of all pairs on, only a few go on.
MOST = 0.4


def best_first(
    n_candidates: int,
    n_queries: int,
    run: Callable[[Sequence[tuple[int, int]]], None],
    failures: Callable[[int], int],
    level: Callable[[int], int],
    most: float = MOST,
) -> list[int]:
    """The candidates that were tried on every query; the best as a rule is, with all that equal it.

    run: tries (candidate, query) pairs, each once. failures: of a candidate so far; as many as there are
    queries where it is out. level: of equals the lowest wins, the others need not be finished. Candidate 0
    (the model alone) is tried on everything at once: others have to beat it. most: share of all pairs after
    which only the few likeliest of the rest go on, so that the best may be missed; 1 for never.
    """
    seen = [0] * n_candidates
    rivals = list(range(1, n_candidates))
    narrowed = False

    def ask(chosen: Sequence[int], step: int) -> None:
        cells = [(i, j) for i in chosen for j in range(seen[i], min(seen[i] + step, n_queries))]
        run(cells)
        for i, _ in cells:
            seen[i] += 1

    ask([0], n_queries)
    while True:
        bounds = [(failures(i), level(i)) for i in range(n_candidates)]
        best = min(bound for bound, n in zip(bounds, seen, strict=True) if n == n_queries)
        rivals = [i for i in rivals if seen[i] < n_queries and bounds[i] <= best]
        if not rivals:
            return [i for i in range(n_candidates) if seen[i] == n_queries]
        if not narrowed and sum(seen) >= most * n_candidates * n_queries:
            narrowed = True
            rivals.sort(key=lambda i: ((bounds[i][0] + 1) / (seen[i] + 2), i))
            rivals = rivals[: few(n_candidates)]
        # of equals the one that is nearest to its end: once finished, it rules out others
        rivals.sort(key=lambda i: (bounds[i][0], -seen[i], i))
        ask(rivals[:FRONTS], STEP)


def few(n_candidates: int) -> int:
    return max(3, n_candidates // 8)


def most_runs(n_candidates: int, n_queries: int) -> int:
    """How many pairs `best_first` tries at most."""
    everything = n_candidates * n_queries
    return min(everything, math.ceil(MOST * everything) + FRONTS * STEP + few(n_candidates) * n_queries)
