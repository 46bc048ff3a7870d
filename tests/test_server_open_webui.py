"""What Open WebUI sends to an OpenAI-compatible server, and how it reads the answers.

The shapes are those that its version 0.12.4 has after its own filtering: of the fields of its page (`params`,
`files`, `features`, `session_id`, ...) only these remain, and the settings of `params` stand in the body.
"""

from __future__ import annotations

import json

import pytest
from serving import FOXES, QUESTION, is_loud, model_path, serving, write_vectors
from test_server_more import TOOLS_TEMPLATE, WEATHER, with_metadata

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

KEY = "sk-a-key-of-ours"
SYSTEM = {"role": "system", "content": "Be kind.\nThe user's name is Ada."}
HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": "Python/3.12 aiohttp/3.13.2",
    "Content-Type": "application/json",  # of a GET too
    "Authorization": f"Bearer {KEY}",
    # where it is set up to tell who asks
    "X-OpenWebUI-User-Name": "Ada%20L%C3%B6w",
    "X-OpenWebUI-User-Id": "8f3c",
    "X-OpenWebUI-User-Email": "ada@example.com",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "a1b2",
}


def builtin_tools(n=24):
    """About as many as a fresh installation offers with every message of its page, as it writes them."""
    properties = {
        "query": {"type": "string", "description": "What to look for"},
        "count": {"default": 5, "type": "integer"},
        "ids": {"items": {"type": "string"}, "type": "array"},
        "options": {"type": "object", "additionalProperties": True, "properties": {}},
    }
    return [
        {
            "type": "function",
            "function": {
                "name": f"search_things_{i}",
                "description": "Search.\n\nFinds what was said before.",
                "parameters": {"type": "object", "properties": properties, "required": ["query"]},
            },
        }
        for i in range(n)
    ]


# every slider of its settings; most are Ollama's, and none is filtered for an OpenAI-compatible server
PARAMS = {
    "temperature": 0, "top_p": 0.95, "min_p": 0.05, "top_k": 40, "seed": 0, "frequency_penalty": 0,
    "presence_penalty": 0.0, "repeat_penalty": 1.05, "repeat_last_n": -1, "mirostat": 0, "mirostat_eta": 0.1,
    "mirostat_tau": 5, "tfs_z": 1, "num_ctx": 2048, "num_keep": 24, "num_batch": 512, "num_thread": 2,
    "num_gpu": 0, "use_mmap": True, "use_mlock": False, "think": False, "keep_alive": "5m",
    "reasoning_effort": "", "logit_bias": "", "stop": ["END", ""],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from localsteer.server.security import Access

    folder = write_vectors(tmp_path_factory.mktemp("vectors"))
    made = tmp_path_factory.mktemp("models")
    models = {
        "bundled": model_path(),
        "tools": with_metadata(made / "tools.gguf", tokenizer__chat_template=TOOLS_TEMPLATE),
        "mean": with_metadata(made / "mean.gguf", llama__pooling_type=1),
    }
    access = Access(api_key=KEY, hosts=("host.docker.internal",))
    with serving(folder, models=models, access=access, engine={"n_seq_max": 4}) as server:
        yield server


@pytest.fixture
def http(server):
    # a container reaches its host by this name
    with server.http(headers=HEADERS | {"Host": f"host.docker.internal:{server.port}"}) as http:
        yield http


class Turn:
    """A stream as Open WebUI reads it: line by line, the first choice alone, usage wherever it comes."""

    def __init__(self, lines):
        self.text, self.usage, self.reason, self.error, self.done = "", {}, None, None, False
        self.calls = {}
        for line in lines:
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            self.done = self.done or data == "[DONE]"
            if data != "[DONE]":
                self._read(json.loads(data))

    def _read(self, data):
        self.usage |= data.get("usage") or {}
        if not data.get("choices"):
            self.error = data.get("error") or self.error
            return
        choice = data["choices"][0]
        self.reason = choice.get("finish_reason") or self.reason
        delta = choice["delta"]
        self.text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            known = self.calls.setdefault(call["index"], {"id": call["id"], "name": "", "arguments": ""})
            known["name"] = call["function"].get("name") or known["name"]
            known["arguments"] += call["function"].get("arguments") or ""


def streamed(http, **body):
    given = {"stream": True, "model": "bundled", "messages": [SYSTEM, *FOXES], **body}
    with http.stream("POST", "/v1/chat/completions", json=given) as answer:
        if answer.status_code != 200:
            pytest.fail(answer.read().decode())
        assert "text/event-stream" in answer.headers["content-type"]
        turn = Turn(answer.iter_lines())
    assert turn.done and turn.error is None
    return turn


# --- the connection -----------------------------------------------------------------------------------------


def test_its_check_of_a_connection_and_its_menu(http):
    """It asks for /models at the address that it was given, and gives the menu each `id`."""
    answer = http.get("/v1/models")
    assert answer.status_code == 200
    listed = answer.json()["data"]
    assert {"bundled", "bundled+json", "tools+uppercase"} <= {each["id"] for each in listed}
    # what it adds to an entry and would find there already
    taken = {"name", "provider", "tags", "connection_type", "pipeline", "info", "actions", "urlIdx"}
    assert not any(taken & each.keys() for each in listed)


def test_a_wrong_key_is_told_as_json(http):
    for key in ("", "Bearer", "Bearer sk-other-key"):
        answer = http.get("/v1/models", headers={"Authorization": key})
        assert answer.status_code == 401 and answer.json()["error"]["message"]


# --- a chat -------------------------------------------------------------------------------------------------


def test_a_message_brings_tools_to_a_model_that_knows_none(http):
    """Its page offers its own tools with every message: without this, no chat at all would be possible."""
    turn = streamed(http, model="bundled+uppercase", tools=builtin_tools(), temperature=0, max_tokens=40)
    assert is_loud(turn.text) and turn.calls == {} and turn.usage == {}
    plain = streamed(http, model="bundled+uppercase", temperature=0, max_tokens=40)
    assert turn.text == plain.text


def test_usage_where_the_model_is_said_to_tell_it(http):
    turn = streamed(http, stream_options={"include_usage": True}, tools=builtin_tools(1), max_tokens=5)
    assert turn.usage["completion_tokens"] == 5 and turn.usage["prompt_tokens"] > 5
    assert turn.reason == "length"


def test_every_slider_of_its_settings(http):
    """max_tokens of its slider begins at -2: both negative values mean `as many as there is room for`."""
    bounded = streamed(http, **PARAMS, max_tokens=8)
    assert (bounded.text != "", bounded.reason) == (True, "length")
    for most in (-1, -2):
        turn = streamed(http, **PARAMS, max_tokens=most)
        assert turn.text.startswith(bounded.text) and turn.reason == "stop"


def test_steering_from_its_custom_parameters(http):
    """What a user adds there as a name and a JSON text stands in the body as JSON."""
    loud = [{"name": "uppercase", "strength": 1.0}]
    turn = streamed(http, steering=loud, tools=builtin_tools(), temperature=0, max_tokens=40)
    assert is_loud(turn.text)
    turn = streamed(http, ensure=["uppercase"], tools=builtin_tools(), temperature=0, max_tokens=60)
    assert is_loud(turn.text)


def test_a_reply_that_goes_on(http):
    """With `llama.cpp` as the connection's provider its Continue button asks for what follows, unrepeated."""
    whole = streamed(http, temperature=0, max_tokens=40).text
    begun = whole[: whole.index(" ", 20)]
    messages = [SYSTEM, *FOXES, {"role": "assistant", "content": begun}]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    turn = streamed(http, messages=messages, **flags, temperature=0, max_tokens=40)
    assert turn.text and whole.startswith(begun + turn.text[:10])
    # from other providers the same button sends no flags: a new turn after the reply that there was
    assert streamed(http, messages=messages, max_tokens=5).reason
    for wrong in (FOXES, messages[-1:]):
        answer = http.post("/v1/chat/completions", json={"messages": wrong, **flags})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "continue_final_message"


def test_a_picture_is_refused_in_words_that_its_page_shows(http):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": QUESTION}, picture]
    body = {"stream": True, "model": "bundled", "messages": [{"role": "user", "content": content}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "application/json" in answer.headers["content-type"]
    assert "'image_url'" in answer.json()["error"]["message"]
    content.pop()
    assert streamed(http, messages=body["messages"], max_tokens=3).text


# --- tools --------------------------------------------------------------------------------------------------


def test_a_call_and_the_turn_after_it(http):
    offered = [WEATHER, *builtin_tools(2)]
    first = streamed(http, model="tools", tools=offered, tool_choice="required", seed=1, max_tokens=400)
    assert first.reason == "tool_calls" and list(first.calls) == [0]
    call = first.calls[0]
    assert call["name"] in {tool["function"]["name"] for tool in offered}
    assert isinstance(json.loads(call["arguments"]), dict)
    function = {"name": call["name"], "arguments": call["arguments"]}
    messages = [
        SYSTEM,
        *FOXES,
        # its answer names no tool, only the call
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call["id"], "content": '{"status": "error"}'},
    ]
    second = streamed(http, model="tools", messages=messages, tools=offered, temperature=0, max_tokens=20)
    assert second.text


def test_more_tools_than_its_own(http):
    assert streamed(http, model="bundled", tools=builtin_tools(128), max_tokens=3).text
    body = {"model": "bundled", "messages": FOXES, "tools": builtin_tools(129)}
    assert http.post("/v1/chat/completions", json=body).status_code == 400


# --- titles, tags, questions that follow --------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"max_tokens": 1000}, {"max_tokens": 4}, {}], ids=str)
def test_a_task(http, bound):
    """One message, no stream; it takes what stands between the braces of the one choice."""
    body = {"model": "bundled+json", "messages": FOXES, "stream": False, **bound}
    answer = http.post("/v1/chat/completions", json=body)
    (choice,) = answer.json()["choices"]
    assert isinstance(choice["message"]["content"], str) and choice["message"]["content"]


# --- documents ----------------------------------------------------------------------------------------------


def test_embeddings_of_a_document_s_pieces(http):
    """A batch is as large as its user sets it, up to thousands; a single question comes as a text."""
    pieces = [f"Fox {i}" for i in range(70)]
    answer = http.post("/v1/embeddings", json={"input": pieces, "model": "mean"}, timeout=300)
    assert answer.status_code == 200, answer.text
    found = [each["embedding"] for each in answer.json()["data"]]
    assert len(found) == len(pieces) and all(isinstance(value, float) for value in found[0])
    with pytest.raises(httpx.ReadTimeout):  # a client that leaves frees the model for the next
        http.post("/v1/embeddings", json={"input": pieces * 29, "model": "mean"}, timeout=0.5)
    one = http.post("/v1/embeddings", json={"input": pieces[7], "model": "mean"}).json()
    assert one["data"][0]["embedding"] == pytest.approx(found[7], abs=1e-3)
