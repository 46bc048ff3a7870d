"""detectable_format:* - bullets, highlights, sections, title, JSON, a fixed answer."""

from __future__ import annotations

import json
import re

from localsteer.verify.patterns import expression
from localsteer.verify.verifiers.parameters import SECTION

_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# The character after the asterisk may be a line break: a line of one asterisk swallows the line after it.
# IFEval's ^\s* may begin lines earlier; it counts the same bullets, in quadratic time on blank lines.
_STAR_BULLET = re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^[^\S\n]*-.*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*[^*\n]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^*\n]*\*\*")
_FENCES = ("```json", "```Json", "```JSON", "```")  # no other spelling, no other language


def number_bullet_lists(reply: str, *, num_bullets: int) -> bool:
    """Exactly this many lines that begin with * or -, indented ones included.

    A rule (---), a negative number and a line that opens with *emphasis* count; "+ item", "1. item" and a
    line that opens with **bold** do not.
    """
    bullets = len(_STAR_BULLET.findall(reply)) + len(_DASH_BULLET.findall(reply))
    return bullets == num_bullets


def constrained_response(reply: str) -> bool:
    """One of the three fixed answers occurs somewhere in the reply, in exactly this case."""
    return any(answer in reply for answer in _FIXED_ANSWERS)


def number_highlighted_sections(reply: str, *, num_highlights: int) -> bool:
    """At least this many *highlights* or **highlights**, each within one line.

    2 * 3 * 4 makes one, and so does a bullet with an asterisk in its text; ***both*** makes two.
    """
    return count_highlights(reply) >= num_highlights


def count_highlights(reply: str) -> int:
    single = sum(1 for text in _HIGHLIGHT.findall(reply) if text.strip("*").strip())
    double = sum(1 for text in _DOUBLE_HIGHLIGHT.findall(reply) if text[2:-2].strip())
    return single + double


def multiple_sections(reply: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least this many markers with a number: "Section 1", "**SECTION 2**".

    The marker counts in its own case only, anywhere in a line and in any order, and only with a number:
    "Section One" is not a section. Numbers in the text count too: "see Section 3". The name's spelling is
    IFEval's.
    """
    marker = expression(section_spliter, around=SECTION)
    # IFEval counts the pieces that re.split leaves, which adds one for every group
    return marker.count(reply) * (1 + marker.n_groups) >= num_sections


def json_format(reply: str) -> bool:
    """The reply, without one code fence around it, is any JSON: 42, "text" and NaN included."""
    body = reply.strip()
    for fence in _FENCES:
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):  # IFEval dies of brackets nested a thousand deep
        return False
    return True


def title(reply: str) -> bool:
    """<<A title>> occurs somewhere within one line. <<< >>> holds none, and << a >> b >> is one."""
    return any(_titled(line) for line in reply.split("\n"))


def _titled(line: str) -> bool:
    """IFEval's <<[^\\n]+>> is greedy, and so runs from the first << to the last >>."""
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip() != ""
