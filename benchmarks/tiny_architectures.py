"""Tiny random checkpoints of the architectures that transformers and llama.cpp share, and their F32 GGUF.

What a configuration needs beyond SIZES stands in CASES; what is left out of the comparison, and why, in OUT.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
N_VOCAB, N_EMBD, N_LAYER = 512, 64, 4
WINDOW = 8  # shorter than the prompts

# Set where a configuration has an attribute of that name.
SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": N_EMBD, "intermediate_size": 2 * N_EMBD,
    "num_hidden_layers": N_LAYER, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_head_dim": 24, "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
DENSE_FIRST = {**GROUPS, "first_k_dense_replace": 1}
SPARSE_AFTER = {**GROUPS, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_d_ssm": 128, "mamba_chunk_size": 8,
}  # fmt: skip
NEMOTRON_H = {
    "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
    "num_hidden_layers": "default", "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip
SLIDING = {
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
GEMMA4 = {
    **SLIDING, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": N_VOCAB, "num_experts": None,
}  # fmt: skip
# The engine knows no window in them: llama.cpp takes them for a Llama, or leaves it out.
NO_WINDOW = {"sliding_window": None}
SIGMOID = {"also": {"scoring_func": "sigmoid", "first_k_dense_replace": 1}}
INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 4}
# What is left out is the default of the configuration. type: of the configuration, if it is not the name.
# also: what the converter asks for beside it, by names that transformers has given up.
CASES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1, "mup_enabled": True},
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3], "also": {"attn_rotary_emb": 8}},
    "bitnet": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "also": {"rotary_pct": 1.0}},
    "cohere2_moe": {"logit_scale": 0.25},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": N_EMBD},
    },
    "deepseek_v2": {**MLA, **DENSE_FIRST},
    "deepseek_v3": {**MLA, **DENSE_FIRST, **SIGMOID},
    "deepseek_v32": {**MLA, **SPARSE_AFTER, **INDEXER, **SIGMOID},
    "deepseek_v4": {},
    "dots1": {**DENSE_FIRST, **SIGMOID, "num_key_value_heads": 4},
    "dots3_note_text": {**MLA},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "exaone": {},
    "exaone4": {**NO_WINDOW, "layer_types": ["full_attention"] * 4},
    "exaone_moe": {**SPARSE_AFTER, **SIGMOID},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 256},
    "falcon-7b": {"type": "falcon", "num_kv_heads": 1, "ffn_hidden_size": 256},
    "falcon_h1": {
        **MAMBA2, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.7,
        "attention_out_multiplier": 0.8, "attention_in_multiplier": 0.9,
        "also": {"head_dim": 16},
    },
    "falcon_mamba": {"time_step_rank": 4},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}},
    "gemma3n_text": {},
    "gemma4_text": {**GEMMA4},
    "gemma4": {"text_config": {**GEMMA4}},
    "glm": {"also": {"layernorm_epsilon": 1.5625e-07}},
    "glm4": {},
    "glm4_moe": {**DENSE_FIRST, **SIGMOID},
    "glm4_moe_lite": {**MLA, **SPARSE_AFTER, **SIGMOID},
    "glm_moe_dsa": {**MLA, **SPARSE_AFTER, **INDEXER, **SIGMOID},
    "gpt2": {"n_ctx": 512},
    "gpt_bigcode": {"n_inner": 256},
    "gpt_neox": {"also": {"rotary_pct": 0.25}},
    "gpt_neox-serial": {"type": "gpt_neox", "use_parallel_residual": False, "also": {"rotary_pct": 0.25}},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "granite": {**GRANITE},
    "granite_swa": {**GRANITE},
    "granitemoe": {**GRANITE},
    "granitemoe_swa": {**GRANITE},
    "granitemoehybrid": {
        **GRANITE, **MAMBA2, "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "also": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    },
    "granitemoehybrid-dense": {
        "type": "granitemoehybrid", **GRANITE, **MAMBA2, "layer_types": ["attention"] * 4,
        "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope",
        "shared_intermediate_size": 32, "also": {"layer_types": ["attention"] * 4},
    },
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 32},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {
        "num_experts": 4, "moe_topk": 2,
        "also": {"moe_intermediate_size": [128] * 4, "moe_topk": [2] * 4, "num_shared_expert": [1] * 4},
    },
    "hy_v3": {},
    "hy_v4": {**MLA, **SPARSE_AFTER},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {"num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {**MLA, "num_experts_per_token": 2},
    "laguna": {},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"], "layer_auto_adjust_ff_dim": False
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 128, "num_experts_per_tok": 1},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "mellum": {},
    "mimo_v2_flash": {
        **GROUPS, "v_head_dim": 16, "layer_types": ["full_attention", *["sliding_attention"] * 3],
        "also": {
            "swa_head_dim": 16, "swa_num_key_value_heads": 2, "swa_num_attention_heads": 4,
            "swa_v_head_dim": 16, "topk_method": "noaux_tc", "hybrid_layer_pattern": [0, 1, 1, 1],
        },
    },
    "minicpm3": {**MLA, "head_dim": "default"},
    "minimax_m2": {"also": {"rotary_dim": 16}},
    "ministral3": {**NO_WINDOW},
    "mistral": {**NO_WINDOW},
    "mixtral": {**NO_WINDOW},
    "mpt": {"also": {"architectures": ["MPTForCausalLM"]}},
    "nemotron": {},
    "nemotron_h": {**NEMOTRON_H, "layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
    "nemotron_h-moe": {
        "type": "nemotron_h", **NEMOTRON_H, "layers_block_type": ["mamba", "attention", "moe", "mamba"]
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "phi3": {**NO_WINDOW, "original_max_position_embeddings": 512},
    "phimoe": {
        "lm_head_bias": True, "attention_bias": True,**NO_WINDOW,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 512
        },
        "also": {"architectures": ["PhiMoEForCausalLM"]},
    },
    "qwen2": {"vocab_size": N_VOCAB + 8},  # its tokenizer adds one of its own
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {**LINEAR},
    "qwen3_5": {"text_config": {**LINEAR}},
    "qwen3_5_moe_text": {**LINEAR, "vocab_size": N_VOCAB + 8},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {**LINEAR},
    "qwen4_exp_text": {},
    "sarvam_mla": {**MLA, **DENSE_FIRST},
    "sarvam_moe": {**DENSE_FIRST},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {**GROUPS},
    "stablelm": {},
    "stablelm-parallel": {"type": "stablelm", "use_parallel_residual": True},
    "starcoder2": {**NO_WINDOW},
    "youtu": {**MLA},
}  # fmt: skip


def case_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    case = {key: value for key, value in CASES[name].items() if key != "also"}
    kind = CONFIG_MAPPING[case.pop("type", name)]
    default = kind()
    if "text_config" in case:
        case["text_config"] = _sized(type(default.text_config)(), case["text_config"])
        return kind(**case)
    return kind(**_sized(default, case))


def _sized(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    known = {*default.to_dict(), *default.attribute_map, *default.attribute_map.values()}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return {key: value for key, value in {**sizes, **own}.items() if value != "default"}


def write_checkpoint(name: str, folder: Path, seed: int = 0) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import randomise, tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(case_config(name), dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(folder)
    own = tokenizer("qwen2" if "qwen" in name else "gpt-2")
    own.chat_template = None  # which would be rendered in a further process each time
    own.save_pretrained(folder)


def warm(llama_cpp: Path) -> None:
    """What making and converting a model imports, so that processes forked from this one need not."""
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    from conversion import load_all_models

    load_all_models()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("llama", Path(folder))
        convert("llama", Path(folder), Path(folder) / "model.gguf")


def convert(name: str, folder: Path, path: Path) -> None:
    """By llama.cpp's own converter, whose tables of tokenizers do not know this one: it is byte-level BPE,
    whatever the architecture has otherwise."""
    import convert_hf_to_gguf
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, TextModel, get_model_architecture

    load = ModelBase.load_hparams
    hparams = load(folder, False) | CASES[name].get("also", {})
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    pre = "qwen2" if json.loads((folder / "tokenizer.json").read_text())["normalizer"] else "gpt-2"
    kind.set_vocab = TextModel._set_vocab_gpt2
    kind.get_vocab_base_pre = lambda self, tokenizer: pre
    kind.no_mtp = True  # the checkpoint has no layers for tokens after the next
    sys.argv = ["convert", str(folder), "--outfile", str(path), "--outtype", "f32"]
    ModelBase.load_hparams = staticmethod(lambda *_, **__: dict(hparams))
    try:
        convert_hf_to_gguf.main()
    finally:
        ModelBase.load_hparams = load
