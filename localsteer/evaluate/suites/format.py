"""The conditions for each format instruction, and what a vector adds where the instruction is said already.

The paper's experiment on any model: none, steered, instructed, both, with two controls.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction
from localsteer.evaluate.conditions import CONDITIONS, arms_of
from localsteer.evaluate.page import Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.cells import (
    Arm,
    Cell,
    Result,
    accuracy_of,
    applied,
    difference,
    grouped,
    select,
    share_of,
)
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.suites.bench import Bench

NAME = "format"
TITLE = "Instructions, one at a time"
GROUPS = ("format", "fixed", "length")  # those with a verifier
FOLLOWED_BADLY = 0.6  # a paraphrase that is followed less often than this, on validation queries
N_TRIED = 8  # validation queries that each paraphrase is tried on
N_SHOWN = 15  # paraphrases that are quoted
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "vi": "Vietnamese",
}  # fmt: skip


def missing(bench: Bench, **_options: Any) -> str:
    bench.instructions(GROUPS)
    return ""


def run(bench: Bench, *, paraphrases: bool = True, **_options: Any) -> SuiteReport:
    instructions = bench.instructions(GROUPS)
    vectors = bench.vectors(instructions)
    cells = [
        cell
        for instruction in instructions
        for cell in condition_cells(bench, instruction, vectors[instruction.id], CONDITIONS)
    ]
    results = bench.run(cells, what="comparing conditions")
    steered = [instruction for instruction in instructions if vectors[instruction.id].strength]
    sections = [present(results), *controls_named(bench, steered), *without_effect(vectors)]
    if paraphrases:
        sections.append(badly_followed(bench, instructions, vectors))
    return bench.report(TITLE, results, CONDITIONS, sections)


def condition_cells(
    bench: Bench,
    instruction: Instruction,
    vector: ControlVector,
    conditions: Sequence[str],
    phrasings: Sequence[str] | None = None,
) -> list[Cell]:
    """A cell for each condition and test query. phrasings: in place of the instruction's own."""
    steers = {"none": (), "steered": applied(vector), "instructed": (), "both": applied(vector)}
    if vector.strength and {"random", "other"} & set(conditions):
        steers |= bench.controls([instruction], [vector])
    return bench.cells(instruction, arms_of(steers, conditions), phrasings=phrasings)


# --- sections ----------------------------------------------------------------------------------------------


def present(results: Sequence[Result]) -> Section:
    """What the vector adds where the instruction stands in the prompt."""
    rows = [[name, *_added(chosen)] for (name,), chosen in grouped(results, "instruction").items()]
    columns = ["instruction", "instructed", "both", "difference"]
    return Section(
        "With the instruction in the prompt",
        "What steering adds to an instruction that the prompt holds already: `both` minus "
        "`instructed`, 95% by bootstrap over the queries. Where it is below zero, don't steer prompts that "
        "say it themselves.",
        [Table(columns, [*rows, ["all", *_added(results)]])],
    )


def _added(results: Sequence[Result]) -> list[Share]:
    told, both = select(results, "instructed"), select(results, "both")
    return [share_of(told), share_of(both), difference(both, told)]


def controls_named(bench: Bench, instructions: Sequence[Instruction]) -> list[Section]:
    if not instructions:
        return []
    rows: list[list[Value]] = [
        [instruction.id, ", ".join(other.id for other in bench.others(instruction))]
        for instruction in instructions
    ]
    text = (
        "Whose vector stands in the place of the right one in condition `other`: drawn from those whose own "
        "replies, when the model is told to follow them, do not happen to follow this instruction."
    )
    return [Section("The control `other`", text, [Table(["instruction", "other"], rows)])]


def without_effect(vectors: Mapping[str, ControlVector]) -> list[Section]:
    """Says which instructions steering does not help on this model."""
    idle = [name for name, vector in vectors.items() if not vector.strength]
    if not idle:
        return []
    text = (
        f"No setting made the model follow {', '.join(idle)} more often than it does unsteered, on "
        "validation queries: nothing was applied, and `steered` is the model alone."
    )
    return [Section("Where steering does not help", text)]


# --- paraphrases -------------------------------------------------------------------------------------------


def badly_followed(
    bench: Bench, instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> Section:
    """Paraphrases that the model follows badly on validation queries, and what steering does for them on
    test queries."""
    candidates = {instruction.id: bench.readable(paraphrases_of(instruction)) for instruction in instructions}
    bad = _tried(bench, instructions, candidates)
    cells = [
        cell
        for each in instructions
        for wordings in [[text for text, _ in bad[each.id]]]
        if wordings
        for cell in condition_cells(bench, each, vectors[each.id], ("instructed", "both"), wordings)
    ]
    results = bench.run(cells, what="paraphrases, told and steered", score=False)
    counts = {name: f"{len(bad[name])} of {len(candidates[name])}" for name in candidates}
    rows = [
        [name, counts[name], *_added(chosen)] for (name,), chosen in grouped(results, "instruction").items()
    ]
    n_bad, n_all = (sum(map(len, counted.values())) for counted in (bad, candidates))
    rows.append(["all", f"{n_bad} of {n_all}", *_added(results)])
    quoted = sorted((share, name, text) for name, pairs in bad.items() for text, share in pairs)[:N_SHOWN]
    return Section(
        "Paraphrases that the model follows badly",
        f"{n_all} wordings that no vector was made with were tried on {N_TRIED} validation queries each; the "
        f"{n_bad} that were followed less than {FOLLOWED_BADLY:.0%} of the time are asked again here on test "
        "queries, without and with the vector (settings as everywhere, not chosen for this).",
        [
            Table(["instruction", "wordings", "instructed", "both", "difference"], rows),
            Table(
                ["followed (validation)", "instruction", "wording"],
                [[Share(share), name, wording] for share, name, wording in quoted],
            ),
        ],
    )


def _tried(
    bench: Bench, instructions: Sequence[Instruction], candidates: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[str, float]]]:
    """(wording, share of validation replies that follow) of the badly followed ones, by instruction."""
    cells = [
        cell
        for instruction in instructions
        for text in candidates[instruction.id]
        for cell in bench.cells(
            instruction,
            [Arm(text, told=True)],
            bench.queries(instruction, "validation")[:N_TRIED],
            phrasings=[text],
        )
    ]
    results = grouped(bench.run(cells, what="trying paraphrases", score=False), "instruction", "condition")
    shares = {key: accuracy_of(chosen) for key, chosen in results.items()}
    return {
        name: [(text, shares[name, text]) for text in texts if shares[name, text] < FOLLOWED_BADLY]
        for name, texts in candidates.items()
    }


def paraphrases_of(instruction: Instruction) -> list[str]:
    """Wordings that are in no vector: the catalogue's held-out ones and those of paraphrases.toml."""
    relation = instruction.kwargs.get("relation")
    key = f"{instruction.verifier} {relation}" if relation else instruction.verifier
    values = {**instruction.kwargs, "language": LANGUAGES.get(instruction.kwargs.get("language", ""), "")}
    own = [text.format_map(values) for text in _written().get(key, ())]
    texts = dict.fromkeys([*instruction.held_out_phrasings, *own])
    return [text for text in texts if text not in instruction.phrasings]


def _written() -> dict[str, list[str]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(Path(__file__).with_name("paraphrases.toml").read_text("utf-8"))
