"""The words that carry a text: what may be highlighted, put in capitals, or made a title."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from localsteer.verify.rewriters.markdown import is_fence

T = TypeVar("T")
Span = tuple[int, int]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNTOUCHED = re.compile(
    r"`[^`\n]*`|(?<!\*)\*{1,3}[^*\n]+\*{1,3}|https?://\S+|\[[^\[\]\n]*\](?:\([^()\s]*\))?"
)
_WORD = re.compile(r"(?<![\w'\u2019-])[^\W\d_]+(?![\w'\u2019-])")  # whole: not the half of office-approved
_MIN_KEY_LETTERS = 4
_COMMON = _words(
    "about above after again all almost along already also although always among and another any are around "
    "because been before behind being below between both but can cannot could does doing done down during "
    "each either else enough even ever every few for from further generally get gets give given had has have "
    "here how however into its itself just keep least less like likely made make makes many may maybe might "
    "more most much must near need never next not now often once one only other others our out over own "
    "perhaps quite rather same shall should since some still such than that the their them then there "
    "therefore these they this those through thus too under until upon use used uses using usually very was "
    "way well were what when where whether which while who whom whose why will with within without would yet "
    "you your"
)

_REQUEST = re.compile(
    r"(?:please\s)?(?:(?:can|could|would|will)\syou\s)?(?:please\s)?(?:help\sme\s)?"
    r"(?:tell\sme\s(?:more\s)?about|what\sdo\syou\sknow\sabout|write(?:\sme)?|give\sme|explain|describe|suggest"
    r"|invent|recommend|compare|create|summarize|what\s(?:is|are|was|were)|who\s(?:is|was))\s",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:a|an|the|some)\s", re.IGNORECASE)
_CLAUSE = re.compile(r"[,;:.?!。\uff01\uff1f\uff0c]")
_SMALL = _words("a an and as at but by for from in of on or the to with")
_MAX_TITLE_WORDS = 9
_MAX_TITLE_CHARACTERS = 80
_TITLE_WITHIN = 1000  # characters from the start; no title is further in


def key_words(text: str) -> list[Span]:
    """(start, end) of each: no common words, none in code, links or emphasis."""
    spans: list[Span] = []
    at, code = 0, False
    for line in text.split("\n"):
        fence = is_fence(line)
        if not code and not fence:
            spans += [(at + start, at + end) for start, end in _keys(line)]
        code ^= fence
        at += len(line) + 1
    return spans


def spread(items: Sequence[T], n: int) -> list[T]:
    """n of the items, evenly over their order; all where there are fewer."""
    return [items[at * len(items) // n] for at in range(n)] if n <= len(items) else list(items)


def replaced(text: str, spans: Sequence[Span], change: Callable[[str], str]) -> str:
    """The text with each span changed; they stand in order."""
    parts, at = [], 0
    for start, end in spans:
        parts += [text[at:start], change(text[start:end])]
        at = end
    return "".join([*parts, text[at:]])


def as_subject(prompt: str) -> str:
    """What a prompt asks about, as a title ("Tell me about otters.": "Otters"), or nothing."""
    asked = " ".join(prompt[:_TITLE_WITHIN].split())
    return as_title(_REQUEST.sub("", asked, count=1) if _REQUEST.match(asked) else asked)


def as_title(text: str) -> str:
    """The first clause of a text in a title's capitals; empty where there is none."""
    clauses = _CLAUSE.split(text[:_TITLE_WITHIN])
    clause = next((part for part in clauses if any(map(str.isalnum, part))), "")
    words = _ARTICLE.sub("", re.sub('[<>*#"]', "", clause).strip(), count=1).split()[:_MAX_TITLE_WORDS]
    while len(words) > 1 and words[-1].lower() in _SMALL:
        words.pop()
    return " ".join(map(_titled, words, range(len(words))))[:_MAX_TITLE_CHARACTERS].strip()


def _keys(line: str) -> list[Span]:
    visible = _UNTOUCHED.sub(lambda found: " " * len(found[0]), line)
    found = (match.span() for match in _WORD.finditer(visible))
    return [(a, b) for a, b in found if b - a >= _MIN_KEY_LETTERS and line[a:b].lower() not in _COMMON]


def _titled(word: str, at: int) -> str:
    return word if at and word.lower() in _SMALL else word[:1].upper() + word[1:]
