"""A thousand malformed requests, generated from the server's own description: not one 500.

schemathesis knows the OpenAPI description; hypothesis writes the rest: bodies that are no objects at all.
"""

from __future__ import annotations

import json
import time

import pytest
from serving import serving, write_vectors

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

TOTAL = 1000
AT_LEAST = TOTAL // 10  # from the description, however slow the machine
SECONDS = 60.0
BODIES = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/steering/trace", "/v1/responses",
    "/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate",
    "/api/embed", "/api/show",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from localsteer.server.limits import Limits

    folder = write_vectors(tmp_path_factory.mktemp("vectors"))
    # short replies: what is tested is the refusals, and what slips through as valid should not take long
    with serving(folder, limits=Limits(predict=4), scheduler={"max_queue": 1000}) as server:
        yield server


class Answers:
    """Counts them, and keeps those that must not be."""

    def __init__(self, server):
        self.http = server.http()
        self.statuses: dict[int, int] = {}
        self.bad: list[tuple[str, object, str]] = []
        self.until = time.monotonic() + SECONDS

    @property
    def n(self):
        return sum(self.statuses.values())

    def send(self, method, path, **request):
        answer = self.http.request(method, path, **request)
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        wrong_shape = False
        if answer.status_code >= 400 and method != "HEAD":
            try:
                error = answer.json()["error"]
                said = error if path.startswith("/api/") else error["type"] and error["message"]
                wrong_shape = not (said and isinstance(said, str))
            except (ValueError, KeyError, TypeError):
                wrong_shape = True
        if answer.status_code >= 500 or wrong_shape or "Traceback" in answer.text:
            self.bad.append(
                (f"{method} {path}", str(request)[:2000], f"{answer.status_code} {answer.text[:400]}")
            )
        return answer


def bounded(value):
    """What slips through as valid must not draw a million tokens."""
    if isinstance(value, dict):
        if isinstance(value.get("options"), dict):
            bounded(value["options"])
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"):
            if isinstance(value.get(name), int) and (value[name] > 4 or value[name] in (-1, -2)):
                value[name] = 4
        if isinstance(value.get("n"), int) and 1 < value["n"] < 17:
            value["n"] = 1
    return value


def from_the_description(server):
    """Requests that break the description, or keep it by the letter: positive ones are odd enough too."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings, strategies

    with server.http() as http:
        schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operations = [each.ok() for each in schema.get_all_operations()]
    operations = [each for each in operations if each.path in BODIES]
    modes = (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE)
    cases = [each.as_strategy(generation_mode=mode) for each in operations for mode in modes]

    def run(answers, n):
        @settings(
            max_examples=n, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategies.one_of(cases))
        def send(case):
            if answers.n >= AT_LEAST and time.monotonic() > answers.until:
                return
            body = bounded(case.body)
            if isinstance(body, bytes):
                answers.send(case.method, case.path, content=body)
                return
            try:
                content = json.dumps(body)
            except (TypeError, ValueError):
                return
            answers.send(
                case.method, case.path, content=content.encode("utf-8", "backslashreplace"),
                headers={"Content-Type": "application/json"},
            )  # fmt: skip

        send()

    return run


def test_a_thousand_malformed_requests_give_no_500(server):
    from hypothesis import HealthCheck, Phase, given, settings, strategies

    answers = Answers(server)
    from_the_description(server)(answers, TOTAL // 2)
    half = answers.n

    valid = {
        "model": "bundled", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi",
        "steering": ["json"], "max_tokens": 2,
    }  # fmt: skip
    keys = strategies.sampled_from(
        ["name", "layer", "type", "text", "role", "content", "schema", "strength", "x"]
    )
    odd = strategies.recursive(
        strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=20)
        | strategies.floats() | strategies.sampled_from(["\0", "\ud800", "../x", "9" * 400, "", "json"]),
        lambda inner: strategies.lists(inner, max_size=4)
        | strategies.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )  # fmt: skip
    fields = strategies.sampled_from(
        [
            "model", "messages", "prompt", "input", "steering", "ensure", "n", "stop", "seed", "temperature",
            "top_p", "top_k", "min_p", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
            "stream", "stream_options", "max_tokens", "max_completion_tokens", "logit_bias", "reply", "echo",
            "best_of", "suffix", "dimensions", "encoding_format", "functions", "presence_penalty",
            "instructions", "text", "reasoning", "system", "thinking", "stop_sequences", "options", "format",
            "think", "raw", "keep_alive", "output_config", "include", "images", "max_output_tokens",
        ]
    )  # fmt: skip

    @settings(
        max_examples=TOTAL, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategies.sampled_from(BODIES), strategies.dictionaries(fields, odd, min_size=1, max_size=3), odd)
    def send(path, change, other):
        if answers.n >= TOTAL + 50 or time.monotonic() > answers.until:
            return
        body = other if answers.n % 7 == 0 else bounded({**valid, **change})
        content = json.dumps(body).encode()  # NaN and infinity as Python writes them, too
        answers.send("POST", path, content=content, headers={"Content-Type": "application/json"})

    send()
    assert answers.bad == []
    assert half >= AT_LEAST, "schemathesis sent too few"
    # a machine under load sends fewer in its minute; on a quiet one it is a thousand within half of it
    assert answers.n >= TOTAL or time.monotonic() > answers.until, answers.statuses
    assert answers.statuses.get(400, 0) >= answers.n // 2, answers.statuses
    assert server.quiet(20)
    with server.http() as http:
        assert http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200


def test_odd_paths_methods_and_headers(server):
    answers = Answers(server)
    paths = ["/v1/steering/%00", "/v1/steering/..", "/v1/models/%ff", "/v1/models/a%2fb", "//", "/v1//models"]
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"):
        for path in [*paths, *BODIES, "/", "/health", "/metrics", "/openapi.json"]:
            answers.send(method, path)
            answers.send(method, path, headers={"Content-Type": "multipart/form-data"}, content=b"\xff\0")
    for headers in (
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "x"},
        {"Accept": "x"},
    ):
        answers.send("POST", "/v1/completions", headers=headers, content=b'{"prompt": "a", "max_tokens": 1}')
    for name in ("", "a/b", "\0", "x" * 5000):
        answers.send("POST", "/v1/steering", params={"name": name, "replace": "maybe"}, content=b"x")
    assert answers.bad == []
