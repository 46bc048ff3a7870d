"""Tiny random models of four architectures, each as a transformers checkpoint and as its F32 GGUF.

The same seed gives the same bytes. Weights are drawn so that every part of a layer matters: norms away from
1, biases away from 0, a residual stream of order 1 (transformers' own initialisation leaves layers that
hardly change their input, and a wrong converter would pass).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("llama", "qwen2", "gemma2", "phi3")
N_LAYER, N_EMBD, N_VOCAB, N_CTX = 4, 64, 512, 512
SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What the architectures need beyond the common configuration; the gemma2 window is shorter than the prompts.
EXTRA = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "phi3": {"original_max_position_embeddings": N_CTX},
}
CORPUS = (
    "Tell me about the fox. What do you know about rivers? Describe a quiet village in the mountains.",
    "Answer in JSON format. Use only lowercase letters. Write everything in CAPITAL LETTERS, please!",
    "The quick brown fox jumps over the lazy dog; 12 dogs sleep, 345 don't. It's 6:30, isn't it?",
    "Ein Fluss fließt durch die Stadt. Une rivière traverse la ville. Un río cruza la ciudad.",
    "Река течёт через город. 川は町を流れる。 нет — да … «цитата» 🙂",
    '{"name": "fox", "facts": ["It runs.", "It hides."]}\n* one\n* two\n\n<<title>>\tend',
)


@dataclass(frozen=True)
class TinyModel:
    """`gguf_path` holds the weights of `hf_dir` in F32; 4 layers, 64 wide, 512 tokens of vocabulary."""

    arch: str
    hf_dir: Path
    gguf_path: Path
    n_layer: int = N_LAYER
    n_embd: int = N_EMBD
    n_vocab: int = N_VOCAB


def write_tiny(arch: str, directory: Path, *, seed: int = 0) -> TinyModel:
    """Write `directory/<arch>/` and `directory/<arch>.gguf`."""
    from localsteer.convert.checkpoint import checkpoint_to_gguf

    hf_dir, gguf_path = Path(directory) / arch, Path(directory) / f"{arch}.gguf"
    write_checkpoint(arch, hf_dir, seed=seed)
    checkpoint_to_gguf(hf_dir, gguf_path, "F32")
    return TinyModel(arch, hf_dir, gguf_path)


def write_checkpoint(arch: str, hf_dir: Path, *, seed: int = 0, **overrides) -> None:
    """A transformers checkpoint alone; `overrides` go into its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    sizes = {
        "vocab_size": N_VOCAB, "hidden_size": N_EMBD, "intermediate_size": 2 * N_EMBD,
        "num_hidden_layers": N_LAYER, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
        "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(arch, **{**sizes, **EXTRA[arch], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    model.save_pretrained(hf_dir)
    tokenizer("qwen2" if arch == "qwen2" else "gpt-2").save_pretrained(hf_dir)


def write_tiny_mamba(path: Path, tokens_of: Path, *, seed: int = 0) -> Path:
    """A random recurrent model in F32, with the tokenizer of another GGUF: llama.cpp can't cut its state."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    draw = np.random.default_rng(seed)
    d_inner, d_conv, d_state, dt_rank = 2 * N_EMBD, 4, 16, 4
    writer = GGUFWriter(path, "mamba")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(N_LAYER)
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(dt_rank)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, field in GGUFReader(tokens_of).fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)

    def matrix(name: str, *shape: int) -> None:
        scale = shape[-1] ** -0.5
        writer.add_tensor(f"{name}.weight", (scale * draw.normal(size=shape)).astype(np.float32))

    matrix("token_embd", N_VOCAB, N_EMBD)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for il in range(N_LAYER):
        blk = f"blk.{il}"
        writer.add_tensor(f"{blk}.attn_norm.weight", np.ones(N_EMBD, np.float32))
        matrix(f"{blk}.ssm_in", 2 * d_inner, N_EMBD)
        matrix(f"{blk}.ssm_conv1d", d_inner, d_conv)
        writer.add_tensor(f"{blk}.ssm_conv1d.bias", np.zeros(d_inner, np.float32))
        matrix(f"{blk}.ssm_x", dt_rank + 2 * d_state, d_inner)
        matrix(f"{blk}.ssm_dt", d_inner, dt_rank)
        writer.add_tensor(f"{blk}.ssm_dt.bias", draw.normal(size=d_inner).astype(np.float32))
        decay = -np.tile(np.arange(1, d_state + 1, dtype=np.float32), (d_inner, 1))
        writer.add_tensor(f"{blk}.ssm_a", decay)
        writer.add_tensor(f"{blk}.ssm_d", np.ones(d_inner, np.float32))
        matrix(f"{blk}.ssm_out", N_EMBD, d_inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def randomise(model, seed: int) -> None:
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def tokenizer(pre: str = "gpt-2"):
    """A byte-level BPE of 512 tokens, trained on CORPUS, with the chat template; no BOS.

    `pre` is how text is cut before merging: "gpt-2", "qwen2" or "llama-bpe". A qwen2 checkpoint needs its
    own: transformers rebuilds that tokenizer whatever tokenizer.json says.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer(pre)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pre_tokenizer(pre: str):
    from tokenizers import Regex, pre_tokenizers

    from localsteer.convert.checkpoint_vocab import PRE_BY_REGEX

    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    regex = next(regex for regex, name in PRE_BY_REGEX.items() if name == pre)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# Pieces that tokenizers disagree about: spaces, line ends, contractions, scripts, combining marks, emoji with
# joiners and modifiers, control characters (no NUL), special tokens in the middle of text.
PIECES = (
    *CORPUS, *SPECIAL_TOKENS,
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d",
    "'s", "'S", "don't", "we'll", "'ve", "1", "1234567890", "3.14", "½", "²", "Ⅷ", "٣", "a", "I", "é",
    "e\u0301", "ß", "İ", "ﬁ", "ǆ", "русский", "ελληνικά", "العربية", "עברית", "हिन्दी", "ไทย",
    "中文字", "日本語", "한국어", "🙂", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "\U0001d4b3", "𐍈",
    "!", "?!...", "---", "<|", "|>", "<<a>>", "{}", "$€₿", "_", "\\n",
    "\x01", "\x1b[0m", "\x7f", "\u0085", "\ufeff", "\ufffd", "\u180e",
)  # fmt: skip


def odd_strings(n: int, seed: int = 0) -> list[str]:
    """`n` distinct strings put together from PIECES."""
    draw = random.Random(seed)
    found: dict[str, None] = dict.fromkeys(PIECES)
    while len(found) < n:
        found["".join(draw.choices(PIECES, k=draw.randint(2, 8)))] = None
    return list(found)[:n]
