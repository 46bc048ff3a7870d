"""Which vector steers a line of an IFEval-form file: by its verifiers and their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction
from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Rule
from localsteer.evaluate.controls import applied_like
from localsteer.evaluate.suites.ifeval_items import Item
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

CASELESS = ("section_spliter",)  # arguments that a vector need not have in the same case


def matches_of(bench: Bench, item: Item) -> list[Instruction]:
    matches = [_match(bench, check) for check in item.checks]
    return list({match.id: match for match in matches if match is not None}.values())


def _match(bench: Bench, check: Rule) -> Instruction | None:
    """The given vector's instruction, or the catalogue's, with this verifier and these texts among its
    arguments; numbers may differ, since a direction is that of a kind (three bullets, five bullets)."""
    known = [bench.instruction(each) for each in bench.given]
    if not known:
        known = list(bench.catalog.instructions.values())
    if bench.wanted is not None:
        known = [each for each in known if each.id in bench.wanted]
    same = [each for each in known if each.verifier == check.verifier]
    filled = [match for each in same if (match := _filled(each, check)) is not None]
    fitting = [each for each in filled if _texts(each.kwargs) == _texts(check.kwargs)]
    exact = [each for each in fitting if dict(each.kwargs) == dict(check.kwargs)]
    return next(iter(exact or fitting), None)


def _filled(instruction: Instruction, check: Rule) -> Instruction | None:
    """The catalogue's instruction with the line's own texts in its slots, and its defaults elsewhere."""
    slots = instruction.open_slots
    values = {
        template[1:-1]: check.kwargs[name]
        for name, template in instruction.kwargs.items()
        if template in [f"{{{slot}}}" for slot in slots] and isinstance(check.kwargs.get(name), str)
    }
    try:
        return instruction.fill(**values)
    except CatalogError:  # a slot without a default that the line does not fill
        return None


def _texts(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.lower() if name in CASELESS else value
        for name, value in kwargs.items()
        if not isinstance(value, (int, float)) and name != "prompt_to_repeat"
    }


def vectors_of(bench: Bench, matches: Sequence[Instruction]) -> dict[str, ControlVector]:
    """By id. One whose slots were filled by a line takes the settings picked for the catalogue's defaults:
    picking for each phrase would take longer than all the rest. Where those are a learned gate, which knows
    only the phrase that it was learned with, nothing is applied."""
    whole = [match for match in matches if kind_of(bench, match) == match.id]
    picked = bench.vectors.tuned(list({each.id: each for each in whole}.values()))
    varied = {each.id: each for each in matches if each.id not in picked}
    kinds = bench.vectors.tuned(sorted({kind_of(bench, each) for each in varied.values()}))
    like = {name: kinds[kind_of(bench, each)] for name, each in varied.items()}
    raw = bench.vectors.raw([each for name, each in varied.items() if like[name].mode != "gate"])
    return picked | {
        name: applied_like(raw[name], kind) if name in raw else kind.at(strength=0.0)
        for name, kind in like.items()
    }


def kind_of(bench: Bench, match: Instruction) -> str:
    """Whose settings and whose control it has: a phrase of one line should change neither."""
    return match.id if match.id in bench.given else match.id.partition(":")[0]
