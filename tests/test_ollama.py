"""Ollama's API, asked by the ollama package over real HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess

import jsonschema
import pytest
from serving import FOXES, QUESTION, model_path, serving
from test_responses import prompts_of
from test_server_more import SCHEMA, TOOLS_TEMPLATE, WEATHER, with_metadata

from localsteer import bundled

ollama = pytest.importorskip("ollama", reason="the ollama package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

GREEDY = {"temperature": 0, "num_predict": 60}
DRAWN = {"temperature": 1.0, "seed": 1, "num_predict": 400}
# shows what it was given
THINKING = "{% if enable_thinking is defined %}{{ enable_thinking }} {% endif %}{{ messages[-1].content }}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {
        "bundled": model_path(),
        "tools": with_metadata(folder / "tools.gguf", tokenizer__chat_template=TOOLS_TEMPLATE),
        "thinking": with_metadata(folder / "thinking.gguf", tokenizer__chat_template=THINKING),
        "mean": with_metadata(folder / "mean.gguf", llama__pooling_type=1),
    }
    with serving(None, models=models, engine={"n_seq_max": 2}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(server.url, trust_env=False)


# -- replies ------------------------------------------------------------------------------------------------


def test_a_chat_is_whole_with_its_times(server, client):
    reply = client.chat("bundled", FOXES, options=GREEDY)
    chat = server.client().chat.completions.create(
        model="bundled", messages=FOXES, temperature=0, max_tokens=60
    )
    assert reply.message.content == chat.choices[0].message.content and reply.message.role == "assistant"
    assert (reply.done, reply.done_reason, reply.model) == (True, "stop", "bundled")
    assert (reply.prompt_eval_count, reply.eval_count) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    parts = reply.load_duration + reply.prompt_eval_duration + reply.eval_duration
    assert 0 < reply.eval_duration < reply.total_duration and parts == pytest.approx(
        reply.total_duration, abs=10
    )


def test_a_stream_is_lines_of_json_and_the_default(server, client):
    whole = client.chat("bundled", FOXES, options=GREEDY)
    parts = list(client.chat("bundled", FOXES, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count and parts[-1].message.content == ""
    with server.http() as http:
        answer = http.post("/api/chat", json={"model": "bundled", "messages": FOXES, "options": GREEDY})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert len([json.loads(line) for line in answer.text.splitlines()]) == len(parts)


def test_generate_asks_by_the_template_and_with_raw_does_not(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "bundled")
    asked = client.generate("bundled", QUESTION, system="Be kind.", options=GREEDY).response
    messages = [{"role": "system", "content": "Be kind."}, *FOXES]
    assert asked == client.chat("bundled", messages, options=GREEDY).message.content
    assert seen[0] == seen[1] != QUESTION
    raw = client.generate("bundled", "The fox is", raw=True, options=GREEDY | {"num_predict": 8})
    chat = server.client().completions.create(
        model="bundled", prompt="The fox is", temperature=0, max_tokens=8
    )
    assert raw.response == chat.choices[0].text and seen[2] == "The fox is"
    streamed = client.generate(
        "bundled", "The fox is", raw=True, stream=True, options=GREEDY | {"num_predict": 8}
    )
    assert "".join(part.response for part in streamed) == raw.response


def test_options_bound_a_reply(client):
    whole = client.chat("bundled", FOXES, options=GREEDY).message.content
    word = whole.split()[3]
    for stop in (word, [word]):
        cut = client.chat("bundled", FOXES, options=GREEDY | {"stop": stop})
        assert (cut.message.content, cut.done_reason) == (whole[: whole.index(word)], "stop")
    short = client.chat("bundled", FOXES, options=GREEDY | {"num_predict": 3})
    assert (short.eval_count, short.done_reason) == (3, "length")
    free = client.chat("bundled", FOXES, options=GREEDY | {"num_predict": -1, "num_ctx": 99, "mirostat": 0})
    assert free.message.content.startswith(whole[:20])


def test_a_request_without_a_prompt_loads_the_model(client):
    for reply in (
        client.generate("bundled"),
        client.generate("bundled", keep_alive=0),
        client.chat("bundled"),
    ):
        assert (reply.done, reply.done_reason) == (True, "load")
    with pytest.raises(ollama.ResponseError) as caught:
        client.generate("bundledd")
    assert caught.value.status_code == 404


def test_latest_is_nothing(client):
    assert client.chat("bundled:latest", FOXES, options={"num_predict": 1}).done
    assert client.show("bundled:latest").details.format == "gguf"
    with pytest.raises(ollama.ResponseError, match="bundled:1b"):
        client.chat("bundled:1b", FOXES)


def test_log_probabilities(client):
    reply = client.chat("bundled", FOXES, options=GREEDY | {"num_predict": 4}, logprobs=True, top_logprobs=2)
    assert len(reply.logprobs) == 4 and len(reply.logprobs[0].top_logprobs) == 2
    raw = client.generate("bundled", "The fox", raw=True, options={"num_predict": 3}, top_logprobs=1)
    assert len(raw.logprobs) == 3


# -- forms and tools ----------------------------------------------------------------------------------------


def test_a_format_is_followed(client):
    reply = client.chat("bundled", FOXES, format=SCHEMA, options=DRAWN)
    jsonschema.validate(json.loads(reply.message.content), SCHEMA)
    raw = client.generate("bundled", QUESTION, format=SCHEMA, options=DRAWN)
    jsonschema.validate(json.loads(raw.response), SCHEMA)
    assert client.chat("bundled", FOXES, format="json", options=GREEDY).message.content.startswith("{")


def test_tools_are_shown_and_calls_are_read(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "tools")
    call = {"function": {"name": "get_weather", "arguments": {"place": "Oslo"}}}
    messages = [
        *FOXES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "It rains."},
    ]
    client.chat("tools", messages, tools=[WEATHER], options={"num_predict": 2})
    (prompt,) = seen
    assert prompt.index("Tools: ") < prompt.index('"place": "Oslo"') < prompt.index("It rains.")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_a_reply_is_one_in_the_answer(server, client, monkeypatch, stream):
    """The bundled model makes none by itself: a constraint of the test's has it make one."""
    from localsteer.server import turns
    from localsteer.server.formats import enforced_call

    def forced(_body, served, tools):
        return enforced_call(served, tools, range(len(tools))) if tools else None

    monkeypatch.setattr(turns, "forced_call", forced)
    made = client.chat("tools", FOXES, tools=[WEATHER], options=DRAWN, stream=stream)
    parts = list(made) if stream else [made]
    (call,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert call.function.name == "get_weather"
    # its package leaves maxLength out of what it sends
    assert call.function.arguments["days"] in (1, 2, 3) and isinstance(call.function.arguments["place"], str)
    assert parts[-1].done and parts[-1].done_reason == "stop"


def test_think_goes_to_the_template(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "thinking")
    for think in (True, False, None):
        client.chat("thinking", FOXES, think=think, options={"num_predict": 1})
    assert seen == [f"True {QUESTION}", f"False {QUESTION}", QUESTION]
    client.chat("bundled", FOXES, think=False, options={"num_predict": 1})
    for think in (True, "high"):
        with pytest.raises(ollama.ResponseError, match="think"):
            client.chat("bundled", FOXES, think=think)


# -- models -------------------------------------------------------------------------------------------------


def test_what_is_told_of_models(server, client):
    assert [model.model for model in client.list().models] == ["bundled", "tools", "thinking", "mean"]
    details = client.list().models[0].details
    assert (details.format, details.family, details.quantization_level) == ("gguf", "llama", "F32")
    assert len({model.digest for model in client.list().models}) == 4
    shown = client.show("tools")
    assert shown.template == TOOLS_TEMPLATE and {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["llama.block_count"] == server.state.models["tools"].engine.model.n_layer
    assert not any(key.startswith("tokenizer.ggml.") for key in shown.modelinfo)
    assert "embedding" in client.show("mean").capabilities
    assert [model.context_length for model in client.ps().models] == [1024] * 4
    with pytest.raises(ollama.ResponseError, match="nothing"):
        client.show("nothing")
    with server.http() as http:
        assert http.get("/api/version").json()["version"].count(".") == 2
        assert [http.head(path).status_code for path in ("/", "/api/tags", "/api/version")] == [200] * 3
        assert http.post("/api/show", json={"name": "bundled", "verbose": True}).status_code == 200


def test_embeddings(client):
    many = client.embed("mean", ["A fox.", "A hare."])
    one = client.embed("mean", "A fox.")
    assert len(many.embeddings) == 2 and many.prompt_eval_count > one.prompt_eval_count > 0
    assert one.embeddings[0] == pytest.approx(many.embeddings[0], abs=1e-3)
    assert client.embeddings("mean", "A fox.").embedding == pytest.approx(one.embeddings[0], abs=1e-3)
    with pytest.raises(ollama.ResponseError, match="make embeddings"):
        client.embed("bundled", "A fox.")


@pytest.mark.parametrize("path", ["/api/pull", "/api/delete", "/api/copy", "/api/blobs/sha256:1"])
def test_what_is_not_served(server, path):
    with server.http() as http:
        answer = http.post(path, json={"model": "x"})
    assert answer.status_code == 404 and path in answer.json()["error"]


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["AAAA"]}]}, "messages.0.images"),
        ("chat", {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ("chat", {"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content"),
        ("chat", {"messages": [{"role": "user", "content": "a", "extra": 1}]}, "messages.0.extra"),
        ("chat", {"messages": FOXES, "format": "yaml"}, "format"),
        ("chat", {"messages": FOXES, "format": {"type": "array", "uniqueItems": True}}, "format.uniqueItems"),
        ("chat", {"messages": FOXES, "template": "{{ .Prompt }}"}, "template"),
        ("chat", {"messages": FOXES, "options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"messages": FOXES, "options": {"temprature": 2}}, "options.temprature"),
        ("chat", {"messages": FOXES, "options": {"temperature": "hot"}}, "options.temperature"),
        ("chat", {"messages": FOXES, "options": {"num_predict": -5}}, "options.num_predict"),
        ("chat", {"messages": FOXES, "options": {"steering": [{"name": "nothing"}]}}, "steering.0.name"),
        ("chat", {"messages": FOXES, "options": {"seed": 1}, "seed": 1}, "seed"),
        ("chat", {"messages": FOXES, "options": [1]}, "options"),
        ("chat", {"messages": FOXES, "options": {"model": "bundled+json"}}, "options.model"),
        ("chat", {"messages": FOXES, "options": {"stream": False}}, "options.stream"),
        ("chat", {"messages": FOXES, "tools": [WEATHER | {"hidden": True}]}, "tools.0.hidden"),
        ("chat", {"messages": FOXES, "keep_alife": 1}, "keep_alife"),
        ("generate", {"prompt": "a", "images": ["AAAA"]}, "images"),
        ("generate", {"prompt": "a", "context": [1, 2]}, "context"),
        ("generate", {"prompt": "a", "template": "x"}, "template"),
        ("generate", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("generate", {"prompt": "a", "raw": True, "system": "b"}, "system"),
        ("generate", {"prompt": "a", "raw": True, "ensure": ["json"]}, "ensure"),
        ("generate", {"prompt": 5}, "prompt"),
        ("embed", {"input": 5}, "input"),
        ("embed", {"input": "a", "normalise": 1}, "normalise"),
        ("show", {}, "model"),
    ],
    ids=str,
)
def test_what_can_t_be_done_is_refused_by_name(server, path, body, param):
    with server.http() as http:
        answer = http.post(f"/api/{path}", json={**({"model": "bundled"} if path != "show" else {}), **body})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"} and answer.json()["error"].startswith(param), answer.text


def test_json_that_is_sent_as_a_form_is_read_but_from_no_page(server):
    body = json.dumps({"model": "bundled", "messages": FOXES, "options": {"num_predict": 1}})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with server.http() as http:
        assert http.post("/api/chat", content=body, headers=form).status_code == 200
        for page in ({"Referer": "http://a.example/"}, {"Sec-Fetch-Site": "cross-site"}):
            assert http.post("/api/chat", content=body, headers=form | page).status_code == 400
        other = http.post("/v1/chat/completions", content=body, headers=form)
        assert other.status_code == 400


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_line_in_its_manual(server):
    body = '{"model": "bundled", "prompt": "Why is the sky blue?", "options": {"num_predict": 3}}'
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", f"{server.url}/api/generate", "-d", body],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["done"] and lines[-1]["eval_count"] == 3
