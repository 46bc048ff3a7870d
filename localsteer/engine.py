"""One loaded model: prompts, plans and decodes. What turns decodes into text is generate.py and batch.py.

Every call here decodes through `_evaluate` or, token by token, through generate.py; both go to bridge/, which
alone knows llama.cpp.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .constrain import END, Constraint, Matcher, TokenBytes
from .errors import LocalsteerError, ModelFileError, PlanError, PromptError
from .plan import position_classes
from .runtime.attach import Attaching, Notices, Steer
from .runtime.bridge import Context, Model, check_threads
from .runtime.prefix import TokenSequence, trees
from .templates import DROPS_WORDS, NO_TEMPLATE, ChatTemplate, Message

if TYPE_CHECKING:
    from .plan import Plan
    from .runtime.bridge import Rows
    from .runtime.generate import Chunk, Reply, Sampling

Prompt = str | Sequence[Message]

DEFAULT_N_CTX = 4096  # tokens of one sequence, where the model would allow more: its cache costs memory
DEFAULT_N_SEQ_MAX = 8
POOL_BYTES = 512 << 20  # of KV cache that several sequences may take together beyond one whole sequence
WIDE_BYTES = 64 << 20  # of logits that one decode may return when every token is an output


class Piece(NamedTuple):
    """Tokens start to stop (exclusive) of sequence `index`, as part of one decode."""

    index: int
    start: int
    stop: int


class Engine:
    """Thread-hostile: one engine serves one thread and one reply at a time (or one `generate_batch`).

    A call that decodes ends a stream that is still open: its next chunk raises LocalsteerError. A stream
    that is closed, or left by Ctrl-C, leaves the engine usable. After `close` every call raises.

    path: a GGUF model. n_ctx: tokens that one sequence may hold, prompt and reply together; at most, and by
    default up to 4096 of, what the model was trained for. n_seq_max: sequences decoded together by the calls
    that take many. n_cells: tokens that all of them may hold together (None: chosen by memory).
    kv_unified: they share one cache; False gives each its own, of n_ctx tokens: many long sequences are
    decoded faster, for more memory, and a prefix that two of them have is copied.
    exact: F32 KV cache and no flash attention, for comparisons. plain_prompts: `Q: ...` / `A:` in place
    of the file's chat template, which a base model has often inherited without ever having read it. In this
    form, which is also that of a file without a template, a reply ends before the next `Q:`.
    on_progress: called with 0.0 to 1.0 on load.
    Raises ModelFileError, UnsupportedModelError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_seq_max: int = DEFAULT_N_SEQ_MAX,
        n_batch: int = 512,
        n_cells: int | None = None,
        kv_unified: bool = True,
        n_gpu_layers: int = 0,
        exact: bool = False,
        plain_prompts: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self.path = Path(path)
        for name, value in {"n_seq_max": n_seq_max, "n_batch": n_batch, "n_cells": n_cells}.items():
            if value is not None and value < 1:
                raise LocalsteerError(f"{name} must be at least 1, not {value}.")
        if n_cells is not None and not kv_unified:
            raise LocalsteerError("n_cells is for a unified cache: without one each sequence has n_ctx.")
        check_threads(n_threads)
        self._closed = False
        self.notice = Notices()
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {END: True}
        self._token_bytes: TokenBytes | None = None
        self._token_bytes_lock = threading.Lock()
        self._run = 0
        self._leaving: list[Callable[[], None]] = []
        self.model = Model(path, n_gpu_layers=n_gpu_layers, on_progress=on_progress)
        try:
            self.n_ctx = self._context_length(n_ctx)
            self.n_seq_max = self._sequences(n_seq_max)
            self.context = Context(
                self.model,
                n_ctx=max(self.n_ctx, n_cells or self._cells(exact, kv_unified)),
                n_seq_max=self.n_seq_max,
                n_batch=max(n_batch, self.n_seq_max),
                n_threads=n_threads,
                exact=exact,
                kv_unified=kv_unified,
            )
        except BaseException:
            self.model.close()
            raise
        self.n_cells = self.context.n_ctx
        self.template = ChatTemplate(
            None if plain_prompts else self.model.chat_template,
            bos=self._token_text("bos"),
            eos=self._token_text("eos"),
        )
        self._attaching = Attaching(
            self.path,
            shape=(self.model.n_layer, self.model.n_embd, self.model.architecture),
            template_hash=self.template.template_hash,
            tokenize=partial(_rendered_tokens, self.model, self.template),
            probe=self.context.probe,
            notice=self.notice,
        )

    def close(self) -> None:
        """Free the context, then the model. A second call does nothing."""
        if not self._closed:
            for leave in self._leaving:
                leave()
            self._closed = True
            self.context.close()
            self.model.close()

    def before_close(self, leave: Callable[[], None]) -> None:
        """Call a function before the context goes: who decodes in a thread must stop first."""
        self._leaving.append(leave)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- text: the doors to generate.py and batch.py ------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        steer: Steer = (),
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Reply:
        """The whole reply at once: `.text .tokens .finish_reason .timings`. See generate.generate."""
        from .runtime import generate

        return generate.generate(
            self, prompt, steer=steer, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        steer: Steer = (),
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Iterator[Chunk]:
        """The reply as it comes: `.text .token .finish_reason`. See generate.stream."""
        from .runtime import generate

        return generate.stream(
            self, prompt, steer=steer, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        steer: Steer | Sequence[Steer] = (),
        max_tokens: int | None = 512,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """Many replies, up to n_seq_max at a time in one decode. See batch.generate_batch."""
        from .runtime import batch

        return batch.generate_batch(
            self,
            prompts,
            steer=steer,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            raw=raw,
            on_progress=on_progress,
        )

    # -- prompts -----------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a question or messages through the model's chat template, or raw text.

        Raises PromptError when there is nothing in it.
        """
        self._check_open()
        if raw and not isinstance(prompt, str):
            raise PromptError("a raw prompt is one text: messages need the chat template.")
        if raw and not prompt:
            raise PromptError("the prompt is empty: give a text to continue.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.rendered_tokens(prompt if raw else self.render(messages))

    def check_template(self) -> None:
        """A notice where the model has no chat template; none where plain prompts were asked for.

        Raises ModelFileError for a template that leaves out what the user says.
        """
        if self.template.is_fallback and not self.model.chat_template:
            self.notice(NO_TEMPLATE.format(self.path.name))
        if not self.template.keeps_words:
            raise ModelFileError(DROPS_WORDS.format(self.path.name))

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of messages as the model reads it, ready for its reply. tools: see ChatTemplate.render."""
        self.check_template()
        return self.template.render(messages, tools=tools)

    def rendered_tokens(self, text: str) -> list[int]:
        """Tokens of a text that a template rendered. This is how a vector's probes are tokenised too."""
        self._check_open()
        tokens = _rendered_tokens(self.model, self.template, text)
        if not tokens:
            raise PromptError("the prompt is empty: it has no tokens.")
        return tokens

    def piece(self, token: int) -> bytes:
        """The bytes of one token; special tokens have none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self.model.token_to_piece(token)
        return known

    def ends(self, token: int) -> bool:
        """Whether a token ends the reply."""
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = self.model.is_eog(token)
        return known

    @property
    def token_bytes(self) -> TokenBytes:
        """The tokens as constraints see them, for any thread; made at the first use (0.4 s for 49,000)."""
        self._check_open()
        with self._token_bytes_lock:
            if self._token_bytes is None:
                self._token_bytes = TokenBytes(self.model.pieces(), self.model.ends())
            return self._token_bytes

    def matcher(self, constraint: Constraint) -> Matcher:
        """What keeps one reply to a constraint. Raises ConstraintError for what can't be read or enforced."""
        return self.token_bytes.matcher(constraint)

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    # -- plans -------------------------------------------------------------------------------------

    def plan(self, steer: Steer) -> Plan | None:
        """The plan of one sequence, checked against this model; None when it changes nothing.

        Raises MismatchError for a vector of another model, PlanError, UnsupportedModelError.
        """
        self._check_open()
        return self._attaching.plan(steer)

    # -- numbers -----------------------------------------------------------------------------------

    def logits(
        self, token_ids: Sequence[int], *, steer: Steer = (), n_prompt: int | None = None
    ) -> np.ndarray:
        """(n_tokens, n_vocab) float32, of one forward pass.

        n_prompt: how many of the tokens are prompt, for the positions of a plan; None: all of them.
        """
        plan = self.plan(steer)
        tokens = self._checked_tokens(token_ids, n_prompt)
        result = np.empty((len(tokens), self.model.n_vocab), np.float32)
        for piece, rows, _, outputs in self._evaluate(
            [tokens], [0], plan=plan, n_prompt=n_prompt, size=self._wide_size
        ):
            result[piece.start : piece.stop] = rows.logits[outputs]
        return result

    def hidden_states(
        self,
        token_ids: Sequence[int],
        layers: Sequence[int],
        *,
        steer: Steer = (),
        n_prompt: int | None = None,
    ) -> np.ndarray:
        """(n_tokens, len(layers), n_embd) float32: the residual stream after each block of `layers`, 0-based.

        A steered block is seen after its edit. Raises PlanError for a block out of range.
        """
        plan = self.plan(steer)
        tokens = self._checked_tokens(token_ids, n_prompt)
        layers = self._checked_layers(layers)
        # the last block keeps only the rows of outputs
        every = self.model.n_layer - 1 in layers
        result = np.empty((len(tokens), len(layers), self.model.n_embd), np.float32)
        for piece, rows, taken, _ in self._evaluate(
            [tokens],
            [0 if every else len(tokens) - 1],
            plan=plan,
            n_prompt=n_prompt,
            capture=layers,
            size=self._wide_size if every else self.context.n_batch,
        ):
            for i, layer in enumerate(layers):
                result[piece.start : piece.stop, i] = rows.states[layer][taken]
        return result

    def last_hidden_states(
        self, prompts: Sequence[Sequence[int]], *, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """(n_prompts, n_layer, n_embd) float32: every block's state at each last token, unsteered."""
        sequences = [self._checked_tokens(tokens) for tokens in prompts]
        size = min(self.context.n_batch, self.n_cells)
        if self.n_seq_max > 1 and self.context.kv_unified and all(len(each) <= size for each in sequences):
            states = self._last_states_together(sequences, size)
        else:
            states = self._last_states(sequences)
        result = np.empty((len(sequences), self.model.n_layer, self.model.n_embd), np.float32)
        for done, (index, layers) in enumerate(states, 1):
            result[index] = layers
            if on_progress:
                on_progress(done, len(sequences))
        return result

    def _last_states_together(
        self, sequences: Sequence[np.ndarray], size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Several in one decode, the beginning that they share computed once."""
        layers = list(range(self.model.n_layer))
        self.context.probe(layers)
        prompts = [
            TokenSequence(tokens.tolist(), [0] * (len(tokens) - 1) + [1], [len(tokens) - 1])
            for tokens in sequences
        ]
        run = self.begin()
        for tree in trees(prompts, n_sequences=self.n_seq_max, n_tokens=size, n_outputs=size):
            self.check_run(run)
            self.context.clear()
            states = tree.decode(self.context, layers).states
            for index, (row,) in tree.rows_of(prompts):
                yield index, np.stack([states[layer][row] for layer in layers])

    def _last_states(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """One after the other, long ones in chunks."""
        layers = list(range(self.model.n_layer))
        for piece, rows, _, outputs in self._evaluate(
            sequences,
            [len(tokens) - 1 for tokens in sequences],
            capture=layers,
            capture_outputs=True,
            size=self.context.n_batch,
        ):
            if piece.stop == len(sequences[piece.index]):
                yield piece.index, np.stack([rows.states[layer][outputs.start] for layer in layers])

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Mean log-probability (natural) of each reply's tokens after its prompt, unsteered.

        pairs: (prompt ids, reply ids). exp(-score) is the reply's perplexity. on_progress: called with (pair
        at work, pairs) after each decode of it. Raises PromptError for an empty prompt or reply.
        """
        for prompt, reply in pairs:
            if not len(prompt) or not len(reply):
                raise PromptError("a score needs a prompt and a reply of at least one token each.")
        # the last token of a reply is predicted but never read
        sequences = [self._checked_tokens([*prompt, *reply][:-1]) for prompt, reply in pairs]
        firsts = [len(prompt) - 1 for prompt, _ in pairs]
        totals = np.zeros(len(pairs))
        for piece, rows, _, outputs in self._evaluate(sequences, firsts, size=self._wide_size):
            prompt, reply = pairs[piece.index]
            first = max(piece.start, len(prompt) - 1) + 1 - len(prompt)
            wanted = np.asarray(reply[first : first + outputs.stop - outputs.start], np.int64)
            totals[piece.index] += _log_probabilities(rows.logits[outputs], wanted).sum()
            if on_progress:
                on_progress(piece.index + 1, len(pairs))
        return [float(total / len(reply)) for total, (_, reply) in zip(totals, pairs, strict=True)]

    # -- decoding ----------------------------------------------------------------------------------

    def begin(self) -> int:
        """Take the context for a new run, forgetting what it held. Returns the run's number."""
        self._check_open()
        self._run += 1
        self.context.clear()
        return self._run

    def check_run(self, run: int) -> None:
        """Raise LocalsteerError when another call has taken the context since `begin`."""
        self._check_open()
        if run != self._run:
            raise LocalsteerError(
                "this stream was ended by another call on its engine: finish or close a stream first."
            )

    def _evaluate(
        self,
        sequences: Sequence[np.ndarray],
        first_outputs: Sequence[int],
        *,
        size: int,
        plan: Plan | None = None,
        n_prompt: int | None = None,
        capture: Sequence[int] = (),
        capture_outputs: bool = False,
    ) -> Iterator[tuple[Piece, Rows, slice, slice]]:
        """Decode sequences from their start, as many as fit `size` tokens at a time, longer ones in chunks.

        Tokens from `first_outputs[i]` on are outputs of sequence i. Yields for each piece its decode's rows
        and where the piece is in them: a slice of the decode's tokens and a slice of its outputs.
        capture_outputs: record the states of outputs alone.
        """
        if capture:
            self.context.probe(capture)
        run = self.begin()
        n_together = self.n_seq_max if self.context.kv_unified else 1
        for batch in pack([len(tokens) for tokens in sequences], size, n_together):
            self.check_run(run)
            if batch[0].start == 0:
                self.context.clear()
            joined = _Joined.of(batch, sequences, first_outputs)
            lengths = joined.lengths if n_prompt is None else n_prompt
            rows = self.context.decode(
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

    # -- checks and sizes --------------------------------------------------------------------------

    @property
    def _wide_size(self) -> int:
        """Tokens of one decode whose every token is an output."""
        return max(1, min(self.context.n_batch, WIDE_BYTES // (4 * self.model.n_vocab)))

    def _context_length(self, asked: int | None) -> int:
        trained = self.model.n_ctx_train
        if asked is None:
            return min(trained, DEFAULT_N_CTX)
        if asked < 1:
            raise LocalsteerError(f"n_ctx must be at least 1, not {asked}.")
        if asked > trained:
            # beyond it llama.cpp aborts where positions are learnt (gpt2), and others answer nonsense
            raise LocalsteerError(
                f"n_ctx {asked} is longer than the {trained} tokens that {self.path.name} was trained for: "
                f"choose at most {trained}."
            )
        return asked

    def _sequences(self, asked: int) -> int:
        why = self.model.why_not_steerable(asked)
        if asked > 1 and why and not self.model.why_not_steerable(1):
            self.notice(f"{self.path.name} is decoded one sequence at a time: {why}.")
            return 1
        return asked

    def _cells(self, exact: bool, kv_unified: bool) -> int:
        """Tokens that all sequences may hold together; keys and values of one cost `cell_bytes` at most."""
        if not kv_unified:
            return self.n_ctx * self.n_seq_max
        cell_bytes = 2 * (4 if exact else 2) * self.model.n_layer * self.model.n_embd
        return min(self.n_ctx * self.n_seq_max, POOL_BYTES // cell_bytes)

    def _token_text(self, name: str) -> str:
        token = getattr(self.model, name)
        if token is None or token < 0:
            return ""
        return self.model.token_to_piece(token, special=True).decode("utf-8", "replace")

    def _checked_tokens(self, token_ids: Sequence[int], n_prompt: int | None = None) -> np.ndarray:
        self._check_open()
        tokens = np.asarray(token_ids, np.int32)
        if tokens.ndim != 1 or not len(tokens):
            raise PromptError("the prompt is empty: give at least one token.")
        if len(tokens) > self.n_ctx:
            more = ", or raise n_ctx (-c)" if self.n_ctx < self.model.n_ctx_train else ""
            raise PromptError(
                f"{len(tokens)} tokens are more than the context of {self.n_ctx} tokens: shorten the "
                f"prompt{more}."
            )
        if tokens.min() < 0 or tokens.max() >= self.model.n_vocab:
            raise PromptError(f"token ids must be 0 to {self.model.n_vocab - 1}.")
        if n_prompt is not None and not 0 <= n_prompt <= len(tokens):
            raise PromptError(f"n_prompt must be 0 to the {len(tokens)} tokens given, not {n_prompt}.")
        return tokens

    def _checked_layers(self, layers: Sequence[int]) -> list[int]:
        n_layer = self.model.n_layer
        for layer in layers:
            if not 0 <= layer < n_layer:
                raise PlanError(
                    f"layer {layer} is out of range: {self.path.name} has blocks 0 to {n_layer - 1}."
                )
        return [int(layer) for layer in layers]

    def _check_open(self) -> None:
        if self._closed:
            raise LocalsteerError(f"the engine of {self.path.name} is closed.")


@dataclass(frozen=True)
class _Joined:
    """Pieces of several sequences as the arrays of one decode. spans: of its tokens, and of its outputs.

    lengths: of its sequence, for each token.
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


def _rendered_tokens(model: Model, template: ChatTemplate, text: str) -> list[int]:
    return model.tokenize(text, add_special=template.adds_special(text), parse_special=True)


def pack(lengths: Sequence[int], size: int, n_seq_max: int) -> Iterator[list[Piece]]:
    """Pieces of one decode each: consecutive whole sequences, at most n_seq_max and `size` tokens together.

    A sequence longer than `size` comes alone, in chunks, one after another.
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


def _log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n,) float64: log softmax of each row at its token."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return logits[np.arange(len(tokens)), tokens] - total
