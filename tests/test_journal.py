"""A journal keeps what a long run has done, whatever ends it; with it an engine gives the same replies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import GREEDY, open_engine, random_vector

from localsteer.errors import LocalsteerError
from localsteer.runtime.journal import Journal, Remembered
from localsteer.runtime.sampling import Sampling
from localsteer.workers import Workers

IDENTITY = {"model": "0123abcd"}
RECORD = {"kind": "reply", "text": "a fox", "tokens": [1, 2], "finish_reason": "stop"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "replies.jsonl"


def write(path, n=3, identity=IDENTITY):
    with Journal(path, identity) as journal:
        for k in range(n):
            journal.put(f"key {k}", RECORD | {"text": f"reply {k}"})
    return path.read_bytes()


# --- the file ---


def test_what_was_put_is_there_when_the_run_goes_on(path):
    write(path)
    with Journal(path, IDENTITY) as journal:
        assert len(journal) == 3
        assert journal.get("key 1") == RECORD | {"text": "reply 1"}
        assert journal.get("key 9") is None
        journal.put("key 3", RECORD)
    assert len(Journal(path, IDENTITY)) == 4


def test_every_line_is_a_json_object_of_its_own(path):
    lines = [json.loads(line) for line in write(path).splitlines()]
    assert lines[0]["localsteer"] == "journal" and lines[0]["model"] == IDENTITY["model"]
    assert [line["text"] for line in lines[1:]] == ["reply 0", "reply 1", "reply 2"]


def test_a_key_is_written_once(path):
    with Journal(path, IDENTITY) as journal:
        journal.put("key", RECORD)
        journal.put("key", RECORD | {"text": "another"})
        assert journal.get("key") == RECORD
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_a_line_at_the_end_is_dropped(path, cut):
    whole = write(path)
    path.write_bytes(whole[:-cut])
    with Journal(path, IDENTITY) as journal:
        assert len(journal) == 2
        journal.put("key 2", RECORD | {"text": "reply 2"})
    assert path.read_bytes() == whole


def test_a_header_that_was_cut_short_begins_anew(path):
    header = write(path).splitlines(keepends=True)[0]
    path.write_bytes(header[:-4])
    assert len(Journal(path, IDENTITY)) == 0
    assert path.read_bytes() == header


@pytest.mark.parametrize(
    "line",
    [
        b"{half",
        b"[" * 100_000,
        b"[1]",
        b'"text"',
        b'{"text": "no key"}',
        b'{"key": 5}',
        b"\xff\xfe",
        b"",
        b"null",
    ],
)
def test_a_line_that_cant_be_read_is_named_by_its_number(path, line):
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with pytest.raises(LocalsteerError, match=r"replies\.jsonl, line 3: .*remove the line"):
        Journal(path, IDENTITY)


def test_unusual_line_ends_in_a_text_do_not_break_its_line(path):
    text = "one\rtwo\u2028three\x85four\nfive\x0bsix\ud800"
    with Journal(path, IDENTITY) as journal:
        journal.put("key", RECORD | {"text": text})
    assert Journal(path, IDENTITY).get("key")["text"] == text


def test_the_journal_of_another_model_is_refused_and_left_alone(path):
    whole = write(path)
    with pytest.raises(LocalsteerError, match=r"belongs to another run .*'0123abcd', now 'ffff'"):
        Journal(path, {"model": "ffff"})
    assert path.read_bytes() == whole


def test_a_journal_without_any_record_holds_no_folder(path):
    refused = Journal(path, {"model": "of a run that was killed before its first reply"})
    whole = write(path)
    assert b"killed" not in whole and len(Journal(path, IDENTITY)) == 3
    refused.close()


def test_a_run_that_was_refused_leaves_nothing_of_its_own(path):
    with Journal(path, IDENTITY), Journal(path.parent / "base" / "replies.jsonl", IDENTITY):
        assert path.exists()
    assert not path.parent.exists() and path.parent.parent.exists()
    path.parent.mkdir()
    with Journal(path, IDENTITY):
        pass
    assert path.parent.exists() and not path.exists()
    with Journal(path, IDENTITY):
        (path.parent / "notes.txt").write_text("mine")
    assert [each.name for each in path.parent.iterdir()] == ["notes.txt"]
    write(path)
    with Journal(path, IDENTITY):
        pass
    assert len(Journal(path, IDENTITY)) == 3


@pytest.mark.parametrize(
    "content",
    ['{"prompt": "Tell me about foxes."}\n', '{"prompt": "no newline"}', "my notes", "my notes\nof foxes"],
)
def test_a_file_of_something_else_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(LocalsteerError, match=r"replies\.jsonl"):
        Journal(path, IDENTITY)
    assert path.read_text() == content


def test_a_folder_that_cant_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalsteerError, match=r"replies\.jsonl can't be used .*: choose another folder"):
        Journal(tmp_path / "file" / "replies.jsonl", IDENTITY)


def test_without_a_path_it_is_a_memory(tmp_path):
    journal = Journal(None, IDENTITY)
    journal.put("key", RECORD)
    assert journal.get("key") == RECORD
    journal.close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from localsteer.errors import LocalsteerError
from localsteer.runtime.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with Journal(Path(sys.argv[1]), {"model": "0123abcd"}) as journal:
        for k in range(1000):
            journal.put(f"key {k}", {"kind": "reply", "text": "x" * 100, "tokens": [], "finish_reason": ""})
except LocalsteerError as error:
    print(k, error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of a file's size here")
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    failed_at, said = done.stdout.strip().split(" ", 1)
    assert "can't be written" in said and "what is done is kept" in said and "again" in said
    with Journal(path, IDENTITY) as journal:  # the disk has room again
        assert len(journal) == int(failed_at) > 10
        journal.put("key new", RECORD)
    assert len(Journal(path, IDENTITY)) == int(failed_at) + 1


def test_threads_may_write_at_once(path):
    with Journal(path, IDENTITY) as journal:

        def work(thread):
            for k in range(200):
                journal.put(f"key {thread % 4} {k}", RECORD | {"text": "long " * 400})  # several buffers long

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(Journal(path, IDENTITY)) == 800
    assert len(path.read_bytes().splitlines()) == 801


KILLED = """
import os, signal, sys
from pathlib import Path
from localsteer.runtime.journal import Journal
journal = Journal(Path(sys.argv[1]), {"model": "0123abcd"})
for k in range(50):
    journal.put(f"key {k}", {"kind": "reply", "text": "kept", "tokens": [], "finish_reason": ""})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_keeps_every_record(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert len(Journal(path, IDENTITY)) == 50


# --- the engine ---

PROMPTS = ["Hello", "one", "Hello", "a b c"]


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_ctx=64) as engine:
        yield engine


class Counting:
    """The engine, and how many sequences and decodes it was asked for."""

    def __init__(self, engine):
        self._engine = engine
        self.scored = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def score(self, pairs, **options):
        self.scored += len(pairs)
        return self._engine.score(pairs, **options)


def ask(engine, prompts=PROMPTS, **options):
    return engine.generate_batch(prompts, **{"max_tokens": 6, "sampling": GREEDY, **options})


def content(replies):
    return [(reply.text, reply.tokens, reply.finish_reason) for reply in replies]


def test_replies_are_those_of_the_engine_itself(engine, path):
    vector = random_vector(engine)
    steer = [(), vector, (vector,), vector.at(strength=0.5)]
    steer = [(each,) if not isinstance(each, tuple) else each for each in steer]
    plain = content(ask(engine, steer=steer))
    with Journal(path, IDENTITY) as journal:
        remembering = Remembered(engine, journal)
        assert content(ask(remembering, steer=steer)) == plain
        assert content(ask(remembering, steer=steer)) == plain
        assert remembering.n_decoded == 4
    again = Remembered(engine, Journal(path, IDENTITY))
    assert content(ask(again, steer=steer)) == plain
    assert again.n_decoded == 0


def test_equal_requests_are_decoded_once(engine, path):
    with Journal(path, IDENTITY) as journal:
        remembering = Remembered(engine, journal)
        replies = ask(remembering)
        assert remembering.n_decoded == len(journal) == 3
        assert replies[0].tokens == replies[2].tokens


def test_whatever_changes_a_reply_is_another_request(engine):
    remembering = Remembered(engine, Journal(None, IDENTITY))
    vector = random_vector(engine)
    changes = [
        {}, {"steer": [vector]}, {"steer": [vector.at(strength=2.0)]}, {"steer": [vector.at(layer=2)]},
        {"steer": [vector.at(positions="last")]}, {"steer": [vector.at(mode="add")]}, {"max_tokens": 3},
        {"stop": ["e"]}, {"raw": True},
    ]  # fmt: skip
    for known, change in enumerate(changes):
        assert remembering.n_decoded == known
        ask(remembering, ["Hello"], **change)
    assert remembering.n_decoded == len(changes)


def test_a_steering_of_no_effect_is_the_same_request_as_none(engine):
    remembering = Remembered(engine, Journal(None, IDENTITY))
    ask(remembering, ["Hello"], steer=[random_vector(engine).at(strength=0.0)])
    ask(remembering, ["Hello"])
    assert remembering.n_decoded == 1


def test_sampled_replies_are_not_kept(engine, path):
    with Journal(path, IDENTITY) as journal:
        remembering = Remembered(engine, journal)
        for sampling in (Sampling(temp=1.0, seed=1), Sampling(temp=0.0, repeat_penalty=1.2)):
            assert len(ask(remembering, sampling=sampling)) == 4
        assert len(journal) == 0


def test_scores_are_kept_too(engine, path):
    counting = Counting(engine)
    pairs = [([1, 2], [3, 4]), ([1, 2], [5]), ([1, 2], [3, 4])]
    expected = engine.score(pairs)
    with Journal(path, IDENTITY) as journal:
        assert Remembered(counting, journal).score(pairs) == pytest.approx(expected, abs=1e-4)
        first = counting.scored
    again = Remembered(counting, Journal(path, IDENTITY))
    assert again.score(pairs) == pytest.approx(expected, abs=1e-4)
    assert counting.scored == first


def test_a_check_ends_a_call_between_two_replies_and_what_was_done_is_kept(engine, path):
    def stop_after_two():
        if len(journal) == 2:
            raise LocalsteerError("the work was stopped.")

    with Journal(path, IDENTITY) as journal:
        with pytest.raises(LocalsteerError, match="stopped"):
            ask(Remembered(engine, journal, check=stop_after_two), [*PROMPTS, "d", "e"])
        assert len(journal) == 2
    assert len(ask(engine)) == 4  # no sequence of the call is left behind


def test_a_check_ends_a_call_between_two_scores(engine, path):
    """A large model scores for minutes, and Ctrl-C has to wait for the call."""
    checked = []

    def stop_at_the_second():
        checked.append(1)
        if len(checked) == 2:
            raise LocalsteerError("the work was stopped.")

    pairs = [([1] * 40, [2] * n) for n in range(1, 20)]
    with Journal(path, IDENTITY) as journal:
        with pytest.raises(LocalsteerError, match="stopped"):
            Remembered(engine, journal, check=stop_at_the_second).score(pairs)
        assert len(checked) == 2 and not len(journal)


def test_workers_that_are_closed_do_not_wait_for_a_call_of_many_replies(tiny_llama, path):
    prompts = [a + b for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    with (
        ThreadPoolExecutor(1) as pool,
        Journal(path, IDENTITY) as journal,
        Workers(tiny_llama.gguf_path, 1, journal=journal, n_ctx=64) as workers,
    ):
        running = pool.submit(workers.map, lambda engine, _: ask(engine, prompts), [None])
        while not len(journal):
            assert not running.done(), running.exception()
            time.sleep(0.001)
        workers.close()
        with pytest.raises(LocalsteerError, match="stopped"):
            running.result()
        assert len(journal) < len(prompts) // 2


def test_progress_counts_what_was_known(engine):
    remembering = Remembered(engine, Journal(None, IDENTITY))
    ask(remembering, PROMPTS[:2])
    seen = []
    ask(remembering, [*PROMPTS, "d"], on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_all_else_is_the_engine_s_own(engine):
    remembering = Remembered(engine, Journal(None, IDENTITY))
    assert remembering.prompt_tokens("Hello") == engine.prompt_tokens("Hello")
    assert remembering.model is engine.model
