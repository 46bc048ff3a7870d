"""Length as the paper steers it (Stolfo et al., section 4): five levels, and two directions made of them.

    conciseness = mean state with "be (extremely) concise" - mean state without
    verbosity   = mean state with "be (extremely) verbose" - mean state without

Both are difference-in-means directions over the base queries of their two levels, added with a weight that
says how far to go: `add`, x <- x + s v, where the paper's c is s |v|. The middle level, moderate, belongs to
neither. Its vector, and those of the other four, can be extracted like any instruction's.
"""

from __future__ import annotations

from itertools import chain

from localsteer.catalog import Catalog, Instruction
from localsteer.errors import CatalogError

from .recipes import Extracted

LEVELS = ("extremely_concise", "concise", "moderate", "verbose", "extremely_verbose")
DIRECTIONS = {"conciseness": LEVELS[:2], "verbosity": LEVELS[3:]}
LENGTHS = (*LEVELS, *DIRECTIONS)  # the values of `--length`
QUERIES_PER_LEVEL = 50  # base queries, each asked at every level of a direction


def length(catalog: Catalog, name: str) -> Extracted:
    """How to extract one of LENGTHS. Raises CatalogError for any other name, and if the catalogue lacks a
    level."""
    if name in DIRECTIONS:
        levels = [catalog.get(level) for level in DIRECTIONS[name]]
        n_pairs = QUERIES_PER_LEVEL * len(levels)
        return Extracted(direction(name, levels), n_pairs=n_pairs, n_queries=QUERIES_PER_LEVEL)
    if name not in LEVELS:
        raise CatalogError(f"unknown length {name!r}: {', '.join(LENGTHS)}")
    return Extracted(catalog.get(name))


def direction(name: str, levels: list[Instruction]) -> Instruction:
    """Several levels as one instruction, with their phrasings in turn, so that pairs are divided equally.

    It has no verifier, since nothing says how long a concise reply may be; mean words show the effect.
    """
    # equally many of each: `build_pairs` advances by one phrasing with each query and each round
    phrasings = chain.from_iterable(zip(*(level.phrasings for level in levels), strict=False))
    return Instruction(id=name, phrasings=tuple(phrasings), group="length", literal=True)
