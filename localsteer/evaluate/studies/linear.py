"""Is an instruction a direction? A linear probe beside a non-linear one, and steering, layer by layer.

Two things are read from the state at the last prompt token: `present`, was the instruction in the prompt at
all, and `which`, was it this one or another. Where only the non-linear probe reads it, the instruction is no
direction there, and a difference in means should not steer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsteer.evaluate.page import Lines, Section, StudyReport, Table, Value
from localsteer.evaluate.probe import GAUSSIAN, LINEAR, PROBES
from localsteer.evaluate.studies.common import StudyJob, by_layer, correlate, layer_map, profile, shares
from localsteer.evaluate.studies.probing import Probes, probe_all
from localsteer.evaluate.texts import said, section

if TYPE_CHECKING:
    pass

NAME, TITLE = "linear", "Linear or not"
INSTRUCTIONS = (
    "json", "lowercase", "uppercase", "bullets", "title", "no_comma", "one_sentence", "two_sentences",
    "four_sentences", "five_sentences", "concise", "verbose",
)  # fmt: skip
N_PAIRS, QUICK_PAIRS = 50, 12
N_QUERIES, QUICK_QUERIES = 10, 2
POSITIONS = ("prompt", "all")
APART = 0.05  # balanced accuracy by which the non-linear probe must lead
CEILING = 0.98  # above it two probes can't be told apart
READS = 0.95
WORKS = 0.5  # share of replies above which steering is said to work


def run(job: StudyJob) -> StudyReport:
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        raw = bench.vectors.raw(instructions)
        probes = probe_all(bench, instructions, QUICK_PAIRS if job.quick else N_PAIRS)
        n_queries = min(QUICK_QUERIES if job.quick else N_QUERIES, len(bench.validation))
        asked = by_layer(bench, [(each, raw[each.id]) for each in instructions], POSITIONS, n_queries)
        followed = np.array(profile(bench, asked, "steering at each layer"), dtype=float)
    # at the better positions
    steered = followed.reshape(len(instructions), len(POSITIONS), -1).max(axis=1)
    ids = [instruction.id for instruction in instructions]
    advice = where_they_part(probes, steered)
    return StudyReport(
        model=bench.model,
        settings={"n": None, "n_validation": n_queries},
        figures={
            "instructions": ids,
            "probes": {f"{task} {probe}": table.tolist() for (task, probe), table in probes.items()},
            "steered": steered.tolist(),
            "advice": advice,
        },
        sections=[section("linear.advice", more=advice), *_sections(ids, probes, steered)],
    )


def where_they_part(probes: Probes, steered: np.ndarray) -> str:
    """In words, from the figures: how often the non-linear probe leads, and whether steering fails there."""
    texts = [_part(task, probes, steered) for task in dict.fromkeys(task for task, _ in probes)]
    readable = probes["present", LINEAR] >= READS
    idle = readable & (steered < WORKS)
    texts.append(said("linear.idle", readable=readable.sum(), of=readable.size, idle=idle.sum()))
    return " ".join(texts)


def _part(task: str, probes: Probes, steered: np.ndarray) -> str:
    means, linear, gaussian = (probes[task, probe] for probe in PROBES)
    gap = gaussian - linear
    apart = gap >= APART
    shares = {"means": means.mean(), "linear": linear.mean(), "gaussian": gaussian.mean()}
    texts = [said("linear.accuracies", task=task.capitalize(), **shares)]
    if min(linear.min(), gaussian.min()) >= CEILING:
        return " ".join([*texts, said("linear.ceiling")])
    texts.append(said("linear.leads", by=APART, n=apart.sum(), of=gap.size))
    if apart.any() and not apart.all():
        there, elsewhere = (np.mean(steered[where] >= WORKS) for where in (apart, ~apart))
        texts.append(said("linear.works", share=WORKS, there=there, elsewhere=elsewhere))
    correlations = {"linear": correlate(linear, steered), "lead": correlate(gap, steered)}
    texts.append(
        said("linear.correlations", **{name: _number(value) for name, value in correlations.items()})
    )
    return " ".join(texts)


def _number(value: float) -> str:
    return "nothing (one of them does not vary)" if np.isnan(value) else f"{value:+.2f}"


def _sections(ids: Sequence[str], probes: Probes, steered: np.ndarray) -> list[Section]:
    layers = list(range(steered.shape[1]))
    series = {f"{task}, {probe}": shares(table.mean(axis=0)) for (task, probe), table in probes.items()}
    series["steered replies that follow"] = shares(steered.mean(axis=0))
    rows: list[list[Value]] = [[il, *(means[il] for means in series.values())] for il in layers]
    maps = {}
    for task in dict.fromkeys(task for task, _ in probes):
        maps[f"{task}: linear probe"] = probes[task, LINEAR]
        maps[f"{task}: lead of the non-linear probe"] = probes[task, GAUSSIAN] - probes[task, LINEAR]
    maps["Steered replies that follow"] = steered
    plot = Lines("Probes and steering", "layer", "share", x=layers, series=series)
    return [
        section("linear.by_layer", Table(["layer", *series], rows), plot),
        section("linear.by_instruction", *(layer_map(title, ids, values) for title, values in maps.items())),
    ]
