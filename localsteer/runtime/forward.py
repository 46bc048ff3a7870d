"""Forward passes over known tokens: logits, states of the residual stream, scores. Nothing is sampled here.

Engine has these functions as methods, whose docstrings describe arguments and results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import PromptError
from ..plan import Plan, position_classes
from .limits import check_positions, check_tokens
from .prefix import TokenSequence, trees

if TYPE_CHECKING:
    from ..engine import Engine
    from .bridge import Rows

WIDE_BYTES = 64 << 20  # bytes of logits that one decode may return if every token is an output

Progress = Callable[[int, int], None] | None


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of sequence `index`, as part of one decode."""

    index: int
    start: int
    stop: int


def logits(engine: Engine, tokens: np.ndarray, plan: Plan | None, n_prompt: int | None) -> np.ndarray:
    """Logits of one forward pass, (n_tokens, n_vocab) float32."""
    result = np.empty((len(tokens), engine.model.n_vocab), np.float32)
    for piece, rows, _, outputs in passes(
        engine, [tokens], [0], plan=plan, n_prompt=n_prompt, size=wide_size(engine)
    ):
        result[piece.start : piece.stop] = rows.logits[outputs]
    return result


def hidden_states(
    engine: Engine, tokens: np.ndarray, layers: Sequence[int], plan: Plan | None, n_prompt: int | None
) -> np.ndarray:
    """States after each layer of `layers`, (n_tokens, len(layers), n_embd) float32."""
    # the last layer keeps only the rows of outputs
    every = engine.model.n_layer - 1 in layers
    result = np.empty((len(tokens), len(layers), engine.model.n_embd), np.float32)
    for piece, rows, taken, _ in passes(
        engine,
        [tokens],
        [0 if every else len(tokens) - 1],
        plan=plan,
        n_prompt=n_prompt,
        capture=layers,
        size=wide_size(engine) if every else engine.context.n_batch,
    ):
        for i, layer in enumerate(layers):
            result[piece.start : piece.stop, i] = rows.states[layer][taken]
    return result


def last_hidden_states(
    engine: Engine, sequences: Sequence[np.ndarray], on_progress: Progress = None
) -> np.ndarray:
    """Every layer's state at the last token of each sequence, unsteered: (n_sequences, n_layer, n_embd)
    float32."""
    size = min(engine.context.n_batch, engine.n_cells)
    fits = all(len(tokens) <= size for tokens in sequences)
    if engine.n_seq_max > 1 and engine.context.kv_unified and fits:
        states = _last_states_together(engine, sequences, size)
    else:
        states = _last_states(engine, sequences)
    result = np.empty((len(sequences), engine.model.n_layer, engine.model.n_embd), np.float32)
    for n_done, (index, layers) in enumerate(states, 1):
        result[index] = layers
        if on_progress:
            on_progress(n_done, len(sequences))
    return result


class Seen(NamedTuple):
    """states: (n, n_layers, n_embd) float32, for the outputs of sequence `index`, starting at its `first`."""

    index: int
    first: int
    states: np.ndarray


def rows_at(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    n_prompts: Sequence[int] | None,
    plan: Plan | None,
) -> list[TokenSequence]:
    """Checked sequences with outputs at their `positions`. n_prompts: None means that all tokens are
    prompt."""
    rows = []
    n_prompts = [None] * len(sequences) if n_prompts is None else n_prompts
    for token_ids, chosen, n_prompt in zip(sequences, positions, n_prompts, strict=True):
        tokens = check_tokens(engine, token_ids, n_prompt)
        outputs = check_positions(chosen, len(tokens))
        classes = position_classes(np.arange(len(tokens)), len(tokens) if n_prompt is None else n_prompt)
        rows.append(TokenSequence(tokens.tolist(), classes.tolist(), outputs, plan))
    return rows


def states_at(engine: Engine, sequences: Sequence[TokenSequence], layers: Sequence[int]) -> Iterator[Seen]:
    """Yields the states of each sequence's outputs after each layer of `layers`, in pieces of one decode.

    Sequences come in any order, the pieces of one sequence in order. Nothing after a sequence's last output
    is computed. The memory needed is that of one decode, however long the sequences.
    """
    engine.context.probe(layers)
    logits = engine.model.n_layer - 1 in layers  # the last layer keeps only the rows of outputs
    size = min(engine.context.n_batch, engine.n_cells)
    n_outputs = min(size, wide_size(engine)) if logits else size
    cut = [_cut(sequence) for sequence in sequences]
    can_share = engine.n_seq_max > 1 and engine.context.kv_unified
    short = [
        i for i, s in enumerate(cut) if can_share and len(s.tokens) <= size and len(s.outputs) <= n_outputs
    ]
    run = engine.begin()
    together = [cut[i] for i in short]
    for tree in trees(together, n_sequences=engine.n_seq_max, n_tokens=size, n_outputs=n_outputs):
        engine.check_run(run)
        engine.context.clear()
        captured = tree.decode(engine.context, layers, logits=logits).states
        for index, rows in tree.rows_of(together):
            yield Seen(short[index], 0, _stacked(captured, layers, rows))
    for index in sorted(set(range(len(cut))) - set(short)):
        dense = len(cut[index].outputs) > n_outputs
        for first, states in _states_in_chunks(engine, run, cut[index], layers, n_outputs if dense else size):
            yield Seen(index, first, states)


def _states_in_chunks(
    engine: Engine, run: int, sequence: TokenSequence, layers: Sequence[int], size: int
) -> Iterator[tuple[int, np.ndarray]]:
    engine.check_run(run)
    engine.context.clear()
    wanted = np.zeros(len(sequence.tokens), bool)
    wanted[list(sequence.outputs)] = True
    nothing = np.zeros(len(wanted), bool)
    outputs = wanted if engine.model.n_layer - 1 in layers else nothing
    for start in range(0, len(wanted), size):
        engine.check_run(run)
        part = slice(start, min(start + size, len(wanted)))
        n_tokens, n_states = part.stop - start, int(wanted[part].sum())
        captured = engine.context.decode(
            sequence.tokens[part],
            np.arange(start, part.stop),
            np.zeros(n_tokens, int),
            outputs[part],
            plans=[sequence.plan] * n_tokens if sequence.plan else None,
            classes=sequence.classes[part],
            capture=layers if n_states else (),
            capture_tokens=wanted[part],
        ).states
        if n_states:
            yield int(wanted[:start].sum()), _stacked(captured, layers, slice(None))


def _cut(sequence: TokenSequence) -> TokenSequence:
    """The sequence without what follows its last output, since attention only looks back."""
    end = max(sequence.outputs) + 1
    return replace(sequence, tokens=sequence.tokens[:end], classes=sequence.classes[:end])


def _stacked(captured: dict[int, np.ndarray], layers: Sequence[int], rows: Any) -> np.ndarray:
    return np.stack([captured[layer][rows] for layer in layers], axis=1)


def score(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], on_progress: Progress = None
) -> list[float]:
    """Mean log-probability (natural) of each reply's tokens after its prompt. Raises PromptError."""
    for prompt, reply in pairs:
        if not len(prompt) or not len(reply):
            raise PromptError("a score needs a prompt and a reply of at least one token each.")
    # the last token of a reply is predicted, but never read
    sequences = [check_tokens(engine, [*prompt, *reply][:-1]) for prompt, reply in pairs]
    firsts = [len(prompt) - 1 for prompt, _ in pairs]
    totals = np.zeros(len(pairs))
    for piece, rows, _, outputs in passes(engine, sequences, firsts, size=wide_size(engine)):
        prompt, reply = pairs[piece.index]
        first = max(piece.start, len(prompt) - 1) + 1 - len(prompt)
        wanted = np.asarray(reply[first : first + outputs.stop - outputs.start], np.int64)
        totals[piece.index] += log_probabilities(rows.logits[outputs], wanted).sum()
        if on_progress:
            on_progress(piece.index + 1, len(pairs))
    return [float(total / len(reply)) for total, (_, reply) in zip(totals, pairs, strict=True)]


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log softmax of each row of (n, n_vocab) float32 logits at its token, (n,) float64."""
    if not len(tokens):
        return np.zeros(0)
    peak = logits.max(axis=1, keepdims=True)
    # float32 is exact to 1e-6 here, and takes a third of the time
    total = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
    return logits[np.arange(len(tokens)), tokens].astype(np.float64) - total


def wide_size(engine: Engine) -> int:
    """How many tokens fit in one decode if every token is an output."""
    return max(1, min(engine.context.n_batch, WIDE_BYTES // (4 * engine.model.n_vocab)))


def passes(
    engine: Engine,
    sequences: Sequence[np.ndarray],
    first_outputs: Sequence[int],
    *,
    size: int,
    plan: Plan | None = None,
    n_prompt: int | None = None,
    capture: Sequence[int] = (),
    capture_outputs: bool = False,
) -> Iterator[tuple[Piece, Rows, slice, slice]]:
    """Decode sequences from their start, as many at a time as fit into `size` tokens, longer ones in chunks.

    Tokens from `first_outputs[i]` on are outputs of sequence i. Yields for each piece the rows of its decode
    and where the piece is in them: a slice of the decode's tokens and a slice of its outputs.
    capture_outputs: record only the states of outputs.
    """
    if capture:
        engine.context.probe(capture)
    run = engine.begin()
    n_together = engine.n_seq_max if engine.context.kv_unified else 1
    for batch in pack([len(tokens) for tokens in sequences], size, n_together):
        engine.check_run(run)
        if batch[0].start == 0:
            engine.context.clear()
        joined = _Joined.of(batch, sequences, first_outputs)
        lengths = joined.lengths if n_prompt is None else n_prompt
        rows = engine.context.decode(
            joined.tokens,
            joined.positions,
            joined.owners,
            joined.outputs,
            plans=[plan] * len(joined.tokens) if plan else None,
            classes=position_classes(joined.positions, lengths),
            capture=capture,
            capture_tokens=joined.outputs if capture_outputs else None,
        )
        for piece, taken, outputs in joined.spans:
            yield piece, rows, taken, outputs


def pack(lengths: Sequence[int], size: int, n_seq_max: int) -> Iterator[list[Piece]]:
    """Pieces of one decode each: consecutive whole sequences, at most n_seq_max and `size` tokens together.

    A sequence longer than `size` comes by itself, in chunks, one after another.
    """
    batch: list[Piece] = []
    room = size
    for index, length in enumerate(lengths):
        if batch and (length > room or len(batch) == n_seq_max):
            yield batch
            batch, room = [], size
        if length > size:
            for start in range(0, length, size):
                yield [Piece(index, start, min(start + size, length))]
        else:
            batch.append(Piece(index, 0, length))
            room -= length
    if batch:
        yield batch


def _last_states_together(
    engine: Engine, sequences: Sequence[np.ndarray], size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode several sequences at once, computing the prefix that they share only once."""
    layers = list(range(engine.model.n_layer))
    engine.context.probe(layers)
    prompts = [
        TokenSequence(tokens.tolist(), [0] * (len(tokens) - 1) + [1], [len(tokens) - 1])
        for tokens in sequences
    ]
    run = engine.begin()
    for tree in trees(prompts, n_sequences=engine.n_seq_max, n_tokens=size, n_outputs=size):
        engine.check_run(run)
        engine.context.clear()
        states = tree.decode(engine.context, layers).states
        for index, (row,) in tree.rows_of(prompts):
            yield index, np.stack([states[layer][row] for layer in layers])


def _last_states(engine: Engine, sequences: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode sequences one after the other, long ones in chunks."""
    layers = list(range(engine.model.n_layer))
    for piece, rows, _, outputs in passes(
        engine,
        sequences,
        [len(tokens) - 1 for tokens in sequences],
        capture=layers,
        capture_outputs=True,
        size=engine.context.n_batch,
    ):
        if piece.stop == len(sequences[piece.index]):
            yield piece.index, np.stack([rows.states[layer][outputs.start] for layer in layers])


@dataclass(frozen=True)
class _Joined:
    """Pieces of several sequences as the arrays of one decode. spans: of tokens and of outputs, for each
    piece.

    lengths: for each token, the length of its sequence.
    """

    tokens: np.ndarray
    positions: np.ndarray
    owners: np.ndarray
    outputs: np.ndarray
    lengths: np.ndarray
    spans: list[tuple[Piece, slice, slice]]

    @classmethod
    def of(
        cls, batch: Sequence[Piece], sequences: Sequence[np.ndarray], first_outputs: Sequence[int]
    ) -> _Joined:
        spans = []
        n_tokens = n_outputs = 0
        for piece in batch:
            given = max(0, piece.stop - max(piece.start, first_outputs[piece.index]))
            taken = slice(n_tokens, n_tokens + piece.stop - piece.start)
            spans.append((piece, taken, slice(n_outputs, n_outputs + given)))
            n_tokens, n_outputs = taken.stop, n_outputs + given
        counts = [piece.stop - piece.start for piece in batch]
        positions = np.concatenate([np.arange(piece.start, piece.stop) for piece in batch])
        return cls(
            tokens=np.concatenate([sequences[piece.index][piece.start : piece.stop] for piece in batch]),
            positions=positions,
            owners=np.repeat(np.arange(len(batch)), counts),
            outputs=positions >= np.repeat([first_outputs[piece.index] for piece in batch], counts),
            lengths=np.repeat([len(sequences[piece.index]) for piece in batch], counts),
            spans=spans,
        )
