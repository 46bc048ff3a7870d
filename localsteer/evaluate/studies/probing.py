"""What probes read from the state at the last prompt token: was an instruction there, and was it this one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.probe import PROBES, accuracy
from localsteer.evaluate.similarity import MIN_PAIRS, probe_groups, probe_pairs
from localsteer.extract import build_pairs, open_backend
from localsteer.extract.states import States

if TYPE_CHECKING:
    from localsteer.engine import Engine

TASKS = ("present", "which")
Probes = dict[tuple[str, str], np.ndarray]  # (k, n_layer) accuracies, by task and probe


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
            return probe_pairs(*read_states[k], groups[k], probe)
        others = [j for j in range(len(pairs)) if j != k]
        states = np.concatenate([read_states[j][0] for j in (k, *others)])
        labels = np.arange(len(states)) < n_pairs
        of_queries = [name for j in (k, *others) for name in queries[j]]
        return [accuracy(states[:, il], labels, of_queries, probe) for il in range(states.shape[1])]

    with bench.stage("probing") as advance:
        rows = bench.workers.map(probe_one, jobs, advance)
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for (task, probe, _), row in zip(jobs, rows, strict=True):
        tables.setdefault((task, probe), []).append(row)
    return {key: np.array(rows) for key, rows in tables.items()}
