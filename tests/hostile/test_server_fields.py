"""No field that would change the reply is ignored: each works, is harmless by the tables, or 400 names it."""

from __future__ import annotations

import json

import pytest
from serving import serving
from test_server_more import TOOLS_TEMPLATE, WEATHER, with_metadata

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

HELLO = [{"role": "user", "content": "Hello there"}]
CHAT = {"messages": HELLO, "max_tokens": 2, "temperature": 0}
CHOICE = {"type": "function", "function": {"name": WEATHER["function"]["name"]}}
TEXT = {"prompt": "The fox is", "max_tokens": 2, "temperature": 0}
# shows what a template was given: the reply does not matter
THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{{ messages[-1].content }}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
LONG = "x" * 400
TOO_LONG = {"messages": [{"role": "user", "content": LONG}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {
        "thinking": with_metadata(folder / "thinking.gguf", tokenizer__chat_template=THINKING),
        "parts": with_metadata(
            folder / "parts.gguf",
            tokenizer__chat_template=PARTS,
            tokenizer__chat_template__tool_use="TOOLS " + TOOLS_TEMPLATE,
        ),
    }
    with serving(None, models=models, engine={"n_seq_max": 2, "n_ctx": 128}) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


@pytest.fixture
def prompts(server, monkeypatch):
    """The texts that models were asked, by the scheduler's own words."""
    seen = []
    for served in server.state.models.values():
        submit = served.scheduler.submit

        def watched(ask, submit=submit):
            seen.append(ask.prompt)
            return submit(ask)

        monkeypatch.setattr(served.scheduler, "submit", watched)
    return seen


REFUSED = {
    "grammer": 'root ::= "a"', "min_tokens": 5, "ignore_eos": True, "stop_token_ids": [5], "bad_words": ["a"],
    "use_beam_search": True, "length_penalty": 2, "prompt_logprobs": 1, "allowed_token_ids": [1],
    "chat_template": "x", "documents": [{"text": "a"}], "add_generation_prompt": False, "echo": True,
    "truncate_prompt_tokens": 4, "logits_processors": ["x"], "thinking_token_budget": 5, "mirostat": 2,
    "typical_p": 0.5, "dry_multiplier": 0.8, "xtc_probability": 0.5, "dynatemp_range": 0.5, "top_n_sigma": 1,
    "samplers": ["top_k"], "lora": [{"id": 0, "scale": 1}], "n_probs": 5, "min_keep": 2, "image_data": ["x"],
    "reasoning_format": "deepseek", "reasoning_budget": 0, "audio": {"voice": "x"}, "modalities": ["audio"],
    "verbosity": "low", "web_search_options": {"a": 1}, "think": True, "tfs_z": 0.5, "top_a": 0.1,
    "logit_bias": {"5": -101}, "functions": [{"name": "f"}], "function_call": {"name": "f"}, "suffix": "x",
    "response_fields": ["a"], "t_max_predict_ms": 5, "template": "x", "Temperature": 0, "max_new_tokens": 5,
    "vllm_xargs": {"steer": "json"}, "grammar_lazy": True, "grammar_triggers": [{"type": 1, "value": "{"}],
}  # fmt: skip
TAKEN = {
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x",
    "prediction": {"type": "content", "content": "x"}, "cache_prompt": False, "session_id": "s", "seed": 1,
    "priority": 1, "num_ctx": 99, "keep_alive": "5m", "timings_per_token": True, "speculative.n_max": 4,
    "mirostat": 0, "typical_p": 1.0, "dry_multiplier": 0, "dry_base": 1.75, "min_tokens": 0,
    "ignore_eos": False, "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True,
    "modalities": ["text"], "think": False, "grammer": None, "nobody": "", "nothing": [], "samplers": [],
    "reasoning_effort": "", "enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False},
    "repetition_penalty": 1.1, "n_predict": 1, "top_k": -1, "repeat_last_n": -1, "parallel_tool_calls": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_reply_is_named(http, name):
    answer = http.post("/v1/chat/completions", json={**CHAT, name: REFUSED[name]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["message"].startswith(f"{name}: ")


def test_what_asks_for_nothing_is_taken(http):
    for name, value in TAKEN.items():
        answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1, name: value})
        assert answer.status_code == 200, (name, answer.text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**TEXT, "best_of": 3}),
        ("/v1/completions", {**TEXT, "messages": HELLO}),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 5}),
        ("/v1/embeddings", {"input": "a", "prompt": "b"}),
        ("/v1/steering/trace", {"messages": HELLO, "steering": ["x"], "temperature": 1}),
        ("/v1/chat/completions", {**CHAT, "messages": [{**HELLO[0], "images": ["x"]}]}),
        ("/v1/chat/completions", {**CHAT, "messages": [{**HELLO[0], "prefix": True}]}),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"continuous_usage_stats": True}}),
        ("/v1/chat/completions", {**CHAT, "n_predict": 5}),
        ("/v1/chat/completions", {**CHAT, "json_schema": 1}),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object", "schema": "yes"}}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "schema": 1}}}),
        ("/v1/chat/completions", {**CHAT, "tools": [{**WEATHER, "defer_loading": True}]}),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object", "whitespace": "x"}}),
        ("/v1/chat/completions", {**CHAT, "tools": [WEATHER], "tool_choice": {**CHOICE, "mode": "x"}}),
    ],
)
def test_on_every_route_and_inside_of_messages(http, path, body):
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    param = answer.json()["error"]["param"]
    assert param.partition(".")[0] in body


def test_fields_can_be_let_through_by_name():
    from localsteer.server.errors import ApiError
    from localsteer.server.fields import accepted

    body = {"a": 1, "own": 2}
    assert accepted(body, {"a"}, {"own"}) == {"a": 1}
    with pytest.raises(ApiError, match="--ignore-field"):
        accepted(body, {"a"})
    assert accepted({"n_predict": 3}, {"max_tokens"}) == {"max_tokens": 3}


# -- the chat template --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}]
)
def test_variables_reach_the_template(http, prompts, more):
    assert http.post("/v1/chat/completions", json=CHAT | {"model": "thinking"} | more).status_code == 200
    assert prompts == ["noHello there"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"model": "parts", "enable_thinking": True}, "enable_thinking"),
        ({"enable_thinking": False, "ensure": ["x"]}, None),
    ],
)
def test_variables_that_no_template_reads_are_refused(http, more, param):
    answer = http.post("/v1/chat/completions", json=CHAT | {"model": "thinking"} | more)
    assert answer.status_code == 400
    assert param is None or answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "content", ["Hello there", [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]]
)
@pytest.mark.parametrize("model", ["parts", "thinking"])
def test_words_reach_templates_that_read_parts_and_those_that_read_texts(http, prompts, model, content):
    body = CHAT | {"model": model, "messages": [{"role": "user", "content": content}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert prompts == ["Hello there"]


def test_the_template_named_tool_use_is_for_tools(http, prompts):
    body = CHAT | {"model": "parts", "tools": [WEATHER]}
    answered = [*HELLO, {"role": "tool", "content": "It rains.", "tool_call_id": "1"}]
    assert http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code in (200, 400)
    assert (
        http.post("/v1/chat/completions", json=CHAT | {"model": "parts", "messages": answered}).status_code
        == 200
    )
    assert prompts[-1].startswith("TOOLS")
    assert "It rains." in prompts[-1]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "It rains."},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
    ],
    ids=["answer", "call"],
)
def test_a_template_without_tools_says_so(http, message):
    answer = http.post(
        "/v1/chat/completions", json=CHAT | {"model": "thinking", "messages": [*HELLO, message]}
    )
    assert answer.status_code == 400
    assert "does not support tools" in answer.json()["error"]["message"]


# -- what clients act on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", TOO_LONG, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG}], "stream": True},
            "messages",
        ),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 200}, "prompt"),
        ("/v1/completions", {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt"),
    ],
)
def test_a_prompt_beyond_the_context(http, path, body, param):
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/models", "/embeddings"])
def test_paths_without_v1(http, path):
    body = CHAT if "chat" in path else TEXT if "compl" in path else {"input": "a"}
    answer = http.get(path) if path == "/models" else http.post(path, json=body)
    # no model here gives embeddings
    assert answer.status_code == (400 if path == "/embeddings" else 200), answer.text


# -- completions --------------------------------------------------------------------------------------------


def test_echo_with_logprobs_scores_the_prompt(server, http):
    """As lm-evaluation-harness asks, by tokens and by texts: against one forward pass of the engine."""
    import numpy as np

    scheduler = server.state.models["thinking"].scheduler
    tokens = scheduler.engine.prompt_tokens("The fox is red", raw=True)
    with scheduler.paused() as engine:
        logits = engine.logits(tokens).astype(np.float64)
    logprobs = logits - logits.max(1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))
    wanted = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
    for most, extra in ((0, 0), (1, 1)):
        body = {"prompt": [tokens, tokens], "max_tokens": most, "logprobs": 1, "echo": True, "temperature": 0}
        choices = http.post("/v1/completions", json=body).json()["choices"]
        assert len(choices) == 2
        for choice in choices:
            found = choice["logprobs"]
            assert len(found["tokens"]) == len(tokens) + extra
            assert found["token_logprobs"][0] is None
            assert found["top_logprobs"][0] is None
            assert found["token_logprobs"][1 : len(tokens)] == pytest.approx(wanted, abs=1e-4)
            best = [max(each.values()) for each in found["top_logprobs"][1 : len(tokens)]]
            assert best == pytest.approx(logprobs.max(1)[: len(wanted)].tolist(), abs=1e-4)
    text = http.post("/v1/completions", json=body | {"prompt": "The fox is red", "max_tokens": 0}).json()[
        "choices"
    ][0]
    assert text["text"] == "The fox is red"
    assert "".join(text["logprobs"]["tokens"]) == "The fox is red"
    assert text["logprobs"]["text_offset"][0] == 0


def test_a_stream_echoes_with_scores_too(http):
    body = TEXT | {"echo": True, "logprobs": 0, "max_tokens": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    first = json.loads(lines[0])["choices"][0]
    assert first["text"].startswith("The fox is")
    assert "".join(first["logprobs"]["tokens"]).startswith("The fox is")


def test_a_suffix_needs_a_model_that_fills_in(http):
    answer = http.post("/v1/completions", json=TEXT | {"suffix": "red."})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "suffix")


def test_the_documentation_has_every_field():
    from pathlib import Path

    from localsteer.server import fields

    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
    harmless = [name for names in fields.HARMLESS.values() for name in names]
    assert not [name for name in (*harmless, *fields.ALIASES, *fields.NEUTRAL) if f"`{name}`" not in page]
