"""Writes states of many prompts into a file, chunk by chunk, and continues from there after a kill."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from localsteer.cache import file_hash
from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject
from localsteer.token_choice import TokenChoice

from .chosen import Progress, Reading, layers_of, n_rows, readings, states_of
from .file import DTYPES, FORMAT, FORMAT_VERSION, Layout, PartialFile, check_target

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.plan import Plan
    from localsteer.prompt_texts import PromptText
    from localsteer.runtime.ask import Prompt
    from localsteer.runtime.attach import Steer

# A killed run loses at most a chunk. The prompts determine the chunks, so a resumed run has the same ones.
CHUNK_PROMPTS = 64
CHUNK_BYTES = 64 << 20


class WrittenStates(TypedDict):
    """kept: how many prompts an earlier run had done."""

    prompts: int
    rows: int
    layers: list[int]
    n_embd: int
    dtype: str
    bytes: int
    kept: int


def write_states(
    engine: Engine,
    prompts: Sequence[Prompt | PromptText],
    path: str | os.PathLike[str],
    *,
    layer: int | Sequence[int] | None = None,
    tokens: str | int | TokenChoice = "last",
    dtype: str = "float32",
    raw: bool = False,
    steer: Steer = (),
    on_progress: Progress | None = None,
) -> WrittenStates:
    """Write the states of all prompts to a safetensors file (docs/states.md), in the memory of one decode.

    The settings are those of `collect_states`. dtype: "float32" or "float16". Called again with the same
    arguments after a kill, it continues where it was. Returns what was written: prompts, rows, layers,
    n_embd, dtype, bytes, and `kept`, how many prompts an earlier run had done. on_progress: called with
    (prompts done, prompts).

    Raises PromptError, PlanError, MismatchError, UnsupportedModelError, and LocalsteerError for a place that
    can't be written, holds something else, or has no room.
    """
    path, choice = Path(path), TokenChoice.parse(tokens)
    if dtype not in DTYPES:
        raise LocalsteerError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    if not prompts:
        raise LocalsteerError("there are no prompts: at least one is needed.")
    check_target(path)
    layers, plan = layers_of(engine, layer), engine.plan(steer)
    chosen = readings(engine, prompts, choice, raw=raw)
    counts = [n_rows(reading, choice) for reading in chosen]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    about = _about(engine, chosen, layers, choice, plan) | {"dtype": dtype}
    layout = Layout(
        (int(offsets[-1]), len(layers), engine.model.n_embd),
        dtype,
        _small(chosen, offsets, layers, choice),
        {"format": FORMAT, "format_version": FORMAT_VERSION} | {k: _text(v) for k, v in about.items()},
    )
    kept = 0
    with PartialFile(path, layout, about) as file:
        for first, last in _chunks(counts, layout.row_bytes):
            rows = int(offsets[first]), int(offsets[last])
            if file.has(str(first), *rows):
                kept += last - first
            else:
                pieces = states_of(engine, chosen[first:last], layers, choice, plan or ())
                for index, at, states in pieces:
                    file.write(int(offsets[first + index]) + at, states)
                file.done(str(first), *rows)
            if on_progress:
                on_progress(last, len(chosen))
        file.finish()
    n_written, _, n_embd = layout.shape
    return {
        "prompts": len(chosen), "rows": n_written, "layers": list(layers), "n_embd": n_embd, "dtype": dtype,
        "bytes": layout.n_bytes, "kept": kept,
    }  # fmt: skip


def _chunks(counts: Sequence[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """[first, last) of consecutive prompts; one that is larger than a chunk comes alone."""
    first, n_bytes = 0, 0
    for i, count in enumerate(counts):
        if i > first and (i - first == CHUNK_PROMPTS or n_bytes + count * row_bytes > CHUNK_BYTES):
            yield first, i
            first, n_bytes = i, 0
        n_bytes += count * row_bytes
    yield first, len(counts)


def _small(
    chosen: Sequence[Reading], offsets: np.ndarray, layers: Sequence[int], choice: TokenChoice
) -> dict[str, np.ndarray]:
    """Every tensor but `states`, by name; those of 8 bytes first, for their alignment."""
    counts = np.diff(offsets)
    if choice.pooling == "mean":
        positions = token_ids = np.full(len(chosen), -1, np.int32)
    else:
        positions = np.concatenate([np.array(reading.positions, np.int32) for reading in chosen])
        token_ids = np.concatenate([reading.tokens[list(reading.positions)] for reading in chosen])
    lengths = [len(reading.tokens) for reading in chosen]
    return {
        "offsets": offsets,
        "prompt_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompt_index": np.repeat(np.arange(len(chosen), dtype=np.int32), counts),
        "positions": positions,
        "token_ids": token_ids,
        "prompt_tokens": np.concatenate([reading.tokens for reading in chosen]),
        "n_prompt": np.array([reading.n_prompt for reading in chosen], np.int32),
        "layers": np.array(layers, np.int32),
    }


def _about(
    engine: Engine, chosen: Sequence[Reading], layers: Sequence[int], choice: TokenChoice, plan: Plan | None
) -> JsonObject:
    """Of the metadata, and what a run that goes on must have in common with the one before."""
    from localsteer import __version__

    digest = hashlib.sha256()
    for reading in chosen:
        for numbers in (reading.tokens, np.array([reading.n_prompt, *reading.positions], np.int64)):
            digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    model, edits = engine.model, plan.edits if plan else ()
    keys = ("name", "layer", "mode", "positions", "strength")
    return {
        "model": model.metadata.get("general.name") or engine.path.stem,
        "model_file": engine.path.name,
        "model_sha256": file_hash(engine.path),
        "architecture": model.architecture,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "layers": list(layers),
        "tokens": choice.spelled,
        "prompts": " and ".join(sorted({"raw" if reading.raw else "chat template" for reading in chosen})),
        "template_sha256": engine.template.template_hash,
        "steer": [{key: _plain(getattr(edit, key)) for key in keys} for edit in edits],
        "plan": plan.key.hex() if plan else "",
        "texts_sha256": digest.hexdigest(),
        "exact": bool(engine.exact),
        "localsteer_version": __version__,
        "llama_cpp_python_version": importlib.metadata.version("llama-cpp-python"),
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int)) else float(value)


def _text(value: Any) -> str:
    """The metadata of a safetensors file, which may hold only texts: other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
