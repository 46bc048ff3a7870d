"""A pattern of a JSON schema, in ECMAScript's dialect, as Rust's `regex` reads the same.

Where dialects differ about a character (`\\S` before a no-break space, `\\W` before an accented letter), only
what all of them accept is written: a reply that follows the result is valid by any validator.
"""

from __future__ import annotations

import re

_SPACE = r"\p{White_Space}\x{feff}\x{1c}-\x{1f}"
_WORD = r"\p{L}\p{N}_"
# of a class: what it must not reach; of a negated class: what must be out of reach
_NARROW = {"S": f"[^{_SPACE}]", "W": f"[^{_WORD}]", "D": r"[^\p{Nd}]"}
_WIDE = {"s": _SPACE, "w": _WORD, "d": r"\p{Nd}"}
_DOT = r"[^\n\r\x{2028}\x{2029}]"
_TOKEN = re.compile(r"\\(?:u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|[pP]\{[^}]*\}|.)|.", re.DOTALL)
_CONTROLS = frozenset([*range(0x20), 0x7F]) - frozenset(map(ord, "\b\f\n\r\t"))
_PROBE = [*map(chr, range(0x20, 0x7F)), *"\b\f\n\r\t", "\u00e9", "\u4e2d", "\u20ac"]


def exact_pattern(pattern: str) -> str:
    """What can't be read is passed on as it is: llguidance refuses it with a reason."""
    rewritten, tokens, at = "", _TOKEN.findall(pattern), 0
    while at < len(tokens):
        if tokens[at] == "[":
            end = _class_end(tokens, at)
            rewritten += _class(tokens[at:end])
            at = end
        else:
            rewritten += _outside(tokens[at])
            at += 1
    return rewritten


def ends_open(pattern: str) -> bool:
    """Whether its last character is a backslash that escapes nothing, which llguidance lets pass."""
    return _TOKEN.findall(pattern)[-1:] == ["\\"]


def fault(pattern: str) -> str | None:
    """Why llguidance would read another pattern of a JSON schema than this one; None where it would not."""
    if ends_open(pattern):
        return "its last backslash escapes nothing"
    return "control characters can't be written" if _control_character(pattern) else None


def _control_character(pattern: str) -> bool:
    """Whether it asks for a control character that JSON can't hold unless it is escaped: llguidance would
    leave it out. `[^\\x00-\\x1f]`, which keeps them away, is fine."""
    tokens, at = _TOKEN.findall(pattern), 0
    while at < len(tokens):
        end = _class_end(tokens, at) if tokens[at] == "[" else at + 1
        part = tokens[at:end]
        if any(_code(token) in _CONTROLS for token in part) and (len(part) == 1 or _only_controls(part)):
            return True
        at = end
    return False


def _only_controls(tokens: list[str]) -> bool:
    try:
        controls = re.compile("".join(tokens))
    except re.error:
        return False
    return not any(controls.fullmatch(character) for character in _PROBE)


def _code(token: str) -> int | None:
    if len(token) == 1:
        return ord(token)
    if token[1] in "ux" and len(token) > 2:
        return int(token[2:].strip("{}"), 16)
    return {"0": 0, "v": 11}.get(token[1:])


def _class_end(tokens: list[str], start: int) -> int:
    at = start + 1
    if tokens[at : at + 1] == ["^"]:
        at += 1
    while at < len(tokens) and tokens[at] != "]":
        at += 1
    return at + 1


def _outside(token: str) -> str:
    if token == ".":
        return _DOT
    if len(token) == 2 and token[0] == "\\":
        return _NARROW.get(token[1]) or _escaped(token)
    return token


def _class(tokens: list[str]) -> str:
    """Rust's classes nest and have operators (`&&`, `--`, `~~`), ECMAScript's do not."""
    if tokens in (["[", "^", "]"], ["[", "]"]):  # anything, and nothing
        return f"[{'^' * (len(tokens) == 2)}\\x{{0}}-\\x{{10FFFF}}]"
    inner = tokens[1:-1] if tokens[-1] == "]" else tokens[1:]
    negated = inner[:1] == ["^"]
    inner = inner[negated:]
    special = _WIDE if negated else _NARROW
    members = ""
    for i, token in enumerate(inner):
        if token in ("[", "&", "~") or (token == "-" and i and inner[i - 1] == "-"):
            members += f"\\{token}"
        elif len(token) == 2 and token[0] == "\\":
            members += special.get(token[1]) or _escaped(token)
        else:
            members += token
    return f"[{'^' * negated}{members}{']' if tokens[-1] == ']' and len(tokens) > 1 else ''}"


def _escaped(token: str) -> str:
    """`\\_` and `\\<` are the characters themselves in ECMAScript."""
    return token[1] if token[1] in "<>_ \"'`@#%,:;=!" else token
