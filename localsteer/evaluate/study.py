"""One model and the instructions of a catalogue: extract vectors, pick settings, compare conditions.

Vectors come from extraction queries, settings from validation queries, figures from test queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from localsteer.catalog import Catalog, Instruction, Query
from localsteer.engine import Engine
from localsteer.evaluate.conditions import (
    Outcome,
    choose_others,
    controls_of,
    mean_state,
    plain_replies,
    run_conditions,
    told_replies,
)
from localsteer.extract import Backend, batches, build_pairs, extract, open_backend, prompt_tokens
from localsteer.perplexity import log_scores, perplexity
from localsteer.runtime.reply import Reply
from localsteer.tune import DEFAULT_N as TUNE_QUERIES
from localsteer.tune import MAX_TOKENS as TUNE_TOKENS
from localsteer.tune import Tuned, tune, tune_exhaustively
from localsteer.tune.setting import grid_blocks
from localsteer.vector import ControlVector
from localsteer.workers import Workers

N_TOLD = 6  # validation queries that show how long replies are, and which instructions make a fair control
N_CTX = 256  # tokens: the longest prompt and reply of the bundled model together stay below 160
N_SEQ_MAX = 8  # more sequences pay more for each other's cells in the shared cache than they save
MAX_TOKENS = 112  # the longest reply in the bundled model's training has 80

Advance = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Advance]]


def silent(_what: str) -> AbstractContextManager[Advance]:
    """A stage that shows nothing."""
    return nullcontext(lambda _done, _total: None)


@dataclass(frozen=True)
class Study:
    """What the instructions of one model share.

    told: replies of the model alone to the first validation queries, with each instruction in words.
    plain: its replies to the test queries, of perplexity plain_perplexity. plain_mean: (n_layer, n_embd), the
    mean state of plain prompts at their last token. max_tokens: of a reply; must_end: as in `judge`.
    """

    instructions: tuple[Instruction, ...]
    validation: tuple[Query, ...]
    test: tuple[Query, ...]
    vectors: dict[str, ControlVector]
    told: dict[str, list[Reply]]
    plain: list[Reply]
    plain_perplexity: float | None
    plain_mean: np.ndarray
    seed: int = 0
    max_tokens: int = MAX_TOKENS
    must_end: bool = True

    @classmethod
    def prepare(
        cls,
        workers: Workers,
        catalog: Catalog,
        instructions: Sequence[Instruction],
        *,
        n: int,
        checkpoint: Path | None = None,
        seed: int = 0,
        stage: Stage = silent,
    ) -> Study:
        """Extract vectors and let the model speak for itself. n: test queries. checkpoint: a transformers
        folder to extract from with PyTorch, in place of the workers' own model."""
        validation, test = catalog.queries["validation"], spread(catalog.queries["test"], n)
        with stage("extracting vectors") as advance:
            vectors = extract_all(checkpoint or workers, instructions, catalog, advance)
        with stage("asking in words") as advance:
            told = workers.map(
                lambda engine, each: ask_in_words(engine, each, validation), instructions, advance
            )
            (by_itself,) = workers.map(alone, [(test, validation)])
        return cls(
            tuple(instructions),
            tuple(validation),
            tuple(test),
            vectors,
            dict(zip(vectors, told, strict=True)),
            *by_itself,
            seed,
        )

    def tune(self, engine: Engine, instruction: Instruction, **options: Any) -> Tuned:
        """Settings found on validation queries. options: of find_setting."""
        queries = instruction.queries.get("validation") or self.validation
        options |= {"max_tokens": self.max_tokens, "seed": self.seed}
        return find_setting(engine, self.vectors[instruction.id], instruction, queries, **options)

    def others(self, *instructions: Instruction, n: int = 1) -> list[Instruction]:
        """Whose vectors are controls, chosen by what the model says when told, on validation queries."""
        queries = self.validation[:N_TOLD]
        return choose_others(instructions, self.instructions, self.told, queries, n=n, seed=self.seed)

    def controls(
        self, instruction: Instruction, vector: ControlVector
    ) -> dict[str, tuple[ControlVector, ...]]:
        """As `controls_of`, with another instruction's vector where there is a fair one."""
        others = [self.vectors[other.id] for other in self.others(instruction)]
        return controls_of([vector], others, self.plain_mean, self.seed)

    def conditions(
        self, engine: Engine, instruction: Instruction, vector: ControlVector, **options: Any
    ) -> dict[str, Outcome]:
        """All conditions on the test queries. vector: with settings applied. options: of run_conditions."""
        options = {
            "controls": self.controls(instruction, vector),
            "scored": ("steered",),
            "plain": self.plain,
            "max_tokens": self.max_tokens,
            "must_end": self.must_end,
        } | options
        outcomes = run_conditions(engine, instruction, vector, self.test, **options)
        return outcomes | {"none": replace(outcomes["none"], perplexity=self.plain_perplexity)}


def find_setting(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    seed: int,
    max_tokens: int,
    check: Callable[[], None] = lambda: None,
    by_generation: bool = False,
    **options: Any,
) -> Tuned:
    """check: called now and then, may raise to end the search. by_generation: every setting of the paper's
    grid generates replies, where the likelihood of what the told model says tells little. options: of
    tune.tune."""
    options |= {
        "max_tokens": min(max_tokens, TUNE_TOKENS),
        "source": {"seconds": None},  # a run that goes on ends with the same files as an unbroken one
        "report": lambda _what, _done, _total: check(),
    }
    if not by_generation:
        return tune(engine, vector, instruction, queries, seed=seed, **options)
    few, blocks = spread(queries, min(len(queries), TUNE_QUERIES)), grid_blocks(vector.n_layer)
    return tune_exhaustively(engine, vector, instruction, few, blocks=blocks, **options)


def spread(queries: Sequence[Query], n: int) -> list[Query]:
    """`n` of the queries at equal distances, so that few of them still hold every kind."""
    return [queries[i * len(queries) // n] for i in range(n)]


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


def ask_in_words(
    engine: Engine, instruction: Instruction, validation: Sequence[Query], max_tokens: int = MAX_TOKENS
) -> list[Reply]:
    """`told` of one instruction."""
    return told_replies(engine, [instruction], validation[:N_TOLD], max_tokens=max_tokens)[instruction.id]


def alone(
    engine: Engine, queries: tuple[Sequence[Query], Sequence[Query]], max_tokens: int = MAX_TOKENS
) -> tuple[list[Reply], float | None, np.ndarray]:
    """The model's own replies to test queries, their perplexity, and its mean state on validation queries."""
    test, validation = queries
    plain = plain_replies(engine, test, max_tokens=max_tokens)
    scores = log_scores(
        engine, [(query.text, reply.tokens) for query, reply in zip(test, plain, strict=True)]
    )
    return plain, perplexity(scores), mean_state(engine, validation)
