"""Regular expressions that come from outside: never slow, refused by name, and with Python's verdict."""

from __future__ import annotations

import re
import time

import pytest
from cli_runs import invoke
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.errors import CatalogError
from localsteer.verify import verify
from localsteer.verify.patterns import MAX_SECONDS, expression
from localsteer.verify.verdicts import check_arguments

SECONDS = 3.0  # of processor time, on a slow core
BIG = "a" * 1_000_000


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\w+\s?)+$!",
        "(a|aa)+$b",
        "(a*)*b",
        "(.*)(.*)(.*)(.*)(.*)x",
        "(?:a?){30}a{30}b",
        "(?:a|b|ab)*c",
        "(.?){900}x",
    ],
)
def test_an_expression_that_would_keep_python_busy_is_over_at_once(pattern):
    start = time.process_time()
    assert not verify("keywords:existence", BIG, {"keywords": [pattern]})
    assert verify("keywords:forbidden_words", BIG, {"forbidden_words": [pattern]})
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("fox(?=es)", "looks around"),
        ("(?<!red )fox", "looks around"),
        (r"(fox)\1", "refers back"),
        ("(fox)?(?(1)a|b)", "asks whether a group"),
        ("^((.?){60}){60}$", "3600 characters one by one"),
        ("a{1,100000}", "one by one"),
        ("a{99999999999999999999}", "too much"),
        ("x" * 1001, "1000 characters, not 1001"),
        ("(" * 450 + "(?=a)" + ")" * 450, "."),
        (r"\b[" + "".join(map(chr, range(0x4E00, 0x4E50))) + "]+", "kinds of characters"),
    ],
)
@pytest.mark.parametrize("rule", ["keywords:existence", "keywords:forbidden_words", "keywords:frequency"])
def test_what_can_not_be_searched_is_refused_by_name_before_any_reply(rule, pattern, why):
    arguments = {
        "keywords:existence": {"keywords": ["dog", pattern]},
        "keywords:forbidden_words": {"forbidden_words": [pattern]},
        "keywords:frequency": {"keyword": pattern, "frequency": 1, "relation": "at least"},
    }[rule]
    with pytest.raises(CatalogError, match=why) as refusal:
        check_arguments(rule, arguments)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_more_words_than_anybody_asks_for_are_refused():
    with pytest.raises(CatalogError, match="200 texts at most"):
        check_arguments("keywords:existence", {"keywords": ["fox"] * 201})


def test_counting_that_looks_far_ahead_from_each_place_has_an_end():
    start = time.monotonic()
    with pytest.raises(CatalogError, match="too long to count"):
        expression("a.*z|a").count(BIG * 4)
    assert time.monotonic() - start < 2 * MAX_SECONDS


def test_the_command_line_refuses_in_one_line():
    rule = ("-i", "keywords:existence", "--kwargs", '{"keywords": ["fox(?=es)"]}')
    assert "looks around" in invoke("verify", *rule, input="Foxes hunt.").complaint()


@pytest.mark.parametrize(
    "pattern",
    [
        "fox", r"\bfox\b", "fox(es)?", "f.x", r"\d+ fox", "é", r"\bÉlan\b", "straße", "\u017f", r"\w+$",
        "^fox", "(?i)K", "(", "*", "fox|hare", r"[^\W\d_]{4,}\b",
    ],
)  # fmt: skip
def test_ordinary_expressions_have_pythons_verdict(pattern):
    replies = [
        "Foxes",
        "a fox.",
        "3 fox\n",
        "٣ fox",
        "éfox",
        "élan",
        "STRASSE Straße",
        "s",
        "\u212a",
        "fox\n\n",
        "x(*",
        "中文fox",
    ]
    try:
        python = re.compile(pattern, re.IGNORECASE)
    except re.error:
        python = re.compile(re.escape(pattern), re.IGNORECASE)
    ours = expression(pattern, re.IGNORECASE)
    assert [ours.search(reply) for reply in replies] == [bool(python.search(reply)) for reply in replies]
    assert [ours.count(reply) for reply in replies] == [
        len(list(python.finditer(reply))) for reply in replies
    ]


ATOMS = st.sampled_from(
    [
        "a",
        "É",
        "ß",
        "k",
        "İ",
        r"\w",
        r"\W",
        r"\d",
        r"\S",
        ".",
        "[a-f]",
        "[^é-ü]",
        r"\b",
        r"\B",
        "^",
        "$",
        r"\Z",
        "\\n",
    ]
)
TEXTS = st.text(st.sampled_from(list("aAéÉßẞkKiİ\u0131٣_ \n.-中\xa0\u0301\ud800")), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        ATOMS,
        lambda inner: (
            st.tuples(inner, inner).map("".join)
            | st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format)
            | st.tuples(inner, st.sampled_from(["*", "+?", "{2}", "{0,2}"])).map("(?:{0[0]}){0[1]}".format)
        ),
        max_leaves=6,
    ),
    TEXTS,
    st.sampled_from([0, re.IGNORECASE]),
)
def test_any_expression_has_pythons_verdict(pattern, text, flags):
    assert expression(pattern, flags).search(text) == bool(re.search(pattern, text, flags))
