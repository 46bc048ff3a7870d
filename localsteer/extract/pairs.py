"""Prompt pairs: the same base query with and without one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError

DEFAULT_PAIRS = 50


@dataclass(frozen=True)
class Pair:
    """Two prompts, before the chat template, that differ only in the instruction."""

    instructed: str
    plain: str


def build_pairs(
    instruction: Instruction, queries: Sequence[Query | str], n_pairs: int | None = None
) -> list[Pair]:
    """`n_pairs` different pairs (default: 50, or as many as possible), always the same ones.

    Queries are evenly spaced over the whole list, phrasings are taken in turn; if pairs outnumber queries, a
    query is repeated with its next phrasing. Raises CatalogError for no or empty queries, and for more pairs
    than queries x phrasings.
    """
    phrasings = instruction.fill().phrasings
    texts = _texts(queries)
    n_queries, n_phrasings = len(texts), len(phrasings)
    n = min(DEFAULT_PAIRS, n_queries * n_phrasings) if n_pairs is None else n_pairs
    if not 1 <= n <= n_queries * n_phrasings:
        raise CatalogError(
            f"{n} pairs can't be made from {n_queries} queries and {n_phrasings} phrasings of "
            f"{instruction.id!r}: ask for 1 to {n_queries * n_phrasings}, or add queries"
        )
    pairs = []
    for i in range(n):
        query = texts[i * n_queries // n if n <= n_queries else i % n_queries]
        phrasing = phrasings[(i % n_queries + i // n_queries) % n_phrasings]
        pairs.append(Pair(f"{query} {phrasing}", query))
    return pairs


def _texts(queries: Sequence[Query | str]) -> list[str]:
    """The texts of the queries, without repetitions."""
    texts = [(query.text if isinstance(query, Query) else query).strip() for query in queries]
    if not texts or not all(texts):
        raise CatalogError("there are no queries to extract from" if not texts else "a base query is empty")
    return list(dict.fromkeys(texts))
