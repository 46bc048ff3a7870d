"""The OpenAI API, asked by the openai package over real HTTP, on the bundled model."""

from __future__ import annotations

import pytest
from serving import FOXES, QUESTION, is_loud, serving, write_vectors

import localsteer
from localsteer import bundled

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

GREEDY = {"temperature": 0, "max_tokens": 80}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(write_vectors(tmp_path_factory.mktemp("vectors"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def plain(client):
    return client.chat.completions.create(model="bundled", messages=FOXES, **GREEDY)


def ask(client, model="bundled", steering=None, **options):
    extra = {} if steering is None else {"extra_body": {"steering": steering}}
    return client.chat.completions.create(model=model, messages=FOXES, **{**GREEDY, **extra, **options})


def text_of(reply, i=0):
    return reply.choices[i].message.content


def streamed(chunks):
    chunks = list(chunks)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    return text, reasons, chunks


# --- models -------------------------------------------------------------------------------------------------


def test_models_are_listed_with_each_vector(client):
    ids = [model.id for model in client.models.list()]
    assert ids == ["bundled", "bundled+json", "bundled+lowercase", "bundled+uppercase"]
    assert client.models.retrieve("bundled+json").id == "bundled+json"
    with pytest.raises(openai.NotFoundError, match="bundled\\+jso"):
        client.models.retrieve("bundled+jso")


# --- chat ---------------------------------------------------------------------------------------------------


def test_a_reply_is_the_engine_s_own(server, plain):
    with server.state.models["bundled"].scheduler.paused() as engine:
        own = engine.generate(QUESTION, max_tokens=80, sampling=localsteer.Sampling(temp=0))
    assert text_of(plain) == own.text
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage.completion_tokens == len(own.tokens)
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + len(own.tokens)
    assert plain.object == "chat.completion" and plain.model == "bundled"


def test_a_stream_gives_the_same_text_and_ends_once(client, plain):
    text, reasons, chunks = streamed(ask(client, stream=True))
    assert text == text_of(plain)
    assert reasons == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_at_the_end_of_a_stream_that_asks_for_it(client, plain):
    _, _, chunks = streamed(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_the_field_steering_steers(client, plain):
    reply = text_of(ask(client, steering=[{"name": "uppercase"}]))
    assert is_loud(reply) and not is_loud(text_of(plain))
    assert text_of(ask(client)) == text_of(plain)


def test_the_model_s_name_steers_alike(client):
    by_field = ask(client, steering=["json"])
    by_name = ask(client, model="bundled+json")
    assert text_of(by_field) == text_of(by_name)
    assert text_of(by_name).startswith("{")
    assert by_name.model == "bundled+json"


def test_settings_of_the_field_win(client, plain):
    off = ask(client, model="bundled+json", steering=[{"name": "json", "strength": 0}])
    assert text_of(off) == text_of(plain)
    other = [{"name": "json", "layer": 1, "positions": "all", "mode": "add", "strength": 0.5}]
    assert text_of(ask(client, steering=other)) != text_of(plain)


def test_two_vectors_in_one_name(client):
    reply = text_of(ask(client, model="bundled+json+lowercase"))
    assert reply != text_of(ask(client, model="bundled+json"))
    assert reply.startswith("{") or not any(map(str.isupper, reply))


def test_a_seed_draws_the_same_again(client):
    drawn = {"temperature": 1.0, "max_tokens": 30, "seed": 7}
    assert text_of(ask(client, **drawn)) == text_of(ask(client, **drawn))
    assert len({text_of(ask(client, **drawn | {"seed": seed})) for seed in range(4)}) > 1


def test_n_choices_differ_and_share_the_prompt(client):
    reply = ask(client, temperature=1.0, n=3, seed=1, max_tokens=30)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) == 3
    assert reply.usage.prompt_tokens == ask(client).usage.prompt_tokens
    texts = ["", "", ""]
    for chunk in ask(client, temperature=1.0, n=3, seed=1, max_tokens=30, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in reply.choices]


def test_stop_strings_and_max_tokens_end_a_reply(client, plain):
    words = text_of(plain).split()
    cut = ask(client, stop=[words[3]])
    assert text_of(cut) == text_of(plain).split(words[3])[0]
    assert cut.choices[0].finish_reason == "stop"
    short = ask(client, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert ask(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_content_may_come_in_parts_and_from_a_developer(client, plain):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "about foxes."}]
    reply = client.chat.completions.create(
        model="bundled", messages=[{"role": "user", "content": parts}], **GREEDY
    )
    assert text_of(reply) == text_of(plain)
    messages = [{"role": "developer", "content": "Be kind."}, *FOXES]
    assert text_of(client.chat.completions.create(model="bundled", messages=messages, **GREEDY))


def test_a_bias_by_token_or_text(client, server, plain):
    """OpenAI's object of ids, and llama-server's pairs with texts and false."""
    engine = server.state.models["bundled"].engine
    first = engine.prompt_tokens(text_of(plain), raw=True)[-plain.usage.completion_tokens :][0]
    text = engine.text([first])
    biases = ({str(first): -100}, [[first, False]], [[text, False]])
    replies = [text_of(ask(client, extra_body={"logit_bias": bias})) for bias in biases]
    assert len(set(replies)) == 1 and not replies[0].startswith(text)
    assert text_of(ask(client, logit_bias={str(first): 0})) == text_of(plain)
    completion = client.completions.create(
        model="bundled", prompt="The fox", max_tokens=3, temperature=0, logit_bias={str(first): 100}
    )
    assert completion.choices[0].text == text * 3


def test_log_probabilities_of_each_token(client, plain):
    reply = ask(client, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == plain.usage.completion_tokens
    assert "".join(each.token for each in content) == text_of(plain)
    for each in content:
        assert each.logprob <= 0 and each.logprob == each.top_logprobs[0].logprob  # greedy
        assert len(each.top_logprobs) == 3
    _, _, chunks = streamed(ask(client, logprobs=True, stream=True))
    found = [c.choices[0].logprobs.content[0].token for c in chunks if c.choices and c.choices[0].logprobs]
    assert found == [each.token for each in content]


# --- completions --------------------------------------------------------------------------------------------


def test_completions_continue_a_text_as_it_is(server, client):
    reply = client.completions.create(model="bundled", prompt="The fox is", temperature=0, max_tokens=12)
    with server.state.models["bundled"].scheduler.paused() as engine:
        own = engine.generate("The fox is", raw=True, max_tokens=12, sampling=localsteer.Sampling(temp=0))
        tokens = engine.prompt_tokens("The fox is", raw=True)
    assert reply.choices[0].text == own.text
    again = client.completions.create(model="bundled", prompt=tokens, temperature=0, max_tokens=12)
    assert again.choices[0].text == own.text
    chunks = client.completions.create(
        model="bundled", prompt="The fox is", temperature=0, max_tokens=12, stream=True, echo=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The fox is" + own.text


def test_several_prompts_each_with_n_choices(client):
    reply = client.completions.create(
        model="bundled", prompt=["The fox", "The owl"], n=2, temperature=1, seed=3, max_tokens=4, logprobs=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice in reply.choices:
        assert "".join(choice.logprobs.tokens).startswith(choice.text)
        assert choice.logprobs.text_offset[0] == 0
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED = [
    ({"temperature": 9}, "temperature", "not 9"),
    ({"top_p": -1}, "top_p", "not -1"),
    ({"n": 1000}, "n", "not 1000"),
    ({"max_tokens": -5}, "max_tokens", "not -5"),
    ({"stop": ["x"] * 99}, "stop", "16"),
    ({"stop": ""}, "stop", "''"),
    ({"messages": []}, "messages", "[]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'wizard'"),
    ({"messages": [{"role": "user"}]}, "messages", "None"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0", "'image'"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    ({"logit_bias": {"5": True}}, "logit_bias", "True"),
    ({"logit_bias": {"4000000000": 1}}, "logit_bias", "4000000000"),
    ({"logit_bias": [[5, 1, 2]]}, "logit_bias.0", "2"),
    ({"logit_bias": [[k, 1] for k in range(1025)]}, "logit_bias", "1024"),
    ({"steering": ["jsn"]}, "steering.0.name", "'jsn'"),
    ({"steering": [{"name": "../json"}]}, "steering.0.name", "'../json'"),
    ({"steering": [{"name": "json", "layer": 99}]}, "steering.0", "99"),
    ({"steering": [{"name": "json", "strenght": 1}]}, "steering.0.strenght", "strenght"),
    ({"steering": [{"name": "json", "strength": 1e9}]}, "steering.0.strength", "1000000000.0"),
    ({"steering": [{"name": "json", "mode": "ad"}]}, "steering.0.mode", "'ad'"),
    ({"messages": [{"role": "user", "content": "fox " * 5000}]}, "messages", "context"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field_and_the_value(server, change, param, says):
    body = {"model": "bundled", "messages": FOXES, **change}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if param:
        assert param.split(".")[-1] in error["message"] or param in error["message"]


@pytest.mark.parametrize("name", ["gpt-4", "bundled+jsn", "bundled+", "bundled+../json", "bundled+json+x"])
def test_an_unknown_model_is_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model=name)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert name.split("+")[-1] in caught.value.message


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{", {"Content-Type": "application/json"}),
        (b"[1, 2]", {"Content-Type": "application/json"}),
        (b'{"messages": []}', {"Content-Type": "text/plain"}),
        (b"", {}),
        (b"\xff\xfe", {"Content-Type": "application/json"}),
        (b"[" * 100_000, {"Content-Type": "application/json"}),
        (b'{"seed": ' + b"9" * 5000 + b"}", {"Content-Type": "application/json"}),
    ],
    ids=range(7),
)
def test_a_body_that_is_no_json_object(server, body, headers):
    with server.http() as http:
        answer = http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods(server):
    with server.http() as http:
        assert http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
        assert http.put("/v1/models").status_code == 405


def test_a_refused_schema_leaves_the_next_request_whole(server, client, plain):
    with pytest.raises(openai.BadRequestError, match="pattern"):
        schema = {"name": "x", "schema": {"type": "string", "pattern": "^(a$"}}
        ask(client, response_format={"type": "json_schema", "json_schema": schema})
    assert server.quiet()
    assert text_of(ask(client)) == text_of(plain)
