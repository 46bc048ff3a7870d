"""The reference arithmetic of steering.py in PyTorch, for hooks in transformers and in vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import Program
from .steering import RMS_EPS


@dataclass(frozen=True, eq=False)
class TorchProgram:
    """A Program as tensors on one device, in the type that is computed in. reads: (k,) bool, which readers
    are not zeros. gram: (n_solved, n_solved), of the writers that are solved jointly, with the ridge."""

    readers: torch.Tensor
    reads: torch.Tensor
    biases: torch.Tensor
    writers: torch.Tensor
    normalised: torch.Tensor
    one_sided: torch.Tensor
    caps: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def of(cls, program: Program, device: torch.device) -> TorchProgram:
        # Metal has no float64
        wide = torch.float64 if device.type != "mps" else torch.float32

        def numbers(array) -> torch.Tensor:
            return torch.as_tensor(array.copy(), dtype=wide, device=device)

        def flags(array) -> torch.Tensor:
            return torch.as_tensor(array.copy(), device=device)

        readers, writers = numbers(program.readers), numbers(program.writers)
        solved = writers[: program.n_solved]
        gram = solved @ solved.T + program.ridge * torch.eye(len(solved), dtype=wide, device=device)
        return cls(
            readers=readers,
            reads=flags(program.readers.any(axis=1)),
            biases=numbers(program.biases),
            writers=writers,
            normalised=flags(program.normalised),
            one_sided=flags(program.one_sided),
            caps=numbers(program.caps),
            gram=gram,
        )

    def change(self, rows: torch.Tensor) -> torch.Tensor:
        """What is added to each state: (n_rows, n_embd), in the type that is computed in."""
        return self.weights(rows.to(self.writers.dtype)) @ self.writers

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """steering.dynamic_weights in torch: (n_rows, k)."""
        rms = (rows.square().mean(dim=1, keepdim=True) + RMS_EPS).sqrt()
        read = rows @ self.readers.T / torch.where(self.normalised, rms, torch.ones_like(rms))
        weights = self.biases + torch.where(self.reads, read, torch.zeros_like(read))
        joins = ~self.one_sided | ~(weights <= 0)  # NaN joins
        weights = torch.where(joins, weights, torch.zeros_like(weights))
        m = len(self.gram)
        if m:
            weights = torch.cat([self._solved(weights[:, :m], joins[:, :m]), weights[:, m:]], dim=1)
        return weights.clamp(-self.caps, self.caps)

    def _solved(self, wanted: torch.Tensor, joins: torch.Tensor) -> torch.Tensor:
        """One least-norm solve for each set of edits that act."""
        weights = torch.zeros_like(wanted)
        for pattern in torch.unique(joins, dim=0):
            chosen = (joins == pattern).all(dim=1)
            k = pattern.nonzero()[:, 0]
            if len(k):
                solved = torch.linalg.solve(self.gram[k][:, k], wanted[chosen][:, k].T).T
                weights[chosen.nonzero(), k] = solved
        return weights


def apply_program(x: torch.Tensor, program: Program) -> torch.Tensor:
    """steering.apply_program in torch: x (..., n_embd) -> the same shape and type, float64 inside."""
    tensors = TorchProgram.of(program, x.device)
    rows = x.reshape(-1, x.shape[-1]).to(tensors.writers.dtype)
    return (rows + tensors.change(rows)).to(x.dtype).reshape(x.shape)
