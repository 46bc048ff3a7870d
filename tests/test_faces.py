"""What holds in all four APIs: the same turns behind them, steered alike, refused in their own shapes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time

import pytest
from serving import is_loud, serving, vectors, write_vectors
from test_asked import with_record

from localsteer import bundled

for package in ("openai", "anthropic", "ollama"):
    pytest.importorskip(package, reason=f"the {package} package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

from faces import (  # noqa: E402
    BODIES,
    ERRORS,
    NAMES,
    PATHS,
    Face,
    message_of,
    said_in,
    streamed_error,
    with_question,
)

KEY = "sk-a-key-of-ours"
SECONDS = 0.5
LATE = "not finished within 0.5 seconds"
LONG = {"temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_vectors(tmp_path_factory.mktemp("vectors"))
    with_record(vectors()["json"]).save(folder / "careful.gguf")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(folder):
    """One that wants a key, takes little, and ends what takes long."""
    from localsteer.server.limits import Limits
    from localsteer.server.security import Access

    limits = Limits(request_seconds=SECONDS, max_body=100_000)
    settings = {"engine": {"n_seq_max": 1}, "scheduler": {"max_queue": 0}}
    with serving(folder, limits=limits, access=Access(api_key=KEY), **settings) as server:
        yield server


@pytest.fixture(params=NAMES)
def face(request, server):
    return Face(request.param, server)


@pytest.fixture(params=NAMES)
def strict(request, guarded):
    return Face(request.param, guarded, KEY)


@pytest.fixture(scope="module")
def plain(server):
    return Face("chat", server).text()


# -- replies ------------------------------------------------------------------------------------------------


def test_all_ask_the_same_question_and_get_the_same_answer(face, plain):
    assert face.text() == plain
    assert face.streamed() == plain


def test_the_model_s_name_steers(face):
    loud = face.text("bundled+uppercase")
    assert is_loud(loud) and face.streamed("bundled+uppercase") == loud
    assert face.text("bundled+json").startswith("{")


def test_a_field_steers(face, plain):
    loud = face.text(steering=[{"name": "uppercase"}])
    assert is_loud(loud) and face.streamed(steering=["uppercase"]) == loud
    assert face.text("bundled+uppercase", steering=[{"name": "uppercase", "strength": 0}]) == plain


@pytest.mark.parametrize(
    "field", [{"ensure": ["uppercase"]}, {"steering": {"ensure": ["uppercase"]}}], ids=str
)
def test_ensure_gives_a_reply_that_follows(face, field):
    assert is_loud(face.text(**field))
    assert is_loud(face.streamed(**field))


def test_the_answer_tells_what_was_ensured(server):
    with server.http() as http:
        for name in NAMES:
            told = http.post(PATHS[name], json=BODIES[name] | {"ensure": ["uppercase"]}).json()
            assert told["ensure"]["tries"], name


def test_a_seed_draws_the_same_everywhere(server):
    drawn = {"temperature": 1.0, "seed": 5}
    assert len({Face(name, server).text(n=20, **drawn) for name in NAMES}) == 1


def test_a_vector_that_would_do_harm_is_left_out_and_told(face):
    """By the sign in its file: the prompt asks for JSON in its own words."""
    asked = with_question(face.name, f"Tell me about foxes. {vectors()['json'].phrasings[0]}")
    told = {"applied": [], "left_out": ["careful"]}
    with face.server.http() as http:
        path, body = PATHS[face.name], asked | {"steering": ["careful"]}
        assert http.post(path, json=body).json()["steering"] == told
        assert json.dumps(told, separators=(",", ":")) in http.post(path, json=body | {"stream": True}).text
        assert "steering" not in http.post(path, json=body | {"always_steer": True}).json()


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"]}
FORMS = {
    "chat": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "ollama_chat": {"format": SCHEMA},
    "ollama_generate": {"format": SCHEMA},
}


def test_a_forced_form_stays_plain_and_is_told(face):
    """By a vector that changes what is generated and nothing else."""
    loud = {"name": "uppercase", "positions": "generation", "mode": "add", "strength": 6}
    body = with_question(face.name, "Tell me about foxes.") | FORMS[face.name] | {"temperature": 0}
    body |= {"options": {"num_predict": 40}} if "options" in body else {}
    body |= {name: 40 for name in ("max_tokens", "max_output_tokens") if name in body}
    path = PATHS[face.name]
    with face.server.http() as http:
        plain = http.post(path, json=body).json()
        kept = http.post(path, json=body | {"steering": [loud]}).json()
        steered = http.post(path, json=body | {"steering": [loud], "steer_forms": True}).json()
        stream = http.post(path, json=body | {"steering": [loud], "stream": True}).text
    said = [said_in(face.name, answer) for answer in (plain, kept, steered)]
    assert said[0] == said[1] != said[2]
    told = kept["steering"]
    assert told["applied"] == ["uppercase"] and 3 < told["plain_tokens"] <= 40
    assert "steering" not in plain and "steering" not in steered
    assert f'"plain_tokens":{told["plain_tokens"]}' in stream


# -- refusals -----------------------------------------------------------------------------------------------


def refused(face, **body):
    """(status, message) of a body that is not taken."""
    with face.server.http(headers={"Authorization": f"Bearer {face.key}"}) as http:
        answer = http.post(PATHS[face.name], json={**BODIES[face.name], **body})
    return answer.status_code, message_of(face.name, answer.json())


def test_an_unknown_model(face):
    for call in (face.text, lambda model: list(face.pieces(model))):
        with pytest.raises(ERRORS, match="bundledd"):
            call("bundledd")
    assert refused(face, model="bundled+nothing")[0] == 404


def test_an_unknown_vector_and_settings_that_are_none(face):
    for steering in (
        ["nothing"],
        [{"name": "json", "strength": "much"}],
        [{"name": "json", "stren": 1}],
        {"a": 1},
    ):
        with pytest.raises(ERRORS, match="steering"):
            face.text(steering=steering)


def test_a_field_that_nobody_knows(face):
    status, message = refused(face, grammer="x")
    assert status == 400 and message.startswith("grammer: ")
    status, message = refused(face, temperature=9)
    assert status == 400 and message.startswith("temperature: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"model": ', b"\xff\xfe", b'"text"', b"9" * 500]
)
def test_a_body_that_is_no_request(face, content):
    with face.server.http() as http:
        answer = http.post(PATHS[face.name], content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message_of(face.name, answer.json())


def test_a_prompt_beyond_the_context(face):
    status, message = refused(face, **with_question(face.name, "word " * 3000))
    assert status == 400 and message.startswith(("input: ", "messages: ", "prompt: "))


def test_a_page_of_another_site(face):
    with face.server.http() as http:
        headers = {"Origin": "https://evil.example"}
        answer = http.post(PATHS[face.name], json=BODIES[face.name], headers=headers)
    assert answer.status_code == 403 and "evil.example" in message_of(face.name, answer.json())


def test_a_wrong_key_and_the_right_one(strict):
    assert strict.text(n=3)
    wrong = Face(strict.name, strict.server, "sk-of-somebody-else")
    with pytest.raises(ERRORS, match="key"):
        wrong.text(n=3)
    assert refused(wrong)[0] == 401


def test_a_body_that_is_too_large(strict):
    status, message = refused(strict, user="x" * 200_000)
    assert status == 413 and "100000 bytes" in message


def test_a_full_queue(strict):
    def wait():
        with contextlib.suppress(*ERRORS):
            strict.text(n=3)

    with strict.server.state.models["bundled"].scheduler.paused():
        waiting = threading.Thread(target=wait)
        waiting.start()
        until = time.monotonic() + SECONDS / 2
        while not strict.server.counts()["waiting"] and time.monotonic() < until:
            time.sleep(0.002)
        status, message = refused(strict)
    waiting.join()
    assert status == 429 and "slots" in message


def test_a_request_that_takes_too_long(strict):
    with strict.server.state.models["bundled"].scheduler.paused(), pytest.raises(ERRORS, match=LATE):
        strict.text()
    assert strict.server.quiet(2)


def test_a_stream_that_takes_too_long_ends_with_the_error_as_its_package_reads_it(strict):
    pieces = iter(strict.pieces(n=900, **LONG))
    assert next(pieces) is not None
    with strict.server.state.models["bundled"].scheduler.paused(), pytest.raises(ERRORS, match=LATE):
        list(pieces)
    assert strict.server.quiet(2)


def test_an_error_in_a_stream_stands_there_in_its_own_shape(strict):
    body = {**BODIES[strict.name], **LONG, "stream": True}
    if "options" in body:
        body["options"] = {"num_predict": 900}
    else:
        body["max_output_tokens" if strict.name == "responses" else "max_tokens"] = 900
    with (
        strict.server.http(headers={"x-api-key": KEY}) as http,
        http.stream("POST", PATHS[strict.name], json=body) as answer,
    ):
        lines = answer.iter_lines()
        found = [next(lines)]
        with strict.server.state.models["bundled"].scheduler.paused():
            found += lines
    assert re.search(LATE, streamed_error(strict.name, found))
    assert strict.server.quiet(2)


def test_a_client_that_leaves_frees_its_slot(face):
    pieces = iter(face.pieces(n=900, **LONG))
    next(pieces)
    pieces.close()
    assert face.server.quiet(2)


def test_a_server_that_closes_says_so(folder):
    with serving(folder) as server:
        for name in NAMES:
            server.state.models["bundled"].scheduler.stop()
            status, message = refused(Face(name, server))
            assert status == 503 and message


def test_every_field_is_in_the_documentation():
    from pathlib import Path

    from localsteer.server.faces import anthropic_body, ollama_body, responses_body

    page = (Path(__file__).parents[1] / "docs" / "clients.md").read_text("utf-8")
    rules = (responses_body.RULES, anthropic_body.RULES, ollama_body.RULES, ollama_body.OPTION_RULES)
    names = [name for rule in rules for group in rule.harmless.values() for name in group]
    names += [name for rule in rules for name in rule.neutral]
    bodies = (
        responses_body.ResponsesRequest,
        anthropic_body.MessagesRequest,
        ollama_body.OllamaChatRequest,
        ollama_body.OllamaGenerateRequest,
        ollama_body.OllamaOptions,
    )
    names += [name for body in bodies for name in body.model_fields]
    assert not [name for name in names if f"`{name}`" not in page and f"`{name}:" not in page]


def test_the_description_lists_every_path(server):
    with server.http() as http:
        paths = json.loads(http.get("/openapi.json").text)["paths"]
    assert {*PATHS.values(), "/api/tags", "/api/show", "/v1/messages/count_tokens"} <= paths.keys()
