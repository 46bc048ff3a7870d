"""Two instructions at once: at one block, where their projections are solved jointly, or at two.

The paper's section 6. A format with a length, and a case with a word to avoid; each vector as it was picked
alone, then the pair's blocks chosen on validation queries by how often both hold. Beside it what happens when
the two projections at one block are done one after the other, as code without a joint solve does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import LocalsteerError
from localsteer.evaluate.suites.bench import is_possible
from localsteer.evaluate.suites.cells import Cell, Result, checks_of, figures, judge_cell, share_cell
from localsteer.evaluate.suites.words import contexts, excluding, words_to_exclude, words_used
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.reply import Reply
from localsteer.steering import apply_program
from localsteer.tune.setting import FEW_BLOCKS
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.suites import SuiteReport
    from localsteer.evaluate.suites.bench import Bench

NAME = "composition"
TITLE = "Two instructions at once"
SAME, DIFFERENT = "same block", "different blocks"
CONDITIONS = ("none", "first alone", "second alone", SAME, DIFFERENT, "random", "other", "instructed")
PAIRS = (
    ("json", "one_sentence"), ("lowercase", "one_sentence"), ("uppercase", "one_sentence"),
    ("title", "five_sentences"), ("lowercase", "no_comma"),
)  # fmt: skip
CASE = "lowercase"  # goes with the word to avoid
POSITIONS = ("prompt", "all")
N_TRIED = 6  # validation queries for each arrangement
N_STATES = 8  # plain prompts whose states are edited both ways
N_REPLIES = 20  # test queries answered by PyTorch, one after the other


@dataclass(frozen=True)
class Composed:
    """Two instructions, and their vectors as each was picked alone. blocks: the arrangements chosen."""

    instructions: tuple[Instruction, Instruction]
    alone: tuple[ControlVector, ControlVector]
    same: tuple[ControlVector, ...] = ()
    different: tuple[ControlVector, ...] = ()

    @cached_property
    def label(self) -> str:
        return " + ".join(each.id for each in self.instructions)

    def queries(self, bench: Bench, split: str) -> tuple[Query, ...]:
        """Those of an instruction that has its own, else those of all."""
        first, second = self.instructions
        return bench.queries(second if split in second.queries else first, split)

    def cell(
        self, bench: Bench, condition: str, query: Query, steer: Sequence[ControlVector] = (), told: int = -1
    ) -> Cell:
        """told: which phrasings stand in the prompt; -1: none."""
        wordings = [each.phrasings[told % len(each.phrasings)] for each in self.instructions]
        return Cell(
            instruction=self.label,
            condition=condition,
            query=query,
            prompt=query.text if told < 0 else " ".join([query.text, *wordings]),
            steer=tuple(steer),
            checks=tuple(check for each in self.instructions for check in checks_of(each, query)),
            max_tokens=bench.max_tokens,
            wording=" ".join(each.phrasings[0] for each in self.instructions),
        )


def missing(bench: Bench, **_options: Any) -> str:
    if named_pairs(bench) or case_words(bench) != []:
        return ""
    pairs = ", ".join(" + ".join(pair) for pair in PAIRS)
    return f"there is nothing to combine: suite composition knows {pairs}, and {CASE} + a word to exclude."


def run(bench: Bench, *, checkpoint: Path | None = None, **_options: Any) -> SuiteReport:
    """checkpoint: the transformers folder that the model was converted from, for replies with one edit after
    the other; known of the bundled model."""
    pairs = choose(bench, pairs_of(bench))
    cells = [cell for pair in pairs for cell in pair_cells(bench, pair)]
    results = bench.run(cells, what="two instructions at once")
    sections = [together(bench, pairs, results), *in_turn(bench, pairs, checkpoint or own_checkpoint(bench))]
    return {"title": TITLE, **bench.tables(results, CONDITIONS), "sections": sections}


# --- which pairs -------------------------------------------------------------------------------------------


def pairs_of(bench: Bench) -> list[Composed]:
    """`named_pairs`, and a case with a word to exclude."""
    named = named_pairs(bench)
    vectors = bench.vectors(list(dict.fromkeys(name for pair in named for name in pair)))
    found = [
        Composed((bench.instruction(a), bench.instruction(b)), (_on(vectors[a]), _on(vectors[b])))
        for a, b in named
    ]
    return found + list(_case_and_word(bench))


def named_pairs(bench: Bench) -> list[tuple[str, str]]:
    """PAIRS of which the catalogue, or what was asked for, has both."""
    known = set(bench.catalog.instructions if bench.asked is None else bench.asked)
    return [pair for pair in PAIRS if set(pair) <= known]


def case_words(bench: Bench) -> list[str] | None:
    """The words that may go with the case: those asked for, or that the catalogue's own queries bring. Empty:
    there is no such pair. None: one that the model's own replies use."""
    known = bench.catalog.instructions
    if CASE not in (known if bench.asked is None else bench.asked) or "exclude_word" not in known:
        return []
    found = list(contexts(bench))
    if bench.asked is not None:
        return [*found, *words_to_exclude(bench)]
    return found or None


def _case_and_word(bench: Bench) -> Iterator[Composed]:
    """Of words that replies use, one that they use without the case and with it: a case may change what is
    said."""
    words = case_words(bench)
    if words == []:
        return
    case = bench.instruction(CASE)
    cased = _on(bench.vectors([case])[CASE])
    if words is None:
        steered = dict(words_used(bench, cased))
        plain = sorted(words_used(bench), key=lambda item: -min(item[1], steered.get(item[0], 0.0)))
        words = [word for word, _ in plain]
    for used in words[:1]:
        word, vector = excluding(bench, used)
        yield Composed((case, word), (cased, _on(vector)))


def _on(vector: ControlVector) -> ControlVector:
    """A vector that did nothing alone is tried at full strength beside another."""
    return vector if vector.strength else vector.at(strength=1.0)


# --- arrangements ------------------------------------------------------------------------------------------


def choose(bench: Bench, pairs: Sequence[Composed]) -> list[Composed]:
    """Each pair with the arrangements of both kinds whose replies to validation queries are best."""
    queries = {pair.label: pair.queries(bench, "validation")[:N_TRIED] for pair in pairs}
    tried = [(pair, steer) for pair in pairs for steer in arrangements(*pair.alone)]
    cells = [
        pair.cell(bench, "tried", query, steer) for pair, steer in tried for query in queries[pair.label]
    ]
    results = iter(bench.run(cells, what="choosing blocks", score=False))
    scores = [sum(_is_good(next(results)) for _ in queries[pair.label]) for pair, _ in tried]
    return [
        replace(pair, same=_best(pair, True, tried, scores), different=_best(pair, False, tried, scores))
        for pair in pairs
    ]


def arrangements(a: ControlVector, b: ControlVector) -> list[tuple[ControlVector, ControlVector]]:
    """The blocks around those that each was tuned to, in all combinations, at the same positions; without
    what a plan refuses (nearly parallel directions at one block). At their own strengths and at 1: one that
    suits a vector alone may be too much beside another."""
    strengths = dict.fromkeys([(a.strength, b.strength), (1.0, 1.0)])
    found = [
        (
            a.at(layer=i, positions=positions, strength=s),
            b.at(layer=j, positions=positions, strength=t),
        )
        for s, t in strengths
        for positions in POSITIONS
        for i, j in [
            *((il, il) for il in sorted({*_around(a), *_around(b)}) if il in a.blocks and il in b.blocks),
            *((i, j) for i, j in product(_around(a), _around(b)) if i != j),
        ]
    ]
    return [pair for pair in found if is_possible(pair)]


def _around(vector: ControlVector) -> list[int]:
    step = 1 if vector.n_layer <= FEW_BLOCKS else 2
    return [il for il in (vector.layers[0] + k * step for k in (-1, 0, 1)) if il in vector.blocks]


def _is_good(result: Result) -> bool:
    return bool(result.verdict.strict) and result.verdict.subject_kept is not False


def _best(
    pair: Composed, same: bool, tried: Sequence[Any], scores: Sequence[int]
) -> tuple[ControlVector, ...]:
    rows = [
        k
        for k, (each, (a, b)) in enumerate(tried)
        if each.label == pair.label and (a.layers == b.layers) == same
    ]
    return tried[max(rows, key=lambda k: (scores[k], -k))][1] if rows else ()


# --- cells -------------------------------------------------------------------------------------------------


def pair_cells(bench: Bench, pair: Composed) -> list[Cell]:
    a, b = pair.alone
    queries = pair.queries(bench, "test")
    steers = {"none": (), "first alone": (a,), "second alone": (b,)}
    steers |= bench.controls(pair.instructions, pair.same or pair.different)
    steers |= {name: found for name, found in ((SAME, pair.same), (DIFFERENT, pair.different)) if found}
    cells = [
        pair.cell(bench, name, query, steers[name])
        for name in CONDITIONS
        if name in steers
        for query in queries
    ]
    return cells + [pair.cell(bench, "instructed", query, told=i) for i, query in enumerate(queries)]


# --- sections ----------------------------------------------------------------------------------------------


def together(bench: Bench, pairs: Sequence[Composed], results: Sequence[Result]) -> dict[str, Any]:
    rows = []
    for pair in pairs:
        mine = [result for result in results if result.cell.instruction == pair.label]
        for name in CONDITIONS:
            found = [result for result in mine if result.cell.condition == name]
            if found:
                rows.append([pair.label, name, _where(pair, name), *_shares(bench, pair, found)])
    text = (
        "Shares of replies that follow the first instruction, the second, and both. `first alone` and "
        "`second alone` are the vectors as each was picked by itself; `same block` solves both jointly, "
        "`different blocks` has one at each; blocks and positions of the pair were chosen on validation "
        "queries. A vector in mode add (a word to avoid) is added after the solve. `random` has random "
        "directions in both places, `other` vectors of two other instructions (the last table)."
    )
    columns = ["pair", "condition", "blocks, positions", "first", "second", "both"]
    plot = {
        "kind": "bars",
        "title": "Both instructions hold",
        "x_label": "pair",
        "y_label": "share of replies",
        "x": [pair.label for pair in pairs],
        "series": {
            name: [_both(results, pair, name) for pair in pairs]
            for name in ("none", SAME, DIFFERENT, "random", "other")
        },
    }
    others = [[pair.label, " and ".join(each.id for each in others_of(bench, pair))] for pair in pairs]
    return {
        "title": "Both at once",
        "text": text,
        "tables": [
            {"columns": columns, "rows": rows},
            {"columns": ["pair", "whose vectors `other` has"], "rows": others},
        ],
        "plots": [plot],
    }


def others_of(bench: Bench, pair: Composed) -> list[Instruction]:
    return bench.others(*pair.instructions, n=2)


def _both(results: Sequence[Result], pair: Composed, condition: str) -> float | None:
    found = [
        bool(each.verdict.strict)
        for each in results
        if (each.cell.instruction, each.cell.condition) == (pair.label, condition)
    ]
    return sum(found) / len(found) if found else None


def _where(pair: Composed, condition: str) -> str:
    vectors = {
        "first alone": pair.alone[:1], "second alone": pair.alone[1:],
        SAME: pair.same, DIFFERENT: pair.different,
        "random": pair.same or pair.different, "other": pair.same or pair.different,
    }.get(condition, ())  # fmt: skip
    blocks = " and ".join(str(each.layers[0]) for each in vectors)
    return f"{blocks}, {vectors[0].positions}" if vectors else ""


def _shares(bench: Bench, pair: Composed, found: Sequence[Result]) -> list[Any]:
    """First, second, both."""
    parts = []
    for instruction in pair.instructions:
        cells = [replace(each.cell, checks=checks_of(instruction, each.cell.query)) for each in found]
        parts.append(_judged(bench, cells, [each.reply for each in found]))
    return [*parts, share_cell(figures(found))]


def _judged(bench: Bench, cells: Sequence[Cell], replies: Sequence[Reply]) -> dict[str, float | None]:
    must_end = bench.limits.must_end
    results = [
        Result(cell, reply, judge_cell(cell, reply, must_end=must_end))
        for cell, reply in zip(cells, replies, strict=True)
    ]
    return share_cell(figures(results))


# --- one after the other -----------------------------------------------------------------------------------


def in_turn(bench: Bench, pairs: Sequence[Composed], checkpoint: Path | None) -> list[dict[str, Any]]:
    """The joint solve beside two projections done in turn at the same block. A plan refuses that by design,
    so the states of plain prompts are edited here in numpy, and replies are PyTorch's where the model's
    checkpoint is known."""
    able = [pair for pair in pairs if pair.same and all(each.mode == "project" for each in pair.same)]
    if not able:
        return []
    text = (
        "At one block, two projections done in turn: the second moves the first off its target by its own "
        "change times the cosine of the two directions. Target missed: mean distance from its target after "
        "the edits, in units of the distance between the mean projections with and without the instruction, "
        f"over all tokens of {N_STATES} plain prompts; the target of the projection done last is always met. "
    )
    columns = ["pair", "block", "cosine", "joint misses", "first missed", "second missed"]
    rows = [_miss_row(bench, pair) for pair in able]
    tables = [{"columns": columns, "rows": rows}]
    replies = _reply_rows(bench, able, checkpoint)
    if replies:
        tables.append(
            {"columns": ["pair", "joint", "first, then second", "second, then first"], "rows": replies}
        )
        text += (
            "The second table is what that does to replies: both hold, in PyTorch on the float32 checkpoint "
            "that the GGUF was made of, at the same block and positions. " + _answer(replies)
        )
    else:
        text += "No replies were made this way: that takes PyTorch and the model's own checkpoint."
    return [{"title": "Solved jointly, or one after the other", "text": text, "tables": tables, "plots": []}]


def _answer(rows: Sequence[Sequence[Any]]) -> str:
    joint, *turns = (sum(row[k]["share"] for row in rows) / len(rows) for k in (1, 2, 3))
    best = max(turns)
    how = "beats" if joint > best + 0.005 else "equals" if joint > best - 0.005 else "does NOT beat"
    return (
        f"On average the joint solve ({joint:.0%}) {how} the better order of one after the other "
        f"({best:.0%}); the worse order has {min(turns):.0%}."
    )


def _miss_row(bench: Bench, pair: Composed) -> list[Any]:
    a, b = pair.same
    layer = a.layers[0]
    queries = bench.validation[:N_STATES]

    def states(engine: Engine, _: None) -> np.ndarray:
        prompts = [engine.prompt_tokens(query.text) for query in queries]
        return np.concatenate([engine.hidden_states(tokens, [layer])[:, 0] for tokens in prompts])

    (rows,) = bench.workers.map(states, [None])
    joint = edited(rows, layer, [[a, b]])
    cosine = float(a.unit(layer).astype(np.float64) @ b.unit(layer).astype(np.float64))
    return [
        pair.label,
        layer,
        cosine,
        max(missed(joint, a, layer), missed(joint, b, layer)),
        missed(edited(rows, layer, [[a], [b]]), a, layer),
        missed(edited(rows, layer, [[b], [a]]), b, layer),
    ]


def edited(rows: np.ndarray, layer: int, steps: Sequence[Sequence[ControlVector]]) -> np.ndarray:
    """rows: (n, n_embd). Each step's vectors are solved jointly, on what the step before left."""
    for vectors in steps:
        rows = apply_program(rows, Plan.from_vectors(vectors).program(layer, PositionClass.LAST))
    return rows


def missed(rows: np.ndarray, vector: ControlVector, layer: int) -> float:
    """Mean distance from the vector's target, in units of the distance with - without the instruction."""
    target, without = float(vector.mean_with[layer]), float(vector.mean_without[layer])
    reached = rows.astype(np.float64) @ vector.unit(layer).astype(np.float64)
    return float(np.abs(reached - target).mean() / abs(target - without))


def own_checkpoint(bench: Bench) -> Path | None:
    """The checkpoint of a bundled model's GGUF."""
    from localsteer import bundled

    if not bundled.is_available():
        return None
    folder = bundled.checkpoint_folder()
    return folder if bundled.checkpoint_hash(folder) in bench.workers.path.name else None


def _reply_rows(bench: Bench, pairs: Sequence[Composed], checkpoint: Path | None) -> list[list[Any]]:
    """Shares of replies where both hold: jointly, and in both orders. Empty without PyTorch."""
    if checkpoint is None:
        return []
    try:
        from localsteer.extract.torch_backend import TorchBackend
    except LocalsteerError:
        return []
    queries = bench.test[:N_REPLIES]
    # one thread: the bundled model is too narrow for two
    with TorchBackend(checkpoint, dtype="float32", device="cpu", n_threads=1) as backend:

        def work(engine: Engine, _: None) -> list[list[Any]]:
            rows = []
            for done, pair in enumerate(pairs):
                shares = [
                    _answered(bench, engine, backend.model, pair, queries, plans) for plans in _orders(pair)
                ]
                rows.append([pair.label, *shares])
                advance(done + 1, len(pairs))
            return rows

        with bench.stage("one after the other") as advance:
            return bench.workers.map(work, [None])[0]


def _orders(pair: Composed) -> list[list[Plan]]:
    a, b = pair.same
    return [[Plan.from_vectors(each) for each in steps] for steps in ([[a, b]], [[a], [b]], [[b], [a]])]


def _answered(
    bench: Bench, engine: Engine, model: Any, pair: Composed, queries: Sequence[Query], plans: Sequence[Plan]
) -> dict[str, float | None]:
    from localsteer.extract.torch_steering import greedy_tokens

    replies = []
    for query in queries:
        bench.workers.check()
        tokens = greedy_tokens(
            model,
            engine.prompt_tokens(query.text),
            plans,
            max_tokens=bench.max_tokens,
            ends=engine.ends,
        )
        text = b"".join(map(engine.piece, tokens)).decode("utf-8", "replace")
        replies.append(Reply(text, tokens, "length" if len(tokens) == bench.max_tokens else "stop"))
    cells = [pair.cell(bench, "in turn", query) for query in queries]
    return _judged(bench, cells, replies)
