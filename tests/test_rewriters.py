"""localsteer/verify/rewriters: a plain reply, rewritten so that the verifier passes and the content stays."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.errors import CatalogError
from localsteer.verify import (
    INSTRUCTION_IDS,
    REWRITERS,
    can_rewrite,
    is_degenerate,
    rewrite,
    trim_before_loop,
    trim_to_paragraph,
    trim_to_sentence,
    verify,
)

DATA = Path(__file__).parents[2] / "shared" / "data"

PROMPT = "Tell me about the otters."

# Arguments that a reply of some sentences can meet.
ARGUMENTS: dict[str, dict] = {
    "keywords:existence": {"keywords": ["moon", "orchard"]},
    "keywords:frequency": {"keyword": "moon", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["winter", "otters"]},
    "keywords:letter_frequency": {"letter": "!", "let_frequency": 2, "let_relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "less than"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:number_words": {"num_words": 30, "relation": "less than"},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": 3,
        "nth_paragraph": 2,
        "first_word": "Weekend",
    },
    "detectable_content:number_placeholders": {"num_placeholders": 3},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 3},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 3},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Tell me about the otters."},
    "startend:end_checker": {"end_phrase": "Is there anything else I can help with?"},
    "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
    "startend:quotation": {},
}
ONLY_SOME = {"detectable_format:constrained_response"}  # replies that say yes or no
SHORTENING = {
    "length_constraints:number_sentences",
    "length_constraints:number_words",
    "keywords:forbidden_words",
}
DETECTED = {"change_case:english_capital", "change_case:english_lowercase"}  # langdetect takes its time
ANY_REPLY = sorted(set(REWRITERS) - ONLY_SOME)

REPLIES = [
    "Otters are playful mammals that live in rivers, lakes, and along coasts. They have thick fur, "
    "which keeps them warm in cold water. Most of them eat fish, crabs, and frogs. They often float "
    "on their backs.",
    "Here are some tips for a tidy desk:\n\n"
    "1. **Sort your papers**: Keep only what you need, and recycle the rest.\n"
    "2. **Use drawers**: Put pens and cables away.\n"
    "3. **Clean weekly**: Wipe the surface every Friday.\n\n"
    "A tidy desk helps you to think clearly.",
    "# The Moon and the Tides\n\n"
    "Tides are caused by the pull of the moon. The sun adds to it, though less.\n\n"
    "## High tide\n\n"
    "Water bulges towards the moon. It rises twice a day.\n\n"
    "## Low tide\n\n"
    "Between the bulges the water is low. Boats wait for it to return.",
    "Dear Mr. Miller,\n\n"
    "I am sorry that I missed your lesson on Monday. I was ill, but I have read the chapter. Could "
    "you send me the exercises?\n\n"
    "Thank you for your patience.\n\n"
    "Best regards,\n"
    "Anna",
    "Cheese is made from milk. First, the milk is warmed, and rennet is added. Then the curd is cut; "
    "the whey runs off. Finally, the cheese is salted, pressed, and left to ripen for 1,000 hours or "
    "more.",
    "A weekend trip by train could look like this:\n\n"
    "* Friday: take the night train to Vienna.\n"
    "* Saturday: visit the railway museum, then have cake.\n"
    "* Sunday: ride the old mountain railway.\n"
    "* Monday: go back to work, tired but happy.\n\n"
    "Book your seats early, since these trains fill up.",
    "Snow falls on the silent town,\n"
    "White flakes drifting slowly down.\n"
    "Children laugh and run to play,\n"
    "On this first and snowy day.\n\n"
    "Lamps are lit behind the glass.\n"
    "Quiet hours come and pass.",
    "**Gravity** is a force that pulls objects towards each other. Isaac Newton described it in 1687."
    " *Einstein* later explained it as a bending of space. On Earth, it gives us weight. It also "
    "keeps the moon in orbit.",
    "To sharpen a knife, you need a stone. Soak it in water for ten minutes. Hold the knife at 20 "
    "degrees and draw it over the stone. Repeat this on the other side. Rinse the blade when you are "
    "done.",
    "Yes, whales are mammals. They breathe air, give birth to live young, and feed them with milk. "
    "Their ancestors lived on land some fifty million years ago. Today they live in every ocean.",
    "| Game | Players |\n"
    "|---|---|\n"
    "| Charades | 4 |\n"
    "| Chess | 2 |\n\n"
    "Charades needs no pieces at all. Chess needs a board, but it lasts all evening. Both work well "
    "without electricity.",
    '"The early bird catches the worm," my grandmother used to say. She rose at five, winter and '
    "summer. She baked bread, fed the hens, and was done by eight. I prefer to sleep. Still, her "
    "bread was very good.",
]

PIECES = st.sampled_from(
    [
        *(piece for reply in REPLIES for piece in re.split(r"(?<=\.) |\n", reply)),
        "```python\nx = [1, 2]\nprint(x)\n```",
        "- one item, unfinished",
        "* another **item**: with a stop.",
        "1. First.",
        "12) Twelfth",
        "## Heading",
        "**Bold line:**",
        "---",
        "***",
        "******",
        "***both***",
        "[a link](https://example.org/a,b)",
        "<<a title>>",
        "猫は小さな動物です。よく眠ります。",
        "狐狸住在森林里\uff0c吃老鼠。",
        "Größe, Übung und Ärger.",
        "Ελληνικά ΟΔΟΣ.",
        "e.g. this, etc. and so on...",
        "2 * 3 * 4 = 24",
        "P.S. already here",
        "\ud800",
        "\u2028",
        "🦊🦊",
        "A",
        "_",
        '"',
        "",
    ]
)
SEPARATORS = st.sampled_from([" ", "\n", "\n\n", "\n\n\n", "", "\t", "\r\n"])
BUILT = st.lists(st.tuples(PIECES, SEPARATORS), max_size=14).map(lambda parts: "".join(map("".join, parts)))
TEXTS = st.one_of(BUILT, BUILT, BUILT, st.text(max_size=200))


def rewritten(instruction_id: str, reply: str, **options) -> str | None:
    return rewrite(instruction_id, reply, ARGUMENTS[instruction_id], prompt=PROMPT, **options)


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def share_kept(before: str, after: str) -> float:
    """Of the words, as often as each occurs."""
    return (words(before) & words(after)).total() / words(before).total()


def test_every_id_but_the_language_has_a_rewriter():
    assert set(INSTRUCTION_IDS) - set(REWRITERS) == {"language:response_language"}
    assert set(ARGUMENTS) == set(REWRITERS) == {name for name in INSTRUCTION_IDS if can_rewrite(name)}
    assert not can_rewrite("no:such_id")


def test_a_language_is_left_to_the_model():
    assert rewrite("language:response_language", REPLIES[0], {"language": "de"}) is None
    assert rewrite("language:response_language", REPLIES[0], {"language": "en"}) == REPLIES[0]


def test_unknown_ids_and_arguments_are_refused():
    with pytest.raises(CatalogError):
        rewrite("no:such_id", "A reply.", {})
    with pytest.raises(CatalogError):
        rewrite("startend:end_checker", "A reply.", {})


@pytest.mark.parametrize("instruction_id", sorted(REWRITERS))
@pytest.mark.parametrize("reply", ["", " \n\t", "...", "---", "🦊", "```\n```"])
def test_a_reply_that_says_nothing_is_not_rewritten(instruction_id, reply):
    assert rewritten(instruction_id, reply) is None


# --- the verifier passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction_id", sorted(set(REWRITERS) - DETECTED))
def test_what_is_rewritten_passes_and_stays(instruction_id):
    @settings(max_examples=150, deadline=None)
    @given(TEXTS, st.integers(0, 9), st.booleans())
    def check(reply, seed, cut):
        passes_and_stays(instruction_id, reply, seed, cut)

    check()


@pytest.mark.parametrize("instruction_id", sorted(DETECTED))
def test_letter_cases_pass_and_stay(instruction_id):
    @settings(max_examples=25, deadline=None)
    @given(TEXTS, st.integers(0, 9), st.booleans())
    def check(reply, seed, cut):
        passes_and_stays(instruction_id, reply, seed, cut)

    check()


def passes_and_stays(instruction_id: str, reply: str, seed: int, cut: bool) -> None:
    found = rewritten(instruction_id, reply, seed=seed, cut=cut)
    assert found == rewritten(instruction_id, reply, seed=seed, cut=cut)
    if found is not None:
        assert verify(instruction_id, found, ARGUMENTS[instruction_id], prompt=PROMPT)
        assert rewritten(instruction_id, found, seed=seed + 1) == found


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(0, 4), st.integers(0, 9), st.sampled_from(["at least", "less than"]))
def test_any_number_is_met_or_refused(reply, number, seed, relation):
    for instruction_id, kwargs in numbered(number, relation):
        found = rewrite(instruction_id, reply, kwargs, seed=seed)
        assert found is None or verify(instruction_id, found, kwargs)


def numbered(number: int, relation: str) -> list[tuple[str, dict]]:
    return [
        ("detectable_format:number_bullet_lists", {"num_bullets": number}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": number}),
        ("detectable_content:number_placeholders", {"num_placeholders": 3 * number}),
        ("length_constraints:number_sentences", {"num_sentences": number, "relation": relation}),
        ("length_constraints:number_words", {"num_words": 5 * number, "relation": relation}),
        ("keywords:frequency", {"keyword": "the", "frequency": number, "relation": relation}),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": number, "capital_relation": relation},
        ),
        (
            "keywords:letter_frequency",
            {"letter": "#", "let_frequency": number, "let_relation": relation},
        ),
    ]


# --- None is rare, and the content stays -------------------------------------------------------------------


@pytest.mark.parametrize("instruction_id", ANY_REPLY)
def test_realistic_replies_are_rewritten(instruction_id):
    missed = [reply for reply in REPLIES if rewritten(instruction_id, reply) is None]
    # langdetect takes the poem in capitals for German
    assert missed == ([REPLIES[6]] if instruction_id == "change_case:english_capital" else [])


@pytest.mark.parametrize("instruction_id", sorted(set(ANY_REPLY) - SHORTENING))
@pytest.mark.parametrize("seed", range(4))
def test_the_words_of_the_reply_stay(instruction_id, seed):
    # what may go: the numbers of a list that becomes prose, thousands that lose their comma
    for reply in REPLIES:
        found = rewritten(instruction_id, reply, seed=seed)
        assert found is None or share_kept(reply, found) >= 0.85


@pytest.mark.parametrize("instruction_id", sorted(set(ANY_REPLY) - SHORTENING))
def test_the_length_stays_within_a_third_on_the_whole(instruction_id):
    found = {reply: rewritten(instruction_id, reply) for reply in REPLIES}
    before = sum(len(reply) for reply in REPLIES if found[reply])
    after = sum(len(text) for text in found.values() if text)
    assert 0.9 * before <= after <= 1.33 * before


@pytest.mark.parametrize("instruction_id", sorted(set(ANY_REPLY) - DETECTED))
def test_a_rewritten_reply_is_still_a_reply(instruction_id):
    assert [is_degenerate(rewritten(instruction_id, reply)) for reply in REPLIES] == [None] * len(REPLIES)


def test_shortened_replies_keep_their_first_sentences():
    for reply in REPLIES:
        kept = rewritten("length_constraints:number_words", reply)
        assert reply.startswith(kept[:20])
        assert verify("length_constraints:number_words", kept, {"num_words": 10, "relation": "at least"})


SELDOM = {"keywords:letter_frequency"} | ONLY_SOME


@pytest.mark.parametrize("instruction_id", sorted(set(REWRITERS) - SELDOM))
def test_real_replies_are_rewritten(instruction_id):
    replies = real_replies()[:: 8 if instruction_id in DETECTED else 2]
    missed = [reply[:60] for reply in replies if rewritten(instruction_id, reply, cut=True) is None]
    assert len(missed) <= 0.05 * len(replies), missed


@cache
def real_replies() -> list[str]:
    """English prose of three sentences or more, without code: what a plain prompt is answered with."""
    path = DATA / "ifeval_verdicts.jsonl"
    if not path.exists():
        pytest.skip("no shared/data/ifeval_verdicts.jsonl: real replies are not in this repository")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    replies = {row["response"].split("<|end|>")[0][:1500] for row in rows}
    return sorted(filter(is_prose, replies))


def is_prose(reply: str) -> bool:
    enough = verify(
        "length_constraints:number_sentences", reply, {"num_sentences": 4, "relation": "at least"}
    )
    english = verify("language:response_language", reply, {"language": "en"})
    return enough and english and "```" not in reply and not reply.isupper() and is_degenerate(reply) is None


# --- one by one --------------------------------------------------------------------------------------------


def test_json_takes_many_shapes():
    shapes = set()
    for seed in range(14):
        found = json.loads(rewritten("detectable_format:json_format", REPLIES[1], seed=seed))
        shapes.add(tuple(found))
    assert len(shapes) >= 5
    assert ("answer",) in shapes and ("introduction", "points", "conclusion") in shapes


def test_headings_become_the_keys_of_a_json():
    reply = "# Food\n\nOtters eat fish.\n\n# Home\n\nThey live in rivers."
    found = [json.loads(rewritten("detectable_format:json_format", reply, seed=seed)) for seed in range(14)]
    assert {"Food": "Otters eat fish.", "Home": "They live in rivers."} in found


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "reply", "expected"),
    [
        ("startend:quotation", {}, 'She said "no".', "\"She said 'no'.\""),
        ("punctuation:no_comma", {}, "Red, green, and blue.", "Red and green and blue."),
        ("punctuation:no_comma", {}, "However, 1,000 foxes live.", "However 1000 foxes live."),
        ("punctuation:no_comma", {}, "```\nf(a, b)\n```", None),
        ("detectable_format:title", {}, "# Foxes\n\nThey hunt.", "<<Foxes>>\n\nThey hunt."),
        ("detectable_format:title", {}, "They hunt.", "<<Otters>>\n\nThey hunt."),
        ("detectable_format:constrained_response", {}, "No, they sleep.", "My answer is no. They sleep."),
        ("detectable_format:constrained_response", {}, "They sleep.", None),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "A. They hunt.", None),
        (
            "detectable_content:postscript",
            {"postscript_marker": "P.P.S"},
            "They hunt. They sleep.",
            "They hunt.\n\nP.P.S. They sleep.",
        ),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 2},
            "They eat:\n1. fish\n2. crabs\n3. frogs\n\nThat is all.",
            "They eat:\n\n{m} fish. crabs.\n{m} frogs\n\nThat is all.",
        ),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A cat sat. A dog ran.", "A dog ran."),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A cat sat.", None),
        (
            "length_constraints:number_words",
            {"num_words": 6, "relation": "less than"},
            "They hunt at night. They sleep all day.",
            "They hunt at night.",
        ),
        ("length_constraints:number_words", {"num_words": 9, "relation": "at least"}, "They hunt.", None),
        ("startend:end_checker", {"end_phrase": "Bye!"}, "They hunt.", "They hunt.\n\nBye!"),
        ("combination:two_responses", {}, "They hunt.", None),
        ("change_case:english_lowercase", {}, "the fox is asleep.", "the fox is asleep."),
    ],
)
def test_short_replies(instruction_id, kwargs, reply, expected):
    found = rewrite(instruction_id, reply, kwargs, prompt=PROMPT)
    assert found == expected or (expected and found in (expected.format(m="*"), expected.format(m="-")))


def test_the_prompt_is_repeated_in_its_own_capitals():
    found = rewrite("combination:repeat_prompt", "They hunt.", {}, prompt=PROMPT)
    assert found == f"{PROMPT}\n\nThey hunt."


@pytest.mark.parametrize(
    ("reply", "trimmed"),
    [
        ("Foxes hunt. They also", "Foxes hunt."),
        ("Foxes hunt.", "Foxes hunt."),
        ("Foxes hunt and", ""),
        ("Tips:\n\n1. **Eat** well.\n2. **Sle", "Tips:\n\n1. **Eat** well."),
        ("Tips:\n\n- eat\n- sle", "Tips:\n\n- eat"),
        ("It helps.\n\n## Tips\n\nFirst you", "It helps."),
        ("It helps.\n\n```python\nx = 1", "It helps."),
        ("It helps.\n\n```python\nx = 1\n```", "It helps.\n\n```python\nx = 1\n```"),
        ('He said "Go." Then', 'He said "Go."'),
        ("猫は小さい。よく", "猫は小さい。"),
        ("", ""),
    ],
)
def test_a_cut_reply_ends_with_its_last_whole_sentence(reply, trimmed):
    assert trim_to_sentence(reply) == trimmed


@pytest.mark.parametrize(
    ("reply", "trimmed"),
    [
        ("Foxes hunt. Owls fly at night.", "Foxes hunt. Owls fly at night."),
        ("Foxes hunt mice. Owls fly. Foxes hunt mice. Owls", "Foxes hunt mice. Owls fly."),
        (
            "The fox hunts mice in deep snow.\n\nThe fox hunts mice in deep sand. It",
            "The fox hunts mice in deep snow.",
        ),
        ("1. Eat well today.\n2. Eat well today.\n3. Eat well", "1. Eat well today."),
        ("Yes. Yes. Yes.", "Yes. Yes. Yes."),
        ("", ""),
    ],
)
def test_a_reply_that_goes_round_in_circles_ends_before_it_does(reply, trimmed):
    assert trim_before_loop(reply) == trimmed


@pytest.mark.parametrize(
    ("reply", "trimmed"),
    [
        ("Foxes hunt.\n\nOwls fly by night.\n\nBees dance.", "Foxes hunt.\n\nOwls fly by night."),
        ("Foxes hunt mice by night.\n \nOwls", "Foxes hunt mice by night."),
        (
            "Three tips for the night:\n\n1. Eat well.\n2. Sleep.\n\nBye",
            "Three tips for the night:\n\n1. Eat well.\n2. Sleep.",
        ),
        ("Foxes hunt mice:\n```\nx = 1\n\ny = 2\n```\n\nSo", "Foxes hunt mice:\n```\nx = 1\n\ny = 2\n```"),
        ("Foxes hunt mice by night.\n\n", None),
        ("Foxes hunt mice by night.", None),
        ("", None),
    ],
)
def test_the_first_paragraphs_leave_nothing_open(reply, trimmed):
    assert trim_to_paragraph(reply, 5) == trimmed


# --- time --------------------------------------------------------------------------------------------------

HOSTILE = [
    "[",
    "\n",
    "<<",
    "a. ",
    "*",
    "* a\n",
    "- \n",
    '"',
    "a, ",
    "#",
    "`",
    "**a ",
    "\n \n",
    "1. ",
    "ab. Cd ",
    "|",
]
SIZE = 6_000


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_replies_take_linear_time(piece):
    # a quadratic rewriter takes 16 times as long; some give up at once on the small one
    # once more where it fails: a collection of garbage in between is no fault of the rewriter
    assert any(seconds(piece, 4 * SIZE) < 10 * seconds(piece, SIZE) + 3 for _ in range(2))


def seconds(piece: str, size: int) -> float:
    reply = "Foxes hunt. " + piece * (size // len(piece)) + " They sleep"
    start = time.process_time()
    for instruction_id in sorted(set(REWRITERS) - DETECTED):
        rewritten(instruction_id, reply, cut=True)
    return time.process_time() - start
