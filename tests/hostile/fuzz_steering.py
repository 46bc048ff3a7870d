"""Random control vectors on a tiny model, for fuzz.py: what the native hook is given at its edges."""

from __future__ import annotations

import random
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tiny_gguf import N_EMBD, N_LAYER, tiny_gguf

import localsteer
from localsteer.errors import LocalsteerError
from localsteer.terms import POSITIONS

ODD = (0.0, -0.0, 1e-38, 1e-45, 1e30, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))
SIZES = (1e-20, 1e-3, 1.0, 1.0, 1.0, 50.0, 1e6, 1e19)
STRENGTHS = (1.0, 0.0, -1.0, 2.0, 1e-9, 1e6, -3.5)
PROMPTS = ("the fox", "a", "ab " * 12)

_running = ExitStack()


@cache
def _engine(folder: Path) -> localsteer.Engine:
    path = folder / "tiny.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    return _running.enter_context(localsteer.Engine(path, n_threads=1, n_seq_max=3))


def close() -> None:
    _running.close()


def _rows(draw: random.Random, rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.normal(scale=draw.choice(SIZES), size=shape)
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        rows.flat[draw.randrange(rows.size)] = draw.choice(ODD)
    return rows


def _vector(draw: random.Random) -> localsteer.ControlVector:
    rng = np.random.default_rng(draw.randrange(2**32))
    mode = draw.choice(("project", "add", "ablate", "gate"))
    gate = mode == "gate"
    with_means = mode == "project" or draw.random() < 0.3
    layers = tuple(sorted(draw.sample(range(N_LAYER), draw.randint(1, N_LAYER))))
    settings: dict[str, Any] = {
        "mode": mode,
        "positions": draw.choice(POSITIONS),
        "strength": draw.choice(STRENGTHS),
        "readers": _rows(draw, rng, N_LAYER, N_EMBD) if gate else None,
        "biases": _rows(draw, rng, N_LAYER).astype(float) if gate else None,
        "name": "fuzz",
    }
    if draw.random() < 0.3:
        settings["cap"] = draw.choice((0.0, 1.0, 1e-30, 1e30))
    if draw.random() < 0.3:
        settings["one_sided"] = True
    means = [_rows(draw, rng, N_LAYER).astype(float) if with_means and not gate else None for _ in range(2)]
    return localsteer.ControlVector(_rows(draw, rng, N_LAYER, N_EMBD), *means, None, None, layers, **settings)


def try_steering(path: Path, draw: random.Random) -> str:
    """Up to three at once, each through its file; a reply, several at once, states and logits.

    Prompts are raw: the process of chat templates has no address space for a sanitizer.
    """
    engine = _engine(path.parent)
    vectors = []
    for k in range(draw.choice((1, 1, 2, 3))):
        at = path.with_suffix(f".{k}.gguf")
        _vector(draw).save(at)
        vectors.append(localsteer.ControlVector.load(at))
    greedy = localsteer.Sampling(temp=0)
    tokens = engine.prompt_tokens("the fox", raw=True)
    asked = [
        lambda: engine.generate(draw.choice(PROMPTS), steer=vectors, sampling=greedy, max_tokens=3, raw=True),
        lambda: engine.generate_batch(
            PROMPTS, steer=[(), vectors, vectors[:1]], sampling=greedy, max_tokens=3
        ),
        lambda: engine.logits(tokens, steer=vectors, n_prompt=draw.randint(1, len(tokens))),
        lambda: engine.hidden_states(tokens, range(N_LAYER), steer=vectors),
    ]
    n_done = 0
    for ask in asked:
        with suppress(LocalsteerError):  # states that overflow give no finite logits, and an error says so
            ask()
            n_done += 1
    plain = engine.generate("the fox", sampling=greedy, max_tokens=3, raw=True).text
    if plain != _plain(engine):
        raise AssertionError("what was steered before changes a plain reply")
    return "applied" if n_done else "refused"


@cache
def _plain(engine: localsteer.Engine) -> str:
    return engine.generate("the fox", sampling=localsteer.Sampling(temp=0), max_tokens=3, raw=True).text
