"""The whole path on the bundled model: quantize, extract, pick settings, compare the conditions.

    document = run_demo(instructions=("json", "lowercase"))
    document["mean"]["steered"]

Vectors are extracted from extraction queries, settings chosen on validation queries, and every figure comes
from test queries; their subjects are disjoint, and none was seen in the model's training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any, TypeVar

import numpy as np

from . import bundled
from .bridge import default_threads
from .cache import cache_folder
from .catalog import Catalog, Instruction, Query, load_catalog
from .engine import Engine
from .errors import LocalsteerError
from .evaluate.conditions import (
    CONDITIONS,
    Outcome,
    applied_like,
    choose_others,
    mean_state,
    plain_replies,
    random_control,
    run_conditions,
    told_replies,
)
from .evaluate.judge import perplexity
from .evaluate.pick import Pick, pick
from .extract import Backend, extract, open_backend
from .generate import Reply
from .vector import ControlVector

BACKENDS = ("gguf", "torch")
GROUPS = ("format", "length")  # of the instructions that are shown when none are named
DEFAULT_N = 20
N_PAIRS = 50
PARTNERS = ("json", "lowercase", "title")
N_TOLD = 6  # validation queries that show how long replies are, and which instructions make a fair control
N_CTX = 256  # tokens: the longest prompt and reply of the bundled model together stay below 160
N_SEQ_MAX = 8
MAX_WORKERS = 8
MAX_TOKENS = 112  # the longest reply in its training has 80
SHOWN = ("none", "steered")
MEANS = (*CONDITIONS, "quality_none", "quality_steered", "subject_kept", "degenerate")

Result = TypeVar("Result")
Advance = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Advance]]


def _silent(_what: str) -> AbstractContextManager[Advance]:
    return nullcontext(lambda _done, _total: None)


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
    stage: Stage = _silent,
) -> dict[str, Any]:
    """Everything that `localsteer demo` shows, as one JSON-able document.

    backend: where vectors come from: "gguf", the quantized model itself, or "torch", its checkpoint in
    PyTorch. instructions: ids of the bundled catalogue (default: all of its formats and lengths). n: test
    queries each. out: folder of the vector files (default: in the user's cache). checkpoint: a folder in the
    bundled one's place. stage: gives a progress bar for a piece of work, called with what is done.

    Raises CatalogError for an unknown instruction, ModelFileError without a bundled model.
    """
    started = time.perf_counter()
    catalog = load_catalog(bundled.CATALOG)
    chosen = _chosen(catalog, instructions)
    _check(backend, n, catalog)
    with stage("quantizing the bundled model"):
        path = bundled.gguf_path("instruct", quant, folder=checkpoint)
    folder = Path(out) if out is not None else cache_folder() / "demo" / path.stem
    n_threads = n_threads or default_threads()
    with Engine(path, n_ctx=N_CTX, n_seq_max=N_SEQ_MAX, n_threads=n_threads) as engine:
        source = engine if backend == "gguf" else bundled.checkpoint_folder("instruct", folder=checkpoint)
        study = Study.prepare(engine, source, catalog, chosen, n=n, seed=seed, stage=stage)
    with stage("picking settings, comparing conditions") as advance:
        found = study.for_each(chosen, _pick_and_compare, n_threads=n_threads, advance=advance)
    files = _save(folder, {each.id: picked for each, (picked, _) in zip(chosen, found, strict=True)})
    rows = [
        row(each, picked, outcomes, study.others(each)) | {"file": files[each.id]}
        for each, (picked, outcomes) in zip(chosen, found, strict=True)
    ]
    examples = [_example(each, outcomes) for each, (_, outcomes) in zip(chosen, found, strict=True)]
    return {
        "model": f"localsteer-{bundled.MODELS[0]}",
        "quant": quant.upper(),
        "instructions": rows,
        "mean": mean(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "backend": backend,
        "examples": examples,
    }


def _chosen(catalog: Catalog, ids: Sequence[str] | None) -> list[Instruction]:
    if ids is None:
        ids = [each.id for each in catalog.instructions.values() if each.group in GROUPS]
    found = [catalog.get(each) for each in dict.fromkeys(ids)]
    if not found:
        raise LocalsteerError("no instruction is named: leave --instructions out for all of them.")
    return found


def _check(backend: str, n: int, catalog: Catalog) -> None:
    if backend not in BACKENDS:
        raise LocalsteerError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    most = len(catalog.queries["test"])
    if not 1 <= n <= most:
        raise LocalsteerError(f"n must be 1 to {most}, the number of test queries, not {n}.")


@dataclass
class Study:
    """A model with all that its instructions share: vectors, plain replies, the mean plain state.

    engine: an open one, for what is asked next; `for_each` opens its own. told: replies of the model alone to
    the first validation queries, with each instruction in words. plain_perplexity: of `plain`.
    """

    engine: Engine
    instructions: Sequence[Instruction]
    validation: Sequence[Query]
    test: Sequence[Query]
    vectors: Mapping[str, ControlVector]
    told: Mapping[str, Sequence[Reply]]
    plain: Sequence[Reply]
    plain_mean: np.ndarray
    plain_perplexity: float | None
    seed: int = 0
    stopping: Event = field(default_factory=Event)  # set when nobody waits for results any more

    @classmethod
    def prepare(
        cls,
        engine: Engine,
        source: Engine | Path,
        catalog: Catalog,
        instructions: Sequence[Instruction],
        *,
        n: int = DEFAULT_N,
        seed: int = 0,
        stage: Stage = _silent,
    ) -> Study:
        """Extract the vectors and let the model speak for itself. source: where vectors come from."""
        instructions = _with_partners(catalog, instructions)
        test = spread(catalog.queries["test"], n)
        validation = catalog.queries["validation"]
        with stage("extracting vectors") as advance:
            vectors = extract_all(source, instructions, catalog, advance)
        with stage("asking in words"):
            told = told_replies(engine, instructions, validation[:N_TOLD], max_tokens=MAX_TOKENS)
            plain = plain_replies(engine, test, max_tokens=MAX_TOKENS)
            asked = zip(test, plain, strict=True)
            pairs = [
                (engine.prompt_tokens(query.text), reply.tokens) for query, reply in asked if reply.tokens
            ]
            surprise = perplexity([-score for score in engine.score(pairs)])
            plain_mean = mean_state(engine, validation)
        return cls(engine, instructions, validation, test, vectors, told, plain, plain_mean, surprise, seed)

    def for_each(
        self,
        instructions: Sequence[Instruction],
        work: Callable[[Study, Instruction], Result],
        *,
        n_threads: int,
        advance: Advance = lambda _done, _total: None,
    ) -> list[Result]:
        """work(study, instruction) for each, in order; several at once, each in an engine of one thread.

        Small models gain from that: two threads on one matrix of 256 columns mostly wait for each other.
        """
        n_workers = min(n_threads, MAX_WORKERS, len(instructions))
        with _workers(self.engine.path, n_workers, n_threads // n_workers) as (pool, engines, stopping):

            def run(instruction: Instruction) -> Result:
                engine = engines.get()
                try:
                    return work(replace(self, engine=engine, stopping=stopping), instruction)
                finally:
                    engines.put(engine)

            running = [pool.submit(run, instruction) for instruction in instructions]
            for done, _ in enumerate(as_completed(running), 1):
                advance(done, len(running))
            return [each.result() for each in running]

    def pick(self, instruction: Instruction, **restricted: Any) -> Pick:
        """Settings chosen on validation queries. restricted: blocks, positions, strengths, rounds."""
        return pick(
            self.engine,
            self.vectors[instruction.id],
            instruction,
            self.validation,
            max_tokens=self.budget(instruction),
            must_end=True,
            on_progress=self._check,
            **restricted,
        )

    def _check(self, _done: int, _total: int) -> None:
        if self.stopping.is_set():
            raise LocalsteerError("stopped.")

    def budget(self, instruction: Instruction) -> int:
        """Tokens of a reply beyond which it is endless: half as many again as replies have when told."""
        longest = max(len(reply.tokens) for reply in (*self.told[instruction.id], *self.plain))
        return min(MAX_TOKENS, longest * 3 // 2 + 8)

    def others(self, instruction: Instruction, n: int = 1) -> list[Instruction]:
        """Whose vectors are controls, chosen by what the model says when told, on validation queries."""
        queries = self.validation[:N_TOLD]
        return choose_others(instruction, self.instructions, self.told, queries, n=n, seed=self.seed)

    def conditions(
        self, instruction: Instruction, vector: ControlVector, **options: Any
    ) -> dict[str, Outcome]:
        """All conditions on the test queries. vector: with its settings applied."""
        controls = {"random": random_control(vector, self.plain_mean, self.seed)}
        for other in self.others(instruction):
            controls["other"] = applied_like(self.vectors[other.id], vector)
        settings = {"scored": ("steered",), "plain": self.plain, "controls": controls} | options
        outcomes = run_conditions(
            self.engine, instruction, vector, self.test, max_tokens=MAX_TOKENS, must_end=True, **settings
        )
        return outcomes | {"none": replace(outcomes["none"], perplexity=self.plain_perplexity)}


@contextmanager
def _workers(path: Path, n: int, n_threads: int) -> Iterator[tuple[ThreadPoolExecutor, Queue[Engine], Event]]:
    """Threads, an engine for each of them, and what tells them to stop early."""
    engines: Queue[Engine] = Queue()
    stopping = Event()
    with ExitStack() as stack:
        for _ in range(n):
            opened = Engine(path, n_ctx=N_CTX, n_seq_max=N_SEQ_MAX, n_threads=n_threads)
            engines.put(stack.enter_context(opened))
        pool = stack.enter_context(ThreadPoolExecutor(n))
        try:
            yield pool, engines, stopping
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)


def _pick_and_compare(study: Study, instruction: Instruction) -> tuple[Pick, dict[str, Outcome]]:
    picked = study.pick(instruction)
    return picked, study.conditions(instruction, picked.vector)


def spread(queries: Sequence[Query], n: int) -> list[Query]:
    """`n` of the queries at equal distances, so that few of them still hold every kind."""
    return [queries[i * len(queries) // n] for i in range(n)]


def _with_partners(catalog: Catalog, instructions: Sequence[Instruction]) -> list[Instruction]:
    """A lone instruction gets company: the control needs another one's vector."""
    partners = [catalog.get(each) for each in ("json", "lowercase", "title")]
    known = {each.id for each in instructions}
    return [
        *instructions,
        *(each for each in partners if each.id not in known and len(known) < len(partners)),
    ]


def extract_all(
    source: Engine | Path, instructions: Sequence[Instruction], catalog: Catalog, advance: Advance
) -> dict[str, ControlVector]:
    """A vector for each instruction, from the same queries: plain prompts go through the model once."""
    vectors = {}
    with _opened(source) as backend:
        for done, each in enumerate(instructions, 1):
            queries = catalog.queries_for(each, "extraction")
            vectors[each.id] = extract(backend, each, queries, n_pairs=N_PAIRS, mode="project")
            advance(done, len(instructions))
    return vectors


@contextmanager
def _opened(source: Engine | Path) -> Iterator[Backend]:
    # float32: the bundled checkpoint is small, and its states are then exact
    with open_backend(source, dtype="float32") as backend:
        yield _Remembering(backend)


class _Remembering:
    """A backend that computes the states of each prompt once. For few prompts: it forgets none."""

    def __init__(self, backend: Backend) -> None:
        # the attributes of the protocol: delegating with __getattr__ would hide them from isinstance
        self.n_layer, self.n_embd = backend.n_layer, backend.n_embd
        self.model_name, self.architecture = backend.model_name, backend.architecture
        self.source_hash, self.description = backend.source_hash, backend.description
        self.template = backend.template
        self.tokenize, self.close = backend.tokenize, backend.close
        self._states_of = backend.last_hidden_states
        self._states: dict[tuple[int, ...], np.ndarray] = {}

    def last_hidden_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        keys = [tuple(tokens) for tokens in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self._states]
        if new:
            self._states.update(zip(new, self._states_of(new), strict=True))
        return np.stack([self._states[key] for key in keys])


def row(
    instruction: Instruction, picked: Pick, outcomes: Mapping[str, Outcome], others: Sequence[Instruction]
) -> dict[str, Any]:
    """One line of the table. layer and positions are None where picking chose to leave the model alone.

    quality_none, quality_steered: perplexity of the replies under the unsteered model after the plain query.
    """
    setting = picked.setting
    steered = outcomes["steered"]
    return {
        "id": instruction.id,
        **{name: outcomes[name].followed if name in outcomes else None for name in CONDITIONS},
        "quality_none": outcomes["none"].perplexity,
        "quality_steered": steered.perplexity,
        "layer": setting.layer if setting else None,
        "positions": setting.positions if setting else None,
        "strength": setting.strength if setting else 0.0,
        "n": steered.n,
        "group": instruction.group,
        "mode": picked.vector.mode,
        "subject_kept": steered.subject_kept,
        "degenerate": steered.degenerate,
        "repetition": steered.repetition,
        "other_id": others[0].id if others else None,
    }


def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of every figure over the instructions that have it."""
    means: dict[str, float | None] = {}
    for key in MEANS:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = sum(values) / len(values) if values else None
    return means


def _example(instruction: Instruction, outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """The first test query that the vector steers well, or the first of all."""
    replies = outcomes["steered"].replies
    k = next((k for k, reply in enumerate(replies) if reply.good), 0)
    texts = {name: outcomes[name].replies[k].text for name in SHOWN}
    return {"id": instruction.id, "query": replies[k].query, **texts}


def _save(folder: Path, picks: Mapping[str, Pick]) -> dict[str, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalsteerError(
            f"{folder} can't be made ({error.strerror or error}): give another --out."
        ) from error
    for name, picked in picks.items():
        picked.vector.save(folder / f"{name}.gguf")
    return {name: str(folder / f"{name}.gguf") for name in picks}
