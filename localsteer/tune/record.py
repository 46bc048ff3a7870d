"""What a vector's file keeps of its choice, and what its user should know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from localsteer.catalog import Instruction

from .check import Trial
from .targets import Told

WORSE, SAME, BETTER = "worse", "same", "better"
N_KEPT = 8  # settings of the table in the file


def of(
    instruction: Instruction,
    best: Trial | None,
    trials: Sequence[Trial],
    plain: Trial,
    told: Trial,
    both: Trial,
    *,
    told_model: Told,
    seconds: float | None,
    stopped: bool,
) -> dict[str, Any]:
    """JSON without infinities. scores: shares of good replies, None where nothing was asked."""
    from localsteer import __version__

    scores = {
        "none": _score(plain),
        "steered": _score(best) if best is not None else _score(plain),
        "instructed": _score(told),
        "both": _score(both),
    }
    n = plain.n
    return {
        "search": "likelihood",
        "instruction": instruction.id,
        "n": n,
        "scores": scores,
        "judged_by": "verifier" if instruction.verifier else "likelihood",
        "recovered_gap": None if best is None else _rounded(best.gap),
        "with_instruction": with_instruction(scores, n),
        "targets": {
            "n": len(told_model.targets),
            "asked": told_model.n_asked,
            "first": told_model.n,
            "first_followed": told_model.n_passed,
        },
        "max_tokens": told_model.max_tokens,
        "seconds": None if seconds is None else round(seconds, 1),
        "stopped": stopped,
        "advice": advice(instruction, best, trials, scores, n, told_model, stopped),
        "table": [_row(trial) for trial in trials[:N_KEPT]],
        "tool_version": __version__,
    }


def with_instruction(scores: Mapping[str, float | None], n: int) -> str | None:
    """What steering does to prompts that hold the instruction already: WORSE or BETTER by two replies of n or
    more, else SAME; None where it was not asked."""
    told, both = scores["instructed"], scores["both"]
    if told is None or both is None:
        return None
    replies = round((both - told) * n)
    return WORSE if replies <= -2 else BETTER if replies >= 2 else SAME


def advice(
    instruction: Instruction,
    best: Trial | None,
    trials: Sequence[Trial],
    scores: Mapping[str, float | None],
    n: int,
    told_model: Told,
    stopped: bool,
) -> list[str]:
    """A sentence for each thing that the user should know."""
    lines = []
    none, told = scores["none"], scores["instructed"]
    if stopped:
        lines.append("the search was stopped: this is the best that it had found.")
    if not told_model.targets and not trials:
        lines.append(
            f"the model follows {instruction.id} in none of {told_model.n_asked} replies when it is told to, "
            "so there is nothing to look for: nothing is applied. Try a larger model, or a wording that it "
            "follows."
        )
    elif best is None and none == 1:
        lines.append(
            f"these queries can't tell whether steering helps {instruction.id} on this model: the model "
            "alone follows it in every reply. Tune with --queries whose replies don't."
        )
    elif best is None:
        words = "" if told is None else f"; told {told:.0%}"
        lines.append(
            f"no setting made the model follow {instruction.id} more often than it does by itself "
            f"({none:.0%}{words}): nothing is applied."
        )
        lines += _spoilt(trials, none)
    elif not best.replies:
        lines.append("no reply was looked at yet: tune again for figures.")
    elif instruction.verifier is None and best.gap is None:
        lines.append(
            f"{instruction.id} has no verifier: nothing tells whether replies follow it, and "
            f"{scores['steered']:.0%} of them are unbroken."
        )
    elif instruction.verifier is None:
        lines.append(
            f"{instruction.id} has no verifier: this setting makes replies of the told model likely (it "
            f"recovers {best.gap:.0%} of what telling does) and leaves {scores['steered']:.0%} of its own "
            "unbroken."
        )
    elif round((scores["steered"] - none) * n) < 2:
        lines.append(f"it helps by one reply of {n} alone, which may be chance: try again with more queries.")
    is_known = best is not None and bool(best.replies) and told is not None
    if is_known and told - scores["steered"] >= 2 / max(1, n):
        lines.append(
            f"told in words the model follows it more often ({told:.0%}) than when it is steered "
            f"({scores['steered']:.0%})."
        )
    verdict = with_instruction(scores, n)
    if verdict == WORSE:
        lines.append(
            f"prompts that hold the instruction already are better left alone: told in words the model "
            f"scores {told:.0%}, told and steered {scores['both']:.0%}."
        )
    elif verdict == BETTER:
        lines.append(
            f"it helps prompts that hold the instruction, too: told in words the model scores {told:.0%}, "
            f"told and steered {scores['both']:.0%}."
        )
    return lines


def _spoilt(trials: Sequence[Trial], none: float) -> list[str]:
    """Of settings that would have won, had it not been for their degenerate replies."""
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


def _row(trial: Trial) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in trial.row().items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
