"""From the messages of a request to the text that the model reads, by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject
from localsteer.tool_calls import loaded

from .errors import ApiError
from .schemas import ChatMessage, ChatRequest, Tool

if TYPE_CHECKING:
    from localsteer.templates import ChatTemplate

    from .models import Served


def rendered(
    served: Served,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] = (),
    *,
    go_on: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model reads it. go_on: continue its last message. variables: see
    `variables_of`.

    Raises ApiError for messages that the model's template refuses.
    """
    given = [template_message(message) for message in messages]
    begun = given.pop()["content"] if go_on else ""
    shown_tools = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        return served.engine.render(given, tools=shown_tools or None, variables=variables) + begun
    except LocalsteerError as error:
        raise ApiError(f"messages: {error}", param="messages") from None


def variables_of(body: ChatRequest, template: ChatTemplate) -> JsonObject:
    """The variables of a request for the model's chat template. Raises ApiError for one that the template
    never reads, since it would change nothing, except `false` and `null`, which clients send to every
    model."""
    asked = dict(body.chat_template_kwargs or {})
    params = dict.fromkeys(asked, "chat_template_kwargs")
    for name in ("enable_thinking", "reasoning_effort"):
        if getattr(body, name) not in (None, ""):
            asked[name], params[name] = getattr(body, name), name
    found = {}
    for name, value in asked.items():
        try:
            template.check_variables({name: value})
        except LocalsteerError as error:
            if value in (None, False, "none") and name not in template.RESERVED:
                continue
            raise ApiError(f"{params[name]}: {error}", param=params[name]) from None
        found[name] = value
    return found


def template_message(message: ChatMessage) -> JsonObject:
    """The messages as chat templates read them; OpenAI's role `developer` becomes `system`."""
    role = "system" if message.role == "developer" else message.role
    made: JsonObject = {"role": role, "content": message.text}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": loaded(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
        made["content"] = message.text or ""
    if message.role == "tool":
        made["tool_call_id"] = message.tool_call_id
    # templates test whether the key exists, and would write None
    more = {"name": message.name, "reasoning_content": message.reasoning_content}
    made |= {key: value for key, value in more.items() if value is not None}
    return {key: value for key, value in made.items() if key != "tool_call_id" or value is not None}
