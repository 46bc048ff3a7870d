"""convert/: control-vector files, byte by byte."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import make_golden
import make_hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vector_cases import PROVENANCE, exact_directions, exact_vector, gated_vector, imported_vector, same

from localsteer.convert import CONVENTIONS, export_static, import_vector, keys, read_vector, static_vector
from localsteer.convert.gguf_file import GgufFile, open_gguf
from localsteer.convert.read import parse_vector
from localsteer.convert.write import write_vector
from localsteer.errors import LocalsteerError, PlanError, VectorFileError
from localsteer.terms import MODES, POSITIONS
from localsteer.vector import ControlVector

DATA = Path(__file__).parent / "data"
ROWS = exact_directions()
# Enough for any of these files many times over; what a hostile count claims is gigabytes and more.
MEMORY = 32 << 20


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400
    return text


# --- writing and reading


def test_a_vector_is_read_back_to_the_last_bit(tmp_path):
    vector = exact_vector(strength=0.1, cap=1 / 3, one_sided=True, positions="last", layers=(1, 3))
    vector.save(tmp_path / "v.gguf")
    assert same(ControlVector.load(tmp_path / "v.gguf"), vector)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_disk_that_fills_up_leaves_the_file_before_and_nothing_else(tmp_path, share):
    """Wherever the file is cut, in the tensors too, whose last bytes numpy would lose without an error."""
    resource = pytest.importorskip("resource", reason="no limit of file sizes here")
    path, rows = tmp_path / "v.gguf", np.ones((8, 512), np.float32)
    imported_vector().save(path)
    before = path.read_bytes()
    bigger = ControlVector(rows, None, None, None, None, (1,), mode="add")
    bigger.save(tmp_path / "whole.gguf")
    size = (tmp_path / "whole.gguf").stat().st_size
    (tmp_path / "whole.gguf").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        with pytest.raises(VectorFileError, match="can't be written"):
            bigger.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["v.gguf"]


def test_provenance_is_read_back_as_it_was(tmp_path):
    exact_vector().save(tmp_path / "v.gguf")
    assert ControlVector.load(tmp_path / "v.gguf").provenance == PROVENANCE


def test_an_import_without_projections_is_read_back(tmp_path):
    vector = imported_vector(name="")
    vector.save(tmp_path / "v.gguf")
    assert same(read_vector(tmp_path / "v.gguf"), vector)


finite32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
scalars = st.one_of(
    st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(), st.none(),
    st.lists(st.integers(0, 9)), st.dictionaries(st.text(), st.text(), max_size=2),
)  # fmt: skip


@st.composite
def vectors(draw) -> ControlVector:
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    directions = draw(hnp.arrays(np.float32, shape, elements=finite32))
    layer = draw(st.integers(0, shape[0] - 1))
    if not directions[layer].any():
        directions[layer, 0] = 1
    columns = [draw(st.none() | hnp.arrays(np.float32, shape[:1], elements=finite32)) for _ in range(4)]
    gate = draw(st.booleans())
    readers = draw(hnp.arrays(np.float32, shape, elements=finite32)) if gate else None
    biases = np.ones(shape[0]) if gate else None
    modes = [
        mode for mode in MODES if (mode != "project" or columns[0] is not None) and (mode != "gate" or gate)
    ]
    mode = draw(st.sampled_from(modes))
    return ControlVector(
        directions, *columns, layers=(layer,), mode=mode, positions=draw(st.sampled_from(POSITIONS)),
        strength=draw(st.floats(allow_nan=False, allow_infinity=False)),
        one_sided=mode != "add" and draw(st.booleans()),
        cap=draw(st.none() | st.floats(0, exclude_min=True, allow_infinity=False)) if mode != "add" else None,
        name=draw(st.text(max_size=9)), readers=readers, biases=biases,
        provenance=draw(st.dictionaries(st.text(max_size=9), scalars, max_size=4)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(vector=vectors())
def test_any_vector_survives_the_file(tmp_path_factory, vector):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    vector.provenance.pop("probes", None)
    vector.save(path)
    again = ControlVector.load(path)
    assert same(again, vector) and again.provenance == vector.provenance


def test_the_same_vector_gives_the_same_bytes(tmp_path):
    shuffled = dict(reversed(PROVENANCE.items()))
    exact_vector().save(tmp_path / "a.gguf")
    exact_vector(provenance=shuffled).save(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_golden_files_are_what_is_written_today(tmp_path):
    make_golden.write_all(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    assert len(written) == 6 and written == {path.name: path.read_bytes() for path in DATA.glob("*.gguf")}


def test_the_golden_file_is_what_the_format_says_byte_by_byte():
    assert make_hostile.good().to_bytes() == (DATA / "json.gguf").read_bytes()
    assert make_hostile.good_gate().to_bytes() == (DATA / "gate.gguf").read_bytes()


def test_the_golden_file_is_read():
    vector = ControlVector.load(DATA / "json.gguf")
    assert same(vector, exact_vector()) and vector.provenance == PROVENANCE


def test_the_golden_file_with_gates_is_read():
    assert same(ControlVector.load(DATA / "gate.gguf"), gated_vector(one_sided=True))


def test_a_file_without_gates_keeps_the_older_version(tmp_path):
    for vector, minor in ((exact_vector(), 0), (gated_vector(), 1), (gated_vector().at(mode="add"), 1)):
        vector.save(tmp_path / "v.gguf")
        with open_gguf(tmp_path / "v.gguf") as file:
            assert (file.keys[keys.MAJOR].value, file.keys[keys.MINOR].value) == (1, minor)


def test_a_gated_vector_applied_otherwise_keeps_its_gate_in_the_file(tmp_path):
    vector = gated_vector().at(mode="add", strength=2)
    vector.save(tmp_path / "v.gguf")
    assert same(read_vector(tmp_path / "v.gguf"), vector)
    assert same(read_vector(tmp_path / "v.gguf").at(mode="gate"), vector.at(mode="gate"))


def test_a_compact_file_holds_the_gate_of_its_layer_alone(tmp_path):
    rng = np.random.default_rng(0)
    vector = ControlVector.from_gate(
        7, rng.normal(size=64), 0.5, rng.normal(size=64), mean_gate=0.8, n_layer=9, cap=2.0
    )
    write_vector(vector, tmp_path / "v.gguf", compact=True)
    assert same(read_vector(tmp_path / "v.gguf"), vector)
    with open_gguf(tmp_path / "v.gguf") as file:
        assert list(file.tensors) == ["direction.7"]
        assert [key for key in file.keys if key.startswith(keys.READER)] == ["localsteer.reader.7"]


def test_the_static_export_of_a_gate_is_its_mean_effect(tmp_path):
    vector = gated_vector(strength=2.0, one_sided=True)
    static = export_static(vector, tmp_path / "s.gguf")
    assert static.mode == "add" and static.readers is None
    assert static.directions[2].tolist() == (2 * vector.directions[2]).tolist()
    assert not static.directions[[0, 1, 3]].any()


def test_unknown_keys_of_a_later_minor_version_are_ignored(tmp_path):
    raw = make_hostile.good()
    raw.key_values["localsteer.format.minor"] = make_hostile.value(make_hostile.U32, 7)
    raw.key_values["localsteer.mood"] = make_hostile.value(make_hostile.STRING, "good")
    (tmp_path / "v.gguf").write_bytes(raw.to_bytes())
    assert same(read_vector(tmp_path / "v.gguf"), exact_vector())


@pytest.mark.parametrize("kept", [(2,), (0, 2), (0, 1, 2, 3)])
def test_a_compact_file_gives_back_the_rows_that_it_holds(tmp_path, kept):
    directions = exact_vector().directions.copy()
    directions[[il for il in range(4) if il not in kept]] = 0
    vector = replace(exact_vector(), directions=directions, layers=(2,))
    write_vector(vector, tmp_path / "v.gguf", compact=True)
    assert same(read_vector(tmp_path / "v.gguf"), vector)
    with open_gguf(tmp_path / "v.gguf") as file:
        assert list(file.tensors) == [f"direction.{il}" for il in kept if il]


@pytest.mark.parametrize("name", ["json", "static", "repeng", "cvector-generator"])
def test_our_reader_and_that_of_gguf_agree(name):
    theirs = gguf.GGUFReader(DATA / f"{name}.gguf")
    with open_gguf(DATA / f"{name}.gguf") as ours:
        fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
        values = {key: kv.value for key, kv in ours.keys.items()}
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()} == fields
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        assert all(t.data.tobytes() == ours.f32(t.name).tobytes() for t in theirs.tensors)


def test_reading_needs_no_numpy_view_of_the_file(tmp_path):
    path = tmp_path / "v.gguf"
    exact_vector().save(path)
    vector = read_vector(path)
    path.unlink()
    assert vector.directions.tobytes() == ROWS.tobytes()


# --- what can go wrong while writing


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "v.gguf"
    exact_vector().save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VectorFileError, match="can't be written: No space left on device"):
        exact_vector(strength=2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]


def test_writing_into_a_missing_folder_or_onto_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "missing" / "v.gguf", tmp_path):
        with pytest.raises(VectorFileError) as error:
            exact_vector().save(path)
        assert "can't be written" in one_line(error)


@pytest.mark.parametrize(
    "provenance",
    [
        {"bad": object()}, {"bad": {1, 2}}, {"bad": [float("nan")]}, {1: "bad"}, {"bad" * 500: 1},
        {"bad": "\ud800"}, {"probes": [["text", ["a"]]]}, {"probes": [["text", [2**31]]]},
        {"probes": [["text", [1.5]]]}, {"probes": ["x"]},
        {"probes": [["\ud800", [1]]]}, {"probes": [[1, [1]]]},
    ],
)  # fmt: skip
def test_provenance_that_can_not_be_written_is_refused(tmp_path, provenance):
    with pytest.raises(VectorFileError) as error:
        exact_vector(provenance=provenance).save(tmp_path / "v.gguf")
    assert "p" in one_line(error)
    assert list(tmp_path.iterdir()) == []


# --- damaged and hostile files


def refused(path: Path, read=read_vector) -> str:
    """The one line with which a file is refused, within little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(VectorFileError) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert path.name in one_line(error)
    return str(error.value)


@pytest.mark.parametrize("name", [*make_hostile.DAMAGE, *make_hostile.GATE_DAMAGE])
def test_hostile(tmp_path, name):
    content, said = make_hostile.hostile(name)
    (tmp_path / "v.gguf").write_bytes(content)
    assert said in refused(tmp_path / "v.gguf")


@pytest.mark.parametrize("name", [*make_hostile.DAMAGE, *make_hostile.GATE_DAMAGE])
def test_hostile_files_do_not_crash_the_import_either(tmp_path, name):
    (tmp_path / "v.gguf").write_bytes(make_hostile.hostile(name)[0])
    for convention in (None, "repeng", "cvector-generator"):
        try:
            import_vector(tmp_path / "v.gguf", convention=convention)
        except VectorFileError as error:
            assert "\n" not in str(error)
        else:
            assert name == "foreign control vector"


def test_missing_empty_and_folder_are_named(tmp_path):
    (tmp_path / "empty.gguf").touch()
    assert "does not exist" in refused(tmp_path / "missing.gguf")
    assert "is empty" in refused(tmp_path / "empty.gguf")
    assert "is a folder" in refused(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "v.gguf"
    path.write_bytes((DATA / "json.gguf").read_bytes())
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(VectorFileError, match="can't be read: Permission denied"):
        read_vector(path)


def test_every_truncation_is_refused():
    content = (DATA / "json.gguf").read_bytes()
    for length in range(1, len(content)):
        with pytest.raises(VectorFileError, match=r"is truncated|not a GGUF"):
            parse_vector(GgufFile("v.gguf", content[:length]))


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_changed_byte_is_refused_or_read_never_a_crash(value):
    content = (DATA / "json.gguf").read_bytes()
    for at in range(len(content)):
        changed = content[:at] + bytes([value]) + content[at + 1 :]
        try:
            assert isinstance(parse_vector(GgufFile("v.gguf", changed)), ControlVector)
        except VectorFileError as error:
            assert "\n" not in str(error)


def test_a_model_is_refused_by_its_architecture(real_data):
    assert "is a 'llama' model, not a control vector" in refused(real_data / "stories260K.gguf")


# --- imports of GGUF


def test_repeng_numbers_layers_as_llama_cpp_applies_them():
    vector = import_vector(DATA / "repeng.gguf")
    assert vector.n_layer == 4 and vector.layers == (1, 2, 3)
    assert vector.directions[1:].tobytes() == ROWS[1:].tobytes() and not vector.directions[0].any()
    assert vector.provenance["convention"] == "repeng" and vector.provenance["model_hint"] == "mistral"


def test_cvector_generator_numbers_layers_one_too_high():
    vector = import_vector(DATA / "cvector-generator.gguf")
    assert vector.n_layer == 4 and vector.layers == (0, 1, 2)
    assert vector.directions[:3].tobytes() == ROWS[:3].tobytes() and not vector.directions[3].any()
    assert vector.provenance["convention"] == "cvector-generator"


def test_both_tools_give_the_same_directions_where_both_have_one():
    a, b = (import_vector(DATA / f"{tool}.gguf") for tool in ("repeng", "cvector-generator"))
    assert a.directions[1:3].tobytes() == b.directions[1:3].tobytes()


def test_a_file_that_does_not_tell_its_tool_asks_for_the_convention():
    with pytest.raises(VectorFileError) as error:
        import_vector(DATA / "jukofyork.gguf")
    said = one_line(error)
    assert "repeng" in said and "cvector-generator" in said and "jukofyork" in said
    vector = import_vector(DATA / "jukofyork.gguf", convention="cvector-generator", n_layer=4)
    assert vector.layers == (1, 2) and vector.directions[1:3].tobytes() == ROWS[1:3].tobytes()


def test_an_explicit_convention_wins():
    vector = import_vector(DATA / "repeng.gguf", convention="cvector-generator")
    assert vector.layers == (0, 1, 2)


def test_an_import_adds_with_the_name_of_its_file_and_can_be_saved(tmp_path):
    vector = import_vector(DATA / "repeng.gguf", layer=2)
    assert (vector.mode, vector.name, vector.layers, vector.mean_with) == ("add", "repeng", (2,), None)
    vector.save(tmp_path / "v.gguf")
    again = import_vector(tmp_path / "v.gguf")
    assert same(again, vector) and again.provenance == vector.provenance


def test_the_depth_of_the_model_may_be_given():
    assert import_vector(DATA / "repeng.gguf", n_layer=6, name="x").n_layer == 6
    with pytest.raises(VectorFileError, match=r"holds direction\.3, beyond a model of 3 layers"):
        import_vector(DATA / "repeng.gguf", n_layer=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"convention": "mistral"}, "unknown convention 'mistral'"),
        ({"convention": "layers"}, "is a GGUF: its convention is one of repeng, cvector-generator"),
        ({"n_layer": 0}, "a model of 0 layers is out of range"),
        ({"n_layer": 10**9}, "out of range"),
    ],
)
def test_imports_with_settings_that_make_no_sense_are_refused(given, said):
    with pytest.raises(VectorFileError) as error:
        import_vector(DATA / "repeng.gguf", **given)
    assert said in one_line(error)


def test_a_layer_that_the_import_does_not_have_is_a_plan_error():
    with pytest.raises(PlanError, match="no direction at layer 0"):
        import_vector(DATA / "repeng.gguf", layer=0)


def test_our_own_file_takes_no_convention():
    with pytest.raises(VectorFileError, match="was written by localsteer"):
        import_vector(DATA / "json.gguf", convention="repeng")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "not there wide"),
        ([("direction.1", [1, 2]), ("direction.2", [1])], "[1, 2] wide"),
        ([("direction.0", [1])], "tensor 'direction.0'"),
        ([("direction.x", [1])], "tensor 'direction.x'"),
        ([("direction.99999", [1])], "tensor 'direction.99999'"),
        ([("direction.1", [0, 0])], "all its directions are zero"),
        ([("direction.1", [np.nan])], "NaN or infinite"),
    ],
)
def test_foreign_gguf_files_without_a_vector_are_refused(tmp_path, tensors, said):
    raw = make_hostile.good()
    raw.key_values = {"general.architecture": raw.key_values["general.architecture"]}
    raw.tensors = [make_hostile.Tensor.row(name, row) for name, row in tensors]
    (tmp_path / "v.gguf").write_bytes(raw.to_bytes())
    assert said in refused(tmp_path / "v.gguf", lambda path: import_vector(path, convention="repeng"))


def test_a_wide_import_can_not_claim_gigabytes_of_zeros(tmp_path):
    raw = make_hostile.good()
    raw.key_values = {"general.architecture": raw.key_values["general.architecture"]}
    raw.tensors = [make_hostile.Tensor.row("direction.1", [1.0] * 100_000)]
    (tmp_path / "v.gguf").write_bytes(raw.to_bytes())
    read = lambda path: import_vector(path, convention="repeng", n_layer=4096)  # noqa: E731
    assert "too large for a model" in refused(tmp_path / "v.gguf", read)


# --- imports of arrays


def save(path: Path, **arrays) -> Path:
    (make_golden.safetensors if path.suffix == ".safetensors" else _npz)(
        path, {name: np.asarray(array) for name, array in arrays.items()}
    )
    return path


def _npz(path: Path, arrays) -> None:
    np.savez(path, **arrays)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_states_of_the_paper_become_directions_and_projections(kind):
    vector = import_vector(DATA / f"paper.{kind}", convention="layers")
    assert vector.directions.tobytes() == ROWS.tobytes()
    states = make_golden.states()
    units = np.stack([vector.unit(il) for il in range(4)]).astype(np.float64)
    for key, mean, std in (("hs_instr", vector.mean_with, vector.std_with),
                           ("hs_no_instr", vector.mean_without, vector.std_without)):  # fmt: skip
        p = np.einsum("nle,le->nl", states[key].astype(np.float64), units)
        np.testing.assert_allclose(mean, p.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(std, p.std(axis=0), rtol=1e-5)
    assert (vector.mode, vector.layers) == ("project", (2,))
    # |v| = zbar(with) - zbar(without): the definition of a difference in means
    np.testing.assert_allclose(
        vector.mean_with - vector.mean_without, np.linalg.norm(vector.directions, axis=1), rtol=1e-5
    )


def test_only_the_last_token_of_the_paper_s_states_counts(tmp_path):
    states = make_golden.states()
    tokens = {k: np.stack([np.full_like(v, 9), v], axis=2) for k, v in states.items()}
    renamed = {"last_token_rs": tokens["hs_instr"], "last_token_rs_no_instr": tokens["hs_no_instr"]}
    vector = import_vector(save(tmp_path / "v.npz", **renamed), n_layer=4)
    assert vector.directions.tobytes() == ROWS.tobytes()


def test_a_pre_computed_vector_of_the_paper_gets_its_length_back(tmp_path):
    unit = ROWS[1] / np.linalg.norm(ROWS[1])
    path = save(tmp_path / "v.npz", instr_dir=unit, max_diff_layer_idx=1, avg_proj=5.0, avg_proj_no_instr=2.0)
    vector = import_vector(path, n_layer=4)
    np.testing.assert_allclose(vector.directions[1], 3 * unit, rtol=1e-6)
    assert (vector.layers, vector.mode, vector.mean_with[1], vector.mean_without[1]) == (
        (1,),
        "project",
        5,
        2,
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_diff_layer_idx": -1}, "no direction for a model of 4 layers (layer -1"),
        ({"max_diff_layer_idx": 4}, "no direction"),
        ({"max_diff_layer_idx": 1.5}, "no direction"),
        ({"avg_proj": [1.0, 2.0]}, "instr_dir needs the numbers"),
        ({"avg_proj": 2.0}, "no direction at layer 1"),
        ({"instr_dir": ROWS}, "no direction"),
        ({"instr_dir": [np.nan]}, "NaN or infinite"),
    ],
)
def test_pre_computed_vectors_without_a_vector_are_refused(tmp_path, changed, said):
    good = {"instr_dir": ROWS[1], "max_diff_layer_idx": 1, "avg_proj": 5.0, "avg_proj_no_instr": 2.0}
    path = save(tmp_path / "v.npz", **good | changed)
    assert said in refused(path, lambda p: import_vector(p, n_layer=4))


def test_directions_alone_can_add(tmp_path):
    vector = import_vector(save(tmp_path / "v.npz", directions=ROWS), convention="layers")
    assert vector.mode == "add" and vector.directions.tobytes() == ROWS.tobytes()


def test_directions_with_their_mean_projections_can_project(tmp_path):
    path = save(tmp_path / "v.npz", directions=ROWS, mean_with=[1.0, 2, 3, 4])
    assert import_vector(path, n_layer=4).mean_with.tolist() == [1, 2, 3, 4]


def test_hidden_states_begin_with_the_embedding_and_end_after_the_norm(tmp_path):
    rows = np.concatenate([np.full((1, 8), 99, np.float32), ROWS])
    path = save(tmp_path / "v.npz", directions=rows)
    vector = import_vector(path, convention="hidden_states")
    assert vector.directions[:3].tobytes() == ROWS[:3].tobytes() and not vector.directions[3].any()
    assert same(import_vector(path, n_layer=4), vector)


def test_rows_are_not_guessed(tmp_path):
    path = save(tmp_path / "v.npz", directions=ROWS)
    assert "choose convention layers" in refused(path, import_vector)
    assert "holds 4 layers, but the model has 5" in refused(
        path, lambda p: import_vector(p, convention="layers", n_layer=5)
    )
    assert "is an array file" in refused(path, lambda p: import_vector(p, convention="repeng"))


@pytest.mark.parametrize(
    ("kind", "numpy_type"), [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")]
)
def test_every_float_type_of_safetensors_is_read(tmp_path, kind, numpy_type):
    rows = ROWS  # multiples of 1/64 below 1: exact in float16, and in bfloat16 after rounding to 8 bits
    rows = np.round(rows * 16) / 16
    raw = (
        (rows.astype("<f4").view(np.uint32) >> 16).astype("<u2")
        if kind == "BF16"
        else rows.astype(numpy_type)
    )
    path = tmp_path / "v.safetensors"
    path.write_bytes(raw_safetensors(entry(f'"{kind}"', "[4,8]", f"[0,{raw.nbytes}]"), data=raw.tobytes()))
    assert import_vector(path, n_layer=4).directions.tolist() == rows.tolist()


def test_the_safetensors_library_writes_what_is_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file({"directions": ROWS, "mean_with": np.ones(4, np.float32)}, tmp_path / "v.safetensors")
    assert import_vector(tmp_path / "v.safetensors", n_layer=4).directions.tobytes() == ROWS.tobytes()


def raw_safetensors(header: bytes, length: int | None = None, data: bytes = bytes(128)) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype='"F32"', shape="[4,8]", offsets="[0,128]") -> bytes:
    return f'{{"directions":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (raw_safetensors(b"{}", 2**63), "header claims 9223372036854775808"),
        (raw_safetensors(b"{", 1), "not JSON"),
        (raw_safetensors(b"{" + b'"a":[' * 50_000), "not JSON"),
        (raw_safetensors(b"[]"), "neither GGUF, .npz nor .safetensors"),
        (b"Hello, world", "neither GGUF, .npz nor .safetensors"),
        (b"x", "neither GGUF, .npz nor .safetensors"),
        (raw_safetensors(b"{}"), "holds no vector"),
        (raw_safetensors(b'{"directions": 1}'), "damaged"),
        (raw_safetensors(entry(dtype='"F8_E4M3"')), "type that can't be read"),
        (raw_safetensors(entry(dtype="[]")), "type that can't be read"),
        (raw_safetensors(entry(shape="[4,9]")), "do not fit its shape"),
        (raw_safetensors(entry(shape="[-4,-8]")), "do not fit its shape"),
        (raw_safetensors(entry(shape='["a"]')), "type that can't be read"),
        (raw_safetensors(entry(shape=f"[{2**62},{2**62}]")), "do not fit its shape"),
        (raw_safetensors(entry(offsets="[0,4096]", shape="[1024]")), "do not fit its shape"),
        (raw_safetensors(entry(offsets="[-8,120]")), "do not fit its shape"),
        (raw_safetensors(entry(offsets="[0]")), "type that can't be read"),
        (raw_safetensors(entry(offsets="[0,128.0]")), "type that can't be read"),
        (raw_safetensors(entry(shape=f"[{'1,' * 99}4,8]")), "a shape that can't be"),
        (raw_safetensors(entry(shape=f"[0,{2**70}]", offsets="[0,0]")), "a shape that can't be"),
        (raw_safetensors(entry(shape="[32]")), "directions must be (layers, n_embd)"),
        (raw_safetensors(entry(shape="[4,8,1]")), "directions must be (layers, n_embd)"),
        (raw_safetensors(entry()), "all its directions are zero"),
    ],
)
def test_hostile_safetensors(tmp_path, content, said):
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    assert said in refused(path, lambda p: import_vector(p, convention="layers"))


@pytest.mark.parametrize("shape", ["0, " + "9" * 25, "1, " * 99 + "4, 8"])
def test_a_shape_that_can_not_be_in_numpy_s_files(tmp_path, shape):
    path = tmp_path / "v.npz"
    path.write_bytes(zipped(npy(head(f"({shape})"), bytes(128))))
    assert "damaged" in refused(path, lambda p: import_vector(p, convention="layers"))


@pytest.mark.filterwarnings("error")
def test_states_beyond_all_bounds_are_one_line_without_warnings(tmp_path):
    states = np.full((2, 4, 8), 1e308)
    np.savez(tmp_path / "v.npz", hs_instr=states, hs_no_instr=-states)
    assert "finite" in refused(tmp_path / "v.npz", lambda p: import_vector(p, convention="layers"))


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def zipped(member: bytes, name: str = "directions.npy", compression=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(name, member)
    return out.getvalue()


def head(shape: str, descr: str = "<f4") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 and nothing more", "not a readable .npz"),
        (zipped(b"", "other.npy"), "holds no vector"),
        (zipped(b"", "é.npy").replace("é".encode(), b"\xff\xff"), "not a readable .npz"),  # says: UTF-8
        (zipped(b"not numpy"), "no readable header"),
        (zipped(npy(head(f"({2**40}, {2**20})"))), "claims"),
        (zipped(npy(head("(-4, 8)"))), "claims -128 bytes"),
        (zipped(npy(head("(4, 8)"), bytes(64))), "truncated"),
        (zipped(npy(head("(1,)", "|O"), bytes(64))), "numbers are needed"),
        (zipped(npy(head("(4, 8)", "<c8"), bytes(256))), "numbers are needed"),
        (zipped(npy("{" * 3000)), "no readable header"),
        (zipped(npy(head(f"({1 << 22}, 8)"), bytes(128 << 20)), compression=zipfile.ZIP_DEFLATED), "claims"),
    ],
)  # fmt: skip
def test_hostile_npz(tmp_path, content, said):
    path = tmp_path / "v.npz"
    path.write_bytes(content)
    assert said in refused(path, lambda p: import_vector(p, convention="layers"))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_every_truncation_and_changed_byte_of_an_array_file_is_refused_or_read(tmp_path, kind):
    content = bytearray((DATA / f"paper.{kind}").read_bytes())
    path = tmp_path / f"v.{kind}"
    variants = [content[:length] for length in range(1, len(content), 13)]
    for at in range(0, len(content), 11):
        variants += [content[:at] + bytes([value]) + content[at + 1 :] for value in (0, 0xFF)]
    for variant in variants:
        path.write_bytes(variant)
        try:
            import_vector(path, convention="layers")
        except LocalsteerError as error:
            assert "\n" not in str(error)


def test_states_of_different_shapes_are_refused(tmp_path):
    states = make_golden.states()
    path = save(tmp_path / "v.npz", hs_instr=states["hs_instr"], hs_no_instr=states["hs_no_instr"][:, :3])
    assert "both be (pairs, layers, n_embd)" in refused(path, lambda p: import_vector(p, n_layer=4))
    path = save(tmp_path / "v.npz", directions=ROWS, mean_with=np.ones(3))
    assert "mean_with is (3,), directions are (4, 8)" in refused(path, lambda p: import_vector(p, n_layer=4))


# --- static export


def test_a_static_export_is_one_layer_times_the_strength():
    static = static_vector(exact_vector(), strength=0.5)
    assert static.directions[2].tolist() == (ROWS[2] * 0.5).tolist()
    assert not np.delete(static.directions, 2, axis=0).any()
    assert (static.mode, static.positions, static.strength, static.layers) == ("add", "all", 1.0, (2,))


def test_a_static_export_takes_strength_and_layer_from_the_vector():
    static = static_vector(exact_vector(strength=-2.0, layers=(1, 3)))
    assert static.directions[[1, 3]].tolist() == (ROWS[[1, 3]] * -2).tolist() and static.layers == (1, 3)


def test_a_static_export_remembers_what_it_was(tmp_path):
    export_static(exact_vector(positions="prompt", strength=0.5), tmp_path / "v.gguf", layer=3)
    vector = read_vector(tmp_path / "v.gguf")
    assert vector.layers == (3,)
    made = {key: vector.provenance[f"static_{key}"] for key in ("mode", "positions", "strength")}
    assert made == {"mode": "project", "positions": "prompt", "strength": 0.5}
    assert vector.provenance["instruction"] == PROVENANCE["instruction"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layer": 0}, "can't steer layer 0"),
        ({"layer": 4}, "out of range"),
        ({"strength": 0}, "nothing to export"),
        ({"strength": float("nan")}, "finite"),
    ],
)
def test_what_stock_llama_cpp_can_not_do_is_not_exported(tmp_path, given, said):
    with pytest.raises(PlanError) as error:
        export_static(exact_vector(), tmp_path / "v.gguf", **given)
    assert said in one_line(error) and not list(tmp_path.iterdir())


# --- the package


def test_the_conventions_are_named():
    assert CONVENTIONS == ("repeng", "cvector-generator", "easysteer", "layers", "hidden_states")


def test_reading_a_vector_loads_neither_torch_nor_llama_cpp():
    code = (
        f"import sys, localsteer.convert as c; c.read_vector({str(DATA / 'json.gguf')!r}); "
        "print([m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_format_document_names_every_key_and_limit():
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    names = [value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)]
    assert [name for name in names if f"`{name}" not in text] == []
    limits = (keys.MAX_LAYERS, keys.MAX_WIDTH, keys.MAX_KEY_VALUES, keys.MAX_ARRAY, keys.MAX_NAME)
    assert [limit for limit in limits if f"{limit:,}" not in text] == []
    assert f"version {keys.VERSION_MAJOR}.{keys.VERSION_MINOR}" in text
