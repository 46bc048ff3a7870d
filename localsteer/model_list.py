"""The models that go by a name (model_names.py), as the headers of their files describe them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf

from . import __version__, bundled
from .convert.gguf_file import GgufFile, open_gguf
from .errors import LocalsteerError
from .model_names import BUNDLED, NAMES, PACKAGED, not_installed, packaged_file
from .packs import match_quietly


@dataclass(frozen=True)
class Shape:
    """What a header tells. quantization: by llama.cpp's name, None where the file does not say."""

    quantization: str | None
    architecture: str
    n_layer: int
    n_embd: int
    chat_template: bool


@dataclass(frozen=True)
class NamedModel:
    """One model. source: the package that it comes from, with its version. path: of its GGUF, also where that
    is yet to be made. size: bytes, None while there is no file. note: what keeps it from being used at once.
    pack: how many instructions have a vector that ships for it (packs/).
    """

    name: str
    source: str
    licence: str
    path: Path | None
    size: int | None
    shape: Shape | None
    note: str = ""
    pack: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shape = asdict(self.shape) if self.shape else dict.fromkeys(Shape.__dataclass_fields__)
        head = {"name": self.name, "from": self.source, "path": str(self.path) if self.path else None}
        return (
            head
            | {"size": self.size}
            | shape
            | {"licence": self.licence, "pack": self.pack, "note": self.note or None}
        )


def named_models() -> list[NamedModel]:
    """All of them, in the order of model_names.NAMES. No weights are read, and nothing is made."""
    return [_bundled(name) if name in BUNDLED else _packaged(name) for name in NAMES]


def read_shape(path: Path) -> Shape:
    """Raises VectorFileError for a file that is no GGUF or is cut short inside its header."""
    with open_gguf(path) as file:
        return _shape(file)


def _shape(file: GgufFile) -> Shape:
    # gguf.GGUFReader takes some seconds for a vocabulary of 50,000 tokens
    values = {key: entry.value for key, entry in file.keys.items()}
    architecture = str(values.get("general.architecture"))
    return Shape(
        quantization=_file_type(values.get("general.file_type")),
        architecture=architecture,
        n_layer=file.get(f"{architecture}.block_count", gguf.GGUFValueType.UINT32) or 0,
        n_embd=file.get(f"{architecture}.embedding_length", gguf.GGUFValueType.UINT32) or 0,
        chat_template="tokenizer.chat_template" in values,
    )


def _file_type(number: Any) -> str | None:
    """`Q4_1` of 3, which gguf calls MOSTLY_Q4_1."""
    try:
        return gguf.LlamaFileType(number).name.partition("_")[2]
    except (ValueError, TypeError):  # an unknown number, or none
        return None


def _packaged(name: str) -> NamedModel:
    packaged, path = PACKAGED[name], packaged_file(name)
    source, licence = packaged.distribution, packaged.licence
    if path is None:
        return NamedModel(name, source, licence, None, None, None, not_installed(name))
    return _of_file(name, _with_version(source), licence, path)


def _with_version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:  # a copied folder
        return distribution


def _bundled(name: str) -> NamedModel:
    head = {"name": name, "source": f"localsteer {__version__}", "licence": "MIT"}
    try:
        checkpoint = bundled.checkpoint_folder(BUNDLED[name])
    except LocalsteerError:
        return NamedModel(**head, path=None, size=None, shape=None, note="this copy comes without it")
    path = bundled.cached_path(checkpoint, BUNDLED[name])
    if path.is_file():
        return _of_file(**head, path=path)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    template = (checkpoint / "chat_template.jinja").is_file()
    return NamedModel(
        **head, path=path, size=None, shape=_shape_of_config(config, template), note="made at first use"
    )


def _of_file(name: str, source: str, licence: str, path: Path) -> NamedModel:
    size = path.stat().st_size
    try:
        shape = read_shape(path)
        found = match_quietly(path)
        n_shipped = len(found.pack.instructions) if found else 0
        return NamedModel(name, source, licence, path, size, shape, pack=n_shipped)
    except LocalsteerError as error:
        return NamedModel(name, source, licence, path, size, None, str(error))


def _shape_of_config(config: Mapping[str, Any], chat_template: bool) -> Shape:
    """What the GGUF will say that is made of a bundled checkpoint."""
    return Shape(
        quantization=bundled.DEFAULT_QUANT,
        architecture=config["model_type"],
        n_layer=config["num_hidden_layers"],
        n_embd=config["hidden_size"],
        chat_template=chat_template,
    )
