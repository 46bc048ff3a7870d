"""What quantization does to directions, to mean projections, and to steering with them.

Settings are picked once per instruction on the most exact file and used on all, so that nothing but the
numbers differs. On each file: the vector of the most exact one as it is, with its mean projections measured
again (`localsteer calibrate`), and extracted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction
from localsteer.errors import LocalsteerError
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Experiment, arms_of
from localsteer.evaluate.controls import controls_of
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Lines, Section, Share, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.common import StudyJob, layer_map, other_vector, working
from localsteer.extract import build_pairs
from localsteer.extract.calibrate import Calibration, calibrate
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine

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
    """One file. calibrations: by instruction id, whose steered layers are `layers`."""

    label: str
    size: int
    calibrations: dict[str, Calibration]
    layers: dict[str, int]
    rows: Outcomes

    def column(self, what: str) -> list[float]:
        """`cosines` or `drift` at each instruction's steered layer."""
        return [float(getattr(done, what)[self.layers[name]]) for name, done in self.calibrations.items()]

    def over_instructions(self, what: str, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(n_layer,): mean of a measure of `cosines` or `drift`."""
        return np.nanmean([measure(getattr(done, what)) for done in self.calibrations.values()], axis=0)

    def share(self, condition: str) -> Share:
        return self.rows.of(condition).share

    def gain(self, condition: str) -> Share:
        """Over the reference vector on this file."""
        return self.rows.of(condition).minus(self.rows.of("reference"))

    def gains(self, condition: str) -> bool:
        gain = self.gain(condition)
        return gain.low > 0 and gain.share >= SURE

    def against(self, first: Measured, condition: str) -> Share:
        return self.rows.of(condition).minus(first.rows.of(condition))


def run(job: StudyJob) -> StudyReport:
    """Raises LocalsteerError for fewer than two files, MismatchError for one of another model."""
    if len(job.files) < 2:
        raise LocalsteerError("a study of quantization needs two files or more of one checkpoint.")
    label, path = job.files[0]
    with job.bench(path, label) as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors(instructions)
        instructions, left_out = working(instructions, vectors)
        model = bench.model
    for label, path in job.files[1:]:  # of all of them, before the first is measured
        with job.bench(path, label) as bench:
            bench.workers.map(lambda engine, vector: engine.plan(vector), [*vectors.values()][:1])
    measured = []
    for label, path in job.files:
        with job.bench(path, label) as bench:
            measured.append(_measure(bench, label, path.stat().st_size, instructions, vectors))
    advice = what_to_do(measured)
    named = ", ".join(
        f"{instruction.id} (layer {vectors[instruction.id].layers[0]}, {vectors[instruction.id].positions})"
        for instruction in instructions
    )
    return StudyReport(
        model=model,
        figures={"files": [_figures(file) for file in measured], "advice": advice},
        sections=[
            Section("What a user should do", advice),
            _steering(measured, named, left_out),
            _differences(measured),
            _by_instruction(measured, [each.id for each in instructions]),
            _by_layer(measured),
        ],
    )


def _measure(
    bench: Bench,
    label: str,
    size: int,
    instructions: Sequence[Instruction],
    vectors: Mapping[str, ControlVector],
) -> Measured:
    def work(engine: Engine, instruction: Instruction) -> Calibration:
        queries = bench.catalog.queries_for(instruction, "extraction")
        return calibrate(engine, vectors[instruction.id], build_pairs(instruction, queries))

    with bench.stage(f"{label}: calibrating") as advance:
        done = bench.workers.map(work, instructions, advance)
    calibrations = {each.id: calibration for each, calibration in zip(instructions, done, strict=True)}
    others = {each.id: other_vector(each, instructions, vectors) for each in instructions}
    asked = [_conditions(bench, each, calibrations[each.id], others[each.id]) for each in instructions]
    rows = bench.run(asked, what=f"{label}: asking", score=False)
    layers = {each.id: vectors[each.id].layers[0] for each in instructions}
    return Measured(label, size, calibrations, layers, rows)


def _conditions(
    bench: Bench, instruction: Instruction, calibration: Calibration, other: ControlVector | None
) -> Experiment:
    vector = calibration.before
    steers = {
        "none": (),
        "instructed": (),
        "reference": (vector,),
        "recalibrated": (calibration.vector,),
        "re-extracted": (calibration.fresh,),
        **controls_of([vector], [other] if other else [], bench.plain_mean(), bench.seed),
    }
    return bench.experiment(instruction, arms_of(steers, CONDITIONS))


def what_to_do(measured: Sequence[Measured]) -> str:
    """For a user, from the figures alone: the coarsest file that the exact vector still works on, whether
    calibrating or extracting anew is worth the time, and where the model itself gives up."""
    first, anew = measured[0], ("recalibrated", "re-extracted")
    changes = {file.label: file.against(first, "reference") for file in measured[1:]}
    lost = {name: change for name, change in changes.items() if change.high < 0 or change.share < -0.1}
    gains = {file.label: [name for name in anew if file.gains(name)] for file in measured[1:]}
    held = [name for name in changes if name not in lost]
    sentences = []
    if held:
        sentences.append(
            f"A vector made on {first.label} steers {', '.join(held)} as it is, without a sure loss."
        )
    for name, change in lost.items():
        mended = f"{' and '.join(gains[name])} vectors win some back" if gains[name] else ""
        sentences.append(
            f"On {name} it loses {-change.share:.0%} of replies; {mended or 'no other vector does better'}."
        )
    worth = [f"{kind} on {name}" for name in held for kind in gains[name]]
    sentences.append(
        f"Worth the minute that it takes: {', '.join(worth)}."
        if worth
        else "Where the vector holds, recalibrating and extracting anew bring no gain beyond chance."
    )
    told = [file.label for file in measured if file.against(first, "instructed").high < -SURE]
    if told:
        sentences.append(
            f"Told in words, too, the model follows less on {', '.join(told)}: what is lost there is the "
            "model's own ability."
        )
    return " ".join(sentences)


def _figures(file: Measured) -> dict[str, Any]:
    parts = file.rows.by("instruction", "condition")
    return {
        "quantization": file.label,
        "bytes": file.size,
        "cosines": {name: done.cosines.tolist() for name, done in file.calibrations.items()},
        "drift": {name: done.drift.tolist() for name, done in file.calibrations.items()},
        "followed": {name: file.share(name) for name in CONDITIONS},
        "instructions": {f"{a} {b}": rows.followed for (a, b), rows in parts.items()},
        "steered_layer": file.layers,
    }


def _steering(measured: Sequence[Measured], named: str, left_out: str) -> Section:
    rows: list[list[Value]] = []
    for file in measured:
        cosines, drift = file.column("cosines"), np.abs(file.column("drift"))
        numbers = (f"{value:.4f}" for value in (np.mean(cosines), min(cosines), np.mean(drift)))
        rows.append([file.label, f"{file.size / 1e6:.1f}", *numbers, *map(file.share, CONDITIONS)])
    shown = [name for name in CONDITIONS if name != "other"]
    plot = Lines(
        title="Replies that follow",
        x_label="file",
        y_label="share of replies",
        x=[file.label for file in measured],
        series={name: [file.share(name) for file in measured] for name in shown},
    )
    return Section(
        "Steering on each file",
        f"Reference: the vector extracted on {measured[0].label}. Settings picked there on validation "
        f"queries: {named}. Cosine: between the reference direction and the file's own at the steered layer, "
        "mean and lowest over the instructions. Drift: how far the mean projection with the instruction has "
        "moved, in units of the distance that the instruction moves it (mean of absolute values). "
        f"{left_out}",
        [Table(["file", "MB", "cosine", "lowest", "drift", *CONDITIONS], rows)],
        [plot],
    )


def _differences(measured: Sequence[Measured]) -> Section:
    first = measured[0]
    rows = [
        [file.label, file.gain("recalibrated"), file.gain("re-extracted"), file.against(first, "reference")]
        for file in measured
    ]
    return Section(
        "Differences",
        "Paired over queries, with 95% intervals: recalibrated and re-extracted against the reference "
        f"vector on the same file, and the reference vector against itself on {first.label}.",
        [Table(["file", "recalibrated", "re-extracted", f"reference against {first.label}"], rows)],
    )


def _by_instruction(measured: Sequence[Measured], names: Sequence[str]) -> Section:
    rows = [
        [name, *(" / ".join(rough_percent(file.rows.of(kind, name).followed)
                            for kind in ("reference", "instructed")) for file in measured)]
        for name in names
    ]  # fmt: skip
    return Section(
        "By instruction",
        "Replies that follow with the reference vector, and told in words.",
        [Table(["steered / told", *(file.label for file in measured)], rows)],
    )


def _by_layer(measured: Sequence[Measured]) -> Section:
    maps = {
        "Angle to the reference direction, degrees": [
            file.over_instructions("cosines", angle) for file in measured
        ],
        "Drift of the mean projection": [file.over_instructions("drift", np.abs) for file in measured],
    }
    labels = [file.label for file in measured]
    plots = [layer_map(title, labels, values, y_label="file") for title, values in maps.items()]
    return Section("Directions and projections by layer", "Means over the instructions.", [], plots)


def angle(cosines: np.ndarray) -> np.ndarray:
    """Degrees."""
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
