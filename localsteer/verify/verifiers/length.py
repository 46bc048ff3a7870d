"""length_constraints:* - sentences, words, paragraphs."""

from __future__ import annotations

import re

from localsteer.verify.sentences import count_sentences
from localsteer.verify.verifiers.parameters import compare
from localsteer.verify.words import count_words

_DIVIDER = re.compile(r"\s?\*{3}\s?")
_WORD_END = re.compile(r"""[.,?!'"]""")


def number_sentences(reply: str, *, num_sentences: int, relation: str) -> bool:
    """Sentences as NLTK's Punkt splits them: `localsteer.verify.sentences` lists its quirks."""
    return compare(count_sentences(reply, at_most=num_sentences), relation, num_sentences)


def number_words(reply: str, *, num_words: int, relation: str) -> bool:
    """Runs of letters, digits and underscores: "well-known" and "don't" are two words each."""
    return compare(count_words(reply), relation, num_words)


def number_paragraphs(reply: str, *, num_paragraphs: int) -> bool:
    """Exactly this many paragraphs between dividers of three asterisks; blank lines separate nothing.

    A divider before the first or after the last paragraph does not count; two in a row fail the reply, and
    so do six asterisks; four leave one in the text.
    """
    parts = _DIVIDER.split(reply)
    filled = [bool(part.strip()) for part in parts]
    if not all(filled[1:-1]):
        return False
    return sum(filled) == num_paragraphs


def nth_paragraph_first_word(reply: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly this many paragraphs separated by an empty line; the nth starts with the word, in any case.

    Blank paragraphs are left out of the count but not out of the numbering: after three line breaks more the
    "third paragraph" is the second one with text. Only . , ? ! or a quote ends the first word: "Summary:"
    and "**summary**" are not "summary", "summary's" is.
    """
    paragraphs = reply.split("\n\n")
    filled = sum(1 for paragraph in paragraphs if paragraph.strip())
    if filled != num_paragraphs or nth_paragraph > filled:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    opening = words[0].lstrip("'").lstrip('"')  # in this order: "'word loses both, '"word keeps one
    return _WORD_END.split(opening, maxsplit=1)[0].lower() == first_word
