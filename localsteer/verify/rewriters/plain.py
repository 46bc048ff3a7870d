"""A plain reply as the rewriters see it: whole, in blocks, in sentences, and in parts of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

from localsteer.verify.rewriters.markdown import CODE, HEADING, TEXT, Block, parse, prose, unmarked
from localsteer.verify.rewriters.sentences import sentences, spans, without_lead_in
from localsteer.verify.rewriters.words import as_subject, as_title

T = TypeVar("T")

Piece = tuple[str, str]  # (gap before it, text)


class Plain:
    """A reply, what was asked, and the seed that settles matters of taste."""

    def __init__(self, text: str, prompt: str | None = None, seed: int = 0) -> None:
        self.text = text.strip()
        self.prompt = prompt
        self.seed = seed

    @cached_property
    def blocks(self) -> list[Block]:
        return parse(self.text)

    @cached_property
    def paragraphs(self) -> list[str]:
        """Prose without Markdown."""
        return prose(self.blocks)

    @cached_property
    def sentences(self) -> list[str]:
        """Of the prose."""
        return [sentence for paragraph in self.paragraphs for sentence in sentences(paragraph)]

    @cached_property
    def pieces(self) -> list[Piece]:
        """Sentences, list items, headings and code, in their own Markdown."""
        pieces: list[Piece] = []
        for block in self.blocks:
            gap, at = block.gap, 0
            for start, end in spans(block.source) if block.kind == TEXT else [(0, len(block.source))]:
                pieces.append((gap + block.source[at:start], block.source[start:end]))
                gap, at = "", end
        return pieces

    @property
    def has_code(self) -> bool:
        return any(block.kind == CODE for block in self.blocks)

    @cached_property
    def subject(self) -> str:
        """A title: the reply's own heading, what the prompt asks about, or how the reply opens."""
        own = [unmarked(block.text) for block in self.blocks[:1] if block.kind == HEADING]
        tried = (*map(as_title, own), as_subject(self.prompt or ""), *map(as_title, self.sentences[:1]))
        return next(filter(None, tried), "")

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, by the seed: texts with the same seed get the same form where they can."""
        return options[self.seed % len(options)]

    def parts(self, n: int) -> list[str] | None:
        """n parts of about equal length, in their own Markdown; None where there are too few sentences.

        Cut at empty lines where there are enough of them, else at lines, else at sentences.
        """
        for pieces in (_together(self.blocks, "\n"), _together(self.blocks, ""), self.pieces):
            if 0 < n <= len(pieces):
                return [joined(group) for group in grouped(pieces, n, lambda piece: len(piece[1]))]
        return None

    def without(self, unwanted: Callable[[str], bool]) -> str:
        """The reply without the sentences, items and headings that are unwanted."""
        return self.within(lambda text: int(unwanted(text)), 0)

    def beginning(self, cost: Callable[[str], int], budget: int) -> str:
        """As many sentences and items from the start as a budget allows."""
        kept = []
        for piece in self.pieces:
            budget -= cost(piece[1])
            if budget < 0:
                break
            kept.append(piece)
        return _closed(kept)

    def within(self, cost: Callable[[str], int], budget: int) -> str:
        """The reply without the sentences and items that a budget does not allow; the first ones stay."""
        kept, skipped = [], ""
        for gap, text in self.pieces:
            skipped = max(skipped, gap, key=lambda blank: (blank.count("\n"), len(blank)))
            if cost(text) <= budget:
                budget -= cost(text)
                kept.append((skipped, text))
                skipped = ""
        return _closed(kept)


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(gap + text for gap, text in pieces).strip()


def grouped(items: Sequence[T], n: int, size: Callable[[T], int]) -> list[list[T]]:
    """n runs of the items of about equal size, none of them empty; there are n items at least."""
    goal = sum(map(size, items)) / n
    groups, at, seen = [], 0, 0
    for group in range(1, n + 1):
        end, seen = at + 1, seen + size(items[at])
        last = len(items) - (n - group)
        while end < last and (group == n or seen + size(items[end]) / 2 <= goal * group):
            seen, end = seen + size(items[end]), end + 1
        groups.append(list(items[at:end]))
        at = end
    return groups


def _together(blocks: Sequence[Block], near: str) -> list[Piece]:
    """Blocks as pieces; a heading stays with what follows it, and so do blocks at the gap `near`."""
    groups: list[tuple[str, list[str]]] = []
    opened = False
    for block in blocks:
        if groups and (opened or block.gap == near):
            groups[-1][1].extend((block.gap, block.source))
        else:
            groups.append((block.gap, [block.source]))
        opened = block.kind == HEADING or block.source.endswith(":")
    return [(gap, "".join(sources)) for gap, sources in groups]


def _closed(pieces: Sequence[Piece]) -> str:
    """The pieces, without a lead-in at the end that nothing follows any more."""
    return "\n".join(without_lead_in(joined(pieces).split("\n")))
