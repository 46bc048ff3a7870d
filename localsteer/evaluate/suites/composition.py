"""Two instructions at once: at one block, where their projections are solved jointly, or at two.

The paper's section 6. A format with a length, and a case with a word to avoid; each vector as it was picked
alone, then the pair's blocks chosen on validation queries by how often both hold. Beside it what happens when
the two projections at one block are done one after the other, as code without a joint solve does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import LocalsteerError
from localsteer.evaluate.conditions import arms_of, is_possible
from localsteer.evaluate.page import Bars, Section, Share, SuiteReport, Table, Value
from localsteer.evaluate.suites.cells import (
    Arm,
    Cell,
    Result,
    accuracy_of,
    judge_cell,
    label_of,
    rejudged,
    select,
    share_of,
)
from localsteer.evaluate.suites.words import contexts, excluding, words_to_exclude, words_used
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.reply import Reply
from localsteer.steering import apply_program
from localsteer.tune.setting import FEW_BLOCKS
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
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

    @property
    def label(self) -> str:
        return label_of(self.instructions)

    def queries(self, bench: Bench, split: str) -> tuple[Query, ...]:
        """Those of an instruction that has its own, else those of all."""
        first, second = self.instructions
        return bench.queries(second if split in second.queries else first, split)

    def cells(self, bench: Bench, arms: Sequence[Arm], queries: Sequence[Query]) -> list[Cell]:
        wording = " ".join(instruction.phrasings[0] for instruction in self.instructions)
        return bench.cells(self.instructions, arms, queries, wordings=[wording])


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
    return bench.report(TITLE, results, CONDITIONS, sections)


# --- which pairs -------------------------------------------------------------------------------------------


def pairs_of(bench: Bench) -> list[Composed]:
    """`named_pairs`, and a case with a word to exclude."""
    named = named_pairs(bench)
    vectors = bench.vectors(list(dict.fromkeys(name for pair in named for name in pair)))
    pairs = [
        Composed((bench.instruction(a), bench.instruction(b)), (_on(vectors[a]), _on(vectors[b])))
        for a, b in named
    ]
    return [*pairs, *_case_and_word(bench)]


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
    brought = list(contexts(bench))
    if bench.asked is not None:
        return [*brought, *words_to_exclude(bench)]
    return brought or None


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
        cell
        for pair, steer in tried
        for cell in pair.cells(bench, [Arm("tried", steer)], queries[pair.label])
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
    pairs = [
        (
            a.at(layer=i, positions=positions, strength=s),
            b.at(layer=j, positions=positions, strength=t),
        )
        for s, t in strengths
        for positions in POSITIONS
        for i, j in [
            *(
                (il, il)
                for il in sorted({*_around(a), *_around(b)})
                if il in a.usable_layers and il in b.usable_layers
            ),
            *((i, j) for i, j in product(_around(a), _around(b)) if i != j),
        ]
    ]
    return [pair for pair in pairs if is_possible(pair)]


def _around(vector: ControlVector) -> list[int]:
    step = 1 if vector.n_layer <= FEW_BLOCKS else 2
    return [il for il in (vector.layers[0] + k * step for k in (-1, 0, 1)) if il in vector.usable_layers]


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
    steers = {"none": (), **_vectors(pair), "instructed": ()}
    steers |= bench.controls(pair.instructions, pair.same or pair.different)
    kept = {name: steer for name, steer in steers.items() if steer or name in ("none", "instructed")}
    return pair.cells(bench, arms_of(kept, CONDITIONS), pair.queries(bench, "test"))


def _vectors(pair: Composed) -> dict[str, tuple[ControlVector, ...]]:
    """By condition."""
    a, b = pair.alone
    return {"first alone": (a,), "second alone": (b,), SAME: pair.same, DIFFERENT: pair.different}


# --- sections ----------------------------------------------------------------------------------------------


def together(bench: Bench, pairs: Sequence[Composed], results: Sequence[Result]) -> Section:
    text = (
        "Shares of replies that follow the first instruction, the second, and both. `first alone` and "
        "`second alone` are the vectors as each was picked by itself; `same block` solves both jointly, "
        "`different blocks` has one at each; blocks and positions of the pair were chosen on validation "
        "queries. A vector in mode add (a word to avoid) is added after the solve. `random` has random "
        "directions in both places, `other` vectors of two other instructions (the last table)."
    )
    rows = [
        [pair.label, name, _where(pair, name), *_shares(bench, pair, chosen)]
        for pair in pairs
        for name in CONDITIONS
        for chosen in [select(results, name, pair.label)]
        if chosen
    ]
    named = {pair.label: bench.others(*pair.instructions, n=2) for pair in pairs}
    others: list[list[Value]] = [
        [label, " and ".join(other.id for other in drawn)] for label, drawn in named.items()
    ]
    plot = Bars(
        title="Both instructions hold",
        x_label="pair",
        y_label="share of replies",
        x=list(named),
        series={
            name: [accuracy_of(select(results, name, label)) for label in named]
            for name in ("none", SAME, DIFFERENT, "random", "other")
        },
    )
    columns = ["pair", "condition", "blocks, positions", "first", "second", "both"]
    tables = [Table(columns, rows), Table(["pair", "whose vectors `other` has"], others)]
    return Section("Both at once", text, tables, [plot])


def _where(pair: Composed, condition: str) -> str:
    as_both = pair.same or pair.different
    vectors = ({"random": as_both, "other": as_both} | _vectors(pair)).get(condition, ())
    blocks = " and ".join(str(vector.layers[0]) for vector in vectors)
    return f"{blocks}, {vectors[0].positions}" if vectors else ""


def _shares(bench: Bench, pair: Composed, results: Sequence[Result]) -> list[Share]:
    """First, second, both."""
    parts = [rejudged(results, instruction, bench.limits.must_end) for instruction in pair.instructions]
    return [share_of(part) for part in (*parts, results)]


# --- one after the other -----------------------------------------------------------------------------------


def in_turn(bench: Bench, pairs: Sequence[Composed], checkpoint: Path | None) -> list[Section]:
    """The joint solve beside two projections done in turn at the same block. A plan refuses that by design,
    so the states of plain prompts are edited here in numpy, and replies are PyTorch's where the model's
    checkpoint is known."""
    able = [pair for pair in pairs if pair.same and all(vector.mode == "project" for vector in pair.same)]
    if not able:
        return []
    text = (
        "At one block, two projections done in turn: the second moves the first off its target by its own "
        "change times the cosine of the two directions. Target missed: mean distance from its target after "
        "the edits, in units of the distance between the mean projections with and without the instruction, "
        f"over all tokens of {N_STATES} plain prompts; the target of the projection done last is always met. "
    )
    columns = ["pair", "block", "cosine", "joint misses", "first missed", "second missed"]
    tables = [Table(columns, [_miss_row(bench, pair) for pair in able])]
    replies = _reply_rows(bench, able, checkpoint)
    if replies:
        tables.append(Table(["pair", "joint", "first, then second", "second, then first"], replies))
        text += (
            "The second table is what that does to replies: both hold, in PyTorch on the float32 checkpoint "
            "that the GGUF was made of, at the same block and positions. " + _answer(replies)
        )
    else:
        text += "No replies were made this way: that takes PyTorch and the model's own checkpoint."
    return [Section("Solved jointly, or one after the other", text, tables)]


def _answer(rows: Sequence[Sequence[Any]]) -> str:
    joint, *turns = (sum(row[k].share for row in rows) / len(rows) for k in (1, 2, 3))
    best = max(turns)
    how = "beats" if joint > best + 0.005 else "equals" if joint > best - 0.005 else "does NOT beat"
    return (
        f"On average the joint solve ({joint:.0%}) {how} the better order of one after the other "
        f"({best:.0%}); the worse order has {min(turns):.0%}."
    )


def _miss_row(bench: Bench, pair: Composed) -> list[Value]:
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


def _reply_rows(bench: Bench, pairs: Sequence[Composed], checkpoint: Path | None) -> list[list[Value]]:
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

        def work(engine: Engine, _: None) -> list[list[Value]]:
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
    return [[Plan.from_vectors(step) for step in steps] for steps in ([[a, b]], [[a], [b]], [[b], [a]])]


def _answered(
    bench: Bench, engine: Engine, model: Any, pair: Composed, queries: Sequence[Query], plans: Sequence[Plan]
) -> Share:
    from localsteer.extract.torch_steering import greedy_tokens

    results = []
    for cell in pair.cells(bench, [Arm("in turn")], queries):
        bench.workers.check()
        ids, ends = engine.prompt_tokens(cell.prompt), engine.ends
        tokens = greedy_tokens(model, ids, plans, max_tokens=cell.max_tokens, ends=ends)
        text = b"".join(map(engine.piece, tokens)).decode("utf-8", "replace")
        reply = Reply(text, tokens, "length" if len(tokens) == cell.max_tokens else "stop")
        results.append(Result(cell, reply, judge_cell(cell, reply, must_end=bench.limits.must_end)))
    return share_of(results)
