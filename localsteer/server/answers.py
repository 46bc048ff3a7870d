"""Turns chunks into the documents that OpenAI's clients read, for chat.py and completions.py."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localsteer import __version__
from localsteer.jsonable import JsonObject

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Chunk, TokenScores

FINGERPRINT = f"localsteer-{__version__}"
REASONS = {"stop": "stop", "length": "length", "deadline": "length"}


def envelope(kind: str, prefix: str, model: str) -> JsonObject:
    """The fields that all documents of one answer share."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


@dataclass
class Whole:
    """One choice, gathered."""

    text: str = ""
    scores: list[tuple[int, TokenScores]] = field(default_factory=list)
    reason: str = "stop"

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.scores += scored(chunk)
        if chunk.finish_reason:
            self.reason = REASONS.get(chunk.finish_reason, "stop")


def scored(chunk: Chunk) -> list[tuple[int, TokenScores]]:
    return [] if chunk.scores is None or chunk.token is None else [(chunk.token, chunk.scores)]


def piece(engine: Engine, token: int) -> bytes:
    return engine.model.token_to_piece(token, special=True)


def chat_logprobs(engine: Engine, scores: Sequence[tuple[int, TokenScores]]) -> JsonObject:
    def one(token: int, logprob: float) -> JsonObject:
        raw = piece(engine, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        one(token, score.logprob) | {"top_logprobs": [one(*top) for top in score.top]}
        for token, score in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    engine: Engine, scores: Sequence[tuple[int, TokenScores | None]], offset: int = 0
) -> JsonObject:
    """Log-probabilities in the older shape of /v1/completions. offset: characters of the text before these
    tokens. The first token of a prompt has no scores."""
    made: JsonObject = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, best in scores:
        text = piece(engine, token).decode("utf-8", "replace")
        made["tokens"].append(text)
        made["token_logprobs"].append(best and best.logprob)
        tops = reversed(best.top) if best else ()
        found = {piece(engine, top).decode("utf-8", "replace"): score for top, score in tops}
        made["top_logprobs"].append(found if best else None)
        made["text_offset"].append(offset)
        offset += len(text)
    return made
