"""Steering stays out of tool calls and forced forms: what a program parses stays whole."""

from __future__ import annotations

import json

import pytest
from bundled_vectors import bundled_vectors

import localsteer
from localsteer import Ask, Sampling, Scheduler
from localsteer.constrain import Constraint
from localsteer.runtime.forms import FormWatch
from localsteer.runtime.reply import TextStream

QUESTION = "Tell me about foxes."
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 60}}, "required": ["a"]}
FORCED = Sampling(temp=0, grammar=Constraint.json_schema(SCHEMA))
GREEDY = Sampling(temp=0)


@pytest.fixture(scope="module")
def loud(exact_bundled):
    """A vector that changes every generated token, and nothing else."""
    vector = bundled_vectors(exact_bundled, ["uppercase"])["uppercase"]
    return vector.at(positions="generation", mode="add", strength=6.0)


@pytest.mark.parametrize(
    ("text", "insides"),
    [
        ("Foxes are red.", ""),
        ('{"name": 1}', '{"name": 1}'),
        (' \n[{"name": 1}]', '[{"name": 1}]'),
        ("Hm. <tool_call>{}</tool_call> So.", "{}</tool_call"),
        ("<function=f>{}</function> and <function=g>x", "f>{}</functiong>x"),
        ("So [TOOL_CALLS] [{}] </tool_call> more", " [{}] </tool_call> more"),
        ("a < b <tool_cal l> {", ""),
        ("<tool_call>{<tool_call>}</tool_call>{", "{<tool_call>}</tool_call"),
    ],
)
def test_a_watch_knows_what_stands_in_a_form_however_it_is_cut(text, insides):
    for size in (1, 2, 3, 7, 100):
        watch, inside = FormWatch(forced=False), []
        pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
        for piece in pieces:
            before = watch.inside
            if watch.push(piece) and before:
                inside.append(piece.decode())
        if size == 1:
            opened = insides[1:] if insides[:1] in ("{", "[") and text.lstrip() == insides else insides
            assert "".join(inside) == opened
        whole = FormWatch(forced=False)
        assert whole.push(text.encode()) == watch.inside, size


def test_the_rest_of_a_mark_that_takes_several_tokens_stays_plain_too():
    watch = FormWatch(forced=False)
    pieces = (b"So", b" <", b"tool", b"_", b"bar", b" <tool", b"_call", b">", b"{}</tool", b"_call>", b".")
    assert [watch.push(piece) for piece in pieces] == [
        False, True, True, True, False, True, True, True, True, False, False,
    ]  # fmt: skip


def test_under_a_constraint_nothing_generated_is_steered(exact_bundled, loud):
    plain = exact_bundled.generate(QUESTION, sampling=FORCED, max_tokens=60)
    steered = exact_bundled.generate(QUESTION, steer=loud, sampling=FORCED, max_tokens=60)
    kept = exact_bundled.generate(QUESTION, steer=loud, sampling=FORCED, max_tokens=60, plain_forms=True)
    assert steered.tokens != plain.tokens
    assert kept.tokens == plain.tokens


def test_a_prompt_is_steered_all_the_same(exact_bundled, loud):
    """As by a vector that has prompt positions alone."""
    here = {"sampling": FORCED, "max_tokens": 60, "plain_forms": True}
    everywhere = exact_bundled.generate(QUESTION, steer=loud.at(positions="all"), **here)
    prompt_only = exact_bundled.generate(QUESTION, steer=loud.at(positions="prompt"), **here)
    assert everywhere.tokens == prompt_only.tokens


def test_from_where_a_free_call_begins_it_is_the_plain_model_s(exact_bundled, loud, monkeypatch):
    """A letter of the reply stands for the mark, since the model writes none."""
    from localsteer.runtime import forms

    steered = exact_bundled.generate(QUESTION, steer=loud, sampling=GREEDY, max_tokens=40)
    pieces = [exact_bundled.piece(token) for token in steered.tokens]
    n = next(i for i in range(4, 20) if set(pieces[i - 1]) - set(b"".join(pieces[: i - 1])))
    mark = bytes([next(iter(set(pieces[n - 1]) - set(b"".join(pieces[: n - 1]))))])
    monkeypatch.setattr(forms, "CALLS", {mark: None})
    kept = exact_bundled.generate(QUESTION, steer=loud, sampling=GREEDY, max_tokens=40, plain_forms=True)
    assert kept.tokens[:n] == steered.tokens[:n]
    assert kept.tokens != steered.tokens
    # the oracle: one token after the other, each with its own plan
    tokens = exact_bundled.prompt_tokens(QUESTION) + steered.tokens[:n]
    plan = exact_bundled.plan(loud)
    classes = [0] * (len(tokens) - n - 1) + [1] + [2] * (n - 1) + [3]
    context = exact_bundled.context
    exact_bundled.begin()
    context.clear()
    for token in kept.tokens[n : n + 8]:
        rows = context.decode(
            tokens, range(len(tokens)), [0] * len(tokens), [False] * (len(tokens) - 1) + [True],
            plans=[plan] * len(tokens), classes=classes,
        )  # fmt: skip
        assert int(rows.logits[0].argmax()) == token
        context.clear()
        tokens, classes = [*tokens, token], [*classes, 3]


def test_what_is_cached_of_a_form_serves_nobody_who_steers_it(exact_bundled, loud):
    """The same tokens as a reply in a form, and as one that is steered: other states, so none is shared."""
    ask = Ask(QUESTION, steer=loud, sampling=FORCED, max_tokens=30)
    with Scheduler(exact_bundled) as fresh:
        wanted = fresh.submit(ask).result().tokens
    with Scheduler(exact_bundled) as scheduler:
        kept = scheduler.submit(ask, plain_forms=True)
        assert kept.result().tokens != wanted
        assert kept.plain_tokens == len(kept.tokens)
        again = scheduler.submit(ask)
        assert again.result().tokens == wanted and again.plain_tokens == 0


def test_a_reply_that_reads_its_tokens_again_reads_them_as_before(exact_bundled, loud):
    ask = Ask(QUESTION, steer=loud, sampling=FORCED, max_tokens=40, plain_forms=True)
    with Scheduler(exact_bundled) as scheduler:
        wanted = scheduler.submit(ask).result().tokens
        ticket = scheduler.submit(ask)
        chunks = iter(ticket)
        next(chunks)
        with scheduler.paused() as engine:
            engine.logits(engine.prompt_tokens("Hello."))
        list(chunks)
        assert ticket.tokens == wanted


def test_a_vector_at_the_prompt_needs_no_watch(exact_bundled, loud):
    ask = Ask(QUESTION, steer=loud.at(positions="prompt"), sampling=FORCED, max_tokens=10, plain_forms=True)
    with Scheduler(exact_bundled) as scheduler:
        ticket = scheduler.submit(ask)
        assert json.dumps(ticket.result().tokens) and ticket.plain_tokens == 0


@pytest.mark.parametrize(
    ("stop", "text", "which"),
    [(("b",), "ab", "b"), (("bc", "b"), "abc", "bc"), (("c", "bcd"), "abcd", "bcd"), (("x",), "abc", None)],
)
def test_the_stop_string_that_came_is_told(stop, text, which):
    stream = TextStream(stop)
    stream.push(text.encode())
    assert (stream.stopped_by, stream.stopped) == (which, which is not None)


def test_a_reply_s_last_chunk_names_its_stop_string(exact_bundled):
    whole = exact_bundled.generate(QUESTION, sampling=GREEDY, max_tokens=40).text
    word = whole.split()[2]
    chunks = list(exact_bundled.stream(Ask(QUESTION, sampling=GREEDY, max_tokens=40, stop=[word])))
    assert chunks[-1].stopped_by == word and isinstance(localsteer.Reply.of(chunks).text, str)
