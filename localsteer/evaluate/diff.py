"""Two evaluations side by side: what was set differently, and what came out differently.

compare(read("run-a"), read("run-b"))["sections"]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from localsteer.errors import LocalsteerError
from localsteer.evaluate.intervals import certain

IGNORED = ("suites", "seconds", "command", "format")
RULE = "strict"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """What can be shown like results: a title, and sections. Two figures differ clearly when the 95%
    intervals of their shares do not overlap, which is stricter than a test of the difference. Raises
    LocalsteerError for what is no evaluation, as a study."""
    for name, each in (("A", a), ("B", b)):
        if not isinstance(each.get("suites"), Mapping):
            raise LocalsteerError(f"{name} is no evaluation: give two runs of `localsteer eval`.")
    sections = [_settings(a, b)]
    for name in [*a["suites"], *(name for name in b["suites"] if name not in a["suites"])]:
        both = a["suites"].get(name), b["suites"].get(name)
        sections.append(_suite(name, *both) if all(both) else _in_one(name, both[0] is not None))
    return {
        "format": 1,
        "title": f"{_label(a)} (A) and {_label(b)} (B)",
        "model": b["model"],
        "suites": {},
        "sections": sections,
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[list[Any]]:
    """[setting, of A, of B] of everything that was recorded differently: settings, hashes, versions."""
    ours, theirs = (dict(_flat({k: v for k, v in each.items() if k not in IGNORED})) for each in (a, b))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [[key, ours.get(key), theirs.get(key)] for key in keys if ours.get(key) != theirs.get(key)]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`model.sha256`: value. A list is one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value))
    else:
        yield path, value if value is None or isinstance(value, (int, float)) else str(value)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    rows = [[key, *map(_shown, values)] for key, *values in differences(a, b)]
    text = "" if rows else "The two runs had the same settings, files and versions."
    tables = [{"columns": ["setting", "A", "B"], "rows": rows}] if rows else []
    return {"title": "What was set differently", "text": text, "tables": tables, "plots": []}


def _shown(value: Any) -> Any:
    """Short: whole hashes would fill a terminal, and part A from B."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return str(value) if isinstance(value, bool) else value


def _suite(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        row
        for label, ours, theirs in _rows(a, b)
        for condition in ours
        if condition in theirs
        for row in [_row(label, condition, ours[condition], theirs[condition])]
    ]
    clear = sum(row[-1] is not None for row in rows)
    text = (
        f"{clear} of {len(rows)} figures differ clearly (their 95% intervals do not overlap). Chance alone "
        "makes some of many differ."
    )
    missing = sorted(set(a["instructions"]) ^ set(b["instructions"]))
    if missing:
        text += f" In one run only: {', '.join(missing)}."
    columns = ["instruction", "condition", "A", "B", "change", "clear"]
    table = {"columns": columns, "rows": rows}
    return {"title": f"Suite {name}", "text": text, "tables": [table], "plots": []}


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "all", a.get("all") or {}, b.get("all") or {}
    for name, row in a["instructions"].items():
        if name in b["instructions"]:
            yield name, row, b["instructions"][name]


def _row(label: str, condition: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Any]:
    ours, theirs = ({"accuracy": None, "low": None, "high": None, **each[RULE]} for each in (a, b))
    cells = [{"share": each["accuracy"], "low": each["low"], "high": each["high"]} for each in (ours, theirs)]
    if ours["accuracy"] is None or theirs["accuracy"] is None:
        return [label, condition, *cells, None, None]
    change = theirs["accuracy"] - ours["accuracy"]
    return [label, condition, *cells, {"share": change}, _clear(certain(a, RULE), certain(b, RULE))]


def _clear(a: tuple[float, float] | None, b: tuple[float, float] | None) -> str | None:
    if a is None or b is None:
        return None
    return "better" if b[0] > a[1] else "worse" if b[1] < a[0] else None


def _in_one(name: str, is_in_a: bool) -> dict[str, Any]:
    text = f"Only run {'A' if is_in_a else 'B'} has it."
    return {"title": f"Suite {name}", "text": text, "tables": [], "plots": []}


def _label(results: Mapping[str, Any]) -> str:
    model = results["model"]
    return " ".join(str(model[key]) for key in ("name", "quantization") if model.get(key))
