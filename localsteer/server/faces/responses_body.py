"""What a request of OpenAI's Responses API may hold, and the ChatRequest that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StrictBool, field_validator, model_validator

from ...jsonable import JsonObject
from .. import limits
from ..errors import ApiError, shown
from ..fields import Rules
from ..schemas import (
    Body,
    ChatMessage,
    ChatRequest,
    ClosedPart,
    ContentPart,
    MostTokens,
    SteeredBody,
    StreamOptions,
    Text,
    without,
)

Parts = Annotated[list[ContentPart], Field(fail_fast=True, max_length=1000)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Id = Annotated[str, Field(max_length=256)]

RULES = Rules(
    harmless={
        "they say who asks and what to store, and nothing is stored here": (
            "user", "store", "safety_identifier", "service_tier", "prompt_cache_key",
            "prompt_cache_options", "prompt_cache_retention", "client_metadata",
        ),
        "it concerns tools that run at OpenAI, which are refused": ("max_tool_calls",),
    },
    neutral={
        "access_programs": (), "background": (False,), "background_options": (), "context_management": (),
        "image": (), "moderation": (), "prompt": (), "truncation": ("disabled",),
    },
)  # fmt: skip
KEPT_NOWHERE = "nothing is stored here: send the whole conversation in `input`"
# of an item: what OpenAI's answers have beside what was said
UNREAD = ("annotations", "caller", "id", "logprobs", "namespace", "phase", "status")
READ = ("message", "function_call", "function_call_output", "reasoning")


class InputItem(Body):
    """An item: a message, a call, the result of a call, or reasoning, which is left out."""

    model_config = ConfigDict(extra="forbid")

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | Parts | None = None
    call_id: Id | None = None
    name: FunctionName | None = None
    arguments: Text | None = None
    output: Text | Parts | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type", "message") not in READ[:3]:
            return {"type": value["type"]}  # has fields of its own
        return without(value, UNREAD)

    @model_validator(mode="after")
    def _whole(self) -> InputItem:
        if self.type not in READ:
            raise ValueError(
                f"only items of the types {', '.join(READ)} are supported, not {self.type!r:.40}"
            )
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for field in needed.get(self.type, ()):
            if getattr(self, field) is None and field != "content":
                raise ValueError(f"an item of the type {self.type} needs {field}")
        return self

    @property
    def text(self) -> str:
        """Of the message, or of what the call gave."""
        held = self.output if self.type == "function_call_output" else self.content
        return held if isinstance(held, str) else "".join(part.text or "" for part in held or ())


class ResponsesTool(ClosedPart):
    type: str
    name: FunctionName | None = None
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _function(self) -> ResponsesTool:
        if self.type != "function":
            raise ValueError(f"only tools of type function are supported, not {self.type!r:.40}")
        if self.name is None:
            raise ValueError("a function needs a name")
        return self


class NamedFunction(ClosedPart):
    type: Literal["function"] = "function"
    name: Annotated[str, Field(max_length=64)]


class AllowedTools(ClosedPart):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=limits.MAX_TOOLS)]


class TextFormat(ClosedPart):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=256)] | None = None
    schema_: JsonObject | StrictBool | None = Field(None, alias="schema")
    strict: bool | None = None
    description: Text | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("type json_schema needs schema")
        return self


class TextConfig(Body):
    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(ClosedPart):
    """Settings of reasoning, which is part of the text here."""

    UNREAD = ("generate_summary", "summary")

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponsesRequest(SteeredBody):
    RULES = RULES
    ONE_BY_ONE: ClassVar = {"input": InputItem}

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: MostTokens | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[Id], Field(max_length=32)] | None = Field(
        None, description="message.output_text.logprobs; the others concern tools that run at OpenAI."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    metadata: Annotated[JsonObject, Field(max_length=64)] | None = None
    stream_options: StreamOptions | None = None
    previous_response_id: Any = None
    conversation: Any = None

    @field_validator("previous_response_id", "conversation")
    @classmethod
    def _kept_nowhere(cls, value: Any) -> None:
        if value not in (None, "", {}):
            raise ValueError(KEPT_NOWHERE)

    @property
    def wants_scores(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat(type="text")

    def chat_request(self) -> ChatRequest:
        shared = {name: getattr(self, name) for name in SteeredBody.model_fields}
        return ChatRequest.model_validate(
            shared
            | {
                "messages": self._messages(),
                "max_tokens": self.max_output_tokens,
                "tools": self._tools(),
                "tool_choice": self._choice(),
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": self._response_format(),
                "reasoning_effort": self.reasoning and self.reasoning.effort,
                "logprobs": self.wants_scores or None,
                "top_logprobs": self.top_logprobs,
            }
        )

    def _messages(self) -> list[ChatMessage]:
        found = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*found, ChatMessage(role="user", content=self.input)]
        for item in self.input:
            if item.type == "function_call_output":
                found.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.text))
            elif item.type == "function_call":
                call = {
                    "id": item.call_id,
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                # what the assistant said and called in one turn is one message
                before = (
                    found.pop() if found and found[-1].role == "assistant" else ChatMessage(role="assistant")
                )
                calls = [*(before.tool_calls or ()), call]
                made = {"role": "assistant", "content": before.content, "tool_calls": calls}
                found.append(ChatMessage.model_validate(made))
            elif item.type == "message":
                found.append(ChatMessage(role=item.role, content=item.text))
        return found

    def _tools(self) -> list[JsonObject] | None:
        """Raises ApiError."""
        allowed = None
        if isinstance(self.tool_choice, AllowedTools):
            allowed = {tool.name for tool in self.tool_choice.tools}
            unknown = next(iter(allowed - {tool.name for tool in self.tools or ()}), None)
            if unknown is not None:
                raise ApiError(
                    f"tool_choice: there is no tool {shown(unknown)} among tools.", param="tool_choice"
                )
        return [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools or ()
            if allowed is None or tool.name in allowed
        ]

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.mode
        if isinstance(self.tool_choice, NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _response_format(self) -> JsonObject | None:
        wanted = self.format
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.schema_}}
