"""Is this a results.json that can be shown? Checked before anything is drawn, so that a broken file ends in
one line that names the place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localsteer.errors import LocalsteerError

FORMAT = 1
PLOTS = ("lines", "bars", "heatmap")


def check(results: Any) -> None:
    """Raises LocalsteerError for results that are no such table, of a newer format, or broken somewhere."""
    try:
        _check(results)
    except _Broken as broken:
        where, wanted = broken.args
        raise LocalsteerError(
            f"these results can't be shown ({where} must be {wanted}): make them again with localsteer eval."
        ) from None


class _Broken(Exception):
    """Where, and what is wanted there."""


def _check(results: Any) -> None:
    _mapping(results, "the whole")
    _check_format(results.get("format"))
    for key in ("model", "base", "settings", "files", "vectors"):
        _mapping(results.get(key) or {}, key)
    for name, vector in (results.get("vectors") or {}).items():
        _mapping(vector, f"vectors.{name}")
    for name, suite in _mapping(results.get("suites", {}), "suites").items():
        _check_suite(suite, f"suites.{name}")
    _check_sections(results.get("sections", []), "sections")


def _check_format(found: Any) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise _Broken("format", "a whole number")
    if found > FORMAT:
        raise LocalsteerError(
            f"these results are of format {found}, this localsteer shows format {FORMAT}: update localsteer."
        )


def _check_suite(suite: Any, where: str) -> None:
    _text(_mapping(suite, where).get("title") or "", f"{where}.title")
    _texts(suite.get("conditions", []), f"{where}.conditions")
    for name, row in _mapping(suite.get("instructions", {}), f"{where}.instructions").items():
        _check_row(row, f"{where}.instructions.{name}")
    _check_row(suite.get("all") or {}, f"{where}.all")
    _check_sections(suite.get("sections", []), f"{where}.sections")


def _check_row(row: Any, where: str) -> None:
    """The figures of one instruction, by condition."""
    for condition, figures in _mapping(row, where).items():
        place = f"{where}.{condition}"
        _number(_mapping(figures, place).get("n"), f"{place}.n")
        for group in ("strict", "loose", "quality"):
            for key, value in _mapping(figures.get(group) or {}, f"{place}.{group}").items():
                _number(value, f"{place}.{group}.{key}")


def _check_sections(sections: Any, where: str) -> None:
    for section, place in _each(sections, where):
        _mapping(section, place)
        _text(section.get("title", ""), f"{place}.title")
        _text(section.get("text") or "", f"{place}.text")
        for table, at in _each(section.get("tables", []), f"{place}.tables"):
            _check_table(table, at)
        for plot, at in _each(section.get("plots", []), f"{place}.plots"):
            check_plot(plot, at)


def _check_table(table: Any, where: str) -> None:
    columns = _list(_mapping(table, where).get("columns"), f"{where}.columns")
    for row, place in _each(table.get("rows"), f"{where}.rows"):
        if len(_list(row, place)) != len(columns):
            raise _Broken(place, f"{len(columns)} long, as the columns are")
        for value, at in _each(row, place):
            _check_value(value, at)


def check_plot(plot: Any, where: str) -> None:
    kind = _mapping(plot, where).get("kind")
    if kind not in PLOTS:
        raise _Broken(f"{where}.kind", f"one of {', '.join(PLOTS)}")
    for key in ("title", "x_label", "y_label"):
        _text(plot.get(key) or "", f"{where}.{key}")
    _check_grid(plot, where) if kind == "heatmap" else _check_series(plot, where)


def _check_series(plot: Mapping[str, Any], where: str) -> None:
    x = _labels(plot, "x", where)
    for name, values in _mapping(plot.get("series"), f"{where}.series").items():
        place = f"{where}.series.{name}"
        if len(_list(values, place)) != len(x):
            raise _Broken(place, f"{len(x)} long, as x is")
        for value, at in _each(values, place):
            _check_point(value, at)


def _check_grid(plot: Mapping[str, Any], where: str) -> None:
    rows, columns = _labels(plot, "rows", where), _labels(plot, "columns", where)
    values = _list(plot.get("values"), f"{where}.values")
    if len(values) != len(rows):
        raise _Broken(f"{where}.values", f"{len(rows)} long, as the rows are")
    for row, place in _each(values, f"{where}.values"):
        if len(_list(row, place)) != len(columns):
            raise _Broken(place, f"{len(columns)} long, as the columns are")
        for value, at in _each(row, place):
            _check_point(value, at)


def _labels(plot: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    for value, place in _each(plot.get(key), f"{where}.{key}"):
        if not isinstance(value, (str, int, float)):
            raise _Broken(place, "a number or a text")
    return plot[key]


def _check_value(value: Any, where: str) -> None:
    """A table's cell."""
    if isinstance(value, (list, tuple)):
        for each, place in _each(value, where):
            _check_value(each, place)
    elif not (value is None or isinstance(value, (str, int, float))):
        _check_point(value, where)


def _check_point(value: Any, where: str) -> None:
    """A number, None, or a share."""
    if not isinstance(value, Mapping):
        _number(value, where)
    elif "share" not in value:
        raise _Broken(where, "a number, or a table with `share`")
    else:
        for key in ("share", "low", "high"):
            _number(value.get(key), f"{where}.{key}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _Broken(where, "a table of names and values")
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _Broken(where, "a list")
    return value


def _each(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    for i, item in enumerate(_list(value, where)):
        yield item, f"{where}[{i}]"


def _texts(value: Any, where: str) -> None:
    for item, place in _each(value, where):
        _text(item, place)


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _Broken(where, "text")


def _number(value: Any, where: str) -> None:
    if not (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        raise _Broken(where, "a number or null")
