"""A JSON schema as llguidance takes it, and which keyword is at fault if it does not.

llguidance enforces a large part of draft 2020-12 exactly, and refuses most of the rest by name. Here are

- the rewritings that keep a schema's meaning and spare its users a refusal (`oneOf` of objects with a tag,
  `propertyNames` of records, `not: {}`),
- the few keywords that it would read more loosely than they are meant (dates, control characters, integers
  of more than 64 bits),
- the search for the keyword and its path behind a refusal that names neither.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ..errors import ConstraintError
from ..jsonable import JsonObject
from .guidance import grammar_error, refused
from .patterns import exact_json_pattern, fault
from .recursion import Path, at, endless_recursion

MAX_DEPTH = 100  # of the document: llguidance's reader ends at 128
MAX_MULTIPLE = 1000
MAX_TOGETHER = 10_000
MAX_TAGGED = 256  # branches of one oneOf that are compared with each other
SEARCH_SECONDS = 1.0  # for whom to blame
# llama.cpp's rule for the space between tokens: no reply goes on with white space for ever.
# Characters have one spelling, or `"\u0061"` would be another name for the property `a`.
OPTIONS = {"whitespace_pattern": " |\\n[ \\t]{0,20}", "json_allowed_escapes": '"\\bfnrt'}

ONE = ("additionalProperties", "items", "additionalItems", "not", "contains", "propertyNames", "if", "then",
       "else", "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
NEVER = ("not", "contains", "propertyNames", "if", "then", "else", "unevaluatedItems",
         "unevaluatedProperties", "dependentSchemas")  # fmt: skip
TYPES = ("null", "boolean", "number", "string", "array", "object")
# formats that any text has, or that say how a number is stored
NO_FORMATS = (
    "password",
    "binary",
    "path",
    "file-path",
    "directory-path",
    "int32",
    "int64",
    "float",
    "double",
)
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# places that a rewritten schema still has: what a `$ref` may lead through as it is
KEPT_IN_MAPS, KEPT_IN_LISTS = ("properties", "$defs", "definitions"), ("allOf", "anyOf", "prefixItems")
IN_URIS = "/%~!$&'()*+,;=:@?"
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")

_DAYS = r"(?:0[1-9]|1\d|2[0-8])"
_MONTHS = rf"(?:(?:0[13578]|1[02])-(?:{_DAYS}|29|3[01])|(?:0[469]|11)-(?:{_DAYS}|29|30)|02-{_DAYS})"
_YEAR = r"(?:\d{3}[1-9]|\d{2}[1-9]0|\d[1-9]00|[1-9]000)"
_LEAP = r"(?:\d{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"(?:{_YEAR}-{_MONTHS}|{_LEAP}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# llguidance's own know no leap years, leap seconds at any time, and names and addresses of any length and
# punycode
FORMATS: dict[str, list[JsonObject]] = {
    "date": [{"pattern": f"^{_DATE}$"}],
    "time": [{"pattern": f"^{_TIME}$"}],
    "date-time": [{"pattern": f"^{_DATE}T{_TIME}$"}],
    "hostname": [
        {"pattern": r"^[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\.[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)*$"},
        {"pattern": r"^[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*$", "maxLength": 253},
    ],
    "email": [
        {"format": "email"},
        {"pattern": r"^[^@]{1,64}@[^.]{1,63}(?:\.[^.]{1,63})*$", "maxLength": 254},
    ],
}


def compiled_schema(schema: Any) -> str:
    """The JSON that follows `%json` in a grammar. Raises ConstraintError with the path of the keyword."""
    check_depth(schema)
    text = _written(schema)
    fault = complaint(text)
    if fault:
        raise _blamed(schema, fault)
    return text


def check_depth(schema: Any) -> None:
    left = [(schema, 1)]
    while left:
        at, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ConstraintError(f"the JSON schema is nested more than {MAX_DEPTH} deep: simplify it.")
        inner = at.values() if isinstance(at, dict) else at if isinstance(at, list) else ()
        left += [(part, depth + 1) for part in inner]


def _check_multiples(multiples: Mapping[int, Path]) -> None:
    """llguidance keeps a state for every remainder, and spends no fuel on them: 99,999 take ten seconds.
    multiples: their digits, and where they stand."""
    most = max(multiples, default=0)
    # keywords of several places may meet at one number, by allOf or $ref
    if most > MAX_MULTIPLE or math.lcm(*multiples, 1) > MAX_TOGETHER:
        raise refused(multiples[most], f"multiples of up to {MAX_MULTIPLE} can be enforced, and few at once")


def _digits(number: float) -> int:
    """12 of 0.12 and of 12: a number without its point."""
    _sign, digits, exponent = Decimal(repr(number)).as_tuple()
    return max(1, int("".join(map(str, digits))) * 10 ** max(0, int(exponent)))


def _written(schema: Any) -> str:
    rewritten = _Rewriter(schema).whole()
    return json.dumps({**rewritten, "x-guidance": OPTIONS})


# -- rewriting ----------------------------------------------------------------------------------------------


class _Rewriter:
    """root: the whole, which `$ref` leads into.

    moved: what a `$ref` leads to where nothing is rewritten, or not in its place (`#/components/schemas/A`,
    `#/oneOf/0`), by its path: a name for it among `$defs`. multiples: see `_check_multiples`.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.moved: dict[Path, str] = {}
        self.multiples: dict[int, Path] = {}
        # a `#` within a part that has a name of its own is that part, and paths are not what they look like
        self.is_one = not any("$id" in part and isinstance(part["$id"], str) for part in _parts_of(root))
        self.endless = endless_recursion(root, self._target)

    def whole(self) -> JsonObject:
        if () in self.endless.targets and self.endless.first is not None:
            why = "this recursion never ends, since what it leads to is required: make it optional"
            raise refused(self.endless.first, why)
        schema = self.schema(self.root, ())
        rewritten = dict(schema) if isinstance(schema, dict) else {"allOf": [schema]}
        parts: JsonObject = {}
        while len(parts) < len(self.moved):  # rewriting one may find others
            for path, name in list(self.moved.items())[len(parts) :]:
                parts[name] = self.schema(at(self.root, path), path)
        if parts:
            rewritten["$defs"] = {**rewritten.get("$defs", {}), **parts}
        _check_multiples(self.multiples)
        return rewritten

    def schema(self, schema: Any, path: Path) -> Any:
        if not isinstance(schema, dict):
            if not isinstance(schema, bool):
                raise refused(path, f"a schema must be an object, true or false, not {schema!r:.40}")
            return schema
        if "x-guidance" in schema:
            raise refused((*path, "x-guidance"), "options of the engine are not supported: leave it out")
        if self.endless.targets and self._target(schema.get("$ref")) in self.endless.targets:
            return False
        rewritten = {key: self._value(key, value, path) for key, value in schema.items()}
        if rewritten.get("not") in ({}, True) and isinstance(rewritten.get("not"), (dict, bool)):
            return False
        _drop_idle(rewritten)
        self._tuple(rewritten, path)
        _spell_names(rewritten)
        self._strings(rewritten, path)
        self._numbers(rewritten, path)
        self._tagged(rewritten)
        return rewritten

    def _value(self, key: str, value: Any, path: Path) -> Any:
        if key in LISTS and key != "items" and not isinstance(value, list):
            raise refused((*path, key), f"it must be a list of schemas, not {value!r:.40}")
        if key in MAPS and not isinstance(value, dict):
            raise refused((*path, key), f"it must be an object of schemas, not {value!r:.40}")
        if key == "type" and not _names_types(value):
            raise refused(
                (*path, key), f"it must be the name of a type, or a list of them, not {value!r:.40}"
            )
        if key in LISTS and isinstance(value, list):
            return [self.schema(schema, (*path, key, str(i))) for i, schema in enumerate(value)]
        if key in MAPS and isinstance(value, dict):
            inner = {name: self.schema(schema, (*path, key, name)) for name, schema in value.items()}
            if key == "patternProperties":
                self._patterns(inner, (*path, key))
                inner = {exact_json_pattern(name): schema for name, schema in inner.items()}
            return inner
        if key in ONE and isinstance(value, (dict, bool)):
            return self.schema(value, (*path, key))
        if key == "$ref" and isinstance(value, str) and "#/" in value:
            return self._reference(value, path)
        return value

    def _reference(self, reference: str, path: Path) -> str:
        """The same, or to where its target is moved to."""
        base, _, pointer = reference.partition("#/")
        target = _steps(pointer)
        # `#/$defs/Box<T>` and `#/$defs/é`, as generators write them, are no URI as they stand
        reference = f"{base}#/{quote(pointer, safe=IN_URIS, errors='replace')}"
        if not self.is_one:
            if len(target) != 2 or target[0] not in ("$defs", "definitions"):
                why = "in a schema whose parts have an $id of their own, a path may only lead to one of $defs"
                raise refused((*path, "$ref"), why)
            return reference
        if base and base != self.root.get("$id"):
            raise refused((*path, "$ref"), "references must stay within the schema")
        if _is_kept(target) or not isinstance(at(self.root, target), (dict, bool)):
            return reference
        if target not in self.moved:
            name = f"moved-{len(self.moved)}"
            while name in _names(self.root.get("$defs")):
                name += "-"
            self.moved[target] = name
        return f"#/$defs/{self.moved[target]}"

    def _tuple(self, made: JsonObject, path: Path) -> None:
        """Lists of schemas in the form of draft 2020-12: beside one, llguidance leaves out `prefixItems`."""
        if not isinstance(made.get("items"), list):
            made.pop("additionalItems", None)  # has no meaning then
        elif "prefixItems" in made:
            raise refused((*path, "items"), "a list of schemas excludes prefixItems: leave one out")

    @staticmethod
    def _patterns(patterns: Mapping[str, Any], path: Path) -> None:
        for pattern in patterns:
            if why := fault(pattern):
                raise refused((*path, pattern), why)

    @staticmethod
    def _strings(made: JsonObject, path: Path) -> None:
        names = [*_names(made.get("properties")), *_names(made.get("required"))]
        for key, values in (
            ("const", [made.get("const")]),
            ("enum", made.get("enum")),
            ("properties", names),
        ):
            if any(_is_unwritable(text) for text in _texts(values)):
                raise refused((*path, key), "control characters and halves of characters can't be written")
        pattern = made.get("pattern")
        if isinstance(pattern, str):
            if why := fault(pattern):
                raise refused((*path, "pattern"), why)
            made["pattern"] = exact_json_pattern(pattern)
        format_ = made.get("format")
        if isinstance(format_, str) and format_ in FORMATS:
            del made["format"]
            made["allOf"] = [*made.get("allOf", ()), *FORMATS[format_]]
        elif format_ in NO_FORMATS:
            del made["format"]

    def _numbers(self, made: JsonObject, path: Path) -> None:
        for key in ("const", "enum", *NUMBERS):
            if key in made and (
                any(abs(integer) >= 2**63 for integer in _integers(made[key])) or _is_wide(made, key)
            ):
                raise refused((*path, key), "integers of more than 64 bits can't be enforced")
            if key in made and any(not math.isfinite(number) for number in _floats(made[key])):
                raise refused((*path, key), "a number must be finite")
        for key in COUNTS:
            if isinstance(made.get(key), float) and made[key].is_integer():
                made[key] = int(made[key])
        for key in NUMBERS:
            number = made.get(key)
            if isinstance(number, bool):  # an exclusiveMinimum of draft 4, which would be left out
                raise refused((*path, key), f"it must be a number, not {json.dumps(number)}")
            if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
                made[key] = int(number)
        multiple = made.get("multipleOf")
        if isinstance(multiple, (int, float)) and multiple <= 0:
            raise refused((*path, "multipleOf"), f"it must be above 0, not {multiple!r:.40}")
        if isinstance(multiple, (int, float)):
            self.multiples.setdefault(_digits(multiple), (*path, "multipleOf"))
        if made.get("type") != "integer":
            _step_in(made, "exclusiveMinimum", "minimum", 1)
            _step_in(made, "exclusiveMaximum", "maximum", -1)

    def _tagged(self, made: JsonObject) -> None:
        """`oneOf` is `anyOf` where no document fits two branches."""
        branches = made.get("oneOf")
        if not isinstance(branches, list) or not 1 <= len(branches) <= MAX_TAGGED:
            return
        if all(self._apart(a, b) for i, a in enumerate(branches) for b in branches[:i]):
            _both(made, "anyOf", made.pop("oneOf"))

    def _apart(self, a: Any, b: Any) -> bool:
        a, b = self._resolved(a), self._resolved(b)
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return a is False or b is False
        if not _types(a) & _types(b):
            return True
        if _no_common(_values(a), _values(b)):
            return True
        if _types(a) & _types(b) != {"object"}:
            return False
        return any(
            _no_common(_values(self._property(a, name)), _values(self._property(b, name)))
            for name in {*_names(a.get("required"))} & {*_names(b.get("required"))}
        )

    def _property(self, schema: JsonObject, name: str) -> Any:
        properties = schema.get("properties")
        return self._resolved(properties.get(name)) if isinstance(properties, dict) else None

    def _resolved(self, schema: Any) -> Any:
        """What a `$ref` within the document leads to; others, and those in a circle, as they are."""
        for _ in range(8):
            ref = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(ref, str) or not ref.startswith("#"):
                break
            target = self._target(ref)
            if target is None:
                return None
            schema = at(self.root, target)
        return schema

    def _target(self, reference: Any) -> Path | None:
        """Where a `$ref` leads within the document; None if that is elsewhere, or unknown."""
        if not self.is_one or not isinstance(reference, str):
            return None
        base, hash_, pointer = reference.partition("#")
        if not hash_ or (base and base != self.root.get("$id")) or pointer[:1] not in ("", "/"):
            return None
        return _steps(pointer[1:]) if pointer else ()


def _steps(pointer: str) -> Path:
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in unquote(pointer).split("/"))


def _is_kept(path: Path) -> bool:
    """Whether the schema at this path is rewritten in its place."""
    steps = list(path)
    while steps:
        key = steps.pop(0)
        if key in KEPT_IN_MAPS or key in KEPT_IN_LISTS:
            if not steps:
                return False
            steps.pop(0)
        elif key not in ("items", "additionalProperties"):
            return False
    return True


def _parts_of(root: Any) -> Iterator[JsonObject]:
    """All objects but the whole."""
    return (part for part in _inside(root) if isinstance(part, dict) and part is not root)


def _is_wide(made: JsonObject, key: str) -> bool:
    """Whether integers are to be beyond a float like 1e20: llguidance takes the last of 64 bits for it."""
    kinds = made.get("type", "integer")
    if "integer" not in ([kinds] if isinstance(kinds, str) else kinds):
        return False
    value = made[key]
    if isinstance(value, float) and key in NUMBERS and (value < 0) == key.lower().endswith("minimum"):
        return False  # a bound that no integer reaches
    return any(abs(number) >= 2.0**63 for number in _floats(value))


def _step_in(made: JsonObject, key: str, inclusive: str, sign: int) -> None:
    """Between 0, exclusive, and 0.5 llguidance takes 0, as with any integer whose other bound is less than 1
    further from 0: the bound moves by what no reply has digits for."""
    bound = made.get(key)
    if isinstance(bound, int) and bound * sign >= 0:
        del made[key]
        _both(made, inclusive, bound + sign * max(1e-9, 4 * math.ulp(bound)))


def _drop_idle(made: JsonObject) -> None:
    """Keywords with a value that asks for nothing."""
    if made.get("uniqueItems") is False:
        del made["uniqueItems"]
    if made.get("propertyNames") in (True, {}, {"type": "string"}) and not isinstance(
        made["propertyNames"], int
    ):
        del made["propertyNames"]
    for key in ("propertyNames", "unevaluatedProperties", "unevaluatedItems"):
        if made.get(key) is True:
            del made[key]


def _spell_names(made: JsonObject) -> None:
    """A record: names by a pattern or a list, and one schema for all values."""
    names = made.get("propertyNames")
    if not isinstance(names, dict) or made.get("properties") or made.get("patternProperties"):
        return
    rest = {key: value for key, value in names.items() if key != "type" or value != "string"}
    value = made.get("additionalProperties", True)
    if list(rest) == ["pattern"] and isinstance(rest["pattern"], str):
        made["patternProperties"] = {rest["pattern"]: value}
    elif list(rest) == ["enum"] and rest["enum"] and _names(rest["enum"]) == rest["enum"]:
        made["properties"] = dict.fromkeys(rest["enum"], value)
    else:
        return
    made["additionalProperties"] = False
    del made["propertyNames"]


def _both(made: JsonObject, key: str, value: Any) -> None:
    if key in made:
        made["allOf"] = [*made.get("allOf", ()), {key: value}]
    else:
        made[key] = value


def _names_types(value: Any) -> bool:
    known = (*TYPES, "integer")
    return value in known if isinstance(value, str) else isinstance(value, list) and all(
        isinstance(kind, str) and kind in known for kind in value
    )  # fmt: skip


def _types(schema: JsonObject) -> set[str]:
    named = schema.get("type", TYPES)
    kinds = (
        {named} if isinstance(named, str) else set(named) if isinstance(named, (list, tuple)) else set(TYPES)
    )
    kinds = {"number" if kind == "integer" else kind for kind in kinds}
    values = _values(schema)
    return kinds if values is None else kinds & {_type_of(json.loads(value)) for value in values}


def _type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _values(schema: Any) -> set[str] | None:
    """As JSON; None where they are not listed. 1.0 is 1."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return {_as_key(schema["const"])}
    listed = schema.get("enum")
    return {_as_key(value) for value in listed} if isinstance(listed, list) else None


def _as_key(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _no_common(a: set[str] | None, b: set[str] | None) -> bool:
    return a is not None and b is not None and not a & b


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, (dict, list)) else []


def _inside(value: Any) -> Iterator[Any]:
    left = [value]
    while left:
        at = left.pop()
        yield at
        if isinstance(at, dict):
            left += [*at, *at.values()]
        elif isinstance(at, list):
            left += at


def _texts(value: Any) -> Iterator[str]:
    return (part for part in _inside(value) if isinstance(part, str))


def _floats(value: Any) -> Iterator[float]:
    return (part for part in _inside(value) if isinstance(part, float))


def _integers(value: Any) -> Iterator[int]:
    return (part for part in _inside(value) if isinstance(part, int))


def _is_unwritable(text: str) -> bool:
    return any((c < " " and c not in "\b\f\n\r\t") or c == "\x7f" or "\ud800" <= c < "\ue000" for c in text)


# -- blame --------------------------------------------------------------------------------------------------


class Complaint(NamedTuple):
    """reason: one line. keys: of those that llguidance names itself."""

    reason: str
    keys: tuple[str, ...] = ()


def complaint(text: str) -> Complaint | None:
    """What llguidance has against a schema as `_written` has it; None: it is taken."""
    error = grammar_error(f"start: %json {text}")
    if error is None:
        return None
    named = re.search(r"Unimplemented keys: (\[[^]]*\])", error)
    keys = json.loads(named[1]) if named else ["oneOf"] if "oneOf constraints" in error else []
    return Complaint(_reason(error), tuple(keys))


def _reason(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error: ")), lines[0])
    told = told.removeprefix("error: ").rpartition("failed to compile JSON schema: ")[2]
    if told.startswith("Unimplemented keys"):
        return "this keyword can't be enforced: leave it out"
    if told.startswith("oneOf"):
        return (
            "branches that may overlap can't be enforced: use anyOf, or give each a required tag of its own"
        )
    if "retriev" in told or "Default retriever" in told:
        return "references must stay within the schema"
    for many in ("too large", "fuel", "max is", "too many", "panic", "limit"):
        if many in told:
            return f"it is too large or too complex ({told[:80]}): simplify it"
    return told.replace("json-schema:///", "")[:160].rstrip(".")


def _blamed(schema: Any, why: Complaint) -> ConstraintError:
    """Take parts away, from the first to the last, until the reason goes: the last one taken was it. Then the
    same within that part."""
    until = time.monotonic() + SEARCH_SECONDS
    path: Path = ()
    while time.monotonic() < until:
        places = list(_places(_at(schema, path)))
        cure = _first_cure(schema, path, places, why, until)
        if cure is None:
            break
        for place in places[:cure]:  # another part may have the same fault: one is enough
            schema = _without(schema, (*path, *place))
        path = (*path, *places[cure])
    node = _at(schema, path)
    named = [key for key in node if key in why.keys] if isinstance(node, dict) else []
    if named:
        path = (*path, named[0])
    elif isinstance(node, dict):
        keys = [(key,) for key in reversed(node)]
        cure = _first_cure(schema, path, keys, why, until + SEARCH_SECONDS, drop=True)
        if cure is not None:
            path = (*path, *keys[cure])
    return refused(path, why.reason)


def _first_cure(
    schema: Any, path: Path, places: list[Path], why: Complaint, until: float, *, drop: bool = False
) -> int | None:
    """Index of the place with which, those before it gone too, the reason goes; None: with none of them."""

    def stays(n: int) -> bool:
        cut = schema
        for place in places[:n]:
            cut = _without(cut, (*path, *place), drop=drop)
        try:
            return complaint(_written(cut)) == why
        except ConstraintError:
            return False

    low, high = 0, len(places)
    if not places or stays(high):
        return None
    while low + 1 < high and time.monotonic() < until:
        middle = (low + high) // 2
        low, high = (middle, high) if stays(middle) else (low, middle)
    return high - 1


def _places(node: Any) -> Iterator[Path]:
    """Where the schemas right under one stand; not those of keywords that are refused anyway."""
    keys = [key for key in node if key not in NEVER] if isinstance(node, dict) else []
    # what is used by reference first: without its user its fault would be gone too
    for key in sorted(keys, key=lambda key: key not in ("$defs", "definitions")):
        value = node[key]
        if key in LISTS and isinstance(value, list):
            yield from ((key, str(i)) for i, schema in enumerate(value) if schema is not True)
        elif key in MAPS and isinstance(value, dict):
            yield from ((key, name) for name, schema in value.items() if schema is not True)
        elif key in ONE and isinstance(value, dict):
            yield (key,)


def _at(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[int(step)] if isinstance(schema, list) else schema[step]
    return schema


def _without(schema: Any, path: Path, *, drop: bool = False) -> Any:
    """A copy that allows anything at the path; drop: that has nothing there."""
    if not path:
        return True
    if len(path) == 2 and path[0] == "anyOf":  # beside anything at all the others would not count
        branches = list(schema[path[0]])
        branches[int(path[1])] = {"const": f"\u2026 {path[1]}"}
        return {**schema, path[0]: branches}
    step: Any = int(path[0]) if isinstance(schema, list) else path[0]
    copied = list(schema) if isinstance(schema, list) else dict(schema)
    if drop and len(path) == 1:
        del copied[step]
    else:
        copied[step] = _without(schema[step], path[1:], drop=drop)
    return copied
