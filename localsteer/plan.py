"""What applies to one sequence: which edits, at which block, in which class of positions. numpy only.

A plan is built from control vectors and never changes. `Plan.program` gives the arrays that one token needs
at one block; steering.py says what they mean, and native and PyTorch follow it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from .errors import MismatchError, PlanError
from .vector import ControlVector, _finite

# Above this cosine two directions at one block are refused. To move two projections independently the joint
# solve stretches the change by up to 1 / sqrt(1 - |cosine|): ten times at 0.99, which leaves the residual
# stream no longer near anything that the model has seen. float32 would hold out much further.
PARALLEL_COSINE = 0.99


class PositionClass(IntEnum):
    """What a token is to its request; earlier replies of a chat are prompt."""

    PROMPT = 0  # a prompt token before the last one
    LAST = 1  # the last prompt token
    GENERATION = 2  # a generated token, as input


_ACTIVE = {
    "all": frozenset(PositionClass),
    "prompt": frozenset({PositionClass.PROMPT, PositionClass.LAST}),
    "last": frozenset({PositionClass.LAST, PositionClass.GENERATION}),
    "generation": frozenset({PositionClass.GENERATION}),
}


def active(positions: str, cls: PositionClass) -> bool:
    """Whether a setting of positions covers a token of this class. Raises PlanError."""
    if positions not in _ACTIVE:
        raise PlanError(f"unknown positions {positions!r}: choose one of {', '.join(_ACTIVE)}.")
    return cls in _ACTIVE[positions]


@dataclass(frozen=True, eq=False)
class Edit:
    """One vector at one block. direction: (n_embd,) float32, unnormalised; unit: the same at length 1.

    mean_projection: the target of the projection; 0 for `ablate`, unused (0) for `add`.
    """

    layer: int
    mode: str
    direction: np.ndarray
    unit: np.ndarray
    mean_projection: float
    strength: float
    positions: str
    one_sided: bool
    cap: float | None
    name: str

    @property
    def digest(self) -> bytes:
        """A hash of everything that changes the result, so not of the name."""
        head = struct.pack(
            "<i?d?d", self.layer, self.one_sided, self.strength, self.cap is None, self.cap or 0.0
        )
        body = f"{self.mode} {self.positions} ".encode() + struct.pack("<d", self.mean_projection)
        return hashlib.sha256(head + body + self.direction.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Program:
    """What one token gets at one block: k projections to set jointly, then an offset to add.

    units: (k, n_embd) float32. targets, strengths: (k,) float64. one_sided: (k,) bool.
    caps: (k,) float32, inf = none. offset: (n_embd,) float32, the sum of s * v of the adds, or None.
    """

    units: np.ndarray
    targets: np.ndarray
    strengths: np.ndarray
    one_sided: np.ndarray
    caps: np.ndarray
    ridge: float
    offset: np.ndarray | None


class Plan:
    """Edits of strength 0 vanish, so a plan of them is empty and the model runs exactly as without one.

    edits: ordered by block, then by content, so that the order in which vectors were given changes no bit.
    key: equal plans have equal keys. notices: what the user should be told, one line each.
    """

    def __init__(self, edits: Sequence[Edit], *, ridge: float = 0.0, n_embd: int = 0) -> None:
        self.edits: tuple[Edit, ...] = tuple(sorted(edits, key=lambda edit: (edit.layer, edit.digest)))
        self.ridge = _finite(ridge, "ridge")
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
        """Nearly parallel projections at one block in one class are refused unless `ridge` is above 0.

        ridge: added to the diagonal of the Gram matrix of the unit directions (whose diagonal is 1); with it
        targets are approached, not reached. Raises PlanError, and MismatchError for vectors of two models.
        """
        for vector in vectors[1:]:
            if vector.directions.shape != vectors[0].directions.shape:
                a, b = vectors[0], vector
                raise MismatchError(
                    f"{a.label} is {a.n_layer} blocks x {a.n_embd} but {b.label} is {b.n_layer} x "
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
        """Blocks with an edit in some class, ascending."""
        return tuple(sorted({edit.layer for edit in self.edits}))

    def program(self, layer: int, cls: PositionClass) -> Program | None:
        """What a token of this class gets at this block; None when that is nothing."""
        return self._programs.get((layer, PositionClass(cls)))

    def class_key(self, cls: PositionClass) -> bytes:
        """Equal for two (plan, class) that treat a token alike at every block; empty when nothing is applied.

        This, with the token, is what a cached position of the KV cache depends on.
        """
        return self._class_keys[PositionClass(cls)]

    def __repr__(self) -> str:
        return (
            f"Plan({', '.join(f'{e.name or e.mode}:{e.strength:g}@{e.layer}' for e in self.edits) or 'none'})"
        )

    def _edits_in(self, cls: PositionClass) -> list[tuple[Edit, str]]:
        # within one class the setting of positions no longer matters: `all` covers every class alike
        return [(edit, "all") for edit in self.edits if active(edit.positions, cls)]

    def _build(self, layer: int, cls: PositionClass) -> Program | None:
        edits = [edit for edit in self.edits if edit.layer == layer and active(edit.positions, cls)]
        if not edits:
            return None
        solved = [edit for edit in edits if edit.mode != "add"]
        added = [edit for edit in edits if edit.mode == "add"]
        self._check_parallel(solved, layer)
        return Program(
            units=_rows([edit.unit for edit in solved], self.n_embd),
            targets=_fixed([edit.mean_projection for edit in solved], np.float64),
            strengths=_fixed([edit.strength for edit in solved], np.float64),
            one_sided=_fixed([edit.one_sided for edit in solved], np.bool_),
            caps=_fixed([np.inf if edit.cap is None else edit.cap for edit in solved], np.float32),
            ridge=self.ridge,
            offset=_offset(added) if added else None,
        )

    def _check_parallel(self, edits: Sequence[Edit], layer: int) -> None:
        """Refuse directions that nearly depend on each other, or note that the ridge is at work.

        The smallest eigenvalue of the Gram matrix is 1 - |cosine| for a pair; it falls also for three in a
        plane. A subset (one-sided edits may stay out) never has a smaller one: one check serves every token.
        """
        if len(edits) < 2:
            return
        units = np.stack([edit.unit for edit in edits]).astype(np.float64)
        gram = units @ units.T
        if np.linalg.eigvalsh(gram)[0] >= 1 - PARALLEL_COSINE:
            return
        i, j = np.unravel_index(np.argmax(np.abs(np.triu(gram, 1))), gram.shape)
        first, second = edits[i].name or "a vector", edits[j].name or "another"
        what = f"{first} and {second} are nearly parallel at block {layer} (cosine {gram[i, j]:.4f})"
        if len(edits) > 2:
            what = f"{len(edits)} directions at block {layer} nearly depend on each other; closest: {what}"
        if self.ridge == 0:
            raise PlanError(f"{what}: leave one out, move one to another block, or set a ridge (try 0.1).")
        notice = f"{what}: regularised with ridge {self.ridge:g}, so targets are approached, not reached."
        self.notices = tuple(dict.fromkeys((*self.notices, notice)))


def _edit(vector: ControlVector, layer: int) -> Edit:
    target = (
        float(vector.mean_with[layer]) if vector.mode == "project" and vector.mean_with is not None else 0.0
    )
    return Edit(
        layer=layer,
        mode=vector.mode,
        direction=vector.directions[layer],
        unit=vector.unit(layer),
        mean_projection=target,
        strength=vector.strength,
        positions=vector.positions,
        one_sided=vector.one_sided,
        cap=vector.cap,
        name=vector.name,
    )


def _offset(added: Sequence[Edit]) -> np.ndarray:
    """What `add` adds, (n_embd,) float32. Raises PlanError where that is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        offset = _fixed(sum(e.strength * e.direction.astype(np.float64) for e in added), np.float32)
    if not np.isfinite(offset).all():
        what = ", ".join(f"{e.name or 'a vector'}:{e.strength:g}" for e in added)
        raise PlanError(f"{what} adds more than a state can hold: lower the strength.")
    return offset


def _key(edits: Sequence[tuple[Edit, str]], ridge: float) -> bytes:
    if not edits:
        return b""
    digests = sorted(replace(edit, positions=positions).digest for edit, positions in edits)
    return hashlib.sha256(struct.pack("<d", ridge) + b"".join(digests)).digest()


def _fixed(values: object, dtype: type) -> np.ndarray:
    array = np.array(values, dtype=dtype)
    array.flags.writeable = False
    return array


def _rows(units: Sequence[np.ndarray], n_embd: int) -> np.ndarray:
    return _fixed(np.stack(units) if units else np.zeros((0, n_embd)), np.float32)
