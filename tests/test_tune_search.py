"""The search by likelihood: what a setting is worth, which settings are scored, and which are checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from localsteer import bundled
from localsteer.catalog import load_catalog
from localsteer.errors import PlanError
from localsteer.runtime.likelihood import Likelihood
from localsteer.tune import POSITIONS, Setting
from localsteer.tune.score import DAMAGE, Score
from localsteer.tune.search import N_COARSE, N_TARGETS, STRENGTHS, Search, candidates, usable_layers
from localsteer.tune.setting import grid_layers
from localsteer.tune.targets import Telling
from localsteer.vector import ControlVector

CATALOG = load_catalog(bundled.CATALOG)
QUERIES = CATALOG.queries["validation"][:4]


@pytest.fixture(scope="module")
def targets(exact_bundled):
    telling = Telling(exact_bundled, CATALOG.get("title"), QUERIES, max_tokens=96)
    return telling.collect(Likelihood(exact_bundled)).targets


@pytest.fixture
def score(exact_bundled, extracted, targets):
    return Score(Likelihood(exact_bundled), extracted["title"], targets)


# --- what a setting is worth ---


def test_what_works_recovers_the_gap_and_what_steers_nothing_recovers_none(score):
    good, nothing = Setting(7, "prompt", 2.0), Setting(7, "prompt", 0.0)
    score.extend([good, nothing], 4)
    assert score.gap(good) > 0.9
    assert score.gap(nothing) == pytest.approx(0, abs=1e-3)
    assert score.of(nothing) == pytest.approx(0, abs=1e-3)
    assert score.gap(good) - DAMAGE * 8 <= score.of(good) <= score.gap(good)


def test_steering_the_other_way_recovers_less_than_nothing(score):
    away = Setting(3, "prompt", -2.0, "add")
    score.extend([away], 4)
    assert score.gap(away) < 0.05


def test_much_too_strong_a_setting_pays_for_its_damage(score):
    sound, broken = Setting(7, "prompt", 2.0), Setting(2, "all", 20.0, "add")
    score.extend([sound, broken], 4)
    damage = {setting: (score.gap(setting) - score.of(setting)) / DAMAGE for setting in (sound, broken)}
    assert damage[broken] > 1 > damage[sound]


def test_a_setting_is_scored_once_on_each_target(exact_bundled, extracted, targets):
    likelihood = Likelihood(exact_bundled)
    score = Score(likelihood, extracted["title"], targets)
    setting = Setting(5, "last", 1.0)
    score.extend([setting, setting], 2)
    assert score.n_targets(setting) == 2
    first, n_tokens = score.gap(setting), likelihood.n_tokens
    score.extend([setting], 2)
    assert likelihood.n_tokens == n_tokens
    score.extend([setting], 99)
    assert score.n_targets(setting) == len(targets) == 4
    assert score.gap(setting, 2) == first
    assert score.settings == [setting]


# --- which settings are scored ---


@pytest.fixture(scope="module")
def searched(exact_bundled, extracted, targets):
    score = Score(Likelihood(exact_bundled), extracted["title"], targets)
    told = []
    search = Search(score, range(8), on_best=lambda *best: told.append(best))
    return search, search.run(), told


def test_the_search_finds_what_telling_does(searched):
    search, ranking, _ = searched
    assert search.score.gap(ranking[0]) > 0.9
    assert search.score.n_targets(ranking[0]) == N_TARGETS[1]
    assert len(ranking) == len(set(ranking)) < 8 * len(POSITIONS) * len(STRENGTHS) / 2
    assert {setting.positions for setting in ranking} == set(POSITIONS)


def test_the_best_so_far_is_told_of_at_each_look(searched):
    search, _, told = searched
    assert 3 <= len(told) <= 5
    for setting, gap in told:
        assert setting in search.score.settings
        assert isinstance(gap, float)


def test_layers_and_positions_that_were_not_asked_for_are_never_scored(score):
    ranking = Search(score, [6, 2, 3], ("prompt", "last")).run()
    assert {setting.layer for setting in ranking} == {2, 3, 6}
    assert {setting.positions for setting in ranking} == {"prompt", "last"}
    assert {setting.mode for setting in ranking} == {"project"}


@pytest.mark.parametrize("strengths", [(1.25,), (-1.0, 0.7)])
def test_strengths_that_are_given_are_tried_exactly(score, strengths):
    ranking = Search(score, [3, 7], ("prompt",), strengths).run()
    tried = {(setting.layer, setting.strength) for setting in ranking}
    assert tried == {(layer, strength) for layer in (3, 7) for strength in strengths}


def test_modes_are_searched_side_by_side(score):
    ranking = Search(score, [6, 7], ("prompt",), None, ("project", "add")).run()
    assert {setting.mode for setting in ranking} == {"project", "add"}
    assert all(setting.strength in STRENGTHS for setting in ranking)


class Surface:
    """Scores that are written down, in the place of a Score: the recovered gap is worth(setting)."""

    targets = (None,) * max(N_TARGETS)

    def __init__(self, worth) -> None:
        self._worth = worth
        self._scored: dict[Setting, int] = {}

    def extend(self, settings, n_targets) -> None:
        for setting in settings:
            self._scored[setting] = max(n_targets, self._scored.get(setting, 0))

    def n_targets(self, setting) -> int:
        return self._scored.get(setting, 0)

    def gap(self, setting, _n_targets=None) -> float:
        return self._worth(setting)

    of = gap

    @property
    def settings(self) -> list[Setting]:
        return list(self._scored)


@given(
    best=st.integers(0, 39),
    strength=st.sampled_from(STRENGTHS),
    positions=st.sampled_from(POSITIONS),
    n_layer=st.integers(1, 40),
)
@effort(max_examples=60, deadline=None)
def test_on_a_smooth_surface_the_best_setting_of_a_deep_model_is_found(best, strength, positions, n_layer):
    best = min(best, n_layer - 1)

    def worth(setting: Setting) -> float:
        far = abs(setting.layer - best) / 40 + 0.01 * abs(setting.strength - strength)
        return 1 - far - 0.2 * (setting.positions != positions)

    surface = Surface(worth)
    winner = Search(surface, range(n_layer)).run()[0]
    assert winner.positions == positions
    assert abs(winner.layer - best) <= 1
    assert abs(STRENGTHS.index(winner.strength) - STRENGTHS.index(strength)) <= 1
    assert len(surface.settings) <= 3 * (N_COARSE + 2 * n_layer / N_COARSE + 8)


def test_a_single_layer_is_no_error():
    ranking = Search(Surface(lambda _setting: 0.0), [5]).run()
    assert {setting.layer for setting in ranking} == {5}


# --- which of them are checked ---


def test_positions_take_turns_in_the_check():
    likeliest = [Setting(layer, "all", 1.0) for layer in (2, 6, 10)]
    others = [Setting(4, "last", 1.0), Setting(4, "prompt", 1.0), Setting(8, "prompt", 1.0)]
    chosen = candidates([*likeliest, *others], 5)
    assert chosen == [likeliest[0], others[0], others[1], likeliest[1], others[2]]


def test_neighbours_are_not_both_checked():
    ranking = [Setting(layer, "all", strength) for layer in (5, 4, 6, 7) for strength in (1.0, 2.0)]
    assert candidates(ranking, 6) == [Setting(5, "all", 1.0), Setting(7, "all", 1.0)]


def test_modes_are_kinds_of_their_own():
    ranking = [Setting(5, "all", 1.0), Setting(5, "all", 1.0, "add")]
    assert candidates(ranking, 6) == ranking


def test_layers_default_to_those_with_a_direction(extracted):
    assert usable_layers(extracted["title"], None) == list(range(8))
    assert usable_layers(extracted["title"], (3, 5)) == [3, 5]
    with pytest.raises(PlanError, match="out of range"):
        usable_layers(extracted["title"], (8,))


def test_grids():
    assert grid_layers(8) == range(8)
    assert grid_layers(28) == range(5, 28, 2)


def test_gates_that_were_learned_together_are_tried_together():
    gate = (np.full(4, 0.1), 1.0, np.ones(4), 1.0)
    vector = ControlVector.from_gates({2: gate, 4: gate}, n_layer=8)
    assert usable_layers(vector, None) == [(2, 4)]
    assert usable_layers(vector, (4,)) == [4]
    settings = [Setting((2, 4), "all", strength, "gate") for strength in (1.0, 1.5)]
    assert candidates(settings, 2) == settings[:1]
    assert str(settings[0]) == "gate at layers 2, 4, all, strength 1"
    assert settings[0].of(vector).layers == (2, 4)
