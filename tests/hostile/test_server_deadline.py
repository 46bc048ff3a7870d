"""Every request ends by its deadline wherever it is, and the process by its grace whatever holds it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time

import pytest
from cli_runs import command_line
from hostile_requests import add_vector, raw_request
from serving import FOXES, serving

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

SECONDS = 1.0
ANY = {"temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
# 512 replies one after the other: minutes of work
LONG = ANY | {"prompt": ["The fox is"] * 32, "n": 16, "max_tokens": 900}
# so that the first token is there in time on a slow machine too
FEWER = LONG | {"prompt": ["The fox is"] * 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from localsteer.server.limits import Limits

    folder = tmp_path_factory.mktemp("vectors")
    limits = Limits(request_seconds=SECONDS, write_seconds=60)
    settings = {"engine": {"n_seq_max": 2}, "scheduler": {"max_queue": 1000}}
    with serving(folder, limits=limits, **settings) as server:
        add_vector(server, tmp_path_factory.mktemp("upload"))
        yield server


def late(answer):
    return answer.status_code == 504 and answer.json()["error"] == {
        "message": f"the request was not finished within {SECONDS:g} seconds: ask for less, or "
        "start the server "
        "with a longer --request-timeout.",
        "type": "timeout_error",
        "param": None,
        "code": "request_timeout",
    }


def test_a_reply_that_takes_too_long(server):
    with server.http() as http:
        started = time.monotonic()
        answer = http.post("/v1/completions", json=LONG)
        assert late(answer)
        assert time.monotonic() - started < SECONDS + 3
    assert answer.headers["x-should-retry"] == "false"
    assert server.quiet(2)


def test_a_stream_ends_with_the_error(server):
    with (
        server.http() as http,
        http.stream("POST", "/v1/completions", json=FEWER | {"stream": True}) as answer,
    ):
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) > 2
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert server.quiet(2)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream": True}),
        ("/v1/chat/completions", {"ensure": ["odd"]}),
        ("/v1/steering/trace", {"steering": ["odd"]}),
    ],
    ids=["reply", "stream", "ensure", "trace"],
)
def test_a_request_that_waits_for_the_model(server, path, more):
    scheduler = server.state.models["bundled"].scheduler
    with scheduler.paused(), server.http() as http:
        assert late(http.post(path, json={"messages": FOXES, **more}))
    assert server.quiet(2)


def test_a_check_that_never_ends(server, monkeypatch):
    """Python code that lets others run: its thread is left behind, and the client gets its answer."""
    from localsteer.ensure import Requirement

    done = threading.Event()
    monkeypatch.setattr(Requirement, "is_hopeless", lambda self, text: done.wait(20))
    try:
        with server.http() as http:
            body = {"messages": FOXES, "ensure": ["odd"]}
            assert late(http.post("/v1/chat/completions", json=body))
            assert server.quiet(2)
    finally:
        done.set()


def test_a_body_that_trickles_in(server):
    with server.raw() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        connection.settimeout(10)
        assert b"504" in connection.recv(100).partition(b"\r\n")[0]


def test_a_client_that_reads_nothing_is_dropped(server):
    """write_seconds is a minute: it is the deadline that ends it."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(server.running.address)
        slow.sendall(raw_request("/v1/completions", LONG | {"stream": True, "logprobs": 20}))
        time.sleep(SECONDS / 2)
        assert server.quiet(3)


# -- the process --------------------------------------------------------------------------------------------

# Runs in the server's process, as a request's thread might: it never lets the interpreter go.
HOLDING = r"""
import os, re, threading, time

def hold():
    # the server may have processes of its own, which run this too
    while not os.path.exists({path!r}) or open({path!r}).read() != str(os.getpid()):
        time.sleep(0.02)
    os.remove({path!r})
    re.match(r"(\w+\s?)+$", "a" * 100 + "!")

if {name!r} in os.environ:
    threading.Thread(target=hold, daemon=True).start()
"""


def test_sigterm_ends_a_process_whose_interpreter_is_held(tmp_path, monkeypatch):
    path = tmp_path / "hold"
    (tmp_path / "sitecustomize.py").write_text(HOLDING.format(path=str(path), name="HOLD_THE_INTERPRETER"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOLD_THE_INTERPRETER", "1")
    process = subprocess.Popen(
        command_line("serve", "--port", 0, "-t", 1, "--grace", 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "Ctrl-C" not in (line := process.stderr.readline()):
            assert line, "it did not start"
        path.write_text(str(process.pid))
        while path.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - started < 8
    assert process.returncode == 1
    assert err == "localsteer: did not end within its grace: stopped.\n"
