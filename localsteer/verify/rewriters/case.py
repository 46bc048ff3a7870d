"""change_case:* - all small, all capitals, and so many words in capitals."""

from __future__ import annotations

import re

from localsteer.verify.rewriters.plain import Plain
from localsteer.verify.rewriters.words import key_words, replaced, spread
from localsteer.verify.words import count_capital_words

_CAPITALS = re.compile(r"\b[^\W\d_]{2,}\b")


def english_lowercase(plain: Plain) -> str:
    return plain.text.lower()


def english_capital(plain: Plain) -> str:
    return plain.text.upper()


def capital_word_frequency(plain: Plain, *, capital_frequency: int, capital_relation: str) -> str:
    """At least: key words in capitals, spread over the reply. Less than: NASA becomes Nasa, "I" stays."""
    if capital_relation == "less than":
        return _CAPITALS.sub(lambda word: word[0].capitalize() if word[0].isupper() else word[0], plain.text)
    missing = capital_frequency - count_capital_words(plain.text)
    small = [span for span in key_words(plain.text) if not plain.text[slice(*span)].isupper()]
    return replaced(plain.text, spread(small, missing), str.upper)
