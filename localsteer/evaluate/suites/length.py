"""How long replies are: conciseness and verbosity added with growing weight, and the five levels.

The paper's section 4: x <- x + c u at one layer, a sweep of c, mean words of the replies. Layer and positions
are chosen on validation queries; no verifier says how long a concise reply may be, so words are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Arm, Experiment
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Bars, Heatmap, Section, SuiteReport, Table
from localsteer.evaluate.suites.length_setting import direction_of, like, with_setting
from localsteer.evaluate.suites.length_sweep import STEERED, STRENGTHS, label, sweep_of, swept
from localsteer.evaluate.texts import section
from localsteer.extract.levels import DIRECTIONS, LENGTHS, LEVELS, length
from localsteer.extract.recipes import Extracted
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "length", "Length: conciseness and verbosity"


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
    vectors = bench.vectors.extract(list(recipes.values()))
    chosen = {name: with_setting(bench, recipes[name], vectors[name]) for name in directions}
    asked = [sweep_experiment(bench, recipes[name], chosen[name]) for name in directions]
    asked += [
        level_experiment(bench, recipes[level], like(vectors[level], chosen[direction_of(level)]))
        for level in levels
    ]
    rows = bench.run(asked, what="sweeping lengths")
    others = {name: bench.controls.others(recipes[name].target) for name in directions}
    sections = [swept([sweep_of(name, chosen[name], rows) for name in directions], others)]
    if levels:
        sections.append(compared(rows, levels))
        sections.append(cosines({level: vectors[level] for level in levels}, chosen[directions[0]].layers[0]))
    conditions = list(dict.fromkeys(["none", "steered", "instructed", *rows.by("condition")]))
    return bench.report(TITLE, rows, conditions, sections)


def sweep_experiment(bench: Bench, recipe: Extracted, vector: ControlVector) -> Experiment:
    """The plain model, each strength of the vector and of its controls, and told in words."""
    steers = {STEERED: (vector,), **bench.controls.of([recipe.target], [vector])}
    swept = [
        Arm(label(kind, strength), (one.at(strength=strength),))
        for strength in STRENGTHS
        for kind, (one,) in steers.items()
    ]
    arms = [Arm("none"), *swept, Arm("instructed", told=True)]
    return bench.experiment(recipe.target, arms, bench.test)


def level_experiment(bench: Bench, recipe: Extracted, vector: ControlVector) -> Experiment:
    """One level: none, steered by its own vector, told in words."""
    steers = {"none": (), "steered": (vector,), "instructed": ()}
    wordings = recipe.target.phrasings[:1]
    return bench.compare(recipe.target, steers, queries=bench.test, wordings=wordings, by_query=True)


def compared(rows: Outcomes, levels: Sequence[str]) -> Section:
    """Each level told in words and steered by its own vector."""
    columns = {"none": "plain model", "instructed": "told in words", "steered": "steered"}
    words = {title: [rows.of(name, level).words for level in levels] for name, title in columns.items()}
    table = [list(line) for line in zip(levels, *words.values(), strict=True)]
    plot = Bars("Mean words of each level", "level", "words", x=list(levels), series=words)
    return section("length.levels", Table(["level", *words], table), plot)


def cosines(vectors: Mapping[str, ControlVector], layer: int) -> Section:
    units = np.stack([vector.unit(layer).astype(np.float64) for vector in vectors.values()])
    title, names = f"Cosine of the levels' directions at layer {layer}", list(vectors)
    plot = Heatmap(title, rows=names, columns=names, values=(units @ units.T).tolist())
    return section("length.cosines", plot)
