"""A trace as a page: one file, no script, no network. A token's figures show when the mouse rests on it."""

from __future__ import annotations

import os
from typing import TypedDict

import numpy as np

from localsteer.cache import atomic_path, require_folder

from . import Line, Trace, looks
from .diagnosis import diagnose

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>localsteer trace: {{ model }}</title>
<style>
:root { color-scheme: light dark; --line: #8886; --dim: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 96rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
.finding { border-left: .3rem solid #888; padding: .3rem .8rem; margin: .4rem 0; background: #8881; }
.finding.locked, .finding.no-effect, .finding.broken { border-color: #c33; background: #c331; }
.finding.acts { border-color: #2a7; }
.reply { white-space: pre-wrap; border: 1px solid var(--line); padding: .5rem .8rem; }
.strip { display: flex; flex-wrap: wrap; row-gap: .9rem; font-variant-numeric: tabular-nums; }
.token { display: grid; grid-auto-rows: 1.35rem; text-align: center; font-size: .78rem; min-width: 2.3rem; }
.token > * { padding: 0 .25rem; line-height: 1.35rem; overflow: hidden; white-space: pre; }
.token > .piece { font: bold .85rem/1.35rem ui-monospace, monospace; }
.token.first { border-left: 3px solid #c33; margin-left: .3rem; padding-left: .3rem; }
.names > * { text-align: right; color: var(--dim); }
.instead { color: var(--dim); font-family: ui-monospace, monospace; }
.bar { align-self: end; height: 1.35rem; position: relative; }
.bar > i { position: absolute; bottom: 0; left: 12%; right: 12%; background: #d1602a88; }
.bar.effect > i { background: #b22b; } .bar > b { position: relative; font-weight: normal; }
table { border-collapse: collapse; font-size: .7rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
td { min-width: 1.9rem; text-align: center; padding: .15rem .1rem; } td.on { outline: 2px solid #c33;
  outline-offset: -2px; }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); font: .72rem ui-monospace, monospace;
  text-align: left; padding: .2rem; } tbody th { padding-right: .5rem; white-space: nowrap; }
.legend span { padding: .1rem .5rem; } .dim { color: var(--dim); }
</style>
</head>
<body>
<h1>What steering does, token by token</h1>
<p class="dim">{{ model }}; {{ n_prompt }} tokens of prompt, {{ n_reply }} of reply
({{ {"stop": "ended by the model", "length": "cut", "given": "a given text"}[reason] }})</p>
{% for finding in findings %}<p class="finding {{ finding.kind }}"><b>{{ finding.kind }}</b>:
{{ finding.text }}</p>{% endfor %}
<p class="reply">{{ reply }}</p>
<p class="legend">Projections:
{% for style, word in legend %}<span style="{{ style }}">{{ word }}</span>{% endfor %}.
The red line is where the reply begins. Weight: how much of the unit direction is added. Effect: nats between
what the steered and the plain model say there. Instead: what the plain model would rather say.</p>
{% for strip in strips %}
<h2>{{ strip.title }}</h2>
<div class="strip">
<div class="token names">{% for name in strip.names %}<div>{{ name }}</div>{% endfor %}</div>
{% for token in strip.tokens %}<div class="token{{ " first" if token.first }}" title="{{ token.title }}">
{%- for cell in token.cells %}<div{{ ' class="piece"'|safe if loop.first }} style="{{ cell.style }}">
{{- cell.text }}</div>{% endfor %}
{%- for bar in token.bars %}<div class="bar {{ bar.kind }}">
{%- if bar.height %}<i style="height:{{ bar.height }}%"></i>{% endif %}<b>{{ bar.text }}</b></div>
{%- endfor %}
<div class="instead">{{ token.instead }}</div></div>
{% endfor %}</div>
{% endfor %}
{% for heat in heats %}
<h2>{{ heat.title }}</h2>
<div class="scroll"><table>
<thead><tr><td></td>{% for name in heat.names %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in heat.rows %}<tr><th>layer {{ row.layer }}</th>{% for cell in row.cells -%}
<td{{ ' class="on"'|safe if cell.on }} style="{{ cell.style }}">{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
</body>
</html>
"""


def write_page(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace as an HTML page. Raises LocalsteerError for a file that can't be written."""
    require_folder(path)
    with atomic_path(path) as temporary:
        temporary.write_text(render(trace), encoding="utf-8")


def render(trace: Trace) -> str:
    """The HTML of the page, with the model's text escaped."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return page.render(
        model=trace.model,
        n_prompt=trace.n_prompt,
        n_reply=len(trace.tokens) - trace.n_prompt,
        reason=trace.finish_reason,
        findings=diagnose(trace),
        reply=trace.reply,
        legend=[(_style(0.0), "as without the instruction"), (_style(1.0), "as with it")],
        strips=[_strip(trace, line) for vector in trace.vectors for line in looks.strips(trace, vector)],
        heats=[_heat(trace, heat) for vector in trace.vectors for heat in looks.heats(trace, vector)],
    )


class _StripBar(TypedDict):
    kind: str
    text: str
    height: int


class _StripCell(TypedDict):
    text: str
    style: str


class _StripToken(TypedDict):
    """first: of the reply. instead: what the plain model would rather have said."""

    first: bool
    title: str
    cells: list[_StripCell]
    bars: list[_StripBar]
    instead: str


class _Strip(TypedDict):
    title: str
    names: list[str]
    tokens: list[_StripToken]


class _HeatCell(_StripCell):
    on: bool


class _HeatRow(TypedDict):
    layer: int
    cells: list[_HeatCell]


class _HeatTable(TypedDict):
    title: str
    names: list[str]
    rows: list[_HeatRow]


def _strip(trace: Trace, line: Line) -> _Strip:
    names = ["", "plain", "before", "after", "target", "weight", "effect", "instead"]
    tokens = [_token(trace, line, i) for i in range(len(trace.tokens))]
    return {"title": looks.title(line), "names": names, "tokens": tokens}


def _token(trace: Trace, line: Line, i: int) -> _StripToken:
    figures = {name: getattr(line, name)[i] for name in ("plain", "before", "after", "target")}
    cells = [{"text": looks.visible(trace.pieces[i]), "style": _style(line.share(line.after[i]))}]
    cells += [{"text": looks.number(value), "style": _style(line.share(value))} for value in figures.values()]
    is_steered = trace.covers(line)[i]
    weight = line.weight[i] if is_steered else np.nan
    bars = [
        _bar("weight", weight, looks.weight_share(line)[i]),
        _bar("effect", trace.effect[i], looks.effect_share(trace.effect[i])),
    ]
    figures |= {"weight": weight, "effect": trace.effect[i]}
    known = [f"{name} {value:.4g}" for name, value in figures.items() if np.isfinite(value)]
    return {
        "first": i == trace.n_prompt,
        "title": f"token {i}, id {trace.tokens[i]}: {trace.pieces[i]!r}; " + ", ".join(known),
        "cells": cells,
        "bars": bars,
        "instead": looks.visible(trace.plain_pieces[i]) if trace.differs[i] else "·",
    }


def _bar(kind: str, value: float, share: float) -> _StripBar:
    height = round(100 * min(1.0, max(0.0, float(share)))) if np.isfinite(value) else 0
    return {"kind": kind, "text": looks.number(value), "height": height}


def _heat(trace: Trace, heat: looks.Heat) -> _HeatTable:
    n_read = int(np.isfinite(trace.lines[0].after).sum())
    columns = range(trace.n_prompt, len(trace.tokens)) if heat.is_effect else range(n_read)
    rows = [
        {
            "layer": layer,
            "cells": [
                {
                    "text": f"{round(float(values[j]), 1) + 0.0:.1f}" if np.isfinite(values[j]) else "·",
                    "style": _style(values[j]),
                    "on": bool(marked[j]),
                }
                for j in columns
            ],
        }
        for layer, values, marked in zip(heat.layers, heat.values, heat.marked, strict=True)
    ]
    return {"title": heat.title, "names": [looks.visible(trace.pieces[j]) for j in columns], "rows": rows}


def _style(share: float) -> str:
    if not np.isfinite(share):
        return ""
    return f"background:rgb{looks.rgb(share)};color:{looks.ink(share)}"
