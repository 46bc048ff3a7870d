"""The four APIs as their own packages ask them: the same question, the text of the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import anthropic
import ollama
import openai
from serving import FOXES, Server

GREEDY = {"temperature": 0}
N = 60  # tokens of a reply


@dataclass
class Face:
    """name: of the API; client: of its package."""

    name: str
    server: Server
    key: str = "none"

    def text(self, model: str = "bundled", n: int = N, **extra: Any) -> str:
        return getattr(self, f"_{self.name}")(model, n, False, GREEDY | extra)

    def streamed(self, model: str = "bundled", n: int = N, **extra: Any) -> str:
        """Of all pieces."""
        return "".join(self.pieces(model, n, **extra))

    def pieces(self, model: str = "bundled", n: int = N, **extra: Any) -> Any:
        return getattr(self, f"_{self.name}")(model, n, True, GREEDY | extra)

    # -- chat completions -----------------------------------------------------------------------------------

    def openai(self) -> openai.OpenAI:
        return self.server.client(api_key=self.key)

    def _chat(self, model, n, stream, extra):
        create = self.openai().chat.completions.create
        made = create(model=model, messages=FOXES, max_tokens=n, stream=stream, extra_body=extra)
        if stream:
            return (c.choices[0].delta.content or "" for c in made if c.choices)
        return made.choices[0].message.content

    def _responses(self, model, n, stream, extra):
        create = self.openai().responses.create
        made = create(
            model=model, input=FOXES[0]["content"], max_output_tokens=n, stream=stream, extra_body=extra
        )
        if stream:
            return self._deltas(made)
        return made.output_text

    @staticmethod
    def _deltas(events):
        for event in events:
            if event.type == "error":
                raise openai.OpenAIError(event.message)
            if event.type == "response.output_text.delta":
                yield event.delta

    # -- Anthropic ------------------------------------------------------------------------------------------

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.server.url, api_key=self.key, max_retries=0)

    def _messages(self, model, n, stream, extra):
        create = self.anthropic().messages.create
        made = create(model=model, messages=FOXES, max_tokens=n, stream=stream, extra_body=extra)
        if stream:
            return (
                e.delta.text for e in made if e.type == "content_block_delta" and e.delta.type == "text_delta"
            )
        return "".join(block.text for block in made.content)

    # -- Ollama ---------------------------------------------------------------------------------------------

    def ollama(self) -> ollama.Client:
        return ollama.Client(
            self.server.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False
        )

    def _ollama_chat(self, model, n, stream, extra):
        """It has no way to send fields of others': all of them go into its options."""
        made = self.ollama().chat(model, FOXES, stream=stream, options={"num_predict": n, **extra})
        if stream:
            return (part.message.content for part in made)
        return made.message.content

    def _ollama_generate(self, model, n, stream, extra):
        made = self.ollama().generate(
            model, FOXES[0]["content"], stream=stream, options={"num_predict": n, **extra}
        )
        if stream:
            return (part.response for part in made)
        return made.response


NAMES = ("chat", "responses", "messages", "ollama_chat", "ollama_generate")
# how each package says that the server refused
ERRORS = (openai.OpenAIError, anthropic.AnthropicError, ollama.ResponseError)
PATHS = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "ollama_chat": "/api/chat",
    "ollama_generate": "/api/generate",
}
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": FOXES, "max_tokens": 4},
    "responses": {"input": "Hi.", "max_output_tokens": 4},
    "messages": {"messages": FOXES, "max_tokens": 4},
    "ollama_chat": {"messages": FOXES, "options": {"num_predict": 4}, "stream": False},
    "ollama_generate": {"prompt": "Hi.", "options": {"num_predict": 4}, "stream": False},
}


def with_question(name: str, text: str) -> dict[str, Any]:
    """A body that asks this."""
    fields = {"responses": "input", "ollama_generate": "prompt"}
    if name in fields:
        return BODIES[name] | {fields[name]: text}
    return BODIES[name] | {"messages": [{"role": "user", "content": text}]}


def said_in(name: str, document: dict[str, Any]) -> str:
    """The text of an answer."""
    if name == "chat":
        return document["choices"][0]["message"]["content"]
    if name == "responses":
        return document["output"][0]["content"][0]["text"]
    if name == "messages":
        return document["content"][0]["text"]
    return document["message"]["content"] if name == "ollama_chat" else document["response"]


def message_of(name: str, document: dict[str, Any]) -> str:
    """The text of an error, in that API's own shape, which is checked."""
    if name.startswith("ollama"):
        assert set(document) == {"error"}
        return document["error"]
    if name == "messages":
        assert document["type"] == "error" and set(document["error"]) == {"type", "message"}
        return document["error"]["message"]
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]["message"]


def streamed_error(name: str, lines: list[str]) -> str:
    """The text of the error that ends a stream."""
    last = next(line for line in reversed(lines) if line)
    document = json.loads(last.removeprefix("data: "))
    if name != "responses":
        if name == "messages":
            assert "event: error" in lines
        return message_of(name, document)
    assert "event: error" in lines and document["type"] == "error"
    assert document["sequence_number"] == sum(line.startswith("event: ") for line in lines) - 1
    return document["message"]
