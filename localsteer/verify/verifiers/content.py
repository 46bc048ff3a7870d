"""detectable_content:* - placeholders and a postscript."""

from __future__ import annotations

import re

from localsteer.verify.patterns import expression

# Not tied to a line's start or to the reply's end, and a prefix is enough: "the P.S. came first" holds one,
# and so does "P.P.S." for the marker P.S. The word "PS:" never does.
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}


def number_placeholders(reply: str, *, num_placeholders: int) -> bool:
    """At least this many [..], each within one line; empty ones, ticks and links count: [], [x],
    [text](url)."""
    return sum(map(_placeholders, reply.split("\n"))) >= num_placeholders


def _placeholders(line: str) -> int:
    """What IFEval's \\[.*?\\] finds, which rereads the line for each [ that nothing closes."""
    count = end = 0
    while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1) > 0:
        count += 1
    return count


def postscript(reply: str, *, postscript_marker: str) -> bool:
    """The marker occurs somewhere in the reply, in any case. A marker other than these two is a regular
    expression."""
    pattern = _POSTSCRIPTS.get(postscript_marker)
    if pattern is None:
        return expression(postscript_marker.lower()).search(reply.lower())
    return pattern.search(reply.lower()) is not None
