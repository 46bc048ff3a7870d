"""Where, how and how strongly to steer by one vector: the paper's grid on validation queries (section 3.1),
and what the answer is worth, with the instruction in the prompt and without it.

    tuned = tune(engine, vector, instruction, queries)
    tuned.vector.save("json.gguf")

A setting is worth nothing as soon as one reply to it is degenerate; the model alone wins ties, then the lower
block. docs/tuning.md says how the search works and what its figures mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, Query
from localsteer.errors import PlanError
from localsteer.evaluate.conditions import plain_replies, run_conditions, told_replies
from localsteer.evaluate.judge import Judged, judge, log_perplexities, perplexity
from localsteer.evaluate.pick import (
    POSITIONS,
    Advance,
    Round,
    Setting,
    Trial,
    most_asked,
    search,
    settings_of,
)
from localsteer.evaluate.verify import check_arguments
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.generate import Reply

DEFAULT_N = 8  # validation queries, as the paper has it
MAX_TOKENS = 384  # a reply cut short fails many verifiers, JSON's first of all
# `project` has a target, which strength 1 reaches; what `add` adds has to be found
STRENGTHS = {"project": (1.0,), "ablate": (1.0,), "add": (0.25, 0.5, 1.0, 1.5, 2.0)}
IMPROBABLE = "improbable"  # beside the reasons of quality.py and judge.py
# Times the perplexity of the most surprising reply that the model gives by itself, told or not. On the
# bundled model sound replies stay below 1.7, and broken ones that pass every other check lie at 1.3 to 13
# (benchmarks/improbable.py).
IMPROBABLE_RATIO = 3.0
CALL_SIZE = 64  # replies in one call of the engine: what a search that was killed has to repeat at most
ALL = 10**6  # more settings than any grid has

WORSE, SAME, BETTER = "worse", "same", "better"


@dataclass(frozen=True)
class Tuned:
    """vector: with the settings that won, and `record` as provenance["validation"]; strength 0 when `setting`
    is None, that is, when nothing did better than the model alone. trials: every setting, the best first;
    after the finished ones those that the quick search left, some of them without replies.

    scores: of `none`, `steered`, `instructed` (the instruction stands in the prompt) and `both`; None where
    it was not asked. record: JSON-able. advice: what the user should know, a sentence each.
    """

    vector: ControlVector
    setting: Setting | None
    trials: tuple[Trial, ...]
    scores: Mapping[str, float | None]
    record: Mapping[str, Any]
    advice: tuple[str, ...]

    @property
    def helps(self) -> bool:
        return self.setting is not None

    @property
    def alone(self) -> Trial:
        """The model without any steering."""
        return next(trial for trial in self.trials if trial.setting is None)


def tune(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    blocks: Iterable[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    modes: Sequence[str] | None = None,
    strengths: Sequence[float] | None = None,
    quick: bool = False,
    max_tokens: int = MAX_TOKENS,
    source: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Try every setting on every query; with `quick`, few of those that can hardly win (best_first.py).

    queries: validation ones, all of them used. blocks: 0-based; all of a shallow model, every second one from
    a fifth of the depth on in a deep one. modes: the vector's own by default. strengths: by default 1, and a
    sweep for `add`. source: what else the record should say of the model. on_progress: called with (replies,
    of how many at most).

    Raises PlanError without queries or settings, CatalogError for an instruction without a usable verifier,
    MismatchError for a vector of another model.
    """
    if not queries:
        raise PlanError(f"no validation queries to tune {instruction.id} with.")
    check_arguments(instruction.verifier, instruction.kwargs_for(queries[0].text), prompt=queries[0].text)
    engine.plan(vector)
    settings = grid(vector, blocks, positions, modes or (vector.mode,), strengths)
    rounds = None if quick else (Round(ALL, len(queries)),)
    n_runs = most_asked(1 + len(settings), len(queries), rounds)
    advance = Advance(n_runs + 2 * len(queries), on_progress)  # the model alone is one of the settings
    natural = Natural.ask(engine, instruction, queries, max_tokens)
    advance.by(natural.n_replies)
    trials = search(
        engine,
        vector,
        instruction,
        queries,
        settings,
        rounds=rounds,
        max_tokens=natural.limit,
        must_end=natural.must_end,
        plain=natural.plain,
        strict=True,
        guard=lambda trial: _guard(engine, trial, natural.most_surprising),
        order=lowest_first,
        call_size=CALL_SIZE,
        on_progress=advance.within,
    )
    advance.by(n_runs - len(natural.plain))
    best = trials[0]
    chosen = vector.at(strength=0.0) if best.setting is None else best.setting.of(vector)
    scores = {
        "none": next(trial for trial in trials if trial.setting is None).score,
        "steered": best.score,
        "instructed": _score(natural.told),
        "both": _score(_both(engine, instruction, chosen, queries, natural)) if best.setting else None,
    }
    advance.end()
    advice = _advice(instruction, trials, scores, len(queries))
    record = _record(vector, instruction, trials, scores, advice, quick, natural, source or {})
    # the verifier, too: a file that named none would be asked for it again by the next command
    origin = {"verifier": instruction.verifier, "kwargs": dict(instruction.kwargs)}
    provenance = {**chosen.provenance, **origin, "validation": record}
    tuned = replace(chosen, provenance=provenance)
    return Tuned(tuned, best.setting, tuple(trials), scores, record, advice)


def grid(
    vector: ControlVector,
    blocks: Iterable[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    modes: Sequence[str] = ("project",),
    strengths: Sequence[float] | None = None,
) -> list[Setting]:
    """Every setting to try, in order of blocks. Raises PlanError for none, and for one that can't be."""
    if blocks is not None:
        blocks = tuple(blocks)
        vector.at(layer=blocks)  # refuses a block that is out of range or has no direction
    found = [
        setting
        for mode in dict.fromkeys(modes)
        for setting in settings_of(vector, blocks, positions, strengths or STRENGTHS[mode], mode)
    ]
    for setting in found:
        if setting.strength == 0:
            raise PlanError("strength 0 steers nothing: the model alone is tried anyway.")
        setting.of(vector)
    return sorted(dict.fromkeys(found), key=lambda setting: setting.layer)


def lowest_first(trial: Trial) -> tuple[float, bool, int, float]:
    """Sort key: score, the model alone before its equals, the lower block, the likelier replies."""
    if trial.setting is None:
        return (-trial.score, False, 0, 0.0)
    unknown = math.inf if trial.perplexity is None else trial.perplexity
    return (-trial.score, True, trial.setting.layer, unknown)


# --- what the model does by itself -------------------------------------------------------------------------


@dataclass(frozen=True)
class Natural:
    """Replies of the model alone: what settings are measured against, and how long and how surprising a reply
    of this model is.

    plain: to the queries. told: with the instruction in the prompt, judged; empty where its wording is not
    known. limit: tokens of a reply from here on. must_end: whether one that reaches it is endless.
    most_surprising: log-perplexity of the most surprising of all of them, None where there is none.
    """

    plain: tuple[Reply, ...]
    told: tuple[Judged, ...]
    limit: int
    must_end: bool
    most_surprising: float | None

    @property
    def n_replies(self) -> int:
        return len(self.plain) + len(self.told)

    @classmethod
    def ask(
        cls, engine: Engine, instruction: Instruction, queries: Sequence[Query], max_tokens: int
    ) -> Natural:
        plain = plain_replies(engine, queries, max_tokens=max_tokens)
        told: Sequence[Reply] = ()
        if instruction.phrasings:
            told = told_replies(engine, [instruction], queries, max_tokens=max_tokens)[instruction.id]
        replies = (*plain, *told)
        # half as long again as the longest: a reply that goes on beyond that has lost its end
        must_end = all(reply.finish_reason == "stop" for reply in replies)
        longest = max(len(reply.tokens) for reply in replies)
        limit = min(max_tokens, longest * 3 // 2 + 16) if must_end else max_tokens
        judged = [judge(instruction, query, reply) for query, reply in _paired(queries, replies)]
        logs = [value for value in log_perplexities(engine, judged) if value is not None]
        return cls(tuple(plain), tuple(judged[len(plain) :]), limit, must_end, max(logs) if logs else None)


def _paired(queries: Sequence[Query], replies: Sequence[Reply]) -> list[tuple[Query, Reply]]:
    """Replies come query by query, once or twice."""
    return [(queries[i % len(queries)], reply) for i, reply in enumerate(replies)]


def _guard(engine: Engine, trial: Trial, most_surprising: float | None) -> None:
    """Mark replies that no model would give by itself: fluent nonsense passes every check of form.

    The other end, a perplexity near 1, is a loop, which its repetition shows better.
    """
    logs = log_perplexities(engine, trial.replies)
    trial.perplexity = perplexity(logs)
    if most_surprising is None:
        return
    limit = most_surprising + math.log(IMPROBABLE_RATIO)
    trial.replies = [
        replace(reply, degenerate=IMPROBABLE)
        if reply.degenerate is None and value is not None and value > limit
        else reply
        for reply, value in zip(trial.replies, logs, strict=True)
    ]


def _both(
    engine: Engine,
    instruction: Instruction,
    vector: ControlVector,
    queries: Sequence[Query],
    natural: Natural,
) -> Sequence[Judged]:
    """Told and steered, judged as all others."""
    if not instruction.phrasings:
        return ()
    found = run_conditions(
        engine,
        instruction,
        vector,
        queries,
        conditions=("both",),
        scored=(),
        max_tokens=natural.limit,
        must_end=natural.must_end,
    )
    trial = Trial(None, replies=list(found["both"].replies))
    _guard(engine, trial, natural.most_surprising)
    return trial.replies


def _score(replies: Sequence[Judged]) -> float | None:
    """By the same rule as a setting's; None without replies."""
    return Trial(None, strict=True, replies=list(replies)).score if replies else None


# --- what is said of it ------------------------------------------------------------------------------------


def with_instruction(scores: Mapping[str, float | None], n: int) -> str | None:
    """What steering does to prompts that hold the instruction already: WORSE or BETTER by two replies of n or
    more, else SAME; None where it was not asked."""
    told, both = scores["instructed"], scores["both"]
    if told is None or both is None:
        return None
    replies = round((both - told) * n)
    return WORSE if replies <= -2 else BETTER if replies >= 2 else SAME


def _advice(
    instruction: Instruction, trials: Sequence[Trial], scores: Mapping[str, float | None], n: int
) -> tuple[str, ...]:
    lines = []
    none, steered, told = scores["none"], scores["steered"], scores["instructed"]
    if trials[0].setting is None and none == 1:
        lines.append(
            f"these queries can't tell whether steering helps {instruction.id} on this model: the model "
            "alone follows it in every reply. Tune with --queries whose replies don't, as those that bring "
            "a word which is to be avoided."
        )
    elif trials[0].setting is None:
        lines.append(
            f"steering does not help {instruction.id} on this model: no setting did better than the model "
            f"alone ({none:.0%})."
        )
        lines += _spoilt(trials, none)
    elif round((steered - none) * n) < 2:
        lines.append(f"it helps by one reply of {n} alone, which may be chance: try again with more queries.")
    if told is not None and trials[0].setting is not None and told - steered >= 2 / n:
        lines.append(
            f"with the instruction in the prompt the model follows it more often ({told:.0%}) than when it "
            f"is steered without it ({steered:.0%})."
        )
    lines += _advice_when_told(scores, n)
    alone = next(trial for trial in trials if trial.setting is None)
    if alone.n_degenerate:
        lines.append(
            f"the model alone gives a degenerate reply to {alone.n_degenerate} of {n} queries: a setting "
            "that leaves them as they are scores 0. Try other --queries."
        )
    return tuple(lines)


def _advice_when_told(scores: Mapping[str, float | None], n: int) -> list[str]:
    told, both, verdict = scores["instructed"], scores["both"], with_instruction(scores, n)
    if verdict == WORSE:
        return [
            "do not use this file for prompts that already hold the instruction: told in words the model "
            f"scores {told:.0%}, told and steered {both:.0%}."
        ]
    if verdict == BETTER:
        return [
            f"it helps prompts that hold the instruction, too: told in words the model scores {told:.0%}, "
            f"told and steered {both:.0%}."
        ]
    return []


def _spoilt(trials: Sequence[Trial], none: float) -> list[str]:
    """Of settings that would have won, had it not been for their degenerate replies; one that the quick
    search left after a few replies tells nothing of that."""
    n = max(len(trial.replies) for trial in trials)
    asked = [trial for trial in trials if trial.setting and len(trial.replies) == n]
    found = [trial for trial in asked if trial.n_degenerate and _share(trial) > none]
    if not found:
        return []
    best = max(found, key=_share)
    bad = {reply.degenerate for reply in best.replies if reply.degenerate}
    return [
        f"{len(found)} settings did, but not without degenerate replies (the best, block "
        f"{best.setting.layer} at {best.setting.positions}: {_share(best):.0%} good, {best.n_degenerate} of "
        f"{len(best.replies)} {' or '.join(sorted(bad))})."
    ]


def _share(trial: Trial) -> float:
    """Of good replies, whatever the others are."""
    return sum(reply.good for reply in trial.replies) / max(1, len(trial.replies))


COLUMNS = ("layer", "positions", "mode", "strength", "n", "score", "followed", "degenerate", "perplexity")


def _record(
    vector: ControlVector,
    instruction: Instruction,
    trials: Sequence[Trial],
    scores: Mapping[str, float | None],
    advice: Sequence[str],
    quick: bool,
    natural: Natural,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """What the file keeps of its tuning: JSON without infinities."""
    from localsteer import __version__

    n = max(len(trial.replies) for trial in trials)
    n_replies = sum(len(trial.replies) for trial in trials) + len(natural.told)
    return {
        "search": "quick" if quick else "full",
        "instruction": instruction.id,
        "n": n,
        "replies": n_replies + (n if scores["both"] is not None else 0),
        "scores": dict(scores),
        "with_instruction": with_instruction(scores, n),
        "advice": list(advice),
        "max_tokens": natural.limit,
        "columns": list(COLUMNS),
        "table": [_row(trial) for trial in trials if trial.replies],
        "tool_version": __version__,
        **source,
    }


def _row(trial: Trial) -> list[Any]:
    row = trial.row()
    return [_rounded(row[name]) for name in COLUMNS]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
