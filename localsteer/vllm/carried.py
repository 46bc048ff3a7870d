"""A plan as bytes, from where requests come in to the workers, which may be other processes and machines.

The whole plan goes along, not the name: a file that is changed or deleted meanwhile changes nothing, and what
is computed is what the prefix cache's salt says.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from localsteer.plan import Edit, Plan

KEY = "localsteer_plan"  # in a request's extra_args; nobody else may set it


class CarriedEdit(msgspec.Struct, array_like=True):
    """An Edit; reader: empty where it reads nothing."""

    layer: int
    reader: bytes
    bias: float
    writer: bytes
    normalised: bool
    one_sided: bool
    cap: float | None
    target: float | None
    positions: str
    mode: str
    strength: float


class CarriedPlan(msgspec.Struct, array_like=True):
    edits: list[CarriedEdit]
    ridge: float
    n_embd: int


def packed(plan: Plan) -> bytes:
    edits = [_packed(edit) for edit in plan.edits]
    return msgspec.msgpack.encode(CarriedPlan(edits, plan.ridge, plan.n_embd))


@lru_cache(maxsize=256)
def unpacked(words: bytes) -> Plan:
    """The same plan: its key is the same."""
    carried = msgspec.msgpack.decode(words, type=CarriedPlan)
    edits = [_unpacked(edit, carried.n_embd) for edit in carried.edits]
    return Plan(edits, ridge=carried.ridge, n_embd=carried.n_embd)


def _packed(edit: Edit) -> CarriedEdit:
    values: dict[str, Any] = {name: getattr(edit, name) for name in CarriedEdit.__struct_fields__}
    values["reader"] = edit.reader.tobytes() if edit.reader.any() else b""
    values["writer"] = edit.writer.tobytes()
    values |= {"bias": float(edit.bias), "strength": float(edit.strength)}
    return CarriedEdit(**values)


def _unpacked(edit: CarriedEdit, n_embd: int) -> Edit:
    values = {name: getattr(edit, name) for name in CarriedEdit.__struct_fields__}
    reader = np.frombuffer(edit.reader, np.float32) if edit.reader else np.zeros(n_embd, np.float32)
    return Edit(**(values | {"reader": reader, "writer": np.frombuffer(edit.writer, np.float32)}), name="")
