"""What a request may hold, as pydantic checks it and /openapi.json describes it.

Fields not named here have already been handled by fields.py: what gets here works. Inside `steering` and
messages, unknown fields are refused, since a misspelt setting would silently change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
    model_validator,
)

from localsteer.terms import Mode, Positions

from . import limits
from .fields import EMPTY, OPENAI, Rules

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=limits.MAX_TEXT)]
StopText = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
Layer = Annotated[int, Field(ge=0, le=100_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[StrictInt | StrictFloat, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[
    list[tuple[Token | StopText, Bias | Literal[False]]], Field(max_length=limits.MAX_BIASES)
]
NOTHING = (*EMPTY, False)
MostTokens = Annotated[int, Field(ge=-2, le=limits.MAX_TOKENS)]


class Body(BaseModel):
    """RULES: for fields that the model does not have. ONE_BY_ONE: lists that may be long, and the type of
    their items. NESTED: fields that hold settings, under the same rules."""

    model_config = ConfigDict(extra="ignore")
    RULES: ClassVar[Rules] = OPENAI
    ONE_BY_ONE: ClassVar[Mapping[str, type[BaseModel]]] = {}
    NESTED: ClassVar[Mapping[str, type[Body]]] = {}


class ClosedPart(Body):
    """An object inside a request that sets something. Unknown fields are refused, since they might have
    changed the reply, except those that ask for nothing or are listed in UNREAD."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    UNREAD: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_part(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            key: held
            for key, held in value.items()
            if key in known or not (key in cls.UNREAD or held in NOTHING)
        }


class SteeringItem(BaseModel):
    """One vector of the folder, with settings that replace the file's."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    strength: Annotated[Finite, Field(ge=-limits.MAX_STRENGTH, le=limits.MAX_STRENGTH)] | None = None
    layer: Layer | Annotated[list[Layer], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    positions: Positions | None = None
    mode: Mode | None = None
    one_sided: bool | None = None
    cap: Annotated[Finite, Field(gt=0)] | None = None


class EnsureSteering(BaseModel):
    """Steer only if the plain reply does not follow: the names of instructions with a verifier."""

    model_config = ConfigDict(extra="forbid")

    ensure: Annotated[list[Name], Field(min_length=1, max_length=limits.MAX_VECTORS)]


Items = Annotated[list[SteeringItem | Name], Field(max_length=limits.MAX_VECTORS)]


def as_items(given: Sequence[SteeringItem | str]) -> list[SteeringItem]:
    """Turn a bare name into a vector with the settings of its file."""
    return [SteeringItem(name=item) if isinstance(item, str) else item for item in given]


Schema = dict[str, Any] | StrictBool | Annotated[str, Field(max_length=limits.MAX_SCHEMA)]
Grammar = Annotated[str, Field(max_length=limits.MAX_GRAMMAR)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=limits.MAX_CHOICES)]


class JsonSchema(ClosedPart):
    UNREAD = ("description", "strict")  # a schema is always enforced

    name: Annotated[str, Field(max_length=256)] | None = None
    schema_: dict[str, Any] | StrictBool = Field(alias="schema")


class ResponseFormat(ClosedPart):
    """OpenAI's format; llama-server puts the schema beside the type, and also takes grammars and patterns."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | StrictBool | None = Field(None, alias="schema")
    pattern: Grammar | None = None
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def _has_its_part(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        if self.type == "regex" and self.pattern is None:
            raise ValueError("type regex needs pattern")
        if self.type == "grammar" and self.grammar is None:
            raise ValueError("type grammar needs grammar")
        return self


class StructuredOutputs(Body):
    """vLLM's format. Fields not named here would change the reply, and are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    disable_fallback: bool | None = None  # there is one engine, and no fallback


class StreamOptions(Body):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # hides the lengths of chunks from eavesdroppers
    continuous_usage_stats: Literal[False] | None = None


class SteeredBody(Body):
    """The fields that all APIs share: the model, how its tokens are drawn, and what steers it."""

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = Field(
        None, description="MODEL, or MODEL+json+lowercase to steer; by default the first served model."
    )
    stream: bool | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 and -1: off.")
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=limits.MAX_TOKENS)] | None = None
    seed: Seed | None = None
    steering: Items | EnsureSteering | None = None
    ensure: Annotated[list[Name], Field(max_length=limits.MAX_VECTORS)] | None = None
    always_steer: bool | None = Field(
        None,
        description="Apply vectors even if the prompt already asks for the same and their files "
        "say that they then do harm"
        "; a `strength` in `steering` does the same for its vector.",
    )
    steer_forms: bool | None = Field(
        None,
        description="true: also steer what is generated inside a tool call, or under a schema or grammar; "
        "by default it stays plain.",
    )

    @property
    def items(self) -> list[SteeringItem]:
        if self.steering is None or isinstance(self.steering, EnsureSteering):
            return []
        return as_items(self.steering)

    @property
    def with_own_strength(self) -> set[str]:
        """Names of the vectors for which the client sets a strength."""
        return {item.name for item in self.items if item.strength is not None}

    @property
    def ensured(self) -> list[str]:
        asked = self.steering.ensure if isinstance(self.steering, EnsureSteering) else []
        return list(dict.fromkeys([*asked, *(self.ensure or ())]))


class SamplingFields(SteeredBody):
    """The fields that chat and completions share."""

    stream_options: StreamOptions | None = None
    max_tokens: MostTokens | None = Field(None, description="-1 and -2: until the context is full.")
    stop: StopText | Annotated[list[StopText], Field(max_length=limits.MAX_STOP)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = None
    logit_bias: LogitBias | None = Field(
        None,
        description="By token id; also llama-server's pairs, with texts instead of ids and false for never.",
    )
    response_format: ResponseFormat | None = None
    grammar: Grammar | None = Field(None, description="llama-server's: GBNF, or Lark with a rule `start`.")
    json_schema: Schema | None = Field(None, description="llama-server's.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's.")
    guided_json: Schema | None = Field(None, description="vLLM's until 0.12, like the next ones.")
    guided_json_object: bool | None = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    guided_whitespace_pattern: Any = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        # front ends send an empty text for a bias that was opened but not filled in
        if value in (None, ""):
            return None
        return list(value.items()) if isinstance(value, dict) else value

    @field_validator("guided_whitespace_pattern")
    @classmethod
    def _own_white_space(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("the white space of JSON can't be chosen here: leave it out")

    @field_validator("stop", mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        # front ends split a line at commas: one at the end leaves an empty text
        return [text for text in value if text != ""] if isinstance(value, list) else value

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    def most_tokens(self, default: int | None) -> int | None:
        """The longest reply in tokens. None: until the context is full, for which llama.cpp's clients send -1
        or -2."""
        if self.asked_tokens is None:
            return default
        return None if self.asked_tokens < 0 else self.asked_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


TEXTS = ("text", "input_text", "output_text", "refusal")
# of a message: what clients store with it for themselves
UNREAD = (
    "annotations",
    "cache_control",
    "created_at",
    "id",
    "metadata",
    "object",
    "parsed",
    "refusal",
    "status",
    "timestamp",
)


def _is_other(part: dict[str, Any]) -> bool:
    return part["type"] not in TEXTS


def without(value: Any, names: Sequence[str]) -> Any:
    """A JSON object without unread and empty fields."""
    if not isinstance(value, dict):
        return value
    return {key: member for key, member in value.items() if key not in names and member not in (None, [], {})}


class ContentPart(Body):
    model_config = ConfigDict(extra="forbid")

    type: str
    text: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        # other types have other fields, and are refused by their type
        if isinstance(value, dict) and isinstance(value.get("type"), str):
            if _is_other(value):
                value = {key: value[key] for key in ("type", "text") if key in value}
            elif value["type"] == "refusal" and "refusal" in value:
                value = {"type": "refusal", "text": value["refusal"]}
        return without(value, ("annotations", "cache_control", "citations", "id", "logprobs"))

    @model_validator(mode="after")
    def _text_only(self) -> ContentPart:
        if self.type not in TEXTS or self.text is None:
            raise ValueError(f"only parts of type text are read here, not {self.type!r:.40}")
        return self


class CalledFunction(Body):
    name: Annotated[str, Field(max_length=256)]
    arguments: Text | dict[str, Any] = ""


class ToolCall(Body):
    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True, max_length=1000)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return without(value, UNREAD)

    @property
    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content


class Function(ClosedPart):
    UNREAD = ("strict",)  # a forced call always follows its schema

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class Tool(ClosedPart):
    UNREAD = ("cache_control",)

    type: Literal["function"]
    function: Function


class ChosenFunction(ClosedPart):
    name: Annotated[str, Field(max_length=64)]


class ToolChoice(ClosedPart):
    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(SamplingFields):
    """A turn of a conversation. The requests of all other APIs become one of these."""

    ONE_BY_ONE: ClassVar = {"messages": ChatMessage}
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: MostTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    functions: Any = None
    parallel_tool_calls: bool | None = Field(None, description="false: a reply calls at most one tool.")
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=limits.MAX_VARIABLES)] | None = Field(
        None, description="Variables for the model's chat template, such as enable_thinking."
    )
    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    continue_final_message: bool | None = Field(
        None, description="Continue the assistant's last message: the reply is what follows it."
    )

    add_generation_prompt: bool | None = Field(None, description="Must be false with continue_final_message.")

    @field_validator("functions")
    @classmethod
    def _no_functions(cls, value: Any) -> None:
        if value:
            raise ValueError("functions are obsolete: send tools")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and not self._can_continue:
            raise ValueError(
                "continue_final_message: the last message must be a text of the assistant's, after others"
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError("add_generation_prompt: a reply needs it: leave it out")
        return self

    @property
    def _can_continue(self) -> bool:
        last = self.messages[-1]
        is_text = last.text is not None and not last.tool_calls
        return len(self.messages) > 1 and last.role == "assistant" and is_text

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def most_calls(self) -> int | None:
        return 1 if self.parallel_tool_calls is False else None

    @property
    def n_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1, max_length=limits.MAX_TEXT)]


class CompletionRequest(SamplingFields):
    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = None
    suffix: Text | None = Field(None, description="What follows the gap; for models that can fill in.")

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise ValueError("suffix: excludes echo, prompt and reply are not one text: leave one out")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: every choice is returned: leave it out, or make it equal to n")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class EmbeddingRequest(Body):
    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = None
    input: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=limits.MAX_INPUTS)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class JobRequest(Body):
    """A vector to make, for an instruction of the catalogue or for a sentence."""

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = None
    instruction: Annotated[str, Field(max_length=limits.MAX_INSTRUCTION)]
    method: Literal["search", "learn"] = "search"
    name: Name | None = None
    replace: bool = False


class TraceRequest(Body):
    """A prompt, the steering to trace, and optionally a reply to trace instead of the model's."""

    ONE_BY_ONE: ClassVar = {"messages": ChatMessage}
    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    steering: Items = []
    reply: Text | None = None
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TRACE_TOKENS)] = 64
