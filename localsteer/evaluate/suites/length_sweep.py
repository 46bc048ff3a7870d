"""Mean words of replies against the weight of a direction of length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.intervals import interval
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Lines, Section, Share, Table, Value
from localsteer.evaluate.suites.length_setting import SIGNS
from localsteer.evaluate.texts import said, section
from localsteer.vector import ControlVector

STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # of `add`: 1 is the whole difference that the instruction makes
STEERED, CONTROLS = "strength", ("random", "other")  # of a condition's name, before the strength
MIN_MONOTONE = 3  # strengths in a row that make a trend
COLUMNS = [
    "direction", "strength", "c", "words", "95% of words", "degenerate", "subject kept", "perplexity ratio",
    "words, random", "words, other",
]  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One direction at its chosen layer and positions, and the rows at each strength, 0 first. controls:
    the same for `random` and `other`, where there is one."""

    name: str
    vector: ControlVector
    steered: Mapping[float, Outcomes]
    controls: Mapping[str, Mapping[float, Outcomes]]

    @property
    def words(self) -> list[float]:
        return [rows.words for rows in self.steered.values()]

    @property
    def n_monotone(self) -> int:
        """How many strengths, from the lowest on, take mean words strictly further the direction's way."""
        steps = (SIGNS[self.name] * (b - a) > 0 for a, b in pairwise(self.words[1:]))
        return 1 + len(list(takewhile(bool, steps)))

    @property
    def verdict(self) -> str:
        """The answer in a sentence. Steps are those between strengths: the weakest may do nothing yet."""
        steered, n = self.words[1:], self.n_monotone
        first, last = (f"{STRENGTHS[k]:g} ({steered[k]:.1f})" for k in (0, n - 1))
        way = "fall" if SIGNS[self.name] < 0 else "rise"
        how = "length.monotone" if n >= MIN_MONOTONE else "length.not_monotone"
        return said(
            "length.verdict",
            direction=self.name.capitalize(),
            how=said(how, way=way, first=first, last=last),
            plain=self.words[0],
            steered=steered[-1],
            strength=STRENGTHS[-1],
            layer=self.vector.layers[0],
            positions=self.vector.positions,
            degenerate=max(rows.degenerate for rows in self.steered.values()),
        )

    def row(self, strength: float) -> list[Value]:
        """By COLUMNS."""
        rows = self.steered[strength]
        quality = rows.figures(self.steered[0.0]).quality
        norm = float(np.linalg.norm(self.vector.directions[self.vector.layers[0]].astype(np.float64)))
        low, high = interval([[row.n_words for row in rows]])
        controls = map(self.controls.get, CONTROLS)
        return [
            self.name, strength, strength * norm, quality["words"], f"{low:.1f} to {high:.1f}",
            Share(quality["degenerate"]), Share(quality["subject_kept"]), quality["perplexity_ratio"],
            *(control[strength].words if control else None for control in controls),
        ]  # fmt: skip


def label(kind: str, strength: float) -> str:
    """A condition's name."""
    return f"{kind} {strength:g}"


def sweep_of(name: str, vector: ControlVector, rows: Outcomes) -> Sweep:
    parts = rows.of(None, name).by("condition")
    steered, *controls = (
        {0.0: parts["none"]} | {strength: parts[label(kind, strength)] for strength in STRENGTHS}
        for kind in (STEERED, *CONTROLS)
        if label(kind, STRENGTHS[0]) in parts
    )
    return Sweep(name, vector, steered, dict(zip(CONTROLS, controls, strict=False)))


def swept(sweeps: Sequence[Sweep], others: Mapping[str, Sequence[Instruction]]) -> Section:
    """others: whose vector the control `other` is, by direction."""
    series = {sweep.name: sweep.words for sweep in sweeps}
    for sweep in sweeps:
        for kind, control in sweep.controls.items():
            series[f"{kind} for {sweep.name}"] = [rows.words for rows in control.values()]
    plot = Lines(
        "Mean words against strength", "strength (c / |v|)", "words", x=[0.0, *STRENGTHS], series=series
    )
    table = Table(COLUMNS, [sweep.row(strength) for sweep in sweeps for strength in sweep.steered])
    named = [
        f"For {name} that is {' and '.join(other.id for other in drawn)}."
        for name, drawn in others.items()
        if drawn
    ]
    verdicts = " ".join(sweep.verdict for sweep in sweeps)
    return section("length.swept", table, plot, verdicts=verdicts, more=" ".join(named))
