"""Directions of control-vector files in half precision, and layers that have none."""

from __future__ import annotations

import numpy as np
import pytest
from raw_gguf import I32, STRING, TENSOR_BF16, TENSOR_F16, TENSOR_F32, U32, RawGguf, Tensor, value

from localsteer.convert import import_vector, read_vector
from localsteer.errors import PlanError, VectorFileError
from localsteer.vector import ControlVector

N_EMBD = 8
KINDS = {"F32": TENSOR_F32, "F16": TENSOR_F16, "BF16": TENSOR_BF16}


def packed(row: np.ndarray, kind: str) -> bytes:
    if kind == "BF16":
        return (row.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return row.astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()


def rounded(row: np.ndarray, kind: str) -> np.ndarray:
    """What a row of this kind can hold, as float32."""
    if kind == "BF16":
        return (row.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")
    return row.astype({"F32": "<f4", "F16": "<f2"}[kind]).astype("<f4")


def foreign(rows: dict[int, np.ndarray], kind: str, count: int = U32) -> bytes:
    tensors = [
        Tensor(f"direction.{n}", packed(row, kind), (len(row),), KINDS[kind]) for n, row in rows.items()
    ]
    keys = {
        "general.architecture": value(STRING, "controlvector"),
        "controlvector.layer_count": value(count, len(rows)),
    }
    return RawGguf(keys, tensors).to_bytes()


def some_rows(*layers: int) -> dict[int, np.ndarray]:
    draw = np.random.default_rng(7)
    return {layer: draw.normal(size=N_EMBD) for layer in layers}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("convention", "count", "shift"), [("repeng", U32, 0), ("cvector-generator", I32, 1)]
)
@pytest.mark.parametrize("layers", [(9, 5, 2), (11, 10, 9), (1,), (11, 1)])
def test_rows_of_any_precision_stay_at_their_layers(tmp_path, kind, convention, count, shift, layers):
    rows = some_rows(*layers)
    path = tmp_path / "v.gguf"
    path.write_bytes(foreign(rows, kind, count))
    vector = import_vector(path, convention=convention, n_layer=12)
    assert vector.directions.dtype == np.float32 and vector.n_layer == 12
    for layer, row in rows.items():
        assert np.array_equal(vector.directions[layer - shift], rounded(row, kind))
    filled = {layer - shift for layer in layers}
    assert vector.layers == tuple(sorted(filled))
    gaps = sorted(set(range(12)) - filled)
    assert not vector.directions[gaps].any()
    with pytest.raises(PlanError, match=f"no direction at layer {gaps[0]}"):
        vector.at(layer=gaps[0])
    vector.save(tmp_path / "ours.gguf")
    again = ControlVector.load(tmp_path / "ours.gguf")
    assert np.array_equal(again.directions, vector.directions) and again.layers == vector.layers


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_file_of_ours_in_half_precision_is_read(tmp_path, kind):
    draw = np.random.default_rng(3)
    plain = ControlVector(draw.normal(size=(4, N_EMBD)), None, None, None, None, (2,), mode="add", name="x")
    plain.save(tmp_path / "v.gguf")
    raw = (tmp_path / "v.gguf").read_bytes()
    at = raw.index(plain.directions[1].astype("<f4").tobytes())
    header = bytearray(raw[:at])
    for layer in (1, 2, 3):  # the types and offsets of the tensors, whose shape stays
        name = f"direction.{layer}".encode()
        start = header.index(name, header.rindex(b"general.architecture")) + len(name) + 4 + 8
        header[start : start + 4] = KINDS[kind].to_bytes(4, "little")
        header[start + 4 : start + 12] = (32 * (layer - 1)).to_bytes(8, "little")
    rows = [packed(plain.directions[layer], kind).ljust(32, b"\0") for layer in (1, 2, 3)]
    (tmp_path / "half.gguf").write_bytes(bytes(header) + b"".join(rows))
    half = read_vector(tmp_path / "half.gguf")
    assert np.array_equal(half.directions[0], plain.directions[0])
    for layer in (1, 2, 3):
        assert np.array_equal(half.directions[layer], rounded(plain.directions[layer], kind))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0] * 7 + [np.nan], "NaN or infinite"),
        ([1.0] * 7 + [70000.0], "NaN or infinite"),  # beyond what F16 holds
        ([0.0] * 8, "all its directions are zero"),
        ([1e-9] * 8, "all its directions are zero"),  # below it
    ],
)
def test_what_half_precision_cannot_hold_is_named(tmp_path, row, said):
    path = tmp_path / "v.gguf"
    with np.errstate(over="ignore"):
        path.write_bytes(foreign({3: np.array(row)}, "F16"))
    with pytest.raises(VectorFileError, match=said):
        import_vector(path, convention="repeng")


def test_a_row_that_is_cut_short_is_named(tmp_path):
    whole = foreign(some_rows(3), "F16")
    path = tmp_path / "v.gguf"
    path.write_bytes(whole[:-20])
    with pytest.raises(VectorFileError, match="truncated"):
        import_vector(path, convention="repeng")
