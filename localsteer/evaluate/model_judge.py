"""A local model as a judge beside the verifiers: is it told that the reply follows, does it say yes or no?

A judge is only as good as the model: a small one says yes to everything. Its agreement with the verifier, and
how much of that is more than chance, is shown beside its verdicts, which change no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from localsteer.errors import PromptError
from localsteer.evaluate.outcomes import Outcome
from localsteer.evaluate.page import Section, Share, Table, Value
from localsteer.workers import Workers

if TYPE_CHECKING:
    from localsteer.engine import Engine

QUESTION = """\
Here is an instruction, and a reply that was meant to follow it.

Instruction: {wording}

Reply:
{reply}

Does the reply follow the instruction? Answer with one word, yes or no."""
YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")
CHUNK = 32  # replies of one piece of work
ANSWER_TOKENS = 4  # room for the longest of YES and NO
REPLY_TOKENS = 64  # of a reply that a judge should have room for, at least
UNREADABLE = "are too long for its context, or hold characters that it has no tokens for"


class ModelJudge:
    """workers: engines of the judge. wording: the instruction in words, of results whose cell has none."""

    def __init__(self, workers: Workers, name: str, wording: Callable[[str], str | None]) -> None:
        self.workers, self.name, self._wording = workers, name, wording

    def verdicts(self, results: Sequence[Outcome]) -> list[bool | None]:
        """Whether the judge thinks that each reply follows; None where there is no wording to ask about, and
        for an exchange that is too long for the judge or that its vocabulary can't spell."""
        parts = [results[start : start + CHUNK] for start in range(0, len(results), CHUNK)]
        return [verdict for part in self.workers.map(self._judge, parts) for verdict in part]

    def section(self, results: Sequence[Outcome]) -> Section:
        """For a report: what the judge says by condition, and how often the verifier says the same."""
        verified = [result for result in results if result.strict is not None]
        judged = [
            (result, verdict)
            for result, verdict in zip(verified, self.verdicts(verified), strict=True)
            if verdict is not None
        ]
        title, why = "The judge", f"with the question about them they {UNREADABLE}."
        if not judged:
            return Section(title, f"{self.name} could judge none of the {len(verified)} replies: {why}")
        text = (
            f"{self.name} was asked of {len(judged)} replies whether each follows its instruction (yes or "
            "no, whichever it finds likelier). Kappa: agreement beyond chance, 1 is perfect, 0 is none; "
            "below 0.6 believe the verifier. The judge's verdicts enter no other figure."
        )
        if len(judged) < len(verified):
            text += f" Left out are {len(verified) - len(judged)} more: {why}"
        by_condition: dict[str, list[tuple[Outcome, bool]]] = {}
        for result, verdict in judged:
            by_condition.setdefault(result.cell.condition, []).append((result, verdict))
        rows = [_row(name, pairs) for name, pairs in (by_condition | {"all": judged}).items()]
        columns = ["condition", "n", "judge: follows", "verifier: follows", "agreement", "kappa"]
        return Section(title, text, [Table(columns, rows)])

    def _judge(self, engine: Engine, results: Sequence[Outcome]) -> list[bool | None]:
        prompts = [_tokens(engine, self._question(result)) for result in results]
        rows = [i for i, ids in enumerate(prompts) if ids and len(ids) + ANSWER_TOKENS <= engine.n_ctx]
        answers = _answers(engine)
        scores = engine.score([(prompts[i], answer) for i in rows for answer in answers])
        verdicts: list[bool | None] = [None] * len(results)
        for k, i in enumerate(rows):
            own = scores[k * len(answers) :][: len(answers)]
            # a score is a mean over tokens: an answer of several is compared by its whole
            totals = [value * len(answer) for value, answer in zip(own, answers, strict=True)]
            verdicts[i] = max(totals[: len(YES)]) > max(totals[len(YES) :])
        return verdicts

    def _question(self, result: Outcome) -> str | None:
        wording = result.cell.wording or self._wording(result.cell.instruction)
        return QUESTION.format(wording=wording, reply=result.reply.text) if wording else None


def check_judge(engine: Engine) -> None:
    """Raises PromptError for a model whose vocabulary can't spell the question or its answers, or whose
    context has no room for them."""
    n = len(engine.prompt_tokens(QUESTION)) + REPLY_TOKENS + ANSWER_TOKENS
    if n > engine.n_ctx:
        raise PromptError(
            f"{engine.path.name} can't be the judge: its context of {engine.n_ctx} tokens has no room for "
            f"the question and a reply of {REPLY_TOKENS} tokens. Choose another --judge."
        )
    _answers(engine)


def _answers(engine: Engine) -> list[list[int]]:
    return [engine.model.tokenize(text, add_special=False, parse_special=False) for text in (*YES, *NO)]


def _tokens(engine: Engine, question: str | None) -> list[int] | None:
    try:
        return None if question is None else engine.prompt_tokens(question)
    except PromptError:
        return None


def kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of two yes-or-no judges; None where chance alone would make them agree always."""
    n = len(pairs)
    if not n:
        return None
    agreed = sum(a == b for a, b in pairs) / n
    a, b = (sum(pair[k] for pair in pairs) / n for k in (0, 1))
    chance = a * b + (1 - a) * (1 - b)
    return None if chance >= 1 else (agreed - chance) / (1 - chance)


def _row(name: str, judged: Sequence[tuple[Outcome, bool]]) -> list[Value]:
    pairs = [(verdict, bool(result.strict)) for result, verdict in judged]
    shares = [sum(verdicts) / len(pairs) for verdicts in zip(*pairs, strict=True)]
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    return [name, len(pairs), *map(Share, (*shares, agreed)), kappa(pairs)]
