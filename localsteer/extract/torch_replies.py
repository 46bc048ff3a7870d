"""Greedy replies of a steered transformers model, for comparison with the engine's."""

from __future__ import annotations

from collections.abc import Sequence

from localsteer.plan import Plan
from localsteer.runtime.reply import Reply

from .torch_backend import TorchBackend, torch
from .torch_steering import steer_hooks

BATCH = 16  # prompts per forward pass


def torch_replies(
    backend: TorchBackend, prompts: Sequence[Sequence[int]], plan: Plan | None, *, max_tokens: int
) -> list[Reply]:
    """One reply for each prompt (token ids), in order, all under one plan.

    Prompts of equal length are batched: padding on the left would shift positions.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(prompts):
        by_length.setdefault(len(tokens), []).append(i)
    for n_prompt, rows in by_length.items():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            answers = _generate(
                backend, [prompts[i] for i in part], plan or Plan.none(), n_prompt, max_tokens
            )
            for i, reply in zip(part, answers, strict=True):
                replies[i] = reply
    return replies


def _generate(
    backend: TorchBackend, prompts: Sequence[Sequence[int]], plan: Plan, n_prompt: int, max_tokens: int
) -> list[Reply]:
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=backend.device)
    ends = _ends(backend)
    options = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": ends[0]}
    with torch.inference_mode(), steer_hooks(backend.model, plan, n_prompt):
        sequences = backend.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return [_reply(backend, row[n_prompt:].tolist(), ends) for row in sequences]


def _reply(backend: TorchBackend, tokens: list[int], ends: Sequence[int]) -> Reply:
    """The reply up to the first end token or stop string of the template; otherwise it ends with "length"."""
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[:end]
    text = backend.tokenizer.decode(kept, skip_special_tokens=True)
    cut = min((at for at in map(text.find, backend.template.stop) if at >= 0), default=None)
    return Reply(text[:cut], kept, "length" if end is None and cut is None else "stop")


def _ends(backend: TorchBackend) -> list[int]:
    """Token ids that end a reply."""
    known = backend.model.generation_config.eos_token_id
    known = backend.tokenizer.eos_token_id if known is None else known
    return list(known) if isinstance(known, (list, tuple)) else [known]
