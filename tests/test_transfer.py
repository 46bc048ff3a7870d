"""A vector in another model: maps recover what was planted, files say whose they are, verdicts are plain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cli_runs import invoke
from engines import open_engine

from localsteer import ControlVector, bundled
from localsteer.catalog import Instruction, load_catalog
from localsteer.errors import CatalogError, LocalsteerError, MismatchError, PlanError
from localsteer.evaluate import transfer
from localsteer.evaluate.transfer import examine, verdict
from localsteer.extract import Pair, build_pairs, extract, open_backend
from localsteer.extract.transfer import (
    AS_IS,
    MAPPED,
    OTHER_MODEL,
    RIDGES,
    adopt,
    carry,
    carry_to_other_model,
    fit_maps,
    layers_by_depth,
    readable,
    relation,
    send_through,
    shared_prompts,
    unmapped,
)
from localsteer.runtime.ask import Ask
from localsteer.runtime.loop import stops_of

RHYME = Instruction.from_text("Answer in rhyme.")
QUERIES = ("Tell me about foxes.", "Describe a quiet village.", "What is a river?")
CATALOG = load_catalog(bundled.CATALOG)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine, open_backend(engine) as backend:
        yield backend


@pytest.fixture(scope="module")
def qwen(tiny):
    with open_engine(tiny("qwen2").gguf_path) as engine, open_backend(engine) as backend:
        yield backend


@pytest.fixture(scope="module")
def vector(llama):
    return extract(llama, RHYME, QUERIES, layer=2)


@pytest.fixture(scope="module")
def bundled_vector(tmp_path_factory):
    """The file of a vector of the bundled Q8_0 model."""
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    instruction = CATALOG.get("json")
    queries = CATALOG.queries_for(instruction, "extraction")
    made = extract(bundled.gguf_path("instruct", "Q8_0"), instruction, queries, n_threads=1, layer=1)
    path = tmp_path_factory.mktemp("vectors") / "json.gguf"
    made.save(path)
    return path


# --- as it is ---


def test_a_model_s_own_vector_goes_as_it_is(llama, vector):
    assert relation(vector, llama) == AS_IS
    carried = carry(vector, llama)
    np.testing.assert_array_equal(carried.directions, vector.directions)
    assert (carried.layers, carried.mode) == (vector.layers, vector.mode)


def test_another_model_of_the_same_width_takes_it_only_when_adopted(qwen, vector):
    assert relation(vector, qwen) == OTHER_MODEL
    with pytest.raises(MismatchError):
        qwen.engine.plan(vector)
    adopted = carry_to_other_model(vector, qwen, build_pairs(RHYME, QUERIES))
    assert qwen.engine.plan(adopted) is not None
    np.testing.assert_array_equal(adopted.directions, vector.directions)
    # the targets are the target model's own
    states = qwen.last_hidden_states([qwen.tokenize(f"<|user|>{q} Answer in rhyme.<|end|><|assistant|>")
                                      for q in QUERIES])  # fmt: skip
    wanted = (states[:, 2] @ vector.unit(2)).mean()
    assert adopted.mean_with[2] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_the_file_says_whose_it_is_and_where_it_is_from(qwen, llama, vector):
    adopted = carry_to_other_model(vector, qwen, build_pairs(RHYME, QUERIES))
    known = adopted.provenance
    assert known["architecture"] == "qwen2" and known["source_hash"] == qwen.source_hash
    assert known["transferred_from"]["architecture"] == "llama"
    assert known["transferred_from"]["source_hash"] == llama.source_hash
    assert known["phrasings"] == ["Answer in rhyme."]
    with pytest.raises(MismatchError):
        llama.engine.plan(adopted)


def test_a_gate_goes_along_to_the_same_states_and_nowhere_else(llama, qwen, vector):
    gated = replace(vector, mode="gate", readers=vector.directions, biases=np.ones(vector.n_layer))
    assert carry(gated, llama).gated == gated.gated
    for other in (
        lambda: carry_to_other_model(gated, qwen, build_pairs(RHYME, QUERIES)),
        lambda: adopt(gated, qwen, MAPPED, directions=gated.directions),
    ):
        with pytest.raises(PlanError, match="has a learned gate"):
            other()
    assert carry_to_other_model(gated.at(mode="add"), qwen, build_pairs(RHYME, QUERIES)).readers is None


def test_another_width_is_refused(llama):
    wide = ControlVector(np.ones((4, 128)), None, None, None, None, layers=(1,), mode="add", name="wide")
    assert relation(wide, llama) == MAPPED
    with pytest.raises(MismatchError, match="--map"):
        carry(wide, llama)


def test_layers_go_by_depth():
    assert layers_by_depth(4, 4) == [0, 1, 2, 3]
    assert layers_by_depth(4, 7) == [0, 0, 1, 2, 2, 2, 3]
    assert layers_by_depth(8, 4) == [0, 2, 5, 7]
    assert layers_by_depth(5, 1) == [0]


# --- maps ---


def planted(n=120, noise=0.01, seed=0):
    """(source, target, groups): two models of widths 10 and 16 whose states hang together linearly."""
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((n, 2, 10))
    matrix = rng.standard_normal((2, 10, 16))
    target = np.einsum("nld,lde->nle", source, matrix) + 3.0
    target += noise * rng.standard_normal(target.shape)
    return source, target, [str(i // 2) for i in range(n)], matrix


def test_a_planted_map_is_recovered():
    source, target, groups, matrix = planted()
    maps = fit_maps(source, target, groups)
    direction = np.random.default_rng(9).standard_normal(10)
    for layer, each in enumerate(maps):
        assert each.r2 > 0.999
        mapped = each(source[0, layer] + direction) - each(source[0, layer])
        true = direction @ matrix[layer]
        assert mapped @ true / np.linalg.norm(mapped) / np.linalg.norm(true) > 0.999


def test_states_that_have_nothing_in_common_have_no_map():
    source, _, groups, _ = planted()
    target = np.random.default_rng(1).standard_normal((120, 3, 16))
    maps = fit_maps(source, target, groups)
    assert [each.source for each in maps] == [0, 0, 1]
    assert max(each.r2 for each in maps) < 0.1
    assert min(each.ridge for each in maps) == RIDGES[-1]


def test_the_shuffled_control_keeps_the_ridge_and_loses_the_map():
    source, target, groups, matrix = planted()
    maps, wrong = fit_maps(source, target, groups), fit_maps(source, target, groups, shuffle=True)
    assert [each.ridge for each in wrong] == [each.ridge for each in maps]
    direction = np.eye(10)[0]
    mapped = wrong[0](source[0, 0] + direction) - wrong[0](source[0, 0])
    assert abs(mapped @ matrix[0, 0]) / np.linalg.norm(mapped) / np.linalg.norm(matrix[0, 0]) < 0.7


def test_a_mapped_vector_steers_to_the_mapped_mean(llama, vector):
    source, target, groups, matrix = planted(noise=0.0)
    wide = ControlVector(np.ones((2, 10)), None, None, None, None, layers=(1,), mode="add", name="wide")
    means = np.stack([source[:60].mean(axis=0), source[60:].mean(axis=0)])

    class Target:  # of the planted width; adopt asks for names and tokens alone
        n_layer, n_embd = 2, 16
        model_name, architecture, source_hash, description = "planted", "llama", "0", "planted"
        template, tokenize = llama.template, staticmethod(llama.tokenize)

    sent = send_through(wide, Target, fit_maps(source, target, groups), means)
    expected = (means[1, 1] - means[0, 1]) @ matrix[1]
    np.testing.assert_allclose(sent.directions[1], expected, atol=0.02)
    assert sent.mean_with[1] - sent.mean_without[1] == pytest.approx(np.linalg.norm(expected), rel=1e-2)
    plain = unmapped(wide, sent, means[0].mean() * np.ones((2, 16)))
    np.testing.assert_allclose(
        np.linalg.norm(plain.directions[1]), np.linalg.norm(sent.directions[1]), rtol=1e-4
    )
    assert not plain.directions[:, 10:].any()


def test_too_few_prompts_fit_no_map():
    source, target, groups, _ = planted(n=12)
    with pytest.raises(CatalogError, match="too few"):
        fit_maps(source, target, groups)


def test_shared_prompts_never_hold_the_instruction_or_one_of_its_kind():
    german = CATALOG.get("german")
    prompts = shared_prompts(CATALOG, german, 400)
    assert len({pair.instructed for pair in prompts}) == len(prompts) > 150
    assert not any("German" in pair.instructed or "Spanish" in pair.instructed for pair in prompts)
    assert any("JSON" in pair.instructed for pair in prompts)
    assert sum(pair.instructed == pair.plain for pair in prompts) >= 100


# --- verdicts ---


SHARES = {"none": 0.0, "transferred": 0.9, "own": 0.9, "random": 0.0, "unmapped": 0.9, "instructed": 1.0}
SURE, EVEN, WORSE = (0.9, 0.8, 1.0), (0.0, -0.1, 0.1), (-0.4, -0.6, -0.2)


@pytest.mark.parametrize(
    ("lifts", "begins"),
    [
        ({"none": SURE, "own": EVEN, "random": SURE}, "It carries over: 90% of replies follow"),
        ({"none": SURE, "own": WORSE, "random": SURE}, "It carries over"),
        ({"none": EVEN, "own": EVEN, "random": EVEN}, "It does nothing"),
        ({"none": SURE, "own": EVEN, "random": EVEN}, "It changes replies"),
        (
            {"none": SURE, "own": EVEN, "random": SURE, "unmapped": EVEN},
            "It carries over: 90% of replies follow",
        ),
        ({"none": SURE, "own": EVEN, "random": EVEN, "unmapped": EVEN}, "It changes replies"),
        ({"none": WORSE, "own": EVEN, "random": EVEN}, "It does harm"),
    ],
)
def test_verdicts_are_plain(lifts, begins):
    assert verdict(SHARES, lifts).startswith(begins)
    assert ("clearly more: extract" in verdict(SHARES, lifts)) == (
        begins == "It carries over" and lifts["own"] == WORSE
    )


def test_a_map_that_adds_nothing_is_said_to():
    lifts = {"none": SURE, "own": EVEN, "random": SURE, "unmapped": EVEN}
    assert verdict(SHARES, lifts).endswith("so does the vector unmapped (90%): no map is needed.")
    assert "no map is needed" not in verdict(SHARES, lifts | {"unmapped": SURE})


def test_a_random_model_is_said_to_do_nothing(llama, vector):
    json = CATALOG.get("json")
    found = examine(
        llama.engine,
        json,
        extract(llama, json, CATALOG.queries_for(json, "extraction"), n_pairs=4),
        CATALOG,
        n=3,
        max_tokens=8,
        controls=lambda plain_mean: {"unmapped": vector},
    )
    assert set(found.conditions) == {"none", "transferred", "own", "random", "unmapped", "instructed"}
    assert not found.helped
    assert found.verdict.startswith("It does nothing") and "in words" in found.verdict


# --- the command ---


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_vector_carries_over_to_a_coarser_quantization(bundled_vector):
    done = invoke(
        "transfer", bundled_vector, "-m", "bundled:Q4_0", "-n", 8, "-t", 1, "-o", "q4.gguf", "--json"
    )
    assert done.status == 0, done.err
    assert done.json["way"] == AS_IS and done.json["verdict"].startswith("It carries over")
    rows = {row["condition"]: row["followed"] for row in done.json["conditions"]}
    assert rows["transferred"] > 0.7 and rows["none"] == rows["random"] == 0
    assert ControlVector.load("q4.gguf").layers == tuple(done.json["layer"])


def test_across_widths_a_map_makes_a_vector_that_the_target_takes(bundled_vector, tiny_llama):
    args = ("transfer", bundled_vector, "-m", tiny_llama.gguf_path, "--catalog", "bundled", "-t", 1)
    done = invoke(
        *args, "--map", "--from", "bundled", "--prompts", 60, "--no-test", "-o", "small.gguf", "--json"
    )
    assert done.status == 0, done.err
    assert done.json["way"] == MAPPED and [each["source"] for each in done.json["map"]] == [0, 2, 5, 7]
    sent = ControlVector.load("small.gguf")
    assert (sent.n_layer, sent.n_embd) == (4, 64)
    with open_engine(tiny_llama.gguf_path) as engine:
        assert engine.plan(sent) is not None


def test_prompts_that_a_small_vocabulary_cant_spell_are_left_out(real_data, folder):
    small = real_data / "tinystories-656k" / "tinystories-656k-f32.gguf"
    extract(real_data / "stories260K.gguf", RHYME, QUERIES, n_pairs=3).save("rhyme.gguf")
    through = ("--map", "--from", real_data / "stories260K.gguf", "--prompts", 80)
    done = invoke("transfer", "rhyme.gguf", "-m", small, *through, "--no-test", "-o", "t.gguf", "-t", 1)
    assert done.status == 0 and "of 80 prompts are left out" in done.err
    assert ControlVector.load("t.gguf").n_embd == 128


def test_prompts_that_are_too_long_for_a_model_are_left_out(real_data, folder):
    # its context is 64 tokens, and it has few of more than a letter
    small = real_data / "craftgpt-chat-5m-f16.gguf"
    long = Pair("Tell me about foxes " * 40, "Tell me about foxes")
    short = Pair("Tell me about foxes", "Tell me about foxes")
    with open_engine(small) as engine, open_backend(engine) as backend:
        assert readable([long, short], backend) == [short]


def test_the_table_ends_in_the_verdict(bundled_vector):
    done = invoke("transfer", bundled_vector, "-m", "bundled", "-n", 4, "-t", 1)
    assert "It carries over" in done.out.splitlines()[-1]


def test_a_model_asked_as_q_and_a_is_stopped_at_its_next_question(monkeypatch, bundled_vector):
    """A base model goes on with a question of its own, and a verdict on both would be one on neither."""

    def look(engine, _instruction, vector, *_rest, **_options):
        engine.plan(vector)
        raise LocalsteerError(f"stops: {stops_of(engine, Ask())}")

    monkeypatch.setattr(transfer, "examine", look)
    said = invoke("transfer", bundled_vector, "-m", "bundled", "--qa", "-t", 1).complaint()
    assert r"'\nQ:'" in said and "a different chat template" not in said


def test_bad_input_is_one_line(folder, bundled_vector, tiny_llama, vector):
    def refused(*args):
        return invoke("transfer", *args).complaint()

    vector.save("v.gguf")
    model = str(tiny_llama.gguf_path)
    assert "64" in refused(bundled_vector, "-m", model) and "--map" in refused(bundled_vector, "-m", model)
    assert "belong together" in refused("v.gguf", "-m", model, "--map")
    assert "belong together" in refused("v.gguf", "-m", model, "--from", model)
    assert "embedding width" in refused(
        bundled_vector, "-m", model, "--map", "--from", model, "--catalog", "bundled"
    )
    imported = ControlVector(vector.directions, None, None, None, None, layers=(1,), mode="add", name="i")
    imported.save("i.gguf")
    assert "does not say which instruction" in refused("i.gguf", "-m", model)
    assert "no folder" in refused("v.gguf", "-m", model, "-o", "none/v.gguf")
    assert "too few" in refused(
        bundled_vector, "-m", model, "--map", "--from", "bundled", "--catalog", "bundled", "--prompts", 5
    )
