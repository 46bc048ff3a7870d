"""Who may ask a server, and how much; names that can't leave the folder; no traceback in a reply."""

from __future__ import annotations

import gzip
import json
import socket

import pytest
from cli_runs import invoke
from serving import FOXES, serving, write_vectors

from localsteer import bundled
from localsteer.errors import LocalsteerError

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

KEY = "a-key-of-sixteen"
CHAT = {"model": "bundled", "messages": FOXES, "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vectors(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def server(folder):
    from localsteer.server.limits import Limits

    with serving(folder, limits=Limits(max_body=20_000, max_upload=50_000, body_seconds=1.0)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(folder):
    from localsteer.server.security import Access

    access = Access(api_key=KEY, hosts=("models.lan",), origins=("https://chat.lan",))
    with serving(folder, access=access) as server:
        yield server


def get(server, headers, path="/v1/models", method="GET"):
    with server.http() as http:
        return http.request(method, path, headers=headers)


# --- names and sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1", "127.0.0.2:8080", "[::1]:80"])
def test_the_machine_s_own_names_are_taken(server, host):
    assert get(server, {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "192.168.1.5", "0.0.0.0", "localhost@x",
     "localhost/", "localhost:99999999", "[::1", "127.0.0.1, evil.example"],
)  # fmt: skip
def test_a_name_that_was_rebound_is_refused(server, host):
    answer = get(server, {"Host": host})
    assert answer.status_code == 403, host
    assert answer.json()["error"]["code"] == "host_refused"
    assert host.split(",")[0][:20] in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://"]
)
def test_a_page_of_another_site_is_refused_even_the_reading(server, origin):
    for path in ("/v1/models", "/health", "/"):
        answer = get(server, {"Origin": origin}, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")
        assert "access-control-allow-origin" not in answer.headers


def test_its_own_page_may_ask(server):
    host = f"127.0.0.1:{server.port}"
    assert get(server, {"Host": host, "Origin": f"http://{host}"}).status_code == 200
    assert get(server, {"Host": host, "Origin": "http://127.0.0.1:1"}).status_code == 403


def test_a_named_host_and_a_named_origin(locked):
    headers = {"Host": "models.lan", "Authorization": f"Bearer {KEY}"}
    assert get(locked, headers).status_code == 200
    answer = get(locked, headers | {"Origin": "https://chat.lan"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.lan"
    asked = {"Host": "models.lan", "Origin": "https://chat.lan", "Access-Control-Request-Method": "POST"}
    before = get(locked, asked, "/v1/chat/completions", "OPTIONS")
    assert (before.status_code, before.headers["vary"]) == (204, "Origin")
    assert get(locked, asked | {"Origin": "https://x.lan"}, method="OPTIONS").status_code == 403


# --- the key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer \xff"]
)
def test_without_the_key_nothing_is_told(locked, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/v1/steering", "/metrics", "/openapi.json"):
        answer = get(locked, headers, path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text


def test_with_the_key_all_is_told_and_health_to_everybody(locked):
    assert get(locked, {"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert get(locked, {}, "/health").json()["status"] == "ok"


def test_the_key_is_compared_in_constant_time(monkeypatch):
    from localsteer.server import security

    seen = []
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    assert security.Access(api_key=KEY).allows_key(f"Bearer {KEY}")
    assert seen == [(KEY.encode(), KEY.encode())]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.lan"])
def test_an_address_for_others_needs_a_key(host):
    from localsteer.server.security import Access

    with pytest.raises(LocalsteerError, match="--api-key"):
        Access(bind=host).check()
    Access(bind=host, api_key=KEY).check()
    for loopback in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        Access(bind=loopback).check()


def test_an_open_server_takes_addresses_but_no_foreign_names():
    from localsteer.server.security import Access

    access = Access(bind="0.0.0.0", api_key=KEY, hosts=("models.lan",))
    assert access.allows_host("192.168.1.5:8080") and access.allows_host("models.lan")
    assert not access.allows_host("evil.example")


# --- how much -----------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large(server):
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=CHAT | {"user": "x" * 30_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert "20000" in answer.json()["error"]["message"]

        def pieces():
            for _ in range(50):
                yield b"x" * 1000

        answer = http.post("/v1/chat/completions", content=pieces())  # no Content-Length
        assert answer.status_code == 413


@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", b"413"), ("/nowhere", b"4")])
def test_a_client_that_sends_all_before_it_reads_is_told_why(server, path, status):
    """Far more than the buffers of a connection hold: a connection closed early would be reset instead."""
    n = 30_000_000
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.raw() as connection:
        connection.settimeout(20)
        connection.sendall(f"{head}Content-Length: {n}\r\n\r\n".encode() + b" " * n)
        assert connection.recv(200).startswith(b"HTTP/1.1 " + status)


def test_a_compressed_body_is_named_as_such(server):
    with server.http() as http:
        body = gzip.compress(json.dumps(CHAT).encode())
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        answer = http.post("/v1/chat/completions", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Encoding")
        headers["Content-Encoding"] = "identity"
        assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


def test_a_body_that_does_not_come(server):
    with server.raw() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # head and body may come apart
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"within 1 seconds" in answer


def test_half_a_request_and_rubbish_hurt_nobody(server):
    for data in (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"\0" * 99,
    ):
        with server.raw() as connection:
            connection.sendall(data)
    with server.raw() as connection:
        connection.sendall(b"GET / HTTP/9.9\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 40")
    assert get(server, {}).status_code == 200


def test_a_full_queue_says_so(folder):
    with (
        serving(folder, scheduler={"max_queue": 1}, engine={"n_seq_max": 1}) as server,
        server.http() as http,
    ):
        with server.state.models["bundled"].scheduler.paused():
            answer = http.post("/v1/chat/completions", json=CHAT | {"n": 4})
        assert answer.status_code == 429, answer.text
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        assert server.quiet()
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


# --- what a reply may tell ----------------------------------------------------------------------------------


def test_a_bug_is_told_without_its_insides(server, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("secret-path /home/user")

    monkeypatch.setattr(server.state.models["bundled"].scheduler, "submit", broken)
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text and "Traceback" not in answer.text


def test_what_is_no_unicode_is_refused_not_a_crash(server):
    body = json.dumps(CHAT | {"model": "\ud800"}).encode()
    with server.http() as http:
        for data in (body, json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode()):
            answer = http.post(
                "/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in (400, 404)
            assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/x.js"]
)
def test_the_page_s_files_alone_are_served(server, path):
    with server.raw() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in connection.recv(4096).split(b"\r\n")[0]


# --- the command line ---------------------------------------------------------------------------------------


def refused(*args):
    return invoke("serve", *args).complaint()


def test_slips_of_the_command_line(tmp_path):
    assert "--api-key" in refused("--host", "0.0.0.0")
    assert "at least 8" in refused("--api-key", "short")
    assert "--host 8.8.8.8" in refused("--host", "8.8.8.8")
    assert "70000" in refused("--port", "70000")
    for origin in ("*", "chat.lan:3000", "https://chat.lan/page"):  # no Origin is ever one of these
        assert f"--cors {origin}" in refused("--cors", origin)
    for host in ("*", "*.lan", "models.lan:8080", "http://models.lan"):
        assert f"--allow-host {host}" in refused("--allow-host", host)
    assert "none.gguf can't be read" in refused("-m", "none.gguf")
    assert "named 'bundled'" in refused("-m", "bundled", "-m", "bundled")
    assert "missing can't be read" in refused("--vectors", tmp_path / "missing", "-t", 1)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}" in refused("--port", port, "-t", 1)


def test_a_missing_package_is_named(monkeypatch):
    from localsteer.cli import serve

    monkeypatch.setattr(serve, "EXTRA", ("a_package_that_is_not_there",))
    assert 'pip install "localsteer[serve]"' in refused()
