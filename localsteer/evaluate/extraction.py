"""Vectors of a catalogue's instructions, extracted from one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localsteer.catalog import Catalog, Instruction
from localsteer.engine import Engine
from localsteer.evaluate.runner import Advance
from localsteer.extract import Backend, batches, build_pairs, extract, open_backend, prompt_tokens
from localsteer.vector import ControlVector
from localsteer.workers import Workers


def extract_all(
    source: Workers | Path, instructions: Sequence[Instruction], catalog: Catalog, advance: Advance
) -> dict[str, ControlVector]:
    """A vector for each instruction, from the same queries: plain prompts go through the model once."""
    states: dict[tuple[int, ...], np.ndarray] = {}
    queries = {each.id: catalog.queries_for(each, "extraction") for each in instructions}

    def remember_plain(model: Engine | Backend) -> None:
        pairs = [build_pairs(instruction, queries[instruction.id]) for instruction in instructions]
        with open_backend(model) as backend:
            for texts in dict.fromkeys(tuple(pair.plain for pair in each) for each in pairs):
                tokens = [tuple(prompt_tokens(backend, text)) for text in dict.fromkeys(texts)]
                for batch in batches([len(each) for each in tokens]):
                    chosen = [tokens[i] for i in batch]
                    states.update(zip(chosen, backend.last_hidden_states(chosen), strict=True))

    def extract_one(model: Engine | Backend, instruction: Instruction) -> ControlVector:
        with open_backend(model) as backend:
            remembering = _Remembering(backend, states)
            return extract(remembering, instruction, queries[instruction.id], mode="project")

    # plain prompts first and by themselves: a batch's states depend a little on what else is in it, and the
    # vectors should not on how many instructions and workers there are
    if isinstance(source, Workers):
        source.map(lambda engine, _: remember_plain(engine), [None])
        vectors = source.map(extract_one, instructions, advance)
    else:
        # float32: the bundled checkpoint is small, and its states are then exact
        with open_backend(source, dtype="float32") as backend:
            remember_plain(backend)
            vectors = [extract_one(backend, each) for each in instructions]
    return {each.id: vector for each, vector in zip(instructions, vectors, strict=True)}


class _Remembering:
    """A backend that computes the states of each prompt once. For few prompts: it forgets none."""

    def __init__(self, backend: Backend, states: dict[tuple[int, ...], np.ndarray]) -> None:
        # the attributes of the protocol: delegating with __getattr__ would hide them from isinstance
        self.n_layer, self.n_embd = backend.n_layer, backend.n_embd
        self.model_name, self.architecture = backend.model_name, backend.architecture
        self.source_hash, self.description = backend.source_hash, backend.description
        self.template = backend.template
        self.tokenize, self.close = backend.tokenize, backend.close
        self._states_of, self._states = backend.last_hidden_states, states

    def last_hidden_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        keys = [tuple(tokens) for tokens in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self._states]
        if new:
            self._states.update(zip(new, self._states_of(new), strict=True))
        return np.stack([self._states[key] for key in keys])
