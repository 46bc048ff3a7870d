"""Writes a control vector as GGUF: the same vector gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from localsteer.cache import temporary_beside
from localsteer.errors import VectorFileError
from localsteer.vector import STATISTICS, ControlVector

from . import keys


def write_vector(vector: ControlVector, path: str | os.PathLike[str], *, compact: bool = False) -> None:
    """Replace the file at `path` in one step: a reader sees either the old file or the complete new one.

    compact: leave layers without a direction out, for a vector of one layer of many. Raises VectorFileError
    when the folder can't be written, the provenance holds what JSON can't, or the vector is larger than what
    is read again.
    """
    if vector.n_layer > keys.MAX_LAYERS or vector.n_embd > keys.MAX_WIDTH:
        raise VectorFileError(
            f"{path} can't hold {vector.n_layer} layers of width {vector.n_embd}: a vector file has at most "
            f"{keys.MAX_LAYERS} layers, of width {keys.MAX_WIDTH}."
        )
    writer = GGUFWriter(None, keys.ARCHITECTURE)
    layers = vector.usable_layers if compact else tuple(range(vector.n_layer))
    _add_header(writer, vector, layers, compact)
    _add_settings(writer, vector)
    _add_statistics(writer, vector, layers)
    _add_gates(writer, vector)
    _add_provenance(writer, vector.provenance)
    for layer in layers:
        if layer:
            writer.add_tensor(f"{keys.DIRECTION}{layer}", checked(vector.directions[layer]))
    try:
        _write_atomically(writer, Path(path))
    except OSError as error:
        raise VectorFileError(f"{path} can't be written: {error.strerror or error}.") from None


def _add_header(writer: GGUFWriter, vector: ControlVector, layers: Sequence[int], compact: bool) -> None:
    hint = vector.provenance.get("architecture")
    if isinstance(hint, str):
        writer.add_string(keys.MODEL_HINT, hint)
    writer.add_uint32(keys.LAYER_COUNT, len(layers) - (0 in layers))  # of the tensors, as repeng counts
    writer.add_uint32(keys.MAJOR, keys.COMPACT if compact else keys.COMPLETE)
    writer.add_uint32(keys.MINOR, keys.VERSION_MINOR if vector.gated else 0)
    writer.add_uint32(keys.N_LAYER, vector.n_layer)
    writer.add_uint32(keys.N_EMBD, vector.n_embd)
    if compact:
        _add_array(writer, keys.ROW_LAYERS, layers, GGUFValueType.UINT32)


def _add_settings(writer: GGUFWriter, vector: ControlVector) -> None:
    _add_text(writer, keys.NAME, vector.name)
    _add_array(writer, keys.LAYERS, vector.layers, GGUFValueType.UINT32)
    writer.add_string(keys.MODE, vector.mode)
    writer.add_string(keys.POSITIONS, vector.positions)
    writer.add_float64(keys.STRENGTH, vector.strength)
    writer.add_bool(keys.ONE_SIDED, vector.one_sided)
    if vector.cap is not None:
        writer.add_float64(keys.CAP, vector.cap)


def _add_statistics(writer: GGUFWriter, vector: ControlVector, layers: Sequence[int]) -> None:
    for key in STATISTICS:
        column = getattr(vector, key)
        if column is not None:
            _add_array(writer, keys.PREFIX + key, column.tolist(), GGUFValueType.FLOAT32)
    if 0 in layers:
        _add_array(writer, keys.DIRECTION_0, vector.directions[0].tolist(), GGUFValueType.FLOAT32)


def _add_gates(writer: GGUFWriter, vector: ControlVector) -> None:
    if vector.gated:
        _add_array(writer, keys.BIASES, vector.biases.tolist(), GGUFValueType.FLOAT32)
    for layer in vector.gated:
        _add_array(writer, f"{keys.READER}{layer}", vector.readers[layer].tolist(), GGUFValueType.FLOAT32)


def _add_provenance(writer: GGUFWriter, provenance: Mapping[str, Any]) -> None:
    for key, value in sorted(provenance.items()):
        if not isinstance(key, str) or len(key.encode("utf-8", "replace")) > keys.MAX_NAME // 2:
            raise VectorFileError(f"provenance key {str(key)[:40]!r} can't be written: use a short string.")
        value = value.item() if isinstance(value, np.generic) else value
        if key == "probes":
            _add_probes(writer, value or [])
        elif isinstance(value, bool):
            writer.add_bool(keys.PROVENANCE + key, value)
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            writer.add_int64(keys.PROVENANCE + key, value)
        elif isinstance(value, float):
            writer.add_float64(keys.PROVENANCE + key, value)
        elif isinstance(value, str):
            _add_text(writer, keys.PROVENANCE + key, value)
        else:
            _add_text(writer, keys.PROVENANCE_JSON + key, _json(key, value))


def _add_probes(writer: GGUFWriter, probes: Sequence[tuple[str, Sequence[int]]]) -> None:
    """GGUF arrays are flat: the texts, how many ids each has, and all ids one after the other."""
    try:
        texts = [text.encode() for text, _ in probes]
        ids = [list(map(_token_id, tokens)) for _, tokens in probes]
    except (TypeError, ValueError, AttributeError):  # a UnicodeEncodeError is a ValueError
        raise VectorFileError("provenance 'probes' must be a list of [text, [token ids]].") from None
    if not texts:
        return
    _add_array(writer, keys.PROBES_TEXT, texts, GGUFValueType.STRING)
    _add_array(writer, keys.PROBES_LENGTH, [len(tokens) for tokens in ids], GGUFValueType.UINT32)
    _add_array(writer, keys.PROBES_TOKENS, [i for tokens in ids for i in tokens], GGUFValueType.INT32)


def _token_id(token: Any) -> int:
    token = operator.index(token)
    if not 0 <= token < 2**31:
        raise ValueError(token)
    return token


def _json(key: str, value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise VectorFileError(f"provenance {key!r} can't be written: {error}.") from None


def _add_text(writer: GGUFWriter, key: str, text: str) -> None:
    # GGUFWriter.add_string drops an empty string
    try:
        writer.add_key_value(key, text.encode(), GGUFValueType.STRING)
    except UnicodeEncodeError:
        raise VectorFileError(f"{key} can't be written: it is not valid Unicode.") from None


def _add_array(writer: GGUFWriter, key: str, values: Sequence[Any], item: GGUFValueType) -> None:
    if len(values):
        writer.add_key_value(key, list(values), GGUFValueType.ARRAY, sub_type=item)


def _write_atomically(writer: GGUFWriter, path: Path) -> None:
    """Beside the target, because a rename is atomic within one file system only."""
    if path.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    try:
        with temporary_beside(path) as beside:
            writer.write_header_to_file(beside)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            for file in writer.fout or ():
                file.flush()
                os.fsync(file.fileno())
            writer.close()
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # a full disk fails here again, with what was left to write
            writer.close()
    _sync_folder(path.parent)


class _Checked(np.ndarray):
    """An array that gguf's writer writes by Python: numpy's own `tofile` loses what its last flush says, so
    that on a full disk a file comes out short without an error."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        file.write(np.ascontiguousarray(self).data)


def checked(array: np.ndarray) -> np.ndarray:
    """For `GGUFWriter.add_tensor` and `write_tensor_data`: a write that fails raises OSError."""
    return np.ascontiguousarray(array).view(_Checked)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
