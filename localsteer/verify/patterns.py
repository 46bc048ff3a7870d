"""Regular expressions from outside: from a vector file, a catalogue or the command line.

    expression("fox(es)?", re.IGNORECASE).search(reply)       # found anywhere?
    expression("a.b").count(reply)

IFEval reads keywords and markers as Python's regular expressions, whose engine backtracks: a short expression
can keep it busy forever, and nothing stops it. Plain words are left to that engine. Everything else is
searched by RE2, in time that grows only with the text, or is refused by name.

RE2 knows only ASCII in \\w, \\b, \\d and \\s, and has a different $ and case folding. The verdict is
nevertheless Python's, because RE2 never sees the text itself: characters are classed by what the expression
distinguishes, each class becomes one symbol (an ASCII letter where Python sees a letter), and both text and
expression are written in these symbols.
"""

from __future__ import annotations

import re
import string
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from localsteer.errors import CatalogError

try:
    from re import _constants as sre
    from re import _parser as sre_parse
except ImportError:  # Python 3.10
    import sre_constants as sre  # type: ignore[no-redef]
    import sre_parse  # type: ignore[no-redef]

MAX_LENGTH = 1000  # characters of an expression
MAX_SIZE = 1000  # characters that it matches one by one, repeats written out: (ab){50} has 100
MAX_WORD = 100  # characters of a plain word: Python's engine may take as many steps at each place of the text
MAX_SORTS = 60  # of characters beside a \b; each needs an ASCII letter of its own, and there are 63
MAX_SECONDS = 5.0  # to count what looks far ahead from each place: "a.*z|a"
MAX_MEMORY = 2 << 20  # bytes of an automaton; where it needs more, RE2 takes more time instead

_SHOWN = 40  # characters of an expression that a message quotes
_WORD_SYMBOLS = string.ascii_letters + string.digits + "_"
_OTHER_SYMBOLS = "".join(c for c in map(chr, range(128)) if c not in _WORD_SYMBOLS + "\n")
_FIRST_OTHER = 0x100
_NOTHING = r"[^\x{0}-\x{10FFFF}]"
_FLAGS_OF_SORT = re.ASCII | re.DOTALL
_REFUSED = {
    "ASSERT": "looks around, (?=...) or (?<=...)",
    "ASSERT_NOT": "looks around, (?!...) or (?<!...)",
    "GROUPREF": "refers back to a group, as \\1",
    "GROUPREF_EXISTS": "asks whether a group was found, (?(1)...)",
    "ATOMIC_GROUP": "has an atomic group, (?>...)",
    "POSSESSIVE_REPEAT": "has a possessive repeat, as x*+",
}
_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}


class Expression:
    """One expression, ready for use; made by `expression`."""

    def __init__(self, shown: str, tree: Any, plain: re.Pattern[str] | None) -> None:
        self.n_groups: int = tree.state.groups - 1
        self._shown = shown
        self._plain = plain
        if plain is None:
            self._draft = _Draft(shown, tree)
            self._automaton(self._draft.alphabet(string.printable))  # RE2 may refuse it: now, not later

    def search(self, text: str) -> bool:
        """Whether the expression is found anywhere."""
        if self._plain is not None:
            return self._plain.search(text) is not None
        return next(self._found(text), None) is not None

    def count(self, text: str) -> int:
        """How often the expression is found, without overlaps. Raises CatalogError after MAX_SECONDS."""
        if self._plain is not None:
            return sum(1 for _ in self._plain.finditer(text))
        ends, n = time.monotonic() + MAX_SECONDS, 0
        for _ in self._found(text):
            n += 1
            if time.monotonic() > ends:
                raise CatalogError(f"{self._shown} takes too long to count in this text: write a simpler one")
        return n

    def _found(self, text: str) -> Iterator[Any]:
        alphabet = self._draft.alphabet(text)
        return self._automaton(alphabet).finditer(self._draft.in_symbols(text, alphabet))

    def _automaton(self, alphabet: _Alphabet) -> Any:
        """RE2's; re2 keeps the latest 128."""
        import re2

        options = re2.Options()
        options.log_errors, options.max_mem = False, MAX_MEMORY
        try:
            return re2.compile(self._draft.in_re2(alphabet), options)
        except re2.error as error:
            reason = error.args[0].decode("utf-8", "replace") if error.args else ""
            raise CatalogError(f"{self._shown} is refused by RE2 ({reason}): write a simpler one") from None


@lru_cache(maxsize=512)
def expression(text: str, flags: int = 0, around: str = "{}") -> Expression:
    """The expression, set into `around` (from this package, and harmless).

    If it is not valid ("(", "*"), IFEval crashes; here the text itself is searched for. Raises CatalogError,
    one line, for what can't be searched safely.
    """
    shown = repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
    if len(text) > MAX_LENGTH:
        raise CatalogError(
            f"an expression may have at most {MAX_LENGTH} characters, not {len(text)}: {shown}"
        )
    bare = _parsed(text, flags, shown)
    whole = around.replace("{}", text)
    tree = bare and _parsed(whole, flags, shown)
    if tree is None:
        text = re.escape(text)
        whole = around.replace("{}", text)
        bare, tree = _parsed(text, flags, shown), _parsed(whole, flags, shown)
    is_word = all(node in (sre.LITERAL, sre.AT) for node, _ in bare)
    n_sorts = len({value for _, value in bare}) if is_word else 0
    is_plain = is_word and (len(bare) <= MAX_WORD or n_sorts > MAX_SORTS)
    return Expression(shown, tree, re.compile(whole, flags) if is_plain else None)


def _parsed(text: str, flags: int, shown: str) -> Any:
    """Python's parse of the expression, or None if it is invalid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sre_parse.parse(text, flags)
    except (OverflowError, RecursionError):
        raise CatalogError(f"{shown} nests or repeats too much: write a simpler expression") from None
    except (re.error, ValueError):
        return None


class _Sort(NamedTuple):
    """What one place of the expression takes: characters of `among`, a class of Python's, or all others."""

    among: str
    others: bool
    flags: int


class _Alphabet(NamedTuple):
    """sorts: what a text's characters are told apart by, one bit for each place that takes them.
    symbols: theirs. table: from characters to symbols."""

    sorts: Sequence[int]
    symbols: Sequence[str]
    table: Mapping[int, str]


class _Draft:
    """An expression between Python's syntax and RE2's: pieces of the latter, and numbers of sorts."""

    def __init__(self, shown: str, tree: Any) -> None:
        self._shown = shown
        self._sorts: dict[_Sort, int] = {}
        self._n_told_apart = 0
        self._boundaries = self._line_ends = self._text_end = False
        self._flags = tree.state.flags
        self._pieces, size = self._sequence(tree, self._flags)
        if size > MAX_SIZE:
            self._refuse(f"matches up to {size} characters one by one, {MAX_SIZE} at most are searched")
        if self._boundaries and self._n_told_apart > MAX_SORTS:
            self._refuse("tells too many kinds of characters apart")
        if self._line_ends and self._text_end:
            self._refuse("has ^ or $ both of lines and of the text")

    def in_re2(self, alphabet: _Alphabet) -> str:
        """Written in the alphabet's symbols."""
        members = [
            "".join(
                f"\\x{{{ord(symbol):x}}}"
                for sort, symbol in zip(alphabet.sorts, alphabet.symbols, strict=True)
                if sort >> number & 1
            )
            for number in self._sorts.values()
        ]
        classes = [f"[{member}]" if member else _NOTHING for member in members]
        return "".join(classes[piece] if isinstance(piece, int) else piece for piece in self._pieces)

    def in_symbols(self, text: str, alphabet: _Alphabet) -> str:
        written = text.translate(alphabet.table)
        # $ stands before a line break that ends the text, too: RE2 gets that one alone as a line break
        return written[:-1] + "\n" if self._text_end and text.endswith("\n") else written

    def alphabet(self, text: str) -> _Alphabet:
        """Of the text's characters. A line break that ends it is a sort of its own, where $ asks for that."""
        characters = sorted(set(text))
        taken = dict.fromkeys(characters, 0)
        folded = _Folded(characters)
        for sort, number in self._sorts.items():
            for character in folded.taken_by(sort):
                taken[character] |= 1 << number
        n = len(self._sorts)
        if self._boundaries:
            for character in re.findall(r"\w", "".join(characters), self._flags & re.ASCII):
                taken[character] |= 1 << n
        if "\n" in taken and self._line_ends:
            taken["\n"] |= 2 << n
        sorts = sorted(set(taken.values()))
        symbols = self._symbols(sorts, n)
        by_sort = dict(zip(sorts, symbols, strict=True))
        table = {ord(character): by_sort[sort] for character, sort in taken.items()}
        if self._text_end:
            sorts, symbols = [*sorts, taken.get("\n", 0)], [*symbols, "\n"]
        return _Alphabet(sorts, symbols, table)

    def _symbols(self, sorts: Sequence[int], n: int) -> list[str]:
        """Beside \\b and \\B ASCII alone: RE2 finds a \\B within the bytes of any other character."""
        if not self._boundaries:
            return ["\n" if sort >> n & 2 else chr(_FIRST_OTHER + at) for at, sort in enumerate(sorts)]
        words, others = iter(_WORD_SYMBOLS), iter(_OTHER_SYMBOLS)
        symbols = ["\n" if sort >> n & 2 else next(words if sort >> n & 1 else others, "") for sort in sorts]
        if not all(symbols):
            self._refuse("tells too many kinds of characters apart")
        return symbols

    def _sequence(self, nodes: Any, flags: int) -> tuple[list[str | int], int]:
        """Pieces, and how many characters they match one by one."""
        pieces: list[str | int] = []
        total = 0
        for operation, value in nodes:
            more, size = self._node(operation, value, flags)
            pieces += more
            total += size
        return pieces, total

    def _node(self, operation: Any, value: Any, flags: int) -> tuple[list[str | int], int]:
        if operation in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            return [self._sort(operation, value, flags)], 1
        if operation is sre.AT:
            return [self._place(value, flags)], 0
        if operation is sre.SUBPATTERN:
            _, added, removed, nodes = value
            pieces, size = self._sequence(nodes, (flags | added) & ~removed)
            return ["(?:", *pieces, ")"], size
        if operation is sre.BRANCH:
            branches = [self._sequence(branch, flags) for branch in value[1]]
            pieces = [piece for branch, _ in branches for piece in ("|", *branch)]
            return ["(?:", *pieces[1:], ")"], sum(size for _, size in branches)
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, nodes = value
            pieces, size = self._sequence(nodes, flags)
            is_open = most == sre.MAXREPEAT
            lazy = "?" if operation is sre.MIN_REPEAT else ""
            size *= max(1, int(least) + 1 if is_open else int(most))
            return ["(?:", *pieces, f"){{{least},{'' if is_open else most}}}{lazy}"], size
        if str(operation) == "FAILURE":  # (?!)
            return [_NOTHING], 1
        return self._refuse(_REFUSED.get(str(operation), f"has {operation}"))

    def _sort(self, operation: Any, value: Any, flags: int) -> int:
        others, items = False, [(operation, value)]
        if operation is sre.NOT_LITERAL:
            others, items = True, [(sre.LITERAL, value)]
        elif operation is sre.IN:
            others = value[0][0] is sre.NEGATE
            items = value[1:] if others else value
        among = "." if operation is sre.ANY else f"[{''.join(_item(*item) for item in items)}]"
        kept = _FLAGS_OF_SORT if operation is sre.ANY else _FLAGS_OF_SORT | re.IGNORECASE
        sort = _Sort(among, others, int(flags & kept & ~(0 if operation is sre.ANY else re.DOTALL)))
        if sort not in self._sorts:
            self._n_told_apart += len(items) if operation is sre.LITERAL else 3 * len(items)
        return self._sorts.setdefault(sort, len(self._sorts))

    def _place(self, place: Any, flags: int) -> str:
        if place in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            self._boundaries = True
            return r"\b" if place is sre.AT_BOUNDARY else r"\B"
        if place is sre.AT_BEGINNING_STRING:
            return r"\A"
        if place is sre.AT_END_STRING:
            return r"\z"
        if flags & re.MULTILINE:
            self._line_ends = True
            return "(?m:^)" if place is sre.AT_BEGINNING else "(?m:$)"
        if place is sre.AT_BEGINNING:
            return r"\A"
        self._text_end = True
        return "(?m:$)"

    def _refuse(self, why: str) -> Any:
        raise CatalogError(f"{self._shown} {why}: write an expression without it, or plain words")


def _item(operation: Any, value: Any) -> str:
    """A member of a class, as Python writes it."""
    if operation is sre.CATEGORY:
        return _CATEGORIES[value]
    if operation is sre.RANGE:
        return "-".join(f"\\U{code:08x}" for code in value)
    return f"\\U{value:08x}"


class _Folded:
    """A text's characters, with those that differ from them in case alone."""

    def __init__(self, characters: Sequence[str]) -> None:
        self._characters = characters
        self._all = "".join(characters)
        self._folds: dict[str, frozenset[str]] | None = None

    def taken_by(self, sort: _Sort) -> set[str]:
        search = re.compile(sort.among, sort.flags & ~re.IGNORECASE).findall
        if not sort.flags & re.IGNORECASE:
            taken = set(search(self._all))
        else:
            if self._folds is None:
                same = _same_but_for_case()
                self._folds = {
                    character: same.get(character, frozenset(character)) for character in self._characters
                }
                self._any_case = "".join(set(self._all).union(*self._folds.values()))
            found = set(search(self._any_case))
            taken = {character for character, folds in self._folds.items() if not found.isdisjoint(folds)}
        return set(self._characters) - taken if sort.others else taken


@lru_cache(maxsize=1)
def _same_but_for_case() -> Mapping[str, frozenset[str]]:
    """What Python's IGNORECASE takes for the same, for every character that has another case."""
    groups: dict[str, set[str]] = {}
    for character in map(chr, range(0x1F000)):
        if character.lower() != character or character.upper() != character:
            key = "i" if character in "\u0130\u0131" else character.casefold()
            groups.setdefault(key, set()).add(character)
    return {character: frozenset(group) for group in groups.values() for character in group}
