"""What quantization does to directions, to mean projections, and to steering with them.

Settings are picked once per instruction on the most exact file and used on all, so that nothing but the
numbers differs. On each file: the vector of the most exact one as it is, with its mean projections measured
again (`localsteer calibrate`), and extracted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localsteer.catalog import Instruction
from localsteer.errors import LocalsteerError
from localsteer.evaluate.calibrate import Calibration, calibrate
from localsteer.evaluate.conditions import random_control
from localsteer.evaluate.studies.common import (
    StudyJob,
    accuracy_of,
    cells_for,
    grouped,
    heatmap,
    lines,
    other_vector,
    percent,
    section,
    share_of,
    table,
    working,
)
from localsteer.evaluate.suites.bench import Bench
from localsteer.evaluate.suites.cells import Result, difference
from localsteer.extract import build_pairs
from localsteer.vector import ControlVector

NAME = "quantization"
TITLE = "What quantization does to steering"
QUANTS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
QUICK_QUANTS = ("F16", "Q4_0", "Q2_K")
INSTRUCTIONS = (
    "json", "lowercase", "bullets", "title", "no_comma", "spanish", "one_sentence", "five_sentences",
)  # fmt: skip
CONDITIONS = ("none", "instructed", "reference", "recalibrated", "re-extracted", "random", "other")
SURE = 0.02  # a smaller difference is of no use, even where it is certain


@dataclass(frozen=True)
class Measured:
    """One file. calibrations: by instruction id."""

    label: str
    size: int
    calibrations: dict[str, Calibration]
    results: list[Result]

    def column(self, what: str, layers: dict[str, int]) -> list[float]:
        """`cosines` or `drift` at each instruction's steered block."""
        return [float(getattr(done, what)[layers[name]]) for name, done in self.calibrations.items()]

    def over_instructions(self, what: str, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(n_layer,): mean of a measure of `cosines` or `drift`."""
        return np.nanmean([measure(getattr(done, what)) for done in self.calibrations.values()], axis=0)

    def share(self, condition: str) -> dict[str, float | None]:
        return share_of(self.of(condition))

    def of(self, condition: str) -> list[Result]:
        return grouped(self.results, "condition").get((condition,), [])


def run(job: StudyJob) -> dict[str, Any]:
    """Raises LocalsteerError for fewer than two files, MismatchError for one of another model."""
    files = job.files[:1] if not job.files else job.files
    if len(files) < 2:
        raise LocalsteerError("a study of quantization needs two files or more of one checkpoint.")
    with job.bench(files[0][1], files[0][0]) as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors(instructions)
        instructions, left_out = working(instructions, vectors)
        model = bench.model
    for label, path in files[1:]:  # of all of them, before the first is measured
        with job.bench(path, label) as bench:
            bench.workers.map(lambda engine, vector: engine.plan(vector), [*vectors.values()][:1])
    measured = []
    for label, path in files:
        with job.bench(path, label) as bench:
            measured.append(_measure(bench, label, path.stat().st_size, instructions, vectors))
    layers = {each.id: vectors[each.id].layers[0] for each in instructions}
    advice = what_to_do(measured, layers)
    return {
        "model": model,
        "figures": {"files": [_figures(each, layers) for each in measured], "advice": advice},
        "sections": _sections(measured, instructions, vectors, layers, advice, left_out),
    }


def _measure(
    bench: Bench,
    label: str,
    size: int,
    instructions: Sequence[Instruction],
    vectors: dict[str, ControlVector],
) -> Measured:
    def calibrated(engine: Any, instruction: Instruction) -> Calibration:
        queries = bench.catalog.queries_for(instruction, "extraction")
        return calibrate(engine, vectors[instruction.id], build_pairs(instruction, queries))

    with bench.stage(f"{label}: calibrating") as advance:
        found = bench.workers.map(calibrated, instructions, advance)
    calibrations = {each.id: done for each, done in zip(instructions, found, strict=True)}
    cells = []
    for each in instructions:
        vector, done = vectors[each.id], calibrations[each.id]
        steers = {
            "reference": vector,
            "recalibrated": done.vector,
            "re-extracted": done.fresh,
            "random": random_control(vector, bench.plain_mean(), bench.seed),
            "other": other_vector(each, instructions, vectors),
        }
        cells += cells_for(bench, each, "none") + cells_for(bench, each, "instructed", told=True)
        for name, steer in steers.items():
            cells += cells_for(bench, each, name, [steer]) if steer is not None else []
    results = bench.run(cells, what=f"{label}: asking", score=False)
    return Measured(label, size, calibrations, results)


def what_to_do(measured: Sequence[Measured], layers: dict[str, int]) -> str:
    """For a user, from the figures alone: the coarsest file that the exact vector still works on, whether
    calibrating or extracting anew is worth the time, and where the model itself gives up."""
    first = measured[0]
    sentences = []
    held, lost = [], []
    for each in measured[1:]:
        found = difference(each.of("reference"), first.of("reference"))
        (lost if found["high"] < 0 or found["share"] < -0.1 else held).append((each, found["share"]))
    if held:
        names = ", ".join(each.label for each, _ in held)
        sentences.append(f"A vector made on {first.label} steers {names} as it is, without a sure loss.")
    for each, share in lost:
        text = f"On {each.label} it loses {-share:.0%} of replies"
        mended = [name for name in ("recalibrated", "re-extracted") if _gains(each, name)]
        text += (
            f"; {' and '.join(mended)} vectors win some back." if mended else "; no other vector does better."
        )
        sentences.append(text)
    gains = [
        (each.label, name)
        for each, _ in held
        for name in ("recalibrated", "re-extracted")
        if _gains(each, name)
    ]
    if gains:
        named = ", ".join(f"{name} on {label}" for label, name in gains)
        sentences.append(f"Worth the minute that it takes: {named}.")
    else:
        sentences.append("Where the vector holds, neither recalibrating nor extracting anew helps surely.")
    told = [each.label for each in measured if _below(each, first, "instructed")]
    if told:
        sentences.append(
            f"Told in words, too, the model follows less on {', '.join(told)}: what is lost there is the "
            "model's own ability."
        )
    return " ".join(sentences)


def _gains(each: Measured, name: str) -> bool:
    found = difference(each.of(name), each.of("reference"))
    return found["low"] > 0 and found["share"] >= SURE


def _below(each: Measured, first: Measured, condition: str) -> bool:
    return difference(each.of(condition), first.of(condition))["high"] < -SURE


def _figures(each: Measured, layers: dict[str, int]) -> dict[str, Any]:
    groups = grouped(each.results, "instruction", "condition")
    return {
        "quantization": each.label,
        "bytes": each.size,
        "cosines": {name: done.cosines.tolist() for name, done in each.calibrations.items()},
        "drift": {name: done.drift.tolist() for name, done in each.calibrations.items()},
        "followed": {name: each.share(name) for name in CONDITIONS},
        "instructions": {f"{a} {b}": accuracy_of(found) for (a, b), found in groups.items()},
        "steered_block": layers,
    }


def _sections(
    measured: Sequence[Measured],
    instructions: Sequence[Instruction],
    vectors: dict[str, ControlVector],
    layers: dict[str, int],
    advice: str,
    left_out: str,
) -> list[dict[str, Any]]:
    first, labels = measured[0], [each.label for each in measured]
    named = ", ".join(
        f"{each.id} (block {layers[each.id]}, {vectors[each.id].positions})" for each in instructions
    )
    columns = ("file", "MB", "cosine", "lowest", "drift", *CONDITIONS)
    rows = [_row(each, layers) for each in measured]
    shown = [name for name in CONDITIONS if name != "other"]
    followed = {name: [each.share(name) for each in measured] for name in shown}
    differences = [[each.label, *_differences(each, first)] for each in measured]
    angles = [each.over_instructions("cosines", angle) for each in measured]
    drift = [each.over_instructions("drift", np.abs) for each in measured]
    blocks = range(len(drift[0]))
    return [
        section("What a user should do", advice),
        section(
            "Steering on each file",
            f"Reference: the vector extracted on {first.label}. Settings picked there on validation queries: "
            f"{named}. Cosine: between the reference direction and the file's own at the steered block, mean "
            "and lowest over the instructions. Drift: how far the mean projection with the instruction has "
            "moved, in units of the distance that the instruction moves it (mean of absolute values). "
            f"{left_out}",
            [table(columns, rows)],
            [lines("Replies that follow", "file", "share of replies", labels, followed)],
        ),
        section(
            "Differences",
            "Paired over queries, with 95% intervals: recalibrated and re-extracted against the reference "
            f"vector on the same file, and the reference vector against itself on {first.label}.",
            [
                table(
                    ("file", "recalibrated", "re-extracted", f"reference against {first.label}"), differences
                )
            ],
        ),
        section(
            "By instruction",
            "Replies that follow with the reference vector, and told in words.",
            [_by_instruction(measured, instructions)],
        ),
        section(
            "Directions and projections by block",
            "Means over the instructions.",
            [],
            [
                heatmap(
                    "Angle to the reference direction, degrees",
                    "block",
                    "file",
                    labels,
                    blocks,
                    _lists(angles),
                ),
                heatmap("Drift of the mean projection", "block", "file", labels, blocks, _lists(drift)),
            ],
        ),
    ]


def _row(each: Measured, layers: dict[str, int]) -> list[Any]:
    cosines, drift = each.column("cosines", layers), each.column("drift", layers)
    found = (np.mean(cosines), min(cosines), np.mean(np.abs(drift)))
    numbers = [f"{each.size / 1e6:.1f}", *(f"{value:.4f}" for value in found)]
    return [each.label, *numbers, *(each.share(name) for name in CONDITIONS)]


def _differences(each: Measured, first: Measured) -> list[dict[str, float | None]]:
    found = [difference(each.of(name), each.of("reference")) for name in ("recalibrated", "re-extracted")]
    return [*found, difference(each.of("reference"), first.of("reference"))]


def angle(cosines: np.ndarray) -> np.ndarray:
    """Degrees."""
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))


def _by_instruction(measured: Sequence[Measured], instructions: Sequence[Instruction]) -> dict[str, Any]:
    rows = []
    for each in instructions:
        cells = []
        for file in measured:
            groups = grouped(file.results, "instruction", "condition")
            steered, told = (accuracy_of(groups[each.id, name]) for name in ("reference", "instructed"))
            cells.append(f"{percent(steered)} / {percent(told)}")
        rows.append([each.id, *cells])
    return table(("steered / told", *(file.label for file in measured)), rows)


def _lists(rows: Sequence[np.ndarray]) -> list[list[float]]:
    return [[round(float(value), 3) for value in row] for row in rows]
