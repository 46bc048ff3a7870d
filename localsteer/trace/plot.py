"""A trace as a picture, with matplotlib: projections, weights and effect over the tokens, and heat maps."""

from __future__ import annotations

import os
from textwrap import fill
from typing import Any

import numpy as np

from localsteer.heatmap import draw_heatmap, new_figure, save_figure

from . import Line, Trace, looks
from .diagnosis import diagnose

TOKEN_WIDTH = 0.24  # inches
MIN_WIDTH, MAX_WIDTH = 9.0, 40.0
STRIP_HEIGHT, BAR_HEIGHT, LAYER_HEIGHT = 2.2, 1.1, 0.22
PLAIN, BEFORE, AFTER = "#8a8a8a", "#2c5c86", "#d1602a"


def draw_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Draw a trace into a picture file; its extension chooses the format (.png, .svg, .pdf).

    Raises LocalsteerError for an unknown extension, and for a file that can't be written.
    """
    lines = [line for vector in trace.vectors for line in looks.strips(trace, vector)]
    maps = [heat for vector in trace.vectors for heat in looks.heats(trace, vector)]
    heights = [part for _ in lines for part in (STRIP_HEIGHT, BAR_HEIGHT)] + [BAR_HEIGHT]
    heights += [0.5 + LAYER_HEIGHT * len(heat.layers) for heat in maps]
    width = min(MAX_WIDTH, max(MIN_WIDTH, 1.5 + TOKEN_WIDTH * len(trace.tokens)))
    figure = new_figure(width, 1.6 + sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for i, line in enumerate(lines):
        _draw_projections(axes[2 * i], trace, line)
        _draw_weights(axes[2 * i + 1], line)
    _draw_effect(axes[2 * len(lines)], trace)
    for panel, heat in zip(axes[2 * len(lines) + 1 :], maps, strict=True):
        _draw_heat(panel, heat)
    _label_tokens(axes, trace)
    words = [fill(f"{finding.kind}: {finding.text}", int(width * 14)) for finding in diagnose(trace)]
    figure.suptitle("\n".join(words).replace("$", r"\$"), fontsize=9, x=0.01, ha="left")
    save_figure(figure, path)


def _draw_projections(axes: Any, trace: Trace, line: Line) -> None:
    at = np.arange(len(trace.tokens))
    axes.plot(at, line.plain, color=PLAIN, linewidth=1, linestyle=":", label="plain")
    axes.plot(at, line.before, color=BEFORE, linewidth=1, marker="o", markersize=3, label="before")
    axes.plot(at, line.after, color=AFTER, linewidth=1.2, marker="o", markersize=4, label="after")
    axes.plot(at, line.target, color="black", linestyle="none", marker="_", markersize=9, label="target")
    moved = trace.covers(line)
    axes.vlines(at[moved], line.before[moved], line.after[moved], color=AFTER, linewidth=0.8, alpha=0.5)
    for side, style in (("without", ":"), ("with", "--")):
        if line.mean(side) is not None:
            axes.axhline(line.mean(side), color="black", linewidth=0.6, linestyle=style)
    axes.axvspan(trace.n_prompt - 0.5, len(at) - 0.5, color="black", alpha=0.05, linewidth=0)
    axes.set_title(looks.title(line).replace("$", r"\$"), fontsize=9, loc="left")
    axes.set_ylabel("projection")
    axes.legend(fontsize=7, ncols=2, framealpha=0.7)


def _draw_weights(axes: Any, line: Line) -> None:
    low, high = line.scale
    axes.bar(np.arange(len(line.weight)), np.nan_to_num(line.weight), color=AFTER)
    reach = max(abs(high - low), float(np.nanmax(np.abs(line.weight))))
    axes.set_ylim(min(0.0, 1.1 * float(np.nanmin(line.weight))), 1.1 * reach)
    axes.set_ylabel("weight")


def _draw_effect(axes: Any, trace: Trace) -> None:
    """At least one nat high: what is nothing should look like nothing."""
    at, effect = np.arange(len(trace.tokens)), np.nan_to_num(trace.effect)
    axes.bar(at, effect, color=["#b22" if differs else PLAIN for differs in trace.differs])
    top = max(1.0, 1.35 * float(effect.max()))  # room for the words
    axes.set_ylim(0, top)
    axes.set_ylabel("nats")
    axes.set_title(
        "effect on what is said; red: the plain model would rather say the word there", fontsize=9, loc="left"
    )
    for i in np.flatnonzero(trace.differs):
        word = looks.visible(trace.plain_pieces[i]).replace("$", r"\$")
        axes.text(i, 0.98 * top, word, fontsize=7, rotation=90, ha="center", va="top")


def _draw_heat(axes: Any, heat: looks.Heat) -> None:
    columns = [""] * heat.values.shape[1]
    draw_heatmap(axes, heat.layers, columns, heat.values.tolist(), low=0, high=1, form="{:.1f}")
    for text in list(axes.texts):
        text.remove()  # as many numbers as tokens times layers can't be read
    rows, columns = np.nonzero(heat.marked)
    axes.scatter(columns, rows, s=5, color="#d22", marker="s", linewidths=0)
    title = heat.title if heat.is_effect else f"{heat.title} (dots: edited here)"
    axes.set_title(title.replace("$", r"\$"), fontsize=9, loc="left")
    axes.set_ylabel("layer")


def _label_tokens(axes: Any, trace: Trace) -> None:
    names = [looks.visible(piece).replace("$", r"\$") for piece in trace.pieces]
    axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7, family="monospace")
    for panel in axes:
        panel.tick_params(axis="y", labelsize=7)
        panel.yaxis.label.set_size(8)
        panel.set_xlim(-0.7, len(names) - 0.3)
