"""Constraints against a vocabulary: which tokens may come next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LocalsteerError
from .constraint import Constraint
from .guidance import compiled, told

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

END = -1  # in the place of a token: the reply is complete, and the vocabulary has no token that says so
KEPT = 16  # compiled constraints of one vocabulary


class TokenBytes:
    """The tokens of a model, made once and usable in any thread.

    pieces: the bytes that each token adds to a reply; tokens that add none are never allowed. ends: the
    tokens that end a reply. Building this takes 0.4 s for 49,000 tokens, and holds the interpreter meanwhile.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Collection[int]) -> None:
        self.n_vocab = len(pieces)
        self.has_end = bool(ends)
        self._tokenizer = _tokenizer(pieces, sorted(ends))
        self._lock = threading.Lock()
        self._compiling = threading.Lock()  # one at a time: it may take a second of a core
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A new matcher for one reply. Raises ConstraintError for what can't be read or enforced."""
        with self._lock:
            compiled = self._compiled.get(constraint)
            if compiled is not None:
                self._compiled.move_to_end(constraint)
                return Matcher(self, constraint, compiled.deep_copy())
        with self._compiling:
            fresh = self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = fresh
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Matcher(self, constraint, fresh.deep_copy())

    def _compile(self, constraint: Constraint) -> LLMatcher:
        matcher = compiled(self._tokenizer, constraint.lark_text())
        if not matcher.is_error():
            packed = matcher.compute_bitmask()  # here, so that what is too complex is refused here
            if not matcher.is_error() and not _unpacked(packed, self.n_vocab + 1).any():
                raise constraint.error("no reply can follow it")
        if matcher.is_error():
            raise constraint.error(told(matcher.get_error()))
        return matcher


class Matcher:
    """The progress of one reply through its constraint. One thread at a time."""

    def __init__(self, vocabulary: TokenBytes, constraint: Constraint, matcher: LLMatcher) -> None:
        self._vocabulary, self._constraint, self._matcher = vocabulary, constraint, matcher

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of one row of logits, (n_vocab,), with -inf for every token that may not come next.

        Ends are allowed where the constraint allows the reply to end, and nothing else is where it must.
        Raises LocalsteerError where the text so far has become too complex to go on.
        """
        masked = np.full_like(logits, -np.inf)
        allowed = self.allowed(len(logits))
        masked[allowed] = logits[allowed]
        return masked

    def allowed(self, n_vocab: int) -> np.ndarray:
        """The tokens that may come next, (n,) ascending. Raises LocalsteerError as `mask` does."""
        packed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._error()
        return np.flatnonzero(_unpacked(packed, n_vocab))

    def allows(self, token: int) -> bool:
        """Whether this one token may come next. Never of an end, of which only `allowed` tells."""
        return self._matcher.validate_tokens([token]) == 1

    @property
    def must_end(self) -> bool:
        """Whether the reply is complete in a vocabulary that has no token to end it."""
        return not self._vocabulary.has_end and self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Advance by a token that the mask allowed."""
        if not self._matcher.consume_token(token) and self._matcher.is_error():
            raise self._error()

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens from here on are a whole reply. Changes nothing."""
        copy = self._matcher.deep_copy()
        return copy.try_consume_tokens(list(tokens)) == len(tokens) and copy.is_accepting()

    def _error(self) -> LocalsteerError:
        return LocalsteerError(
            f"the reply can't be kept to its constraint: {told(self._matcher.get_error())}."
        )


def _unpacked(packed: bytes, count: int) -> np.ndarray:
    """(count,) of bool."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count, bitorder="little")
    return bits.view(np.bool_)


class _Tokens:
    """What llguidance asks a tokenizer for. It is never called: see `HEAD` in guidance.py."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], ends: list[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, ends, ends[0]

    def __call__(self, text: bytes | str) -> list[int]:
        raise LocalsteerError("a constraint forces no tokens.")


def _tokenizer(pieces: Sequence[bytes], ends: list[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = ends or [len(pieces)]  # one more than there are: a grammar has to end somehow
    special = set(ends)
    tokens = [
        piece if piece and token not in special else b"\xff<%d>" % token  # 0xff: no text
        for token, piece in enumerate([*pieces, *[b""] * (ends[0] == len(pieces))])
    ]
    return LLTokenizer(TokenizerWrapper(_Tokens(tokens, ends)), eos_token=ends)
