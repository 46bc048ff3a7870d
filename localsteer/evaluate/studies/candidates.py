"""Ways to put the vectors of several instructions together: each at its own settings, all at one layer, each
at another one; and a word excluded by minus the vector of including it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.cells import applied
from localsteer.evaluate.controls import is_possible
from localsteer.vector import ControlVector

N_SPREAD = 16  # ways to put the three at different layers that are tried
POSITIONS = ("prompt", "all")
KINDS = ("own settings", "one layer", "different layers")
MINUS = (1.0, 2.0)  # strengths with which a word's include vector is taken away


@dataclass(frozen=True)
class Candidate:
    """One way to put vectors together. kind: one of KINDS."""

    kind: str
    label: str
    vectors: tuple[ControlVector, ...]


def candidates(
    instructions: Sequence[Instruction],
    vectors: Mapping[str, ControlVector],
    raw: Mapping[str, ControlVector],
    minus: Mapping[str, ControlVector] | None = None,
    *,
    n_spread: int = N_SPREAD,
    seed: int = 0,
) -> list[Candidate]:
    """Ways to put the vectors together; those whose directions are nearly parallel at a layer are left out.

    Layers of the lower two thirds: above them little is left to steer. minus: for an instruction to exclude a
    word, the vector that includes it; the paper excludes by adding it with a negative strength.
    """
    own = [vectors[instruction.id] for instruction in instructions]
    alone = Candidate(KINDS[0], KINDS[0], tuple(vector for each in own for vector in applied(each)))
    layers = range(max(3, 2 * own[0].n_layer // 3))
    bare = [raw[each.id].at(mode="project", strength=1.0) for each in instructions]
    ways = [
        Candidate(KINDS[1], f"layer {il}, {where}", tuple(v.at(layer=il, positions=where) for v in bare))
        for where in POSITIONS
        for il in layers
    ]
    orders = list(permutations(layers, len(bare)))
    drawn = np.random.default_rng(seed).permutation(len(orders))[:n_spread]
    for order in (orders[i] for i in sorted(drawn)):
        apart = tuple(v.at(layer=il, positions=POSITIONS[0]) for v, il in zip(bare, order, strict=True))
        ways.append(Candidate(KINDS[2], f"layers {', '.join(map(str, order))}, {POSITIONS[0]}", apart))
    more = [other for way in ways for other in _excluding(way, instructions, minus or {})]
    return [way for way in (alone, *ways, *more) if is_possible(way.vectors)]


def _excluding(
    way: Candidate, instructions: Sequence[Instruction], minus: Mapping[str, ControlVector]
) -> Iterator[Candidate]:
    """The same with a word excluded by minus its include vector."""
    for strength in MINUS if any(instruction.id in minus for instruction in instructions) else ():
        vectors = [
            minus[each.id].at(layer=old.layers, positions=old.positions, mode="add", strength=-strength)
            if each.id in minus
            else old
            for each, old in zip(instructions, way.vectors, strict=True)
        ]
        yield Candidate(way.kind, f"{way.label}, minus {strength:g} x include", tuple(vectors))
