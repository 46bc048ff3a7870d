"""Extraction finds the paper's direction, and both backends find the same one.

Agreement of PyTorch (float32) and llama.cpp (F32 weights, exact settings): direction cosine at least 0.9999
at every layer and mean projection within 0.1% are demanded; measured 1 - 1e-7 and 3e-7 relative (gemma2,
whose GELU llama.cpp looks up in a table of half-precision floats: 5e-5).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import open_engine
from hypothesis import given, settings
from hypothesis import strategies as st

import localsteer.extract as extraction
from localsteer import ControlVector
from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.errors import CatalogError, LocalsteerError, ModelFileError, PlanError, PromptError
from localsteer.extract import Pair, batches, build_pairs, extract, open_backend
from localsteer.extract.statistics import ProjectionSpread, RunningMeans
from localsteer.templates import NO_TEMPLATE

torch = pytest.importorskip("torch", reason="PyTorch extraction is half of what is tested")
QUERIES = [
    "Tell me about the fox.",
    "What is a river?",
    "Describe the village.",
    "Why do dogs sleep?",
    "Who?",
]
RHYME = Instruction(id="rhyme", phrasings=("Answer in rhyme.", "Make it rhyme, please.", "Rhyme!"))
EXACT = {"exact": True, "n_threads": 1}


# Pairs


def test_a_pair_differs_by_the_instruction_alone():
    assert build_pairs(RHYME, ["Why?"], 1) == [Pair("Why? Answer in rhyme.", "Why?")]


def test_phrasings_take_turns_over_the_queries():
    pairs = build_pairs(RHYME, QUERIES[:4], 4)
    assert [pair.instructed.removeprefix(pair.plain + " ") for pair in pairs] == [
        "Answer in rhyme.",
        "Make it rhyme, please.",
        "Rhyme!",
        "Answer in rhyme.",
    ]


def test_fifty_pairs_by_default_spread_over_all_queries():
    general = load_catalog().queries["extraction"]
    pairs = build_pairs(RHYME, general)
    positions = [[query.text for query in general].index(pair.plain) for pair in pairs]
    assert len(set(positions)) == 50
    assert positions == sorted(positions)
    assert positions[-1] > 0.95 * len(general)


def test_few_queries_give_all_their_pairs_by_default():
    assert len(build_pairs(RHYME, QUERIES[:2])) == 6


@settings(deadline=None)
@given(n_queries=st.integers(1, 12), n_phrasings=st.integers(1, 6), data=st.data())
def test_pairs_never_repeat(n_queries, n_phrasings, data):
    instruction = Instruction(id="i", phrasings=tuple(f"p{i}." for i in range(n_phrasings)))
    queries = [f"q{i}?" for i in range(n_queries)]
    n = data.draw(st.integers(1, n_queries * n_phrasings))
    pairs = build_pairs(instruction, queries, n)
    assert len(set(pairs)) == n
    assert pairs == build_pairs(instruction, [Query(text) for text in queries], n)
    counts = [sum(pair.plain == query for pair in pairs) for query in queries]
    assert max(counts) - min(counts) <= 1


def test_slots_are_filled_and_own_braces_kept():
    bullets = load_catalog().instructions["bullets"]
    assert "exactly 3 bullet" in build_pairs(bullets, ["Why?"], 1)[0].instructed
    assert build_pairs(Instruction.from_text("Use {n}."), ["Why?"], 1)[0].instructed == "Why? Use {n}."


def test_a_query_written_twice_counts_once():
    assert len(build_pairs(Instruction.from_text("Rhyme."), ["Why?", "Why? "])) == 1


@pytest.mark.parametrize(
    ("queries", "n_pairs", "words"),
    [
        ([], None, "there are no queries"),
        (["Why?", " "], None, "a base query is empty"),
        (["Why?"], 4, "4 pairs can't be made from 1 queries and 3 phrasings of 'rhyme': ask for 1 to 3"),
        (["Why?"], 0, "0 pairs can't be made"),
        (["Why?"], -1, "-1 pairs can't be made"),
    ],
)
def test_pairs_that_can_not_be_made_are_refused(queries, n_pairs, words):
    with pytest.raises(CatalogError, match=words):
        build_pairs(RHYME, queries, n_pairs)


# Statistics


def random_states(n: int, seed: int = 0, n_layer: int = 3, n_embd: int = 8) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    states = draw.normal(2.0, 3.0, size=(n, n_layer, n_embd)).astype(np.float32)
    instructed = np.arange(n) % 2 == 0
    states[instructed] += draw.normal(size=(n_layer, n_embd)).astype(np.float32)
    return states, instructed


def statistics(states, instructed, chunks: int = 1) -> tuple[RunningMeans, ProjectionSpread]:
    means = RunningMeans(*states.shape[1:])
    parts = list(zip(np.array_split(states, chunks), np.array_split(instructed, chunks), strict=True))
    for part in parts:
        means.add(*part)
    spread = ProjectionSpread(means)
    for part in parts:
        spread.add(*part)
    return means, spread


def test_statistics_are_those_of_the_definition():
    states, instructed = random_states(40)
    means, spread = statistics(states, instructed, chunks=7)
    wide = states.astype(np.float64)
    v = (wide[instructed] - wide[~instructed]).mean(axis=0)
    u = v / np.linalg.norm(v, axis=1, keepdims=True)
    projections = np.einsum("nle,le->nl", wide, u)
    assert np.allclose(means.directions, v, rtol=1e-12)
    assert np.allclose(means.projections[1], projections[instructed].mean(axis=0), rtol=1e-12)
    assert np.allclose(means.projections[0], projections[~instructed].mean(axis=0), rtol=1e-12)
    assert np.allclose(spread.deviations[1], projections[instructed].std(axis=0), rtol=1e-12)
    assert np.allclose(spread.deviations[0], projections[~instructed].std(axis=0), rtol=1e-12)


@settings(deadline=None)
@given(chunks=st.integers(1, 40), seed=st.integers(0, 5))
def test_batches_and_their_order_change_nothing(chunks, seed):
    states, instructed = random_states(40, seed)
    order = np.random.default_rng(seed).permutation(40)
    means, spread = statistics(states, instructed)
    other_means, other_spread = statistics(states[order], instructed[order], chunks)
    assert np.allclose(means.directions, other_means.directions, rtol=1e-10, atol=1e-12)
    assert np.allclose(spread.deviations, other_spread.deviations, rtol=1e-10)


def test_a_planted_direction_is_recovered():
    draw = np.random.default_rng(1)
    planted = draw.normal(size=(2, 64))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    states = draw.normal(size=(2000, 2, 64)).astype(np.float32)
    instructed = np.arange(2000) % 2 == 0
    states[instructed] += (5 * planted).astype(np.float32)
    means, spread = statistics(states, instructed, 10)
    assert ((means.units * planted).sum(axis=1) > 0.99).all()
    assert np.allclose(means.projections[1] - means.projections[0], 5, atol=0.2)
    assert np.allclose(spread.deviations, 1, atol=0.1)


def test_a_layer_without_difference_has_no_direction():
    states, instructed = random_states(10)
    states[:, 1] = 4.0
    means, spread = statistics(states, instructed)
    assert (means.directions[1] == 0).all() and (means.units[1] == 0).all()
    assert (means.projections[:, 1] == 0).all() and (spread.deviations[:, 1] == 0).all()


def test_memory_does_not_grow_with_the_number_of_states():
    means = RunningMeans(3, 8)
    sizes = []
    for seed in range(5):
        means.add(*random_states(100, seed))
        sizes.append(sum(value.nbytes for value in vars(means).values()))
    assert len(set(sizes)) == 1


def test_batches_hold_every_prompt_once_and_stay_small():
    lengths = np.random.default_rng(0).integers(1, 900, 200).tolist()
    made = list(batches(lengths))
    assert sorted(i for batch in made for i in batch) == list(range(200))
    assert all(len(batch) <= extraction.BATCH_PROMPTS for batch in made)
    assert all(len(batch) * max(lengths[i] for i in batch) <= extraction.BATCH_TOKENS for batch in made)


def test_a_prompt_longer_than_a_batch_comes_alone():
    assert list(batches([9000, 5])) == [[1], [0]]


# The PyTorch backend


def states_one_by_one(hf_dir: Path, prompts: list[list[int]]) -> np.ndarray:
    """The residual stream after every layer, from transformers' own hidden_states.

    These end with the state after the final norm: the last layer's comes from the norm's input.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, attn_implementation="eager").float().eval()
    before_norm = {}
    model.model.norm.register_forward_pre_hook(lambda _m, args: before_norm.update(state=args[0]))
    rows = []
    with torch.no_grad():
        for ids in prompts:
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            states = [*hidden[1:-1], before_norm["state"]]
            rows.append(torch.stack([state[0, -1] for state in states]).numpy())
    return np.stack(rows)


def token_lists(seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(4, 512, n).tolist() for n in (7, 3, 60, 12, 1, 33)]


def test_states_are_those_after_each_layer_at_the_last_real_token(tiny_model):
    prompts = token_lists()
    with open_backend(tiny_model.hf_dir, n_threads=1) as backend:
        batched = backend.last_hidden_states(prompts)
    assert np.abs(batched - states_one_by_one(tiny_model.hf_dir, prompts)).max() < 1e-5


def test_the_padding_side_of_the_tokenizer_does_not_matter(tiny_llama):
    with open_backend(tiny_llama.hf_dir, n_threads=1) as backend:
        found = []
        for side in ("left", "right"):
            backend.tokenizer.padding_side = side
            found.append(backend.last_hidden_states(token_lists()))
    assert np.array_equal(*found)


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "falcon": {"new_decoder_architecture": False},
    "bloom": {"n_layer": 3, "n_head": 2},
    "mistral": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "olmo2": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_any_decoder(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    from localsteer.extract.torch_backend import decoder_layers, observe_layers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family, vocab_size=50, **{**sizes, **ids, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), observe_layers(model, seen.__setitem__):
        hidden = model(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states
    assert len(decoder_layers(model)) == 3
    assert sorted(seen) == [0, 1, 2]
    for layer in (0, 1):
        assert torch.equal(seen[layer], hidden[layer + 1])


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    from localsteer.errors import UnsupportedModelError
    from localsteer.extract.torch_backend import decoder_layers

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        decoder_layers(model)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("phi", "phi2"),
        ("gemma3_text", "gemma3"),
        ("gemma4_text", "gemma4"),
        ("gpt_oss", "gpt-oss"),
        ("granitemoehybrid", "granitehybrid"),
        ("x", None),
    ],
)
def test_architectures_have_the_names_of_llama_cpp(model_type, expected):
    from localsteer.extract.torch_backend import gguf_architecture

    assert gguf_architecture(model_type) == expected


@pytest.mark.parametrize(
    ("layers", "n_experts", "expected"),
    [
        (["mamba", "attention"], 2, "granitehybrid"),
        (["attention", "attention"], 2, "granitemoe"),
        (["attention", "attention"], 0, "granite"),
    ],
)
def test_a_granite_without_recurrent_layers_has_the_plain_name(layers, n_experts, expected):
    from types import SimpleNamespace

    from localsteer.extract.torch_backend import config_architecture

    config = SimpleNamespace(model_type="granitemoehybrid", layer_types=layers, num_experts_per_tok=n_experts)
    assert config_architecture(config) == expected


def test_bfloat16_stays_near_float32(tiny_llama):
    exact = extract(tiny_llama.hf_dir, RHYME, QUERIES, n_threads=1)
    rounded = extract(tiny_llama.hf_dir, RHYME, QUERIES, dtype="bfloat16", n_threads=1)
    assert "bfloat16" in rounded.provenance["backend"]
    assert min(cosines(exact, rounded)) > 0.99


# Both backends


def cosines(one: ControlVector, other: ControlVector) -> list[float]:
    return [float(one.unit(il).astype(np.float64) @ other.unit(il)) for il in range(one.n_layer)]


def check_agreement(one: ControlVector, other: ControlVector) -> None:
    assert min(cosines(one, other)) >= 0.9999
    for column in ("mean_with", "mean_without", "std_with", "std_without"):
        scale = np.abs(one.mean_with)
        assert (np.abs(getattr(one, column) - getattr(other, column)) / scale).max() < 1e-3, column


@pytest.fixture(scope="module")
def both(tiny):
    """Vectors of one instruction from the checkpoint and from its GGUF, by architecture."""
    made = {}

    def vectors(arch: str) -> tuple[ControlVector, ControlVector]:
        if arch not in made:
            model = tiny(arch)
            made[arch] = (
                extract(model.hf_dir, RHYME, QUERIES, n_threads=1),
                extract(model.gguf_path, RHYME, QUERIES, **EXACT),
            )
        return made[arch]

    return vectors


def test_both_backends_find_the_same_vector(tiny_model, both):
    check_agreement(*both(tiny_model.arch))


def test_both_backends_see_the_same_tokens(tiny_model, both):
    ours, theirs = (vector.provenance for vector in both(tiny_model.arch))
    assert ours["probes"] == theirs["probes"]
    assert all(ids[-1] == 2 for _, ids in ours["probes"])  # <|assistant|>: the generation prompt was added
    for key in ("template_hash", "architecture", "n_pairs", "method", "instruction_id", "phrasings"):
        assert ours[key] == theirs[key], key


def test_a_vector_from_pytorch_steers_its_gguf(tiny_model, both):
    with open_engine(tiny_model.gguf_path) as engine:
        ids = engine.prompt_tokens("Tell me about the fox.")
        plain, steered = engine.logits(ids), engine.logits(ids, steer=[both(tiny_model.arch)[0]])
    assert np.abs(plain - steered).max() > 1e-3


def test_real_pair_agrees(real_data):
    """TinyStories-656K: grouped-query attention, sentencepiece-like tokenizer with BOS, no template."""
    folder = real_data / "tinystories-656k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    one = extract(folder, RHYME, QUERIES, n_threads=1)
    other = extract(folder / "tinystories-656k-f32.gguf", RHYME, QUERIES, **EXACT)
    assert one.provenance["probes"] == other.provenance["probes"]
    assert one.provenance["probes"][0][1][0] == 1  # BOS, once
    assert one.provenance["probes"][0][1][1] != 1
    check_agreement(one, other)


def test_the_definition_holds_on_a_model_of_others(real_data):
    """stories260K through llama.cpp: every figure again, from whole hidden states of one prompt at a time."""
    path = real_data / "stories260K.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}")
    vector = extract(path, RHYME, QUERIES, n_pairs=6, **EXACT)
    with open_engine(path) as engine:
        layers = list(range(engine.model.n_layer))

        def last(text: str) -> np.ndarray:
            return engine.hidden_states(engine.prompt_tokens(text), layers)[-1].astype(np.float64)

        pairs = build_pairs(RHYME, QUERIES, 6)
        told = np.stack([last(pair.instructed) for pair in pairs])
        plain = np.stack([last(pair.plain) for pair in pairs])
    v = (told - plain).mean(axis=0)
    u = v / np.linalg.norm(v, axis=1, keepdims=True)
    assert np.abs(vector.directions - v).max() < 1e-4
    assert np.allclose(vector.mean_with, (told * u).sum(axis=2).mean(axis=0), rtol=1e-4)
    assert np.allclose(vector.std_without, (plain * u).sum(axis=2).std(axis=0), rtol=1e-3)


# The whole of it


def test_few_states_are_kept_and_many_come_again(tiny_llama, monkeypatch):
    kept = extract(tiny_llama.gguf_path, RHYME, QUERIES, n_pairs=10, **EXACT)
    monkeypatch.setattr(extraction, "KEPT_STATES", 4)
    again = extract(tiny_llama.gguf_path, RHYME, QUERIES, n_pairs=10, **EXACT)
    assert np.array_equal(kept.directions, again.directions)
    assert np.allclose(kept.std_with, again.std_with, rtol=1e-5)


@pytest.mark.parametrize("kept", [4, 1000])
def test_progress_reaches_its_end(tiny_llama, monkeypatch, kept):
    monkeypatch.setattr(extraction, "KEPT_STATES", kept)
    seen: list[tuple[int, int]] = []
    extract(
        tiny_llama.gguf_path,
        RHYME,
        QUERIES,
        on_progress=lambda done, total: seen.append((done, total)),
        **EXACT,
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_own_words_and_the_general_queries_are_enough(tiny_llama):
    vector = extract(tiny_llama.gguf_path, "Answer in rhyme.", **EXACT)
    assert vector.provenance["n_pairs"] == 50
    assert vector.provenance["instruction"] == "Answer in rhyme."
    assert (vector.name, vector.mode, vector.layers, vector.strength) == (
        "answer_in_rhyme",
        "project",
        (2,),
        1.0,
    )


def test_lengths_and_words_are_added_as_the_paper_does(tiny_llama):
    catalog = load_catalog()
    for instruction in (catalog.get("concise"), catalog.get("include_word", word="fox")):
        assert extract(tiny_llama.gguf_path, instruction, QUERIES, **EXACT).mode == "add"
    chosen = extract(tiny_llama.gguf_path, catalog.get("concise"), QUERIES, mode="project", **EXACT)
    assert chosen.mode == "project"


def test_an_instruction_with_queries_of_its_own_uses_them(tiny_llama):
    vector = extract(tiny_llama.gguf_path, load_catalog().get("fixed_answer"), **EXACT)
    assert "Is it safe to eat raw mushrooms?" in vector.provenance["probes"][0][0]
    assert vector.provenance["verifier"] == "detectable_format:constrained_response"


def test_several_vectors_share_one_open_model(tiny_llama):
    with open_backend(tiny_llama.gguf_path, **EXACT) as backend:
        vectors = [extract(backend, text, QUERIES) for text in ("Answer in rhyme.", "Be brief.")]
        assert backend.engine.model.n_layer == 4  # still open
    assert max(cosines(*vectors)) < 0.999


def test_an_engine_stays_open(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        vector = extract(engine, RHYME, QUERIES)
        assert engine.logits(engine.prompt_tokens("Who?"), steer=[vector]).shape[1] == tiny_llama.n_vocab


def test_a_vector_survives_its_file(tiny_llama, tmp_path, both):
    vector = both("llama")[0]
    vector.save(tmp_path / "rhyme.gguf")
    loaded = ControlVector.load(tmp_path / "rhyme.gguf")
    assert np.array_equal(loaded.directions, vector.directions)
    assert np.array_equal(loaded.std_with, vector.std_with)
    assert dict(loaded.provenance) == dict(vector.provenance)


def without_template(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_model_without_template_is_asked_plainly_and_says_so(tiny_llama, tmp_path, caplog):
    from localsteer.convert.checkpoint import checkpoint_to_gguf

    folder = without_template(tiny_llama.hf_dir, tmp_path / "base")
    path = checkpoint_to_gguf(folder, tmp_path / "base.gguf")
    vectors = [extract(folder, RHYME, QUERIES, n_threads=1), extract(path, RHYME, QUERIES, **EXACT)]
    assert vectors[0].provenance["probes"] == vectors[1].provenance["probes"]
    assert vectors[0].provenance["probes"][0][0] == "Q: Tell me about the fox.\nA:"
    said = [record.message for record in caplog.records if "chat template" in record.message]
    # in the words of Engine, so that the command line, which tells nothing twice, says it once
    assert said == [NO_TEMPLATE.format(folder.name), NO_TEMPLATE.format(path.name)]
    check_agreement(*vectors)


def test_the_source_hash_follows_the_weights(tiny_llama, tmp_path, both):
    ours = both("llama")[0].provenance["source_hash"]
    copy = shutil.copytree(tiny_llama.hf_dir, tmp_path / "copy")
    with open_backend(copy, n_threads=1) as backend:
        assert backend.source_hash == ours
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, copy / "model.safetensors")
    with open_backend(copy, n_threads=1) as backend:
        assert backend.source_hash != ours


# Bad input


def test_a_layer_out_of_range_is_refused(tiny_llama):
    with pytest.raises(PlanError, match="layer 4 is out of range"):
        extract(tiny_llama.gguf_path, RHYME, QUERIES, layer=4, **EXACT)


@pytest.mark.parametrize("source", ["missing.gguf", "missing-folder"])
def test_a_missing_model_is_one_line(tmp_path, source):
    with pytest.raises(ModelFileError) as caught:
        extract(tmp_path / source, RHYME, QUERIES)
    assert source in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    with pytest.raises(ModelFileError) as caught:
        extract(tmp_path, RHYME, QUERIES)
    assert "transformers can't load" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(tiny_llama):
    with pytest.raises(LocalsteerError, match="unknown dtype 'int8': use one of auto, float32"):
        extract(tiny_llama.hf_dir, RHYME, QUERIES, dtype="int8")


@pytest.mark.parametrize("kind", ["hf_dir", "gguf_path"])
def test_a_prompt_longer_than_the_context_is_refused(tiny_llama, kind):
    with pytest.raises(PromptError, match="512"):
        extract(getattr(tiny_llama, kind), RHYME, ["why " * 600], n_threads=1)


def test_states_that_are_not_finite_are_refused(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(LocalsteerError, match="state after layer 2 is not finite"):
        extract(folder, RHYME, QUERIES, n_threads=1)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_torch_the_message_says_what_to_install(tiny_llama):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from localsteer.extract import extract\n"
        f"try: extract({str(tiny_llama.hf_dir)!r}, 'Rhyme.')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert run_python(code).stdout.startswith(
        "LocalsteerError extraction from a transformers model needs PyTorch"
    )


def test_extraction_from_a_gguf_loads_no_torch(tiny_llama):
    code = (
        "import sys\nfrom localsteer.extract import extract\n"
        f"extract({str(tiny_llama.gguf_path)!r}, 'Rhyme.', ['Why?', 'Who?'], n_threads=1)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code).stdout == "[]\n"


@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=40))
def test_any_words_give_a_name_or_a_clear_error(text):
    try:
        instruction = Instruction.from_text(text)
    except CatalogError as error:
        assert "empty" in str(error) or "plain text" in str(error)
        return
    assert instruction.id and build_pairs(instruction, ["Why?"])
