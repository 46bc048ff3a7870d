"""Vectors that are left out because the prompt already asks for the same (localsteer/asked.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsteer.asked import Inquiry
from localsteer.jsonable import JsonObject

from .errors import api_error
from .prompts import rendered, template_message, variables_of
from .threads import off_loop

if TYPE_CHECKING:
    from localsteer.runtime.scheduler import Ticket
    from localsteer.vector import ControlVector

    from .models import Served
    from .schemas import ChatMessage, ChatRequest, Tool


async def harmless(
    served: Served, steer: Mapping[str, ControlVector], body: ChatRequest, tools: Sequence[Tool]
) -> tuple[dict[str, ControlVector], list[str]]:
    """The vectors to steer this request by, and the names of those that would do harm. Raises ApiError."""
    # a reply to be continued is not part of the question
    messages = body.messages[:-1] if body.continue_final_message else body.messages
    wanted = steer if body.always_steer else body.with_own_strength
    always = [vector for name, vector in steer.items() if name in wanted]
    if not steer:
        return {}, []
    inquiry = await off_loop(_inquiry, messages, steer, always)
    states: dict[int, np.ndarray] = {}
    if inquiry.layers:
        variables = variables_of(body, served.engine.template)
        text = await off_loop(rendered, served, messages, tools, variables=variables)
        states = await _states(served, text, inquiry.layers)
    _, left_out = inquiry.settle(states)
    applied = {name: vector for name, vector in steer.items() if vector not in left_out}
    return applied, [name for name in steer if name not in applied]


def _inquiry(
    messages: Sequence[ChatMessage], steer: Mapping[str, ControlVector], always: Sequence[ControlVector]
) -> Inquiry:
    return Inquiry.of(steer.values(), [template_message(message) for message in messages], always)


def report(applied: Iterable[str], left_out: Sequence[str], plain_tokens: int = 0) -> JsonObject:
    """The field `steering` of the answer; nothing if every vector of the request was applied throughout.

    plain_tokens: tokens of the reply inside tool calls and forced forms.
    """
    if not left_out and not plain_tokens:
        return {}
    told: JsonObject = {"applied": list(applied), "left_out": list(left_out)}
    return {"steering": told | ({"plain_tokens": plain_tokens} if plain_tokens else {})}


async def _states(served: Served, text: str, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """The states at the end of a text, by layer. The scheduler reads the text beside all other requests, and
    what it reads stays in the cache for the reply."""
    gone = threading.Event()
    ticket = None

    def look() -> Ticket:
        made = served.scheduler.look(served.engine.rendered_tokens(text), layers)
        if gone.is_set():  # nothing waits for this thread any more
            made.cancel()
        return made

    try:
        ticket = await off_loop(look)
        return dict(zip(layers, await ticket.astates(), strict=True))
    except Exception as error:
        raise api_error(error) from None
    finally:
        gone.set()
        if ticket is not None:
            ticket.cancel()
