"""Last-token states of questions, for calibration, similarity, probes and maps. Needs only numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from localsteer.errors import UnsupportedModelError
from localsteer.extract import Backend, Pair, batches, prompt_tokens

Progress = Callable[[int, int], None]


def stream_states(
    backend: Backend, questions: Sequence[str], on_progress: Progress | None = None
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields (indices, states) in batches, shortest prompts first: states are (n, n_layer, n_embd) float32,
    the residual stream after each layer at the last prompt token. Memory does not grow with the number of
    questions.

    Raises UnsupportedModelError for states that are not finite.
    """
    ids = [prompt_tokens(backend, text) for text in questions]
    done = 0
    for batch in batches([len(tokens) for tokens in ids]):
        states = backend.last_hidden_states([ids[i] for i in batch])
        if not np.isfinite(states).all():
            raise UnsupportedModelError(f"{backend.model_name}: a state is not finite; is the file damaged?")
        done += len(batch)
        if on_progress:
            on_progress(done, len(ids))
        yield batch, states


class States:
    """States of questions, each computed once and kept: for some thousands of questions with a small model,
    or some hundreds with a large one."""

    def __init__(self, backend: Backend, on_progress: Progress | None = None) -> None:
        self.backend = backend
        self._on_progress = on_progress
        self._known: dict[str, np.ndarray] = {}

    def of(self, questions: Sequence[str]) -> np.ndarray:
        """The states, (n, n_layer, n_embd) float32, in the order of the questions."""
        new = [text for text in dict.fromkeys(questions) if text not in self._known]
        for batch, states in stream_states(self.backend, new, self._on_progress):
            for i, state in zip(batch, states, strict=True):
                self._known[new[i]] = state
        return np.stack([self._known[text] for text in questions])

    def of_pairs(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (with, without), each (n_pairs, n_layer, n_embd) float32."""
        both = self.of([pair.instructed for pair in pairs] + [pair.plain for pair in pairs])
        return both[: len(pairs)], both[len(pairs) :]
