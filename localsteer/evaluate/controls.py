"""The conditions that every steered figure is shown with, and the controls that give it meaning.

    bench.controls.of([json], [vector])    {"random": (...,), "other": (...,)}

    none        the plain model                     instructed  the instruction in the prompt, in words
    steered     the vector, no word of it           both        in words and steered
    random      a random direction in its place     other       another instruction's vector in its place

The first, second, fourth and fifth are the paper's (section 3); the controls show that it is this direction
that counts, not that something is changed at this layer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction, Query, alike
from localsteer.errors import PlanError, PromptError
from localsteer.evaluate.runner import plain_replies
from localsteer.evaluate.scope import lacks_slots
from localsteer.evaluate.vectors import N_TOLD, BenchVectors
from localsteer.perplexity import log_scores
from localsteer.plan import Plan
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify
from localsteer.workers import Workers

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Reply

PARTNERS = ("json", "lowercase", "title")  # a control needs other instructions, also where few are wanted
N_CANDIDATES = 2  # of other instructions that the control `other` is drawn from, at least


def controls_of(
    vectors: Sequence[ControlVector], others: Sequence[ControlVector], plain_mean: np.ndarray, seed: int
) -> dict[str, tuple[ControlVector, ...]]:
    """What stands in the place of vectors that are applied together: `random`, random directions of equal
    norm; `other`, the vectors `others`; same layers, positions and strengths. No `other` where there are too
    few, or what a plan refuses (parallel directions)."""
    controls = {"random": tuple(random_control(each, plain_mean, seed + k) for k, each in enumerate(vectors))}
    if len(others) == len(vectors):
        other = tuple(applied_like(other, vector) for other, vector in zip(others, vectors, strict=True))
        controls |= {"other": other} if is_possible(other) else {}
    return controls


def is_possible(vectors: Sequence[ControlVector]) -> bool:
    """Whether these can be applied together: nearly parallel directions at one layer can't."""
    try:
        Plan.from_vectors(vectors)
    except PlanError:
        return False
    return True


def random_control(vector: ControlVector, plain_mean: np.ndarray, seed: int) -> ControlVector:
    """A random direction in the vector's place: same layers, mode, positions, strength and length.

    For `project` the target is the mean projection of plain prompts on the random direction plus
    |zbar_with - zbar_without| of the real one, so that at the last prompt token both move the state equally
    far on average. plain_mean: (n_layer, n_embd), mean state of plain prompts at their last token.
    """
    rng = np.random.default_rng(seed)
    directions = np.zeros_like(vector.directions)
    targets, bases = np.zeros(vector.n_layer), np.zeros(vector.n_layer)
    for layer in vector.layers:
        unit = rng.standard_normal(vector.n_embd)
        unit /= np.linalg.norm(unit)
        directions[layer] = unit * np.linalg.norm(vector.directions[layer].astype(np.float64))
        bases[layer] = plain_mean[layer] @ unit
        targets[layer] = bases[layer] + _distance(vector, layer)
    return replace(
        vector,
        directions=directions,
        mean_with=targets,
        mean_without=bases,
        std_with=None,
        std_without=None,
        name=f"random-{seed}",
    )


def applied_like(other: ControlVector, vector: ControlVector) -> ControlVector:
    """Another vector, applied where and as `vector` is; behind the same gate, with the same length, if that
    is a learned one and the other is not."""
    if vector.mode == "gate" and not set(vector.layers) <= set(other.gated):
        directions = np.zeros_like(vector.directions)
        for layer in vector.layers:
            directions[layer] = np.linalg.norm(vector.directions[layer]) * other.unit(layer)
        return replace(vector, directions=directions, name=other.name)
    return other.at(
        layer=vector.layers, positions=vector.positions, strength=vector.strength, mode=vector.mode
    )


def _distance(vector: ControlVector, layer: int) -> float:
    """|zbar_with - zbar_without|; the direction's length is the same number where they are not known."""
    if vector.mean_with is None or vector.mean_without is None:
        return float(np.linalg.norm(vector.directions[layer]))
    return abs(float(vector.mean_with[layer]) - float(vector.mean_without[layer]))


def mean_state(engine: Engine, queries: Sequence[Query]) -> np.ndarray:
    """(n_layer, n_embd) float64: mean state of the plain prompts at their last token."""
    states = engine.last_hidden_states([engine.prompt_tokens(query.text) for query in queries])
    return states.mean(axis=0, dtype=np.float64)


def choose_others(
    instructions: Sequence[Instruction],
    candidates: Sequence[Instruction],
    told: Mapping[str, Sequence[Reply]],
    queries: Sequence[Query],
    *,
    n: int = 1,
    seed: int = 0,
) -> list[Instruction]:
    """Up to `n` other instructions whose vectors are fair controls of the vectors of `instructions`, drawn by
    a generator seeded with `seed` and their ids.

    Fair: it is alike to none of them (`alike`), and the replies of a model that was told to follow it
    (`told`, to `queries`) do not pass their verifiers by themselves, as a postscript makes four sentences of
    three. Where too few are fair, the ones that pass least often come next.
    """
    others = _unlike(candidates, instructions)
    passes = {
        other.id: sum(_passes(mine, told[other.id], queries) for mine in instructions) for other in others
    }
    draw = random.Random(" ".join([str(seed), *(instruction.id for instruction in instructions)]))
    drawn: list[Instruction] = []
    for n_passes in sorted(set(passes.values())):
        same = sorted((each for each in others if passes[each.id] == n_passes), key=lambda each: each.id)
        drawn += draw.sample(same, min(n - len(drawn), len(same)))
    return drawn


def _passes(instruction: Instruction, replies: Sequence[Reply], queries: Sequence[Query]) -> int:
    if instruction.verifier is None:
        return 0
    return sum(
        verify(instruction.verifier, reply.text, instruction.kwargs_for(query.text), prompt=query.text)
        for query, reply in zip(queries, replies, strict=True)
    )


class BenchControls:
    """The controls of a bench: the same ones whenever they are asked for again."""

    def __init__(self, vectors: BenchVectors) -> None:
        self.vectors, self.scope, self.workers = vectors, vectors.scope, vectors.workers
        self._others: dict[tuple[str, ...], list[Instruction]] = {}
        self._mean: np.ndarray | None = None

    def of(
        self, instructions: Sequence[Instruction], vectors: Sequence[ControlVector]
    ) -> dict[str, tuple[ControlVector, ...]]:
        """As `controls_of`, with the vectors of other instructions."""
        others = self.others(*instructions, n=len(vectors))
        return self.like(vectors, list(self.vectors.raw(others).values()))

    def like(
        self, vectors: Sequence[ControlVector], others: Sequence[ControlVector] = ()
    ) -> dict[str, tuple[ControlVector, ...]]:
        """As `controls_of`, with the bench's own mean state and seed."""
        return controls_of(vectors, others, self.plain_mean(), self.scope.seed)

    def others(self, *instructions: Instruction, n: int = 1) -> list[Instruction]:
        """Whose vectors the control `other` is drawn from: evaluated ones and, where few are, PARTNERS."""
        key = (str(n), *(instruction.id for instruction in instructions))
        if key not in self._others:
            self.vectors.prepare(instructions)
            missing = max(n, N_CANDIDATES) - len(_unlike(self._candidates(), instructions))
            if missing > 0:
                self.vectors.prepare(self.partners(instructions, missing))
            told, queries = self.vectors.told, self.scope.validation[:N_TOLD]
            self._others[key] = choose_others(
                instructions, self._candidates(), told, queries, n=n, seed=self.scope.seed
            )
        return self._others[key]

    def partners(self, instructions: Sequence[Instruction], n: int) -> list[Instruction]:
        """At most n of PARTNERS, or else of the catalogue's formats, that are not known yet, alike to none of
        these, and that the model's vocabulary can spell."""
        known = self.scope.catalog.instructions
        formats = [one.id for one in known.values() if one.group == "format" and one.verifier]
        names = [name for name in dict.fromkeys([*PARTNERS, *formats]) if name in known]
        usable = [known[name].fill() for name in names if not lacks_slots(known[name])]
        candidates = [one for one in _unlike(usable, instructions) if one.id not in self.vectors.told]
        return [one for one in candidates if readable(self.workers, one.phrasings) == [*one.phrasings]][:n]

    def plain_mean(self) -> np.ndarray:
        """(n_layer, n_embd) float64: mean state of plain validation prompts at their last token."""
        max_tokens, test = self.vectors.max_tokens, self.scope.test

        def work(engine: Engine, _: None) -> np.ndarray:
            # its own replies first, and scored by themselves: what else is asked should change none of them
            plain = plain_replies(engine, test, max_tokens=max_tokens)
            log_scores(engine, [(query.text, reply.tokens) for query, reply in zip(test, plain, strict=True)])
            return mean_state(engine, self.scope.validation)

        if self._mean is None:
            (self._mean,) = self.workers.map(work, [None])
        return self._mean

    def _candidates(self) -> list[Instruction]:
        """Not of words: which suites ran before should not matter, and a word changes little of a reply. Not
        an import that can't be applied as any vector is, at any layer and in mode project."""
        known = [self.scope.known[name] for name in self.vectors.told]
        usable = [one for one in known if one.verifier and one.group != "word"]
        return [one for one in usable if _is_whole(self.vectors.all_raw[one.id])]


def readable(workers: Workers, texts: Sequence[str]) -> list[str]:
    """Those that the model's vocabulary can spell."""

    def can_spell(engine: Engine, text: str) -> bool:
        try:
            return bool(engine.prompt_tokens(text))
        except PromptError:
            return False

    return [text for text, can in zip(texts, workers.map(can_spell, texts), strict=True) if can]


def _unlike(candidates: Sequence[Instruction], instructions: Sequence[Instruction]) -> list[Instruction]:
    return [candidate for candidate in candidates if not any(alike(mine, candidate) for mine in instructions)]


def _is_whole(vector: ControlVector) -> bool:
    return vector.mean_with is not None and len(vector.usable_layers) == vector.n_layer
