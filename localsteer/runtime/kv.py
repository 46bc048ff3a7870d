"""What the KV cache holds: each sequence's tokens, and the edits under which each was computed.

A cached position is valid for another request only if token AND edits are the same, there and at every
earlier position. The plan is not enough: the reply in the first turn of a chat is prompt in the second, and
under positions `prompt`, `last` or `generation` it then has another state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plan import PositionClass

if TYPE_CHECKING:
    from ..plan import Plan
    from .bridge import Context

NO_KEYS = (b"",) * len(PositionClass)


class _Cell:
    """One position of the cache; several sequences may share it."""

    __slots__ = ("key", "refs", "token")

    def __init__(self, token: int, key: bytes) -> None:
        self.token, self.key, self.refs = token, key, 1


def class_keys(plan: Plan | None) -> tuple[bytes, ...]:
    """For each PositionClass, a key of what is applied to its tokens; keys are equal if the edits are."""
    return NO_KEYS if plan is None else tuple(plan.class_key(cls) for cls in PositionClass)


class CachedSequences:
    """Keeps track of the cache of one Context. Apart from decodes, only this class changes the cache.

    n_used: cells in use; a cell that several sequences share counts once.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sequences: list[list[_Cell]] = [[] for _ in range(context.n_seq_max)]
        self.n_used = 0

    def length(self, seq: int) -> int:
        return len(self._sequences[seq])

    def common(self, seq: int, tokens: Sequence[int], keys: Sequence[bytes] | None) -> int:
        """How many of a sequence's first positions are valid for these tokens and keys.

        keys: None accepts positions whatever they were computed under. They keep their own keys, so no other
        request gets them by mistake.
        """
        n = 0
        for i, (cell, token) in enumerate(zip(self._sequences[seq], tokens, strict=False)):
            if cell.token != token or (keys is not None and cell.key != keys[i]):
                break
            n += 1
        return n

    def own_cells(self, seq: int, start: int = 0) -> int:
        """How many cells from `start` on no other sequence shares; forgetting them would free so many."""
        return sum(cell.refs == 1 for cell in self._sequences[seq][start:])

    def append(self, seq: int, tokens: Sequence[int], keys: Sequence[bytes]) -> None:
        """Record positions that are being decoded."""
        self._sequences[seq] += [_Cell(token, key) for token, key in zip(tokens, keys, strict=True)]
        self.n_used += len(tokens)

    def cut(self, seq: int, n: int) -> int:
        """Forget all but the first n positions. Returns how many are left, since a recurrent state can't be
        cut."""
        if n >= self.length(seq):
            return self.length(seq)
        if n and not self._context.seq_rm(seq, n):
            n = 0
        if n == 0:
            self._context.seq_rm(seq)
        for cell in self._sequences[seq][n:]:
            cell.refs -= 1
            self.n_used -= cell.refs == 0
        del self._sequences[seq][n:]
        return n

    def share(self, src: int, dst: int, n: int) -> None:
        """Make dst begin with the first n positions of src: the same cells, or copies if caches are
        separate."""
        self.cut(dst, 0)
        if n:
            self._context.seq_cp(src, dst, n)
        shared = self._sequences[src][:n]
        if self._context.kv_unified:
            for cell in shared:
                cell.refs += 1
        else:
            shared = [_Cell(cell.token, cell.key) for cell in shared]
            self.n_used += n
        self._sequences[dst] = shared

    def clear(self) -> None:
        """Forget everything, for instance after a failed decode."""
        self._context.clear()
        self._sequences = [[] for _ in self._sequences]
        self.n_used = 0
