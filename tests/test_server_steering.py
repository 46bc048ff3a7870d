"""Vectors while the server runs, two models in one process, ensure, and many clients at once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote

import pytest
from serving import FOXES, QUESTIONS, is_loud, model_path, serving, vectors, write_vectors
from test_server import ask, streamed, text_of

import localsteer
from localsteer import ControlVector, bundled
from localsteer.catalog import load_catalog

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")


@pytest.fixture
def folder(tmp_path):
    return write_vectors(tmp_path / "vectors")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for the tests that leave the folder as it was."""
    with serving(write_vectors(tmp_path_factory.mktemp("vectors"))) as server:
        yield server


@pytest.fixture
def server(shared):
    """The same server with its folder as at first."""
    write_vectors(shared.state.vectors.folder)
    for path in shared.state.vectors.folder.iterdir():
        if path.stem not in vectors():
            path.unlink()
    shared.state.vectors.reload()
    return shared


def names(http):
    return [each["name"] for each in http.get("/v1/steering").json()["data"]]


def upload(http, name, data, **params):
    return http.post("/v1/steering", params={"name": name, **params}, content=data)


def file_of(server, name):
    return (server.state.vectors.folder / f"{name}.gguf").read_bytes()


# --- the list -----------------------------------------------------------------------------------------------


def test_vectors_are_listed_with_settings_and_figures(folder):
    figures = [{"layer": 2, "positions": "prompt", "strength": 1.0, "score": 0.9}]
    tuned = vectors()["json"]
    replace(tuned, provenance={**tuned.provenance, "validation": figures}).save(folder / "json.gguf")
    with serving(folder) as server, server.http() as http:
        listed = {each["name"]: each for each in http.get("/v1/steering").json()["data"]}
        one = http.get("/v1/steering/json").json()
    assert list(listed) == ["json", "lowercase", "uppercase"]
    assert one == listed["json"]
    assert one["settings"] == {
        "layer": list(tuned.layers), "mode": "project", "positions": tuned.positions, "strength": 1.0,
        "one_sided": False, "cap": None,
    }  # fmt: skip
    assert one["instruction"] == "json" and one["models"] == ["bundled"] and one["can_ensure"]
    assert one["validation"][0]["score"] == 0.9


def test_files_that_are_no_vectors_of_this_model_are_listed_with_the_reason(folder):
    (folder / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 50)
    vector = vectors()["json"]
    ControlVector(vector.directions[:, :64], *[None] * 4, (1,), mode="add").save(folder / "narrow.gguf")
    (folder / "a+b.gguf").write_bytes(file_bytes(folder, "json"))
    (folder / "notes.txt").write_text("not a vector")
    with serving(folder) as server, server.http() as http:
        listed = {each["name"]: each for each in http.get("/v1/steering").json()["data"]}
        assert set(listed) == {"broken", "narrow", *vectors()}
        assert "broken.gguf" in listed["broken"]["error"]
        assert str(folder) not in listed["broken"]["error"]
        assert "64" in listed["narrow"]["misfits"]["bundled"]
        assert "bundled+narrow" not in [each["id"] for each in http.get("/v1/models").json()["data"]]
        for name in ("broken", "narrow"):
            answer = http.post("/v1/chat/completions", json={"messages": FOXES, "steering": [name]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unfit_vector")


def file_bytes(folder, name):
    return (folder / f"{name}.gguf").read_bytes()


# --- while it runs ------------------------------------------------------------------------------------------


def test_a_vector_can_be_added_used_and_removed(server):
    client = server.client()
    data = file_of(server, "json")
    with server.http() as http:
        answer = upload(http, "mine", data)
        assert answer.status_code == 201 and answer.json()["name"] == "mine"
        assert file_of(server, "mine") == data
        assert "bundled+mine" in [model.id for model in client.models.list()]
        assert text_of(ask(client, "bundled+mine")) == text_of(ask(client, "bundled+json"))
        assert upload(http, "mine", data).status_code == 409
        assert upload(http, "mine", file_of(server, "uppercase"), replace="true").status_code == 201
        assert is_loud(text_of(ask(client, "bundled+mine")))
        assert http.delete("/v1/steering/mine").json()["deleted"] is True
        assert "mine" not in names(http)
        assert not (server.state.vectors.folder / "mine.gguf").exists()
        assert http.delete("/v1/steering/mine").status_code == 404
    with pytest.raises(openai.NotFoundError):
        ask(client, "bundled+mine")


def test_the_folder_can_be_read_again(server):
    folder = server.state.vectors.folder
    with server.http() as http:
        shutil.copy(folder / "json.gguf", folder / "copied.gguf")
        (folder / "lowercase.gguf").unlink()
        assert "copied" not in names(http)
        found = http.post("/v1/steering/reload").json()["data"]
        assert [each["name"] for each in found] == ["copied", "json", "uppercase"]


def test_a_file_that_was_not_read_yet_is_not_overwritten(server):
    mine = server.state.vectors.folder / "mine.gguf"
    mine.write_bytes(b"somebody's work")
    with server.http() as http:
        answer = upload(http, "mine", file_of(server, "json"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "exists")
        assert mine.read_bytes() == b"somebody's work"
        assert upload(http, "mine", file_of(server, "json"), replace="true").status_code == 201


def test_a_folder_that_can_t_be_changed_is_told_without_its_path(folder):
    with serving(folder) as server, server.http() as http:
        data = file_of(server, "json")
        shutil.rmtree(folder)
        folder.write_text("no folder any more")
        for answer in (upload(http, "mine", data), http.delete("/v1/steering/json")):
            assert answer.status_code == 409, answer.text
            assert "can't be changed" in answer.json()["error"]["message"]
            assert str(folder) not in answer.text
        assert names(http) == list(vectors())


@pytest.mark.parametrize("change", ["remove", "replace"])
def test_a_request_under_way_keeps_what_it_started_with(server, change):
    """The engine is held while the vector goes: the request has been taken, and not one token is drawn."""
    client = server.client()
    expected = text_of(ask(client, "bundled+uppercase"))
    found = {}

    def run():
        found["text"] = text_of(ask(client, "bundled+uppercase"))

    with server.http() as http:
        with server.state.models["bundled"].scheduler.paused():
            thread = threading.Thread(target=run)
            thread.start()
            while not server.counts()["waiting"]:
                pass
            if change == "remove":
                http.delete("/v1/steering/uppercase")
            else:
                upload(http, "uppercase", file_of(server, "lowercase"), replace="true")
        thread.join(60)
        assert found["text"] == expected and is_loud(expected)
        if change == "replace":
            assert not is_loud(text_of(ask(client, "bundled+uppercase")))


@pytest.mark.parametrize(
    "name", ["../json", "a/b", "a+b", "", ".hidden", "x" * 65, "nul\0", "/etc/passwd", "é"]
)
def test_a_name_can_t_leave_the_folder(server, name):
    before = sorted(path.name for path in server.state.vectors.folder.parent.rglob("*"))
    with server.http() as http:
        answer = upload(http, name, file_of(server, "json"))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "name"
        assert http.delete(f"/v1/steering/{quote(name, safe=chr(47))}").status_code in (404, 405)
    assert sorted(path.name for path in server.state.vectors.folder.parent.rglob("*")) == before


def test_hostile_uploads_are_refused_and_leave_nothing(server):
    good = file_of(server, "json")
    hostile = [
        b"",
        b"GGUF",
        good[:-100],
        good[: len(good) // 2],
        b"\0" * 1000,
        good.replace(b"project", b"pr0ject"),
    ]
    data = model_path().read_bytes()[:200_000]  # a model, cut
    before = sorted(os.listdir(server.state.vectors.folder))
    with server.http() as http:
        for i, body in enumerate([*hostile, data]):
            answer = upload(http, f"bad{i}", body)
            assert answer.status_code == 400, (i, answer.text)
            assert answer.json()["error"]["code"] == "invalid_vector"
            assert str(server.state.vectors.folder) not in answer.text
        assert names(http) == list(vectors())
    assert sorted(os.listdir(server.state.vectors.folder)) == before


def test_an_upload_is_bounded_and_needs_a_folder(server):
    from localsteer.server.limits import Limits

    with serving(None, limits=Limits(max_upload=1000)) as small, small.http() as http:
        assert upload(http, "x", b"x" * 2000).status_code == 413
        answer = upload(http, "x", b"x" * 100)
        assert answer.status_code == 409 and "--vectors DIR" in answer.json()["error"]["message"]
        assert http.get("/v1/steering").json()["data"] == []


# --- traces -------------------------------------------------------------------------------------------------


def test_a_trace_tells_the_projection_at_each_token(server):
    item = {"name": "json", "layer": 1, "positions": "prompt"}
    body = {"messages": FOXES, "steering": [item], "max_tokens": 12}
    with server.http() as http:
        found = http.post("/v1/steering/trace", json=body).json()
        given = http.post("/v1/steering/trace", json=body | {"reply": "Some foxes are red."}).json()
        refused = http.post("/v1/steering/trace", json=body | {"steering": []})
    (line,) = found["lines"]
    assert len(line["share"]) == len(found["tokens"])
    assert line["vector"] == "json" and line["layer"] == 1
    steered = [share for share in line["share"][: found["n_prompt"]] if share is not None]
    assert steered and all(share == pytest.approx(1, abs=0.05) for share in steered)  # project at strength 1
    assert given["reply"] == "Some foxes are red."
    assert refused.json()["error"]["param"] == "steering"


# --- ensure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [{"ensure": ["json"]}, {"steering": {"ensure": ["json"]}}])
def test_ensure_steers_where_the_plain_reply_does_not_follow(server, field):
    client = server.client()
    reply = client.chat.completions.create(
        model="bundled", messages=FOXES, temperature=0, max_tokens=80, extra_body=field
    )
    assert json.loads(text_of(reply))
    record = reply.model_extra["ensure"]
    assert record["passed"] and record["steered_strength"] > 0 and len(record["tries"]) >= 2
    text, reasons, _ = streamed(
        client.chat.completions.create(
            model="bundled", messages=FOXES, temperature=0, max_tokens=80, extra_body=field, stream=True
        )
    )
    assert (text, reasons) == (text_of(reply), ["stop"])


def test_ensure_that_can_t_be(server):
    with server.http() as http:
        for change, param in (
            ({"ensure": ["nothing"]}, "ensure"),
            ({"ensure": ["json"], "n": 2}, "n"),
            ({"ensure": ["json"], "logprobs": True}, "logprobs"),
            ({"steering": {"ensure": []}}, "steering.ensure"),
            ({"steering": {"ensured": ["json"]}}, "steering"),
            ({"ensure": ["json"], "messages": [{"role": "user"}]}, "messages"),
        ):
            answer = http.post("/v1/chat/completions", json={"messages": FOXES, **change})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].startswith(param)


def test_tries_that_are_given_up_before_they_begin_leave_their_place(monkeypatch):
    """The client hung up while every thread was busy."""
    from concurrent.futures import ThreadPoolExecutor

    from localsteer.server import ensured

    leave = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        busy.submit(leave.wait, 10)
        monkeypatch.setattr(ensured, "_threads", busy)
        monkeypatch.setattr(ensured, "_free", threading.BoundedSemaphore(1))

        async def hang_up():
            ensured._begin(lambda: None).cancel()
            await asyncio.sleep(0)

        asyncio.run(hang_up())
        leave.set()
    assert ensured._free.acquire(blocking=False)


# --- a prompt that asks already -----------------------------------------------------------------------------

HARM = {"n": 8, "scores": {"instructed": 0.875, "both": 0.5}}


@pytest.fixture
def harmful(server):
    """json with a file that says that it does harm where the prompt asks for JSON."""
    vector = vectors()["json"]
    made = replace(vector, provenance={**vector.provenance, "validation": HARM})
    made.save(server.state.vectors.folder / "json.gguf")
    server.state.vectors.reload()
    return made


def asking(text="Tell me about foxes."):
    words = load_catalog("bundled").get("json").held_out_phrasings[0]
    return [{"role": "user", "content": f"{text} {words}"}]


def test_what_does_harm_is_left_out_of_a_request_that_asks_already(server, harmful):
    client = server.client()
    asked = {"messages": asking(), "temperature": 0, "max_tokens": 60}
    plain = client.chat.completions.create(model="bundled", **asked)
    reply = client.chat.completions.create(model="bundled+json+lowercase", **asked)
    assert reply.steering == {"applied": ["lowercase"], "left_out": ["json"]}
    same = client.chat.completions.create(model="bundled+json", **asked)
    assert text_of(same) == text_of(plain) and not hasattr(plain, "steering")
    _, _, chunks = streamed(client.chat.completions.create(model="bundled+json", stream=True, **asked))
    assert all(chunk.steering == {"applied": [], "left_out": ["json"]} for chunk in chunks)
    assert not hasattr(ask(client, "bundled+json"), "steering")
    assert text_of(ask(client, "bundled+json")).startswith("{")


@pytest.mark.parametrize("how", [{"steering": [{"name": "json", "strength": 1}]}, {"always_steer": True}])
def test_a_client_that_insists_gets_the_steered_reply(server, harmful, how):
    body = {"model": "bundled+json", "messages": asking(), "temperature": 0, "max_tokens": 20, **how}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body).json()
    engine = server.state.models["bundled"].engine
    assert "steering" not in answer
    with server.state.models["bundled"].scheduler.paused():
        steered = engine.generate(
            asking(), steer=harmful, sampling=localsteer.Sampling(temp=0), max_tokens=20
        )
    assert answer["choices"][0]["message"]["content"] == steered.text


def test_requests_that_ask_and_requests_that_do_not_are_answered_beside_each_other(server, harmful):
    client = server.client()
    several = [(asking(text), "left_out") for text in QUESTIONS]
    several += [([{"role": "user", "content": text}], "applied") for text in QUESTIONS]

    def answered(messages):
        how = {"temperature": 0, "max_tokens": 30}
        return client.chat.completions.create(model="bundled+json", messages=messages, **how)

    with ThreadPoolExecutor(len(several)) as threads:
        replies = list(threads.map(answered, [messages for messages, _ in several]))
    assert [hasattr(reply, "steering") for reply in replies] == [how == "left_out" for _, how in several]
    assert server.quiet()


def test_what_is_applied_beside_ensure_is_considered_too(server, harmful):
    body = {"messages": asking(), "steering": ["json"], "ensure": ["lowercase"], "temperature": 0}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**body, "max_tokens": 40}).json()
    assert answer["steering"] == {"applied": [], "left_out": ["json"]}
    assert answer["ensure"]["tries"]


# --- two models ---------------------------------------------------------------------------------------------


def test_two_models_from_one_process(folder):
    models = {"instruct": model_path(), "base": bundled.gguf_path("base", "F32")}
    with serving(folder, models=models) as server:
        client = server.client()
        ids = [model.id for model in client.models.list()]
        assert {"instruct", "base", "instruct+json"} <= set(ids)
        found = {
            name: client.completions.create(model=name, prompt="The fox", temperature=0, max_tokens=10)
            for name in models
        }
        assert found["instruct"].choices[0].text != found["base"].choices[0].text
        assert is_loud(text_of(ask(client, "instruct+uppercase")))
        with server.http() as http:
            assert set(http.get("/health").json()["models"]) == set(models)
            default = http.post("/v1/chat/completions", json={"messages": FOXES, "max_tokens": 2})
            assert default.json()["model"] == "instruct"


# --- real clients -------------------------------------------------------------------------------------------


def test_many_clients_at_once_each_steered_its_own_way(server):
    """What each gets is what it would get alone."""
    client = server.client()
    kinds = ["bundled", "bundled+uppercase", "bundled+lowercase", "bundled+json"]
    alone = {
        (kind, question): chat(client, kind, question).choices[0].message.content
        for kind in kinds
        for question in QUESTIONS
    }

    async def one(client, kind, question, stream):
        messages = [{"role": "user", "content": question}]
        reply = await client.chat.completions.create(
            model=kind, messages=messages, temperature=0, max_tokens=60, stream=stream
        )
        if not stream:
            return reply.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            jobs = [one(client, *key, stream) for key in alone for stream in (False, True)]
            return await asyncio.gather(*jobs)

    found = asyncio.run(everybody())
    assert found == [text for text in alone.values() for _ in "12"]
    for (kind, _), text in zip([key for key in alone for _ in "12"], found, strict=True):
        if kind.endswith("uppercase"):
            assert sum(map(str.islower, text)) <= 0.1 * len(text)
        if kind.endswith("lowercase"):
            assert sum(map(str.isupper, text)) <= 0.1 * len(text)
    assert server.quiet()


def chat(client, kind, question):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=kind, messages=messages, temperature=0, max_tokens=60)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_transcripts(server):
    def curl(path, *args):
        done = subprocess.run(
            ["curl", "-sS", "--noproxy", "*", f"{server.url}{path}", *args],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(curl("/v1/models"))["data"][0]["id"] == "bundled"
    body = {
        "model": "bundled+uppercase",
        "messages": FOXES,
        "temperature": 0,
        "max_tokens": 20,
        "stream": True,
    }
    lines = curl("/v1/chat/completions", "-N", "--json", json.dumps(body)).split("\n\n")
    assert all(line.startswith("data: ") for line in lines[:-1]) and lines[-1] == ""
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    assert is_loud("".join(c["choices"][0]["delta"].get("content", "") for c in chunks))
    # without a Content-Type curl sends a form, which no page of another site may use either
    refused = json.loads(curl("/v1/chat/completions", "-d", json.dumps(body)))
    assert "Content-Type: application/json" in refused["error"]["message"]
    path = server.state.vectors.folder / "json.gguf"
    added = json.loads(curl("/v1/steering?name=second", "--data-binary", f"@{path}"))
    assert added["name"] == "second"
    assert json.loads(curl("/v1/steering/second", "-X", "DELETE"))["deleted"]
