"""The conditions for each format instruction, and what a vector adds where the instruction is said already.

The paper's experiment on any model: none, steered, instructed, both, with two controls.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction
from localsteer.evaluate.conditions import CONDITIONS, told_prompts
from localsteer.evaluate.suites.cells import (
    Cell,
    Result,
    applied,
    checks_of,
    difference,
    figures,
    share_cell,
)
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.suites import SuiteReport
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
        cell for each in instructions for cell in condition_cells(bench, each, vectors[each.id], CONDITIONS)
    ]
    results = bench.run(cells, what="comparing conditions")
    steered = [each for each in instructions if vectors[each.id].strength]
    sections = [present(results), *controls_named(bench, steered), *without_effect(vectors)]
    if paraphrases:
        sections += badly_followed(bench, instructions, vectors)
    return {"title": TITLE, **bench.tables(results, CONDITIONS), "sections": sections}


def condition_cells(
    bench: Bench,
    instruction: Instruction,
    vector: ControlVector,
    conditions: Sequence[str],
    *,
    phrasings: Sequence[str] | None = None,
    split: str = "test",
) -> list[Cell]:
    """A cell for each condition and query. phrasings: in place of the instruction's own."""
    phrasings = phrasings or instruction.phrasings
    queries = bench.queries(instruction, split)
    on = applied(vector)
    steers = {"none": (), "steered": on, "instructed": (), "both": on}
    if on and {"random", "other"} & set(conditions):
        steers |= bench.controls([instruction], [vector])
    told = told_prompts(queries, phrasings)
    return [
        Cell(
            instruction=instruction.id,
            condition=name,
            query=query,
            prompt=told[i] if name in ("instructed", "both") else query.text,
            steer=steers[name],
            checks=checks_of(instruction, query),
            max_tokens=bench.max_tokens,
            wording=phrasings[i % len(phrasings)],
        )
        for name in conditions
        if name in steers
        for i, query in enumerate(queries)
    ]


# --- sections ----------------------------------------------------------------------------------------------


def present(results: Sequence[Result]) -> dict[str, Any]:
    """What the vector adds where the instruction stands in the prompt."""
    names = list(dict.fromkeys(result.cell.instruction for result in results))
    rows = [_present_row(name, [each for each in results if each.cell.instruction == name]) for name in names]
    return {
        "title": "With the instruction in the prompt",
        "text": "What steering adds to an instruction that the prompt holds already: `both` minus "
        "`instructed`, 95% by bootstrap over the queries. Where it is below zero, don't steer prompts that "
        "say it themselves.",
        "tables": [
            {
                "columns": ["instruction", "instructed", "both", "difference"],
                "rows": [*rows, _present_row("all", results)],
            }
        ],
        "plots": [],
    }


def _present_row(name: str, results: Sequence[Result]) -> list[Any]:
    told, both = (
        [result for result in results if result.cell.condition == condition]
        for condition in ("instructed", "both")
    )
    return [name, share_cell(figures(told)), share_cell(figures(both)), difference(both, told)]


def controls_named(bench: Bench, instructions: Sequence[Instruction]) -> list[dict[str, Any]]:
    if not instructions:
        return []
    rows = [[each.id, ", ".join(other.id for other in bench.others(each))] for each in instructions]
    text = (
        "Whose vector stands in the place of the right one in condition `other`: drawn from those whose own "
        "replies, when the model is told to follow them, do not happen to follow this instruction."
    )
    table = {"columns": ["instruction", "other"], "rows": rows}
    return [{"title": "The control `other`", "text": text, "tables": [table], "plots": []}]


def without_effect(vectors: Mapping[str, ControlVector]) -> list[dict[str, Any]]:
    """Says which instructions steering does not help on this model."""
    idle = [name for name, vector in vectors.items() if not vector.strength]
    if not idle:
        return []
    text = (
        f"No setting made the model follow {', '.join(idle)} more often than it does unsteered, on "
        "validation queries: nothing was applied, and `steered` is the model alone."
    )
    return [{"title": "Where steering does not help", "text": text, "tables": [], "plots": []}]


# --- paraphrases -------------------------------------------------------------------------------------------


def badly_followed(
    bench: Bench, instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> list[dict[str, Any]]:
    """Paraphrases that the model follows badly on validation queries, and what steering does for them on
    test queries."""
    candidates = {each.id: bench.readable(paraphrases_of(each)) for each in instructions}
    bad = _tried(bench, instructions, candidates)
    chosen = [each for each in instructions if bad[each.id]]
    cells = [
        cell
        for each in chosen
        for cell in condition_cells(
            bench,
            each,
            vectors[each.id],
            ("instructed", "both"),
            phrasings=[text for text, _ in bad[each.id]],
        )
    ]
    results = bench.run(cells, what="paraphrases, told and steered", score=False)
    rows = [
        [each.id, f"{len(bad[each.id])} of {len(candidates[each.id])}", *_present_row("", found)[1:]]
        for each in chosen
        for found in [[result for result in results if result.cell.instruction == each.id]]
    ]
    n_bad, n_all = (sum(map(len, counted.values())) for counted in (bad, candidates))
    rows.append(["all", f"{n_bad} of {n_all}", *_present_row("", results)[1:]])
    quoted = sorted((share, name, text) for name, found in bad.items() for text, share in found)[:N_SHOWN]
    text = (
        f"{n_all} wordings that no vector was made with were tried on {N_TRIED} validation queries each; the "
        f"{n_bad} that were followed less than {FOLLOWED_BADLY:.0%} of the time are asked again here on test "
        "queries, without and with the vector (settings as everywhere, not chosen for this)."
    )
    return [
        {
            "title": "Paraphrases that the model follows badly",
            "text": text,
            "tables": [
                {"columns": ["instruction", "wordings", "instructed", "both", "difference"], "rows": rows},
                {
                    "columns": ["followed (validation)", "instruction", "wording"],
                    "rows": [[{"share": share}, name, wording] for share, name, wording in quoted],
                },
            ],
            "plots": [],
        }
    ]


def _tried(
    bench: Bench, instructions: Sequence[Instruction], candidates: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[str, float]]]:
    """(wording, share of validation replies that follow) of the badly followed ones, by instruction."""
    cells = [
        Cell(
            each.id, text, query, f"{query.text} {text}", (), checks_of(each, query), bench.max_tokens,
            wording=text,
        )
        for each in instructions
        for text in candidates[each.id]
        for query in bench.queries(each, "validation")[:N_TRIED]
    ]  # fmt: skip
    followed: dict[tuple[str, str], list[bool]] = {}
    for result in bench.run(cells, what="trying paraphrases", score=False):
        key = (result.cell.instruction, result.cell.condition)
        followed.setdefault(key, []).append(bool(result.verdict.strict))
    shares = {key: sum(found) / len(found) for key, found in followed.items()}
    return {
        each.id: [
            (text, shares[each.id, text])
            for text in candidates[each.id]
            if shares[each.id, text] < FOLLOWED_BADLY
        ]
        for each in instructions
    }


def paraphrases_of(instruction: Instruction) -> list[str]:
    """Wordings that are in no vector: the catalogue's held-out ones and those of paraphrases.toml."""
    relation = instruction.kwargs.get("relation")
    key = f"{instruction.verifier} {relation}" if relation else instruction.verifier
    values = {**instruction.kwargs, "language": LANGUAGES.get(instruction.kwargs.get("language", ""), "")}
    own = [text.format_map(values) for text in _written().get(key, ())]
    found = [*instruction.held_out_phrasings, *own]
    return [text for text in dict.fromkeys(found) if text not in instruction.phrasings]


def _written() -> dict[str, list[str]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(Path(__file__).with_name("paraphrases.toml").read_text("utf-8"))
