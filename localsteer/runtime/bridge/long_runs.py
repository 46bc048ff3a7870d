"""Cuts texts on which llama.cpp's tokenizer would end the process: many of its pre-tokenizers match a word
with std::regex, which recurses once per character and runs out of stack after some 25,000."""

from __future__ import annotations

import re

# characters without a blank, or blanks in a row; less than half of what 4 MB of stack can take
MAX_RUN = 8192
# `tokenizer.ggml.pre` of vocabularies that llama.cpp cuts with its own loops, or into single characters
SAFE = frozenset(
    ("gpt-2", "llama3", "llama-v3", "llama-bpe", "qwen2", "smollm", "starcoder", "command-r", "refact")
)
_RUN = re.compile(r"\S+|\s+")


def pieces(text: str) -> list[str]:
    """The text in pieces without longer runs, cut between a letter and another character if possible."""
    if len(text) <= MAX_RUN:
        return [text]
    cut, start = [], 0
    for run in _RUN.finditer(text):
        at, end = run.span()
        while end - at > MAX_RUN:
            at = _boundary(text, at + MAX_RUN // 2, at + MAX_RUN)
            cut.append(text[start:at])
            start = at
    return [*cut, text[start:]]


def _boundary(text: str, low: int, high: int) -> int:
    return next((at for at in range(high, low, -1) if _kind(text[at - 1]) != _kind(text[at])), high)


def _kind(character: str) -> int:
    return 1 if character.isalpha() else 2 if character.isdecimal() else 3
