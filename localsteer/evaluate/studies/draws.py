"""Pairs of prompts drawn at random, any number and in few or many wordings, and the vectors of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.outcomes import Outcomes, mean
from localsteer.evaluate.page import Share
from localsteer.extract import Pair, open_backend
from localsteer.extract.states import States
from localsteer.extract.statistics import unit_rows
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.bench import Bench


@dataclass(frozen=True)
class Draw:
    """What was drawn. wordings: how many phrasings, 0 for all."""

    n_pairs: int
    wordings: int
    number: int

    @property
    def size(self) -> str:
        return f"{self.n_pairs} pairs, {self.wordings or 'all'} wordings"

    @property
    def label(self) -> str:
        return f"{self.size}, draw {self.number}"


Drawn = Mapping[Draw, ControlVector]  # of one instruction


class Size(Struct, frozen=True, kw_only=True):
    """What all draws of one size did. cosine: of their directions with those of the largest size."""

    n_pairs: int
    wordings: int
    followed: Share
    worst_draw: float | None = None
    best_draw: float | None = None
    cosine: float | None = None


def draw_vectors(
    engine: Engine, bench: Bench, instruction: Instruction, vector: ControlVector, draws: Sequence[Draw]
) -> Drawn:
    """The vector of each draw, applied as `vector` is; states are computed once for each prompt."""
    queries = bench.catalog.queries_for(instruction, "extraction")
    pairs_of = {draw: draw_pairs(instruction, queries, draw, bench.seed) for draw in draws}
    prompts = [
        text for pairs in pairs_of.values() for pair in pairs for text in (pair.plain, pair.instructed)
    ]
    with open_backend(engine) as backend:
        states = States(backend)
        states.of(prompts)
        return {draw: vector_of(vector, *states.of_pairs(pairs)) for draw, pairs in pairs_of.items()}


def draw_pairs(instruction: Instruction, queries: Sequence[Query], draw: Draw, seed: int = 0) -> list[Pair]:
    """Queries without repetition (as far as there are enough) and wordings in turn, both in random order.

    Fewer queries than pairs: a query comes again with another wording."""
    rng = np.random.default_rng([seed, draw.n_pairs, draw.wordings, draw.number])
    wordings = [instruction.phrasings[i] for i in rng.permutation(len(instruction.phrasings))]
    wordings = wordings[: draw.wordings or None]
    order = rng.permutation(len(queries))
    pairs = []
    for i in range(min(draw.n_pairs, len(queries) * len(wordings))):
        query = queries[order[i % len(queries)]].text
        pairs.append(Pair(f"{query} {wordings[(i + i // len(queries)) % len(wordings)]}", query))
    return pairs


def vector_of(like: ControlVector, instructed: np.ndarray, plain: np.ndarray) -> ControlVector:
    """Directions and mean projections of these states, (n, n_layer, n_embd) each, applied as `like` is."""
    means = instructed.mean(axis=0, dtype=np.float64), plain.mean(axis=0, dtype=np.float64)
    directions = means[0] - means[1]
    units = unit_rows(directions)
    instructed, plain = (np.einsum("le,le->l", states, units) for states in means)
    statistics = {"mean_with": instructed, "mean_without": plain, "std_with": None, "std_without": None}
    return replace(like, directions=directions, **statistics)


def cosine(drawn: Sequence[Drawn], draw: Draw, largest: Sequence[Draw]) -> float:
    """With the mean direction of the other draws of the largest size, at the steered layer; mean over
    instructions."""
    cosines = []
    for vectors in drawn:
        (layer, *_) = vectors[draw].layers
        reference = np.mean([vectors[other].unit(layer) for other in largest if other != draw], axis=0)
        cosines.append(float(vectors[draw].unit(layer) @ reference / np.linalg.norm(reference)))
    return float(np.mean(cosines))


def sizes_of(rows: Outcomes, draws: Sequence[Sequence[Draw]], drawn: Sequence[Drawn]) -> list[Size]:
    parts = rows.by("condition")
    largest = max((members for members in draws if not members[0].wordings), key=lambda own: own[0].n_pairs)
    sizes = []
    for members in draws:
        followed = [parts[draw.label].followed for draw in members]
        sizes.append(
            Size(
                n_pairs=members[0].n_pairs,
                wordings=members[0].wordings,
                followed=Outcomes(row for draw in members for row in parts[draw.label]).share,
                worst_draw=min(followed),
                best_draw=max(followed),
                cosine=mean([cosine(drawn, draw, largest) for draw in members]),
            )
        )
    return sizes
