"""What a vector is applied with: block, positions, strength and mode."""

from __future__ import annotations

from dataclasses import dataclass

from localsteer.vector import ControlVector

POSITIONS = ("prompt", "last", "all")


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
