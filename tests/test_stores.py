"""Models of other programs by name: Ollama, LM Studio, llama.cpp's cache, and the hub's."""

from __future__ import annotations

import json
import os
import random
import re

import pytest
from cli_runs import invoke
from other_programs import Ollama, cached_in_hub, empty_home, sha256, split_in_two
from tiny_gguf import tiny_gguf

from localsteer import Engine
from localsteer.errors import LocalsteerError, ModelFileError
from localsteer.model_names import asked_of, path_of
from localsteer.stores import everything, folders, hub
from localsteer.stores.ollama import LIST as OLLAMA_LIST

LIST = "application/vnd.ollama.manifest.list.v2+json"
LLAMA = "registry.ollama.ai/library/llama3.2/1b"


@pytest.fixture(scope="module")
def gguf():
    return tiny_gguf().to_bytes()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name, value in empty_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def plain_file(tmp_path, gguf):
    path = tmp_path / "plain.gguf"
    path.write_bytes(gguf)
    return path


@pytest.fixture
def ollama(home):
    return Ollama(home / ".ollama" / "models")


def names():
    return {model.name for model in everything() if not model.fault}


def faults():
    return {model.name: model.fault for model in everything() if model.fault}


def refused(name):
    with pytest.raises(ModelFileError) as caught:
        path_of(name, download=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- Ollama -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "name", "others"),
    [
        (LLAMA, "ollama:llama3.2:1b", ["ollama:library/llama3.2:1b", "ollama:Llama3.2:1B"]),
        ("registry.ollama.ai/library/phi4/latest", "ollama:phi4:latest", ["ollama:phi4"]),
        ("registry.ollama.ai/anna/fox/v2", "ollama:anna/fox:v2", ["ollama:registry.ollama.ai/anna/fox:v2"]),
        (
            "hf.co/ORG/Fox-GGUF/Q4_K_M",
            "ollama:hf.co/ORG/Fox-GGUF:Q4_K_M",
            ["ollama:hf.co/org/fox-gguf:q4_k_m"],
        ),
        ("localhost:5000/anna/fox/v2", "ollama:localhost:5000/anna/fox:v2", []),
    ],
)
def test_ollama_models_go_by_the_names_that_ollama_shows(ollama, gguf, manifest, name, others):
    ollama.model(manifest, gguf)
    assert names() == {name}
    blob = ollama.root / "blobs" / f"sha256-{sha256(gguf)}"
    assert [path_of(other) for other in (name, *others)] == [blob] * (1 + len(others))


def test_a_model_of_ollama_answers(ollama, gguf):
    ollama.model(LLAMA, gguf)
    done = invoke("run", "-m", "ollama:llama3.2:1b", "-n", "3", "--json", "Hi")
    assert (done.status, done.json["model"], done.json["n_tokens"]) == (0, "ollama:llama3.2:1b", 3), done.err


def test_newer_manifests_are_links_and_lists_for_several_engines(ollama, gguf):
    plain = ollama.manifest([ollama.layer("model", gguf)])
    mlx = ollama.manifest([ollama.layer("tensor", b"x")]) | {"runner": "mlx"}
    ollama.link(LLAMA, plain)
    ollama.link(
        "registry.ollama.ai/library/both/1b",
        {"schemaVersion": 2, "mediaType": LIST, "manifests": [mlx, plain | {"runner": "ollama"}]},
    )
    child = {
        "mediaType": plain["mediaType"],
        "runner": "llamacpp",
        "digest": ollama.blob(json.dumps(plain).encode()),
    }
    ollama.link(
        "registry.ollama.ai/library/far/1b",
        {"schemaVersion": 2, "mediaType": LIST, "manifests": [mlx, child]},
    )
    ollama.link(
        "registry.ollama.ai/library/mlx/1b", {"schemaVersion": 2, "mediaType": LIST, "manifests": [mlx]}
    )
    assert names() == {"ollama:llama3.2:1b", "ollama:both:1b", "ollama:far:1b"}
    assert faults() == {"ollama:mlx:1b": "it has no GGUF (made for mlx)"}


def test_what_a_modelfile_sets_is_respected(ollama, gguf, plain_file):
    params = {"stop": ["<|end|>", "Q:"], "temperature": 0, "top_k": 1, "num_ctx": 100_000, "num_gpu": 99}
    ollama.model(LLAMA, gguf, params=params, system="Be brief.", template="{{ .Prompt }}")
    asked = asked_of("ollama:llama3.2:1b")
    assert (asked.stop, asked.system, asked.n_ctx) == (("<|end|>", "Q:"), "Be brief.", 100_000)
    assert asked.sampling == {"temp": 0.0, "top_k": 1}
    args = ("run", "-m", "ollama:llama3.2:1b", "-n", "8", "--json")
    greedy = [
        invoke(*args, "Hi").json["reply"] for _ in range(2)
    ]  # temperature 0, and no more context than 64
    plain = invoke("run", "-m", plain_file, "--temp", "0", "-n", "8", "--json", "Hi").json["reply"]
    told = invoke(
        "run", "-m", plain_file, "--temp", "0", "-sys", "Be brief.", "-n", "8", "--json", "Hi"
    ).json["reply"]
    assert greedy == [told, told] and told != plain
    own = invoke(*args, "-sys", "Be long.", "Hi").json["reply"]
    assert own != told  # the user's own comes first
    assert invoke(*args, "--temp", "2", "--top-k", "0", "--seed", "3", "Hi").json["reply"] != told


def test_a_stop_of_the_model_ends_a_reply(ollama, gguf, plain_file):
    args = ("-n", "12", "--json", "Hi")
    whole = invoke("run", "-m", plain_file, "--temp", "0", *args).json["reply"]
    stop = re.findall("[ -~]{2}", whole)[-1]
    ollama.model(LLAMA, gguf, params={"stop": stop, "temperature": 0})
    cut = invoke("run", "-m", "ollama:llama3.2:1b", *args).json
    assert (cut["reply"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_an_adapter_is_refused_and_a_projector_left_out_aloud(ollama, gguf):
    ollama.model("registry.ollama.ai/anna/tuned/latest", gguf, adapter=b"GGUF...")
    ollama.model("registry.ollama.ai/library/seeing/latest", gguf, projector=b"GGUF...", messages=[])
    assert "has an adapter (LoRA), which is not applied here" in refused("ollama:anna/tuned")
    seeing = next(model for model in everything() if not model.fault)
    assert seeing.remark == "its projector is left out: text only; its example messages are left out"


def damage(ollama, gguf, kind):
    layers = [ollama.layer("model", gguf)]
    blob = ollama.root / "blobs" / f"sha256-{sha256(gguf)}"
    if kind == "no blob":
        blob.unlink()
    elif kind == "cut":
        blob.write_bytes(gguf[:100])
    elif kind == "loop":
        blob.unlink()
        blob.symlink_to(blob)
    elif kind == "digest":
        layers[0]["digest"] = "sha256:../../../../etc/passwd"
    elif kind == "no model":
        layers = [ollama.layer("license", b"MIT")]
    elif kind == "params":
        layers.append(ollama.layer("params", b"[1"))
    elif kind == "system":
        layers.append(ollama.layer("system", b"\xff\xfe"))
    changed = {
        "version": {"schemaVersion": 3},
        "media": {"mediaType": "application/vnd.x"},
    }
    manifest = ollama.manifest("?" if kind == "layers" else layers, **changed.get(kind, {}))
    texts = {"json": "{", "list": "[]", "deep": "[" * 100_000, "null": "null", "empty": ""}
    ollama.put(LLAMA, texts.get(kind, manifest))


DAMAGE = {
    "no blob": "its blob is missing", "cut": "its blob has 100 of", "loop": "its blob is a link that",
    "digest": "which is no sha256", "no model": "it has no GGUF",
    "params": "its layer of parameters is damaged",
    "system": "its system message is missing or damaged",
    "version": "its manifest is of a kind that is unknown here",
    "media": "its manifest is of a kind that is unknown here", "layers": "its manifest is damaged",
    "json": "its manifest is damaged", "list": "its manifest is damaged", "deep": "its manifest is damaged",
    "null": "its manifest is damaged", "empty": "its manifest is damaged",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_of_ollama_is_one_line(ollama, gguf, kind):
    damage(ollama, gguf, kind)
    assert DAMAGE[kind] in faults()["ollama:llama3.2:1b"]
    assert refused("ollama:llama3.2:1b").startswith("ollama:llama3.2:1b can't be used: ")


@pytest.mark.parametrize(
    "text",
    [
        '{"top_k": Infinity}',
        '{"top_k": NaN}',
        '{"temperature": 1e999}',
        '{"top_k": 1e30}',
        f'{{"temperature": {10**400}}}',
        f'{{"repeat_last_n": {-(10**400)}}}',
    ],
)
def test_a_number_that_is_none_is_the_fault_of_its_model(ollama, gguf, text):
    ollama.model(LLAMA, gguf, params=text)
    ollama.model("registry.ollama.ai/library/good/1b", gguf, params={"num_ctx": True})
    assert "parameter" in faults()["ollama:llama3.2:1b"] and names() == {"ollama:good:1b"}
    assert asked_of("ollama:good:1b").n_ctx is None


def test_half_a_character_is_no_stop_string_and_reaches_no_terminal(ollama, gguf, plain_file):
    ollama.model(LLAMA, gguf, params='{"stop": ["\\ud800", "END"]}')
    assert asked_of("ollama:llama3.2:1b").stop == ("END",)
    engines = [{"runner": "\x1b[31m\ud800\n"}]
    ollama.put("registry.ollama.ai/library/odd/1b", {"mediaType": OLLAMA_LIST, "manifests": engines})
    assert faults()["ollama:odd:1b"].isprintable()
    with Engine(plain_file) as engine, pytest.raises(LocalsteerError, match="half a character"):
        engine.generate("Hi", stop=["\ud800"])


def test_a_pull_that_is_not_done_is_listed(ollama):
    blobs = ollama.root / "blobs"
    blobs.mkdir(parents=True)
    for name in ("-partial", "-partial-0", "-partial-12"):
        (blobs / f"sha256-{'ab' * 32}{name}").write_bytes(b"{}")
    assert list(faults().values()) == ["a download that was never finished: `ollama pull` continues it"]


def test_a_name_that_ollama_lacks_is_told_with_the_nearest(ollama, gguf):
    assert "`ollama pull llama3.2` brings it" in refused("ollama:llama3.2")
    ollama.model(LLAMA, gguf)
    ollama.model("registry.ollama.ai/library/qwen2.5/0.5b", gguf)
    assert "Ollama has it as ollama:llama3.2:1b" in refused("ollama:llama3.2")
    assert "the nearest: ollama:llama3.2:1b" in refused("ollama:lama3.2:1b")
    assert "`ollama pull zzz` brings it" in refused("ollama:zzz")
    (ollama.root / "manifests" / "registry.ollama.ai" / ".DS_Store").write_bytes(b"x")
    (ollama.root / "manifests" / "loop").symlink_to(ollama.root / "manifests")
    assert "ollama:llama3.2:1b" in names()


@pytest.mark.parametrize("prefix", ["ollama:", "hf:", "lmstudio:", "llama.cpp:"])
@pytest.mark.parametrize(
    "rest",
    [
        "",
        " ",
        "/etc/passwd",
        "../../x",
        "a/../b",
        "a//b",
        "a/b\x00",
        "a/b\n",
        "..",
        "a\\..\\b",
        "x" * 600,
        "./a/b",
    ],
)
def test_what_can_be_no_name_is_refused_before_anything_is_looked_at(prefix, rest):
    said = refused(prefix + rest)
    assert "is not the name of a model: write it like" in said and len(said) < 400


@pytest.mark.parametrize(
    "name",
    [
        "ollama:a/b/c/d:e",
        "ollama:a:b:c",
        "ollama:a:",
        "hf:repo",
        "hf:a/b/c",
        "hf:a--b/c",
        "hf:a/b:",
        "hf:a/b@x",
    ],
)
def test_names_of_the_wrong_form_are_refused(name):
    assert "write" in refused(name)


# -- LM Studio ----------------------------------------------------------------------------------------------


@pytest.fixture
def lmstudio(home, gguf):
    def put(name, data=gguf, root=home / ".lmstudio" / "models"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return put


def test_lm_studio_models_are_found_by_any_part_that_means_one(lmstudio):
    fox = lmstudio("anna/Fox-GGUF/Fox-Q4_K_M.gguf")
    other = lmstudio("anna/Fox-GGUF/Fox-Q8_0.gguf")
    owl = lmstudio("ben/Owl-GGUF/Owl-Q8_0.gguf")
    lmstudio("ben/Owl-GGUF/mmproj-Owl-f16.gguf")
    assert len(names()) == 3
    for name in (
        "anna/Fox-GGUF/Fox-Q4_K_M.gguf",
        "Fox-Q4_K_M.gguf",
        "fox-q4_k_m",
        "Q4_K_M",
        "fox-gguf/fox-q4_k_m",
    ):
        assert path_of(f"lmstudio:{name}") == fox
    assert path_of("lmstudio:Owl-GGUF") == owl == path_of("lmstudio:ben")
    said = refused("lmstudio:fox-gguf")
    assert said.startswith(
        "lmstudio:fox-gguf means 2 models: choose one of lmstudio:anna/Fox-GGUF/Fox-Q4_K_M.gguf"
    )
    assert "the nearest: lmstudio:" in refused("lmstudio:anna/Fox-GGUF/Fox-Q4_K_S.gguf")
    assert path_of("lmstudio:Fox-Q8_0") == other


def test_lm_studio_says_itself_where_its_folders_are(home, lmstudio, tmp_path):
    elsewhere, chosen = tmp_path / "elsewhere", tmp_path / "disk"
    (home / ".lmstudio-home-pointer").write_text(f"{elsewhere}\n")
    at = lmstudio("a/b/c.gguf", root=elsewhere / "models")
    assert path_of("lmstudio:c") == at
    (elsewhere / "settings.json").write_text(json.dumps({"downloadsFolder": str(chosen)}))
    more = lmstudio("a/b/d.gguf", root=chosen)
    assert (path_of("lmstudio:c"), path_of("lmstudio:d")) == (at, more)
    (elsewhere / "settings.json").write_text("{")
    assert names() == {"lmstudio:a/b/c.gguf"}


def test_an_older_lm_studio_has_its_folder_in_the_cache(home, lmstudio):
    older = lmstudio("a/b/c.gguf", root=home / ".cache" / "lm-studio" / "models")
    lmstudio("a/b/d.gguf")
    assert path_of("lmstudio:c") == older and names() == {"lmstudio:a/b/c.gguf"}


def test_split_files_are_one_model(lmstudio, gguf):
    first = lmstudio("a/b/big-00001-of-00002.gguf")
    lmstudio("a/b/big-00002-of-00002.gguf")
    lmstudio("a/c/cut-00001-of-00003.gguf")
    lmstudio("a/d/tail-00002-of-00002.gguf")
    model = next(model for model in everything() if "big" in model.name)
    assert (model.path, len(model.files), model.size) == (first, 2, 2 * len(gguf))
    assert faults() == {
        "lmstudio:a/c/cut-00001-of-00003.gguf": "part 2 of 3 is missing (cut-00002-of-00003.gguf)",
        "lmstudio:a/d/tail-00002-of-00002.gguf": "part 1 of 2 is missing (tail-00001-of-00002.gguf)",
    }


@pytest.mark.parametrize("part", ["00000-of-00000", "00005-of-00003", "00000-of-00002", "00001-of-99999"])
def test_a_number_of_parts_that_can_t_be_is_a_part_of_the_name(lmstudio, part):
    at = lmstudio(f"a/b/odd-{part}.gguf")
    assert path_of("lmstudio:odd") == at and folders.parts(at.name) == [at.name]


def test_a_split_model_answers_like_a_whole_one(lmstudio, plain_file):
    for i, data in enumerate(split_in_two(tiny_gguf()), 1):
        lmstudio(f"a/b/big-0000{i}-of-00002.gguf", data)
    args = ("--temp", "0", "-n", "8", "--json", "Hi")
    whole, split = (invoke("run", "-m", model, *args) for model in (plain_file, "lmstudio:a/b"))
    assert split.status == 0, split.err
    assert split.json["reply"] == whole.json["reply"]


def test_a_folder_or_a_device_in_the_place_of_a_file_is_a_fault(home, lmstudio, ollama, gguf):
    (home / ".lmstudio" / "models" / "a").mkdir(parents=True)
    (home / ".lmstudio" / "models" / "a" / "zero.gguf").symlink_to("/dev/zero")
    digest = ollama.layer("model", gguf)["digest"]
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
    ollama.put(LLAMA, ollama.manifest([layer]))
    blob = ollama.root / "blobs" / digest.replace(":", "-")
    blob.unlink()
    blob.mkdir()
    assert ["a device" in fault for fault in faults().values()] == [True, True]


def test_links_in_a_loop_and_half_downloads_end_nothing(home, lmstudio):
    lmstudio("a/b/c.gguf")
    folder = home / ".lmstudio" / "models"
    (folder / "loop").symlink_to(folder)
    (folder / "a" / "b" / "self.gguf").symlink_to("self.gguf")
    (folder / "a" / "b" / "gone.gguf").symlink_to("/nowhere/gone.gguf")
    lmstudio("a/b/half.gguf.part", b"GGUF")
    lmstudio("a/b/empty.gguf", b"")
    assert "lmstudio:a/b/c.gguf" in names()
    found = faults()
    assert "a link that leads nowhere" in found["lmstudio:a/b/self.gguf"]
    assert "a link that leads nowhere" in found["lmstudio:a/b/gone.gguf"]
    assert "never finished" in found["lmstudio:a/b/half.gguf.part"]
    assert "is empty" in found["lmstudio:a/b/empty.gguf"]


# -- llama.cpp ----------------------------------------------------------------------------------------------


def test_llama_cpp_models_go_by_the_names_of_its_manifests(home, gguf, monkeypatch):
    cache = home / ".cache" / "llama.cpp"
    cache.mkdir(parents=True)
    (cache / "manifest=ORG=Fox-GGUF=Q4_K_M.json").write_text(
        json.dumps({"ggufFile": {"rfilename": "sub/Fox-Q4_K_M.gguf"}})
    )
    (cache / "manifest=ORG=Fox-GGUF=latest.json").write_text("{}")
    fox = cache / "ORG_Fox-GGUF_sub_Fox-Q4_K_M.gguf"
    fox.write_bytes(gguf)
    (cache / "ORG_Fox-GGUF_mmproj.gguf").write_bytes(gguf)
    (cache / "by-hand.gguf").write_bytes(gguf)
    (cache / "half.gguf.downloadInProgress").write_bytes(gguf)
    assert names() == {"llama.cpp:ORG/Fox-GGUF:Q4_K_M", "llama.cpp:by-hand.gguf"}
    assert path_of("llama.cpp:ORG/Fox-GGUF:Q4_K_M") == fox == path_of("llama.cpp:org/fox-gguf:q4_k_m")
    assert path_of("llama.cpp:by-hand") == cache / "by-hand.gguf"
    assert "its manifest can't be read" in faults()["llama.cpp:ORG/Fox-GGUF:latest"]
    assert "llama-cli -hf continues it" in faults()["llama.cpp:half.gguf"]
    elsewhere = home / "elsewhere"
    monkeypatch.setenv("LLAMA_CACHE", str(elsewhere))
    assert names() == set()
    cached_in_hub(elsewhere, "ORG/Owl-GGUF", {"Owl-Q8_0.gguf": gguf})  # as its newer versions do
    assert names() == {"llama.cpp:ORG/Owl-GGUF:Q8_0"}


# -- the hub's cache ----------------------------------------------------------------------------------------


FILES = (
    "Fox-BF16-00001-of-00002.gguf", "Fox-BF16-00002-of-00002.gguf", "Fox-IQ4_0.gguf", "Fox-Q2_K.gguf",
    "Fox-Q4_0.gguf", "Fox-Q4_K_M.gguf", "Fox-Q8_0.gguf", "UD-Q5_K_XL/Fox-UD-Q5_K_XL.gguf",
    "mmproj-Fox-Q8_0.gguf", "mtp-Fox-Q4_K_M.gguf", "imatrix.gguf", "README.md",
)  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("", "Fox-Q4_K_M.gguf"), ("q4_k_m", "Fox-Q4_K_M.gguf"), ("Q4_0", "Fox-Q4_0.gguf"),
        ("IQ4_0", "Fox-IQ4_0.gguf"),
        ("BF16", "Fox-BF16-00001-of-00002.gguf"), ("Q5_K_XL", "UD-Q5_K_XL/Fox-UD-Q5_K_XL.gguf"),
        ("UD-Q5_K_XL", "UD-Q5_K_XL/Fox-UD-Q5_K_XL.gguf"), ("Fox-Q2_K.gguf", "Fox-Q2_K.gguf"),
        ("UD-Q5_K_XL/Fox-UD-Q5_K_XL.gguf", "UD-Q5_K_XL/Fox-UD-Q5_K_XL.gguf"),
        ("Fox-BF16-00002-of-00002.gguf", "Fox-BF16-00001-of-00002.gguf"),
    ],
)  # fmt: skip
def test_a_quantization_is_chosen_as_llama_cpp_does(wanted, file):
    assert hub.chosen("ORG/Fox-GGUF", wanted, FILES) == file


def test_without_the_usual_quantizations_the_first_is_taken():
    assert hub.chosen("ORG/R", "", ["b-Q6_K.gguf", "a-Q2_K.gguf", "mmproj-a.gguf"]) == "a-Q2_K.gguf"
    assert hub.chosen("ORG/R", "", ["a-Q2_K.gguf", "b-Q8_0.gguf"]) == "b-Q8_0.gguf"
    for files in ([], ["model.safetensors"], ["mmproj-a.gguf"]):
        with pytest.raises(ModelFileError, match="holds no GGUF file of a model"):
            hub.chosen("ORG/R", "", files)
    for wanted in ("Q9", "mmproj-Fox-Q8_0.gguf", "(a+)+$", "Fox.gguf"):
        with pytest.raises(ModelFileError, match=r"has no .*: choose one of hf:ORG/R:"):
            hub.chosen("ORG/R", wanted, FILES)


def test_each_listed_name_leads_back_to_its_file(home, gguf):
    files = {name: gguf + name.encode() for name in FILES}
    snapshot = cached_in_hub(home / "hf" / "hub", "ORG/Fox-GGUF", files)
    found = {model.name: model.path for model in everything()}
    assert len(found) == 7 and "hf:ORG/Fox-GGUF:Q4_K_M" in found
    assert {path_of(name, download=False) for name in found} == set(found.values())
    assert path_of("hf:ORG/Fox-GGUF") == path_of("hf:org/fox-gguf") == snapshot / "Fox-Q4_K_M.gguf"


def test_the_cache_is_where_the_hubs_own_variables_say(home, gguf, monkeypatch, tmp_path):
    for variable, folder in (
        ("XDG_CACHE_HOME", "huggingface/hub"), ("HF_HOME", "hub"), ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HUB_CACHE", ""),
    ):  # fmt: skip
        if variable == "XDG_CACHE_HOME":
            monkeypatch.delenv("HF_HOME")
        root = tmp_path / variable
        monkeypatch.setenv(variable, str(root))
        at = cached_in_hub(root / folder, "ORG/R", {"m-Q8_0.gguf": gguf})
        assert path_of("hf:ORG/R") == at / "m-Q8_0.gguf"


def test_a_snapshot_that_leads_nowhere_hides_no_other(home, gguf):
    snapshot = cached_in_hub(home / "hf" / "hub", "o/r", {"a-Q8_0.gguf": gguf})
    (snapshot.parent / ("d" * 40)).symlink_to("nowhere")
    assert path_of("hf:o/r") == snapshot / "a-Q8_0.gguf"


def test_the_newest_commit_that_has_a_file_is_taken(home, gguf):
    root = home / "hf" / "hub"
    old = cached_in_hub(root, "ORG/R", {"m-Q8_0.gguf": gguf, "m-Q4_0.gguf": gguf}, "a" * 40)
    new = cached_in_hub(root, "ORG/R", {"m-Q8_0.gguf": gguf + b"x"}, "b" * 40)
    assert path_of("hf:ORG/R:Q8_0") == new / "m-Q8_0.gguf"
    assert path_of("hf:ORG/R:Q4_0") == old / "m-Q4_0.gguf"
    (new / "m-Q8_0.gguf").resolve().unlink()
    assert path_of("hf:ORG/R:Q8_0") == old / "m-Q8_0.gguf"


def test_a_name_that_is_not_in_the_cache_says_how_it_gets_there(home, gguf):
    cached_in_hub(home / "hf" / "hub", "ORG/Fox-GGUF", {"Fox-Q8_0.gguf": gguf})
    assert "the nearest: hf:ORG/Fox-GGUF:Q8_0; `localsteer models pull hf:ORG/Fox` fetches it" in refused(
        "hf:ORG/Fox"
    )
    assert "has no Q2_K: choose one of hf:ORG/Fox-GGUF:Q8_0" in refused("hf:ORG/Fox-GGUF:Q2_K")


def test_a_missing_path_is_told_with_the_nearest_names(ollama, gguf):
    ollama.model(LLAMA, gguf)
    assert "did you mean ollama:llama3.2:1b?" in invoke("run", "-m", "llama3.2:1b", "Hi").complaint()
    assert "did you mean smol?" in invoke("run", "-m", "smoll", "Hi").complaint()
    assert "No such file" in invoke("run", "-m", "llama3.2.gguf", "Hi").complaint()


def test_a_file_of_the_name_wins(home, tmp_path, gguf):
    (tmp_path / "hf:ORG").mkdir()
    (tmp_path / "hf:ORG" / "R").write_bytes(gguf)
    assert str(path_of("hf:ORG/R")) == "hf:ORG/R"


def test_pipes_in_the_place_of_files_hold_nothing_up(home, ollama, gguf):
    ollama.model(LLAMA, gguf, params={"top_k": 1})
    params = sha256(json.dumps({"top_k": 1}).encode())
    places = [
        ollama.root / "manifests" / "registry.ollama.ai" / "library" / "pipe" / "1b",
        ollama.root / "blobs" / f"sha256-{params}",
        home / ".lmstudio-home-pointer",
        home / ".lmstudio" / "settings.json",
        home / ".lmstudio" / "models" / "a" / "b" / "c.gguf",
        home / ".cache" / "llama.cpp" / "manifest=a=b=c.json",
        home / "hf" / "hub" / "models--a--b" / "refs" / "main",
        home / "hf" / "hub" / "models--a--b" / "snapshots" / ("a" * 40) / "c.gguf",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        os.mkfifo(place)
    found = faults()
    assert names() == set() and len(found) == 5
    assert found["ollama:pipe:1b"] == "its manifest is damaged: pull it again"
    assert "a pipe" in found["lmstudio:a/b/c.gguf"]


def test_names_that_are_no_utf_8_are_listed(home, ollama, gguf, lmstudio):
    folder = home / ".lmstudio" / "models" / "a" / "b"
    folder.mkdir(parents=True)
    with open(
        os.fsencode(home / ".lmstudio" / "models" / "a" / "b") + b"/f\xff\n\x1b[31mx.gguf", "wb"
    ) as file:
        file.write(gguf)
    table = invoke("models")
    assert table.status == 0 and "\x1b" not in table.out
    assert invoke("models", "--json").json["models"][-1]["architecture"] == "llama"


def test_damage_at_random_is_a_note_in_the_list(home, lmstudio, gguf):
    from localsteer.model_list import all_models

    draw = random.Random(1)
    header = 6000  # bytes
    for i in range(150):
        data = bytearray(gguf)
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(header)] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
        lmstudio(f"a/b/{i}.gguf", bytes(data[: draw.choice((len(data), draw.randrange(header)))]))
    told = [model for model in all_models().models if model.name.startswith("lmstudio:")]
    assert len(told) == 150 and all(model.shape or model.note for model in told)


def test_a_folder_that_can_t_be_read_is_passed_over(ollama, gguf, lmstudio):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    ollama.model(LLAMA, gguf)
    (ollama.root / "manifests").chmod(0)
    try:
        assert names() == set()
    finally:
        (ollama.root / "manifests").chmod(0o755)


@pytest.mark.parametrize("name", ["x" * 300 + ".gguf", "y/" * 3000 + "x", "\ud800.gguf", "a\0b"])
def test_what_can_be_no_path_is_one_line(home, name):
    with pytest.raises(LocalsteerError) as caught, Engine(path_of(name)):
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("file", ["\ud800.gguf", "x" * 5000, "../../x", "a\nb.gguf"])
def test_a_manifest_of_llama_cpp_that_names_no_file_is_a_fault(home, file):
    folder = home / ".cache" / "llama.cpp"
    folder.mkdir(parents=True)
    (folder / "manifest=o=r=Q4_0.json").write_text(json.dumps({"ggufFile": {"rfilename": file}}))
    assert "its file is missing" in faults()["llama.cpp:o/r:Q4_0"]
    assert refused("llama.cpp:o/r:Q4_0").isprintable()
