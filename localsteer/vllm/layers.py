"""The decoder layers of a model in vLLM, and the hooks that edit the residual stream after them.

A layer returns either the stream itself, or (its own output, the stream before it), which the next layer's
norm adds. With tensor parallelism both are complete and equal on every rank, since a layer ends with an
all-reduce: each rank makes the same edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from localsteer.errors import UnsupportedModelError
from localsteer.torch_arithmetic import TorchProgram

LISTS = ("layers", "h", "blocks")  # what models call the list of their blocks
ELSEWHERE = ("vision", "visual", "audio", "encoder", "mtp", "draft")  # part of the path to lists of others

Rows = slice | torch.Tensor  # of a batch: a range, or their numbers
Edits = Mapping[int, Sequence[tuple[Rows, TorchProgram]]]  # by layer


def decoder_layers(model: torch.nn.Module, n_layer: int) -> dict[int, torch.nn.Module]:
    """By 0-based number; with pipeline parallelism those of this rank alone. Raises UnsupportedModelError."""
    lists = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LISTS
        and isinstance(module, torch.nn.ModuleList)
        and len(module) == n_layer
        and not any(word in name for word in ELSEWHERE)
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"localsteer finds {len(lists)} lists of {n_layer} decoder layers in {type(model).__name__} and "
            "needs one: unset LOCALSTEER_VECTORS to run it unsteered."
        )
    missing = "PPMissingLayer"  # vLLM's placeholder for a layer of another rank
    return {il: module for il, module in enumerate(lists[0]) if type(module).__name__ != missing}


class LayerHook:
    """edits: what there is to do in the running forward pass, changed by its owner. The first pass, which
    vLLM makes to measure memory, before any request, proves the form of the layer's output."""

    def __init__(self, layer: int, n_embd: int, edits: dict) -> None:
        self.layer, self.n_embd, self.edits = layer, n_embd, edits
        self._checked = False

    def __call__(self, module: Any, _inputs: Any, output: Any) -> None:
        if not self._checked:
            self._check(module, output)
        for rows, program in self.edits.get(self.layer, ()):
            hidden, before = output if isinstance(output, tuple) else (output, None)
            wide = program.writers.dtype
            state = hidden[rows].to(wide)
            if before is not None:
                state = state + before[rows].to(wide)
            change = program.change(state).to(hidden.dtype)
            if isinstance(rows, slice):
                hidden[rows] += change
            else:
                hidden.index_add_(0, rows, change)

    def _check(self, module: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        fits = all(isinstance(part, torch.Tensor) and part.dim() == 2 for part in parts)
        if not (fits and len(parts) <= 2 and all(part.shape[-1] == self.n_embd for part in parts)):
            raise UnsupportedModelError(
                f"localsteer can't steer {type(module).__name__}: its output is not the residual stream, nor "
                "two parts of it. Unset LOCALSTEER_VECTORS to run the model unsteered."
            )
        self._checked = True
