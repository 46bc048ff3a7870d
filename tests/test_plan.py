"""localsteer/plan.py: which edits a token gets, and which plans are equal."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from vector_cases import axis_vectors, exact_vector, gated_vector, imported_vector, vector_along

from localsteer.errors import MismatchError, PlanError
from localsteer.plan import PARALLEL_COSINE, Plan, PositionClass, active

PROMPT, LAST, GENERATION, _FORM = PositionClass
COVERED = {
    "all": {PROMPT, LAST, GENERATION},
    "prompt": {PROMPT, LAST},
    "last": {LAST, GENERATION},
    "generation": {GENERATION},
}


def at_angle(cosine: float) -> tuple[list[float], list[float]]:
    return [2.0, 0, 0], [3 * cosine, 3 * math.sqrt(1 - cosine**2), 0]


@pytest.mark.parametrize("positions", COVERED)
def test_positions_cover_their_classes(positions):
    assert {cls for cls in PositionClass if active(positions, cls)} == COVERED[positions]


def test_unknown_positions_are_refused():
    with pytest.raises(PlanError, match="unknown positions 'first'"):
        active("first", LAST)


@pytest.mark.parametrize("positions", COVERED)
def test_a_program_exists_for_the_covered_classes_at_the_chosen_layer_alone(positions):
    plan = Plan.from_vectors([exact_vector(positions=positions)])
    assert plan.layers == (2,)
    assert {cls for cls in PositionClass if plan.program(2, cls)} == COVERED[positions]
    assert not any(plan.program(layer, cls) for layer in (0, 1, 3, 99) for cls in PositionClass)


def test_a_program_holds_what_the_vector_says():
    vector = exact_vector(strength=0.5, one_sided=True, cap=2.0)
    program = Plan.from_vectors([vector]).program(2, LAST)
    assert program.writers.dtype == program.readers.dtype == np.float32 and program.writers.shape == (1, 8)
    assert program.writers[0].tobytes() == vector.unit(2).tobytes()
    np.testing.assert_allclose(program.readers, -0.5 * program.writers, rtol=1e-6)
    np.testing.assert_allclose(program.biases, [0.5 * 1.25], rtol=1e-6)
    assert (program.one_sided.tolist(), program.caps.tolist(), program.caps.dtype) == (
        [True],
        [2.0],
        np.float32,
    )
    assert (program.n_solved, program.ridge, program.normalised.tolist()) == (0, 0, [False])


def test_no_cap_is_an_infinite_cap():
    assert Plan.from_vectors([exact_vector()]).program(2, LAST).caps.tolist() == [math.inf]


def test_ablate_aims_at_zero():
    assert Plan.from_vectors([imported_vector(mode="ablate")]).program(2, LAST).biases.tolist() == [0.0]


def test_adds_at_one_layer_become_one_row_that_reads_nothing():
    vector = imported_vector()
    program = Plan.from_vectors([vector.at(strength=2), vector.at(strength=-0.5)]).program(2, LAST)
    assert not program.readers.any() and program.biases.tolist() == [1.0] and program.n_solved == 0
    assert program.writers.tolist() == [(1.5 * vector.directions[2]).tolist()]


def test_what_has_a_target_comes_first_and_what_is_constant_last():
    vectors = [
        imported_vector(),
        gated_vector(),
        exact_vector(),
        imported_vector(strength=2),
        *axis_vectors(2),
    ]
    plan = Plan.from_vectors(vectors)
    program = plan.program(2, LAST)
    assert (program.n_solved, len(program.biases)) == (3, 5)
    assert program.normalised.tolist() == [False, False, False, True, False]
    assert program.readers.any(axis=1).tolist() == [True, True, True, True, False]
    assert [edit.mode for edit in plan.rows(2, LAST)] == ["project", "project", "project", "gate"]


def test_a_gate_is_its_reader_bias_and_direction_times_the_strength():
    vector = gated_vector(strength=-0.5, cap=2.0)
    program = Plan.from_vectors([vector]).program(2, LAST)
    assert program.writers[0].tolist() == (-vector.directions[2]).tolist()
    assert program.readers[0].tolist() == (0.5 * vector.readers[2]).tolist()
    assert program.biases.tolist() == [0.5 * vector.biases[2]] and program.normalised.tolist() == [True]
    np.testing.assert_allclose(program.caps, 2.0 / np.linalg.norm(vector.directions[2]), rtol=1e-6)


def test_gates_at_one_layer_are_not_solved_jointly():
    program = Plan.from_vectors([gated_vector(), gated_vector()]).program(2, LAST)
    assert (program.n_solved, len(program.biases)) == (0, 2)


def test_a_vector_at_two_layers_is_two_edits_with_their_own_targets():
    plan = Plan.from_vectors([exact_vector(layers=(1, 3))])
    assert plan.layers == (1, 3)
    assert [edit.target for edit in plan.edits] == [1.125, 1.375]


def test_programs_can_not_be_written():
    program = Plan.from_vectors([exact_vector()]).program(2, LAST)
    with pytest.raises(ValueError):
        program.writers[0, 0] = 1


def test_strength_zero_leaves_an_empty_plan():
    plan = Plan.from_vectors([exact_vector(strength=0), imported_vector(strength=0)])
    assert plan.is_empty and plan.layers == () and plan.n_embd == 0
    assert plan.key == Plan.none().key == Plan.from_vectors([]).key == b""
    assert plan.program(2, LAST) is None


def test_a_plan_knows_its_width():
    assert Plan.from_vectors([exact_vector()]).n_embd == 8


def test_equal_plans_have_equal_keys_whatever_their_names():
    a = Plan.from_vectors([exact_vector()])
    b = Plan.from_vectors([exact_vector(name="other", provenance={})])
    assert a.key == b.key and a.key


def test_the_order_of_vectors_changes_neither_key_nor_programs():
    vectors = [exact_vector(layers=(layer,), strength=s) for layer, s in ((1, 1.0), (2, 0.5), (3, 1.0))]
    vectors.append(imported_vector(layers=(2,)))
    plans = [Plan.from_vectors(order) for order in itertools.permutations(vectors)]
    assert len({plan.key for plan in plans}) == 1
    assert len({plan.program(2, LAST).writers.tobytes() for plan in plans}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.5}, {"layer": 3}, {"mode": "ablate"}, {"mode": "add"}, {"positions": "last"},
        {"one_sided": True}, {"cap": 2.0},
    ],
)  # fmt: skip
def test_every_setting_changes_the_key(change):
    vector = exact_vector()
    assert Plan.from_vectors([vector]).key != Plan.from_vectors([vector.at(**change)]).key


def test_target_direction_and_ridge_change_the_key():
    plans = [
        Plan.from_vectors([vector_along([1, 0], 1.0)]),
        Plan.from_vectors([vector_along([1, 0], 2.0)]),
        Plan.from_vectors([vector_along([1, 1], 1.0)]),
        Plan.from_vectors([vector_along([1, 0], 1.0)], ridge=0.1),
    ]
    assert len({plan.key for plan in plans}) == 4


def test_the_length_of_a_direction_matters_to_add_alone():
    short, long = vector_along([1, 0], 1.0), vector_along([2, 0], 1.0)
    assert Plan.from_vectors([short]).key == Plan.from_vectors([long]).key
    assert Plan.from_vectors([short.at(mode="add")]).key != Plan.from_vectors([long.at(mode="add")]).key


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.5}, {"strength": -1}, {"mode": "add"}, {"positions": "last"}, {"one_sided": True},
        {"cap": 2.0},
    ],
)  # fmt: skip
def test_every_setting_of_a_gate_changes_the_key(change):
    vector = gated_vector()
    assert Plan.from_vectors([vector]).key != Plan.from_vectors([vector.at(**change)]).key


@pytest.mark.parametrize("name", ["directions", "readers", "biases"])
def test_every_array_of_a_gate_changes_the_key(name):
    vector = gated_vector()
    other = replace(vector, **{name: getattr(vector, name) * np.float32(1.5)})
    assert Plan.from_vectors([vector]).key != Plan.from_vectors([other]).key


def test_a_gate_that_reads_nothing_has_the_key_of_what_it_adds():
    vector = gated_vector(readers=np.zeros((4, 8)), biases=np.ones(4))
    assert Plan.from_vectors([vector]).key == Plan.from_vectors([vector.at(mode="add")]).key


def test_the_mean_projection_does_not_matter_to_add():
    vector, other = exact_vector(mode="add"), imported_vector()
    assert Plan.from_vectors([vector]).key == Plan.from_vectors([other]).key


def test_a_class_key_tells_what_a_cached_token_depends_on():
    everywhere, prompt = (Plan.from_vectors([exact_vector(positions=p)]) for p in ("all", "prompt"))
    assert everywhere.class_key(PROMPT) == everywhere.class_key(GENERATION) == prompt.class_key(LAST) != b""
    assert prompt.class_key(GENERATION) == Plan.none().class_key(PROMPT) == b""


@pytest.mark.parametrize("cosine", [0.991, -0.991, 1.0, -1.0])
def test_nearly_parallel_directions_are_refused_by_name_cosine_and_layer(cosine):
    vectors = [vector_along(d, name=n) for d, n in zip(at_angle(cosine), ("json", "lower"), strict=True)]
    with pytest.raises(PlanError) as error:
        Plan.from_vectors(vectors)
    said = str(error.value)
    assert (
        "json" in said
        and "lower" in said
        and f"{cosine:.4f}" in said
        and "layer 0" in said
        and "ridge" in said
    )


@pytest.mark.parametrize("cosine", [PARALLEL_COSINE - 0.001, 0.5, 0, -0.5, 0.001 - PARALLEL_COSINE])
def test_directions_below_the_limit_are_accepted_in_silence(cosine):
    plan = Plan.from_vectors([vector_along(d) for d in at_angle(cosine)])
    assert plan.program(0, LAST).n_solved == 2 and plan.notices == ()


def test_a_ridge_accepts_parallel_directions_and_says_so_once():
    vectors = [vector_along(d, name=n) for d, n in zip(at_angle(0.999), ("json", "lower"), strict=True)]
    plan = Plan.from_vectors(vectors, ridge=0.1)
    assert len(plan.notices) == 1
    assert "json" in plan.notices[0] and "lower" in plan.notices[0] and "ridge 0.1" in plan.notices[0]


def test_parallel_directions_may_stand_at_different_layers_or_positions():
    Plan.from_vectors([exact_vector(layers=(1,)), exact_vector(layers=(2,))])
    Plan.from_vectors([exact_vector(positions="generation"), exact_vector(positions="prompt")])


def test_parallel_directions_that_meet_in_one_class_are_refused():
    with pytest.raises(PlanError, match="nearly parallel at layer 2"):
        Plan.from_vectors([exact_vector(positions="last"), exact_vector(positions="prompt")])


def test_parallel_adds_are_no_problem():
    Plan.from_vectors([imported_vector(), imported_vector(), exact_vector()])


def test_three_directions_in_a_plane_are_refused_though_no_pair_is_parallel():
    thirds = [[math.cos(a), math.sin(a), 0] for a in (0, math.pi / 3, 2 * math.pi / 3)]
    with pytest.raises(PlanError, match="3 directions at layer 0 are nearly linearly dependent"):
        Plan.from_vectors([vector_along(d, name=str(i)) for i, d in enumerate(thirds)])


@pytest.mark.parametrize("ridge", [-0.1, math.nan, math.inf])
def test_a_ridge_must_be_finite_and_not_negative(ridge):
    with pytest.raises(PlanError, match="ridge must"):
        Plan.from_vectors([exact_vector()], ridge=ridge)


def test_vectors_of_two_models_do_not_go_into_one_plan():
    with pytest.raises(MismatchError, match="4 layers x 8 but wide is 4 x 16"):
        Plan.from_vectors([exact_vector(), exact_vector(n_embd=16, name="wide")])


def test_a_plan_shows_strength_and_layer():
    assert repr(Plan.from_vectors([exact_vector(strength=0.5)])) == "Plan(json:0.5@2)"
    assert repr(Plan.none()) == "Plan(none)"


@pytest.mark.parametrize("mode", ["project", "add", "ablate", "gate"])
def test_an_edit_that_float32_can_not_hold_is_refused(mode):
    with pytest.raises(PlanError, match="adds more than a state can hold: lower the strength"):
        Plan.from_vectors([gated_vector(mode=mode, strength=1e300, mean_with=np.ones(4))])
