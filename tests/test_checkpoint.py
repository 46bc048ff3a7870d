"""The GGUF that convert/checkpoint.py writes computes what transformers computes, token for token.

Tolerances. F32 weights, F32 KV cache, no flash attention: llama.cpp and transformers differ by summation
order alone, 5e-6 measured on logits of standard deviation 1; 1e-4 is demanded. llama.cpp looks GELU up in a
table of half-precision floats, so gemma2 is compared with transformers doing the same (up to 1.2e-3
measured, where one rounding falls the other way; 2e-3 demanded).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_reference import Reference
from tiny_models import ARCHITECTURES, CHAT_TEMPLATE, N_VOCAB, odd_strings, tokenizer, write_checkpoint

from localsteer.convert.checkpoint import (
    FTYPES,
    _stored_form,
    _weights,
    checkpoint_to_gguf,
    read_checkpoint,
)
from localsteer.errors import LocalsteerError, ModelFileError, UnsupportedModelError

torch = pytest.importorskip("torch", reason="the reference is transformers")
TOLERANCE = {"gemma2": 2e-3}
TOKENS = np.random.default_rng(0).integers(4, N_VOCAB, 200).tolist()


def transformers_logits(hf_dir: Path, ids: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, attn_implementation="eager").float().eval()
    if model.config.model_type == "gemma2":
        for layer in model.model.layers:
            layer.mlp.act_fn = HalfTableGelu()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


class HalfTableGelu(torch.nn.Module):
    """ggml's GELU: argument and result rounded to half precision."""

    def forward(self, x):
        value = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros(()), torch.where(x >= 10, x, value))


def max_difference(hf_dir: Path, gguf_path: Path, ids: list[int] = TOKENS) -> float:
    with Reference(gguf_path) as llama:
        return float(np.abs(llama.logits(ids) - transformers_logits(hf_dir, ids)).max())


def converted(hf_dir: Path, out_dir: Path, ftype: str = "F32") -> Path:
    return checkpoint_to_gguf(hf_dir, out_dir / f"{hf_dir.name}-{ftype}.gguf", ftype)


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def field(path: Path, key: str):
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


# Logits -------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(tiny_model):
    difference = max_difference(tiny_model.hf_dir, tiny_model.gguf_path)
    assert difference < TOLERANCE.get(tiny_model.arch, 1e-4)


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
                }
            },
        ),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
        ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}),
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
        ("phi3", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    ],
)  # fmt: skip
def test_settings_of_the_configuration_are_carried_over(tmp_path, arch, overrides):
    write_checkpoint(arch, tmp_path / arch, seed=1, **overrides)
    path = converted(tmp_path / arch, tmp_path)
    assert max_difference(tmp_path / arch, path) < TOLERANCE.get(arch, 1e-4)


def test_old_spelling_of_rotary_settings_is_understood(tiny_llama, tmp_path):
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}}
    old = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 777.0}
    first = converted(edited(tiny_llama.hf_dir, tmp_path / "a" / "model", new), tmp_path / "a")
    second = converted(edited(tiny_llama.hf_dir, tmp_path / "b" / "model", old), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


# Tokens -------------------------------------------------------------------------------------------------


def transformers_ids(hf_dir: Path, strings: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf_dir)(strings, add_special_tokens=False).input_ids


def test_a_thousand_odd_strings_give_the_same_tokens(tiny_model):
    strings = odd_strings(1000)
    if tiny_model.arch == "qwen2":  # Qwen 2 normalises to NFC and llama.cpp does not: composed text agrees
        strings = [unicodedata.normalize("NFC", text) for text in strings]
    expected = transformers_ids(tiny_model.hf_dir, strings)
    with Reference(tiny_model.gguf_path) as llama:
        differ = [text for text, ids in zip(strings, expected, strict=True) if llama.tokenize(text) != ids]
    assert differ == []


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_every_known_way_of_cutting_text_agrees(tiny_llama, tmp_path, pre):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    tokenizer(pre).save_pretrained(folder)
    path = converted(folder, tmp_path)
    strings = [unicodedata.normalize("NFC", text) for text in odd_strings(1000, seed=1)]
    fast = tokenizer(pre)
    with Reference(path) as llama:
        assert field(path, "tokenizer.ggml.pre") == pre
        assert [llama.tokenize(text) for text in strings] == fast(strings, add_special_tokens=False).input_ids


def test_a_rendered_chat_gives_the_same_tokens(tiny_model):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Tell me about the fox."}]
    rendered = AutoTokenizer.from_pretrained(tiny_model.hf_dir).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    with Reference(tiny_model.gguf_path) as llama:
        ids = llama.tokenize(rendered)
        assert ids == transformers_ids(tiny_model.hf_dir, [rendered])[0]
    assert (ids[0], ids[-1]) == (1, 2)  # <|user|> ... <|assistant|>


def test_no_bos_is_added(tiny_model):
    with Reference(tiny_model.gguf_path) as llama:
        assert llama.tokenize("fox", add_special=True) == llama.tokenize("fox", add_special=False)


def test_a_bos_that_the_tokenizer_adds_is_added(tiny_llama, tmp_path):
    config = {"bos_token": "<|user|>", "add_bos_token": True}
    folder = edited(tiny_llama.hf_dir, tmp_path / "model", {}, config, "tokenizer_config.json")
    with Reference(converted(folder, tmp_path)) as llama:
        assert llama.tokenize("fox", add_special=True) == [1, *llama.tokenize("fox")]


# Metadata -----------------------------------------------------------------------------------------------


def test_metadata_is_that_of_llama_cpp(tiny_llama):
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 0,
        "llama.block_count": 4, "llama.context_length": 512,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 512, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    assert {key: field(tiny_llama.gguf_path, key) for key in expected} == expected


def test_gemma2_caps_and_window_are_written(tiny):
    path = tiny("gemma2").gguf_path
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    assert [field(path, f"gemma2.{key}") for key in keys] == [50.0, 30.0, 32]


def test_special_tokens_are_control_tokens(tiny_llama):
    types = field(tiny_llama.gguf_path, "tokenizer.ggml.token_type")
    assert types[:4] == [gguf.TokenType.CONTROL] * 4
    assert set(types[4:]) == {gguf.TokenType.NORMAL}


def test_an_added_token_that_is_not_special_is_user_defined(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    edit_json(folder / "tokenizer.json", lambda t: t["added_tokens"][1].update(special=False))
    path = converted(folder, tmp_path)
    assert field(path, "tokenizer.ggml.token_type")[:3] == [3, gguf.TokenType.USER_DEFINED, 3]
    with Reference(path) as llama:
        assert llama.tokenize("a<|user|>b")[1] == 1


def test_tied_embeddings_are_stored_once(tiny):
    assert "output.weight" not in tensors(tiny("llama").gguf_path)
    assert "output.weight" in tensors(tiny("qwen2").gguf_path)


def test_a_stored_copy_of_tied_embeddings_is_left_out(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    weights = load(folder)
    save(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert "output.weight" not in tensors(converted(folder, tmp_path))


def test_rows_beyond_the_tokenizer_become_unused_tokens(tmp_path):
    write_checkpoint("llama", tmp_path / "model", vocab_size=N_VOCAB + 3)
    path = converted(tmp_path / "model", tmp_path)
    assert field(path, "tokenizer.ggml.tokens")[-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert field(path, "tokenizer.ggml.token_type")[-1] == gguf.TokenType.UNUSED


def test_the_default_of_several_chat_templates_is_written(tiny_llama, tmp_path):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    template = {"chat_template": named}
    folder = edited(tiny_llama.hf_dir, tmp_path / "model", {}, template, "tokenizer_config.json")
    assert field(converted(folder, tmp_path), "tokenizer.chat_template") == "D"


def test_without_a_template_none_is_written(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert field(converted(folder, tmp_path), "tokenizer.chat_template") is None


def test_a_name_that_changes_tokens_in_llama_cpp_is_not_written(tmp_path):
    write_checkpoint("phi3", tmp_path / "my-Phi-3-mini")
    path = converted(tmp_path / "my-Phi-3-mini", tmp_path)
    assert field(path, "general.name") == "my-phi 3-mini"
    with Reference(path) as llama:
        text = "<|user|> fox<|end|>\n\n<|assistant|>  "
        assert llama.tokenize(text) == transformers_ids(tmp_path / "my-Phi-3-mini", [text])[0]


# Weights and bytes --------------------------------------------------------------------------------------


def load(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder: Path, weights: dict) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_type_of_safetensors_is_read_exactly(tiny, tmp_path, dtype):
    folder = shutil.copytree(tiny("qwen2").hf_dir, tmp_path / "model")
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in load(folder).items()}
    save(folder, weights)
    stored = tensors(converted(folder, tmp_path))
    for name, source in {
        "token_embd.weight": "embed_tokens.weight",
        "output_norm.weight": "norm.weight",
    }.items():
        assert np.array_equal(stored[name].data, weights[f"model.{source}"].float().numpy())


@pytest.mark.parametrize("ftype", ["F16", "BF16"])
def test_sixteen_bit_files_round_matrices_and_keep_vectors(tiny_llama, tmp_path, ftype):
    path = converted(tiny_llama.hf_dir, tmp_path, ftype)
    exact, rounded = tensors(tiny_llama.gguf_path), tensors(path)
    norm, matrix = "blk.0.attn_norm.weight", "blk.2.ffn_up.weight"
    assert np.array_equal(rounded[norm].data, exact[norm].data)
    as_type = {"F16": torch.float16, "BF16": torch.bfloat16}[ftype]
    values = gguf.quants.dequantize(rounded[matrix].data, rounded[matrix].tensor_type)
    assert np.array_equal(values, torch.from_numpy(exact[matrix].data.copy()).to(as_type).float().numpy())
    # a processor with BF16 instructions rounds the activations to 8 bits as well: 0.10 was seen there
    assert max_difference(tiny_llama.hf_dir, path) < {"F16": 0.02, "BF16": 0.3}[ftype]


def test_sixteen_bit_weights_survive_unchanged(tiny_llama, tmp_path):
    """The bundled checkpoint is F16: its F16 and F32 files hold the same numbers."""
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    save(folder, {name: weight.half() for name, weight in load(folder).items()})
    half, single = tensors(converted(folder, tmp_path, "F16")), tensors(converted(folder, tmp_path, "F32"))
    assert half.keys() == single.keys()
    assert all(np.array_equal(half[name].data.astype(np.float32), single[name].data) for name in half)


def test_shards_are_put_together(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / tiny_llama.hf_dir.name)
    weights = load(folder)
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for shard in set(index.values()):
        save_file({name: weights[name] for name in index if index[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert converted(folder, tmp_path).read_bytes() == tiny_llama.gguf_path.read_bytes()


def test_the_same_checkpoint_gives_the_same_bytes(tiny_model, tmp_path):
    again = converted(tiny_model.hf_dir, tmp_path)
    assert again.read_bytes() == tiny_model.gguf_path.read_bytes()


def test_layers_stand_in_order(tmp_path):
    write_checkpoint("llama", tmp_path / "model", num_hidden_layers=12)
    names = list(tensors(converted(tmp_path / "model", tmp_path)))
    layers = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert layers == sorted(layers)
    assert max(layers) == 11


def test_a_real_pair_has_the_same_tensors(real_data):
    """TinyStories-656K: its own GGUF was written by llama.cpp's converter."""
    folder = real_data / "tinystories-656k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    checkpoint = read_checkpoint(folder)
    ours = {w.name: _stored_form(checkpoint, w) for w in _weights(checkpoint, FTYPES["F32"][0])}
    theirs = tensors(folder / "tinystories-656k-f32.gguf")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name].data) for name in ours)


def test_converting_loads_no_torch():
    code = "import sys, localsteer.convert.checkpoint; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Bad input ----------------------------------------------------------------------------------------------


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edited(source: Path, folder: Path, config: dict, other: dict | None = None, file: str = "") -> Path:
    """A copy of the checkpoint with changed entries in config.json, and in one other JSON file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder)
    edit_json(folder / "config.json", lambda content: content.update(config))
    if other:
        edit_json(folder / file, lambda content: content.update(other))
    return folder


def refusal(folder: Path, out_dir: Path, kind: type[LocalsteerError] = UnsupportedModelError) -> str:
    """The message of the refusal: one line, and no file left behind."""
    with pytest.raises(kind) as caught:
        checkpoint_to_gguf(folder, out_dir / "out.gguf")
    assert [path.name for path in out_dir.iterdir() if path.name.endswith((".gguf", ".part"))] == []
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("arch", "config", "words"),
    [
        ("llama", {"model_type": "t5"}, "architecture 't5' can't be converted"),
        ("llama", {"model_type": ["llama"]}, "architecture ['llama'] can't be converted"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rotary scaling 'longrope'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ("gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": None}, "no final_logit_softcapping"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(tiny, tmp_path, arch, config, words):
    assert words in refusal(edited(tiny(arch).hf_dir, tmp_path / "model", config), tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"vocab_size": 100}, "says vocab_size 100, the weights have 512 rows"),
        ({"vocab_size": 10**9}, "says vocab_size 1000000000, the weights have 512 rows"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 4096"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"intermediate_size": 10**30}, "intermediate_size is 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": "default"}, "rope_scaling) is 'default', expected an object"),
        ({"num_hidden_layers": 5}, "lacks 9 tensors, the first is blk.4.attn_norm.weight"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors, the first is output.weight"),
        ({"num_attention_heads": 7, "head_dim": 16}, "64 rows does not make 7 heads"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "original_max_position_embeddings is None"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tiny_llama, tmp_path, config, words):
    assert words in refusal(edited(tiny_llama.hf_dir, tmp_path / "model", config), tmp_path, ModelFileError)


@pytest.mark.parametrize(
    ("arch", "key"),
    [
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("phi3", "sliding_window"),
    ],
)
def test_a_setting_of_one_architecture_that_is_no_number_is_named(tiny, tmp_path, arch, key):
    folder = edited(tiny(arch).hf_dir, tmp_path / "model", {key: "x"})
    assert f"{key} is 'x', expected a positive" in refusal(folder, tmp_path, ModelFileError)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 5}])
def test_a_damaged_list_of_shards_is_one_line(tiny_llama, tmp_path, weight_map):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "expected a weight_map of file names" in refusal(folder, tmp_path, ModelFileError)


def test_fewer_layers_than_stored_is_refused(tiny_llama, tmp_path):
    folder = edited(tiny_llama.hf_dir, tmp_path / "model", {"num_hidden_layers": 3})
    assert "no place for model.layers.3" in refusal(folder, tmp_path)


def ascii_split(t):
    t["pre_tokenizer"] = {"type": "Whitespace"}


def metaspace(t):
    t["pre_tokenizer"] = None


def prefix_space(t):
    t["pre_tokenizer"]["add_prefix_space"] = True


def unknown_regex(t):
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    t["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (ascii_split, "not known to split text"),
        (metaspace, "not known to split text"),
        (prefix_space, "not known to split text"),
        (unknown_regex, "not known to split text"),
        (lambda t: t["model"].update(type="Unigram"), "model type Unigram"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda t: t["model"].update(dropout=0.1), "dropout"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda t: t["added_tokens"][0].update(rstrip=True), "swallow spaces"),
    ],
)
def test_a_tokenizer_that_llama_cpp_can_not_follow_is_refused(tiny_llama, tmp_path, change, words):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    edit_json(folder / "tokenizer.json", change)
    assert words in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model"),
        lambda t: t.update(pre_tokenizer=[1]),
        lambda t: t["model"].update(merges=[1, 2]),
        lambda t: t["model"]["merges"].__setitem__(0, "x"),
        lambda t: t.update(added_tokens=[{}]),
        lambda t: t["added_tokens"][0].update(content=None),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tiny_llama, tmp_path, change):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    edit_json(folder / "tokenizer.json", change)
    assert "not a readable tokenizer file" in refusal(folder, tmp_path, ModelFileError)


def test_a_token_beyond_the_weights_is_named(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    edit_json(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(id=600))
    assert "goes up to token 600, the model has 512" in refusal(folder, tmp_path, ModelFileError)


def test_a_tokenizer_without_end_of_text_is_refused(tiny_llama, tmp_path):
    folder = edited(tiny_llama.hf_dir, tmp_path / "model", {"eos_token_id": None})
    edit_json(folder / "tokenizer_config.json", lambda content: content.pop("eos_token"))
    assert "names no end-of-text token" in refusal(folder, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tiny_llama, tmp_path, name):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    (folder / name).unlink()
    assert f"holds no {name}" in refusal(folder, tmp_path, ModelFileError)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_configuration_is_one_line(tiny_llama, tmp_path, content):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    assert "config.json can't be read" in refusal(folder, tmp_path, ModelFileError)


def header(**entry) -> bytes:
    text = json.dumps({"model.norm.weight": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x00" * 7, "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "not a whole safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a whole safetensors file"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not a whole safetensors file"),
        (header(dtype="F32"), "not a whole safetensors file"),
        (header(dtype="F32", shape=[2], data_offsets=[0, 8]), "truncated or damaged at model.norm.weight"),
        (header(dtype="F32", shape=[2], data_offsets=[0, 4]) + b"1234", "truncated or damaged"),
        (header(dtype="F32", shape=[1], data_offsets=[-400, -396]) + b"1234", "truncated or damaged"),
        (header(dtype="F32", shape=[0], data_offsets=[0, 0]), "truncated or damaged"),
        (header(dtype="F32", shape=["a"], data_offsets=[0, 4]) + b"1234", "truncated or damaged"),
    ],
)
def test_hostile_safetensors_are_one_line(tiny_llama, tmp_path, content, words):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    assert words in refusal(folder, tmp_path, ModelFileError)


def test_truncated_weights_are_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert "truncated or damaged" in refusal(folder, tmp_path, ModelFileError)


def test_integer_weights_are_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    save(folder, {"model.norm.weight": torch.ones(64, dtype=torch.int32)})
    assert "is I32" in refusal(folder, tmp_path)


def test_an_unknown_tensor_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    save(folder, {**load(folder), "model.vision.weight": torch.ones(4)})
    assert "no place for model.vision.weight" in refusal(folder, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_llama, tmp_path, value):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    weights = load(folder)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save(folder, weights)
    assert "layers.1.mlp.up_proj.weight holds values" in refusal(folder, tmp_path, ModelFileError)


def test_weights_too_large_for_half_precision_are_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama.hf_dir, tmp_path / "model")
    weights = load(folder)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save(folder, weights)
    with pytest.raises(ModelFileError, match="not finite as F16"):
        checkpoint_to_gguf(folder, tmp_path / "out.gguf", "F16")
    checkpoint_to_gguf(folder, tmp_path / "out.gguf", "BF16")


def test_an_unknown_type_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ModelFileError, match=r"'Q4_0'.*F32, F16, BF16"):
        checkpoint_to_gguf(tiny_llama.hf_dir, tmp_path / "out.gguf", "Q4_0")


def test_a_folder_that_can_not_be_written_is_one_line(tiny_llama, tmp_path):
    with pytest.raises(ModelFileError, match=r"can't write .*No such file"):
        checkpoint_to_gguf(tiny_llama.hf_dir, tmp_path / "nowhere" / "out.gguf")


def test_an_existing_file_survives_a_failed_conversion(tiny_llama, tmp_path):
    folder = edited(tiny_llama.hf_dir, tmp_path / "model", {"model_type": "t5"})
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(UnsupportedModelError):
        checkpoint_to_gguf(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"


def test_the_four_architectures_are_the_documented_ones():
    assert set(ARCHITECTURES) == {"llama", "qwen2", "gemma2", "phi3"}
