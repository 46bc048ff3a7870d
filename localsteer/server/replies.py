"""Turns a request into tickets, which are cancelled at once when the client hangs up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from localsteer.jsonable import JsonObject
from localsteer.runtime.reply import Chunk
from localsteer.runtime.sampling import Sampling

from .errors import ApiError, api_error
from .limits import MAX_BIASES, MAX_SCORES
from .threads import off_loop

if TYPE_CHECKING:
    from localsteer.constrain import Constraint
    from localsteer.runtime.ask import Ask
    from localsteer.runtime.scheduler import Ticket
    from localsteer.vector import ControlVector

    from .models import Served, State
    from .schemas import SamplingFields

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client no longer waits for the answer."""


@dataclass(frozen=True)
class Order:
    """The work for the scheduler. prompts: rendered texts, or token ids; n replies to each. steer, left_out:
    by the names in the request. ask: everything else that the replies have in common."""

    served: Served
    prompts: Sequence[str | Sequence[int]]
    steer: Mapping[str, ControlVector]
    samplings: Sequence[Sampling]  # one for each of the n replies
    ask: Ask
    left_out: Sequence[str] = ()
    param: str | None = None  # the field at fault if a prompt is too long


@dataclass(eq=False)
class Job:
    """The replies of one request in progress: those to the first prompt, then those to the second, ..."""

    state: State
    order: Order
    tickets: list[Ticket] = field(default_factory=list)
    ended: bool = False

    def end(self) -> None:
        """Cancel what still runs, and count its tokens. A second call does nothing."""
        if self.ended:
            return
        self.ended = True
        name, metrics = self.order.served.name, self.state.metrics
        for ticket in self.tickets:
            reason = ticket.finish_reason or "cancelled"
            ticket.cancel()
            metrics.choices.labels(name, reason).inc()
            metrics.tokens.labels(name, "reply").inc(len(ticket.tokens))
            metrics.tokens.labels(name, "prompt").inc(ticket.prompt_tokens)
            metrics.tokens.labels(name, "cached").inc(ticket.cached_tokens)

    @property
    def usage(self) -> JsonObject:
        """The usage; a prompt with several replies counts once."""
        n = len(self.order.samplings)
        prompts = [ticket.prompt_tokens for ticket in self.tickets[::n]]
        cached = [ticket.cached_tokens for ticket in self.tickets[::n]]
        reply = sum(len(ticket.tokens) for ticket in self.tickets)
        return {
            "prompt_tokens": sum(prompts),
            "completion_tokens": reply,
            "total_tokens": sum(prompts) + reply,
            "prompt_tokens_details": {"cached_tokens": sum(cached)},
        }

    @property
    def plain_tokens(self) -> int:
        """How many tokens of all replies so far are inside forms that are not steered."""
        return sum(ticket.plain_tokens for ticket in self.tickets)

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yields (index of the choice, chunk) as they come, to the end of the last choice. Raises
        ApiError."""
        if len(self.tickets) == 1:
            async for chunk in self._one(self.tickets[0]):
                yield 0, chunk
            return
        events: asyncio.Queue[tuple[int, Chunk | ApiError]] = asyncio.Queue()

        async def pump(i: int, ticket: Ticket) -> None:
            try:
                async for chunk in self._one(ticket):
                    events.put_nowait((i, chunk))
            except ApiError as error:
                events.put_nowait((i, error))

        pumps = [asyncio.create_task(pump(i, ticket)) for i, ticket in enumerate(self.tickets)]
        try:
            left = len(pumps)
            while left:
                i, event = await events.get()
                if isinstance(event, ApiError):
                    raise event
                left -= bool(event.finish_reason)
                yield i, event
        finally:
            for task in pumps:
                task.cancel()

    async def _one(self, ticket: Ticket) -> AsyncIterator[Chunk]:
        """Yields the chunks of one choice. Raises ApiError."""
        try:
            async for chunk in ticket:
                if chunk.finish_reason == "cancelled":
                    raise ApiError("the server is closing: the reply was cut.", status=503, code="closing")
                if chunk.finish_reason and chunk.timings:
                    first = self.state.metrics.first_token.labels(self.order.served.name)
                    first.observe(chunk.timings.first_token_seconds)
                yield chunk
        except Exception as error:
            raise api_error(error) from None


def check_scores(order: Order) -> None:
    """Raise ApiError for more log-probabilities than one answer may hold; a stream does not hold them."""
    if order.ask.n_top is None:
        return
    n_ctx = order.served.engine.n_ctx
    n_tokens = n_ctx if order.ask.max_tokens is None else min(order.ask.max_tokens, n_ctx)
    check_n_scores(len(order.prompts) * len(order.samplings) * n_tokens * (order.ask.n_top + 1))


def check_n_scores(n: int) -> None:
    if n > MAX_SCORES:
        raise ApiError(
            f"logprobs: the answer could hold {n} log-probabilities, but at most {MAX_SCORES} are "
            "possible: ask "
            "for fewer prompts, choices, tokens or top_logprobs, or for a stream.",
            param="logprobs",
        )


async def begin(state: State, order: Order) -> Job:
    """Submit everything to the scheduler, or nothing. Raises ApiError."""
    job = Job(state, order)
    try:
        await off_loop(_submit, job)
    except BaseException:
        job.end()
        raise
    return job


def _submit(job: Job) -> None:
    order = job.order
    ask = replace(order.ask, steer=tuple(order.steer.values()))
    for prompt in order.prompts:
        words: JsonObject = {"tokens": prompt}
        if isinstance(prompt, str):
            words = {"prompt": prompt, "raw": True}
        for sampling in order.samplings:
            try:
                ticket = order.served.scheduler.submit(replace(ask, sampling=sampling, **words))
            except Exception as error:
                raise api_error(error, order.param) from None
            job.tickets.append(ticket)
            if job.ended:  # ended while this thread was busy, so the ticket was not seen
                ticket.cancel()
                return


def samplings(request: SamplingFields, served: Served, grammar: Constraint | None = None) -> list[Sampling]:
    """Sampling for each choice; with a seed each gets its own, or all would be equal. What the request leaves
    open is taken from the model. Raises ApiError."""
    names = {
        "temp": request.temperature,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "repeat_last_n": request.repeat_last_n,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "grammar": grammar,
        "logit_bias": _logit_bias(request, served),
    }
    given = dict(served.sampling) | {name: value for name, value in names.items() if value is not None}
    seeds = [None if request.seed is None else (request.seed + i) % 2**32 for i in range(request.n or 1)]
    return [Sampling(**given, seed=seed) for seed in seeds]


def _logit_bias(request: SamplingFields, served: Served) -> tuple[tuple[int, float], ...] | None:
    """The biases by token id; a text, as llama-server takes it, stands for each of its tokens. Raises
    ApiError."""
    model, biases = served.engine.model, {}
    for key, bias in request.logit_bias or ():
        is_id = isinstance(key, int) or (key.isascii() and key.isdigit())
        tokens = [int(key)] if is_id else model.tokenize(key, add_special=False, parse_special=True)
        if is_id and tokens[0] >= model.n_vocab:
            raise ApiError(
                f"logit_bias: {tokens[0]} is not a token of {served.name} (0 to {model.n_vocab - 1}).",
                param="logit_bias",
            )
        biases |= dict.fromkeys(tokens, -math.inf if bias is False else float(bias))
    if len(biases) > MAX_BIASES:
        raise ApiError(
            f"logit_bias: may name at most {MAX_BIASES} tokens, not {len(biases)}.", param="logit_bias"
        )
    return tuple(biases.items()) or None


# -- clients that hang up -----------------------------------------------------------------------------------


async def until_gone(request: Request) -> None:
    """Return when the client has hung up; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, or ClientGone as soon as the client hangs up."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
