"""Words as IFEval counts them: two different ways, one per instruction.

`length_constraints:number_words` counts runs of word characters: "well-known" is two words, "don't" is two,
"snake_case" is one. `change_case:capital_word_frequency` counts the tokens of NLTK's `word_tokenize`, which
cuts contractions ("DON'T" and "CANNOT" are two words each) and keeps hyphens and slashes ("AND/OR" is one).
Both are restated here for what they count, not for the exact text of punctuation tokens.
"""

from __future__ import annotations

import re

from localsteer.verify.sentences import count, sentences

_WORD = re.compile(r"\w+")

# A quote before a one-letter word is cut off it, clitics apart: "O'B" is two tokens, "O's" is not.
_QUOTE_BEFORE_LETTER = re.compile(r"'(?!re|ve|ll|[mtsdn])(?=\w\b)", re.IGNORECASE)
_CLOSING = r"""[\])}>"'»\u201d\u2019\s]*$"""
_APART = re.compile(
    r"""[«»\u2018\u2019\u201c-\u201e";@#$%&?!*\[\](){}<>]"""  # always tokens of their own
    r"""|`+|''|--|\.{2,}"""
    r"""|[:,](?!\d)"""  # 3:15 and 1,000 stay whole
    rf"""|(?<=[^.])\.(?={_CLOSING})"""  # only the sentence's last full stop leaves its word
    rf"""|(?<=[^'])'(?=[ ?!;@#$%&`«\u2018\u201c\u201e]|[:,](?!\d)|\.\.|\.{_CLOSING})"""
)
# Clitics are cut before a space alone, not before a line break: "IT'S\n" is one token. The second kind is
# cut in all lower or all upper case only: "It'Ll" stays whole.
_CLITIC = re.compile(r"(?<=[^' ])('[sSmMdD]?)(?= )")
_LONG_CLITIC = re.compile(r"(?<=[^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?= )")
_FUSED = re.compile(
    r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b"
    r"|\b(wan)(na)(?=\s)|(?<= )('t)(is|was)\b",
    re.IGNORECASE,
)


def count_words(text: str) -> int:
    """How many words IFEval's `length_constraints:number_words` sees in a text."""
    return sum(1 for _ in _WORD.finditer(text))


def count_capital_words(text: str, at_most: int | None = None) -> int:
    """How many tokens are in capitals: "A", "I", "GPT-4" and "U.S." are, "ABCs" and "42" are not. at_most:
    where the counting may end."""
    if not any(map(str.isupper, text)):
        return 0
    capitals = (token for sentence in sentences(text) for token in _capital_tokens(sentence))
    return count(capitals, len(text) if at_most is None else min(at_most, len(text)))


def _capital_tokens(sentence: str) -> list[str]:
    if not any(map(str.isupper, sentence)):
        return []
    return [token for token in _tokens_of(sentence) if token.isupper()]


def tokens(text: str) -> list[str]:
    """The tokens of each sentence in turn; punctuation that stays on a word does not change a count."""
    return [token for sentence in sentences(text) for token in _tokens_of(sentence)]


def _tokens_of(sentence: str) -> list[str]:
    spaced = _QUOTE_BEFORE_LETTER.sub("' ", sentence)
    spaced = " " + _APART.sub(r" \g<0> ", spaced) + " "
    spaced = _LONG_CLITIC.sub(r" \1", _CLITIC.sub(r" \1", spaced))
    return _FUSED.sub(lambda found: f" {' '.join(part for part in found.groups() if part)} ", spaced).split()
