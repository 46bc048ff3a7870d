"""How long replies are: conciseness and verbosity added with growing weight, and the five levels.

The paper's section 4: x <- x + c u at one block, a sweep of c, mean words of the replies. Block and positions
are chosen on validation queries; no verifier says how long a concise reply may be, so words are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction
from localsteer.errors import CatalogError, PlanError
from localsteer.evaluate.intervals import interval
from localsteer.evaluate.page import Bars, Heatmap, Lines, Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.cells import Arm, Cell, Result, figures, grouped, mean_words, select
from localsteer.extract.levels import DIRECTIONS, LENGTHS, LEVELS, length
from localsteer.extract.recipes import Extracted
from localsteer.tune.setting import grid_blocks
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.suites.bench import Bench

NAME = "length"
TITLE = "Length: conciseness and verbosity"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # of `add`: 1 is the whole difference that the instruction makes
TRIED = (0.5, 0.75, 1.0)  # strengths that block and positions are chosen with
POSITIONS = ("prompt", "all")
N_TRIED = 4  # validation queries for each setting
MAX_DEGENERATE = 0.05
STEERED, CONTROLS = "strength", ("random", "other")  # of a condition's name, before the strength
SIGNS = {"conciseness": -1, "verbosity": 1}
MIN_MONOTONE = 3  # strengths in a row that make a trend


@dataclass(frozen=True)
class Sweep:
    """One direction at its chosen block and positions, and the results at each strength, 0 first. controls:
    the same for `random` and `other`, where there is one."""

    name: str
    vector: ControlVector
    steered: Mapping[float, Sequence[Result]]
    controls: Mapping[str, Mapping[float, Sequence[Result]]]

    @property
    def words(self) -> list[float]:
        return [mean_words(results) for results in self.steered.values()]

    @property
    def n_monotone(self) -> int:
        """How many strengths, from the lowest on, take mean words strictly further the direction's way."""
        steps = (SIGNS[self.name] * (b - a) > 0 for a, b in pairwise(self.words[1:]))
        return 1 + len(list(takewhile(bool, steps)))

    @property
    def worst_degenerate(self) -> float:
        return max(figures(results).measure("degenerate") for results in self.steered.values())


def missing(bench: Bench, **_options: Any) -> str:
    directions, levels = lengths(bench)
    if not directions:
        return f"none of {', '.join(bench.asked)} is a length: suite length knows {', '.join(LENGTHS)}."
    try:
        for name in (*directions, *levels):
            length(bench.catalog, name)
    except CatalogError as error:
        return str(error)
    return ""


def lengths(bench: Bench) -> tuple[list[str], list[str]]:
    """(directions, levels): all, or those asked for. A level takes the settings of its direction, which is
    swept for that too."""
    asked = LENGTHS if bench.asked is None else bench.asked
    levels = [level for level in LEVELS if level in asked]
    needed = {direction_of(level) for level in levels}
    return [name for name in DIRECTIONS if name in asked or name in needed], levels


def run(bench: Bench, **_options: Any) -> SuiteReport:
    directions, levels = lengths(bench)
    recipes = {name: length(bench.catalog, name) for name in (*directions, *levels)}
    vectors = bench.extract(list(recipes.values()))
    chosen = {name: _chosen(bench, recipes[name], vectors[name]) for name in directions}
    cells = [cell for name in directions for cell in sweep_cells(bench, recipes[name], chosen[name])]
    cells += [
        cell
        for level in levels
        for cell in level_cells(bench, recipes[level], like(vectors[level], chosen[direction_of(level)]))
    ]
    results = bench.run(cells, what="sweeping lengths")
    others = {name: [other.id for other in bench.others(recipes[name].target)] for name in directions}
    sections = [swept([sweep_of(name, chosen[name], results) for name in directions], others)]
    if levels:
        sections.append(compared(results, levels))
        sections.append(cosines({level: vectors[level] for level in levels}, chosen[directions[0]].layers[0]))
    conditions = list(dict.fromkeys(["none", "steered", "instructed", *(cell.condition for cell in cells)]))
    return bench.report(TITLE, results, conditions, sections)


# --- settings ----------------------------------------------------------------------------------------------


def _chosen(bench: Bench, recipe: Extracted, vector: ControlVector) -> ControlVector:
    """The given file as it is, or the block and positions that move the length of replies furthest."""
    if recipe.target.id in bench.given:
        return vector
    return bench.use(recipe.target, choose(bench, recipe.target, vector))


def choose(bench: Bench, target: Instruction, vector: ControlVector) -> ControlVector:
    """On validation queries: the block and positions where replies that are still good get shorter (longer)
    by the largest factor, on average over TRIED strengths. Among equals the lowest block.

    A setting with more than 5% degenerate replies is out; a degenerate reply, or one that has lost its
    subject, counts as no change. Raises PlanError when every setting is out.
    """
    queries = bench.validation[:N_TRIED]
    plain = bench.run(bench.cells(target, [Arm("none")], queries), what="choosing a block", score=False)
    settings = [
        vector.at(layer=layer, positions=positions, mode="add")
        for layer in grid_blocks(vector.n_layer)
        for positions in POSITIONS
        if layer in vector.usable_layers
    ]
    arms = [Arm("tried", (setting.at(strength=strength),)) for setting in settings for strength in TRIED]
    results = bench.run(bench.cells(target, arms, queries), what="choosing a block", score=False)
    size = len(TRIED) * len(queries)
    scores = [
        change(results[k * size : (k + 1) * size], list(plain) * len(TRIED), SIGNS[target.id])
        for k in range(len(settings))
    ]
    best = max(range(len(scores)), key=lambda k: (scores[k], -k), default=None)
    if best is None or scores[best] == -math.inf:
        raise PlanError(f"no block can be steered by {target.id}: every setting gives degenerate replies.")
    return settings[best].at(strength=1.0)


def change(steered: Sequence[Result], plain: Sequence[Result], sign: int) -> float:
    """Mean log ratio of words the wanted way; minus infinity where too many replies are degenerate."""
    if sum(result.verdict.degenerate is not None for result in steered) > MAX_DEGENERATE * len(steered):
        return -math.inf
    ratios = [
        sign * math.log((ours.verdict.n_words + 1) / (theirs.verdict.n_words + 1))
        if ours.verdict.degenerate is None and ours.verdict.subject_kept is not False
        else 0.0
        for ours, theirs in zip(steered, plain, strict=True)
    ]
    return sum(ratios) / len(ratios)


def like(vector: ControlVector, other: ControlVector) -> ControlVector:
    return vector.at(layer=other.layers, positions=other.positions, mode="add", strength=1.0)


def direction_of(level: str) -> str:
    """The direction whose settings a level is steered with; moderate takes verbosity's."""
    return "conciseness" if level in DIRECTIONS["conciseness"] else "verbosity"


# --- cells -------------------------------------------------------------------------------------------------


def sweep_cells(bench: Bench, recipe: Extracted, vector: ControlVector) -> list[Cell]:
    """The model alone, each strength of the vector and of its controls, and told in words."""
    steers = {STEERED: (vector,), **bench.controls([recipe.target], [vector])}
    arms = [Arm("none")]
    for strength in STRENGTHS:
        arms += [
            Arm(label(kind, strength), (each.at(strength=strength),)) for kind, (each,) in steers.items()
        ]
    return bench.cells(recipe.target, [*arms, Arm("instructed", told=True)], bench.test)


def level_cells(bench: Bench, recipe: Extracted, vector: ControlVector) -> list[Cell]:
    """One level: none, steered by its own vector, told in words; query by query."""
    arms = [Arm("none"), Arm("steered", (vector,)), Arm("instructed", told=True)]
    wordings = recipe.target.phrasings[:1]
    by_arm = [bench.cells(recipe.target, [arm], bench.test, wordings=wordings) for arm in arms]
    return [cell for cells in zip(*by_arm, strict=True) for cell in cells]


def label(kind: str, strength: float) -> str:
    return f"{kind} {strength:g}"


# --- sections ----------------------------------------------------------------------------------------------


def sweep_of(name: str, vector: ControlVector, results: Sequence[Result]) -> Sweep:
    by_condition = {
        key: chosen for (key,), chosen in grouped(select(results, None, name), "condition").items()
    }
    steered, *controls = (
        {0.0: by_condition["none"]} | {each: by_condition[label(kind, each)] for each in STRENGTHS}
        for kind in (STEERED, *CONTROLS)
        if label(kind, STRENGTHS[0]) in by_condition
    )
    return Sweep(name, vector, steered, dict(zip(CONTROLS, controls, strict=False)))


def swept(sweeps: Sequence[Sweep], others: Mapping[str, Sequence[str]]) -> Section:
    """others: whose vector the control `other` is, by direction."""
    rows = [_sweep_row(sweep, strength) for sweep in sweeps for strength in sweep.steered]
    named = [f"For {name} that is {' and '.join(ids)}." for name, ids in others.items() if ids]
    series = {sweep.name: sweep.words for sweep in sweeps}
    series |= {
        f"{kind} for {sweep.name}": list(map(mean_words, control.values()))
        for sweep in sweeps
        for kind, control in sweep.controls.items()
    }
    plot = Lines(
        title="Mean words against strength",
        x_label="strength (c / |v|)",
        y_label="words",
        x=[0.0, *STRENGTHS],
        series=series,
    )
    text = " ".join([*map(verdict, sweeps), _EXPLAINED, *named])
    return Section("Mean words against the weight", text, [Table(_COLUMNS, rows)], [plot])


_COLUMNS = [
    "direction", "strength", "c", "words", "95% of words", "degenerate", "subject kept", "perplexity ratio",
    "words, random", "words, other",
]  # fmt: skip
_EXPLAINED = (
    "`c` is the paper's weight, strength times |v|. The subject is kept when the reply names what was asked "
    "about. `words, random` is a random direction of the same length, `words, other` another instruction's "
    "vector, both at the same block, positions and strength."
)


def verdict(sweep: Sweep) -> str:
    """The answer in a sentence. Steps are those between strengths: the weakest may do nothing yet."""
    way = "fall" if SIGNS[sweep.name] < 0 else "rise"
    steered, n = sweep.words[1:], sweep.n_monotone
    if n >= MIN_MONOTONE:
        ends = (f"{STRENGTHS[k]:g} ({steered[k]:.1f})" for k in (0, n - 1))
        how = f"mean words {way} monotonically with the weight from strength {' to '.join(ends)}"
    else:
        how = f"mean words do NOT {way} monotonically with the weight"
    return (
        f"{sweep.name.capitalize()}: {how}; {sweep.words[0]:.1f} unsteered, {steered[-1]:.1f} at strength "
        f"{STRENGTHS[-1]:g} (block {sweep.vector.layers[0]}, positions {sweep.vector.positions}); at most "
        f"{sweep.worst_degenerate:.0%} of replies degenerate."
    )


def _sweep_row(sweep: Sweep, strength: float) -> list[Value]:
    results = sweep.steered[strength]
    quality = figures(results, sweep.steered[0.0]).quality
    norm = float(np.linalg.norm(sweep.vector.directions[sweep.vector.layers[0]].astype(np.float64)))
    low, high = interval([[result.verdict.n_words for result in results]])
    controls = map(sweep.controls.get, CONTROLS)
    return [
        sweep.name,
        strength,
        strength * norm,
        quality["words"],
        f"{low:.1f} to {high:.1f}",
        Share(quality["degenerate"]),
        Share(quality["subject_kept"]),
        quality["perplexity_ratio"],
        *(mean_words(control[strength]) if control else None for control in controls),
    ]


def compared(results: Sequence[Result], levels: Sequence[str]) -> Section:
    """Each level told in words and steered by its own vector."""
    columns = {"none": "model alone", "instructed": "told in words", "steered": "steered"}
    words = {
        title: [mean_words(select(results, condition, level)) for level in levels]
        for condition, title in columns.items()
    }
    rows = [list(row) for row in zip(levels, *words.values(), strict=True)]
    return Section(
        "Levels of length",
        "Mean words when each level is said in the prompt, and when its own vector is added with "
        "strength 1 at the block and positions of its direction.",
        [Table(["level", *words], rows)],
        [
            Bars(
                title="Mean words of each level",
                x_label="level",
                y_label="words",
                x=list(levels),
                series=words,
            )
        ],
    )


def cosines(vectors: Mapping[str, ControlVector], layer: int) -> Section:
    units = np.stack([vector.unit(layer).astype(np.float64) for vector in vectors.values()])
    plot = Heatmap(
        title=f"Cosine of the levels' directions at block {layer}",
        rows=list(vectors),
        columns=list(vectors),
        values=(units @ units.T).tolist(),
    )
    text = "How far the levels share one direction: 1 is the same, 0 unrelated, -1 opposite."
    return Section("The levels' directions", text, [], [plot])
