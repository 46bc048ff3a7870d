"""`localsteer verify`: IFEval's verdicts from the command line, each run a real process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import invoke, program

from localsteer.verify import INSTRUCTION_IDS, verify
from localsteer.verify.verifiers import VERIFIERS

DATA = Path(__file__).parents[2] / "shared" / "data"
OFFICIAL = DATA / "ifeval_verdicts.jsonl"
MIN_AGREEMENT = 0.99
LOWERCASE = "change_case:english_lowercase"
WORDS = "length_constraints:number_words"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(response: str, *ids: str, **changed) -> dict:
    found = {"prompt": "Tell me about foxes.", "response": response, "instruction_id_list": list(ids)}
    return found | {"kwargs": [{} for _ in ids]} | changed


# --- one reply ---------------------------------------------------------------------------------------------


def test_a_reply_that_follows():
    done = program("verify", "--instruction", LOWERCASE, input=b"the fox sleeps in its den.\n")
    assert (done.status, done.out, done.err) == (0, f"pass  {LOWERCASE}\n", "")


def test_a_reply_that_does_not():
    done = program("verify", "--instruction", LOWERCASE, input=b"The fox sleeps in its den.\n")
    assert (done.status, done.out, done.err) == (1, f"fail  {LOWERCASE}\n", "")


def test_a_reply_from_a_file(tmp_path):
    (tmp_path / "reply.txt").write_text("the fox sleeps in its den.\n")
    assert program("verify", "-i", LOWERCASE, tmp_path / "reply.txt").status == 0


def test_several_instructions_each_with_its_arguments():
    kwargs = '{"num_words": 3, "relation": "at least"}', '{"keywords": ["dog", "fox"]}'
    ids = ("-i", LOWERCASE, "-i", WORDS, "-i", "keywords:existence")
    given = ("--kwargs", "{}", "--kwargs", kwargs[0], "--kwargs", kwargs[1])
    done = program("verify", *ids, *given, input=b"the fox sleeps.")
    assert done.status == 1
    assert done.out.splitlines() == [
        f"pass  {LOWERCASE}",
        f"pass  {WORDS}  num_words=3, relation=\"at least\"",
        "fail  keywords:existence  keywords=[\"dog\", \"fox\"]",
    ]  # fmt: skip


def test_json_is_one_document():
    kwargs = '{"num_words": 3, "relation": "less than"}'
    done = program("verify", "-i", WORDS, "--kwargs", kwargs, "--json", input=b"the fox sleeps.")
    verdict = {"instruction_id": WORDS, "kwargs": json.loads(kwargs), "follows": False}
    assert (done.status, done.json) == (1, {"rule": "strict", "follows": False, "verdicts": [verdict]})


def test_loose_forgives_a_first_line():
    reply = "Sure! Here you are:\nthe fox sleeps in its den."
    assert program("verify", "-i", LOWERCASE, input=reply.encode()).status == 1
    done = program("verify", "-i", LOWERCASE, "--loose", "--json", input=reply.encode())
    assert (done.status, done.json["rule"]) == (0, "loose")


def test_the_line_break_that_ends_a_file_is_no_line_of_the_reply():
    # the loose rule drops the last line: with an empty one in its place "Bye!" would be left
    reply = "the fox sleeps in its den.\nBye!"
    assert verify(LOWERCASE, reply, {}, loose=True) and not verify(LOWERCASE, reply + "\n", {}, loose=True)
    for ending in ("", "\n", "\r\n"):
        assert invoke("verify", "-i", LOWERCASE, "--loose", input=reply + ending).status == 0
    assert invoke("verify", "-i", LOWERCASE, "--loose", input=reply + "\n\n").status == 1


def test_the_prompt_is_what_must_be_repeated(tmp_path):
    (tmp_path / "prompt.txt").write_text("Tell me about foxes.\n")
    run = ("verify", "-i", "combination:repeat_prompt")
    for prompt in (("--prompt", "Tell me about foxes."), ("--prompt-file", tmp_path / "prompt.txt")):
        assert program(*run, *prompt, input=b"Tell me about foxes. They are red.").status == 0
        assert invoke(*run, *prompt, input=b"They are red.").status == 1


def test_text_of_any_script_and_a_byte_order_mark(tmp_path):
    text = '"Лисы живут в лесу и охотятся на мышей, когда наступает ночь."'
    (tmp_path / "reply.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    ids = ("-i", "startend:quotation", "-i", "language:response_language")
    kwargs = ("--kwargs", "{}", "--kwargs", '{"language": "ru"}')
    done = program("verify", *ids, *kwargs, tmp_path / "reply.txt")
    assert (done.status, done.err) == (0, "")


def test_an_empty_reply_follows_nothing():
    assert program("verify", "-i", "punctuation:no_comma", input=b"").status == 1
    assert invoke("verify", "-i", "punctuation:no_comma", input=" \n").status == 1


def test_what_is_shown_of_the_arguments_can_not_drive_a_terminal():
    kwargs = json.dumps({"keywords": ["\x1b[2J" + "x" * 500]})
    done = invoke("verify", "-i", "keywords:existence", "--kwargs", kwargs, input="fox")
    assert "\x1b" not in done.out and len(done.out) < 120


# --- many replies ------------------------------------------------------------------------------------------


@pytest.fixture
def replies(tmp_path):
    return write(
        tmp_path / "replies.jsonl",
        row("the fox sleeps.", LOWERCASE, "punctuation:no_comma"),
        row("**the fox, a red one, sleeps in its den.**\nBye", LOWERCASE, "punctuation:no_comma"),
        row("Sure!\nfoxes are small and red animals.", LOWERCASE),
    )


def test_a_file_of_replies_gives_a_verdict_for_each_and_the_accuracies(replies):
    done = program("verify", "--jsonl", replies, "--json")
    found = done.json
    assert done.status == 1
    assert [line["line"] for line in found["lines"]] == [1, 2, 3]
    assert [line["strict"] for line in found["lines"]] == [[True, True], [False, False], [False]]
    assert [line["loose"] for line in found["lines"]] == [[True, True], [True, True], [True]]
    assert found["n"] == {"prompts": 3, "instructions": 5}
    assert found["accuracy"] == {
        "strict": {"prompt": pytest.approx(1 / 3), "instruction": pytest.approx(2 / 5)},
        "loose": {"prompt": 1.0, "instruction": 1.0},
    }
    assert found["by_instruction"][LOWERCASE] == {"n": 3, "strict": pytest.approx(1 / 3), "loose": 1.0}
    assert list(found["by_instruction"]) == sorted(found["by_instruction"])


def test_the_same_as_tables(replies):
    done = program("verify", "--jsonl", replies, "--loose")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["2", "fail", "pass", f"{LOWERCASE},", "punctuation:no_comma"] in lines
    assert [LOWERCASE, "3", "33.3%", "100.0%"] in lines
    assert ["prompts", "3", "33.3%", "100.0%"] in lines and ["instructions", "5", "40.0%", "100.0%"] in lines


def test_lines_from_standard_input_and_empty_ones_between(replies):
    text = replies.read_text().replace("\n", "\n\n")
    done = program("verify", "--jsonl", "-", "--json", input=text.encode())
    assert [line["line"] for line in done.json["lines"]] == [1, 3, 5]


def test_arguments_may_be_missing_or_null_and_a_line_may_hold_odd_line_breaks(tmp_path):
    null = row(
        "the fox\u2028sleeps.", WORDS, kwargs=[{"num_words": 2, "relation": "at least", "keyword": None}]
    )
    none = {"response": "the fox sleeps.", "instruction_id_list": [LOWERCASE]}
    repeated = row("tell me about foxes. so:", "combination:repeat_prompt")
    assert program("verify", "--jsonl", write(tmp_path / "a.jsonl", null, none, repeated)).status == 0


def test_accuracy_agrees_with_the_official_verdicts():
    """390 replies of other models; the official verdicts came with them."""
    if not OFFICIAL.exists():
        pytest.skip("no shared/data/ifeval_verdicts.jsonl: the official verdicts are not in this repository")
    official = [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]
    found = program("verify", "--jsonl", OFFICIAL, "--json").json
    assert found["n"]["prompts"] == len(official)
    for rule in ("strict", "loose"):
        same = [ours[rule] == theirs[rule] for ours, theirs in zip(found["lines"], official, strict=True)]
        assert sum(same) / len(same) >= MIN_AGREEMENT
        verdicts = [each for theirs in official for each in theirs[rule]]
        prompts = [all(theirs[rule]) for theirs in official]
        accuracy = found["accuracy"][rule]
        assert accuracy["instruction"] == pytest.approx(sum(verdicts) / len(verdicts), abs=1 - MIN_AGREEMENT)
        assert accuracy["prompt"] == pytest.approx(sum(prompts) / len(prompts), abs=1 - MIN_AGREEMENT)


# --- the list ----------------------------------------------------------------------------------------------


def test_the_list_has_every_id_with_its_arguments():
    found = program("verify", "--list", "--json").json
    assert list(found) == list(INSTRUCTION_IDS)
    assert {name: list(arguments) for name, arguments in found.items()} == {
        name: list(verifier.parameters) for name, verifier in VERIFIERS.items()
    }
    assert all(text for arguments in found.values() for text in arguments.values())
    text = invoke("verify", "--list").out
    assert all(name in text for name in INSTRUCTION_IDS) and "'less than' or 'at least'" in text


# --- bad input ---------------------------------------------------------------------------------------------


def refused(*args, input: str | bytes = "the fox sleeps.") -> str:
    return invoke("verify", *args, input=input).complaint()


def test_a_process_is_refused_with_one_line_and_status_2():
    says = program("verify", "-i", "change_case:english_lower", input=b"x").complaint()
    assert (
        "unknown instruction id 'change_case:english_lower': did you mean change_case:english_lowercase?"
        in says
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "name an --instruction"),
        (("-i", WORDS), "argument 'num_words' is missing; it takes num_words, relation"),
        (("-i", LOWERCASE, "--kwargs", '{"fox": 1}'), "unknown argument 'fox'; it takes none"),
        (
            ("-i", WORDS, "--kwargs", '{"num_words": -1, "relation": "at least"}'),
            "whole number, 0 or more, not -1",
        ),
        (("-i", WORDS, "--kwargs", '{"num_words": 3, "relation": "exactly"}'), "'less than' or 'at least'"),
        (("-i", WORDS, "--kwargs", "{num_words: 3}"), "is not JSON (Expecting property name"),
        (("-i", WORDS, "--kwargs", "[3]"), "must be a JSON object"),
        (("-i", WORDS, "--kwargs", "[" * 100_000), "is not JSON"),
        (("-i", LOWERCASE, "--kwargs", "{}", "--kwargs", "{}"), "2 --kwargs for 1 --instruction"),
        (("-i", "combination:repeat_prompt"), "'prompt_to_repeat' is missing"),
        (("-i", LOWERCASE, "--prompt", "a", "--prompt-file", "b"), "exclude each other"),
        (("-i", LOWERCASE, "none.txt"), "none.txt can't be read: No such file"),
        (("-i", LOWERCASE, "."), ". can't be read: Is a directory"),
        (("-i", LOWERCASE, "--prompt-file", "none.txt"), "none.txt can't be read"),
        (("--jsonl", "none.jsonl"), "none.jsonl can't be read"),
        (("--jsonl", "a.jsonl", "-i", LOWERCASE), "--jsonl stands by itself"),
        (("--list", "reply.txt"), "--list stands by itself"),
        (("--list", "--jsonl", "a.jsonl"), "--list stands by itself"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_slip_is_named(args, says):
    assert says in refused(*args)


def test_input_that_is_no_text(tmp_path):
    assert "standard input is not UTF-8 text (line 2, byte 3)" in refused("-i", LOWERCASE, input=b"ab\n\xff")
    assert "standard input is not text: it holds a NUL byte (byte 2)" in refused(
        "-i", LOWERCASE, input=b"ab\0"
    )
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "model.gguf is not text" in refused("-i", LOWERCASE, tmp_path / "model.gguf")
    assert "model.gguf is not text" in refused("--jsonl", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON (Expecting property name"),
        ("[1]", "expected a JSON object"),
        (json.dumps({"instruction_id_list": [LOWERCASE]}), "`response` must be the reply's text"),
        (json.dumps({"response": "x"}), "`instruction_id_list` must be a list"),
        (json.dumps(row("x")), "0 in `instruction_id_list`"),
        (json.dumps(row("x", LOWERCASE, kwargs=[])), "1 in `instruction_id_list`, 0 in `kwargs`"),
        (json.dumps(row("x", LOWERCASE, kwargs={})), "`kwargs` must be a list"),
        (json.dumps(row("x", LOWERCASE, kwargs=[3])), "arguments must be a table of names and values"),
        (json.dumps(row("x", "case:lower")), "unknown instruction id 'case:lower'"),
        (json.dumps(row("x", 7)), "unknown instruction id 7"),
        (json.dumps(row("x", WORDS)), "argument 'num_words' is missing"),
        (json.dumps(row("x", LOWERCASE, prompt=3)), "`prompt` must be text"),
    ],
    ids=lambda value: "",
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, says):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(row("the fox sleeps.", LOWERCASE)) + f"\n\n{line}\n")
    complaint = refused("--jsonl", path)
    assert f"{path}, line 3: " in complaint and says in complaint


def test_a_file_without_a_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "empty.jsonl is empty" in refused("--jsonl", tmp_path / "empty.jsonl")
