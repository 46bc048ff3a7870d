"""Where requests enter vLLM: they are checked, and get their plan and their salt."""

from __future__ import annotations

import functools
import logging
from typing import Any

from localsteer.errors import LocalsteerError
from localsteer.plan import Plan

from . import carried
from .asked import SETTINGS, STEER, plan_of
from .shelf import VectorShelf

logger = logging.getLogger("localsteer")
_MARK = "_localsteer"


def install(shelf: VectorShelf) -> None:
    """A second call does nothing. Raises LocalsteerError where vLLM is not as this plugin knows it."""
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.input_processor import InputProcessor

        process, configure = InputProcessor.process_inputs, EngineArgs.create_engine_config
    except (ImportError, AttributeError) as error:
        raise LocalsteerError(f"this version of vLLM has changed where requests come in: {error}.") from None
    if hasattr(process, _MARK):
        return
    InputProcessor.process_inputs = _steered_inputs(process, shelf)
    EngineArgs.create_engine_config = _eager_config(configure)


def _steered_inputs(process: Any, shelf: VectorShelf) -> Any:
    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
        plan = _checked_plan(self.model_config, params, shelf)
        request = process(self, request_id, prompt, params, *args, **more)
        if plan is not None:
            _add(request, plan)
        return request

    setattr(process_inputs, _MARK, True)
    return process_inputs


def _checked_plan(config: Any, params: Any, shelf: VectorShelf) -> Plan | None:
    """Raises vLLM's own error, which becomes status 400."""
    from vllm.exceptions import VLLMValidationError

    extra = getattr(params, "extra_args", None) or {}
    if carried.KEY in extra:
        raise VLLMValidationError(
            f"{carried.KEY} is not for requests: name a vector by steer.", parameter=STEER
        )
    try:
        n_layer, n_embd = config.hf_text_config.num_hidden_layers, config.get_hidden_size()
        return plan_of(extra, shelf, n_layer=n_layer, n_embd=n_embd)
    except LocalsteerError as error:
        named = str(error).partition(" ")[0].rstrip(":")
        parameter = named if named in SETTINGS else STEER
        raise VLLMValidationError(str(error), parameter=parameter) from None


def _add(request: Any, plan: Plan) -> None:
    """request: vLLM's, whose parameters are a copy of the caller's."""
    params = request.sampling_params
    params.extra_args = {**(params.extra_args or {}), carried.KEY: carried.packed(plan)}
    request.cache_salt = (request.cache_salt or "") + salt_of(plan, len(request.prompt_token_ids or ()))


def salt_of(plan: Plan, n_prompt: int) -> str:
    """What the key of a cached block needs beside its tokens: the edits, and if these depend on what is
    prompt and what is reply, the prompt's length: a reply that becomes prompt in the next turn is read
    again."""
    everywhere = all(edit.positions == "all" for edit in plan.edits)
    return f"|localsteer:{plan.key.hex()}" + ("" if everywhere else f":{n_prompt}")


def _eager_config(configure: Any) -> Any:
    @functools.wraps(configure)
    def create_engine_config(self: Any, *args: Any, **more: Any) -> Any:
        if not self.enforce_eager:
            logger.warning(
                "localsteer: --enforce-eager is switched on, since hooks do not run inside compiled graphs."
            )
            self.enforce_eager = True
        config = configure(self, *args, **more)
        _refuse(config)
        return config

    return create_engine_config


def _refuse(config: Any) -> None:
    """Raise LocalsteerError for features that move the rows of a batch without the hooks' knowledge."""
    parallel = config.parallel_config
    reasons = {
        "speculative decoding": config.speculative_config is not None,
        "dual batch overlap (--enable-dbo)": getattr(parallel, "enable_dbo", False),
        "context parallelism in prefill": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
    }
    for what, is_on in reasons.items():
        if is_on:
            raise LocalsteerError(
                f"localsteer's plugin can't steer with {what}: leave that out, or unset LOCALSTEER_VECTORS."
            )
