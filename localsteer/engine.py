"""One loaded model, with methods to ask, stream, batch, and read states and logits. runtime/ does the
work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .runtime import forward, generate, limits
from .runtime.ask import Ask, Prompt, asks_for
from .runtime.attach import Attaching, Steer
from .runtime.opened import Capacity, Opened
from .runtime.rpc import RPC_SECONDS
from .runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .constrain import TokenBytes
    from .plan import Plan
    from .runtime.reply import Chunk, Reply
    from .templates import Message


class Engine(Opened):
    """A loaded model. Not thread-safe: one engine serves one thread and one reply (or `generate_batch`) at a
    time.

    A call that decodes ends a stream that is still open: its next chunk raises LocalsteerError. Closing a
    stream, or leaving it by Ctrl-C, leaves the engine usable. After `close` every call raises.

    path: a GGUF model. n_ctx: tokens that one sequence may hold, prompt and reply together; at most what the
    model was trained for, by default also at most 4096. n_seq_max: sequences decoded together by the calls
    that take many. n_cells: tokens that all of them may hold together (None: chosen by memory). kv_unified:
    all sequences share one cache; False gives each its own of n_ctx tokens, which decodes many long sequences
    faster, takes more memory, and copies a prefix that two of them share. exact: F32 KV cache and no flash
    attention, for comparisons. plain_prompts: use `Q: ...` / `A:` instead of the file's chat template, which
    a base model often inherits without having been trained on it. In this form, which is also used for a file
    without a template, a reply ends before the next `Q:` or `A:`. rpc: HOST:PORT of llama.cpp's RPC servers,
    which hold and compute the model's layers (docs/scale.md). Losing one raises HostError, and the next call
    loads the model again. rpc_seconds: how long a host may be silent. n_gpu_layers: None means none, but all
    of them with rpc. on_progress: called with 0.0 to 1.0 during the load. Raises ModelFileError,
    UnsupportedModelError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_seq_max: int = limits.DEFAULT_N_SEQ_MAX,
        n_batch: int = 512,
        n_cells: int | None = None,
        kv_unified: bool = True,
        n_gpu_layers: int | None = None,
        exact: bool = False,
        plain_prompts: bool = False,
        rpc: str | Sequence[str] = (),
        rpc_seconds: float = RPC_SECONDS,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(
            path,
            Capacity(
                n_ctx=n_ctx,
                n_threads=n_threads,
                n_seq_max=n_seq_max,
                n_batch=n_batch,
                n_cells=n_cells,
                kv_unified=kv_unified,
                exact=exact,
            ),
            rpc=rpc,
            rpc_seconds=rpc_seconds,
            n_gpu_layers=n_gpu_layers,
            on_progress=on_progress,
        )
        self._tokenizer = Tokenizer(self.model, self.path.name, self.notice, plain_prompts=plain_prompts)
        self.template = self._tokenizer.template
        self.piece, self.ends = self._tokenizer.piece, self._tokenizer.ends  # called at every token
        self._attaching = Attaching(
            self.path,
            shape=(self.model.n_layer, self.model.n_embd, self.model.architecture),
            template_hash=self.template.template_hash,
            tokenize=self._tokenizer.tokenize,
            probe=self.context.probe,
            notice=self.notice,
        )

    # -- replies -----------------------------------------------------------------------------------

    def generate(self, prompt: Prompt | Ask, **fields: Any) -> Reply:
        """The whole reply at once: `.text .tokens .finish_reason .timings`. fields: of Ask."""
        return generate.generate(self, Ask.of(prompt, **fields))

    def stream(self, prompt: Prompt | Ask, **fields: Any) -> Iterator[Chunk]:
        """Chunks of the reply as they are generated: `.text .token .finish_reason`. fields: of Ask.

        Prompt, plan and settings are checked before this returns. Raises PromptError, MismatchError,
        PlanError.
        """
        return generate.stream(self, Ask.of(prompt, **fields))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        **fields: Any,
    ) -> list[Reply]:
        """Many replies, up to n_seq_max at a time in one decode (generate.generate_batch).

        fields: of Ask, the same for all; steer and sampling may also be one for each prompt (ask.asks_for).
        """
        return generate.generate_batch(self, asks_for(prompts, **fields), on_progress=on_progress)

    # -- prompts and tokens ------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a question or messages through the model's chat template, or raw text.

        Raises PromptError if it is empty.
        """
        self.check_open()
        return self._tokenizer.prompt_tokens(prompt, raw)

    def check_template(self) -> None:
        """Print a notice if there is no chat template. Raises ModelFileError if it drops what the user
        says."""
        self._tokenizer.check_template()

    def render(self, messages: Sequence[Message], **settings: Any) -> str:
        """The text of messages as the model reads it. settings: arguments of ChatTemplate.render."""
        return self._tokenizer.render(messages, **settings)

    def rendered_tokens(self, text: str) -> list[int]:
        """Tokens of a text that a template rendered. A vector's probes are tokenised in this way too."""
        self.check_open()
        return self._tokenizer.rendered_tokens(text)

    @property
    def token_bytes(self) -> TokenBytes:
        """The tokens as constraints see them, usable in any thread; made at first use (0.4 s for 49,000)."""
        self.check_open()
        return self._tokenizer.token_bytes

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens have none. See also `piece(token)`, its bytes, and
        `ends(token)`, whether it ends a reply."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    # -- plans and numbers -------------------------------------------------------------------------

    def plan(self, steer: Steer) -> Plan | None:
        """The plan of one sequence, checked against this model; None when it changes nothing.

        Raises MismatchError for a vector of another model, PlanError, UnsupportedModelError.
        """
        self.check_open()
        return self._attaching.plan(steer)

    def logits(
        self, token_ids: Sequence[int], *, steer: Steer = (), n_prompt: int | None = None
    ) -> np.ndarray:
        """Logits of one forward pass, (n_tokens, n_vocab) float32.

        n_prompt: how many of the tokens are prompt, for the positions of a plan; None: all of them.
        """
        plan = self.plan(steer)
        return forward.logits(self, limits.check_tokens(self, token_ids, n_prompt), plan, n_prompt)

    def hidden_states(
        self,
        token_ids: Sequence[int],
        layers: Sequence[int],
        *,
        steer: Steer = (),
        n_prompt: int | None = None,
    ) -> np.ndarray:
        """The residual stream after each layer of `layers` (0-based): (n_tokens, len(layers), n_embd)
        float32.

        The state of a steered layer is taken after its edit. Raises PlanError for a layer out of range.
        """
        plan, tokens = self.plan(steer), limits.check_tokens(self, token_ids, n_prompt)
        return forward.hidden_states(self, tokens, limits.check_layers(self, layers), plan, n_prompt)

    def last_hidden_states(
        self, prompts: Sequence[Sequence[int]], *, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Every layer's state at the last token of each prompt, unsteered: (n_prompts, n_layer, n_embd)
        float32."""
        return forward.last_hidden_states(
            self, [limits.check_tokens(self, ids) for ids in prompts], on_progress
        )

    def states_at(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        *,
        steer: Steer = (),
        n_prompts: Sequence[int] | None = None,
    ) -> Iterator[forward.Seen]:
        """Yields (index, first, states) piece by piece, in the memory of one decode: states are (n,
        len(layers), n_embd) float32, at the chosen `positions` of sequence `index`, starting at its `first`
        position.

        positions: for each sequence at least one, ascending. n_prompts: how many tokens of each are prompt,
        for the positions of a plan; None: all. Sequences come in any order.
        """
        plan, layers = self.plan(steer), limits.check_layers(self, layers)
        rows = forward.rows_at(self, sequences, positions, n_prompts, plan)
        return forward.states_at(self, rows, layers)

    def find_part(self, token_ids: Sequence[int], part: str) -> range | None:
        """The tokens that spell the last occurrence of a text, in part or whole; None if it does not
        occur."""
        return self._tokenizer.find_part(token_ids, part)

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Mean log-probability (natural) of each reply's tokens after its prompt, unsteered.

        pairs: (prompt ids, reply ids). exp(-score) is the reply's perplexity. on_progress: called with
        (current pair, pairs) after each of its decodes. Raises PromptError for an empty prompt or reply.
        """
        return forward.score(self, pairs, on_progress)
