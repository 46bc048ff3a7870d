"""The bundled models: small checkpoints inside the package, and their GGUF files, made at first use.

`gguf_path("instruct", "Q4_K_M")` is all that most callers need. The files lie in the user's cache under the
hash of what they were made from, so that another checkpoint, converter or llama.cpp never meets an old one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .cache import atomic_path, is_intact, is_sealed, model_path, seal
from .errors import LocalsteerError, ModelFileError

logger = logging.getLogger("localsteer")

MODELS = ("instruct", "base")
CATALOG = "bundled"  # the catalogue of the instructions that the instruct model was trained on
DEFAULT_QUANT = "Q8_0"
# what the GGUF depends on; a checkpoint may lack the ones after the first three
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
N_REQUIRED = 3
_HASH_CHARS = 12


def checkpoint_folder(name: str = "instruct", *, folder: str | os.PathLike[str] | None = None) -> Path:
    """The transformers checkpoint of a bundled model, or `folder` in its place, found complete.

    Raises ModelFileError for an unknown name and for a folder that lacks a file.
    """
    if name not in MODELS:
        raise ModelFileError(f"unknown bundled model {name!r}: choose one of {', '.join(MODELS)}.")
    checkpoint = Path(folder) if folder is not None else Path(__file__).parent / "models" / name
    for required in CHECKPOINT_FILES[:N_REQUIRED]:
        if not (checkpoint / required).is_file():
            raise ModelFileError(f"{checkpoint} holds no {required}: install localsteer again.")
    return checkpoint


def is_available(name: str = "instruct") -> bool:
    """Whether this copy of the package holds the model (a bare checkout may come without it)."""
    try:
        checkpoint_folder(name)
    except ModelFileError:
        return False
    return True


def gguf_path(
    name: str = "instruct",
    quant: str = DEFAULT_QUANT,
    *,
    folder: str | os.PathLike[str] | None = None,
    on_making: Callable[[str], None] | None = None,
) -> Path:
    """The GGUF of a bundled model, converted and quantized now unless an earlier call did it.

    quant: F32, F16, BF16 or any name that llama.cpp's quantization knows (Q8_0, Q4_K_M, ...). folder: another
    checkpoint in the model's place. on_making: told in one line that a file is being made. A kept file that
    is not what was written is made again; a notice says so.
    Raises ModelFileError; LocalsteerError when the cache folder can't be written.
    """
    quant = quant.upper()
    checkpoint = checkpoint_folder(name, folder=folder)
    _check_quant(quant)
    path = cached_path(checkpoint, name, quant)
    if is_intact(path):
        return path
    if path.exists() and not path.is_file():
        raise LocalsteerError(f"{path} is not a file: delete it, and it is made again.")
    if path.is_file() and is_sealed(path):
        say = on_making or logger.warning
        say(f"the cached {path.name} is damaged: making it again from the bundled checkpoint")
    elif on_making:
        on_making(f"making {path.name} from the bundled checkpoint")
    _make(checkpoint, path, quant, f"localsteer-{name}")
    return path


def cached_path(checkpoint: Path, name: str, quant: str = DEFAULT_QUANT) -> Path:
    """Where the GGUF of a checkpoint lies once it is made."""
    return model_path(f"localsteer-{name}-{checkpoint_hash(checkpoint)}-{quant.lower()}")


def checkpoint_hash(checkpoint: Path) -> str:
    """Of every byte that a GGUF depends on: the checkpoint's files, our version and llama.cpp's.

    The weights are read each time (12 MB): a memory by size and time could miss a retrained model.
    """
    digest = hashlib.sha256(f"{__version__} {importlib.metadata.version('llama-cpp-python')}".encode())
    for name in CHECKPOINT_FILES:
        path = checkpoint / name
        if path.is_file():
            digest.update(f"\n{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:_HASH_CHARS]


def _check_quant(quant: str) -> None:
    from localsteer.convert.checkpoint import FTYPES

    from .runtime.bridge import quantization_types

    known = {*FTYPES, *quantization_types()}
    if quant not in known:
        raise ModelFileError(f"unknown quantization {quant!r}: one of {', '.join(sorted(known))}.")


def _make(checkpoint: Path, path: Path, quant: str, name: str) -> None:
    """Write one GGUF and its seal. A second process that does the same at once writes the same bytes."""
    from localsteer.convert.checkpoint import FTYPES, checkpoint_to_gguf

    from .runtime.bridge import quantize

    with atomic_path(path) as temporary:
        if quant in FTYPES:
            checkpoint_to_gguf(checkpoint, temporary, quant, name=name)
        else:
            with tempfile.TemporaryDirectory() as folder:
                full = checkpoint_to_gguf(checkpoint, Path(folder) / "full.gguf", "F32", name=name)
                quantize(full, temporary, quant, trusted=True)
    seal(path)
