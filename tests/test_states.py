"""States of many prompts: those of transformers and of the engine, and a file that goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cli_runs import invoke, write_vector
from engines import open_engine, random_vector

from localsteer.errors import LocalsteerError, MismatchError, PlanError, PromptError
from localsteer.prompt_texts import PromptText, read_prompts
from localsteer.states import collect_states, readings, write_states
from localsteer.token_choice import TokenChoice

numpy_files = pytest.importorskip("safetensors.numpy", reason="states are a safetensors file")
# F32 weights and exact settings; batches take other kernels than single sequences
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
PROMPTS = [
    "Tell me about the fox.",
    "What do you know about rivers?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why do dogs sleep?"}],
    "Describe a quiet village in the mountains.",
    PromptText("The quick brown fox", raw=True),
    PromptText("Is it safe?", reply="No. It isn't."),
]


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        yield engine


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path="states.safetensors"):
    return numpy_files.load_file(path)


def rows_of(found, index):
    return found["states"][found["offsets"][index] : found["offsets"][index + 1]]


# --- which states ------------------------------------------------------------------------------------------


def test_states_are_those_of_transformers(tiny_model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model.hf_dir, attn_implementation="eager")
    before_norm = {}
    model.float().eval().model.norm.register_forward_pre_hook(lambda _m, args: before_norm.update(x=args[0]))
    with open_engine(tiny_model.gguf_path) as engine:
        found = collect_states(engine, PROMPTS[:4], tokens="all")
        chosen = readings(engine, PROMPTS[:4], "all")
    for states, reading in zip(found, chosen, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor(reading.tokens[None]).long(), output_hidden_states=True).hidden_states
        # hidden_states[L + 1], but for the last one, which is after the final norm
        theirs = torch.stack([*hidden[1:-1], before_norm["x"]], dim=2)[0].numpy()
        np.testing.assert_allclose(states, theirs, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize(
    "options", [{}, {"n_batch": 5, "n_seq_max": 1}, {"n_seq_max": 1}, {"kv_unified": False}]
)
@pytest.mark.parametrize("tokens", ["last", "all", "mean", "2", "span:i", "last:i"])
@pytest.mark.parametrize("layers", [(0, 2), (1, 3)])
def test_states_are_those_of_the_engine(tiny_llama, engine, options, tokens, layers):
    chosen = readings(engine, PROMPTS, tokens)
    with open_engine(tiny_llama.gguf_path, **options) as other:
        found = collect_states(other, PROMPTS, layer=layers, tokens=tokens)
    for states, reading in zip(found, chosen, strict=True):
        expected = engine.hidden_states(reading.tokens, layers)[list(reading.positions)]
        if tokens == "mean":
            expected = expected.mean(axis=0, keepdims=True)
        np.testing.assert_allclose(states, expected, **CLOSE)


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generation"])
def test_a_steered_state_is_seen_after_its_edit(engine, positions):
    vector = random_vector(engine, layers=(1,), positions=positions)
    steered = collect_states(engine, PROMPTS, layer=[1, 3], tokens="all", steer=[vector])
    for states, reading in zip(steered, readings(engine, PROMPTS, "all"), strict=True):
        expected = engine.hidden_states(reading.tokens, [1, 3], steer=[vector], n_prompt=reading.n_prompt)
        np.testing.assert_allclose(states, expected, **CLOSE)
    plain = collect_states(engine, PROMPTS, layer=[1, 3], tokens="all")
    changed = [not np.allclose(a, b, **CLOSE) for a, b in zip(steered, plain, strict=True)]
    # nothing is generated but the reply that is forced
    assert changed == [positions != "generation"] * 5 + [True]


def test_the_tokens_of_a_forced_reply(engine):
    (reading,) = readings(engine, [PromptText("Is it safe?", reply="No. It isn't.")], "reply")
    assert engine.text(reading.tokens[list(reading.positions)]) == "No. It isn't."
    assert reading.n_prompt == reading.positions.start
    messages = [{"role": "user", "content": "Is it safe?"}, {"role": "assistant", "content": "No. It isn't."}]
    (same,) = readings(engine, [messages], "reply")
    assert same.tokens.tolist() == reading.tokens.tolist() and same.positions == reading.positions


# --- the file ----------------------------------------------------------------------------------------------


def test_the_file_says_which_row_is_what(engine):
    done = write_states(engine, PROMPTS, "states.safetensors", layer=[0, 3], tokens="span:i")
    found, expected = load(), collect_states(engine, PROMPTS, layer=[0, 3], tokens="span:i")
    chosen = readings(engine, PROMPTS, "span:i")
    assert done["rows"] == len(found["states"]) and done["layers"] == found["layers"].tolist() == [0, 3]
    np.testing.assert_allclose(found["states"], np.concatenate(expected), **CLOSE)
    for i, reading in enumerate(chosen):
        rows = slice(*found["offsets"][i : i + 2])
        assert found["positions"][rows].tolist() == list(reading.positions)
        assert found["token_ids"][rows].tolist() == reading.tokens[list(reading.positions)].tolist()
        assert set(found["prompt_index"][rows]) == {i}
        assert (
            found["prompt_tokens"][slice(*found["prompt_offsets"][i : i + 2])].tolist()
            == reading.tokens.tolist()
        )
        assert found["n_prompt"][i] == reading.n_prompt


def test_pytorch_and_a_memory_map_read_the_same(engine):
    torch_files = pytest.importorskip("safetensors.torch")
    write_states(engine, PROMPTS, "states.safetensors", tokens="all", dtype="float16")
    found = load()["states"]
    assert found.dtype == np.float16
    assert np.array_equal(torch_files.load_file("states.safetensors")["states"].numpy(), found)
    with open("states.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert (8 + length) % 64 == 0 and header["states"]["data_offsets"][0] == 0
    mapped = np.memmap(
        "states.safetensors", np.float16, "r", offset=8 + length, shape=tuple(header["states"]["shape"])
    )
    assert np.array_equal(mapped, found)


def test_the_metadata_says_where_states_come_from(engine, tiny_llama):
    from safetensors import safe_open

    vector = random_vector(engine, layers=(2,), positions="prompt", strength=0.5)
    write_states(engine, PROMPTS[:2], "states.safetensors", layer=1, tokens="-2", steer=[vector])
    with safe_open("states.safetensors", "np") as file:
        about = file.metadata()
    assert about["format"] == "localsteer.states" and about["architecture"] == "llama"
    assert (about["layers"], about["tokens"], about["dtype"]) == ("[1]", "-2", "float32")
    assert about["prompts"] == "chat template" and len(about["model_sha256"]) == 64
    (steer,) = json.loads(about["steer"])
    expected = {"name": "random-0", "layer": 2, "mode": "project", "positions": "prompt", "strength": 0.5}
    assert steer == expected


def test_memory_does_not_grow_with_the_file(engine):
    text = "Describe a quiet village in the mountains, the river and the fox. " * 3
    peaks, sizes = [], []
    for n in (64, 128):
        tracemalloc.start()
        done = write_states(engine, [f"{i} {text}" for i in range(n)], f"{n}.safetensors", tokens="all")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(done["bytes"])
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 8


def test_one_long_prompt_is_streamed_too(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_batch=64) as engine:
        write_states(engine, ["fox " * 200], "states.safetensors", tokens="all")
        (expected,) = collect_states(engine, ["fox " * 200], tokens="all")
    assert np.array_equal(load()["states"], expected)


# --- a run that is stopped ---------------------------------------------------------------------------------

MANY = [f"Tell me about {word} and {i}." for i in range(70) for word in ("foxes", "rivers")]
KILLED = """
import os, signal, sys
from engines import open_engine
from localsteer.states import write_states
from test_states import MANY
with open_engine(sys.argv[1]) as engine:
    stop = lambda done, total: done >= 128 and os.kill(os.getpid(), signal.SIGKILL)
    write_states(engine, MANY, "states.safetensors", tokens="all", on_progress=stop)
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tiny_llama, engine, folder):
    write_states(engine, MANY, "whole.safetensors", tokens="all")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tiny_llama.gguf_path],
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "states.safetensors").exists() and (folder / "states.safetensors.part").exists()
    assert write_states(engine, MANY, "states.safetensors", tokens="all")["kept"] == 128
    assert (folder / "states.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["states.safetensors", "whole.safetensors"]


def stopped(engine, **settings):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_states(engine, MANY, "states.safetensors", **settings, on_progress=stop)


def test_rows_that_changed_on_disk_are_made_again(engine, folder):
    write_states(engine, MANY, "whole.safetensors")
    stopped(engine)
    part = folder / "states.safetensors.part"
    content = bytearray(part.read_bytes())
    content[2000:2100] = bytes(100)
    part.write_bytes(content)
    assert write_states(engine, MANY, "states.safetensors")["kept"] == 0
    assert (folder / "states.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_a_part_without_its_journal_or_a_journal_without_its_part(engine, folder):
    stopped(engine)
    (folder / "states.safetensors.part").unlink()
    assert write_states(engine, MANY, "states.safetensors")["kept"] == 0
    stopped(engine)
    (folder / "states.safetensors.journal").unlink()
    assert write_states(engine, MANY, "states.safetensors")["kept"] == 0


@pytest.mark.parametrize("other", [{"tokens": "mean"}, {"layer": 1}, {"dtype": "float16"}])
def test_what_another_run_has_done_is_not_lost(engine, folder, other):
    stopped(engine)
    before = (folder / "states.safetensors.part").read_bytes()
    with pytest.raises(LocalsteerError, match="another run"):
        write_states(engine, MANY, "states.safetensors", **other)
    assert (folder / "states.safetensors.part").read_bytes() == before
    assert write_states(engine, MANY, "states.safetensors")["kept"] == 64


def test_a_run_that_did_nothing_leaves_nothing(engine, folder):
    vector = random_vector(engine, strength=1e30, mode="add")
    with pytest.raises(LocalsteerError, match=r"beyond float16|not finite"):
        write_states(engine, MANY, "states.safetensors", dtype="float16", steer=[vector])
    assert not list(folder.iterdir())


def test_a_state_beyond_float16_is_no_infinity(engine, folder):
    vector = random_vector(engine, strength=1e5, mode="add", layers=(3,))
    with pytest.raises(LocalsteerError, match="use --dtype float32"):
        write_states(engine, PROMPTS, "states.safetensors", dtype="float16", steer=[vector])
    write_states(engine, PROMPTS, "states.safetensors", steer=[vector])
    assert np.abs(load()["states"]).max() > 65504


def test_what_is_not_ours_is_neither_written_nor_deleted(engine, folder):
    (folder / "states.safetensors.part").write_text("precious")
    with pytest.raises(LocalsteerError, match="does not belong to this run"):
        write_states(engine, PROMPTS, "states.safetensors")
    assert [path.name for path in folder.iterdir()] == ["states.safetensors.part"]
    assert (folder / "states.safetensors.part").read_text() == "precious"
    (folder / "states.safetensors.part").unlink()
    (folder / "states.safetensors.journal").mkdir()
    with pytest.raises(LocalsteerError, match=r"safetensors\.journal can't be written"):
        write_states(engine, PROMPTS, "states.safetensors")
    assert [path.name for path in folder.iterdir()] == ["states.safetensors.journal"]


def test_a_run_that_was_killed_while_it_began_goes_on(engine, folder):
    stopped(engine)
    part, journal = folder / "states.safetensors.part", folder / "states.safetensors.journal"
    part.write_bytes(part.read_bytes()[:100])
    journal.write_bytes(journal.read_bytes().partition(b"\n")[0] + b"\n")
    assert write_states(engine, MANY, "states.safetensors")["kept"] == 0
    assert len(load()["states"]) == len(MANY)


def test_two_runs_do_not_write_one_file(engine):
    pytest.importorskip("fcntl")

    def again(done, total):
        with pytest.raises(LocalsteerError, match="another run is writing"):
            write_states(engine, PROMPTS, "states.safetensors")

    write_states(engine, PROMPTS, "states.safetensors", on_progress=again)
    assert len(load()["states"]) == len(PROMPTS)


def test_a_full_disk_is_said_and_what_is_done_is_kept(engine, folder):
    resource = pytest.importorskip("resource", reason="no limit of file sizes here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(LocalsteerError, match="can't be written"):
            write_states(engine, MANY, "states.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_states(engine, MANY, "states.safetensors")
    assert len(load()["states"]) == len(MANY)


def test_too_large_a_file_is_refused_before_the_work(engine, folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(LocalsteerError, match="are free"):
        write_states(engine, MANY, "states.safetensors")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"layer": 4}, PlanError, "layer 4 is out of range"),
        ({"layer": []}, PlanError, "no layer"),
        ({"tokens": "first"}, PromptError, "names no tokens"),
        ({"tokens": 99}, PromptError, "prompt 1: it has 9 tokens, and no token 99"),
        ({"tokens": "span:cat"}, PromptError, "prompt 1: it does not contain 'cat'"),
        ({"tokens": "reply"}, PromptError, "prompt 1: it has no reply"),
        ({"dtype": "int8"}, LocalsteerError, "unknown dtype 'int8'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(engine, folder, settings, error, says):
    with pytest.raises(error, match=says):
        write_states(engine, ["Who is it?"], "states.safetensors", **settings)
    assert not list(folder.iterdir())


def test_a_vector_of_another_model_is_refused(engine):
    vector = random_vector(engine)
    other = type(vector)(vector.directions[:, :32], *[None] * 4, (1,), mode="add")
    with pytest.raises(MismatchError):
        write_states(engine, ["Who?"], "states.safetensors", steer=[other])


# --- prompts in files --------------------------------------------------------------------------------------


def test_a_text_file_has_one_prompt_a_line(folder):
    (folder / "p.txt").write_bytes("\ufeffOne?\r\n\r\n  \nTwo? \u2028 {x}\n".encode())
    assert [text.prompt for text in read_prompts("p.txt")] == ["One?", "Two? \u2028 {x}"]


def test_jsonl_has_prompts_messages_and_replies(folder):
    messages = [{"role": "user", "content": "Two?"}]
    lines = [{"prompt": "One?", "id": 7}, {"messages": messages}, {"prompt": "Three?", "reply": "3."}]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = read_prompts("p.jsonl", raw=False)
    assert [text.prompt for text in texts] == ["One?", messages, "Three?"]
    assert [text.reply for text in texts] == ["", "", "3."]
    (folder / "p.txt").write_text("\n".join(map(json.dumps, lines)))
    assert [text.prompt for text in read_prompts("p.txt")] == ["One?", messages, "Three?"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"{}", "neither prompt nor messages"),
        (b'{"prompt": "a", "messages": []}', "both prompt and messages"),
        (b'{"prompt": 7}', "must be a text, not 7"),
        (b'{"prompt": " "}', "is empty"),
        (b'{"messages": []}', "must be a list"),
        (b'{"messages": ["a"]}', "must be a list"),
        (b'{"prompt": "a", "reply": 7}', "reply must be a text"),
        (b'{"prompt": "a", "reply": ""}', "reply is empty"),
    ],
)
def test_a_bad_line_is_named_by_its_number(folder, line, says):
    (folder / "p.jsonl").write_bytes(b'{"prompt": "Who?"}\n\n' + line + b"\n")
    with pytest.raises(PromptError, match=f"line 3.*{says}") as error:
        read_prompts("p.jsonl")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "\\ud800"}', "not a Unicode character"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "unknown role 'boss'"),
        ('{"messages": [{"role": "user", "content": null}]}', "must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "prompt is empty"),
        (json.dumps({"prompt": "fox " * 2000}), "more than the context of 512"),
    ],
)
def test_a_prompt_that_the_model_can_not_read_is_named_too(tiny_llama, folder, line, says):
    (folder / "p.jsonl").write_text('{"prompt": "Who?"}\n' + line)
    said = invoke("states", "-m", tiny_llama.gguf_path, "--prompts", "p.jsonl", "-t", "1").complaint()
    assert "p.jsonl, line 2" in said and says in said
    assert [path.name for path in folder.iterdir()] == ["p.jsonl"]


# --- the command -------------------------------------------------------------------------------------------


def states(tiny_llama, *args):
    return invoke("states", "-m", tiny_llama.gguf_path, "-t", "1", "--prompts", "p.txt", *args)


@pytest.fixture
def prompts(folder):
    (folder / "p.txt").write_text("Who is it?\nTell me about foxes.\n")


def test_the_answer_is_the_file_s_name(tiny_llama, prompts):
    done = states(tiny_llama, "--layer", "1-2", "--dtype", "float16")
    assert (done.status, done.out) == (0, "states.safetensors\n")
    assert "2 prompts; 2 x 2 layers x 64, float16" in done.err
    assert load()["states"].shape == (2, 2, 64)


def test_the_settings_of_the_command_arrive(tiny_llama, prompts):
    write_vector(Path("v.gguf"))
    args = ("--tokens", "span:Who", "--raw", "-s", "v.gguf:0.5@1", "--layer", "2", "--json")
    refused = states(tiny_llama, *args)
    assert "line 2" in refused.complaint() and "'Who'" in refused.complaint()
    done = states(tiny_llama, *args[2:], "-o", "o.safetensors").json
    assert done["file"] == "o.safetensors" and done["layers"] == [2]
    from safetensors import safe_open

    with safe_open("o.safetensors", "np") as file:
        about = file.metadata()
    (edit,) = json.loads(about["steer"])
    assert (edit["layer"], edit["strength"], about["prompts"]) == (1, 0.5, "raw")


def test_a_file_of_states_is_replaced_and_nothing_else_is(tiny_llama, prompts, folder):
    (folder / "notes.txt").write_text("precious")
    assert "holds no states" in states(tiny_llama, "-o", "notes.txt").complaint()
    assert "holds no states" in states(tiny_llama, "-o", "p.txt").complaint()
    assert (folder / "notes.txt").read_text() == "precious"
    assert states(tiny_llama).status == 0
    assert states(tiny_llama, "--tokens", "all").status == 0
    assert len(load()["states"]) > 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "none/s.safetensors"], "no folder none"),
        (["-o", "."], "holds no states"),
        (["-o", "/dev/null"], "holds no states"),
        (["--prompts", "none.txt"], "none.txt can't be read"),
        (["--prompts", "."], "can't be read"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--prompts", "binary.txt"], "not UTF-8 text (byte 0)"),
        (["--tokens", "first"], "'first' names no tokens"),
        (["--layer", "9"], "layer 9 is out of range"),
        (["--layer", "x"], "'x' is not a layer"),
        (["-s", "none.gguf"], "none.gguf"),
        (["--dtype", "float64"], "'float64' is not one of"),
        (["-c", "3"], "line 1: it has"),
    ],
)
def test_bad_input_is_one_line(tiny_llama, prompts, folder, args, says):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    assert says in states(tiny_llama, *args).complaint()
    assert not list(folder.glob("*states*"))


def test_a_choice_is_written_as_it_is_read():
    for text in ("last", "all", "mean", "reply", "-2", "span: fox ", "last:fox", "mean:a:b"):
        assert TokenChoice.parse(TokenChoice.parse(text).spelled) == TokenChoice.parse(text)
