"""The vocabulary of settings. This module imports nothing, so every other module can use it."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["project", "add", "ablate", "gate"]
Positions = Literal["all", "prompt", "last", "generation"]

LEARNING_NEEDS = ("torch", "transformers", "accelerate")  # packages

MODES: tuple[str, ...] = get_args(Mode)
POSITIONS: tuple[str, ...] = get_args(Positions)
