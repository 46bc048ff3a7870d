"""Constraints over HTTP: hostile ones hold nobody up, and calls are read in linear time."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="the package httpx is not installed")

from serving import FOXES, model_path, serving  # noqa: E402

from localsteer import bundled  # noqa: E402
from localsteer.server.schemas import Tool  # noqa: E402
from localsteer.server.tools import CallHold, parse  # noqa: E402

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

TOOL = Tool(type="function", function={"name": "f", "parameters": {"type": "object"}})
N = 100_000
TEXTS = {
    "an open call and spaces": "<tool_call>a" + " " * N + "x",
    "calls that never end": "<tool_call>" * (N // 10),
    "calls of nothing": "<tool_call></tool_call>" * (N // 20),
    "functions that never end": "<function=f>" * (N // 10),
    "a name that never ends": "<function=" + "a" * N,
    "parameters that never end": "<tool_call><function=f>" + "<parameter=a>" * (N // 10),
    "parameters of spaces": "<tool_call><function=f>" + "<parameter=a>\n \n</parameter> " * (N // 30),
    "brackets": "[" * N,
    "braces": '{"a":' * N,
    "objects": '{"name": "f"}' * (N // 10),
    "marks": "[TOOL_CALLS]<|python_tag|>" * (N // 25),
    "half marks": "<tool_cal" * (N // 9),
    "spaces": " " * N,
    "lines": "\n" * N,
    "numbers": "1" * N,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("piece", [10, N * 10])
def test_calls_are_read_in_linear_time(name, piece):
    text = TEXTS[name]
    started = time.thread_time()
    hold = CallHold()
    passed = "".join(hold.push(text[i : i + piece]) for i in range(0, len(text), piece))
    content, calls = parse(hold.rest(), [TOOL])
    assert time.thread_time() - started < 1.5
    assert not calls or {call.name for call in calls} == {"f"}
    if not calls:
        assert passed + content == text


def test_hostile_constraints_hold_nobody_up():
    """While they are compiled and drawn under, /health and a plain client go on."""
    pattern = {"type": "string", "pattern": "^((.?){60}){60}$"}
    wide = {"properties": {f"p{i}": {"type": "string"} for i in range(600)}}
    letters = {"type": "string", "pattern": r"^(\p{L}{0,90}\p{N}{0,90}){90}$"}
    many = {"type": "object", "properties": {f"p{i}": {"uniqueItems": True} for i in range(600)}}
    bodies = [
        *({"json_schema": schema} for schema in (pattern, wide, letters, many)),
        {"guided_regex": "((a{0,50}){0,50}){0,50}b"},
        {"grammar": "root ::= " + "(" * 5000},
        {"grammar": 'root ::= "a" | root root | root root root'},
    ]
    with serving(None, models={"bundled": model_path()}) as server:
        answers: list[int] = []

        def attack(body: dict) -> None:
            with server.http() as client:
                asked = {"messages": FOXES, "max_tokens": 40, "temperature": 1, **body}
                answers.append(client.post("/v1/chat/completions", json=asked).status_code)

        threads = [threading.Thread(target=attack, args=(body,)) for body in bodies]
        with server.http() as client:
            plain = {"messages": FOXES, "max_tokens": 12, "temperature": 0}

            def said() -> str:
                made = client.post("/v1/chat/completions", json=plain).json()
                return made["choices"][0]["message"]["content"]

            before = said()
            for thread in threads:
                thread.start()
            slowest = 0.0
            while any(thread.is_alive() for thread in threads):
                started = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - started)
                assert said() == before
        assert set(answers) <= {200, 400} and len(answers) == len(bodies)
        assert slowest < 2  # of a busy machine: a held interpreter shows as tens of seconds
