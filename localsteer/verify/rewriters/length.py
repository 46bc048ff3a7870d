"""length_constraints:* - sentences, words, paragraphs."""

from __future__ import annotations

import re

from localsteer.verify.rewriters.markdown import TEXT, finished, parse
from localsteer.verify.rewriters.plain import Plain
from localsteer.verify.rewriters.sentences import sentences
from localsteer.verify.sentences import count_sentences
from localsteer.verify.words import count_words

_ASTERISKS = re.compile(r"\*{3,}")
_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_CLAUSE_END = re.compile(r"[,;:]\s")
# Before a clause with a subject of its own, which can stand alone.
_STANDS_ALONE = re.compile(r"(?:; |, (?:and|but|so) (?=(?:it|they|he|she|we|you|I|this|these|there)\b))(\w)")
# They open a sentence with a comma after them; other words stand alone before a dash.
_ADVERBS = re.compile(
    r"however|therefore|moreover|finally|meanwhile|furthermore|overall|then|\w+ly", re.IGNORECASE
)


def number_sentences(plain: Plain, *, num_sentences: int, relation: str) -> str | None:
    """Less than: the first sentences, those of lists included. At least: items become sentences, and so do
    clauses that can stand alone."""
    if relation == "less than":
        return _first_sentences(plain.paragraphs, num_sentences - 1)
    text = "\n\n".join(plain.paragraphs)
    missing = num_sentences - count_sentences(text)
    return text if missing <= 0 else _STANDS_ALONE.sub(_new_sentence, text, count=missing)


def number_words(plain: Plain, *, num_words: int, relation: str) -> str | None:
    """Less than: the first sentences and items that fit, or clauses. More words would be invented."""
    if relation != "less than":
        return None
    kept = plain.beginning(count_words, num_words - 1)
    return kept or _first_clauses(plain, num_words - 1)


def number_paragraphs(plain: Plain, *, num_paragraphs: int) -> str | None:
    """Parts of about equal length between dividers of three asterisks."""
    bare = Plain(_ASTERISKS.sub("**", plain.text), plain.prompt, plain.seed)
    parts = bare.parts(num_paragraphs)
    return "\n\n***\n\n".join(parts) if parts else None


def nth_paragraph_first_word(
    plain: Plain, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> str | None:
    """Parts of about equal length between empty lines; the word opens its own, before a dash or a comma."""
    parts = plain.parts(num_paragraphs)
    if parts is None:
        return None
    solid = [_EMPTY_LINES.sub("\n", part) for part in parts]
    opening = first_word[:1].upper() + first_word[1:]
    solid[nth_paragraph - 1] = opening + _mark(first_word, solid[nth_paragraph - 1])
    return "\n\n".join(solid)


def _mark(word: str, paragraph: str) -> str:
    """The paragraph with what parts it from the word before it; lists and headings start a line."""
    blocks = parse(paragraph)
    if not blocks or blocks[0].kind != TEXT:  # none: a rule alone
        return "\n" + paragraph
    return f", {paragraph}" if _ADVERBS.fullmatch(word) else f" - {paragraph}"


def _first_sentences(paragraphs: list[str], budget: int) -> str:
    kept = []
    for paragraph in paragraphs:
        fitting = []
        for sentence in sentences(paragraph):
            budget -= count_sentences(sentence)
            if budget < 0:
                break
            fitting.append(sentence)
        kept.append(" ".join(fitting))
        if budget < 0:
            break
    return "\n\n".join(filter(None, kept))


def _new_sentence(found: re.Match[str]) -> str:
    return f". {found[1].upper()}"


def _first_clauses(plain: Plain, budget: int) -> str | None:
    opening = (plain.sentences or [""])[0]
    kept = start = 0
    for clause_end in _CLAUSE_END.finditer(opening):
        budget -= count_words(opening[start : clause_end.start()])
        if budget < 0:
            break
        kept, start = clause_end.start(), clause_end.end()
    return finished(opening[:kept]) if start else None
