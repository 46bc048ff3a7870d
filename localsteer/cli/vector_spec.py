"""`json.gguf:0.8@12`: a vector file on the command line, with its strength and layers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.errors import PlanError, VectorFileError

from .options import parse_layers

if TYPE_CHECKING:
    from localsteer.vector import ControlVector

SYNTAX = "write FILE[:STRENGTH][@LAYER[,LAYER]], as in json.gguf:0.8@12"


@dataclass(frozen=True)
class VectorSpec:
    """A vector file with settings; None: as in the file."""

    path: str
    strength: float | None = None
    layers: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> VectorSpec:
        """Parse the text of an option. An existing file of exactly this name wins, whatever colons and at
        signs its name contains.

        Raises PlanError for a strength or layers that can't be read, VectorFileError if the file name is
        missing.
        """
        if os.path.isfile(text):
            return cls(text)
        path, layers = _split_layers(text)
        path, strength = (path, None) if os.path.isfile(path) else _split_strength(path, text)
        if not path:
            raise VectorFileError(f"{text!r} names no vector file: {SYNTAX}.")
        return cls(path, strength, layers)

    def load(self, **settings: Any) -> ControlVector:
        """The vector with the command's settings, overridden by those in this text.

        settings: arguments of ControlVector.at. Raises VectorFileError, PlanError.
        """
        from localsteer.vector import ControlVector

        if not os.path.exists(self.path) and not Path(self.path).suffix:
            raise VectorFileError(
                f"there is no file {self.path}: name a vector file, or use --instruction {self.path} for one "
                "that is made on first use."
            )
        own = {"strength": self.strength, "layer": self.layers}
        own = {key: value for key, value in own.items() if value is not None}
        return ControlVector.load(self.path).at(**{**settings, **own})


def with_own_strength(specs: Sequence[str], vectors: Sequence[ControlVector]) -> list[ControlVector]:
    """The vectors loaded from `specs` whose strength is written after the file's name."""
    pairs = zip(specs, vectors, strict=False)
    return [vector for spec, vector in pairs if VectorSpec.parse(spec).strength is not None]


def _split_layers(text: str) -> tuple[str, tuple[int, ...] | None]:
    path, at, tail = text.rpartition("@")
    if not at:
        return text, None
    try:
        return path, parse_layers(tail)
    except ValueError as error:
        # an at sign in a folder's name does not begin layers
        if os.path.isfile(_before_colon(path)) or not _looks_like_path(tail):
            raise PlanError(f"{text}: {error}") from None
        return text, None


def _split_strength(path: str, text: str) -> tuple[str, float | None]:
    file, colon, tail = path.rpartition(":")
    if not colon or _looks_like_path(tail):
        return path, None  # C:\vectors\json.gguf
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise PlanError(f"{text}: {tail!r} is not a strength: {SYNTAX}.")
    return file, strength


def _before_colon(path: str) -> str:
    return path if os.path.isfile(path) else path.rpartition(":")[0]


def _looks_like_path(tail: str) -> bool:
    return any(character in tail for character in "/\\") or tail.lower().endswith(".gguf")
