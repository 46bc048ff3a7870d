"""Generates replies under every setting to every query: slow, and the reference for measuring the search.

It needs no wording of the instruction, so it also works for a vector without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError, PlanError
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import check_arguments

from .check import Check, Trial
from .record import Choice
from .replies import Asked
from .search import usable_layers
from .setting import POSITIONS, Scope, Setting
from .targets import Told
from .tuning import Report, Tuned

if TYPE_CHECKING:
    from localsteer.engine import Engine

STRENGTHS = (1.0, 2.0, 3.0)
CALL_SIZE = 64  # replies in one call of the engine: at most this many are repeated after a kill


def tune_exhaustively(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
    **settings: Any,
) -> Tuned:
    """Like `tune`, with a reply under every setting to every query; all queries are used. settings: of Scope.

    If `engine` keeps its replies (journal.Remembered), a search that was killed can continue. Raises
    PlanError without queries or settings, CatalogError without a usable verifier, MismatchError.
    """
    if not queries:
        raise PlanError(f"no validation queries to tune {instruction.id} with.")
    if instruction.verifier is None:
        raise CatalogError(f"{instruction.id} has no verifier, so only the search by likelihood can tune it.")
    check_arguments(instruction.verifier, instruction.kwargs_for(queries[0].text), prompt=queries[0].text)
    engine.plan(vector)
    scope = Scope(**settings)
    tried = grid(vector, scope.layers, scope.positions, scope.modes_of(vector), scope.strengths)
    total = (len(tried) + 2 + bool(instruction.phrasings)) * len(queries)

    def on_reply(done: int) -> None:
        if report:
            report(f"tuning {instruction.id} by generation", min(done, total), total)

    check = Check(
        engine,
        vector,
        instruction,
        queries,
        max_tokens=scope.max_tokens,
        generate=lambda asked, on_done: _generate(engine, asked, scope.max_tokens, on_done),
        on_reply=on_reply,
    )
    check.ask_model()
    trials = sorted(check.ask(tried), key=_order)
    best = trials[0] if trials[0].score > check.plain.score else None
    if best is not None and instruction.phrasings:
        check.ask_both(best.setting)
    on_reply(total)
    chosen = vector.at(strength=0.0) if best is None else best.setting.of(vector)
    n_followed = sum(bool(reply.followed) for reply in check.told.replies)
    told_model = Told((), check.told.n, n_followed, check.told.n, scope.max_tokens)
    choice = Choice(instruction, best, trials, check.plain, check.told, check.both, told_model)
    kept = choice.record() | {"search": "exhaustive", "replies": check.n_replies, **(source or {})}
    vector = replace(chosen, provenance={**chosen.provenance, **choice.origin, "validation": kept})
    return Tuned(vector, best and best.setting, tuple(trials), check.plain, check.told, check.both, (), kept)


def grid(
    vector: ControlVector,
    layers: Iterable[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    modes: Sequence[str] = ("project",),
    strengths: Sequence[float] | None = None,
) -> list[Setting]:
    """Every setting to try, in order of layers. Raises PlanError for none, and for an impossible one."""
    if strengths is not None and not all(strengths):
        raise PlanError("strength 0 steers nothing: the plain model is tried anyway.")
    usable = usable_layers(vector, layers)
    settings = [
        Setting(layer, where, strength, mode)
        for layer, where, strength, mode in product(usable, positions, strengths or STRENGTHS, modes)
    ]
    for setting in settings:
        setting.of(vector)
    return list(dict.fromkeys(settings))


def _generate(engine: Engine, asked: Sequence[Asked], max_tokens: int, on_done) -> list[Reply]:
    """Generate whole replies, in calls whose results a journal can keep."""
    replies: list[Reply] = []
    for start in range(0, len(asked), CALL_SIZE):
        part = asked[start : start + CALL_SIZE]
        before = len(replies)
        replies += engine.generate_batch(
            [question.prompt for question in part],
            steer=[question.plan for question in part],
            max_tokens=max_tokens,
            sampling=GREEDY,
            on_progress=lambda done, _of, before=before: on_done(before + done),
        )
    return replies


def _order(trial: Trial) -> tuple[float, ...]:
    """Sort key: score, then fewer degenerate replies, then the lower layer."""
    return (-trial.score, trial.n_degenerate, trial.setting.layer)
