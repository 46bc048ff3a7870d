"""Do PyTorch and the quantized engine agree on which blocks can be steered?

Each extracts and steers by itself: PyTorch on the float32 checkpoint with the reference hooks, the engine on
the quantized file. The profile is the share of replies that follow, block by block, at fixed positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import LocalsteerError, ModelFileError
from localsteer.evaluate.journal import Journal
from localsteer.evaluate.studies.common import (
    StudyJob,
    accuracy_of,
    cells_for,
    heatmap,
    lines,
    section,
    table,
)
from localsteer.evaluate.suites.bench import Bench
from localsteer.evaluate.suites.cells import Cell, judge_cell
from localsteer.extract import extract, open_backend
from localsteer.plan import Plan
from localsteer.runtime.reply import Reply
from localsteer.vector import ControlVector

NAME = "layers"
TITLE = "The layer profile: PyTorch and the quantized engine"
INSTRUCTIONS = ("json", "lowercase", "title", "one_sentence")
POSITIONS = ("prompt", "all")
N_QUERIES, QUICK_QUERIES = 10, 3


def run(job: StudyJob) -> dict[str, Any]:
    """Raises LocalsteerError without a checkpoint, or without torch."""
    if job.checkpoint is None:
        raise LocalsteerError("a study of layers needs the checkpoint that the model was made from.")
    from localsteer.extract import torch_backend  # noqa: F401 - says at once that torch is missing

    # any other may be a name on the hub
    if job.checkpoint.is_absolute() and not job.checkpoint.is_dir():
        raise ModelFileError(f"there is no folder {job.checkpoint}.")
    positions = POSITIONS[:1] if job.quick else POSITIONS
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        queries = bench.validation[: QUICK_QUERIES if job.quick else N_QUERIES]
        raw = bench.raw(instructions)
        engine = _engine_profile(bench, instructions, raw, positions, queries)
        torch = _torch_profile(bench, instructions, positions, queries, job)
        model = bench.model
    correlation = correlate(engine, torch)
    mean_gap = float(np.abs(engine - torch).mean())
    said = (
        f"Over {engine.size} settings of block, positions and instruction the two shares correlate at "
        f"{correlation:.3f}; they are {mean_gap:.1%} apart on average, and "
        f"{np.abs(engine - torch).max():.0%} at most."
    )
    names = [f"{each.id}, {where}" for each in instructions for where in positions]
    return {
        "model": model,
        "settings": {"n": None, "n_validation": len(queries)},
        "figures": {
            "correlation": correlation,
            "mean_difference": mean_gap,
            "rows": names,
            "engine": engine.tolist(),
            "torch": torch.tolist(),
            "queries": len(queries),
        },
        "sections": _sections(names, engine, torch, said, len(queries), model),
    }


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _cells(
    bench: Bench, each: Instruction, vector: ControlVector, where: str, queries: Sequence[Query]
) -> list[list[Cell]]:
    """For each block."""
    settings = (
        {"layer": il, "positions": where, "mode": "project", "strength": 1.0} for il in range(vector.n_layer)
    )
    return [
        cells_for(bench, each, f"{where} {i}", [vector.at(**setting)], queries=queries)
        for i, setting in enumerate(settings)
    ]


def _engine_profile(
    bench: Bench,
    instructions: Sequence[Instruction],
    raw: dict[str, ControlVector],
    positions: Sequence[str],
    queries: Sequence[Query],
) -> np.ndarray:
    """(rows, n_layer) shares."""
    blocks = [
        _cells(bench, each, raw[each.id], where, queries) for each in instructions for where in positions
    ]
    flat = [cell for row in blocks for cells in row for cell in cells]
    results = bench.run(flat, what="the engine, block by block", score=False)
    shares = [accuracy_of(results[i : i + len(queries)]) for i in range(0, len(results), len(queries))]
    return np.array(shares, dtype=float).reshape(len(blocks), -1)


def _torch_profile(
    bench: Bench,
    instructions: Sequence[Instruction],
    positions: Sequence[str],
    queries: Sequence[Query],
    job: StudyJob,
) -> np.ndarray:
    """(rows, n_layer) shares. Replies are kept in OUT/torch.jsonl, as the engine's are."""
    profile = []
    with ExitStack() as stack:
        advance = stack.enter_context(bench.stage("PyTorch, block by block"))
        backend = stack.enter_context(open_backend(job.checkpoint, dtype="float32", n_threads=job.n_threads))
        journal = stack.enter_context(Journal(job.out / "torch.jsonl", {"model": backend.source_hash}))
        total = len(instructions) * len(positions) * backend.n_layer
        for each in instructions:
            vector = extract(backend, each, bench.catalog.queries_for(each, "extraction"), mode="project")
            for where in positions:
                row = []
                for cells in _cells(bench, each, vector, where, queries):
                    row.append(_share(bench, backend, journal, cells))
                    advance(len(profile) * backend.n_layer + len(row), total)
                profile.append(row)
    return np.array(profile)


def _share(bench: Bench, backend: Any, journal: Journal, cells: Sequence[Cell]) -> float:
    from localsteer.extract.torch_replies import torch_replies

    plan = Plan.from_vectors(cells[0].steer)
    prompts = [
        backend.tokenize(backend.template.render([{"role": "user", "content": c.prompt}])) for c in cells
    ]
    content = f"torch {backend.source_hash} {plan.key.hex()} {prompts} {cells[0].max_tokens}"
    key = hashlib.sha256(content.encode()).hexdigest()
    known = journal.get(key)
    if known is None or len(known["replies"]) != len(cells):
        replies = torch_replies(backend, prompts, plan, max_tokens=cells[0].max_tokens)
        journal.put(key, {"kind": "torch", "replies": [[r.text, r.tokens, r.finish_reason] for r in replies]})
        known = journal.get(key)
    replies = [Reply(*each) for each in known["replies"]]
    judged = [
        judge_cell(cell, reply, must_end=bench.limits.must_end)
        for cell, reply in zip(cells, replies, strict=True)
    ]
    return float(np.mean([bool(verdict.strict) for verdict in judged]))


def _sections(
    names: Sequence[str], engine: np.ndarray, torch: np.ndarray, said: str, n: int, model: dict[str, Any]
) -> list[dict[str, Any]]:
    blocks = list(range(engine.shape[1]))
    quantized = str(model.get("quantization") or model.get("name"))
    rows = []
    for name, ours, theirs in zip(names, engine, torch, strict=True):
        rows.append([name, f"engine, {quantized}", *({"share": float(v)} for v in ours)])
        rows.append(["", "PyTorch, float32", *({"share": float(v)} for v in theirs)])
    mean = {
        f"engine, {quantized}": [{"share": float(v)} for v in engine.mean(axis=0)],
        "PyTorch, float32": [{"share": float(v)} for v in torch.mean(axis=0)],
    }
    return [
        section(
            "Agreement",
            f"{said} Each setting is tried on {n} validation queries with strength 1.",
            [table(("setting", "by", *map(str, blocks)), rows)],
            [
                lines("Replies that follow, mean of all settings", "block", "share of replies", blocks, mean),
                heatmap(
                    "Engine minus PyTorch", "block", "", names, blocks, (engine - torch).round(3).tolist()
                ),
            ],
        )
    ]
