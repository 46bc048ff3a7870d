"""Which tokens of a text count, by name."""

from __future__ import annotations

import pytest

from localsteer.errors import PromptError
from localsteer.token_choice import TokenChoice, tokens_of_part, tokens_over

PIECES = [b"<|user|>", b"Tell", b" me", b" about", b" fo", b"xes", b".", b"<|end|>"]


def positions(text, reply=""):
    choice = TokenChoice.parse(text)
    return list(choice.positions(len(PIECES), lambda part: tokens_of_part(PIECES, part), reply))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("last", [7]),
        ("all", list(range(8))),
        ("mean", list(range(8))),
        ("0", [0]),
        ("-2", [6]),
        (3, [3]),
        ("span:foxes", [4, 5]),
        ("span: about fox", [3, 4, 5]),
        ("mean:Tell me", [1, 2]),
        ("last:foxes", [5]),
        ("span:<|user|>", [0]),
        ("span:e", [7]),  # the last occurrence
    ],
)
def test_tokens_are_chosen_by_name(text, chosen):
    assert positions(text) == chosen


def test_a_reply_is_the_end_of_its_text():
    assert positions("reply", reply="foxes.") == [4, 5, 6]


@pytest.mark.parametrize(
    ("text", "one"),
    [("last", True), ("mean", True), ("-1", True), ("last:x", True), ("all", False), ("span:x", False)],
)
def test_one_state_for_each_text_or_several(text, one):
    assert TokenChoice.parse(text).is_one is one


@pytest.mark.parametrize(
    "text",
    ["", "first", "1.5", "span", "span:", "span:  ", "spam:x", "1-3", "--1", "1e3", None, True, 1.0, "९"],
)
def test_what_names_no_tokens_is_refused(text):
    with pytest.raises(PromptError, match="names no t") as error:
        TokenChoice.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"), [("8", "no token 8"), ("-9", "no token -9"), ("span:cat", "'cat'")]
)
def test_a_text_without_such_a_token_is_refused(text, says):
    with pytest.raises(PromptError, match=says):
        positions(text)


def test_a_text_without_a_reply_has_no_reply():
    with pytest.raises(PromptError, match="no reply"):
        positions("reply")


def test_the_bytes_of_one_character_may_lie_in_several_tokens():
    pieces = [b"a", b"\xf0\x9f", b"\x99\x82", b"b"]
    assert tokens_of_part(pieces, "🙂") == range(1, 3)
    assert tokens_of_part(pieces, "🙂b") == range(1, 4)


def test_tokens_without_text_belong_to_no_part():
    assert tokens_over([(0, 0), (0, 3), (3, 3), (3, 5)], 0, 3) == range(1, 2)
    assert tokens_over([(0, 0)], 0, 0) is None
