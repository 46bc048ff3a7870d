"""keywords:* - words and letters that must or must not occur in the reply, and how often."""

from __future__ import annotations

import re

from localsteer.verify.patterns import expression
from localsteer.verify.verifiers.parameters import WHOLE_WORD, compare


def existence(reply: str, *, keywords: tuple[str, ...]) -> bool:
    """Every keyword occurs, in any case, also inside a word: "cat" is found in "education"."""
    return all(expression(keyword, re.IGNORECASE).search(reply) for keyword in keywords)


def frequency(reply: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword's occurrences, in any case, also inside words: "art" occurs twice in "Art in parts"."""
    occurrences = expression(keyword, re.IGNORECASE).count(reply)
    return compare(occurrences, relation, frequency)


def forbidden_words(reply: str, *, forbidden_words: tuple[str, ...]) -> bool:
    """No word of the list occurs as a whole word, in any case: "cat" forbids "Cat-like", not "cats".

    A word that ends in punctuation ("U.S.", "etc.") is hardly ever found: the boundary after it asks for a
    letter or digit to follow.
    """
    return not any(expression(word, re.IGNORECASE, WHOLE_WORD).search(reply) for word in forbidden_words)


def letter_frequency(reply: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter's occurrences; lower and upper case count together."""
    return compare(reply.lower().count(letter), let_relation, let_frequency)
