"""The edit that is learned, in PyTorch: x <- x + (w.n(x) + b) z at each of a few layers, n(x) = x / rms(x).

A rank-1 edit whose weight is read from the state, like LoReFT's (Wu et al., arXiv 2404.03592) with separate
reader and writer; `constant` leaves w at 0, which gives an ordinary control vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from localsteer.extract.torch_backend import torch
from localsteer.steering import RMS_EPS

READER_NOISE = 1e-3  # standard deviation of w at the start; at 0 it would get no gradient until z has moved


@dataclass(frozen=True, eq=False)
class Learned:
    """reader, writer: (n_embd,) float32, the writer in residual-stream units. mean: the gate's mean over the
    tokens of its examples."""

    reader: np.ndarray
    bias: float
    writer: np.ndarray
    mean: float


class Gate(torch.nn.Module):
    """scale: the length of a change of size 1, a tenth of a typical state at this layer, which makes learning
    rates mean the same in every model."""

    def __init__(self, n_embd: int, scale: float, *, constant: bool, seed: int) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        reader = READER_NOISE * torch.randn(n_embd, generator=noise)
        self.reader = torch.nn.Parameter(torch.zeros(n_embd) if constant else reader)
        self.reader.requires_grad_(not constant)
        self.writer = torch.nn.Parameter(torch.zeros(n_embd))
        self.bias = torch.nn.Parameter(torch.ones(()))
        self.scale = scale

    def weights(self, hidden: Any) -> Any:
        """The factors of the writer, (..., 1)."""
        x = hidden.float()
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
        return (normal @ self.reader + self.bias).unsqueeze(-1)

    def forward(self, hidden: Any, where: Any) -> Any:
        """The states after the edit. hidden: (..., n_embd). where: (...) bool, the tokens that are
        steered."""
        change = self.weights(hidden) * (self.scale * self.writer)
        return hidden + torch.where(where.unsqueeze(-1), change, 0.0).to(hidden.dtype)

    def learned(self, mean: float) -> Learned:
        reader, writer = (tensor.detach().numpy() for tensor in (self.reader, self.scale * self.writer))
        return Learned(reader, float(self.bias.detach()), writer, mean)


class Gates(torch.nn.Module):
    """Gates that are learned together, one for each layer. scales: by layer, see Gate."""

    def __init__(self, n_embd: int, scales: Mapping[int, float], *, constant: bool, seed: int) -> None:
        super().__init__()
        self.layers = tuple(sorted(scales))
        self._gates = torch.nn.ModuleList(
            Gate(n_embd, scales[layer], constant=constant, seed=seed + layer) for layer in self.layers
        )

    def __getitem__(self, layer: int) -> Gate:
        return self._gates[self.layers.index(layer)]

    @property
    def scales(self) -> dict[int, float]:
        return {layer: self[layer].scale for layer in self.layers}
