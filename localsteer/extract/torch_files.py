"""Vectors in files of torch.save: those of steering-vectors, one tensor, or a dictionary of tensors by layer.

A pickle can run code. Files are therefore read with weights_only=True, which allows tensors, plain containers
and, here, a stand-in for the one class of steering-vectors; a file with anything else is refused.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localsteer.cache import atomic_path
from localsteer.convert.exports import losses
from localsteer.convert.imports import vector_of_directions, vector_of_rows
from localsteer.convert.static import constant_rows
from localsteer.errors import LocalsteerError, VectorFileError
from localsteer.vector import ControlVector

STEERING_VECTOR = "steering_vectors.steering_vector.SteeringVector"
SUFFIXES, ZIP_MAGIC = (".pt", ".pth"), b"PK\x03\x04"
RESIDUAL = "decoder_block"  # the layer_type of the residual stream in steering-vectors


@dataclass
class PickledSteeringVector:
    """Stand-in for the class of steering-vectors, with the fields of its pickle."""

    layer_activations: dict[int, Any] = field(default_factory=dict)
    layer_type: str = RESIDUAL


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file was written by torch.save, as a zip archive. One without the end of its archive is
    known by its first bytes and its suffix."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return False
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return Path(path).suffix in SUFFIXES and file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def import_torch_vector(
    path: str | os.PathLike[str],
    *,
    convention: str | None = None,
    n_layer: int | None = None,
    layer: int | Sequence[int] | None = None,
    name: str | None = None,
) -> ControlVector:
    """The vector in a file of torch.save, like `localsteer.convert.import_vector` for other files; it can
    only add.

    A SteeringVector, or {"layer_activations": {layer: tensor}}, or {layer: tensor}; one tensor (n_embd,), for
    the layers of `layer`; one tensor (rows, n_embd), which takes a convention. Raises VectorFileError,
    PlanError.
    """
    path = os.fspath(path)
    name = Path(path).stem if name is None else name
    content = _loaded(path)
    rows = _rows(path, content)
    if rows is not None:
        _refuse_convention(path, convention)
        vector = vector_of_rows(path, rows, n_layer, name, "steering-vectors")
        return vector if layer is None else vector.at(layer=layer)
    array = _array(path, content)
    if array.ndim == 1:
        _refuse_convention(path, convention)
        layers = [layer] if isinstance(layer, int) else list(layer or ())
        if not layers or n_layer is None:
            raise VectorFileError(
                f"{path} holds one direction: name its layer and the model's number of layers."
            )
        return vector_of_rows(path, dict.fromkeys(layers, array), n_layer, name, "torch")
    vector = vector_of_directions(path, {"directions": array}, convention, n_layer, name)
    return vector if layer is None else vector.at(layer=layer)


def write_torch_vector(
    vector: ControlVector,
    path: str | os.PathLike[str],
    *,
    layer: int | Sequence[int] | None = None,
    strength: float | None = None,
) -> tuple[str, ...]:
    """Write {"layer_activations": {layer: tensor}, "layer_type": ...}, the fields of a SteeringVector;
    returns what the file does not hold. `SteeringVector(**torch.load(path, weights_only=True))` restores the
    vector.

    Raises PlanError, VectorFileError.
    """
    torch = _torch()
    chosen = vector.at(layer=layer, strength=strength)
    rows = {il: torch.from_numpy(row) for il, row in constant_rows(chosen).items()}
    if os.path.isdir(path):
        raise VectorFileError(f"{os.fspath(path)} can't be written: it is a folder.")
    try:
        with atomic_path(path) as beside, beside.open("wb") as file:
            torch.save({"layer_activations": rows, "layer_type": RESIDUAL}, file)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise VectorFileError(f"{os.fspath(path)} can't be written: {reason}.") from None
    return losses(chosen, "steering-vectors")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise LocalsteerError(
            f"a file of torch.save needs PyTorch: pip install 'localsteer[torch]' ({error})"
        ) from error
    return torch


def _loaded(path: str) -> Any:
    torch = _torch()
    _check_archive(path)
    stand_in = [(PickledSteeringVector, STEERING_VECTOR)]
    try:
        with torch.serialization.safe_globals(stand_in):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise VectorFileError(
            f"{path} holds more than tensors, which could run code: save its directions with numpy.savez."
        ) from None
    except Exception:  # the file may be anything, and torch raises almost any type of error
        raise VectorFileError(f"{path} is damaged: torch can't read it.") from None


def _check_archive(path: str) -> None:
    """Raise VectorFileError for a compressed archive: torch.save compresses nothing, so it could be a
    bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
            size = sum(info.file_size for info in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        raise VectorFileError(f"{path} is damaged: its archive has no end. Copy or save it again.") from None
    if packed or size > os.path.getsize(path):
        raise VectorFileError(
            f"{path} is damaged: torch.save compresses nothing, but this archive is compressed."
        )


def _rows(path: str, content: Any) -> dict[int, np.ndarray] | None:
    """Directions by layer, from an object that names layers."""
    kind = RESIDUAL
    if isinstance(content, PickledSteeringVector):
        content, kind = content.layer_activations, content.layer_type
    elif isinstance(content, Mapping) and "layer_activations" in content:
        content, kind = content["layer_activations"], content.get("layer_type", RESIDUAL)
    elif not isinstance(content, Mapping):
        return None
    if kind != RESIDUAL:
        raise VectorFileError(
            f"{path} is for {kind!r:.40}: only {RESIDUAL}, the residual stream, can be steered."
        )
    if not isinstance(content, Mapping) or not content:
        raise VectorFileError(f"{path} holds no directions by layer.")
    return {_layer(path, key): _array(path, row) for key, row in content.items()}


def _layer(path: str, key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 6:
        key = int(key)
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise VectorFileError(f"{path} holds {key!r:.40} instead of a layer's number.")
    return key


def _array(path: str, tensor: Any) -> np.ndarray:
    """A direction (n_embd,) or several (rows, n_embd), float64."""
    torch = _torch()
    is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
    if not is_plain or tensor.device.type != "cpu" or not tensor.is_floating_point():
        what = type(tensor).__name__ if not isinstance(tensor, torch.Tensor) else str(tensor.dtype)
        raise VectorFileError(f"{path} holds {what!r:.40} instead of a direction of numbers.")
    # with strides of 0, a few bytes can stand for any number of values
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise VectorFileError(f"{path} is damaged: a tensor claims more numbers than the file has.")
    array = tensor.detach().to(torch.float64).numpy()
    array = array.reshape(-1) if array.ndim > 1 and array.size == array.shape[-1] else array  # (1, 1, n_embd)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise VectorFileError(f"{path}: directions must be (n_embd,) or (layers, n_embd), not {array.shape}.")
    return array


def _refuse_convention(path: str, convention: str | None) -> None:
    if convention is not None:
        raise VectorFileError(f"{path} names its layers itself: it takes no convention.")
