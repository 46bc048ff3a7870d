"""Best first finds what asking everything finds, for less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.evaluate.best_first import MOST, best_first, most_runs


def search(good: np.ndarray, levels: list[int], **options) -> tuple[list[int], np.ndarray]:
    """good: (candidates, queries) of outcomes. Returns the finished and how often each pair was tried."""
    tried = np.zeros(good.shape, int)

    def run(cells) -> None:
        for cell in cells:
            tried[cell] += 1

    def failures(i: int) -> int:
        return int((~good[i] & (tried[i] > 0)).sum())

    return best_first(*good.shape, run, failures, lambda i: levels[i], **options), tried


@st.composite
def tables(draw) -> tuple[np.ndarray, list[int]]:
    """Outcomes and levels of up to 30 candidates, from hopeless to perfect ones."""
    n, n_queries = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    chances = rng.random(n) ** draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 100.0]))
    return rng.random((n, n_queries)) < chances[:, None], [-1, *sorted(rng.integers(0, 6, n - 1).tolist())]


@given(tables())
@settings(max_examples=300, deadline=None)
def test_the_winner_is_that_of_asking_everything(table) -> None:
    good, levels = table
    keys = [(-row.sum(), level) for row, level in zip(good, levels, strict=True)]
    finished, tried = search(good, levels, most=1.0)
    assert {i for i, key in enumerate(keys) if key == min(keys)} <= set(finished)
    assert tried.max() == 1 and (tried[finished] == 1).all()


@given(tables())
@settings(max_examples=200, deadline=None)
def test_it_ends_soon_with_the_model_alone_among_the_finished(table) -> None:
    finished, tried = search(*table)
    assert 0 in finished and tried.max() == 1
    assert tried.sum() <= most_runs(*tried.shape) <= tried.size


@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_where_nothing_is_good_it_stops_at_half(chance) -> None:
    good = np.random.default_rng(3).random((40, 8)) < chance
    good[0] = False
    tried = search(good, [-1, *range(39)])[1]
    assert MOST * tried.size <= tried.sum() <= 0.55 * tried.size


def test_a_perfect_candidate_ends_the_search() -> None:
    good = np.zeros((40, 8), bool)
    good[4] = True
    finished, tried = search(good, [-1, *range(39)])
    assert 4 in finished and tried.sum() < 0.2 * tried.size


def test_equals_of_the_winners_level_are_all_finished_and_those_above_need_not_be() -> None:
    finished, tried = search(np.ones((10, 8), bool) & (np.arange(10) > 0)[:, None], [-1, *[0] * 3, *[1] * 6])
    assert {1, 2, 3} <= set(finished)
    assert tried[5:].sum() == 0
