"""What `localsteer run` says about a vector that it leaves out (localsteer/asked.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.ask import Prompt
    from localsteer.vector import ControlVector


def harmless(
    engine: Engine,
    vectors: Sequence[ControlVector],
    prompt: Prompt,
    *,
    always: Sequence[ControlVector],
    raw: bool,
) -> tuple[list[ControlVector], dict[str, list[str]]]:
    """The vectors to apply, and what `--json` says about the others, which are also named on stderr."""
    from localsteer.asked import considerate, why_left_out

    applied, left_out = considerate(engine, vectors, prompt, raw=raw, always=always)
    for vector in left_out:
        note(f"{why_left_out(vector)}; --always-steer applies it anyway.")
    return applied, {"left_out": [vector.name for vector in left_out]} if left_out else {}
