"""Learns a vector by likelihood, in PyTorch: gradient steps on the edits of a few layers, the model frozen.

The loss is the cross-entropy of each example's reply after its plain prompt. The tokens that the rewriting
changed make up half of it, however few they are (JSON's braces); on tokens that the plain reply has as well,
the distance (KL) from the plain model is added. The layers below the lowest edit always compute the same, so
they run once, and each step runs only the layers above it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from localsteer.errors import LocalsteerError
from localsteer.extract.torch_backend import torch

from .examples import Example
from .gate import Gates, Learned
from .weights import Weights

BATCH = 8  # examples per step
MICRO_BATCH = 2  # examples per forward pass, of about the same length, since padding costs as much as tokens
WARM_UP = 5  # steps during which the learning rate grows
LEAST_RATE = 0.1  # share of the learning rate at the end
MAX_NORM = 1.0  # norm of the gradient
# Share of the learning rate for the reader. The gate adds up a step in every component of the reader, so at
# the full rate it jumps back and forth between batches.
READER_RATE = 0.3
CHANGED = 0.5  # share of the loss that comes from changed tokens
# unchanged tokens of an example used in a step or a look, since logits cost as much as ten layers
N_KEPT = 24
KEEP = 0.1  # weight of the distance from the plain model, beside the loss
N_TOP = 32  # probabilities of the plain model kept for each token; the others are lumped together
PLAIN_STATE = ("step", "stale", "loss", "held", "best", "_rate", "_order")  # attributes of a Training
WORSE = 1.3  # times the best held-out loss; a higher loss means that the steps were too long


@dataclass(frozen=True)
class Recipe:
    """How a vector is learned.

    layers: None chooses them. together: all of them are edited; otherwise they race, and only the best is.
    None edits several for the user's own examples, whose forms one layer can't hold, and one for instructions
    of the catalogue, where several are slower and no better. positions: where the edits act, during learning
    and afterwards. constant: an ordinary control vector, without a gate. n_steps: at most, on the examples;
    half as many follow on the model's own replies. rate: the learning rate. seed: for everything random, and
    for the form of rewritten replies.
    """

    layers: tuple[int, ...] | None = None
    together: bool | None = None
    positions: str = "all"
    constant: bool = False
    n_steps: int = 50
    rate: float = 0.012
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Prepared:
    """One example, with the plain model's results for it. states: (n_tokens, n_embd) by layer.

    top: (n_kept, N_TOP) token ids, and log_top their log-probabilities, at the kept tokens of the reply.
    """

    example: Example
    states: dict[int, Any]
    top: Any
    log_top: Any


def prepare(
    weights: Weights,
    examples: Sequence[Example],
    layers: Sequence[int],
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Prepared]:
    prepared = []
    for done, example in enumerate(examples):
        report(done, len(examples))
        ids = torch.tensor([example.tokens])
        states, last = weights.states(ids, torch.ones_like(ids), layers)
        at = len(example.prompt) - 1 + np.flatnonzero(example.kept)
        with torch.inference_mode():
            log = weights.logits(last[0, at]).log_softmax(-1) if len(at) else torch.zeros(0, N_TOP)
            log_top, top = log.topk(N_TOP)
        # not in inference mode, since gradients flow through results of these
        own = {layer: hidden[0].clone() for layer, hidden in states.items()}
        prepared.append(Prepared(example, own, top.clone(), log_top.clone()))
    return prepared


def typical_length(prepared: Sequence[Prepared], layer: int) -> float:
    """The median length of a state at a layer, since the first token's can be a thousand times as long."""
    lengths = [one.states[layer][1:].float().norm(dim=-1) for one in prepared]
    return float(torch.cat(lengths).median())


# what a training goes on from: PLAIN_STATE, and the states of gate, optimizer and random generator
TrainingState = Mapping[str, Any]


class Training:
    """Gradient steps on a few layers. gates: the starting point, new ones by default.

    loss: of the last step. held: the latest held-out loss, best: the lowest so far. stale: looks since then.
    """

    def __init__(
        self,
        weights: Weights,
        layers: Sequence[int],
        examples: Sequence[Prepared],
        held_out: Sequence[Prepared],
        recipe: Recipe,
        gates: Gates | None = None,
    ) -> None:
        self._weights, self.layers, self._recipe = weights, tuple(sorted(layers)), recipe
        self._examples, self._held_out = list(examples), list(held_out)
        scales = {layer: typical_length(examples, layer) / 10 for layer in self.layers}
        self.gates = gates or Gates(weights.n_embd, scales, constant=recipe.constant, seed=recipe.seed)
        each = [self.gates[layer] for layer in self.layers]
        readers = [] if recipe.constant else [gate.reader for gate in each]
        others = [value for gate in each for value in (gate.writer, gate.bias)]
        self._free = [*others, *readers]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": others, "share": 1.0},
                *({"params": [reader], "share": READER_RATE} for reader in readers),
            ],
            lr=recipe.rate,
            weight_decay=0.0,
        )
        self._rate = recipe.rate
        self._random = np.random.default_rng(recipe.seed)
        self._order: list[int] = []
        self.step, self.stale = 0, 0
        self.loss, self.held, self.best = math.nan, math.nan, math.inf
        self._best_state = copy.deepcopy(self.gates.state_dict())

    def run(self, n: int) -> None:
        """Take n steps. Raises LocalsteerError if the loss is not finite, however short the steps."""
        for _ in range(n):
            self._set_rate()
            self._optimizer.zero_grad()
            self.loss = self._backward(self._batch())
            if not math.isfinite(self.loss):
                self._go_back()
            else:
                torch.nn.utils.clip_grad_norm_(self._free, MAX_NORM)
                self._optimizer.step()
            self.step += 1

    def look(self) -> float:
        """The held-out loss. The best edit so far is kept; if the loss has grown far above the best, the
        steps continue from the best edit at half the rate."""
        with torch.inference_mode():
            losses = [float(self._losses(batch)) * len(batch) for batch in _alike(self._held_out)]
        self.held = sum(losses) / len(self._held_out)
        self.stale += 1
        if self.held < self.best:
            self.best, self.stale = self.held, 0
            self._best_state = copy.deepcopy(self.gates.state_dict())
        elif not self.held <= WORSE * self.best:
            self._go_back()
        return self.held

    def best_gates(self) -> Gates:
        """The best gates so far, by the held-out loss."""
        gates = copy.deepcopy(self.gates)
        gates.load_state_dict(self._best_state)
        return gates

    def learned(self) -> dict[int, Learned]:
        """The best gates so far by layer, with their means over the steered tokens held out, except each
        first one, which is unlike all others in most models."""
        gates, seen = self.best_gates(), defaultdict(list)

        def see(layer: int, values: Any) -> None:
            seen[layer].append(float((values[1:] if len(values) > 1 else values).mean()))

        with torch.inference_mode():
            for one in self._held_out:
                self._last([one], gates, see)
        return {layer: gates[layer].learned(float(np.mean(seen[layer]))) for layer in self.layers}

    def state(self) -> TrainingState:
        """Everything that `restore` needs to continue as if there had been no interruption."""
        return {name: getattr(self, name) for name in PLAIN_STATE} | {
            "gates": self.gates.state_dict(),
            "scales": self.gates.scales,
            "best_state": self._best_state,
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: TrainingState) -> None:
        for name in PLAIN_STATE:
            setattr(self, name, state[name])
        self.gates.load_state_dict(state["gates"])
        for layer, scale in state["scales"].items():
            self.gates[layer].scale = scale
        self._best_state = state["best_state"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._random.bit_generator.state = state["random"]

    # -- one step ----------------------------------------------------------------------------------

    def _set_rate(self) -> None:
        warm = min(1.0, (self.step + 1) / WARM_UP)
        decline = max(LEAST_RATE, 1 - self.step / self._recipe.n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["share"] * self._rate * warm * decline

    def _go_back(self) -> None:
        self._rate /= 2
        if self._rate < 1e-6:
            raise LocalsteerError(
                "the loss grows or is not finite, whatever the learning rate: these examples can't be "
                "learned from."
            )
        self.gates.load_state_dict(self._best_state)
        self._optimizer.state.clear()

    def _batch(self) -> list[Prepared]:
        if len(self._order) < min(BATCH, len(self._examples)):
            self._order = [int(i) for i in self._random.permutation(len(self._examples))]
        return [self._examples[self._order.pop()] for _ in range(min(BATCH, len(self._examples)))]

    def _backward(self, batch: Sequence[Prepared]) -> float:
        total = 0.0
        for some in _alike(batch):
            loss = self._losses(some, self._random) * (len(some) / len(batch))
            loss.backward()
            total += float(loss.detach())
        return total

    def _losses(self, batch: Sequence[Prepared], random: np.random.Generator | None = None) -> Any:
        """The loss of a batch, as the mean over examples: a long reply counts as much as a short one. random:
        draws which of the unchanged tokens are used; without it they are always the same."""
        last = self._last(batch, self.gates)
        losses = [self._loss(row, one, random) for row, one in zip(last, batch, strict=True)]
        return torch.stack(losses).mean()

    def _last(
        self, batch: Sequence[Prepared], gates: Gates, see: Callable[[int, Any], None] | None = None
    ) -> Any:
        """The last hidden states of a batch, edited. see: called with each layer and its gates' values at the
        steered tokens."""
        hidden, ids, attention, where = self._padded(batch)

        def edited(layer: int, hidden: Any) -> Any:
            if see is not None:
                see(layer, gates[layer].weights(hidden)[where])
            return gates[layer](hidden, where)

        first, *others = self.layers
        edits = {layer: partial(edited, layer) for layer in others}
        return self._weights.after(first, edited(first, hidden), ids, attention, edits)

    def _loss(self, row: Any, one: Prepared, random: np.random.Generator | None) -> Any:
        """The loss of one example. row: (n_tokens, n_embd), its last hidden states."""
        reply, is_kept = one.example.reply, one.example.kept
        changed, kept = np.flatnonzero(~is_kept), np.flatnonzero(is_kept)
        drawn = np.arange(len(kept))
        if len(kept) > N_KEPT and random is None:
            drawn = np.linspace(0, len(kept) - 1, N_KEPT).astype(int)
        elif len(kept) > N_KEPT:
            drawn = np.sort(random.choice(len(kept), N_KEPT, replace=False))
        at = np.concatenate([changed, kept[drawn]])
        logits = self._weights.logits(row[len(one.example.prompt) - 1 + at])
        entropies = torch.nn.functional.cross_entropy(
            logits, torch.tensor(reply)[torch.from_numpy(at)], reduction="none"
        )
        of_changed, of_kept = entropies[: len(changed)], entropies[len(changed) :]
        if not len(kept):
            return of_changed.mean()
        distance = KEEP * _distance(logits[len(changed) :], one.top[drawn], one.log_top[drawn])
        if not len(changed):
            return of_kept.mean() + distance
        share = len(changed) / len(reply)
        whole = share * of_changed.mean() + (1 - share) * of_kept.mean()
        return CHANGED * of_changed.mean() + (1 - CHANGED) * whole + distance

    def _padded(self, batch: Sequence[Prepared]) -> tuple[Any, Any, Any, Any]:
        """States, token ids, attention mask and steered tokens of a batch, padded on the right."""
        n = max(len(one.example.tokens) for one in batch)
        layer = self.layers[0]
        first = batch[0].states[layer]
        hidden = torch.zeros(len(batch), n, first.shape[-1], dtype=first.dtype)
        ids = torch.zeros(len(batch), n, dtype=torch.long)
        attention = torch.zeros_like(ids)
        where = torch.zeros(len(batch), n, dtype=torch.bool)
        for i, one in enumerate(batch):
            n_prompt, n_own = len(one.example.prompt), len(one.example.tokens)
            hidden[i, :n_own] = one.states[layer]
            ids[i, :n_own] = torch.tensor(one.example.tokens)
            attention[i, :n_own] = 1
            start, stop = steered_range(self._recipe.positions, n_prompt, n_own)
            where[i, start:stop] = True
        return hidden, ids, attention, where


def steered_range(positions: str, n_prompt: int, n: int) -> tuple[int, int]:
    """The range of tokens of a prompt and its reply that a positions setting covers."""
    return {
        "all": (0, n),
        "prompt": (0, n_prompt),
        "last": (n_prompt - 1, n),
        "generation": (n_prompt, n),
    }[positions]


def _distance(logits: Any, top: Any, log_top: Any) -> Any:
    """KL(plain | steered), nats per token, over the plain model's likeliest tokens and all others as one."""
    log = logits.log_softmax(-1).gather(-1, top)
    plain = log_top.exp()
    rest = (1 - plain.sum(-1)).clamp_min(1e-6)
    own_rest = (1 - log.exp().sum(-1)).clamp_min(1e-6)
    likely = (plain * (log_top - log)).sum(-1)
    return (likely + rest * (rest / own_rest).log()).mean()


def _alike(batch: Sequence[Prepared]) -> list[Sequence[Prepared]]:
    """The examples in micro-batches of similar length."""
    batch = sorted(batch, key=lambda one: len(one.example.tokens))
    return [batch[start : start + MICRO_BATCH] for start in range(0, len(batch), MICRO_BATCH)]


def is_exact(weights: Weights, layer: int, one: Prepared, tolerance: float = 0.05) -> bool:
    """Whether running only the layers above gives the same as the whole model: not if they take more from
    those below than their output."""
    ids = torch.tensor([one.example.tokens])
    attention = torch.ones_like(ids)
    with torch.inference_mode():
        _, whole = weights.states(ids, attention, ())
        above = weights.after(layer, one.states[layer][None], ids, attention)
    return bool((whole.float() - above.float()).norm() <= tolerance * whole.float().norm())
