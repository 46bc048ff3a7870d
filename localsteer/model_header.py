"""Checks what llama.cpp takes for granted about a model file, before it loads one.

    check_header("model.gguf")   # ModelFileError, one line, for a file that is damaged or hostile

llama.cpp asserts much of this (`GGML_ASSERT(hparams.n_layer_all > 0 ...)`), and a failed assertion ends the
process. Sources: llama-model.cpp (load_hparams), llama-vocab.cpp (load), llama-model-loader.cpp and gguf.cpp
of the pinned version. What llama.cpp refuses with an error is left to it. No such list is complete:
bridge/trial.py therefore loads a new file in a separate process.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from .convert import keys
from .convert.gguf_file import GgufFile
from .errors import ModelFileError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_HEADER = 1 << 28  # bytes; the largest vocabularies have some 20 MB
MAX_STRINGS = 1 << 23  # in all arrays of a header together
MAX_WIDTH = 1 << 20
MAX_HEADS = 1 << 16
MAX_CONTEXT = (1 << 31) - 1
MAX_VOCABULARY = 1 << 22
NO_TOKEN = 0xFFFFFFFF  # -1, as converters write it for a model without this token
N_POOLING_TYPES = 5  # enum llama_pooling_type, without UNSPECIFIED
ROPE_SCALING = ("none", "linear", "yarn", "longrope")
NO_VOCABULARY = ("no_vocab", "none")
_BYTE = 6  # enum llama_token_type
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
_ARRAY = GGUFValueType.ARRAY


class ModelHeader(GgufFile):
    """Arrays of strings are lists of bytes: llama.cpp takes any bytes in them. file_size: of the whole file,
    of which `data` is the beginning."""

    def __init__(self, path: str, data: Any, file_size: int) -> None:
        self.file_size = file_size
        self._n_strings = 0
        super().__init__(path, data)

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.path} {message}")

    def damaged(self, what: str) -> ModelFileError:
        return self.error(f"is damaged or hostile: {what}. Copy or download it again.")

    def _text(self, raw: bytes) -> str:
        return raw.decode("utf-8", "replace")

    def _texts(self, raws: list[bytes]) -> list[Any]:
        return raws

    def _strings(self, count: int) -> list[bytes]:
        self._n_strings += count
        if self._n_strings > MAX_STRINGS:
            raise self.damaged(f"its header claims more than {MAX_STRINGS} strings")
        return super()._strings(count)

    @property
    def length(self) -> int:
        """Bytes of all that comes before the padding and the data of the tensors."""
        return self._at

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def value(self, key: str) -> Any:
        """None where the key is absent."""
        entry = self.keys.get(key)
        return None if entry is None else entry.value

    def text(self, key: str) -> str:
        """Empty where the key is absent, or no string."""
        value = self.value(key)
        return value if isinstance(value, str) else ""

    def of_model(self, key: str) -> Any:
        """The value of `ARCHITECTURE.key`."""
        return self.value(f"{self.architecture}.{key}")

    def number(self, key: str) -> int | float | None:
        """A number of the model; None where the key is absent, an array, or of another type, which llama.cpp
        refuses by itself."""
        value = self.of_model(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def numbers(self, key: str) -> list[int]:
        """Of a key that may be one number for all layers or an array with one for each."""
        value = self.of_model(key)
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [] if self.number(key) is None else [value]

    def require(self, key: str, low: float, high: float) -> None:
        value = self.number(key)
        if value is not None and not low <= value <= high:
            raise self.damaged(f"{key} is {value} ({low} to {high})")


def check_header(path: str | os.PathLike[str]) -> int:
    """The length of the header in bytes, of which MAX_HEADER are read at most, once.

    Raises ModelFileError for whatever in it would have llama.cpp end the process, as far as is known.
    """
    shown = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelFileError(f"{shown} is empty: use a model in llama.cpp's format.")
            with mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
                header = ModelHeader(shown, data, size)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{shown} can't be read: {getattr(error, 'strerror', None) or error}.") from None
    if header.architecture == keys.ARCHITECTURE:
        raise ModelFileError(f"{shown} is a control vector: name a model here, and steer it by this file.")
    for check in (_sizes, _heads, _experts, _floats, _vocabulary, _tensors):
        check(header)
    return header.length


def _sizes(header: ModelHeader) -> None:
    header.require("block_count", 1, MAX_LAYERS)
    header.require("nextn_predict_layers", 0, header.number("block_count") or MAX_LAYERS)
    header.require("context_length", 1, MAX_CONTEXT)
    header.require("embedding_length", 1, MAX_WIDTH)
    header.require("vocab_size", 1, MAX_VOCABULARY)
    pooling = header.number("pooling_type")
    if pooling not in (None, NO_TOKEN, -1, *range(N_POOLING_TYPES)):
        raise header.damaged(f"pooling_type is {pooling} (0 to {N_POOLING_TYPES - 1})")
    scaling = header.of_model("rope.scaling.type")
    if isinstance(scaling, str) and scaling not in ROPE_SCALING:
        raise header.damaged(f"rope.scaling.type is {scaling[:40]!r} (one of {', '.join(ROPE_SCALING)})")


def _heads(header: ModelHeader) -> None:
    """0 heads are those of a layer without attention."""
    for key in ("attention.head_count", "attention.head_count_kv"):
        wrong = next((n for n in header.numbers(key) if not 0 <= n <= MAX_HEADS), None)
        if wrong is not None:
            raise header.damaged(f"{key} is {wrong} (0 to {MAX_HEADS})")
    n_embd, n_head = header.number("embedding_length"), header.number("attention.head_count")
    n_head_kv = header.number("attention.head_count_kv")
    key_length = header.number("attention.key_length")
    for key in ("attention.key_length", "attention.value_length"):
        header.require(key, 1 if n_head else 0, MAX_HEADS)
    if not n_head:
        return
    if n_head_kv is not None and (n_head_kv == 0 or n_head % n_head_kv):
        raise header.damaged(f"{n_head} heads can't share {n_head_kv} heads of keys and values")
    if n_embd and key_length is None and n_embd % n_head:
        raise header.damaged(f"a width of {n_embd} can't be split into {n_head} heads")
    n_rot = header.number("rope.dimension_count")
    length = key_length or (n_embd or 0) // n_head
    if n_rot is not None and length and not (0 <= n_rot <= length and n_rot % 2 == 0):
        raise header.damaged(f"rope.dimension_count is {n_rot}: an even number up to {length} is needed")


def _experts(header: ModelHeader) -> None:
    header.require("expert_count", 0, MAX_EXPERTS)
    n, used = header.number("expert_count") or 0, max(header.numbers("expert_used_count"), default=0)
    groups = header.number("expert_group_count") or 0
    groups_used = header.number("expert_group_used_count") or 0
    if header.architecture in ("hunyuan-vl", "hunyuan-dense", "hunyuan_vl") and n <= 1:
        return  # llama.cpp takes these for models without experts
    if used > n or (n and not used):
        raise header.damaged(f"it uses {used} of {n} experts")
    if groups and (groups >= n or (groups > 1 and (n % groups or not 0 < groups_used < groups))):
        raise header.damaged(f"it uses {groups_used} of {groups} groups of {n} experts")


def _floats(header: ModelHeader) -> None:
    prefix = f"{header.architecture}."
    for key, entry in header.keys.items():
        if not key.startswith(prefix) or not isinstance(entry.value, float):
            continue
        is_epsilon = key.endswith(("_epsilon", "_eps"))
        if not math.isfinite(entry.value) or (is_epsilon and entry.value < 0):
            raise header.damaged(f"{key} is {entry.value:g}")
        if key.endswith("layer_norm_rms_epsilon") and entry.value == 0:
            raise header.damaged(f"{key} is 0")


# --- the vocabulary ----------------------------------------------------------------------------------------


def _vocabulary(header: ModelHeader) -> None:
    if header.text("tokenizer.ggml.model") in ("", *NO_VOCABULARY):
        return
    tokens = _array(header, "tokens", GGUFValueType.STRING)
    if tokens is None:
        return  # llama.cpp says so
    if not tokens:
        raise header.damaged("its vocabulary is empty")
    types = _array(header, "token_type", GGUFValueType.INT32)
    scores = _array(header, "scores", GGUFValueType.FLOAT32, GGUFValueType.INT32)
    _array(header, "merges", GGUFValueType.STRING)
    for name, values in (("types", types), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise header.damaged(f"its vocabulary has {len(tokens)} tokens and {len(values)} {name}")
    if scores is not None and np.isnan(scores).any():
        raise header.damaged("a score of its vocabulary is not a number")
    _no_token_twice(header, tokens)
    _bytes_of(header, tokens, types)
    _special_tokens(header, len(tokens))


def _array(header: ModelHeader, name: str, *items: GGUFValueType) -> Any:
    key = f"tokenizer.ggml.{name}"
    entry = header.keys.get(key)
    if entry is None:
        return None
    if entry.type != _ARRAY or entry.item not in items:
        raise header.damaged(f"{key} has the wrong type")
    return entry.value


def _no_token_twice(header: ModelHeader, tokens: Sequence[bytes]) -> None:
    names = [text or b"[EMPTY_%d]" % i for i, text in enumerate(tokens)]  # as llama.cpp calls these
    if len(set(names)) < len(names):
        twice = next(text for text, n in Counter(names).items() if n > 1)
        raise header.damaged(f"its vocabulary has the token {_shown(twice)} more than once")


def _bytes_of(header: ModelHeader, tokens: Sequence[bytes], types: np.ndarray | None) -> None:
    """A token of a byte is `<0x41>`; a vocabulary of SentencePiece has all of them or none."""
    if types is None:
        return
    chosen = [tokens[i] for i in np.flatnonzero(types == _BYTE)]
    odd = next((text for text in chosen if not _BYTE_TOKEN.fullmatch(text)), None)
    if odd is not None:
        raise header.damaged(f"its vocabulary has the token {_shown(odd)} for a byte")
    if not chosen or header.text("tokenizer.ggml.model") != "llama":
        return
    known = set(tokens)
    unspelt = (b for b in range(256) if b"<0x%02X>" % b not in known and bytes([b]) not in known)
    missing = next(unspelt, None)
    if missing is not None:
        raise header.damaged(f"its vocabulary has no token for the byte <0x{missing:02X}>")


def _special_tokens(header: ModelHeader, n_tokens: int) -> None:
    """llama.cpp ignores others that are out of range: padding of a model that lacks it, for one."""
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = header.value(key)
        if isinstance(value, int) and value != NO_TOKEN and not 0 <= value < n_tokens:
            raise header.damaged(f"{key} is {value}, and its vocabulary has {n_tokens} tokens")


def _shown(raw: bytes) -> str:
    return repr(raw[:40].decode("utf-8", "replace"))


# --- the tensors -------------------------------------------------------------------------------------------


def _tensors(header: ModelHeader) -> None:
    sizes = {int(type_): size for type_, size in GGML_QUANT_SIZES.items()}
    for name, info in header.tensors.items():
        shape = "x".join(map(str, info.shape))
        if not all(1 <= n < 1 << 63 for n in info.shape):
            raise header.damaged(f"tensor {name[:64]!r} has the shape {shape}")
        if info.type not in sizes:
            continue  # of a newer llama.cpp than gguf's list: it says so itself
        group, n_bytes = sizes[info.type]
        width = info.shape[0] if info.shape else 1
        if width % group:
            type_name = GGMLQuantizationType(info.type).name
            raise header.damaged(f"tensor {name[:64]!r} of {type_name} has rows of {width} numbers")
        end = info.offset + math.prod(info.shape) // group * n_bytes
        if end > header.file_size:
            raise header.error(
                f"is truncated: tensor {name[:64]!r} ends at byte {end} of {header.file_size}. Copy or "
                "download it again."
            )
