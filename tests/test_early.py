"""Early verdicts: a reply that the final verifier would pass is never stopped, and failing ones are."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from localsteer.verify.verdicts import check_arguments
from localsteer.verify.verifiers import VERIFIERS
from localsteer.verify.verifiers.early import EARLY, hopeless

CASES = [
    ("change_case:english_lowercase", {}),
    ("change_case:english_capital", {}),
    ("punctuation:no_comma", {}),
    ("startend:quotation", {}),
    ("detectable_format:json_format", {}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Ab c. Ab"}),
    ("combination:two_responses", {}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "ab"},
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"}),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "u.s."]}),
]

LETTERS = [
    "a",
    "A",
    "ab",
    "Ab",
    "AB",
    "cat",
    "cats",
    "The",
    "Mr",
    "c",
    "\u01c5",
    "\u03a3",
    "\u0130",
    "é",
    "1",
]
BLANKS = [" ", "  ", "\n", "\n\n", "\t", "\u00a0"]
MARKS = [
    ".",
    "1.",
    "?",
    "!",
    "...",
    "?!",
    ". ",
    "! ",
    ", ",
    ",",
    ")",
    '"',
    "'",
    "*",
    "**",
    "***",
    "******",
    "-",
]
LISTS = ["- ", "* ", "--", "`", "```", "```json", "```Json", "json", "{", "}", "[", "]", ":", "\\", "\\u00"]
SCRAPS = [*LETTERS, *BLANKS, *MARKS, *LISTS, '"a": ', "0", "12", "-1", "1e", "e+5", "true", "nul", "NaN"]
TEXTS = st.one_of(st.lists(st.sampled_from(SCRAPS), max_size=14).map("".join), st.text(max_size=12))
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
WRAPS = st.sampled_from(
    ["{}", " {}\n", "```json\n{}\n```", "```\n{}```", "```json```JSON{}```", "\u00a0{} ``` ", "{}`"]
)


def passes(case: tuple[str, dict], text: str) -> bool:
    verifier, arguments = case
    checked = check_arguments(verifier, arguments)
    if verifier.startswith("change_case"):  # the language is no part of what is tested here
        return text.islower() if "lowercase" in verifier else text.isupper()
    return bool(text.strip()) and bool(VERIFIERS[verifier].check(text, **checked))


def first_stop(case: tuple[str, dict], text: str) -> str | None:
    """The shortest beginning of the text at which it would be stopped."""
    verifier, arguments = case
    checked = check_arguments(verifier, arguments)
    beginnings = (text[:n] for n in range(len(text) + 1))
    return next((part for part in beginnings if hopeless(verifier, part, checked)), None)


def test_every_early_test_is_tried():
    assert {verifier for verifier, _ in CASES} == set(EARLY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_reply_that_passes_is_never_stopped(case, text):
    if passes(case, text):
        assert first_stop(case, text) is None


@given(value=VALUES, wrap=WRAPS, indent=st.sampled_from([None, 2]))
@settings(max_examples=200, deadline=None)
@example(value=-0.0, wrap="{}", indent=None)
def test_json_is_never_stopped(value, wrap, indent):
    text = wrap.replace("{}", json.dumps(value, indent=indent), 1)
    case = ("detectable_format:json_format", {})
    if passes(case, text):
        assert first_stop(case, text) is None


@given(text=st.lists(st.sampled_from(SCRAPS), max_size=10).map("".join))
@settings(max_examples=200, deadline=None)
def test_a_whole_text_that_is_stopped_fails(text):
    for case in CASES:
        if passes(case, text):
            assert first_stop(case, text) is None, case


@pytest.mark.parametrize(
    ("case", "text", "at"),
    [
        (0, "a fox is Red and quick", "a fox is R"),
        (1, "A FOx IS", "A FOx"),
        (2, "Red, quick", "Red,"),
        (3, " A fox", " A"),
        (4, "The fox", "T"),
        (4, '{"a": 1, b', '{"a": 1, b'),
        (4, '{"a": 1} is it', '{"a": 1} i'),
        (4, "```python\n{", "```p"),
        (5, "- a\n- b\n- c", "- a\n- b\n-"),
        (6, "Ab d", "Ab d"),
        (7, "a******b******c", "a******b******c"),
        (8, "a *** b *** c", "a *** b *** c"),
        (9, "a\n\nb\n\nc", "a\n\nb\n\nc"),
        (10, "one two three", "one two t"),
        (11, "One is. Two are. Three go. Now then it ends.", "One is. Two are. Three go. "),
        (12, "a cat sat", "a ca"),
        (13, "ab and Ab", "ab and Ab"),
        (14, "the cat sat", "the cat "),
    ],
)
def test_a_failing_reply_is_stopped_here(case, text, at):
    assert not passes(CASES[case], text)
    assert first_stop(CASES[case], text) == at


def test_verifiers_that_a_later_word_can_satisfy_are_never_hopeless():
    assert not hopeless("detectable_format:title", "No title yet.", {})
    assert not hopeless("detectable_content:postscript", "No postscript.", {"postscript_marker": "P.S."})
    at_least = {"num_words": 3, "relation": "at least"}
    assert not hopeless("length_constraints:number_words", "one two three four", at_least)
