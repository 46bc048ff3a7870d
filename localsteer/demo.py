"""What steering does to one model, with the controls that give it meaning: a table, and replies side by side.

    document = demonstrate(engine, catalog, vectors)              # your model, with tuned vectors
    document = run_demo(instructions=("json", "lowercase"))       # the bundled one: quantized, extracted,
    tuned document["mean"]["steered"]

Subjects of extraction, validation and test queries are disjoint.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from . import bundled
from .cache import cache_folder
from .catalog import Catalog, Instruction, alike, load_catalog, spread
from .engine import Engine
from .errors import LocalsteerError
from .evaluate.bench import BUNDLED_LIMITS, Bench
from .evaluate.cells import CONDITIONS, Experiment, arms_of
from .evaluate.controls import mean_state, random_control
from .evaluate.model_info import quantization
from .evaluate.outcomes import Outcomes
from .evaluate.runner import Stage, by_instruction, plain_replies, run_conditions, silent
from .runtime.bridge import default_threads
from .runtime.sampling import GREEDY
from .tune import Setting, Tuned
from .vector import ControlVector
from .workers import Workers

BACKENDS = ("gguf", "torch")
GROUPS = ("format", "length")  # of the instructions that are shown when none are named
DEFAULT_N = 20
N_REAL = 5  # test queries of a real model: five conditions each, on a laptop
REAL_TOKENS = 64  # of a reply there
LEARNED_TOKENS = 128  # of one under a learned vector: what opens as JSON must have room to be closed
PARTNERS = ("json", "lowercase", "title")  # a control needs other instructions, also where few are named
SHOWN = ("none", "steered")
MEANS = (*CONDITIONS, "quality_none", "quality_steered", "subject_kept", "degenerate")


class DemoRow(TypedDict, total=False):
    """One instruction. none to other: shares that follow, None without a control. quality_none,
    quality_steered: perplexity of the replies under the unsteered model after the plain query. layer,
    positions: None where the model is left alone. other_id: whose vector the control is. file: of the vector.
    """

    id: str
    none: float | None
    steered: float | None
    instructed: float | None
    both: float | None
    random: float | None
    other: float | None
    quality_none: float | None
    quality_steered: float | None
    layer: int | None
    positions: str | None
    strength: float
    n: int
    group: str
    mode: str
    subject_kept: float | None
    degenerate: float | None
    repetition: float | None
    other_id: str | None
    file: str


class DemoExample(TypedDict):
    id: str
    query: str
    none: str
    steered: str


class DemoDocument(TypedDict, total=False):
    """mean: of every figure over the instructions that have it."""

    model: str
    quant: str
    instructions: list[DemoRow]
    mean: dict[str, float | None]
    seconds: float
    backend: str
    examples: list[DemoExample]


def run_demo(
    *,
    quant: str = bundled.DEFAULT_QUANT,
    backend: str = "gguf",
    instructions: Sequence[str] | None = None,
    n: int = DEFAULT_N,
    out: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    seed: int = 0,
    stage: Stage = silent,
) -> DemoDocument:
    """Everything that `localsteer demo` shows, as one JSON-able document.

    backend: where vectors come from: "gguf", the quantized model itself, or "torch", its checkpoint in
    PyTorch. instructions: ids of the bundled catalogue (default: all of its formats and lengths). n: test
    queries each. out: folder of the vector files (default: in the user's cache). checkpoint: a folder to use
    instead of the bundled one. stage: returns a progress callback for a piece of work.

    Raises CatalogError for an unknown instruction, ModelFileError without a bundled model.
    """
    started = time.perf_counter()
    catalog = load_catalog(bundled.CATALOG)
    chosen = _chosen(catalog, instructions)
    ids = [instruction.id for instruction in chosen]
    _check(backend, n, catalog)
    with stage("quantizing the bundled model"):
        path = bundled.gguf_path("instruct", quant, folder=checkpoint)
    folder = Path(out) if out is not None else cache_folder() / "demo" / path.stem
    _make_folder(folder)
    source = bundled.checkpoint_folder("instruct", folder=checkpoint) if backend == "torch" else None
    options = {"limits": BUNDLED_LIMITS, "n": n, "seed": seed, "checkpoint": source, "stage": stage}
    sizes = {"n_ctx": BUNDLED_LIMITS.n_ctx, "n_seq_max": BUNDLED_LIMITS.n_seq_max}
    with Workers(path, n_threads or default_threads(), **sizes) as workers:
        bench = Bench(workers, catalog, None, batch=by_instruction, **options)
        bench.vectors.prepare(_with_partners(catalog, chosen))
        raw = bench.vectors.raw(chosen)
        tuned = bench.vectors.tune([(each, raw[each.id]) for each in chosen])
        picks = dict(zip(ids, tuned, strict=True))
        compared = [_conditions(bench, each, picks[each.id].vector) for each in chosen]
        outcomes = bench.run(compared, what="comparing conditions", score=SHOWN).by("instruction")
        others = {each.id: bench.controls.others(each) for each in chosen}
    files = _save(folder, picks)
    by_condition = {name: outcomes[name].by("condition") for name in ids}
    rows = [
        row(each, picks[each.id], by_condition[each.id], others[each.id]) | {"file": files[each.id]}
        for each in chosen
    ]
    return {
        "model": f"localsteer-{bundled.MODELS[0]}",
        "quant": quant.upper(),
        "instructions": rows,
        "mean": mean(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "backend": backend,
        "examples": [_example(name, conditions) for name, conditions in by_condition.items()],
    }


def _conditions(bench: Bench, instruction: Instruction, vector: ControlVector) -> Experiment:
    steers = {"none": (), "steered": (vector,), "instructed": (), "both": (vector,)}
    steers |= bench.controls.of([instruction], [vector])
    return bench.experiment(instruction, arms_of(steers, CONDITIONS), bench.test)


def demonstrate(
    engine: Engine,
    catalog: Catalog,
    vectors: Mapping[str, ControlVector],
    *,
    n: int = N_REAL,
    seed: int = 0,
    stage: Stage = silent,
) -> DemoDocument:
    """The same table for tuned vectors of any model, by instruction id. n: test queries each.

    The control column `other` uses the vector of an unlike instruction at that vector's own settings, since a
    shipped vector holds only its one layer. Replies are cut at REAL_TOKENS, or LEARNED_TOKENS, so that this
    takes a minute or two on a laptop.
    """
    started = time.perf_counter()
    queries = spread(catalog.queries["test"], n)
    limits = {name: _limit(vector) for name, vector in vectors.items()}
    with stage("asking the plain model") as advance:
        advance(0, 0)
        plain = {limit: plain_replies(engine, queries, max_tokens=limit) for limit in set(limits.values())}
        plain_mean = mean_state(engine, queries)
    outcomes: dict[str, dict[str, Outcomes]] = {}
    with stage("comparing conditions") as advance:
        for done, (name, vector) in enumerate(vectors.items()):
            advance(done, len(vectors))
            others = [
                other for known, other in vectors.items() if not alike(catalog.get(known), catalog.get(name))
            ]
            outcomes[name] = run_conditions(
                engine,
                catalog.get(name),
                vector,
                queries,
                controls={
                    "random": random_control(vector, plain_mean, seed),
                    **({"other": others[done % len(others)]} if others else {}),
                },
                plain=plain[limits[name]],
                scored=("none", "steered"),
                max_tokens=limits[name],
            )
    rows = []
    for name, conditions in outcomes.items():
        vector = vectors[name]
        setting = Setting(vector.layers[0], vector.positions, vector.strength, vector.mode)
        rows.append(_row(catalog.get(name), vector, conditions, setting))
    return {
        "model": engine.model.metadata.get("general.name") or engine.path.stem,
        "quant": quantization(engine.model.metadata) or "",
        "instructions": rows,
        "mean": mean(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "examples": [_example(name, conditions) for name, conditions in outcomes.items()],
    }


def answers(
    engine: Engine, catalog: Catalog, vectors: Mapping[str, ControlVector], question: str
) -> list[DemoExample]:
    """Replies to one question, plain and under each vector, in the form of the document's `examples`."""
    steers = [(), *((vector,) for vector in vectors.values())]
    replies = engine.generate_batch(
        [question] * len(steers),
        steer=steers,
        max_tokens=max(map(_limit, vectors.values())),
        sampling=GREEDY,
    )
    plain, *steered = [reply.text for reply in replies]
    return [
        {"id": name, "query": question, "none": plain, "steered": text}
        for name, text in zip(vectors, steered, strict=True)
    ]


def _limit(vector: ControlVector) -> int:
    return LEARNED_TOKENS if vector.mode == "gate" else REAL_TOKENS


def _row(
    instruction: Instruction,
    vector: ControlVector,
    conditions: Mapping[str, Outcomes],
    setting: Setting | None,
) -> DemoRow:
    """setting: None where picking chose to apply nothing."""
    steered = conditions["steered"]
    return {
        "id": instruction.id,
        **{name: conditions[name].followed if name in conditions else None for name in CONDITIONS},
        "quality_none": conditions["none"].perplexity,
        "quality_steered": steered.perplexity,
        "layer": setting.layer if setting else None,
        "positions": setting.positions if setting else None,
        "strength": setting.strength if setting else 0.0,
        "n": steered.n,
        "group": instruction.group,
        "mode": vector.mode,
        "subject_kept": steered.subject_kept,
        "degenerate": steered.degenerate,
        "repetition": steered.repetition,
    }


def _chosen(catalog: Catalog, ids: Sequence[str] | None) -> list[Instruction]:
    if ids is None:
        # without a verifier there is nothing to show
        ids = [
            instruction.id
            for instruction in catalog.instructions.values()
            if instruction.group in GROUPS and instruction.verifier
        ]
    instructions = [catalog.get(name) for name in dict.fromkeys(ids)]
    if not instructions:
        raise LocalsteerError("--instructions is empty: leave it out for all instructions.")
    return instructions


def _check(backend: str, n: int, catalog: Catalog) -> None:
    if backend not in BACKENDS:
        raise LocalsteerError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    most = len(catalog.queries["test"])
    if not 1 <= n <= most:
        raise LocalsteerError(f"n must be 1 to {most}, the number of test queries, not {n}.")


def _with_partners(catalog: Catalog, instructions: Sequence[Instruction]) -> list[Instruction]:
    known = {instruction.id for instruction in instructions}
    partners = [catalog.get(name) for name in PARTNERS if name not in known]
    return [*instructions, *(partners if len(known) < len(PARTNERS) else ())]


def row(
    instruction: Instruction, picked: Tuned, conditions: Mapping[str, Outcomes], others: Sequence[Instruction]
) -> DemoRow:
    """One line of the table."""
    made = _row(instruction, picked.vector, conditions, picked.setting)
    return {**made, "other_id": others[0].id if others else None}


def mean(rows: Sequence[DemoRow]) -> dict[str, float | None]:
    """Of every figure over the instructions that have it."""
    means: dict[str, float | None] = {}
    for key in MEANS:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = sum(values) / len(values) if values else None
    return means


def _example(name: str, conditions: Mapping[str, Outcomes]) -> DemoExample:
    """The first test query that the vector steers well, or the first of all."""
    steered = conditions["steered"]
    k = next((k for k, row in enumerate(steered) if row.good), 0)
    texts = {condition: conditions[condition][k].reply.text for condition in SHOWN}
    return {"id": name, "query": steered[k].cell.query.text, **texts}


def _make_folder(folder: Path) -> None:
    """Create the folder and try to write there, before the work whose results would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LocalsteerError(
            f"{folder} can't be written ({error.strerror or error}): choose another --out."
        ) from error


def _save(folder: Path, picks: Mapping[str, Tuned]) -> dict[str, str]:
    files = {name: folder / f"{name}.gguf" for name in picks}
    for name, path in files.items():
        picks[name].vector.save(path)
    return {name: str(path) for name, path in files.items()}
