"""Wordings that no vector was made with: those that a model follows badly, and what steering adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction, read_toml
from localsteer.evaluate.cells import Arm
from localsteer.evaluate.controls import readable
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Section, Share, Table, Value
from localsteer.evaluate.texts import section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

FOLLOWED_BADLY = 0.6  # a paraphrase that is followed less often than this, on validation queries
N_TRIED = 8  # validation queries that each paraphrase is tried on
N_SHOWN = 15  # paraphrases that are quoted
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "vi": "Vietnamese",
}  # fmt: skip


def added(rows: Outcomes) -> list[Share]:
    """What steering adds to being told: told, both, and the difference."""
    told, both = rows.of("instructed"), rows.of("both")
    return [told.share, both.share, both.minus(told)]


def badly_followed(
    bench: Bench, instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> Section:
    """Paraphrases that the model follows badly on validation queries, and what steering does for them on
    test queries."""
    candidates = {each.id: readable(bench.workers, paraphrases_of(each)) for each in instructions}
    bad = _tried(bench, instructions, candidates)
    asked = [
        bench.conditions(each, vectors[each.id], ("instructed", "both"), phrasings=list(bad[each.id]))
        for each in instructions
        if bad[each.id]
    ]
    rows = bench.run(asked, what="paraphrases, told and steered", score=False)
    n_bad, n_all = (sum(map(len, counted.values())) for counted in (bad, candidates))
    table = [
        [name, f"{len(bad[name])} of {len(candidates[name])}", *added(part)]
        for name, part in rows.by("instruction").items()
    ]
    table.append(["all", f"{n_bad} of {n_all}", *added(rows)])
    quoted = sorted((share, name, text) for name, texts in bad.items() for text, share in texts.items())
    shown: list[list[Value]] = [[Share(share), name, text] for share, name, text in quoted[:N_SHOWN]]
    return section(
        "format.paraphrases",
        Table(["instruction", "wordings", "instructed", "both", "difference"], table),
        Table(["followed (validation)", "instruction", "wording"], shown),
        n_all=n_all,
        n_bad=n_bad,
        tried=N_TRIED,
        badly=FOLLOWED_BADLY,
    )


def _tried(
    bench: Bench, instructions: Sequence[Instruction], candidates: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """The badly followed wordings of each instruction, and the share of validation replies that follow."""
    asked = [
        bench.experiment(
            instruction,
            [Arm(text, told=True)],
            bench.queries(instruction, "validation")[:N_TRIED],
            phrasings=[text],
        )
        for instruction in instructions
        for text in candidates[instruction.id]
    ]
    rows = bench.run(asked, what="trying paraphrases", score=False)
    shares = {key: part.followed for key, part in rows.by("instruction", "condition").items()}
    return {
        name: {text: shares[name, text] for text in texts if shares[name, text] < FOLLOWED_BADLY}
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
    return read_toml(Path(__file__).with_name("paraphrases.toml"))
