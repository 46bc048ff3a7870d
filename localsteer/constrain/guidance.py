"""llguidance itself: how it is asked, within which bounds, and what its messages say."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import ConstraintError, LocalsteerError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Where a text can go on in one way alone, llguidance would allow the one tokenization that it thinks best:
# with this, every tokenization of an allowed text is allowed.
HEAD = '%llguidance {"no_forcing": true}\n'
# llguidance's own bounds on the time of one mask (some 15 ms) are kept. Here are those on memory, and on the
# time before the first: 0.3 s, where its own would be 1.6.
MAX_STATES = 50_000
FIRST_FUEL = 200_000
MAX_SYMBOLS = 100_000
STACK_BYTES = 256 << 20
_starting = threading.Lock()


def grammar_error(rules: str) -> str | None:
    """The complaint about a grammar, whatever the vocabulary."""
    matcher = compiled(_bytes(), HEAD + rules)
    return matcher.get_error() if matcher.is_error() else None


def compiled(vocabulary: LLTokenizer, rules: str) -> LLMatcher:
    """A matcher, which may be an error.

    llguidance follows rules and references by recursion: a chain of a thousand ends the process that has the
    usual stack of 8 MB. A thread of its own has what the longest chain in a grammar of `MAX_TEXT` needs; of
    memory it takes what is used.
    """
    from llguidance import LLMatcher

    with _starting:  # the size is one for the whole process
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = ThreadPoolExecutor(1, "localsteer-grammar")
            made = thread.submit(LLMatcher, vocabulary, rules, log_level=0, limits=limits())
        except RuntimeError as error:
            raise LocalsteerError(f"no memory is left to read a grammar ({error}).") from None
        finally:
            threading.stack_size(usual)
    with thread:
        return made.result()


def told(error: str) -> str:
    """Of a message with the grammar in it, what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["it is too complex"]
    complaint = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    if "NoExtension" in complaint:
        return "no reply can follow it"
    return complaint[:160].rstrip(".:")


@lru_cache(maxsize=1)
def limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=FIRST_FUEL,
        max_lexer_states=MAX_STATES,
        max_grammar_size=MAX_SYMBOLS,
        verbose_errors=False,
    )


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def refused(path: tuple[str, ...], why: str) -> ConstraintError:
    """why: without a full stop."""
    where = ".".join(path)
    return ConstraintError(
        f"the JSON schema can't be enforced: {f'{where}: ' if where else ''}{why}.", path, why
    )
