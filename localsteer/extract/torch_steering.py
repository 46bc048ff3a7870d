"""The reference arithmetic of steering.py as PyTorch hooks, with which native runs are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from localsteer.errors import UnsupportedModelError
from localsteer.plan import Plan, PositionClass

# isort: split
from .torch_backend import decoder_layers, layer_output, torch, transformers

# isort: split
from localsteer.torch_arithmetic import apply_program  # after torch_backend, which reports missing packages

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # the last one is used by recurrent models


@contextmanager
def steer_hooks(model: Any, plan: Plan, n_prompt: int | None = None) -> Iterator[None]:
    """Within the `with` block, forward passes and `generate` of a transformers model are steered by `plan`.

    Rows of a batch must not be padded on the left: a token's class follows from its position, and the first
    `n_prompt` tokens are the prompt (None: all of them).
    """
    position = _Position()
    layers = decoder_layers(model)
    handles = [model.base_model.register_forward_pre_hook(position.update, with_kwargs=True)]
    for layer in plan.layers:
        handles.append(layers[layer].register_forward_hook(_Hook(plan, layer, position, n_prompt)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy_tokens(
    model: Any, ids: Sequence[int], plans: Sequence[Plan], *, max_tokens: int, ends: Callable[[int], bool]
) -> list[int]:
    """A greedy reply with the plans applied one after the other at each layer, which no single Plan does (it
    solves jointly). ends: whether a token ends the reply; that token is not part of it.
    """
    reply: list[int] = []
    inputs = torch.tensor([list(ids)], device=model.device)
    cache = {cache_argument(model): reply_cache(model)}  # every forward pass adds to it
    with torch.inference_mode(), ExitStack() as stack:
        for plan in plans:
            stack.enter_context(steer_hooks(model, plan, n_prompt=len(ids)))
        while len(reply) < max_tokens:
            token = int(model(input_ids=inputs, use_cache=True, **cache).logits[0, -1].argmax())
            if ends(token):
                break
            reply.append(token)
            inputs = torch.tensor([[token]], device=model.device)
    return reply


def reply_cache(model: Any) -> Any:
    """An empty KV cache. The config says which layers keep a recurrent state instead of keys and values."""
    if "config" in inspect.signature(transformers.DynamicCache.__init__).parameters:
        return transformers.DynamicCache(config=model.config)
    return (
        transformers.DynamicCache()
    )  # transformers before 4.56, in which hybrid models had their own caches


def cache_argument(model: Any) -> str:
    """The name of the cache argument of a model's forward pass, which depends on the model and the
    version."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), "past_key_values")


class _Position:
    """Tracks where the tokens of the current forward pass begin: after those in the cache. A wrong position
    would go unnoticed, so a cache that can't tell is refused unless it was empty at the start."""

    start = 0

    def __init__(self) -> None:
        self._cache: Any = None  # the last one
        self._n_seen = 0  # tokens that went into it

    def update(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # recognised by what it can do, or by its name
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        if cache is None:
            named = (kwargs.get(name) for name in CACHE_ARGUMENTS)
            cache = next((value for value in named if value is not None), None)
        self.start = 0 if cache is None else self._length(cache)
        tokens = next(
            tensor
            for tensor in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
            if tensor is not None
        )
        self._cache, self._n_seen = cache, self.start + tokens.shape[1]

    def _length(self, cache: Any) -> int:
        try:
            return int(cache.get_seq_length())
        except (AttributeError, ValueError) as error:  # only recurrent layers, whose states have no length
            if cache is self._cache:
                return self._n_seen
            if _is_used(cache):
                raise UnsupportedModelError(
                    "the cache of a recurrent model can't tell how many tokens it has seen: begin with an "
                    "empty one."
                ) from error
            return 0


def _is_used(cache: Any) -> bool:
    """Whether a recurrent cache already has a state; False if this version of transformers can't tell."""
    has = getattr(cache, "has_previous_state", False)
    return bool(has() if callable(has) else has)


class _Hook:
    def __init__(self, plan: Plan, layer: int, position: _Position, n_prompt: int | None) -> None:
        self._plan, self._layer, self._position, self._n_prompt = plan, layer, position, n_prompt

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> Any:
        hidden = layer_output(output).clone()
        classes = self._classes(hidden.shape[1])
        for cls in PositionClass:
            chosen = [i for i, own in enumerate(classes) if own == cls]
            program = self._plan.program(self._layer, cls)
            if chosen and program is not None:
                hidden[:, chosen] = apply_program(hidden[:, chosen], program)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _classes(self, n_tokens: int) -> list[PositionClass]:
        start = self._position.start
        n_prompt = start + n_tokens if self._n_prompt is None else self._n_prompt
        return [_class(position, n_prompt) for position in range(start, start + n_tokens)]


def _class(position: int, n_prompt: int) -> PositionClass:
    if position >= n_prompt:
        return PositionClass.GENERATION
    return PositionClass.LAST if position == n_prompt - 1 else PositionClass.PROMPT
