"""Reads pairs of texts from a file, as in published sets of pairs, with each side taken as it is.

    pairs = read_text_pairs("sycophancy.json")
    vector = extract_from_texts("model.gguf", pairs, name="sycophancy", tokens="-2")

A line, or an item of a JSON array, is an object with two sides under one of KEYS, and perhaps a prompt shared
by both; or simply [with, without].
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsteer.errors import PromptError
from localsteer.jsonable import JsonObject
from localsteer.prompt_texts import PromptText, filled_text, read_lines, text_or_messages

# (with, without): localsteer; repeng and steering-vectors; CAA and Anthropic's evaluations; preference data
KEYS = (
    ("with", "without"),
    ("positive", "negative"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
    ("chosen", "rejected"),
)
PROMPT_KEYS = ("prompt", "question")


@dataclass(frozen=True, eq=False)
class TextPair:
    """Two texts whose difference the direction should point to."""

    instructed: PromptText
    plain: PromptText


def read_text_pairs(path: str | Path, *, raw: bool = False) -> list[TextPair]:
    """The pairs of a JSONL file or a JSON array, in order. raw: without the chat template.

    Raises PromptError, which names the line or the item.
    """
    pairs = [_pair(record, raw, where) for where, record in _records(path)]
    if not pairs:
        raise PromptError(f"{path} holds no pairs: write one per line.")
    return pairs


def some_pairs(pairs: Sequence[TextPair], n_pairs: int | None) -> list[TextPair]:
    """`n_pairs` of the pairs, evenly spaced; all for None. Raises PromptError if there are fewer."""
    n = len(pairs) if n_pairs is None else n_pairs
    if not 1 <= n <= len(pairs):
        raise PromptError(
            f"{n} pairs were asked for, but there are only {len(pairs)}: choose 1 to {len(pairs)}."
        )
    return [pairs[i * len(pairs) // n] for i in range(n)]


def _records(path: str | Path) -> Iterator[tuple[str, Any]]:
    lines = read_lines(path)
    if lines and lines[0][1].lstrip().startswith("["):
        items = _array(path, lines)
        if items is not None:
            yield from ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
            return
    for number, line in lines:
        record = _parsed(line)
        yield f"{path}, line {number}", line if record is None else record  # for the message


def _array(path: str | Path, lines: Sequence[tuple[int, str]]) -> list[Any] | None:
    """The items of a file that is one JSON array; None if its first line is a pair, which is an array too."""
    items = _parsed("\n".join(line for _, line in lines))
    if not isinstance(items, list):
        if len(lines) > 1 and isinstance(_parsed(lines[0][1]), list):
            return None
        raise PromptError(
            f"{path} begins like a JSON array but is not one: write one object per line, or repair it."
        )
    return None if items and all(isinstance(item, str) for item in items) else items


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _pair(record: Any, raw: bool, where: str) -> TextPair:
    prompt: Any = None
    if isinstance(record, list) and len(record) == 2:
        sides = dict(zip(KEYS[0], record, strict=True))
    elif isinstance(record, dict):
        sides, prompt = _sides(record, where), _prompt(record, where)
    else:
        raise PromptError(f'{where} is not a pair like {{"with": "...", "without": "..."}}: {record!r:.60}.')
    texts = [_side(value, name, prompt, raw, where) for name, value in sides.items()]
    if _content(texts[0]) == _content(texts[1]):
        raise PromptError(f"{where}: its two sides are the same.")
    return TextPair(*texts)


def _sides(record: Mapping[str, Any], where: str) -> JsonObject:
    named = [names for names in KEYS if all(record.get(name) is not None for name in names)]
    if len(named) != 1:
        known = "; ".join(" and ".join(names) for names in KEYS)
        raise PromptError(f"{where} must have one of {known}: it has {', '.join(map(str, record))!r:.80}.")
    return {name: record[name] for name in named[0]}


def _prompt(record: Mapping[str, Any], where: str) -> Any:
    named = [key for key in PROMPT_KEYS if record.get(key) is not None]
    if len(named) > 1:
        raise PromptError(f"{where} has both {' and '.join(named)}: keep one of them.")
    return text_or_messages(record[named[0]], where) if named else None


def _side(value: Any, name: str, prompt: Any, raw: bool, where: str) -> PromptText:
    label = f"{where}, {name}"
    if isinstance(value, str):
        text = filled_text(value, name, where)
        return (
            PromptText(text, raw=raw, label=label) if prompt is None else PromptText(prompt, text, raw, label)
        )
    if not isinstance(value, list):
        raise PromptError(f"{where}: {name} must be a text, or messages, not {value!r:.60}.")
    messages = text_or_messages(value, label)
    # preference data may repeat the prompt in each side
    is_whole = prompt is None or messages[0].get("role") != "assistant"
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    return PromptText(messages if is_whole else before + messages, raw=raw, label=label)


def _content(text: PromptText) -> tuple[Any, str]:
    return text.prompt, text.reply
