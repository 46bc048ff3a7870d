"""JSON by grammar, tools, embeddings, figures: what a server does beside plain chat."""

from __future__ import annotations

import base64
import json

import jsonschema
import numpy as np
import pytest
from llama_reference import stock_llama
from serving import FOXES, model_path, serving

from localsteer import bundled

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

TOOLS_TEMPLATE = (
    "{%- if tools -%}<|user|>Tools: {{ tools | tojson }}{%- endif -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}<|assistant|>"
    "{{ message['content'] or '' }}"
    "{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{%- endfor -%}<|end|>"
    "{%- else -%}<|user|>{{ message['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "tame": {"type": "boolean"},
        "kind": {"enum": ["bird", "mammal"]},
    },
    "required": ["animal", "legs", "tame", "kind"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


def with_metadata(path, **values):
    """A copy of the bundled model with other key-values."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(model_path(), "r")
    writer = GGUFWriter(path, arch="llama", endianess=reader.endianess)
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
    made = {
        key.replace("__", "."): MetadataDetails(kinds[type(value)], value) for key, value in values.items()
    }
    copy_with_new_metadata(reader, writer, made, [])
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {
        "bundled": model_path(),
        "tools": with_metadata(folder / "tools.gguf", tokenizer__chat_template=TOOLS_TEMPLATE),
        "mean": with_metadata(folder / "mean.gguf", llama__pooling_type=1),
        "last": with_metadata(folder / "last.gguf", llama__pooling_type=3),
    }
    with serving(None, models=models, engine={"n_seq_max": 4}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, model="bundled", messages=FOXES, **options):
    return client.chat.completions.create(
        model=model, messages=messages, **{"temperature": 1.0, "max_tokens": 400, "seed": 1, **options}
    )


# --- response_format ----------------------------------------------------------------------------------------


def test_a_json_object_whatever_the_model_would_say(client):
    ended = 0
    for seed in range(6):  # a string may go on to the limit: the grammar ends nothing by itself
        (choice,) = ask(client, response_format={"type": "json_object"}, seed=seed).choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            ended += 1
    assert ended


def test_a_json_schema_is_followed_streamed_or_not(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        reply = ask(client, response_format=wanted, seed=seed)
        found = json.loads(reply.choices[0].message.content)
        jsonschema.validate(found, SCHEMA)
    chunks = ask(client, response_format=wanted, seed=2, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert json.loads(text) == found


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"$ref": "https://example.com/schema.json"}, "$ref"),
        ({"$ref": "#/definitions/none"}, "$ref"),
        ({"type": "spaceship"}, "type"),
        ({"type": "string", "pattern": "(?<=x)y"}, "pattern"),
        ({"type": "string", "pattern": "^(a$"}, "pattern"),
        ({"type": "object", "properties": {"a": 5}}, "properties.a"),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "properties.a.items.uniqueItems"),
        ({"anyOf": [{"type": "null"}, {"not": {"type": "string"}}]}, "anyOf.1.not"),
        ({"$defs": {"a": {"if": {}, "then": False}}, "$ref": "#/$defs/a"}, "$defs.a.if"),
        ({"enum": ["x" * 70_000]}, ""),
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_can_t_be_enforced_is_refused_by_keyword_and_path(client, schema, path):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=wanted)
    assert caught.value.param == f"response_format.json_schema.schema.{path}".rstrip(".")
    assert "\n" not in caught.value.body["message"] and len(caught.value.body["message"]) < 400


FIELDS = [
    ({"response_format": {"type": "json_object", "schema": {"const": "no"}}}, '"no"'),
    ({"response_format": {"type": "json_schema", "schema": {"const": "no"}}}, '"no"'),
    ({"response_format": {"type": "regex", "pattern": "^n[o]$"}}, "no"),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "no"'}}, "no"),
    ({"grammar": 'root ::= "no"'}, "no"),
    ({"grammar": 'start: "no"'}, "no"),
    ({"json_schema": {"const": "no"}}, '"no"'),
    ({"guided_json": {"const": "no"}}, '"no"'),
    ({"guided_json": '{"const": "no"}'}, '"no"'),
    ({"guided_regex": "no"}, "no"),
    ({"guided_choice": ["no"]}, "no"),
    ({"guided_grammar": 'root ::= "no"'}, "no"),
    ({"structured_outputs": {"json": {"const": "no"}}}, '"no"'),
    ({"structured_outputs": {"regex": "no"}}, "no"),
    ({"structured_outputs": {"choice": ["no"]}}, "no"),
    ({"structured_outputs": {"grammar": 'root ::= "no"'}}, "no"),
]


@pytest.mark.parametrize(("fields", "says"), FIELDS, ids=lambda given: str(given)[:50])
def test_every_spelling_of_a_constraint_works(server, client, fields, says):
    assert ask(client, extra_body=fields).choices[0].message.content == says
    made = server.http().post("/v1/completions", json={"prompt": "Tell", **fields}).json()
    assert made["choices"][0]["text"] == says


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json.uniqueItems"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": "{a"}, "guided_json"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"tools": [WEATHER], "tool_choice": "auto", "guided_choice": ["a"]}, "guided_choice"),
    ],
    ids=lambda given: str(given)[:50],
)
def test_what_does_not_make_a_constraint_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "tools", extra_body=fields)
    assert caught.value.param == param


def test_log_probabilities_are_those_before_the_mask(client):
    asked = {"temperature": 0, "logprobs": True, "top_logprobs": 1, "max_tokens": 1}
    free = ask(client, **asked).choices[0].logprobs.content[0].top_logprobs[0]
    kept = ask(client, extra_body={"guided_choice": ["q"]}, **asked).choices[0].logprobs.content[0]
    assert kept.token == "q" and kept.top_logprobs[0].token == free.token


def test_a_schema_is_needed(client):
    with pytest.raises(openai.BadRequestError, match="json_schema needs"):
        ask(client, response_format={"type": "json_schema"})


# --- tools --------------------------------------------------------------------------------------------------


def test_a_template_without_tools_leaves_them_out(client):
    """A model that is not told of tools calls none, as `auto` allows; what must be a call is refused."""
    plain = ask(client, temperature=0, max_tokens=30).choices[0].message.content
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        reply = ask(client, tools=[WEATHER], temperature=0, max_tokens=30, **choice)
        assert reply.choices[0].message.content == plain
    with pytest.raises(
        openai.BadRequestError, match="tools: the chat template of bundled has none"
    ) as caught:
        ask(client, tools=[WEATHER], tool_choice="required")
    assert caught.value.param == "tools"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_asked_for_is_made(client, choice):
    reply = ask(client, "tools", tools=[WEATHER], tool_choice=choice)
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None
    assert call.function.name == "get_weather" and call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    chunks = list(ask(client, "tools", tools=[WEATHER], tool_choice=choice, stream=True))
    calls = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert json.loads(calls[0].function.arguments) == json.loads(call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_read_as_json_whatever_is_in_it(client, stream):
    """Its schema keeps `$ref`s of its own, and a mark of another form of call inside is no mark."""
    value = "<tool_call>a   x </tool_call>[TOOL_CALLS]<function=f>"
    parameters = {
        "$defs": {"a/b": {"const": value}},
        "properties": {"x": {"$ref": "#/$defs/a~1b"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tools = [WEATHER, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "f"}}
    reply = ask(client, "tools", tools=tools, tool_choice=choice, stream=stream)
    if stream:
        (call,) = (each for chunk in reply for each in chunk.choices[0].delta.tool_calls or [])
    else:
        (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"x": value}


def test_parameters_of_a_forced_call_that_can_t_be_enforced_are_named(client):
    other = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    bad = {"type": "function", "function": {"name": "g", "parameters": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        choice = {"type": "function", "function": {"name": "g"}}
        ask(client, "tools", tools=[WEATHER, other, bad], tool_choice=choice)
    assert caught.value.param == "tools.2.function.parameters.uniqueItems"


def test_a_reply_that_calls_nothing_is_text(client):
    reply = ask(client, "tools", tools=[WEATHER], temperature=0, max_tokens=40)
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls
    chunks = ask(client, "tools", tools=[WEATHER], temperature=0, max_tokens=40, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content


def test_the_answer_of_a_tool_goes_back_to_the_model(client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"place": "Rome", "days": 1}'},
    }
    messages = [
        *FOXES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert ask(client, "tools", messages, tools=[WEATHER], max_tokens=20).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="messages"):
        ask(client, messages=messages)


def test_choices_that_go_with_no_tool(client):
    for options, says in (
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool 'x'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "excludes tools"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            ask(client, "tools", **options)


FORMS = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Rome"}}\n</tool_call>',
    'Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"place": "Rome"}}</tool_call>',
    '{"name": "get_weather", "parameters": {"place": "Rome"}}',
    '[{"name": "get_weather", "arguments": {"place": "Rome"}}]',
    '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"place": "Rome"}}]',
    '<|python_tag|>{"name": "get_weather", "parameters": {"place": "Rome"}}',
    '<function=get_weather>{"place": "Rome"}</function>',
    "<tool_call>\n<function=get_weather>\n<parameter=place>\nRome\n</parameter>\n</function>\n</tool_call>",
]


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_common_forms_of_a_call(text, size):
    """However the text is cut, a stream lets the words before a call through and nothing of the call."""
    from localsteer.server.schemas import Tool
    from localsteer.server.tools import CallHold, parse

    tools = [Tool(**WEATHER)]
    content, (call,) = parse(text, tools)
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"place": "Rome"})
    hold = CallHold()
    passed = "".join(hold.push(text[i : i + size]) for i in range(0, len(text), size))
    assert passed.strip() == content
    rest, calls = parse(hold.rest(), tools)
    assert (rest, [each.name for each in calls]) == ("", ["get_weather"])


@pytest.mark.parametrize(
    "text", ['{"name": "other", "arguments": {}}', '{"a": 1}', "[1, 2]", "{ broken", "a < b"]
)
def test_what_calls_no_tool_stays_text(text):
    from localsteer.server.schemas import Tool
    from localsteer.server.tools import CallHold, parse

    tools = [Tool(**WEATHER)]
    assert parse(text, tools) == (text, [])
    hold = CallHold()
    assert "".join(map(hold.push, text)) + hold.rest() == text


# --- embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mean", "last"])
def test_embeddings_are_llama_cpp_s_own(server, client, model):
    texts = ["Tell me about foxes.", "What is a river?"]
    found = client.embeddings.create(model=model, input=texts)  # as base64, which the package reads
    path = server.state.models[model].engine.path
    llama = stock_llama(path, embedding=True, verbose=False, n_threads=1, n_ctx=512)
    for each, text in zip(found.data, texts, strict=True):
        assert each.embedding == pytest.approx(llama.embed(text, normalize=True), abs=2e-3)
        assert np.linalg.norm(each.embedding) == pytest.approx(1, abs=1e-5)
    plain = client.embeddings.create(model=model, input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-5)
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens > 0
    # its chat still works beside it
    assert ask(client, model, max_tokens=5).choices[0].message.content


def test_embeddings_that_can_t_be(server, client):
    with pytest.raises(openai.BadRequestError, match="bundled can't make embeddings"):
        client.embeddings.create(model="bundled", input="x")
    with server.http() as http:
        for change in (
            {"input": ""},
            {"input": []},
            {"input": ["x"] * 2049},
            {"input": [10**7]},
            {"dimensions": 3},
        ):
            answer = http.post("/v1/embeddings", json={"model": "mean", "input": "x", **change})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].split(".")[0] in ("input", "dimensions")
        raw = http.post("/v1/embeddings", json={"model": "mean", "input": "x", "encoding_format": "base64"})
        assert len(base64.b64decode(raw.json()["data"][0]["embedding"])) == 4 * 256


# --- watching it --------------------------------------------------------------------------------------------


def test_health_tells_slots_and_queue(server):
    with server.http() as http:
        found = http.get("/health").json()
    assert found["status"] == "ok"
    assert found["models"]["bundled"]["slots"] == 4 and found["models"]["bundled"]["running"] == 0


def test_metrics_count_requests_tokens_and_replies(server, client):
    from prometheus_client.parser import text_string_to_metric_families

    def figures():
        with server.http() as http:
            text = http.get("/metrics").text
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = figures()
    reply = ask(client, max_tokens=7)
    with pytest.raises(openai.BadRequestError):
        ask(client, temperature=99)
    after = figures()

    def grown(*key):
        return after[key] - before.get(key, 0)

    path = "/v1/chat/completions"
    assert grown("localsteer_requests_total", *sorted([path, "POST", "200"])) == 1
    assert grown("localsteer_requests_total", *sorted([path, "POST", "400"])) == 1
    assert grown("localsteer_tokens_total", "bundled", "reply") == reply.usage.completion_tokens
    assert grown("localsteer_tokens_total", "bundled", "prompt") == reply.usage.prompt_tokens
    assert grown("localsteer_request_seconds_count", path) == 2
    assert after["localsteer_slots", "bundled"] == 4
    assert after["localsteer_running", "bundled"] == 0
    assert after["localsteer_cells_used", "bundled"] > 0


def test_the_description_is_offline(server):
    with server.http() as http:
        api = http.get("/openapi.json").json()
        assert {"/v1/chat/completions", "/v1/steering", "/v1/embeddings", "/metrics"} <= set(api["paths"])
        for path in ("/docs", "/page/docs.js"):
            page = http.get(path)
            assert page.status_code == 200
            assert "default-src 'self'" in page.headers["content-security-policy"]
            assert "http://" not in page.text and "https://" not in page.text
