"""Many requests in one engine: what they share, what they don't, and how they end."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
from engines import GREEDY, open_engine, random_vector

from localsteer.errors import (
    LocalsteerError,
    ModelFileError,
    PromptError,
    QueueFullError,
    SchedulerClosedError,
)
from localsteer.runtime.ask import Ask
from localsteer.runtime.bridge import Context
from localsteer.runtime.kv import CachedSequences
from localsteer.runtime.loop import Loop, new_request
from localsteer.runtime.sampling import Sampling
from localsteer.runtime.scheduler import Scheduler

POSITIONS = ("all", "prompt", "last", "generation")
SHORT = {"max_tokens": 12, "sampling": GREEDY}


@pytest.fixture(scope="module", params=[True, False], ids=["shared cache", "separate caches"])
def engine(request, tiny_llama):
    with open_engine(tiny_llama.gguf_path, kv_unified=request.param) as engine:
        yield engine


def alone(engine, prompt, **settings):
    return engine.generate(prompt, **{**SHORT, **settings}).tokens


def prompts(n):
    return [f"Question {i}: tell me about {'foxes and hares ' * (i % 4)}now." for i in range(n)]


def plans(engine, n):
    """None, and one vector at each setting of positions, in turn."""
    vectors = [[], *([random_vector(engine, k, positions=where)] for k, where in enumerate(POSITIONS))]
    return [vectors[i % len(vectors)] for i in range(n)]


# --- one request does not depend on another -----------------------------------------------------------------


def test_32_requests_with_mixed_plans_give_the_tokens_of_each_alone(engine):
    texts, steers = prompts(32), plans(engine, 32)
    expected = [alone(engine, text, steer=steer) for text, steer in zip(texts, steers, strict=True)]
    with Scheduler(engine, prefill_chunk=16) as scheduler:
        pairs = zip(texts, steers, strict=True)
        tickets = [scheduler.submit(text, steer=steer, **SHORT) for text, steer in pairs]
        assert [ticket.result().tokens for ticket in tickets] == expected
    assert len({tuple(tokens) for tokens in expected}) > 16


def test_separate_caches_on_every_architecture(tiny_model):
    """The sliding window of gemma2 has a cache of its own, which llama.cpp splits by sequence too."""
    with (
        open_engine(tiny_model.gguf_path) as one,
        open_engine(tiny_model.gguf_path, n_seq_max=6, n_ctx=256, kv_unified=False) as many,
        Scheduler(many, prefill_chunk=16) as scheduler,
    ):
        texts, steers = prompts(12), plans(one, 12)
        expected = [alone(one, text, steer=steer) for text, steer in zip(texts, steers, strict=True)]
        pairs = zip(texts, steers, strict=True)
        tickets = [scheduler.submit(text, steer=steer, **SHORT) for text, steer in pairs]
        assert [ticket.result().tokens for ticket in tickets] == expected


def test_requests_that_join_later_change_nothing(engine):
    first, second = prompts(2)
    steer = [random_vector(engine, 1)]
    expected = [alone(engine, first, steer=steer, max_tokens=40), alone(engine, second)]
    with Scheduler(engine, prefill_chunk=4) as scheduler:
        early = scheduler.submit(first, steer=steer, max_tokens=40, sampling=GREEDY)
        chunks = iter(early)
        head = [next(chunks) for _ in range(3)]
        late = scheduler.submit(second, **SHORT)
        assert late.result().tokens == expected[1]
        tokens = [chunk.token for chunk in (*head, *chunks) if chunk.token is not None]
    assert tokens == expected[0]


def test_a_seed_gives_the_same_reply_whatever_runs_beside_it(engine):
    sampling = Sampling(temp=1.0, seed=5)
    text = prompts(1)[0]
    expected = engine.generate(text, max_tokens=12, sampling=sampling).tokens
    with Scheduler(engine) as scheduler:
        others = [scheduler.submit(each, **SHORT) for each in prompts(3)]
        mine = scheduler.submit(text, max_tokens=12, sampling=sampling)
        assert mine.result().tokens == expected
        assert all(other.result().tokens for other in others)


# --- the cache ----------------------------------------------------------------------------------------------


def conversation(first, reply, second):
    roles = ("user", "assistant", "user")
    return [{"role": r, "content": c} for r, c in zip(roles, (first, reply, second), strict=True)]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_second_turn_is_as_from_an_empty_cache(engine, positions):
    """Turn 1's reply becomes prompt in turn 2, where other edits apply to it."""
    steer = [random_vector(engine, 3, positions=positions)]
    with Scheduler(engine) as scheduler:
        reply = scheduler.submit("Tell me about foxes.", steer=steer, **SHORT).result()
        turns = conversation("Tell me about foxes.", reply.text, "And hares?")
        ticket = scheduler.submit(turns, steer=steer, **SHORT)
        found, cached = ticket.result().tokens, ticket.cached_tokens
    assert found == alone(engine, turns, steer=steer)
    assert cached > 0


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_cache_keyed_by_tokens_alone_would_be_poisoned(engine, monkeypatch, poisoned):
    """So the tests around this one can fail: without the edits in the key a prompt is taken as it is."""
    if poisoned:
        monkeypatch.setattr("localsteer.runtime.loop.class_keys", lambda plan: (b"", b"", b""))
    text = prompts(4)[3]
    with Scheduler(engine) as scheduler:
        scheduler.submit(text, steer=[random_vector(engine, 4, strength=8.0)], **SHORT).result()
        tokens = scheduler.submit(text, **SHORT).result().tokens
    assert (tokens == alone(engine, text)) is not poisoned


@pytest.mark.parametrize("kept", [False, True])
def test_a_kept_cache_reads_nothing_again_and_deceives_nobody_else(engine, kept):
    text = prompts(4)[3]
    strong = [random_vector(engine, 4, strength=8.0)]
    with Scheduler(engine) as scheduler:
        scheduler.submit(text, **SHORT).result()
        ticket = scheduler.submit(text, steer=strong, keep_cache=kept, **SHORT)
        mixed = ticket.result().tokens
        again = scheduler.submit(text, steer=strong, **SHORT).result().tokens
    assert ticket.cached_tokens == (ticket.prompt_tokens - 1 if kept else 0)
    assert again == alone(engine, text, steer=strong)
    assert (mixed == again) is not kept


def test_generation_shares_the_plain_prompt_with_everyone(engine):
    text = prompts(4)[3]
    with Scheduler(engine) as scheduler:
        scheduler.submit(text, **SHORT).result()
        steered = scheduler.submit(text, steer=[random_vector(engine, 1, positions="generation")], **SHORT)
        steered.result()
        other = scheduler.submit(text, steer=[random_vector(engine, 1, positions="all")], **SHORT)
        other.result()
    assert steered.cached_tokens == steered.prompt_tokens - 1
    assert other.cached_tokens == 0


def test_a_prefix_is_shared_with_a_reply_that_is_still_running(engine):
    text = prompts(4)[3]
    with Scheduler(engine) as scheduler:
        running = scheduler.submit(text, max_tokens=60, sampling=GREEDY)
        next(iter(running))
        shared = scheduler.submit(text, **SHORT)
        tokens = shared.result().tokens
        assert running.finish_reason is None or len(running.tokens) == 60
        running.cancel()
    assert shared.cached_tokens == shared.prompt_tokens - 1
    assert tokens == alone(engine, text)


def test_a_short_prefix_is_not_worth_copying_a_cache(engine):
    assert engine.n_ctx == 512
    tokens = list(range(5, 25))
    with Scheduler(engine) as scheduler:
        running = scheduler.submit("", tokens=tokens, max_tokens=60, sampling=GREEDY)
        next(iter(running))
        near, far = (scheduler.submit("", tokens=[*tokens[:n], 99, 98], **SHORT) for n in (8, 7))
        near.result(), far.result()
        running.cancel()
    assert near.cached_tokens == 8
    assert far.cached_tokens == (7 if engine.context.kv_unified else 0)


def test_slots_in_a_gap_keep_what_they_hold(engine):
    """With separate caches an idle slot between two replies has a token decoded in it: it must not stay."""
    held, first, last = ([k + 1, *range(5, 25)] for k in range(3))
    with Scheduler(engine) as scheduler:
        tickets = [scheduler.submit("", tokens=each, **SHORT) for each in (held, first, last)]
        expected = [ticket.result().tokens for ticket in tickets]
    loop = Loop(engine)

    def begin(tokens, n):
        request = new_request(engine, Ask(tokens=tokens, max_tokens=n, sampling=GREEDY))
        loop.add(request)
        list(loop.step())
        return request

    one, two, three = begin(first, 12), begin(held, 3), begin(last, 12)
    assert (one.slot, two.slot, three.slot) == (0, 1, 2)
    n_steps, n_decodes = 0, engine.context.n_decodes
    while one in loop.live or three in loop.live:
        list(loop.step())
        n_steps += 1
    assert engine.context.n_decodes - n_decodes == n_steps  # the gap is filled: it would be two a step
    again = begin(held, 12)
    assert again.n_cached == len(held) - 1
    while loop.busy:
        list(loop.step())
    assert [again.tokens, one.tokens, three.tokens] == expected


def test_a_slot_in_a_gap_may_be_full(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_ctx=256, n_seq_max=3, kv_unified=False) as engine:
        loop = Loop(engine)
        lengths = (20, engine.context.n_ctx_seq - 1, 20)
        requests = [
            new_request(engine, Ask(tokens=[k + 1] * n, max_tokens=m, sampling=GREEDY))
            for k, (n, m) in enumerate(zip(lengths, (9, 1, 9), strict=True))
        ]
        for request in requests:
            loop.add(request)
        while loop.busy:
            events = [event for _, event in loop.step()]
            assert not any(isinstance(event, LocalsteerError) for event in events)
        assert [len(request.tokens) for request in requests] == [9, 1, 9]


def test_separate_caches_have_no_cells_in_common(tiny_llama):
    with pytest.raises(LocalsteerError, match="n_cells is for a unified cache"):
        open_engine(tiny_llama.gguf_path, n_cells=512, kv_unified=False)


def test_cells_that_are_shared_are_counted_once(engine):
    cache = CachedSequences(engine.context)
    engine.begin()
    engine.context.decode([1, 2, 3], [0, 1, 2], [0] * 3, [False, False, True])
    cache.append(0, [1, 2, 3], [b""] * 3)
    cache.share(0, 1, 2)
    copied = not engine.context.kv_unified
    assert (cache.n_used, cache.own_cells(0), cache.own_cells(1)) == ((5, 3, 2) if copied else (3, 1, 0))
    assert cache.common(1, [1, 2, 9], [b""] * 3) == 2
    assert cache.common(1, [1, 2], [b"", b"x"]) == 1
    cache.cut(0, 0)
    assert (cache.n_used, cache.own_cells(1)) == (2, 2)
    cache.cut(1, 0)
    assert cache.n_used == 0


def test_old_sequences_make_room_for_new_ones(tiny_llama):
    with (
        open_engine(tiny_llama.gguf_path, n_ctx=64, n_cells=64, n_batch=32) as engine,
        Scheduler(engine) as scheduler,
    ):
        for text in prompts(9):
            reply = scheduler.submit(text, max_tokens=8, sampling=GREEDY).result()
            assert len(reply.tokens) == 8 or reply.finish_reason == "stop"
            assert scheduler.counts["cells_used"] <= 64


# --- how requests end ---------------------------------------------------------------------------------------


def test_cancel_frees_the_slot_and_leaves_the_others_alone(engine):
    text, other = prompts(2)
    with Scheduler(engine) as scheduler:
        tickets = [scheduler.submit(text, max_tokens=None, sampling=GREEDY) for _ in range(engine.n_seq_max)]
        waiting = scheduler.submit(other, **SHORT)
        next(iter(tickets[0]))
        tickets[0].cancel()
        assert waiting.result().tokens == alone_later(tiny=engine, text=other)
        last = list(tickets[0])[-1]
        assert last.finish_reason == "cancelled"
        for ticket in tickets[1:]:
            ticket.cancel()
        tickets[0].cancel()  # a second time: nothing


def alone_later(tiny, text):
    """The reply of an engine of its own: the scheduler has the other one."""
    with open_engine(tiny.path) as engine:
        return alone(engine, text)


def test_a_deadline_ends_a_reply_with_what_there_is(engine):
    with Scheduler(engine) as scheduler:
        late = scheduler.submit(prompts(1)[0], max_tokens=None, sampling=GREEDY, deadline=0.05)
        reply = late.result()
    assert reply.finish_reason in ("deadline", "length", "stop")
    with Scheduler(engine) as scheduler:
        never = scheduler.submit(prompts(1)[0], **SHORT, deadline=1e-9).result()
    assert (never.finish_reason, never.tokens) == ("deadline", [])


def test_a_full_queue_refuses_and_later_takes_again(engine):
    with Scheduler(engine, max_queue=2) as scheduler, scheduler.paused():
        tickets = [scheduler.submit(text, **SHORT) for text in prompts(engine.n_seq_max + 2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            scheduler.submit("One more", **SHORT)
    assert all(ticket.finish_reason == "cancelled" for ticket in tickets)


def test_without_a_queue_the_free_slots_are_there_all_the_same(engine):
    with Scheduler(engine, max_queue=0) as scheduler:
        with scheduler.paused():
            tickets = [scheduler.submit(text, **SHORT) for text in prompts(engine.n_seq_max)]
            with pytest.raises(QueueFullError):
                scheduler.submit("One more", **SHORT)
        assert all(ticket.result().tokens for ticket in tickets)
        assert scheduler.submit("One more", **SHORT).result().tokens


def test_closing_waits_for_grace_and_cancels_the_rest(engine):
    scheduler = Scheduler(engine)
    short = scheduler.submit(prompts(1)[0], **SHORT)
    scheduler.close(grace=30)
    assert short.result().finish_reason in ("length", "stop")
    with pytest.raises(SchedulerClosedError):
        scheduler.submit("Too late", **SHORT)


def test_closing_the_engine_ends_its_replies_first(tiny_llama):
    engine = open_engine(tiny_llama.gguf_path)
    scheduler = Scheduler(engine)
    tickets = [scheduler.submit(text, max_tokens=None, sampling=GREEDY) for text in prompts(6)]
    next(iter(tickets[0]))
    engine.close()
    assert all(ticket.result().finish_reason in ("cancelled", "stop", "length") for ticket in tickets)
    with pytest.raises(LocalsteerError, match="clos"):
        scheduler.submit("Too late", **SHORT)


def test_the_context_may_fill_up(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_ctx=48, n_cells=96) as engine, Scheduler(engine) as scheduler:
        found = [scheduler.submit(text, max_tokens=None, sampling=GREEDY) for text in prompts(2)[:1] * 3]
        for ticket in found:
            reply = ticket.result()
            assert reply.finish_reason == "stop" or len(reply.tokens) + ticket.prompt_tokens == 48


def test_what_is_wrong_with_a_request_is_its_own_affair(engine):
    with Scheduler(engine) as scheduler:
        good = scheduler.submit(prompts(1)[0], **SHORT)
        with pytest.raises(PromptError):
            scheduler.submit("x" * 100_000, **SHORT)
        with pytest.raises(LocalsteerError, match="grammar"):
            scheduler.submit("A", sampling=Sampling(grammar="root ::= ("))
        assert good.result().tokens
        assert scheduler.submit("A", **SHORT).result().tokens


# --- other users of the engine ------------------------------------------------------------------------------


def test_a_guest_gets_the_engine_and_running_replies_go_on(engine):
    text = prompts(3)[2]
    expected = alone(engine, text, max_tokens=50)
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(text, max_tokens=50, sampling=GREEDY)
        chunks = iter(ticket)
        tokens = [next(chunks).token for _ in range(3)]
        with scheduler.paused() as lent:
            assert lent.logits([1, 2, 3]).shape[0] == 3
        tokens += [chunk.token for chunk in chunks if chunk.token is not None]
    assert tokens == expected


@pytest.mark.parametrize("error", [LocalsteerError("too long"), KeyboardInterrupt()])
def test_a_guest_that_fails_leaves_the_replies_as_they_were(engine, error):
    text = prompts(3)[2]
    expected = alone(engine, text, max_tokens=50)
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(text, max_tokens=50, sampling=GREEDY)
        chunks = iter(ticket)
        first = next(chunks).token
        with pytest.raises(type(error)), scheduler.paused() as lent:
            lent.logits([1, 2, 3])
            raise error
        assert [first, *(chunk.token for chunk in chunks if chunk.token is not None)] == expected
        assert scheduler.submit(text, **SHORT).result().tokens


def test_closing_waits_for_a_guest(engine):
    """Whoever closes the scheduler frees the context next."""
    scheduler = Scheduler(engine)
    inside, leave = threading.Event(), threading.Event()

    def visit() -> None:
        with scheduler.paused():
            inside.set()
            leave.wait(10)

    guest = threading.Thread(target=visit)
    closing = threading.Thread(target=scheduler.close)
    guest.start()
    assert inside.wait(10)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    leave.set()
    closing.join(10)
    assert not closing.is_alive()
    guest.join()


def test_many_threads_may_submit_read_and_cancel(engine):
    texts = prompts(24)
    with Scheduler(engine, max_queue=100) as scheduler:
        replies: dict[int, object] = {}

        def ask(i: int) -> None:
            ticket = scheduler.submit(texts[i], **SHORT)
            if i % 3 == 0:
                ticket.cancel()
            replies[i] = ticket.result()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        counts = scheduler.counts
    assert len(replies) == 24
    assert (counts["waiting"], counts["running"]) == (0, 0)


def test_async_readers(engine):
    texts = prompts(5)
    expected = [alone(engine, text) for text in texts]

    async def ask(scheduler):
        tickets = [scheduler.submit(text, **SHORT) for text in texts]
        return await asyncio.gather(*(ticket.aresult() for ticket in tickets))

    with Scheduler(engine) as scheduler:
        replies = asyncio.run(ask(scheduler))
    assert [reply.tokens for reply in replies] == expected


def test_a_reader_whose_event_loop_has_ended_stops_nobody_else(engine):
    async def begin(scheduler):
        ticket = scheduler.submit(prompts(1)[0], max_tokens=60, sampling=GREEDY)
        chunks = aiter(ticket)
        await anext(chunks)
        return ticket, chunks

    with Scheduler(engine) as scheduler:
        ticket, _chunks = asyncio.run(begin(scheduler))
        assert scheduler.submit(prompts(2)[1], **SHORT).result().tokens
        ticket.cancel()
        assert scheduler.submit("A", **SHORT).result().tokens


def test_an_error_that_nobody_foresaw_ends_every_reply_with_one(engine, monkeypatch, caplog):
    scheduler = Scheduler(engine)
    with scheduler.paused():
        tickets = [scheduler.submit(text, **SHORT) for text in prompts(6)]
        monkeypatch.setattr(engine.context, "decode", None)
    for ticket in tickets:
        with pytest.raises(SchedulerClosedError, match="see the log"):
            ticket.result()
    assert "TypeError" in caplog.text
    with pytest.raises(SchedulerClosedError):
        scheduler.submit("Too late", **SHORT)
    scheduler.close()


# --- an engine of its own -----------------------------------------------------------------------------------


@pytest.fixture
def decoding_threads(monkeypatch):
    """{context: the threads that have decoded in it, trying its layers included}, by their ids."""
    seen: dict[int, set[int]] = {}
    decode = Context._llama_decode

    def watched(context, *arrays):
        seen.setdefault(id(context), set()).add(threading.get_ident())
        decode(context, *arrays)

    monkeypatch.setattr(Context, "_llama_decode", watched)
    return seen


def test_the_thread_that_decodes_has_opened_the_engine(tiny_llama, decoding_threads):
    """Two threads that have decoded have two teams of OpenMP threads, which hinder each other."""
    with Scheduler(partial(open_engine, tiny_llama.gguf_path)) as scheduler:
        engine = scheduler.engine
        assert scheduler.submit(prompts(1)[0], **SHORT).result().tokens
        assert decoding_threads == {id(engine.context): {scheduler._thread.ident}}
    with pytest.raises(LocalsteerError, match="closed"):
        engine.generate("Too late", **SHORT)


def test_each_model_of_a_server_is_opened_where_it_is_decoded(tiny_llama, tmp_path, decoding_threads):
    from localsteer.cli.serve import _opened

    paths = [tmp_path / f"{name}.gguf" for name in ("one", "two")]
    for path in paths:
        path.symlink_to(tiny_llama.gguf_path)
    given = {"ctx_size": 0, "threads": 1, "gpu_layers": 0, "kv_unified": True, "parallel": 2, "max_queue": 4}
    given |= {"reproducible": False, "variables": {}, "rpc": (), "rpc_seconds": None}
    given |= {"all_models": False, "max_models": None, "max_memory": None}
    with _opened([*map(str, paths)], given) as pool:
        schedulers = [served.scheduler for served in pool.served.values()]
        for scheduler in schedulers:
            assert scheduler.submit(prompts(1)[0], **SHORT).result().tokens
        threads = {id(one.engine.context): {one._thread.ident} for one in schedulers}
    assert decoding_threads == threads
    assert len(threads) == 2


def test_an_engine_that_can_t_be_opened_is_an_error_of_the_scheduler(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        Scheduler(partial(open_engine, tmp_path / "none.gguf"))


def test_ctrl_c_while_the_engine_opens_leaves_nothing_open(tiny_llama):
    """The press reaches the thread that waits; what is opened meanwhile is closed."""
    opened = []

    def slow():
        time.sleep(0.2)  # by now the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        opened.append(open_engine(tiny_llama.gguf_path))
        return opened[0]

    with pytest.raises(KeyboardInterrupt):
        Scheduler(slow)
    with pytest.raises(LocalsteerError, match="closed"):
        opened[0].generate("Too late", **SHORT)
    assert not any(thread.name == "localsteer-scheduler" for thread in threading.enumerate())


# --- the loop -----------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_a_running_reply(engine):
    """Between two tokens of a reply no step takes more than prefill_chunk tokens of the prompt."""
    loop = Loop(engine, prefill_chunk=8)
    short = new_request(engine, Ask("Hi", max_tokens=30, sampling=GREEDY))
    loop.add(short)
    list(loop.step())
    long = new_request(engine, Ask("word " * 40, max_tokens=30, sampling=GREEDY))
    loop.add(long)
    seen = []
    while not long.tokens:
        before = long.n_past
        tokens = len(short.tokens)
        list(loop.step())
        seen.append(long.n_past - max(before, long.n_cached))
        assert len(short.tokens) == tokens + 1
    assert max(seen) == 8
    loop.close()


def test_a_step_takes_no_time_to_notice_a_cancel(engine):
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(prompts(1)[0], max_tokens=None, sampling=GREEDY)
        chunks = iter(ticket)
        next(chunks)
        before = len(ticket.tokens)
        ticket.cancel()
        *_, last = chunks
        deadline = time.monotonic() + 5
        while scheduler.counts["running"] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert scheduler.counts["running"] == 0
    assert last.finish_reason in ("cancelled", "stop", "length")
    assert len(ticket.tokens) >= before


def test_log_probabilities_are_those_of_the_steered_model(engine):
    steer = [random_vector(engine, 2)]
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit("Tell me about foxes.", steer=steer, n_top=3, **SHORT)
        chunks = [chunk for chunk in ticket if chunk.token is not None]
    prompt = engine.prompt_tokens("Tell me about foxes.")
    tokens = [chunk.token for chunk in chunks]
    logits = engine.logits([*prompt, *tokens][:-1], steer=steer, n_prompt=len(prompt))[len(prompt) - 1 :]
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    for row, chunk in zip(wanted, chunks, strict=True):
        assert chunk.scores.logprob == pytest.approx(row[chunk.token], abs=1e-3)
        assert chunk.scores.top[0][0] == chunk.token  # greedy
        assert [score for _, score in chunk.scores.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-3)


def test_a_prompt_may_come_as_tokens(engine):
    tokens = engine.prompt_tokens(prompts(1)[0])
    with Scheduler(engine) as scheduler:
        found = scheduler.submit("", tokens=tokens, **SHORT).result().tokens
        assert found == alone_later(tiny=engine, text=prompts(1)[0])
        with pytest.raises(PromptError, match="token ids"):
            scheduler.submit("", tokens=[10**6], **SHORT)
