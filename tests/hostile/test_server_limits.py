"""What all clients together may hold: connections, bytes, time of the event loop; a plain one is served."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hostile_requests import raw_request, serving_process
from serving import serving

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

MIB = 1 << 20
PLAIN = {"prompt": "The fox is", "max_tokens": 2, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from localsteer.server.limits import Limits

    limits = Limits(head_seconds=1.0, write_seconds=1.0, max_connections=40, max_held=8 * MIB)
    with serving(tmp_path_factory.mktemp("vectors"), limits=limits) as server:
        yield server


def is_served(server) -> bool:
    with server.http() as http:
        return http.post("/v1/completions", json=PLAIN).status_code == 200


# -- connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)  # fmt: skip
def test_connections_that_say_nothing_make_room(server, begun):
    """More than there may be, from the one address that plain clients come from too."""
    with ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(server.raw())
            connection.sendall(begun)
        assert is_served(server)
        assert is_served(server)


def test_a_connection_that_is_kept_for_the_next_request_outlives_silent_ones(server):
    with server.http() as http, ExitStack() as stack:
        kept = http.get("/health").extensions["network_stream"].get_extra_info("client_addr")
        for _ in range(100):
            stack.enter_context(server.raw())
        answer = http.get("/health")
        assert answer.extensions["network_stream"].get_extra_info("client_addr") == kept


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_has_its_time(server, begun):
    """However often a little more of it comes."""
    with server.raw() as connection:
        connection.sendall(begun)
        connection.settimeout(0.2)
        started, told = time.monotonic(), b""
        while time.monotonic() - started < 5:
            try:
                if not (part := connection.recv(4096)):
                    break
                told += part
            except TimeoutError:
                if begun.endswith(b": "):
                    connection.sendall(b"x")
            except OSError:
                break
        assert 0.8 < time.monotonic() - started < 3
    assert not told or b"408" in told.partition(b"\r\n")[0]


def test_an_answer_that_nobody_reads_is_dropped(server):
    """Written whole, so that no request is under way any more: the connection would stay for ever."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(server.running.address)
        for _ in range(250):  # more than the kernel's buffers take
            slow.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                time.sleep(0.1)
                slow.sendall(b"\r\n")


# -- bytes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    with serving_process("--vectors", folder, "--body-memory", 8) as program:
        assert is_served(program)
        yield program


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_large_bodies_have_a_bound_together_and_memory_comes_back(program):
    body = json.dumps({**CHAT, "x": "y" * (4 * MIB - 200)}).encode()
    head = raw_request("/v1/completions", {}, **{"Content-Length": str(len(body))})[:-2]
    assert is_served(program)
    before, peak, done = program.resident, 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, program.resident)

    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        watching = pool.submit(watch)
        connections = [stack.enter_context(socket.create_connection(program.address)) for _ in range(15)]
        for connection in connections:
            connection.sendall(head)
        statuses = list(pool.map(lambda each: status_of(each, body[:-1]), connections))
        assert is_served(program)  # small ones are never kept out
        done.set()
        watching.result()
    assert statuses.count(429) >= 12
    assert peak - before < 40 * MIB
    for _ in range(50):
        if program.resident - before < 32 * MIB:
            break
        time.sleep(0.1)
    assert program.resident - before < 32 * MIB


def test_memory_comes_back_while_large_bodies_keep_coming(monkeypatch):
    from localsteer.server import bodies
    from localsteer.server.limits import Limits

    trims = []
    monkeypatch.setattr(bodies, "TRIM_AFTER", 0.1)
    monkeypatch.setattr(bodies, "trim_memory", lambda: trims.append(1))
    scope = {"type": "http", "path": "/v1/completions", "headers": []}

    async def receive() -> dict:
        return {"type": "http.request", "body": bytes(3 * MIB)}

    async def nothing(*_message) -> None: ...

    async def keep_coming() -> None:
        limit = bodies.BodyLimit(nothing, Limits())
        for _ in range(20):  # each before the memory of the one before has been given back
            await limit(scope, receive, nothing)
            await asyncio.sleep(0.03)
        assert len(trims) >= 2

    asyncio.run(keep_coming())


def status_of(connection: socket.socket, part: bytes) -> int | None:
    """All but the last byte is sent; the status, where one comes."""
    try:
        connection.sendall(part)
        connection.settimeout(3)
        return int(connection.recv(100).split()[1])
    except TimeoutError:
        return None
    except (OSError, IndexError):  # cut off while it sent
        return 429


def test_an_upload_is_small(server):
    with server.raw() as connection:
        connection.sendall(
            b"POST /v1/steering?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n"
        )
        assert b"413" in connection.recv(200)


def test_a_client_that_never_ends_its_body_is_not_read_for_ever(server, monkeypatch):
    from localsteer.server import draining

    monkeypatch.setattr(draining, "SECONDS", 0.5)
    with server.raw() as connection:
        connection.settimeout(5)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{"
        )
        answer = b""
        while piece := connection.recv(1000):  # the answer comes at once, the end of the connection later
            answer += piece
        assert answer.startswith(b"HTTP/1.1 413")


# -- the event loop -----------------------------------------------------------------------------------------

M = 4 * MIB
ODD = {
    "lists": b'{"messages":' + b"[" * (M // 2),
    "objects": b'{"x":[' + b'{"":0},' * (M // 8) + b"0]}",
    "members": b'{"x":{' + b",".join(b'"%d":0' % i for i in range(M // 12)) + b"}}",
    "values": b'{"prompt":[' + b"1," * (M // 3) + b"1]}",
    "levels": b'{"x":' + b"[" * 1000 + b"]" * 1000 + b"}",
    "escaped quotes": b'{"x":"' + b'\\"' * (M // 3),
    "digits": b'{"x":[' + b",".join([b"9" * 4000] * 500) + b"]}",
    "wrong tokens": json.dumps({"prompt": ["x"] * 250_000}).encode(),
    "wrong parts": json.dumps({"messages": [{"role": "user", "content": [1] * 1000}] * 250}).encode(),
    "calls": json.dumps(
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}] * 128}] * 70}
    ).encode(),
    "not UTF-8": json.dumps(CHAT).encode("utf-16"),
}
PATHS = {"values": "/v1/completions", "wrong tokens": "/v1/completions"}


@pytest.mark.parametrize("kind", ODD)
def test_health_answers_while_bodies_are_read(program, kind):
    """Four clients at once. The aim is 100 ms; this process has the same core."""
    path, headers = PATHS.get(kind, "/v1/chat/completions"), {"Content-Type": "application/json"}

    def send(_):
        client = program.plain()
        client.request("POST", path, ODD[kind], headers)
        answer = client.getresponse()
        return answer.status, json.loads(answer.read())

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(send, i) for i in range(4)]
        assert slowest_health(program, lambda: all(each.done() for each in answers)) < 0.8
    assert {each.result()[0] for each in answers} <= {400, 429}
    message = answers[0].result()[1]["error"]["message"]
    assert message.startswith(("body: ", "the body can't be read", "the body is not", "prompt", "messages"))


def test_a_body_of_small_chunks_does_not_hold_the_event_loop_up(program):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(program.address) as connection:
        connection.sendall(head)
        sending = threading.Thread(target=exchange, args=(connection, b"1\r\n \r\n" * 60_000 + b"0\r\n\r\n"))
        sending.start()
        assert slowest_health(program, lambda: not sending.is_alive()) < 0.8
        sending.join()


def slowest_health(program, is_over) -> float:
    """Seconds of the slowest answer."""
    seconds = [0.0]
    client = program.plain()
    while not is_over():
        started = time.monotonic()
        client.request("GET", "/health")
        assert client.getresponse().read()
        seconds.append(time.monotonic() - started)
    print(f"{os.environ['PYTEST_CURRENT_TEST']} slowest {1000 * max(seconds):.0f} ms of {len(seconds)}")
    return max(seconds)


def exchange(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)
        connection.recv(100)


def test_an_answer_has_a_bound_of_log_probabilities(server):
    many = PLAIN | {"prompt": ["a"] * 32, "n": 16, "logprobs": 20, "max_tokens": 1000}
    with server.http() as http:
        answer = http.post("/v1/completions", json=many)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
        found = http.post(
            "/v1/completions", json=PLAIN | {"n": 2, "logprobs": 20, "max_tokens": 80, "temperature": 2}
        )
    assert [len(choice["logprobs"]["tokens"]) > 0 for choice in found.json()["choices"]] == [True, True]


def test_json_in_pieces_is_the_same():
    from localsteer.server.errors import as_json, as_json_in_pieces

    scores = [{"token": "\u00e9\ud800", "top": [{"logprob": -0.5, "bytes": [1, 2]}] * 3}] * 100
    document = {"choices": [{"logprobs": {"content": scores}, "text": 'a"b'}] * 2, "usage": {}, "none": None}
    assert as_json_in_pieces(document) == as_json(document)
    assert as_json_in_pieces({"data": [list(range(2000))] * 70, "empty": []}) == as_json(
        {"data": [list(range(2000))] * 70, "empty": []}
    )
