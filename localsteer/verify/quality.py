"""Is it still a reply? Measures of a degenerate reply that need no judge and no second model.

Steering too hard, or at every position, makes a model repeat itself, locks it at the start of its reply
(`{"name": {"name": {"name":`), or fills the reply with quotes that a lenient verifier passes. `is_degenerate`
detects these, but not fluent nonsense, for which there is the perplexity ratio to the unsteered model.

The thresholds were set on 390 real replies of three models, of which 66 really loop: the longest exact
repetition of tokens in the others is 6, the shortest in those that loop by tokens is 46.
tests/test_quality.py prints what is flagged there.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from localsteer.verify.words import count_words

EMPTY = "empty"
LOOPING = "looping"
LOCKED = "locked at its start"

NGRAM = 4  # tokens; shorter ones recur in good prose, longer ones miss loops that vary a word
REPETITION_LIMIT = 0.75  # four equal quarters; songs with a refrain on every line reach 0.61
MAX_NUMBERS = 1 / 6  # of the words; up to here numbers are the labels of a list, above they are its content
MIN_REPETITION_TOKENS = 40  # below this a list of like items can reach the limit honestly
MIN_RUN_TOKENS = 16  # tokens that repeat what stood one period before; "crazy, crazy, crazy" is 4
MIN_RUN_CHARACTERS = 48  # the same within words: !!!!, 0000; "Nooooooo" stays below
MIN_RUN_RULES = 200  # characters; Markdown rules and dot leaders may be a line or two long
MIN_RUN_SHORT = 5  # tokens, where the whole reply is the loop: "yes yes yes yes yes yes"
SHORT_SHARE = 0.8  # of the reply that a short loop must cover
MIN_QUOTES = 8  # quotes with nothing but blanks between them; an empty docstring has 6
START_TOKENS = 3  # a loop that begins within these locks the reply at its start
MIN_OPENINGS = 3  # how often the same key opens a JSON that goes nowhere
_MAX_PERIOD_TOKENS = 512
_MAX_PERIOD_CHARACTERS = 8  # longer ones hold a word, and are found as tokens

# Scripts that put no blanks between words are cut into characters: Thai, kana, Han, Hangul.
_UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_TOKEN = re.compile(_UNSPACED + r"|[^\W_]+|(?:[^\w\s]|_)+")
# Characters that draw lines, leaders and tables.
_RULE = re.compile("[-_=*.~#+|:^\\s\u2500-\u257f]+")
_QUOTES = re.compile(rf"(?:[\"'\u201c\u201d\u2018\u2019«»]\s*){{{MIN_QUOTES}}}")
# The gaps are bounded, so that a reply of brackets alone costs no more than its length.
_NESTED_KEY = re.compile(rf"\W{{0,20}}(\w+)(?:\W{{0,20}}[{{\[:]\W{{0,20}}\1\b){{{MIN_OPENINGS - 1}}}")
_NUMBER = re.compile(r"\b\d+\b")
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([nrt"/\\]))')
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


class _Loop(NamedTuple):
    """`length` items from `start` on, each equal to the one `period` before it, the first period included."""

    start: int
    period: int
    length: int

    @property
    def run(self) -> int:
        """The items that repeat: all but the first period."""
        return self.length - self.period


def is_degenerate(reply: str, *, repetition_limit: float = REPETITION_LIMIT) -> str | None:
    """Why a reply is degenerate (EMPTY, LOCKED or LOOPING), or None if nothing is wrong with its form.

    Locked: the loop begins with the reply, or it has no letter, digit or emoji. Only the form counts, so a
    reply that was asked to say a word twenty times is flagged too. Short replies, JSON, lists, tables, rules,
    two answers separated by asterisks, capitals, numbered sections and placeholders pass.

    repetition_limit: the `repetition` above which a long reply counts as looping.
    """
    if not reply.strip():
        return EMPTY
    if not any(_says_something(character) for character in reply):
        return LOCKED
    tokens = _TOKEN.findall(reply.casefold())
    loop = _token_loop(tokens)
    if loop is not None:
        return LOCKED if loop.start <= START_TOKENS else LOOPING
    if _NESTED_KEY.match(reply):
        return LOCKED
    if _QUOTES.search(reply) or _loops_in_characters(reply):
        return LOOPING
    return LOOPING if _repeats_itself(reply, len(tokens), repetition_limit) else None


def repetition(text: str) -> float:
    """The share of the text's runs of four tokens that occurred in it before: 0 means never, near 1 a loop.

    Case and blanks do not matter; a text that says all twice is near 0.5, three times 0.67.
    """
    tokens = _TOKEN.findall(text.casefold())
    grams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def length_words(text: str) -> int:
    """The length of a reply in words, as IFEval's `length_constraints:number_words` counts them."""
    return count_words(text)


def subject_kept(reply: str, subject: str) -> bool:
    """Whether the reply names what it was asked about. Case, the encoding of accents and plural endings do
    not matter.

    The subject must occur as whole words: "elegant" does not keep "Ant". It is found in capitals, with its
    words separated by line breaks, hyphens or underscores (JSON keys), and with letters escaped as in JSON.
    Raises ValueError for a subject without a letter or digit.
    """
    words = _plain(subject).split()
    if not words:
        raise ValueError(f"a subject needs a letter or digit: {subject!r}")
    # Chinese, Japanese and Thai do not part words: there the subject may stand within a run of letters.
    edge = "" if re.search(_UNSPACED, subject) else " "
    wanted = [edge + " ".join([*words[:-1], form]) + edge for form in _forms(words[-1])]
    texts = [f" {_plain(text)} " for text in (reply, _unescaped(reply))]
    return any(form in text for form in wanted for text in texts)


def perplexity(log_probs: float | Sequence[float] | np.ndarray) -> float:
    """exp of minus the mean natural log-probability per token; also takes the mean itself."""
    mean = _mean_log_prob(log_probs)
    return math.exp(-mean) if mean > -700 else math.inf


def perplexity_ratio(
    steered: float | Sequence[float] | np.ndarray, unsteered: float | Sequence[float] | np.ndarray
) -> float:
    """How much more the unsteered model is surprised by the steered reply than by its own, per token.

    Both are log-probabilities (or their mean) under the UNSTEERED model, of the steered and of the
    unsteered reply to the same prompt. 1: as natural; 3: three times as surprising; far below 1: a loop,
    which any model finds easy to predict.
    """
    difference = _mean_log_prob(unsteered) - _mean_log_prob(steered)
    return math.exp(difference) if difference < 700 else math.inf


def _repeats_itself(reply: str, n_tokens: int, limit: float) -> bool:
    """Long, and above the limit; a list that gives the same items new numbers is, too."""
    if n_tokens < MIN_REPETITION_TOKENS:
        return False
    unnumbered, numbers = _NUMBER.subn(" ", reply)
    labels_only = 0 < numbers <= MAX_NUMBERS * count_words(reply)
    return repetition(reply) > limit or (labels_only and repetition(unnumbered) > limit)


def _says_something(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) == "So"


def _token_loop(tokens: list[str]) -> _Loop | None:
    """The longest loop that is long enough to count, or one that is the whole of a short reply."""
    numbers: dict[str, int] = {}
    items = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], dtype=np.int32)
    loop = _longest_loop(items, _MAX_PERIOD_TOKENS)
    if loop is None:
        return None
    if loop.run >= MIN_RUN_TOKENS:
        looped = "".join(tokens[loop.start : loop.start + loop.length])
        return loop if not _RULE.fullmatch(looped) or len(looped) >= MIN_RUN_RULES else None
    is_whole = loop.start <= START_TOKENS and loop.length >= SHORT_SHARE * len(tokens)
    return loop if is_whole and loop.run >= MIN_RUN_SHORT else None


def _loops_in_characters(text: str) -> bool:
    """Runs such as !!!!!! and 0000, which are one token."""
    packed = "".join(text.split())
    items = np.frombuffer(packed.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    loop = _longest_loop(items, _MAX_PERIOD_CHARACTERS)
    if loop is None:
        return False
    looped = packed[loop.start : loop.start + loop.length]
    return loop.run >= (MIN_RUN_RULES if _RULE.fullmatch(looped) else MIN_RUN_CHARACTERS)


def _longest_loop(items: np.ndarray, max_period: int) -> _Loop | None:
    """The loop with the longest run over all periods, of those that hold their period three times or more."""
    best: _Loop | None = None
    for period in range(1, min(len(items) // 3, max_period) + 1):
        repeats = items[:-period] == items[period:]
        least = max(2 * period, best.run + 1 if best else 0)
        if _has_run(repeats, least):
            start, run = _longest_true(repeats)
            best = _Loop(start, period, run + period)
    return best


def _has_run(flags: np.ndarray, length: int) -> bool:
    """Whether so many stand in a row. Most texts answer after a few doublings, without a list of runs."""
    known = 1  # flags[i]: whether this many are true from i on
    while known < length and flags.any():
        step = min(known, length - known)
        flags = flags[:-step] & flags[step:]
        known += step
    return bool(flags.any())


def _longest_true(flags: np.ndarray) -> tuple[int, int]:
    """(start, length) of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    if edges.size == 0:
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(edges[2 * longest]), int(lengths[longest])


def _plain(text: str) -> str:
    """Letters and digits in one spelling (NFKC, case folded), everything else one blank."""
    composed = unicodedata.normalize("NFKC", _few_marks(text))
    folded = unicodedata.normalize("NFKC", _few_marks(composed.casefold()))
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
    return " ".join("".join(kept).split())


def _few_marks(text: str) -> str:
    """The text with 30 combining marks in a row at most, as the Unicode Standard's stream-safe text (UAX 15,
    13) has it: normalising sorts them, in time that grows with the square of their number."""
    if text.isascii():
        return text
    marks = "".join(c for c in set(text) if unicodedata.combining(unicodedata.normalize("NFKD", c)[0]))
    return re.sub(f"([{re.escape(marks)}]{{30}})[{re.escape(marks)}]+", r"\1", text) if marks else text


def _forms(word: str) -> set[str]:
    """The word with and without a plural ending, by the rules of English spelling."""
    if len(word) < 3 or not word.isalpha():
        return {word}
    forms = {word, word + "s", word + "es"}
    if word.endswith("y"):
        forms.add(word[:-1] + "ies")
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    if word.endswith("es"):
        forms.add(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
    return {form for form in forms if len(form) >= 3}


def _unescaped(text: str) -> str:
    """The text with JSON's backslash escapes resolved, wherever they stand."""
    resolved = _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else _ESCAPED.get(m[2], m[2]), text)
    return resolved.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _mean_log_prob(log_probs: float | Sequence[float] | np.ndarray) -> float:
    values = np.atleast_1d(np.asarray(log_probs, dtype=np.float64))
    if values.size == 0 or np.isnan(values).any() or (values > 0).any():
        raise ValueError("log-probabilities must be one number or more, none of them above 0 or NaN")
    return float(values.mean())
