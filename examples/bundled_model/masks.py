"""The attention masks of instruct training: what makes the model steerable.

A small model trained with a plain causal mask follows an instruction by reading its words again at every
step; nothing of it stays in the residual stream for steering to find. So most samples hide the instruction's
words from the reply. What the reply needs to know must then pass through the last prompt token (`BOTTLENECK`),
or along the reply itself (`WINDOW`); and in half of these the lower half of the layers can't see the last
prompt token either, so that the state has to cross in the residual stream of the middle layers. The question
stays visible, so that names are copied by attention as in any language model. Inference is plain causal.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

FULL, BOTTLENECK, WINDOW = range(3)
P_FULL, P_BOTTLENECK = 0.3, 0.45  # the rest is WINDOW
P_LOWER_BLIND = 0.5
P_CODED_HIDDEN = 0.8
WINDOW_TOKENS = (10, 40)


@dataclass
class Spans:
    """Token positions of one sample: [0, n_prompt) is the prompt, [n_prompt, n_tokens) the reply; `hidden`
    are the tokens of the instruction, `argument` those among them that the reply must copy (a word to include,
    unless it is one of the few that the state can name) and so may see. coded: it has such a word, which is
    learnt where it is hidden alone.
    """

    n_prompt: int
    n_tokens: int
    hidden: list[int]
    argument: list[int]
    coded: bool = False


def attention_masks(
    spans: list[Spans], n_tokens: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive masks (batch, 1, n_tokens, n_tokens) bfloat16 for the lower and the upper half of the layers."""
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)[None, :]
    upper = causal.repeat(len(spans), 1, 1)
    lower = upper.clone()
    for k, span in enumerate(spans):
        u = rng.random()
        if span.coded and rng.random() < P_CODED_HIDDEN:
            u = P_FULL + u * (1 - P_FULL)
        if u < P_FULL:
            continue
        reply = slice(span.n_prompt, span.n_tokens)
        hidden = [i for i in span.hidden if i not in span.argument]
        first_hidden = reply.start if rng.random() < 0.5 else 0
        upper[k, first_hidden : span.n_prompt - 1, hidden] = (
            False  # a question after the instruction may be blind too
        )
        upper[k, reply, hidden] = False
        for i in hidden:
            upper[k, i, hidden] = causal[i, hidden]  # the instruction reads itself
        if u >= P_FULL + P_BOTTLENECK:
            near = distance[reply] < rng.randint(*WINDOW_TOKENS)
            near[:, : span.n_prompt - 1] = True  # the question, whose instruction is hidden above
            upper[k, reply] &= near
        lower[k] = upper[k]
        if rng.random() < P_LOWER_BLIND:
            lower[k, reply, span.n_prompt - 1] = False

    def additive(allowed):
        mask = torch.zeros(allowed.shape, dtype=torch.bfloat16)
        return mask.masked_fill_(~allowed, float("-inf"))[:, None]

    return additive(lower), additive(upper)
