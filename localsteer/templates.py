"""From messages to the text that a model reads. Both PyTorch and llama.cpp use this, so that they agree.

A chat template is a program from the model's file: it runs in jinja2's immutable sandbox, with the few
functions that transformers gives it (transformers, utils/chat_template_utils.py), and under limits of time,
memory and length in a separate process (rendering.py).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from .errors import LocalsteerError, ModelFileError, PromptError
from .jsonable import JsonObject
from .rendering import RENDERER, RenderingFailed
from .rendering_child import one_line as one_line

Message = Mapping[str, Any]

# How the paper prompts a base model. Its hash names this format in a vector's provenance.
FALLBACK = "Q: {question}\nA:"
# A base model continues with another question, or answers again. The first two also take a blank line before.
NEXT_TURN = ("\n\nQ:", "\n\nA:", "\nQ:", "\nA:")
NO_TEMPLATE = (
    "{} has no chat template (a base model?): prompts are sent as `Q: ...` and `A:`, and a reply ends before "
    "the next of them."
)
DROPS_WORDS = (
    "{} has a chat template that leaves out what the user says, so the model would never read it: send a raw "
    "prompt (run --raw), or use another model."
)
# What a template is tried on: letters and single blanks, which no quoting or trimming changes
SAID = "wild geese above a quiet harbour"
RETRY_SECONDS = 60.0
ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """A model's chat template. Render once, tokenise once: if the template writes BOS, a second must not be
    added.

    template: the model's jinja text, or None for the plain `Q: ...` / `A:` of the paper. bos, eos: the texts
    of these tokens, "" if the model has none. The template is parsed at the first `render`, so a model whose
    template is broken still answers raw prompts.

    tool_use: a second template of the file, for conversations with tools. variables: passed to the template
    beside the messages, unless a call has others of the same name: `{"enable_thinking": False}`.
    """

    RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")

    def __init__(
        self, template: str | None, bos: str = "", eos: str = "", *, tool_use: str | None = None
    ) -> None:
        self.template = template or None
        self.bos = bos
        self.eos = eos
        self.variables: JsonObject = {}
        self.system: str | None = None
        self.own_stop: tuple[str, ...] = ()
        self._refusal: LocalsteerError | None = None
        self._refused_until = 0.0
        self._for_tools = ChatTemplate(tool_use, bos, eos) if tool_use else None

    @property
    def is_fallback(self) -> bool:
        return self.template is None

    @property
    def template_hash(self) -> str:
        """sha256 of the template's text. Vectors record it, because another template makes other prompts."""
        return hashlib.sha256((self.template or FALLBACK).encode("utf-8", "replace")).hexdigest()

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings that end a reply with its turn. A real template needs none: its model ends the
        turn."""
        return (NEXT_TURN if self.is_fallback else ()) + self.own_stop

    @cached_property
    def keeps_words(self) -> bool:
        """Whether the user's words reach the prompt. A template that refuses the trial message says why in
        `render`, so it counts as keeping them."""
        try:
            return self._keeps(SAID) is not False or self.reads_parts
        except LocalsteerError:
            return True

    def _keeps(self, content: str | list[dict[str, str]]) -> bool | None:
        """Whether these words of a user reach the prompt; None if the template refuses them.

        Raises if the template can't be read or gave no answer, which must not be taken for a refusal. One
        that exceeds its limits even here is not run again for a while: it would keep those of other models
        waiting.
        """
        if self.is_fallback:
            return True
        try:
            rendered = self._render([{"role": "user", "content": content}], True, None, self.variables)
        except ModelFileError as error:
            self._put_off(error)
            raise
        except PromptError as error:
            failure = error.__cause__
            if not isinstance(failure, RenderingFailed) or (failure.was_run and not failure.was_killed):
                return None
            if failure.was_killed:
                self._put_off(error)
            raise
        return _plain_words(SAID) in _plain_words(rendered)

    def _put_off(self, refusal: LocalsteerError) -> None:
        """Answer with this refusal instead of running the template, until RETRY_SECONDS have passed: it may
        have been the machine that was too busy."""
        self._refusal, self._refused_until = refusal, time.monotonic() + RETRY_SECONDS

    @property
    def takes_tools(self) -> bool:
        """Whether the template shows tools to the model, judging by its text."""
        return self._for_tools is not None or self._names("tools")

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template reads content only as a list of parts, so that a plain text would be lost."""
        return not self._keeps(SAID) and bool(self._keeps([{"type": "text", "text": SAID}]))

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        """Raise PromptError for a variable that localsteer sets itself, or that the template never reads."""
        for name in variables:
            if name in self.RESERVED:
                raise PromptError(f"the variable {name!r:.80} of the chat template is set by other means.")
            if not self._names(name) and not (self._for_tools and self._for_tools._names(name)):
                raise PromptError(
                    f"the model's chat template reads no variable {name!r:.80}: it would change nothing."
                )

    def _names(self, variable: str) -> bool:
        return bool(self.template and re.search(rf"\b{re.escape(variable)}\b", self.template))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. tools: JSON schemas as transformers takes them; `takes_tools` must hold.
        variables: see the class.

        Raises PromptError, ModelFileError for a template that isn't valid jinja.
        """
        variables = self.variables | dict(variables or {})
        messages = self._with_system(messages)
        if self._for_tools and (tools or any(map(_is_of_tools, messages))):
            return self._for_tools.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
            )
        if tools and not self.takes_tools:
            raise PromptError("the model's chat template has no tools: leave them out, or use another model.")
        check_messages(messages, with_tools=self.takes_tools)
        if self.is_fallback:
            return render_fallback(messages, add_generation_prompt)
        if self.reads_parts:
            messages = [_in_parts(message) for message in messages]
        return self._render(messages, add_generation_prompt, tools, variables)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the words of a system message come out, rather than an error or nothing."""
        if self.is_fallback:
            return True
        messages = [{"role": "system", "content": SAID}, {"role": "user", "content": "?"}]
        try:
            return _plain_words(SAID) in _plain_words(self._render(messages, True, None, self.variables))
        except LocalsteerError:
            return False

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with the model's own system message, if it has one and the conversation has none."""
        if not self.system or not messages or not all(isinstance(message, Mapping) for message in messages):
            return messages
        if any(message.get("role") == "system" for message in messages):
            return messages
        if self.takes_system:
            return [{"role": "system", "content": self.system}, *messages]
        first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), None)
        if first is None or not isinstance(messages[first].get("content"), str):
            return messages
        told = {**messages[first], "content": f"{self.system}\n\n{messages[first]['content']}"}
        return [*messages[:first], told, *messages[first + 1 :]]

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        values = {
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": list(tools) if tools else None,
            "documents": None,
        }
        if self._refusal is not None and time.monotonic() < self._refused_until:
            raise type(self._refusal)(str(self._refusal)) from self._refusal.__cause__
        try:
            return RENDERER.render(self.template, values)
        except RenderingFailed as error:
            if error.is_template:
                raise ModelFileError(
                    f"the model's chat template can't be read ({error}): send a raw prompt instead."
                ) from error
            raise PromptError(
                f"the model's chat template refuses these messages ({error}): "
                "change the messages, or send a raw prompt."
            ) from error

    def adds_special(self, rendered: str) -> bool:
        """Whether tokenising `rendered` should add special tokens: not if it already begins with BOS."""
        return not (self.bos and rendered.startswith(self.bos))


def check_messages(messages: Sequence[Message], *, with_tools: bool = False) -> None:
    """Raise PromptError unless every message has a known role and a text, and at least one is not empty.

    with_tools: the role `tool` is known too, and a message that calls tools needs no text.
    """
    if not messages:
        raise PromptError("the prompt is empty: it needs a question, or at least one message.")
    for message in messages:
        if with_tools and isinstance(message, Mapping) and _calls_tools(message):
            continue
        if not with_tools and _is_of_tools(message):
            raise PromptError(
                "the model's chat template does not support tools, so their calls and results "
                "can't be shown: leave these messages out, or use another model."
            )
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise PromptError(f"a message must be {{'role': ..., 'content': text}}, not {message!r:.80}.")
        roles = (*ROLES, "tool") if with_tools else ROLES
        if message.get("role") not in roles:
            raise PromptError(f"unknown role {message.get('role')!r}: choose one of {', '.join(roles)}.")
    if not any((message.get("content") or "").strip() for message in messages):
        raise PromptError("the prompt is empty: it needs a question.")


def _is_of_tools(message: Message) -> bool:
    return isinstance(message, Mapping) and (message.get("role") == "tool" or bool(message.get("tool_calls")))


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


def _calls_tools(message: Message) -> bool:
    text = message.get("content")
    return bool(message.get("role") == "assistant" and message.get("tool_calls")) and (
        text is None or isinstance(text, str)
    )


def render_fallback(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """`Q: ...` and `A: ...` in turn; a system message comes first, without a mark."""
    leads = {"system": "", "user": "Q: ", "assistant": "A: "}
    turns = [leads[message["role"]] + message["content"] for message in messages]
    text = ""
    for turn, message in zip(turns, messages, strict=True):
        text += turn + ("\n" if message["role"] == "user" else "\n\n")
    return text + "A:" if add_generation_prompt else text.rstrip("\n")


def _plain_words(text: str) -> str:
    """The text without what a template may well change: capitals and white space."""
    return " ".join(text.casefold().split())
