"""Two evaluations side by side: what was set differently, and what came out differently.

compare(read("run-a"), read("run-b")).sections
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from localsteer.errors import LocalsteerError
from localsteer.evaluate.intervals import certain
from localsteer.evaluate.page import (
    FORMAT,
    ByCondition,
    Figures,
    Results,
    Section,
    Share,
    SuiteReport,
    Table,
    Value,
    plain,
)
from localsteer.evaluate.report.document import model_label

IGNORED = ("suites", "seconds", "command", "format")
RULE = "strict"


def compare(a: Results, b: Results) -> Results:
    """A page with a section for the settings and one for each suite. Two figures differ clearly when the 95%
    intervals of their shares do not overlap, which is stricter than a test of the difference. Raises
    LocalsteerError for what is no evaluation, as a study."""
    for name, results in (("A", a), ("B", b)):
        if not isinstance(results.suites, Mapping):
            raise LocalsteerError(f"{name} is no evaluation: give two runs of `localsteer eval`.")
    sections = [_settings(a, b)]
    for name in dict.fromkeys([*a.suites, *b.suites]):
        both = [results.suites[name] for results in (a, b) if name in results.suites]
        sections.append(_suite(name, *both) if len(both) == 2 else _in_one(name, name in a.suites))
    title = f"{model_label(a.model)} (A) and {model_label(b.model)} (B)"
    return Results(format=FORMAT, title=title, model=b.model, suites={}, sections=sections)


def differences(a: Results, b: Results) -> list[list[Any]]:
    """[setting, of A, of B] of everything that was recorded differently: settings, hashes, versions."""
    ours, theirs = (
        dict(_flat({key: value for key, value in plain(results).items() if key not in IGNORED}))
        for results in (a, b)
    )
    keys = dict.fromkeys([*ours, *theirs])
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


def _settings(a: Results, b: Results) -> Section:
    rows = [[key, *map(_shown, values)] for key, *values in differences(a, b)]
    text = "" if rows else "The two runs had the same settings, files and versions."
    tables = [Table(["setting", "A", "B"], rows)] if rows else []
    return Section("What was set differently", text, tables)


def _shown(value: Any) -> Value:
    """Short: whole hashes would fill a terminal and push A away from B."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return str(value) if isinstance(value, bool) else value


def _suite(name: str, a: SuiteReport, b: SuiteReport) -> Section:
    rows = [
        _row(label, condition, ours[condition], theirs[condition])
        for label, ours, theirs in _rows(a, b)
        for condition in ours
        if condition in theirs
    ]
    clear = sum(row[-1] is not None for row in rows)
    text = (
        f"{clear} of {len(rows)} figures differ clearly (their 95% intervals do not overlap). Chance alone "
        "makes some of many differ."
    )
    missing = sorted(set(a.instructions) ^ set(b.instructions))
    if missing:
        text += f" In one run only: {', '.join(missing)}."
    columns = ["instruction", "condition", "A", "B", "change", "clear"]
    return Section(f"Suite {name}", text, [Table(columns, rows)])


def _rows(a: SuiteReport, b: SuiteReport) -> Iterator[tuple[str, ByCondition, ByCondition]]:
    yield "all", a.all or {}, b.all or {}
    for name, row in a.instructions.items():
        if name in b.instructions:
            yield name, row, b.instructions[name]


def _row(label: str, condition: str, a: Figures, b: Figures) -> list[Value]:
    ours, theirs = a.rule(RULE).share, b.rule(RULE).share
    if ours.share is None or theirs.share is None:
        return [label, condition, ours, theirs, None, None]
    change = Share(theirs.share - ours.share)
    return [label, condition, ours, theirs, change, _clear(certain(a, RULE), certain(b, RULE))]


def _clear(a: tuple[float, float] | None, b: tuple[float, float] | None) -> str | None:
    if a is None or b is None:
        return None
    return "better" if b[0] > a[1] else "worse" if b[1] < a[0] else None


def _in_one(name: str, is_in_a: bool) -> Section:
    return Section(f"Suite {name}", f"Only run {'A' if is_in_a else 'B'} has it.")
