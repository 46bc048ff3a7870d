"""`localsteer convert`: models and vectors from and to other formats."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from cli_runs import invoke, write_vector

from localsteer import ControlVector, Engine


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(*args):
    done = invoke("convert", *args)
    assert done.status == 0, done.err
    return done


def write_foreign(path, *, layers=(3, 2, 1), n_embd=64):
    """A control vector as repeng writes it: from the last layer down."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(layers))
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", np.full(n_embd, layer, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_checkpoint_becomes_a_model_that_loads(tiny_llama):
    assert convert("model", tiny_llama.hf_dir, "-o", "model.gguf").out == "model.gguf\n"
    with Engine("model.gguf", n_threads=1) as engine:
        assert engine.model.n_layer == tiny_llama.n_layer
        assert engine.model.metadata["general.file_type"] == "1"  # F16


def test_a_checkpoint_is_quantized(tiny_llama, folder):
    document = convert("model", tiny_llama.hf_dir, "-o", "model.gguf", "--quantize", "q8_0", "--json").json
    assert document == {"file": "model.gguf", "type": "Q8_0", "bytes": (folder / "model.gguf").stat().st_size}
    with Engine("model.gguf", n_threads=1) as engine:
        assert engine.model.metadata["general.file_type"] == "7"
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]


def test_force_replaces_a_model(tiny_llama, folder):
    (folder / "model.gguf").write_bytes(b"old")
    convert("model", tiny_llama.hf_dir, "-o", "model.gguf", "--ftype", "F32", "--force")
    assert (folder / "model.gguf").stat().st_size > 1000


def test_an_unknown_quantization_lists_the_known_ones(tiny_llama):
    args = ("convert", "model", tiny_llama.hf_dir, "-o", "model.gguf", "--quantize", "Q9_Z")
    assert "Q4_K_M" in invoke(*args).complaint()


def test_a_folder_without_a_checkpoint(folder):
    assert "config.json" in invoke("convert", "model", folder, "-o", "model.gguf").complaint()


def test_a_file_is_no_checkpoint(folder):
    write_vector(folder / "v.gguf")
    assert "give a folder" in invoke("convert", "model", "v.gguf", "-o", "model.gguf").complaint()


def test_a_repeng_file_is_imported(folder):
    write_foreign(folder / "happy.gguf")
    assert convert("import", "happy.gguf", "--from", "repeng", "-o", "ours.gguf").out == "ours.gguf\n"
    vector = ControlVector.load("ours.gguf")
    assert (vector.n_layer, vector.mode, vector.name) == (4, "add", "happy")
    assert vector.directions[3, 0] == 3


def test_a_cvector_generator_file_is_one_layer_late(folder):
    write_foreign(folder / "happy.gguf", layers=(1, 2, 3))
    convert("import", "happy.gguf", "--from", "cvector-generator", "-o", "ours.gguf")
    assert ControlVector.load("ours.gguf").directions[2, 0] == 3


def test_arrays_are_imported_with_settings(folder):
    np.savez(folder / "v.npz", directions=np.ones((4, 64), np.float32), mean_with=np.ones(4, np.float32))
    settings = ("--layer", "1", "--positions", "prompt", "--strength", "0.5", "--name", "rhyme")
    convert("import", "v.npz", "--from", "layers", *settings, "-o", "ours.gguf")
    vector = ControlVector.load("ours.gguf")
    assert (vector.layers, vector.positions, vector.strength, vector.name) == ((1,), "prompt", 0.5, "rhyme")


def test_a_file_that_does_not_say_its_convention_asks(folder):
    write_foreign(folder / "happy.gguf", layers=(1, 2, 3))
    assert "choose convention" in invoke("convert", "import", "happy.gguf", "-o", "ours.gguf").complaint()


def test_an_import_does_not_replace_its_source(folder):
    before = write_foreign(folder / "happy.gguf").read_bytes()
    args = ("convert", "import", "happy.gguf", "--from", "repeng", "-o", "happy.gguf")
    assert "choose another name" in invoke(*args).complaint()
    assert (folder / "happy.gguf").read_bytes() == before


def test_a_static_export_is_the_direction_times_the_strength(folder):
    write_vector(folder / "v.gguf")
    done = convert("export", "v.gguf", "--static", "--layer", "1", "--strength", "0.5", "-o", "static.gguf")
    assert "stock llama.cpp will add it" in done.err
    tensors = gguf.GGUFReader("static.gguf").tensors
    expected = 0.5 * ControlVector.load("v.gguf").directions[1]
    (tensor,) = [tensor for tensor in tensors if tensor.data.any()]
    assert tensor.name == "direction.1"
    np.testing.assert_array_equal(tensor.data, expected)


def test_layer_zero_can_not_be_exported(folder):
    write_vector(folder / "v.gguf", layers=(0,))
    assert "layer 0" in invoke("convert", "export", "v.gguf", "-o", "static.gguf").complaint()


def test_an_export_does_not_replace_its_source(folder):
    before = write_vector(folder / "v.gguf").read_bytes()
    args = ("convert", "export", "v.gguf", "--layer", "1", "-o", folder / "v.gguf")
    assert "is the vector itself" in invoke(*args).complaint()
    assert (folder / "v.gguf").read_bytes() == before


@pytest.mark.parametrize("output", ["none/v.gguf", "notes.gguf"])
def test_what_can_not_be_written_is_said_first_and_alone(folder, output):
    write_vector(folder / "v.gguf")
    (folder / "notes.gguf").write_text("precious")
    assert output in invoke("convert", "export", "v.gguf", "-o", output).complaint()
    assert output in invoke("convert", "import", "missing.npz", "-o", output).complaint()
    assert (folder / "notes.gguf").read_text() == "precious"


def test_a_vector_that_could_not_be_read_again_is_not_written(folder):
    np.savez("deep.npz", directions=np.ones((5000, 4), np.float32))
    (folder / "old.gguf").write_bytes(write_vector(folder / "vector.gguf").read_bytes())
    before = (folder / "old.gguf").read_bytes()
    done = invoke("convert", "import", "deep.npz", "--from", "layers", "-o", "old.gguf")
    assert "at most 4096 layers" in done.complaint()
    assert (folder / "old.gguf").read_bytes() == before
