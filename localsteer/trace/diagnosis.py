"""What a trace means, in a sentence or two: what the numbers show, and what to try next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localsteer.plan import PositionClass

if TYPE_CHECKING:
    from localsteer.trace import Line, Trace


NO_EFFECT = (
    0.25  # nats, at every token: below it a greedy reply changes where two words were near a tie anyway
)
AUDIBLE = 1.0  # nats: an effect that makes another layer worth a try
CLOSE = 0.1  # of the distance between the means: a projection that is moved by less was there already
SEPARATE = 1.0  # standard deviations that the means should be apart
LOOP_TOKENS, LOOP_SHARE, NGRAM = 16, 0.5, 4  # a reply this long, this much of whose runs of four stood before
MIN_TOKENS = 8  # a shorter reply was cut before anything can be said
EFFECT_SHARE = 0.9  # of the effect on the reply that "most of it" means


@dataclass(frozen=True)
class Finding:
    """kind: idle, no-reply, no-effect, at-target, weak, overlap, locked, broken or acts. text: one line."""

    kind: str
    text: str


def diagnose(trace: Trace) -> list[Finding]:
    """The findings, the most serious first."""
    steered = [line for line in trace.lines if trace.covers(line).any()]
    if not steered:
        return [Finding("idle", _why_idle(trace))]
    findings = [finding for line in steered if (finding := _of_line(trace, line))]
    effect = trace.effect[trace.n_prompt :]
    if not len(effect):
        text = "there is no reply, so nothing shows what steering does to it: allow more tokens (-n)."
        return [*findings, Finding("no-reply", text)]
    if effect.max() < NO_EFFECT:
        return [Finding("no-effect", _no_effect(trace, steered)), *findings]
    loop = _loop(trace)
    return [*([loop] if loop else []), *findings, Finding("acts", _acts(trace))]


def repeated(tokens: tuple[int, ...]) -> float:
    """The share of the runs of four tokens that stood before; finds loops inside one word too."""
    grams = [tokens[start : start + NGRAM] for start in range(len(tokens) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _why_idle(trace: Trace) -> str:
    if all(vector.strength == 0 for vector in trace.vectors):
        return "no token is steered: the strength is 0."
    return f"no token is steered: there is none at positions {trace.vectors[0].positions}."


def _of_line(trace: Trace, line: Line) -> Finding | None:
    """What is unusual about one vector at one layer, whatever its effect."""
    where = f"{line.vector.label} at layer {line.layer}"
    low, high = line.scale
    here = trace.covers(line)
    if np.abs(line.after - line.before)[here].max() < CLOSE * abs(high - low):
        return _barely_moved(line, here, where)
    apart = separation(line)
    if apart is not None and apart < SEPARATE:
        return Finding(
            "overlap",
            f"{where} hardly distinguishes the instruction: with and without it, the projections are only "
            f"{apart:.1f} standard deviations apart. Choose another layer.",
        )
    return None


def _barely_moved(line: Line, here: np.ndarray, where: str) -> Finding:
    low, high = line.scale
    goal = {"project": line.mean("with"), "ablate": 0.0}.get(line.vector.mode)
    if goal is not None and np.abs(goal - line.before)[here].max() < CLOSE * abs(high - low):
        return Finding(
            "at-target", f"{where} has little to do: the projections are at the target without it."
        )
    moved = float(np.abs(line.after - line.before)[here].max())
    return Finding(
        "weak",
        f"{where} moves the projection by at most {moved:.3g}, with {abs(high - low):.3g} between the means: "
        "raise the strength" + (", or the cap." if line.vector.cap is not None else "."),
    )


def separation(line: Line) -> float | None:
    """The distance between the means with and without the instruction, in standard deviations."""
    vector = line.vector
    columns = (vector.mean_with, vector.mean_without, vector.std_with, vector.std_without)
    if any(column is None for column in columns):
        return None
    high, low, *spreads = (float(column[line.layer]) for column in columns)
    spread = float(np.sqrt(np.mean(np.square(spreads))))
    return abs(high - low) / spread if spread else None


def _no_effect(trace: Trace, steered: list[Line]) -> str:
    moved = max(float(np.abs(line.after - line.before)[trace.covers(line)].max()) for line in steered)
    layers = ", ".join(str(layer) for layer in sorted({line.layer for line in steered}))
    effect = trace.effect[trace.n_prompt :]
    n_same = len(effect) - int(trace.differs.sum())
    return (
        f"steering does nothing: it moves the projection by up to {moved:.3g} at layer {layers}, but what "
        f"the model says by at most {effect.max():.2g} nats ({n_same} of {len(effect)} tokens are those of "
        f"the plain model). {_where_better(trace)}"
    )


def _where_better(trace: Trace) -> str:
    """The layer of the largest effect, where others were tried."""
    best = [
        (float(row[trace.n_prompt :].max()), line.layer, line.vector.label)
        for line, row in zip(trace.lines, trace.effect_here, strict=True)
        if np.isfinite(row[trace.n_prompt :]).all()
    ]
    if not best:
        return "Try another layer, an earlier one first."
    if max(best)[0] < AUDIBLE:
        return "Nor would it do much at another layer shown: try other positions, or a larger strength."
    effect, layer, label = max(best)
    return f"At layer {layer} {label} would move it by up to {effect:.3g} nats: try --layer {layer}."


def _loop(trace: Trace) -> Finding | None:
    """A finding if the reply loops, which says whether steering of its tokens causes it."""
    from localsteer.verify.quality import EMPTY, is_degenerate

    tokens = trace.tokens[trace.n_prompt :]
    if trace.finish_reason == "given":
        return None  # not what steering made of it
    why = is_degenerate(trace.reply)
    if why == EMPTY:
        return Finding("broken", "the reply is empty: lower the strength, or choose another layer.")
    loops = why is not None and len(tokens) >= MIN_TOKENS
    if not loops and (len(tokens) < LOOP_TOKENS or repeated(tokens) < LOOP_SHARE):
        return None
    for line in trace.lines:
        held = trace.covers(line) & (trace.classes == PositionClass.GENERATION)
        if held.sum() > 1:
            return Finding("locked", _locked(line, held))
    return Finding("broken", "the reply loops: lower the strength, or choose another layer.")


def _locked(line: Line, held: np.ndarray) -> str:
    what = f"the reply is locked: it loops while {line.vector.label} at layer {line.layer} "
    if line.vector.mode == "add":
        return f"{what}pushes each of its tokens by {line.weight[held][0]:.3g}. Try --positions prompt."
    kept, free = line.after[held], line.before[held]
    return (
        f"{what}holds each of its tokens at {kept.mean():.3g} ± {kept.std():.1f} (unsteered they would be "
        f"at {free.mean():.3g} ± {free.std():.1f}). Try --positions prompt."
    )


def _acts(trace: Trace) -> str:
    effect = trace.effect[trace.n_prompt :]
    n_most = int(np.searchsorted(np.cumsum(effect), EFFECT_SHARE * effect.sum())) + 1
    largest = trace.n_prompt + int(effect.argmax())
    return (
        f"steering changes what is said: at {int(trace.differs.sum())} of {len(effect)} tokens the plain "
        f"model would say something else. Largest effect: {effect.max():.3g} nats at "
        f"{trace.pieces[largest]!r}; {EFFECT_SHARE:.0%} of it all by token {n_most} of the reply."
    )
