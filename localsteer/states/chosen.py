"""Prompts as a model reads them, with the tokens whose states are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localsteer.errors import PromptError, UnsupportedModelError
from localsteer.prompt_texts import PromptText
from localsteer.token_choice import TokenChoice
from localsteer.vector import checked_layers

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.ask import Prompt
    from localsteer.runtime.attach import Steer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Reading:
    """tokens: (n,) int32, of the whole text. positions: the chosen ones. n_prompt: how many of the tokens are
    prompt rather than forced reply. raw: without the chat template. label: for error messages."""

    tokens: np.ndarray
    positions: range
    n_prompt: int
    raw: bool
    label: str


def readings(
    engine: Engine,
    prompts: Sequence[Prompt | PromptText],
    tokens: str | int | TokenChoice = "last",
    *,
    raw: bool = False,
    on_progress: Progress | None = None,
) -> list[Reading]:
    """Every prompt, rendered and tokenised. raw: for prompts that are not PromptText, which has its own flag.

    Raises PromptError, which names the prompt, for one that can't be read, is longer than the context, or has
    no such token.
    """
    choice = TokenChoice.parse(tokens)
    texts = []
    for number, prompt in enumerate(prompts, 1):
        text = prompt
        if not isinstance(prompt, PromptText):
            text = PromptText(prompt, raw=raw, label=f"prompt {number}")
        texts.append(_reading(engine, text, choice))
        if on_progress:
            on_progress(number, len(prompts))
    return texts


def _reading(engine: Engine, text: PromptText, choice: TokenChoice) -> Reading:
    try:
        if not text.raw:
            engine.check_template()
        ids = engine.rendered_tokens(text.render(engine.template))
        if len(ids) > engine.n_ctx:
            more = " or raise the context (-c)" if engine.n_ctx < engine.model.n_ctx_train else ""
            raise PromptError(
                f"it has {len(ids)} tokens, more than the context of {engine.n_ctx}: shorten it{more}"
            )
        reply = text.forced
        positions = choice.positions(len(ids), lambda part: engine.find_part(ids, part), reply)
        reply_tokens = engine.find_part(ids, reply) if reply else None
    except PromptError as error:
        raise PromptError(f"{text.label}: {str(error).rstrip('.')}.") from error
    n_prompt = reply_tokens.start if reply_tokens else len(ids)
    return Reading(np.array(ids, np.int32), positions, n_prompt, text.raw, text.label)


def states_of(
    engine: Engine,
    chosen: Sequence[Reading],
    layers: Sequence[int],
    choice: TokenChoice,
    steer: Steer = (),
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (index, first row, rows) piece by piece: rows are (n, len(layers), n_embd) float32; for a mean,
    one row once it is complete.

    Raises UnsupportedModelError for a state that is not finite.
    """
    sums: dict[int, np.ndarray] = {}
    left = {i: len(reading.positions) for i, reading in enumerate(chosen)}
    seen = engine.states_at(
        [reading.tokens for reading in chosen],
        [reading.positions for reading in chosen],
        layers,
        steer=steer,
        n_prompts=[reading.n_prompt for reading in chosen],
    )
    for index, first, states in seen:
        _check_finite(states, layers, chosen[index].label)
        if choice.pooling != "mean":
            yield index, first, states
            continue
        left[index] -= len(states)
        sums[index] = sums.get(index, 0.0) + states.sum(axis=0, dtype=np.float64)
        if not left[index]:
            mean = sums.pop(index) / len(chosen[index].positions)
            yield index, 0, mean.astype(np.float32)[None]


def collect_states(
    engine: Engine,
    prompts: Sequence[Prompt | PromptText],
    *,
    layer: int | Sequence[int] | None = None,
    tokens: str | int | TokenChoice = "last",
    raw: bool = False,
    steer: Steer = (),
) -> list[np.ndarray]:
    """The states of each prompt, in memory: (n_chosen, n_layers, n_embd) float32, where n_chosen is 1 for
    `last`, a mean and an index.

    layer: 0-based layers, by default all. tokens: see TokenChoice. steer: what steers; the state of a steered
    layer is taken after its edit. Raises PromptError, PlanError, MismatchError, UnsupportedModelError.
    """
    choice = TokenChoice.parse(tokens)
    layers = layers_of(engine, layer)
    chosen = readings(engine, prompts, choice, raw=raw)
    shape = (len(layers), engine.model.n_embd)
    result = [np.empty((n_rows(reading, choice), *shape), np.float32) for reading in chosen]
    for index, first, rows in states_of(engine, chosen, layers, choice, steer):
        result[index][first : first + len(rows)] = rows
    return result


def layers_of(engine: Engine, layer: int | Sequence[int] | None) -> tuple[int, ...]:
    """Sorted layers; all of them for None. Raises PlanError."""
    n_layer = engine.model.n_layer
    return checked_layers(range(n_layer) if layer is None else layer, n_layer, engine.path.name)


def n_rows(reading: Reading, choice: TokenChoice) -> int:
    """Of one prompt."""
    return 1 if choice.is_one else len(reading.positions)


def _check_finite(states: np.ndarray, layers: Sequence[int], label: str) -> None:
    broken = ~np.isfinite(states).all(axis=(0, 2))
    if broken.any():
        layer = layers[int(broken.argmax())]
        raise UnsupportedModelError(
            f"{label}: the state after layer {layer} is not finite: is the model's file damaged?"
        )
