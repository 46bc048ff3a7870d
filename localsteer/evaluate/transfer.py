"""Does a vector that comes from another model (`extract/transfer.py`) do anything in this one?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Catalog, Instruction, spread
from localsteer.evaluate.controls import applied_like, mean_state, random_control
from localsteer.evaluate.intervals import interval
from localsteer.evaluate.outcomes import Outcomes, OutcomesRecord
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.runner import run_conditions
from localsteer.extract import extract
from localsteer.extract.states import Progress
from localsteer.extract.transfer import UNMAPPED
from localsteer.tune import Tuned, tune
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine


class ConditionRow(OutcomesRecord):
    """low, high: the interval of `followed`."""

    condition: str
    low: float
    high: float


@dataclass(frozen=True)
class Examined:
    """conditions: the rows of none, transferred, own (the target's own vector), random, further controls,
    instructed. lifts: (mean, low, high) of transferred minus each of them, paired over the queries."""

    vector: ControlVector
    helped: bool
    conditions: dict[str, Outcomes]
    lifts: dict[str, tuple[float, float, float]]

    @property
    def verdict(self) -> str:
        shares = {name: rows.followed for name, rows in self.conditions.items()}
        return verdict(shares, self.lifts)

    def rows(self) -> list[ConditionRow]:
        table = []
        for name, rows in self.conditions.items():
            low, high = interval([[bool(row.strict) for row in rows]])
            table.append({"condition": name, "low": low, "high": high, **rows.record()})
        return table


def examine(
    engine: Engine,
    instruction: Instruction,
    vector: ControlVector,
    catalog: Catalog,
    *,
    controls: Callable[[np.ndarray], Mapping[str, ControlVector]] | None = None,
    n: int = 20,
    max_tokens: int = 320,
    must_end: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Examined:
    """Settings picked on validation queries of the catalogue, conditions on test queries, in the target.

    controls: further vectors (`unmapped`, `shuffled`), made with the target's mean plain state; they are
    applied as the transferred vector is. Where no setting helps, the one that helped most is shown.
    """
    validation = catalog.queries_for(instruction, "validation")
    test = catalog.queries_for(instruction, "test")
    test = spread(test, min(n, len(test)))
    options = {"max_tokens": max_tokens, "must_end": must_end}
    report = (lambda _what, done, total: on_progress(done, total)) if on_progress else None
    tuned = tune(engine, vector, instruction, validation, report=report)
    applied = _best(tuned, vector)
    own = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), mode="project")
    own_tuned = tune(engine, own, instruction, validation, report=report)
    plain_mean = mean_state(engine, validation)
    others = {name: applied_like(each, applied) for name, each in (controls or dict)(plain_mean).items()}
    steers = {"own": own_tuned.vector, "random": random_control(applied, plain_mean, seed), **others}
    names = ("none", "steered", *steers, "instructed")
    found = run_conditions(
        engine, instruction, applied, test, controls=steers, conditions=names, scored=(), **options
    )
    conditions = {"transferred" if name == "steered" else name: rows for name, rows in found.items()}
    transferred = conditions["transferred"]
    lifts = {name: _lift(transferred, rows) for name, rows in conditions.items() if name != "transferred"}
    return Examined(applied, tuned.helps, conditions, lifts)


def verdict(shares: Mapping[str, float | None], lifts: Mapping[str, tuple[float, float, float]]) -> str:
    """What the figures say: an effect counts where it is above the plain model AND above every control."""
    followed = f"{rough_percent(shares['transferred'])} of replies follow"
    figures = f"{followed}, {rough_percent(shares['none'])} without it"
    _, low, high = lifts["none"]
    if high < 0:
        return f"It does harm here: {figures}."
    if low <= 0:
        text = f"It does nothing here that could be told from chance: {figures}."
        if not shares.get("instructed") and not shares.get("own"):
            text += " Nor does this model follow the instruction in words, or with a vector of its own."
        return text
    controls = [name for name in lifts if name not in ("none", "own", "instructed")]
    for name in controls:
        if name != UNMAPPED and lifts[name][1] <= 0:
            return (
                f"It changes replies ({figures}), but not clearly more than the control `{name}` does "
                f"({rough_percent(shares[name])}): it is not this direction that counts."
            )
    if UNMAPPED in lifts and lifts[UNMAPPED][1] <= 0:
        so_does = f"so does the vector unmapped ({rough_percent(shares[UNMAPPED])})"
        return f"It carries over: {figures}, and {so_does}: no map is needed."
    highest = rough_percent(max(shares[name] for name in controls))
    text = f"It carries over: {figures}, at most {highest} with a control. "
    text += f"The model's own vector: {rough_percent(shares.get('own'))}"
    if lifts["own"][2] < 0:
        return f"{text}, clearly more: extract one from this model if you can."
    return f"{text}, clearly less." if lifts["own"][1] > 0 else f"{text}, no clear difference."


def _lift(transferred: Outcomes, other: Outcomes) -> tuple[float, float, float]:
    pairs = zip(transferred, other, strict=True)
    values = [[float(bool(a.strict)) - float(bool(b.strict)) for a, b in pairs]]
    return (float(np.mean(values)), *interval(values))


def _best(tuned: Tuned, vector: ControlVector) -> ControlVector:
    """As it was tuned; where nothing helped at the setting that came nearest, or as it is if nothing was
    tried."""
    if tuned.helps:
        return tuned.vector
    return tuned.trials[0].setting.of(vector) if tuned.trials else vector
