"""What is kept between runs, damaged: it is made again or named in one line, and never believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from cli_runs import invoke, program
from engines import GREEDY, open_engine
from tiny_gguf import tiny_gguf

from localsteer import bundled, cache
from localsteer.engine import Engine
from localsteer.errors import LocalsteerError, VectorFileError
from localsteer.packs import all_packs, read_pack
from localsteer.runtime.journal import Journal, Remembered
from localsteer.runtime.scheduler import Scheduler

IDENTITY = {"model": "0123abcd"}
PROMPTS = ["Tell me about foxes.", "Tell me about rivers."]
DAMAGE = [
    lambda record: record.pop("text"),
    lambda record: record.pop("tokens"),
    lambda record: record.pop("finish_reason"),
    lambda record: record.pop("kind"),
    lambda record: record.update(kind=["reply"]),
    lambda record: record.update(kind="score"),
    lambda record: record.update(text=5),
    lambda record: record.update(tokens="1, 2"),
    lambda record: record.update(tokens=[1, "2"]),
    lambda record: record.update(tokens=[1, None]),
    lambda record: record.update(text=record["text"][:-1] + "~"),
]


# --- the journal of eval ---


def replies(engine, path):
    with Journal(path, IDENTITY) as journal:
        remembered = Remembered(engine, journal)
        found = remembered.generate_batch(PROMPTS, max_tokens=4, sampling=GREEDY)
        return [reply.text for reply in found], remembered.n_decoded


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    with open_engine(path) as engine:
        yield engine


@pytest.mark.parametrize("keeps_sum", [True, False])
def test_a_damaged_record_of_a_reply_is_made_again_with_a_notice(engine, tmp_path, caplog, keeps_sum):
    path = tmp_path / "replies.jsonl"
    expected, _ = replies(engine, path)
    whole = path.read_bytes().splitlines()
    for damage in DAMAGE if keeps_sum else DAMAGE[:-1]:  # without the checksum of newer files
        record = json.loads(whole[1])
        damage(record)
        if not keeps_sum:
            record.pop("crc32")
        path.write_bytes(b"\n".join([whole[0], json.dumps(record).encode(), *whole[2:], b""]))
        caplog.clear()
        assert replies(engine, path) == (expected, 1)
        assert [each.message for each in caplog.records] == [
            f"{path}: 1 records are damaged and will be made again."
        ]
        caplog.clear()
        assert replies(engine, path) == (expected, 0) and not caplog.records


@pytest.mark.parametrize("damage", [{"score": None}, {"score": "high"}, {"kind": "reply"}, {"kind": 7}])
def test_a_damaged_record_of_a_score_is_made_again(engine, tmp_path, damage):
    path = tmp_path / "scores.jsonl"
    pairs = [([1, 2, 3], [4, 5])]
    with Journal(path, IDENTITY) as journal:
        expected = Remembered(engine, journal).score(pairs)
    head, line = path.read_bytes().splitlines()
    record = json.loads(line) | damage
    record.pop("crc32")
    path.write_bytes(b"\n".join([head, json.dumps(record).encode(), b""]))
    with Journal(path, IDENTITY) as journal:
        assert len(journal) == 0
        assert Remembered(engine, journal).score(pairs) == expected


# --- the bundled model ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache folder with the bundled model in it: (folder, the model's path in it, its bytes)."""
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALSTEER_CACHE", str(folder))
        path = bundled.gguf_path()
    return folder, path, path.read_bytes()


def flipped(raw: bytes, start: int, n: int) -> bytes:
    return raw[:start] + bytes(byte ^ 0xFF for byte in raw[start : start + n]) + raw[start + n :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: flipped(raw, len(raw) // 2, 20_000),
        lambda raw: flipped(raw, len(raw) - 1, 1),
        lambda raw: flipped(raw, 100, 1),
        lambda raw: bytes(len(raw)),
        lambda raw: raw + b"more",
    ],
)
def test_a_damaged_bundled_model_is_made_again_with_one_notice(made, damage, monkeypatch):
    folder, path, whole = made
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder))
    path.write_bytes(damage(whole))
    said = []
    assert bundled.gguf_path(on_making=said.append) == path
    assert path.read_bytes() == whole
    assert len(said) == 1 and "is damaged" in said[0]
    assert bundled.gguf_path(on_making=said.append) == path and len(said) == 1


def test_damage_that_keeps_size_and_time_is_seen_by_the_next_process(made, monkeypatch):
    folder, path, whole = made
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder))
    before = path.stat()
    path.write_bytes(flipped(whole, 50_000, 4))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = program("run", "--temp", "0", "-n", "4", "-t", "1", "Tell me about foxes.")
    assert done.status == 0, done.err
    assert done.err.count("is damaged") == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "0" * 64, "\xff", "not a hash\n" * 100])
def test_a_damaged_seal_costs_another_making(made, text, monkeypatch):
    folder, path, whole = made
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder))
    monkeypatch.setattr(cache, "_intact", {})
    path.with_name(path.name + cache.SEAL).write_text(text, "latin-1")
    assert bundled.gguf_path().read_bytes() == whole
    assert cache.is_intact(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_a_pipe_in_the_place_of_the_model_is_one_line(made, monkeypatch):
    folder, path, whole = made
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder))
    path.unlink()
    os.mkfifo(path)
    try:
        done = program("run", "-n", "4", "-t", "1", "Tell me about foxes.")
    finally:
        path.unlink()
        path.write_bytes(whole)
    assert "is not a file: delete it" in done.complaint()


# --- the index of hashes, vectors, packs, what is being learned ---


def test_a_changed_entry_of_the_index_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"one")
    expected = cache.file_hash(model)
    index = tmp_path / "cache" / "hashes.json"
    whole = index.read_text()
    for text in (whole.replace(expected, "0" * 64), whole.replace('"sha256"', '"identity"'), "[" * 99999):
        index.write_text(text)
        assert cache.file_hash(model) == expected
        assert cache.remembered(model, "identity", lambda path: "computed") == "computed"


def test_a_cached_vector_that_was_changed_is_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path))
    command = ("run", "-t", "1", "--layer", "2", "--instruction", "json", "--temp", "0", "-n", "3", "Foxes?")
    first = invoke(*command)
    assert first.status == 0, first.err
    (path,) = cache.cached_vectors()
    whole = path.read_bytes()
    for damaged in (flipped(whole, len(whole) - 40, 1), whole[:-100], b""):
        path.write_bytes(damaged)
        again = invoke(*command)
        assert (again.status, again.out) == (0, first.out)
        assert "the cached vector is made again" in again.err
        assert path.read_bytes() == whole


def test_a_vector_of_a_pack_that_was_changed_is_named(tmp_path):
    pack = next(pack for pack in all_packs() if pack.model == "SmolLM2-135M-Instruct")
    folder = shutil.copytree(pack.folder, tmp_path / "pack")
    path = folder / "json.gguf"
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 64, 1))
    with pytest.raises(VectorFileError, match=r"pack .* is damaged: .*json\.gguf"):
        read_pack(folder).vector("json")
    assert read_pack(folder).vector("title")


# --- temporary files of runs that were killed ---

WRITES = """
import os, signal, sys, time
from pathlib import Path
from localsteer import cache
with cache.atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.utime(temporary, (1, 1))  # as of long ago
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    print(flush=True)
    sys.stdin.read()
"""


def writer(path, what):
    command = [sys.executable, "-c", WRITES, str(path), what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def parts(folder):
    return sorted(path.name for path in folder.glob(".*.part"))


@pytest.mark.parametrize("in_cache", [True, False])
def test_what_a_killed_run_left_is_swept_and_a_living_one_keeps_its_own(tmp_path, monkeypatch, in_cache):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder if in_cache else tmp_path / "other"))
    folder.mkdir()
    with writer(folder / "model.gguf", "lives") as living:
        living.stdout.readline()
        (alive,) = parts(folder)
        writer(folder / "model.gguf", "dies").wait()
        writer(folder / "old.gguf", "dies").wait()
        assert len(parts(folder)) == (2 if in_cache else 3)  # the second has swept after the first
        young = folder / f".model.gguf.{'0' * 16}.part"
        young.touch()
        foreign = folder / ".model.gguf.part"
        foreign.touch()
        os.utime(foreign, (1, 1))
        with cache.atomic_path(folder / "model.gguf") as temporary:
            temporary.write_bytes(b"whole")
        left = [alive, young.name, foreign.name]
        if not in_cache:  # a folder of the user's: the same target alone
            left += [name for name in parts(folder) if name.startswith(".old.gguf.")]
            assert len(left) == 4
        assert parts(folder) == sorted(left)
        living.communicate(b"")
    assert living.returncode == 0
    assert (folder / "model.gguf").read_bytes() == b"half" and alive not in parts(folder)


# --- what the cache holds changes no reply of a reproducible server ---


def test_without_reuse_a_reply_is_the_same_whatever_was_asked_before(made):
    _, path, _ = made
    questions = [f"Tell me about {what}." for what in ("foxes", "rivers", "old clocks", "winter")]
    found = []
    for order in (questions, questions[::-1]):
        with Scheduler(lambda: Engine(path, n_threads=1, n_seq_max=1, n_ctx=256), reuse=False) as scheduler:
            tickets = {q: scheduler.submit(q, max_tokens=8, sampling=GREEDY) for q in order}
            found.append({q: ticket.result().tokens for q, ticket in tickets.items()})
            assert all(ticket.cached_tokens == 0 for ticket in tickets.values())
    assert found[0] == found[1]


# --- a disk without room ---


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_disk_without_room_is_one_line(tmp_path, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""

    refused = pytest.raises(LocalsteerError, match=r"can't write .*kept\.json \(No space left on device\)")
    with refused, cache.atomic_path(tmp_path / "kept.json"), open("/dev/full", "w") as file:
        file.write("{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE on this system")
def test_what_llama_cpp_says_of_a_full_disk_becomes_one_line(tmp_path):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_gguf().to_bytes())
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from localsteer.runtime.bridge import quantize\n"
        "from localsteer.errors import LocalsteerError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    quantize({str(model)!r}, {str(tmp_path / 'small.gguf')!r}, 'Q8_0', trusted=True)\n"
        "except LocalsteerError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "small.gguf (No space left on device)" in done.stdout and done.stdout.count("\n") == 1
