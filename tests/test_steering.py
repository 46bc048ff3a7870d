"""localsteer/steering.py: the mathematics that the native code and the PyTorch hook are held to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_cases import exact_vector, floats32, gated_vector, imported_vector, problems, vector_along

from localsteer.plan import Plan, PositionClass
from localsteer.steering import apply_program, dynamic_weights, steer
from localsteer.vector import ControlVector

PROMPT, LAST, GENERATION, _FORM = PositionClass
# x has entries of order 1 and dynamic weights stay below some hundred (PARALLEL_COSINE), so that rounding the
# result to float32 moves a projection by less than this.
CLOSE = 1e-3


def program(vectors, ridge=0.0):
    return Plan.from_vectors(vectors, ridge=ridge).program(0, LAST)


def projections(x, vectors) -> np.ndarray:
    units = np.stack([vector.unit(0) for vector in vectors]).astype(np.float64)
    return x.astype(np.float64) @ units.T


def targets(vectors) -> np.ndarray:
    return np.array([vector.mean_with[0] for vector in vectors], dtype=np.float64)


@settings(deadline=None)
@given(problems(max_k=1))
def test_projection_after_project_is_the_target(problem):
    x, vectors = problem
    assert projections(apply_program(x, program(vectors)), vectors) == pytest.approx(
        targets(vectors)[0], abs=CLOSE
    )


@settings(deadline=None)
@given(problems())
def test_joint_projections_all_reach_their_targets(problem):
    x, vectors = problem
    after = projections(apply_program(x, program(vectors)), vectors)
    np.testing.assert_allclose(after, np.broadcast_to(targets(vectors), after.shape), atol=CLOSE)


@settings(deadline=None)
@given(problems())
def test_what_is_orthogonal_to_the_directions_stays(problem):
    x, vectors = problem
    change = (apply_program(x, program(vectors)) - x).astype(np.float64)
    units = np.stack([vector.unit(0) for vector in vectors]).astype(np.float64)
    inside = change @ np.linalg.pinv(units) @ units
    np.testing.assert_allclose(change, inside, atol=CLOSE)


@settings(deadline=None)
@given(problems())
def test_the_joint_solve_is_the_least_change(problem):
    x, vectors = problem
    units = np.stack([vector.unit(0) for vector in vectors]).astype(np.float64)
    wanted = targets(vectors) - projections(x, vectors)
    least = np.stack([np.linalg.lstsq(units, row, rcond=None)[0] for row in wanted])
    np.testing.assert_allclose(apply_program(x, program(vectors)) - x, least, atol=CLOSE)


@settings(deadline=None)
@given(problems())
def test_twice_equals_once(problem):
    x, vectors = problem
    once = apply_program(x, program(vectors))
    np.testing.assert_allclose(apply_program(once, program(vectors)), once, atol=CLOSE)


@settings(deadline=None)
@given(problems(), st.sampled_from(["project", "add", "ablate"]))
def test_strength_zero_keeps_every_bit(problem, mode):
    x, vectors = problem
    plan = Plan.from_vectors([vector.at(mode=mode, strength=0) for vector in vectors])
    assert steer(x, plan, 0, [LAST] * len(x)).tobytes() == x.tobytes()


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0))
def test_strength_goes_that_part_of_the_way(problem, strength):
    x, vectors = problem
    before = projections(x, vectors)
    plan = Plan.from_vectors([vectors[0].at(strength=strength)])
    after = projections(steer(x, plan, 0, [LAST] * len(x)), vectors)
    np.testing.assert_allclose(after, before + strength * (targets(vectors) - before), atol=CLOSE)


@settings(max_examples=30, deadline=None)
@given(problems(max_k=4))
def test_the_order_of_vectors_changes_no_bit(problem):
    x, vectors = problem
    results = {apply_program(x, program(order)).tobytes() for order in itertools.permutations(vectors)}
    assert len(results) == 1


def test_single_projections_do_not_commute_which_is_why_they_are_solved_jointly():
    a, b = vector_along([1, 0], 1.0), vector_along([1, 1], 1.0)
    x = np.array([[0.3, -0.7]], dtype=np.float32)
    ab = apply_program(apply_program(x, program([a])), program([b]))
    ba = apply_program(apply_program(x, program([b])), program([a]))
    assert np.abs(ab - ba).max() > 0.1


@settings(deadline=None)
@given(problems())
def test_ablate_leaves_no_projection(problem):
    x, vectors = problem
    ablated = [vector.at(mode="ablate") for vector in vectors]
    assert np.abs(projections(apply_program(x, program(ablated)), vectors)).max() < CLOSE


@settings(deadline=None)
@given(problems(max_k=1), st.floats(0.1, 2.0))
def test_one_sided_never_lowers_and_raises_to_the_target(problem, strength):
    x, vectors = problem
    one_sided = vectors[0].at(one_sided=True, strength=strength)
    before = projections(x, vectors)
    after = projections(apply_program(x, program([one_sided])), vectors)
    assert (after >= before - CLOSE).all()
    np.testing.assert_allclose(
        after, before + strength * np.maximum(targets(vectors) - before, 0), atol=CLOSE
    )


@settings(deadline=None)
@given(problems())
def test_one_sided_edits_solved_jointly_reach_their_targets_where_they_join(problem):
    x, vectors = problem
    before = projections(x, vectors)
    after = projections(apply_program(x, program([v.at(one_sided=True) for v in vectors])), vectors)
    joins = targets(vectors) > before
    wanted = np.broadcast_to(targets(vectors), before.shape)
    np.testing.assert_allclose(after[joins], wanted[joins], atol=CLOSE)


@settings(deadline=None)
@given(problems(max_k=2))
def test_a_token_where_no_one_sided_edit_joins_keeps_its_bits(problem):
    x, vectors = problem
    units = np.stack([vector.unit(0) for vector in vectors])
    low = [vector_along(u, -100.0, one_sided=True) for u in units]
    assert apply_program(x, program(low)).tobytes() == x.tobytes()


def test_one_sided_is_decided_for_each_token():
    x = np.array([[0.0, 5.0], [3.0, 5.0]], dtype=np.float32)
    after = apply_program(x, program([vector_along([1, 0], 1.0, one_sided=True)]))
    assert after.tolist() == [[1.0, 5.0], [3.0, 5.0]]


@settings(deadline=None)
@given(problems(), st.floats(0.01, 2.0))
def test_the_cap_bounds_the_dynamic_weight(problem, cap):
    x, vectors = problem
    free = dynamic_weights(x, program(vectors))
    capped = dynamic_weights(x, program([vector.at(cap=cap) for vector in vectors]))
    assert np.abs(capped).max() <= np.float32(cap)
    # the cap is part of the content by which edits are ordered, so weights are compared as sets
    wanted = np.clip(free, -np.float32(cap), np.float32(cap))
    np.testing.assert_allclose(np.sort(capped), np.sort(wanted), atol=1e-9)


def test_a_cap_moves_no_further_than_it_says():
    x = np.zeros((1, 2), dtype=np.float32)
    assert apply_program(x, program([vector_along([4, 0], 3.0, cap=0.5)])).tolist() == [[0.5, 0.0]]


@settings(deadline=None)
@given(problems(max_k=1), floats32(3.0))
def test_add_adds_the_unnormalised_direction(problem, strength):
    x, vectors = problem
    added = vectors[0].at(mode="add", strength=strength)
    after = apply_program(x, Plan.from_vectors([added]).program(0, LAST))
    wanted = x.astype(np.float64) + strength * added.directions[0].astype(np.float64)
    np.testing.assert_allclose(after, wanted, rtol=1e-6, atol=1e-5)


def test_adds_come_after_the_projections():
    x = np.array([[5.0, 7.0]], dtype=np.float32)
    vectors = [vector_along([2, 0], 1.0), vector_along([2, 0], mode="add", strength=3.0)]
    assert apply_program(x, program(vectors)).tolist() == [[7.0, 7.0]]


def test_a_ridge_approaches_the_targets_of_parallel_directions():
    x = np.zeros((1, 2), dtype=np.float32)
    pair = [vector_along([1, 0], 2.0), vector_along([1, 0], 2.0)]
    shares = dynamic_weights(x, program(pair, ridge=0.1))
    np.testing.assert_allclose(shares, [[2 / 2.1, 2 / 2.1]])


def test_a_small_ridge_hardly_changes_independent_directions():
    x = np.ones((1, 3), dtype=np.float32)
    pair = [vector_along([1, 0, 0], 2.0), vector_along([0, 1, 0], -1.0)]
    np.testing.assert_allclose(apply_program(x, program(pair, ridge=1e-6)), [[2, -1, 1]], atol=1e-5)


# --- the modes are one edit


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0), floats32(2.0), st.booleans(), st.sampled_from([None, 0.5]))
def test_project_is_what_the_paper_writes(problem, strength, target, one_sided, cap):
    """x + clip(s (zbar - u.x)) u, written out without readers and biases."""
    x, vectors = problem
    rows = vectors[0].directions
    vector = vector_along(rows[0], target, strength=strength or 1.0, one_sided=one_sided, cap=cap)
    u = vector.unit(0).astype(np.float64)
    weights = vector.strength * (np.float32(target) - x.astype(np.float64) @ u)
    weights = np.maximum(weights, 0) if one_sided else weights
    bound = np.inf if cap is None else cap
    wanted = x.astype(np.float64) + np.clip(weights, -bound, bound)[:, None] * u
    np.testing.assert_allclose(apply_program(x, program([vector])), wanted, atol=1e-5)


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0))
def test_ablate_is_project_to_zero(problem, strength):
    x, vectors = problem
    ablate = vectors[0].at(mode="ablate", strength=strength or 1.0)
    project = vector_along(ablate.directions[0], 0.0, strength=ablate.strength)
    assert apply_program(x, program([ablate])).tobytes() == apply_program(x, program([project])).tobytes()


def gate(reader, bias, writer, mean_gate=1.0, **settings) -> ControlVector:
    return ControlVector.from_gate(0, reader, bias, writer, mean_gate=mean_gate, n_layer=1, **settings)


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0))
def test_a_gate_without_a_reader_adds_its_bias(problem, strength):
    x, vectors = problem
    v, strength = vectors[0].directions[0], strength or 1.0
    gated = gate(np.zeros(len(v)), 1.0, v, strength=abs(strength))
    assert (
        apply_program(x, program([gated])).tobytes()
        == apply_program(x, program([gated.at(mode="add")])).tobytes()
    )
    negative = gate(np.zeros(len(v)), 1.0, v, strength=-abs(strength))
    np.testing.assert_allclose(
        apply_program(x, program([negative])), apply_program(x, program([negative.at(mode="add")])), atol=1e-5
    )


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0), st.booleans(), st.sampled_from([None, 0.5]), st.floats(0.1, 3))
def test_a_planted_gate_is_applied_as_planted(problem, bias, clipped, cap, mean_gate):
    """Whatever mean it was divided by, the edit is x + clip(w . x/rms(x) + b) z."""
    x, _ = problem
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=(2, x.shape[1]))
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(axis=1))
    weights = x @ w / rms + bias
    weights = np.maximum(weights, 0) if clipped else weights
    bound = np.inf if cap is None else cap / np.linalg.norm(z)
    wanted = x + np.clip(weights, -bound, bound)[:, None] * z
    vector = gate(w, bias, z, mean_gate, one_sided=clipped, cap=cap)
    np.testing.assert_allclose(apply_program(x, program([vector])), wanted, atol=1e-4)


@settings(deadline=None)
@given(problems(max_k=1), floats32(2.0), st.booleans())
def test_a_negative_strength_takes_away_what_a_positive_one_adds(problem, bias, clipped):
    x, _ = problem
    w, z = np.random.default_rng(1).normal(size=(2, x.shape[1]))
    up, down = (
        apply_program(x, program([gate(w, bias, z, one_sided=clipped, strength=s)])).astype(np.float64) - x
        for s in (0.7, -0.7)
    )
    np.testing.assert_allclose(up, -down, atol=1e-5)


def test_the_fallback_of_a_gate_is_its_mean_effect():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 12)).astype(np.float32)
    w, z = rng.normal(size=(2, 12))
    gates = np.maximum(x @ w / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1)) + 0.3, 0)
    vector = gate(w, 0.3, z, gates.mean(), one_sided=True)
    change = (apply_program(x, program([vector])).astype(np.float64) - x).mean(axis=0)
    np.testing.assert_allclose(vector.directions[0], change, atol=1e-5)
    np.testing.assert_allclose(vector.at(mode="add").directions[0], gates.mean() * z, rtol=1e-5)


def test_a_clipped_gate_leaves_tokens_below_zero_alone():
    x = np.array([[3.0, 4.0], [-3.0, 4.0]], dtype=np.float32)
    after = apply_program(x, program([gate([1.0, 0.0], -0.5, [0.0, 1.0], one_sided=True)]))
    assert after[0, 1] > 4 and after[1].tobytes() == x[1].tobytes()


def test_a_gate_reads_the_state_before_the_other_edits():
    x = np.array([[3.0, 4.0]], dtype=np.float32)
    vectors = [vector_along([1, 0], 0.0), gate([1.0, 0.0], 0.0, [0.0, 1.0])]
    rms = np.sqrt(12.5)
    np.testing.assert_allclose(apply_program(x, program(vectors)), [[0.0, 4 + 3 / rms]], rtol=1e-6)


def test_a_row_of_zeros_gets_the_bias_of_a_gate():
    x = np.zeros((1, 2), dtype=np.float32)
    assert apply_program(x, program([gate([1.0, 0.0], 0.5, [0.0, 2.0])])).tolist() == [[0.0, 1.0]]


def test_a_gate_at_another_layer_is_another_gate():
    x = np.ones((1, 8), dtype=np.float32)
    first, second = (steer(x, Plan.from_vectors([gated_vector(layers=(il,))]), il, [LAST]) for il in (1, 2))
    assert first.tobytes() != second.tobytes()


def test_classes_are_steered_by_their_own_programs():
    vector = vector_along([1, 0], 9.0, positions="last")
    x = np.zeros((4, 2), dtype=np.float32)
    after = steer(x, Plan.from_vectors([vector]), 0, [PROMPT, PROMPT, LAST, GENERATION])
    assert after[:, 0].tolist() == [0, 0, 9, 9]


def test_other_layers_are_left_alone():
    x = np.ones((2, 8), dtype=np.float32)
    plan = Plan.from_vectors([exact_vector(layers=(1,))])
    assert steer(x, plan, 2, [LAST, LAST]).tobytes() == x.tobytes()
    assert steer(x, plan, 1, [LAST, LAST]).tobytes() != x.tobytes()


def test_the_input_is_never_written():
    x = np.ones((2, 8), dtype=np.float32)
    plan = Plan.from_vectors([exact_vector(), imported_vector()])
    steer(x, plan, 2, [LAST, LAST])
    apply_program(x, plan.program(2, LAST))
    assert (x == 1).all()


def test_each_token_is_steered_as_if_alone():
    x = np.arange(40, dtype=np.float32).reshape(5, 8) / 16
    plan = Plan.from_vectors([exact_vector(one_sided=True), imported_vector()])
    together = apply_program(x, plan.program(2, LAST))
    alone = np.concatenate([apply_program(row[None], plan.program(2, LAST)) for row in x])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_broken_state_stays_visibly_broken_and_alone():
    x = np.array([[np.nan, 1.0], [0.5, 1.0]], dtype=np.float32)
    after = apply_program(x, program([vector_along([1, 0], 2.0)]))
    assert np.isnan(after[0]).any() and after[1].tolist() == [2.0, 1.0]


def test_no_program_is_the_identity():
    x = np.ones((2, 3), dtype=np.float32)
    assert apply_program(x, None).tobytes() == x.tobytes()
