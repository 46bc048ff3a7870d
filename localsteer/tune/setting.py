"""The settings with which a vector is applied: layer, positions, strength and mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localsteer.errors import PlanError
from localsteer.vector import ControlVector

POSITIONS = ("prompt", "last", "all")
FEW_LAYERS = 12  # up to this depth, a grid has every layer
MAX_TOKENS = 192  # tokens of a reply


Layers = int | tuple[int, ...]  # one, or several that are steered together


@dataclass(frozen=True)
class Setting:
    """One setting of a vector. layer: 0-based."""

    layer: Layers
    positions: str
    strength: float
    mode: str = "project"

    def __str__(self) -> str:
        return f"{self.mode} at {self.where}, {self.positions}, strength {self.strength:g}"

    @property
    def where(self) -> str:
        return layers_in_words((self.layer,) if isinstance(self.layer, int) else self.layer)

    @property
    def numbers(self) -> str:
        """The layers without the word."""
        return self.where.partition(" ")[2]

    def of(self, vector: ControlVector) -> ControlVector:
        """The vector with this setting applied."""
        return vector.at(layer=self.layer, positions=self.positions, strength=self.strength, mode=self.mode)


@dataclass(frozen=True)
class Scope:
    """Which settings a search may try, and how long a reply may be.

    layers: 0-based, by default all. modes: by default the vector's. strengths: by default the search's;
    negative ones steer away. Raises PlanError for strength 0.
    """

    layers: Iterable[int] | None = None
    positions: Sequence[str] = POSITIONS
    modes: Sequence[str] | None = None
    strengths: Sequence[float] | None = None
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if self.strengths is not None and not all(self.strengths):
            raise PlanError("strength 0 steers nothing: the plain model is asked anyway.")

    def modes_of(self, vector: ControlVector) -> tuple[str, ...]:
        return tuple(self.modes or (vector.mode,))


def layers_of(vector: ControlVector) -> Layers:
    """The layers of a vector as one setting has them."""
    return vector.layers[0] if len(vector.layers) == 1 else tuple(vector.layers)


def layers_in_words(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def grid_layers(n_layer: int) -> range:
    """All layers of a shallow model; of a deep one the paper's grid (section 3.1)."""
    return range(n_layer) if n_layer <= FEW_LAYERS else range(n_layer // 5, n_layer, 2)
