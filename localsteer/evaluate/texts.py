"""The prose of reports: texts.toml, with figures put into its {fields}.

section("words.include", table, plot, pairs=20)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from localsteer.catalog import read_toml
from localsteer.evaluate.page import AnyPlot, Section, Table


def section(name: str, /, *shown: Table | AnyPlot, more: str = "", **values: Any) -> Section:
    """A section with the title and text of this name. more: put after the text. shown: its tables, plots."""
    tables = [one for one in shown if isinstance(one, Table)]
    plots = [one for one in shown if not isinstance(one, Table)]
    text = f"{said(name, **values)} {more}".strip()
    return Section(_entry(name)["title"], text, tables, plots)


def said(name: str, /, **values: Any) -> str:
    """A text by its name, `suite.part`."""
    return written(name).format(**values)


def written(name: str) -> str:
    """The same with its {fields}."""
    entry = _entry(name)
    return entry if isinstance(entry, str) else entry.get("text", "")


def _entry(name: str) -> Any:
    entry: Any = _texts()
    for key in name.split("."):
        entry = entry[key]
    return entry


@cache
def _texts() -> dict[str, Any]:
    return read_toml(Path(__file__).with_name("texts.toml"))
