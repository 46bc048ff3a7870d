"""The models that have a name (model_names.py), as described by the headers of their files.

`all_models` adds those in the folders of other programs (stores/). Their headers are read only once, since a
vocabulary of 150,000 tokens takes some tenths of a second, and a folder may hold a hundred models.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf

from . import __version__, bundled
from .cache import remembered
from .convert import keys
from .convert.gguf_file import GgufFile, open_gguf
from .errors import LocalsteerError, ModelFileError
from .model_names import BUNDLED, NAMES, PACKAGED, not_installed, packaged_file
from .packs import Pack, all_packs, is_off, match_quietly
from .packs.identity import identity_of
from .runtime.limits import DEFAULT_N_CTX, POOL_BYTES
from .stores import StoredModel, everything, store_of, title_of
from .stores.ollama import PREFIX as OLLAMA

REMEMBERED = "shape 1"  # in the cache's index; another number where Shape or the checks change
# Whose graph has no l_out-N that is the whole residual stream of a layer, or that engines refuse for another
# reason: encoders, diffusion models, parts of other models. By src/models/ of the llama.cpp that is pinned
NOT_STEERED = {
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
    "eurobert", "t5", "t5encoder", "wavtokenizer-dec", "clip", "eagle3", "gemma4-assistant", "gemma3n",
    "plamo2", "deepseek4", "qwen4exp", "dream", "llada", "llada-moe", "rnd1", "qwen3tts", "pockettts",
}  # fmt: skip


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
    pack: how many instructions have a vector that ships for it (packs/). remark: what of it is left out, and
    how it is asked.
    """

    name: str
    source: str
    licence: str
    path: Path | None
    size: int | None
    shape: Shape | None
    note: str = ""
    pack: int = 0
    remark: str = ""

    @property
    def steers(self) -> bool | None:
        """Whether its architecture can be steered; None where that is not known."""
        if self.shape is None:
            return None
        architecture = self.shape.architecture
        if architecture in NOT_STEERED:
            return False
        return True if architecture in gguf.MODEL_ARCH_NAMES.values() else None

    def to_dict(self) -> dict[str, str | int | bool | None]:
        """For JSON: the fields, those of `shape` among them."""
        return {
            "name": self.name,
            "from": self.source,
            "path": str(self.path) if self.path else None,
            "size": self.size,
            **(asdict(self.shape) if self.shape else dict.fromkeys(Shape.__dataclass_fields__)),
            "steers": self.steers,
            "licence": self.licence,
            "pack": self.pack,
            "note": self.note or None,
            "remark": self.remark or None,
        }


@dataclass(frozen=True)
class Listing:
    """n_unread: models whose headers there was no time for."""

    models: list[NamedModel]
    n_unread: int = 0


def named_models() -> list[NamedModel]:
    """All of them, in the order of model_names.NAMES. No weights are read, and nothing is made."""
    return [_bundled(name) if name in BUNDLED else _packaged(name) for name in NAMES]


def all_models(seconds: float = math.inf) -> Listing:
    """Those and all of the stores. seconds: for headers that were never read before."""
    models, n_unread, ends = named_models(), 0, time.monotonic() + seconds
    for stored in everything():
        is_late = time.monotonic() > ends
        model = _of_store(stored, only_remembered=is_late)
        n_unread += is_late and model.shape is None and not model.note
        models.append(model)
    return Listing(models, n_unread)


def memory_needed(files: Sequence[Path], n_ctx: int, n_seq_max: int) -> int:
    """Bytes that an engine takes at most, about: its weights, and keys and values for all sequences.

    files: all parts. n_ctx: 0 for the default. An upper bound of the cache, as limits.pool_cells has it:
    grouped attention takes less. Raises LocalsteerError, OSError for a file that can't be read.
    """
    shape = read_shape(files[0])
    n_ctx = n_ctx or min(trained_context(files[0]) or DEFAULT_N_CTX, DEFAULT_N_CTX)
    cell = 4 * shape.n_layer * shape.n_embd  # two numbers of 16 bits
    cells = max(n_ctx, min(n_ctx * n_seq_max, POOL_BYTES // max(1, cell)))
    return sum(file.stat().st_size for file in files) + cells * cell


def trained_context(path: Path) -> int | None:
    """Tokens that a model was trained for, None where its header does not say."""
    try:
        with open_gguf(path) as file:
            architecture = file.get("general.architecture", gguf.GGUFValueType.STRING)
            entry = file.keys.get(f"{architecture}.context_length")
    except LocalsteerError:
        return None
    return entry.value if entry and isinstance(entry.value, int) and entry.value > 0 else None


def read_shape(path: Path) -> Shape:
    """Raises VectorFileError for a file that is not a GGUF or is cut short inside its header."""
    with open_gguf(path) as file:
        return _shape(file)


def _of_store(stored: StoredModel, *, only_remembered: bool) -> NamedModel:
    source = title_of(store_of(stored.name) or "")
    path = stored.files[0] if stored.files else None
    own = f"asked with its own {stored.asked.shown}" if stored.asked.shown else ""
    remark = "; ".join(filter(None, (stored.remark, own)))
    head = NamedModel(stored.name, source, "", path, stored.size, None, stored.fault, remark=remark)
    if stored.fault or path is None:
        return head
    shape, licence = None, ""
    for file in stored.files:
        try:
            told = json.loads(remembered(file, REMEMBERED, _unread if only_remembered else _header_text))
        except _Unread:
            return head
        except LocalsteerError as error:
            return replace(head, note=" ".join(str(error).replace(str(file), file.name).split()))
        if "error" in told:
            return replace(head, note=f"{file.name} {told['error']}")
        if shape is None:  # of a split model: the first part has the key-values
            shape, licence = Shape(**told["shape"]), told["licence"]
    if store_of(stored.name) == OLLAMA and shape and not shape.chat_template:
        remark = "; ".join(filter(None, (remark, "no chat template in its GGUF, and Ollama's is not used")))
    return replace(head, shape=shape, licence=licence, pack=_shipped(path, shape), remark=remark)


class _Unread(Exception):
    """A header that is not remembered, when there is no time for it."""


def _unread(path: Path) -> str:
    raise _Unread


def _header_text(path: Path) -> str:
    """What is remembered of a file. One that is damaged stays so until its size or time changes."""
    try:
        with open_gguf(path) as file:
            _check_whole(file, path.stat().st_size)
            licence = file.keys.get("general.license")
            shape = asdict(_shape(file))
    except LocalsteerError as error:
        return json.dumps({"error": " ".join(str(error).removeprefix(str(path)).split())})
    return json.dumps({"shape": shape, "licence": str(licence.value)[:40] if licence else ""})


def _check_whole(file: GgufFile, size: int) -> None:
    """Raises ModelFileError for a control vector, and for a file that ends before its tensors do."""
    if _text(file, "general.architecture") == keys.ARCHITECTURE:
        raise ModelFileError("is a control vector, not a model.")
    for name, info in file.tensors.items():
        group, n_bytes = gguf.GGML_QUANT_SIZES.get(info.type, (1, 0))
        end = info.offset + math.prod(info.shape) // group * n_bytes
        if end > size:
            raise ModelFileError(
                f"is truncated: tensor {name[:64]!r} ends at byte {end} of {size}. Copy or download it again."
            )


def _text(file: GgufFile, key: str) -> str:
    entry = file.keys.get(key)
    return entry.value if entry and isinstance(entry.value, str) else ""


def _shipped(path: Path, shape: Shape | None) -> int:
    """Instructions with a vector that ships. Only a file of a pack's own shape is looked at closely, and told
    by its tokenizer and norms: the sha256 that packs.match begins with would be of all its gigabytes."""
    if shape is None or is_off():
        return 0
    try:
        packs = all_packs()
    except LocalsteerError:
        return 0
    ours = (shape.architecture, shape.n_layer, shape.n_embd)
    alike = [pack for pack in packs if _shape_of_pack(pack) == ours]
    try:
        identity = identity_of(path) if alike else None
    except LocalsteerError:
        return 0
    fitting = (pack for pack in alike if identity and identity.weights and pack.identity == identity)
    return next((len(pack.instructions) for pack in fitting), 0)


def _shape_of_pack(pack: Pack) -> tuple[str, int, int]:
    return pack.identity.architecture, pack.identity.n_layer, pack.identity.n_embd


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
        match = match_quietly(path)
        n_shipped = len(match.pack.instructions) if match else 0
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
