"""A trace in the terminal, with rich: a strip of tokens for each vector, and a heat map over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from localsteer.heatmap import terminal_heatmap

from . import Line, Trace, looks
from .diagnosis import diagnose

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LABEL_WIDTH = 8
HEAT_CELL = 6
HEAT_MARGIN = 7  # the numbers of the layers
MIN_WIDTH = 40


class TokenRow(NamedTuple):
    """One line of a strip: a text and a share of the colours for each token; NaN leaves a cell plain."""

    label: str
    texts: Sequence[str]
    shares: np.ndarray
    style: str = ""


def print_trace(trace: Trace, console: Console) -> None:
    """Print the whole trace. The verdict comes last, so that it is still in sight after a long one."""
    from rich.text import Text

    for vector in trace.vectors:
        for line in looks.strips(trace, vector):
            console.print(Text(looks.title(line), style="bold"))
            for text in _strip(trace, line, max(MIN_WIDTH, console.width)):
                console.print(text, soft_wrap=True)
        for heat in looks.heats(trace, vector):
            _print_heat(trace, heat, console)
    console.print(_legend(), soft_wrap=True)
    for finding in diagnose(trace):
        console.print(Text(f"{finding.kind}: ", style="bold").append(finding.text, style="not bold"))


def _strip(trace: Trace, line: Line, width: int) -> Iterator[Text]:
    from rich.text import Text

    rows = _rows(trace, line)
    widths = [_cell_width(texts) for texts in zip(*(row.texts for row in rows), strict=True)]
    for start, stop in _segments(widths, width - LABEL_WIDTH - 2):
        for row in rows:
            yield _row_text(row, range(start, stop), widths, trace.n_prompt)
        yield Text()


def _rows(trace: Trace, line: Line) -> list[TokenRow]:
    after = line.share(line.after)
    same = np.array_equal(line.plain, line.before, equal_nan=True)
    rows = [
        TokenRow("", [looks.visible(piece) for piece in trace.pieces], after, "bold"),
        # below the first steered layer nothing has changed yet
        *([] if same else [_projections("plain", line, line.plain, "dim")]),
        _projections("before", line, line.before),
        _projections("after", line, line.after),
    ]
    if not _is_constant(line.target):
        rows.append(_projections("target", line, line.target))
    weight = np.where(trace.covers(line), line.weight, np.nan)
    rows.append(TokenRow("weight", list(map(looks.number, weight)), looks.weight_share(line) + 0 * weight))
    rows.append(TokenRow("effect", list(map(looks.number, trace.effect)), looks.effect_share(trace.effect)))
    instead = [
        looks.visible(piece) if differs else "·"
        for piece, differs in zip(trace.plain_pieces, trace.differs, strict=True)
    ]
    rows.append(TokenRow("instead", instead, np.full(len(instead), np.nan), "dim"))
    return rows


def _projections(label: str, line: Line, values: np.ndarray, style: str = "") -> TokenRow:
    return TokenRow(label, list(map(looks.number, values)), line.share(values), style)


def _is_constant(target: np.ndarray) -> bool:
    known = target[np.isfinite(target)]
    return not len(known) or float(np.ptp(known)) <= 1e-6 * max(1.0, float(np.abs(known).max()))


def _cell_width(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts)) + 1


def _segments(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens that fit on one line each."""
    start, used = 0, 0
    for i, width in enumerate(widths):
        if i > start and used + width > room:
            yield start, i
            start, used = i, 0
        used += width
    yield start, len(widths)


def _row_text(row: TokenRow, tokens: range, widths: Sequence[int], n_prompt: int) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    text = Text(row.label.ljust(LABEL_WIDTH), style="dim")
    for i in tokens:
        if i == n_prompt:
            text.append("│ ", style="not dim")
        cell = " " * (widths[i] - cell_len(row.texts[i])) + row.texts[i]
        text.append(cell, style=_style(row.shares[i], row.style))
    return text


def _style(share: float, style: str) -> str:
    if not np.isfinite(share):
        return style or "not dim"
    return f"not dim {style if style != 'dim' else ''} {looks.ink(share)} on rgb{looks.rgb(share)}".replace(
        ", ", ","
    )


def _print_heat(trace: Trace, heat: looks.Heat, console: Console) -> None:
    from rich.text import Text

    n_read = int(np.isfinite(trace.lines[0].after).sum())
    columns = range(trace.n_prompt, len(trace.tokens)) if heat.is_effect else range(n_read)
    labels = [looks.visible(piece)[: HEAT_CELL - 2].center(HEAT_CELL - 2) for piece in trace.pieces]
    console.print(Text(heat.title, style="bold"))  # a table would fold it to its own width
    for start, stop in _segments([HEAT_CELL] * len(columns), max(MIN_WIDTH, console.width) - HEAT_MARGIN):
        here = columns[start:stop]
        marked = [tuple(cell) for cell in np.argwhere(heat.marked[:, here.start : here.stop]).tolist()]
        values = (heat.values[:, here.start : here.stop].round(1) + 0.0).tolist()  # no -0.0
        names = labels[here.start : here.stop]
        console.print(
            terminal_heatmap(
                "", heat.layers, names, values, marked, low=0, high=1, form="{:4.1f}", corner="layer"
            )
        )
    console.print()


def _legend() -> Text:
    from rich.text import Text

    text = Text("projections: ", style="dim")
    for share, word in ((0.0, " as without the instruction "), (0.5, " between "), (1.0, " as with it ")):
        text.append(word, style=_style(share, ""))
    text.append(
        " · effect: nats between what the steered and the plain model say there · instead: what the plain "
        "model would rather say",
        style="dim",
    )
    return text
