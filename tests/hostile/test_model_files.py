"""Hostile model files: each is one line and status 2, whatever llama.cpp would have done with it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from cli_runs import invoke, program
from model_damage import HEADER, TRIAL, made_file
from raw_gguf import U32, value
from tiny_gguf import tiny_gguf

import localsteer
from localsteer import bundled
from localsteer.errors import LocalsteerError, ModelFileError
from localsteer.model_header import check_header
from localsteer.runtime.bridge import check_gguf, guard, quantize

ENDS = "BPE vocabulary with SentencePiece's name"  # of TRIAL: an exception that nobody catches
ASSERTS = "SentencePiece without any separator in a BERT vocabulary"


@pytest.fixture(autouse=True)
def checked(tmp_path, monkeypatch):
    """In full, with a cache of its own and no memory of earlier files."""
    monkeypatch.setenv(guard.VARIABLE, guard.FULL)
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(guard, "_passed", set())


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    return path


def hostile(tmp_path, name):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(made_file(*{**HEADER, **TRIAL}[name]))
    return path


def refusal(path) -> str:
    with pytest.raises(ModelFileError) as error:
        check_gguf(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def no_trial(monkeypatch):
    monkeypatch.setattr(guard, "_try", lambda path, load: pytest.fail("the file was tried"))


# --- the header ---


@pytest.mark.parametrize("name", HEADER)
def test_the_header_of_a_hostile_file_is_refused_untried(name, tmp_path, monkeypatch):
    no_trial(monkeypatch)
    refusal(hostile(tmp_path, name))


@pytest.mark.parametrize("name", TRIAL)
def test_what_is_left_to_llama_cpp_is_one_line_or_none(name, tmp_path, monkeypatch):
    monkeypatch.setenv(guard.VARIABLE, "header")
    path = hostile(tmp_path, name)
    try:
        check_gguf(path)
    except ModelFileError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "made",
    [{}, {"tokenizer": "gpt2"}, {"tokenizer": "bert"}, {"n_expert": 2}, {"architecture": "qwen2"}],
    ids=str,
)
def test_a_good_header_is_taken(made, tmp_path):
    path = tmp_path / "tiny.gguf"
    raw = tiny_gguf(**made)
    path.write_bytes(raw.to_bytes())
    assert 0 < check_header(path) < path.stat().st_size


def test_every_cut_of_a_file_is_one_line(good, monkeypatch):
    no_trial(monkeypatch)
    whole = good.read_bytes()
    for part in (4, 8, 23, 24, 25, 60, 1000, 3000, 9000, len(whole) // 2, len(whole) - 1):
        good.write_bytes(whole[:part])
        refusal(good)


@pytest.mark.parametrize(
    "content", [b"", b"GGU", b"GGUF", b"\0" * 5000, b"<html>not found</html>", b"ggjt" * 99]
)
def test_what_is_no_gguf_is_named(content, tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    refusal(path)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none.gguf", "/dev/zero"):
        refusal(path)


# --- the trial ---


def test_what_llama_cpp_quotes_from_a_file_is_shortened(tmp_path):
    assert "unknown tokenizer: 'xxx" in refusal(hostile(tmp_path, "an endless name of a tokenizer"))


@pytest.mark.parametrize(
    ("name", "said"), [(ENDS, "unordered_map::at"), (ASSERTS, "GGML_ASSERT(special_sep_id")]
)
def test_a_file_that_ends_the_process_is_one_line(name, said, tmp_path, monkeypatch):
    path = hostile(tmp_path, name)
    line = refusal(path)
    assert "llama.cpp ends the process with" in line and said in line and "hostile" in line
    no_trial(monkeypatch)
    assert refusal(path) == line  # known by now


def test_a_good_file_is_tried_once_and_again_when_it_changes(good, monkeypatch):
    check_gguf(good)
    monkeypatch.setattr(guard, "_passed", set())  # as another process would find it
    with monkeypatch.context() as patch:
        no_trial(patch)
        check_gguf(good)
        elsewhere = shutil.copy(good, good.with_name("copy.gguf"))
        check_gguf(elsewhere)
    tried = []
    monkeypatch.setattr(guard, "_try", lambda path, load: tried.append(path))
    raw = bytearray(good.read_bytes())
    raw[-5] ^= 1
    good.write_bytes(raw)
    check_gguf(good)
    check_gguf(good, n_gpu_layers=1)
    assert tried == [good, good]


def test_a_large_file_is_known_by_its_header_ends_and_samples(good, monkeypatch):
    monkeypatch.setattr(guard, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(guard, "EDGE_BYTES", 100)
    monkeypatch.setattr(guard, "N_SAMPLES", 2)
    tried = []
    monkeypatch.setattr(guard, "_try", lambda path, load: tried.append(path))
    check_gguf(good)
    before = good.stat()
    raw = bytearray(good.read_bytes())
    raw[raw.index(b"\xe2\x96\x81fox")] ^= 1  # in the header, beyond what is hashed of the beginning
    good.write_bytes(raw)
    os.utime(good, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_gguf(good)
    assert len(tried) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "[" * 99999, '{"header": "x"}', '{"header": 5}'])
def test_a_damaged_outcome_is_found_again(good, damage, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(guard, "_try", lambda path, load: tried.append(path))
    check_gguf(good)
    (outcome,) = (tmp_path / "cache" / "tried").iterdir()
    whole = outcome.read_text()
    for text in (damage, json.dumps(json.loads(whole) | {"digest": "0"})):
        outcome.write_text(text)
        monkeypatch.setattr(guard, "_passed", set())
        check_gguf(good)
        assert outcome.read_text() == whole
    assert len(tried) == 3


def test_without_a_cache_a_file_is_tried_each_time(good, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(good / "no folder"))
    tried = []
    monkeypatch.setattr(guard, "_try", lambda path, load: tried.append(path))
    for _ in range(2):
        check_gguf(good)
        monkeypatch.setattr(guard, "_passed", set())
    assert len(tried) == 2


def test_a_trial_has_an_end_and_its_lateness_is_not_kept(good, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(guard, "SECONDS", 0.001)
        assert "has not finished loading it after" in refusal(good)
    check_gguf(good)


def test_the_variable_switches_the_trial_and_the_header_off(tmp_path, monkeypatch):
    no_trial(monkeypatch)
    monkeypatch.setenv(guard.VARIABLE, "header")
    check_gguf(hostile(tmp_path, ENDS))
    refusal(hostile(tmp_path, "0 layers"))
    monkeypatch.setenv(guard.VARIABLE, "off")
    check_gguf(hostile(tmp_path, "0 layers"))
    monkeypatch.setenv(guard.VARIABLE, "maybe")
    with pytest.raises(LocalsteerError, match="LOCALSTEER_MODEL_CHECK=maybe is not known: choose full"):
        check_gguf(hostile(tmp_path, "0 layers"))


def test_the_bundled_model_is_not_tried(monkeypatch):
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    no_trial(monkeypatch)
    path = bundled.gguf_path()
    check_gguf(path)
    monkeypatch.setattr(guard, "_passed", set())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(pytest.fail.Exception):
        check_gguf(path)


# --- every way in ---


def test_every_command_refuses_in_one_line(tmp_path):
    path = hostile(tmp_path, ENDS)
    for command in (
        ("run", "-m", path, "Hi"),
        ("chat", "-m", path),
        ("serve", "-m", path, "--port", "0"),
        ("extract", "--gguf", path, "-i", "json", "-o", tmp_path / "v.gguf"),
    ):
        complaint = invoke(*command).complaint()
        assert "llama.cpp ends the process with" in complaint, command


def test_a_process_of_the_program_is_not_ended(tmp_path):
    done = program("run", "-m", hostile(tmp_path, ASSERTS), "Hi")
    assert "GGML_ASSERT" in done.complaint()


def test_the_python_doors_refuse_too(tmp_path):
    path = hostile(tmp_path, ENDS)
    for opened in (
        localsteer.Engine,
        localsteer.SteeredLlama,
        lambda p: quantize(p, tmp_path / "q.gguf", "Q8_0"),
    ):
        with pytest.raises(ModelFileError, match=r"llama\.cpp ends the process with"):
            opened(path)


def test_doctor_tries_a_file_again(tmp_path, good):
    assert invoke("run", "-m", good, "-n", "2", "Hi").status == 0
    (outcome,) = (tmp_path / "cache" / "tried").iterdir()
    known = json.loads(outcome.read_text()) | {"refused": "an earlier trial said so."}
    outcome.write_text(json.dumps(known))
    guard._passed.clear()
    assert "an earlier trial said so" in invoke("run", "-m", good, "Hi").complaint()
    done = invoke("doctor", "-m", good, "--json")
    assert {check["name"]: check["status"] for check in done.json["checks"]}["file"] == "ok"
    assert json.loads(outcome.read_text())["refused"] is None
    done = invoke("doctor", "-m", hostile(tmp_path, ASSERTS))
    assert done.status == 1 and "GGML_ASSERT" in done.out


def test_a_key_of_the_wrong_kind_is_one_line_in_the_lists_too(tmp_path):
    raw = tiny_gguf()
    raw.key_values["llama.block_count"] = value(8, "two")
    raw.key_values["llama.embedding_length"] = value(U32, 0)
    path = tmp_path / "odd.gguf"
    path.write_bytes(raw.to_bytes())
    for command in (("run", "-m", path, "-i", "json", "Hi"), ("vectors", "shipped", path)):
        done = invoke(*command)
        assert done.status in (0, 2) and "Traceback" not in done.err, done
