"""Layer and positions of a direction of length, chosen by the words of replies: no verifier says how long a
concise reply may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction
from localsteer.errors import PlanError
from localsteer.evaluate.cells import Arm
from localsteer.evaluate.outcomes import Outcome
from localsteer.extract.levels import DIRECTIONS
from localsteer.extract.recipes import Extracted
from localsteer.tune.setting import grid_layers
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

SIGNS = {"conciseness": -1, "verbosity": 1}
TRIED = (0.5, 0.75, 1.0)  # strengths that layer and positions are chosen with
POSITIONS = ("prompt", "all")
N_TRIED = 4  # validation queries for each setting
MAX_DEGENERATE = 0.05


def with_setting(bench: Bench, recipe: Extracted, vector: ControlVector) -> ControlVector:
    """The given file as it is, or the layer and positions that move the length of replies furthest."""
    if recipe.target.id in bench.given:
        return vector
    return bench.vectors.use(recipe.target, choose(bench, recipe.target, vector))


def choose(bench: Bench, target: Instruction, vector: ControlVector) -> ControlVector:
    """On validation queries: the layer and positions where replies that are still good get shorter (longer)
    by the largest factor, on average over TRIED strengths. Among equals the lowest layer.

    A setting with more than 5% degenerate replies is out; a degenerate reply, or one that has lost its
    subject, counts as no change. Raises PlanError when every setting is out.
    """
    queries = bench.validation[:N_TRIED]
    plain = bench.run(
        [bench.experiment(target, [Arm("none")], queries)], what="choosing a layer", score=False
    )
    settings = [
        vector.at(layer=layer, positions=positions, mode="add")
        for layer in grid_layers(vector.n_layer)
        for positions in POSITIONS
        if layer in vector.usable_layers
    ]
    arms = [Arm("tried", (setting.at(strength=strength),)) for setting in settings for strength in TRIED]
    rows = bench.run([bench.experiment(target, arms, queries)], what="choosing a layer", score=False)
    size = len(TRIED) * len(queries)
    scores = [
        change(rows[k * size : (k + 1) * size], list(plain) * len(TRIED), SIGNS[target.id])
        for k in range(len(settings))
    ]
    best = max(range(len(scores)), key=lambda k: (scores[k], -k), default=None)
    if best is None or scores[best] == -math.inf:
        raise PlanError(f"no layer can be steered by {target.id}: every setting gives degenerate replies.")
    return settings[best].at(strength=1.0)


def change(steered: Sequence[Outcome], plain: Sequence[Outcome], sign: int) -> float:
    """Mean log ratio of words the wanted way; minus infinity where too many replies are degenerate."""
    if sum(row.degenerate is not None for row in steered) > MAX_DEGENERATE * len(steered):
        return -math.inf
    ratios = [
        sign * math.log((ours.n_words + 1) / (theirs.n_words + 1))
        if ours.degenerate is None and ours.subject_kept is not False
        else 0.0
        for ours, theirs in zip(steered, plain, strict=True)
    ]
    return sum(ratios) / len(ratios)


def like(vector: ControlVector, other: ControlVector) -> ControlVector:
    return vector.at(layer=other.layers, positions=other.positions, mode="add", strength=1.0)


def direction_of(level: str) -> str:
    """The direction whose settings a level is steered with; moderate takes verbosity's."""
    return "conciseness" if level in DIRECTIONS["conciseness"] else "verbosity"
