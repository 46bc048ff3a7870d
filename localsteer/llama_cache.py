"""llama-cpp-python's caches of states (LlamaRAMCache, LlamaDiskCache), keyed by token and edit.

A state is found by the longest prefix of the tokens that it was computed from. By tokens only, this could be
the state of a prompt that was steered differently, so each number of a key combines a token with what was
applied at its position. Unsteered, that is the token itself: states stored by a plain Llama are found, and
the reverse.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_cpp import BaseLlamaCache

if TYPE_CHECKING:
    from llama_cpp import LlamaState

    from .llama import SteeredLlama

_TOKEN_BITS = 32
_EDIT_BYTES = 8  # enough to tell plans apart; a state that was found wrongly is still cut by its full keys


def coded(tokens: Sequence[int], edits: Sequence[bytes | None]) -> tuple[int, ...]:
    """One number per position; `edits` may be shorter, and missing positions are unsteered."""
    edits = [*edits, *[b""] * (len(tokens) - len(edits))]
    return tuple(
        int(token) | int.from_bytes((edit or b"")[:_EDIT_BYTES], "little") << _TOKEN_BITS
        for token, edit in zip(tokens, edits, strict=False)
    )


class KeyedCache(BaseLlamaCache):
    """Wraps a cache, so that `llama.cache[tokens]` returns only states valid under the current plan."""

    def __init__(self, cache: BaseLlamaCache, llama: SteeredLlama) -> None:
        self.wrapped = cache
        self._llama = weakref.ref(llama)

    @property
    def cache_size(self) -> int:
        return self.wrapped.cache_size

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._key(tokens) in self.wrapped

    def __getitem__(self, tokens: Sequence[int]) -> LlamaState:
        """The state with the longest usable prefix. Raises KeyError if there is none."""
        llama = self._owner()
        key = self._key(tokens)
        state = self.wrapped[key]
        # whoever asks compares it with the live state, by tokens: keep of that only what is right as well
        llama.forget_wrong(len(tokens))
        return _usable(state, key, llama.state_edits(state))

    def __setitem__(self, tokens: Sequence[int], state: LlamaState) -> None:
        self.wrapped[coded(tokens, self._owner().state_edits(state))] = state

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":  # not there yet, while it is being unpickled
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return coded(tokens, self._owner().prompt_edits(len(tokens)))

    def _owner(self) -> SteeredLlama:
        llama = self._llama()
        assert llama is not None, "the cache of a Llama that no longer exists"
        return llama


def _usable(state: LlamaState, key: Sequence[int], edits: Sequence[bytes | None]) -> LlamaState:
    """The state, with its tokens hidden from the first on that was steered otherwise than the key says."""
    tokens = state.input_ids[: state.n_tokens].tolist()
    for i, (have, want) in enumerate(zip(coded(tokens, edits), key, strict=False)):
        if have != want:
            hidden = copy.copy(state)
            hidden.input_ids = state.input_ids.copy()
            hidden.input_ids[i:] = -1
            return hidden
    return state
