"""Schemas that require themselves: no document that ends can match them.

A reply under such a schema could only go on until its last token. llguidance does not notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Path = tuple[str, ...]

MAX_STEPS = 200_000  # for a schema so large, or so entangled, nothing is said


class Endless(NamedTuple):
    """targets: where a `$ref` leads to a schema without a finite match; () is the whole. first: the path of
    the first such `$ref`, or None."""

    targets: frozenset[Path]
    first: Path | None


def endless_recursion(root: Any, target_of: Callable[[str], Path | None]) -> Endless:
    """target_of: where a value of `$ref` leads within the document, or None. What is uncertain counts as
    finite."""
    return _Search(root, target_of).endless()


class _Search:
    """finite: the targets that are known to have a finite match."""

    def __init__(self, root: Any, target_of: Callable[[str], Path | None]) -> None:
        self.root, self.target_of = root, target_of
        self.finite: set[Path] = set()
        self.steps = 0

    def endless(self) -> Endless:
        references = list(self._references())
        if not references:
            return Endless(frozenset(), None)
        schemas = {target: at(self.root, target) for target in ((), *(target for _, target in references))}
        waiting = defaultdict(list)  # by a target, those whose match may depend on it
        for target, schema in schemas.items():
            for inner in self._targets_in(schema):
                waiting[inner].append(target)
        left = list(schemas)
        while left:
            target = left.pop()
            if target not in self.finite and self._is_finite(schemas[target]):
                self.finite.add(target)
                left += waiting[target]
            if self.steps > MAX_STEPS:
                return Endless(frozenset(), None)
        endless = frozenset(schemas) - self.finite
        return Endless(endless, next((path for path, target in references if target in endless), None))

    def _references(self) -> Iterator[tuple[Path, Path]]:
        """Path and target of each, in the order of the document."""
        left: list[tuple[Path, Any]] = [((), self.root)]
        while left:
            path, value = left.pop()
            if isinstance(value, dict):
                target = self._target(value)
                if target is not None:
                    yield (*path, "$ref"), target
                left += reversed([((*path, key), part) for key, part in value.items()])
            elif isinstance(value, list):
                left += reversed([((*path, str(i)), part) for i, part in enumerate(value)])

    def _targets_in(self, schema: Any) -> set[Path]:
        found, left = set(), [schema]
        while left and self.steps <= MAX_STEPS:
            self.steps += 1
            value = left.pop()
            if isinstance(value, dict):
                target = self._target(value)
                if target is not None:
                    found.add(target)
                left += value.values()
            elif isinstance(value, list):
                left += value
        return found

    def _target(self, schema: Any) -> Path | None:
        return self.target_of(schema["$ref"]) if isinstance(schema.get("$ref"), str) else None

    def _is_finite(self, schema: Any) -> bool:
        self.steps += 1
        if not isinstance(schema, dict) or self.steps > MAX_STEPS:
            return schema is not False
        target = self._target(schema)
        if target is not None and target not in self.finite:
            return False
        if not all(map(self._is_finite, _list(schema.get("allOf")))):
            return False
        for key in ("anyOf", "oneOf"):
            branches = _list(schema.get(key))
            if branches and not any(map(self._is_finite, branches)):
                return False
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else _list(kinds)
        ends = any(kind not in ("object", "array") for kind in kinds)
        if "const" in schema or "enum" in schema or not kinds or ends:
            return True
        return ("object" in kinds and self._is_finite_object(schema)) or (
            "array" in kinds and self._is_finite_array(schema)
        )

    def _is_finite_object(self, schema: dict[str, Any]) -> bool:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        rest = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        required = (name for name in _list(schema.get("required")) if isinstance(name, str))
        return all(self._is_finite(properties.get(name, rest)) for name in required)

    def _is_finite_array(self, schema: dict[str, Any]) -> bool:
        least, rest = schema.get("minItems"), schema.get("items", True)
        if not isinstance(least, (int, float)):
            return True
        first = _list(schema.get("prefixItems"))
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems", True)
        if not all(self._is_finite(item) for i, item in enumerate(first) if i < least):
            return False
        return least <= len(first) or self._is_finite(rest)


def at(root: Any, path: Path) -> Any:
    """What is at a path of a document; None where there is nothing."""
    for step in path:
        if isinstance(root, list):
            root = root[int(step)] if step.isdecimal() and int(step) < len(root) else None
        else:
            root = root.get(step) if isinstance(root, dict) else None
    return root


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
