"""OpenAI's Responses API, asked by the openai package over real HTTP."""

from __future__ import annotations

import json

import jsonschema
import pytest
from serving import FOXES, QUESTION, model_path, serving
from test_server_more import SCHEMA, TOOLS_TEMPLATE, WEATHER, with_metadata

from localsteer import bundled

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

GREEDY = {"temperature": 0, "max_output_tokens": 60}
TOOL = {"type": "function", "strict": True, **WEATHER["function"]}
DRAWN = {"temperature": 1.0, "max_output_tokens": 400, "extra_body": {"seed": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tools.gguf"
    models = {
        "bundled": model_path(),
        "tools": with_metadata(path, tokenizer__chat_template=TOOLS_TEMPLATE),
    }
    with serving(None, models=models, engine={"n_seq_max": 4}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, input=QUESTION, model="bundled", **options):
    return client.responses.create(model=model, input=input, **{**GREEDY, **options})


def prompts_of(server, monkeypatch, model):
    """The texts that the model was asked, by the scheduler's own words."""
    seen, scheduler = [], server.state.models[model].scheduler
    submit = scheduler.submit
    monkeypatch.setattr(scheduler, "submit", lambda asked: (seen.append(asked.prompt), submit(asked))[1])
    return seen


# -- text ---------------------------------------------------------------------------------------------------


def test_a_response_is_whole(client):
    reply = ask(client, metadata={"a": "b"}, instructions="Be kind.", store=True)
    chat = client.chat.completions.create(
        model="bundled",
        messages=[{"role": "system", "content": "Be kind."}, *FOXES],
        temperature=0,
        max_tokens=60,
    )
    assert reply.output_text == chat.choices[0].message.content
    assert (reply.status, reply.error, reply.incomplete_details) == ("completed", None, None)
    assert reply.usage.output_tokens == chat.usage.completion_tokens
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert (reply.metadata, reply.instructions, reply.model) == ({"a": "b"}, "Be kind.", "bundled")
    assert reply.to_dict()["store"] is False
    (message,) = reply.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")


def test_one_that_reaches_its_bound_is_incomplete(client):
    reply = ask(client, max_output_tokens=3)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output[0].status == "incomplete" and reply.usage.output_tokens == 3
    events = list(ask(client, max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete" and events[-1].response.status == "incomplete"


def test_events_come_in_order_with_their_numbers(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    n = kinds.count("output_text.delta")
    assert n > 5 and kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * n,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event.delta for event in events[4 : 4 + n]) == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == whole.usage.output_tokens
    assert len({event.response.id for event in (events[0], events[1], events[-1])}) == 1
    assert events[2].item.id == events[4].item_id == last.output[0].id


def test_its_package_s_own_stream_ends_with_the_response(client):
    with client.responses.stream(model="bundled", input=QUESTION, **GREEDY) as stream:
        for _event in stream:
            pass
        assert stream.get_final_response().output_text == ask(client).output_text


def test_a_conversation_in_items(client, server, monkeypatch):
    seen = prompts_of(server, monkeypatch, "bundled")
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {
            "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "They are red.", "annotations": [], "logprobs": []}],
        },
        {"type": "message", "role": "user", "content": "And hares?"},
    ]  # fmt: skip
    ask(client, items, max_output_tokens=2)
    messages = [
        {"role": "system", "content": "Be kind."},
        *FOXES,
        {"role": "assistant", "content": "They are red."},
        {"role": "user", "content": "And hares?"},
    ]
    client.chat.completions.create(model="bundled", messages=messages, max_tokens=2)
    assert seen[0] == seen[1]


def test_what_it_answered_can_be_sent_back(client):
    first = ask(client)
    history = [*FOXES, *[item.to_dict() for item in first.output], {"role": "user", "content": "And hares?"}]
    assert ask(client, history).output_text


def test_log_probabilities(client):
    reply = ask(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4)
    scores = reply.output[0].content[0].logprobs
    assert len(scores) == 4 and all(len(score.top_logprobs) == 2 for score in scores)
    assert "".join(score.token for score in scores).strip() == reply.output_text.strip()
    events = ask(
        client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4, stream=True
    )
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [score.token for event in deltas for score in event.logprobs] == [score.token for score in scores]


# -- forms --------------------------------------------------------------------------------------------------


def test_a_schema_is_followed_streamed_or_not(client):
    wanted = {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}}
    reply = ask(client, text=wanted, **DRAWN)
    found = json.loads(reply.output_text)
    jsonschema.validate(found, SCHEMA)
    events = list(ask(client, text=wanted, stream=True, **DRAWN))
    assert json.loads(events[-1].response.output_text) == found
    assert ask(client, text={"format": {"type": "json_object"}}).output_text.startswith("{")


def test_its_package_parses_into_a_model(client):
    import pydantic

    class Animal(pydantic.BaseModel):
        legs: int = pydantic.Field(ge=0, le=8)
        tame: bool

    reply = client.responses.parse(model="bundled", input=QUESTION, text_format=Animal, **DRAWN)
    assert isinstance(reply.output_parsed, Animal)


def test_a_schema_that_can_t_be_kept_is_refused_with_its_path(client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, text={"format": {"type": "json_schema", "name": "a", "schema": schema}})
    assert caught.value.param == "text.format.schema.properties.a.uniqueItems"


# -- tools --------------------------------------------------------------------------------------------------


def test_a_call_that_must_be_made_and_its_events(client):
    reply = ask(client, model="tools", tools=[TOOL], tool_choice="required", **DRAWN)
    (call,) = reply.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
    events = list(ask(client, model="tools", tools=[TOOL], tool_choice="required", stream=True, **DRAWN))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[4].arguments == call.arguments and events[-1].response.output[0].name == "get_weather"


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
    ids=["function", "allowed"],
)
def test_a_choice_of_tools(client, choice):
    other = {**TOOL, "name": "other"}
    reply = ask(client, model="tools", tools=[other, TOOL], tool_choice=choice, **DRAWN)
    assert reply.output[0].name == "get_weather"


def test_a_call_and_what_it_gave_reach_the_model(client, server, monkeypatch):
    seen = prompts_of(server, monkeypatch, "tools")
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"place": "Oslo"}'}
    items = [
        *FOXES,
        {"role": "assistant", "content": "Let me see."},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "It rains."},
    ]
    ask(client, items, model="tools", tools=[TOOL], max_output_tokens=2)
    (prompt,) = seen
    assert prompt.index("Let me see.") < prompt.index('"place": "Oslo"') < prompt.index("It rains.")
    assert prompt.count("<|assistant|>") == 2  # of what was said and called, and of what is to come


# -- refusals -----------------------------------------------------------------------------------------------


def allowed(*names):
    return {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": n} for n in names],
    }


def said(**part):
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [TOOL], "tool_choice": allowed("get_weather", "other")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x", "y": 1}}, "tool_choice"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"text": {"format": {"type": "text", "syntax": "lark"}}}, "text.format.syntax"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": said(type="input_image", image_url="x")}, "input.0.content.0"),
        ({"input": said(type="input_file", file_id="x")}, "input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input.0"),
        ({"input": [{"role": "user", "content": "a", "name": "b", "extra": 1}]}, "input.0.extra"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"messages": FOXES}, "messages"),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_t_be_done_is_refused_by_name(server, body, param):
    with server.http() as http:
        answer = http.post(
            "/v1/responses", json={"model": "tools", "input": "Hi.", "max_output_tokens": 1, **body}
        )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"].startswith(param)


def test_more_calls_than_a_turn_may_hold(server):
    call = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}
    with server.http() as http:
        for n, field in ((200, "input"), (1000, "input")):
            items = [FOXES[0], *[call] * (n - 1)]
            answer = http.post(
                "/v1/responses", json={"model": "tools", "input": items, "instructions": "Hm."}
            )
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_nothing_is_kept(client):
    reply = ask(client, max_output_tokens=2)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="nothing is stored"):
            call(reply.id)


def test_tokens_are_counted(client):
    counted = client.responses.input_tokens.count(model="bundled", input=QUESTION, instructions="Be kind.")
    assert (
        counted.input_tokens == ask(client, instructions="Be kind.", max_output_tokens=1).usage.input_tokens
    )
