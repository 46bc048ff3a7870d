"""Is an instruction a direction? A linear probe beside a non-linear one, and steering, layer by layer.

Two things are read from the state at the last prompt token: `present`, was the instruction in the prompt at
all, and `which`, was it this one or another. Where only the non-linear probe reads it, the instruction is no
direction there, and a difference in means should not steer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.page import Lines, Section, StudyReport, Table, Value
from localsteer.evaluate.probe import GAUSSIAN, LINEAR, PROBES, accuracy
from localsteer.evaluate.similarity import MIN_PAIRS, probe_groups
from localsteer.evaluate.studies.common import StudyJob, by_layer, correlate, layer_map, profile, shares
from localsteer.evaluate.texts import said, section
from localsteer.extract import build_pairs, open_backend
from localsteer.extract.states import States

if TYPE_CHECKING:
    from localsteer.engine import Engine

NAME, TITLE = "linear", "Linear or not"
INSTRUCTIONS = (
    "json", "lowercase", "uppercase", "bullets", "title", "no_comma", "one_sentence", "two_sentences",
    "four_sentences", "five_sentences", "concise", "verbose",
)  # fmt: skip
N_PAIRS, QUICK_PAIRS = 50, 12
N_QUERIES, QUICK_QUERIES = 10, 2
POSITIONS = ("prompt", "all")
TASKS = ("present", "which")
APART = 0.05  # balanced accuracy by which the non-linear probe must lead
CEILING = 0.98  # above it two probes can't be told apart
READS = 0.95
Probes = dict[tuple[str, str], np.ndarray]  # (k, n_layer) accuracies, by task and probe
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
        sections=[section("linear.advice", advice=advice), *_sections(ids, probes, steered)],
    )


def probe_all(bench: Bench, instructions: Sequence[Instruction], n_pairs: int) -> Probes:
    """`which` needs two instructions or more."""
    assert n_pairs >= MIN_PAIRS
    pairs = [
        build_pairs(instruction, bench.catalog.queries_for(instruction, "extraction"), n_pairs)
        for instruction in instructions
    ]

    def read(engine: Engine, _: None) -> list[tuple[np.ndarray, np.ndarray]]:
        with open_backend(engine) as backend:
            states = States(backend)
            states.of([text for each in pairs for pair in each for text in (pair.plain, pair.instructed)])
            return [states.of_pairs(each) for each in pairs]

    with bench.stage("reading states"):
        (read_states,) = bench.workers.map(read, [None])
    groups = [probe_groups(each) for each in pairs]
    queries = [[pair.plain for pair in each] for each in pairs]
    tasks = TASKS if len(instructions) > 1 else TASKS[:1]
    jobs = [(task, probe, k) for task in tasks for probe in PROBES for k in range(len(pairs))]

    def probe_one(_engine: Engine, job: tuple[str, str, int]) -> list[float]:
        task, probe, k = job
        if task == "present":
            states, labels = np.concatenate(read_states[k]), np.repeat([True, False], n_pairs)
            return _by_layer(states, labels, [*groups[k], *groups[k]], probe)
        others = [j for j in range(len(pairs)) if j != k]
        states = np.concatenate([read_states[j][0] for j in (k, *others)])
        labels = np.arange(len(states)) < n_pairs
        return _by_layer(states, labels, [name for j in (k, *others) for name in queries[j]], probe)

    with bench.stage("probing") as advance:
        rows = bench.workers.map(probe_one, jobs, advance)
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for (task, probe, _), row in zip(jobs, rows, strict=True):
        tables.setdefault((task, probe), []).append(row)
    return {key: np.array(rows) for key, rows in tables.items()}


def _by_layer(states: np.ndarray, labels: np.ndarray, groups: Sequence[str], probe: str) -> list[float]:
    return [accuracy(states[:, il], labels, groups, probe) for il in range(states.shape[1])]


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
