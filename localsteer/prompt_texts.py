"""Texts that a model reads: a prompt, through its chat template or raw, and perhaps a forced reply.

PromptText("Tell me about foxes.").render(template)
PromptText("Is it safe?", reply="No.").render(template)      # the reply follows the generation prompt
read_prompts("prompts.jsonl")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PromptError
from .jsonable import JsonObject
from .templates import ChatTemplate, Message

JSONL = (".jsonl", ".ndjson")
PROMPT_KEYS = ("prompt", "messages")


@dataclass(frozen=True, eq=False)
class PromptText:
    """prompt: a question or messages; with `raw` one text, sent as it is. reply: teacher-forced, after the
    generation prompt. A last message from the assistant is a reply too. label: for error messages."""

    prompt: str | Sequence[Message]
    reply: str = ""
    raw: bool = False
    label: str = "the prompt"

    @property
    def forced(self) -> str:
        """The forced reply that ends the text; empty if there is none."""
        return self.reply or ("" if isinstance(self.prompt, str) else _last_reply(self.prompt))

    def render(self, template: ChatTemplate) -> str:
        """The text as the model reads it. Raises PromptError, ModelFileError."""
        if self.raw:
            if not isinstance(self.prompt, str):
                raise PromptError("a raw prompt is one text: messages need the chat template")
            return self.prompt + self.reply
        messages = self.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        elif not self.reply and _last_reply(messages):
            messages = messages[:-1]
        return template.render(messages) + self.forced


def _last_reply(messages: Sequence[Message]) -> str:
    last = messages[-1] if len(messages) else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    return content if isinstance(content, str) else ""


def read_prompts(path: str | Path, *, raw: bool = False) -> list[PromptText]:
    """Read prompts: one per line, without blank lines; or JSONL, recognised by its name or its first line,
    with {"prompt": text} or {"messages": [...]}, and {"reply": text} if the model is to read one.

    Raises PromptError, which names the line, for what can't be read.
    """
    content = read_lines(path)
    first = next((line for _, line in content), "")
    if Path(path).suffix.lower() in JSONL or _is_record(first):
        texts = [_of_record(record, raw, where) for where, record in records(path, content)]
    else:
        texts = [PromptText(line, raw=raw, label=f"{path}, line {number}") for number, line in content]
    if not texts:
        raise PromptError(f"{path} holds no prompt: write one per line.")
    return texts


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(number, line) for each line that is not blank. Raises PromptError."""
    try:
        # not splitlines: a line separator inside a JSON text does not end its line
        lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise PromptError(f"{path} can't be read: {error.strerror or error}.") from None
    except ValueError as error:  # also UnicodeDecodeError, and a NUL in the name
        at = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise PromptError(f"{path} is not UTF-8 text{at}.") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def records(path: str | Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, JsonObject]]:
    """(where, object) for each line of a JSONL file. Raises PromptError."""
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise PromptError(f'{where} is not a JSON object like {{"prompt": "..."}}: {line.strip()!r:.60}.')
        yield where, record


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(key in record for key in PROMPT_KEYS)


def _of_record(record: Mapping[str, Any], raw: bool, where: str) -> PromptText:
    named = [key for key in PROMPT_KEYS if record.get(key) is not None]
    if len(named) != 1:
        what = "both prompt and messages" if named else "neither prompt nor messages"
        raise PromptError(f"{where} has {what}: write exactly one of them.")
    text = PromptText(text_or_messages(record[named[0]], where), raw=raw, label=where)
    reply = record.get("reply")
    if reply is None:
        return text
    return PromptText(text.prompt, filled_text(reply, "reply", where), raw, where)


def text_or_messages(value: Any, where: str) -> str | list[Message]:
    """A prompt from a user's file, checked as far as that is possible without a template. Raises
    PromptError."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    if isinstance(value, list):
        raise PromptError(f"{where}: messages must be a list of {{'role': ..., 'content': text}}.")
    return filled_text(value, "the prompt", where)


def filled_text(value: Any, what: str, where: str) -> str:
    """The text. Raises PromptError for a value that is not a text, or is empty."""
    if not isinstance(value, str):
        raise PromptError(f"{where}: {what} must be a text, not {value!r:.60}.")
    if not value.strip():
        raise PromptError(f"{where}: {what} is empty.")
    return value
