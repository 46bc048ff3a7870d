"""detectable_format:* - bullets, highlights, sections, title, JSON, a fixed answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from localsteer.verify.rewriters.markdown import HEADING, ITEM, Block, finished, prose, unmarked
from localsteer.verify.rewriters.plain import Plain, grouped, joined
from localsteer.verify.rewriters.sentences import sentences
from localsteer.verify.rewriters.words import Span, key_words, replaced, spread
from localsteer.verify.verifiers.formats import count_highlights

_STAR_MARKER = re.compile(r"^([^\S\n]*)\*(?=[^\S\n])", re.MULTILINE)
_MAX_QUESTION = 300  # characters; a longer prompt is no question that a JSON would repeat
_MAX_KEY = 60
_ANSWER = re.compile(r"[\s*\"']*(yes|no)\b[\s*,.:;!-]*", re.IGNORECASE)
_UNDECIDED = re.compile(r"[\s*\"']*(?:it depends|maybe|perhaps|possibly)\b", re.IGNORECASE)


# --- JSON ---


def json_format(plain: Plain) -> str:
    """The reply as prose, or its points, in one of several objects; on one line or indented."""
    shape = plain.pick([shape for shape in _SHAPES if shape(plain)])
    indent = 2 if plain.seed % 2 else None
    return json.dumps(shape(plain), ensure_ascii=False, indent=indent)


def _answer(plain: Plain) -> Any:
    return {"answer": _text(plain)}


def _response(plain: Plain) -> Any:
    return {"response": plain.paragraphs}


def _question(plain: Plain) -> Any:
    asked = (plain.prompt or "").strip()
    return {"question": asked, "answer": _text(plain)} if 0 < len(asked) <= _MAX_QUESTION else None


def _titled(plain: Plain) -> Any:
    return {"title": plain.subject, "text": _text(plain)} if plain.subject else None


def _summary(plain: Plain) -> Any:
    first, *rest = plain.sentences
    return {"summary": first, "details": " ".join(rest)} if rest else None


def _points(plain: Plain) -> Any:
    """A list's items with what stands before and after it, else the sentences."""
    before, items, after = _around_list(plain.blocks)
    if len(items) < 2:
        return {"points": plain.sentences} if len(plain.sentences) > 1 else None
    found = {
        "introduction": " ".join(prose(before, goes_on=True)),
        "points": [finished(unmarked(block.text)) for block in items],
        "conclusion": " ".join(prose(after)),
    }
    return {key: value for key, value in found.items() if value}


def _by_heading(plain: Plain) -> Any:
    """The reply's own headings as keys, where it has two or more, each once."""
    starts = [at for at, block in enumerate(plain.blocks) if block.kind == HEADING]
    keys = [unmarked(plain.blocks[at].text).rstrip(":")[:_MAX_KEY] for at in starts]
    if len(keys) < 2 or starts[0] > 0 or len(set(keys)) < len(keys):
        return None
    bodies = [plain.blocks[at + 1 : end] for at, end in zip(starts, [*starts[1:], None], strict=True)]
    return (
        {key: " ".join(prose(body)) for key, body in zip(keys, bodies, strict=True)} if all(bodies) else None
    )


_SHAPES: tuple[Callable[[Plain], Any], ...] = (
    _answer,
    _points,
    _titled,
    _question,
    _summary,
    _response,
    _by_heading,
)


def _text(plain: Plain) -> str:
    return "\n\n".join(plain.paragraphs)


# --- bullets ---


def number_bullet_lists(plain: Plain, *, num_bullets: int) -> str | None:
    """The reply's own items between what stands before and after them; without a list, its sentences.

    Too many are put together, neighbours in one bullet; too few are made up for by the sentences around them,
    then by those within them. Code has no place in a bullet.
    """
    if num_bullets == 0:
        return "\n\n".join(plain.paragraphs)
    if plain.has_code:
        return None
    before, listed, after = _around_list(plain.blocks)
    items = _items(listed)
    if len(items) >= num_bullets:
        lead = _lines(prose(before, goes_on=True))
        return "\n\n".join([*lead, _bullets(items, num_bullets, plain), *_lines(prose(after))])
    points = [*_sentences(prose(before, goes_on=True)), *items, *_sentences(prose(after))]
    if len(points) < num_bullets:
        points = plain.sentences
    return _bullets(points, num_bullets, plain) if len(points) >= num_bullets else None


def _items(blocks: Sequence[Block]) -> list[str]:
    """What the items say, bold type included; a heading among them opens the next one."""
    items, heading = [], ""
    for block in blocks:
        if block.kind == HEADING:
            heading += unmarked(block.text).rstrip(":") + ": "
        else:
            items.append(heading + block.text)
            heading = ""
    return items


def _bullets(points: Sequence[str], n: int, plain: Plain) -> str:
    marker = plain.pick("*-")
    lines = (" ".join(map(finished, group) if len(group) > 1 else group) for group in grouped(points, n, len))
    return "\n".join(f"{marker} {' '.join(line.split())}" for line in lines)


def _lines(paragraphs: Sequence[str]) -> list[str]:
    """Prose that no verifier takes for a bullet."""
    return [text.lstrip("-* ") for text in paragraphs]


def _sentences(paragraphs: Sequence[str]) -> list[str]:
    return [sentence for text in paragraphs for sentence in sentences(text)]


def _around_list(blocks: Sequence[Block]) -> tuple[Sequence[Block], Sequence[Block], Sequence[Block]]:
    """The blocks before the first item, from it to the last, and after."""
    at = [position for position, block in enumerate(blocks) if block.kind == ITEM]
    if not at:
        return blocks, [], []
    return blocks[: at[0]], blocks[at[0] : at[-1] + 1], blocks[at[-1] + 1 :]


# --- highlights, sections, title ---


def number_highlighted_sections(plain: Plain, *, num_highlights: int) -> str:
    """*Key words* all over the reply, two where they stand side by side; bold type counts already."""
    text = _STAR_MARKER.sub(r"\1-", plain.text)
    missing = max(0, num_highlights - count_highlights(text))
    return replaced(text, spread(_phrases(text), missing), "*{}*".format)


def _phrases(text: str) -> list[Span]:
    """Key words, with the one before where only a blank parts the two."""
    phrases: list[Span] = []
    for start, end in key_words(text):
        if (
            phrases
            and start == phrases[-1][1] + 1
            and text[start - 1] == " "
            and " " not in text[slice(*phrases[-1])]
        ):
            phrases[-1] = (phrases[-1][0], end)
        else:
            phrases.append((start, end))
    return phrases


def multiple_sections(plain: Plain, *, section_spliter: str, num_sections: int) -> str | None:
    """The reply in parts of about equal length under numbered headings."""
    parts = plain.parts(num_sections)
    if parts is None:
        return None
    return "\n\n".join(f"{section_spliter} {n}\n{part}" for n, part in enumerate(parts, start=1))


def title(plain: Plain) -> str:
    """The reply's own heading becomes the title; else what the prompt asks about, or the reply's opening."""
    own = plain.blocks[0].kind == HEADING and len(plain.blocks) > 1
    body = joined([(block.gap, block.source) for block in plain.blocks[own:]])
    return f"<<{plain.subject}>>\n\n{body if own else plain.text}"


# --- a fixed answer ---


def constrained_response(plain: Plain) -> str | None:
    """A reply that opens with yes, no or "it depends" gives that answer in IFEval's words, and goes on."""
    if answer := _ANSWER.match(plain.text):
        rest = plain.text[answer.end() :]
        return f"My answer is {answer[1].lower()}. {rest[:1].upper()}{rest[1:]}".strip()
    return f"My answer is maybe. {plain.text}" if _UNDECIDED.match(plain.text) else None
