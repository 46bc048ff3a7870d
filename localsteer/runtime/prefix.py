"""Many sequences in one decode, with their common prefix computed once.

A chat template opens every prompt with the same system message, and plans that differ only in the reply share
the prompt. Two positions are the same if token and edits are the same, there and at every earlier position
(as in kv.py). llama.cpp computes a token that belongs to several sequences once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from .kv import class_keys

if TYPE_CHECKING:
    from ..plan import Plan
    from .bridge import Context, Rows


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Token ids, their PositionClass, the plan that steers them, and the positions whose outputs are
    wanted."""

    tokens: Sequence[int]
    classes: Sequence[int]
    outputs: Sequence[int]
    plan: Plan | None = None


@dataclass(eq=False)
class _Node:
    """One token of the decode. owners: the sequences it belongs to."""

    token: int
    position: int
    cls: int
    plan: Plan | None
    owners: list[int]


@dataclass
class PrefixTree:
    """The sequences of one decode. paths: for each, its index in the packed list, and its nodes."""

    nodes: list[_Node] = field(default_factory=list)
    paths: list[tuple[int, list[int]]] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    _last: tuple[int, ...] = ()

    def grown(self, cells: tuple[int, ...]) -> int:
        """How many nodes the tree would have with another sequence."""
        return len(self.nodes) + len(cells) - _n_common(self._last, cells)

    def add(self, index: int, sequence: TokenSequence, cells: tuple[int, ...]) -> None:
        """Add a sequence. They come sorted by their cells, so the previous one shares the most."""
        n_common = _n_common(self._last, cells)
        path = self.paths[-1][1][:n_common] if self.paths else []
        owner = len(self.paths)
        for node in path:
            self.nodes[node].owners.append(owner)
        for position in range(n_common, len(cells)):
            path.append(len(self.nodes))
            content = (sequence.tokens[position], position, sequence.classes[position], sequence.plan)
            self.nodes.append(_Node(*content, [owner]))
        self.outputs |= {path[position] for position in sequence.outputs}
        self.paths.append((index, path))
        self._last = cells

    def decode(self, context: Context, capture: Sequence[int] = (), *, logits: bool = True) -> Rows:
        """Decode into an empty cache. capture: layers to record at the outputs. logits: compute those of the
        outputs, without which the last layer can't be recorded."""
        wanted = np.zeros(len(self.nodes), bool)
        wanted[sorted(self.outputs)] = True
        return context.decode(
            [node.token for node in self.nodes],
            [node.position for node in self.nodes],
            [node.owners[0] for node in self.nodes],
            wanted if logits else np.zeros(len(self.nodes), bool),
            plans=[node.plan for node in self.nodes],
            classes=[node.cls for node in self.nodes],
            capture=capture,
            capture_tokens=wanted if capture else None,
            also=[node.owners[1:] for node in self.nodes],
        )

    def rows_of(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of a sequence, the decode's output rows for its outputs), in the order of the
        tree."""
        row = {node: i for i, node in enumerate(sorted(self.outputs))}
        for index, path in self.paths:
            yield index, [row[path[position]] for position in sequences[index].outputs]


def trees(
    sequences: Sequence[TokenSequence], *, n_sequences: int, n_tokens: int, n_outputs: int
) -> Iterator[PrefixTree]:
    """All sequences in as few decodes as the limits allow; those that begin alike stay together.

    No sequence may be longer than `n_tokens`; one with more outputs than `n_outputs` gets its own decode.
    """
    names: dict[tuple[int, bytes], int] = {}
    cells = [_cells(sequence, names) for sequence in sequences]
    tree = PrefixTree()
    for index in sorted(range(len(sequences)), key=cells.__getitem__):
        is_full = len(tree.paths) == n_sequences or tree.grown(cells[index]) > n_tokens
        if tree.paths and (is_full or len(tree.outputs) + len(sequences[index].outputs) > n_outputs):
            yield tree
            tree = PrefixTree()
        tree.add(index, sequences[index], cells[index])
    if tree.paths:
        yield tree


def _cells(sequence: TokenSequence, names: dict[tuple[int, bytes], int]) -> tuple[int, ...]:
    """A number for each token together with its edits: positions with equal numbers may be shared."""
    keys = class_keys(sequence.plan)
    pairs = ((token, keys[cls]) for token, cls in zip(sequence.tokens, sequence.classes, strict=True))
    return tuple(names.setdefault(pair, len(names)) for pair in pairs)


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
