"""What applies to one sequence: which edits, at which layer, for which class of positions. Needs only numpy.

A plan is built from control vectors and never changes. `Plan.program` returns the arrays that one token needs
at one layer; steering.py defines what they mean, and the native and PyTorch code follow it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypedDict

import numpy as np

from .errors import MismatchError, PlanError
from .vector import ControlVector, finite_number

# Above this cosine two directions at one layer are refused. To move two projections independently, the joint
# solve stretches the change by up to 1 / sqrt(1 - |cosine|): ten times at 0.99, which takes the residual
# stream far from anything the model has seen. float32 precision would allow much more.
PARALLEL_COSINE = 0.99


class PositionClass(IntEnum):
    """The role of a token in its request; earlier replies of a chat are prompt."""

    PROMPT = 0  # a prompt token before the last one
    LAST = 1  # the last prompt token
    GENERATION = 2  # a generated token, as input
    FORM = 3  # inside a tool call or a forced form that stays plain (Ask.plain_forms): never steered


def position_classes(positions: np.ndarray, n_prompt: np.ndarray | int) -> np.ndarray:
    """The PositionClass of each position, as int8, in a request whose first n_prompt tokens are prompt."""
    return (positions >= n_prompt - 1).astype(np.int8) + (positions >= n_prompt)


_ACTIVE = {
    "all": frozenset({PositionClass.PROMPT, PositionClass.LAST, PositionClass.GENERATION}),
    "prompt": frozenset({PositionClass.PROMPT, PositionClass.LAST}),
    "last": frozenset({PositionClass.LAST, PositionClass.GENERATION}),
    "generation": frozenset({PositionClass.GENERATION}),
}


def active(positions: str, cls: PositionClass) -> bool:
    """Whether a positions setting covers a token of this class. Raises PlanError."""
    if positions not in _ACTIVE:
        raise PlanError(f"unknown positions {positions!r}: choose one of {', '.join(_ACTIVE)}.")
    return cls in _ACTIVE[positions]


@dataclass(frozen=True, eq=False)
class Edit:
    """One vector at one layer: x <- x + clip(reader . n(x) + bias) writer, strength included (steering.py).

    reader, writer: (n_embd,) float32. normalised: n(x) is x / rms(x), else x. cap: bound on the absolute
    weight, in units of the writer. target: the value to which strength 1 sets the projection, or None; edits
    with a target are solved jointly, and their writers have length 1.
    """

    layer: int
    reader: np.ndarray
    bias: float
    writer: np.ndarray
    normalised: bool
    one_sided: bool
    cap: float | None
    target: float | None
    positions: str
    mode: str
    strength: float
    name: str

    @property
    def is_constant(self) -> bool:
        """Whether the edit adds the same to every token."""
        return self.target is None and not (self.reader.any() or self.one_sided or self.cap is not None)

    @property
    def digest(self) -> bytes:
        """A hash of everything that affects the result, which excludes the name."""
        flags = (self.normalised, self.one_sided, self.target is not None, self.cap is None)
        head = struct.pack("<i4?dd", self.layer, *flags, self.bias, self.cap or 0.0) + self.positions.encode()
        return hashlib.sha256(head + self.reader.tobytes() + self.writer.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Program:
    """The edits of one token at one layer: k weights, all computed from the same state, times k writers.

    readers, writers: (k, n_embd) float32; a reader of zeros reads nothing, not even a NaN. biases: (k,)
    float64. normalised, one_sided: (k,) bool. caps: (k,) float32, inf = none. n_solved: how many, from the
    first on, are solved jointly; 0 or at least 2. ridge: added to the diagonal of their Gram matrix.
    """

    readers: np.ndarray
    biases: np.ndarray
    writers: np.ndarray
    normalised: np.ndarray
    one_sided: np.ndarray
    caps: np.ndarray
    n_solved: int
    ridge: float


class Plan:
    """What steers one sequence. Edits of strength 0 vanish: a plan of only such edits is empty, and the model
    runs exactly as without a plan.

    edits: ordered by layer, then by content, so that the order of the vectors changes no bit. key: equal
    plans have equal keys. notices: what the user should be told, one line each.
    """

    def __init__(self, edits: Sequence[Edit], *, ridge: float = 0.0, n_embd: int = 0) -> None:
        self.edits: tuple[Edit, ...] = tuple(sorted(edits, key=lambda edit: (edit.layer, edit.digest)))
        self.ridge = finite_number(ridge, "ridge")
        if self.ridge < 0:
            raise PlanError(f"ridge must not be negative, not {self.ridge:g}.")
        self.n_embd = n_embd if self.edits else 0
        self.notices: tuple[str, ...] = ()
        self._programs = {
            (layer, cls): self._build(layer, cls) for layer in self.layers for cls in PositionClass
        }
        self._class_keys = {cls: _key(self._edits_in(cls), self.ridge) for cls in PositionClass}
        self.key = _key([(edit, edit.positions) for edit in self.edits], self.ridge)

    @classmethod
    def from_vectors(cls, vectors: Sequence[ControlVector], *, ridge: float = 0.0) -> Plan:
        """The plan of these vectors. Projections that are nearly parallel at one layer, for one class of
        positions, are refused unless `ridge` is above 0.

        ridge: added to the diagonal of the Gram matrix of the unit directions (whose diagonal is 1); targets
        are then approached, not reached. Raises PlanError, and MismatchError for vectors of different models.
        """
        for vector in vectors[1:]:
            if vector.directions.shape != vectors[0].directions.shape:
                a, b = vectors[0], vector
                raise MismatchError(
                    f"{a.label} is {a.n_layer} layers x {a.n_embd} but {b.label} is {b.n_layer} x "
                    f"{b.n_embd}: they were made for different models."
                )
        edits = [
            _edit(vector, layer) for vector in vectors if vector.strength != 0 for layer in vector.layers
        ]
        return cls(edits, ridge=ridge, n_embd=vectors[0].n_embd if edits else 0)

    @classmethod
    def none(cls) -> Plan:
        return cls(())

    @property
    def is_empty(self) -> bool:
        return not self.edits

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with an edit for some class, ascending."""
        return tuple(sorted({edit.layer for edit in self.edits}))

    def program(self, layer: int, cls: PositionClass) -> Program | None:
        """The program for a token of this class at this layer, or None if nothing applies."""
        return self._programs.get((layer, PositionClass(cls)))

    def class_key(self, cls: PositionClass) -> bytes:
        """A key that is equal for two (plan, class) that treat a token alike at every layer; empty if nothing
        is applied.

        A position in the KV cache depends on this and on its token.
        """
        return self._class_keys[PositionClass(cls)]

    def __repr__(self) -> str:
        return (
            f"Plan({', '.join(f'{e.name or e.mode}:{e.strength:g}@{e.layer}' for e in self.edits) or 'none'})"
        )

    def _edits_in(self, cls: PositionClass) -> list[tuple[Edit, str]]:
        # within one class the positions setting no longer matters: `all` covers every class alike
        return [(edit, "all") for edit in self.edits if active(edit.positions, cls)]

    def rows(self, layer: int, cls: PositionClass) -> list[Edit]:
        """The edits that make the rows of `program`, except its last, which is the sum of the constant
        ones."""
        edits = [edit for edit in self._at(layer, cls) if not edit.is_constant]
        return sorted(edits, key=lambda edit: edit.target is None)

    def _at(self, layer: int, cls: PositionClass) -> list[Edit]:
        return [edit for edit in self.edits if edit.layer == layer and active(edit.positions, cls)]

    def _build(self, layer: int, cls: PositionClass) -> Program | None:
        rows = self.rows(layer, cls)
        solved = [edit for edit in rows if edit.target is not None]
        self._check_parallel(solved, layer)
        if len(solved) == 1:
            rows[0] = _solved_alone(rows[0], self.ridge)
        constant = [edit for edit in self._at(layer, cls) if edit.is_constant]
        rows += [_sum(constant)] if constant else []
        if not rows:
            return None
        return Program(
            readers=_fixed([edit.reader for edit in rows], np.float32),
            biases=_fixed([edit.bias for edit in rows], np.float64),
            writers=_fixed([edit.writer for edit in rows], np.float32),
            normalised=_fixed([edit.normalised for edit in rows], np.bool_),
            one_sided=_fixed([edit.one_sided for edit in rows], np.bool_),
            caps=_fixed([np.inf if edit.cap is None else edit.cap for edit in rows], np.float32),
            n_solved=len(solved) if len(solved) > 1 else 0,
            ridge=self.ridge,
        )

    def _check_parallel(self, edits: Sequence[Edit], layer: int) -> None:
        """Refuse directions that are nearly linearly dependent, or note that the ridge applies.

        The smallest eigenvalue of the Gram matrix is 1 - |cosine| for a pair; it is also small for three in a
        plane. A subset (one-sided edits may stay out) never has a smaller one, so one check serves all
        tokens.
        """
        if len(edits) < 2:
            return
        units = np.stack([edit.writer for edit in edits]).astype(np.float64)
        gram = units @ units.T
        if np.linalg.eigvalsh(gram)[0] >= 1 - PARALLEL_COSINE:
            return
        i, j = np.unravel_index(np.argmax(np.abs(np.triu(gram, 1))), gram.shape)
        first, second = edits[i].name or "a vector", edits[j].name or "another"
        what = f"{first} and {second} are nearly parallel at layer {layer} (cosine {gram[i, j]:.4f})"
        if len(edits) > 2:
            what = f"{len(edits)} directions at layer {layer} are nearly linearly dependent; closest: {what}"
        if self.ridge == 0:
            raise PlanError(f"{what}: leave one out, move one to another layer, or set a ridge (try 0.1).")
        notice = f"{what}: regularised with ridge {self.ridge:g}, so targets are approached, not reached."
        self.notices = tuple(dict.fromkeys((*self.notices, notice)))


def _edit(vector: ControlVector, layer: int) -> Edit:
    """The edit that a vector makes at a layer, in terms of the one formula. Raises PlanError if the strength
    is too great."""
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused as such
        values = _VALUES[vector.mode](vector, layer)
    reader, writer = (_held(values.pop(name), vector) for name in ("reader", "writer"))
    common = {"normalised": False, "cap": vector.cap, "target": None} | values
    return Edit(
        layer=layer,
        reader=reader,
        writer=writer,
        **common,
        one_sided=vector.one_sided,
        positions=vector.positions,
        mode=vector.mode,
        strength=vector.strength,
        name=vector.name,
    )


class _EditValues(TypedDict, total=False):
    """Fields of an Edit that depend on its mode; without the last three, as Edit has them by default."""

    reader: np.ndarray
    bias: float
    writer: np.ndarray
    target: float
    normalised: bool
    cap: float | None


def _project(vector: ControlVector, layer: int, target: float | None = None) -> _EditValues:
    unit, target = vector.unit(layer), float(vector.mean_with[layer]) if target is None else target
    bias = vector.strength * target
    return {"reader": -vector.strength * _wide(unit), "bias": bias, "writer": unit, "target": target}


def _ablate(vector: ControlVector, layer: int) -> _EditValues:
    return _project(vector, layer, target=0.0)


def _add(vector: ControlVector, layer: int) -> _EditValues:
    direction = vector.directions[layer]
    return {"reader": np.zeros_like(direction), "bias": vector.strength, "writer": direction}


def _gate(vector: ControlVector, layer: int) -> _EditValues:
    """The edit of a learned gate. A negative strength reverses the writer: it subtracts what a positive one
    adds, clipped or not."""
    size, direction, reader = abs(vector.strength), _wide(vector.directions[layer]), vector.readers[layer]
    return {
        "reader": size * _wide(reader),
        "bias": size * float(vector.biases[layer]),
        "writer": math.copysign(1.0, vector.strength) * direction,
        "normalised": bool(reader.any()),
        "cap": None if vector.cap is None else vector.cap / float(np.linalg.norm(direction)),
    }


_VALUES: dict[str, Callable[[ControlVector, int], _EditValues]] = {
    "project": _project, "ablate": _ablate, "add": _add, "gate": _gate,
}  # fmt: skip


def _solved_alone(edit: Edit, ridge: float) -> Edit:
    """Fold the joint solve of a single edit, which is a division, into reader and bias. Raises PlanError if
    float32 can't hold them."""
    squared = float(_wide(edit.writer) @ _wide(edit.writer)) + ridge
    with np.errstate(over="ignore"):
        reader = _fixed(_wide(edit.reader) / squared, np.float32)
    if not np.isfinite(reader).all():
        raise PlanError(f"{edit.name or 'a vector'}: its direction is too short to project on.")
    return replace(edit, reader=reader, bias=edit.bias / squared)


def _sum(constant: Sequence[Edit]) -> Edit:
    """The sum of constant edits as one edit of weight 1. Raises PlanError if it is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(edit.bias * _wide(edit.writer) for edit in constant)
    return replace(constant[0], bias=1.0, writer=_held(total, *constant))


def _held(array: np.ndarray, *sources: ControlVector | Edit) -> np.ndarray:
    """The row as read-only (n_embd,) float32. Raises PlanError for values that float32 can't hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        held = _fixed(array, np.float32)
    if not np.isfinite(held).all():
        what = ", ".join(f"{source.name or 'a vector'}:{source.strength:g}" for source in sources)
        raise PlanError(f"{what} adds more than a state can hold: lower the strength.")
    return held


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _key(edits: Sequence[tuple[Edit, str]], ridge: float) -> bytes:
    if not edits:
        return b""
    digests = sorted(replace(edit, positions=positions).digest for edit, positions in edits)
    return hashlib.sha256(struct.pack("<d", ridge) + b"".join(digests)).digest()


def _fixed(values: object, dtype: type) -> np.ndarray:
    array = np.array(values, dtype=dtype)
    array.flags.writeable = False
    return array
