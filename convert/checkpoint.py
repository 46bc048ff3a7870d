"""A transformers checkpoint becomes a GGUF file: numpy and gguf alone, no torch.

Names, layouts and metadata are those of llama.cpp's convert_hf_to_gguf.py, for four decoder-only
architectures: llama, qwen2, gemma2, phi3. What llama.cpp would compute differently from transformers is
refused, never approximated.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.utility import LocalTensor, SafetensorsLocal

from localsteer.cache import temporary_beside
from localsteer.errors import ModelFileError, UnsupportedModelError

from .checkpoint_vocab import read_json, read_vocabulary
from .keys import MAX_LAYERS
from .write import checked

FTYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
SAFETENSORS_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# What gguf's reader raises on a file that is cut short or is something else
DAMAGED = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, MemoryError, OverflowError,
    RecursionError,
)  # fmt: skip
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


@dataclass(frozen=True)
class Architecture:
    """What differs between the architectures, as llama.cpp hard-codes it."""

    arch: gguf.MODEL_ARCH
    layer_tensors: str  # GGUF names that every layer must have
    activation: str = "silu"
    tied: bool = False  # tie_word_embeddings where config.json leaves it out
    interleaved_rope: bool = False  # llama.cpp rotates (2i, 2i+1), transformers (i, i + d/2)
    norm_offset: float = 0.0  # transformers multiplies by (1 + weight), llama.cpp by the weight


_ATTENTION_AND_MLP = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, _ATTENTION_AND_MLP, interleaved_rope=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _ATTENTION_AND_MLP),
    "gemma2": Architecture(
        gguf.MODEL_ARCH.GEMMA2, _ATTENTION_AND_MLP + " post_attention_norm post_ffw_norm",
        activation="gelu_pytorch_tanh", tied=True, norm_offset=1.0,
    ),
    "phi3": Architecture(gguf.MODEL_ARCH.PHI3, "attn_norm attn_qkv attn_output ffn_norm ffn_up ffn_down"),
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose config.json was read and found convertible."""

    directory: Path
    config: Mapping[str, Any]
    kind: Architecture

    @property
    def n_layer(self) -> int:
        n_layer = self.integer("num_hidden_layers")
        if n_layer > MAX_LAYERS:
            raise self._bad("num_hidden_layers", n_layer, f"at most {MAX_LAYERS}")
        return n_layer

    @property
    def n_head(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def n_head_kv(self) -> int:
        return self.integer("num_key_value_heads", self.n_head)

    @property
    def head_dim(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // self.n_head)

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary settings under their names of transformers 5, whatever version wrote the file."""
        stored = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(stored, dict):
            raise self._bad("rope_parameters (or rope_scaling)", stored, "an object")
        kind = stored.get("rope_type", stored.get("type", "default"))
        theta = stored.get("rope_theta", self.config.get("rope_theta", 10000.0))
        partial = stored.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        return {**stored, "rope_type": kind, "rope_theta": theta, "partial_rotary_factor": partial}

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", self.kind.tied))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._bad(key, value, "a positive integer of 32 bits")
        return value

    def number(self, key: str, settings: Mapping[str, Any] | None = None) -> float:
        """A number of config.json, or of `settings`, one of its tables."""
        value = (self.config if settings is None else settings).get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def _bad(self, key: str, value: Any, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self.directory / 'config.json'}: {key} is {value!r:.80}, expected {expected}"
        )


@dataclass(frozen=True)
class Weight:
    """One tensor of the GGUF: where it comes from and how it is stored."""

    name: str
    source: str  # its name in the checkpoint, for messages
    tensor: LocalTensor
    dtype: gguf.GGMLQuantizationType


def checkpoint_to_gguf(
    checkpoint_dir: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    ftype: str = "F32",
    *,
    name: str | None = None,
) -> Path:
    """Write `checkpoint_dir` (config.json, safetensors, tokenizer.json) as a GGUF file at `out_path`.

    The file appears whole or not at all, and the same checkpoint gives the same bytes. `name` is stored as
    general.name (default: the folder's name). One tensor at a time is in memory. Matrices are stored as
    `ftype`, vectors always as F32, as llama.cpp expects.

    Raises ModelFileError (missing, truncated or damaged file) and UnsupportedModelError (something that
    llama.cpp would compute differently).
    """
    if ftype not in FTYPES:
        raise ModelFileError(f"unknown type {ftype!r} for a converted model: use one of {', '.join(FTYPES)}")
    checkpoint = read_checkpoint(Path(checkpoint_dir))
    weights = _weights(checkpoint, FTYPES[ftype][0])
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[checkpoint.kind.arch])
    _add_general(writer, checkpoint, weights, ftype, name)
    _add_hparams(writer, checkpoint)
    read_vocabulary(checkpoint.directory, checkpoint.integer("vocab_size")).write(writer)
    _write(writer, checkpoint, weights, Path(out_path))
    return Path(out_path)


def read_checkpoint(directory: Path) -> Checkpoint:
    """The folder's config.json, refused unless llama.cpp computes the same function from it."""
    config = read_json(directory / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{directory}: architecture {model_type!r} can't be converted here "
            f"({', '.join(ARCHITECTURES)} can): use llama.cpp's convert_hf_to_gguf.py"
        )
    checkpoint = Checkpoint(directory, config, ARCHITECTURES[model_type])
    for reason in _differences(checkpoint):
        raise UnsupportedModelError(f"{directory}: {reason}, which llama.cpp does not compute")
    return checkpoint


def _differences(checkpoint: Checkpoint) -> Iterator[str]:
    config, kind = checkpoint.config, checkpoint.kind
    if config.get("quantization_config"):
        yield "the checkpoint is quantized already (quantization_config)"
    activation = config.get("hidden_activation") or config.get("hidden_act") or kind.activation
    if activation != kind.activation:
        yield f"activation {activation!r}"
    allowed = ("default", "linear", "llama3") if kind.arch == gguf.MODEL_ARCH.LLAMA else ("default", "linear")
    if checkpoint.rope["rope_type"] not in allowed:
        yield f"rotary scaling {checkpoint.rope['rope_type']!r} (for this architecture, here)"
    if kind.arch != gguf.MODEL_ARCH.PHI3 and checkpoint.rope["partial_rotary_factor"] != 1.0:
        yield "partial_rotary_factor"
    if config.get("use_sliding_window"):
        yield "use_sliding_window"
    if kind.arch == gguf.MODEL_ARCH.GEMMA2:
        yield from _gemma2_differences(checkpoint)


def _gemma2_differences(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    n_layer, head_dim = checkpoint.n_layer, checkpoint.head_dim
    # llama.cpp takes 46 layers for the 27B model, the only one scaled by hidden_size / heads
    scale = config.get("hidden_size", 0) // checkpoint.n_head if n_layer == 46 else head_dim
    if config.get("query_pre_attn_scalar", scale) != scale:
        yield f"query_pre_attn_scalar {config['query_pre_attn_scalar']}"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key, True) is None:
            yield f"no {key}"
    pattern = ["sliding_attention" if il % 2 == 0 else "full_attention" for il in range(n_layer)]
    if config.get("layer_types", pattern) != pattern:
        yield "layer_types that do not alternate"
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention"


def _add_general(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, weights: list[Weight], ftype: str, name: str | None
) -> None:
    n_params = sum(math.prod(weight.tensor.shape) for weight in weights)
    writer.add_type(gguf.GGUFType.MODEL)
    name = name or checkpoint.directory.resolve().name
    # llama.cpp strips spaces after special tokens in any model whose name says Phi-3 (and fails to load one
    # without that model's tokens); a tokenizer that does so has been refused
    writer.add_name(re.sub(r"(?i)phi-?3", "phi 3", name))
    writer.add_size_label(gguf.size_label(n_params, 0, 0, 0))
    writer.add_file_type(FTYPES[ftype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_hparams(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    n_embd, n_head = checkpoint.integer("hidden_size"), checkpoint.n_head
    writer.add_block_count(checkpoint.n_layer)
    writer.add_context_length(checkpoint.integer("max_position_embeddings"))
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(checkpoint.integer("intermediate_size"))
    writer.add_head_count(n_head)
    writer.add_head_count_kv(checkpoint.n_head_kv)
    writer.add_layer_norm_rms_eps(checkpoint.number("rms_norm_eps"))
    writer.add_vocab_size(checkpoint.integer("vocab_size"))
    writer.add_key_length(checkpoint.head_dim)
    writer.add_value_length(checkpoint.head_dim)
    rotated = checkpoint.number("partial_rotary_factor", checkpoint.rope)
    writer.add_rope_dimension_count(int(rotated * checkpoint.head_dim))
    writer.add_rope_freq_base(checkpoint.number("rope_theta", checkpoint.rope))
    if checkpoint.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(checkpoint.number("factor", checkpoint.rope))
    if checkpoint.kind.arch == gguf.MODEL_ARCH.GEMMA2:
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **checkpoint.config}
        writer.add_attn_logit_softcapping(checkpoint.number("attn_logit_softcapping", caps))
        writer.add_final_logit_softcapping(checkpoint.number("final_logit_softcapping", caps))
        writer.add_sliding_window(checkpoint.integer("sliding_window", 4096))
    if checkpoint.kind.arch == gguf.MODEL_ARCH.PHI3:
        writer.add_rope_scaling_orig_ctx_len(checkpoint.integer("original_max_position_embeddings", 4096))
        has_window = checkpoint.config.get("sliding_window")
        writer.add_sliding_window(checkpoint.integer("sliding_window") if has_window else 0)


def _weights(checkpoint: Checkpoint, matrix_type: gguf.GGMLQuantizationType) -> list[Weight]:
    """Every tensor under its GGUF name, in layer order; unknown and missing ones are errors."""
    names = gguf.get_tensor_name_map(checkpoint.kind.arch, checkpoint.n_layer)
    weights = []
    for source, tensor in sorted(_stored_tensors(checkpoint.directory).items(), key=_natural):
        if source.endswith(NOT_WEIGHTS) or (checkpoint.tied and source == "lm_head.weight"):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"{checkpoint.directory}: llama.cpp has no place for {source}")
        dtype = matrix_type if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        weights.append(Weight(name, source, tensor, dtype))
    _check_complete(checkpoint, {weight.name: weight for weight in weights})
    return weights


def _natural(item: tuple[str, Any]) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def _check_complete(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> None:
    wanted = ["token_embd.weight", "output_norm.weight"] + ([] if checkpoint.tied else ["output.weight"])
    for il in range(checkpoint.n_layer):
        wanted += [f"blk.{il}.{tensor}.weight" for tensor in checkpoint.kind.layer_tensors.split()]
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ModelFileError(
            f"{checkpoint.directory} lacks {len(missing)} tensors, the first is {missing[0]}"
        )
    # before tokens are made up for all the rows that config.json claims
    n_rows, n_vocab = weights["token_embd.weight"].tensor.shape[0], checkpoint.integer("vocab_size")
    if n_rows != n_vocab:
        raise ModelFileError(
            f"{checkpoint.directory}: config.json says vocab_size {n_vocab}, the weights have {n_rows} rows"
        )


def _stored_tensors(directory: Path) -> dict[str, LocalTensor]:
    index = directory / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ModelFileError(f"{index} can't be read: expected a weight_map of file names")
        shards = sorted(set(weight_map.values()))
    tensors: dict[str, LocalTensor] = {}
    for shard in shards:
        tensors.update(_read_safetensors(directory / shard))
    return tensors


def _read_safetensors(path: Path) -> dict[str, LocalTensor]:
    """Where the tensors of a safetensors file are; each lies inside it and is as long as its shape says."""
    try:
        tensors = SafetensorsLocal(path).tensors
        for name, tensor in tensors.items():
            if tensor.dtype not in SAFETENSORS_DTYPES:
                raise UnsupportedModelError(f"{path}: {name} is {tensor.dtype}; F32, F16 and BF16 are read")
            if not _lies_inside(tensor, path.stat().st_size):
                raise ModelFileError(f"{path} is truncated or damaged at {name}: copy the checkpoint again")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path.parent} holds no {path.name}: only safetensors can be read") from error
    except DAMAGED as error:
        raise ModelFileError(f"{path} is not a whole safetensors file: {error!r}") from error
    return tensors


def _lies_inside(tensor: LocalTensor, file_size: int) -> bool:
    place = tensor.data_range
    n_bytes = math.prod(tensor.shape) * np.dtype(SAFETENSORS_DTYPES[tensor.dtype]).itemsize
    return 0 < place.size == n_bytes and 0 < place.offset <= file_size - place.size


def _write(writer: gguf.GGUFWriter, checkpoint: Checkpoint, weights: list[Weight], out_path: Path) -> None:
    extra = _rope_factors(checkpoint)
    for weight in weights:
        n_bytes = math.prod(weight.tensor.shape) * (4 if weight.dtype == gguf.GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(weight.name, weight.tensor.shape, np.dtype(np.float32), n_bytes, weight.dtype)
    if extra is not None:
        writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
    try:
        with temporary_beside(out_path) as part:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for weight in weights:
                writer.write_tensor_data(checked(_stored_form(checkpoint, weight)))
            if extra is not None:
                writer.write_tensor_data(checked(extra))
            writer.close()
            os.replace(part, out_path)
    except OSError as error:
        raise ModelFileError(f"can't write {out_path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def _stored_form(checkpoint: Checkpoint, weight: Weight) -> np.ndarray:
    """The tensor as the GGUF holds it: layout and offset of llama.cpp, element type of the file."""
    values = _float32(weight.tensor)
    kind = checkpoint.kind
    if kind.norm_offset and weight.source.endswith("norm.weight"):
        values = values + np.float32(kind.norm_offset)
    if kind.interleaved_rope and ".q_proj." in weight.source:
        values = _interleave(values, checkpoint.n_head)
    if kind.interleaved_rope and ".k_proj." in weight.source:
        values = _interleave(values, checkpoint.n_head_kv)
    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(values, weight.dtype)
    finite = np.isfinite(stored if weight.dtype == gguf.GGMLQuantizationType.F16 else values)
    if not finite.all():
        raise ModelFileError(
            f"{checkpoint.directory}: {weight.source} holds values that are not finite as {weight.dtype.name}"
        )
    return stored


def _float32(tensor: LocalTensor) -> np.ndarray:
    values = tensor.mmap_bytes().view(SAFETENSORS_DTYPES[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.array(values, dtype=np.float32)


def _interleave(values: np.ndarray, n_head: int) -> np.ndarray:
    """Rows (i, i + d/2) of each head become rows (2i, 2i + 1), the pairs that llama.cpp rotates."""
    if values.shape[0] % (2 * n_head):
        raise ModelFileError(
            f"an attention projection of {values.shape[0]} rows does not make {n_head} heads"
        )
    halves = values.reshape(n_head, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _rope_factors(checkpoint: Checkpoint) -> np.ndarray | None:
    """Llama 3's frequency divisors, (head_dim / 2,) float32; None where rotary frequencies are plain.

    Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    rope = checkpoint.rope
    if rope["rope_type"] != "llama3":
        return None
    keys = ("rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    theta, n_ctx, low, high, factor = (checkpoint.number(key, rope) for key in keys)
    dim = checkpoint.head_dim
    turns = n_ctx / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
