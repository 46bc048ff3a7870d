"""The conditions that every steered figure is shown with, and the controls that give it meaning.

    none        the model alone                     instructed  the instruction in the prompt, in words
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
from localsteer.errors import PlanError
from localsteer.plan import Plan
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Reply


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
    """Another vector, applied where and as `vector` is."""
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
    others = [
        candidate for candidate in candidates if not any(alike(mine, candidate) for mine in instructions)
    ]
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


def told_prompts(queries: Sequence[Query], phrasings: Sequence[str]) -> list[str]:
    """Each query, with one of the phrasings after it, in turn."""
    return [f"{query.text} {phrasings[i % len(phrasings)]}" for i, query in enumerate(queries)]
