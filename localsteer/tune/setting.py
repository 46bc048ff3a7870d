"""What a vector is applied with: block, positions, strength and mode."""

from __future__ import annotations

from dataclasses import dataclass

from localsteer.vector import ControlVector

POSITIONS = ("prompt", "last", "all")
FEW_BLOCKS = 12  # up to this depth a grid has every block


@dataclass(frozen=True)
class Setting:
    """layer: 0-based block."""

    layer: int
    positions: str
    strength: float
    mode: str = "project"

    def __str__(self) -> str:
        return f"{self.mode} at block {self.layer}, {self.positions}, strength {self.strength:g}"

    def of(self, vector: ControlVector) -> ControlVector:
        """The vector with this setting applied."""
        return vector.at(layer=self.layer, positions=self.positions, strength=self.strength, mode=self.mode)


def grid_blocks(n_layer: int) -> range:
    """All blocks of a shallow model; of a deep one the paper's grid (section 3.1)."""
    return range(n_layer) if n_layer <= FEW_BLOCKS else range(n_layer // 5, n_layer, 2)
