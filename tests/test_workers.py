"""The processes that run the tests: how many, and on which cores."""

from __future__ import annotations

import os

import pytest
from workers import available_cores, fitting, share

GB = 2**30


@pytest.mark.parametrize(
    ("n_cores", "memory", "n"),
    [(1, 64 * GB, 0), (2, 64 * GB, 2), (8, 64 * GB, 4), (16, 8 * GB, 4), (16, 6 * GB, 3), (2, 3 * GB, 0)],
)
def test_the_cores_the_memory_and_a_bound_decide(n_cores, memory, n):
    assert fitting(n_cores, memory) == n


def test_the_cores_are_shared_out():
    assert [share(worker, 2, [0, 1]) for worker in range(2)] == [[0], [1]]
    assert [share(worker, 3, [0, 2, 4, 6, 8, 10, 12]) for worker in range(3)] == [[0, 2], [4, 6], [8, 10]]
    assert [share(worker, 3, [4, 5]) for worker in range(3)] == [[4], [5], [4]]


def test_a_worker_is_on_its_own_share():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("these tests run in one process (-n 0)")
    n_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    assert len(available_cores()) <= max(1, (os.cpu_count() or 1) // n_workers)
