"""combination:* - two answers in one, and the request repeated first."""

from __future__ import annotations

_DIVIDER = "******"


def two_responses(reply: str) -> bool:
    """Exactly two different texts separated by six asterisks.

    A divider at the very start or end does not count; two in a row fail; a seventh asterisk belongs to the
    text after it. One different character makes the texts different.
    """
    parts = reply.split(_DIVIDER)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(reply: str, *, prompt_to_repeat: str) -> bool:
    """The reply starts with the request, in any case; an answer need not follow."""
    return reply.strip().lower().startswith(prompt_to_repeat)
