"""A model without a chat template is asked as `Q: ...` / `A:`, and no reply runs on into a next turn."""

from __future__ import annotations

import shutil

import pytest
from cli_runs import invoke, write_vector
from engines import GREEDY, open_engine
from serving import serving

from localsteer.chat import Chat
from localsteer.runtime.ask import Ask
from localsteer.runtime.journal import Journal, Remembered
from localsteer.runtime.loop import stops_of
from localsteer.runtime.sampling import Sampling
from localsteer.runtime.scheduler import Scheduler
from localsteer.trace import trace
from localsteer.vector import ControlVector

# what a base model writes, and what of it is the reply
RUNS_ON = {
    "a blank line": " A fox.\n\nQ: And owls?\nA: Owls.",
    "none": " A fox.\nQ: And owls?\nA: Owls.",
    "another answer": " A fox.\nA: It hunts.\nA: Owls.",
    "another answer after a blank line": " A fox.\n\nA: It hunts. Owls.",
}
REPLY = " A fox."
ASKED = "Tell me about foxes."


def writing(text: str) -> Sampling:
    """A grammar that lets the model write nothing else."""
    quoted = text.replace("\n", "\\n")
    return Sampling(temp=0.0, grammar=f'root ::= "{quoted}"')


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    """The tiny model without its chat template."""
    from localsteer.convert.checkpoint import checkpoint_to_gguf

    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_llama.hf_dir, folder / "hf")
    (folder / "hf" / "chat_template.jinja").unlink()
    return checkpoint_to_gguf(folder / "hf", folder / "base.gguf")


@pytest.fixture(scope="module")
def engine(base):
    with open_engine(base) as engine:
        yield engine


@pytest.fixture(params=RUNS_ON)
def sampling(request):
    return writing(RUNS_ON[request.param])


@pytest.fixture
def vector(tmp_path):
    return ControlVector.load(write_vector(tmp_path / "v.gguf")).at(strength=0.01)


def test_a_reply_ends_before_the_next_question_whoever_asks(engine, sampling):
    assert engine.generate(ASKED, sampling=sampling).text == REPLY
    assert "".join(chunk.text for chunk in engine.stream(ASKED, sampling=sampling)) == REPLY
    for reply in engine.generate_batch([ASKED, "Hi"], sampling=sampling):
        assert (reply.text, reply.finish_reason) == (REPLY, "stop")
    with Scheduler(engine) as scheduler:
        assert scheduler.submit(ASKED, sampling=sampling).result().text == REPLY


def test_stop_strings_of_the_caller_count_beside_it(engine, sampling):
    assert engine.generate(ASKED, sampling=sampling, stop=["fox"]).text == " A "
    assert engine.generate(ASKED, sampling=sampling, stop="Owls").text == REPLY
    assert stops_of(engine, Ask(ASKED, stop=["\nQ:", "x"])) == [
        "\nQ:",
        "x",
        "\n\nQ:",
        "\n\nA:",
        "\nA:",
    ]  # none twice


def test_a_raw_prompt_goes_on(engine, sampling):
    whole = engine.generate("Q: Why?\nA:", raw=True, sampling=sampling).text
    assert whole in RUNS_ON.values()


def test_a_model_with_a_template_may_write_what_it_likes(tiny_llama, sampling):
    with open_engine(tiny_llama.gguf_path) as engine:
        assert engine.generate(ASKED, sampling=sampling).text in RUNS_ON.values()
    with open_engine(tiny_llama.gguf_path, plain_prompts=True) as engine:  # a template that is not used
        assert engine.generate(ASKED, sampling=sampling).text == REPLY


def test_every_turn_of_a_conversation_ends(base, sampling):
    with open_engine(base) as engine, Chat(engine, sampling=sampling) as chat:
        assert [chat.ask(question).reply for question in (ASKED, "And hares?")] == [REPLY, REPLY]
        assert engine.render(chat.messages("Why?")).count("Q:") == 3


def test_a_trace_has_no_token_of_the_next_question(engine, vector, sampling):
    traced = trace(engine, ASKED, [vector], sampling=sampling)
    assert (traced.reply.rstrip("\n"), traced.finish_reason) == (REPLY, "stop")
    assert trace(engine, "Q: Hi\nA:", [vector], sampling=sampling, raw=True).reply in RUNS_ON.values()


def test_a_journal_knows_replies_by_how_they_end(base):
    """One that was kept under other stop strings is another reply."""
    journal = Journal(None, {})
    for options in ({}, {"plain_prompts": True}):
        with open_engine(base, **options) as engine:
            remembered = Remembered(engine, journal)
            remembered.generate_batch([ASKED], sampling=GREEDY, max_tokens=4)
            assert remembered.n_decoded == (0 if options else 1)
            remembered.generate_batch([ASKED], sampling=GREEDY, max_tokens=4, stop=["x"])
            assert remembered.n_decoded == (0 if options else 2)


def test_the_command_line_says_once_how_the_model_is_asked(base, tmp_path, vector):
    grammar = ("--grammar", writing(RUNS_ON["none"]).grammar, "--temp", "0")
    done = invoke("run", "-m", base, *grammar, "-s", tmp_path / "v.gguf", "--compare", "--json", ASKED)
    assert (done.json["reply"], done.json["plain"]["reply"]) == (REPLY, REPLY)
    assert done.err.count("no chat template") == 1 and "before the next of them" in done.err
    done = invoke("chat", "-m", base, *grammar, input=f"{ASKED}\nAnd hares?\n")
    assert (done.out, done.err.count("no chat template")) == (f"{REPLY}\n{REPLY}\n", 1)


def test_a_server_ends_replies_to_chats_and_not_to_texts(base, monkeypatch, sampling):
    monkeypatch.setattr("localsteer.server.turns._grammar", lambda *_: sampling.grammar)
    with serving(None, models={"base": base}) as server:
        client = server.client()
        asked = {"model": "base", "messages": [{"role": "user", "content": ASKED}], "temperature": 0}
        choice = client.chat.completions.create(**asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == (REPLY, "stop")
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY


def test_replies_of_the_torch_backend_end_alike(tiny_llama, tmp_path):
    from localsteer.extract import open_backend
    from localsteer.extract.torch_replies import _reply

    shutil.copytree(tiny_llama.hf_dir, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    for folder, text in ((tmp_path / "hf", REPLY), (tiny_llama.hf_dir, RUNS_ON["a blank line"])):
        with open_backend(folder, n_threads=1) as backend:
            tokens = backend.tokenizer(RUNS_ON["a blank line"]).input_ids
            assert _reply(backend, tokens, ()).text == text
