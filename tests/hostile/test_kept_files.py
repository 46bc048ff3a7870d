"""What is kept between runs, damaged: it is made again or named in one line, and never believed."""

from __future__ import annotations

import json

import pytest
from engines import GREEDY, open_engine

from localsteer.evaluate.journal import Journal, Remembered

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
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
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
            f"{path}: 1 records are damaged, and are made again."
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
