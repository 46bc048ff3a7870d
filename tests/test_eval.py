"""Cells, figures, benches and suites: what is counted, what is compared, and that a run can go on."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from string import Formatter

import numpy as np
import pytest

from localsteer import bundled
from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.errors import CatalogError, LocalsteerError, MismatchError, PromptError
from localsteer.evaluate import texts
from localsteer.evaluate.bench import (
    BUNDLED_LIMITS,
    Bench,
    EvalLimits,
    open_bench,
    open_judge,
)
from localsteer.evaluate.cells import Arm, Cell, Experiment, Rule, applied, checks_of
from localsteer.evaluate.diff import compare, differences
from localsteer.evaluate.intervals import N_BOOTSTRAP, certain, clustered, interval, wilson
from localsteer.evaluate.model_info import quantization
from localsteer.evaluate.model_judge import kappa
from localsteer.evaluate.outcomes import Outcome, Outcomes, judged, report
from localsteer.evaluate.page import Accuracy, Figures, Results, Share, SuiteReport, loaded, plain
from localsteer.evaluate.suites import MODULES, suite
from localsteer.evaluate.suites.ifeval_items import read_items
from localsteer.evaluate.suites.ifeval_match import vectors_of
from localsteer.evaluate.suites.paraphrases import FOLLOWED_BADLY, badly_followed, paraphrases_of
from localsteer.extract.vector_instruction import instruction_of
from localsteer.runtime.reply import Reply
from localsteer.vector import ControlVector

CATALOG = load_catalog(bundled.CATALOG)
JSON, LOWERCASE = CATALOG.get("json"), CATALOG.get("lowercase")
FOX, OWL = Query("Tell me about the fox.", "fox"), Query("Describe the owl.", "owl")
IDS = ("json", "lowercase")


# --- intervals ---------------------------------------------------------------------------------------------


def test_wilsons_interval_is_as_in_the_tables_and_no_point_at_the_ends():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    assert np.isnan(wilson(0, 0)).all()


def test_the_interval_holds_the_mean_and_narrows_with_more_queries():
    draw = np.random.default_rng(0)
    few, many = ((draw.random((1, n)) < 0.7).astype(float) for n in (10, 1000))
    low, high = interval(few)
    assert low < few.mean() < high
    assert interval(many)[1] - interval(many)[0] < (high - low) / 4
    assert interval(few) == interval(few)


def test_rows_on_the_same_queries_are_no_more_evidence():
    values = (np.random.default_rng(1).random((1, 20)) < 0.5).astype(float)
    assert interval(np.repeat(values, 10, axis=0)) == pytest.approx(interval(values))


def test_the_bootstrap_agrees_with_the_normal_approximation():
    values = (np.arange(400) % 4 < 3).astype(float)[None]
    low, high = interval(values)
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.005)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.75 * 0.25 / 400), rel=0.1)


def test_queries_with_several_values_are_drawn_whole():
    sums, counts = [3.0, 0.0, 1.0], [3, 1, 2]
    low, high = clustered(sums, counts)
    assert 0.0 <= low < 4 / 6 < high <= 1.0
    assert N_BOOTSTRAP >= 1000
    assert all(np.isnan(clustered([], [])))
    assert all(np.isnan(interval(np.zeros((0, 0)))))


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [(0.0, 1, (0.0, 0.95)), (0.0, 20, (0.0, 0.139)), (1.0, 20, (0.861, 1.0)), (0.5, 20, (0.5, 0.5))],
)
def test_no_claim_rests_on_the_point_that_equal_replies_give(share, n, expected):
    alike = Figures(n=n, strict=Accuracy(share, share, share))
    assert certain(alike, "strict") == pytest.approx(expected, abs=0.001)
    assert certain(Figures(n=n, strict=Accuracy(None, 0.2, 0.4)), "strict") == (0.2, 0.4)
    assert certain(Figures(n=n), "strict") is certain(None, "strict") is None


# --- cells and figures -------------------------------------------------------------------------------------


def cell(query: Query = FOX, condition: str = "none", instruction: Instruction = LOWERCASE) -> Cell:
    return Cell(instruction.id, condition, query, query.text, (), checks_of(instruction, query))


def row(text: str, *, log: float | None = 1.0, finish: str = "stop", **options) -> Outcome:
    return judged(cell(**options), Reply(text, [1], finish), must_end=True, log_perplexity=log)


def test_a_cell_follows_when_all_of_its_checks_pass():
    both = replace(cell(), checks=(*cell().checks, Rule("punctuation:no_comma")))
    assert judged(both, Reply("the fox runs.", [1], "stop")).strict is True
    assert judged(both, Reply("the fox, it runs.", [1], "stop")).strict is False
    assert judged(replace(both, checks=()), Reply("x", [1], "stop")).strict is None


def test_the_loose_rule_forgives_a_first_line_and_no_degenerate_reply():
    greeted = row("HERE YOU ARE:\nthe fox runs over the small bridge and it sleeps there.")
    assert (greeted.strict, greeted.loose) == (False, True)
    looping = row("the fox " * 40)
    assert (looping.strict, looping.loose, looping.degenerate) == (False, False, "locked at its start")
    assert row("the fox runs", finish="length").degenerate == "endless"


def test_figures_count_what_they_say():
    plain = Outcomes([row("The fox.", log=0.5), row("The owl.", log=0.5, query=OWL)])
    rows = [row("the fox runs over the bridge.", log=2.0), row("The owl sleeps.", log=1.0, query=OWL)]
    found = Outcomes(rows).figures(plain)
    assert found.n == 2
    assert found.strict == Accuracy(0.5, 0.0, 1.0)
    assert found.measure("perplexity") == pytest.approx(np.exp(1.5))
    assert found.measure("perplexity_ratio") == pytest.approx(np.exp(1.0))
    assert found.measure("words") == pytest.approx(4.5)
    assert found.measure("subject_kept") == 1.0
    assert found.settings is None


def test_figures_without_verdicts_or_scores_are_none():
    found = Outcomes([judged(replace(cell(), checks=()), Reply("", [], "stop"))]).figures()
    assert found.measure("perplexity") is found.measure("perplexity_ratio") is None
    assert Outcomes().figures().strict == Accuracy(None, None, None)


def test_a_report_puts_instructions_by_conditions():
    rows = Outcomes(
        [
            row("the fox runs over the bridge.", condition="steered"),
            row("The fox runs."),
            row('{"name": "fox"}', instruction=JSON),
        ]
    )
    made = report("T", rows, ("none", "steered", "both"), {})
    assert made.conditions == ["none", "steered"]
    assert list(made.instructions) == ["lowercase", "json"]
    assert made.instructions["lowercase"]["steered"].strict.accuracy == 1.0
    assert made.all["none"].n == 2
    assert made.all["none"].strict.accuracy == 0.5


def test_arms_ask_each_query_in_turn_and_of_several_instructions_all_are_checked():
    arms = [Arm("none"), Arm("both", told=True)]
    cells = Experiment([JSON, LOWERCASE], arms, [FOX, OWL]).cells(max_tokens=9)
    assert [(each.condition, each.query) for each in cells] == [
        ("none", FOX), ("none", OWL), ("both", FOX), ("both", OWL),
    ]  # fmt: skip
    assert {each.instruction for each in cells} == {"json + lowercase"}
    assert all(each.checks == (*checks_of(JSON, FOX), *checks_of(LOWERCASE, FOX)) for each in cells)
    assert [each.prompt for each in cells[:2]] == [FOX.text, OWL.text]
    assert cells[3].prompt == f"{OWL.text} {JSON.phrasings[1]} {LOWERCASE.phrasings[1]}"
    (own,) = Experiment([JSON], arms[1:], [OWL], ["Curly."], ["Braces."]).cells(max_tokens=9)
    assert (own.prompt, own.wording) == (f"{OWL.text} Curly.", "Braces.")
    by_query = Experiment([JSON, LOWERCASE], arms, [FOX, OWL], by_query=True).cells(max_tokens=9)
    assert by_query == [cells[0], cells[2], cells[1], cells[3]]


def test_a_difference_is_paired_by_query():
    passes, fails = ("the fox runs over the bridge.", "The fox runs.")
    queries = [Query(f"Question {i}?") for i in range(12)]
    ours = [row(passes if i < 9 else fails, query=query) for i, query in enumerate(queries)]
    theirs = [row(passes if i < 6 else fails, query=query) for i, query in enumerate(queries)]
    found = Outcomes(ours).minus(Outcomes(theirs))
    assert found.share == pytest.approx(0.25)
    # the two agree on nine of twelve queries: unpaired, the interval would be twice as wide
    assert 0.0 <= found.low < 0.25 < found.high < 0.55
    assert Outcomes(ours).minus(Outcomes(ours)) == Share(0.0, 0.0, 0.0)
    assert Outcomes().minus(Outcomes()) == Share(None)


# --- suites by name ----------------------------------------------------------------------------------------


def test_suites_have_names_and_titles():
    from localsteer.cli.eval import SUITES

    assert tuple(MODULES) == SUITES
    for name in ("format", "ifeval", "cross-model"):
        assert name == suite(name).NAME
        assert suite(name).TITLE
    with pytest.raises(LocalsteerError, match="unknown suite 'rhymes'"):
        suite("rhymes")


def test_every_passage_that_a_report_asks_for_is_written_and_gets_the_figures_it_names():
    """Of those whose names stand in the code: a field without a value, or a figure too many, is a mistake."""
    asked = {}
    for path in Path(texts.__file__).parent.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            by_name = call.args and isinstance(call.args[0], ast.Constant)
            if by_name and getattr(call.func, "id", "") in ("said", "section"):
                asked[call.args[0].value] = {keyword.arg for keyword in call.keywords} - {"more"}
    assert len(asked) > 30
    for name, given in asked.items():
        fields = {field for _, field, _, _ in Formatter().parse(texts.written(name)) if field}
        assert None in given or fields == given, name


# --- which instruction a vector is of ----------------------------------------------------------------------


def named(**provenance) -> ControlVector:
    ones = np.ones(2, np.float32)
    return ControlVector(
        np.ones((2, 3)), ones, 0 * ones, ones, ones, layers=(1,), name="json", provenance=provenance
    )


def test_a_vector_is_of_the_instruction_that_its_file_names():
    path = Path("x.gguf")
    assert instruction_of(named(instruction_id="lowercase"), CATALOG, path) == LOWERCASE
    assert instruction_of(named(), CATALOG, path) == JSON
    own = named(
        instruction_id="bullets:5", phrasings=["Use five bullets."], group="format",
        verifier="detectable_format:number_bullet_lists", kwargs={"num_bullets": 5},
    )  # fmt: skip
    found = instruction_of(own, CATALOG, path)
    assert (found.id, found.phrasings, dict(found.kwargs)) == (
        "bullets:5",
        ("Use five bullets.",),
        {"num_bullets": 5},
    )
    with pytest.raises(CatalogError, match="does not say which instruction"):
        instruction_of(replace(named(), name="x"), CATALOG, path)


@pytest.mark.parametrize(("word", "own"), [("moon", True), ("zeppelin", False)])
def test_a_word_to_avoid_is_asked_of_queries_that_bring_it(word, own):
    vector = named(
        instruction_id=f"exclude_word:{word}", phrasings=[f"No {word}."], group="word",
        verifier="keywords:forbidden_words", kwargs={"forbidden_words": [word]},
    )  # fmt: skip
    found = instruction_of(vector, CATALOG, Path("x.gguf"))
    assert found.queries == (CATALOG.get("exclude_moon").queries if own else {})


def test_a_file_says_how_it_is_quantized():
    assert quantization({"general.file_type": "7"}) == "Q8_0"
    assert quantization({"general.file_type": "15"}) == "Q4_K_M"
    assert quantization({"general.file_type": "0"}) == "F32"
    assert quantization({}) is quantization({"general.file_type": "999"}) is None


# --- paraphrases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundled", "general"])
def test_every_judged_instruction_has_paraphrases_without_open_slots(name):
    catalog = load_catalog(name)
    for each in catalog.instructions.values():
        if each.verifier and each.group in ("format", "fixed", "length"):
            found = paraphrases_of(each.fill())
            assert len(found) >= 2, each.id
            assert not set(found) & set(each.fill().phrasings)
            assert all("{" not in text for text in found), found
    assert "I only speak Spanish." in paraphrases_of(CATALOG.get("spanish"))


# --- IFEval files ------------------------------------------------------------------------------------------

GOOD = {
    "prompt": "Tell me of foxes. No commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
    "prompt_without_instruction": "Tell me of foxes.",
}


def write_lines(path: Path, *records: object) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_line_becomes_its_prompts_and_checks(tmp_path):
    two = GOOD | {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "less than", "num_words": 9}],
        "prompt_without_instruction": None,
    }
    first, second = read_items(write_lines(tmp_path / "f.jsonl", GOOD, "", two))
    assert (first.number, first.base, first.label) == (1, "Tell me of foxes.", "punctuation:no_comma")
    assert (second.number, second.base, second.label) == (3, None, "several at once")
    assert second.checks[1] == Rule(
        "length_constraints:number_words", {"relation": "less than", "num_words": 9}
    )


class Ready:
    """Stands for a bench whose vectors are all ready, so that nothing may be extracted."""

    def __init__(self, vectors: dict[str, ControlVector]) -> None:
        self.given, self.vectors, self._ready = {}, self, vectors

    def tuned(self, chosen) -> dict[str, ControlVector]:
        names = [each if isinstance(each, str) else each.id for each in chosen]
        return {name: self._ready[name] for name in names}

    def raw(self, chosen) -> dict[str, ControlVector]:
        assert not chosen
        return {}


def test_a_learned_gate_does_not_stand_for_a_text_that_it_has_not_learned():
    gate = ControlVector.from_gate(1, np.ones(8), 0.5, np.ones(8), mean_gate=0.5, n_layer=2)
    end_phrase = load_catalog("general").instructions["end_phrase"]
    other = end_phrase.fill(phrase="That is all.")
    vectors = vectors_of(Ready({end_phrase.id: gate}), [end_phrase.fill(), other])
    assert vectors[end_phrase.id] is gate
    assert applied(vectors[other.id]) == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[1]", "not a JSON object"),
        (GOOD | {"prompt": " "}, "prompt must be a text"),
        (GOOD | {"prompt_without_instruction": 3}, "prompt_without_instruction"),
        (GOOD | {"instruction_id_list": []}, "instruction_id_list"),
        (GOOD | {"kwargs": [{}, {}]}, "kwargs"),
        (GOOD | {"instruction_id_list": ["punctuation:no_coma"]}, "did you mean punctuation:no_comma"),
        (GOOD | {"kwargs": [{"word": "x"}]}, "unknown argument 'word'"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, says):
    path = write_lines(tmp_path / "f.jsonl", GOOD, line)
    with pytest.raises(LocalsteerError, match=f"f.jsonl, line 2: .*{says}"):
        read_items(path)


def test_an_empty_or_missing_file_of_prompts(tmp_path):
    with pytest.raises(LocalsteerError, match="holds no prompt"):
        read_items(write_lines(tmp_path / "f.jsonl", ""))
    with pytest.raises(LocalsteerError, match="can't be read"):
        read_items(tmp_path / "none.jsonl")


def test_the_files_of_ifeval_are_read(real_data):
    assert len(read_items(real_data / "ifeval_format_163.jsonl")) == 163
    whole = read_items(real_data / "ifeval_input_data.jsonl")
    assert len(whole) == 541
    assert all(each.base is None for each in whole)


# --- on the bundled model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Path:
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    return bundled.gguf_path("instruct", "Q8_0")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> tuple[Bench, SuiteReport]:
    """A bench and its report of the format suite, of two instructions."""
    out = tmp_path_factory.mktemp("run")
    options = {"limits": BUNDLED_LIMITS, "n": 10, "n_threads": 1, "wanted": IDS}
    with open_bench(model, CATALOG, out, **options) as bench:
        yield bench, suite("format").run(bench, paraphrases=False)


def test_steering_works_and_its_controls_do_not(run):
    bench, report = run
    assert report.conditions == ["none", "steered", "random", "other", "instructed", "both"]
    assert list(report.instructions) == list(IDS)
    for name, row in report.instructions.items():
        accuracy = {condition: figure.strict.accuracy for condition, figure in row.items()}
        assert accuracy["steered"] >= 0.7 and accuracy["instructed"] >= 0.9, name
        assert max(accuracy["none"], accuracy["random"], accuracy["other"]) <= 0.1, name
        assert row["none"].measure("perplexity_ratio") == 1.0
        assert 0.5 < row["steered"].measure("perplexity_ratio") < 5
        assert all(figure.n == 10 for figure in row.values())
        assert row["steered"].settings.layer == list(bench.vectors.tuned([name])[name].layers)
        assert row["none"].settings is row["none"].vector_sha256 is None
        assert row["steered"].vector_sha256 == bench.vectors.records()[name].sha256
    assert report.all["steered"].n == 20
    whole = Results(format=1, suites={"format": report})
    assert loaded(plain(whole)) == whole


def test_the_suite_in_the_developers_document_runs(run):
    bench, format_report = run
    page = Path(__file__).parents[1] / "docs" / "development.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["missing"](bench) == ""
    report = names["run"](bench)
    assert report.conditions == ["none", "steered", "half"] and list(report.instructions) == list(IDS)
    steered = format_report.instructions["json"]["steered"].strict
    assert report.instructions["json"]["steered"].strict == steered
    assert [row[0] for row in report.sections[0].tables[0].rows] == list(IDS)


def test_vectors_are_kept_with_their_settings(run):
    bench, _ = run
    for name, vector in bench.vectors.tuned(IDS).items():
        kept = ControlVector.load(bench.out / "vectors" / f"{name}.gguf")
        assert (kept.layers, kept.positions, kept.strength) == (
            vector.layers,
            vector.positions,
            vector.strength,
        )
        assert kept.provenance["validation"]["scores"]["steered"] >= 0.7
        assert bench.vectors.records()[name].source_sha256 == bench.model["sha256"]


def test_a_run_that_goes_on_takes_the_settings_that_it_had_chosen(model, tmp_path):
    options = {"limits": BUNDLED_LIMITS, "n": 2, "n_threads": 1}
    path = tmp_path / "vectors" / "title.gguf"
    with open_bench(model, CATALOG, tmp_path, **options) as bench:
        bench.vectors.raw(["title"])
        raw = ControlVector.load(path)
        # as if the search had ended with a setting that it would not choose again
        chosen = raw.at(layer=1, positions="last", strength=0.25)
        replace(chosen, provenance={**raw.provenance, "validation": {"n": 8}}).save(path)
    with open_bench(model, CATALOG, tmp_path, **options) as bench:
        vector = bench.vectors.tuned(["title"])["title"]
        assert (vector.layers, vector.positions, vector.strength) == ((1,), "last", 0.25)
        assert bench.vectors.raw(["title"])["title"].strength == 1.0
    with open_bench(model, CATALOG, tmp_path, seed=1, **options) as bench:
        vector = bench.vectors.tuned(["title"])["title"]
        assert vector.layers != (1,) and vector.provenance["validation"]["search"] == "likelihood"


def test_replies_are_kept_as_lines(run):
    bench, _ = run
    records = [json.loads(line) for line in (bench.out / "replies.jsonl").read_text("utf-8").splitlines()]
    replies = [record for record in records if record.get("kind") == "reply"]
    assert {"prompt", "steer", "text", "tokens", "finish_reason"} <= set(replies[0])
    assert any(record["steer"] for record in replies)


def test_equal_requests_are_asked_once_and_a_second_time_not_at_all(run):
    bench, _ = run
    asked = [bench.conditions(JSON, bench.vectors.tuned(["json"])["json"], ("none", "steered"))]
    before = (bench.out / "replies.jsonl").read_bytes()
    rows = bench.run([*asked, *asked])
    texts, n = [row.reply.text for row in rows], len(rows) // 2
    assert texts[:n] == texts[n:]
    assert (bench.out / "replies.jsonl").read_bytes() == before


def test_paraphrases_come_from_validation_and_are_asked_on_test_queries(run, monkeypatch):
    bench, _ = run
    wordings = ["Answer in JSON format.", "Squeeze it between curly things."]
    monkeypatch.setattr("localsteer.evaluate.suites.paraphrases.paraphrases_of", lambda _: wordings)
    bench.results.clear()
    section = badly_followed(bench, [JSON], bench.vectors.tuned(["json"]))
    asked = {each.cell.query.text for each in bench.results if each.cell.condition in ("instructed", "both")}
    assert asked == {query.text for query in bench.test}
    tried = {each.cell.query.text for each in bench.results if each.cell.condition in wordings}
    assert tried <= {query.text for query in bench.validation}
    followed, name, wording = section.tables[1].rows[0]
    assert (name, wording) == ("json", wordings[1])
    assert followed.share < FOLLOWED_BADLY
    instruction, counted, told, both, gain = section.tables[0].rows[0]
    assert (instruction, counted) == ("json", "1 of 2")
    assert gain.share == pytest.approx(both.share - told.share)


def test_what_steering_does_not_help_is_left_alone_and_said(run):
    bench, _ = run
    from localsteer.evaluate.suites.format import without_effect

    vector = bench.vectors.tuned(["json"])["json"]
    assert without_effect({"json": vector}) == []
    (section,) = without_effect({"json": vector.at(strength=0.0)})
    assert "json" in section.text
    assert applied(vector.at(strength=0.0)) == ()
    assert applied(vector) == (vector,)


def test_a_judge_is_compared_with_the_verifier(run, model):
    bench, _ = run
    vector = bench.vectors.tuned(["json"])["json"]
    results = bench.run([bench.conditions(JSON, vector, ("none", "steered"))])
    with open_judge(model, bench, n_threads=1) as judge:
        section = judge.section(results)
        assert judge.section(results) == section
    rows = section.tables[0].rows
    assert [row[0] for row in rows] == ["none", "steered", "all"]
    assert rows[-1][1] == len(results)
    assert rows[1][3].share >= 0.7
    assert 0 <= rows[-1][4].share <= 1


def test_replies_that_a_judge_has_no_room_for_are_counted(run, model):
    bench, _ = run
    results = bench.run([bench.conditions(JSON, bench.vectors.tuned(["json"])["json"], ("none",))])
    endless = replace(results[0], reply=Reply("fox " * 2000, [1], "stop"))
    with open_judge(model, bench, n_threads=1) as judge:
        some = judge.section([*results, endless]).text
        assert f"asked of {len(results)} replies" in some and "Left out are 1 more: with the question" in some
        none = judge.section([endless])
    assert "could judge none of the 1 replies" in none.text and none.tables == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("craftgpt-chat-5m-f16.gguf", "craftgpt-chat-5m-f16.gguf has no token for"),
        ("stories260K.gguf", "context of 128 tokens has no room for the question"),
    ],
)
def test_a_judge_that_can_not_read_the_question_is_refused_before_anything_is_asked(
    run, real_data, name, says
):
    bench, _ = run
    with (
        pytest.raises(PromptError, match=says),
        open_judge(real_data / name, bench, n_threads=1),
    ):
        pytest.fail("it was opened")


def test_the_control_other_is_of_instructions_that_the_model_can_read(run, real_data, tmp_path):
    bench, _ = run
    other, second = bench.controls.others(JSON, LOWERCASE, n=2)
    assert {other.id, second.id}.isdisjoint(IDS)
    assert bench.controls.others(JSON, LOWERCASE, n=2) == [other, second]
    # this vocabulary has no < and >, which the wordings of `title` hold; a catalogue's further formats do
    path = real_data / "craftgpt-chat-5m-f16.gguf"
    catalog = load_catalog("general")
    queries = {"extraction": 24, "validation": 4, "test": 4}
    few = replace(catalog, queries={split: catalog.queries[split][:n] for split, n in queries.items()})
    options = {"n": 2, "n_threads": 1, "limits": EvalLimits(max_tokens=16)}
    with open_bench(path, few, tmp_path, **options) as small:
        no_comma, lowercase = few.get("no_comma"), few.get("lowercase")
        assert "title" not in [each.id for each in small.controls.partners([no_comma], 99)]
        assert len(small.controls.others(no_comma)) == len(small.controls.others(lowercase)) == 1


def test_kappa_is_agreement_beyond_chance():
    same = [(True, True)] * 5 + [(False, False)] * 5
    assert kappa(same) == 1.0
    assert kappa([(True, each) for each in (True, False)] * 5) == pytest.approx(0.0)
    assert kappa([(not a, b) for a, b in same]) == -1.0
    assert kappa([]) is kappa([(True, True)]) is None


def test_lines_of_a_file_are_steered_by_the_vectors_of_their_ids(run, tmp_path):
    bench, _ = run
    base = bench.test[0].text
    lines = [
        {
            "prompt": f"{base} {each.phrasings[0]}",
            "prompt_without_instruction": base,
            "instruction_id_list": [each.verifier],
            "kwargs": [dict(each.kwargs)],
        }
        for each in (JSON, LOWERCASE, CATALOG.get("title"))
    ]
    lines.append(lines[0] | {"prompt_without_instruction": None})
    lines.append(lines[0] | {"prompt": "word " * 300})
    report = suite("ifeval").run(bench, ifeval=write_lines(tmp_path / "f.jsonl", *lines))
    assert set(report.instructions) == {JSON.verifier, LOWERCASE.verifier}
    row = report.instructions[JSON.verifier]
    assert (row["none"].n, row["instructed"].n) == (1, 2)
    assert row["none"].strict.accuracy == 0.0
    assert row["steered"].strict.accuracy == 1.0
    assert row["steered"].settings.name == "json"
    for control in ("random", "other"):
        assert row[control].n == 1 and row[control].strict.accuracy == 0.0
        assert row[control].settings.name != "json"
        assert row[control].settings.layer == row["steered"].settings.layer
    text = report.sections[0].text
    assert "3 of 5 lines are asked. 1 are too long" in text
    assert "1 have no instruction that there is a vector for" in text
    title = write_lines(tmp_path / "g.jsonl", lines[2])
    assert "no line has an instruction" in suite("ifeval").missing(bench, ifeval=title)
    assert "--ifeval FILE" in suite("ifeval").missing(bench)
    with pytest.raises(LocalsteerError, match="no prompt leaves room for"):
        suite("ifeval").run(bench, ifeval=write_lines(tmp_path / "h.jsonl", lines[4]))


def test_given_vectors_are_used_as_they_are(run, model, tmp_path):
    first, _ = run
    path = tmp_path / "mine.gguf"
    first.vectors.tuned(["json"])["json"].at(strength=0.7).save(path)
    given = [(path, ControlVector.load(path))]
    options = {"limits": BUNDLED_LIMITS, "n": 2, "n_threads": 1}
    with open_bench(model, CATALOG, tmp_path / "run", given=given, **options) as bench:
        assert [each.id for each in bench.instructions(("format",))] == ["json"]
        assert bench.vectors.tuned(["json"])["json"].strength == 0.7
        assert bench.vectors.records()["json"].given is True
        assert not (tmp_path / "run" / "vectors" / "json.gguf").exists()
    # an import knows no mean projections, so it can't stand in for a vector that is projected
    bare = replace(given[0][1], name="title", mode="add", mean_with=None, mean_without=None, std_with=None,
                   std_without=None, provenance={"instruction_id": "title"})  # fmt: skip
    two = [*given, (path, bare)]
    with open_bench(model, CATALOG, tmp_path / "import", given=two, **options) as bench:
        controls = bench.controls.of([bench.instruction("json")], [given[0][1]])
        assert {name: len(each) for name, each in controls.items()} == {"random": 1, "other": 1}
        assert controls["other"][0].name != "title"
    with (
        pytest.raises(LocalsteerError, match="two vectors of 'json'"),
        open_bench(model, CATALOG, tmp_path / "again", given=given * 2, **options),
    ):
        pass
    broken = replace(given[0][1], provenance={"instruction_id": "json", "probes": [["fox", [1, 2]]]})
    with (
        pytest.raises(MismatchError, match="another tokenizer"),
        open_bench(model, CATALOG, tmp_path / "third", given=[(path, broken)], **options),
    ):
        pass


def test_instruct_vectors_are_tried_on_the_base_model(model, tmp_path):
    base = bundled.gguf_path("base", "Q8_0")
    options = {"limits": BUNDLED_LIMITS, "n": 2, "n_threads": 1, "wanted": ["json"], "base": base}
    with open_bench(model, CATALOG, tmp_path, **options) as bench:
        assert bench.base.workers.map(lambda engine, _: engine.template.is_fallback, [None]) == [True]
        report = suite("cross-model").run(bench)
    # no setting makes the base answer in JSON: nothing is applied, which is said, and there is no control
    assert report.conditions == ["none", "own", "instruct", "instructed"]
    assert "for 1 of its own vectors and for 1 of the instruct model's" in report.sections[0].text
    assert report.instructions["json"]["none"].measure("degenerate") == 0
    assert [section.title for section in report.sections] == [
        "Whose vectors lift the base model",
        "What the two models share",
    ]
    assert len(report.sections[1].plots[0].values[0]) == bench.model["n_layer"]


def test_cross_model_wants_a_base_model(run):
    assert "--base" in suite("cross-model").missing(run[0])


# --- comparing two runs ------------------------------------------------------------------------------------


def results_of(accuracy: float, spread: float, **more) -> Results:
    strict = {"accuracy": accuracy, "low": accuracy - spread, "high": accuracy + spread}
    figure = {"n": 20, "strict": strict, "loose": strict, "quality": {}, "settings": None}
    one = {"title": "T", "conditions": ["steered"], "instructions": {"json": {"steered": figure}},
           "all": {"steered": figure}, "sections": []}  # fmt: skip
    return loaded({
        "format": 1, "seconds": 3.0, "model": {"name": "m", "quantization": "Q8_0"}, "settings": {"n": 20},
        "vectors": {}, "suites": {"format": one}, **more,
    })  # fmt: skip


def test_two_runs_are_compared_by_settings_and_by_figures():
    a = results_of(0.5, 0.05)
    b = results_of(0.9, 0.05, model={"name": "m", "quantization": "Q4_K_M"}, seconds=9.0)
    assert differences(a, b) == [["model.quantization", "Q8_0", "Q4_K_M"]]
    found = compare(a, b)
    assert loaded(plain(found)) == found
    row = found.sections[1].tables[0].rows[0]
    assert row[:2] == ["all", "steered"]
    assert row[4].share == pytest.approx(0.4)
    assert row[5] == "better"
    assert compare(b, a).sections[1].tables[0].rows[0][5] == "worse"
    assert compare(a, results_of(0.52, 0.05)).sections[1].tables[0].rows[0][5] is None
    none, some = results_of(0.0, 0.0), results_of(0.2, 0.1)  # 0 and 4 of 20 may well be chance
    assert compare(none, some).sections[1].tables[0].rows[0][5] is None
    alone = compare(a, results_of(0.5, 0.05, suites={})).sections
    assert "same settings" in alone[0].text and "Only run A" in alone[1].text
