"""localsteer/verify/quality.py: what is flagged as no reply, and what must not be."""

from __future__ import annotations

import json
import math
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.verify import (
    EMPTY,
    LOCKED,
    LOOPING,
    is_degenerate,
    length_words,
    perplexity,
    perplexity_ratio,
    repetition,
    subject_kept,
)
from localsteer.verify.quality import MIN_RUN_CHARACTERS, MIN_RUN_RULES, MIN_RUN_TOKENS

DATA = Path(__file__).parents[2] / "shared" / "data"

FOXES = "Foxes live in forests and at the edge of towns, where they hunt mice, beetles and the odd hen."

SOUND = {
    "short": "My answer is yes.",
    "one word": "Paris",
    "a number": "42",
    "emoji": "👍",
    "no": "No, no, no.",
    "laughter": "Ha ha ha ha!",
    "prose": FOXES,
    "twice": f"{FOXES}\n******\n{FOXES}",
    "two responses": f"{FOXES}\n******\nWolves hunt in packs, and need far more room.",
    "json": json.dumps(
        {"name": "fox", "size": {"min": 1, "max": 2}, "eats": ["mice", "mice", "hens"]}, indent=2
    ),
    "json of like items": json.dumps(
        [{"id": n, "name": name, "alive": True} for n, name in enumerate("abcdef")]
    ),
    "json with empty values": json.dumps({"name": "", "diet": "", "size": "", "colour": "", "sound": ""}),
    "json of zeros": json.dumps([[0, 0, 0], [0, 0, 0], [0, 0, 1]]),
    "fenced json": '```json\n{"name": "fox"}\n```',
    "bullets": "\n".join(f"* {word} are part of the diet" for word in ("Mice", "Hens", "Beetles", "Plums")),
    "one-word bullets": "- red\n- green\n- blue\n- black\n- white\n- grey\n- brown\n- pink",
    "capitals": FOXES.upper(),
    "numbered sections": "\n\n".join(f"SECTION {n}\n{word} matter." for n, word in enumerate(FOXES.split())),
    "placeholders": "Dear [name],\n\nI live at [address], [city], [country].\n\n[signature]",
    "one placeholder thrice": "[name], [name] and [name] met.",
    "rule": f"{FOXES}\n\n{'-' * 120}\n\n{FOXES.lower()} Really.",
    "dot leaders": f"Contents\nForests {'.' * 60} 1\nTowns {'.' * 60} 2",
    "spaced rule": f"{FOXES}\n\n* * * * * * * * * * * * * * * * * * * *\n\nEnd.",
    "blanks to fill in": f"Name: {'_' * 60}\nAddress: {'_' * 60}\nDate: {'_' * 60}",
    "table": "| a | b | c |\n|---|---|---|\n" + "\n".join(f"| {n} | {n * n} | {n**3} |" for n in range(9)),
    "empty table": "| a | b | c | d |\n|---|---|---|---|\n" + "| | | | |\n" * 4,
    "refrain": "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\n"
    "Life is but a dream.\n" * 2,
    "shout": "Nooooooooooooooooooooooooooo! Yessssssssss!!!!!!!!!!",
    "docstring": 'def f():\n    """"""\n    return None',
    "python": "def f(a, b):\n    return [[a, b], [b, a]]\n\n\nprint(f(1, 2), f(2, 3), f(3, 4))",
    "a week's plan": "\n".join(f"Day {n}: run {n + 2} km, rest {n % 3} hours." for n in range(1, 8)),
    "json of numbers": json.dumps([{"x": n, "y": n * n, "z": -n} for n in range(20)]),
    "counting": " ".join(str(n) for n in range(60)),
    "chinese": "狐狸生活在森林和城镇边缘\uff0c捕食老鼠、甲虫和偶尔的母鸡。",
    "thai": "สุนัขจิ้งจอกอาศัยอยู่ในป่าและชานเมือง",
    "quoted": f'"{FOXES}"',
    "quotes in json": '{"quote": "\\"Foxes\\", he said, \\"sleep.\\""}',
    "repeated word": "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo is a sentence.",
}


@pytest.mark.parametrize("reply", SOUND.values(), ids=SOUND)
def test_a_sound_reply_passes(reply):
    assert is_degenerate(reply) is None


DEGENERATE = {
    "nothing": ("", EMPTY),
    "blanks": (" \n\t\u00a0", EMPTY),
    "one quote": ('"', LOCKED),
    "quotes": ('"" "" ""', LOCKED),
    "dots": ("...", LOCKED),
    "brackets": ("[[[[[[", LOCKED),
    "asterisks": ("* * * * * * *", LOCKED),
    "open json": ('{"name": {"name": {"name":', LOCKED),
    "open json, other quotes": ('{"name": "{"name": "{"name":', LOCKED),
    "open json, long": ('{"name": {"name": {"name": {"name": {"na', LOCKED),
    "open list": ('["fox": ["fox": ["fox": [', LOCKED),
    "one word, short": ("yes yes yes yes yes yes", LOCKED),
    "one bullet": ("- fox\n- fox\n- fox\n- fox\n- fox\n- fox", LOCKED),
    "titles": ("<<title>> " * 30, LOCKED),
    "section": ("SECTION 1\n\n" * 20, LOCKED),
    "sentence from the start": (f"{FOXES} " * 4, LOCKED),
    "one word": ("Foxes are small mammals that live in forests. " + "fox " * 40, LOOPING),
    "sentence": ("Foxes are mammals, and small. " + f"{FOXES} " * 3, LOOPING),
    "truncated sentence": ("Foxes are mammals, and small. " + (f"{FOXES} " * 5)[:-40], LOOPING),
    "capitals now and then": (
        "There was a red fox. " + "It sleeps in the DEN, and wakes. it sleeps in the den, AND wakes. " * 3,
        LOOPING,
    ),
    "loop in the middle": (f"{FOXES} " + "and so on " * 20 + "but then it ended well.", LOOPING),
    "quotes within": ('Foxes are "" "" "" "" "" small.', LOOPING),
    "marks": ("My answer is yes." + "!" * 200, LOOPING),
    "backslashes": ("Foxes say " + '\\"' * 80, LOOPING),
    "letters": ("Then he cried O" + "o" * 100, LOOPING),
    "digits": ("It costs 1" + "0" * 100, LOOPING),
    "rule without end": (f"{FOXES}\n\n" + "-" * 600, LOOPING),
    "spaced rule without end": (f"{FOXES}\n\n" + "* " * 300, LOOPING),
    "chinese": ("狐狸生活在森林里。" + "好的" * 30, LOOPING),
    "varied": (
        # each sentence differs from the last by its number
        " ".join(
            f"{n}. The fox that sleeps in the wood by day hunts in the fields by night." for n in range(20)
        )
        + " And so it goes on and on with the fox that sleeps in the wood by day and hunts by night.",
        LOOPING,
    ),
}


@pytest.mark.parametrize(("reply", "reason"), DEGENERATE.values(), ids=DEGENERATE)
def test_a_degenerate_reply_is_flagged_with_its_reason(reply, reason):
    assert is_degenerate(reply) == reason


def looks_repeated(reply: str) -> bool:
    """Other evidence than the one under test: the reply, or its end, packs to a third or less."""
    ends = (reply, reply[-300:])
    return any(len(zlib.compress(end.encode(), 9)) < len(end.encode()) / 3 for end in ends)


def test_no_real_reply_is_flagged_without_cause(capsys):
    path = DATA / "ifeval_verdicts.jsonl"
    if not path.exists():
        pytest.skip("no shared/data/ifeval_verdicts.jsonl: the real replies are not in this repository")
    replies = [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]
    flagged = [(reply, reason) for reply in replies if (reason := is_degenerate(reply))]
    false = [reply for reply, _ in flagged if not looks_repeated(reply)]
    with capsys.disabled():
        print(f"\n{len(flagged)} of {len(replies)} real replies flagged, {len(false)} of them without cause")
        for reply, reason in flagged[:: len(flagged) // 8]:
            print(f"  {reason}: {reply[:30]!r} ... {reply[-30:]!r}")
    assert not false
    assert len(flagged) == 66  # read one by one: each really loops


def test_no_ifeval_prompt_is_flagged():
    path = DATA / "ifeval_input_data.jsonl"
    if not path.exists():
        pytest.skip("no shared/data/ifeval_input_data.jsonl: IFEval's prompts are not in this repository")
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [prompt for prompt in prompts if is_degenerate(prompt)] == []


# --- thresholds, at their edges ----------------------------------------------------------------------------


def test_a_loop_of_tokens_counts_from_its_minimum():
    start = "A fox lives in a den under the roots of an old oak and sleeps there. "
    run = MIN_RUN_TOKENS + 1  # the first token of a loop repeats nothing
    assert is_degenerate(start + "so " * run) == LOOPING
    assert is_degenerate(start + "so " * (run - 1)) is None


def test_a_loop_within_a_word_counts_from_its_minimum():
    assert is_degenerate("Yes, said the fox" + "!" * (MIN_RUN_CHARACTERS + 1)) == LOOPING
    assert is_degenerate("Yes, said the fox" + "!" * MIN_RUN_CHARACTERS) is None


def test_a_rule_counts_from_its_own_minimum():
    assert is_degenerate("Yes, said the fox\n" + "=" * (MIN_RUN_RULES + 1)) == LOOPING
    assert is_degenerate("Yes, said the fox\n" + "=" * MIN_RUN_RULES) is None


def test_the_repetition_limit_can_be_set():
    song = "\n".join(f"{word}, oh {word}, sing for me tonight" for word in FOXES.split())
    assert is_degenerate(song) is None
    assert is_degenerate(song, repetition_limit=0.2) == LOOPING


# --- repetition and length ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 1 / 5),  # of five runs of four, the last is the first
        ("a b c d A B C D", 1 / 5),
        ("a a a a a", 1 / 2),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


def test_repetition_of_copies_nears_what_they_add():
    for copies in (2, 3, 4):
        assert repetition(f"{FOXES} " * copies) == pytest.approx(1 - 1 / copies, abs=0.05)


def test_length_words():
    assert length_words("Well-known foxes don't sleep.") == 6
    assert length_words("") == 0


# --- subjects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "subject", "kept"),
    [
        ("Velmora is a town.", "Velmora", True),
        ("VELMORA IS A TOWN.", "Velmora", True),
        ("velmora's people", "Velmora", True),
        ("**Velmora**: [old]", "Velmora", True),
        ("<<Velmora>>", "velmora", True),
        ("Velmorania is a town.", "Velmora", False),
        ("An elegant thing", "ant", False),
        ("It is a town.", "Velmora", False),
        ("", "Velmora", False),
        ("The San Marino hills", "San Marino", True),
        ("The San\nMarino hills", "San Marino", True),
        ('{"san_marino": 1}', "San Marino", True),
        ("SAN-MARINO", "San Marino", True),
        ("San and Marino", "San Marino", False),
        ('{"city": "S\\u00e3o Paulo"}', "São Paulo", True),
        ('{"text": "So\\nVelmora\\tis"}', "Velmora", True),
        ('{"text": "\\"Velmora\\""}', "Velmora", True),
        ('{"text": "\\ud83e\\udd8a fox"}', "fox", True),
        ("Sa\u0303o Paulo is big", "S\u00e3o Paulo", True),  # the accent as a character of its own
        ("SA\u0303O PAULO", "são paulo", True),
        ("The foxes sleep", "fox", True),
        ("The fox sleeps", "foxes", True),
        ("One house", "houses", True),
        ("A city", "cities", True),
        ("Two cities", "city", True),
        ("One horse", "horses", True),
        ("the busy", "bus", False),
        ("The glass is full", "glass", True),
        ("STRASSE", "Straße", True),
        ("GPT-4 is a model", "GPT-4", True),
        ("GPT-40 is a model", "GPT-4", False),
        ("狐狸生活在森林里", "狐狸", True),
        ("狗生活在森林里", "狐狸", False),
        ("ΟΔΥΣΣΕΥΣ", "Οδυσσεύς", False),  # capitals without accents are another spelling
        ("ОДЕССА", "Одесса", True),
        ("a (b", "(b", True),
    ],
)
def test_subject_kept(reply, subject, kept):
    assert subject_kept(reply, subject) is kept


@pytest.mark.parametrize("subject", ["", " ", "!?"])
def test_a_subject_needs_a_letter(subject):
    with pytest.raises(ValueError, match="letter or digit"):
        subject_kept("reply", subject)


# --- perplexity --------------------------------------------------------------------------------------------


def test_perplexity_takes_log_probabilities_or_their_mean():
    assert perplexity([math.log(0.5)] * 7) == pytest.approx(2.0)
    assert perplexity(np.log([0.25, 1.0])) == pytest.approx(2.0)
    assert perplexity(-math.log(2)) == pytest.approx(2.0)
    assert perplexity(0.0) == 1.0
    assert perplexity([-math.inf]) == math.inf
    assert perplexity(-1e6) == math.inf


def test_the_ratio_says_how_much_more_surprising_the_steered_reply_is():
    assert perplexity_ratio([-2.0, -2.0], [-1.0]) == pytest.approx(math.e)
    assert perplexity_ratio(-1.0, -1.0) == 1.0
    assert perplexity_ratio([-0.01] * 50, [-1.0]) < 0.5  # a loop is easy to predict
    assert perplexity_ratio(-math.inf, -1.0) == math.inf


@pytest.mark.parametrize("wrong", [[], [0.1], [math.nan], math.nan, [-1.0, math.nan]])
def test_what_is_no_log_probability_is_refused(wrong):
    with pytest.raises(ValueError, match="log-probabilities"):
        perplexity(wrong)
    with pytest.raises(ValueError, match="log-probabilities"):
        perplexity_ratio([-1.0], wrong)


# --- properties --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_measured(text):
    assert is_degenerate(text) in (None, EMPTY, LOCKED, LOOPING)
    assert 0.0 <= repetition(text) < 1.0
    assert length_words(text) >= 0
    assert (is_degenerate(text) == EMPTY) == (not text.strip())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abcdefghij", min_size=2, max_size=8), min_size=1, max_size=12, unique=True),
    st.sampled_from([" ", "\n", ", ", "\n\n"]),
    st.integers(8, 30),
)
def test_any_unit_said_often_enough_is_flagged(words, joint, copies):
    unit = " ".join(words) + joint
    assert is_degenerate(unit * max(copies, MIN_RUN_TOKENS + 2)) == LOCKED
    assert is_degenerate("There was once a fox who said: " + unit * (MIN_RUN_TOKENS + 2)) == LOOPING


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abcdefghij", min_size=2, max_size=8), min_size=1, max_size=80, unique=True))
def test_words_that_never_recur_are_never_flagged(words):
    for reply in (" ".join(words), "\n".join(f"- {word}" for word in words), " ".join(words).upper()):
        assert is_degenerate(reply) is None
        assert repetition(" ".join(words)) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.text("abcdefghij XYZ\n", max_size=40), st.text("klmnop", min_size=3, max_size=9))
def test_a_subject_that_stands_in_the_reply_is_kept(rest, subject):
    for reply in (f"{rest} {subject} {rest}", json.dumps({"a": f"{rest}\n{subject}"}), f"{subject.upper()}."):
        assert subject_kept(reply, subject)
    assert not subject_kept(rest, subject)


@pytest.mark.parametrize("unit", ["{", '"', "[ ", "a{", "fox. ", "\n", "* ", "word%d "])
def test_a_long_reply_costs_little(unit):
    reply = "".join(unit % n if "%" in unit else unit for n in range(20_000))
    started = time.process_time()
    is_degenerate(reply)
    assert time.process_time() - started < 5.0
