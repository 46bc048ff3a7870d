"""Which tokens of a text count: the last, all, their mean, one by index, those of a part, or the reply.

    choice = TokenChoice.parse("span:the fox")
    choice.positions(len(tokens), find)     # range(7, 9)

`states` writes the state of every chosen token; extraction, which needs one state for each prompt, takes
their mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .errors import PromptError

FORMS = "last, all, mean, reply, an index as in 0 or -2, span:TEXT, last:TEXT or mean:TEXT"
MAX_INDEX = 10**9

Find = Callable[[str], "range | None"]  # the tokens that spell a text's last occurrence


@dataclass(frozen=True)
class TokenChoice:
    """scope: "text" is all tokens, "index" the one at `index`, "part" those that spell `part`, "reply" those
    of a teacher-forced reply. pooling: how they are combined: each by itself, their mean, or only the last.
    """

    spelled: str
    scope: Literal["text", "index", "part", "reply"]
    pooling: Literal["each", "mean", "last"]
    index: int = 0
    part: str = ""

    @classmethod
    def parse(cls, text: str | int | TokenChoice) -> TokenChoice:
        """Parse a choice. Raises PromptError for a text that is not one of FORMS."""
        if isinstance(text, TokenChoice):
            return text
        spelled = str(text).strip() if isinstance(text, (str, int)) and not isinstance(text, bool) else ""
        whole = {"last": "last", "all": "each", "mean": "mean"}
        if spelled in whole:
            return cls(spelled, "text", whole[spelled])
        if spelled == "reply":
            return cls(spelled, "reply", "each")
        if re.fullmatch(r"[+-]?\d{1,9}", spelled, re.ASCII):
            return cls(str(int(spelled)), "index", "each", index=int(spelled))
        kind, colon, part = str(text).lstrip().partition(":")
        pooling = {"span": "each", "mean": "mean", "last": "last"}.get(kind)
        if not colon or pooling is None:
            raise PromptError(f"{text!r:.80} names no tokens: write {FORMS}.")
        if not part.strip():
            raise PromptError(f"{text!r:.80} names no text: write it after the colon, as in {kind}:fox.")
        return cls(f"{kind}:{part}", "part", pooling, part=part)

    @property
    def is_last(self) -> bool:
        """Whether this is the last token of every text."""
        return self.scope == "text" and self.pooling == "last"

    @property
    def is_one(self) -> bool:
        """Whether this gives one state for each text, whatever the text."""
        return self.scope == "index" or self.pooling != "each"

    def positions(self, n_tokens: int, find: Find, reply: str = "") -> range:
        """The chosen tokens of one text of `n_tokens`, 0-based and not empty. reply: the reply that ends the
        text.

        Raises PromptError if the text has no such token.
        """
        tokens = self._scoped(n_tokens, find, reply)
        return tokens[-1:] if self.pooling == "last" else tokens

    def _scoped(self, n_tokens: int, find: Find, reply: str) -> range:
        if self.scope == "text":
            return range(n_tokens)
        if self.scope == "index":
            at = self.index + n_tokens if self.index < 0 else self.index
            if not 0 <= at < n_tokens:
                raise PromptError(f"it has {n_tokens} tokens, and no token {self.index}")
            return range(at, at + 1)
        if self.scope == "reply" and not reply:
            raise PromptError("it has no reply: add one, for instance as the assistant's last message")
        part = reply if self.scope == "reply" else self.part
        tokens = find(part)
        if not tokens:
            raise PromptError(f"it does not contain {part!r:.80}")
        # a reply ends its text: what follows it, such as an end token, is not part of it
        return tokens


def tokens_over(spans: list[tuple[int, int]], start: int, end: int) -> range | None:
    """The tokens that share a character with [start, end). spans: the span of each token in its text, in
    order; empty for a token without text."""
    over = [i for i, (first, last) in enumerate(spans) if first < end and last > start and first < last]
    return range(over[0], over[-1] + 1) if over else None


def tokens_of_part(pieces: list[bytes], part: str) -> range | None:
    """The tokens that spell the last occurrence of `part`. pieces: the bytes of each token."""
    at = b"".join(pieces).rfind(part.encode("utf-8", "surrogatepass"))
    if at < 0:
        return None
    spans, end = [], 0
    for piece in pieces:
        spans.append((end, end + len(piece)))
        end += len(piece)
    return tokens_over(spans, at, at + len(part.encode("utf-8", "surrogatepass")))
