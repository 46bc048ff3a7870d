"""`localsteer tune`: the winner goes into the file, a killed search goes on, and slips cost no search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_runs import command_line, environment, invoke, write_vector

from localsteer import ControlVector, bundled

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

# few settings and short replies, so that a search takes seconds
FEW = ("-t", "1", "-n", "4", "--layer", "3,7", "--positions", "generation,prompt", "--max-tokens", "128")
SMALL = (*FEW, "--strengths", "1", "--exhaustive")
PATIENCE_SECONDS = 100


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Shared by these tests: the model is made once, and replies that one search got serve the next."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def folder(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def no_comma(cache, tmp_path_factory):
    """A vector file of the bundled model, as bytes."""
    return _extracted("no_comma", cache, tmp_path_factory)


def _extracted(name, cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / f"{name}.gguf"
    before = os.environ.get("LOCALSTEER_CACHE")
    os.environ["LOCALSTEER_CACHE"] = str(cache)
    try:
        done = invoke("extract", "--gguf", "bundled", "-i", name, "--pairs", "20", "-t", "1", "-o", path)
    finally:
        if before is None:
            del os.environ["LOCALSTEER_CACHE"]
        else:
            os.environ["LOCALSTEER_CACHE"] = before
    assert done.status == 0, done.err
    return path.read_bytes()


@pytest.fixture
def vector(no_comma, folder):
    (folder / "no_comma.gguf").write_bytes(no_comma)
    return folder / "no_comma.gguf"


def tune(*args):
    done = invoke("tune", *args)
    assert done.status == 0, done.err
    return done


# --- what it does ---


def test_the_winner_goes_into_the_file_with_its_figures(vector):
    before = ControlVector.load(vector)
    done = tune(vector, *SMALL)
    after = ControlVector.load(vector)
    assert (after.layers, after.positions, after.strength, after.mode) == ((3,), "prompt", 1.0, "project")
    assert np.array_equal(after.directions, before.directions)
    record = after.provenance["validation"]
    assert record["n"] == 4 and record["scores"]["none"] == 0 and record["scores"]["steered"] >= 0.75
    assert set(record["scores"]) == {"none", "steered", "instructed", "both"}
    assert len(record["table"]) == 4 and record["search"] == "exhaustive"
    assert len(record["model"]["sha256"]) == 64 and record["tool_version"]
    assert "no_comma: project at layer 3, positions prompt, strength 1:" in done.out
    assert "told in words" in done.out
    assert f"written to {vector}" in done.err


def test_the_table_and_the_heat_map_show_every_setting(vector):
    lines = tune(vector, *SMALL, "--dry-run").out.splitlines()
    assert lines[0] == "no_comma, score on 4 queries"
    assert lines[1].split() == ["layer", "prompt", "generation"]
    assert [line.split()[0] for line in lines[2:4]] == ["3", "7"]
    assert sum(line.count("[") for line in lines[2:4]) == 1
    assert any(line.split()[:3] == ["3", "prompt", "project"] for line in lines)
    assert any("plain model" in line for line in lines)


def test_json_is_one_document(vector):
    document = tune(vector, *SMALL, "--json", "--dry-run").json
    (found,) = document["vectors"]
    assert found["setting"] == {"layer": 3, "positions": "prompt", "strength": 1.0, "mode": "project"}
    assert found["helps"] is True and found["written"] is None
    assert found["replies"]["asked"] == 4 * (1 + 4 + 2)
    assert len(found["table"]) == 5 and found["table"][0]["score"] == found["scores"]["steered"]


def test_a_dry_run_writes_nothing_and_the_next_search_asks_nothing_again(vector, no_comma):
    tune(vector, *SMALL, "--dry-run")
    assert vector.read_bytes() == no_comma
    assert tune(vector, *SMALL, "--json").json["vectors"][0]["replies"]["new"] == 0
    assert vector.read_bytes() != no_comma


def test_output_goes_elsewhere(vector, no_comma, folder):
    (folder / "second.gguf").write_bytes(no_comma)
    tune(vector, *SMALL, "-o", "one.gguf")
    tune(vector, "second.gguf", *SMALL, "-o", "tuned/new")
    assert vector.read_bytes() == no_comma
    assert ControlVector.load("one.gguf").layers == (3,)
    assert sorted(path.name for path in (folder / "tuned" / "new").iterdir()) == [
        "no_comma.gguf", "second.gguf",
    ]  # fmt: skip


def test_where_steering_does_not_help_the_file_does_nothing(vector):
    done = tune(vector, *SMALL, "--layer", "7", "--positions", "prompt")
    assert "No setting made the model follow no_comma more often" in done.out
    assert ControlVector.load(vector).strength == 0
    assert ControlVector.load(vector).provenance["validation"]["advice"]
    run = ("run", "--temp", "0", "-t", "1", "-n", "12")
    plain = invoke(*run, "Tell me about foxes.").out
    assert invoke(*run, "-s", vector, "Tell me about foxes.").out == plain


def test_an_instruction_is_extracted_and_tuned_in_one_go(folder):
    document = tune("-i", "no_comma", *SMALL, "-o", "made.gguf", "--json").json["vectors"][0]
    assert document["written"] == "made.gguf"
    assert ControlVector.load("made.gguf").provenance["validation"]["instruction"] == "no_comma"


def test_a_verifier_may_be_given_where_the_file_has_none(vector):
    bare = ControlVector.load(vector)
    provenance = {key: bare.provenance[key] for key in ("architecture", "probes")}
    from dataclasses import replace

    replace(bare, name="mine", provenance=provenance).save(vector)
    assert "--verifier ID --kwargs JSON" in invoke("tune", vector, *SMALL).complaint()
    rule = ("--verifier", "keywords:forbidden_words", "--kwargs", '{"forbidden_words": ["zeppelin"]}')
    document = tune(vector, *SMALL, *rule, "--json").json["vectors"][0]
    assert document["verifier"] == "keywords:forbidden_words"
    assert document["setting"] is None and document["scores"]["none"] == 1.0
    assert document["scores"]["instructed"] is None
    kept = ControlVector.load(vector).provenance
    assert (kept["verifier"], kept["kwargs"]) == (rule[1], json.loads(rule[3]))


def test_the_picture_is_drawn(vector, folder):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    tune(vector, *SMALL, "--dry-run", "--plot", "map.png")
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")


# --- the search by likelihood ---


@pytest.fixture(scope="module")
def tuned(cache, no_comma, tmp_path_factory):
    """A vector file after the search, and what the command printed."""
    path = tmp_path_factory.mktemp("tuned") / "no_comma.gguf"
    path.write_bytes(no_comma)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALSTEER_CACHE", str(cache))
        done = tune(path, "--max-tokens", "112")
    return path, done


def test_a_good_setting_is_found_and_told_of(tuned):
    path, done = tuned
    vector = ControlVector.load(path)
    record = vector.provenance["validation"]
    assert record["search"] == "likelihood" and record["n"] == 8
    assert record["scores"]["none"] == 0 and record["scores"]["steered"] >= 0.75
    assert record["recovered_gap"] > 0.5 and record["targets"]["n"] >= 4
    assert vector.strength != 0
    assert f"no_comma: project at layer {vector.layers[0]}, positions {vector.positions}" in done.out
    assert done.out.splitlines()[0] == "no_comma, recovered gap"


def test_inspect_shows_why(tuned):
    shown = invoke("inspect", tuned[0]).out
    assert "checked on 8 queries: plain 0%" in shown and "of what telling does" in shown


def test_words_without_a_verifier_are_tuned_by_likelihood(folder):
    options = ("--max-tokens", "64", "-n", "4", "--layer", "2-4", "--json", "-o", "own.gguf")
    (document,) = tune("-i", "Answer in small letters only.", *options).json["vectors"]
    assert document["judged_by"] == "likelihood" and document["verifier"] is None
    assert any("has no verifier" in line for line in document["advice"])
    assert ControlVector.load("own.gguf").provenance["validation"]["judged_by"] == "likelihood"


def test_a_file_without_wording_needs_the_exhaustive_search(vector):
    from dataclasses import replace

    bare = ControlVector.load(vector)
    provenance = {key: bare.provenance[key] for key in ("architecture", "probes")}
    replace(bare, name="mine", provenance=provenance).save(vector)
    rule = ("--verifier", "punctuation:no_comma")
    assert "--exhaustive" in invoke("tune", vector, *rule).complaint()


# --- stopped and gone on with ---


def start(vector, folder, *args):
    return subprocess.Popen(
        command_line("tune", vector, *args),
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def replies_in(folder):
    """How many replies the journals of searches hold."""
    return sum(path.read_bytes().count(b'"kind": "reply"') for path in folder.glob("tune/*/*.jsonl"))


def wait_for(what, process):
    end = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


LONGER = ("-t", "1", "-n", "6", "--positions", "prompt", "--max-tokens", "128", "--json", "--exhaustive")
ONE_STRENGTH = ("--strengths", "1")
ASKED = 6 * (1 + 8 + 2)  # in calls of 12, 48 and 6


def new_cache(folder, cache):
    """With the model in it, and no journal."""
    (folder / "models").mkdir(parents=True)
    for model in (cache / "models").iterdir():
        os.link(model, folder / "models" / model.name)
    return folder


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_search_asks_only_for_the_rest_and_ends_the_same(vector, no_comma, tmp_path, cache):
    stopped, whole = new_cache(tmp_path / "stopped", cache), new_cache(tmp_path / "whole", cache)
    process = start(vector, stopped, *LONGER, *ONE_STRENGTH)
    wait_for(lambda: replies_in(stopped) > 6 + 6 + 12, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert vector.read_bytes() == no_comma
    kept = replies_in(stopped)
    assert 24 < kept < ASKED
    out, err = start(vector, stopped, *LONGER, *ONE_STRENGTH).communicate(timeout=PATIENCE_SECONDS)
    assert b"continuing from" in err
    resumed = json.loads(out)["vectors"][0]
    assert resumed["replies"] == {"asked": ASKED, "new": ASKED - kept}
    assert replies_in(stopped) == ASKED
    tuned = vector.read_bytes()
    vector.write_bytes(no_comma)
    out, _ = start(vector, whole, *LONGER, *ONE_STRENGTH).communicate(timeout=PATIENCE_SECONDS)
    same = ("setting", "scores", "table", "advice")
    assert {key: json.loads(out)["vectors"][0][key] for key in same} == {key: resumed[key] for key in same}
    assert vector.read_bytes() == tuned


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child here")
def test_ctrl_c_leaves_the_file_as_it_was(vector, no_comma, cache):
    before = replies_in(cache)
    process = start(vector, cache, *LONGER, "--strengths", "0.7,1.1")
    wait_for(lambda: replies_in(cache) > before + 4, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert vector.read_bytes() == no_comma
    assert [path.name for path in vector.parent.glob("*no_comma*")] == ["no_comma.gguf"]


def test_without_a_cache_folder_it_works_and_says_so(vector, folder, monkeypatch):
    model = bundled.gguf_path("instruct", "Q8_0")
    (folder / "file").write_text("")
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder / "file"))
    few = ("-t", "1", "-n", "1", "--layer", "1", "--positions", "prompt", "--catalog", "bundled")
    few += ("--exhaustive",)
    done = tune("-m", model, vector, *few)
    assert "this search can't be resumed if it is stopped" in done.err
    assert "written to" in done.err and (folder / "file").read_text() == ""


# --- slips ---


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--instruction"),
        (["none.gguf"], "none.gguf"),
        (["V", "-i", "json"], "--instruction"),
        (["V", "--positions", "first"], "'first' is not one of all, prompt"),
        (["V", "--modes", "project,replace"], "'replace' is not one of project"),
        (["V", "--strengths", "1,x"], "'1,x' is not a list of strengths"),
        (["V", "--strengths", "0"], "0 steers nothing"),
        (["V", "--layer", "two"], "'two' is not a layer"),
        (["V", "--layer", "8"], "layer 8 is out of range"),
        (["V", "-n", "0"], "0 is not in the range"),
        (["V", "--kwargs", "{}"], "--verifier"),
        (["V", "--verifier", "keywords:existence", "--kwargs", "moon"], "moon is not a JSON object"),
        (["V", "--verifier", "keywords:existence", "--kwargs", "[" * 100_000], "is not a JSON object"),
        (["V", "--verifier", "keywords:existence"], "argument 'keywords' is missing"),
        (["V", "--verifier", "keyword:existence"], "did you mean keywords:existence"),
        (["V", "--queries", "none.txt"], "none.txt can't be read"),
        (["V", "--queries", "empty.txt"], "holds no query"),
        (["V", "--queries", "test.txt"], "is among the test queries of bundled"),
        (["V", "--catalog", "none.toml"], "none.toml can't be read"),
        (["V", "-o", "no/folder.gguf"], "there is no folder no"),
        (["V", "-o", "empty.txt"], "not a vector file of localsteer"),
        pytest.param(
            ["V", "-o", "/proc/self/v.gguf"],
            "choose another folder",
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no such folder here"),
        ),
        (["V", "--plot", "map.xyz"], "its ending must be one of"),
        (["V", "--plot", "no/map.png"], "there is no folder no"),
        (["-i", "jsom"], "unknown instruction 'jsom'"),
        (["-i", "Answer in rhyme.", "--exhaustive"], "--verifier ID --kwargs JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line(vector, folder, args, says):
    from localsteer.catalog import load_catalog

    (folder / "empty.txt").write_text("\n")
    (folder / "test.txt").write_text(load_catalog("bundled").queries["test"][3].text.upper())
    done = invoke("tune", *(vector if arg == "V" else arg for arg in args))
    assert says in done.complaint()


def test_queries_that_an_instruction_s_own_test_holds_are_refused(folder):
    """Those of a catalogue are not all: an instruction may have queries of its own."""
    from localsteer.catalog import load_catalog

    own = load_catalog("general").get("fixed_answer").queries["test"]
    (folder / "own.txt").write_text(own[0].text)
    done = invoke(
        "tune", "-i", "fixed_answer", "--catalog", "general", "--queries", "own.txt", "-o", "f.gguf"
    )
    assert "is among the test queries of general" in done.complaint()


def test_a_vector_of_another_model_is_refused_before_any_search(vector, no_comma, folder):
    write_vector(folder / "tiny.gguf", provenance={"verifier": "punctuation:no_comma", "phrasings": ["x"]})
    done = invoke("tune", vector, "tiny.gguf", "-t", "1", "--layer", "1")
    assert "was made for a model with embedding width 64 but this model has 256" in done.complaint()
    assert vector.read_bytes() == no_comma


def test_an_unreadable_line_of_the_journal_is_named(vector, cache):
    tune(vector, *SMALL, "--dry-run")  # so that there is one, whatever ran before
    said = tune(vector, *SMALL, "--dry-run").err
    path = next(path for path in cache.glob("tune/*/*.jsonl") if str(path) in said)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"{spoilt\n", *lines[4:]]))
    try:
        assert "line 5: this is not a record of a run" in invoke("tune", vector, *SMALL).complaint()
    finally:
        path.write_bytes(content)


def test_options_answer_to_the_names_that_they_once_had(vector):
    """And no help mentions these."""
    for name in ("--layer", "--blocks"):
        assert "layer 8 is out of range" in invoke("tune", vector, name, "8").complaint()
    for command in ("tune", "learn", "trace", "similarity"):
        assert "--block" not in invoke(command, "--help").out
