"""Finds tool calls in the text of a reply.

Chat templates teach models several ways to write a call; these are recognised:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Hermes, Qwen, Granite
    <function=NAME>{...}</function>, <parameter=KEY>VALUE</parameter>  Llama 3.1 functions, Qwen coder
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]                   Mistral
    {"name": ..., "parameters": {...}}, bare or in a list              Llama 3.x
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .jsonable import JsonObject

MARKS = ("<tool_call>", "<function=", "[TOOL_CALLS]", "<|python_tag|>")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON, as OpenAI's clients expect it

    def document(self) -> JsonObject:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def loaded(arguments: str | JsonObject) -> Any:
    """Templates write them with tojson: a text would be quoted twice."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def calls_in(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """Split a reply into its text and its tool calls; a call to a tool of another name stays text.

    Runs in time linear in the text, because whoever writes the prompt controls what the model writes.
    """
    calls, rest = _found(text)
    if not calls or any(call.name not in names for call in calls):
        return text, []
    return rest.strip(), calls


def _found(text: str) -> tuple[list[Call], str]:
    if text.lstrip().startswith(("{", "[")) and _is_json(text):
        return _json_calls(text), ""  # a mark inside a JSON text is no mark
    if "<tool_call>" in text:
        bodies, rest = _between(text, "<tool_call>", "</tool_call>")
        return [call for body in bodies for call in _body_calls(body.strip())], rest
    if "<function=" in text:
        return _functions(text), _between(text, "<function=", "</function>")[1]
    for mark in MARKS:
        text = text.replace(mark, "", 1) if text.lstrip().startswith(mark) else text
    return _json_calls(text), ""


def _between(text: str, start: str, end: str) -> tuple[list[str], str]:
    """What stands between marks, the last one closed or not; and the text without any of it."""
    bodies, rest, at = [], [], 0
    while (begin := text.find(start, at)) >= 0:
        rest.append(text[at:begin])
        stop = text.find(end, begin + len(start))
        bodies.append(text[begin + len(start) : stop if stop >= 0 else None])
        at = stop + len(end) if stop >= 0 else len(text)
    return bodies, "".join([*rest, text[at:]])


def _body_calls(body: str) -> list[Call]:
    return _functions(body) or _json_calls(body)


def _functions(text: str) -> list[Call]:
    calls = []
    for body in _between(text, "<function=", "</function>")[0]:
        name, closed, rest = body.partition(">")
        if closed and _NAME.fullmatch(name):
            calls.append(Call(name, _arguments(rest.strip())))
    return calls


def _arguments(body: str) -> str:
    arguments = {}
    for part in _between(body, "<parameter=", "</parameter>")[0]:
        name, closed, value = part.partition(">")
        if closed and _NAME.fullmatch(name):
            arguments[name] = loaded(value.removeprefix("\n").removesuffix("\n"))
    if not arguments:
        return body if _is_json(body) else "{}"
    return json.dumps(arguments, ensure_ascii=False)


def _json_calls(text: str) -> list[Call]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in document if isinstance(document, list) else [document]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters"))
        if not isinstance(arguments, (dict, str)):
            return []
        calls.append(Call(item["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    return calls


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class CallHold:
    """Lets a streamed reply's text through as long as no call can have begun in it; keeps the rest."""

    def __init__(self) -> None:
        self._held: list[str] = []  # joined when it is looked at: a long reply comes in many pieces
        self._calling = False
        self._begun = False

    def push(self, text: str) -> str:
        """Take the next piece of the reply; return the part that is certain to be text."""
        self._held.append(text)
        if self._calling:
            return ""
        if not self._begun:
            if not text or text.isspace():  # as all before it: nothing to see yet
                return ""
            if text.lstrip()[0] in "{[":
                self._calling = True
                return ""
        self._begun = True
        held = "".join(self._held)
        cut = min((at for at in map(held.find, MARKS) if at >= 0), default=-1)
        self._calling = cut >= 0
        if cut < 0:
            cut = len(held) - _possible_mark(held)
        self._held = [held[cut:]]
        return held[:cut]

    def rest(self) -> str:
        """What is still held when the reply ends."""
        held, self._held = "".join(self._held), []
        return held


def _possible_mark(text: str) -> int:
    """Length of the longest suffix of the text that may be the beginning of a mark."""
    for n in range(min(max(map(len, MARKS)) - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in MARKS):
            return n
    return 0
