"""What a vector learns from: plain prompts, each with the reply that it should get.

These are the told model's replies if it follows; otherwise the model's own plain replies, rewritten until the
verifier passes; or pairs supplied by the user.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import LocalsteerError
from localsteer.plan import Plan
from localsteer.runtime.sampling import GREEDY
from localsteer.tune.replies import Asked, replies_to, told_prompt
from localsteer.verify import can_rewrite, rewrite, trim_before_loop, trim_to_paragraph
from localsteer.verify.judge import judge
from localsteer.verify.quality import is_degenerate
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Reply
    from localsteer.vector import ControlVector

FEWEST = 4  # examples; fewer would be learned by heart
MAX_TOKENS = 192  # tokens of a reply
LEAST_WORDS = 40  # words of the paragraphs that are kept of a reply without an end
# The told model's replies are used if it follows at least this often: they are what it would say by itself.
# If it rarely follows, the few replies that pass are its oddest.
FOLLOWS = 0.5
N_TRIED = 8  # queries that decide whether it does
# One rewritten reply in so many is also learned after the told prompt: learned after plain ones only, vectors
# can harm prompts that ask for the same
TOLD_EVERY = 4
N_FOLLOWING = 16  # if this many replies all follow, there is nothing left to improve
RUN = 3  # tokens in a row that a rewritten reply must share with the plain one to count as unchanged

Report = Callable[[str, int, int], None]
Plain = Callable[["Engine", Sequence[str], int], "list[Reply]"]


@dataclass(frozen=True, eq=False)
class Example:
    """prompt, reply: token ids, the reply with its end token if it ends.

    kept: (n_reply,) bool, the tokens that the plain reply has as well, which the instruction does not
    concern. source: "told", "rewritten" or "given".
    """

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    kept: np.ndarray
    source: str

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.reply


def of_instruction(
    engine: Engine,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    report: Report | None = None,
    plain: Plain | None = None,
) -> list[Example]:
    """One example for each query that yields one; some rewritten ones again after the told prompt. plain:
    returns the model's own replies (kept.PlainReplies.of).

    Raises LocalsteerError, with the reason, for fewer than four.
    """
    report = report or (lambda _what, _done, _total: None)
    told = _told(engine, instruction, queries, max_tokens, report)
    if told is not None:
        return _enough(told, instruction, f"{len(told)} of {len(queries)} told replies follow")
    if instruction.verifier is None or not can_rewrite(instruction.verifier):
        raise LocalsteerError(
            f"{instruction.id} can't be learned: the model follows it in too few replies when told to, "
            "and no rule can rewrite a plain reply to follow it: supply your own --examples."
        )
    report("plain replies to rewrite", 0, len(queries))
    replies = (plain or _replies)(engine, [query.text for query in queries], max_tokens)
    if not any(reply.text.strip() for reply in replies):
        raise LocalsteerError("the model's plain replies are empty: there is nothing to rewrite.")
    pairs = [
        (query, rewritten(engine, instruction, query, reply, seed))
        for query, reply in _answers(queries, replies)
    ]
    found = [(query, example) for query, example in pairs if example is not None]
    examples = _enough(
        [example for _, example in found],
        instruction,
        f"{len(found)} of {len(queries)} plain replies can be rewritten",
    )
    return [*examples, *_after_telling(engine, instruction, found)]


def _after_telling(
    engine: Engine, instruction: Instruction, found: Sequence[tuple[Query, Example]]
) -> list[Example]:
    """Some of the examples with the told prompt; none of the first, which are held out."""
    later = found[len(found) // 3 :: TOLD_EVERY] if instruction.phrasings else ()
    prompts = [told_prompt(query, instruction.phrasings, turn) for turn, (query, _) in enumerate(later)]
    return [
        replace(example, prompt=tuple(engine.prompt_tokens(prompt)))
        for (_, example), prompt in zip(later, prompts, strict=True)
    ]


def _told(
    engine: Engine, instruction: Instruction, queries: Sequence[Query], max_tokens: int, report: Report
) -> list[Example] | None:
    """Examples from the told model; None if it follows too rarely. A reply that can no longer follow is
    ended."""
    if not instruction.phrasings:
        return None
    found: list[Example] = []
    for start, stop in ((0, N_TRIED), (N_TRIED, len(queries))):
        report(f"asking for {instruction.id} in words", start, len(queries))
        some = queries[start:stop]
        asked = [
            Asked(told_prompt(query, instruction.phrasings, start + i), query) for i, query in enumerate(some)
        ]
        replies = replies_to(engine, instruction, asked, max_tokens=max_tokens)
        for query, reply in zip(some, replies, strict=True):
            if judge(instruction, query, reply).good and reply.tokens:
                found.append(_example(engine, query.text, reply, None, "told"))
        if len(found) < FOLLOWS * len(queries[:stop]):
            return None
    return found


def rewritten(
    engine: Engine, instruction: Instruction, query: Query, reply: Reply, seed: int
) -> Example | None:
    """The example of a rewritten reply, or None if it can't be rewritten. One that still has no end stays
    open, unless its form has its own end (JSON's last brace), after which anything more would break it."""
    said, was_cut = _with_an_end(reply)
    if is_degenerate(said):
        return None
    kwargs = instruction.kwargs_for(query.text)
    text = rewrite(instruction.verifier, said, kwargs, prompt=query.text, seed=seed, cut=was_cut)
    if text is None:
        return None
    ends = not was_cut or not verify(instruction.verifier, _going_on(text), kwargs, prompt=query.text)
    return _from_text(engine, query.text, text, ends=ends, plain=reply.tokens, source="rewritten")


def all_follow(
    engine: Engine,
    instruction: Instruction,
    queries: Sequence[Query],
    vector: ControlVector,
    *,
    max_tokens: int = MAX_TOKENS,
) -> bool:
    """Whether the steered replies to the first queries all follow. A vector that is not good enough usually
    shows it in the first few."""
    plan = Plan.from_vectors([vector])
    for some in (queries[: N_FOLLOWING // 2], queries[N_FOLLOWING // 2 : N_FOLLOWING]):
        asked = [Asked(query.text, query, plan) for query in some]
        replies = replies_to(engine, instruction, asked, max_tokens=max_tokens)
        if not all(
            judge(instruction, query, reply).followed for query, reply in zip(some, replies, strict=True)
        ):
            return False
    return True


def of_steered(
    engine: Engine,
    instruction: Instruction,
    queries: Sequence[Query],
    vector: ControlVector,
    *,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    report: Report | None = None,
) -> list[Example]:
    """Examples from steered replies, rewritten if they do not follow yet: these correct the remaining
    mistakes where they are made. Replies that are degenerate, or can't be rewritten, are left out."""
    if report:
        report("replies with the learned vector", 0, len(queries))
    replies = _replies(engine, [query.text for query in queries], max_tokens, vector)
    examples = [
        rewritten(engine, instruction, query, reply, seed)
        for query, reply in _answers(queries, replies)
        if not is_degenerate(reply.text)
    ]
    return [example for example in examples if example is not None]


def _answers(queries: Sequence[Query], replies: Sequence[Reply]) -> list[tuple[Query, Reply]]:
    """Without what is said to several questions in the same words. A model that excuses itself now and then
    ("I'm sorry, but I can't assist with that.") would learn to do so for every other question: no likelier
    reply is to be had than one that is always the same."""
    often = Counter(reply.text.strip() for reply in replies)
    pairs = zip(queries, replies, strict=True)
    return [(query, reply) for query, reply in pairs if often[reply.text.strip()] == 1]


def _with_an_end(reply: Reply) -> tuple[str, bool]:
    """The text, and whether it is still cut by the limit.

    A reply that was cut, or that loops, is made to end after its first paragraphs: the model learns to end
    where it would begin another. An end after just any sentence can't be foreseen, and never becomes likely
    enough for greedy decoding: JSON would not be closed.
    """
    said = trim_before_loop(reply.text)
    loops = said != reply.text
    if reply.finish_reason != "length" and not loops:
        return said, False
    paragraphs = trim_to_paragraph(said, LEAST_WORDS)
    return (said, not loops) if paragraphs is None else (paragraphs, False)


def _going_on(text: str) -> str:
    """The text as if the reply continued in its own manner and was cut in mid-sentence."""
    return text + "\n\n" + text[: len(text) // 2]


def of_pairs(engine: Engine, path: str | Path) -> tuple[list[Example], list[Query]]:
    """The examples of a JSONL file of {"prompt": ..., "reply": ...}, and its prompts as queries.

    Raises LocalsteerError for a file that can't be read, for a wrong line, which it names, and for fewer than
    four examples.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalsteerError(
            f"{path} can't be read ({getattr(error, 'strerror', None) or error})."
        ) from None
    pairs = [_pair(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if len(pairs) < FEWEST:
        raise LocalsteerError(f"{path} holds {len(pairs)} examples: at least {FEWEST} are needed.")
    examples = []
    for where, prompt, reply in pairs:
        example = _from_text(engine, prompt, reply, ends=True, plain=(), source="given")
        if len(example.tokens) > engine.n_ctx:
            raise LocalsteerError(
                f"{where}: prompt and reply have {len(example.tokens)} tokens, but the context holds "
                f"{engine.n_ctx}: shorten the reply, or raise -c."
            )
        examples.append(example)
    return examples, [Query(prompt) for _, prompt, _ in pairs]


def _pair(line: str, where: str) -> tuple[str, str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LocalsteerError(f"{where}: not JSON ({error}).") from None
    texts = [record.get(key) if isinstance(record, dict) else None for key in ("prompt", "reply")]
    for key, text in zip(("prompt", "reply"), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise LocalsteerError(f"{where}: {key!r} must be a text, and not empty.")
    return where, texts[0], texts[1]


def _enough(examples: list[Example], instruction: Instruction, what: str) -> list[Example]:
    if len(examples) < FEWEST:
        raise LocalsteerError(
            f"{instruction.id} can't be learned: {what}, and {FEWEST} are needed: supply your own --examples."
        )
    return examples


def _replies(
    engine: Engine, prompts: Sequence[str], max_tokens: int, vector: ControlVector | None = None
) -> list[Reply]:
    steer = () if vector is None else [vector]
    return engine.generate_batch(list(prompts), steer=steer, max_tokens=max_tokens, sampling=GREEDY)


def _example(engine: Engine, prompt: str, reply: Reply, plain: Sequence[int] | None, source: str) -> Example:
    ended = reply.finish_reason == "stop" and engine.model.eos >= 0
    tokens = (*reply.tokens, engine.model.eos) if ended else tuple(reply.tokens)
    kept = shared(tokens, plain) if plain else np.zeros(len(tokens), bool)
    return Example(tuple(engine.prompt_tokens(prompt)), tokens, kept, source)


def _from_text(
    engine: Engine, prompt: str, text: str, *, ends: bool, plain: Sequence[int], source: str
) -> Example:
    tokens = tuple(engine.model.tokenize(text, add_special=False, parse_special=False))
    if ends and engine.model.eos >= 0:
        tokens += (engine.model.eos,)
    kept = shared(tokens, plain)
    return Example(tuple(engine.prompt_tokens(prompt)), tokens, kept, source)


def shared(tokens: Sequence[int], plain: Sequence[int]) -> np.ndarray:
    """(n,) bool: the tokens in runs that the plain reply has as well, except the first of each run, since
    that is what follows something rewritten."""
    kept = np.zeros(len(tokens), bool)
    matcher = SequenceMatcher(None, list(tokens), list(plain), autojunk=False)
    for start, _, size in matcher.get_matching_blocks():
        if size >= RUN:
            kept[start + 1 : start + size] = True
    return kept
