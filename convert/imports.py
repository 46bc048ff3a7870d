"""Control vectors written by other tools. Each tool counts layers in its own way, which is its convention.

GGUF:    repeng             `direction.N` is the output of 0-based layer N, as llama.cpp applies it.
         cvector-generator  (llama.cpp's tool; jukofyork's too) `direction.N` is the output of layer N - 1:
                            llama.cpp applies those files one layer late, and this import undoes it.
         easysteer          as repeng, layer 0 included.
Arrays:  layers             row l is the output of layer l: resid_post[l] of TransformerLens, as in the
                            paper's code, or what a forward hook on decoder layer l sees.
         hidden_states      row 0 is the embedding and row l + 1 the output of layer l, as in transformers'
                            `hidden_states`; the last row is after the final norm and is dropped.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from localsteer.errors import LocalsteerError, VectorFileError
from localsteer.jsonable import JsonObject
from localsteer.vector import STATISTICS, ControlVector

from . import keys
from .arrays import read_arrays
from .exports import METHOD, SETTINGS, SETTINGS_KEYS
from .gguf_file import MAGIC, GgufFile, open_bytes, open_gguf
from .read import check_architecture, is_ours, read_vector

GGUF_CONVENTIONS = ("repeng", "cvector-generator", "easysteer")
ARRAY_CONVENTIONS = ("layers", "hidden_states")
CONVENTIONS = GGUF_CONVENTIONS + ARRAY_CONVENTIONS
_OLD_NAMES = {"blocks": "layers"}  # of conventions

# names in .npz and .safetensors files: those of the paper's code, and ours
_PAIRS = (("hs_instr", "hs_no_instr"), ("last_token_rs", "last_token_rs_no_instr"))
_ONE_LAYER = ("instr_dir", "max_diff_layer_idx", "avg_proj", "avg_proj_no_instr")
_GATE = ("readers", "biases")
_WANTED = {name for pair in _PAIRS for name in pair} | {
    *_ONE_LAYER,
    "directions",
    *STATISTICS,
    *_GATE,
    SETTINGS,
}
_SETTINGS = ("layers", "mode", "positions", "strength", "one_sided", "cap", "name", "provenance")


def import_vector(
    path: str | os.PathLike[str],
    *,
    convention: str | None = None,
    n_layer: int | None = None,
    layer: int | Sequence[int] | None = None,
    name: str | None = None,
) -> ControlVector:
    """Read another tool's vector. Without a `convention`, it is taken from the file if that is certain.

    n_layer: depth of the model; without it, what the file suggests. layer: chosen layers; without it, for a
    GGUF all that have a direction, for arrays the middle one. A file written by localsteer is read as it is.
    Raises VectorFileError, and PlanError for a layer that does not exist.
    """
    convention = _OLD_NAMES.get(convention or "", convention)
    if convention is not None and convention not in CONVENTIONS:
        raise VectorFileError(f"unknown convention {convention!r}: choose one of {', '.join(CONVENTIONS)}.")
    if n_layer is not None and not 1 <= n_layer <= keys.MAX_LAYERS:
        raise VectorFileError(f"a model of {n_layer} layers is out of range (1 to {keys.MAX_LAYERS}).")
    with open_bytes(path) as data:
        is_gguf = data[:4] == MAGIC
    read = _from_gguf if is_gguf else _from_arrays
    vector = read(path, convention, n_layer, Path(path).stem if name is None else name)
    return vector if layer is None else vector.at(layer=layer)


def _from_gguf(
    path: str | os.PathLike[str], convention: str | None, n_layer: int | None, name: str
) -> ControlVector:
    with open_gguf(path) as file:
        if not is_ours(file):
            check_architecture(file)
            rows = {_layer_number(file, tensor): file.f32(tensor) for tensor in file.tensors}
            convention = convention or _detect(file)
            _check_convention(file.path, convention, GGUF_CONVENTIONS)
            if 0 in rows and convention == "cvector-generator":
                raise file.error("holds direction.0, which cvector-generator never writes.")
            directions = _place_rows(file, rows, convention, n_layer)
            # it adds at all its layers, as the tool that made it would have
            settings = {"layers": _layers(file.path, directions), "mode": "add", "name": name}
            return _vector(file.path, directions, {}, settings, {"convention": convention, **_hint(file)})
    if convention is not None:
        raise VectorFileError(f"{os.fspath(path)} was written by localsteer: it takes no convention.")
    return read_vector(path)


def _layer_number(file: GgufFile, tensor: str) -> int:
    match = re.fullmatch(r"direction\.(\d{1,6})", tensor, re.ASCII)
    first = 0 if METHOD in file.keys else 1  # no other tool writes a direction.0
    if not match or not first <= int(match[1]) <= keys.MAX_LAYERS:
        raise file.error(f"is not a control vector: it holds a tensor {tensor[:40]!r}.")
    return int(match[1])


def _detect(file: GgufFile) -> str:
    """EasySteer names its method; cvector-generator counts layers as INT32, the Python tools as UINT32, and
    repeng writes downwards.

    jukofyork's files (UINT32, upwards) can't be told from a repeng file that was sorted: ask.
    """
    count = file.keys.get(keys.LAYER_COUNT)
    layers = [_layer_number(file, tensor) for tensor in file.tensors]
    if METHOD in file.keys:
        return "easysteer"
    if count and count.type == GGUFValueType.INT32:
        return "cvector-generator"
    if count and count.type == GGUFValueType.UINT32 and len(layers) > 1 and layers == sorted(layers)[::-1]:
        return "repeng"
    raise file.error(
        "does not say which tool wrote it: choose convention repeng (direction.N is layer N) "
        "or cvector-generator (direction.N is layer N - 1; jukofyork's files too)."
    )


def _check_convention(path: str, convention: str, known: Sequence[str]) -> None:
    if convention not in known:
        kind = "a GGUF" if known is GGUF_CONVENTIONS else "an array file"
        raise VectorFileError(f"{path} is {kind}: its convention is one of {', '.join(known)}.")


def _hint(file: GgufFile) -> JsonObject:
    # not `architecture`: repeng writes transformers' name of it (mistral), llama.cpp its own (llama)
    hint = file.get(keys.MODEL_HINT, GGUFValueType.STRING)
    return {"model_hint": hint} if hint else {}


def _place_rows(
    file: GgufFile, rows: dict[int, np.ndarray], convention: str, n_layer: int | None
) -> np.ndarray:
    """(n_layer, n_embd). Both tools leave one layer out, so n_layer is the highest N + 1 in both."""
    widths = {len(row) for row in rows.values()}
    if len(widths) != 1 or 0 in widths:
        raise file.error(f"is not a control vector: its directions are {sorted(widths) or 'not there'} wide.")
    shift = 1 if convention == "cvector-generator" else 0
    n_layer = max(rows) + 1 if n_layer is None else n_layer
    beyond = [layer for layer in rows if layer - shift >= n_layer]
    if beyond:
        raise file.error(f"holds direction.{max(beyond)}, beyond a model of {n_layer} layers.")
    directions = _zeros(file.path, n_layer, max(widths))
    for layer, row in rows.items():
        directions[layer - shift] = row
    return directions


def _zeros(path: str, n_layer: int, n_embd: int) -> np.ndarray:
    if 4 * n_layer * n_embd > keys.MAX_BYTES:
        raise VectorFileError(f"{path}: {n_layer} layers x {n_embd} are too large for a model.")
    return np.zeros((n_layer, n_embd), dtype=np.float32)


def _vector(
    path: str,
    directions: np.ndarray,
    columns: dict[str, np.ndarray | None],
    settings: JsonObject,
    provenance: JsonObject,
) -> ControlVector:
    columns = dict.fromkeys(STATISTICS) | columns
    try:
        return ControlVector(directions, **columns, **settings, provenance={"method": "import", **provenance})
    except LocalsteerError as error:
        raise VectorFileError(f"{path} holds no usable vector: {error}") from None


def _layers(path: str, directions: np.ndarray) -> tuple[int, ...]:
    layers = tuple(int(il) for il in np.flatnonzero(directions.any(axis=1)))
    if not layers:
        raise VectorFileError(f"{path} holds no vector: all its directions are zero.")
    return layers


def _from_arrays(
    path: str | os.PathLike[str], convention: str | None, n_layer: int | None, name: str
) -> ControlVector:
    shown = os.fspath(path)
    arrays = read_arrays(path, _WANTED)
    if SETTINGS in arrays:
        if convention is not None:
            raise VectorFileError(f"{shown} was written by localsteer: it takes no convention.")
        return _whole(shown, arrays)
    if "instr_dir" in arrays:
        return _one_layer(shown, arrays, n_layer, name)
    for instructed, plain in _PAIRS:
        if instructed in arrays and plain in arrays:
            arrays |= _statistics(*_last_tokens(shown, arrays[instructed], arrays[plain]))
    if "directions" not in arrays:
        raise VectorFileError(
            f"{shown} holds no vector: it needs directions, or hs_instr and hs_no_instr, or instr_dir."
        )
    return vector_of_directions(shown, arrays, convention, n_layer, name)


def vector_of_directions(
    shown: str, arrays: Mapping[str, np.ndarray], convention: str | None, n_layer: int | None, name: str
) -> ControlVector:
    """Of `directions`, (rows, n_embd), and the statistics that there are, (rows,). Raises VectorFileError."""
    directions, columns = arrays["directions"], {key: arrays.get(key) for key in STATISTICS}
    if directions.ndim != 2:
        raise VectorFileError(f"{shown}: directions must be (layers, n_embd), not {directions.shape}.")
    for key, column in columns.items():
        if column is not None and column.shape != directions.shape[:1]:
            raise VectorFileError(f"{shown}: {key} is {column.shape}, directions are {directions.shape}.")
    convention = _array_convention(shown, convention, n_layer, len(directions))
    first = 1 if convention == "hidden_states" else 0
    directions = directions[first:].copy()
    if convention == "hidden_states":
        directions[-1] = 0  # after the final norm: not the residual stream of the last layer
    columns = {key: None if column is None else column[first:] for key, column in columns.items()}
    # one layer is chosen, as in the paper: the middle one, until tuning or the user picks another
    layers, middle = _layers(shown, directions), len(directions) // 2
    chosen = min(layers, key=lambda il: (abs(il - middle), il))
    mode = "add" if columns["mean_with"] is None else "project"
    settings = {"layers": (chosen,), "mode": mode, "name": name}
    return _vector(shown, directions, columns, settings, {"convention": convention})


def vector_of_rows(
    shown: str, rows: Mapping[int, np.ndarray], n_layer: int | None, name: str, convention: str
) -> ControlVector:
    """Of one direction for each of some layers, added at all of them. Raises VectorFileError."""
    widths = {np.shape(row) for row in rows.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1 or min(rows) < 0:
        raise VectorFileError(f"{shown} holds no vector: every layer needs one direction of the same width.")
    n_layer = max(rows) + 1 if n_layer is None else n_layer
    if max(rows) >= n_layer or n_layer > keys.MAX_LAYERS:
        raise VectorFileError(f"{shown} holds layer {max(rows)}, beyond a model of {n_layer} layers.")
    directions = _zeros(shown, n_layer, next(iter(widths))[0])
    for il, row in rows.items():
        directions[il] = row
    settings = {"layers": _layers(shown, directions), "mode": "add", "name": name}
    return _vector(shown, directions, {}, settings, {"convention": convention})


def _whole(path: str, arrays: Mapping[str, np.ndarray]) -> ControlVector:
    """What `export_vector` wrote into arrays, as it was."""
    try:
        settings = json.loads(arrays[SETTINGS].tobytes())
        settings = {key: settings[key] for key in SETTINGS_KEYS}
        types = {"provenance": dict, "name": str, "layers": list}
        if not all(isinstance(settings[key], kind) for key, kind in types.items()):
            raise TypeError
        settings["layers"] = [operator.index(il) for il in settings["layers"] if il < keys.MAX_LAYERS]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise VectorFileError(f"{path} is damaged: its array {SETTINGS!r} holds no settings.") from None
    named = {key: arrays.get(key) for key in (*STATISTICS, *_GATE)}
    try:
        return ControlVector(arrays.get("directions"), **named, **settings)
    except LocalsteerError as error:
        raise VectorFileError(f"{path} holds no usable vector: {error}") from None


def _array_convention(path: str, convention: str | None, n_layer: int | None, n_rows: int) -> str:
    """Raises when neither the convention nor the depth tells."""
    convention = _OLD_NAMES.get(convention or "", convention)
    if convention is None and n_layer is not None and n_rows in (n_layer, n_layer + 1):
        convention = "layers" if n_rows == n_layer else "hidden_states"
    if convention is None:
        raise VectorFileError(
            f"{path} holds {n_rows} rows: choose convention layers (row l is layer l, as in the paper's "
            "code) or hidden_states (row 0 is the embedding), or give the model's number of layers."
        )
    _check_convention(path, convention, ARRAY_CONVENTIONS)
    n_layers = n_rows - (convention == "hidden_states")
    if n_layers < 1 or (n_layer is not None and n_layers != n_layer):
        raise VectorFileError(
            f"{path} holds {n_layers} layers, but the model has {n_layer or 'at least one'}."
        )
    return convention


def _last_tokens(path: str, instructed: np.ndarray, plain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n_pairs, layers, n_embd) from that shape or (n_pairs, layers, n_tokens, n_embd)."""
    if instructed.shape != plain.shape or instructed.ndim not in (3, 4) or 0 in instructed.shape:
        raise VectorFileError(
            f"{path}: states with and without must both be (pairs, layers, n_embd), "
            f"not {instructed.shape} and {plain.shape}."
        )
    if instructed.ndim == 4:
        instructed, plain = instructed[:, :, -1], plain[:, :, -1]
    return instructed, plain


@np.errstate(all="ignore")  # what is not finite is refused by the vector
def _statistics(instructed: np.ndarray, plain: np.ndarray) -> dict[str, np.ndarray]:
    """The paper's definition (docs/method.md), population standard deviations."""
    directions = (instructed - plain).mean(axis=0)
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    units = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
    p_with, p_without = (np.einsum("nle,le->nl", states, units) for states in (instructed, plain))
    return {
        "directions": directions,
        "mean_with": p_with.mean(axis=0), "mean_without": p_without.mean(axis=0),
        "std_with": p_with.std(axis=0), "std_without": p_without.std(axis=0),
    }  # fmt: skip


def _one_layer(path: str, arrays: dict[str, np.ndarray], n_layer: int | None, name: str) -> ControlVector:
    """The paper's pre-computed vectors: a unit direction at one layer, and its mean projections.

    |v| is the difference of the two mean projections, so v = (avg_proj - avg_proj_no_instr) instr_dir.
    """
    try:
        layer, p_with, p_without = (float(arrays[key].reshape(()).item()) for key in _ONE_LAYER[1:])
    except (KeyError, ValueError):
        raise VectorFileError(f"{path}: instr_dir needs the numbers {', '.join(_ONE_LAYER[1:])}.") from None
    unit = arrays["instr_dir"].astype(np.float64)
    if n_layer is None:
        raise VectorFileError(f"{path} holds one layer: pass the model's number of layers.")
    if unit.ndim != 1 or not layer.is_integer() or not 0 <= layer < n_layer:
        raise VectorFileError(
            f"{path}: no direction for a model of {n_layer} layers (layer {layer:g}, shape {unit.shape})."
        )
    directions = _zeros(path, n_layer, len(unit)).astype(np.float64)
    directions[int(layer)] = (p_with - p_without) * unit
    means = np.zeros((2, n_layer))
    means[:, int(layer)] = p_with, p_without
    columns = {"mean_with": means[0], "mean_without": means[1]}
    return _vector(
        path, directions, columns, {"layers": (int(layer),), "name": name}, {"convention": "layers"}
    )
