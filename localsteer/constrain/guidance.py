"""llguidance itself: how it is asked, within which bounds, and what its messages say."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import ConstraintError

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

# Where a text can go on in one way alone, llguidance would allow the one tokenization that it thinks best:
# with this, every tokenization of an allowed text is allowed.
HEAD = '%llguidance {"no_forcing": true}\n'
# llguidance's own bounds on the time of one mask (some 15 ms) are kept. Here are those on memory, and on the
# time before the first: 0.3 s, where its own would be 1.6.
MAX_STATES = 50_000
FIRST_FUEL = 200_000
MAX_SYMBOLS = 100_000


def grammar_error(rules: str) -> str | None:
    """The complaint about a grammar, whatever the vocabulary."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes(), HEAD + rules, log_level=0, limits=limits())
    return matcher.get_error() if matcher.is_error() else None


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
