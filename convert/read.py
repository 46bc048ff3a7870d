"""Reads a control-vector GGUF written by localsteer; imports.py reads those of other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGUFValueType

from localsteer.errors import LocalsteerError, VectorFileError
from localsteer.jsonable import JsonObject
from localsteer.terms import MODES, POSITIONS
from localsteer.vector import STATISTICS, ControlVector

from . import keys
from .gguf_file import GgufFile, open_gguf

_U32, _F32, _F64, _I32 = (
    GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.INT32,
)  # fmt: skip
_TEXT, _BOOL, _ARRAY = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.ARRAY


def read_vector(path: str | os.PathLike[str]) -> ControlVector:
    """The vector, bit for bit as it was written. Raises VectorFileError, one line, for anything wrong."""
    with open_gguf(path) as file:
        return parse_vector(file)


def parse_vector(file: GgufFile) -> ControlVector:
    check_architecture(file)
    _check_version(file)
    settings = _settings(file)
    directions = _directions(file)
    columns = {key: file.get(keys.PREFIX + key, _ARRAY, item=_F32) for key in STATISTICS}
    readers, biases = _readers(file, directions.shape), file.get(keys.BIASES, _ARRAY, item=_F32)
    provenance = _provenance(file)
    try:
        return ControlVector(
            directions, **columns, **settings, provenance=provenance, readers=readers, biases=biases
        )
    except LocalsteerError as error:
        raise VectorFileError(f"{file.path} holds no usable vector: {error}") from None


def check_architecture(file: GgufFile) -> None:
    architecture = file.get("general.architecture", _TEXT)
    if architecture != keys.ARCHITECTURE:
        what = f"a {architecture[:40]!r} model" if architecture else "some other GGUF"
        raise file.error(f"is {what}, not a control vector.")


def is_ours(file: GgufFile) -> bool:
    return keys.MAJOR in file.keys


def _check_version(file: GgufFile) -> None:
    major = file.get(keys.MAJOR, _U32)
    if major is None:
        raise file.error(
            "is a control vector that localsteer did not write: import it with "
            "`localsteer convert import --from repeng` (or cvector-generator)."
        )
    if major > keys.VERSION_MAJOR:
        raise file.error(
            f"has format version {major}, newer than {keys.VERSION_MAJOR}: upgrade localsteer to read it."
        )
    if major < 1:
        raise file.error(f"has format version {major}, which never existed.")


def _require(file: GgufFile, key: str, *types: GGUFValueType, item: GGUFValueType | None = None) -> Any:
    value = file.get(key, *types, item=item)
    if value is None:
        raise file.error(f"is damaged: key {key} is missing.")
    return value


def _settings(file: GgufFile) -> JsonObject:
    settings = {
        "layers": tuple(_require(file, keys.LAYERS, _ARRAY, item=_U32).tolist()),
        "mode": _require(file, keys.MODE, _TEXT),
        "positions": _require(file, keys.POSITIONS, _TEXT),
        "strength": _require(file, keys.STRENGTH, _F64),
        "one_sided": _require(file, keys.ONE_SIDED, _BOOL),
        "cap": file.get(keys.CAP, _F64),
        "name": file.get(keys.NAME, _TEXT) or "",
    }
    for key, known in (("mode", MODES), ("positions", POSITIONS)):
        if settings[key] not in known:
            raise file.error(
                f"has unknown {key} {settings[key][:40]!r} (known: {', '.join(known)}): upgrade localsteer?"
            )
    return settings


def _directions(file: GgufFile) -> np.ndarray:
    """(n_layer, n_embd); allocated only after each row has been found in the file at its full width."""
    n_layer = _claim(file, keys.N_LAYER, keys.MAX_LAYERS)
    n_embd = _claim(file, keys.N_EMBD, keys.MAX_WIDTH)
    layers = _layers(file, n_layer)
    rows = _rows(file, layers, n_layer)
    for layer, row in rows.items():
        if len(row) != n_embd:
            raise file.error(f"is damaged: direction {layer} is {len(row)} wide, not {n_embd}.")
    if 4 * n_layer * n_embd > keys.MAX_BYTES and len(rows) < n_layer:
        raise file.error(f"is damaged: {len(rows)} rows claim {n_layer} layers, {n_embd} wide.")
    directions = np.zeros((n_layer, n_embd), np.float32)
    directions[list(rows)] = list(rows.values())
    return directions


def _readers(file: GgufFile, shape: tuple[int, int]) -> np.ndarray | None:
    """(n_layer, n_embd): of the layers that have a gate, zeros elsewhere. No larger than the directions."""
    n_layer, n_embd = shape
    rows = {il: file.get(f"{keys.READER}{il}", _ARRAY, item=_F32) for il in range(n_layer)}
    rows = {il: row for il, row in rows.items() if row is not None}
    if not rows:
        return None
    readers = np.zeros(shape, np.float32)
    for il, row in rows.items():
        if len(row) != n_embd:
            raise file.error(f"is damaged: reader {il} is {len(row)} wide, not {n_embd}.")
        readers[il] = row
    return readers


def _layers(file: GgufFile, n_layer: int) -> Sequence[int]:
    """Those whose rows the file holds: all of them unless it is compact."""
    kept = file.get(keys.ROW_LAYERS, _ARRAY, item=_U32)
    if kept is None:
        return range(n_layer)
    layers = kept.tolist()
    if layers != sorted({il for il in layers if il < n_layer}):
        raise file.error(f"is damaged: {keys.ROW_LAYERS} must name layers below {n_layer}, in their order.")
    return layers


def _rows(file: GgufFile, layers: Sequence[int], n_layer: int) -> dict[int, np.ndarray]:
    names = {layer: f"{keys.DIRECTION}{layer}" for layer in layers if layer}
    odd = set(names.values()) ^ set(file.tensors)
    if odd:
        those = f"{n_layer} layers" if len(layers) == n_layer else "the layers that it names"
        raise file.error(
            f"is damaged: it must hold one direction for each of {those}, "
            f"and {len(odd)} are missing or too many ({min(odd)[:40]!r})."
        )
    first = {0: _require(file, keys.DIRECTION_0, _ARRAY, item=_F32)} if 0 in layers else {}
    return first | {layer: file.f32(name) for layer, name in names.items()}


def _claim(file: GgufFile, key: str, limit: int) -> int:
    value = _require(file, key, _U32)
    if not 1 <= value <= limit:
        raise file.error(f"is damaged: {key} is {value} (1 to {limit}).")
    return value


def _provenance(file: GgufFile) -> JsonObject:
    provenance: JsonObject = {}
    for key, entry in file.keys.items():
        if key.startswith(keys.PROVENANCE) and entry.type != _ARRAY:
            provenance[key.removeprefix(keys.PROVENANCE)] = entry.value
        elif key.startswith(keys.PROVENANCE_JSON) and entry.type == _TEXT:
            provenance[key.removeprefix(keys.PROVENANCE_JSON)] = _parse(file, key, entry.value)
    if keys.PROBES_TEXT in file.keys:
        provenance["probes"] = _probes(file)
    return provenance


def _parse(file: GgufFile, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise file.error(f"is damaged: {key[:80]} is not JSON.") from None


def _probes(file: GgufFile) -> list[list[Any]]:
    texts = _require(file, keys.PROBES_TEXT, _ARRAY, item=_TEXT)
    lengths = _require(file, keys.PROBES_LENGTH, _ARRAY, item=_U32).tolist()
    ids = file.get(keys.PROBES_TOKENS, _ARRAY, item=_I32)
    ids = [] if ids is None else ids.tolist()
    if len(texts) != len(lengths) or sum(lengths) != len(ids):
        raise file.error("is damaged: its probe strings and their token ids do not fit together.")
    probes, at = [], 0
    for text, length in zip(texts, lengths, strict=True):
        probes.append([text, ids[at : at + length]])
        at += length
    return probes
