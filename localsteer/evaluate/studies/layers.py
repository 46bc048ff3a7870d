"""Do PyTorch and the quantized engine agree on which layers can be steered?

Each extracts and steers by itself: PyTorch on the float32 checkpoint with the reference hooks, the engine on
the quantized file. The profile is the share of replies that follow, layer by layer, at fixed positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localsteer.errors import LocalsteerError, ModelFileError
from localsteer.evaluate.page import Lines, Section, StudyReport, Table
from localsteer.evaluate.studies.common import StudyJob, by_layer, correlate, layer_map, profile, shares
from localsteer.evaluate.texts import section

NAME = "layers"
TITLE = "The layer profile: PyTorch and the quantized engine"
INSTRUCTIONS = ("json", "lowercase", "title", "one_sentence")
POSITIONS = ("prompt", "all")
N_QUERIES, QUICK_QUERIES = 10, 3


def run(job: StudyJob) -> StudyReport:
    """Raises LocalsteerError without a checkpoint, or without torch."""
    if job.checkpoint is None:
        raise LocalsteerError("a study of layers needs the checkpoint that the model was made from.")
    from localsteer.evaluate.studies.torch_profile import torch_profile  # says at once that torch is missing

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
        theirs = torch_profile(bench, instructions, positions, n, job)
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
