"""States from any decoder-only transformers model, with PyTorch."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from localsteer.cache import file_hash
from localsteer.errors import LocalsteerError, ModelFileError, PromptError, UnsupportedModelError
from localsteer.templates import DROPS_WORDS, NO_TEMPLATE, ChatTemplate, one_line
from localsteer.token_choice import tokens_over

try:
    import torch
    import transformers
except ImportError as error:
    raise LocalsteerError(
        "extraction from a transformers model needs PyTorch: pip install 'localsteer[torch]', "
        f"or extract from a GGUF ({error})"
    ) from error

logger = logging.getLogger("localsteer")

DTYPES = ("auto", "float32", "bfloat16", "float16")
# model_type in config.json -> general.architecture in a GGUF, if the two differ
GGUF_ARCHITECTURES = {
    "bamba": "granitehybrid", "cohere": "command-r", "cohere2_moe": "cohere2moe",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4", "dots3_note_text": "dots3note", "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe", "falcon_h1": "falcon-h1", "falcon_mamba": "mamba", "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n", "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4", "glm": "chatglm",
    "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2", "glm_moe_dsa": "glm-dsa", "gpt-sw3": "gpt2",
    "gpt_bigcode": "starcoder", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss",
    "granitemoe_swa": "granite_swa", "granitemoehybrid": "granitehybrid", "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe", "internlm3": "llama",
    "iquestcoder": "llama", "kimi_linear": "kimi-linear", "lfm2_moe": "lfm2moe", "llama4_text": "llama4",
    "mimo_v2_flash": "mimo2", "minimax_m2": "minimax-m2", "ministral3": "mistral3", "mistral": "llama",
    "mixtral": "llama", "olmo3": "olmo2", "phi": "phi2", "qwen2_moe": "qwen2moe",
    "qwen3_5_moe_text": "qwen35moe", "qwen3_5_text": "qwen35", "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next", "qwen4_exp_text": "qwen4exp", "solar_open": "glm4moe", "youtu": "deepseek2",
}  # fmt: skip
# the same in both, and newer than the lists in the required gguf package
NEWER = ("granite_swa", "hrm_text", "hy_v3", "hy_v4", "laguna", "mellum")
# Model types that transformers computes as another type. A checkpoint saved by transformers names the other
# type's class in config.json, and is converted as such; a published one names its own.
GGUF_OF_CLASSES = {
    "LlamaForCausalLM": "llama", "Glm4MoeForCausalLM": "glm4moe", "DeepseekV3ForCausalLM": "deepseek2",
    "SarvamMoEForCausalLM": "bailingmoe2",
}  # fmt: skip


class TorchBackend:
    """A transformers model, its tokenizer, and one forward pass per batch.

    source: a folder saved by transformers, or a name on the hub (which may download it). dtype: "auto" is
    float32 on a CPU, and the checkpoint's type elsewhere. device: "cpu", "cuda", ...; None takes CUDA if
    there is one. n_threads: for torch, in the whole process. Raises ModelFileError, UnsupportedModelError,
    and LocalsteerError for a device that does not exist.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str | None = None,
        n_threads: int | None = None,
    ) -> None:
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        self.source = str(source)
        self.device = _device(device)
        self.model = _load_model(self.source, _dtype(dtype, self.device)).to(self.device).eval()
        self.tokenizer = _load(transformers.AutoTokenizer, self.source)
        config = self.model.config.get_text_config(decoder=True)
        self.n_layer, self.n_embd = config.num_hidden_layers, config.hidden_size
        self.n_ctx = getattr(config, "max_position_embeddings", None)
        self.architecture = config_architecture(config)
        self.template = _template(self.tokenizer)
        self.model_name = Path(self.source).name
        if self.template.is_fallback:
            logger.warning(NO_TEMPLATE.format(self.model_name))
        if not self.template.keeps_words:
            raise ModelFileError(DROPS_WORDS.format(self.model_name))
        self.source_hash = _source_hash(self.source, self.model.config)
        self.description = f"transformers {transformers.__version__}, {str(self.model.dtype)[6:]}"

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt."""
        return self.tokenizer(text, add_special_tokens=self.template.adds_special(text)).input_ids

    def last_hidden_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """(n_prompts, n_layer, n_embd) float32: the residual stream after each layer at each last token."""
        return self._states(prompts, lambda hidden, rows, last: hidden[rows, last].float())

    def mean_hidden_states(self, prompts: Sequence[Sequence[int]], positions: Sequence[range]) -> np.ndarray:
        """The same, of the mean over the chosen positions of each prompt."""

        def mean(hidden: Any, _rows: Any, _last: Any) -> Any:
            means = [
                row[at.start : at.stop].float().mean(dim=0) for row, at in zip(hidden, positions, strict=True)
            ]
            return torch.stack(means)

        return self._states(prompts, mean)

    def find_part(self, text: str, tokens: Sequence[int], part: str) -> range | None:
        """The tokens of `text` that spell the last occurrence of `part`. Raises UnsupportedModelError."""
        at = text.rfind(part)
        if at < 0:
            return None
        if not self.tokenizer.is_fast:
            raise UnsupportedModelError(
                f"the tokenizer of {self.model_name} can't tell where a text is: choose tokens by index."
            )
        special = self.template.adds_special(text)
        spans = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True).offset_mapping
        return tokens_over([tuple(span) for span in spans], at, at + len(part))

    def _states(self, prompts: Sequence[Sequence[int]], take: Callable[[Any, Any, Any], Any]) -> np.ndarray:
        """The states of prompts. take: returns (n_prompts, n_embd) from a layer's output, the prompts' rows
        and their last tokens."""
        lengths = torch.tensor([len(ids) for ids in prompts])
        self._check_lengths(lengths)
        # Padded on the right, after the last token: with causal attention nothing before it can change, and
        # positions count from 0 whatever the tokenizer's padding side.
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        states = np.empty((len(prompts), self.n_layer, self.n_embd), dtype=np.float32)
        rows, last = torch.arange(len(prompts)), lengths - 1

        def keep(layer: int, hidden: Any) -> None:
            states[:, layer] = take(hidden, rows, last).cpu().numpy()

        with torch.inference_mode(), observe_layers(self.model, keep):
            # the inner model: logits of every token would be computed for nothing
            self.model.base_model(
                input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            )
        return states

    def _check_lengths(self, lengths: Any) -> None:
        longest = int(lengths.max())
        if int(lengths.min()) == 0:
            raise PromptError("a prompt has no tokens")
        if self.n_ctx is not None and longest > self.n_ctx:
            raise PromptError(f"a prompt of {longest} tokens is longer than the model's {self.n_ctx}")

    def close(self) -> None:
        """Release the weights."""
        self.model = None

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers in order, found by their number: a list of modules as long as the model is deep.

    Raises UnsupportedModelError if there is none, or if the model is not a decoder.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder: only decoders can be steered"
        )
    n_layer = config.get_text_config(decoder=True).num_hidden_layers
    # A vision model has a second stack, which can be as deep: take the decoder's
    parts = [getattr(model, "get_decoder", lambda: None)(), model]
    lists = next(filter(None, (_lists(part, n_layer) for part in parts if part is not None)), None)
    if not lists:
        raise UnsupportedModelError(f"{config.model_type}: no list of {n_layer} decoder layers in the model")
    # A mixture with as many experts as layers has such lists inside its layers: take the larger one
    return list(max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters())))


def _lists(part: Any, n: int) -> list[Any]:
    """The lists of this many modules in a part of a model."""
    return [
        module for module in part.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == n
    ]


def layer_output(output: Any) -> Any:
    """The hidden state (batch, n_tokens, n_embd) in the return value of a decoder layer.

    Raises UnsupportedModelError for a model that keeps several side by side.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.ndim != 3:
        raise UnsupportedModelError(
            "the layers of this model give several residual streams for each token: it can't be read or "
            "steered here."
        )
    return hidden


@contextmanager
def observe_layers(model: Any, see: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `see(layer, hidden)` with the output of each decoder layer: the residual stream after it.

    The hidden_states of transformers end with the state after the final norm, which is not the last layer's
    output.
    """
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: see(layer, layer_output(output))
        )
        for layer, module in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def config_architecture(config: Any) -> str | None:
    """llama.cpp's name for the architecture of a checkpoint. Its converter writes a hybrid Granite without
    recurrent layers as a plain one, and has two names for Nemotron-H."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if config.model_type == "granitemoehybrid" and kinds and kinds <= {"attention", "full_attention"}:
        return "granitemoe" if getattr(config, "num_experts_per_tok", None) else "granite"
    if config.model_type == "nemotron_h" and "moe" in kinds:
        return "nemotron_h_moe"
    for name in getattr(config, "architectures", None) or ():
        if name in GGUF_OF_CLASSES:
            return GGUF_OF_CLASSES[name]
    return gguf_architecture(config.model_type)


def gguf_architecture(model_type: str) -> str | None:
    """llama.cpp's name for an architecture, or None if it is not known here."""
    if model_type in GGUF_ARCHITECTURES:
        return GGUF_ARCHITECTURES[model_type]
    return model_type if model_type in (*gguf.MODEL_ARCH_NAMES.values(), *NEWER) else None


def _device(name: str | None) -> Any:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)  # reports what this build or machine lacks before the model is loaded
    except Exception as error:  # every backend of torch raises its own type of error
        raise LocalsteerError(
            f"device {name!r} can't be used ({one_line(error)}): use cpu, or leave it out."
        ) from error
    return device


def _dtype(name: str, device: Any) -> Any:
    if name not in DTYPES:
        raise LocalsteerError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def _load_model(source: str, dtype: Any) -> Any:
    config = _load(transformers.AutoConfig, source)
    # transformers renamed the argument in version 5
    options = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}
    if caps_attention(config):
        options["attn_implementation"] = "eager"
    model = _load(transformers.AutoModelForCausalLM, source, **options)
    decoder_layers(model)
    return model


def caps_attention(config: Any) -> bool:
    """Whether a model caps its attention logits, which only the "eager" implementation does."""
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def _load(kind: Any, source: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # the folder may be anything, and transformers raises almost any type of error
        folder = "" if Path(source).is_dir() else ", which is not a folder here"
        raise ModelFileError(f"transformers can't load {source}{folder}: {one_line(error)}") from error


def _template(tokenizer: Any) -> ChatTemplate:
    text = tokenizer.chat_template
    if isinstance(text, dict):  # several, by name
        text = text.get("default")
    return ChatTemplate(text, tokenizer.bos_token or "", tokenizer.eos_token or "")


def _source_hash(source: str, config: Any) -> str:
    """A folder: sha256 over its weight files' names and hashes. A name on the hub: its commit."""
    folder = Path(source)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or source)
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()
