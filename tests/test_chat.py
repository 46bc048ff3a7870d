"""Chat: what a conversation holds, what a change of steering does to it, and whole transcripts."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace

import pytest
from bundled_vectors import GREEDY, bundled_vectors, judged_by, open_bundled
from cli_runs import command_line, invoke

from localsteer import bundled
from localsteer.catalog import load_catalog
from localsteer.chat import Chat
from localsteer.errors import LocalsteerError, PlanError, PromptError
from localsteer.runtime.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

FOXES, HARES, OWLS = "Tell me about foxes.", "Where does the hare live?", "Tell me about owls."
SHORT = {"sampling": GREEDY, "max_tokens": 60}


@pytest.fixture(scope="module")
def engine():
    with open_bundled() as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine):
    return bundled_vectors(engine, ("json", "lowercase", "title"))


@pytest.fixture
def chat(engine, vectors):
    with Chat(engine, vectors=vectors, **SHORT) as chat:
        chat.notes = []
        chat.on_note = chat.notes.append
        yield chat


def fresh(engine, messages, steer=()):
    return engine.generate(messages, steer=steer, **SHORT).text


def talk(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# --- what a turn answers -----------------------------------------------------------------------------------


def test_turns_are_answered_as_from_an_empty_cache(engine, chat, vectors):
    """Plain, steered, and plain again: each reply is that of the whole conversation read afresh."""
    steps = [(FOXES, []), (HARES, ["json"]), (OWLS, ["json"]), (FOXES, [])]
    for question, names in steps:
        chat.unsteer()
        for name in names:
            chat.steer(name)
        chat.ask(question)
    said = [(turn.question, turn.reply) for turn in chat.turns]
    chat.close()
    history: list[str] = []
    for (question, names), (_, reply) in zip(steps, said, strict=True):
        history.append(question)
        assert reply == fresh(engine, talk(*history), [vectors[name] for name in names])
        history.append(reply)
    assert said[1][1].startswith("{")


def test_a_change_of_steering_is_told_once_with_its_cost(chat):
    chat.ask(FOXES)
    assert chat.notes == []
    chat.steer("json")
    chat.ask(HARES)
    (note,) = chat.notes
    assert note.startswith("steering changed: ") and note.endswith(" are read again under it.")
    again, known = (int(word) for word in note.split() if word.isdigit())
    assert again == known > 20
    chat.ask(OWLS)
    assert len(chat.notes) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_keep_cache_reads_nothing_again_and_says_so(engine, vectors, keep):
    with Chat(engine, vectors=vectors, keep_cache=keep, **SHORT) as chat:
        notes: list[str] = []
        chat.on_note = notes.append
        chat.ask(FOXES)
        chat.steer("json", positions="all")
        chat.ask(HARES)
        used = max(chat.scheduler._loop.cache._sequences, key=len)
    again, known = (int(word) for word in notes[0].split() if word.isdigit())
    assert again == known > 20
    assert notes[0].endswith("computed before (--keep-cache)." if keep else "are read again under it.")
    # what the cache says of itself stays true: the first turn unsteered, or everything steered alike
    assert {cell.key == b"" for cell in used[:known]} == {keep}
    assert b"" not in {cell.key for cell in used[known:]}


def test_text_comes_as_it_is_generated(chat):
    pieces: list[str] = []
    turn = chat.ask(FOXES, on_text=pieces.append)
    assert "".join(pieces) == turn.reply and len(pieces) > 5


def test_ctrl_c_keeps_what_has_come(engine, chat):
    pieces: list[str] = []

    def press(text):
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    turn = chat.ask(FOXES, on_text=press)
    assert (turn.finish_reason, chat.turns) == ("cancelled", [turn])
    assert turn.reply == "".join(pieces)
    after = chat.ask(HARES)
    chat.close()
    assert after.reply == fresh(engine, talk(FOXES, turn.reply, HARES))


def test_a_reply_without_a_word_is_not_kept(chat, monkeypatch):
    def interrupted(_ticket):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("localsteer.runtime.scheduler.Ticket.__iter__", interrupted)
    assert chat.ask(FOXES).finish_reason == "cancelled"
    assert chat.turns == []


def test_a_seed_counts_up(engine):
    from localsteer import Sampling

    def replies():
        with Chat(engine, sampling=Sampling(temp=1.0, seed=5), max_tokens=20) as chat:
            first = chat.ask(FOXES).reply
            chat.undo()
            return first, chat.ask(FOXES).reply

    assert replies() == replies()
    assert replies()[0] != replies()[1]


# --- ensure, compare, trace --------------------------------------------------------------------------------


def test_ensure_steers_only_where_the_reply_fails(engine, chat, vectors):
    chat.ensure("json")
    turn = chat.ask(FOXES)
    assert turn.reply.startswith("{")
    assert chat.notes == ["the plain reply fails json: this one is steered at strength 1."]
    assert [each["name"] for each in turn.steering] == ["json"]
    chat.clear()
    kept = chat.ask(f"{FOXES} Answer in JSON format.")
    assert kept.reply.startswith("{") and kept.steering == ()
    chat.ensure()
    chat.clear()
    assert not chat.ask(FOXES).reply.startswith("{")


def test_compare_is_the_last_question_plain_and_steered_and_changes_nothing(engine, chat, vectors):
    with pytest.raises(LocalsteerError, match="no question"):
        chat.compare()
    chat.ask(FOXES)
    with pytest.raises(LocalsteerError, match="there is no steering"):
        chat.compare()
    chat.ask(HARES)
    turns = list(chat.turns)
    chat.steer("json")
    plain, steered = chat.compare()
    assert chat.turns == turns
    chat.close()
    messages = talk(FOXES, turns[0].reply, HARES)
    assert plain.text == fresh(engine, messages) == turns[1].reply
    assert steered.text == fresh(engine, messages, [vectors["json"]])


def test_trace_follows_the_last_turn(chat, vectors):
    with pytest.raises(LocalsteerError, match="no reply to trace"):
        chat.trace()
    chat.ask(FOXES)
    with pytest.raises(LocalsteerError, match="was not steered"):
        chat.trace()
    chat.steer("json")
    turn = chat.ask(HARES)
    made = chat.trace()
    assert (made.reply, made.vectors[0].name) == (turn.reply, "json")
    # the engine is the chat's again
    assert chat.ask(OWLS).reply


# --- a question that asks already --------------------------------------------------------------------------

HARM = {"n": 8, "scores": {"instructed": 0.875, "both": 0.5}}


@pytest.fixture
def harmful(vectors):
    title = vectors["title"]
    return replace(title, provenance={**title.provenance, "validation": HARM})


def asking(harmful):
    return f"{FOXES} {load_catalog(bundled.CATALOG).get('title').held_out_phrasings[0]}"


def test_each_turn_is_steered_only_where_its_question_does_not_ask_already(engine, chat, harmful):
    chat.add("title", harmful)
    chat.steer("title")
    turns = [chat.ask(question) for question in (asking(harmful), HARES, asking(harmful))]
    chat.close()
    assert [turn.left_out for turn in turns] == [("title",), (), ("title",)]
    assert [[each["name"] for each in turn.steering] for turn in turns] == [[], ["title"], []]
    assert turns[0].reply == fresh(engine, talk(asking(harmful)))
    history = talk(asking(harmful), turns[0].reply, HARES)
    assert turns[1].reply == fresh(engine, history, [harmful]) != fresh(engine, history)
    told = [note for note in chat.notes if "left out" in note]
    assert told == [
        "title is left out: the prompt already asks for it, and its file says that steering then does harm "
        "(told 88%, told and steered 50%); /strength, or --always-steer, applies it anyway."
    ]
    assert turns[0].record()["left_out"] == ["title"] and "left_out" not in turns[1].record()


@pytest.mark.parametrize("how", ["steer", "change", "always"])
def test_a_strength_of_the_users_own_is_applied_always(engine, vectors, harmful, how):
    with Chat(engine, vectors={"title": harmful}, always_steer=how == "always", **SHORT) as chat:
        chat.steer("title", strength=1 if how == "steer" else None)
        if how == "change":
            chat.change(strength=1)
        turn = chat.ask(asking(harmful))
        chat.unsteer()
        chat.steer("title")
        again = chat.ask(asking(harmful))
    assert turn.left_out == () and [vector.name for vector in turn.vectors] == ["title"]
    assert again.left_out == (() if how == "always" else ("title",))


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_full_context_is_said_and_nothing_is_dropped(vectors):
    with open_bundled(n_ctx=64) as engine, Chat(engine, sampling=GREEDY, max_tokens=None) as chat:
        notes: list[str] = []
        chat.on_note = notes.append
        chat.ask(FOXES)
        chat.ask(HARES)
        assert notes and notes[-1].startswith(
            "the context of 64 tokens is full, and the reply was cut: /undo"
        )
        with pytest.raises(PromptError, match="the context holds 64: /undo removes the last turn, /clear"):
            chat.ask(OWLS)
        assert [turn.question for turn in chat.turns] == [FOXES, HARES]
        chat.undo()
        chat.undo()
        assert chat.ask(OWLS).reply


def test_what_cannot_be_steered_changes_nothing(engine, chat, vectors):
    chat.steer("json")
    with pytest.raises(PlanError, match="no vector 'jsn' here: choose one of json, lowercase, title"):
        chat.steer("jsn")
    with pytest.raises(PlanError, match="layer 99 is out of range"):
        chat.steer("lowercase", layer=99)
    with pytest.raises(PlanError, match="'title' does not steer: json does"):
        chat.unsteer("title")
    with pytest.raises(PlanError, match="nearly parallel"):
        chat.add("twin", vectors["json"])
        chat.steer("twin")
    with pytest.raises(PlanError, match="unknown positions"):
        chat.change(positions="everywhere")
    assert list(chat.active) == ["json"]
    chat.add("bare", judged_by(vectors["title"], ""))
    with pytest.raises(PlanError, match="bare names no verifier"):
        chat.ensure("bare")


# --- files -------------------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_as_it_would_have(engine, chat, vectors, tmp_path):
    chat.ask(FOXES)
    chat.steer("json", strength=0.9)
    chat.ask(HARES)
    path = tmp_path / "chat.json"
    chat.save(path)
    expected = chat.ask(OWLS).reply
    chat.close()
    document = json.loads(path.read_text("utf-8"))
    assert [turn["steering"] for turn in document["turns"]] == [[], document["steering"]]
    assert document["steering"] == [
        {"name": "json", "layers": [2], "mode": "project", "positions": "prompt", "strength": 0.9}
    ]
    with Chat(engine, vectors=vectors, **SHORT) as other:
        other.load(path)
        assert [turn.question for turn in other.turns] == [FOXES, HARES]
        assert other.trace().vectors[0].strength == 0.9
        assert other.ask(OWLS).reply == expected
        assert other.document()["turns"][:2] == document["turns"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_be_saved_can_be_loaded(chat, tmp_path):
    chat.system = "be \udcff kind"  # a byte of the command line that is no UTF-8
    chat.save(tmp_path / "chat.json")
    chat.load(tmp_path / "chat.json")
    assert chat.system == "be \udcff kind"


def test_saving_replaces_conversations_alone(chat, vectors, tmp_path):
    path = tmp_path / "json.gguf"
    vectors["json"].save(path)
    before = path.read_bytes()
    with pytest.raises(LocalsteerError, match="not a saved conversation: choose another name"):
        chat.save(path)
    assert path.read_bytes() == before
    chat.save(tmp_path / "chat.json")
    chat.system = "Be kind."
    chat.save(tmp_path / "chat.json")
    assert "Be kind." in (tmp_path / "chat.json").read_text("utf-8")


def test_vectors_that_are_not_here_are_left_out_aloud(engine, chat, vectors, tmp_path):
    chat.steer("json")
    chat.ask(FOXES)
    chat.save(tmp_path / "chat.json")
    chat.close()
    with Chat(engine, **SHORT) as other:
        notes: list[str] = []
        other.on_note = notes.append
        other.load(tmp_path / "chat.json")
        assert notes == ["there is no vector 'json' here: the conversation continues without it."]
        with pytest.raises(LocalsteerError, match="not steered by a vector that is here"):
            other.trace()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it has no turns"),
        ('{"turns": []}', "format None"),
        ('{"format": 2, "turns": []}', "format 2"),
        ('{"format": 1, "turns": [{"question": "Hi"}]}', "lacks its question or its reply"),
        ('{"format": 1, "turns": [3]}', "lacks its question or its reply"),
        ('{"format": 1, "turns": [], "steering": 3}', "not a list of vectors"),
        ('{"format": 1, "turns": [], "steering": [{"name": "json", "strength": "x"}]}', "not a number"),
        ('{"format": 1, "turns": [], "system": 3}', "system message"),
    ],
)
def test_a_broken_file_is_refused_and_changes_nothing(chat, tmp_path, text, complaint):
    chat.steer("title")
    chat.ask(FOXES)
    before = chat.document()
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(LocalsteerError, match=complaint):
        chat.load(path)
    assert chat.document() == before
    with pytest.raises(LocalsteerError, match="can't read"):
        chat.load(tmp_path / "missing.json")


def test_the_engine_is_free_after_a_chat(engine, chat):
    chat.ask(FOXES)
    chat.close()
    with Scheduler(engine) as scheduler:
        assert scheduler.submit(FOXES, **SHORT).result().text


# --- whole transcripts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    for name, vector in vectors.items():
        vector.save(folder / f"{name}.gguf")
    bundled.gguf_path("instruct")  # made before any transcript: the first use of it is announced
    return folder


@pytest.fixture(scope="module")
def conversation(vectors):
    """The library's own conversation in the context that the command opens: `conversation(steps)` gives the
    replies to (question, names of vectors) in turn."""
    from localsteer import Engine

    def replies(*steps):
        with (
            Engine(bundled.gguf_path(), n_threads=1, n_seq_max=2) as engine,
            Chat(engine, vectors=vectors, **SHORT) as chat,
        ):
            for question, *names in steps:
                chat.unsteer()
                for name in names:
                    chat.steer(name)
                chat.ask(question)
            return [turn.reply for turn in chat.turns]

    return replies


def chat_args(folder, *more):
    vectors = ("--vectors", folder) if folder else ()
    return ("chat", *vectors, "--temp", "0", "-n", "60", "-t", "1", *more)


def test_a_piped_conversation(folder, conversation, tmp_path):
    saved = tmp_path / "saved.json"
    lines = [
        FOXES, "", "/steer json:1@2", HARES, "/foo", "/steer jsn", "/strength json x", "/positions sideways",
        "/undo", "/unsteer", f"/save {saved}", "/clear", f"/load {saved}", "/quit", OWLS,
    ]  # fmt: skip
    done = invoke(*chat_args(folder), input="\n".join(lines) + "\n")
    first, second = conversation((FOXES,), (HARES, "json"))
    assert (done.status, done.out) == (0, f"{first}\n{second}\n")
    notes = [line.removeprefix("localsteer: ") for line in done.err.splitlines()]
    assert notes[0] == "steering by json:1@2 project prompt."
    assert notes[1].startswith("steering changed: ")
    assert notes[2:] == [
        "unknown command /foo: /help lists them; write // to begin a question with /.",
        "there is no vector 'jsn': choose json, lowercase, title, a file, or an instruction of the "
        "catalogue.",
        "strength 'x' is not a number.",
        "unknown positions 'sideways': choose one of all, prompt, last, generation.",
        f"removed {HARES!r}; 1 turn left.",
        "no longer steering by json.",
        f"wrote {saved}: 1 turn.",
        "forgot 1 turn.",
        f"read {saved}: 1 turn; steering by nothing.",
    ]
    assert json.loads(saved.read_text())["turns"][0]["reply"] == first


def test_a_piped_conversation_as_one_document(folder, conversation):
    done = invoke(*chat_args(folder, "--json", "-s", folder / "title.gguf"), input=f"{FOXES}\n")
    (turn,) = done.json["turns"]
    assert [turn["reply"]] == conversation((FOXES, "title"))
    assert turn["steering"][0]["name"] == "title"


def test_a_piped_conversation_says_once_what_it_leaves_out(harmful, tmp_path):
    path = tmp_path / "title.gguf"
    harmful.save(path)
    questions = f"{asking(harmful)}\n{asking(harmful)}\n"
    for more, n_told in (((path,), 1), ((path, "--always-steer"), 0), ((f"{path}:1",), 0)):
        done = invoke(*chat_args(None, "-s", *more, "--json"), input=questions)
        assert done.err.count("title is left out") == n_told
        assert ["left_out" in turn for turn in done.json["turns"]] == [bool(n_told)] * 2


def test_two_files_of_one_name_are_two_vectors(folder, vectors, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "json.gguf"
    vectors["title"].at(layer=1).save(other)
    args = chat_args(None, "-s", folder / "json.gguf", "-s", folder / "json.gguf:0.5@1", "--json")
    done = invoke(*args, input=f"/steer {other}\n")
    found = {(each["name"], each["strength"]) for each in done.json["steering"]}
    assert found == {("json", 1.0), ("json#2", 0.5), (str(other), 1.0)}, done.err


def test_tables_of_a_conversation(folder):
    lines = [FOXES, "/steer title", "/compare", "/vectors", "/help", "/trace"]
    done = invoke(*chat_args(folder), input="\n".join(lines))
    assert done.status == 0
    flat = " ".join(done.out.split())
    assert "title:1@2 project prompt" in flat and "<<All" in flat
    assert "title steers 1 2 prompt project" in flat
    assert "/steer NAME[:STRENGTH][@LAYER] ..." in done.out
    assert done.err.endswith("the last reply was not steered: there is nothing to trace.\n")


def test_replies_under_a_schema_stay_plain_unless_it_is_asked_for(folder):
    form = ("-j", '{"type": "string", "maxLength": 20}')
    steered = (*form, "-s", folder / "json.gguf:6", "--mode", "add", "--positions", "generation")
    plain, kept, loose = (
        invoke(*chat_args(folder, *options), input=f"{FOXES}\n")
        for options in (form, steered, (*steered, "--steer-forms"))
    )
    assert kept.out == plain.out != loose.out
    assert "--steer-forms" in kept.err and "--steer-forms" not in plain.err + loose.err


def test_what_the_command_refuses_before_it_begins(folder, tmp_path):
    assert "there is no such folder" in invoke("chat", "--vectors", tmp_path / "none").complaint()
    assert "no vector file" in invoke("chat", "--vectors", tmp_path).complaint()
    assert "not in the range" in invoke("chat", "--tries", "0").complaint()
    bad = invoke(*chat_args(folder, "--ensure", "jsn"), input="Hi\n")
    assert "there is no vector 'jsn'" in bad.complaint()


def test_a_missing_prompt_toolkit_is_one_line(monkeypatch):
    from localsteer.cli import chat as command

    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(LocalsteerError, match=r'pip install "localsteer\[chat\]"'):
        command._require_prompt_toolkit()


def test_a_line_that_is_no_text_is_left_out(folder, conversation):
    done = invoke(*chat_args(folder), input=b"\xff\xfe\n" + FOXES.encode() + b"\n")
    assert done.out == conversation((FOXES,))[0] + "\n"
    assert done.err == "localsteer: line 1 of the standard input is not UTF-8 text (byte 0): skipped.\n"


# --- in a real terminal ------------------------------------------------------------------------------------


@pytest.fixture
def terminal(folder, tmp_path):
    """`terminal(*args)` opens a chat in a pty; the line history goes to a folder of the test."""
    pytest.importorskip("pexpect", reason="pexpect drives the terminal")
    pytest.importorskip("pyte", reason="pyte shows what is on the screen")
    if os.name != "posix":
        pytest.skip("a pty is a POSIX thing")
    from terminals import Terminal

    opened = []
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    for path in bundled.gguf_path().parent.glob(f"{bundled.gguf_path().name}*"):  # its checksum as well
        (cache / "models" / path.name).symlink_to(path)

    def open_chat(*more, folder=folder):
        command = command_line(*chat_args(folder, *more))
        opened.append(Terminal(command, env={"LOCALSTEER_CACHE": str(cache)}))
        opened[-1].wait_for_prompt(1)
        return opened[-1]

    open_chat.cache = cache
    yield open_chat
    for each in opened:
        each.child.close(force=True)


def wrapped(text, width=100):
    """A text as a terminal of this width shows it."""
    rows = (text[start : start + width].rstrip() for start in range(0, len(text), width))
    return [row for row in rows if row]


GREETING = "localsteer: {}: /help lists the commands, Alt-Enter starts a new line, Ctrl-D quits."


def test_a_transcript_in_a_terminal(terminal, conversation):
    """Steering in the middle, a bad command, many lines, completion, and Ctrl-D."""
    chat = terminal()
    chat.send(f"{FOXES}\r")
    chat.wait_for_prompt(2)
    chat.send("/stee\t")
    chat.wait_for(lambda screen: screen.endswith("> /steer"), "the completed command")
    chat.send(" js\t")
    chat.wait_for(lambda screen: screen.endswith("> /steer json"), "the completed name")
    chat.send("\r")
    chat.wait_for_prompt(3)
    chat.send("Where does\x1b\rthe hare live?\r")
    chat.wait_for_prompt(4)
    chat.send("/nonsense\r")
    chat.wait_for_prompt(5)
    chat.send("/undo\r")
    screen = chat.wait_for_prompt(6)
    chat.send("\x04")
    assert chat.end() == 0
    first, second = conversation((FOXES,), ("Where does\nthe hare live?", "json"))
    note = next(line for line in screen.split("\n") if "steering changed" in line)
    assert screen.split("\n") == [
        *wrapped(GREETING.format(bundled.gguf_path().name)),
        f"> {FOXES}",
        *wrapped(first),
        "> /steer json",
        "localsteer: steering by json:1@2 project prompt.",
        "> Where does",
        ". the hare live?",
        note,
        *wrapped(second),
        "> /nonsense",
        "localsteer: unknown command /nonsense: /help lists them; write // to begin a question with /.",
        "> /undo",
        "localsteer: removed 'Where does the hare live?'; 1 turn left.",
        ">",
    ]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that goes on for thousands of tokens."""
    pytest.importorskip("torch")
    from tiny_models import write_checkpoint

    from localsteer.convert.checkpoint import checkpoint_to_gguf

    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint("llama", folder / "hf", max_position_embeddings=32768)
    return checkpoint_to_gguf(folder / "hf", folder / "endless.gguf", "F32")


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal, endless):
    """More often than other commands stand it, in the middle of a line too."""
    chat = terminal("-m", endless, "-n", "-1", "-c", "32768", folder=None)
    for _ in range(4):  # what was long ago may have left the screen
        chat.send("half a question\x03")
        chat.wait_for(lambda screen: screen.endswith("> half a question\n>"), "a fresh prompt")
        chat.send("Hi\r")
        chat.wait_for(lambda screen: len(screen.rpartition("> Hi")[2]) > 40, "the reply's beginning")
        chat.send("\x03")
        screen = chat.wait_for(
            lambda screen: screen.rpartition("> Hi")[2].endswith("localsteer: the reply was stopped.\n>"),
            "the notice and a fresh prompt",
        )
        assert "Traceback" not in screen
    chat.send("\x04")
    assert chat.end() == 0


def test_lines_are_remembered_for_their_owner_alone(terminal):
    chat = terminal()
    chat.send("/clear\r")
    chat.wait_for_prompt(2)
    chat.send("\x04")
    assert chat.end() == 0
    file = terminal.cache / "chat-history"
    assert "/clear" in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    again = terminal()
    again.send("\x1b[A")  # the line before
    again.wait_for(lambda screen: screen.endswith("> /clear"), "the line of the last time")
