"""How numbers are written in every report: 95%, 1.3x, `-` for what is not known.

A value of a table is a number, a text, a list of these, None, or a `Share` with its interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from localsteer.evaluate.page import Point, Share, Value

NONE = "-"
# All but tab and newline of what could drive a terminal, and what neither XML nor UTF-8 can hold.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class TableCell:
    """text: what is read first. minor: what stands small beside it, an interval mostly. share: 0 to 1, for
    the bar behind it. number: aligned to the right."""

    text: str
    minor: str = ""
    share: float | None = None
    number: bool = False


def showable(value: Any) -> Any:
    """The same with U+FFFD for every character that can't be shown, in names and in texts, at any depth."""
    if isinstance(value, str):
        return _UNSHOWABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {showable(key): showable(item) for key, item in value.items()}
    return [showable(item) for item in value] if isinstance(value, (list, tuple)) else value


def cell(value: Value) -> TableCell:
    """Any value of a page's table."""
    if isinstance(value, Share):
        return share_cell(value)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return TableCell(number(value), number=True)
    if isinstance(value, bool):
        return TableCell("yes" if value else "no")
    if isinstance(value, (list, tuple)):
        return TableCell(", ".join(cell(item).text for item in value))
    return TableCell(str(value))


def share_cell(value: Share) -> TableCell:
    if not finite(value.share):
        return TableCell(NONE, number=True)
    bar = max(0.0, min(1.0, value.share))
    return TableCell(percent(value.share), interval(value.low, value.high), bar, number=True)


def value_of(point: Point) -> float:
    """What is drawn of a value in a plot; NaN for a gap."""
    value = point.share if isinstance(point, Share) else point
    return float(value) if finite(value) else math.nan


def is_share(points: Iterable[Point]) -> bool:
    return any(isinstance(point, Share) for point in points)


def known(value: Any) -> bool:
    """A number that says something: neither None nor NaN."""
    return isinstance(value, (int, float)) and not math.isnan(value)


def finite(value: Any) -> bool:
    return known(value) and not math.isinf(value)


def percent(share: float | None) -> str:
    """Whole per cents; `<1%` and `>99%` where rounding would hide that it is not all or nothing."""
    if not finite(share):
        return NONE
    rounded = _whole(share)
    if rounded == "0" and share > 0:
        return "<1%"
    return ">99%" if rounded == "100" and share < 1 else f"{rounded}%"


def rough_percent(share: float | None) -> str:
    """Whole per cents in a sentence, where `0%` and `100%` claim nothing."""
    return NONE if share is None else f"{share:.0%}"


def interval(low: float | None, high: float | None) -> str:
    """`90-98`, in per cents without the sign, `-5 to 3` for a difference; empty where it is not known.

    Empty, too, where all draws of the bootstrap were alike: a point would claim more than is known.
    """
    if not (finite(low) and finite(high)) or low == high:
        return ""
    return (" to " if min(low, high) < 0 else "-").join((_whole(low), _whole(high)))


def _whole(share: float) -> str:
    """In per cents; never -0."""
    return f"{round(100 * share)}"


def ratio(value: float | None) -> str:
    """`1.3x`."""
    if not known(value):
        return NONE
    return f"{number(value)}x" if value >= 10 else f"{value:.1f}x" if value >= 0.05 else f"{value:.1g}x"


def number(value: float | None) -> str:
    """Three digits that count, fewer where the rest is nothing, no exponent from 0.001 to a billion."""
    if not known(value):
        return NONE
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if isinstance(value, int) or size >= 100 or value == 0:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3g}"
    if size < 0.001:
        return f"{value:.1e}"
    digits = 1 if size >= 10 or round(value, 1) == value else 2 if size >= 0.1 else 3
    return f"{value:.{digits}f}"
