"""Whatever a model says, judging and rewriting it takes time in proportion to its length."""

from __future__ import annotations

import time

import pytest

from localsteer.verify import is_degenerate, rewrite, subject_kept, verify
from localsteer.verify.language import chance
from localsteer.verify.sentences import split_sentences
from localsteer.verify.verdicts import check_arguments
from localsteer.verify.verifiers.early import hopeless, without_last_words

N = 100_000  # characters
SECONDS = 5.0  # of processor time, on a slow core; most of these took from ten seconds to hours
MANY = 10**12

LESS = {"num_sentences": 3, "relation": "less than"}


def early(name, arguments):
    return lambda text: hopeless(name, text, check_arguments(name, arguments))


def written(name, arguments):
    return lambda text: rewrite(name, text, arguments, prompt="What is it?")


CASES = {
    "blanks before the last words": (early("length_constraints:number_sentences", LESS), "x{}x y z.", " "),
    "blanks after a value": (early("detectable_format:json_format", {}), "1{}x", " "),
    "a list of numbers": (early("detectable_format:json_format", {}), "[{}", "1,"),
    "nested brackets": (early("detectable_format:json_format", {}), "{}", "["),
    "nested objects": (lambda text: verify("detectable_format:json_format", text), "{}", '{"a":'),
    "a number": (lambda text: verify("detectable_format:json_format", text), "{}", "7"),
    "blanks without a comma": (written("punctuation:no_comma", {}), "Foxes, hares{}x", " "),
    "openings": (written("punctuation:no_comma", {}), "{}foxes, hares", "however, "),
    "clauses": (
        written("length_constraints:number_words", {"num_words": N, "relation": "less than"}),
        "Foxes {}hunt.",
        "a b, ",
    ),
    "highlights": (
        written("detectable_format:number_highlighted_sections", {"num_highlights": MANY}),
        "Foxes hunt. {}",
        "*a* ",
    ),
    "marks in the wrong order": (lambda text: subject_kept(text, "fox"), "a{}" + "\u0300" * N, "\u0315"),
    "marks that hide marks": (lambda text: subject_kept(text, "fox"), "a{}", "\u0f73"),
    "exclamations": (split_sentences, "{}", "!"),
    "full stops": (split_sentences, "{}", ". "),
    "brackets": (is_degenerate, "{}", "["),
    "two syllables": (is_degenerate, "{}", "한국국한한국"),
    "an address without an end": (lambda text: chance(text, "en"), "{}@b", "a"),
}


@pytest.mark.parametrize("name", CASES)
def test_time_is_in_proportion_to_the_reply(name):
    work, text, piece = CASES[name]
    work("The fox.")  # loads what is loaded once
    reply = text.format(piece * (N // len(piece))) if "{}" in text else text
    start = time.process_time()
    work(reply)
    assert time.process_time() - start < SECONDS


def test_what_the_early_test_leaves_out_of_a_text():
    known = {"x y z": "x", "x y ": "x", "x  ": "x", " x y": "", "x\ny  z": "x"}
    known |= dict.fromkeys(("", "x", "x ", "x y"))
    assert {text: without_last_words(text) for text in known} == known


def test_an_opening_keeps_its_place():
    said = "However, therefore, red, green, and blue."
    assert rewrite("punctuation:no_comma", said) == "However therefore red and green and blue."


@pytest.mark.parametrize(
    ("name", "arguments", "piece"),
    [
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, ". "),
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "! ? "),
        ("length_constraints:number_sentences", {"num_sentences": MANY**3, "relation": "at least"}, "a b"),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 3, "capital_relation": "at least"},
            "A b. ",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": MANY**3, "capital_relation": "less than"},
            "a.",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": MANY, "capital_relation": "at least"},
            "A. ",
        ),
    ],
)
def test_counting_ends_where_the_verdict_is_certain(name, arguments, piece):
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    verify(name, text, arguments)
    assert time.process_time() - started < SECONDS / 3
