"""What a request of Anthropic's Messages API may hold, and the ChatRequest that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StrictBool, field_validator, model_validator

from ...jsonable import JsonObject
from .. import limits
from ..errors import ApiError
from ..fields import Rules
from ..schemas import Body, ChatMessage, ChatRequest, ClosedPart, SteeredBody, StopText, Text, without

Id = Annotated[str, Field(max_length=256)]
RULES = Rules(
    harmless={
        "they say who asks and what to store, and nothing is stored here": (
            "metadata", "service_tier", "inference_geo", "speed", "user_profile_id", "workspace_id",
            "diagnostics", "cache_control",
        ),
    },
    neutral={
        "container": (), "context_management": (), "mcp_servers": (), "betas": (), "fallbacks": (),
    },
)  # fmt: skip
# of a block: what is kept with it for others
UNREAD = ("cache_control", "caller", "citations", "is_error", "signature", "toolset_name")
READ = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
WITHOUT_THOUGHTS = ("disabled", "adaptive", "between_tools")


class AnthropicBlock(Body):
    """A content block: a text, a call, the result of a call, or reasoning."""

    model_config = ConfigDict(extra="forbid")

    type: str
    text: Text | None = None
    id: Id | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    input: JsonObject | None = None
    tool_use_id: Id | None = None
    content: Text | Annotated[list[AnthropicBlock], Field(fail_fast=True, max_length=1000)] | None = None
    thinking: Text | None = None
    data: Any = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, dict) and "type" in value and value["type"] not in READ:
            return {"type": value["type"]}  # has fields of its own
        if isinstance(value, dict) and isinstance(value.get("input"), dict):
            return without(value, UNREAD) | {"input": value["input"]}  # which may be empty
        return without(value, UNREAD)

    @model_validator(mode="after")
    def _whole(self) -> AnthropicBlock:
        if self.type not in READ:
            raise ValueError(
                f"only blocks of the types {', '.join(READ)} are supported, not {self.type!r:.40}"
            )
        needed = {"tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}
        for field in needed.get(self.type, ()):
            if getattr(self, field) is None:
                raise ValueError(f"a block of the type {self.type} needs {field}")
        if isinstance(self.content, list) and any(block.type != "text" for block in self.content):
            raise ValueError("a tool's result must be text, in blocks of the type text")
        return self


Blocks = Annotated[list[AnthropicBlock], Field(fail_fast=True, max_length=1000)]


def text_of(content: str | list[AnthropicBlock] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text or "" for block in content or () if block.type == "text")


class AnthropicMessage(Body):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        # what its own answers have beside these two, which clients send back whole
        unread = ("id", "type", "model", "stop_reason", "stop_sequence", "stop_details", "usage", "container")
        if not isinstance(value, dict):
            return value
        return {key: held for key, held in value.items() if key not in unread}

    def chat_messages(self) -> list[ChatMessage]:
        """The messages of one message's blocks, in order; results of tools become separate messages."""
        if isinstance(self.content, str):
            return [ChatMessage(role=self.role, content=self.content)]
        if self.role == "assistant":
            return [self._assistant(self.content)]
        found, said = [], []
        for block in self.content:
            if block.type == "tool_result":
                found += [ChatMessage(role=self.role, content="".join(said))] if said else []
                text = text_of(block.content)
                found.append(ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=text))
                said = []
            elif block.type == "text":
                said.append(block.text or "")
        return found + ([ChatMessage(role=self.role, content="".join(said))] if said or not found else [])

    def _assistant(self, blocks: list[AnthropicBlock]) -> ChatMessage:
        calls = [
            {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
            for block in blocks
            if block.type == "tool_use"
        ]
        thoughts = "".join(block.thinking or "" for block in blocks)
        text = text_of(blocks)
        made = {"role": "assistant", "content": text or ("" if not calls else None)}
        return ChatMessage.model_validate(made | {"tool_calls": calls, "reasoning_content": thoughts or None})


class AnthropicTool(ClosedPart):
    UNREAD = ("cache_control", "eager_input_streaming", "strict")

    type: str | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    input_schema: JsonObject | None = None

    @model_validator(mode="after")
    def _own(self) -> AnthropicTool:
        if self.type not in (None, "custom"):
            raise ValueError(f"only tools that the client runs are supported, not {self.type!r:.40}")
        if self.input_schema is None:
            raise ValueError("a tool needs input_schema")
        return self


class AnthropicChoice(Body):
    model_config = ConfigDict(extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(max_length=64)] | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_a_name(self) -> AnthropicChoice:
        if self.type == "tool" and not self.name:
            raise ValueError("type tool needs name")
        return self


class OutputFormat(ClosedPart):
    type: Literal["json_schema"]
    schema_: JsonObject | StrictBool = Field(alias="schema")


class OutputConfig(Body):
    """effort: high, Anthropic's default, asks for nothing."""

    model_config = ConfigDict(extra="forbid")

    format: OutputFormat | None = None
    effort: Annotated[str, Field(max_length=32)] | None = None


class CountRequest(SteeredBody):
    """What of a request makes its prompt; MessagesRequest has the rest."""

    RULES = RULES
    ONE_BY_ONE: ClassVar = {"messages": AnthropicMessage}

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    system: Text | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="The same as output_config.format.")
    thinking: Annotated[JsonObject, Field(max_length=16)] | None = Field(
        None, description="disabled or adaptive: reasoning is part of the text here."
    )
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=limits.MAX_STOP)] | None = None

    @field_validator("thinking")
    @classmethod
    def _no_thoughts_apart(cls, value: JsonObject | None) -> JsonObject | None:
        if value and value.get("type") not in WITHOUT_THOUGHTS:
            raise ValueError(
                "reasoning is not separated from the text here: send type disabled, or leave it out"
            )
        return value

    @property
    def _prefills(self) -> bool:
        """Whether the reply continues a text of the assistant, as in this API."""
        last = self.messages[-1]
        if last.role != "assistant":
            return False
        if len(self.messages) == 1 and not self.system:
            raise ApiError(
                "messages: need at least one with the role user, since there is nothing to answer.",
                param="messages",
            )
        if not isinstance(last.content, str) and any(block.type == "tool_use" for block in last.content):
            raise ApiError(
                "messages: the last one calls tools: send their results as blocks of the type tool_result.",
                param="messages",
            )
        return True

    def chat_request(self) -> ChatRequest:
        """Raises ApiError."""
        shared = {name: getattr(self, name) for name in SteeredBody.model_fields}
        system = text_of(self.system)
        messages = [ChatMessage(role="system", content=system)] if system else []
        for message in self.messages:
            messages += message.chat_messages()
        choice = self.tool_choice
        return ChatRequest.model_validate(
            shared
            | {
                "messages": messages,
                "continue_final_message": self._prefills or None,
                "max_tokens": self.max_tokens,
                "stop": self.stop_sequences,
                "tools": self._tools(),
                "tool_choice": self._choice(),
                "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
                "response_format": self._response_format(),
                "reasoning_effort": self._effort(),
                "enable_thinking": False if self.thinking and self.thinking["type"] == "disabled" else None,
            }
        )

    def _tools(self) -> list[JsonObject]:
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                },
            }
            for tool in self.tools or ()
        ]  # fmt: skip

    def _choice(self) -> Any:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name}}
        return {"any": "required"}.get(choice.type, choice.type)

    def _response_format(self) -> JsonObject | None:
        wanted = (self.output_config and self.output_config.format) or self.output_format
        return wanted and {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}

    def _effort(self) -> str | None:
        effort = self.output_config and self.output_config.effort
        return None if effort == "high" else effort


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)]
