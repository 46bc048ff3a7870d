"""Lengths, words and languages: which pairs they are made of, and that minus a vector leads away."""

from __future__ import annotations

import numpy as np
import pytest
from cli_runs import invoke

from localsteer import ControlVector, bundled
from localsteer.catalog import load_catalog
from localsteer.catalog.languages import NAMES, find_language, languages
from localsteer.cli import extract as command
from localsteer.engine import Engine
from localsteer.errors import CatalogError
from localsteer.extract import build_pairs, extract
from localsteer.extract.levels import DIRECTIONS, LENGTHS, LEVELS, length
from localsteer.extract.recipes import exclude_word, include_word, language, minus
from localsteer.plan import Plan
from localsteer.verify.language import LANGUAGES

GENERAL, BUNDLED = load_catalog(), load_catalog("bundled")


@pytest.fixture(scope="module")
def engine():
    if not bundled.is_available():
        pytest.skip("this copy has no bundled model")
    with Engine(bundled.gguf_path("instruct"), n_threads=1, n_ctx=256, n_seq_max=8) as opened:
        yield opened


# --- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("catalog", [GENERAL, BUNDLED], ids=["general", "bundled"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_asks_each_query_at_both_levels(catalog, name):
    recipe = length(catalog, name)
    queries = [f"What is {k}?" for k in range(50)]
    pairs = build_pairs(recipe.instruction, queries, recipe.n_pairs)
    asked = {query: set() for query in queries}
    for pair in pairs:
        for level in DIRECTIONS[name]:
            if pair.instructed.removeprefix(pair.plain + " ") in catalog.get(level).phrasings:
                asked[pair.plain].add(level)
    assert len(pairs) == 100
    assert all(levels == set(DIRECTIONS[name]) for levels in asked.values())


def test_a_level_is_an_instruction_of_the_catalogue():
    for level in LEVELS:
        assert length(GENERAL, level).target == GENERAL.get(level)
        assert length(BUNDLED, level).target.phrasings


def test_a_direction_is_the_mean_of_its_levels(engine):
    queries = BUNDLED.queries["extraction"][:12]
    both = length(BUNDLED, "verbosity").extract(engine, queries, n_pairs=24)
    # the same pairs, level by level: phrasing k of a level goes with every second pair
    pairs = build_pairs(length(BUNDLED, "verbosity").instruction, queries, 24)
    sums = np.zeros_like(both.directions, dtype=np.float64)
    for pair in pairs:
        states = engine.last_hidden_states([engine.prompt_tokens(pair.instructed)])
        sums += states[0] - engine.last_hidden_states([engine.prompt_tokens(pair.plain)])[0]
    np.testing.assert_allclose(both.directions, sums / 24, atol=0.02 * np.abs(both.directions).max())
    assert both.mode == "add" and both.name == "verbosity"


def test_concise_replies_are_shorter_and_verbose_ones_longer(engine):
    queries = BUNDLED.queries["extraction"][:20]
    asked = [query.text for query in BUNDLED.queries["validation"][:4]]

    def words(*steer: ControlVector) -> float:
        replies = engine.generate_batch(asked, steer=steer, max_tokens=112, sampling=_greedy())
        return np.mean([len(reply.text.split()) for reply in replies])

    settings = {"layer": 2, "positions": "prompt", "strength": 0.8}
    concise, verbose = (length(BUNDLED, name).extract(engine, queries) for name in DIRECTIONS)
    assert words(concise.at(**settings)) < 0.8 * words() < words() < 0.8 * words(verbose.at(**settings))


def test_an_unknown_length_is_refused():
    with pytest.raises(CatalogError, match="unknown length 'short': extremely_concise, concise"):
        length(GENERAL, "short")


# --- words -------------------------------------------------------------------------------------------------


def test_a_word_takes_twenty_examples_of_its_own(engine):
    recipe = include_word(BUNDLED, "fox")
    vector = recipe.extract(engine, BUNDLED.queries["extraction"])
    assert vector.provenance["n_pairs"] == 20
    assert vector.provenance["instruction_id"] == vector.name == "include_word:fox"
    assert "fox" in vector.provenance["instruction"]
    assert vector.mode == "add"


def test_excluding_is_minus_including(engine):
    queries = BUNDLED.queries["extraction"]
    include = include_word(BUNDLED, "fox").extract(engine, queries)
    exclude = exclude_word(BUNDLED, "fox").extract(engine, queries)
    np.testing.assert_array_equal(exclude.directions, -include.directions)
    assert exclude.name == "exclude_word:fox"
    assert exclude.provenance["verifier"] == "keywords:forbidden_words"
    assert exclude.provenance["kwargs"] == {"forbidden_words": ["fox"]}
    plan, opposite = Plan.from_vectors([exclude]), Plan.from_vectors([include.at(strength=-1.0)])
    added = []
    for each in (plan, opposite):
        program = each.program(each.layers[0], 0)
        added.append(program.biases @ program.writers.astype(np.float64))
    np.testing.assert_array_equal(*added)


def test_minus_aims_at_the_state_without_the_instruction():
    directions = np.array([[3.0, 4.0]])
    vector = ControlVector(directions, [7.0], [2.0], [0.5], [0.25], layers=(0,), name="include_word:fox")
    away = minus(vector, BUNDLED.get("exclude_word", word="fox"))
    assert (away.mean_with[0], away.mean_without[0]) == (-2.0, -7.0)
    assert (away.std_with[0], away.std_without[0]) == (0.25, 0.5)
    assert away.mean_with[0] - away.mean_without[0] == np.linalg.norm(away.directions)


def test_few_queries_give_fewer_examples(engine):
    vector = include_word(GENERAL, "fox").extract(engine, BUNDLED.queries["extraction"][:2])
    assert vector.provenance["n_pairs"] == 14  # seven phrasings


@pytest.mark.parametrize("word", ["", " ", "two words"])
def test_something_that_is_no_word_is_refused(word):
    for recipe in (include_word, exclude_word):
        with pytest.raises(CatalogError, match="is not a word: write one"):
            recipe(GENERAL, word)


# --- languages ---------------------------------------------------------------------------------------------


def test_languages_have_a_code_and_a_name():
    known = languages(GENERAL)
    assert len(known) >= 8
    for code, instruction in known.items():
        assert language(GENERAL, code).target.kwargs == {"language": code}
        assert find_language(GENERAL, NAMES[code].upper()) == find_language(GENERAL, f" {code} ")
        assert all(NAMES[code] in text for text in instruction.phrasings)
    assert set(NAMES) <= set(LANGUAGES)


def test_the_bundled_catalogue_has_its_own_ids():
    assert find_language(BUNDLED, "es").id == find_language(BUNDLED, "Spanish").id == "spanish"


def test_an_unknown_language_names_the_known_ones():
    with pytest.raises(CatalogError, match=r"unknown language 'Klingon': general has ar \(Arabic\), de"):
        find_language(GENERAL, "Klingon")
    with pytest.raises(CatalogError, match=r"'fr': bundled has de \(German\), es \(Spanish\)"):
        find_language(BUNDLED, "fr")


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.txt").write_text("Tell me about foxes.\nDescribe a quiet village.\n")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "file", "verifier", "mode"),
    [
        (["--include-word", "fox"], "include_word-fox.gguf", "keywords:existence", "add"),
        (["--exclude-word", "fox"], "exclude_word-fox.gguf", "keywords:forbidden_words", "add"),
        (["--length", "concise"], "concise.gguf", None, "add"),
        (["--length", "verbosity"], "verbosity.gguf", None, "add"),
        (["--language", "es"], "language_es.gguf", "language:response_language", "project"),
        (["--language", "french"], "language_fr.gguf", "language:response_language", "project"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_for_each_kind(tiny_llama, folder, flags, file, verifier, mode):
    given = ("--gguf", tiny_llama.gguf_path, "--queries", "queries.txt", "-t", "1", "--pairs", "2")
    done = invoke("extract", *given, *flags, "--json")
    assert done.status == 0, done.err
    assert done.json["file"] == file
    assert done.json["mode"] == mode
    assert done.json["provenance"].get("verifier") == verifier
    assert ControlVector.load(folder / file).provenance["n_pairs"] == 2


def test_a_flag_extracts_what_the_catalogue_s_instruction_does(tiny_llama, folder):
    given = ("extract", "--gguf", tiny_llama.gguf_path, "--queries", "queries.txt", "-t", "1", "--pairs", "4")
    slot = ("--instruction", "include_word", "--slot", "word=fox")
    for name, how in (("a", ("--include-word", "fox")), ("b", slot)):
        assert invoke(*given, *how, "-o", f"{name}.gguf").status == 0
    ours, theirs = (ControlVector.load(folder / f"{name}.gguf") for name in "ab")
    np.testing.assert_array_equal(ours.directions, theirs.directions)
    assert ours.name == theirs.name


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give exactly one of --instruction, --include-word, --exclude-word, --length, --language"),
        (["-i", "json", "--language", "es"], "give exactly one of"),
        (["--include-word", "fox", "--exclude-word", "fox"], "give exactly one of"),
        (["--include-word", "two words"], "'two words' is not a word"),
        (["--exclude-word", ""], "'' is not a word"),
        (["--length", "short"], "'short' is not one of 'extremely_concise'"),
        (["--language", "Klingon"], "unknown language 'Klingon': general has ar (Arabic)"),
        (["--language", "es", "--slot", "n=2"], "--slot belongs to --instruction"),
        (["--include-word", "fox", "--catalog", "mine.toml"], "unknown instruction 'include_word'"),
        (["--length", "verbosity", "--catalog", "mine.toml"], "unknown instruction 'verbose'"),
        (["--language", "es", "--catalog", "mine.toml"], "mine.toml has none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line(folder, args, says):
    (folder / "mine.toml").write_text("[[instruction]]\nid = 'rhyme'\nphrasings = ['Answer in rhyme.']\n")
    assert says in invoke("extract", "--gguf", "none.gguf", *args).complaint()


def test_the_command_s_lengths_are_the_library_s():
    assert command.LENGTHS == LENGTHS


def test_extract_takes_the_mapped_instruction_directly(engine):
    """The flags are thin: the same vector comes from the public function."""
    queries = BUNDLED.queries["extraction"][:6]
    ours = language(BUNDLED, "de").extract(engine, queries)
    theirs = extract(engine, BUNDLED.get("german"), queries, n_pairs=50)
    np.testing.assert_array_equal(ours.directions, theirs.directions)


def _greedy():
    from localsteer.runtime.sampling import GREEDY

    return GREEDY
