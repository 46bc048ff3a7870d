"""The Markdown of small chat models, cut into blocks and turned into prose.

Everything here takes linear time, on hostile text too: replies are whatever a model says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HEADING, ITEM, TEXT, CODE = "heading", "item", "text", "code"

_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*)")
_BOLD_LINE = re.compile(r"\s*(?:\*\*|__)([^*_]+)(?:\*\*|__):?\s*")
_ITEM = re.compile(r"\s*(?:[-*+•]|\(?\d{1,3}[.)])\s+(.*)")
_ROW = re.compile(r"\s*\|(.*)\|\s*")
_RULE = re.compile(r"[\s|:]*[-*_=](?:[-*_=|:]|\s)*")
_LINK = re.compile(r"!?\[([^\[\]\n]*)\]\([^()\s]*\)")
# The edges keep 2 * 3 * 4 and 2**3 as they are.
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9*])\*{1,3}(?=[^\s*])([^*\n]+)(?<=\S)\*{1,3}(?![A-Za-z0-9*])")
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
_END = re.compile(r"""[.!?。\uff01\uff1f…।:\uff1a]["'*_)\]”\u2019»」』\uff09]*\Z""")
_CLOSERS = "\"'*)]”\u2019»"


@dataclass(frozen=True)
class Block:
    """A heading, a list item, a paragraph or a fence of code.

    source: as the model wrote it. text: on one line, without the marker (#, 1., -); code without its fence.
    gap: what parts it from the block before, a line break or an empty line.
    """

    kind: str
    source: str
    text: str
    gap: str


def parse(text: str) -> list[Block]:
    """The blocks of a text in their order; rules (---) are dropped."""
    groups: list[tuple[str, list[str], str]] = []
    kind, gap = "", ""
    for line in text.split("\n"):
        if kind == CODE:
            groups[-1][1].append(line)
            kind = "" if is_fence(line) else CODE
        elif not line.strip() or _RULE.fullmatch(line):
            kind, gap = "", "\n\n"
        else:
            new = _kind(line)
            if _goes_on(kind, new, line):
                groups[-1][1].append(line)
            else:
                groups.append((new, [line], gap))
                kind = new
            gap = "\n"
    return [_block(*group) for group in groups]


def is_fence(line: str) -> bool:
    return line.lstrip().startswith("```")


def is_heading(line: str) -> bool:
    return (_HEADING.match(line) or _BOLD_LINE.fullmatch(line)) is not None


def prose(blocks: Sequence[Block], *, goes_on: bool = False) -> list[str]:
    """Paragraphs without Markdown. A heading opens its paragraph, list items carry theirs on.

    goes_on: something follows, so that a lead-in at the end keeps its colon.
    """
    found: list[list[str]] = []
    opened = False
    for block in blocks:
        said = _said(block)
        if not said:
            continue
        if found and (block.kind == ITEM or (block.kind == TEXT and opened)):
            found[-1].append(said)
        else:
            found.append([said])
        opened = said.endswith((":", "\uff1a"))
    paragraphs = [" ".join(paragraph) for paragraph in found]
    last = paragraphs[-1:] if goes_on else list(map(_closed, paragraphs[-1:]))
    return [*map(_closed, paragraphs[:-1]), *last]


def unmarked(text: str) -> str:
    """The text without bold, italics, links and code marks."""
    return _INLINE_CODE.sub(r"\1", _EMPHASIS.sub(r"\1", _LINK.sub(r"\1", text))).strip()


def finished(sentence: str) -> str:
    """With a full stop where nothing ends it."""
    bare = sentence.rstrip(",; ")
    if not bare or _END.search(bare[-8:]) or not (bare[-1].isalnum() or bare[-1] in _CLOSERS):
        return bare
    return bare + ("。" if _CJK.match(bare[-1]) else ".")


def _kind(line: str) -> str:
    if is_fence(line):
        return CODE
    if is_heading(line):
        return HEADING
    return ITEM if _ITEM.match(line) or _ROW.fullmatch(line) else TEXT


def _goes_on(kind: str, new: str, line: str) -> bool:
    """A line of text carries its paragraph on, and an item where it is indented."""
    return new == TEXT and (kind == TEXT or (kind == ITEM and line[0].isspace()))


def _block(kind: str, lines: list[str], gap: str) -> Block:
    source = "\n".join(lines)
    if kind == CODE:
        return Block(kind, source, "\n".join(line for line in lines if not is_fence(line)), gap)
    first = _bare(kind, lines[0])
    return Block(kind, source, " ".join(" ".join([first, *lines[1:]]).split()), gap)


def _bare(kind: str, line: str) -> str:
    """The line without its marker; the cells of a table's row one after the other."""
    if kind == HEADING:
        match = _HEADING.match(line) or _BOLD_LINE.fullmatch(line)
        return match[1].rstrip("#") if match else line
    if kind == ITEM and (row := _ROW.fullmatch(line)):
        return ", ".join(cell.strip() for cell in row[1].split("|"))
    match = _ITEM.match(line) if kind == ITEM else None
    return match[1] if match else line


def _said(block: Block) -> str:
    if block.kind == CODE:
        return block.text
    said = unmarked(block.text)
    return said + ":" if block.kind == HEADING and said[-1:].isalnum() else finished(said)


def _closed(paragraph: str) -> str:
    """A lead-in that nothing follows becomes a sentence."""
    return paragraph[:-1] + "." if paragraph.endswith(":") else paragraph
