"""Vectors of pairs of texts, and of other tokens than the last: both backends, and files as published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runs import invoke
from engines import open_engine

from localsteer import ControlVector
from localsteer.catalog import load_catalog
from localsteer.errors import LocalsteerError, PromptError, VectorFileError
from localsteer.extract import TextPair, extract, extract_from_texts, open_backend, read_text_pairs
from localsteer.extract.calibrate import pairs_of
from localsteer.prompt_texts import PromptText
from localsteer.states import collect_states

QUERIES = ["Tell me about the fox.", "What is a river?", "Describe the village.", "Who?"]
CAA = [
    {
        "question": f"Do you like {thing}?\n\nChoices:\n (A) Yes\n (B) No",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    for thing in ("rain", "foxes", "the village")
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, *records, array=False):
    text = json.dumps(records) if array else "\n".join(map(json.dumps, records))
    Path(name).write_text(text, "utf-8")
    return name


def cosines(one, other):
    return [float(one.unit(il).astype(np.float64) @ other.unit(il)) for il in range(one.n_layer)]


# --- tokens ------------------------------------------------------------------------------------------------


BOTH_HOLD_THE = [TextPair(PromptText(f"the {text}"), PromptText(f"Is the {text}?")) for text in QUERIES]


@pytest.mark.parametrize("tokens", ["-2", "mean", "span:the", "reply", "last:the"])
def test_both_backends_find_the_same_vector_at_any_token(tiny_model, tokens):
    pairs = read_text_pairs(write("caa.json", *CAA, array=True)) if tokens == "reply" else BOTH_HOLD_THE
    ours = extract_from_texts(tiny_model.gguf_path, pairs, name="v", tokens=tokens, exact=True, n_threads=1)
    theirs = extract_from_texts(tiny_model.hf_dir, pairs, name="v", tokens=tokens, n_threads=1)
    assert min(cosines(ours, theirs)) >= 0.9999
    for column in ("mean_with", "mean_without", "std_with", "std_without"):
        a, b = getattr(ours, column), getattr(theirs, column)
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(ours.mean_with).max(), err_msg=column)
    assert ours.provenance["probes"] == theirs.provenance["probes"]


def test_the_direction_is_the_difference_of_the_chosen_states(tiny_llama):
    pairs = read_text_pairs(write("caa.json", *CAA, array=True))
    with open_engine(tiny_llama.gguf_path) as engine:
        vector = extract_from_texts(engine, pairs, name="caa", tokens="reply")
        means = [
            np.mean([x.mean(axis=0) for x in collect_states(engine, side, tokens="reply")], axis=0)
            for side in ([pair.instructed for pair in pairs], [pair.plain for pair in pairs])
        ]
    np.testing.assert_allclose(vector.directions, means[0] - means[1], rtol=1e-3, atol=1e-4)
    expected = [means[0][il] @ vector.unit(il) for il in range(4)]
    np.testing.assert_allclose(vector.mean_with, expected, rtol=1e-3, atol=1e-4)


def test_the_last_token_by_its_index_is_the_last_token(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        last, index = (extract(engine, "Rhyme!", QUERIES, tokens=tokens) for tokens in ("last", -1))
    assert min(cosines(last, index)) > 0.999999
    assert "tokens" not in last.provenance and index.provenance["tokens"] == "-1"
    assert last.provenance["method"] == "difference of means, last prompt token"
    assert index.provenance["method"] == "difference of means, tokens -1"


def test_many_pairs_pass_by_twice_and_give_the_same(tiny_llama):
    pairs = [TextPair(PromptText(f"{i} foxes"), PromptText(f"{i} rivers"), ) for i in range(70)]  # fmt: skip
    with open_backend(tiny_llama.gguf_path, exact=True, n_threads=1) as backend:
        vector = extract_from_texts(backend, pairs, name="v", tokens="mean")
        states = [
            np.concatenate(collect_states(backend.engine, side, tokens="mean"))
            for side in ([pair.instructed for pair in pairs], [pair.plain for pair in pairs])
        ]
    projections = np.einsum("nle,le->nl", states[0], np.stack([vector.unit(il) for il in range(4)]))
    np.testing.assert_allclose(vector.std_with, projections.std(axis=0), rtol=1e-2, atol=1e-4)


def test_a_vector_says_what_it_was_made_of_and_belongs_to_its_model(tiny_llama, folder):
    pairs = read_text_pairs(write("caa.json", *CAA, array=True))
    with open_engine(tiny_llama.gguf_path) as engine:
        vector = extract_from_texts(engine, pairs, name="caa", tokens=-2, n_pairs=2, layer=[1, 2])
        vector.save("caa.gguf")
        loaded = ControlVector.load("caa.gguf")
        ids = engine.prompt_tokens("Who?")
        assert np.abs(engine.logits(ids) - engine.logits(ids, steer=[loaded])).max() > 1e-3
        raw = extract_from_texts(engine, read_text_pairs("caa.json", raw=True), name="caa")
    made = loaded.provenance
    assert (made["tokens"], made["n_pairs"], made["raw"], loaded.layers) == ("-2", 2, False, (1, 2))
    assert made["method"] == "difference of means of pairs of texts, tokens -2"
    assert len(made["texts_sha256"]) == 64 and "template_hash" in made and "phrasings" not in made
    assert made["probes"][1][0].endswith("<|assistant|>(A)") and loaded.mean_with is not None
    assert raw.provenance["raw"] and "template_hash" not in raw.provenance
    assert raw.provenance["probes"][1][0].endswith("No(A)")
    assert raw.provenance["texts_sha256"] != made["texts_sha256"]
    # its means can't be measured again with other pairs
    with pytest.raises(VectorFileError, match="pairs of texts"):
        pairs_of(loaded, load_catalog())


# --- files -------------------------------------------------------------------------------------------------


def sides(path, **options):
    (pair, *_) = read_text_pairs(path, **options)
    return [(text.prompt, text.reply) for text in (pair.instructed, pair.plain)]


USER, YES = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
TALKS = [([USER, YES], ""), ([USER, NO], "")]
PERSONA = {
    "question": "q", "statement": "s", "label_confidence": 0.9,
    "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No",
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"with": "a b", "without": "c"}, [("a b", ""), ("c", "")]),
        ({"prompt": "p", "with": "a", "without": "b"}, [("p", "a"), ("p", "b")]),
        ({"positive": "a", "negative": "b", "more": 1}, [("a", ""), ("b", "")]),
        (["a", "b"], [("a", ""), ("b", "")]),
        (CAA[0], [(CAA[0]["question"], "(A)"), (CAA[0]["question"], "(B)")]),
        (PERSONA, [("q", " Yes"), ("q", " No")]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, [("p", "a"), ("p", "b")]),
        ({"prompt": "Rain?", "chosen": [USER, YES], "rejected": [USER, NO]}, TALKS),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, TALKS),
        ({"prompt": "Rain?", "chosen": [YES], "rejected": [NO]}, TALKS),
        ({"with": [USER], "without": "x"}, [([USER], ""), ("x", "")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("array", [False, True])
def test_pairs_are_read_as_they_are_published(record, expected, array):
    name = write("p.json" if array else "p.jsonl", record, record, array=array)
    assert sides(name) == expected
    assert len(read_text_pairs(name)) == 2


def test_a_forced_reply_stands_behind_the_generation_prompt(tiny_llama):
    pairs = read_text_pairs(write("p.jsonl", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}))
    with open_engine(tiny_llama.gguf_path) as engine:
        assert pairs[0].instructed.render(engine.template) == "<|user|>Rain?<|end|><|assistant|>Yes."
    assert pairs[0].instructed.forced == "Yes."


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not a pair"),
        ("{'with': 1}", "'with': 1"),
        ('"a"', "line 2 is not a pair"),
        ("[1]", "line 2 is not a pair"),
        ("{}", "line 2 must have one of with and without"),
        ('{"with": "a"}', "must have one of"),
        ('{"with": "a", "without": null}', "must have one of"),
        ('{"with": "a", "without": "b", "chosen": "c", "rejected": "d"}', "must have one of"),
        ('{"with": "a", "without": 7}', "line 2: without must be a text, or messages, not 7"),
        ('{"with": "a", "without": " "}', "without is empty"),
        ('{"with": "a", "without": "a"}', "two sides are the same"),
        ('{"prompt": "p", "question": "q", "with": "a", "without": "b"}', "both prompt and question"),
        ('{"prompt": 7, "with": "a", "without": "b"}', "prompt must be a text"),
        ('{"with": [], "without": "b"}', "messages must be a list"),
        ('["a", ["b"]]', "messages must be a list"),
        ("[" * 100_000, "not a pair"),
    ],
)
def test_a_bad_pair_is_named_by_its_line(line, says):
    Path("p.jsonl").write_text('{"with": "a", "without": "b"}\n' + line)
    with pytest.raises(PromptError, match=says) as error:
        read_text_pairs("p.jsonl")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no pairs"),
        ("[]", "holds no pairs"),
        ('[{"with": "a"}', "begins like a JSON array but is not one"),
        ('[{"with": "a", "without": "b"},\n{"with": "a"}]', "item 2 must have"),
        ("[[[[", "is not one"),
    ],
)
def test_a_file_that_holds_no_pairs(content, says):
    Path("p.json").write_text(content)
    with pytest.raises(PromptError, match=says):
        read_text_pairs("p.json")


# --- the command -------------------------------------------------------------------------------------------


def run(tiny_llama, *args):
    return invoke("extract", "--gguf", tiny_llama.gguf_path, "-t", "1", *args)


def test_the_command_names_the_vector_after_its_file(tiny_llama):
    write("Rain lovers.json", *CAA, array=True)
    done = run(
        tiny_llama, "--pairs-file", "Rain lovers.json", "--tokens", "-2", "--pairs", "2", "--layer", "1,2"
    )
    assert (done.status, done.out) == (0, "rain-lovers.gguf\n"), done.err
    vector = ControlVector.load("rain-lovers.gguf")
    assert (vector.name, vector.layers, vector.mode) == ("Rain lovers", (1, 2), "project")
    assert "2 pairs" in done.err
    done = run(
        tiny_llama, "--pairs-file", "Rain lovers.json", "--name", "rain", "--mode", "add", "--raw", "--json"
    )
    assert (done.json["file"], done.json["name"], done.json["mode"]) == ("rain.gguf", "rain", "add")


def test_an_instruction_takes_tokens_and_a_name_too(tiny_llama, folder):
    (folder / "q.txt").write_text("\n".join(QUERIES))
    args = ("--queries", "q.txt", "--pairs", "3", "--name", "no fox", "--json")
    done = run(tiny_llama, "--exclude-word", "fox", "--tokens", "mean", *args).json
    assert (done["file"], done["name"]) == ("no-fox.gguf", "no fox")
    assert done["provenance"]["tokens"] == "mean"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--pairs-file", "none.jsonl"], "none.jsonl can't be read"),
        (["--pairs-file", "p.jsonl", "-o", ""], "-o names no file"),
        (["--pairs-file", "p.jsonl", "-i", "json"], "--instruction and --pairs-file exclude"),
        (["--pairs-file", "p.jsonl", "--queries", "q.txt"], "--queries and --pairs-file exclude"),
        (["--pairs-file", "p.jsonl", "--slot", "n=5"], "--slot and --pairs-file exclude"),
        (["--pairs-file", "p.jsonl", "--pairs", "9"], "9 pairs were asked for, but there are only 3"),
        (["--pairs-file", "p.jsonl", "--tokens", "first"], "'first' names no tokens"),
        (["--pairs-file", "p.jsonl", "--tokens", "span:cat"], "p.jsonl, line 1, answer_matching_behavior"),
        (["--pairs-file", "p.jsonl", "--tokens", "999"], "no token 999"),
        (["--pairs-file", "long.jsonl"], "long.jsonl, line 1, with: it has"),
        (["--pairs-file", "chat.jsonl", "--raw"], "a raw prompt is one text"),
        (["-i", "Rhyme, please.", "--raw"], "--raw belongs to --pairs-file"),
        (["-i", "Rhyme, please.", "--tokens", "span:Rhyme", "--pairs", "2"], "does not contain 'Rhyme'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(tiny_llama, folder, args, says):
    write("p.jsonl", *CAA)
    write("long.jsonl", {"with": "fox " * 2000, "without": "b"})
    write("chat.jsonl", {"with": [USER], "without": "b"})
    (folder / "q.txt").write_text("\n".join(QUERIES))
    assert says in run(tiny_llama, *args).complaint()
    assert not list(folder.glob("*.gguf"))


def test_a_text_that_no_token_follows_is_said_in_pytorch_too(tiny_llama):
    pairs = [TextPair(PromptText("a fox", label="one"), PromptText("a river", label="two"))]
    with pytest.raises(LocalsteerError, match="two: it does not contain 'fox'"):
        extract_from_texts(tiny_llama.hf_dir, pairs, name="v", tokens="span:fox", n_threads=1)
