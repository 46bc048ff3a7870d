"""Tools in a request: which of them the template shows, and which parts of a reply are calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from localsteer.tool_calls import Call as Call
from localsteer.tool_calls import CallHold as CallHold
from localsteer.tool_calls import calls_in

from .errors import ApiError, shown
from .formats import enforced_call
from .schemas import ChatRequest, Tool, ToolChoice

if TYPE_CHECKING:
    from localsteer.constrain import Constraint

    from .models import Served


def offered(body: ChatRequest, served: Served) -> list[Tool]:
    """The tools that this reply may call. Raises ApiError for a choice that does not go with them.

    Front ends offer tools with every message, whatever the model. One whose template shows none never hears
    of them and answers in words, which `auto` allows; a call that must be made is refused.
    """
    tools, choice = list(body.tools or ()), body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError("tool_choice: needs tools: send them too.", param="tool_choice")
    if choice == "none":
        return []
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise ApiError(
                f"tool_choice: there is no tool {shown(choice.function.name)} among tools.",
                param="tool_choice",
            )
    if not tools or served.engine.template.takes_tools:
        return tools
    if choice not in (None, "auto"):
        raise ApiError(
            f"tools: the chat template of {served.name} has none: leave them out, or serve another model.",
            param="tools", code="tools_unsupported",
        )  # fmt: skip
    served.engine.notice(f"the chat template of {served.name} has no tools: tools in requests are left out.")
    return []


def forced_call(body: ChatRequest, served: Served, tools: Sequence[Tool]) -> Constraint | None:
    """For tool_choice `required` or a function's name: nothing but one call."""
    if not tools or body.tool_choice in (None, "auto"):
        return None
    numbers = [i for i, tool in enumerate(body.tools or ()) if tool in tools]
    return enforced_call(served, tools, numbers)


def parse(text: str, tools: Sequence[Tool]) -> tuple[str, list[Call]]:
    """The text beside the calls, and the calls; what calls no tool that was offered stays text."""
    return calls_in(text, {tool.function.name for tool in tools})
