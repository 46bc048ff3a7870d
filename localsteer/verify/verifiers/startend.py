"""startend:* and punctuation:* - how the reply ends, quotation marks, commas."""

from __future__ import annotations


def end_checker(reply: str, *, end_phrase: str) -> bool:
    """The reply ends with the phrase, in any case. Double quotes around the reply are taken off first, the
    blanks inside them are not: '"... Bye! "' does not end with "Bye!"."""
    return reply.strip().strip('"').lower().endswith(end_phrase)


def quotation(reply: str) -> bool:
    """The first and the last character are straight double quotes: '""' passes, curly quotes do not."""
    trimmed = reply.strip()
    return len(trimmed) > 1 and trimmed.startswith('"') and trimmed.endswith('"')


def no_comma(reply: str) -> bool:
    """No ASCII comma: those of Chinese and Arabic are allowed."""
    return "," not in reply
