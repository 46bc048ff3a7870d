"""A control vector: one direction per layer, and the settings to apply it with. Needs only numpy."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np

from .errors import MismatchError, PlanError, VectorFileError
from .terms import MODES, POSITIONS

STATISTICS = ("mean_with", "mean_without", "std_with", "std_without")  # one number for each layer


@dataclass(frozen=True, eq=False, repr=False)
class ControlVector:
    """Directions and the settings (`layers`, `mode`, ...) that travel with them; only `at` changes settings.

    directions: (n_layer, n_embd) float32, v_l = mean(h_l(with) - h_l(without)) at the last prompt token,
        unnormalised, in residual-stream units; a row of zeros means no direction at that layer.
    mean_with, mean_without, std_with, std_without: (n_layer,) float32, mean and standard deviation of the
        projection on the unit direction, with and without the instruction. `mean_with` is the target of
        `project`; a vector without it (an import) can only add or ablate.
    layers: chosen layers, 0-based: layer l is steered at its output, `l_out-l` in llama.cpp.
    strength: the user's multiplier. cap: bound on the absolute dynamic weight, residual-stream units.
    one_sided: only raise the projection, never lower it; for a gate, no weight below 0.
    readers, biases: (n_layer, n_embd) and (n_layer,) float32, or both None. Mode `gate` gives the direction
        the weight w_l . x / rms(x) + b_l, with x the token's state, while `add` gives it 1. The mean of that
        weight is 1: the direction is the gate's mean effect, which `add` and stock llama.cpp apply.

    Arrays are copied and made read-only. Raises PlanError for settings that make no sense, VectorFileError
    for arrays that do not form a vector.
    """

    directions: np.ndarray
    mean_with: np.ndarray | None
    mean_without: np.ndarray | None
    std_with: np.ndarray | None
    std_without: np.ndarray | None
    layers: tuple[int, ...]
    mode: str = "project"
    positions: str = "all"
    strength: float = 1.0
    one_sided: bool = False
    cap: float | None = None
    name: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    readers: np.ndarray | None = None
    biases: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._put("directions", _directions(self.directions, self.label))
        for key in STATISTICS:
            self._put(key, _per_layer(getattr(self, key), key, self.n_layer, self.label))
        self._put("readers", _readers(self.readers, self.directions.shape, self.label))
        self._put("biases", _per_layer(self.biases, "biases", self.n_layer, self.label))
        if (self.readers is None) != (self.biases is None):
            raise VectorFileError(f"{self.label}: a gate needs both readers and biases, and one is missing.")
        if not self.gated:  # as read from a file, which has no place for gates that are zero
            self._put("readers", None)
            self._put("biases", None)
        self._put("layers", checked_layers(self.layers, self.n_layer, self.label))
        self._put("strength", finite_number(self.strength, "strength"))
        self._put("one_sided", bool(self.one_sided))
        self._put("cap", _cap(self.cap))
        self._put("provenance", dict(self.provenance))
        self._check_settings()

    def _put(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)  # the class is frozen; used only during construction

    def _check_settings(self) -> None:
        if self.mode not in MODES:
            raise PlanError(f"unknown mode {self.mode!r}: choose one of {', '.join(MODES)}.")
        if self.positions not in POSITIONS:
            raise PlanError(f"unknown positions {self.positions!r}: choose one of {', '.join(POSITIONS)}.")
        if self.mode == "project" and self.mean_with is None:
            raise PlanError(
                f"{self.label} has no mean projection (an import), so it can't project: use add or ablate."
            )
        if self.mode == "add" and (self.one_sided or self.cap is not None):
            raise PlanError(
                "one-sided and cap limit the dynamic weight, and add has none: use project or ablate."
            )
        if self.mode == "gate" and self.readers is None:
            raise PlanError(f"{self.label} has no learned gate: use add or another mode.")
        for layer in self.layers:
            if not self.directions[layer].any():
                known = _ranges(self.usable_layers)
                raise PlanError(
                    f"{self.label} has no direction at layer {layer} (it is zero): choose from {known}."
                )
            if self.mode == "gate" and layer not in self.gated:
                known = _ranges(self.gated)
                raise PlanError(f"{self.label} has no gate at layer {layer}: choose from {known}.")

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.layers))
        size = f"{self.n_layer} layers x {self.n_embd}"
        what = f"{self.mode} at layer {where}, strength {self.strength:g}, positions {self.positions}"
        return f"ControlVector({self.name!r}, {size}, {what})"

    @property
    def n_layer(self) -> int:
        return self.directions.shape[0]

    @property
    def n_embd(self) -> int:
        return self.directions.shape[1]

    @property
    def label(self) -> str:
        """The name for messages: never empty."""
        return self.name or "the vector"

    @property
    def phrasings(self) -> tuple[str, ...]:
        """The wordings it was extracted with; empty if the file, which may be anyone's, names none."""
        kept = self.provenance.get("phrasings")
        texts = kept if isinstance(kept, (list, tuple)) else ()
        return tuple(text for text in texts if isinstance(text, str))

    @property
    def usable_layers(self) -> tuple[int, ...]:
        """The layers that have a direction."""
        return tuple(int(il) for il in np.flatnonzero(self.directions.any(axis=1)))

    @property
    def gated(self) -> tuple[int, ...]:
        """The layers that have a learned gate."""
        if self.readers is None or self.biases is None:
            return ()
        return tuple(int(il) for il in np.flatnonzero(self.readers.any(axis=1) | (self.biases != 0)))

    def unit(self, layer: int) -> np.ndarray:
        """The direction at one layer divided by its length: (n_embd,) float32, normalised in float64.

        Raises PlanError if there is no direction.
        """
        (layer,) = checked_layers(layer, self.n_layer, self.label)
        direction = self.directions[layer].astype(np.float64)
        norm = np.linalg.norm(direction)
        if norm == 0:
            raise PlanError(f"{self.label} has no direction at layer {layer}.")
        return (direction / norm).astype(np.float32)

    @classmethod
    def from_gate(
        cls,
        layer: int,
        reader: np.ndarray,
        bias: float,
        writer: np.ndarray,
        *,
        mean_gate: float,
        n_layer: int,
        **settings: Any,
    ) -> ControlVector:
        """A vector for a learned edit of one layer, x <- x + g writer with g = reader . x / rms(x) + bias.

        reader, writer: (n_embd,). mean_gate: the mean of g (clipped, if `one_sided`) over the tokens that the
        edit is for; the direction is mean_gate * writer, and the gate is divided by mean_gate. settings:
        other fields of the class; a `cap` limits |g| times the length of the writer. Raises PlanError for a
        mean of 0, and for a negative one where clipping rules it out.
        """
        return cls.from_gates({layer: (reader, bias, writer, mean_gate)}, n_layer=n_layer, **settings)

    @classmethod
    def from_gates(
        cls,
        gates: Mapping[int, tuple[np.ndarray, float, np.ndarray, float]],
        *,
        n_layer: int,
        **settings: Any,
    ) -> ControlVector:
        """A vector for edits that were learned together at several layers: layer -> (reader, bias, writer,
        mean_gate), each as in `from_gate`."""
        layers = checked_layers(tuple(gates), n_layer, "the model")
        n_embd = len(np.asarray(gates[layers[0]][2]))
        directions, readers = np.zeros((2, n_layer, n_embd))
        biases = np.zeros(n_layer)
        for layer in layers:
            reader, bias, writer, mean_gate = gates[layer]
            mean = finite_number(mean_gate, "mean_gate")
            if mean == 0 or (mean < 0 and settings.get("one_sided")):
                raise PlanError(
                    f"a gate of mean {mean:g} has no constant effect to fall back on: check mean_gate."
                )
            directions[layer], biases[layer] = mean * np.asarray(writer, np.float64), bias / mean
            readers[layer] = np.asarray(reader, np.float64) / mean
        return cls(
            directions,
            None,
            None,
            None,
            None,
            layers,
            mode="gate",
            readers=readers,
            biases=biases,
            **settings,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlVector:
        """Read a control-vector GGUF written by localsteer. Raises VectorFileError."""
        from localsteer.convert import read_vector

        return read_vector(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a control-vector GGUF (docs/format.md), replacing the file at `path` in one step."""
        from localsteer.convert import write_vector

        write_vector(self, path)

    def at(
        self,
        *,
        layer: int | Sequence[int] | None = None,
        strength: float | None = None,
        mode: str | None = None,
        positions: str | None = None,
        one_sided: bool | None = None,
        cap: float | None = None,
    ) -> ControlVector:
        """The same directions with other settings; None keeps a setting, `cap=math.inf` removes the cap.

        Changing the mode to `add` drops one_sided and cap if they came with the vector, because `add` has no
        dynamic weight to limit. Raises PlanError.
        """
        if mode == "add" and self.mode != "add":
            one_sided, cap = bool(one_sided), math.inf if cap is None else cap
        changes = {
            "layers": layer,
            "strength": strength,
            "mode": mode,
            "positions": positions,
            "one_sided": one_sided,
            "cap": cap,
        }
        return replace(self, **{key: value for key, value in changes.items() if value is not None})


def check_model(vector: ControlVector, n_layer: int, n_embd: int, architecture: str) -> None:
    """Raise MismatchError unless the vector was made for a model of this width, depth and architecture.

    A vector without a recorded architecture (an import) is checked only by width and depth.
    """
    for what, ours, theirs in (
        ("embedding width", vector.n_embd, n_embd),
        ("number of layers", vector.n_layer, n_layer),
        ("architecture", vector.provenance.get("architecture") or architecture, architecture or None),
    ):
        if theirs is not None and ours != theirs:
            raise MismatchError(
                f"{vector.label} was made for a model with {what} {ours} but this model has {theirs}: "
                "extract the vector from this model, or choose the model that it was made from."
            )


class VectorSettings(TypedDict):
    """Which vector steers, where and how: what every transcript and report says of it."""

    name: str
    layers: list[int]
    mode: str
    positions: str
    strength: float


def settings_of(vector: ControlVector) -> VectorSettings:
    return {
        "name": vector.name,
        "layers": list(vector.layers),
        "mode": vector.mode,
        "positions": vector.positions,
        "strength": vector.strength,
    }


class _Gate(TypedDict, total=False):
    """Of a layer that has one: length of its reader, and its bias."""

    gate_reader_norm: float
    gate_bias: float


class LayerFacts(_Gate):
    """One layer: length of the direction, mean and spread of the projections, where they are known."""

    layer: int
    chosen: bool
    norm: float
    mean_with: float | None
    mean_without: float | None
    std_with: float | None
    std_without: float | None


class VectorFacts(VectorSettings):
    """by_layer: an entry for each layer, in order. provenance: as the vector has it, whatever made it."""

    n_layer: int
    n_embd: int
    one_sided: bool
    cap: float | None
    by_layer: list[LayerFacts]
    provenance: dict[str, Any]


def describe(vector: ControlVector) -> VectorFacts:
    """What a vector holds, as plain JSON-able values."""
    columns = {key: getattr(vector, key) for key in STATISTICS}
    norms = np.linalg.norm(vector.directions.astype(np.float64), axis=1)
    by_layer = []
    for il in range(vector.n_layer):
        entry = {"layer": il, "chosen": il in vector.layers, "norm": float(norms[il])}
        entry |= {key: None if c is None else float(c[il]) for key, c in columns.items()}
        by_layer.append(entry | _gate(vector, il))
    return {
        **settings_of(vector),
        "n_layer": vector.n_layer,
        "n_embd": vector.n_embd,
        "one_sided": vector.one_sided,
        "cap": vector.cap,
        "by_layer": by_layer,
        "provenance": dict(vector.provenance),
    }


def _gate(vector: ControlVector, il: int) -> _Gate:
    if il not in vector.gated:
        return {}
    length = np.linalg.norm(vector.readers[il].astype(np.float64))
    return {"gate_reader_norm": float(length), "gate_bias": float(vector.biases[il])}


def _frozen(array: Any, label: str, what: str) -> np.ndarray:
    """A read-only float32 copy; an array that is already read-only float32 is shared. Raises
    VectorFileError."""
    if not _is_frozen(array):
        try:
            # values that overflow float32 become infinite, and are refused as such
            with np.errstate(over="ignore"):
                array = np.array(array, dtype=np.float32, order="C")
        except (TypeError, ValueError):
            raise VectorFileError(f"{label}: {what} must be an array of numbers.") from None
        array.flags.writeable = False
    if not np.isfinite(array).all():
        raise VectorFileError(f"{label}: {what} holds NaN or infinite values: extract the vector again.")
    return array


def _is_frozen(array: Any) -> bool:
    if type(array) is not np.ndarray or array.dtype != np.float32:
        return False
    return array.flags.owndata and array.flags.c_contiguous and not array.flags.writeable


def _directions(array: Any, label: str) -> np.ndarray:
    directions = _frozen(array, label, "directions")
    if directions.ndim != 2 or 0 in directions.shape:
        raise VectorFileError(f"{label}: directions must be (n_layer, n_embd), not {directions.shape}.")
    return directions


def _readers(array: Any, shape: tuple[int, ...], label: str) -> np.ndarray | None:
    if array is None:
        return None
    readers = _frozen(array, label, "readers")
    if readers.shape != shape:
        raise VectorFileError(f"{label}: readers must be {shape} as the directions are, not {readers.shape}.")
    return readers


def _per_layer(array: Any, what: str, n_layer: int, label: str) -> np.ndarray | None:
    if array is None:
        return None
    column = _frozen(array, label, what)
    if column.shape != (n_layer,):
        raise VectorFileError(
            f"{label}: {what} must hold one number per layer ({n_layer}), not {column.shape}."
        )
    return column


def checked_layers(layers: int | Sequence[int], n_layer: int, label: str) -> tuple[int, ...]:
    """The layers, sorted, unique and in range. label: for messages, what has these layers. Raises
    PlanError."""
    try:
        chosen = sorted({operator.index(il) for il in (layers if np.iterable(layers) else (layers,))})
    except TypeError:
        raise PlanError(f"layer {layers!r} is not a layer number: choose 0 to {n_layer - 1}.") from None
    if not chosen:
        raise PlanError(f"no layer is chosen: choose 0 to {n_layer - 1}.")
    for il in chosen:
        if not 0 <= il < n_layer:
            raise PlanError(f"layer {il} is out of range: {label} has layers 0 to {n_layer - 1}.")
    return tuple(chosen)


def finite_number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"{what} {value!r:.40} is not a number.") from None
    if not math.isfinite(number):
        raise PlanError(f"{what} must be a finite number, not {number}.")
    return number


def _cap(value: Any) -> float | None:
    if value is None or value == math.inf:
        return None
    cap = finite_number(value, "cap")
    if cap <= 0:
        raise PlanError(f"cap must be above 0, not {cap:g}; strength 0 switches a vector off.")
    return cap


def _ranges(layers: Sequence[int]) -> str:
    """Layers as text for messages: `1-27` or `2, 5-7`."""
    runs: list[list[int]] = []
    for il in layers:
        if runs and runs[-1][1] == il - 1:
            runs[-1][1] = il
        else:
            runs.append([il, il])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"
