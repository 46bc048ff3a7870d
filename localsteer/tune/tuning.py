"""Tuning as a whole: targets from the told model, settings by likelihood, a few of them checked by
generation.

tuned = tune(engine, vector, instruction, queries)
tuned.vector.save("json.gguf")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, Query
from localsteer.errors import PlanError
from localsteer.runtime.likelihood import Likelihood
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import check_arguments

from .check import Check, Trial
from .record import Choice, TuningRecord
from .score import Score
from .search import Search, candidates, usable_layers
from .setting import Layers, Scope, Setting
from .targets import Telling, Told

if TYPE_CHECKING:
    from localsteer.engine import Engine

DEFAULT_N = 8  # queries in the check, as in the paper
WAVE = 3  # settings checked at once, each on half of the queries, and the best of them on all
N_WAVES = 2  # the second only if the first found nothing as good as telling
N_SEQ_MAX = 32  # of an engine for tuning: sequences per decode, most of them short

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tuned:
    """vector: with the settings that won, and `record` as provenance["validation"]; strength 0 if `setting`
    is None, that is, if nothing was better than the plain model.

    trials: the settings that were checked, best first. plain, told, both: the plain model, told in words, and
    told and steered; `both` has no replies if nothing won. ranking: (setting, recovered gap), best first.
    advice: what the user should know, a sentence each. stopped: Ctrl-C ended the search.
    """

    vector: ControlVector
    setting: Setting | None
    trials: tuple[Trial, ...]
    plain: Trial
    told: Trial
    both: Trial
    ranking: tuple[tuple[Setting, float], ...]
    record: TuningRecord
    stopped: bool = False

    @property
    def helps(self) -> bool:
        return self.setting is not None

    @property
    def scores(self) -> Mapping[str, float | None]:
        return self.record["scores"]

    @property
    def advice(self) -> tuple[str, ...]:
        return tuple(self.record["advice"])


@dataclass(frozen=True)
class TuneScope(Scope):
    """What a search may try. n: queries in the check. seed: for the sampled targets."""

    n: int = DEFAULT_N
    seed: int = 0


def tune(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
    **settings: Any,
) -> Tuned:
    """Find layer, positions, strength and mode for one vector on one model, in about a minute.

    queries: validation queries; `n` of them are for the check, the others for the targets. settings: of
    TuneScope; without `strengths`, a line search goes up to 3. source: what else the record should say about
    the model. report: called with (what is being done, done, total).

    Ctrl-C keeps the best so far, if there is one. Raises PlanError without queries or layers, PromptError for
    an instruction without wording, CatalogError for an unusable verifier, MismatchError for a vector of
    another model.
    """
    if not queries:
        raise PlanError(f"no validation queries to tune {instruction.id} with.")
    scope = TuneScope(**settings)
    if instruction.verifier is not None:
        check_arguments(instruction.verifier, instruction.kwargs_for(queries[0].text), prompt=queries[0].text)
    engine.plan(vector)
    return _Tuning(
        engine,
        vector,
        instruction,
        *split(queries, scope.n),
        scope=scope,
        layers=usable_layers(vector, scope.layers),
        report=report or (lambda _what, _done, _total: None),
    ).run(source or {})


def split(queries: Sequence[Query], n: int) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """Returns (queries for targets, at most n queries for the check), which are disjoint if there are at
    least two; those of the check are evenly spaced, so that a few still cover every kind."""
    n = min(n, max(1, len(queries) // 2))
    checked = {i * len(queries) // n for i in range(n)}
    rest = tuple(query for i, query in enumerate(queries) if i not in checked)
    return rest or tuple(queries), tuple(queries[i] for i in sorted(checked))


@dataclass
class _Tuning:
    """The steps of one search, and their results so far."""

    engine: Engine
    vector: ControlVector
    instruction: Instruction
    asked: Sequence[Query]
    checked: Sequence[Query]
    scope: TuneScope
    layers: Sequence[Layers]
    report: Report
    _search: Search | None = None
    _check: Check | None = None
    _told: Told = field(default_factory=lambda: Told((), 0, 0, 0, 0))

    def run(self, source: Mapping[str, Any]) -> Tuned:
        started = time.perf_counter()
        likelihood = Likelihood(self.engine)
        stopped = False
        try:
            self._tell(likelihood)
            if self._told.targets:
                self._compare(likelihood)
        except KeyboardInterrupt:
            if self._best() is None:
                raise
            stopped = True
        return self._tuned(source, time.perf_counter() - started, likelihood.n_tokens, stopped)

    def _tell(self, likelihood: Likelihood) -> None:
        what = f"asking for {self.instruction.id} in words"
        telling = Telling(
            self.engine,
            self.instruction,
            self.asked,
            max_tokens=self.scope.max_tokens,
            seed=self.scope.seed,
            on_reply=lambda done, n_passed: self.report(f"{what}: {n_passed} replies follow", done, 0),
        )
        self._told = telling.collect(likelihood)

    def _compare(self, likelihood: Likelihood) -> None:
        score = Score(likelihood, self.vector, self._told.targets)
        self._search = Search(
            score,
            self.layers,
            self.scope.positions,
            self.scope.strengths,
            self.scope.modes_of(self.vector),
            on_best=lambda setting, gap: self.report(
                f"scoring settings, best so far {setting} ({gap:.0%} of what telling does)",
                len(score.settings),
                0,
            ),
        )
        ranking = self._search.run()
        self._check = Check(
            self.engine,
            self.vector,
            self.instruction,
            self.checked,
            max_tokens=self._told.max_tokens,
            on_reply=lambda done: self.report(f"checking{self._shown_best()}", done, 0),
        )
        self._check.ask_model()
        half = (len(self.checked) + 1) // 2
        chosen = candidates(ranking, WAVE * N_WAVES)
        for start in range(0, len(chosen), WAVE):
            self._check.ask(chosen[start : start + WAVE], half)
            self._finish()
            if self._is_as_good_as_told(self._ordered()[0]):
                break
        best = self._best()
        if best is not None:
            self._check.ask_both(best.setting)

    def _finish(self) -> None:
        """Ask all queries under the best setting, until no other can be better."""
        while True:
            best = self._ordered()[0]
            if best.n == len(self.checked):
                return
            self._check.ask([best.setting])

    def _is_as_good_as_told(self, best: Trial) -> bool:
        return best.score >= max(self._check.told.score, 0.5) and best.score > self._check.plain.score

    def _ordered(self) -> list[Trial]:
        """The checked settings, those on all queries first, then the best first."""
        if self._check is None or self._search is None:
            return []
        trials = list(self._check.trials.values())
        for trial in trials:
            trial.gap = self._search.score.gap(trial.setting)
        return sorted(trials, key=lambda trial: self._order(trial), reverse=True)

    def _order(self, trial: Trial) -> tuple[float, ...]:
        # without a verifier the likelihood decides, and the replies only show what is broken
        if self.instruction.verifier is None:
            return (trial.score >= 0.5 * self._check.told.score, trial.gap, trial.score)
        return (trial.score, -trial.n_degenerate, trial.gap, trial.n)

    def _best(self) -> Trial | None:
        """The trial that wins, or None if the plain model does."""
        if self._search is None or not self._search.score.settings:
            return None
        trials = self._ordered()
        # a search that was stopped has no setting that was asked everything
        complete = [trial for trial in trials if trial.n == len(self.checked)] or [
            trial for trial in trials if trial.n
        ]
        if not complete:
            # nothing was checked: use the likeliest
            setting = self._search.ranking()[0]
            return Trial(setting, gap=self._search.score.gap(setting))
        best = complete[0]
        if self.instruction.verifier is None:
            return best if best.gap > 0 and best.score >= 0.5 * self._check.plain.score else None
        return best if best.score > self._check.plain.score else None

    def _shown_best(self) -> str:
        best = next(iter(self._ordered()), None)
        if best is None or not best.n:
            return ""
        return f", best so far {best.setting} ({best.n_good} of {best.n} good)"

    def _tuned(self, source: Mapping[str, Any], seconds: float, n_scored: int, stopped: bool) -> Tuned:
        nobody = Trial(None)
        check = self._check
        plain, told, both = (check.plain, check.told, check.both) if check else (nobody, nobody, nobody)
        ranking = self._search.ranking() if self._search else []
        best = self._best()
        trials = tuple(self._ordered())
        chosen = self.vector.at(strength=0.0) if best is None else best.setting.of(self.vector)
        choice = Choice(
            self.instruction, best, trials, plain, told, both, self._told, seconds=seconds, stopped=stopped
        )
        kept = choice.record() | dict(source)
        vector = replace(chosen, provenance={**chosen.provenance, **choice.origin, "validation": kept})
        scored = tuple((setting, self._search.score.gap(setting)) for setting in ranking)
        return Tuned(vector, best and best.setting, trials, plain, told, both, scored, kept, stopped)
