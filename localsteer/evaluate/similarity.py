"""Does an instruction move the state the same way whatever the query? The paper's check (section 3) that a
difference in means may stand for it, with a probe's accuracy beside it.

For each pair of prompts, d = h(with) - h(without) at the last prompt token. Within an instruction the cosine
between the d of different pairs should be high, between instructions low. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from localsteer.catalog import Instruction
from localsteer.errors import CatalogError
from localsteer.evaluate.probe import GAUSSIAN, LINEAR, N_FOLDS, accuracy
from localsteer.extract import Pair
from localsteer.extract.states import States
from localsteer.extract.statistics import unit_rows

MIN_PAIRS = 4  # fewer leave a fold of the probe without one


class LayerSimilarity(TypedDict):
    """Means over the instructions: cosines, and probe accuracies."""

    layer: int
    within: float
    between: float | None
    linear: float
    gaussian: float


@dataclass(frozen=True)
class Similarity:
    """matrix: (n_layer, k, k) mean cosines between pair differences of two instructions; on the diagonal
    between different pairs of one. linear, gaussian: (k, n_layer) probe accuracies, with against without."""

    instructions: tuple[str, ...]
    n_pairs: int
    matrix: np.ndarray
    linear: np.ndarray
    gaussian: np.ndarray

    @property
    def n_layer(self) -> int:
        return len(self.matrix)

    @property
    def within(self) -> np.ndarray:
        """(k, n_layer)."""
        return np.diagonal(self.matrix, axis1=1, axis2=2).T

    @property
    def between(self) -> np.ndarray:
        """(k, n_layer): mean over the other instructions; NaN where there is no other."""
        k = len(self.instructions)
        if k < 2:
            return np.full((k, self.n_layer), np.nan)
        return (self.matrix.sum(axis=2).T - self.within) / (k - 1)

    @property
    def clearest(self) -> int:
        """The layer where `within` is furthest above `between`, on average."""
        apart = self.within - np.nan_to_num(self.between)
        return int(apart.mean(axis=0).argmax())

    def rows(self) -> list[LayerSimilarity]:
        """One for each layer: means over the instructions."""
        return [
            {
                "layer": il,
                "within": float(self.within[:, il].mean()),
                "between": None if len(self.instructions) < 2 else float(self.between[:, il].mean()),
                "linear": float(self.linear[:, il].mean()),
                "gaussian": float(self.gaussian[:, il].mean()),
            }
            for il in range(self.n_layer)
        ]


def similarity(
    states: States, instructions: Sequence[Instruction], pairs: Sequence[Sequence[Pair]]
) -> Similarity:
    """Cosines and probes of instructions, each with its own pairs.

    Raises CatalogError with fewer than MIN_PAIRS pairs, one query alone, or without an instruction.
    """
    if not instructions:
        raise CatalogError("no instruction is named")
    fewest = min(len(each) for each in pairs)
    if fewest < MIN_PAIRS:
        raise CatalogError(f"{fewest} pairs are too few to compare: use at least {MIN_PAIRS}")
    units, linear, gaussian = [], [], []
    for pair in pairs:
        instructed, plain = states.of_pairs(pair)
        units.append(unit_rows(instructed.astype(np.float64) - plain))
        groups = probe_groups(pair)
        linear.append(probe_pairs(instructed, plain, groups, LINEAR))
        gaussian.append(probe_pairs(instructed, plain, groups, GAUSSIAN))
    ids = tuple(instruction.id for instruction in instructions)
    return Similarity(ids, fewest, cosines(units), np.array(linear), np.array(gaussian))


def cosines(units: Sequence[np.ndarray]) -> np.ndarray:
    """(n_layer, k, k) from k arrays (n_pairs, n_layer, n_embd) of unit rows: a mean cosine is the product of
    mean unit vectors; on the diagonal a pair is not compared with itself."""
    means = np.stack([unit.mean(axis=0) for unit in units])
    matrix = np.einsum("ale,ble->lab", means, means)
    for k, each in enumerate(units):
        n = len(each)
        own = np.einsum("nle,nle->l", each, each)  # 1 for each pair that differs at all
        matrix[:, k, k] = (n * n * matrix[:, k, k] - own) / (n * (n - 1))
    return matrix


def probe_pairs(instructed: np.ndarray, plain: np.ndarray, groups: Sequence[str], probe: str) -> list[float]:
    """Accuracy at each layer, of telling states with the instruction from those without."""
    labels = np.repeat([True, False], len(instructed))
    both = np.concatenate([instructed, plain])
    return [accuracy(both[:, il], labels, [*groups, *groups], probe) for il in range(both.shape[1])]


def probe_groups(pairs: Sequence[Pair]) -> list[str]:
    """What must not be split between training and test: the wording where each query comes once and there
    are wordings enough (then the query is unseen, too), else the query.

    Raises CatalogError for pairs of one query alone: nothing would be left to train on.
    """
    wordings = [pair.instructed[len(pair.plain) :].strip() for pair in pairs]
    queries = [pair.plain for pair in pairs]
    if len(set(queries)) < 2:
        raise CatalogError(f"a probe needs two base queries or more, and {queries[0]!r} is the only one")
    once = len(set(queries)) == len(queries)
    return wordings if once and len(set(wordings)) >= N_FOLDS else queries
