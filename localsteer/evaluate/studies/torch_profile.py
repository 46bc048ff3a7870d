"""The layer profile by PyTorch: vectors of the float32 checkpoint, and replies under the reference hooks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from localsteer.catalog import Instruction
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Cell
from localsteer.evaluate.outcomes import Outcomes, judged
from localsteer.evaluate.studies.common import StudyJob, by_layer
from localsteer.extract import extract, open_backend
from localsteer.extract.torch_backend import TorchBackend
from localsteer.extract.torch_replies import torch_replies
from localsteer.plan import Plan
from localsteer.runtime.journal import Journal
from localsteer.runtime.reply import Reply


def torch_profile(
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
