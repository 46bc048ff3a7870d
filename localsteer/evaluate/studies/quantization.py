"""What quantization does to directions, to mean projections, and to steering with them.

Settings are picked once per instruction on the most exact file and used on all, so that nothing but the
numbers differs. On each file: the vector of the most exact one as it is, with its mean projections measured
again (`localsteer calibrate`), and extracted anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localsteer.errors import LocalsteerError
from localsteer.evaluate.page import Lines, Section, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.common import StudyJob, layer_map, working
from localsteer.evaluate.studies.quantized import CONDITIONS, Measured, measure, what_to_do
from localsteer.evaluate.texts import section

NAME, TITLE = "quantization", "What quantization does to steering"
QUANTS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
QUICK_QUANTS = ("F16", "Q4_0", "Q2_K")
INSTRUCTIONS = (
    "json", "lowercase", "bullets", "title", "no_comma", "spanish", "one_sentence", "five_sentences",
)  # fmt: skip


def run(job: StudyJob) -> StudyReport:
    """Raises LocalsteerError for fewer than two files, MismatchError for one of another model."""
    if len(job.files) < 2:
        raise LocalsteerError("a study of quantization needs two files or more of one checkpoint.")
    label, path = job.files[0]
    with job.bench(path, label) as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors.tuned(instructions)
        instructions, left_out = working(instructions, vectors)
        model = bench.model
    for label, path in job.files[1:]:  # of all of them, before the first is measured
        with job.bench(path, label) as bench:
            bench.workers.map(lambda engine, vector: engine.plan(vector), [*vectors.values()][:1])
    measured = []
    for label, path in job.files:
        with job.bench(path, label) as bench:
            measured.append(measure(bench, label, path.stat().st_size, instructions, vectors))
    advice, ids = what_to_do(measured), [instruction.id for instruction in instructions]
    places = ((name, vectors[name].layers[0], vectors[name].positions) for name in ids)
    named = ", ".join(f"{name} (layer {layer}, {positions})" for name, layer, positions in places)
    return StudyReport(
        model=model,
        figures={"files": [file.figures() for file in measured], "advice": advice},
        sections=[
            section("quantization.advice", more=advice),
            _steering(measured, named, left_out),
            _differences(measured),
            _by_instruction(measured, ids),
            _by_layer(measured),
        ],
    )


def _steering(measured: Sequence[Measured], named: str, left_out: str) -> Section:
    rows: list[list[Value]] = []
    for file in measured:
        cosines, drift = file.column("cosines"), np.abs(file.column("drift"))
        numbers = (f"{value:.4f}" for value in (np.mean(cosines), min(cosines), np.mean(drift)))
        rows.append([file.label, f"{file.size / 1e6:.1f}", *numbers, *map(file.share, CONDITIONS)])
    series = {name: [file.share(name) for file in measured] for name in CONDITIONS if name != "other"}
    labels = [file.label for file in measured]
    return section(
        "quantization.steering",
        Table(["file", "MB", "cosine", "lowest", "drift", *CONDITIONS], rows),
        Lines("Replies that follow", "file", "share of replies", x=labels, series=series),
        first=labels[0],
        named=named,
        more=left_out,
    )


def _differences(measured: Sequence[Measured]) -> Section:
    first = measured[0]
    rows: list[list[Value]] = [
        [file.label, file.gain("recalibrated"), file.gain("re-extracted"), file.against(first, "reference")]
        for file in measured
    ]
    columns = ["file", "recalibrated", "re-extracted", f"reference against {first.label}"]
    return section("quantization.differences", Table(columns, rows), first=first.label)


def _by_instruction(measured: Sequence[Measured], names: Sequence[str]) -> Section:
    def shares(file: Measured, name: str) -> str:
        kinds = ("reference", "instructed")
        return " / ".join(rough_percent(file.rows.of(kind, name).followed) for kind in kinds)

    rows: list[list[Value]] = [[name, *(shares(file, name) for file in measured)] for name in names]
    columns = ["steered / told", *(file.label for file in measured)]
    return section("quantization.by_instruction", Table(columns, rows))


def _by_layer(measured: Sequence[Measured]) -> Section:
    maps = {
        "Angle to the reference direction, degrees": ("cosines", angle),
        "Drift of the mean projection": ("drift", np.abs),
    }
    labels = [file.label for file in measured]
    plots = [
        layer_map(title, labels, [file.over_instructions(*what) for file in measured], y_label="file")
        for title, what in maps.items()
    ]
    return section("quantization.by_layer", *plots)


def angle(cosines: np.ndarray) -> np.ndarray:
    """Degrees."""
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
