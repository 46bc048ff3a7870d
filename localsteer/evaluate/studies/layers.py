"""Do PyTorch and the quantized engine agree on which layers can be steered?

Each extracts and steers by itself: PyTorch on the float32 checkpoint with the reference hooks, the engine on
the quantized file. The profile is the share of replies that follow, layer by layer, at fixed positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction
from localsteer.errors import LocalsteerError, ModelFileError
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Cell
from localsteer.evaluate.outcomes import Outcomes, judged
from localsteer.evaluate.page import Lines, Section, StudyReport, Table
from localsteer.evaluate.studies.common import StudyJob, by_layer, correlate, layer_map, profile, shares
from localsteer.evaluate.texts import section
from localsteer.extract import extract, open_backend
from localsteer.plan import Plan
from localsteer.runtime.journal import Journal
from localsteer.runtime.reply import Reply

if TYPE_CHECKING:
    from localsteer.extract.torch_backend import TorchBackend

NAME = "layers"
TITLE = "The layer profile: PyTorch and the quantized engine"
INSTRUCTIONS = ("json", "lowercase", "title", "one_sentence")
POSITIONS = ("prompt", "all")
N_QUERIES, QUICK_QUERIES = 10, 3


def run(job: StudyJob) -> StudyReport:
    """Raises LocalsteerError without a checkpoint, or without torch."""
    if job.checkpoint is None:
        raise LocalsteerError("a study of layers needs the checkpoint that the model was made from.")
    from localsteer.extract import torch_backend  # noqa: F401 - says at once that torch is missing

    # any other may be a name on the hub
    if job.checkpoint.is_absolute() and not job.checkpoint.is_dir():
        raise ModelFileError(f"there is no folder {job.checkpoint}.")
    positions = POSITIONS[:1] if job.quick else POSITIONS
    n = QUICK_QUERIES if job.quick else N_QUERIES
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        n = min(n, len(bench.validation))
        names = [f"{instruction.id}, {where}" for instruction in instructions for where in positions]
        raw = bench.vectors.raw(instructions)
        asked = by_layer(bench, [(each, raw[each.id]) for each in instructions], positions, n)
        ours = profile(bench, asked, "the engine, layer by layer")
        theirs = _torch_profile(bench, instructions, positions, n, job)
        engine, torch = np.array([ours, theirs], dtype=float).reshape(2, len(names), -1)
        model = bench.model
    return StudyReport(
        model=model,
        settings={"n": None, "n_validation": n},
        figures={
            "correlation": correlate(engine, torch),
            "mean_difference": float(np.abs(engine - torch).mean()),
            "rows": names,
            "engine": engine.tolist(),
            "torch": torch.tolist(),
            "queries": n,
        },
        sections=[_agreement(names, engine, torch, n, str(model.get("quantization") or model.get("name")))],
    )


def _torch_profile(
    bench: Bench, instructions: Sequence[Instruction], positions: Sequence[str], n: int, job: StudyJob
) -> list[float]:
    """Shares, as the engine's. Replies are kept in OUT/torch.jsonl."""
    with ExitStack() as stack:
        advance = stack.enter_context(bench.stage("PyTorch, layer by layer"))
        backend = stack.enter_context(open_backend(job.checkpoint, dtype="float32", n_threads=job.n_threads))
        journal = stack.enter_context(Journal(job.out / "torch.jsonl", {"model": backend.source_hash}))
        followed: list[float] = []
        total = len(instructions) * len(positions) * backend.n_layer
        for instruction in instructions:
            vector = extract(
                backend, instruction, bench.catalog.queries_for(instruction, "extraction"), mode="project"
            )
            (asked,) = by_layer(bench, [(instruction, vector)], positions, n)
            for arm in asked.arms:
                cells = replace(asked, arms=[arm]).cells(bench.max_tokens)
                followed.append(_share(bench, backend, journal, cells))
                advance(len(followed), total)
    return followed


def _share(bench: Bench, backend: TorchBackend, journal: Journal, cells: Sequence[Cell]) -> float:
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
    rows = [
        judged(cell, Reply(*reply), must_end=bench.limits.must_end)
        for cell, reply in zip(cells, journal.get(key)["replies"], strict=True)
    ]
    return Outcomes(rows).followed


def _agreement(
    names: Sequence[str], engine: np.ndarray, torch: np.ndarray, n: int, quantized: str
) -> Section:
    layers = list(range(engine.shape[1]))
    ours, theirs = f"engine, {quantized}", "PyTorch, float32"
    rows = []
    for name, *both in zip(names, engine, torch, strict=True):
        rows += [[name, ours, *shares(both[0])], ["", theirs, *shares(both[1])]]
    gap = np.abs(engine - torch)
    series = {ours: shares(engine.mean(axis=0)), theirs: shares(torch.mean(axis=0))}
    title = "Replies that follow, mean of all settings"
    means = Lines(title, "layer", "share of replies", x=layers, series=series)
    gaps = layer_map("Engine minus PyTorch", names, engine - torch)
    return section(
        "layers.agreement",
        Table(["setting", "by", *map(str, layers)], rows),
        means,
        gaps,
        settings=engine.size,
        correlation=correlate(engine, torch),
        mean=gap.mean(),
        most=gap.max(),
        n=n,
    )
