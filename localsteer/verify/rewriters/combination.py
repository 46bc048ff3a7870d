"""combination:* - two answers in one, and the request repeated first."""

from __future__ import annotations

import re

from localsteer.verify.rewriters.plain import Plain
from localsteer.verify.words import count_words

_DIVIDER = "******"
_LONG_RUN = re.compile(r"\*{6,}")
_SHORT_SHARE = 0.25  # of the reply's words: the two together are hardly longer than one


def two_responses(plain: Plain) -> str | None:
    """The reply, and the same in short: its first sentences. A single sentence has no shorter answer."""
    whole = _LONG_RUN.sub("***", plain.text)
    short = _in_short(plain.sentences)
    return f"{whole}\n\n{_DIVIDER}\n\n{short}" if short else None


def repeat_prompt(plain: Plain, *, prompt_to_repeat: str) -> str:
    return f"{prompt_to_repeat}\n\n{plain.text}"


def _in_short(sentences: list[str]) -> str:
    room = sum(map(count_words, sentences)) * _SHORT_SHARE
    kept: list[str] = []
    for sentence in sentences[:-1]:
        room -= count_words(sentence)
        if kept and room < 0:
            break
        kept.append(sentence)
    return " ".join(kept).replace("*", "")
