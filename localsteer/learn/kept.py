"""What a run of learning has done so far, in a folder, so that one that was killed goes on.

Each file has a seal (cache.py): one that is damaged is not there, and what it held is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from localsteer.cache import atomic_path, is_intact, seal, unlink_sealed
from localsteer.extract.torch_backend import torch

from .examples import Example


class Kept:
    """folder: made when something is kept; None keeps nothing. digest: of what is learned and how; what was
    kept for another one is not read."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder, self._digest = folder, digest

    def examples(self, own: bool = False) -> list[Example]:
        """own: those of the model under what it had learned."""
        record = self._read_json(_file(own))
        if not isinstance(record, dict) or record.get("digest") != self._digest:
            return []
        try:
            return [
                Example(tuple(prompt), tuple(reply), np.array(kept, bool), source)
                for prompt, reply, kept, source in record["examples"]
            ]
        except (KeyError, TypeError, ValueError):  # damaged: made again
            return []

    def keep_examples(self, examples: Sequence[Example], own: bool = False) -> None:
        rows = [(one.prompt, one.reply, one.kept.astype(int).tolist(), one.source) for one in examples]
        text = json.dumps({"digest": self._digest, "examples": rows})
        self._write(_file(own), lambda path: path.write_text(text, "utf-8"))

    def state(self) -> dict[str, Any] | None:
        if self._folder is None or not is_intact(self._folder / "steps.pt"):
            return None
        try:
            state = torch.load(self._folder / "steps.pt", weights_only=True)
        except Exception:  # of another version of torch, which raises nearly every type
            return None
        return state if isinstance(state, dict) and state.get("digest") == self._digest else None

    def keep_state(self, state: Mapping[str, Any]) -> None:
        self._write("steps.pt", lambda path: torch.save({"digest": self._digest, **state}, path))

    def forget(self) -> None:
        for name in (_file(False), _file(True), "steps.pt"):
            if self._folder is not None:
                with suppress(OSError):
                    unlink_sealed(self._folder / name)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.rmdir()

    def _read_json(self, name: str) -> dict[str, Any]:
        if self._folder is None or not is_intact(self._folder / name):
            return {}
        try:
            return json.loads((self._folder / name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}

    def _write(self, name: str, write: Any) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._folder / name) as path:
            write(path)
        seal(self._folder / name)


def _file(own: bool) -> str:
    return "own_examples.json" if own else "examples.json"
