"""What a run of learning has done so far, kept in a folder so that a run that was killed can continue.

Each file has a seal (cache.py): a damaged one counts as missing, and its contents are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.cache import atomic_path, is_intact, seal, unlink_sealed
from localsteer.extract.torch_backend import torch
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY

from .examples import Example

if TYPE_CHECKING:
    from localsteer.engine import Engine

    from .training import TrainingState


@dataclass(frozen=True)
class PlainReplies:
    """The model's own greedy replies, which do not depend on what is learned.

    folder: for one model file; None keeps nothing. The replies stay there when a run is over.
    """

    folder: Path | None

    def of(self, engine: Engine, prompts: Sequence[str], max_tokens: int) -> list[Reply]:
        tokens = [engine.prompt_tokens(prompt) for prompt in prompts]
        content = json.dumps([tokens, max_tokens, engine.n_ctx])
        path = self.folder and self.folder / f"plain-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        replies = _replies_in(path)
        if len(replies) != len(prompts):
            replies = engine.generate_batch(list(prompts), max_tokens=max_tokens, sampling=GREEDY)
            rows = [(reply.text, reply.tokens, reply.finish_reason) for reply in replies]
            if path is not None:
                _write(path, lambda temporary: temporary.write_text(json.dumps(rows), "utf-8"))
        return replies


class Kept:
    """folder: of one run, created when something is kept; None keeps nothing. digest: of what is learned and
    how; what was kept under another digest is not read. plain: in the parent folder, which belongs to the
    model."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder, self._digest = folder, digest
        self.plain = PlainReplies(None if folder is None else folder.parent)

    def examples(self, own: bool = False) -> list[Example]:
        """The kept examples. own: those from the model's steered replies."""
        record = self._read_json(_file(own))
        if not isinstance(record, dict) or record.get("digest") != self._digest:
            return []
        try:
            return [
                Example(tuple(prompt), tuple(reply), np.array(kept, bool), source)
                for prompt, reply, kept, source in record["examples"]
            ]
        except (KeyError, TypeError, ValueError):  # damaged, so it is made again
            return []

    def keep_examples(self, examples: Sequence[Example], own: bool = False) -> None:
        rows = [(one.prompt, one.reply, one.kept.astype(int).tolist(), one.source) for one in examples]
        text = json.dumps({"digest": self._digest, "examples": rows})
        self._write(_file(own), lambda path: path.write_text(text, "utf-8"))

    def state(self) -> TrainingState | None:
        if self._folder is None or not is_intact(self._folder / "steps.pt"):
            return None
        try:
            state = torch.load(self._folder / "steps.pt", weights_only=True)
        except Exception:  # written by another version of torch, which can raise almost any type of error
            return None
        return state if isinstance(state, dict) and state.get("digest") == self._digest else None

    def keep_state(self, state: TrainingState) -> None:
        self._write("steps.pt", lambda path: torch.save({"digest": self._digest, **state}, path))

    def forget(self) -> None:
        for name in (_file(False), _file(True), "steps.pt"):
            if self._folder is not None:
                with suppress(OSError):
                    unlink_sealed(self._folder / name)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.rmdir()

    def _read_json(self, name: str) -> Any:
        return {} if self._folder is None else _read_json(self._folder / name)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if self._folder is not None:
            _write(self._folder / name, write)


def _replies_in(path: Path | None) -> list[Reply]:
    """The replies in a file; none if it is missing or damaged."""
    rows = [] if path is None else _read_json(path)
    try:
        return [Reply(text, list(tokens), finish_reason) for text, tokens, finish_reason in rows]
    except (TypeError, ValueError):
        return []


def _read_json(path: Path) -> Any:
    if not is_intact(path):
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write(temporary)
    seal(path)


def _file(own: bool) -> str:
    return "own_examples.json" if own else "examples.json"
