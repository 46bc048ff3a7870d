"""change_case:* and language:* - capitals, and the language they are in."""

from __future__ import annotations

from localsteer.verify.language import chance
from localsteer.verify.verifiers.parameters import compare
from localsteer.verify.words import count_capital_words


def capital_word_frequency(reply: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Tokens in capitals as NLTK cuts them: "I" and "A" count, "DON'T" counts twice, "AND/OR" once."""
    if sum(map(str.isupper, reply)) < capital_frequency:  # so are the tokens, which need not be cut then
        return compare(0, capital_relation, capital_frequency)
    number = count_capital_words(reply, at_most=capital_frequency)
    return compare(number, capital_relation, capital_frequency)


def english_capital(reply: str) -> float:
    """No lowercase letter and at least one capital, in English. Some English in capitals is detected as
    German or another language, and fails; a reply without any language passes."""
    return chance(reply, "en") if reply.isupper() else 0.0


def english_lowercase(reply: str) -> float:
    """No capital and at least one lowercase letter, in English; a reply without any language passes."""
    return chance(reply, "en") if reply.islower() else 0.0


def response_language(reply: str, *, language: str) -> float:
    """The language of most of the reply; a reply without any language (digits, punctuation) passes."""
    return chance(reply, language)
