"""What the terminal, the picture and the page have in common: words, numbers and colours.

One scale for all projections: dark as without the instruction, light as with it. Effects and weights have
fixed scales too, so that a vector that does nothing is dark, instead of noise drawn large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from localsteer.heatmap import colour
from localsteer.vector import ControlVector

from . import Line, Trace

_VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "·"})
MAX_PIECE = 14  # characters of a token that are shown


def visible(piece: str) -> str:
    """A token with its blanks made visible and its control characters replaced, cut where it is long."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in piece.translate(_VISIBLE)) or "·"
    return text if len(text) <= MAX_PIECE else f"{text[: MAX_PIECE - 1]}…"


def number(value: float) -> str:
    """At most four characters and a sign, or `·` where there is none."""
    if not math.isfinite(value):
        return "·"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.95 else 2
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def title(line: Line) -> str:
    """`json at layer 2: project, positions all, strength 1; -81 without the instruction, 110 with it`."""
    vector = line.vector
    how = settings(vector) if line.is_steered else "not steered here"
    low, high = line.mean("without"), line.mean("with")
    means = "" if low is None or high is None else f"; {low:.3g} without the instruction, {high:.3g} with it"
    return f"{vector.label} at layer {line.layer}: {how}{means}"


def settings(vector: ControlVector) -> str:
    text = f"{vector.mode}, positions {vector.positions}, strength {vector.strength:g}"
    text += ", one-sided" if vector.one_sided else ""
    return text if vector.cap is None else f"{text}, cap {vector.cap:g}"


def strips(trace: Trace, vector: ControlVector) -> list[Line]:
    """The lines that get a strip: the steered layers, or the first layer if none is steered."""
    lines = trace.of_vector(vector)
    return [line for line in lines if line.is_steered] or lines[:1]


def weight_share(line: Line) -> np.ndarray:
    """The dynamic weight against the distance of the two means, 0 to 1 and beyond."""
    low, high = line.scale
    return np.abs(line.weight) / abs(high - low)


def effect_share(effect: np.ndarray) -> np.ndarray:
    """0 at 0 nats, 0.1 at 0.1, 0.63 at 1, nearly 1 from 4 on."""
    return 1.0 - np.exp(-effect)


class Heat(NamedTuple):
    """values: (n_layers, n_tokens), 0 to 1 on the colour scale; values outside it are clipped. marked: bool,
    the same shape."""

    title: str
    layers: list[int]
    values: np.ndarray
    marked: np.ndarray
    is_effect: bool = False


def heats(trace: Trace, vector: ControlVector) -> list[Heat]:
    """The maps of one vector over the layers, the highest layer first; none for a single layer."""
    lines = trace.of_vector(vector)[::-1]
    if len(lines) < 2:
        return []
    layers = [line.layer for line in lines]
    marked = np.stack([trace.covers(line) for line in lines])
    after = np.stack([line.share(line.after) for line in lines])
    plain = np.stack([line.share(line.plain) for line in lines])
    effect = np.stack(
        [row for line, row in zip(trace.lines, trace.effect_here, strict=True) if line in lines]
    )
    name = vector.label
    maps = [
        Heat(
            f"{name}, projections, steered: 0 as without the instruction, 1 as with it", layers, after, marked
        ),
        Heat(f"{name}, steered less plain: what becomes of the change", layers, after - plain, marked),
    ]
    if np.isfinite(effect).any():
        effect, nothing = effect[::-1], np.zeros_like(marked)
        maps.append(
            Heat(f"{name}, effect in nats if it steered at this layer", layers, effect, nothing, True)
        )
    return maps


def rgb(share: float) -> tuple[int, int, int]:
    """The background colour for a share: dark at 0 and below, light at 1 and above."""
    return colour(min(1.0, max(0.0, share)))


def ink(share: float) -> str:
    """Black or white, whichever can be read on it."""
    red, green, blue = rgb(share)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else "#000000"
