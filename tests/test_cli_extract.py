"""`localsteer extract`: the same flags for both backends, one file, the library's own numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import invoke

from localsteer import ControlVector

QUERIES = "Tell me about foxes.\nDescribe a quiet village.\nWhat is a river?\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.txt").write_text(QUERIES)
    return tmp_path


def extract(*args):
    done = invoke("extract", "--queries", "queries.txt", "-t", "1", *args)
    assert done.status == 0, done.err
    return done


def test_both_backends_write_the_same_vector(tiny_llama):
    exact = ("-i", "Answer in rhyme.", "--pairs", "3")
    extract("--gguf", tiny_llama.gguf_path, *exact, "--exact", "-o", "llama.gguf")
    extract("--model", tiny_llama.hf_dir, *exact, "--dtype", "float32", "-o", "torch.gguf")
    ours, theirs = ControlVector.load("llama.gguf"), ControlVector.load("torch.gguf")
    for layer in range(tiny_llama.n_layer):
        assert float(ours.unit(layer) @ theirs.unit(layer)) > 0.9999
    np.testing.assert_allclose(ours.mean_with, theirs.mean_with, rtol=1e-3, atol=1e-4)


def test_the_answer_is_the_file_s_name(tiny_llama, folder):
    done = extract("--gguf", tiny_llama.gguf_path, "-i", "Answer in rhyme.", "--pairs", "2")
    assert done.out == "answer_in_rhyme.gguf\n"
    assert "2 pairs" in done.err
    assert (folder / "answer_in_rhyme.gguf").is_file()


def test_settings_given_are_stored(tiny_llama):
    settings = ("--layer", "1,3", "--mode", "add", "--positions", "prompt", "--strength", "0.5")
    document = extract(
        "--gguf",
        tiny_llama.gguf_path,
        "-i",
        "Answer in rhyme.",
        "--pairs",
        "2",
        "-o",
        "v.gguf",
        *settings,
        "--json",
    ).json
    vector = ControlVector.load("v.gguf")
    assert document["file"] == "v.gguf" and document["layers"] == [1, 3]
    assert (vector.layers, vector.mode, vector.positions, vector.strength) == ((1, 3), "add", "prompt", 0.5)


def test_a_catalogue_s_instruction_with_a_slot(tiny_llama):
    document = extract(
        "--gguf", tiny_llama.gguf_path, "-i", "bullets", "--slot", "n=5", "--pairs", "3", "--json"
    ).json
    assert document["provenance"]["instruction_id"] == "bullets:5"
    assert document["provenance"]["verifier"].startswith("detectable_format:")


def test_a_vector_is_replaced_by_a_newer_one(tiny_llama):
    args = ("--gguf", tiny_llama.gguf_path, "--pairs", "2", "-o", "v.gguf")
    extract(*args, "-i", "Answer in rhyme.")
    extract(*args, "-i", "Answer in prose.")
    assert ControlVector.load("v.gguf").name == "answer_in_prose"


def test_a_folder_that_is_not_there_is_refused_before_the_work(tiny_llama):
    args = ("--gguf", tiny_llama.gguf_path, "-i", "json", "-o", "none/v.gguf")
    assert "there is no folder none" in invoke("extract", *args).complaint()


def test_without_torch_one_line_names_the_extra(monkeypatch, tiny_llama):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("torch_backend", "torch_steering"):
        monkeypatch.delitem(sys.modules, f"localsteer.extract.{name}", raising=False)
    says = invoke("extract", "--model", tiny_llama.hf_dir, "-i", "json", "-o", "v.gguf").complaint()
    assert 'pip install "localsteer[torch]"' in says.replace("'", '"')


def test_a_checkpoint_that_is_not_there(folder):
    (folder / "empty").mkdir()
    assert "empty" in invoke("extract", "--model", "empty", "-i", "json", "-o", "v.gguf").complaint()


@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there(tiny_llama, device):
    args = ("extract", "--model", tiny_llama.hf_dir, "-i", "json", "-o", "v.gguf", "--device", device)
    assert f"device '{device}' can't be used" in invoke(*args).complaint()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-i", "json", "--layer", "99"], "layer 99 is out of range"),
        (["-i", "json", "--strength", "nan"], "'nan' is not a finite number"),
        (["-i", "bullets", "--slot", "n=many"], "the verifier of 'bullets:many'"),
        (["-i", "shout", "--catalog", "own.toml"], "the verifier of 'shout': unknown instruction id"),
    ],
)
def test_what_is_wrong_is_said_before_any_state_is_computed(tiny_llama, folder, monkeypatch, args, says):
    from localsteer.engine import Engine

    monkeypatch.setattr(Engine, "last_hidden_states", lambda *_: pytest.fail("a state was computed"))
    (folder / "own.toml").write_text(
        '[[instruction]]\nid = "shout"\nphrasings = ["Shout."]\nverifier = "change_case:loud"\n'
    )
    assert says in invoke("extract", "--gguf", tiny_llama.gguf_path, *args, "-o", "v.gguf").complaint()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here that nobody can write to")
def test_a_folder_that_takes_no_file_is_refused_before_the_work(tiny_llama):
    done = invoke("extract", "--gguf", tiny_llama.gguf_path, "-i", "json", "-o", "/proc/self/v.gguf")
    assert "/proc/self/v.gguf can't be written" in done.complaint()
    assert "chat template" not in done.err and "choose another folder" in done.err


def test_a_file_that_is_no_gguf_is_not_taken_for_a_checkpoint_s_name(folder):
    (folder / "model.bin").write_bytes(b"")
    for name, why in {"model.bin": "is not a GGUF file", "none.bin": "can't be read"}.items():
        assert f"{name} {why}" in invoke("extract", "--gguf", name, "-i", "json").complaint()


@pytest.mark.parametrize(
    ("source", "option"),
    [("--gguf", ("--dtype", "float32")), ("--gguf", ("--device", "cpu")), ("--model", ("--exact",))],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_option_of_the_other_backend_is_refused(source, option):
    says = invoke("extract", source, "model.gguf", "-i", "json", *option).complaint()
    assert says.startswith(f"{option[0]} is for ")
