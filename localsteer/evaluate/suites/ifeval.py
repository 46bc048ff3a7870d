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
from localsteer.errors import LocalsteerError
from localsteer.evaluate.cells import Cell, applied
from localsteer.evaluate.controls import is_possible
from localsteer.evaluate.page import SuiteReport, Table
from localsteer.evaluate.suites.ifeval_items import Item, read_items
from localsteer.evaluate.suites.ifeval_match import kind_of, matches_of, vectors_of
from localsteer.evaluate.texts import said, section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "ifeval", "IFEval-form prompts"
CONDITIONS = ("none", "steered", "random", "other", "instructed", "both")


def missing(bench: Bench, *, ifeval: Path | None = None, **_options: Any) -> str:
    if ifeval is None:
        return "suite ifeval needs a file of prompts: give it with --ifeval FILE.jsonl."
    items = read_items(Path(ifeval))
    if not any(matches_of(bench, item) for item in items):
        return f"{ifeval}: no line has an instruction that there is a vector for ({len(items)} lines)."
    return ""


def run(bench: Bench, *, ifeval: Path, **_options: Any) -> SuiteReport:
    items = read_items(Path(ifeval))
    fitting = _fitting(bench, items)
    plan = {each.number: matches_of(bench, each) for each in fitting}
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
    vectors = vectors_of(bench, [match for each in usable for match in plan[each.number]])
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
        kinds = [bench.instruction(kind_of(bench, match)) for match in matches]
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


def _used(plan: Mapping[int, Sequence[Instruction]], usable: Sequence[Item]) -> Table:
    counts = Counter((match.verifier or "", match.id) for item in usable for match in plan[item.number])
    return Table(["IFEval id", "vector", "lines"], [[*key, n] for key, n in sorted(counts.items())])
