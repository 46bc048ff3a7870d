"""The bundled instructions and queries are complete and split for good; a user's file is checked."""

from __future__ import annotations

import re
import string

import pytest

from localsteer.catalog import (
    GROUPS,
    SPLITS,
    Catalog,
    Instruction,
    Query,
    catalog_names,
    load_catalog,
    load_queries,
)
from localsteer.errors import CatalogError

# The 25 ids of IFEval and the arguments that each takes (its instructions_registry.py)
IFEVAL = {
    "keywords:existence": {"keywords"},
    "keywords:frequency": {"keyword", "frequency", "relation"},
    "keywords:forbidden_words": {"forbidden_words"},
    "keywords:letter_frequency": {"letter", "let_frequency", "let_relation"},
    "language:response_language": {"language"},
    "length_constraints:number_sentences": {"num_sentences", "relation"},
    "length_constraints:number_paragraphs": {"num_paragraphs"},
    "length_constraints:number_words": {"num_words", "relation"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs", "nth_paragraph", "first_word"},
    "detectable_content:number_placeholders": {"num_placeholders"},
    "detectable_content:postscript": {"postscript_marker"},
    "detectable_format:number_bullet_lists": {"num_bullets"},
    "detectable_format:constrained_response": set(),
    "detectable_format:number_highlighted_sections": {"num_highlights"},
    "detectable_format:multiple_sections": {"section_spliter", "num_sections"},
    "detectable_format:json_format": set(),
    "detectable_format:title": set(),
    "combination:two_responses": set(),
    "combination:repeat_prompt": {"prompt_to_repeat"},
    "startend:end_checker": {"end_phrase"},
    "startend:quotation": set(),
    "change_case:capital_word_frequency": {"capital_frequency", "capital_relation"},
    "change_case:english_capital": set(),
    "change_case:english_lowercase": set(),
    "punctuation:no_comma": set(),
}
# The kinds of the paper, by verifier
WANTED = {
    "detectable_format:json_format", "change_case:english_lowercase", "change_case:english_capital",
    "change_case:capital_word_frequency", "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections", "detectable_format:multiple_sections",
    "detectable_format:title", "startend:quotation", "punctuation:no_comma", "startend:end_checker",
    "detectable_format:constrained_response", "detectable_content:postscript",
    "detectable_content:number_placeholders", "combination:two_responses", "combination:repeat_prompt",
    "language:response_language", "length_constraints:number_sentences", "keywords:existence",
    "keywords:forbidden_words",
}  # fmt: skip
LEVELS = ("extremely_concise", "concise", "moderate", "verbose", "extremely_verbose")


@pytest.fixture(scope="module")
def general() -> Catalog:
    return load_catalog()


def ready(catalog: Catalog) -> list[Instruction]:
    """Every instruction as it would be used; the word is open, so it gets one."""
    return [
        catalog.get(name, **({"word": "fox"} if "word" in i.open_slots else {}))
        for name, i in catalog.instructions.items()
    ]


# The bundled catalog


def test_every_kind_of_the_paper_is_there(general):
    verifiers = {instruction.verifier for instruction in general.instructions.values()}
    assert verifiers >= WANTED
    assert set(LEVELS) <= set(general.instructions)


def test_at_least_eight_reply_languages(general):
    languages = [i for i in general.instructions.values() if i.verifier == "language:response_language"]
    assert len({instruction.kwargs["language"] for instruction in languages}) >= 8


def test_verifiers_and_arguments_are_those_of_ifeval(general):
    for instruction in ready(general):
        if instruction.verifier is None:
            assert instruction.id in LEVELS
        else:
            assert set(instruction.kwargs) == IFEVAL[instruction.verifier], instruction.id


def test_numbers_in_arguments_are_numbers(general):
    for instruction in ready(general):
        for name, value in instruction.kwargs.items():
            if name.startswith("num_") or name.endswith("frequency"):
                assert isinstance(value, int), instruction.id


def test_every_instruction_has_six_different_phrasings(general):
    for instruction in ready(general):
        spoken = {text.lower().rstrip(".") for text in instruction.phrasings}
        assert len(spoken) >= 6, instruction.id


def test_phrasings_are_whole_sentences(general):
    for instruction in ready(general):
        for text in instruction.phrasings:
            assert text[0].isupper() and text == text.strip() and "  " not in text
            assert text[-1] in '.?!"*:' + string.ascii_letters, text
            assert not re.search(r"[{}]", text), text


def test_no_phrasing_belongs_to_two_instructions(general):
    owner: dict[str, str] = {}
    for instruction in ready(general):
        for text in instruction.phrasings:
            assert owner.setdefault(text, instruction.id) == instruction.id


def test_a_number_in_a_phrasing_is_the_number_that_is_verified(general):
    for name in ("bullets", "highlights", "placeholders", "sections", "capital_words", "sentences"):
        instruction = general.get(name, n=7)
        assert all("7" in text for text in instruction.phrasings)
        assert 7 in instruction.kwargs.values()


def test_groups_are_known(general):
    assert {instruction.group for instruction in general.instructions.values()} == set(GROUPS)


def test_queries_are_split_for_good(general):
    texts = {split: {query.text.casefold() for query in general.queries[split]} for split in SPLITS}
    assert sum(map(len, texts.values())) >= 200
    assert not texts["extraction"] & texts["validation"]
    assert not texts["extraction"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def test_no_subject_is_in_two_splits(general):
    subjects = [
        {query.subject.lower() for query in general.queries[split] if query.subject} for split in SPLITS
    ]
    assert all(subjects)
    assert not subjects[0] & subjects[1] | subjects[0] & subjects[2] | subjects[1] & subjects[2]


def test_splits_are_large_enough_for_their_work(general):
    """50 pairs for a vector, some 8 queries for a choice, 20 for a figure."""
    assert len(general.queries["extraction"]) >= 50
    assert len(general.queries["validation"]) >= 8
    assert len(general.queries["test"]) >= 20


def test_base_queries_hold_no_instruction(general):
    told = re.compile(
        r"json|lowercase|uppercase|capital|bullet|comma\b|markdown|sentence|in (spanish|german|french)",
        re.I,
    )
    allowed = {"Write a few sentences that sell an old guitar."}
    for split in SPLITS:
        for query in general.queries[split]:
            assert query.text in allowed or not told.search(query.text), query.text


def test_most_subjects_are_named_by_their_query(general):
    """A subject is a word to look for in a reply: nearly always one of the query, singular or not."""
    queries = [query for split in SPLITS for query in general.queries[split] if query.subject]
    named = sum(query.subject.lower().rstrip("s") in query.text.lower() for query in queries)
    assert named / len(queries) > 0.9


def test_questions_for_a_fixed_answer_are_their_own(general):
    instruction = general.get("fixed_answer")
    for split in SPLITS:
        queries = general.queries_for(instruction, split)
        assert all(query.text.endswith("?") for query in queries)
        assert not set(queries) & set(general.queries[split])


def test_catalog_names_are_listed():
    assert "general" in catalog_names()


# Slots


def test_defaults_fill_slots_and_keep_the_id(general):
    assert general.get("bullets").id == "bullets"
    assert general.get("bullets").kwargs == {"num_bullets": 3}


def test_a_changed_slot_shows_in_the_id(general):
    assert general.get("bullets", n=5).id == "bullets:5"
    assert general.get("include_word", word="fox").id == "include_word:fox"


def test_any_word_can_be_asked_for(general):
    instruction = general.get("exclude_word", word="don't {n}")
    assert instruction.kwargs == {"forbidden_words": ["don't {n}"]}
    assert all("don't {n}" in text for text in instruction.phrasings)
    assert instruction.open_slots == ()
    assert instruction.fill() == instruction


def test_an_open_slot_must_be_filled(general):
    with pytest.raises(CatalogError, match="'include_word' needs a value for word"):
        general.get("include_word")


def test_a_value_without_a_slot_is_refused(general):
    with pytest.raises(CatalogError, match="'json' has no slot 'n': it has none"):
        general.get("json", n=3)


def test_the_query_reaches_the_verifier_that_needs_it(general):
    instruction = general.get("repeat_prompt")
    assert instruction.kwargs_for("Why?") == {"prompt_to_repeat": "Why?"}
    assert general.get("json").kwargs_for("Why?") == {}


def test_unknown_instruction_names_the_known(general):
    with pytest.raises(CatalogError, match="unknown instruction 'rhyme': general has json, lowercase"):
        general.get("rhyme")


def test_unknown_split_is_refused(general):
    with pytest.raises(CatalogError, match="unknown split 'train'"):
        general.queries_for(general.get("json"), "train")


# A user's own instruction


def test_own_words_become_an_instruction():
    instruction = Instruction.from_text("  Answer in {rhyme}, please! ")
    assert instruction.phrasings == ("Answer in {rhyme}, please!",)
    assert instruction.id == "answer_in_rhyme_please"
    assert instruction.fill().phrasings == instruction.phrasings
    assert instruction.verifier is None


def test_own_words_in_any_script_have_an_id():
    assert Instruction.from_text("!!!").id == "own"
    assert Instruction.from_text("Отвечай в рифму").id == "отвечай_в_рифму"


@pytest.mark.parametrize("text", ["json\u200b", "\u202ejson", "json\0", "js\x1bon", "nope\ufeff"])
def test_one_word_stays_an_id_whatever_is_hidden_in_it(general, text):
    with pytest.raises(CatalogError, match="unknown instruction"):
        general.find(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Say \0 it.", "plain text, without"),
        ("Say \x1b[31m it.", "plain text, without"),
        ("Say \ud800 it.", "plain text, without"),
        ("Say it. " + "x" * 10_000, "at most 10000"),
        ("\u200b", "is empty"),
    ],
)
def test_what_is_no_text_is_no_instruction(general, text, said):
    with pytest.raises(CatalogError, match=said):
        general.find(text)


def test_words_with_line_breaks_and_joiners_are_an_instruction(general):
    for text in ("Answer\nin\trhyme.", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"):
        assert general.find(text).phrasings == (text,)


def test_empty_words_are_refused():
    with pytest.raises(CatalogError, match="the instruction is empty"):
        Instruction.from_text(" \n")


TEN_LINES = """\
[[instruction]]
id = "rhyme"
phrasings = [
    "Answer in rhyme.",
    "Make every line rhyme.",
]
[queries]
extraction = ["Tell me about foxes.", { text = "What is a lake?", subject = "lake" }]
validation = ["What is a sea?"]
test = ["What is a river?"]
"""


def written(tmp_path, text: str):
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_ten_lines_is_enough(tmp_path):
    catalog = load_catalog(written(tmp_path, TEN_LINES))
    instruction = catalog.get("rhyme")
    assert instruction.phrasings == ("Answer in rhyme.", "Make every line rhyme.")
    assert catalog.queries_for(instruction, "extraction")[1] == Query("What is a lake?", "lake")


def test_a_file_without_queries_takes_the_general_ones(tmp_path, general):
    path = written(tmp_path, '[[instruction]]\nid = "rhyme"\nphrasings = ["Rhyme."]')
    assert load_catalog(str(path)).queries == general.queries


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert load_catalog(written(tmp_path, "\ufeff" + TEN_LINES)).instructions.keys() == {"rhyme"}


def test_variants_make_one_instruction_each(tmp_path):
    text = '[[instruction]]\nid="tone"\nphrasings=["Be {tone}."]\n[instruction.variants]\n'
    text += 'kind={tone="kind"}\nstern={tone="stern"}'
    catalog = load_catalog(written(tmp_path, text))
    assert {name: i.phrasings for name, i in catalog.instructions.items()} == {
        "kind": ("Be kind.",),
        "stern": ("Be stern.",),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no [[instruction]]"),
        ("[[instruction]\n", "is not readable TOML: .*line 1"),
        ("x = 1", "unknown key 'x', expected instruction, queries"),
        ('instruction = "a"', "holds no [[instruction]]"),
        ("instruction = [1]", "instruction 1 is not a table"),
        ("[[instruction]]\nphrasings = ['a']", "instruction 1 needs an id"),
        ("[[instruction]]\nid = ' '\nphrasings = ['a']", "needs an id"),
        ("[[instruction]]\nid = 'a'", "instruction 'a': phrasings must be a list of texts"),
        ("[[instruction]]\nid = 'a'\nphrasings = []", "instruction 'a' has no phrasings"),
        ("[[instruction]]\nid = 'a'\nphrasings = ['x', ' ']", "none of them empty"),
        ("[[instruction]]\nid = 'a'\nphrasings = ['x', 'x']", "phrasings hold one text twice"),
        (
            "[[instruction]]\nid = 'a'\nphrasing = ['x']",
            "unknown key 'phrasing', expected id, group, phrasings",
        ),
        (
            "[[instruction]]\nid = 'a'\nphrasings = ['x']\ngroup = 'b'",
            "unknown group 'b', expected format, length",
        ),
        (
            "[[instruction]]\nid = 'a'\nphrasings = ['x']\nverifier = 'json'",
            "verifier 'json' is not an IFEval id",
        ),
        ("[[instruction]]\nid = 'a'\nphrasings = ['x']\nkwargs = 1", "kwargs is not a table"),
        (
            "[[instruction]]\nid = 'a'\nphrasings = ['{n}']\nvariants = { b = 1 }",
            "variant 'b' is not a table",
        ),
        (
            "[[instruction]]\nid = 'a'\nphrasings = ['{n}']\nvariants = { b = { m = 1 } }",
            "'a' has no slot 'm': it has n",
        ),
        ("[[instruction]]\nid = 'a'\nphrasings = ['x']\n" * 2, "instruction 'a' is there twice"),
    ],
)
def test_bad_instructions_are_one_clear_line(tmp_path, text, words):
    check_refusal(written(tmp_path, text), words)


def check_refusal(path, words: str) -> None:
    with pytest.raises(CatalogError) as caught:
        load_catalog(path)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(words if ".*" in words else re.escape(words), message)


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ("extraction = 'a'", "queries.extraction is not a list"),
        ("extraction = ['']", "queries.extraction has an empty query"),
        ("extraction = [1]", "1 is neither a text nor a table"),
        ("extraction = [{ subject = 'a' }]", "has an empty query"),
        ("extraction = [{ text = 'a', topic = 'b' }]", "unknown key 'topic', expected text, subject"),
        ("extraction = [{ text = 'a', subject = 1 }]", "the subject of 'a' is not a text"),
        ("train = ['a']", "unknown key 'train', expected extraction, validation, test"),
        ("extraction = ['a', 'A ']", "query 'A' is both in extraction and in extraction"),
        ("extraction = ['a b']\ntest = ['A  b']", "query 'A  b' is both in extraction and in test"),
    ],
)
def test_bad_queries_are_one_clear_line(tmp_path, queries, words):
    text = f"[[instruction]]\nid = 'a'\nphrasings = ['x']\n[queries]\n{queries}"
    check_refusal(written(tmp_path, text), words)
    own = f"[[instruction]]\nid = 'a'\nphrasings = ['x']\n[instruction.queries]\n{queries}"
    check_refusal(written(tmp_path, own), words)


def test_an_empty_split_is_named_when_it_is_needed(tmp_path):
    text = "[[instruction]]\nid = 'a'\nphrasings = ['x']\n[queries]\nextraction = ['b']"
    catalog = load_catalog(written(tmp_path, text))
    with pytest.raises(CatalogError, match="has no test queries for 'a'"):
        catalog.queries_for(catalog.get("a"), "test")


def test_a_missing_file_is_named(tmp_path):
    check_refusal(tmp_path / "none.toml", "none.toml can't be read: No such file")
    check_refusal("nowhere", "unknown catalog 'nowhere': ")


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b"id = '\xff'")
    check_refusal(path, "is not UTF-8 text (byte 6)")


# Query files


def test_a_query_file_holds_one_query_a_line(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("\nWhat is a lake?\r\n\n  What is a sea?  \n", encoding="utf-8")
    assert load_queries(path) == (Query("What is a lake?"), Query("What is a sea?"))


def test_an_empty_query_file_is_refused(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(" \n\n")
    with pytest.raises(CatalogError, match=r"my.txt holds no query: write one per line"):
        load_queries(path)


def test_a_missing_query_file_is_refused(tmp_path):
    with pytest.raises(CatalogError, match=r"my.txt can't be read"):
        load_queries(tmp_path / "my.txt")


def test_a_file_that_is_nested_too_deeply_is_one_line(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("x = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(CatalogError, match="nested too deeply"):
        load_catalog(path)
