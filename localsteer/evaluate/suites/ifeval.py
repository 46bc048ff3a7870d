"""A file of IFEval-form prompts, one JSON object on each line: IFEval's own, the paper's test set, or yours.

    {"prompt": ..., "instruction_id_list": [...], "kwargs": [{...}, ...], "prompt_without_instruction": ...}

Each line is judged by its own ids and arguments. Without `prompt_without_instruction` (or where it is null)
there is no unsteered or steered reply to compare, only `instructed` and `both`. The controls have random
directions of equal norm, or vectors of other instructions, in the vectors' places; where nothing is applied
there are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError, LocalsteerError
from localsteer.evaluate.cells import Cell, Rule, applied
from localsteer.evaluate.controls import applied_like, is_possible
from localsteer.evaluate.page import SuiteReport, Table
from localsteer.evaluate.suites.ifeval_items import Item, read_items
from localsteer.evaluate.texts import said, section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "ifeval", "IFEval-form prompts"
CONDITIONS = ("none", "steered", "random", "other", "instructed", "both")
CASELESS = ("section_spliter",)  # arguments that a vector need not have in the same case


def missing(bench: Bench, *, ifeval: Path | None = None, **_options: Any) -> str:
    if ifeval is None:
        return "suite ifeval needs a file of prompts: give it with --ifeval FILE.jsonl."
    items = read_items(Path(ifeval))
    if not any(_matches(bench, item) for item in items):
        return f"{ifeval}: no line has an instruction that there is a vector for ({len(items)} lines)."
    return ""


def run(bench: Bench, *, ifeval: Path, **_options: Any) -> SuiteReport:
    items = read_items(Path(ifeval))
    fitting = _fitting(bench, items)
    plan = {each.number: _matches(bench, each) for each in fitting}
    usable = [each for each in fitting if plan[each.number]]
    if not fitting:
        raise LocalsteerError(
            f"{ifeval}: no prompt leaves room for a reply of {bench.max_tokens} tokens in the model's "
            "context: allow fewer with --max-tokens."
        )
    if not usable:
        raise LocalsteerError(
            f"{ifeval}: no line has an instruction that there is a vector for ({len(items)} lines, "
            f"{len(items) - len(fitting)} of them too long for the context)."
        )
    vectors = _vectors(bench, [match for each in usable for match in plan[each.number]])
    cells, alone = [], 0
    for item in usable:
        matches = [match for match in plan[item.number] if applied(vectors[match.id])]
        if not is_possible([vectors[match.id] for match in matches]):
            matches, alone = matches[:1], alone + 1
        cells += _cells(bench, item, matches, tuple(vectors[match.id] for match in matches))
    rows = bench.run(cells, what="IFEval-form prompts")
    left_out = {
        "too_long": len(items) - len(fitting),
        "no_vector": len(fitting) - len(usable),
        "parallel": alone,
        "no_base": sum(item.base is None for item in usable),
    }
    more = " ".join(said(f"ifeval.{why}", n=n) for why, n in left_out.items() if n)
    asked = section("ifeval.asked", _used(plan, usable), n=len(usable), of=len(items), more=more)
    return bench.report(TITLE, rows, CONDITIONS, [asked])


def _cells(
    bench: Bench, item: Item, matches: Sequence[Instruction], steer: tuple[ControlVector, ...]
) -> list[Cell]:
    query = Query(item.base or item.prompt)
    asked = {"none": (item.base, ()), "steered": (item.base, steer)}
    if steer and item.base is not None:
        kinds = [bench.instruction(_kind(bench, match)) for match in matches]
        asked |= {name: (item.base, control) for name, control in bench.controls.of(kinds, steer).items()}
    asked |= {"instructed": (item.prompt, ()), "both": (item.prompt, steer)}
    return [
        Cell(item.label, name, query, prompt, vectors, item.checks, bench.max_tokens, wording=item.prompt)
        for name, (prompt, vectors) in asked.items()
        if prompt is not None
    ]


def _fitting(bench: Bench, items: Sequence[Item]) -> list[Item]:
    """Those whose prompts leave room for a whole reply."""

    def work(engine: Engine, _: None) -> list[Item]:
        room = engine.n_ctx - bench.max_tokens
        texts = [(each, [each.prompt, *([each.base] if each.base else [])]) for each in items]
        return [item for item, prompts in texts if max(len(engine.prompt_tokens(t)) for t in prompts) <= room]

    return bench.workers.map(work, [None])[0]


# --- which vector ------------------------------------------------------------------------------------------


def _matches(bench: Bench, item: Item) -> list[Instruction]:
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


def _vectors(bench: Bench, matches: Sequence[Instruction]) -> dict[str, ControlVector]:
    """By id. One whose slots were filled by a line takes the settings picked for the catalogue's defaults:
    picking for each phrase would take longer than all the rest."""
    whole = [match for match in matches if _kind(bench, match) == match.id]
    picked = bench.vectors.tuned(list({each.id: each for each in whole}.values()))
    varied = {each.id: each for each in matches if each.id not in picked}
    kinds = bench.vectors.tuned(sorted({_kind(bench, each) for each in varied.values()}))
    raw = bench.vectors.raw(list(varied.values()))
    return picked | {
        name: applied_like(raw[name], kinds[_kind(bench, each)]) for name, each in varied.items()
    }


def _kind(bench: Bench, match: Instruction) -> str:
    """Whose settings and whose control it has: a phrase of one line should change neither."""
    return match.id if match.id in bench.given else match.id.partition(":")[0]


def _used(plan: Mapping[int, Sequence[Instruction]], usable: Sequence[Item]) -> Table:
    counts = Counter((match.verifier or "", match.id) for item in usable for match in plan[item.number])
    return Table(["IFEval id", "vector", "lines"], [[*key, n] for key, n in sorted(counts.items())])
