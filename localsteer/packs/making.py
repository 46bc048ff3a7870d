"""Makes a pack: one compact vector file for each instruction, and pack.json beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from localsteer.asked import does_harm, reading_layer
from localsteer.cache import atomic_path, file_hash
from localsteer.catalog import Catalog, Instruction
from localsteer.convert import write_vector
from localsteer.errors import LocalsteerError, MismatchError, VectorFileError
from localsteer.vector import STATISTICS, ControlVector

from . import FILE, FORMAT
from .identity import identity_of

# of the provenance: what the maker of a vector is told, not its user, and paths of the maker's machine
DROPPED = ("notice", "eval_digest", "source")


def instructions_for_a_pack(catalog: Catalog, ids: Iterable[str] = ()) -> list[Instruction]:
    """Those of these ids, by default every one with a verifier whose slots have defaults, ready for use.

    Raises CatalogError for an id that the catalogue lacks, LocalsteerError for one without a verifier.
    """
    chosen = [catalog.get(name) for name in dict.fromkeys(ids)]
    for instruction in chosen:
        if instruction.verifier is None:
            raise LocalsteerError(
                f"{instruction.id} has no verifier, so a pack could have no figures for it: leave it out."
            )
    every = (instruction for instruction in catalog.instructions.values() if instruction.verifier)
    return chosen or [
        instruction.fill() for instruction in every if set(instruction.open_slots) <= set(instruction.slots)
    ]


def compact(vector: ControlVector) -> ControlVector:
    """With the directions of its own layers alone, and of the layer that tells whether a prompt asks for the
    same where the vector is to be left out then (asked.py)."""
    kept = set(vector.layers)
    reading = reading_layer(vector) if does_harm(vector) else None
    kept |= set() if reading is None else {reading}
    mask = np.isin(np.arange(vector.n_layer), sorted(kept))
    columns = {key: getattr(vector, key) for key in STATISTICS}
    provenance = {key: value for key, value in vector.provenance.items() if key not in DROPPED}
    return replace(
        vector,
        directions=np.where(mask[:, None], vector.directions, np.float32(0)),
        **{key: None if column is None else np.where(mask, column, 0) for key, column in columns.items()},
        readers=None if vector.readers is None else np.where(mask[:, None], vector.readers, np.float32(0)),
        biases=None if vector.biases is None else np.where(mask, vector.biases, 0),
        provenance=provenance,
    )


def check_measured(vector: ControlVector, path: Path, catalog: Catalog, model: Path) -> Instruction:
    """The instruction that a tuned vector is of. Raises VectorFileError for one that the catalogue does not
    have in these words, or that was not tuned; MismatchError for one of another model file."""
    name = str(vector.provenance.get("instruction_id") or vector.name)
    known = catalog.instructions.get(name)
    if known is None or known.verifier is None or known.fill().phrasings != vector.phrasings:
        raise VectorFileError(
            f"{path} is for {name!r}, which the catalogue {catalog.source} does not have in these "
            "words: a pack "
            "holds the catalogue's instructions."
        )
    record = vector.provenance.get("validation")
    if not isinstance(record, Mapping) or "scores" not in record or record.get("stopped"):
        raise VectorFileError(f"{path} has no figures of a whole search: `localsteer tune` it first.")
    measured = record.get("model")
    source = measured.get("sha256") if isinstance(measured, Mapping) else vector.provenance.get("source_hash")
    if source != file_hash(model):
        raise MismatchError(f"{path} was measured on another file than {model.name}: tune it on this one.")
    return known.fill()


class _Measured(TypedDict):
    """Settings of a vector, and the figures that it was chosen by: its TuningRecord, shortened."""

    layers: list[int]
    mode: str
    positions: str
    strength: float
    scores: dict[str, float | None]
    n: int
    recovered_gap: float | None
    seconds: float | None
    advice: list[str]


class PackRow(_Measured):
    file: str
    sha256: str


class PackDocument(TypedDict):
    """pack.json. shape: architecture, n_layer, n_embd. tokenizer, weights: fingerprints (identity.py)."""

    format: int
    model: str
    licence: str
    quantization: str | None
    sha256: str
    shape: dict[str, str | int]
    tokenizer: str
    weights: str
    catalog: str
    tool_version: str
    instructions: dict[str, PackRow]


@dataclass
class PackFolder:
    """A pack that is being made, or added to: a vector is kept for good once `add` returns.

    folder: created with the first vector. model: published name.
    """

    folder: Path
    model: str
    licence: str
    catalog: str
    _document: PackDocument

    @classmethod
    def open(
        cls,
        folder: Path,
        model_file: Path,
        *,
        model: str,
        licence: str,
        catalog: str,
        quantization: str | None,
    ) -> PackFolder:
        """Raises MismatchError where the folder holds the pack of another file, LocalsteerError where its
        pack.json is damaged."""
        from localsteer import __version__

        identity = identity_of(model_file)
        head = {
            "format": FORMAT,
            "model": model,
            "licence": licence,
            "quantization": quantization,
            "sha256": file_hash(model_file),
            "shape": {key: getattr(identity, key) for key in ("architecture", "n_layer", "n_embd")},
            "tokenizer": identity.tokenizer,
            "weights": identity.weights,
            "catalog": catalog,
            "tool_version": __version__,
        }
        return cls(folder, model, licence, catalog, {**head, "instructions": _kept(folder, head, model_file)})

    def __contains__(self, instruction_id: str) -> bool:
        row = self._document["instructions"].get(instruction_id)
        return row is not None and (self.folder / row["file"]).is_file()

    def add(self, vector: ControlVector, instruction: Instruction) -> PackRow:
        """Write the vector, then pack.json. Returns the instruction's row in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"{re.sub(r'[^a-z0-9_.-]+', '-', instruction.id.lower())}.gguf"
        write_vector(compact(vector), self.folder / file, compact=True)
        digest = hashlib.sha256((self.folder / file).read_bytes()).hexdigest()
        row = {"file": file, "sha256": digest, **_row(vector)}
        rows = {**self._document["instructions"], instruction.id: row}
        self._document["instructions"] = dict(sorted(rows.items()))
        with atomic_path(self.folder / FILE) as temporary:
            temporary.write_text(json.dumps(self._document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return row

    @property
    def rows(self) -> Mapping[str, PackRow]:
        return self._document["instructions"]


def _kept(folder: Path, head: Mapping[str, Any], model_file: Path) -> dict[str, PackRow]:
    """The instructions of a pack that is there already."""
    from . import read_pack

    if not (folder / FILE).is_file():
        return {}
    pack = read_pack(folder)
    if pack.sha256 != head["sha256"] or pack.catalog != head["catalog"]:
        raise MismatchError(
            f"{folder} holds a pack for {pack.model} ({pack.identity.shown}, {pack.quantization}), "
            f"measured on a file or catalogue other than {model_file.name}: choose another -o."
        )
    return json.loads((folder / FILE).read_text("utf-8"))["instructions"]


def _row(vector: ControlVector) -> _Measured:
    record = vector.provenance["validation"]
    scores = {key: _rounded(record["scores"][key]) for key in ("none", "steered", "instructed", "both")}
    return {
        "layers": list(vector.layers),
        "mode": vector.mode,
        "positions": vector.positions,
        "strength": vector.strength,
        "scores": scores,
        "n": record["n"],
        "recovered_gap": record["recovered_gap"],
        "seconds": record["seconds"],
        "advice": list(record["advice"]),
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
