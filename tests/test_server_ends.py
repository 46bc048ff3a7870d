"""How replies and servers end: clients that hang up or read nothing, SIGTERM, grace."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time

import pytest
from cli_runs import command_line
from serving import FOXES, serving, write_vectors

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

ANY = {"temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
ONE = ANY | {"prompt": "The fox is", "max_tokens": 900}
# the bundled model may end a reply at any token: 48 of them are seconds of work, the same each time
LONG = ONE | {"prompt": ["The fox is"] * 6, "n": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vectors(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, engine={"n_seq_max": 2}) as server:
        yield server


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.002)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slots(server, stream):
    """Within a decode step: the steps that are still made are counted."""
    body = json.dumps(LONG | {"stream": stream}).encode()
    context = server.state.models["bundled"].engine.context
    with server.raw() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert wait_for(lambda: server.counts()["running"] == 2)
    assert wait_for(lambda: not (server.counts()["running"] or server.counts()["waiting"]), 5.0)
    decodes = context.n_decodes
    time.sleep(0.2)
    assert context.n_decodes == decodes


def test_a_hang_up_ends_the_tries_of_ensure(server):
    """While the plain reply is held back, so that there is something to end."""
    ensure = {"messages": FOXES, "ensure": ["json"], "temperature": 0}
    body = json.dumps(ensure).encode()
    scheduler = server.state.models["bundled"].scheduler
    with scheduler.paused(), server.raw() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert wait_for(lambda: server.counts()["waiting"] == 1)
        connection.close()
        time.sleep(0.3)  # the server sees the end of the connection
    assert server.quiet(10)
    before = scheduler.engine.context.n_decodes
    time.sleep(0.2)
    assert scheduler.engine.context.n_decodes == before


def test_a_hang_up_is_seen_within_a_step_of_the_cancel(server, monkeypatch):
    """From the cancel on no further token of the reply is drawn."""
    from localsteer.runtime.scheduler import Ticket

    seen = []
    cancel = Ticket.cancel

    def watched(ticket):
        if ticket.finish_reason is None:
            seen.append((ticket, len(ticket.tokens)))
        cancel(ticket)

    monkeypatch.setattr(Ticket, "cancel", watched)
    with (
        server.http() as http,
        http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer,
    ):
        next(answer.iter_lines())
    assert server.quiet()
    assert wait_for(lambda: seen)
    assert all(len(ticket.tokens) <= before + 1 for ticket, before in seen)


def test_a_client_that_reads_nothing_does_not_hold_the_others_up(folder):
    from localsteer.server.limits import Limits

    with serving(folder, limits=Limits(write_seconds=0.5)) as server:
        body = json.dumps(LONG | {"stream": True, "logprobs": 20}).encode()
        with server.raw() as slow, server.http() as http:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            answer = http.post("/v1/completions", json={"prompt": "The owl", "max_tokens": 3})
            assert answer.status_code == 200
            assert server.quiet(30)


def test_stopping_lets_replies_finish_within_the_grace(folder):
    with serving(folder, grace=30.0) as server, server.http() as http:
        found = {}

        def ask():
            found["answer"] = http.post("/v1/chat/completions", json={"messages": FOXES, "seed": 1})

        thread = threading.Thread(target=ask)
        thread.start()
        assert wait_for(lambda: server.counts()["running"] == 1)
        server.running.stop()
        thread.join(60)
        assert found["answer"].status_code == 200
        assert found["answer"].json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_after_the_grace_replies_are_cut_with_a_word(folder):
    with serving(folder, grace=0.0, engine={"n_seq_max": 1}) as server, server.http() as http:
        lines = []

        def read():
            with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                lines.extend(answer.iter_lines())

        thread = threading.Thread(target=read)
        thread.start()
        assert wait_for(lambda: server.counts()["running"] == 1)
        time.sleep(0.1)
        server.running.stop()
        thread.join(60)
    last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "closing"


def start(*args):
    process = subprocess.Popen(
        command_line("serve", "--port", 0, "--json", "-t", 1, *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        text += line
    return process, json.loads(text)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("handlers", [True, False], ids=["", "no loop handlers"])
def test_signals_end_the_program_cleanly(folder, number, status, handlers, tmp_path, monkeypatch):
    if not handlers:  # as on Windows, where the event loops take none
        lines = (
            "import asyncio",
            "asyncio.SelectorEventLoop.add_signal_handler = asyncio.AbstractEventLoop.add_signal_handler",
        )
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process, told = start("--vectors", folder, "--grace", 20)
    assert told["vectors"] == ["json", "lowercase", "uppercase"]
    with (
        httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as http,
        http.stream("POST", "/v1/completions", json=ONE | {"max_tokens": 60, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(number)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    _out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert f"at {told['url']}" in err


def test_each_slot_may_have_a_cache_of_its_own(folder):
    process, told = start("--vectors", folder, "--no-kv-unified", "-np", 3, "-c", 512)
    with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as http:
        (counts,) = http.get("/health").json()["models"].values()
        found = http.post("/v1/completions", json=ONE | {"n": 3, "max_tokens": 8, "temperature": 0}).json()
        process.send_signal(signal.SIGTERM)
    assert (counts["slots"], counts["cells"]) == (3, 3 * 512)
    assert len({choice["text"] for choice in found["choices"]}) == 1
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
