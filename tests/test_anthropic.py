"""Anthropic's Messages API, asked by the anthropic package over real HTTP."""

from __future__ import annotations

import json

import jsonschema
import pytest
from serving import FOXES, QUESTION, model_path, serving
from test_responses import prompts_of
from test_server_more import SCHEMA, TOOLS_TEMPLATE, WEATHER, with_metadata

from localsteer import bundled

anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

GREEDY = {"temperature": 0}
DRAWN = {"temperature": 1.0, "seed": 1}
PARAMETERS = WEATHER["function"]["parameters"]
TOOL = {"name": "get_weather", "description": "The weather in a place.", "input_schema": PARAMETERS}
THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{{ messages[-1].content }}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {
        "bundled": model_path(),
        "tools": with_metadata(folder / "tools.gguf", tokenizer__chat_template=TOOLS_TEMPLATE),
        "thinking": with_metadata(folder / "thinking.gguf", tokenizer__chat_template=THINKING),
    }
    with serving(None, models=models, engine={"n_seq_max": 4}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def ask(client, messages=FOXES, model="bundled", drawn=GREEDY, **options):
    return client.messages.create(
        model=model, messages=messages, extra_body=drawn, **{"max_tokens": 60, **options}
    )


def text_of(reply):
    return "".join(block.text for block in reply.content if block.type == "text")


# -- text ---------------------------------------------------------------------------------------------------


def test_a_message_is_whole(server, client):
    reply = ask(client, system="Be kind.")
    chat = server.client().chat.completions.create(
        model="bundled",
        messages=[{"role": "system", "content": "Be kind."}, *FOXES],
        temperature=0,
        max_tokens=60,
    )
    assert text_of(reply) == chat.choices[0].message.content
    assert (reply.stop_reason, reply.stop_sequence, reply.role) == ("end_turn", None, "assistant")
    assert reply.usage.output_tokens == chat.usage.completion_tokens
    n_read = reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    assert n_read == chat.usage.prompt_tokens


def test_system_and_contents_in_blocks(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "bundled")
    cached = {"cache_control": {"type": "ephemeral"}}
    blocks = [{"type": "text", "text": "Tell me ", **cached}, {"type": "text", "text": "about foxes."}]
    system = [{"type": "text", "text": "Be kind.", **cached}]
    ask(client, [{"role": "user", "content": blocks}], system=system, max_tokens=2)
    ask(client, system="Be kind.", max_tokens=2)
    assert seen[0] == seen[1]


def test_why_it_ended(client):
    whole = text_of(ask(client))
    word = whole.split()[3]
    reply = ask(client, stop_sequences=["nowhere in it", word])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", word)
    assert text_of(reply) == whole[: whole.index(word)]
    reply = ask(client, max_tokens=3)
    assert (reply.stop_reason, reply.usage.output_tokens) == ("max_tokens", 3)
    with client.messages.stream(
        model="bundled", messages=FOXES, max_tokens=60, stop_sequences=[word], extra_body=GREEDY
    ) as stream:
        assert stream.get_final_message().stop_sequence == word


def test_events_come_in_order(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    n = kinds.count("content_block_delta")
    assert n > 5 and kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * n,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(event.delta.text for event in events[2 : 2 + n]) == text_of(whole)
    assert events[0].message.usage.output_tokens == 0 and events[0].message.stop_reason is None
    assert events[-2].usage.output_tokens == whole.usage.output_tokens
    assert events[-2].delta.stop_reason == "end_turn"


def test_its_package_s_own_stream(client):
    with client.messages.stream(model="bundled", messages=FOXES, max_tokens=60, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        assert text == text_of(stream.get_final_message()) == text_of(ask(client))


def test_a_last_message_of_the_assistant_s_is_gone_on_with(client):
    whole = text_of(ask(client))
    begun = whole[: whole.index(" ", 20)]
    reply = ask(client, [*FOXES, {"role": "assistant", "content": begun}])
    assert reply.content and whole.startswith(begun + text_of(reply)[:10])


def test_tokens_are_counted(client):
    n = client.messages.count_tokens(model="bundled", messages=FOXES, system="Be kind.").input_tokens
    usage = ask(client, system="Be kind.", max_tokens=1).usage
    assert n == usage.input_tokens + usage.cache_read_input_tokens
    with_tools = client.messages.count_tokens(model="tools", messages=FOXES, tools=[TOOL]).input_tokens
    assert with_tools > n


def test_models_are_listed_in_its_own_shape(server, client):
    assert [model.id for model in client.models.list()] == ["bundled", "tools", "thinking"]
    assert client.models.retrieve("bundled").type == "model"
    with pytest.raises(anthropic.NotFoundError, match="bundledd"):
        client.models.retrieve("bundledd")


# -- forms and tools ----------------------------------------------------------------------------------------


def test_a_schema_is_followed(client):
    wanted = {"format": {"type": "json_schema", "schema": SCHEMA}}
    jsonschema.validate(
        json.loads(text_of(ask(client, output_config=wanted, drawn=DRAWN, max_tokens=400))), SCHEMA
    )


def test_its_package_parses_into_a_model(client):
    import pydantic

    class Animal(pydantic.BaseModel):
        legs: int
        tame: bool

    reply = client.messages.parse(
        model="bundled", messages=FOXES, max_tokens=200, output_format=Animal, extra_body=DRAWN
    )
    assert isinstance(reply.parsed_output, Animal)


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"]
)
def test_a_call_that_must_be_made_streamed_or_not(client, choice):
    options = {"model": "tools", "tools": [TOOL], "tool_choice": choice, "drawn": DRAWN, "max_tokens": 400}
    reply = ask(client, **options)
    (block,) = reply.content
    assert (block.type, block.name, reply.stop_reason) == ("tool_use", "get_weather", "tool_use")
    jsonschema.validate(block.input, PARAMETERS)
    options["extra_body"] = options.pop("drawn")
    with client.messages.stream(messages=FOXES, **options) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_message()
    assert last.content[0].input == block.input and last.stop_reason == "tool_use"
    assert "content_block_start" in kinds and "input_json" in kinds


def test_a_call_and_what_it_gave_reach_the_model(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "tools")
    messages = [
        *FOXES,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"place": "Oslo"}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "It rains.", "is_error": False},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "It snows."}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    ask(client, messages, model="tools", tools=[TOOL], max_tokens=2)
    (prompt,) = seen
    places = [
        prompt.index(text) for text in ("Let me see.", '"place": "Oslo"', "It rains.", "It snows.", "So?")
    ]
    assert places == sorted(places)


def test_thoughts_are_switched_off_where_the_template_can(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch, "thinking")
    for thinking in ({"type": "disabled"}, {"type": "adaptive"}):
        ask(client, model="thinking", thinking=thinking, max_tokens=1)
    assert seen == [f"no{QUESTION}", QUESTION]
    assert ask(client, thinking={"type": "disabled"}, max_tokens=1).content


# -- refusals -----------------------------------------------------------------------------------------------


def one(**block):
    return {"messages": [{"role": "user", "content": [block]}]}


IMAGE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a", "extra": 1}]}, "messages.0.extra"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        (one(type="image", source=IMAGE), "messages.0.content.0"),
        (one(type="document", source=IMAGE), "messages.0.content.0"),
        (one(type="search_result", source="x"), "messages.0.content.0"),
        (one(type="server_tool_use", id="x", name="y", input={}), "messages.0.content.0"),
        (one(type="tool_result", content="x"), "messages.0.content.0"),
        (one(type="tool_result", tool_use_id="x", content=[{"type": "image"}]), "messages.0.content.0"),
        (one(type="text", text="a", extra=1), "messages.0.content.0.extra"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0"),
        ({"tools": [{"name": "a"}]}, "tools.0"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools.0.input_examples"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "max"}}, "output_config.effort"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"stop_sequences": [""] * 3 + ["x" * 999]}, "stop_sequences"),
        ({"top_p": 7}, "top_p"),
        ({"max_completion_tokens": 4}, "max_completion_tokens"),
    ],
    ids=str,
)
def test_what_can_t_be_done_is_refused_by_name(server, body, param):
    valid = {"model": "tools", "messages": FOXES, "max_tokens": 1}
    with server.http() as http:
        answer = http.post("/v1/messages", json={**valid, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"].startswith(param), error


def test_more_results_than_a_turn_may_hold(server):
    results = [{"type": "tool_result", "tool_use_id": str(i), "content": "x"} for i in range(600)]
    messages = [*FOXES, *[{"role": "user", "content": results}] * 2]
    with server.http() as http:
        for path in ("", "/count_tokens"):
            body = {"model": "tools", "messages": messages, "max_tokens": 1}
            answer = http.post(f"/v1/messages{path}", json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"].startswith("messages: ")


def test_a_conversation_that_waits_for_a_tool(server):
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}}
    messages = [*FOXES, {"role": "assistant", "content": [call]}]
    with server.http() as http:
        answer = http.post("/v1/messages", json={"model": "tools", "messages": messages, "max_tokens": 1})
    assert answer.status_code == 400 and "tool_result" in answer.json()["error"]["message"]
