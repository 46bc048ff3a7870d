"""What `--include-word fox`, `--exclude-word fox`, `--length concise` and `--language es` extract: an
instruction of the catalogue, and from how many pairs.

    recipe = include_word(load_catalog(), "fox")
    vector = recipe.extract("model.gguf", queries)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from localsteer.catalog import Catalog, Instruction, Query, spread
from localsteer.catalog.languages import find_language
from localsteer.errors import CatalogError
from localsteer.vector import ControlVector

from .pairs import DEFAULT_PAIRS

WORD_PAIRS = 20  # pairs for each word (Stolfo et al., section 5)


@dataclass(frozen=True)
class Extracted:
    """instruction: what the prompts of the pairs ask for. n_pairs: at most this many. n_queries: how many of
    the base queries, evenly spaced; None: all. excludes: what minus the vector makes the model do, or
    None."""

    instruction: Instruction
    n_pairs: int = DEFAULT_PAIRS
    n_queries: int | None = None
    excludes: Instruction | None = None

    @property
    def target(self) -> Instruction:
        """The instruction that a model steered by the vector follows."""
        return self.excludes or self.instruction

    def extract(
        self, source: Any, queries: Sequence[Query], *, n_pairs: int | None = None, **options: Any
    ) -> ControlVector:
        """Extract the vector. source, options: of localsteer.extract.extract. n_pairs: replaces the
        recipe's."""
        from localsteer.extract import extract

        queries = spread(queries, self.n_queries or len(queries))
        if n_pairs is None:
            n_pairs = min(self.n_pairs, len(queries) * len(self.instruction.fill().phrasings))
        vector = extract(source, self.instruction, queries, n_pairs=n_pairs, **options)
        return vector if self.excludes is None else minus(vector, self.excludes)


def include_word(catalog: Catalog, word: str) -> Extracted:
    """A word that replies should contain. Raises CatalogError unless it is a single word."""
    return Extracted(_of_word(catalog, "include_word", word), n_pairs=WORD_PAIRS)


def exclude_word(catalog: Catalog, word: str) -> Extracted:
    """A word that replies should not contain: minus the vector of including it (the paper, section 5).

    This is not the vector of "do not use the word", which is `--instruction exclude_word --slot word=fox`.
    """
    excludes = _of_word(catalog, "exclude_word", word)
    return replace(include_word(catalog, word), excludes=excludes)


def language(catalog: Catalog, wanted: str) -> Extracted:
    """The language of replies, by code or English name. Raises CatalogError."""
    return Extracted(find_language(catalog, wanted))


def minus(vector: ControlVector, excludes: Instruction) -> ControlVector:
    """The vector of the same pairs with their sides exchanged: -v_l, so strength 1 leads away.

    The mean without the instruction becomes the target: in mode `project`, the projection is held where it is
    when nobody asks for the word. `excludes`: the instruction of the result.
    """
    changed = {
        "instruction_id": excludes.id,
        "instruction": excludes.phrasings[0],
        "phrasings": list(excludes.phrasings),
        "verifier": excludes.verifier,
        "kwargs": dict(excludes.kwargs),
        "method": f"minus the vector of {vector.provenance.get('instruction_id', vector.label)}",
    }
    return replace(
        vector,
        directions=-vector.directions,
        mean_with=None if vector.mean_without is None else -vector.mean_without,
        mean_without=None if vector.mean_with is None else -vector.mean_with,
        std_with=vector.std_without,
        std_without=vector.std_with,
        name=excludes.id,
        provenance={**vector.provenance, **changed},
    )


def _of_word(catalog: Catalog, instruction_id: str, word: str) -> Instruction:
    word = word.strip()
    if not word or len(word.split()) > 1:
        raise CatalogError(f"{word!r} is not a word: write one word, without blanks")
    return catalog.get(instruction_id, word=word)
