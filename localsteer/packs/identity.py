"""What makes two GGUF files the same model, whatever their quantization.

Quantization leaves every one-dimensional tensor (norms and biases) unchanged in F32, and training moves them,
so their bytes are equal in all files of one model and differ between models. They can't reveal a fine-tune
whose adapters were merged only into the matrices, which is why a notice says when a file is not the measured
one. A quantizer that folds scales into the norms (AWQ) makes another model by this measure.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localsteer.jsonable import JsonObject

if TYPE_CHECKING:
    from localsteer.convert.gguf_file import GgufFile

REMEMBERED = "identity 1"  # in the cache's index; another number where the computation changes
KEPT = ("norm.weight", ".bias")  # how the names of such tensors end; rope_freqs are the converter's


@dataclass(frozen=True)
class Identity:
    """tokenizer: sha256 of the vocabulary. weights: sha256 of norms and biases, empty where there is none."""

    architecture: str
    n_layer: int
    n_embd: int
    tokenizer: str
    weights: str

    @property
    def shown(self) -> str:
        return f"{self.architecture}, {self.n_layer} layers x {self.n_embd}"


def identity_of(path: str | os.PathLike[str]) -> Identity:
    """Of a model file; read once, then remembered like its hash. No engine, a second at most.

    Raises VectorFileError for a file that is not a GGUF, ModelFileError for one that can't be read.
    """
    from localsteer.cache import remembered

    text = remembered(path, REMEMBERED, lambda file: json.dumps(asdict(read_identity(file))))
    return Identity(**json.loads(text))


def read_identity(path: Path) -> Identity:
    from gguf import GGUFValueType

    from localsteer.convert.gguf_file import open_gguf

    with open_gguf(path) as file:
        values = {key: entry.value for key, entry in file.keys.items()}
        architecture = str(values.get("general.architecture"))
        return Identity(
            architecture=architecture,
            n_layer=file.get(f"{architecture}.block_count", GGUFValueType.UINT32) or 0,
            n_embd=file.get(f"{architecture}.embedding_length", GGUFValueType.UINT32) or 0,
            tokenizer=_tokenizer(values),
            weights=_weights(file),
        )


def _tokenizer(values: JsonObject) -> str:
    digest = hashlib.sha256()
    for key in ("model", "pre", "tokens"):
        digest.update(json.dumps(values.get(f"tokenizer.ggml.{key}"), default=str).encode())
    return digest.hexdigest()


def _weights(file: GgufFile) -> str:
    from gguf import GGMLQuantizationType

    names = [
        name
        for name, info in sorted(file.tensors.items())
        if name.endswith(KEPT) and len(info.shape) == 1 and info.type == GGMLQuantizationType.F32
    ]
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(file.f32(name).tobytes())
    return digest.hexdigest() if names else ""
