"""Vectors from and to other tools, with the tools themselves where they are installed."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli_runs import invoke, write_vector
from engines import open_engine, random_vector
from vector_cases import exact_vector, gated_vector, imported_vector, same

from localsteer import ControlVector
from localsteer.convert import FORMATS, export_vector, import_vector
from localsteer.errors import LocalsteerError, PlanError, VectorFileError
from localsteer.extract.torch_files import import_torch_vector, is_torch_file, write_torch_vector

WHOLE = ("npz", "safetensors")
TOOLS = (("npz", "o.npz"), ("safetensors", "o.st"), ("steering-vectors", "o.pt"), ("repeng", "o.gguf"))
# it asks for an older transformers, and works with this one
STEERING_VECTORS = "needs pip install scikit-learn, and --no-deps steering-vectors"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400
    return text


# --- NPZ and safetensors hold a vector whole ---------------------------------------------------------------


@pytest.mark.parametrize("to", WHOLE)
@pytest.mark.parametrize(
    "vector",
    [
        exact_vector(strength=0.1, cap=1 / 3, one_sided=True, positions="last", layers=(1, 3)),
        exact_vector(layers=(0,), mode="ablate", name="Ünïcode 🙂"),
        gated_vector(),
        imported_vector(name=""),
    ],
    ids=["settings", "layer 0", "gate", "import"],
)  # fmt: skip
def test_a_whole_file_gives_back_the_vector_to_the_last_bit(vector, to):
    assert export_vector(vector, f"v.{to}", to=to) == ()
    assert same(import_vector(f"v.{to}"), vector)
    assert import_vector(f"v.{to}").provenance == vector.provenance
    before = Path(f"v.{to}").read_bytes()
    export_vector(vector, f"v.{to}", to=to)
    assert Path(f"v.{to}").read_bytes() == before


def test_numpy_and_safetensors_read_the_arrays(folder):
    vector = exact_vector()
    export_vector(vector, "v.npz", to="npz")
    export_vector(vector, "v.safetensors", to="safetensors")
    arrays = dict(np.load("v.npz", allow_pickle=False))
    assert np.array_equal(arrays["directions"], vector.directions)
    safetensors = pytest.importorskip("safetensors.numpy")
    theirs = safetensors.load_file("v.safetensors")
    assert sorted(theirs) == sorted(arrays)
    assert all(np.array_equal(theirs[name], arrays[name]) for name in arrays)


def test_a_whole_file_takes_other_settings_but_no_convention(folder):
    export_vector(exact_vector(), "v.npz", to="npz", layer=2, strength=3.0)
    assert (import_vector("v.npz").layers, import_vector("v.npz").strength) == ((2,), 3.0)
    assert import_vector("v.npz", layer=1).layers == (1,)
    with pytest.raises(VectorFileError, match="takes no convention"):
        import_vector("v.npz", convention="layers")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (b"", "holds no settings"),
        (b"{}", "holds no settings"),
        (b"[1]", "holds no settings"),
        (b"[" * 100_000, "holds no settings"),
        (b"\xff", "holds no settings"),
        ({"provenance": 7}, "holds no settings"),
        ({"name": None}, "holds no settings"),
        ({"layers": "abc"}, "holds no settings"),
        ({"layers": ["a"]}, "holds no settings"),
        ({"layers": [1.5]}, "holds no settings"),
        ({"layers": [99]}, "out of range"),
        ({"layers": [10**400]}, "no layer is chosen"),
        ({"mode": ["add"]}, "unknown mode"),
        ({"positions": {}}, "unknown positions"),
        ({"strength": "much"}, "not a number"),
        ({"strength": 10**400}, "not a number"),
        ({"cap": -1}, "cap must be above 0"),
    ],
)
def test_hostile_settings_are_one_line(folder, settings, says):
    export_vector(exact_vector(), "v.npz", to="npz")
    arrays = dict(np.load("v.npz"))
    if isinstance(settings, dict):
        settings = json.dumps(json.loads(arrays["localsteer"].tobytes()) | settings).encode()
    arrays["localsteer"] = np.frombuffer(settings, np.uint8)
    np.savez("v.npz", **arrays)
    with pytest.raises(VectorFileError, match=says) as error:
        import_vector("v.npz")
    one_line(error)


@pytest.mark.parametrize("name", ["directions", "mean_with"])
def test_a_whole_file_that_lacks_an_array_or_has_another_shape(folder, name):
    export_vector(exact_vector(), "v.npz", to="npz")
    arrays = dict(np.load("v.npz"))
    np.savez("less.npz", **{key: array for key, array in arrays.items() if key != name})
    np.savez("other.npz", **(arrays | {name: np.ones(3, np.float32)}))
    for path in ("less.npz", "other.npz"):
        with pytest.raises(VectorFileError) as error:
            import_vector(path)
        one_line(error)


# --- what is added -----------------------------------------------------------------------------------------


def tensors(path):
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_a_repeng_file_is_recognised_and_holds_every_layer(folder):
    vector = exact_vector(layers=(1, 3), strength=0.5)
    lost = export_vector(vector, "v.gguf", to="repeng")
    assert any("mode project" in text for text in lost) and any("mean projections" in text for text in lost)
    assert list(tensors("v.gguf")) == ["direction.3", "direction.2", "direction.1"]
    again = import_vector("v.gguf")
    assert again.provenance["convention"] == "repeng" and again.layers == (1, 3) and again.mode == "add"
    for il in (1, 3):
        assert np.array_equal(again.directions[il], (0.5 * vector.directions[il]).astype(np.float32))


def test_an_easysteer_file_holds_layer_0_too(folder):
    vector = exact_vector(layers=(0, 2), mode="add", strength=2.0)
    export_vector(vector, "v.gguf", to="easysteer")
    fields = gguf.GGUFReader("v.gguf").fields
    assert fields["controlvector.model_hint"].contents() and fields["controlvector.method"].contents()
    assert sorted(tensors("v.gguf")) == ["direction.0", "direction.2"]
    again = import_vector("v.gguf", n_layer=4)
    assert (again.n_layer, again.layers, again.provenance["convention"]) == (4, (0, 2), "easysteer")
    assert np.array_equal(again.directions[0], 2 * vector.directions[0])
    with pytest.raises(VectorFileError, match=r"direction\.0"):
        import_vector("v.gguf", convention="cvector-generator")


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "steering-vectors"])
def test_what_can_not_be_exported_is_refused_and_nothing_is_written(folder, to):
    vector = exact_vector(layers=(0,), mode="add")
    wrong = [{"layer": 9}] if to in WHOLE else [{"layer": 9}, {"strength": 0.0}, {"strength": 1e300}]
    for settings in wrong:
        with pytest.raises(PlanError):
            export_vector(vector, "v", to=to, **{"layer": 1, **settings})
    if to in ("llama.cpp", "repeng"):
        with pytest.raises(PlanError, match="layer 0"):
            export_vector(vector, "v", to=to)
    if to in WHOLE:
        with pytest.raises(VectorFileError, match="provenance"):
            export_vector(replace(vector, provenance={"x": object()}), "v", to=to)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "steering-vectors"])
def test_a_place_that_can_not_be_written_is_one_line(folder, to):
    (folder / "there").mkdir()
    with pytest.raises(LocalsteerError, match="can't be written") as error:
        export_vector(exact_vector(), "there", to=to)
    one_line(error)
    assert not list((folder / "there").iterdir())


def test_losses_are_those_of_the_vector(folder):
    gated = gated_vector()
    assert "the learned gate, of which the mean effect is left" in export_vector(gated, "v.gguf", to="repeng")
    rows = np.eye(4, 8, dtype=np.float32)
    plain = ControlVector(rows, *[None] * 4, (1, 2, 3), mode="add")
    assert export_vector(plain, "v.gguf", to="repeng") == ("the directions of 1 other layer",)
    rows[0] = 0
    assert export_vector(replace(plain, directions=rows), "v.gguf", to="repeng") == ()


# --- PyTorch's files ---------------------------------------------------------------------------------------


def test_a_dictionary_of_tensors_goes_both_ways(torch, folder):
    vector = exact_vector(layers=(0, 2), strength=0.5, positions="prompt")
    lost = write_torch_vector(vector, "v.pt")
    assert "positions prompt, which become all" in lost
    content = torch.load("v.pt", weights_only=True)
    assert sorted(content["layer_activations"]) == [0, 2] and content["layer_type"] == "decoder_block"
    again = import_torch_vector("v.pt", n_layer=4)
    assert (again.layers, again.mode, again.n_layer, again.name) == ((0, 2), "add", 4, "v")
    assert np.array_equal(again.directions[2], (0.5 * vector.directions[2]).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_every_type_and_shape_are_read(torch, folder, dtype):
    row = torch.arange(8).to(getattr(torch, dtype)) + 1
    torch.save({"3": row, 1: row.reshape(1, 1, 8)}, "d.pt")
    assert import_torch_vector("d.pt").layers == (1, 3)
    torch.save(row, "one.pt")
    one = import_torch_vector("one.pt", layer=2, n_layer=4)
    assert one.layers == (2,) and one.directions[2].tolist() == list(range(1, 9))
    torch.save(torch.stack([row] * 5), "rows.pt")
    assert import_torch_vector("rows.pt", convention="hidden_states").n_layer == 4
    assert import_torch_vector("rows.pt", convention="layers", layer=3).layers == (3,)
    torch.save(collections.OrderedDict({1: torch.nn.Parameter(row)}), "p.pt")
    assert import_torch_vector("p.pt").layers == (1,)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def hostile(torch):
    """What each file holds, and what is said of it."""
    row = torch.ones(8)
    yield Malicious(), "could run code"
    yield {1: Malicious()}, "could run code"
    yield {1: np.ones(8)}, "could run code"
    yield {}, "no directions by layer"
    yield {"layer_activations": 7}, "no directions by layer"
    yield {"layer_activations": {1: row}, "layer_type": "mlp"}, "only decoder_block"
    yield {"a": row}, "instead of a layer's number"
    yield {-1: row}, "instead of a layer's number"
    yield {True: row}, "instead of a layer's number"
    yield {10**9: row}, "in the place|beyond|too large|layers"
    yield {1: [1.0, 2.0]}, "instead of a direction"
    yield {1: torch.ones(8, dtype=torch.int64)}, "instead of a direction"
    yield {1: torch.ones(8, dtype=torch.complex64)}, "instead of a direction"
    yield {1: torch.ones(8).to_sparse()}, "instead of a direction"
    yield {1: torch.ones(8, device="meta")}, "instead of a direction"
    yield {1: torch.ones(8), 2: torch.ones(9)}, "same width"
    yield {1: torch.ones(2, 8), 2: torch.ones(2, 8)}, "same width"
    yield {1: torch.full((8,), float("nan"))}, "NaN"
    yield {1: torch.zeros(8)}, "all its directions are zero"
    yield {1: torch.ones(0)}, "must be"
    yield torch.ones(1).expand(10**12), "claims more numbers"
    yield {1: torch.ones(1).expand(10**12)}, "claims more numbers"
    yield row, "holds one direction"
    yield torch.ones(4, 8), "choose convention"
    yield torch.ones(2, 2, 8), "must be"
    yield torch.tensor(1.0), "must be"
    yield 7, "instead of a direction"
    yield "text", "instead of a direction"


def test_hostile_files_of_torch_are_one_line(torch, folder):
    for content, says in hostile(torch):
        torch.save(content, "v.pt")
        with pytest.raises(VectorFileError, match=says) as error:
            import_torch_vector("v.pt")
        one_line(error)
    assert not (folder / "harmed").exists()


def test_archives_that_torch_did_not_write(torch, folder):
    torch.save({1: torch.ones(1000)}, "v.pt")
    whole = Path("v.pt").read_bytes()
    with zipfile.ZipFile("v.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert is_torch_file("packed.pt") and is_torch_file("v.pt")
    with pytest.raises(VectorFileError, match="compresses nothing"):
        import_torch_vector("packed.pt")
    for name in members:
        with zipfile.ZipFile("part.pt", "w") as archive:
            for other, content in members.items():
                archive.writestr(other, content[: len(content) // 2] if other == name else content)
        if name.endswith(("data.pkl", "data/0")):
            with pytest.raises(VectorFileError):
                import_torch_vector("part.pt")
    for cut in range(97, len(whole), 97):
        Path("cut.pt").write_bytes(whole[:cut])
        assert is_torch_file("cut.pt")
        with pytest.raises(VectorFileError, match="has no end"):
            import_torch_vector("cut.pt")
    for beginning in (b"", whole[:3], b"GGUF"):
        Path("short.pt").write_bytes(beginning)
        assert not is_torch_file("short.pt")
    Path("old.pt").write_bytes(pickle.dumps({1: [1.0]}))
    assert not is_torch_file("old.pt")
    with pytest.raises(VectorFileError, match="neither GGUF"):
        import_vector("old.pt")


# --- the tools themselves ----------------------------------------------------------------------------------


def logits_of(model, ids, torch):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture
def checkpoint(tiny_llama, torch):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama.hf_dir).float().eval()


@pytest.fixture
def adding(tiny_llama):
    """A vector that adds at two layers, some tokens, and the logits that it makes of them."""
    with open_engine(tiny_llama.gguf_path) as engine:
        vector = random_vector(engine, mode="add", layers=(1, 2), strength=0.5)
        ids = engine.prompt_tokens("Tell me about the fox.")
        return vector, ids, engine.logits(ids, steer=[vector])


def test_steering_vectors_adds_what_was_exported_and_its_pickle_is_read(torch, folder, checkpoint, adding):
    theirs = pytest.importorskip("steering_vectors", reason=STEERING_VECTORS)
    vector, ids, expected = adding
    write_torch_vector(vector, "v.pt")
    steering = theirs.SteeringVector(**torch.load("v.pt", weights_only=True))
    with steering.apply(checkpoint):
        np.testing.assert_allclose(logits_of(checkpoint, ids, torch), expected, rtol=1e-3, atol=1e-3)
    torch.save(steering, "pickled.pt")
    again = import_torch_vector("pickled.pt", n_layer=4)
    assert again.layers == (1, 2)
    assert np.array_equal(again.directions[1], (0.5 * vector.directions[1]).astype(np.float32))


def test_a_pickle_of_steering_vectors_is_read_without_it(torch, folder, monkeypatch):
    """Its class under its own name, in a module that is gone when the file is read."""
    import sys
    import types

    module = types.ModuleType("steering_vectors.steering_vector")
    kind = type("SteeringVector", (), {"__module__": module.__name__})
    module.SteeringVector = kind
    instance = kind()
    instance.layer_activations, instance.layer_type = {2: torch.ones(8)}, "decoder_block"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(instance, "v.pt")
    assert import_torch_vector("v.pt").layers == (2,)


def test_repeng_reads_what_was_exported_and_writes_what_is_imported(torch, folder, monkeypatch, adding):
    pytest.importorskip("sklearn", reason="repeng needs scikit-learn")
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 is of numpy 1
    repeng = pytest.importorskip("repeng", reason="pip install --no-deps repeng")
    vector, _, _ = adding
    export_vector(vector, "v.gguf", to="repeng")
    theirs = repeng.ControlVector.import_gguf("v.gguf")
    assert sorted(theirs.directions) == [1, 2, 3]
    assert np.array_equal(theirs.directions[1], (0.5 * vector.directions[1]).astype(np.float32))
    (2 * theirs).export_gguf("again.gguf")
    again = import_vector("again.gguf")
    assert again.layers == (1, 2)
    np.testing.assert_allclose(again.directions[1], vector.directions[1], rtol=1e-6)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "name"), [*TOOLS, ("easysteer", "o.gguf")])
def test_the_command_goes_both_ways(torch, folder, to, name):
    write_vector(folder / "v.gguf", layers=(2,), positions="prompt")
    done = invoke("convert", "export", "v.gguf", "--to", to, "-o", name)
    assert (done.status, done.out) == (0, f"{name}\n"), done.err
    assert ("not in the file: mode project, which becomes add" in done.err) == (to not in WHOLE)
    there = invoke("convert", "import", name, "-o", "back.gguf", *(() if to in WHOLE else ("--n-layer", "4")))
    assert there.status == 0, there.err
    one, other = ControlVector.load("v.gguf"), ControlVector.load("back.gguf")
    assert same(one, other) if to in WHOLE else np.array_equal(one.directions[2], other.directions[2])


def test_an_export_replaces_a_foreign_file_only_when_told(folder):
    write_vector(folder / "v.gguf")
    (folder / "o.npz").write_text("precious")
    args = ("convert", "export", "v.gguf", "--to", "npz", "-o", "o.npz")
    assert "choose another name" in invoke(*args).complaint()
    assert (folder / "o.npz").read_text() == "precious"
    assert invoke(*args, "--force").status == 0
    assert (
        "is the vector itself" in invoke("convert", "export", "v.gguf", "--force", "-o", "v.gguf").complaint()
    )


def test_json_says_what_is_lost(folder):
    write_vector(folder / "v.gguf")
    found = invoke("convert", "export", "v.gguf", "--to", "repeng", "-o", "o.gguf", "--json").json
    assert found["to"] == "repeng" and found["mode"] == "add" and len(found["lost"]) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export", "v.gguf", "--to", "onnx", "-o", "o"], "'onnx' is not one of"),
        (["export", "v.gguf", "--to", "npz", "-o", "none/o.npz"], "none/o.npz"),
        (["export", "v.gguf", "--to", "npz", "-o", "."], "is not a vector file"),
        (["export", "v.gguf", "--to", "steering-vectors", "--strength", "0", "-o", "o.pt"], "strength 0"),
        (["import", "bad.pt", "-o", "o.gguf"], "could run code"),
        (["import", "a.pt", "-o", "o.gguf"], "holds one direction"),
        (["import", "map.pt", "--from", "repeng", "-o", "o.gguf"], "takes no convention"),
        (["import", "map.pt", "--n-layer", "1", "-o", "o.gguf"], "beyond a model of 1 layers"),
        (["import", "map.pt", "--layer", "2", "-o", "o.gguf"], "layer 2 is out of range"),
    ],
)
def test_bad_input_is_one_line(torch, folder, args, says):
    write_vector(folder / "v.gguf")
    torch.save(Malicious(), "bad.pt")
    torch.save(torch.ones(8), "a.pt")
    torch.save({1: torch.ones(8)}, "map.pt")
    assert says in invoke("convert", *args).complaint()
    assert not (folder / "harmed").exists() and not list(folder.glob("o*"))
