"""The edit that is learned: x <- x + (w.n(x) + b) z at one layer, n(x) = x / rms(x). torch.

A rank-1 edit with a weight that is read from the state, as LoReFT's (Wu et al., arXiv 2404.03592) with its
two sides apart; `constant` leaves w at 0, which makes it an ordinary control vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from localsteer.extract.torch_backend import torch
from localsteer.steering import RMS_EPS

READER_NOISE = 1e-3  # standard deviation of w at the start: at 0 it would never move from z's first steps


@dataclass(frozen=True, eq=False)
class Learned:
    """reader, writer: (n_embd,) float32, the writer in residual-stream units. mean: of the gate, over the
    tokens of its examples."""

    reader: np.ndarray
    bias: float
    writer: np.ndarray
    mean: float


class Gate(torch.nn.Module):
    """scale: length that a change of size 1 has, a tenth of a typical state at this layer: learning rates
    then mean the same in every model."""

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
        """(..., 1): what the writer is multiplied with."""
        x = hidden.float()
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
        return (normal @ self.reader + self.bias).unsqueeze(-1)

    def forward(self, hidden: Any, where: Any) -> Any:
        """hidden: (..., n_embd). where: (...) bool, the tokens that are steered."""
        change = self.weights(hidden) * (self.scale * self.writer)
        return hidden + torch.where(where.unsqueeze(-1), change, 0.0).to(hidden.dtype)

    def learned(self, mean: float) -> Learned:
        reader, writer = (tensor.detach().numpy() for tensor in (self.reader, self.scale * self.writer))
        return Learned(reader, float(self.bias.detach()), writer, mean)
