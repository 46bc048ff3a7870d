"""What requests of Ollama's API may hold, and what they become: a ChatRequest, or a text to continue."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ...jsonable import JsonObject
from .. import limits
from ..fields import Rules
from ..schemas import (
    Body,
    ChatMessage,
    ChatRequest,
    ClosedPart,
    CompletionRequest,
    Function,
    MostTokens,
    SteeredBody,
    StopText,
    Text,
    without,
)

HOW_COMPUTED = "they say how to compute the reply, which the server decides"
OPTION_RULES = Rules(
    harmless={
        HOW_COMPUTED: (
            "num_ctx", "num_keep", "num_batch", "num_thread", "num_gpu", "num_gqa", "main_gpu", "low_vram",
            "numa", "use_mmap", "use_mlock", "f16_kv", "logits_all", "vocab_only", "embedding_only",
            "draft_num_predict",
        ),
        "settings of something that is off here": ("mirostat_tau", "mirostat_eta"),
    },
    neutral={"mirostat": (0,), "penalize_newline": (True,), "tfs_z": (1,), "typical_p": (1,)},
)  # fmt: skip
RULES = Rules(
    harmless={
        "a model stays loaded until another needs the room": ("keep_alive",),
        "a prompt that is too long is refused": ("truncate", "shift"),
    },
    neutral={
        "context": (), "images": (), "template": (), "width": (), "height": (), "steps": (),
        "_debug_render_only": (False,),
    },
)  # fmt: skip
SHARED = tuple(name for name in SteeredBody.model_fields if name not in ("model", "stream"))


class OllamaOptions(SteeredBody):
    """The options that clients set for the model; steering is accepted here too, for clients that can set
    nothing else."""

    RULES = OPTION_RULES

    num_predict: MostTokens | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=limits.MAX_STOP)] | None = None

    @field_validator("model", "stream")
    @classmethod
    def _beside(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("belongs outside options: send it there")


class OllamaFunction(Body):
    name: Annotated[str, Field(max_length=256)]
    arguments: JsonObject | Text | None = None


class OllamaCall(Body):
    id: Annotated[str, Field(max_length=256)] | None = None
    function: OllamaFunction


class OllamaMessage(Body):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    images: Any = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return without(value, ("created_at", "id"))

    @field_validator("images")
    @classmethod
    def _no_images(cls, value: Any) -> None:
        if value:
            raise ValueError("pictures are not supported: leave them out")

    def chat_message(self) -> ChatMessage:
        calls = [
            {
                "id": call.id,
                "function": {"name": call.function.name, "arguments": call.function.arguments or {}},
            }
            for call in self.tool_calls or ()
        ]
        return ChatMessage.model_validate(
            {
                "role": self.role,
                "content": self.content or (None if calls else ""),
                "tool_calls": calls,
                "name": self.tool_name,
                "tool_call_id": self.tool_call_id,
                "reasoning_content": self.thinking,
            }
        )


class OllamaTool(ClosedPart):
    type: Literal["function"] = "function"
    function: Function


class OllamaBody(SteeredBody):
    """The fields that chat and generate share. The answer is a stream unless `stream` is false."""

    RULES = RULES
    NESTED: ClassVar = {"options": OllamaOptions}

    options: OllamaOptions | None = None
    format: Literal["json"] | JsonObject | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _no_format(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _once(self) -> OllamaBody:
        for name in SHARED:
            if getattr(self, name) is not None and getattr(self.options, name, None) is not None:
                raise ValueError(f"{name}: is also in options: send one of them")
        return self

    @property
    def streams(self) -> bool:
        return self.stream is not False

    @property
    def wants_scores(self) -> bool:
        return bool(self.logprobs or self.top_logprobs)

    def shared(self) -> JsonObject:
        """Fields of a ChatRequest or a CompletionRequest."""
        options = self.options or OllamaOptions()
        found = {name: getattr(self, name) for name in SHARED}
        found = {name: getattr(options, name) if value is None else value for name, value in found.items()}
        return found | {
            "model": self.model,
            "stream": self.streams,
            "stop": options.stop,
            "max_tokens": options.num_predict,
            "response_format": self._response_format(),
        }

    def _response_format(self) -> JsonObject | None:
        if self.format is None:
            return None
        if self.format == "json":
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"schema": self.format}}

    def turn(self, messages: list[ChatMessage], tools: list[JsonObject] | None = None) -> ChatRequest:
        effort = self.think if isinstance(self.think, str) else None
        return ChatRequest.model_validate(
            self.shared()
            | {
                "messages": messages,
                "tools": tools,
                "enable_thinking": None if effort else self.think,
                "reasoning_effort": effort,
                "logprobs": self.wants_scores or None,
                "top_logprobs": self.top_logprobs,
            }
        )


class OllamaChatRequest(OllamaBody):
    ONE_BY_ONE: ClassVar = {"messages": OllamaMessage}

    messages: Annotated[list[OllamaMessage], Field(max_length=limits.MAX_MESSAGES)] | None = None
    tools: Annotated[list[OllamaTool], Field(max_length=limits.MAX_TOOLS)] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the request only loads the model."""
        return not self.messages

    def chat_request(self) -> ChatRequest:
        messages = [message.chat_message() for message in self.messages or ()]
        return self.turn(messages, [tool.model_dump(exclude_none=True) for tool in self.tools or ()])


class OllamaGenerateRequest(OllamaBody):
    prompt: Text | None = None
    system: Text | None = None
    suffix: Text | None = None
    raw: bool | None = None

    @model_validator(mode="after")
    def _raw_has_no_form(self) -> OllamaGenerateRequest:
        if self.is_text and self.system:
            raise ValueError("system: excludes raw and suffix, which use no template: leave it out")
        if self.is_text and self.think:
            raise ValueError("think: excludes raw and suffix, which use no template: leave it out")
        return self

    @property
    def is_empty(self) -> bool:
        return not self.prompt

    @property
    def is_text(self) -> bool:
        """Whether the prompt is sent as it is."""
        return bool(self.raw or self.suffix)

    def chat_request(self) -> ChatRequest:
        messages = [ChatMessage(role="system", content=self.system)] if self.system else []
        return self.turn([*messages, ChatMessage(role="user", content=self.prompt)])

    def text_request(self, most_tokens: int) -> CompletionRequest:
        shared = self.shared()
        if shared["max_tokens"] is None:
            shared["max_tokens"] = most_tokens
        n_top = self.top_logprobs or 0
        scores = n_top if self.wants_scores else None
        return CompletionRequest.model_validate(
            shared | {"prompt": self.prompt, "suffix": self.suffix or None, "logprobs": scores}
        )


class OllamaEmbedRequest(Body):
    RULES = Rules(RULES.harmless, {})
    NESTED: ClassVar = {"options": OllamaOptions}

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = None
    input: Text | Annotated[list[Text], Field(fail_fast=True, max_length=limits.MAX_INPUTS)]
    dimensions: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    options: OllamaOptions | None = None


class OllamaPromptRequest(Body):
    """Of /api/embeddings, the older one."""

    RULES = Rules(RULES.harmless, {})
    NESTED: ClassVar = {"options": OllamaOptions}

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = None
    prompt: Text
    options: OllamaOptions | None = None


class OllamaShowRequest(Body):
    """name: what `model` was called before."""

    RULES = Rules({"more of the same": ("options", "system", "template")}, {}, {"name": "model"})

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)]
    verbose: bool | None = None
