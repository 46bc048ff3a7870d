"""One vector held by the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from localsteer.errors import LocalsteerError
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine


@dataclass(frozen=True)
class Loaded:
    """One vector file. judged: the models it was tried on; misfits: {model: why this vector can't steer it};
    error: why the file can't be read."""

    name: str
    sha256: str
    size: int
    vector: ControlVector | None = None
    error: str | None = None
    misfits: Mapping[str, str] = field(default_factory=dict)
    judged: frozenset[str] = frozenset()
    stamp: tuple[int, int, int] = (0, 0, 0)
    ships_for: str | None = None

    def fits(self, model: str) -> bool:
        return self.vector is not None and model in self.judged and model not in self.misfits

    def judge(self, model: str, engine: Engine) -> Loaded:
        """The same, tried on one more model."""
        if self.vector is None:
            return self
        misfits = {name: why for name, why in self.misfits.items() if name != model}
        try:
            engine.plan(self.vector)
        except LocalsteerError as error:
            misfits[model] = str(error)
        return replace(self, misfits=misfits, judged=self.judged | {model})
