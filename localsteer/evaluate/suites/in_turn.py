"""The joint solve of two projections at one layer, beside the two done one after the other: what code without
a joint solve does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Query
from localsteer.errors import LocalsteerError
from localsteer.evaluate.cells import Arm
from localsteer.evaluate.outcomes import Outcomes, judged
from localsteer.evaluate.page import Section, Share, Table, Value
from localsteer.evaluate.suites.composed import Composed
from localsteer.evaluate.texts import said, section
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.reply import Reply
from localsteer.steering import apply_program
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.bench import Bench

N_STATES = 8  # plain prompts whose states are edited both ways
N_REPLIES = 20  # test queries answered by PyTorch, one after the other


def in_turn(bench: Bench, pairs: Sequence[Composed], checkpoint: Path | None) -> list[Section]:
    """The joint solve beside two projections done in turn at the same layer. A plan refuses that by design,
    so the states of plain prompts are edited here in numpy, and replies are PyTorch's where the model's
    checkpoint is known."""
    able = [pair for pair in pairs if pair.same and all(vector.mode == "project" for vector in pair.same)]
    if not able:
        return []
    columns = ["pair", "layer", "cosine", "joint misses", "first missed", "second missed"]
    tables = [Table(columns, [_miss_row(bench, pair) for pair in able])]
    replies = _reply_rows(bench, able, checkpoint)
    if replies:
        tables.append(Table(["pair", "joint", "first, then second", "second, then first"], replies))
    more = _answer(replies) if replies else said("in_turn.no_replies")
    return [section("in_turn", *tables, states=N_STATES, more=more)]


def _answer(rows: Sequence[Sequence[Any]]) -> str:
    joint, *turns = (sum(row[k].share for row in rows) / len(rows) for k in (1, 2, 3))
    best = max(turns)
    how = "beats" if joint > best + 0.005 else "equals" if joint > best - 0.005 else "does NOT beat"
    return said("in_turn.replies", joint=joint, how=how, best=best, worst=min(turns))


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

    rows = []
    for cell in pair.experiment(bench, [Arm("in turn")], queries).cells(bench.max_tokens):
        bench.workers.check()
        ids, ends = engine.prompt_tokens(cell.prompt), engine.ends
        tokens = greedy_tokens(model, ids, plans, max_tokens=cell.max_tokens, ends=ends)
        text = b"".join(map(engine.piece, tokens)).decode("utf-8", "replace")
        reply = Reply(text, tokens, "length" if len(tokens) == cell.max_tokens else "stop")
        rows.append(judged(cell, reply, must_end=bench.limits.must_end))
    return Outcomes(rows).share
