"""Vectors in the formats of other tools, and what each of them can't hold.

    lost = export_vector(vector, "json.npz", to="npz")     # ()

llama.cpp, repeng and EasySteer read a GGUF of constant directions, which they add. NPZ and safetensors files
hold a vector whole, in arrays under our own names, and `import_vector` gives it back to the last bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGUFWriter

from localsteer.cache import atomic_path
from localsteer.errors import PlanError, VectorFileError
from localsteer.vector import STATISTICS, ControlVector

from . import keys
from .arrays import save_npz, save_safetensors
from .static import constant_rows, static_vector
from .write import checked, write_vector

ADDING = ("llama.cpp", "repeng", "easysteer", "steering-vectors")  # what they hold is added, everywhere
WHOLE = ("npz", "safetensors")
FORMATS = ADDING + WHOLE
SETTINGS = "localsteer"  # in NPZ and safetensors: a JSON text as bytes
SETTINGS_KEYS = ("layers", "mode", "positions", "strength", "one_sided", "cap", "name", "provenance")
METHOD = "controlvector.method"  # EasySteer's
UNKNOWN = "unknown"  # model_hint, which repeng and EasySteer want, where the architecture is not known


def export_vector(
    vector: ControlVector,
    path: str | os.PathLike[str],
    *,
    to: str,
    layer: int | Sequence[int] | None = None,
    strength: float | None = None,
) -> tuple[str, ...]:
    """Write the vector for another tool, and return what the file does not hold, in words.

    to: one of FORMATS, but for "steering-vectors", whose files are PyTorch's
    (localsteer.extract.torch_files.write_torch_vector). layer, strength: in the place of the vector's own.
    Raises PlanError for a layer that the tool can't steer, VectorFileError for a file that can't be written.
    """
    if to not in FORMATS or to == "steering-vectors":
        known = ", ".join(name for name in FORMATS if name != "steering-vectors")
        raise VectorFileError(f"unknown format {to!r}: choose one of {known}.")
    chosen = vector.at(layer=layer, strength=strength)
    if to == "llama.cpp":
        write_vector(static_vector(chosen), path)
    elif to in WHOLE:
        save = save_npz if to == "npz" else save_safetensors
        _write(path, lambda beside: save(beside, _arrays(chosen)))
    else:
        rows = _rows_for(chosen, to)
        _write(path, lambda beside: _write_gguf(beside, chosen, rows, to))
    return losses(chosen, to)


def losses(vector: ControlVector, to: str) -> tuple[str, ...]:
    """The parts of this vector that a format can't hold, in words."""
    if to in WHOLE:
        return ()
    lost = []
    if vector.mode != "add":
        lost.append(f"mode {vector.mode}, which becomes add")
    if vector.mean_with is not None:
        lost.append("mean projections and spreads")
    if vector.positions != "all":
        lost.append(f"positions {vector.positions}, which become all")
    if vector.gated:
        lost.append("the learned gate, of which the mean effect is left")
    others = len(vector.usable_layers) - len(vector.layers)
    if others > 0:
        lost.append(f"the directions of {others} other layer{'s' * (others != 1)}")
    # a static export is a file of ours, which keeps its provenance
    return (*lost, "where it comes from") if to != "llama.cpp" and vector.provenance else tuple(lost)


def _rows_for(vector: ControlVector, to: str) -> dict[int, np.ndarray]:
    """Directions by layer, strength included, in the tool's order."""
    rows = constant_rows(vector)
    if to == "easysteer":
        return rows
    if 0 in rows:
        raise PlanError("repeng's files, as llama.cpp's, have no place for layer 0: choose a later layer.")
    zeros = np.zeros(vector.n_embd, np.float32)
    # from the last layer down, as repeng writes them; it looks for one at every layer that it controls
    return {il: rows.get(il, zeros) for il in range(vector.n_layer - 1, 0, -1)}


def _write_gguf(path: Any, vector: ControlVector, rows: Mapping[int, np.ndarray], to: str) -> None:
    writer = GGUFWriter(path, keys.ARCHITECTURE)
    hint = vector.provenance.get("architecture")
    writer.add_string(keys.MODEL_HINT, hint if isinstance(hint, str) and hint else UNKNOWN)
    if to == "easysteer":
        writer.add_string(METHOD, "localsteer")
    writer.add_uint32(keys.LAYER_COUNT, len(rows))
    for il, row in rows.items():
        writer.add_tensor(f"{keys.DIRECTION}{il}", checked(row))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write(path: str | os.PathLike[str], save: Any) -> None:
    if os.path.isdir(path):
        raise VectorFileError(f"{os.fspath(path)} can't be written: it is a folder.")
    try:
        with atomic_path(path) as beside:
            save(beside)
    except OSError as error:
        raise VectorFileError(f"{os.fspath(path)} can't be written: {error.strerror or error}.") from None


def _arrays(vector: ControlVector) -> dict[str, np.ndarray]:
    """Everything that a vector is, as arrays of numbers."""
    named = {key: getattr(vector, key) for key in ("directions", *STATISTICS, "readers", "biases")}
    settings = {
        key: getattr(vector, key) for key in ("mode", "positions", "strength", "one_sided", "cap", "name")
    }
    settings |= {"layers": list(vector.layers), "provenance": dict(vector.provenance)}
    try:
        text = json.dumps(settings, default=_plain, allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise VectorFileError(f"the provenance of {vector.label} can't be written: {error}.") from None
    named[SETTINGS] = np.frombuffer(text, np.uint8)
    return {key: array for key, array in named.items() if array is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")
