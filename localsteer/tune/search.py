"""Which settings to check: layers from coarse to fine, strengths along a line, targets by halving.

The criterion is the recovered gap (score.py). It varies smoothly with layer and strength, so a coarse look
finds the region and a finer one the best place in it. Settings are first tried on one target, and on more
only if they are good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from localsteer.errors import PlanError
from localsteer.vector import ControlVector

from .score import Score
from .setting import POSITIONS, Layers, Setting

N_COARSE = 8  # layers in the first look
FIRST_STRENGTH = 1.5  # between 1, which suits the early layers, and 2, which suits the late ones
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)  # range of the line search
# Settings of each kind whose neighbours are tried, whose strengths are tried, and that enter the last look.
# Of each kind, because likelihood does not show which positions a model tolerates.
KEPT = (2, 1, 3)
N_TARGETS = (2, 4)  # targets in the first looks, and in the last


class Search:
    """Searches the settings of one vector. layers: 0-based, those to try. strengths: all to try; None
    searches along STRENGTHS.

    on_best: called with the best setting so far and its recovered gap whenever it changes.
    """

    def __init__(
        self,
        score: Score,
        layers: Sequence[Layers],
        positions: Sequence[str] = POSITIONS,
        strengths: Sequence[float] | None = None,
        modes: Sequence[str] = ("project",),
        on_best: Callable[[Setting, float], None] | None = None,
    ) -> None:
        self.score = score
        self._layers, self._positions, self._modes = sorted(set(layers)), tuple(positions), tuple(modes)
        self._strengths = None if strengths is None else tuple(dict.fromkeys(strengths))
        self._on_best = on_best

    def run(self) -> list[Setting]:
        """Every setting that was scored, those on more targets first, then the best first."""
        few, many = (min(n, len(self.score.targets)) for n in N_TARGETS)
        near, along, last = KEPT
        self._look(self._coarse(), few)
        self._look(self._between(self._best_of_each_kind(near, few)), few)
        self._look(self._along(self._best_of_each_kind(along, few)), few)
        self._look(self._along(self._best_of_each_kind(along, few)), few)
        self._look(self._best_of_each_kind(last, few), many)
        return self.ranking()

    def ranking(self) -> list[Setting]:
        """The settings scored so far, best first."""
        return sorted(
            self.score.settings, key=lambda setting: (-self.score.n_targets(setting), -self.of(setting))
        )

    def of(self, setting: Setting) -> float:
        return self.score.of(setting)

    def _look(self, settings: Iterable[Setting], n_targets: int) -> None:
        settings = list(dict.fromkeys(settings))
        if settings:
            self.score.extend(settings, n_targets)
            if self._on_best:
                best = self._best(1, n_targets)[0]
                self._on_best(best, self.score.gap(best))

    def _coarse(self) -> list[Setting]:
        """Settings at evenly spaced layers, including the first and the last, at every position."""
        n = len(self._layers)
        few = min(n, N_COARSE)
        chosen = sorted({self._layers[round(i * (n - 1) / max(1, few - 1))] for i in range(few)})
        strengths = self._strengths or (FIRST_STRENGTH,)
        return [
            Setting(layer, positions, strength, mode)
            for layer in chosen
            for mode in self._modes
            for positions in self._positions
            for strength in strengths
        ]

    def _best(self, n: int, n_targets: int) -> list[Setting]:
        known = [setting for setting in self.score.settings if self.score.n_targets(setting) >= n_targets]
        return sorted(known, key=lambda setting: -self.score.of(setting, n_targets))[:n]

    def _best_of_each_kind(self, n: int, n_targets: int) -> list[Setting]:
        """The best n settings for each positions and mode."""
        ordered = self._best(len(self.score.settings), n_targets)
        kinds: dict[tuple[str, str], list[Setting]] = {}
        for setting in ordered:
            kinds.setdefault((setting.positions, setting.mode), []).append(setting)
        return [setting for kind in kinds.values() for setting in kind[:n]]

    def _between(self, settings: Sequence[Setting]) -> Iterable[Setting]:
        """Settings at layers around good ones that the coarse look skipped."""
        scored = {setting.layer for setting in self.score.settings}
        for setting in settings:
            for layer in self._layers:
                gap = sorted(scored | {self._layers[0], self._layers[-1]})
                below = max((tried for tried in gap if tried < setting.layer), default=setting.layer)
                above = min((tried for tried in gap if tried > setting.layer), default=setting.layer)
                if below < layer < above and layer not in scored:
                    yield replace(setting, layer=layer)

    def _along(self, settings: Sequence[Setting]) -> Iterable[Setting]:
        """Settings with strengths next to those of good ones; none if the user named the strengths."""
        if self._strengths is not None:
            return
        for setting in settings:
            at = STRENGTHS.index(setting.strength)
            for i in (at - 1, at + 1):
                if 0 <= i < len(STRENGTHS):
                    yield replace(setting, strength=STRENGTHS[i])


def usable_layers(vector: ControlVector, layers: Iterable[int] | None) -> list[Layers]:
    """The layers to try: all that have a direction, or those requested. Gates that were learned together are
    tried together.

    Raises PlanError for a layer that is out of range or has no direction, and if there are none.
    """
    if layers is None and vector.mode == "gate" and len(vector.layers) > 1:
        return [tuple(vector.layers)]
    usable = list(vector.usable_layers if layers is None else vector.at(layer=tuple(layers)).layers)
    if not usable:
        raise PlanError(f"{vector.label} has no direction at any of the layers to choose from.")
    return usable


def candidates(settings: Sequence[Setting], n: int) -> list[Setting]:
    """The first n settings that are not neighbours (at most one layer apart), taking kinds of positions and
    mode in turn.

    In turn, because only replies show, and likelihood does not, that a setting which steers the whole reply
    can keep it from getting past its beginning.
    """
    kinds: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings:
        kind = kinds.setdefault((setting.positions, setting.mode), [])
        if all(_are_apart(setting.layer, other.layer) for other in kind):
            kind.append(setting)
    turns = zip_longest(*kinds.values())
    return [setting for turn in turns for setting in turn if setting is not None][:n]


def _are_apart(one: Layers, other: Layers) -> bool:
    """Whether two settings are no neighbours. Sets of layers are the same or have nothing to do with each
    other."""
    return abs(one - other) > 1 if isinstance(one, int) and isinstance(other, int) else one != other
