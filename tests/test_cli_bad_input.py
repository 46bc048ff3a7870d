"""Bad input: one clear line on stderr, nothing on stdout, exit status 2, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess

import numpy as np
import pytest
from cli_runs import command_line, invoke, program, write_vector


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tiny_llama):
    return str(tiny_llama.gguf_path)


def refused(*args, input=""):
    return invoke(*args, input=input).complaint()


# --- the command line itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["runn"], "'runn'"),
        (["--colour"], "--colour"),
        (["run", "--temp", "warm", "Hi"], "'warm' is not a valid float"),
        (["run", "--top-k", "1.5", "Hi"], "'1.5' is not a valid int"),
        (["run", "-n", "-2", "Hi"], "-2 is not in the range"),
        (["run", "-c", "-1", "Hi"], "-1 is not in the range"),
        (["run", "--mode", "replace", "Hi"], "'replace' is not one of"),
        (["run", "--positions", "first", "Hi"], "'first' is not one of"),
        (["run", "--layer", "two", "Hi"], "'two' is not a layer"),
        (["run", "--layer", "-1", "Hi"], "'-1' is not a layer"),
        (["run", "--layer", "0-99999999", "Hi"], "not a range of layers"),
        (["run", "--slot", "n", "Hi"], "'n' is not NAME=VALUE"),
        (["run", "Tell", "me"], "unexpected extra argument"),
        (["run", "--compare", "Hi"], "--compare needs"),
        (["run", "--strength", "0.5", "Hi"], "--strength needs something to steer by"),
        (["run", "--layer", "3", "Hi"], "--layer needs something to steer by"),
        (["run", "--ridge", "0.1", "Hi"], "--ridge needs something to steer by"),
        (["run", "--always-steer", "Hi"], "--always-steer needs something to steer by"),
        (["run", "--slot", "n=5", "-s", "json.gguf", "Hi"], "--slot needs --instruction"),
        (["run", "--pairs", "5", "Hi"], "--pairs needs --instruction"),
        (["run", "--steer-forms", "-j", "{}", "Hi"], "--steer-forms needs something to steer by"),
        (["run", "--steer-forms", "-i", "json", "Hi"], "--steer-forms needs --json-schema or --grammar"),
        (["chat", "--steer-forms"], "--steer-forms needs --json-schema or --grammar"),
        (["run", "--tries", "4", "Hi"], "--tries needs --ensure"),
        (["run", "--raw", "--system", "Be brief.", "Hi"], "--raw"),
        (["run", "--top-p", "1.5", "Hi"], "top_p must be 0 to 1, not 1.5"),
        (["run", "--temp", "nan", "Hi"], "temp must be a finite number"),
        (["run", "--grammar", "x", "--grammar-file", "y", "Hi"], "exclude each other"),
        (["run", "--grammar-file", "none.gbnf", "Hi"], "none.gbnf can't be read"),
        (["run", "--grammar", "x", "--json-schema", "{}", "Hi"], "--grammar and --json-schema exclude"),
        (["run", "--json-schema", "none.json", "Hi"], "none.json can't be read"),
        (["run", "--json-schema", "{a}", "Hi"], "the JSON schema is not JSON"),
        (["extract", "-i", "json"], "--gguf"),
        (["extract", "--gguf", "a.gguf", "--model", "b", "-i", "json"], "either"),
        (["extract", "--gguf", "a.gguf"], "--instruction"),
        (["vectors", "remove"], "--all"),
        (["vectors", "remove", "json", "--all"], "--all"),
        (["inspect"], "FILE"),
        (["convert", "model", "."], "--output"),
        (["convert", "import", "x", "--from", "vllm", "-o", "y"], "'vllm' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_in_the_command_line_names_the_value(args, says):
    assert says in refused(*args)


def test_a_process_ends_with_the_same_line_and_status():
    assert "'runn'" in program("runn").complaint()


def test_a_prompt_is_asked_for_when_there_is_none(model, monkeypatch):
    monkeypatch.setattr("localsteer.cli.prompt_input.sys.stdin", None)
    assert "there is no prompt" in refused("run", "-m", model)


def test_a_pipe_that_is_no_text(model):
    assert "not UTF-8 text (byte 2)" in refused("run", "-m", model, input=b"ab\xff")


# --- models ------------------------------------------------------------------------------------------------


def test_a_missing_model():
    assert "none.gguf can't be read: No such file" in refused("run", "-m", "none.gguf", "Hi")


def test_a_foreign_file_as_a_model(folder):
    (folder / "notes.gguf").write_text("not a model")
    assert "notes.gguf is not a GGUF file" in refused("run", "-m", "notes.gguf", "Hi")


def test_a_truncated_model(folder, tiny_llama):
    (folder / "cut.gguf").write_bytes(tiny_llama.gguf_path.read_bytes()[:5000])
    assert "cut.gguf" in refused("run", "-m", "cut.gguf", "Hi")


def test_a_folder_as_a_model(tiny_llama):
    assert "is a folder: name a GGUF file" in refused("run", "-m", tiny_llama.hf_dir, "Hi")
    assert "no model is named" in refused("run", "-m", "", "Hi")


def test_a_vector_as_a_model(folder):
    write_vector(folder / "vector.gguf")
    assert "vector.gguf is a control vector" in refused("run", "-m", "vector.gguf", "Hi")


def test_more_threads_than_ggml_is_made_for(model):
    assert "1 to 512, not 100000" in refused("run", "-m", model, "-t", "100000", "Hi")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_a_file(folder, model):
    os.mkfifo(folder / "pipe.gguf")
    assert "pipe.gguf is a pipe" in refused("run", "-m", "pipe.gguf", "Hi")
    assert "pipe.gguf is a pipe" in refused("run", "-m", model, "-s", "pipe.gguf", "Hi")
    assert "pipe.gguf is a pipe" in refused("inspect", "pipe.gguf")
    assert "pipe.gguf is a pipe" in refused("convert", "import", "pipe.gguf", "-o", "out.gguf")


def test_a_context_that_the_model_does_not_have(model):
    assert "512 tokens" in refused("run", "-m", model, "-c", "100000", "Hi")


@pytest.fixture
def silent(folder, tiny_llama):
    """A model whose chat template leaves out what the user says."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(tiny_llama.gguf_path, "r")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.text }}{% endfor %}"
    changed = {"tokenizer.chat_template": MetadataDetails(GGUFValueType.STRING, template)}
    writer = GGUFWriter(folder / "silent.gguf", arch="llama", endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, changed, [])
    return "silent.gguf"


@pytest.mark.parametrize(
    "args",
    [
        ("run", "-m", "{}", "Hi"),
        ("run", "-m", "{}", "--system", "Be brief.", "Hi"),
        ("run", "-m", "{}", "--json", "-s", "v.gguf", "Hi"),
        ("chat", "-m", "{}"),
        ("serve", "-m", "{}", "--port", "0"),
        ("trace", "-m", "{}", "-s", "v.gguf", "Hi"),
        ("extract", "--gguf", "{}", "-i", "Answer in rhyme.", "--pairs", "4"),
        ("similarity", "-m", "{}", "json", "lowercase", "--pairs", "4"),
    ],
    ids=" ".join,
)
def test_a_template_that_leaves_out_what_the_user_says(silent, folder, args):
    write_vector(folder / "v.gguf")
    said = refused(*(arg.format(silent) for arg in args))
    assert said.startswith("silent.gguf has a chat template that leaves out what the user says")
    assert "--raw" in said
    assert not list(folder.glob("answer*"))  # nothing was written


def test_a_raw_prompt_needs_no_template(silent):
    assert invoke("run", "-m", silent, "-n", "2", "--raw", "Hi").status == 0


# --- prompts -----------------------------------------------------------------------------------------------


def test_an_empty_prompt(model):
    assert "the prompt is empty" in refused("run", "-m", model, "")
    assert "the prompt is empty" in refused("run", "-m", model, "  ")
    assert "there is no prompt" in refused("run", "-m", model, input="\n")


def test_a_prompt_longer_than_the_context(model):
    assert "shorten the prompt" in refused("run", "-m", model, "-c", "64", "fox " * 200)


def test_a_context_too_small_for_a_question(folder, model):
    write_vector(folder / "v.gguf")
    question = "Tell me about the fox that lives near the river, and about owls."
    too_small = "and the context of 8 must also hold the reply: shorten the prompt, or raise n_ctx (-c)"
    assert too_small in refused("run", "-m", model, "-c", "8", question)
    assert too_small in refused("run", "-m", model, "-c", "8", "-s", "v.gguf", "--compare", question)
    assert too_small in refused("trace", "-m", model, "-c", "8", "-s", "v.gguf", question)
    no_room = "the context of 8 must also hold the reply"
    assert no_room in refused("chat", "-m", model, "-c", "8", input=question)
    made_now = ("-i", "Answer in rhyme.", "--pairs", "4")
    done = invoke("run", "-m", model, "-c", "8", *made_now, question)
    assert (done.status, done.out) == (2, "") and "the context of 8 tokens" in done.err


def test_an_empty_stop_text(model):
    assert "stop string must not be empty" in refused("run", "-m", model, "-r", "", "Hi")


def test_a_broken_grammar(model):
    assert "grammar can't be parsed" in refused("run", "-m", model, "--grammar", "root ::= (", "Hi")
    assert "grammar can't be parsed: it is empty" in refused("run", "-m", model, "--grammar", " ", "Hi")


def test_a_schema_that_can_t_be_enforced(model):
    schema = '{"properties": {"a": {"uniqueItems": true}}}'
    assert "properties.a.uniqueItems" in refused("run", "-m", model, "--json-schema", schema, "Hi")


def test_penalties_that_leave_no_token_are_no_grammar(model):
    done = invoke("run", "-m", model, "-n", "9", "--repeat-penalty", "1e-40", "Hi")
    assert (done.status, done.err) == (2, "localsteer: penalties and biases leave no token.\n")


# --- vectors -----------------------------------------------------------------------------------------------


def test_a_missing_vector(model):
    assert "none.gguf" in refused("run", "-m", model, "-s", "none.gguf", "Hi")
    assert "--instruction json" in refused("run", "-m", model, "-s", "json", "Hi")


def test_a_truncated_vector(folder, model):
    path = write_vector(folder / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-200])
    assert "cut.gguf" in refused("run", "-m", model, "-s", "cut.gguf", "Hi")
    assert "cut.gguf" in refused("inspect", "cut.gguf")


def test_a_foreign_file_as_a_vector(folder, model):
    (folder / "notes.gguf").write_text("not a vector")
    assert "notes.gguf" in refused("run", "-m", model, "-s", "notes.gguf", "Hi")


def test_a_model_as_a_vector(model):
    assert "llama.gguf" in refused("run", "-m", model, "-s", model, "Hi")
    assert "llama.gguf" in refused("inspect", model)


@pytest.mark.parametrize(("shape", "says"), [((4, 32), "width 32"), ((5, 64), "layers 5")])
def test_a_vector_of_another_width_or_depth(folder, model, shape, says):
    write_vector(folder / "other.gguf", n_layer=shape[0], n_embd=shape[1])
    assert says in refused("run", "-m", model, "-s", "other.gguf", "Hi")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_with_numbers_that_are_none(folder, model, value):
    path = write_vector(folder / "bad.gguf")
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(value).tobytes()
    path.write_bytes(raw)
    assert "NaN or infinite" in refused("run", "-m", model, "-s", "bad.gguf", "Hi")


def test_a_layer_without_a_direction(folder, model):
    from localsteer import ControlVector

    directions = np.zeros((4, 64), np.float32)
    directions[2] = 1
    ControlVector(directions, None, None, None, None, (2,), mode="add").save(folder / "one.gguf")
    assert "no direction at layer 1" in refused("run", "-m", model, "-s", "one.gguf@1", "Hi")


def test_a_layer_out_of_range(folder, model):
    write_vector(folder / "v.gguf")
    assert "layer 9 is out of range" in refused("run", "-m", model, "-s", "v.gguf@9", "Hi")
    assert "layer 9 is out of range" in refused("run", "-m", model, "-s", "v.gguf", "--layer", "9", "Hi")


def test_a_strength_that_is_no_number(folder, model):
    write_vector(folder / "v.gguf")
    assert "'much' is not a strength" in refused("run", "-m", model, "-s", "v.gguf:much", "Hi")
    assert "finite" in refused("run", "-m", model, "-s", "v.gguf", "--strength", "nan", "Hi")


def test_a_strength_beyond_every_number(folder, model):
    write_vector(folder / "json.gguf")
    said = refused("run", "-m", model, "-s", "json.gguf:1e300", "--mode", "add", "Hi")
    assert "json:1e+300 adds more than a state can hold" in said


def test_a_vector_without_a_learned_gate(folder, model):
    write_vector(folder / "json.gguf")
    said = refused("run", "-m", model, "-s", "json.gguf", "--mode", "gate", "Hi")
    assert "json has no learned gate" in said


def test_an_import_can_not_project(folder, model):
    write_vector(
        folder / "v.gguf", mean_with=None, mean_without=None, std_with=None, std_without=None, mode="add"
    )
    assert "use add or ablate" in refused("run", "-m", model, "-s", "v.gguf", "--mode", "project", "Hi")


@pytest.mark.parametrize(
    ("key", "value", "says"), [("localsteer.mode", "rotate", "rotate"), ("localsteer.format.major", 99, "99")]
)
def test_an_unknown_mode_or_a_newer_format(folder, model, key, value, says):
    path = write_vector(folder / "v.gguf")
    _patch(path, key, value)
    assert says in refused("run", "-m", model, "-s", "v.gguf", "Hi")


def _patch(path, key, value):
    """Overwrite a key-value in place; a text by one of the same length."""
    raw = path.read_bytes()
    at = raw.index(key.encode()) + len(key) + 4  # past the value's type
    if isinstance(value, str):
        size = int.from_bytes(raw[at : at + 8], "little")
        new = value.ljust(size)[:size].encode()
        path.write_bytes(raw[: at + 8] + new + raw[at + 8 + size :])
    else:
        path.write_bytes(raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :])


# --- instructions ------------------------------------------------------------------------------------------


def test_an_unknown_instruction_lists_the_known_ones(model):
    says = refused("run", "-m", model, "-i", "jason", "Hi")
    assert "unknown instruction 'jason'" in says and "json" in says


def test_a_slot_without_a_value(model):
    assert "needs a value for" in refused("run", "-m", model, "-i", "include_word", "Hi")


def test_an_unknown_slot(model):
    assert "no slot 'm'" in refused("run", "-m", model, "-i", "json", "--slot", "m=3", "Hi")


def test_no_queries(folder, model):
    (folder / "empty.txt").write_text("\n\n")
    assert "holds no query" in refused("run", "-m", model, "-i", "json", "--queries", "empty.txt", "Hi")
    assert "none.txt" in refused("run", "-m", model, "-i", "json", "--queries", "none.txt", "Hi")


def test_a_catalogue_that_is_none(folder, model):
    (folder / "my.toml").write_text("[[instruction]\n")
    assert "my.toml" in refused("run", "-m", model, "-i", "json", "--catalog", "my.toml", "Hi")


def test_more_pairs_than_there_are(folder, model):
    (folder / "two.txt").write_text("One.\nTwo.\n")
    args = ("-i", "Answer in rhyme.", "--queries", "two.txt", "--pairs", "50")
    assert "50 pairs can't be made" in refused("run", "-m", model, *args, "Hi")


# --- nothing of the user's is overwritten ------------------------------------------------------------------


def test_a_model_is_not_overwritten_by_a_vector(folder, tiny_llama):
    copy = folder / "model.gguf"
    copy.write_bytes(tiny_llama.gguf_path.read_bytes())
    args = ("extract", "--gguf", copy, "-i", "Answer in rhyme.", "--pairs", "2", "-o", copy)
    assert "choose another name" in refused(*args)
    assert copy.read_bytes() == tiny_llama.gguf_path.read_bytes()


def test_a_model_is_not_overwritten_by_a_model(folder, tiny_llama):
    (folder / "model.gguf").write_bytes(b"precious")
    assert "--force" in refused("convert", "model", tiny_llama.hf_dir, "-o", "model.gguf")
    assert (folder / "model.gguf").read_bytes() == b"precious"


def test_json_is_not_printed_half(model):
    done = invoke("run", "-m", model, "--json", "-c", "64", "fox " * 200)
    assert (done.status, done.out) == (2, "")
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.out)


# --- where the answer and the cache go ----------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("options", [(), ("--json",), ("--no-stream",)])
def test_no_room_for_the_answer(model, options):
    with open("/dev/full", "wb") as full:
        args = command_line("run", "-m", model, "-n", "4", *options, "Hi")
        done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"localsteer: standard output can't be written: No space left on device.\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the stream")
@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), ("2>&-", 0), ("<&-", 0)])
def test_a_closed_stream_is_an_empty_one(model, closed, status):
    line = shlex.join(command_line("run", "-m", model, "-n", "4", "Hi"))
    done = subprocess.run(f"{line} {closed}", shell=True, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (status, False), done.stderr
    chat = shlex.join(command_line("chat", "-m", model))
    assert subprocess.run(f"{chat} {closed}", shell=True, input=b"", capture_output=True).returncode == 0


def test_a_cache_in_a_home_that_is_none(monkeypatch, model):
    monkeypatch.setenv("LOCALSTEER_CACHE", "~nobody-of-this-name/cache")
    assert "~nobody-of-this-name/cache has no home folder" in refused("vectors")
    assert invoke("run", "-m", model, "-n", "2", "Hi").status == 0  # what needs no cache does not ask for it
