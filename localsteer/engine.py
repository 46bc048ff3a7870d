"""One loaded model and its doors: ask, stream, batch, states, logits. The work behind them is in runtime/."""

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
    rpc: HOST:PORT of llama.cpp's RPC servers, which hold and compute the model's layers (docs/scale.md); one
    that is gone raises HostError, and the next call loads the model anew. rpc_seconds: how long one may be
    silent. n_gpu_layers: None is none, and all of them with rpc.
    on_progress: called with 0.0 to 1.0 on load. Raises ModelFileError, UnsupportedModelError.
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
        self.piece, self.ends = self._tokenizer.piece, self._tokenizer.ends  # asked at every token
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
        """The reply as it comes: `.text .token .finish_reason`. fields: of Ask.

        Prompt, plan and settings are checked here and now. Raises PromptError, MismatchError, PlanError.
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

        fields: of Ask, the same for all; steer and sampling may be one for all or one each (ask.asks_for).
        """
        return generate.generate_batch(self, asks_for(prompts, **fields), on_progress=on_progress)

    # -- prompts and tokens ------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a question or messages through the model's chat template, or raw text.

        Raises PromptError when there is nothing in it.
        """
        self.check_open()
        return self._tokenizer.prompt_tokens(prompt, raw)

    def check_template(self) -> None:
        """A notice where there is none. Raises ModelFileError for one that leaves out what the user says."""
        self._tokenizer.check_template()

    def render(self, messages: Sequence[Message], **settings: Any) -> str:
        """The text of messages as the model reads it. settings: of ChatTemplate.render."""
        return self._tokenizer.render(messages, **settings)

    def rendered_tokens(self, text: str) -> list[int]:
        """Tokens of a text that a template rendered. This is how a vector's probes are tokenised too."""
        self.check_open()
        return self._tokenizer.rendered_tokens(text)

    @property
    def token_bytes(self) -> TokenBytes:
        """The tokens as constraints see them, for any thread; made at the first use (0.4 s for 49,000)."""
        self.check_open()
        return self._tokenizer.token_bytes

    def text(self, tokens: Sequence[int]) -> str:
        """Special tokens have none. `piece(token)`: its bytes; `ends(token)`: whether it ends a reply."""
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
        """(n_tokens, n_vocab) float32, of one forward pass.

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
        """(n_tokens, len(layers), n_embd) float32: the residual stream after each layer of `layers`, 0-based.

        A steered layer is seen after its edit. Raises PlanError for a layer out of range.
        """
        plan, tokens = self.plan(steer), limits.check_tokens(self, token_ids, n_prompt)
        return forward.hidden_states(self, tokens, limits.check_layers(self, layers), plan, n_prompt)

    def last_hidden_states(
        self, prompts: Sequence[Sequence[int]], *, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """(n_prompts, n_layer, n_embd) float32: every layer's state at each last token, unsteered."""
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
        """(index, first, states) piece by piece, in the memory of one decode: states are (n, len(layers),
        n_embd) float32, at the chosen `positions` of sequence `index` from its `first` one on.

        positions: of each sequence, ascending, at least one. n_prompts: how many tokens of each are prompt,
        for the positions of a plan; None: all. The sequences come in any order.
        """
        plan, layers = self.plan(steer), limits.check_layers(self, layers)
        rows = forward.rows_at(self, sequences, positions, n_prompts, plan)
        return forward.states_at(self, rows, layers)

    def find_part(self, token_ids: Sequence[int], part: str) -> range | None:
        """The tokens that spell the last occurrence of a text, in part or whole; None where there is none."""
        return self._tokenizer.find_part(token_ids, part)

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
        return forward.score(self, pairs, on_progress)
