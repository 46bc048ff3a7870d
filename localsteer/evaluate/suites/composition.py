"""Two instructions at once: at one layer, where their projections are solved jointly, or at two.

The paper's section 6. A format with a length, and a case with a word to avoid; each vector as it was picked
alone, then the pair's layers chosen on validation queries by how often both hold. Beside it what happens when
the two projections at one layer are done one after the other, as code without a joint solve does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.evaluate.cells import Experiment, arms_of
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Bars, Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.composed import (
    CASE,
    PAIRS,
    Composed,
    case_words,
    choose,
    named_pairs,
    pairs_of,
)
from localsteer.evaluate.suites.in_turn import in_turn, own_checkpoint
from localsteer.evaluate.texts import section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "composition", "Two instructions at once"
SAME, DIFFERENT = "same layer", "different layers"
CONDITIONS = ("none", "first alone", "second alone", SAME, DIFFERENT, "random", "other", "instructed")


def missing(bench: Bench, **_options: Any) -> str:
    if named_pairs(bench) or case_words(bench) != []:
        return ""
    pairs = ", ".join(" + ".join(pair) for pair in PAIRS)
    return f"there is nothing to combine: suite composition knows {pairs}, and {CASE} + a word to exclude."


def run(bench: Bench, *, checkpoint: Path | None = None, **_options: Any) -> SuiteReport:
    """checkpoint: the transformers folder that the model was converted from, for replies with one edit after
    the other; known of the bundled model."""
    pairs = choose(bench, pairs_of(bench))
    rows = bench.run([conditions_of(bench, pair) for pair in pairs], what="two instructions at once")
    sections = [together(bench, pairs, rows), *in_turn(bench, pairs, checkpoint or own_checkpoint(bench))]
    return bench.report(TITLE, rows, CONDITIONS, sections)


def conditions_of(bench: Bench, pair: Composed) -> Experiment:
    steers = {"none": (), **_vectors(pair), "instructed": ()}
    steers |= bench.controls.of(pair.instructions, pair.same or pair.different)
    kept = {name: steer for name, steer in steers.items() if steer or name in ("none", "instructed")}
    return pair.experiment(bench, arms_of(kept, CONDITIONS), pair.queries(bench, "test"))


def _vectors(pair: Composed) -> dict[str, tuple[ControlVector, ...]]:
    """By condition."""
    a, b = pair.alone
    return {"first alone": (a,), "second alone": (b,), SAME: pair.same, DIFFERENT: pair.different}


def together(bench: Bench, pairs: Sequence[Composed], rows: Outcomes) -> Section:
    table = [
        [pair.label, name, _where(pair, name), *_shares(bench, pair, part)]
        for pair in pairs
        for name in CONDITIONS
        if (part := rows.of(name, pair.label))
    ]
    named = {pair.label: bench.controls.others(*pair.instructions, n=2) for pair in pairs}
    others: list[list[Value]] = [
        [label, " and ".join(other.id for other in drawn)] for label, drawn in named.items()
    ]
    shown = ("none", SAME, DIFFERENT, "random", "other")
    series = {name: [rows.of(name, label).followed for label in named] for name in shown}
    return section(
        "composition.together",
        Table(["pair", "condition", "layers, positions", "first", "second", "both"], table),
        Table(["pair", "whose vectors `other` has"], others),
        Bars("Both instructions hold", "pair", "share of replies", x=list(named), series=series),
    )


def _where(pair: Composed, condition: str) -> str:
    as_both = pair.same or pair.different
    vectors = ({"random": as_both, "other": as_both} | _vectors(pair)).get(condition, ())
    layers = " and ".join(str(vector.layers[0]) for vector in vectors)
    return f"{layers}, {vectors[0].positions}" if vectors else ""


def _shares(bench: Bench, pair: Composed, rows: Outcomes) -> list[Share]:
    """First, second, both."""
    parts = [rows.judged_by(each, must_end=bench.limits.must_end) for each in pair.instructions]
    return [part.share for part in (*parts, rows)]
