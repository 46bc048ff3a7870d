"""States directly from a GGUF, whatever its quantization, with llama.cpp and without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localsteer.cache import file_hash
from localsteer.engine import Engine


class GgufBackend:
    """exact: F32 KV cache and no flash attention, for comparisons. An Engine that is passed in, or its
    stand-in, is not closed."""

    def __init__(
        self, source: str | os.PathLike[str] | Engine, *, exact: bool = False, n_threads: int | None = None
    ) -> None:
        self._owned = isinstance(source, (str, os.PathLike))
        self.engine = Engine(source, exact=exact, n_threads=n_threads) if self._owned else source
        model = self.engine.model
        self.n_layer, self.n_embd, self.n_ctx = model.n_layer, model.n_embd, self.engine.n_ctx
        self.architecture: str | None = model.architecture
        self.template = self.engine.template
        self.engine.check_template()
        path = Path(self.engine.path)
        self.model_name = model.metadata.get("general.name") or path.stem
        self.source_hash = file_hash(path)
        self.description = f"llama.cpp on {path.name}"

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt."""
        return self.engine.rendered_tokens(text)

    def last_hidden_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """(n_prompts, n_layer, n_embd) float32: the residual stream after each layer at each last token."""
        return self.engine.last_hidden_states(prompts)

    def find_part(self, text: str, tokens: Sequence[int], part: str) -> range | None:
        """The tokens of `text` that spell the last occurrence of `part`."""
        return self.engine.find_part(tokens, part)

    def mean_hidden_states(self, prompts: Sequence[Sequence[int]], positions: Sequence[range]) -> np.ndarray:
        """The same for the mean over the chosen positions of each prompt."""
        sums = np.zeros((len(prompts), self.n_layer, self.n_embd))
        for index, _, states in self.engine.states_at(prompts, positions, range(self.n_layer)):
            sums[index] += states.sum(axis=0, dtype=np.float64)
        return (sums / np.array([len(chosen) for chosen in positions])[:, None, None]).astype(np.float32)

    def close(self) -> None:
        if self._owned:
            self.engine.close()

    def __enter__(self) -> GgufBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
