"""A pattern of a JSON schema, in ECMAScript's dialect, as Rust's `regex` reads the same.

Where dialects differ about a character (`\\S` before a no-break space, `\\W` before an accented letter), only
what all of them accept is written: a reply that follows the result is valid by any validator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# what some dialect takes for white space, a letter or a digit; and what all do
_SPACE, _WORD, _DIGIT = r"\p{White_Space}\x{feff}\x{1c}-\x{1f}", r"\p{L}\p{N}_", r"\p{Nd}"
_EVERY_SPACE = r"\t\n\x{b}\f\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_EVERY_WORD, _EVERY_DIGIT = "A-Za-z0-9_", "0-9"
# of a class: what it must not reach; of a negated class: what must be out of reach
_NARROW = {"S": f"[^{_SPACE}]", "W": f"[^{_WORD}]", "D": f"[^{_DIGIT}]"}
_WIDE = {"s": _SPACE, "w": _WORD, "d": _DIGIT}
_NARROW_IN_JSON = {**_NARROW, "s": f"[{_EVERY_SPACE}]", "w": f"[{_EVERY_WORD}]", "d": f"[{_EVERY_DIGIT}]"}
_WIDE_IN_JSON = {**_WIDE, "S": f"[^{_EVERY_SPACE}]", "W": f"[^{_EVERY_WORD}]", "D": f"[^{_EVERY_DIGIT}]"}
_DOT = r"[^\n\r\x{2028}\x{2029}]"
_TOKEN = re.compile(
    r"\\(?:u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|[pP](?:\{[^}]*\}|[A-Z])|.)|.", re.DOTALL
)
# Where a class holds every control character, llguidance also takes the two that JSON escapes, so that
# `[^"]` would be any character. Those that a reply never holds are therefore left out.
_WRITABLE = r"[^\x{0}-\x{7}\x{b}\x{e}-\x{1f}\x{7f}]"
_CONTROLS = frozenset([*range(0x20), 0x7F]) - frozenset(map(ord, "\b\f\n\r\t"))
_PROBE = [*map(chr, range(0x20, 0x7F)), *"\b\f\n\r\t", "\u00e9", "\u4e2d", "\u20ac"]


def exact_pattern(pattern: str) -> str:
    """The pattern of a whole text. What can't be read is passed on as it is: llguidance refuses it with a
    reason."""
    return "".join(
        _class(part, _WIDE if part[1:2] == ["^"] else _NARROW)
        if part[0] == "["
        else _outside(part[0], _NARROW)
        for part in _parts(pattern)
    )


def exact_json_pattern(pattern: str) -> str:
    """The pattern of what a JSON string stands for."""
    rewritten = ""
    for part in _parts(pattern):
        if part[0] == "[":
            exact = _class(part, _WIDE_IN_JSON if part[1:2] == ["^"] else _NARROW_IN_JSON)
            is_class = len(part) > 1 and part[-1] == "]"
        else:
            exact = _outside(part[0], _NARROW_IN_JSON)
            is_class = exact[:1] == "[" or exact[:2] in ("\\p", "\\P")
        rewritten += f"[{exact}&&{_WRITABLE}]" if is_class else exact
    return rewritten


def _parts(pattern: str) -> Iterator[list[str]]:
    """The tokens, those of a class together."""
    tokens, at = _TOKEN.findall(pattern), 0
    while at < len(tokens):
        end = _class_end(tokens, at) if tokens[at] == "[" else at + 1
        yield tokens[at:end]
        at = end


def ends_open(pattern: str) -> bool:
    """Whether its last character is a backslash that escapes nothing, which llguidance lets pass."""
    return _TOKEN.findall(pattern)[-1:] == ["\\"]


def fault(pattern: str) -> str | None:
    """Why llguidance would read another pattern of a JSON schema than this one; None where it would not."""
    if ends_open(pattern):
        return "its last backslash escapes nothing"
    if any("\ud800" <= character < "\ue000" for character in pattern):
        return "half a surrogate pair is not a Unicode character"
    return "control characters can't be written" if _control_character(pattern) else None


def _control_character(pattern: str) -> bool:
    """Whether it asks for a control character that JSON can't hold unless it is escaped: llguidance would
    leave it out. `[^\\x00-\\x1f]`, which keeps them away, is fine."""
    return any(
        any(_code(token) in _CONTROLS for token in part) and (len(part) == 1 or _only_controls(part))
        for part in _parts(pattern)
    )


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
    return {"0": 0, "a": 7, "v": 11}.get(token[1:])


def _class_end(tokens: list[str], start: int) -> int:
    at = start + 1
    if tokens[at : at + 1] == ["^"]:
        at += 1
    while at < len(tokens) and tokens[at] != "]":
        at += 1
    return at + 1


def _outside(token: str, special: Mapping[str, str]) -> str:
    if token == ".":
        return _DOT
    if len(token) == 2 and token[0] == "\\":
        return special.get(token[1]) or _escaped(token)
    return token


def _class(tokens: list[str], special: Mapping[str, str]) -> str:
    """Rust's classes nest and have operators (`&&`, `--`, `~~`), ECMAScript's do not."""
    if tokens in (["[", "^", "]"], ["[", "]"]):  # anything, and nothing
        return f"[{'^' * (len(tokens) == 2)}\\x{{0}}-\\x{{10FFFF}}]"
    inner = tokens[1:-1] if tokens[-1] == "]" else tokens[1:]
    negated = inner[:1] == ["^"]
    inner = inner[negated:]
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
