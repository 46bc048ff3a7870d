"""Do no harm: leave a vector out if the prompt already asks for the same, and the vector's file says that
steering makes such replies worse.

    applied, left_out = considerate(engine, vectors, prompt)
    reply = engine.generate(prompt, steer=applied)

`tune` measures replies to prompts that hold the instruction, plain (`instructed`) and steered (`both`), and
the file keeps both shares. If the second is lower, two signs must agree that a prompt asks: it contains a
word that is typical of the vector's phrasings, and the model's state at its last token lies on the side of
the prompts with the instruction (docs/method.md). A prompt that contains one of the phrasings literally is
certain to ask.

Neither sign is enough by itself: a word may be there for other reasons, and on small models the projection
rises with any instruction (docs/do-no-harm.md has the figures).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .vector import STATISTICS, ControlVector

if TYPE_CHECKING:
    from .engine import Engine
    from .runtime.ask import Prompt
    from .runtime.scheduler import Scheduler


def considerate(
    source: Engine | Scheduler,
    vectors: ControlVector | Sequence[ControlVector],
    prompt: Prompt,
    *,
    raw: bool = False,
    always: Sequence[ControlVector] = (),
) -> tuple[list[ControlVector], list[ControlVector]]:
    """Returns (vectors to apply to this prompt, vectors to leave out), both in their original order.

    Each vector is decided separately; if no file says that its vector does harm, nothing is computed. always:
    vectors to apply in any case. raw: the prompt has no chat template, and every vector is applied, since a
    vector's statistics are those of templated prompts. On an Engine, this ends an open stream. Raises
    MismatchError for a vector of another model, PromptError.
    """
    vectors = [vectors] if isinstance(vectors, ControlVector) else list(vectors)
    inquiry = Inquiry.of(vectors, prompt, vectors if raw else always)
    if not inquiry.layers:
        return inquiry.settle({})
    engine: Engine = getattr(source, "engine", source)
    for vector in inquiry.open:
        engine.plan(vector)
    tokens = engine.prompt_tokens(prompt)
    if hasattr(source, "look"):
        states = source.look(tokens, inquiry.layers).states()
    else:
        states = engine.last_hidden_states([tokens])[0, inquiry.layers]
    return inquiry.settle(dict(zip(inquiry.layers, states, strict=True)))


def asks(engine: Engine, vector: ControlVector, prompt: Prompt) -> bool | None:
    """Whether a prompt asks for what the vector steers to; None if that can't be decided, because the vector
    has no statistics (an import) or they do not separate. On an Engine, this ends an open stream."""
    if stands_in(vector, prompt):
        return True
    layer = reading_layer(vector)
    if layer is None:
        return None
    if not mentions(vector, prompt):
        return False
    state = engine.last_hidden_states([engine.prompt_tokens(prompt)])[0, layer]
    return is_beyond(vector, state, layer)


@dataclass(frozen=True)
class Inquiry:
    """What remains to be decided before a prompt is steered. vectors: all of them. left_out: those already
    certain. open: those for which the state at the last prompt token decides."""

    vectors: tuple[ControlVector, ...]
    left_out: tuple[ControlVector, ...]
    open: tuple[ControlVector, ...]

    @classmethod
    def of(
        cls, vectors: Iterable[ControlVector], prompt: Prompt, always: Sequence[ControlVector] = ()
    ) -> Inquiry:
        vectors = tuple(vectors)
        harmful = [vector for vector in vectors if vector not in always and does_harm(vector)]
        certain = tuple(vector for vector in harmful if stands_in(vector, prompt))
        unsure = tuple(
            vector
            for vector in harmful
            if vector not in certain and reading_layer(vector) is not None and mentions(vector, prompt)
        )
        return cls(vectors, certain, unsure)

    @property
    def layers(self) -> list[int]:
        """The layers whose state is needed; none if nothing is open."""
        return sorted({reading_layer(vector) for vector in self.open})

    def settle(self, states: Mapping[int, np.ndarray]) -> tuple[list[ControlVector], list[ControlVector]]:
        """Returns (vectors to apply, vectors to leave out). states: by layer, (n_embd,) of the plain model at
        the last prompt token."""
        asked = [v for v in self.open if is_beyond(v, states[reading_layer(v)], reading_layer(v))]
        left_out = [v for v in self.vectors if v in self.left_out or v in asked]
        return [v for v in self.vectors if v not in left_out], left_out


# --- what the file says ------------------------------------------------------------------------------------


def told_and_both(vector: ControlVector) -> tuple[float, float] | None:
    """The shares of good replies to prompts that hold the instruction, plain and steered; None if the file,
    which may be anyone's, does not say."""
    record = vector.provenance.get("validation")
    scores = record.get("scores") if isinstance(record, Mapping) else None
    if not isinstance(scores, Mapping):
        return None
    told, both = _share(scores.get("instructed")), _share(scores.get("both"))
    return None if told is None or both is None else (told, both)


def does_harm(vector: ControlVector) -> bool:
    """Whether the file says that steering makes replies to prompts that already ask worse, even by one reply:
    if that was chance, leaving the vector out costs nothing. A vector that changes nothing does no harm."""
    shares = told_and_both(vector)
    return vector.strength != 0 and shares is not None and shares[1] < shares[0]


def why_left_out(vector: ControlVector) -> str:
    """One line for the user, without its full stop."""
    told, both = told_and_both(vector) or (math.nan, math.nan)
    return (
        f"{vector.label} is left out: the prompt already asks for it, and its file says that steering then "
        f"does harm (told {told:.0%}, told and steered {both:.0%})"
    )


def _share(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None


# --- what the words say ------------------------------------------------------------------------------------

TYPICAL = 1 / 3  # of a vector's phrasings must have the word; in fewer it is chance
# of the catalogue's kinds of instructions may have the word; one that more of them have is no sign
COMMON = 0.2


def stands_in(vector: ControlVector, prompt: Prompt) -> bool:
    """Whether the user's last message, or a system message, contains one of the vector's phrasings, whatever
    its case and spacing."""
    text = _plain("\n".join(_said(prompt, last=True)))
    return any(phrase and phrase in text for phrase in map(_plain, vector.phrasings))


def mentions(vector: ControlVector, prompt: Prompt) -> bool:
    """Whether the user's or the system's messages contain a word that is typical of the vector's
    phrasings."""
    return not typical_words(vector.phrasings).isdisjoint(_words("\n".join(_said(prompt))))


@lru_cache(maxsize=64)
def typical_words(phrasings: tuple[str, ...]) -> frozenset[str]:
    """Words in at least a third of the phrasings, without those common to many instructions (answer,
    must)."""
    counts = Counter(word for text in phrasings for word in _words(text))
    wanted = max(1.0, TYPICAL * len(phrasings))
    return frozenset(word for word, n in counts.items() if n >= wanted) - _common_words()


@lru_cache(maxsize=1)
def _common_words() -> frozenset[str]:
    """Words in the phrasings of more than a fifth of the general catalogue's kinds of instructions. A kind
    shares one verifier, so `sentence`, which is in all instructions that count sentences, counts once."""
    from .catalog import load_catalog

    kinds: dict[str, set[str]] = {}
    for instruction in load_catalog().instructions.values():
        kinds.setdefault(instruction.verifier or instruction.group, set()).update(
            _words("\n".join(instruction.phrasings))
        )
    counts = Counter(word for words in kinds.values() for word in words)
    return frozenset(word for word, n in counts.items() if n > COMMON * len(kinds))


def _words(text: str) -> set[str]:
    """Words of at least two letters, whatever their case; a plural counts as its singular."""
    words = re.findall(r"[^\W\d_]{2,}", text.casefold())
    return {re.sub(r"(?<=\w\w[^\Ws])s$", "", word) for word in words}


def _said(prompt: Prompt, last: bool = False) -> list[str]:
    """The texts of the user and the system; last: of the user's, only the last message."""
    if isinstance(prompt, str):
        return [prompt]
    by_user = [message for message in prompt if message.get("role") == "user"]
    said = [message for message in prompt if message.get("role") == "system"]
    said += by_user[-1:] if last else by_user
    return [message["content"] for message in said if isinstance(message.get("content"), str)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# --- what the state says -----------------------------------------------------------------------------------


def reading_layer(vector: ControlVector) -> int | None:
    """The layer at which the projections with and without the instruction are furthest apart, in units of
    their spread; None if the vector has no statistics, or no layer separates the two."""
    separation = _separation(vector)
    if separation is None or not separation.max() > 0:
        return None
    return int(separation.argmax())


def _separation(vector: ControlVector) -> np.ndarray | None:
    """d' = (mean with - mean without) / pooled standard deviation, (n_layer,); 0 at layers without a
    direction."""
    columns = [getattr(vector, key) for key in STATISTICS]
    if any(column is None for column in columns) or _is_turned_round(vector):
        return None
    mean_with, mean_without, std_with, std_without = (column.astype(np.float64) for column in columns)
    spread = np.sqrt((std_with**2 + std_without**2) / 2)
    gap = np.where(vector.directions.any(axis=1), mean_with - mean_without, 0.0)
    return np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)


def _is_turned_round(vector: ControlVector) -> bool:
    """Whether the vector's two sides are exchanged (extract/recipes.py, `minus`): `with` then means every
    prompt that does not ask for the word, which says nothing about prompts that ask to avoid it."""
    return str(vector.provenance.get("method", "")).startswith("minus ")


def is_beyond(vector: ControlVector, state: np.ndarray, layer: int) -> bool:
    """Whether a state at the last prompt token lies on the side of the prompts with the instruction.

    state: (n_embd,), of the plain model after `layer`.
    """
    return float(vector.unit(layer).astype(np.float64) @ state) > threshold(vector, layer)


def threshold(vector: ControlVector, layer: int) -> float:
    """The threshold between the two means, in proportion to the spreads: two normal distributions err equally
    there."""
    mean_with, mean_without, std_with, std_without = (
        float(getattr(vector, key)[layer]) for key in STATISTICS
    )
    return (mean_with * std_without + mean_without * std_with) / (std_with + std_without)
