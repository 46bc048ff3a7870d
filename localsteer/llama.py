"""llama-cpp-python's Llama with steering: a drop-in for code written for `llama_cpp.Llama`.

    llama = localsteer.SteeredLlama("model.gguf", n_ctx=4096)
    llama.steer([vector])
    llama.create_chat_completion(messages)
    with llama.steering([other]):
        llama("Once upon a time")

All decodes of Llama go through `eval` (or `embed`). Here, `eval` also makes sure that everything before the
new tokens was computed under the same edits, and computes it again from the first position that was not. This
keeps the prefix cache, loaded states and state caches correct, whatever matched their tokens.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.bridge import (
    BorrowedContext,
    BorrowedModel,
    Hook,
    batch_arrays,
    check_gguf,
    check_llama_grammar,
    check_threads,
    check_version,
    install,
    our_log,
    set_extra_bufts,
)  # before llama_cpp: bridge/openmp.py

# isort: split
import llama_cpp
import numpy as np

from .errors import LocalsteerError, ModelFileError, PromptError, UnsupportedModelError
from .llama_cache import KeyedCache
from .plan import position_classes
from .runtime.attach import Attaching, Notices, Steer
from .runtime.kv import class_keys
from .templates import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import BaseLlamaCache, LlamaState
    from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel

    from .plan import Plan

_GENERATE = inspect.signature(llama_cpp.Llama.generate)


@dataclass(frozen=True)
class _Request:
    """What a call keeps from its beginning to its end. number, n_prompt: for a call that generates."""

    plan: Plan | None
    number: int | None = None
    n_prompt: int | None = None


class _Decode:
    """Replaces LlamaContext.decode: with a plan, a batch goes through the hook, without one as usual.

    n_prompt: None means that the sequences of the batch are whole prompts.
    """

    def __init__(self, context: BorrowedContext, plain: Callable[[LlamaBatch], None], embeds: bool) -> None:
        self._context, self._plain, self._embeds = context, plain, embeds
        self._plan: Plan | None = None
        self._n_prompt: int | None = None

    @contextmanager
    def under(self, plan: Plan | None, n_prompt: int | None) -> Iterator[None]:
        self._plan, self._n_prompt = plan, n_prompt
        try:
            yield
        finally:
            self._plan = None

    def __call__(self, batch: LlamaBatch) -> None:
        if self._plan is None:
            self._plain(batch)
            return
        arrays = batch_arrays(batch)
        lengths = self._n_prompt
        if lengths is None:
            lengths = np.bincount(arrays.seq_ids)[arrays.seq_ids]
        classes = position_classes(arrays.positions, lengths)
        self._context.decode(*arrays, plans=[self._plan] * len(classes), classes=classes)
        if not self._embeds and not np.isfinite(self._context.logits(-1).max()):
            raise LocalsteerError("the model gave no finite logits: lower the strength of the steering.")


class SteeredLlama(llama_cpp.Llama):
    """A llama_cpp.Llama whose replies are steered; unsteered it answers exactly as that class does.

    One thread at a time: a call while another decodes raises LocalsteerError. A stream keeps the plan under
    which it was started; another call that decodes ends it, and its next chunk raises.

    steer: initial steering, as for `steer`. use_extra_bufts: None means weight repacking as Engine chooses
    it. A decode must be one micro-batch, so n_batch is lowered to n_ubatch (with `embedding`, n_ubatch raised
    to n_batch); both are 512 by default. Everything else: llama_cpp.Llama. Raises ModelFileError for a file
    that is not a model, MismatchError, PlanError, UnsupportedModelError.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        steer: Steer = None,
        use_extra_bufts: bool | None = None,
        n_batch: int = 512,
        n_ubatch: int = 512,
        embedding: bool = False,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        check_version()
        n_gpu_layers = options.get("n_gpu_layers", 0)
        check_gguf(model_path, n_gpu_layers=n_gpu_layers, use_extra_bufts=use_extra_bufts)
        self._asked_extra_bufts = use_extra_bufts
        self._plan: Plan | None = None
        self._lock = threading.RLock()
        self._local = threading.local()  # .request: what this thread is working on
        self._n_requests = 0
        self._n_prompt: int | None = None  # of tokens given to `eval` by hand; None: all so far
        # the edits that each live position was computed under; None: not by eval, as images are
        self._edits: list[bytes | None] = []
        self._right_for: object = None  # (keys, n_prompt) that all of _edits are known to agree with
        self._attaching: Attaching | None = None
        if min(n_batch, n_ubatch) < 1:
            raise LocalsteerError(f"n_batch and n_ubatch must be at least 1, not {n_batch} and {n_ubatch}.")
        for name in ("n_threads", "n_threads_batch"):
            check_threads(options.get(name))
        n_batch = n_batch if embedding else min(n_batch, n_ubatch)
        sizes = {"n_batch": n_batch, "n_ubatch": n_batch, "embedding": embedding, "verbose": verbose}
        self._load(os.fspath(model_path), {**options, **sizes})
        self.steer(steer)

    def _load(self, path: str, options: dict[str, Any]) -> None:
        if options["verbose"]:  # then its reasons are on the screen
            super().__init__(path, **options)
            return
        with our_log() as log:
            try:
                super().__init__(path, **options)
            except ValueError as error:
                if "Failed to load model" in str(error):
                    raise ModelFileError(f"{path} can't be loaded: {log.why()}.") from None
                if "Failed to create llama_context" in str(error):
                    raise LocalsteerError(f"no context for {path}: {log.why()}. Try a smaller one.") from None
                raise

    # -- steering ----------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan that steers the next call, or None."""
        return self._plan

    def steer(self, steer: Steer) -> None:
        """Steer every call from now on by vectors or a plan, instead of the previous ones.

        They are checked at once: raises MismatchError, PlanError, UnsupportedModelError.
        """
        self._plan = self._checked_plan(steer)

    def unsteer(self) -> None:
        self._plan = None

    @contextmanager
    def steering(self, steer: Steer) -> Iterator[SteeredLlama]:
        """Steer the calls made inside the `with` block; a stream started there keeps its steering."""
        before = self._plan
        self._plan = self._checked_plan(steer)
        try:
            yield self
        finally:
            self._plan = before

    def _checked_plan(self, steer: Steer) -> Plan | None:
        self._check_open()
        if self._attaching is not None:
            return self._attaching.plan(steer)
        if steer is None or (isinstance(steer, Sequence) and not steer):
            return None
        raise UnsupportedModelError(f"{self.model_path} can't be steered: only its vocabulary was loaded.")

    # -- what Llama.__init__ makes, caught on its way ------------------------------------------------

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        set_extra_bufts(params, self._asked_extra_bufts)
        self._model_params = params

    @property
    def _model(self) -> LlamaModel:
        return self._llama_model

    @_model.setter
    def _model(self, model: LlamaModel) -> None:
        """Install the hook: the model is loaded, and its context does not exist yet."""
        self._llama_model = model
        self._hook: Hook | None = None
        if self.model_params.vocab_only:
            return
        self._borrowed = BorrowedModel(Path(self.model_path), model.model)
        self._hook = Hook(self._borrowed.n_layer, self._borrowed.n_embd)
        self._stack.callback(self._hook.close)  # the stack frees the context before, the model after it
        install(self._hook, self.context_params)

    @property
    def _ctx(self) -> LlamaContext:
        return self._llama_context

    @_ctx.setter
    def _ctx(self, context: LlamaContext) -> None:
        self._llama_context = context
        if self._hook is None:
            return
        params = self.context_params
        borrowed = BorrowedContext(self._borrowed, context.ctx, self._hook, swa_full=params.swa_full)
        self._decode = context.decode = _Decode(borrowed, context.decode, params.embeddings)
        template = _template(self._borrowed)
        tokenizer = self.tokenizer_  # a custom one must agree with the vectors' as well

        def tokenize(text: str) -> list[int]:
            return list(tokenizer.tokenize(text.encode("utf-8"), template.adds_special(text), True))

        self._attaching = Attaching(
            self._borrowed.path,
            shape=(self._borrowed.n_layer, self._borrowed.n_embd, self._borrowed.architecture),
            template_hash=template.template_hash,
            tokenize=tokenize,
            probe=borrowed.probe,
            notice=Notices(),
        )

    def close(self) -> None:
        """Free the model. A second call does nothing; any other call then raises LocalsteerError."""
        if hasattr(self, "_stack"):
            super().close()

    def _check_open(self) -> None:
        if self._ctx.ctx is None:
            raise LocalsteerError(f"the SteeredLlama of {self.model_path} is closed.")

    # -- requests: each keeps its plan, and the model to itself --------------------------------------

    @property
    def _request(self) -> _Request:
        return getattr(self._local, "request", None) or _Request(self._plan)

    @contextmanager
    def _serving(self, request: _Request) -> Iterator[None]:
        """Decode for a request; another thread is refused meanwhile, and so is a stream that was ended."""
        if not self._lock.acquire(blocking=False):
            raise LocalsteerError(
                "this SteeredLlama is in use by another thread: take turns, or give each thread its own."
            )
        before = getattr(self._local, "request", None)
        self._local.request = request
        try:
            self._check_open()
            if request.number not in (None, self._n_requests):
                raise LocalsteerError(
                    "this stream was ended by another call on its model: finish or close a stream first."
                )
            yield
        finally:
            self._local.request = before
            self._lock.release()

    def _steps(self, request: _Request, steps: Iterator[Any]) -> Generator[Any, Any, None]:
        """A generator of Llama, each of its steps as part of the request."""
        sent = None
        try:
            while True:
                with self._serving(request):
                    try:
                        item = next(steps) if sent is None else steps.send(sent)  # type: ignore[attr-defined]
                    except StopIteration:
                        return
                sent = yield item
        finally:
            if hasattr(steps, "close"):
                steps.close()

    def generate(self, tokens: Sequence[int], *args: Any, **options: Any) -> Generator[int, Any, None]:
        """Like Llama.generate, under the current plan. tokens: the prompt; with reset=False, its end."""
        self._check_open()
        tokens = list(tokens)
        reset = _GENERATE.bind(self, tokens, *args, **options).arguments.get("reset", True)
        steps = super().generate(tokens, *args, **options)
        return self._generation(self._request.plan, len(tokens), reset, steps)

    def _generation(
        self, plan: Plan | None, n_tokens: int, reset: bool, steps: Iterator[int]
    ) -> Generator[int, Any, None]:
        with self._serving(_Request(plan)):
            n_prompt = n_tokens if reset else self.n_tokens + n_tokens
            if n_prompt == 0:
                raise PromptError("the prompt is empty: it needs at least one token.")
            self._n_requests += 1
            request = _Request(plan, self._n_requests, n_prompt)
            self._n_prompt = n_prompt  # for those who go on by hand
        yield from self._steps(request, steps)

    def _create_completion(self, *args: Any, **options: Any) -> Iterator[Any]:
        self._check_open()
        return self._steps(_Request(self._request.plan), super()._create_completion(*args, **options))

    def create_chat_completion(self, *args: Any, **options: Any) -> Any:
        """Like Llama.create_chat_completion, under the current plan, however late a chat handler begins."""
        request = _Request(self._request.plan)
        with self._serving(request):
            reply = super().create_chat_completion(*args, **options)
        return self._steps(request, reply) if isinstance(reply, Iterator) else reply

    def sample(self, *args: Any, **options: Any) -> int:
        """Like Llama.sample. Raises LocalsteerError for a token without logits, which would end the
        process."""
        idx = options.get("idx")
        if idx is not None and idx != self.n_tokens - 1 and not self._logits_all:
            raise LocalsteerError(f"token {idx} has no logits: open the model with logits_all=True.")
        if self._n_prompt is None:
            self._n_prompt = self.n_tokens
        return super().sample(*args, **options)

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        grammar = options.get("grammar")
        if grammar is not None and self._hook is not None:
            with our_log():  # Llama itself goes on without one, and the process ends
                check_llama_grammar(self._borrowed, grammar._grammar)
        return super()._init_sampler(*args, **options)

    # -- decoding ------------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those in the state, and those again from where their edits are wrong.

        If called directly, all tokens before the first `sample` since a `reset` are prompt. Raises
        PromptError if the context is full, LocalsteerError; the state is then empty.
        """
        request = self._request
        with self._serving(request):
            self._end_streams(request)
            n_prompt = self._n_prompt if request.n_prompt is None else request.n_prompt
            n_prompt = self.n_tokens + len(tokens) if n_prompt is None else n_prompt
            keys = class_keys(request.plan)
            tokens = [*self._take_back(keys, n_prompt), *tokens]
            start, stop = self.n_tokens, self.n_tokens + len(tokens)
            if stop > self._n_ctx:
                raise PromptError(
                    f"{stop} tokens are more than the context of {self._n_ctx}: shorten the prompt, or raise "
                    "n_ctx."
                )
            edits = _edits(keys, start, stop, n_prompt)
            try:
                with self._decode.under(request.plan if any(edits) else None, n_prompt):
                    super().eval(tokens)
            except BaseException:
                self._keep(0)  # what was decoded can't be trusted
                raise
            self._edits += edits
            self._right_for = keys, n_prompt

    def _take_back(self, keys: Sequence[bytes], n_prompt: int) -> list[int]:
        """Forget the state from its first wrong position on. Returns the tokens to be read again."""
        right = self._n_right(keys, n_prompt)
        if right == self.n_tokens:
            return []
        tokens = self._input_ids.tolist()
        edits = list(self._edits)
        right = self._keep(right)
        if None in edits[right:]:
            raise UnsupportedModelError(
                "what the prompt holds beside tokens (an image, say) can't be steered: steer positions "
                "`generation`."
            )
        return tokens[right:]

    def _n_right(self, keys: Sequence[bytes], n_prompt: int) -> int:
        """How many positions, from the first on, were computed under these edits."""
        n = self.n_tokens
        if len(self._edits) == n and self._right_for == (keys, n_prompt):
            return n
        self._edits += [None] * (n - len(self._edits))  # llama.n_tokens was raised from outside
        wanted = _edits(keys, 0, n, n_prompt)
        pairs = zip(self._edits, wanted, strict=True)
        return next((i for i, (have, want) in enumerate(pairs) if (have or b"") != want), n)

    def _keep(self, n: int) -> int:
        """Forget all but the first n positions. Returns how many are left: a recurrent state can't be cut."""
        if n == 0 or not self._ctx.kv_cache_seq_rm(-1, n, -1):
            super().reset()
            return 0
        self.n_tokens = n
        self._requires_eval = True
        return n

    def embed(self, *args: Any, **options: Any) -> Any:
        """Like Llama.embed, steered: each text is a prompt."""
        request = self._request
        with self._serving(request), self._decode.under(request.plan, None):
            self._end_streams(request)
            return super().embed(*args, **options)

    def reset(self) -> None:
        request = self._request
        with self._serving(request):
            self._end_streams(request)
            self._n_prompt = None
            super().reset()

    def _end_streams(self, request: _Request) -> None:
        """The state changes under their hands."""
        if request.number is None:
            self._n_requests += 1

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Like Llama.tokenize, with very long words cut (long_runs.py). Raises PromptError for a character
        that the vocabulary can't spell."""
        self._check_open()
        if self._hook is None or not isinstance(self.tokenizer_, llama_cpp.LlamaTokenizer):
            return super().tokenize(text, add_bos, special)
        self._borrowed.check_text(text.decode("utf-8", "replace"))
        first, *rest = self._borrowed.safe_pieces(text.decode("utf-8", "surrogateescape"))
        tokens = super().tokenize(first.encode("utf-8", "surrogateescape"), add_bos, special)
        for piece in rest:
            tokens += super().tokenize(piece.encode("utf-8", "surrogateescape"), False, special)
        return tokens

    # -- states and caches ---------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """The number of positions in the state."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        self._n_tokens = n
        del self._edits[n:]

    def save_state(self) -> LlamaState:
        """Like Llama.save_state; the state records what it was steered by."""
        with self._serving(self._request):
            state = super().save_state()
            state.edits = [*self._edits, *[None] * (self.n_tokens - len(self._edits))]
            state.n_prompt = self._n_prompt
            return state

    def load_state(self, state: LlamaState) -> None:
        """Like Llama.load_state; a state of a plain Llama counts as unsteered."""
        request = self._request
        with self._serving(request):
            self._end_streams(request)
            super().load_state(state)
            self._edits, self._n_prompt = self.state_edits(state), getattr(state, "n_prompt", None)
            self._right_for = None

    @staticmethod
    def state_edits(state: LlamaState) -> list[bytes | None]:
        """The edits under which each position of a state was computed; none for a state of a plain Llama."""
        return list(getattr(state, "edits", [b""] * state.n_tokens))

    def prompt_edits(self, n_prompt: int) -> list[bytes]:
        """The edits under which a prompt of this length would be computed now."""
        return _edits(class_keys(self._request.plan), 0, n_prompt, n_prompt)

    def forget_wrong(self, n_prompt: int) -> None:
        """Keep the part of the state that is valid for a prompt of this length now."""
        right = self._n_right(class_keys(self._request.plan), n_prompt)
        if right < self.n_tokens and None not in self._edits:
            self._keep(right)

    @property
    def cache(self) -> KeyedCache | None:
        """Set a cache, which is then looked up by token and edit."""
        return self._cache

    @cache.setter
    def cache(self, cache: BaseLlamaCache | None) -> None:
        if isinstance(cache, KeyedCache):
            cache = cache.wrapped
        self._cache = None if cache is None else KeyedCache(cache, self)

    # -- pickling: the model is loaded again ---------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "steer": self._plan, "use_extra_bufts": self._asked_extra_bufts}


def _edits(keys: Sequence[bytes], start: int, stop: int, n_prompt: int) -> list[bytes]:
    """The key of what applies at positions start to stop (exclusive); keys: one for each PositionClass."""
    return [keys[(i >= n_prompt - 1) + (i >= n_prompt)] for i in range(start, stop)]


def _template(model: BorrowedModel) -> ChatTemplate:
    def text(token: int) -> str:
        return model.token_to_piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    return ChatTemplate(model.chat_template, bos=text(model.bos), eos=text(model.eos))
