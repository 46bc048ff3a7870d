"""Packs: vectors that ship for the models that could be measured, with their figures (docs/packs.md).

    match = pack_for("model.gguf")
    if match and "json" in match.pack.instructions:
        vector = match.pack.vector("json")

A pack is a folder named after the published model. It holds pack.json, which says from which file it was made
and how well each vector does, and one control-vector file for each instruction. LOCALSTEER_PACKS=off switches
packs off; LOCALSTEER_PACKS=FOLDER names a folder of packs that take precedence over the shipped ones, or one
pack, which is then refused for every other model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError, MismatchError, VectorFileError
from localsteer.jsonable import JsonObject

if TYPE_CHECKING:
    from localsteer.vector import ControlVector

    from .identity import Identity

__all__ = ["Entry", "Match", "Pack", "all_packs", "match", "pack_for", "read_pack"]

VARIABLE = "LOCALSTEER_PACKS"
OFF = "off"
FILE = "pack.json"
FORMAT = 1  # of pack.json; a reader refuses a newer one
_ADVICE = f"install localsteer again, or set {VARIABLE}={OFF}"


@dataclass(frozen=True)
class Entry:
    """One instruction of a pack. settings: layers, mode, positions and strength; strength 0 where nothing was
    found that helps. scores: shares of good replies, of the plain model (none), steered, instructed, and
    both; None where it was not asked. n: replies each. advice: what the user should know. sha256: of the
    file; None in a pack of an earlier version."""

    id: str
    file: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float | None]
    n: int
    advice: tuple[str, ...] = ()
    seconds: float | None = None
    sha256: str | None = None

    @property
    def helps(self) -> bool:
        return self.settings["strength"] != 0


@dataclass(frozen=True)
class Pack:
    """model: its published name. sha256, quantization: of the file that it was measured on. catalog: whose
    instructions these are. instructions: by id."""

    folder: Path
    model: str
    sha256: str
    quantization: str | None
    identity: Identity
    catalog: str
    licence: str
    instructions: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`SmolLM2-135M-Instruct, measured on its Q4_1 file`."""
        return f"{self.model}, measured on its {self.quantization or 'own'} file"

    def to_dict(self) -> JsonObject:
        """For JSON."""
        head = {key: getattr(self, key) for key in ("model", "sha256", "quantization", "catalog", "licence")}
        rows = {name: asdict(entry) for name, entry in self.instructions.items()}
        return {**head, "folder": str(self.folder), "instructions": rows}

    def vector(self, instruction_id: str) -> ControlVector:
        """Raises VectorFileError for a file that is missing or damaged."""
        from localsteer.vector import ControlVector

        path, expected = self.path(instruction_id), self.instructions[instruction_id].sha256
        try:
            vector = ControlVector.load(path)
            if expected not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
                raise VectorFileError(f"{path} is not the file that was measured.")
            return vector
        except VectorFileError as error:
            raise VectorFileError(f"the pack for {self.model} is damaged: {error} ({_ADVICE})") from None

    def path(self, instruction_id: str) -> Path:
        return self.folder / self.instructions[instruction_id].file


@dataclass(frozen=True)
class Match:
    """exact: the very file that the pack was measured on, not another quantization of the same model."""

    pack: Pack
    exact: bool


def pack_for(path: str | os.PathLike[str]) -> Match | None:
    """The pack for this model file, or None if there is none or packs are switched off.

    Raises MismatchError if LOCALSTEER_PACKS names the pack of another model, LocalsteerError for a damaged
    pack, ModelFileError for a model file that can't be read.
    """
    packs = all_packs()
    matching = match(path, packs) if packs else None
    named = named_folder()
    if matching is None and named is not None and (named / FILE).is_file():
        ours = read_pack(named)
        raise MismatchError(
            f"{VARIABLE}={named} is a pack for {ours.model} ({ours.identity.shown}), and "
            f"{Path(path).name} is a different model: name a folder of packs, or {VARIABLE}={OFF}."
        )
    return matching


def match_quietly(path: str | os.PathLike[str]) -> Match | None:
    """The same for listing models: a pack that is damaged or for another model is ignored."""
    try:
        return match(path, all_packs())
    except LocalsteerError:
        return None


def match(path: str | os.PathLike[str], packs: list[Pack]) -> Match | None:
    """A pack made from this very file, or otherwise from another quantization of the same model."""
    from localsteer.cache import file_hash

    from .identity import identity_of

    try:
        identity = identity_of(path)
    except VectorFileError:  # no GGUF: whoever opens it says so
        return None
    same = [pack for pack in packs if pack.identity == identity]
    if not same:
        return None  # before all of a large file is read for its hash
    digest = file_hash(path)
    exact = (Match(pack, exact=True) for pack in same if pack.sha256 == digest)
    return next(exact, Match(same[0], exact=False) if identity.weights else None)


def all_packs() -> list[Pack]:
    """Those that LOCALSTEER_PACKS names, then those that ship. Raises LocalsteerError."""
    if is_off():
        return []
    named = named_folder()
    own = [] if named is None else _packs_in(named)
    if named is not None and not own:
        raise LocalsteerError(f"{VARIABLE}={named} holds no pack: name a folder of packs, or {OFF}.")
    return own + _packs_in(Path(__file__).parent)


def is_off() -> bool:
    return os.environ.get(VARIABLE, "").strip().lower() == OFF


def named_folder() -> Path | None:
    """What LOCALSTEER_PACKS names."""
    text = os.environ.get(VARIABLE, "").strip()
    return Path(text) if text and not is_off() else None


def _packs_in(folder: Path) -> list[Pack]:
    """The folder itself if it is a pack, else the packs in it."""
    if (folder / FILE).is_file():
        return [read_pack(folder)]
    return [read_pack(path.parent) for path in sorted(folder.glob(f"*/{FILE}"))]


def read_pack(folder: str | os.PathLike[str]) -> Pack:
    """Raises LocalsteerError, one line, for whatever is wrong with its pack.json."""
    path = Path(folder) / FILE
    try:
        return _pack(path.parent, json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise LocalsteerError(f"{path} can't be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LocalsteerError(f"{path} is damaged ({what}): {_ADVICE}.") from None


def _pack(folder: Path, document: Mapping[str, Any]) -> Pack:
    from .identity import Identity

    if document["format"] > FORMAT:
        raise ValueError(f"format {document['format']}, newer than {FORMAT}")
    shape = document["shape"]
    return Pack(
        folder=folder,
        model=str(document["model"]),
        sha256=str(document["sha256"]),
        quantization=document.get("quantization"),
        identity=Identity(
            str(shape["architecture"]),
            int(shape["n_layer"]),
            int(shape["n_embd"]),
            str(document["tokenizer"]),
            str(document["weights"]),
        ),
        catalog=str(document["catalog"]),
        licence=str(document.get("licence", "")),
        instructions={name: _entry(name, row) for name, row in document["instructions"].items()},
    )


def _entry(name: str, row: Mapping[str, Any]) -> Entry:
    file, scores = row["file"], row["scores"]
    if Path(file).name != file:
        raise ValueError(f"{file!r} is no file of this folder")
    return Entry(
        id=name,
        file=file,
        settings={key: row[key] for key in ("layers", "mode", "positions", "strength")},
        scores={key: scores[key] for key in ("none", "steered", "instructed", "both")},
        n=int(row["n"]),
        advice=tuple(map(str, row.get("advice", ()))),
        seconds=row.get("seconds"),
        sha256=row.get("sha256"),
    )
