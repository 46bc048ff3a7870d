"""Instructions and base queries as data: TOML files, those in this folder and the user's.

A user's file needs one `[[instruction]]` with `id` and `phrasings`; without `[queries]` it uses the general
ones. localsteer/catalog/general.toml shows everything else.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from localsteer.errors import CatalogError
from localsteer.jsonable import JsonObject

SPLITS = ("extraction", "validation", "test")
GROUPS = ("format", "length", "word", "language", "fixed")
DEFAULT = "general"
INSTRUCTION_KEYS = (
    "id", "group", "phrasings", "held_out_phrasings", "verifier", "kwargs", "slots", "variants", "queries",
)  # fmt: skip
MAX_WORDS = 10_000  # characters of an instruction in one's own words
QUERY_SLOT = "query"  # in kwargs alone: the base query that a reply answers
_SLOT = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Query:
    """A base query, without any instruction. subject: a word that a reply to it should name."""

    text: str
    subject: str | None = None


@dataclass(frozen=True)
class Instruction:
    """One instruction in several wordings, and the IFEval verifier that judges whether a reply follows it.

    A `{slot}` in phrasings or kwargs is filled by `fill`; `slots` holds the defaults. Only phrasings are used
    for extraction and tuning; held_out_phrasings measure generalisation.
    """

    id: str
    phrasings: tuple[str, ...]
    group: str = "format"
    held_out_phrasings: tuple[str, ...] = ()
    verifier: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, Any] = field(default_factory=dict)
    queries: Mapping[str, tuple[Query, ...]] = field(default_factory=dict)  # instead of the catalog's
    literal: bool = False  # braces in the texts are just braces: the user's own words, or filled already

    @classmethod
    def from_text(cls, text: str) -> Instruction:
        """The user's own words; braces in them are no slots. Raises CatalogError for an empty text, for one
        that is too long to be an instruction, and for what is no text."""
        text = text.strip()
        if not _seen(text):
            raise CatalogError("the instruction is empty: write what the replies should be like")
        if len(text) > MAX_WORDS:
            raise CatalogError(f"the instruction has {len(text)} characters: write at most {MAX_WORDS}")
        odd = next((character for character in text if _is_odd(character)), None)
        if odd is not None:
            raise CatalogError(f"the instruction must be plain text, without {odd!r}")
        name = "_".join(re.findall(r"\w+", text.lower()))[:40].strip("_")
        return cls(id=name or "own", phrasings=(text,), literal=True)

    @property
    def open_slots(self) -> tuple[str, ...]:
        """Slots of the phrasings and kwargs, in order of appearance; each must get a value before use."""
        if self.literal:
            return ()
        text = " ".join((*self.phrasings, *self.held_out_phrasings, str(dict(self.kwargs))))
        return tuple(slot for slot in dict.fromkeys(_SLOT.findall(text)) if slot != QUERY_SLOT)

    def fill(self, **values: Any) -> Instruction:
        """The instruction with its slots filled, defaults where nothing is given.

        The id of a changed one says so (`bullets:5`). Raises CatalogError for a slot that is missing, and for
        a value without a slot.
        """
        slots = self.open_slots
        for name in values:
            if name not in slots:
                known = f"it has {', '.join(slots)}" if slots else "it has none"
                raise CatalogError(f"instruction {self.id!r} has no slot {name!r}: {known}")
        if self.literal:
            return self
        filled = {**self.slots, **values}
        missing = [slot for slot in slots if slot not in filled]
        if missing:
            raise CatalogError(f"instruction {self.id!r} needs a value for {_listed(missing)}")
        changed = [str(value) for name, value in values.items() if value != self.slots.get(name)]
        return replace(
            self,
            id=":".join([self.id, *changed]),
            phrasings=tuple(_substitute(text, filled) for text in self.phrasings),
            held_out_phrasings=tuple(_substitute(text, filled) for text in self.held_out_phrasings),
            kwargs=_substitute(dict(self.kwargs), filled),
            literal=True,
        )

    def kwargs_for(self, query: str) -> JsonObject:
        """The verifier's arguments for a reply to this base query (repeat_prompt compares with it)."""
        return _substitute(dict(self.kwargs), {QUERY_SLOT: query})


@dataclass(frozen=True)
class Catalog:
    """What one TOML file holds. source: its name, for messages and provenance."""

    source: str
    instructions: Mapping[str, Instruction]
    queries: Mapping[str, tuple[Query, ...]]

    def get(self, instruction_id: str, **values: Any) -> Instruction:
        """The instruction ready for use, with its slots filled. Raises CatalogError for an unknown one."""
        try:
            instruction = self.instructions[instruction_id]
        except KeyError:
            known = _listed(self.instructions)
            raise CatalogError(
                f"unknown instruction {instruction_id!r:.80}: {self.source} has {known}"
            ) from None
        return instruction.fill(**values)

    def find(self, text: str) -> Instruction:
        """The instruction of this id, or the user's own words.

        One word is an id: a misspelt one must not become an instruction. A text without a letter of ASCII is
        none, since there are scripts without spaces. Raises CatalogError.
        """
        if text in self.instructions or re.fullmatch(r"[!-~]+", _seen(text)):
            return self.get(text)
        return Instruction.from_text(text)

    def queries_for(self, instruction: Instruction, split: str) -> tuple[Query, ...]:
        """The instruction's own queries of a split, or the catalog's. Raises CatalogError for none."""
        if split not in SPLITS:
            raise CatalogError(f"unknown split {split!r}: {_listed(SPLITS)}")
        queries = (instruction.queries or self.queries).get(split, ())
        if not queries:
            raise CatalogError(f"{self.source} has no {split} queries for {instruction.id!r}")
        return queries


def alike(a: Instruction, b: Instruction) -> bool:
    """Whether two instructions ask for the same kind of thing: both a length, or one verifier for both."""
    if a.id == b.id or (a.group == b.group == "length"):
        return True
    return a.verifier is not None and a.verifier == b.verifier


def load_catalog(path_or_name: str | Path = DEFAULT) -> Catalog:
    """A bundled catalog by name, or a file of the user's by path (anything with a suffix or a folder in it).

    Raises CatalogError, one line with the file, the place and what is wrong.
    """
    path = Path(path_or_name)
    if isinstance(path_or_name, str) and not path.suffix and len(path.parts) == 1:
        path = _folder() / f"{path_or_name}.toml"
        if not path.is_file():
            raise CatalogError(
                f"unknown catalog {path_or_name!r}: {_listed(catalog_names())}, or give a file"
            )
    content = read_toml(path)
    _check_keys(content, ("instruction", "queries"), str(path))
    queries = _query_splits(content["queries"], str(path)) if "queries" in content else None
    if queries is None:
        queries = load_catalog(DEFAULT).queries
    return Catalog(str(path_or_name), _instructions(content.get("instruction"), str(path)), queries)


def spread(queries: Sequence[Query], n: int) -> list[Query]:
    """n of the queries at equal distances, so that few of them still hold every kind; all where there are
    fewer."""
    return [queries[i * len(queries) // n] for i in range(n)] if n < len(queries) else list(queries)


def load_queries(path: str | Path) -> tuple[Query, ...]:
    """The lines of a text file, empty ones left out. Raises CatalogError when none is left."""
    lines = [line.strip() for line in _read_text(Path(path)).splitlines()]
    queries = tuple(Query(line) for line in lines if line)
    if not queries:
        raise CatalogError(f"{path} holds no query: write one per line")
    return queries


def catalog_file(source: str) -> Path:
    """Where the catalogue of this `source` is: a bundled one's file, or the user's own."""
    path = Path(source)
    is_name = not path.suffix and len(path.parts) == 1
    return _folder() / f"{source}.toml" if is_name else path


def catalog_names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.toml"))


def _folder() -> Path:
    return Path(__file__).parent


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CatalogError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_toml(path: Path) -> JsonObject:
    """The tables of a TOML file. Raises CatalogError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(_read_text(path))
    except RecursionError:
        raise CatalogError(f"{path} is not readable TOML: it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{path} is not readable TOML: {error}") from error


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise CatalogError(f"{where}: unknown key {key!r}, expected {_listed(known)}")


def _instructions(tables: Any, where: str) -> dict[str, Instruction]:
    if not isinstance(tables, list) or not tables:
        raise CatalogError(f"{where} holds no [[instruction]]")
    by_id: dict[str, Instruction] = {}
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict):
            raise CatalogError(f"{where}: instruction {number} is not a table")
        for instruction in _variants(table, f"{where}: instruction {table.get('id', number)!r}"):
            if instruction.id in by_id:
                raise CatalogError(f"{where}: instruction {instruction.id!r} is there twice")
            by_id[instruction.id] = instruction
    return by_id


def _variants(table: JsonObject, where: str) -> Iterator[Instruction]:
    """One instruction, or one per line of its `variants`."""
    base = _instruction(table, where)
    variants = _table(table, "variants", where)
    if not variants:
        yield base
    for name, values in variants.items():
        if not isinstance(values, dict):
            raise CatalogError(f"{where}: variant {name!r} is not a table of slots")
        yield replace(base.fill(**values), id=name)


def _instruction(table: JsonObject, where: str) -> Instruction:
    _check_keys(table, INSTRUCTION_KEYS, where)
    identifier, group, verifier = table.get("id"), table.get("group", GROUPS[0]), table.get("verifier")
    if not isinstance(identifier, str) or not identifier.strip():
        raise CatalogError(f"{where} needs an id, a short text")
    if group not in GROUPS:
        raise CatalogError(f"{where}: unknown group {group!r}, expected {_listed(GROUPS)}")
    if verifier is not None and not (isinstance(verifier, str) and re.fullmatch(r"\w+:\w+", verifier)):
        raise CatalogError(f"{where}: verifier {verifier!r} is not an IFEval id such as startend:quotation")
    phrasings = _texts(table.get("phrasings"), f"{where}: phrasings")
    if not phrasings:
        raise CatalogError(f"{where} has no phrasings")
    return Instruction(
        id=identifier,
        phrasings=phrasings,
        group=group,
        held_out_phrasings=_texts(table.get("held_out_phrasings", []), f"{where}: held_out_phrasings"),
        verifier=verifier,
        kwargs=_table(table, "kwargs", where),
        slots=_table(table, "slots", where),
        queries=_query_splits(_table(table, "queries", where), where),
    )


def _table(table: Mapping[str, Any], key: str, where: str) -> JsonObject:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise CatalogError(f"{where}: {key} is not a table")
    return value


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise CatalogError(f"{where} must be a list of texts, none of them empty")
    if len(set(values)) != len(values):
        raise CatalogError(f"{where} hold one text twice")
    return tuple(values)


def _query_splits(table: Any, where: str) -> dict[str, tuple[Query, ...]]:
    """Splits that share no query, whatever the case and spacing: figures on known queries are worthless."""
    if not isinstance(table, dict):
        raise CatalogError(f"{where}: queries is not a table")
    _check_keys(table, SPLITS, f"{where}: queries")
    seen: dict[str, str] = {}
    splits: dict[str, tuple[Query, ...]] = {}
    for split, entries in table.items():
        if not isinstance(entries, list):
            raise CatalogError(f"{where}: queries.{split} is not a list")
        splits[split] = tuple(_query(entry, f"{where}: queries.{split}") for entry in entries)
        for query in splits[split]:
            key = " ".join(query.text.casefold().split())
            if key in seen:
                raise CatalogError(f"{where}: query {query.text!r} is both in {seen[key]} and in {split}")
            seen[key] = split
    return splits


def _query(entry: Any, where: str) -> Query:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict):
        raise CatalogError(f"{where}: {entry!r} is neither a text nor a table with text and subject")
    _check_keys(entry, ("text", "subject"), where)
    text, subject = entry.get("text"), entry.get("subject")
    if not isinstance(text, str) or not text.strip():
        raise CatalogError(f"{where} has an empty query")
    if subject is not None and (not isinstance(subject, str) or not subject.strip()):
        raise CatalogError(f"{where}: the subject of {text!r} is not a text")
    return Query(text.strip(), subject)


def _substitute(value: Any, slots: Mapping[str, Any]) -> Any:
    """Slots filled in texts, lists and tables; a text that is one slot alone keeps the value's type."""
    if isinstance(value, dict):
        return {key: _substitute(item, slots) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, slots) for item in value]
    if not isinstance(value, str):
        return value
    alone = _SLOT.fullmatch(value)
    if alone and alone[1] in slots:
        return slots[alone[1]]
    return _SLOT.sub(lambda match: str(slots.get(match[1], match[0])), value)


def _is_odd(character: str) -> bool:
    """Control characters, halves of surrogates, and what is no character."""
    return unicodedata.category(character) in ("Cc", "Cs", "Cn") and character not in "\n\t\r"


def _seen(text: str) -> str:
    """Without what nobody sees at its ends or anywhere: control characters, joiners, marks of direction."""
    visible = (
        character
        for character in text
        if character.isspace() or not unicodedata.category(character).startswith("C")
    )
    return "".join(visible).strip()


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
