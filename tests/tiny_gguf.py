"""Tiny models of two layers, written byte by byte (raw_gguf.py), to be damaged; they load as they are."""

from __future__ import annotations

import numpy as np
from raw_gguf import F32, I32, STRING, U32, RawGguf, Tensor, array, value

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 2, 32, 4, 2, 64, 64
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def spm_tokens() -> tuple[list[str], list[int]]:
    words = ["\u2581the", "\u2581fox", "ab", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return tokens, [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]


def bpe_tokens() -> tuple[list[str], list[int]]:
    """As GPT-2 writes bytes: those that can be printed stand for themselves, others for U+0100 and on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = [chr(byte) for byte in printed] + [chr(0x100 + k) for k in range(len(others))]
    tokens = ["<s>", "</s>", *letters, "th", "the", "\u0120the"]
    return tokens, [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2)]


def wpm_tokens() -> tuple[list[str], list[int]]:
    words = [*"abcdefghijklmnopqrstuvwxyz", *["▁a", "▁the", "▁fox"]]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return tokens, [CONTROL, UNKNOWN, *[CONTROL] * 3, *[NORMAL] * len(words)]


TOKENIZERS = {"llama": spm_tokens, "gpt2": bpe_tokens, "bert": wpm_tokens}


def tiny_gguf(tokenizer: str = "llama", architecture: str = "llama", n_expert: int = 0) -> RawGguf:
    """A random model in F32; with experts, one of two is used for each token."""
    tokens, types = TOKENIZERS[tokenizer]()
    a = architecture
    keys = {
        "general.architecture": value(STRING, a),
        "general.name": value(STRING, "tiny"),
        f"{a}.block_count": value(U32, N_LAYER),
        f"{a}.context_length": value(U32, N_CTX),
        f"{a}.embedding_length": value(U32, N_EMBD),
        f"{a}.feed_forward_length": value(U32, N_FF),
        f"{a}.attention.head_count": value(U32, N_HEAD),
        f"{a}.attention.head_count_kv": value(U32, N_HEAD_KV),
        f"{a}.attention.layer_norm_rms_epsilon": value(F32, 1e-5),
        f"{a}.rope.dimension_count": value(U32, N_EMBD // N_HEAD),
        f"{a}.rope.freq_base": value(F32, 10000.0),
        "tokenizer.ggml.model": value(STRING, tokenizer),
        "tokenizer.ggml.tokens": array(STRING, tokens),
        "tokenizer.ggml.token_type": array(I32, types),
        "tokenizer.ggml.scores": array(F32, [-float(i) for i in range(len(tokens))]),
        "tokenizer.ggml.bos_token_id": value(U32, tokens.index("<s>") if "<s>" in tokens else 2),
        "tokenizer.ggml.eos_token_id": value(U32, tokens.index("</s>") if "</s>" in tokens else 3),
        "tokenizer.chat_template": value(STRING, TEMPLATE),
    }  # fmt: skip
    if tokenizer == "gpt2":
        keys["tokenizer.ggml.pre"] = value(STRING, "gpt-2")
        keys["tokenizer.ggml.merges"] = array(STRING, ["t h", "th e", "\u0120 the"])
    if n_expert:
        keys[f"{a}.expert_count"] = value(U32, n_expert)
        keys[f"{a}.expert_used_count"] = value(U32, 1)
    return RawGguf(keys, _tensors(len(tokens), n_expert))


def _tensors(n_vocab: int, n_expert: int) -> list[Tensor]:
    draw = np.random.default_rng(0)

    def matrix(name: str, *dims: int) -> Tensor:
        numbers = draw.normal(scale=dims[0] ** -0.5, size=int(np.prod(dims)))
        return Tensor.row(f"{name}.weight", numbers, dims=dims)

    def ones(name: str) -> Tensor:
        return Tensor.row(f"{name}.weight", np.ones(N_EMBD))

    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    tensors = [matrix("token_embd", N_EMBD, n_vocab), ones("output_norm"), matrix("output", N_EMBD, n_vocab)]
    for il in range(N_LAYER):
        b = f"blk.{il}."
        tensors += [ones(b + "attn_norm"), ones(b + "ffn_norm")]
        tensors += [matrix(b + "attn_q", N_EMBD, N_EMBD), matrix(b + "attn_k", N_EMBD, n_kv)]
        tensors += [matrix(b + "attn_v", N_EMBD, n_kv), matrix(b + "attn_output", N_EMBD, N_EMBD)]
        if n_expert:
            tensors += [matrix(b + "ffn_gate_inp", N_EMBD, n_expert)]
            tensors += [matrix(b + f"ffn_{part}_exps", N_EMBD, N_FF, n_expert) for part in ("gate", "up")]
            tensors += [matrix(b + "ffn_down_exps", N_FF, N_EMBD, n_expert)]
        else:
            tensors += [matrix(b + f"ffn_{part}", N_EMBD, N_FF) for part in ("gate", "up")]
            tensors += [matrix(b + "ffn_down", N_FF, N_EMBD)]
    return tensors
