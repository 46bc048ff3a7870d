"""How long replies are: conciseness and verbosity added with growing weight, and the five levels.

The paper's section 4: x <- x + c u at one layer, a sweep of c, mean words of the replies. Layer and positions
are chosen on validation queries; no verifier says how long a concise reply may be, so words are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Arm, Experiment
from localsteer.evaluate.intervals import interval
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Bars, Heatmap, Lines, Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.length_setting import SIGNS, direction_of, like, with_setting
from localsteer.extract.levels import DIRECTIONS, LENGTHS, LEVELS, length
from localsteer.extract.recipes import Extracted
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME = "length"
TITLE = "Length: conciseness and verbosity"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # of `add`: 1 is the whole difference that the instruction makes
STEERED, CONTROLS = "strength", ("random", "other")  # of a condition's name, before the strength
MIN_MONOTONE = 3  # strengths in a row that make a trend


@dataclass(frozen=True)
class Sweep:
    """One direction at its chosen layer and positions, and the rows at each strength, 0 first. controls:
    the same for `random` and `other`, where there is one."""

    name: str
    vector: ControlVector
    steered: Mapping[float, Outcomes]
    controls: Mapping[str, Mapping[float, Outcomes]]

    @property
    def words(self) -> list[float]:
        return [rows.words for rows in self.steered.values()]

    @property
    def n_monotone(self) -> int:
        """How many strengths, from the lowest on, take mean words strictly further the direction's way."""
        steps = (SIGNS[self.name] * (b - a) > 0 for a, b in pairwise(self.words[1:]))
        return 1 + len(list(takewhile(bool, steps)))

    @property
    def worst_degenerate(self) -> float:
        return max(rows.degenerate for rows in self.steered.values())


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
    chosen = {name: with_setting(bench, recipes[name], vectors[name]) for name in directions}
    asked = [sweep_experiment(bench, recipes[name], chosen[name]) for name in directions]
    asked += [
        level_experiment(bench, recipes[level], like(vectors[level], chosen[direction_of(level)]))
        for level in levels
    ]
    rows = bench.run(asked, what="sweeping lengths")
    others = {name: [other.id for other in bench.others(recipes[name].target)] for name in directions}
    sections = [swept([sweep_of(name, chosen[name], rows) for name in directions], others)]
    if levels:
        sections.append(compared(rows, levels))
        sections.append(cosines({level: vectors[level] for level in levels}, chosen[directions[0]].layers[0]))
    conditions = list(dict.fromkeys(["none", "steered", "instructed", *rows.by("condition")]))
    return bench.report(TITLE, rows, conditions, sections)


# --- experiments ------------------------------------------------------------------------------------------


def sweep_experiment(bench: Bench, recipe: Extracted, vector: ControlVector) -> Experiment:
    """The model alone, each strength of the vector and of its controls, and told in words."""
    steers = {STEERED: (vector,), **bench.controls([recipe.target], [vector])}
    arms = [Arm("none")]
    for strength in STRENGTHS:
        arms += [
            Arm(label(kind, strength), (each.at(strength=strength),)) for kind, (each,) in steers.items()
        ]
    return bench.experiment(recipe.target, [*arms, Arm("instructed", told=True)], bench.test)


def level_experiment(bench: Bench, recipe: Extracted, vector: ControlVector) -> Experiment:
    """One level: none, steered by its own vector, told in words."""
    arms = [Arm("none"), Arm("steered", (vector,)), Arm("instructed", told=True)]
    wordings = recipe.target.phrasings[:1]
    return bench.experiment(recipe.target, arms, bench.test, wordings=wordings, by_query=True)


def label(kind: str, strength: float) -> str:
    return f"{kind} {strength:g}"


# --- sections ----------------------------------------------------------------------------------------------


def sweep_of(name: str, vector: ControlVector, rows: Outcomes) -> Sweep:
    by_condition = rows.of(None, name).by("condition")
    steered, *controls = (
        {0.0: by_condition["none"]} | {each: by_condition[label(kind, each)] for each in STRENGTHS}
        for kind in (STEERED, *CONTROLS)
        if label(kind, STRENGTHS[0]) in by_condition
    )
    return Sweep(name, vector, steered, dict(zip(CONTROLS, controls, strict=False)))


def swept(sweeps: Sequence[Sweep], others: Mapping[str, Sequence[str]]) -> Section:
    """others: whose vector the control `other` is, by direction."""
    table = [_sweep_row(sweep, strength) for sweep in sweeps for strength in sweep.steered]
    named = [f"For {name} that is {' and '.join(ids)}." for name, ids in others.items() if ids]
    series = {sweep.name: sweep.words for sweep in sweeps}
    series |= {
        f"{kind} for {sweep.name}": [rows.words for rows in control.values()]
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
    return Section("Mean words against the weight", text, [Table(_COLUMNS, table)], [plot])


_COLUMNS = [
    "direction", "strength", "c", "words", "95% of words", "degenerate", "subject kept", "perplexity ratio",
    "words, random", "words, other",
]  # fmt: skip
_EXPLAINED = (
    "`c` is the paper's weight, strength times |v|. The subject is kept when the reply names what was asked "
    "about. `words, random` is a random direction of the same length, `words, other` another instruction's "
    "vector, both at the same layer, positions and strength."
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
        f"{STRENGTHS[-1]:g} (layer {sweep.vector.layers[0]}, positions {sweep.vector.positions}); at most "
        f"{sweep.worst_degenerate:.0%} of replies degenerate."
    )


def _sweep_row(sweep: Sweep, strength: float) -> list[Value]:
    rows = sweep.steered[strength]
    quality = rows.figures(sweep.steered[0.0]).quality
    norm = float(np.linalg.norm(sweep.vector.directions[sweep.vector.layers[0]].astype(np.float64)))
    low, high = interval([[row.n_words for row in rows]])
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
        *(control[strength].words if control else None for control in controls),
    ]


def compared(rows: Outcomes, levels: Sequence[str]) -> Section:
    """Each level told in words and steered by its own vector."""
    columns = {"none": "model alone", "instructed": "told in words", "steered": "steered"}
    words = {
        title: [rows.of(condition, level).words for level in levels] for condition, title in columns.items()
    }
    table = [list(line) for line in zip(levels, *words.values(), strict=True)]
    return Section(
        "Levels of length",
        "Mean words when each level is said in the prompt, and when its own vector is added with "
        "strength 1 at the layer and positions of its direction.",
        [Table(["level", *words], table)],
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
        title=f"Cosine of the levels' directions at layer {layer}",
        rows=list(vectors),
        columns=list(vectors),
        values=(units @ units.T).tolist(),
    )
    text = "How far the levels share one direction: 1 is the same, 0 unrelated, -1 opposite."
    return Section("The levels' directions", text, [], [plot])
