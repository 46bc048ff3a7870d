"""The vectors of an instruction-tuned model on its base model, as in the paper.

The base model is asked `Q: ...` / `A:`, whatever template its file holds, and stopped at its next question.
Both kinds of vectors get settings of their own, chosen on the base model's validation replies. The controls
are those of the instruct model's vectors: `other` is its vector of another instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction
from localsteer.evaluate.cells import Experiment, applied
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Section, Share, SuiteReport, Table
from localsteer.evaluate.suites.carried import alike, carry_all
from localsteer.evaluate.suites.format import GROUPS
from localsteer.evaluate.texts import said, section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME = "cross-model"
TITLE = "Vectors of the instruct model on the base model"
CONDITIONS = ("none", "own", "instruct", "random", "other", "instructed")
BAR = 0.15  # how much more the instruct model's vectors should lift


def missing(bench: Bench, **_options: Any) -> str:
    if bench.base is None:
        return "suite cross-model needs the base model: give it with --base MODEL.gguf."
    bench.instructions(GROUPS)
    return ""


def run(bench: Bench, **_options: Any) -> SuiteReport:
    base = bench.base
    instructions = bench.instructions(GROUPS)
    carried = carry_all(base, bench.vectors.raw(instructions))
    picks = base.vectors.tune([(each, carried[each.id]) for each in instructions])
    theirs = {each.id: tuned.vector for each, tuned in zip(instructions, picks, strict=True)}
    own = base.vectors.tuned(instructions)
    # where nothing is applied there is nothing to control for
    others = {
        instruction.id: bench.controls.others(instruction) if applied(theirs[instruction.id]) else []
        for instruction in instructions
    }
    carried |= carry_all(base, bench.vectors.raw([other for drawn in others.values() for other in drawn]))
    compared = [
        _conditions(
            base, each, own[each.id], theirs[each.id], [carried[other.id] for other in others[each.id]]
        )
        for each in instructions
    ]
    rows = base.run(compared, what="base model: comparing vectors")
    idle = [sum(not applied(vector) for vector in vectors.values()) for vectors in (own, theirs)]
    sections = [_compared(rows, *idle), alike(instructions, base.vectors.raw(instructions), carried, rows)]
    return base.report(TITLE, rows, CONDITIONS, sections)


def _conditions(
    base: Bench,
    instruction: Instruction,
    own: ControlVector,
    theirs: ControlVector,
    others: Sequence[ControlVector],
) -> Experiment:
    steers = {"none": (), "own": applied(own), "instruct": applied(theirs), "instructed": ()}
    controls = base.controls.like([theirs], others) if applied(theirs) else {}
    return base.compare(instruction, steers | controls, CONDITIONS)


def _compared(rows: Outcomes, own_idle: int, instruct_idle: int) -> Section:
    """How much further the instruct model's vectors lift the base model than its own.

    own_idle, instruct_idle: for how many instructions no setting was any better than the plain model.
    """
    by_name = rows.by("instruction")
    table = [[name, *_lift(part)] for name, part in (by_name | {"all": rows}).items()]
    gain: Share = table[-1][-1]
    points = {key: 100 * (getattr(gain, key) or 0.0) for key in ("share", "low", "high")}
    enough = gain.share is not None and gain.share >= BAR
    more = [said("cross_model.enough" if enough else "cross_model.too_little", bar=100 * BAR)]
    if own_idle or instruct_idle:
        counts = {"n": len(by_name), "own": own_idle, "instruct": instruct_idle}
        more.append(said("cross_model.idle", **counts))
    columns = ["instruction", "none", "own", "instruct", "instruct - own"]
    return section("cross_model.compared", Table(columns, table), **points, more=" ".join(more))


def _lift(rows: Outcomes) -> list[Share]:
    return [*rows.shares(("none", "own", "instruct")), rows.of("instruct").minus(rows.of("own"))]
