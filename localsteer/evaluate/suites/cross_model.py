"""The vectors of an instruction-tuned model on its base model, as in the paper.

The base model is asked `Q: ...` / `A:`, whatever template its file holds, and stopped at its next question.
Both kinds of vectors get settings of their own, chosen on the base model's validation replies. The controls
are those of the instruct model's vectors: `other` is its vector of another instruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.conditions import arms_of, controls_of
from localsteer.evaluate.page import Heatmap, Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.cells import (
    Cell,
    Result,
    accuracy_of,
    applied,
    difference,
    grouped,
    select,
    share_of,
)
from localsteer.evaluate.suites.format import GROUPS
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.suites.bench import Bench

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
    carried = carry_all(base, bench.raw(instructions))
    picks = base.tune([(each, carried[each.id]) for each in instructions])
    theirs = {each.id: tuned.vector for each, tuned in zip(instructions, picks, strict=True)}
    own = base.vectors(instructions)
    # where nothing is applied there is nothing to control for
    others = {
        instruction.id: bench.others(instruction) if applied(theirs[instruction.id]) else []
        for instruction in instructions
    }
    carried |= carry_all(base, bench.raw([other for drawn in others.values() for other in drawn]))
    cells = [
        cell
        for each in instructions
        for cell in _cells(
            base, each, own[each.id], theirs[each.id], [carried[other.id] for other in others[each.id]]
        )
    ]
    results = base.run(cells, what="base model: comparing vectors")
    idle = [sum(not applied(vector) for vector in vectors.values()) for vectors in (own, theirs)]
    sections = [_compared(results, *idle), _alike(instructions, base.raw(instructions), carried, results)]
    return base.report(TITLE, results, CONDITIONS, sections)


def carry_all(base: Bench, vectors: Mapping[str, ControlVector]) -> dict[str, ControlVector]:
    """The instruct model's vectors as vectors of the base model. Raises MismatchError for another width."""
    from localsteer.evaluate.transfer import carry
    from localsteer.extract import open_backend

    def work(engine: Engine, _: None) -> dict[str, ControlVector]:
        with open_backend(engine) as backend:
            return {name: carry(vector, backend) for name, vector in vectors.items()}

    return base.workers.map(work, [None])[0]


def _cells(
    base: Bench,
    instruction: Instruction,
    own: ControlVector,
    theirs: ControlVector,
    others: Sequence[ControlVector],
) -> list[Cell]:
    steers = {"none": (), "own": applied(own), "instruct": applied(theirs), "instructed": ()}
    if applied(theirs):
        steers |= controls_of([theirs], others, base.plain_mean(), base.seed)
    return base.cells(instruction, arms_of(steers, CONDITIONS))


def _compared(results: Sequence[Result], own_idle: int, instruct_idle: int) -> Section:
    """Whether the instruct model's vectors lift the base more than its own do, in numbers and in words.

    own_idle, instruct_idle: for how many instructions no setting was any better than the model alone.
    """
    by_name = {name: chosen for (name,), chosen in grouped(results, "instruction").items()}
    rows = [[name, *_lift(chosen)] for name, chosen in (by_name | {"all": list(results)}).items()]
    gain: Share = rows[-1][-1]
    text = (
        f"The instruct model's vectors follow {100 * (gain.share or 0.0):.1f} points more often than the "
        f"base model's own (95%: {100 * (gain.low or 0.0):.1f} to {100 * (gain.high or 0.0):.1f}), "
    )
    text += (
        f"at least the {100 * BAR:.0f} points that were looked for."
        if gain.share is not None and gain.share >= BAR
        else f"less than the {100 * BAR:.0f} points that were looked for; the next section shows what is "
        "there to be steered."
    )
    if own_idle or instruct_idle:
        text += (
            f" Of {len(by_name)} instructions, no setting did better than the base model alone for "
            f"{own_idle} of its own vectors and for {instruct_idle} of the instruct model's: there nothing "
            "is applied, and there is no control."
        )
    table = Table(["instruction", "none", "own", "instruct", "instruct - own"], rows)
    return Section("Whose vectors lift the base model", text, [table])


def _lift(results: Sequence[Result]) -> list[Share]:
    none, own, instruct = (select(results, name) for name in ("none", "own", "instruct"))
    return [share_of(none), share_of(own), share_of(instruct), difference(instruct, own)]


def _alike(
    instructions: Sequence[Instruction],
    own: Mapping[str, ControlVector],
    carried: Mapping[str, ControlVector],
    results: Sequence[Result],
) -> Section:
    """Why: does the base know the instruction at all, and do the two directions have anything in common?"""
    names = [instruction.id for instruction in instructions]
    cosines = {name: _cosines(own[name], carried[name]) for name in names}
    told = select(results, "instructed")
    rows: list[list[Value]] = [
        [name, share_of(select(told, None, name)), max(cosines[name]), float(np.mean(cosines[name]))]
        for name in names
    ]
    text = (
        "A vector can only use what a model does by itself. `instructed`: the base model with the "
        "instruction in its prompt. Cosine: between its own direction and the instruct model's, largest and "
        "mean over blocks; near zero, the two models do not keep the instruction in the same place."
    )
    if accuracy_of(told) is not None:
        text += f" Told in words, the base model follows in {accuracy_of(told):.0%} of replies."
    plot = Heatmap(
        title="Cosine of the base model's direction and the instruct model's",
        x_label="block",
        rows=names,
        columns=list(map(str, range(len(cosines[names[0]])))),
        values=list(cosines.values()),
    )
    table = Table(["instruction", "instructed", "largest cosine", "mean cosine"], rows)
    return Section("What the two models share", text, [table], [plot])


def _cosines(a: ControlVector, b: ControlVector) -> list[float]:
    both = set(a.usable_layers) & set(b.usable_layers)
    return [float(a.unit(il) @ b.unit(il)) if il in both else 0.0 for il in range(a.n_layer)]
