"""Calibration keeps directions and measures projections on the model that will run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cli_runs import invoke, write_vector
from engines import open_engine

from localsteer import ControlVector, bundled
from localsteer.catalog import Instruction, load_catalog
from localsteer.engine import Engine
from localsteer.errors import CatalogError, PlanError, VectorFileError
from localsteer.extract import build_pairs, extract, open_backend
from localsteer.extract.calibrate import CALIBRATION, calibrate, instruction_of, pairs_match, pairs_of

QUERIES = ("Tell me about foxes.", "Describe a quiet village.", "What is a river?")
RHYME = Instruction.from_text("Answer in rhyme.")
STATISTICS = ("mean_with", "mean_without", "std_with", "std_without")


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def vector(engine):
    return extract(engine, RHYME, QUERIES)


@pytest.fixture
def pairs():
    return build_pairs(RHYME, QUERIES)


@pytest.fixture(scope="session")
def bundled_json():
    """(catalogue, a vector of the bundled F16 model)."""
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    catalog = load_catalog(bundled.CATALOG)
    instruction = catalog.get("json")
    queries = catalog.queries_for(instruction, "extraction")
    source = bundled.gguf_path("instruct", "F16")
    return catalog, extract(source, instruction, queries, n_threads=1, layer=2)


def test_on_the_model_of_the_extraction_nothing_changes(engine, vector, pairs):
    done = calibrate(engine, vector, pairs)
    np.testing.assert_array_equal(done.vector.directions, vector.directions)
    for key in STATISTICS:
        np.testing.assert_allclose(getattr(done.vector, key), getattr(vector, key), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(done.cosines, 1, atol=1e-6)
    np.testing.assert_allclose(done.drift, 0, atol=1e-4)
    np.testing.assert_allclose(done.fresh.directions, vector.directions, atol=1e-4)


def test_projections_are_those_of_the_stored_directions(engine, vector, pairs):
    """Of directions that have nothing to do with this model's own."""
    random = np.random.default_rng(3).standard_normal(vector.directions.shape)
    done = calibrate(engine, replace(vector, directions=random), pairs)
    states = engine.last_hidden_states([engine.prompt_tokens(pair.instructed) for pair in pairs])
    for layer in range(vector.n_layer):
        unit = random[layer] / np.linalg.norm(random[layer])
        projections = states[:, layer].astype(np.float64) @ unit
        assert done.vector.mean_with[layer] == pytest.approx(projections.mean(), rel=1e-4, abs=1e-5)
        assert done.vector.std_with[layer] == pytest.approx(projections.std(), rel=1e-3, abs=1e-5)
        known = vector.unit(layer) @ unit
        assert done.cosines[layer] == pytest.approx(known, abs=1e-4)


def test_drift_is_in_units_of_what_the_instruction_moves(engine, vector, pairs):
    moved = replace(vector, mean_with=vector.mean_with + 0.5 * (vector.mean_with - vector.mean_without))
    done = calibrate(engine, moved, pairs)
    # stored: 1.5 distances from the mean without; found: 1 distance from it
    np.testing.assert_allclose(done.drift, -0.5 / 1.5, rtol=1e-3)


def test_an_import_can_project_afterwards(engine, vector, pairs):
    imported = ControlVector(vector.directions, None, None, None, None, layers=(1,), mode="add", name="rhyme")
    done = calibrate(engine, imported, pairs)
    assert done.vector.at(mode="project").mean_with is not None
    assert np.isnan(done.drift).all()
    assert done.rows()[0]["drift"] is None


def test_a_layer_without_direction_stays_one(engine, vector, pairs):
    directions = vector.directions.copy()
    directions[0] = 0
    done = calibrate(engine, replace(vector, directions=directions, layers=(1,)), pairs)
    assert np.isnan(done.cosines[0]) and not done.vector.directions[0].any()
    assert done.rows()[0]["cosine"] is None


def test_a_learned_gate_has_nothing_to_calibrate(engine, vector, pairs):
    gated = replace(vector, mode="gate", readers=vector.directions, biases=np.ones(vector.n_layer))
    with pytest.raises(PlanError, match="has a learned gate, and so no target to measure"):
        calibrate(engine, gated, pairs)
    done = calibrate(engine, gated.at(mode="add"), pairs)
    assert done.vector.readers is not None and done.fresh.readers is None


def test_settings_stay_and_the_file_says_on_what_it_was_calibrated(engine, vector, pairs):
    done = calibrate(engine, vector.at(layer=2, strength=0.5, positions="prompt"), pairs)
    assert (done.vector.layers, done.vector.strength, done.vector.positions) == ((2,), 0.5, "prompt")
    note = done.vector.provenance[CALIBRATION]
    assert note["n_pairs"] == 3 and len(note["source_hash"]) == 64
    again = calibrate(engine, vector, pairs)
    assert again.vector.provenance[CALIBRATION] == note


def test_the_pairs_are_those_of_the_extraction(bundled_json):
    catalog, vector = bundled_json
    pairs = pairs_of(vector, catalog)
    instruction = catalog.get("json")
    assert pairs == build_pairs(instruction, catalog.queries_for(instruction, "extraction"))
    with open_backend(bundled.gguf_path("instruct", "F16"), n_threads=1) as backend:
        assert pairs_match(vector, backend, pairs) is True
        assert pairs_match(vector, backend, pairs[:-1]) is False
        assert pairs_match(replace(vector, provenance={}), backend, pairs) is None


def test_instructions_that_cant_be_known_are_named():
    bare = ControlVector(np.eye(2), None, None, None, None, layers=(0,), mode="add", name="bare")
    with pytest.raises(VectorFileError, match="bare does not say"):
        instruction_of(bare)
    catalog = load_catalog(bundled.CATALOG)
    other = replace(bare, provenance={"method": "levels", "phrasings": ["Be brief."]})
    with pytest.raises(VectorFileError, match="levels"):
        pairs_of(other, catalog)
    with pytest.raises(CatalogError):
        pairs_of(replace(bare, provenance={"phrasings": ["Be brief."]}), catalog, queries=())


def test_a_coarse_quantization_is_measured(bundled_json):
    catalog, vector = bundled_json
    pairs = pairs_of(vector, catalog)
    found = {}
    for quant in ("Q8_0", "Q2_K"):
        with Engine(bundled.gguf_path("instruct", quant), n_threads=1, n_ctx=256) as engine:
            found[quant] = calibrate(engine, vector, pairs)
    assert found["Q8_0"].cosines.min() > 0.995
    assert found["Q2_K"].cosines.mean() < found["Q8_0"].cosines.mean()
    assert np.abs(found["Q8_0"].drift).max() < 0.05


# --- the command ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))
    (tmp_path / "empty.txt").write_text("\n\n")
    return tmp_path


@pytest.fixture
def model(tiny_llama):
    return str(tiny_llama.gguf_path)


def test_the_file_is_rewritten_in_place(folder, model, vector):
    replace(vector, mean_with=vector.mean_with + 1).save("v.gguf")
    done = invoke("calibrate", "-m", model, "v.gguf", "--queries", "queries.txt", "-t", 1)
    assert done.status == 0, done.err
    assert "cosine" in done.out and "steered" in done.out
    assert "not the pairs" not in done.err
    written = ControlVector.load("v.gguf")
    np.testing.assert_allclose(written.mean_with, vector.mean_with, atol=0.05)
    assert written.provenance[CALIBRATION]["n_pairs"] == 3


def test_output_and_dry_run_leave_the_file_as_it_is(folder, model, vector):
    vector.save("v.gguf")
    before = (folder / "v.gguf").read_bytes()
    args = ("calibrate", "-m", model, "v.gguf", "--queries", "queries.txt", "-t", 1)
    document = invoke(*args, "--dry-run", "--json").json
    assert document["file"] is None and len(document["layers"]) == vector.n_layer
    assert invoke(*args, "-o", "w.gguf", "--json").json["file"] == "w.gguf"
    assert (folder / "v.gguf").read_bytes() == before
    assert (folder / "w.gguf").is_file()


def test_other_queries_are_said_aloud(folder, model, vector):
    vector.save("v.gguf")
    (folder / "others.txt").write_text("What is an owl?\nWhat is a moth?\nWhat is a bee?\n")
    done = invoke("calibrate", "-m", model, "v.gguf", "--queries", "others.txt", "--dry-run", "-t", 1)
    assert done.status == 0 and "not the pairs that the vector was made from" in done.err


def refused(*args):
    return invoke("calibrate", *args).complaint()


def test_bad_input_is_one_line(folder, model, vector):
    vector.save("v.gguf")
    assert "there is no file" in refused("-m", model, "none.gguf").lower() or "none.gguf" in refused(
        "-m", model, "none.gguf"
    )
    assert "empty.txt holds no query" in refused("-m", model, "v.gguf", "--queries", "empty.txt")
    assert "no folder nowhere" in refused("-m", model, "v.gguf", "-o", "nowhere/v.gguf")
    assert "not a vector file" in refused("-m", model, "v.gguf", "-o", model)
    assert "already says what it was made from" in refused("-m", model, "v.gguf", "-i", "json")
    assert "--instruction" in refused("-m", model, "v.gguf", "--slot", "n=2")
    imported = ControlVector(vector.directions, None, None, None, None, layers=(1,), mode="add", name="i")
    imported.save("import.gguf")
    assert "--instruction" in refused("-m", model, "import.gguf")
    assert "unknown instruction" in refused("-m", model, "import.gguf", "-i", "rhymes")


def test_a_vector_of_another_model_is_refused_and_kept(folder, model, vector):
    path = write_vector(folder / "wide.gguf", n_embd=128)
    before = path.read_bytes()
    says = refused("-m", model, path, "-i", "Answer in rhyme.", "--queries", "queries.txt")
    assert "embedding width 128" in says
    assert path.read_bytes() == before
