"""What the arguments of a verifier may be. Each checker returns the value to use, or raises ValueError.

IFEval fills a missing or negative argument with a random one; a verdict on that means nothing, so it is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from localsteer.verify.language import LANGUAGES
from localsteer.verify.patterns import expression

Checker = Callable[[Any], Any]

MAX_TEXTS = 200  # each of them is looked for in the whole reply
WHOLE_WORD = r"\b{}\b"
SECTION = r"\s?{}\s?\d+\s?"

RELATIONS = ("less than", "at least")  # all that IFEval knows: no "at most", no "exactly"


def count(value: Any) -> int:
    """A whole number, 0 or more. 3.0 passes: some copies of IFEval went through a float column."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, 0 or more")
    return value


def position(value: Any) -> int:
    """A whole number, 1 or more: the paragraph to look at."""
    if count(value) == 0:
        raise ValueError("a whole number, 1 or more")
    return int(value)


def relation(value: Any) -> str:
    if value not in RELATIONS:
        raise ValueError(" or ".join(map(repr, RELATIONS)))
    return value


def text(value: Any) -> str:
    """Text that is not blank, without the blanks around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text that is not blank")
    return value.strip()


def lower_text(value: Any) -> str:
    return text(value).lower()


def texts(value: Any) -> tuple[str, ...]:
    """A list of one or more texts. Blanks around them stay, as in IFEval: " cat" is not found at a reply's
    start."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise ValueError('a list of texts such as ["fox", "dog"]')
    for item in value:
        text(item)
    if len(value) > MAX_TEXTS:
        raise ValueError(f"{MAX_TEXTS} texts at most")
    return tuple(value)


def pattern(value: Any) -> str:
    """Text that IFEval reads as a regular expression. Raises CatalogError for one that can't be searched."""
    bare = text(value)
    expression(bare, re.IGNORECASE)
    expression(bare.lower())
    expression(bare, around=SECTION)
    return bare


def patterns(value: Any) -> tuple[str, ...]:
    """A list of one or more patterns, with the blanks around them, as in `texts`."""
    for item in texts(value):
        expression(item, re.IGNORECASE)
        expression(item, re.IGNORECASE, WHOLE_WORD)
    return tuple(value)


def letter(value: Any) -> str:
    """One character, in lower case. IFEval's data asks for "#" and "!" too."""
    if not isinstance(value, str) or len(value) != 1 or not value.strip():
        raise ValueError("one character")
    return value.lower()


def language(value: Any) -> str:
    if value not in LANGUAGES:
        raise ValueError("one of " + ", ".join(LANGUAGES))
    return value


def compare(number: int, relation: str, threshold: int) -> bool:
    """Whether a number is "less than" or "at least" the threshold, IFEval's two relations."""
    return number < threshold if relation == "less than" else number >= threshold


def describe(checker: Checker) -> str:
    """What an argument may be, in a few words."""
    return {
        count: "a whole number, 0 or more",
        position: "a whole number, 1 or more",
        relation: " or ".join(map(repr, RELATIONS)),
        lower_text: "text, in any case",
        pattern: "text",
        patterns: "a list of texts",
        letter: "one character",
        language: f"an ISO 639-1 code: {', '.join(LANGUAGES)}",
    }[checker]
