"""localsteer/vector.py: what a ControlVector accepts, keeps and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from vector_cases import exact_directions, exact_vector, gated_vector, imported_vector

from localsteer.errors import MismatchError, PlanError, VectorFileError
from localsteer.terms import MODES, POSITIONS
from localsteer.vector import ControlVector, check_model, describe


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def make(directions=None, mean_with=None, **settings) -> ControlVector:
    directions = exact_directions() if directions is None else directions
    mean_with = np.ones(len(directions)) if mean_with is None else mean_with
    return ControlVector(directions, mean_with, None, None, None, **{"layers": (2,)} | settings)


def test_arrays_are_copied_and_can_not_be_written():
    mine = exact_directions()
    vector = make(mine)
    mine[:] = 0
    assert vector.directions.any()
    with pytest.raises(ValueError):
        vector.directions[0, 0] = 1


def test_arrays_become_float32_rows():
    vector = make(exact_directions().astype(np.float64).tolist(), [1, 2, 3, 4])
    assert vector.directions.dtype == np.float32 and vector.mean_with.dtype == np.float32
    assert vector.directions.flags.c_contiguous
    assert (vector.n_layer, vector.n_embd) == (4, 8)


def test_a_vector_can_not_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().strength = 2


def test_at_changes_only_what_it_is_told():
    vector = exact_vector()
    other = vector.at(layer=3, strength=0.5)
    assert (other.layers, other.strength) == ((3,), 0.5)
    assert (other.mode, other.positions, other.name) == (vector.mode, vector.positions, vector.name)
    assert (vector.layers, vector.strength) == ((2,), 1.0)
    assert other.directions is vector.directions


def test_at_takes_every_setting():
    other = exact_vector().at(layer=[3, 1, 3], mode="ablate", positions="last", one_sided=True, cap=2)
    assert other.layers == (1, 3)
    assert (other.mode, other.positions, other.one_sided, other.cap) == ("ablate", "last", True, 2.0)


def test_an_infinite_cap_is_no_cap():
    assert exact_vector(cap=2.0).at(cap=math.inf).cap is None


def test_changing_to_add_drops_what_bounds_the_dynamic_weight():
    other = exact_vector(one_sided=True, cap=2.0).at(mode="add")
    assert (other.one_sided, other.cap) == (False, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_mode_and_position_is_accepted(mode, positions):
    vector = gated_vector(mean_with=np.ones(4))
    assert vector.at(mode=mode, positions=positions).mode == mode


def test_a_gate_keeps_its_arrays_and_falls_back_to_its_direction():
    vector = gated_vector()
    assert vector.gated == (1, 2) and not vector.readers.flags.writeable
    assert vector.at(mode="add").directions is vector.directions
    assert vector.at(mode="add").at(mode="gate").readers is vector.readers


def test_a_vector_without_readers_has_no_gate():
    with pytest.raises(PlanError) as error:
        exact_vector().at(mode="gate")
    assert message(error) == "json has no learned gate: use add or another mode."


def test_a_layer_without_a_gate_is_refused_and_the_others_are_named():
    with pytest.raises(PlanError) as error:
        gated_vector().at(layer=3)
    assert message(error) == "gated has no gate at layer 3: choose from 1-2."


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"readers": None}, "one is missing"),
        ({"biases": None}, "one is missing"),
        ({"readers": np.ones((4, 7))}, "readers must be (4, 8) as the directions are, not (4, 7)"),
        ({"biases": np.ones(3)}, "biases must hold one number per layer (4), not (3,)"),
        ({"readers": np.full((4, 8), np.inf)}, "readers holds NaN or infinite values"),
        ({"biases": np.full(4, np.nan)}, "biases holds NaN or infinite values"),
    ],
)
def test_arrays_that_hold_no_gate_are_refused(arrays, said):
    with pytest.raises(VectorFileError) as error:
        gated_vector(**arrays)
    assert said in message(error)


@pytest.mark.parametrize("settings", [{"mean_gate": 0.0}, {"mean_gate": -1.0, "one_sided": True}])
def test_a_gate_without_a_mean_effect_is_refused(settings):
    with pytest.raises(PlanError, match="no constant effect to fall back on"):
        ControlVector.from_gate(1, np.ones(8), 0.0, np.ones(8), n_layer=4, **settings)


def test_a_description_of_a_gate_has_its_reader_and_bias_where_it_acts():
    layers = json.loads(json.dumps(describe(gated_vector())))["by_layer"]
    assert [layer.get("gate_bias") for layer in layers] == [None, 0.5, -0.25, None]
    assert layers[2]["gate_reader_norm"] == pytest.approx(np.linalg.norm(gated_vector().readers[2]))


def test_numpy_numbers_are_accepted():
    vector = make(layers=(np.int64(1),), strength=np.float32(0.5))
    assert vector.layers == (1,) and type(vector.layers[0]) is int and type(vector.strength) is float


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "push"}, "unknown mode 'push'"),
        ({"positions": "first"}, "unknown positions 'first'"),
        ({"layers": (4,)}, "layer 4 is out of range: json has layers 0 to 3"),
        ({"layers": (-1,)}, "layer -1 is out of range"),
        ({"layers": ()}, "no layer is chosen"),
        ({"layers": 1.5}, "layer 1.5 is not a layer number"),
        ({"layers": "12"}, "not a layer number"),
        ({"strength": math.nan}, "strength must be a finite number, not nan"),
        ({"strength": math.inf}, "strength must be a finite number, not inf"),
        ({"strength": "much"}, "strength 'much' is not a number"),
        ({"cap": 0.0}, "cap must be above 0"),
        ({"cap": -1.0}, "cap must be above 0"),
        ({"cap": math.nan}, "cap must be a finite number"),
        ({"mode": "add", "cap": 1.0}, "add has none"),
        ({"mode": "add", "one_sided": True}, "add has none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(PlanError) as error:
        exact_vector(**settings)
    assert said in message(error)


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        (np.ones(8), "directions must be (n_layer, n_embd), not (8,)"),
        (np.ones((0, 8)), "directions must be (n_layer, n_embd)"),
        (np.ones((4, 0)), "directions must be (n_layer, n_embd)"),
        (np.full((4, 8), np.nan), "NaN or infinite"),
        (np.full((4, 8), 1e39), "NaN or infinite"),
        ([[1, 2], [3]], "must be an array of numbers"),
        ([["a"]], "must be an array of numbers"),
    ],
)
def test_arrays_that_hold_no_vector_are_refused(directions, said):
    with pytest.raises(VectorFileError) as error:
        make(directions, [1.0] * 4)
    assert said in message(error)


def test_a_read_only_array_is_checked_as_well():
    broken = np.full((4, 8), np.nan, dtype=np.float32)
    broken.flags.writeable = False
    with pytest.raises(VectorFileError, match="NaN"):
        make(broken)


def test_a_statistic_of_another_length_is_refused():
    with pytest.raises(VectorFileError, match=r"mean_with must hold one number per layer \(4\), not \(3,\)"):
        make(mean_with=np.ones(3))


def test_a_zero_direction_at_the_chosen_layer_is_refused_and_the_others_are_named():
    directions = exact_directions()
    directions[2] = 0
    with pytest.raises(PlanError) as error:
        make(directions)
    assert "no direction at layer 2" in message(error) and "0-1, 3" in message(error)
    assert make(directions, layers=(1,)).usable_layers == (0, 1, 3)


def test_an_import_can_add_and_ablate_but_not_project():
    vector = imported_vector()
    assert vector.at(mode="ablate").mode == "ablate"
    with pytest.raises(PlanError) as error:
        vector.at(mode="project")
    assert "plain has no mean projection" in message(error)


def test_a_unit_has_length_one_and_the_direction_of_its_row():
    vector = exact_vector()
    for layer in range(vector.n_layer):
        unit = vector.unit(layer)
        assert unit.dtype == np.float32
        assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1, abs=1e-6)
        length = np.linalg.norm(vector.directions[layer].astype(np.float64))
        assert unit * length == pytest.approx(vector.directions[layer], rel=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e37])
def test_a_unit_survives_extreme_lengths(scale):
    unit = make(exact_directions() * np.float32(scale)).unit(2)
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)


def test_a_unit_where_there_is_no_direction_is_refused():
    directions = exact_directions()
    directions[0] = 0
    with pytest.raises(PlanError, match="no direction at layer 0"):
        make(directions).unit(0)
    with pytest.raises(PlanError, match="out of range"):
        make().unit(9)


def test_a_vector_fits_the_model_that_it_was_made_for():
    check_model(exact_vector(), 4, 8, "llama")


def test_an_import_knows_no_architecture_and_is_checked_by_size():
    check_model(imported_vector(), 4, 8, "gemma2")


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        ((4, 16, "llama"), ("embedding width 8", "16")),
        ((6, 8, "llama"), ("number of layers 4", "6")),
        ((4, 8, "qwen2"), ("architecture llama", "qwen2")),
    ],
)
def test_a_vector_of_another_model_is_refused_with_both_numbers_and_what_to_do(model, numbers):
    with pytest.raises(MismatchError) as error:
        check_model(exact_vector(), *model)
    said = message(error)
    assert all(number in said for number in numbers)
    assert "json" in said and "extract the vector from this model" in said


def test_a_description_is_json_with_one_entry_per_layer():
    vector = exact_vector(cap=2.0)
    described = json.loads(json.dumps(describe(vector)))
    assert described["n_layer"] == len(described["by_layer"]) == 4
    assert (
        [layer["layer"] for layer in described["by_layer"] if layer["chosen"]] == [2] == described["layers"]
    )
    third = described["by_layer"][3]
    assert third["norm"] == pytest.approx(np.linalg.norm(vector.directions[3]))
    assert (third["mean_with"], third["mean_without"], third["std_with"]) == (1.375, -0.625, 0.1875)
    assert described["provenance"]["instruction"] == "Answer in JSON format."
    assert (described["mode"], described["strength"], described["cap"]) == ("project", 1.0, 2.0)


def test_a_description_of_an_import_has_no_projections():
    assert {layer["mean_with"] for layer in describe(imported_vector())["by_layer"]} == {None}


@pytest.mark.parametrize("kept", [None, 5, "json", {"a": 1}, [], [5]])
def test_phrasings_are_texts_whatever_a_file_holds(kept):
    assert make(provenance={"phrasings": kept}).phrasings == ()
    assert make(provenance={"phrasings": ["Use JSON.", kept]}).phrasings[0] == "Use JSON."


def test_a_vector_shows_its_settings_not_its_numbers():
    shown = repr(exact_vector(strength=0.75))
    assert shown == "ControlVector('json', 4 layers x 8, project at layer 2, strength 0.75, positions all)"


def test_vector_plan_and_steering_load_numpy_alone():
    code = (
        "import sys, localsteer.vector, localsteer.plan, localsteer.steering; "
        "print([m for m in ('torch', 'transformers', 'llama_cpp', 'gguf', 'click') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
