"""Random schemas, templates and requests for fuzz.py: each `try_` makes one and says what came of it."""

from __future__ import annotations

import copy
import json
import random
import time
import warnings
from contextlib import ExitStack
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SLOW = 6.0  # seconds for one input: longer is a failure
TEMPLATE_SECONDS = 1.0  # of rendering; 5 elsewhere
N_TOKENS = 400  # that are drawn under one schema
VALUES = (
    None, True, False, 0, -1, 1, 2.5, 1e20, -(2**63), 10**30, "", "a", "\x00", "#", "#/$defs/A", "é🙂", "^a+$",
    r"^(\d+\.?)*$", "(?!x)", "(a|b)*?", r"\S{3,}", "date", "integer", "null", [], {}, [[]], [{}], {"type": "string"},
)  # fmt: skip
KEYWORDS = (
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "pattern", "minLength", "maxLength",
    "minimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "additionalProperties", "anyOf", "oneOf",
    "allOf", "not", "$ref", "$defs", "format", "if", "then", "patternProperties", "uniqueItems", "contains",
    "dependentRequired", "unevaluatedProperties", "propertyNames", "minProperties", "x-guidance", "title", "$id",
    "$anchor", "$dynamicRef", "description", "default", "nullable",
)  # fmt: skip
ENDS = (
    "é", "\x00", "$", "*", "(", "\\", "x" * 3000, "{2,1}", "[b-a]", r"\8", r"\c", "(?", r"\p{Nope}", "{,3}", "++", "|", "^",
    r"\b", "[", "]", "(?i)a", "(?<n>a)", "{3", "[^]", "&&[a]", r"\/", "/", "\n",
)  # fmt: skip
# every byte, some longer tokens, and an end
PIECES = [*(bytes([i]) for i in range(256)), b'{"', b'": "', b'", "', b"]}", b"true", b"  ", b"ab", b""]
TEMPLATE_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if loop.first %}",
    "{% else %}", "{% endif %}", "{{ bos_token }}", "{{ raise_exception('no') }}", "{% set ns = namespace(x=0) %}",
    "{% set ns.x = ns.x + 1 %}", "{{ ns }}", "{{ 'a' * 10**9 }}", "{{ messages[99].content }}", "{{ 1 / 0 }}",
    "{{ m.content | tojson }}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{{ range(10**8) | list }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ strftime_now('%Y') }}",
    "{% generation %}", "{% endgeneration %}", "{{ tools | length }}", "{% for i in range(99999) %}", "{%", "}}", "{#",
    "<|im_start|>", "\x00", "\ud800", "é🙂", "{{ m.content.split('x')[5] }}", "{{ messages | map('upper') | join }}",
    "{% break %}", "{{ lipsum(n=3) }}", "{{ cycler('a', 'b').next() }}", "{{ messages.append(1) }}", "{{ self }}",
)  # fmt: skip
FIELDS: dict[str, tuple[Any, ...]] = {  # with values that are taken somewhere
    "model": ("bundled", None), "stream": (True, False), "n": (1, 2), "stop": ("a", ["x", "y"], None),
    "seed": (0, -1, 2**40), "max_tokens": (1, 5, 0), "temperature": (0, 0.5, 2), "top_p": (0, 0.5, 1),
    "top_k": (0, 1, 40), "min_p": (0, 1), "logit_bias": ({"5": -100}, [["fox", False]], {}), "logprobs": (True, 1, 0),
    "top_logprobs": (1,), "response_format": ({"type": "json_object"}, {"type": "text"}), "tool_choice": ("none",),
    "tools": ([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], []),
    "steering": ([], None), "ensure": ([],), "stream_options": ({"include_usage": True},), "echo": (True, False),
    "suffix": ("", "b"), "grammar": ('root ::= "a" | "b"',), "json_schema": ({"type": "integer"},),
    "guided_regex": ("a|b", "[0-9]{2}"), "guided_choice": (["a", "b"],), "structured_outputs": ({"regex": "ab?"},),
    "chat_template_kwargs": ({}, {"enable_thinking": False}), "repeat_penalty": (1, 1.3), "presence_penalty": (1, -2),
    "continue_final_message": (False,), "encoding_format": ("base64", "float"), "always_steer": (True,),
    "user": ("a",), "metadata": ({"a": "b"},), "mirostat": (0, 2), "nobody_knows": (None, 1), "prompt": ("a", [5, 6]),
    "messages": ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],), "input": ("a", [5]),
}  # fmt: skip
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/completions",
    "/v1/trace",
    "/v1/steering",
)
REQUESTS = (
    {"messages": [{"role": "user", "content": "Tell me about foxes."}], "max_tokens": 4},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_tokens": 3,
        "stream": True,
    },
    {"prompt": "The fox", "max_tokens": 3, "logprobs": 2, "echo": True},
    {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "temperature": 1.0},
    {"input": ["a", "b"]},
)


_TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "required": ["a"]}}
_SAY = [{"role": "user", "content": "Hi."}]
FACES: dict[str, dict[str, Any]] = {  # whole requests of the other APIs, which are damaged
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                  {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "5"}, *_SAY],
        "instructions": "s", "max_output_tokens": 3, "tools": [{"type": "function", "strict": True, **_TOOL}],
        "tool_choice": "auto", "text": {"format": {"type": "text"}}, "include": [], "top_logprobs": 1,
        "metadata": {"a": "b"}, "stream": False, "temperature": 0.5,
    },
    "/v1/messages": {
        "messages": [*_SAY, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "5"}]}, *_SAY],
        "system": [{"type": "text", "text": "s"}], "max_tokens": 3, "stop_sequences": ["x"], "top_k": 5,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"}, "output_config": {"effort": "high"}, "stream": False,
    },
    "/api/chat": {
        "messages": [*_SAY, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                     {"role": "tool", "tool_name": "f", "content": "5"}, *_SAY],
        "options": {"num_predict": 3, "stop": ["x"], "temperature": 0.5, "seed": 1, "mirostat": 0},
        "tools": [{"type": "function", "function": _TOOL}], "think": False, "logprobs": True, "stream": False,
    },
    "/api/generate": {
        "prompt": "a", "system": "s", "options": {"num_predict": 3, "top_k": 5}, "raw": False, "images": [],
        "context": [], "stream": False, "keep_alive": "5m", "steering": [], "format": "",
    },
}  # fmt: skip


# -- schemas ------------------------------------------------------------------------------------------------


@cache
def _cases() -> list[Any]:
    from schema_corpus import CASES

    return [schema for _, schema, _ in CASES]


def changed(document: Any, draw: random.Random) -> Any:
    """A copy with one change somewhere inside."""
    if isinstance(document, dict) and document and draw.random() < 0.8:
        key = draw.choice(list(document))
        return document | {key: changed(document[key], draw)}
    if isinstance(document, list) and document and draw.random() < 0.8:
        k = draw.randrange(len(document))
        return [*document[:k], changed(document[k], draw), *document[k + 1 :]]
    way = draw.randrange(5)
    if way == 0 and isinstance(document, dict):
        return document | {draw.choice(KEYWORDS): copy.deepcopy(draw.choice((*VALUES, document)))}
    if way == 1:
        return {draw.choice(("anyOf", "allOf", "oneOf")): [document, draw.choice((*VALUES, document))]}
    if way == 2:
        return [document] * draw.choice((0, 1, 2, 50))
    if way == 3 and isinstance(document, str):
        return document + draw.choice(ENDS)
    return copy.deepcopy(draw.choice(VALUES))


def try_schema(path: Path, draw: random.Random) -> str:
    """What is taken is kept: a document that was drawn to its end is valid by jsonschema."""
    import jsonschema

    from localsteer.constrain import Constraint

    schema = draw.choice(_cases())
    for _ in range(draw.choice((1, 1, 2, 3))):
        schema = changed(schema, draw)
    path.write_text(json.dumps(schema), "utf-8")  # left behind after a failure
    started = time.monotonic()
    matcher = _tokens().matcher(Constraint.json_schema(schema))
    text = _drawn(matcher, draw)
    _check_time(started)
    if text is None:
        return "unfinished"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError:
            return "taken"  # a list of `items` as in draft 7, an `$id` that is no text: nobody can say more
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text)))
        errors = [error for error in errors if not _is_multiple(error)]
    if errors:
        raise AssertionError(f"{text!r} is not valid: {errors[0].message}")
    return "valid"


def _is_multiple(error: Any) -> bool:
    """jsonschema divides in binary, where 4214.74 is no multiple of 0.01."""
    if error.validator != "multipleOf":
        return False
    return Decimal(repr(error.instance)) % Decimal(repr(error.validator_value)) == 0


@cache
def _tokens() -> Any:
    from localsteer.constrain import TokenBytes

    return TokenBytes(PIECES, [len(PIECES) - 1])


def _drawn(matcher: Any, draw: random.Random) -> str | None:
    """Bytes drawn from what is allowed, those that close something first; None for no end."""
    end, text = len(PIECES) - 1, b""
    for n in range(N_TOKENS):
        if matcher.must_end:
            return text.decode()
        allowed = np.flatnonzero(np.isfinite(matcher.mask(np.zeros(len(PIECES), np.float32))))
        closing = [token for token in allowed if token == end or PIECES[token] in (b'"', b"}", b"]")]
        token = int(draw.choice(closing if closing and n > N_TOKENS // 8 else allowed))
        if token == end:
            return text.decode()
        matcher.accept(token)
        text += PIECES[token]
    return None


# -- templates ----------------------------------------------------------------------------------------------


def try_template(path: Path, draw: random.Random) -> str:
    from localsteer import rendering
    from localsteer.templates import ChatTemplate

    rendering.SECONDS = TEMPLATE_SECONDS
    template = "".join(draw.choices(TEMPLATE_PIECES, k=draw.randrange(1, 9)))
    path.write_text(template, "utf-8", errors="surrogatepass")
    messages = [
        {"role": draw.choice(("user", "system", "x")), "content": draw.choice(("a", "", "é\x00" * 50))}
    ]
    started = time.monotonic()
    try:
        made = ChatTemplate(template)
        text = made.render(messages * draw.choice((1, 2)))
    finally:
        _check_time(started)
    return "rendered" if isinstance(text, str) else "odd"


# -- requests -----------------------------------------------------------------------------------------------


_running = ExitStack()


@cache
def _http() -> Any:
    from serving import serving

    server = _running.enter_context(serving(None, engine={"n_seq_max": 4, "n_ctx": 256}))
    return _running.enter_context(server.http())


def close() -> None:
    """End the server, if there is one."""
    _running.close()


def try_request(path: Path, draw: random.Random) -> str:
    """Answered within its time, by 2xx or 4xx; after a refusal the server still answers."""
    body: Any = copy.deepcopy(draw.choice(REQUESTS))
    for _ in range(draw.choice((1, 1, 2, 4))):
        field, odd = draw.choice([*FIELDS]), draw.choice((*VALUES, *_cases()[:9], 1e9, "x" * 600))
        if draw.random() < 0.7:
            body = body | {field: odd if draw.random() < 0.2 else draw.choice(FIELDS[field])}
        else:
            body = changed(body, draw)
        if not isinstance(body, dict):
            break
    where, content = _path_for(body, draw), json.dumps(body).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(content))
        content = content[:at] + draw.choice((b"", b"\xff", b'"', b"[" * 99, b"\x00")) + content[at + 1 :]
    path.write_bytes(where.encode() + b"\n" + content)
    started = time.monotonic()
    answer = _http().post(where, content=content, headers={"Content-Type": "application/json"})
    _check_time(started)
    if answer.status_code >= 500:
        raise AssertionError(f"{answer.status_code} {answer.text[:300]}")
    if answer.status_code >= 400 and "\n" in answer.json()["error"]["message"]:
        raise AssertionError(f"not one line: {answer.text[:300]}")
    if _http().get("/health").status_code != 200:
        raise AssertionError("/health does not answer")
    return f"{answer.status_code // 100}xx"


def try_face(path: Path, draw: random.Random) -> str:
    """The same of the other APIs, each with errors in its own shape."""
    where, whole = draw.choice([*FACES.items()])
    needed = (  # without them nothing else would be looked at
        "input",
        "messages",
        "prompt",
        "options",
        "max_tokens",
        "max_output_tokens",
    )
    kept = {key: whole[key] for key in whole if key in needed or draw.random() < 0.5}
    body = {key: copy.deepcopy(value) for key, value in kept.items()}
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice([*body])
        body[key] = changed(body[key], draw)
    content = json.dumps(body).encode()
    path.write_bytes(where.encode() + b"\n" + content)
    started = time.monotonic()
    answer = _http().post(where, content=content, headers={"Content-Type": "application/json"})
    if answer.status_code >= 500:
        raise AssertionError(f"{answer.status_code} {answer.text[:300]}")
    if answer.status_code >= 400:
        _check_time(started)
        error = answer.json()["error"]
        message = error if where.startswith("/api") else error["message"]
        if not isinstance(message, str) or "\n" in message:
            raise AssertionError(f"not one line: {answer.text[:300]}")
    return f"{answer.status_code // 100}xx"


def _path_for(body: Any, draw: random.Random) -> str:
    if draw.random() < 0.1 or not isinstance(body, dict):
        return draw.choice(PATHS)
    if "messages" in body:
        return "/v1/chat/completions"
    return "/v1/completions" if "prompt" in body else "/v1/embeddings"


def _check_time(started: float) -> None:
    seconds = time.monotonic() - started
    if seconds > SLOW:
        raise AssertionError(f"took {seconds:.1f} s")
