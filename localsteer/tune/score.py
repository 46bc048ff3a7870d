"""How much of the effect of telling a setting recovers, by likelihood: no reply is generated.

The recovered gap does not reveal a setting that begins well and then loops, so the damage it does is
subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localsteer.plan import Plan
from localsteer.runtime.likelihood import Likelihood
from localsteer.vector import ControlVector

from .setting import Setting
from .targets import Target

DAMAGE = 0.5  # share of the gap that a nat of damage per token costs


class Score:
    """Recovered gap and damage of one vector's settings; each (setting, target) is computed once.

    on_progress: called after each decode with the number of rows done.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        vector: ControlVector,
        targets: Sequence[Target],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._likelihood, self._vector = likelihood, vector
        self.targets = tuple(targets)
        self._on_progress = on_progress
        self._known: dict[Setting, list[tuple[float, float]]] = {}

    def extend(self, settings: Sequence[Setting], n_targets: int) -> None:
        """Score settings on the first `n_targets` targets."""
        missing = [
            (setting, target)
            for target in self.targets[:n_targets]
            for setting in dict.fromkeys(settings)
            if self.targets.index(target) >= len(self._known.get(setting, ()))
        ]
        plans = {setting: Plan.from_vectors([setting.of(self._vector)]) for setting, _ in missing}
        values = self._likelihood(
            [target.row(plans[setting]) for setting, target in missing],
            on_progress=lambda done, _: self._on_progress and self._on_progress(done),
        )
        for (setting, target), steered in zip(missing, values, strict=True):
            self._known.setdefault(setting, []).append((target.recovered(steered), target.damage(steered)))

    def n_targets(self, setting: Setting) -> int:
        """The number of targets on which a setting was scored."""
        return len(self._known.get(setting, ()))

    def of(self, setting: Setting, n_targets: int | None = None) -> float:
        """The recovered gap minus the cost of the damage, on the targets so far or the first `n_targets`."""
        return self.gap(setting, n_targets) - DAMAGE * self._mean(setting, 1, n_targets)

    def gap(self, setting: Setting, n_targets: int | None = None) -> float:
        """The mean recovered gap."""
        return self._mean(setting, 0, n_targets)

    def _mean(self, setting: Setting, which: int, n_targets: int | None) -> float:
        values = [value[which] for value in self._known[setting][:n_targets]]
        return sum(values) / len(values)

    @property
    def settings(self) -> list[Setting]:
        return list(self._known)
