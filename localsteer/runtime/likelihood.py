"""How likely known replies are: teacher forcing of many (prompt, reply, plan) rows, as many per decode as
fit.

The prefix that rows share is computed once per decode (prefix.py), and logits only for the wanted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PromptError
from ..plan import position_classes
from .forward import WIDE_BYTES, log_probabilities
from .prefix import TokenSequence, trees

if TYPE_CHECKING:
    from ..engine import Engine
    from ..plan import Plan


@dataclass(frozen=True, eq=False)
class Row:
    """A reply after a prompt, both as token ids, at least one each. plan: what steers it, None = nothing.

    wanted: (n_reply,) bool, the tokens of the reply whose log-probabilities are needed; None: all.
    """

    prompt: Sequence[int]
    reply: Sequence[int]
    plan: Plan | None = None
    wanted: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        """The wanted tokens."""
        reply = np.asarray(self.reply, np.int64)
        return reply if self.wanted is None else reply[self.wanted]

    @property
    def sequence(self) -> TokenSequence:
        """What the model has to read for this row: nothing after the last wanted token matters."""
        chosen = np.arange(len(self.reply)) if self.wanted is None else np.flatnonzero(self.wanted)
        outputs = (len(self.prompt) - 1 + chosen).tolist()
        tokens = [*self.prompt, *self.reply][: max(outputs, default=-1) + 1]
        classes = position_classes(np.arange(len(tokens)), len(self.prompt)).tolist()
        return TokenSequence(tokens, classes, outputs, self.plan)


class Likelihood:
    """Log-probabilities under one engine. n_tokens: tokens computed so far.

    measure: computes an array of n rows from the logits of the wanted tokens, (n, n_vocab) float32, and these
    tokens.
    """

    def __init__(
        self, engine: Engine, measure: Callable[[np.ndarray, np.ndarray], np.ndarray] = log_probabilities
    ) -> None:
        self._engine, self._measure = engine, measure
        self.n_tokens = 0

    def __call__(
        self, rows: Sequence[Row], *, on_progress: Callable[[int, int], None] | None = None
    ) -> list[np.ndarray]:
        """Natural log-probabilities of the wanted tokens of each row, float64, in the order of `rows`.

        on_progress: called with (rows done, rows). Raises PromptError for a row that is empty, or too long.
        """
        context = self._engine.context
        limits = {
            "n_sequences": self._engine.n_seq_max if context.kv_unified else 1,
            "n_tokens": min(context.n_batch, self._engine.n_cells),
            "n_outputs": max(1, WIDE_BYTES // (4 * self._engine.model.n_vocab)),
        }
        sequences = [self._checked(row) for row in rows]
        results: list[np.ndarray] = [np.zeros(0)] * len(rows)
        done = 0
        for tree in trees(sequences, **limits):
            self._engine.begin()
            tree.decode(context)
            self.n_tokens += len(tree.nodes)
            logits = context.all_logits()
            for index, where in tree.rows_of(sequences):
                results[index] = self._measure(logits[where], rows[index].targets)
            done += len(tree.paths)
            if on_progress:
                on_progress(done, len(rows))
        return results

    def _checked(self, row: Row) -> TokenSequence:
        if not len(row.prompt) or not len(row.targets):
            raise PromptError("a likelihood needs a prompt, a reply, and at least one wanted token of it.")
        sequence = row.sequence
        room = min(self._engine.n_ctx, self._engine.context.n_batch, self._engine.n_cells)
        if len(sequence.tokens) > room:
            raise PromptError(
                f"a prompt and reply of {len(sequence.tokens)} tokens do not fit into the {room} that can be "
                "read at once: shorten them, or raise n_ctx (-c)."
            )
        return sequence
