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
from localsteer.evaluate.conditions import applied_like, random_control, told_prompts
from localsteer.evaluate.suites.cells import (
    Cell,
    Result,
    applied,
    checks_of,
    difference,
    figures,
    share_cell,
)
from localsteer.evaluate.suites.format import GROUPS
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.suites import SuiteReport
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
    theirs = {each.id: picked.vector for each, picked in zip(instructions, picks, strict=True)}
    own = base.vectors(instructions)
    # where nothing is applied there is nothing to control for
    others = {each.id: bench.others(each) if applied(theirs[each.id]) else [] for each in instructions}
    carried |= carry_all(base, bench.raw([other for found in others.values() for other in found]))
    cells = [
        cell
        for each in instructions
        for cell in _cells(
            base, each, own[each.id], theirs[each.id], [carried[other.id] for other in others[each.id]]
        )
    ]
    results = base.run(cells, what="base model: comparing vectors")
    idle = [sum(not applied(each) for each in found.values()) for found in (own, theirs)]
    sections = [_compared(results, *idle), _alike(instructions, base.raw(instructions), carried, results)]
    return {"title": TITLE, **base.tables(results, CONDITIONS), "sections": sections}


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
    queries = base.queries(instruction, "test")
    steers = {"none": (), "own": applied(own), "instruct": applied(theirs), "instructed": ()}
    if applied(theirs):
        steers["random"] = (random_control(theirs, base.plain_mean(), base.seed),)
        for each in others:
            steers["other"] = (applied_like(each, theirs),)
    told = told_prompts(queries, instruction.phrasings)
    return [
        Cell(
            instruction=instruction.id,
            condition=name,
            query=query,
            prompt=told[i] if name == "instructed" else query.text,
            steer=steers[name],
            checks=checks_of(instruction, query),
            max_tokens=base.max_tokens,
            wording=instruction.phrasings[i % len(instruction.phrasings)],
        )
        for name in CONDITIONS
        if name in steers
        for i, query in enumerate(queries)
    ]


def _of(results: Sequence[Result], condition: str, instruction: str | None = None) -> list[Result]:
    return [
        each
        for each in results
        if each.cell.condition == condition and instruction in (None, each.cell.instruction)
    ]


def _compared(results: Sequence[Result], own_idle: int, instruct_idle: int) -> dict[str, Any]:
    """Whether the instruct model's vectors lift the base more than its own do, in numbers and in words.

    own_idle, instruct_idle: for how many instructions no setting was any better than the model alone.
    """
    names = list(dict.fromkeys(each.cell.instruction for each in results))
    rows = [_row(name, *(_of(results, kind, name) for kind in ("none", "own", "instruct"))) for name in names]
    together = _row("all", *(_of(results, kind) for kind in ("none", "own", "instruct")))
    gain = together[-1]
    met = gain["share"] is not None and gain["share"] >= BAR
    text = (
        f"The instruct model's vectors follow {100 * (gain['share'] or 0.0):.1f} points more often than the "
        f"base model's own (95%: {100 * (gain['low'] or 0.0):.1f} to {100 * (gain['high'] or 0.0):.1f}), "
    )
    text += (
        f"at least the {100 * BAR:.0f} points that were looked for."
        if met
        else f"less than the {100 * BAR:.0f} points that were looked for; the next section shows what is "
        "there to be steered."
    )
    if own_idle or instruct_idle:
        text += (
            f" Of {len(names)} instructions, no setting did better than the base model alone for {own_idle} "
            f"of its own vectors and for {instruct_idle} of the instruct model's: there nothing is applied, "
            "and there is no control."
        )
    table = {
        "columns": ["instruction", "none", "own", "instruct", "instruct - own"],
        "rows": [*rows, together],
    }
    return {"title": "Whose vectors lift the base model", "text": text, "tables": [table], "plots": []}


def _row(name: str, none: list[Result], own: list[Result], instruct: list[Result]) -> list[Any]:
    return [name, *(share_cell(figures(each)) for each in (none, own, instruct)), difference(instruct, own)]


def _alike(
    instructions: Sequence[Instruction],
    own: Mapping[str, ControlVector],
    carried: Mapping[str, ControlVector],
    results: Sequence[Result],
) -> dict[str, Any]:
    """Why: does the base know the instruction at all, and do the two directions have anything in common?"""
    cosines = {each.id: _cosines(own[each.id], carried[each.id]) for each in instructions}
    rows = [
        [
            each.id,
            share_cell(figures(_of(results, "instructed", each.id))),
            max(cosines[each.id]),
            float(np.mean(cosines[each.id])),
        ]
        for each in instructions
    ]
    told = figures(_of(results, "instructed"))["strict"]["accuracy"]
    text = (
        "A vector can only use what a model does by itself. `instructed`: the base model with the "
        "instruction in its prompt. Cosine: between its own direction and the instruct model's, largest and "
        "mean over blocks; near zero, the two models do not keep the instruction in the same place."
    )
    if told is not None:
        text += f" Told in words, the base model follows in {told:.0%} of replies."
    columns = ["instruction", "instructed", "largest cosine", "mean cosine"]
    n_layer = len(next(iter(cosines.values())))
    plot = {
        "kind": "heatmap",
        "title": "Cosine of the base model's direction and the instruct model's",
        "x_label": "block",
        "y_label": "",
        "rows": list(cosines),
        "columns": list(map(str, range(n_layer))),
        "values": list(cosines.values()),
    }
    table = {"columns": columns, "rows": rows}
    return {"title": "What the two models share", "text": text, "tables": [table], "plots": [plot]}


def _cosines(a: ControlVector, b: ControlVector) -> list[float]:
    both = set(a.blocks) & set(b.blocks)
    return [float(a.unit(il) @ b.unit(il)) if il in both else 0.0 for il in range(a.n_layer)]
