"""Greedy or sampled replies, many together, each ended as soon as its verdict is known: when it can no longer
follow its instruction, or loops.

Most replies here fail, and most of those fail early: a plain reply that should be JSON does so at its first
letter. Its verdict is then known, and generating the rest would cost most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction, Query
from localsteer.errors import PromptError
from localsteer.runtime.ask import Ask
from localsteer.runtime.generate import stream_batch
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY, Sampling
from localsteer.verify.quality import is_degenerate
from localsteer.verify.verdicts import check_arguments
from localsteer.verify.verifiers.early import hopeless

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.plan import Plan
    from localsteer.runtime.ask import Prompt

GIVEN_UP = "given up"  # finish_reason of a reply whose verdict was known before it ended
EVERY = 4  # tokens between two looks at a reply
LOOPS_FROM = 32  # tokens; from here on a look also checks for loops


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt, its query, and what steers its reply."""

    prompt: Prompt
    query: Query
    plan: Plan | None = None


def replies_to(
    engine: Engine,
    instruction: Instruction,
    asked: Sequence[Asked],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    on_reply: Callable[[int], None] | None = None,
) -> list[Reply]:
    """Replies in the order of `asked`. on_reply: called after each reply with the number so far.

    Raises PromptError for a prompt that leaves no room for a reply.
    """
    watches = [_watch(instruction, question.query) for question in asked]
    asks = [
        Ask(question.prompt, steer=question.plan, max_tokens=max_tokens, sampling=_seeded(sampling, i))
        for i, question in enumerate(asked)
    ]

    def watch(index: int, text: str, n: int) -> str:
        return GIVEN_UP if n % EVERY == 0 and watches[index](text, n) else ""

    replies: list[Reply | None] = [None] * len(asks)
    for n_done, (index, reply) in enumerate(stream_batch(engine, asks, watch=watch), 1):
        replies[index] = reply
        if on_reply:
            on_reply(n_done)
    return replies


def _watch(instruction: Instruction, query: Query) -> Callable[[str, int], bool]:
    """A function that says whether a reply, given its text and number of tokens, can be ended."""

    def loops(text: str, n: int) -> bool:
        return n >= LOOPS_FROM and n % (4 * EVERY) == 0 and is_degenerate(text) is not None

    if instruction.verifier is None:
        return loops
    arguments = check_arguments(instruction.verifier, instruction.kwargs_for(query.text), prompt=query.text)
    return lambda text, n: hopeless(instruction.verifier, text, arguments) or loops(text, n)


def _seeded(sampling: Sampling, i: int) -> Sampling:
    return (
        sampling if sampling.seed is None or sampling.is_argmax else replace(sampling, seed=sampling.seed + i)
    )


def told_prompt(query: Query, phrasings: Sequence[str], i: int) -> str:
    """The i-th query with one of the phrasings appended, in turn. Raises PromptError if there are no
    phrasings."""
    if not phrasings:
        raise PromptError("an instruction without a wording can't be told to the model.")
    return f"{query.text} {phrasings[i % len(phrasings)]}"
