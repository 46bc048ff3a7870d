"""The conditions for each format instruction, and what a vector adds where the instruction is said already.

The paper's experiment on any model: none, steered, instructed, both, with two controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction
from localsteer.evaluate.cells import CONDITIONS
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Section, SuiteReport, Table, Value
from localsteer.evaluate.suites.paraphrases import added, badly_followed
from localsteer.evaluate.texts import section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "format", "Instructions, one at a time"
GROUPS = ("format", "fixed", "length")  # those with a verifier


def missing(bench: Bench, **_options: Any) -> str:
    bench.instructions(GROUPS)
    return ""


def run(bench: Bench, *, paraphrases: bool = True, **_options: Any) -> SuiteReport:
    instructions = bench.instructions(GROUPS)
    vectors = bench.vectors.tuned(instructions)
    compared = [bench.conditions(each, vectors[each.id]) for each in instructions]
    rows = bench.run(compared, what="comparing conditions")
    sections = [present(rows), *controls_named(bench, instructions, vectors), *without_effect(vectors)]
    if paraphrases:
        sections.append(badly_followed(bench, instructions, vectors))
    return bench.report(TITLE, rows, CONDITIONS, sections)


def present(rows: Outcomes) -> Section:
    """What the vector adds where the instruction stands in the prompt."""
    table = [[name, *added(part)] for name, part in (rows.by("instruction") | {"all": rows}).items()]
    return section("format.present", Table(["instruction", "instructed", "both", "difference"], table))


def controls_named(
    bench: Bench, instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> list[Section]:
    others: list[list[Value]] = [
        [instruction.id, ", ".join(other.id for other in bench.controls.others(instruction))]
        for instruction in instructions
        if vectors[instruction.id].strength
    ]
    return [section("format.other", Table(["instruction", "other"], others))] if others else []


def without_effect(vectors: Mapping[str, ControlVector]) -> list[Section]:
    """Says which instructions steering does not help on this model."""
    idle = [name for name, vector in vectors.items() if not vector.strength]
    return [section("format.idle", names=", ".join(idle))] if idle else []
