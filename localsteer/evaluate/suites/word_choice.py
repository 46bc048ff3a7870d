"""Which words are included and excluded: those asked for, those that the catalogue names, and those that this
model's own replies use most."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

INCLUDED = ("music", "river", "winter", "garden", "mirror")  # where the catalogue names no words
N_EXCLUDED = 4
MIN_LETTERS = 3
EXISTENCE, FORBIDDEN = "keywords:existence", "keywords:forbidden_words"
_COMMON = """
about after also and any are because been before being between but can could did does each for from
get had has have her here him his how into its just like made make many may more most much must not
now off one only other our out over own she should some such than that the their them then there
these they this those through too under upon use used very was were what when where which while who
will with would you your near often every
"""
COMMON = frozenset(_COMMON.split())  # words of grammar: a reply without one of them is another kind of text


def words_to_include(bench: Bench) -> list[str]:
    """Those asked for; else those of the catalogue's instructions to include a word, or those of INCLUDED
    that the model's own replies do not use anyway."""
    named = _named(bench, EXISTENCE, "keywords")
    if named or bench.asked is not None:
        return named
    used = dict(words_used(bench))
    return [word for word in INCLUDED if word not in used]


def words_to_exclude(bench: Bench) -> list[str]:
    """Those asked for, else the words that the model's own replies use most; none of `contexts`."""
    brought = contexts(bench)
    if bench.asked is not None:
        return [word for word in _named(bench, FORBIDDEN, "forbidden_words") if word not in brought]
    return [word for word, _ in words_used(bench) if word not in brought][:N_EXCLUDED]


def contexts(bench: Bench) -> dict[str, Instruction]:
    """The instructions to avoid one word for which the catalogue has queries of their own, by word: these
    queries bring the word into replies. Those asked for, if any were."""
    avoided = _of_one_word(bench, FORBIDDEN, "forbidden_words")
    return {word: each for word, each in avoided if {"validation", "test"} <= each.queries.keys()}


def words_used(bench: Bench, *steer: ControlVector) -> list[tuple[str, float]]:
    """(word, share of the validation replies that use it), the most used first; no words of grammar, of the
    queries, or of less than three letters. steer: nothing for the model's own replies."""
    replies = bench.plain(bench.validation, *steer)
    counts: Counter[str] = Counter()
    for row in replies:
        counts.update(set(_words(row.reply.text)) - set(_words(row.cell.query.text)))
    return [
        (word, n / len(replies)) for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _words(text: str) -> list[str]:
    return [
        word
        for word in re.findall(r"[^\W\d_]+", text.lower())
        if len(word) >= MIN_LETTERS and word not in COMMON
    ]


def _named(bench: Bench, verifier: str, argument: str) -> list[str]:
    return list(dict.fromkeys(word for word, _ in _of_one_word(bench, verifier, argument)))


def _of_one_word(bench: Bench, verifier: str, argument: str) -> list[tuple[str, Instruction]]:
    """The instructions asked for, or those of the catalogue that are ready for use, with their word."""
    if bench.asked is not None:
        known = [bench.instruction(each) for each in bench.asked]
    else:
        known = [
            instruction for instruction in bench.catalog.instructions.values() if not instruction.open_slots
        ]
    of_one = [each for each in known if each.verifier == verifier and len(each.kwargs[argument]) == 1]
    return [(each.kwargs[argument][0], each) for each in of_one]
