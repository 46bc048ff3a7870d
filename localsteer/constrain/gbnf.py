"""llama.cpp's GBNF as llguidance's Lark.

llguidance's own converter does the work. Its reader copies characters into another syntax as they are,
where `[a&&b]` or `"\\u0041"` mean something else, so texts and classes are read here; and its rules keep
their names, of which two may differ in their case alone, or be called `start`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from llguidance import gbnf_to_lark as lib

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_DIGITS = {"x": 2, "u": 4, "U": 8}


def lark_of_gbnf(text: str) -> str:
    """Raises ValueError, with what is wrong where; RecursionError for one that is nested too deeply."""
    rules = _Reader().parse(text)
    if "root" not in rules:
        raise ValueError("it has no rule `root`")
    named = {name: f"r{i}" for i, name in enumerate(rules)}
    uses: dict[str, list[str]] = {}
    for name, rule in rules.items():
        references = [node for node in _inner(rule) if isinstance(node, lib.RuleRefNode)]
        uses[name] = [node.name for node in references]
        for node in references:
            if node.name not in named:
                raise ValueError(f"there is no rule `{node.name}`, which `{name}` needs")
            node.name = named[node.name]
        rule.name, rule.comment = named[name], ""
    # llguidance goes through all rules again as long as it learns something: in this order, twice
    found = {named[name]: rules[name] for name in _users_last(uses)}
    # A rule without recursion is one regular expression. So is the whole then, by standing under another.
    found["root"] = lib.RuleNode("root", lib.AlternativeNode([lib.RuleRefNode(named["root"])]), "")
    lib.resolve(found)
    return "\n".join(str(rule) for rule in sorted(found.values(), key=lambda rule: rule.order))


def _users_last(uses: Mapping[str, Sequence[str]]) -> list[str]:
    """Every rule after those that it uses, where there is no circle."""
    ordered: dict[str, None] = {}
    seen: set[str] = set()
    left = [(name, False) for name in reversed(uses)]
    while left:
        name, is_done = left.pop()
        if is_done:
            ordered[name] = None
        elif name not in seen:
            seen.add(name)
            left.append((name, True))
            left += [(used, False) for used in uses[name]]
    return list(ordered)


def _inner(node: lib.ASTNode) -> Iterator[lib.ASTNode]:
    left = [node]
    while left:
        at = left.pop()
        left += at.children()
        yield at


class _Reader(lib.GrammarParser):
    def parse(self, text: str) -> dict[str, lib.RuleNode]:
        try:
            return super().parse(text)
        except lib.GbnfToLarkError as error:
            line = error.pos.text.count("\n", 0, error.pos.pos) + 1
            said = str(error).partition(" at line ")[0]
            raise ValueError(f"line {line}: {said[0].lower()}{said[1:]}") from None
        except IndexError:  # a backslash at the very end
            raise ValueError("it ends within an escape") from None

    def _char(self, pos: lib.Position) -> tuple[str, bool, lib.Position]:
        """One character, whether it was escaped, and what follows."""
        c = pos.current()
        if not c:
            raise lib.GbnfToLarkError(pos, "Unexpected end of input")
        if c != "\\":
            return c, False, pos.advance()
        kind = pos.peek(2)[1:]
        if kind in _DIGITS:
            digits = pos.peek(2 + _DIGITS[kind])[2:]
            if len(digits) != _DIGITS[kind] or set(digits) - set("0123456789abcdefABCDEF"):
                raise lib.GbnfToLarkError(pos, f"Invalid escape \\{kind}{digits}")
            code = int(digits, 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise lib.GbnfToLarkError(pos, f"\\{kind}{digits} is not a Unicode character")
            return chr(code), True, pos.advance(2 + _DIGITS[kind])
        if not kind or kind not in '"\\[]nrt':
            raise lib.GbnfToLarkError(pos, f"Invalid escape \\{kind}")
        return _ESCAPES.get(kind, kind), True, pos.advance(2)

    def _parse_literal(self, pos: lib.Position) -> tuple[lib.ASTNode, lib.Position]:
        text, pos = "", pos.advance()
        while True:
            c, escaped, pos = self._char(pos)
            if c == '"' and not escaped:
                return lib.LiteralNode(json.dumps(text, ensure_ascii=False)[1:-1]), pos
            text += c

    def _parse_char_class(self, pos: lib.Position) -> tuple[lib.ASTNode, lib.Position]:
        start, pos = pos, pos.advance()
        negated = pos.current() == "^"
        pos = pos.advance() if negated else pos
        ranges = ""
        while True:
            c, escaped, pos = self._char(pos)
            if c == "]" and not escaped:
                break
            last = c
            if pos.current() == "-" and pos.peek(2)[1:] not in ("]", ""):
                last, _, pos = self._char(pos.advance())
                if last < c:
                    raise lib.GbnfToLarkError(start, f"Empty range {c}-{last}")
            ranges += _code(c) if last == c else f"{_code(c)}-{_code(last)}"
        if not ranges:
            if not negated:
                raise lib.GbnfToLarkError(start, "Empty class []")
            return lib.RegexNode(_ANY), pos
        return lib.RegexNode(f"[{'^' * negated}{ranges}]"), pos

    def _parse_sequence(self, pos: lib.Position, is_nested: bool) -> tuple[lib.SequenceNode, lib.Position]:
        sequence, pos = super()._parse_sequence(pos, is_nested)
        for node in _inner(sequence):
            if isinstance(node, lib.RegexNode) and node.rx == ".":
                node.rx = _ANY  # any character in GBNF, all but a line's end in a regular expression
        return sequence, pos


_ANY = r"[\x{0}-\x{10FFFF}]"


def _code(c: str) -> str:
    return f"\\x{{{ord(c):X}}}"
