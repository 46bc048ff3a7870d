"""Replies: one at a time, as a stream and in batches, all the same tokens; and every way to end."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import one_sequence
import pytest
from engines import GREEDY, open_engine, random_vector
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.errors import LocalsteerError, MismatchError, PromptError
from localsteer.plan import Plan
from localsteer.runtime.reply import Chunk, TextStream, Timings
from localsteer.runtime.sampling import Sampling
from localsteer.terms import POSITIONS

PROMPTS = [
    "Tell me about foxes.",
    "Who?",
    "Describe a quiet village in the mountains, please!",
    "Why not",
    "12 dogs",
]
SEEDED = Sampling(temp=1.5, seed=7, min_p=0.0)


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def stories(real_data):
    with open_engine(real_data / "stories260K.gguf") as engine:
        yield engine


def streamed(chunks) -> tuple[str, list[int], str]:
    chunks = list(chunks)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish_reason


def told(reply) -> tuple[str, list[int], str]:
    return reply.text, reply.tokens, reply.finish_reason


# --- one, streamed and batched ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_loop_draws_what_one_sequence_by_itself_draws(engine, sampling):
    """Steered in every class of positions, and with a prompt of more than one decode."""
    long = "word " * 20
    vectors = [None, *(random_vector(engine, k, positions=where) for k, where in enumerate(POSITIONS))]
    for prompt, steer in [(long, None), *((PROMPTS[2], vector) for vector in vectors)]:
        tokens = engine.prompt_tokens(prompt)
        expected = one_sequence.reply_tokens(engine, tokens, 24, plan=engine.plan(steer), sampling=sampling)
        assert engine.generate(prompt, steer=steer, sampling=sampling, max_tokens=24).tokens == expected
        assert len(expected) > 1


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_generate_stream_and_batch_give_the_same_reply(engine, sampling):
    for prompt in PROMPTS:
        options = {"sampling": sampling, "max_tokens": 24}
        reply = engine.generate(prompt, **options)
        assert told(reply) == streamed(engine.stream(prompt, **options))
        assert told(reply) == told(engine.generate_batch([prompt], **options)[0])
        assert reply.tokens and len(reply.tokens) <= 24


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generation"])
def test_a_steered_reply_is_what_one_forward_pass_over_it_predicts(engine, positions):
    vector = random_vector(engine, positions=positions, layers=(0, 2))
    prompt = engine.prompt_tokens(PROMPTS[2])
    reply = engine.generate(PROMPTS[2], steer=[vector], sampling=GREEDY, max_tokens=20).tokens
    logits = engine.logits([*prompt, *reply], steer=[vector], n_prompt=len(prompt))
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == reply


def test_under_generation_the_first_reply_token_is_unsteered(engine):
    plain = engine.generate(PROMPTS[0], sampling=GREEDY, max_tokens=12).tokens
    vector = random_vector(engine, positions="generation", layers=(3,))
    steered = engine.generate(PROMPTS[0], steer=[vector], sampling=GREEDY, max_tokens=12).tokens
    assert steered[0] == plain[0] and steered != plain


def test_a_prompt_fed_in_chunks_gives_the_same_reply(engine, tiny_llama):
    vector = random_vector(engine, positions="last")
    with open_engine(tiny_llama.gguf_path, n_batch=4) as small:
        for steer in ((), [vector]):
            options = {"steer": steer, "sampling": GREEDY, "max_tokens": 16}
            expected = [told(engine.generate(prompt, **options)) for prompt in PROMPTS]
            assert [told(small.generate(prompt, **options)) for prompt in PROMPTS] == expected
            assert [told(reply) for reply in small.generate_batch(PROMPTS, **options)] == expected


def test_batched_sequences_with_different_plans_are_as_each_alone(engine):
    steers = [
        [random_vector(engine, 1, layers=(0,))],
        [],
        [random_vector(engine, 2, layers=(2, 3), positions="prompt"), random_vector(engine, 3, mode="add")],
        Plan.from_vectors([random_vector(engine, 4, positions="generation")]),
        random_vector(engine, 5, layers=(3,), mode="ablate", positions="last"),
    ]
    options = {"sampling": GREEDY, "max_tokens": 20}
    alone = [told(engine.generate(p, steer=s, **options)) for p, s in zip(PROMPTS, steers, strict=True)]
    assert len({tuple(reply[1]) for reply in alone}) == 5
    together = engine.generate_batch(PROMPTS, steer=steers, **options)  # 5 sequences through 4 slots
    assert [told(reply) for reply in together] == alone


def test_vectors_from_a_generator_steer_a_batch_too(engine):
    vector = random_vector(engine)
    options = {"sampling": GREEDY, "max_tokens": 8}
    expected = [told(reply) for reply in engine.generate_batch(PROMPTS[:2], steer=[vector], **options)]
    for steer in ((each for each in [vector]), [(each for each in [vector]) for _ in range(2)]):
        replies = engine.generate_batch(PROMPTS[:2], steer=steer, **options)
        assert [told(reply) for reply in replies] == expected


def test_the_order_of_prompts_does_not_matter(engine):
    prompts = [f"{prompt} {i}" for i in range(3) for prompt in PROMPTS]
    options = {"steer": random_vector(engine), "sampling": GREEDY, "max_tokens": 12}
    replies = engine.generate_batch(prompts, **options)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = engine.generate_batch([prompts[i] for i in order], **options)
    assert [told(reply) for reply in shuffled] == [told(replies[i]) for i in order]


def test_sampling_is_repeatable_and_differs_between_the_prompts_of_a_batch(engine):
    options = {"sampling": SEEDED, "max_tokens": 16}
    first = engine.generate_batch([PROMPTS[0]] * 4, **options)
    assert [told(r) for r in first] == [told(r) for r in engine.generate_batch([PROMPTS[0]] * 4, **options)]
    assert len({tuple(reply.tokens) for reply in first}) == 4
    same = engine.generate_batch([PROMPTS[0]] * 2, sampling=[SEEDED, SEEDED], max_tokens=16)
    assert same[0].tokens == same[1].tokens == first[0].tokens


def test_greedy_with_a_penalty_goes_through_the_sampler(engine):
    harsh = Sampling(temp=0, repeat_penalty=50.0, repeat_last_n=-1)
    assert GREEDY.is_argmax and not harsh.is_argmax
    # random weights greedily repeat themselves; a harsh penalty forbids it
    tokens = engine.generate(PROMPTS[0], sampling=harsh, max_tokens=24).tokens
    assert len(set(tokens)) == len(tokens)
    assert engine.generate_batch([PROMPTS[0]], sampling=harsh, max_tokens=24)[0].tokens == tokens


def test_a_bias_is_added_to_the_logit(engine):
    logits = engine.logits(engine.prompt_tokens(PROMPTS[0]))[-1]
    first, second = (int(token) for token in np.argsort(-logits)[:2])
    gap = float(logits[first] - logits[second])

    def drawn(*pairs, **fields):
        sampling = Sampling(temp=0, logit_bias=pairs, **fields)
        return engine.generate(PROMPTS[0], sampling=sampling, max_tokens=1).tokens

    assert drawn() == drawn((second, gap * 0.9)) == [first]
    assert drawn((first, -math.inf)) == drawn((first, -gap * 1.1)) == drawn((second, gap * 1.1)) == [second]
    assert drawn((first, 100.0), grammar='root ::= "y"') == drawn(grammar='root ::= "y"')
    seeded = Sampling(temp=1.5, seed=7, top_k=0, logit_bias=((second, 50.0),))
    assert set(engine.generate(PROMPTS[0], sampling=seeded, max_tokens=9).tokens) == {second}


@pytest.mark.parametrize("pair", [(-1, 1.0), (1 << 30, 1.0), (5, math.nan), (5, math.inf)])
def test_a_bias_of_no_token_or_no_number_is_refused(engine, pair):
    with pytest.raises(LocalsteerError, match="logit_bias"):
        engine.generate(PROMPTS[0], sampling=Sampling(temp=0, logit_bias=(pair,)), max_tokens=1)


def test_a_grammar_binds_the_reply(engine):
    sampling = Sampling(temp=0, grammar='root ::= "yes" | "no"')
    assert engine.generate(PROMPTS[0], sampling=sampling).text in ("yes", "no")
    assert {reply.text for reply in engine.generate_batch(PROMPTS, sampling=sampling)} <= {"yes", "no"}


def test_progress_counts_replies(engine):
    seen = []
    engine.generate_batch(PROMPTS, sampling=GREEDY, max_tokens=4, on_progress=lambda *at: seen.append(at))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_sequences_wait_until_the_cache_has_room(tiny_llama, engine):
    options = {"sampling": GREEDY, "max_tokens": 30}
    expected = [told(engine.generate(prompt, **options)) for prompt in PROMPTS]
    with open_engine(tiny_llama.gguf_path, n_ctx=80, n_cells=90) as small:
        assert small.n_cells < 2 * 80
        assert [told(reply) for reply in small.generate_batch(PROMPTS, **options)] == expected


# --- how a reply ends ------------------------------------------------------------------------------------


def test_max_tokens_ends_a_reply_with_length(engine):
    reply = engine.generate(PROMPTS[0], sampling=GREEDY, max_tokens=3)
    assert len(reply.tokens) == 3 and reply.finish_reason == "length"
    nothing = engine.generate(PROMPTS[0], max_tokens=0)
    assert told(nothing) == ("", [], "length") == told(engine.generate_batch([PROMPTS[0]], max_tokens=0)[0])
    with pytest.raises(PromptError, match="max_tokens"):
        engine.generate(PROMPTS[0], max_tokens=-1)


def test_an_end_of_generation_token_stops_the_reply_and_is_no_part_of_it(engine, monkeypatch):
    plain = engine.generate(PROMPTS[0], sampling=GREEDY, max_tokens=12).tokens
    end = next(token for token in plain[3:] if token not in plain[:3])
    monkeypatch.setattr(engine, "ends", lambda token: token == end)
    for reply in (
        engine.generate(PROMPTS[0], sampling=GREEDY, max_tokens=12),
        engine.generate_batch([PROMPTS[0]], sampling=GREEDY, max_tokens=12)[0],
    ):
        assert reply.finish_reason == "stop"
        assert reply.tokens == plain[: plain.index(end)]
        assert reply.text == engine.text(reply.tokens)


def test_a_grammar_that_is_done_ends_with_the_end_token_of_the_model(engine):
    reply = engine.generate(PROMPTS[0], sampling=Sampling(temp=0, grammar='root ::= "yes"'))
    assert told(reply)[::2] == ("yes", "stop")
    assert engine.model.eos not in reply.tokens


def test_a_full_context_is_a_clean_stop(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_ctx=40) as engine:
        n_prompt = len(engine.prompt_tokens("Who?"))
        for limit in (None, 512):
            reply = engine.generate("Who?", sampling=GREEDY, max_tokens=limit)
            assert (len(reply.tokens), reply.finish_reason) == (40 - n_prompt, "length")
            assert told(engine.generate_batch(["Who?"] * 3, sampling=GREEDY, max_tokens=limit)[1]) == told(
                reply
            )


def test_a_model_with_a_table_of_64_positions_is_filled_to_the_last(real_data):
    with open_engine(real_data / "craftgpt-chat-5m-f16.gguf") as engine:
        assert engine.n_ctx == 64
        n_prompt = len(engine.prompt_tokens("hello", raw=True))
        reply = engine.generate("hello", raw=True, sampling=NEVER_ENDING, max_tokens=None)
        assert (n_prompt + len(reply.tokens), reply.finish_reason) == (64, "length")
        replies = engine.generate_batch(["hello"] * 3, raw=True, sampling=NEVER_ENDING, max_tokens=None)
        assert [len(reply.tokens) for reply in replies] == [64 - n_prompt] * 3
        with pytest.raises(LocalsteerError, match=r"n_ctx 65 .* 64"):
            open_engine(engine.path, n_ctx=65)


NEVER_ENDING = Sampling(temp=0, grammar="root ::= [^\\x00]+ root")


@pytest.mark.parametrize("room", [0, -3])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(tiny_llama, room):
    with open_engine(tiny_llama.gguf_path, n_ctx=20) as engine:
        prompt = [5] * (20 - room)
        text = engine.text(prompt)
        assert len(engine.prompt_tokens(text, raw=True)) >= 20
        n = len(engine.prompt_tokens(text, raw=True))
        for call in (engine.generate, engine.stream):
            with pytest.raises(PromptError, match=rf"{n} tokens, and the context of 20"):
                call(text, raw=True)
        with pytest.raises(PromptError, match=rf"prompt 1: .*{n} tokens"):
            engine.generate_batch(["a", text], raw=True)


def test_a_stream_checks_its_arguments_before_the_first_chunk(engine):
    with pytest.raises(PromptError):
        engine.stream("")
    with pytest.raises(LocalsteerError, match="stop string"):
        engine.stream("Hello", stop=[""])
    wide = random_vector(engine)
    with pytest.raises(MismatchError):
        engine.stream("Hello", steer=[type(wide)(np.ones((4, 8)), np.ones(4), None, None, None, layers=(1,))])


# --- streams that are left -------------------------------------------------------------------------------


def test_a_closed_stream_leaves_the_engine_usable(engine):
    expected = told(engine.generate(PROMPTS[0], sampling=SEEDED, max_tokens=10))
    for n in (0, 1, 4):
        stream = engine.stream(PROMPTS[1], sampling=SEEDED)
        for _ in range(n):
            next(stream)
        stream.close()
        assert told(engine.generate(PROMPTS[0], sampling=SEEDED, max_tokens=10)) == expected


def test_another_call_ends_an_open_stream_with_a_clear_error(engine):
    stream = engine.stream(PROMPTS[0], sampling=GREEDY)
    next(stream)
    engine.logits([5, 6])
    with pytest.raises(LocalsteerError, match="another call"):
        next(stream)


def test_ctrl_c_leaves_the_engine_usable(engine, monkeypatch):
    options = {"sampling": SEEDED, "max_tokens": 10}
    expected = told(engine.generate(PROMPTS[0], **options))
    for call in (
        lambda: engine.generate(PROMPTS[1], **options),
        lambda: engine.generate_batch(PROMPTS, **options),
    ):
        with monkeypatch.context() as patch:
            interrupt_at(3, engine, patch)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert told(engine.generate(PROMPTS[0], **options)) == expected
        assert told(engine.generate_batch(PROMPTS, **options)[0]) == expected


def interrupt_at(n, engine, patch):
    decode, calls = engine.context.decode, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        rows = decode(*args, **kwargs)  # Python handles the signal when llama.cpp has returned
        if len(calls) == n:
            raise KeyboardInterrupt
        return rows

    patch.setattr(engine.context, "decode", interrupted)


# --- text ------------------------------------------------------------------------------------------------


def test_half_a_character_waits_for_its_other_half():
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push("🙂".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_may_span_pieces_and_nothing_of_it_is_shown():
    stream = TextStream(["\nQ:", "END"])
    assert stream.push(b"one\n") == "one"
    assert stream.push(b"two EN") == "\ntwo "
    assert stream.push(b"ergy\nQ") == "ENergy"
    assert not stream.stopped
    assert stream.push(b": three") == ""
    assert stream.stopped and stream.finish() == ""


def test_a_possible_stop_string_that_was_none_is_shown_at_the_end():
    stream = TextStream(["STOP"])
    assert stream.push(b"a STO") == "a "
    assert stream.finish() == "STO" and not stream.stopped


def test_the_earliest_stop_string_counts():
    stream = TextStream(["cd", "b"])
    assert stream.push(b"abcd") == "a" and stream.stopped


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab\n🙂é", max_size=30),
    stops=st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=12),
)
def test_however_bytes_are_cut_the_text_is_all_before_the_first_stop(text, stops, cuts):
    raw = text.encode()
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    stream = TextStream(stops)
    shown = ""
    for start, end in pairwise(edges):
        shown += stream.push(raw[start:end])
        if stream.stopped:
            break
    shown += stream.finish()
    assert stream.stopped == any(stop in text for stop in stops)
    if stream.stopped:
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
    else:
        assert shown == text


def test_stop_strings_end_replies_alike_in_stream_and_batch(stories):
    options = {"sampling": GREEDY, "raw": True, "max_tokens": 60}
    text = stories.generate("Once upon a time", **options).text
    stop = text[20:27]  # spans tokens: this model's are hardly longer than a character
    reply = stories.generate("Once upon a time", stop=[stop, "never seen"], **options)
    assert reply.text == text[: text.index(stop)] and reply.finish_reason == "stop"
    assert told(stories.generate_batch(["Once upon a time"], stop=[stop], **options)[0]) == told(reply)
    chunks = list(stories.stream("Once upon a time", stop=stop, **options))
    assert "".join(chunk.text for chunk in chunks) == reply.text


def test_streamed_text_is_the_text_of_the_tokens(engine):
    for seed in range(4):  # random weights write broken UTF-8 as well
        text, tokens, _ = streamed(
            engine.stream(PROMPTS[seed], sampling=Sampling(seed=seed, temp=2), max_tokens=60)
        )
        assert text == engine.text(tokens)


# --- settings and timings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [{"temp": float("nan")}, {"top_p": 1.5}, {"min_p": -0.1}, {"repeat_penalty": 0.0}]
)
def test_sampling_is_checked(setting):
    with pytest.raises(LocalsteerError, match=next(iter(setting))):
        Sampling(**setting)


def test_one_entry_for_each_prompt_or_one_for_all(engine):
    with pytest.raises(PromptError, match="steer has 3 entries for 2 prompts"):
        engine.generate_batch(["a", "b"], steer=[[], [], []])
    with pytest.raises(LocalsteerError, match="sampling has 1 entries for 2 prompts"):
        engine.generate_batch(["a", "b"], sampling=[GREEDY])


def test_timings_tell_speeds(engine):
    timings = engine.generate(PROMPTS[0], sampling=GREEDY, max_tokens=5).timings
    assert timings.prompt_tokens == len(engine.prompt_tokens(PROMPTS[0])) and timings.reply_tokens == 5
    assert timings.first_token_seconds > 0 and timings.decode_seconds > 0
    assert timings.decode_per_second == pytest.approx(4 / timings.decode_seconds)
    assert Timings().prompt_per_second == Timings().decode_per_second == 0.0


def test_a_chunk_may_have_no_text():
    assert Chunk("", 5).finish_reason is None


def test_one_text_is_no_list_of_prompts(engine):
    with pytest.raises(PromptError, match="put it into a list"):
        engine.generate_batch("Hi")


@pytest.mark.parametrize("n_threads", [-1, 513, 100_000])
def test_a_number_of_threads_that_would_end_the_process_is_refused(tiny_llama, n_threads):
    with pytest.raises(LocalsteerError, match=f"1 to 512, not {n_threads}"):
        open_engine(tiny_llama.gguf_path, n_threads=n_threads)


def test_a_character_without_a_token_is_named(real_data):
    refused = pytest.raises(PromptError, match="no token for '日': leave it out")
    with open_engine(real_data / "craftgpt-chat-5m-f16.gguf") as engine, refused:
        engine.generate("a 日本", raw=True)
