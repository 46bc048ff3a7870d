"""POST /v1/completions: continues a text, without the chat template."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from localsteer.jsonable import JsonObject
from localsteer.runtime.ask import Ask

from .answers import REASONS, Whole, envelope, scored, text_logprobs
from .considered import report
from .echoed import Scored, prompt_scores, with_gap
from .errors import ApiError, as_json_in_pieces, written
from .formats import constraint_of
from .models import State
from .reading import BodyRoute
from .replies import ClientGone, Job, Order, begin, check_scores, samplings, unless_gone
from .schemas import CompletionRequest
from .streaming import event, stream
from .threads import aside, off_loop

router = APIRouter(route_class=BodyRoute)
DEFAULT_TOKENS = 16  # as at OpenAI


@router.post("/completions", include_in_schema=False)
@router.post("/v1/completions", tags=["OpenAI"], summary="Continue a text")
async def completions(body: CompletionRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    order = await off_loop(text_order, state, body)
    if not body.stream:
        check_scores(order)
    try:
        scores = await unless_gone(request, _scores_of_prompts(state, body, order))
    except ClientGone:
        return Response(status_code=499)
    job = await begin(state, order)
    if body.stream:
        return await stream(request, _events(body, job, scores), job.end, state.limits.write_seconds)
    try:
        return written(await unless_gone(request, _document(body, job, scores)))
    except ClientGone:
        return Response(status_code=499)
    finally:
        job.end()


async def _scores_of_prompts(state: State, body: CompletionRequest, order: Order) -> list[list[Scored]]:
    """The scores of each prompt; none if they were not asked for."""
    if not body.echo or body.logprobs is None:
        return [[] for _ in order.prompts]
    gone = threading.Event()
    try:
        async with state.tracing:
            return await aside(prompt_scores, order, gone)
    finally:
        gone.set()


def text_order(state: State, body: CompletionRequest) -> Order:
    """The texts to continue. Raises ApiError."""
    if body.ensured:
        raise ApiError("ensure: needs a chat: send it to /v1/chat/completions.", param="ensure")
    served, steer = state.steering(body.model, body.items)
    if any(not prompt for prompt in body.prompts):
        raise ApiError("prompt: must not be empty: send a text to continue.", param="prompt")
    prompts = body.prompts
    if body.suffix:
        prompts = [with_gap(served, prompt, body.suffix) for prompt in prompts]
    grammar = constraint_of(body, served)
    return Order(
        served=served,
        prompts=prompts,
        steer=steer,
        samplings=samplings(body, served, grammar),
        ask=Ask(
            max_tokens=body.most_tokens(DEFAULT_TOKENS),
            stop=body.stops,
            n_top=body.logprobs,
            plain_forms=grammar is not None and not body.steer_forms,
        ),
        param="prompt",
    )


def _head(body: CompletionRequest, job: Job) -> JsonObject:
    return envelope("text_completion", "cmpl", body.model or job.order.served.name)


def _told(job: Job) -> JsonObject:
    return report(job.order.steer, (), job.plain_tokens)


def _echo(body: CompletionRequest, job: Job, i: int) -> str:
    if not body.echo:
        return ""
    prompt = body.prompts[i // len(job.order.samplings)]
    return prompt if isinstance(prompt, str) else job.order.served.engine.text(prompt)


async def _document(body: CompletionRequest, job: Job, heads: Sequence[list[Scored]]) -> bytes:
    """heads: scores of each prompt's tokens."""
    choices = [Whole() for _ in job.tickets]
    async for i, chunk in job.chunks():
        choices[i].add(chunk)
    engine, wanted, n = job.order.served.engine, body.logprobs is not None, len(job.order.samplings)

    def one(i: int, choice: Whole) -> JsonObject:
        scores = [*heads[i // n], *choice.scores]
        return {
            "index": i,
            "text": _echo(body, job, i) + choice.text,
            "logprobs": text_logprobs(engine, scores) if wanted else None,
            "finish_reason": choice.reason,
        }

    def write() -> bytes:
        found = [one(i, choice) for i, choice in enumerate(choices)]
        return as_json_in_pieces(_head(body, job) | {"choices": found, "usage": job.usage} | _told(job))

    return await off_loop(write) if wanted else write()


async def _events(body: CompletionRequest, job: Job, heads: Sequence[list[Scored]]) -> AsyncIterator[bytes]:
    head, engine = _head(body, job), job.order.served.engine
    texts = [_echo(body, job, i) for i in range(len(job.tickets))]
    offsets, n = [0] * len(job.tickets), len(job.order.samplings)
    ahead: list[list[Scored]] = [heads[i // n] for i in range(len(texts))]
    async for i, chunk in job.chunks():
        scores, ahead[i] = [*ahead[i], *scored(chunk)], []
        text, texts[i] = texts[i] + chunk.text, ""
        if not (text or scores or chunk.finish_reason):
            continue
        logprobs = text_logprobs(engine, scores, offsets[i]) if scores else None
        offsets[i] += sum(len(token) for token in logprobs["tokens"]) if logprobs else 0
        reason = REASONS.get(chunk.finish_reason or "")
        choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}
        told = _told(job) if reason else {}
        yield event(head | {"choices": [choice]} | ({"usage": None} if body.with_usage else {}) | told)
    if body.with_usage:
        yield event(head | {"choices": [], "usage": job.usage})
