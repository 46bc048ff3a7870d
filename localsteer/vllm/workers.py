"""Which rows of a batch get which plan: around vLLM's model runners, of its first and its second version."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from localsteer.errors import LocalsteerError
from localsteer.plan import Plan, PositionClass, Program
from localsteer.torch_arithmetic import TorchProgram

from . import carried
from .layers import LayerHook, decoder_layers

logger = logging.getLogger("localsteer")
_MARK = "_localsteer"
Span = tuple[str, int, int, int]  # request, first row, row after the last, position of the first row


def install() -> None:
    """A second call does nothing. Raises LocalsteerError where vLLM is not as this plugin knows it."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "_prepare_inputs", _spans_of_first)
    except (ImportError, AttributeError) as error:
        raise LocalsteerError(f"this version of vLLM has another model runner: {error}.") from None
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    except Exception as error:  # whatever its kernels miss on a machine that does not use it
        logger.debug("vLLM's second model runner is not here: %s", error)
        return
    _wrap(SecondRunner, "prepare_inputs", _spans_of_second)


class Batches:
    """The plans of the requests that a runner knows, and the edits of the batch that it computes."""

    def __init__(self, runner: Any) -> None:
        config = runner.model_config
        n_embd, n_layer = config.get_hidden_size(), config.hf_text_config.num_hidden_layers
        self.device: torch.device = runner.device
        self.edits: dict[int, list[tuple[slice | torch.Tensor, TorchProgram]]] = {}
        self._plans: dict[str, tuple[Plan, int]] = {}  # and the length of the prompt
        self._programs: dict[tuple[bytes, int, int], TorchProgram] = {}
        for layer, module in decoder_layers(runner.model, n_layer).items():
            module.register_forward_hook(LayerHook(layer, n_embd, self.edits))

    def take(self, output: Any) -> None:
        """Requests that begin and end with a SchedulerOutput."""
        for request in output.finished_req_ids:
            self._plans.pop(request, None)
        for new in output.scheduled_new_reqs:
            words = (getattr(new.sampling_params, "extra_args", None) or {}).get(carried.KEY)
            if words:
                self._plans[new.req_id] = (carried.unpacked(bytes(words)), _prompt_length(new))
        if not self._plans:
            self._programs.clear()

    def begin(self, spans: Iterable[Span]) -> None:
        """Before a forward pass over these rows."""
        self.edits.clear()
        if not self._plans:
            return
        groups: dict[tuple[bytes, bytes], list[tuple[int, int]]] = {}
        plans: dict[tuple[bytes, bytes], tuple[Plan, PositionClass]] = {}
        for request, first, after, position in spans:
            plan, n_prompt = self._plans.get(request, (None, 0))
            if plan is None:
                continue
            for cls, start, end in _classes(position, after - first, n_prompt):
                group = (plan.key, plan.class_key(cls))
                plans[group] = (plan, cls)
                groups.setdefault(group, []).append((first + start, first + end))
        for group, ranges in groups.items():
            self._add(*plans[group], self._rows(ranges))

    def end(self) -> None:
        self.edits.clear()

    def _add(self, plan: Plan, cls: PositionClass, rows: slice | torch.Tensor) -> None:
        for layer in plan.layers:
            program = plan.program(layer, cls)
            if program is not None:
                tensors = self._on_device(program, (plan.key, layer, int(cls)))
                self.edits.setdefault(layer, []).append((rows, tensors))

    def _on_device(self, program: Program, key: tuple[bytes, int, int]) -> TorchProgram:
        if key not in self._programs:
            self._programs[key] = TorchProgram.of(program, self.device)
        return self._programs[key]

    def _rows(self, ranges: list[tuple[int, int]]) -> slice | torch.Tensor:
        """One range where they follow each other."""
        merged: list[list[int]] = []
        for first, after in sorted(ranges):
            if merged and merged[-1][1] == first:
                merged[-1][1] = after
            else:
                merged.append([first, after])
        if len(merged) == 1:
            return slice(*merged[0])
        numbers = np.concatenate([np.arange(*span) for span in merged])
        return torch.as_tensor(numbers, dtype=torch.long, device=self.device)


def _prompt_length(new: Any) -> int:
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    return len(new.prompt_embeds)


def _classes(position: int, n: int, n_prompt: int) -> Iterator[tuple[PositionClass, int, int]]:
    """(class, first, after the last) of n rows from `position` on, counted from there; no empty ones."""
    bounds = {
        PositionClass.PROMPT: (position, n_prompt - 1),
        PositionClass.LAST: (n_prompt - 1, n_prompt),
        PositionClass.GENERATION: (n_prompt, position + n),
    }
    for cls, (first, after) in bounds.items():
        start, end = max(first, position) - position, min(after, position + n) - position
        if start < end:
            yield cls, start, end


def _wrap(runner: type, prepare_name: str, spans_of: Any) -> None:
    load, execute, prepare = runner.load_model, runner.execute_model, getattr(runner, prepare_name)
    if hasattr(execute, _MARK):
        return

    @functools.wraps(execute)
    def execute_model(self: Any, output: Any, *args: Any, **more: Any) -> Any:
        batches = _batches(self)
        batches.take(output)
        try:
            return execute(self, output, *args, **more)
        finally:
            batches.end()

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **more: Any) -> Any:
        result = prepare(self, *args, **more)
        _batches(self).begin(spans_of(self, result, args))
        return result

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **more: Any) -> None:
        load(self, *args, **more)
        self.__dict__.pop(_MARK, None)  # other weights, other modules
        _batches(self)

    setattr(execute_model, _MARK, True)
    runner.load_model, runner.execute_model = load_model, execute_model
    setattr(runner, prepare_name, prepare_inputs)


def _batches(runner: Any) -> Batches:
    if not hasattr(runner, _MARK):
        setattr(runner, _MARK, Batches(runner))
    return getattr(runner, _MARK)


def _spans_of_first(runner: Any, _result: Any, args: tuple[Any, ...]) -> Iterator[Span]:
    scheduled = np.asarray(args[1])
    ends = np.cumsum(scheduled)
    computed = runner.input_batch.num_computed_tokens_cpu
    for i, request in enumerate(runner.input_batch.req_ids[: len(ends)]):
        yield request, int(ends[i] - scheduled[i]), int(ends[i]), int(computed[i])


def _spans_of_second(_runner: Any, result: Any, _args: tuple[Any, ...]) -> Iterator[Span]:
    starts = result.query_start_loc_np
    for i, request in enumerate(result.req_ids):
        yield request, int(starts[i]), int(starts[i + 1]), int(result.num_computed_tokens_np[i])
