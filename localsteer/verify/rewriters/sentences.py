"""Sentences of a reply; one that a token limit has cut, back at the end of its last sentence; one that goes
round in circles, back at the last sentence that says something new; and the first paragraph or two."""

from __future__ import annotations

import re
from collections.abc import Sequence

from localsteer.verify.rewriters.markdown import is_fence, is_heading
from localsteer.verify.sentences import split_sentences

_CJK_END = re.compile(r"(?<=[。\uff01\uff1f])(?![」』\uff09。\uff01\uff1f])")
_FINISHED = re.compile(r"""[.!?。\uff01\uff1f…।]["'*_)\]”\u2019»」』\uff09]*\Z""")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\A\W*\d+(?=\W)")  # of a list item
_SHINGLE = 4  # words in a row that a sentence shares with what stood before it
_SAID = 0.5  # of a sentence's shingles; beyond, it says nothing new
_LABEL = re.compile(r"(?:[-+•]|\d{1,3}[.)]|\w[.)])?")


def sentences(text: str) -> list[str]:
    """As IFEval cuts them, and at the full stops of Chinese and Japanese, which it does not see.

    The number of a list item stays with what it numbers.
    """
    return [text[start:end] for start, end in spans(text)]


def spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence."""
    spans: list[tuple[int, int]] = []
    parts = (part.strip() for whole in split_sentences(text) for part in _CJK_END.split(whole))
    start, at = -1, 0
    for part in filter(None, parts):
        begin = text.index(part, at)
        at = begin + len(part)
        start = begin if start < 0 else start
        if not _is_label(part):
            spans.append((start, at))
            start = -1
    return spans if start < 0 else [*spans, (start, at)]


def trim_to_sentence(reply: str) -> str:
    """The reply without the sentence that a token limit has cut; empty where there is no other.

    List items and lines of verse need no full stop: of these the last line goes. An open fence goes whole,
    and so do a lead-in and a list number that nothing follows any more.
    """
    lines = _without_open_fence(reply.rstrip().split("\n"))
    last = lines[-1].rstrip() if lines else ""
    if _FINISHED.search(last[-16:]) and not _is_label(last):
        return "\n".join(lines).rstrip()
    if is_fence(last):
        return "\n".join(lines)
    return "\n".join(without_lead_in([*lines[:-1], _finished_part(last)]))


def trim_before_loop(reply: str) -> str:
    """The reply up to the first sentence that for the most part repeats what stood before it.

    Small models go round in circles when they have nothing more to say, and a loop that is learned from would
    be learned. Sentences of one or two words may recur.
    """
    said: set[tuple[str, ...]] = set()
    words: list[str] = []
    for start, end in spans(reply):
        own = _WORD.findall(_NUMBER.sub("", reply[start:end].casefold()))
        shingles = _shingles(own)
        if len(own) > 2 and sum(shingle in said for shingle in shingles) > _SAID * len(shingles):
            return reply[:start].rstrip()
        # across the border to the sentence before, too
        said.update(_shingles([*words[1 - _SHINGLE :], *own]))
        words = own
    return reply


def trim_to_paragraph(reply: str, least: int) -> str | None:
    """The reply up to the first empty line that comes after `least` words or more and leaves nothing open: no
    fence, and no line that announces what follows. None where there is no such line, or nothing after it."""
    lines = [line.rstrip() for line in reply.rstrip().split("\n")]
    n_words = n_fences = 0
    for at, line in enumerate(lines):
        if line:
            n_words += len(_WORD.findall(line))
            n_fences += is_fence(line)
        elif n_words >= least and n_fences % 2 == 0 and lines[at - 1] and not _announces(lines[at - 1]):
            return "\n".join(lines[:at])
    return None


def _shingles(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Runs of four words, or the whole of a shorter sentence."""
    n = max(1, len(words) - _SHINGLE + 1)
    return [tuple(words[start : start + _SHINGLE]) for start in range(n)]


def without_lead_in(lines: Sequence[str]) -> list[str]:
    """The lines without those at the end that announce what is not there: "Tips:", "## Food", "3."."""
    kept = list(lines)
    while kept and _announces(kept[-1]):
        kept.pop()
    return kept


def _without_open_fence(lines: list[str]) -> list[str]:
    fences = [at for at, line in enumerate(lines) if is_fence(line)]
    return without_lead_in(lines[: fences[-1]]) if len(fences) % 2 else lines


def _finished_part(line: str) -> str:
    whole = sentences(line)
    kept = line[: line.rfind(whole[-1])].rstrip() if len(whole) > 1 else ""
    return "" if _is_label(kept) else kept


def _announces(line: str) -> bool:
    bare = line.strip()
    return bare.rstrip("*").endswith((":", "\uff1a")) or is_heading(bare) or _is_label(bare)


def _is_label(text: str) -> bool:
    """A list's number or letter, with the marks around it, or such marks alone."""
    return _LABEL.fullmatch(text.strip().lstrip("#>*( \t").rstrip("* ")) is not None
