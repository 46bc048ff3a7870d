"""Many requests with different steering in one engine: what it costs, and what it saves.

    python benchmarks/concurrency.py [--rounds 5] [--threads 2] [-m MODEL.gguf]

Without -m it writes a random llama of 0.4 billion parameters in Q4_0. In the decode phase, with a cache for
each sequence (`Engine(kv_unified=False)`) and with one that all share: 8 sequences with 8 different plans
against 8 unsteered ones in the same engine, against bare llama.cpp decoding 8 sequences with the same kind of
cache, and against the same 8 one after another; then a search of 12 settings on 8 prompts, as many sequences
at once as `localsteer tune` takes, against one reply at a time. What is compared takes turns in one run;
medians of ratios. Beside them, what bare llama.cpp gains on this machine from the same eight at once: no
engine that is built on it can gain much more. Last, long prompts: the same 8 with separate caches against a
shared one. The last line is JSON. Exit status 1 below a bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as lc
import numpy as np
from decode_overhead import random_vector, write_random_model

from localsteer import Ask, ControlVector, Engine
from localsteer.cli.tune import N_SEQ_MAX as N_SEQ_SEARCH
from localsteer.plan import Plan
from localsteer.runtime.bridge import Context, default_threads, system_info
from localsteer.runtime.loop import Loop, new_request
from localsteer.runtime.sampling import GREEDY

N_SEQ, N_PROMPT, N_REPLY, N_LONG = 8, 32, 48, 1000
N_SETTINGS, N_QUERIES, N_SEARCH_REPLY = 12, 8, 24
UNSTEERED, BARE, IN_TURN = "8 plans / 8 unsteered", "8 plans / bare llama.cpp", "8 plans / one after another"
CEILING = "bare llama.cpp, 8 at once / one after another"
SEARCH = "search in batches / one at a time"
LONG = f"8 plans of {N_LONG} tokens, separate caches / shared cache"
CACHES = {"separate caches": False, "shared cache": True}  # name: kv_unified
BOUNDS = {
    f"{UNSTEERED}, separate caches": 0.95,
    f"{BARE}, separate caches": 0.85,
    f"{IN_TURN}, separate caches": 2.5,
    f"{UNSTEERED}, shared cache": 0.95,
    f"{BARE}, shared cache": 0.85,
    SEARCH: 2.0,
}


def prompts(n: int, n_vocab: int, length: int = N_PROMPT) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, n_vocab, length).tolist() for _ in range(n)]


def plans(vector: ControlVector, n: int) -> list[Plan]:
    """n that differ in layer, positions and strength."""
    where = ("all", "last", "generation")
    return [
        Plan.from_vectors(
            [vector.at(layer=1 + 2 * i % (vector.n_layer - 1), positions=where[i % 3], strength=0.5 + i / 20)]
        )
        for i in range(n)
    ]


def decode_seconds(engine: Engine, texts: list[list[int]], steers: list[Plan | None]) -> float:
    """Wall time of all steps but those that read prompts; each sequence draws N_REPLY tokens."""
    loop = Loop(engine)
    requests = [
        new_request(engine, Ask(tokens=tokens, steer=plan, max_tokens=N_REPLY, sampling=GREEDY))
        for tokens, plan in zip(texts, steers, strict=True)
    ]
    for request in requests:
        loop.add(request)
    while not all(request.tokens for request in requests):
        list(loop.step())
    started = time.perf_counter()
    while loop.busy:
        list(loop.step())
    seconds = time.perf_counter() - started
    if any(len(request.tokens) != N_REPLY for request in requests):
        raise RuntimeError("a reply ended early: take another model")
    return seconds


def bare_seconds(context: Context, texts: list[list[int]]) -> float:
    """The same with llama.cpp's own functions, as a C program would call them: batched decode and argmax."""
    n, n_vocab = len(texts), context.model.n_vocab
    context.clear()
    for seq, tokens in enumerate(texts):
        batch = context._batch.filled(tokens, np.arange(len(tokens)), seq, 0)
        batch.logits[len(tokens) - 1] = 1
        lc.llama_decode(context.pointer, batch)
    drawn = np.ones(n, np.int32)
    started = time.perf_counter()
    for step in range(N_REPLY - 1):
        batch = context._batch.filled(drawn, np.full(n, N_PROMPT + step), np.arange(n), np.ones(n))
        if lc.llama_decode(context.pointer, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a batch")
        logits = np.ctypeslib.as_array(lc.llama_get_logits(context.pointer), shape=(n, n_vocab))
        drawn = logits.argmax(axis=1)
    return time.perf_counter() - started


def one_by_one(engine: Engine, texts: list[list[int]], steers: list[Plan | None]) -> float:
    return sum(decode_seconds(engine, [text], [plan]) for text, plan in zip(texts, steers, strict=True))


def search_seconds(engine: Engine, texts: list[list[int]], steers: list[Plan], together: bool) -> float:
    """Every setting on every prompt, prompts included."""
    cells = [(tokens, plan) for plan in steers for tokens in texts]
    started = time.perf_counter()
    for batch in [cells] if together else [[cell] for cell in cells]:
        loop = Loop(engine)
        for tokens, plan in batch:
            loop.add(
                new_request(
                    engine, Ask(tokens=tokens, steer=plan, max_tokens=N_SEARCH_REPLY, sampling=GREEDY)
                )
            )
        while loop.busy:
            list(loop.step())
    return time.perf_counter() - started


def compare_decoding(path: Path, n_threads: int, rounds: int, kv_unified: bool) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in (UNSTEERED, BARE, IN_TURN, CEILING)}
    options = {"n_threads": n_threads, "kv_unified": kv_unified}
    with Engine(path, n_ctx=256, n_seq_max=N_SEQ, **options) as engine:
        texts, steers = prompts(N_SEQ, engine.model.n_vocab), plans(random_vector(engine.model), N_SEQ)
        with Context(engine.model, n_ctx=engine.n_cells, n_seq_max=N_SEQ, steering=False, **options) as bare:
            for done in range(rounds):
                print(f"round {done + 1} of {rounds}", file=sys.stderr)
                steered = decode_seconds(engine, texts, steers)
                plain = decode_seconds(engine, texts, [None] * N_SEQ)
                raw = bare_seconds(bare, texts)
                again = decode_seconds(engine, texts, steers)
                mine = (steered + again) / 2
                found[UNSTEERED].append(plain / mine)
                found[BARE].append(raw / mine)
                found[IN_TURN].append(one_by_one(engine, texts, steers) / mine)
                found[CEILING].append(sum(bare_seconds(bare, [text]) for text in texts) / raw)
    return {name: median(values) for name, values in found.items()}


def compare_search(path: Path, n_threads: int) -> float:
    options = {"n_ctx": 256, "n_threads": n_threads}
    ratios = []
    with (
        Engine(path, **options, n_cells=1024, n_seq_max=N_SEQ) as engine,
        Engine(path, **options, n_cells=2048, n_seq_max=N_SEQ_SEARCH) as searching,
    ):
        texts = prompts(N_QUERIES, engine.model.n_vocab)
        settings = plans(random_vector(engine.model), N_SETTINGS)
        for done in range(2):
            print(f"search {done + 1} of 2", file=sys.stderr)
            alone = search_seconds(engine, texts, settings, together=False)
            ratios.append(alone / search_seconds(searching, texts, settings, together=True))
    return median(ratios)


def compare_long(path: Path, n_threads: int, rounds: int) -> float:
    options = {"n_ctx": N_LONG + 2 * N_REPLY, "n_threads": n_threads, "n_seq_max": N_SEQ}
    ratios = []
    with (
        Engine(path, **options, n_cells=N_SEQ * options["n_ctx"]) as shared,
        Engine(path, **options, kv_unified=False) as separate,
    ):
        texts = prompts(N_SEQ, shared.model.n_vocab, N_LONG)
        steers = plans(random_vector(shared.model), N_SEQ)
        for done in range(rounds):
            print(f"long prompts {done + 1} of {rounds}", file=sys.stderr)
            slow, fast = (decode_seconds(engine, texts, steers) for engine in (shared, separate))
            ratios.append(slow / fast)
    return median(ratios)


def median(values: list[float]) -> float:
    return round(float(np.median(values)), 3)


def measure(path: Path, n_threads: int, rounds: int) -> Iterator[tuple[str, float]]:
    """Each ratio when it is known: the whole takes minutes."""
    for cache, kv_unified in CACHES.items():
        print(cache, file=sys.stderr)
        for name, ratio in compare_decoding(path, n_threads, rounds, kv_unified).items():
            yield f"{name}, {cache}", ratio
    yield SEARCH, compare_search(path, n_threads)
    yield LONG, compare_long(path, n_threads, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or Path(folder) / "random-0.4b-q4_0.gguf"
        if arguments.model is None:
            write_random_model(path)
        ratios = {}
        for name, ratio in measure(path, arguments.threads, arguments.rounds):
            ratios[name] = ratio
            bound = f"   at least {BOUNDS[name]}" if name in BOUNDS else ""
            print(f"{name:64} {ratio:6.3f}{bound}", flush=True)
    document = {"model": path.name, "threads": arguments.threads, "rounds": arguments.rounds}
    print(json.dumps({**document, "ratios": ratios, "bounds": BOUNDS, "machine": system_info()}))
    return 0 if all(ratios[name] >= bound for name, bound in BOUNDS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
