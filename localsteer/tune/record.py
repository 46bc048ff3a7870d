"""What a vector's file records about the choice of its settings, and what its user should know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from localsteer.catalog import Instruction

from .check import Trial, TrialRow
from .targets import Told

WORSE, SAME, BETTER = "worse", "same", "better"
N_KEPT = 8  # rows of settings in the file


Shares = dict[str, float | None]  # for none, steered, instructed, both


class Origin(TypedDict, total=False):
    verifier: str
    kwargs: dict[str, Any]


class TargetCounts(TypedDict):
    """What the told model said: n, of `asked`, became targets; of the `first`, so many followed."""

    n: int
    asked: int
    first: int
    first_followed: int


class _OfASearch(TypedDict, total=False):
    """replies: of an exhaustive search. examples to seed: of a learned vector. model: it was tuned on."""

    model: str
    replies: int
    examples: dict[str, int | str]
    steps: int
    loss: float
    layers_raced: list[list[int]]
    seed: int


class TuningRecord(_OfASearch):
    """`validation` of a vector's provenance. degenerate, scores: shares of replies."""

    search: str
    instruction: str
    n: int
    scores: Shares
    degenerate: Shares
    judged_by: str
    recovered_gap: float | None
    with_instruction: str | None
    targets: TargetCounts
    max_tokens: int
    seconds: float | None
    stopped: bool
    advice: list[str]
    table: list[TrialRow]
    tool_version: str


@dataclass(frozen=True)
class Choice:
    """The result of choosing a setting.

    best: the setting that won, None if the plain model did. trials: what was checked, best first. plain,
    told, both: the plain model, told in words, told and steered. told_model: where the targets came from.
    seconds: None for a search that was resumed, so that it leaves the same file as an uninterrupted one.
    stopped: Ctrl-C ended it.
    """

    instruction: Instruction
    best: Trial | None
    trials: Sequence[Trial]
    plain: Trial
    told: Trial
    both: Trial
    told_model: Told
    seconds: float | None = None
    stopped: bool = False

    @property
    def scores(self) -> Shares:
        """Shares of good replies; None for what was not asked."""
        return {
            "none": _score(self.plain),
            "steered": _score(self.plain if self.best is None else self.best),
            "instructed": _score(self.told),
            "both": _score(self.both),
        }

    @property
    def degenerate(self) -> Shares:
        """Shares of degenerate replies, under the same names."""
        return {
            "none": _spoilt_share(self.plain),
            "steered": _spoilt_share(self.plain if self.best is None else self.best),
            "instructed": _spoilt_share(self.told),
            "both": _spoilt_share(self.both),
        }

    @property
    def n(self) -> int:
        """The number of questions in the check."""
        return self.plain.n

    @property
    def origin(self) -> Origin:
        """Fields for the vector's provenance; without a verifier in the file, the next tuning would ask for
        it again."""
        if self.instruction.verifier is None:
            return {}
        return {"verifier": self.instruction.verifier, "kwargs": dict(self.instruction.kwargs)}

    def record(self) -> TuningRecord:
        """The record as JSON without infinities."""
        from localsteer import __version__

        told, scores = self.told_model, self.scores
        return {
            "search": "likelihood",
            "instruction": self.instruction.id,
            "n": self.n,
            "scores": scores,
            "degenerate": self.degenerate,
            "judged_by": "verifier" if self.instruction.verifier else "likelihood",
            "recovered_gap": None if self.best is None else _rounded(self.best.gap),
            "with_instruction": with_instruction(scores, self.n),
            "targets": {
                "n": len(told.targets),
                "asked": told.n_asked,
                "first": told.n,
                "first_followed": told.n_passed,
            },
            "max_tokens": told.max_tokens,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "stopped": self.stopped,
            "advice": self.advice(),
            "table": [_row(trial) for trial in self.trials[:N_KEPT]],
            "tool_version": __version__,
        }

    def advice(self) -> list[str]:
        """What the user should know, a sentence each."""
        stopped = ["the search was stopped: this is the best it had found."] if self.stopped else []
        finding = self._on_nothing() if self.best is None else self._on_best(self.best)
        return [*stopped, *finding, *self._on_telling()]

    def _on_nothing(self) -> list[str]:
        """Sentences on why nothing is applied."""
        name, none, told = self.instruction.id, self.scores["none"], self.scores["instructed"]
        if not self.told_model.targets and not self.trials:
            return [
                f"the model follows {name} in none of {self.told_model.n_asked} replies when told to, "
                "so there is nothing to find: nothing is applied. Try a larger model, or a wording that "
                "it follows."
            ]
        if self.instruction.verifier is None and self.trials and self.trials[0].n_degenerate:
            first = self.trials[0]
            reasons = {reply.degenerate for reply in first.replies if reply.degenerate}
            return [
                f"{first.n_degenerate} of {first.n} replies are {' or '.join(sorted(reasons))}: nothing is "
                "applied."
            ]
        if none == 1:
            return [
                f"these queries can't tell whether steering helps {name} on this model: the plain model "
                "follows it in every reply. Tune with --queries to which it doesn't."
            ]
        words = "" if told is None else f"; told {told:.0%}"
        return [
            f"no setting made the model follow {name} more often than it does without steering "
            f"({none:.0%}{words}): nothing is applied.",
            *_spoilt(self.trials, none),
        ]

    def _on_best(self, best: Trial) -> list[str]:
        """Sentences on how far to trust the result."""
        name, none, steered = self.instruction.id, self.scores["none"], self.scores["steered"]
        if not best.replies:
            return ["no reply has been checked yet: tune again for figures."]
        if self.instruction.verifier is not None:
            if round((steered - none) * self.n) >= 2:
                return []
            return [
                f"it helps by only one reply of {self.n}, which may be chance: try again with more queries."
            ]
        if best.gap is None:
            return [
                f"{name} has no verifier: nothing can judge whether replies follow it, and "
                f"{steered:.0%} of them "
                "are unbroken."
            ]
        return [
            f"{name} has no verifier: this setting makes replies of the told model likely (it recovers "
            f"{best.gap:.0%} of what telling does) and leaves {steered:.0%} of its own replies unbroken."
        ]

    def _on_telling(self) -> list[str]:
        """Sentences on the instruction in words, instead of steering and beside it."""
        told, both, steered = (self.scores[name] for name in ("instructed", "both", "steered"))
        lines = []
        is_known = self.best is not None and bool(self.best.replies) and told is not None
        if is_known and told - steered >= 2 / max(1, self.n):
            lines.append(
                f"told in words, the model follows it more often ({told:.0%}) than when steered "
                f"({steered:.0%})."
            )
        verdict = with_instruction(self.scores, self.n)
        if verdict == WORSE:
            lines.append(
                "don't steer prompts that already hold the instruction: told in words, the model "
                f"scores {told:.0%}, told and steered {both:.0%}."
            )
        elif verdict == BETTER:
            lines.append(
                "it also helps prompts that hold the instruction: told in words, the model scores "
                f"{told:.0%}, told and steered {both:.0%}."
            )
        return lines


def with_instruction(scores: Mapping[str, float | None], n: int) -> str | None:
    """What steering does to prompts that already hold the instruction: WORSE or BETTER by at least two
    replies of n, else SAME; None if it was not asked."""
    told, both = scores["instructed"], scores["both"]
    if told is None or both is None:
        return None
    replies = round((both - told) * n)
    return WORSE if replies <= -2 else BETTER if replies >= 2 else SAME


def _spoilt(trials: Sequence[Trial], none: float) -> list[str]:
    """A sentence on settings that would have won without their degenerate replies."""
    spoilt = [trial for trial in trials if not trial.is_sound and trial.n_good > none * trial.n]
    if not spoilt:
        return []
    best = max(spoilt, key=lambda trial: trial.n_good / trial.n)
    reasons = {reply.degenerate for reply in best.replies if reply.degenerate}
    return [
        f"{len(spoilt)} settings did, but not without degenerate replies (the best, {best.setting}: "
        f"{best.n_good} of {best.n} good, {best.n_degenerate} {' or '.join(sorted(reasons))})."
    ]


def _score(trial: Trial) -> float | None:
    return trial.score if trial.replies else None


def _spoilt_share(trial: Trial) -> float | None:
    return trial.n_degenerate / trial.n if trial.replies else None


def _row(trial: Trial) -> TrialRow:
    return {name: _rounded(value) for name, value in trial.row().items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
