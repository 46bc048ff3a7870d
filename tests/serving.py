"""A server over real HTTP for tests, on the bundled model, with vectors that really steer it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import localsteer
from localsteer import bundled

NAMES = ("json", "lowercase", "uppercase")  # instructions of the bundled model
# the first that works best is taken: another training of the model may change which that is
SETTINGS = [*((il, "prompt") for il in (1, 2, 3, 0)), (4, "last"), (4, "all"), (0, "last"), (2, "last")]
QUESTION = "Tell me about foxes."
QUESTIONS = (QUESTION, "Tell me about the zorrel.", "Please describe Marlowton.")
FOXES = [{"role": "user", "content": QUESTION}]


# With F32 weights and an exact context a reply is the same whatever runs beside it, and whatever the cache
# holds of its prompt. Quantized kernels round otherwise for one row than for many: that tips near ties.
EXACT = {"n_threads": 1, "exact": True}


def model_path() -> Path:
    return bundled.gguf_path("instruct", "F32")


@lru_cache(maxsize=1)
def vectors() -> dict[str, localsteer.ControlVector]:
    """Extracted once a session."""
    from localsteer.catalog import load_catalog
    from localsteer.extract import extract

    catalog = load_catalog("bundled")
    with localsteer.Engine(model_path(), **EXACT, n_seq_max=16) as engine:
        found = {}
        for name in NAMES:
            instruction = catalog.get(name)
            queries = catalog.queries_for(instruction, "extraction")
            vector = extract(engine, instruction, queries, n_pairs=24, mode="project")
            tried = (vector.at(layer=layer, positions=positions) for layer, positions in SETTINGS)
            found[name] = best_of(engine, tried)
    return found


def best_of(engine: localsteer.Engine, tried: Iterator[localsteer.ControlVector]) -> localsteer.ControlVector:
    scores: dict[int, localsteer.ControlVector] = {}
    for vector in tried:
        scores.setdefault(followed(engine, vector), vector)
        if len(QUESTIONS) in scores:
            break
    return scores[max(scores)]


def followed(engine: localsteer.Engine, vector: localsteer.ControlVector) -> int:
    """How many of the questions are answered as the vector wants it."""
    from localsteer.verify.verdicts import verify

    greedy = localsteer.Sampling(temp=0)
    replies = engine.generate_batch(QUESTIONS, steer=vector, sampling=greedy, max_tokens=80)
    known = vector.provenance
    return sum(verify(known["verifier"], reply.text, known.get("kwargs") or {}) for reply in replies)


def write_vectors(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, vector in vectors().items():
        vector.save(folder / f"{name}.gguf")
    return folder


class Server:
    """url, state and the clients that tests use."""

    def __init__(self, running: Any) -> None:
        self.running, self.url, self.state = running, running.url, running.state

    @property
    def port(self) -> int:
        return self.running.address[1]

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> Any:
        import httpx

        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def raw(self) -> socket.socket:
        return socket.create_connection(self.running.address, timeout=30)

    def counts(self, model: str = "bundled") -> dict[str, int]:
        return self.state.models[model].scheduler.counts

    def quiet(self, seconds: float = 5.0, model: str = "bundled") -> bool:
        """Whether nothing runs or waits, within a time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            counts = self.counts(model)
            if not counts["waiting"] and not counts["running"]:
                return True
            time.sleep(0.005)
        return False


@contextmanager
def serving(
    folder: Path | None, *, models: dict[str, Path] | None = None, grace: float = 0.0, **options: Any
) -> Iterator[Server]:
    """options: as create_app has them; `engine` and `scheduler` hold those of the engines and schedulers."""
    from localsteer.runtime.scheduler import Scheduler
    from localsteer.server.app import create_app
    from localsteer.server.run import Running

    settings = {**EXACT, "n_seq_max": 8, **options.pop("engine", {})}
    queue = options.pop("scheduler", {})
    with ExitStack() as stack:
        schedulers = {
            name: stack.enter_context(Scheduler(partial(localsteer.Engine, path, **settings), **queue))
            for name, path in (models or {"bundled": model_path()}).items()
        }
        running = Running(create_app(schedulers, folder=folder, **options), "127.0.0.1", 0, grace)
        ready = threading.Event()
        thread = threading.Thread(
            target=running.serve, kwargs={"on_ready": ready.set, "signals": False}, daemon=True
        )
        thread.start()
        assert ready.wait(30)
        try:
            yield Server(running)
        finally:
            running.stop()
            thread.join(60)
            assert not thread.is_alive()


def is_loud(text: str) -> bool:
    """Mostly capitals: the bundled model may keep a name as the question wrote it."""
    letters = [character for character in text if character.isalpha()]
    return bool(letters) and sum(map(str.isupper, letters)) >= 0.8 * len(letters)
