"""`localsteer eval` as a process: killed and going on, its files, its comparison, and what it refuses."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_runs import command_line, environment, invoke, program, write_vector

from localsteer import bundled
from localsteer.evaluate.page import plain
from localsteer.evaluate.results import NAME, read

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")
IDS = "json,title"
ARGS = ("eval", "--instructions", IDS, "-n", "3", "--no-paraphrases", "-t", "1", "-o", "run")
SECONDS_AT_MOST = 240


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One for all of these tests: the bundled model is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def folder(cache, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALSTEER_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    where = tmp_path_factory.mktemp("whole")
    done = program(*ARGS, cwd=where, env=environment(cache))
    assert done.status == 0, done.err
    (where / "stdout.txt").write_text(done.out, "utf-8")
    return where / "run"


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_but_for_time(a: Path, b: Path) -> bool:
    first, second = (plain(read(each)) | {"seconds": 0} for each in (a, b))
    return first == second


def wait_for(path: Path, n_lines: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS_AT_MOST
    while lines_of(path) < n_lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_and_ends_the_same(whole, cache, folder):
    replies, n_all = folder / "run" / "replies.jsonl", lines_of(whole / "replies.jsonl")
    with subprocess.Popen(
        command_line(*ARGS), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(replies, n_all // 2, process)
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "run" / NAME).exists()
    done = program(*ARGS, env=environment(cache))
    assert done.status == 0, done.err
    assert same_but_for_time(folder / "run", whole)


def test_two_engines_find_what_one_finds(whole, cache, folder):
    done = program(*(each if each != "1" else "2" for each in ARGS), env=environment(cache))
    assert done.status == 0, done.err
    first, second = read(whole), read(folder / "run")
    assert first.suites == second.suites
    assert first.vectors == second.vectors


def test_a_full_disk_keeps_what_is_done(whole, cache, folder):
    """A limit on the size of files stands for the full disk."""
    limit = (whole / "replies.jsonl").stat().st_size // 2

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = program(*ARGS, env=environment(cache), preexec_fn=limited)
    assert "what is done is kept" in done.complaint()
    assert "replies.jsonl" in done.err
    n_kept = lines_of(folder / "run" / "replies.jsonl")
    assert n_kept > 10
    again = program(*ARGS, env=environment(cache))
    assert again.status == 0, again.err
    assert same_but_for_time(folder / "run", whole)


def test_a_run_leaves_its_files_and_says_all_about_itself(whole):
    assert {each.name for each in whole.iterdir()} - {"plots"} == {
        "results.json", "report.md", "report.html", "replies.jsonl", "vectors",
    }  # fmt: skip
    results = plain(read(whole))
    assert results["format"] == 1
    assert results["model"]["name"] == "localsteer-instruct"
    assert results["model"]["quantization"] == "Q8_0"
    assert results["settings"]["n"] == 3 and results["settings"]["suites"] == ["format"]
    assert results["command"].startswith("localsteer eval --instructions")
    assert len(results["files"]["catalog"]) == 64
    assert set(results["vectors"]) == set(IDS.split(","))
    steered = results["suites"]["format"]["instructions"]["json"]["steered"]
    assert set(steered) == {"n", "strict", "loose", "quality", "settings", "vector_sha256"}
    assert set(steered["quality"]) == {
        "perplexity", "perplexity_ratio", "repetition", "words", "degenerate", "subject_kept",
    }  # fmt: skip
    assert "json" in (whole.parent / "stdout.txt").read_text("utf-8")
    assert "json" in (whole / "report.md").read_text("utf-8")
    assert "<html" in (whole / "report.html").read_text("utf-8")


def test_two_runs_are_compared(whole):
    done = invoke("eval", "--diff", whole, whole / NAME)
    assert done.status == 0, done.err
    assert "same settings" in " ".join(done.out.split())
    document = invoke("eval", "--diff", whole, whole, "--json", "-o", "changes").json
    assert "same settings" in Path("changes", "report.md").read_text("utf-8")
    assert document["sections"][1]["tables"][0]["columns"][-1] == "clear"


def test_a_comparison_does_not_replace_a_run_s_report(whole):
    before = (whole / "report.md").read_bytes()
    assert "choose another folder" in invoke("eval", "--diff", whole, whole, "-o", whole).complaint()
    assert (whole / "report.md").read_bytes() == before


def test_a_run_of_another_model_is_not_gone_on_with(whole):
    bundled.gguf_path("instruct", "F16")
    said = invoke("eval", "-m", "bundled:F16", "--instructions", "json", "-o", whole).complaint()
    assert "belongs to another run" in said


def test_a_run_with_another_context_is_not_gone_on_with(whole):
    """Replies that a smaller context has cut short would stand under the larger one."""
    said = invoke("eval", "--instructions", "json", "-c", "512", "-o", whole).complaint()
    assert "n_ctx 256, now 512" in said and "choose another folder" in said


# --- what is refused ---------------------------------------------------------------------------------------


def refused(*args: object) -> str:
    said = invoke("eval", "-t", "1", "-n", "2", "-o", "refused", *args).complaint()
    assert not Path("refused").exists()  # nothing is left of a run that was refused
    return said


def test_slips_in_names_are_found_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("localsteer.engine.Engine.__init__", lambda *_: pytest.fail("a model was loaded"))
    assert "unknown suite 'rhymes'" in refused("--suite", "rhymes")
    assert "unknown instruction 'jsn'" in refused("--instructions", "jsn")
    assert "--instructions is empty" in refused("--instructions", ",")
    assert "suite ifeval needs --ifeval" in refused("--suite", "ifeval")
    assert "suite cross-model needs --base" in refused("-m", "x.gguf", "--suite", "cross-model")
    assert "no room for a prompt" in refused("--max-tokens", "256")
    assert "there is no file prompts.jsonl" in refused("--suite", "ifeval", "--ifeval", "prompts.jsonl")


def test_a_model_or_vector_that_is_not_there():
    assert "x.gguf" in refused("-m", "x.gguf")
    assert "none.gguf" in refused("none.gguf")


def test_an_empty_file_of_queries(folder):
    (folder / "empty.txt").write_text("\n \n")
    assert "empty.txt holds no query" in refused("--queries", "empty.txt", "--instructions", "json")


def test_test_queries_that_vectors_were_made_with(folder):
    from localsteer.catalog import load_catalog

    queries = load_catalog("bundled").queries
    for split in ("extraction", "validation"):
        (folder / "mine.txt").write_text(f"What is a river?\n{queries[split][3].text.upper()}\n")
        said = refused("--queries", "mine.txt", "--instructions", "json")
        assert f"is in {split} of bundled" in said


def test_queries_of_ones_own_need_no_number(folder):
    (folder / "mine.txt").write_text("What is a river?\nWhat is rain?\nWhat is snow?\n")
    args = ("--queries", "mine.txt", "-i", "title", "--no-paraphrases", "-t", "1", "--max-tokens", "24")
    done = invoke("eval", *args, "-o", "run", "--json")
    assert done.status == 0, done.err
    assert done.json["settings"]["n"] == 3
    assert done.json["suites"]["format"]["instructions"]["title"]["none"]["n"] == 3
    assert "n must be 1 to 3" in refused("--queries", "mine.txt", "-n", "4")


def test_a_catalogue_whose_splits_overlap(folder):
    (folder / "own.toml").write_text(
        '[[instruction]]\nid = "json"\nphrasings = ["JSON."]\nverifier = "detectable_format:json_format"\n'
        '[queries]\nextraction = ["A?"]\nvalidation = ["B?"]\ntest = ["a?"]\n'
    )
    assert "is both in extraction and in test" in refused("--catalog", "own.toml")


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_catalogue_without_queries_of_a_kind(folder, missing):
    given = {"extraction": "A?", "validation": "B?", "test": "C?"}
    lines = [f'{split} = ["{text}"]' for split, text in given.items() if split != missing]
    (folder / "own.toml").write_text(
        '[[instruction]]\nid = "json"\nphrasings = ["JSON."]\nverifier = "detectable_format:json_format"\n'
        "[queries]\n" + "\n".join(lines) + "\n"
    )
    assert f"own.toml has no {missing} queries" in refused("--catalog", "own.toml")


def test_an_instruction_that_nothing_can_judge(folder):
    (folder / "own.toml").write_text('[[instruction]]\nid = "rhyme"\nphrasings = ["Rhyme."]\n')
    said = refused("--catalog", "own.toml", "--instructions", "rhyme")
    assert "'rhyme' has no verifier" in said
    assert "no instruction of own.toml in format" in refused("--catalog", "own.toml")


def test_more_queries_than_there_are():
    said = invoke("eval", "-t", "1", "-n", "9999", "--instructions", "json").complaint()
    assert "n must be 1 to" in said


def test_a_vector_of_another_model(folder):
    write_vector(folder / "json.gguf")
    assert "was made for a model with" in refused("json.gguf")


def test_an_unreadable_line_of_prompts(folder):
    good = {"prompt": "A?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (folder / "p.jsonl").write_text(json.dumps(good) + "\n{oops\n")
    said = refused("--suite", "ifeval", "--ifeval", "p.jsonl", "--instructions", "no_comma")
    assert "p.jsonl, line 2: not readable as JSON" in said


def test_every_line_of_a_file_of_prompts_is_asked_whatever_n(folder):
    good = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    lines = [json.dumps(good | {"prompt": f"What is {each}? Use no commas."}) for each in "ABC"]
    (folder / "p.jsonl").write_text("\n".join(lines))
    args = ("--suite", "ifeval", "--ifeval", "p.jsonl", "--instructions", "no_comma", "-n", "2", "-t", "1")
    done = invoke("eval", *args, "-o", "run", "--max-tokens", "8", "--json")
    assert done.status == 0, done.err
    assert done.json["settings"]["n"] is None and "3 of 3 lines are asked" in json.dumps(done.json["suites"])


def test_suites_with_nothing_to_do_are_left_out_of_all_and_refused_by_name(folder):
    args = ("-i", "title", "-n", "2", "-t", "1", "--max-tokens", "24", "--no-paraphrases", "-o")
    done = invoke("eval", "--suite", "all", *args, "run", "--json")
    assert done.status == 0, done.err
    assert list(done.json["suites"]) == done.json["settings"]["suites"] == ["format", "cross-model"]
    for name, why in (("length", "is a length"), ("words", "is a word"), ("composition", "nothing to comb")):
        assert f"suite {name} is left out: " in done.err and why in done.err
        said = invoke("eval", "--suite", f"format,{name}", *args, name).complaint()
        assert why in said and not (folder / name).exists()


def test_results_that_are_none(folder, whole):
    (folder / "bad.json").write_text("{")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "old.json").write_text('{"format": 99}')
    assert "bad.json is no results.json" in invoke("eval", "--diff", "bad.json", whole).complaint()
    assert "deep.json is no results.json" in invoke("eval", "--diff", "deep.json", whole).complaint()
    assert "format 99" in invoke("eval", "--diff", whole, "old.json").complaint()
    study = {"format": 1, "model": {}, "base": None, "settings": {}, "files": {}, "vectors": {}}
    (folder / "study.json").write_text(json.dumps(study | {"study": "pairs"}))
    assert "B is no evaluation" in invoke("eval", "--diff", whole, "study.json").complaint()
    assert "no.json can't be read" in invoke("eval", "--diff", whole, "no.json").complaint()


def test_a_report_is_made_again_from_its_results(tmp_path):
    recorded = Path(__file__).parents[1] / "docs" / "results" / "eval-q8_0"
    done = invoke("eval", "--report", recorded, "--out", tmp_path / "page")
    assert done.status == 0, done.err
    assert (tmp_path / "page" / "report.md").read_text() == (recorded / "report.md").read_text()
    assert "<html" in (tmp_path / "page" / "report.html").read_text()
    assert invoke("eval", "--report", tmp_path / "nothing").status == 2
