"""Damaged and hostile vector files, one for each kind of damage, and what the reader should say of it.

`python tests/make_hostile.py FOLDER` writes them there to look at; the tests make them afresh.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from raw_gguf import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    STRING,
    TENSOR_Q8_0,
    U8,
    U32,
    RawGguf,
    Tensor,
    array,
    text,
    value,
)
from vector_cases import exact_directions

N_LAYER, N_EMBD = 4, 8
HUGE = 2**62


def good() -> RawGguf:
    """`exact_vector()` as docs/format.md tells, byte by byte, without our writer."""
    rows = exact_directions(N_LAYER, N_EMBD)
    column = [il / 8 for il in range(N_LAYER)]
    return RawGguf(
        {
            "general.architecture": value(STRING, "controlvector"),
            "controlvector.model_hint": value(STRING, "llama"),
            "controlvector.layer_count": value(U32, 3),
            "localsteer.format.major": value(U32, 1),
            "localsteer.format.minor": value(U32, 0),
            "localsteer.n_layer": value(U32, N_LAYER),
            "localsteer.n_embd": value(U32, N_EMBD),
            "localsteer.name": value(STRING, "json"),
            "localsteer.layers": array(U32, [2]),
            "localsteer.mode": value(STRING, "project"),
            "localsteer.positions": value(STRING, "all"),
            "localsteer.strength": value(F64, 1.0),
            "localsteer.one_sided": value(BOOL, False),
            "localsteer.mean_with": array(F32, [c + 1 for c in column]),
            "localsteer.mean_without": array(F32, [c - 1 for c in column]),
            "localsteer.std_with": array(F32, [c / 2 for c in column]),
            "localsteer.std_without": array(F32, column),
            "localsteer.direction.0": array(F32, rows[0].tolist()),
            "localsteer.provenance.architecture": value(STRING, "llama"),
            "localsteer.provenance.instruction": value(STRING, "Answer in JSON format."),
            "localsteer.provenance.instruction_id": value(STRING, "json"),
            "localsteer.provenance.method": value(STRING, "difference in means"),
            "localsteer.provenance.model_name": value(STRING, "tiny"),
            "localsteer.provenance.n_pairs": value(I64, 50),
            "localsteer.probes.text": array(STRING, ["<|user|>Tell me about foxes.<|end|>", "Füchse 🦊", ""]),
            "localsteer.probes.length": array(U32, [4, 2, 0]),
            "localsteer.probes.tokens": array(I32, [1, 5, 300, 2, 7, 8]),
            "localsteer.provenance.quantized": value(BOOL, True),
            "localsteer.provenance.seconds": value(F64, 1.5),
            "localsteer.provenance_json.validation": value(STRING, '{"accuracy": 0.9375, "blocks": [1, 2]}'),
        },
        [Tensor.row(f"direction.{il}", rows[il].tolist()) for il in range(1, N_LAYER)],
    )


def good_gate() -> RawGguf:
    """`gated_vector(one_sided=True)` in the same way: two of four layers have a gate."""
    rows = exact_directions(N_LAYER, N_EMBD)
    return RawGguf(
        {
            "general.architecture": value(STRING, "controlvector"),
            "controlvector.layer_count": value(U32, 3),
            "localsteer.format.major": value(U32, 1),
            "localsteer.format.minor": value(U32, 1),
            "localsteer.n_layer": value(U32, N_LAYER),
            "localsteer.n_embd": value(U32, N_EMBD),
            "localsteer.name": value(STRING, "gated"),
            "localsteer.layers": array(U32, [2]),
            "localsteer.mode": value(STRING, "gate"),
            "localsteer.positions": value(STRING, "all"),
            "localsteer.strength": value(F64, 1.0),
            "localsteer.one_sided": value(BOOL, True),
            "localsteer.direction.0": array(F32, rows[0].tolist()),
            "localsteer.biases": array(F32, [0, 0.5, -0.25, 0]),
            "localsteer.reader.1": array(F32, rows[2].tolist()),
            "localsteer.reader.2": array(F32, rows[1].tolist()),
        },
        [Tensor.row(f"direction.{il}", rows[il].tolist()) for il in range(1, N_LAYER)],
    )


def _key(name: str, content: bytes | None) -> Callable[[RawGguf], None]:
    """Set a key, or drop it. A name without a dot before it is ours."""
    key = name if name.startswith("general.") else f"localsteer.{name}"

    def damage(raw: RawGguf) -> None:
        if content is None:
            del raw.key_values[key]
        else:
            raw.key_values[key] = content

    return damage


def _tensor(index: int, **changes) -> Callable[[RawGguf], None]:
    return lambda raw: vars(raw.tensors[index]).update(changes)


def _row(index: int, numbers) -> Callable[[RawGguf], None]:
    name = f"direction.{index + 1}"
    return lambda raw: raw.tensors.__setitem__(index, Tensor.row(name, numbers))


def _raw(**changes) -> Callable[[RawGguf], None]:
    return lambda raw: vars(raw).update(changes)


def _both(*damages: Callable[[RawGguf], None]) -> Callable[[RawGguf], None]:
    return lambda raw: [damage(raw) for damage in damages]


def _overlap(raw: RawGguf) -> None:
    """255 tensors, 16 KiB each as they say, that share the same bytes."""
    raw.key_values["localsteer.n_layer"] = value(U32, 256)
    raw.key_values["localsteer.n_embd"] = value(U32, 4096)
    shared = Tensor.row("direction.1", [1.0] * 4096)
    raw.tensors = [shared, *(Tensor(f"direction.{il}", b"", (4096,), offset=0) for il in range(2, 256))]


def _pop(raw: RawGguf) -> None:
    raw.tensors.pop(0)


def _few_of_many(raw: RawGguf) -> None:
    """One honest row of the greatest width, which speaks for 16 GiB of zeros."""
    width = 1 << 20
    raw.key_values |= {
        "localsteer.n_layer": value(U32, 4096),
        "localsteer.n_embd": value(U32, width),
        "localsteer.blocks": array(U32, [2]),
    }
    raw.tensors = [Tensor.row("direction.2", np.ones(width))]


def _foreign(raw: RawGguf) -> None:
    raw.key_values = {key: v for key, v in raw.key_values.items() if not key.startswith("localsteer.")}


def _add(tensor: Tensor) -> Callable[[RawGguf], None]:
    return lambda raw: raw.tensors.append(tensor)


ROW = [1.0] * N_EMBD
MODE_AGAIN = text("localsteer.mode") + value(STRING, "add")
# name -> (what is done to a good file, what the message says)
DAMAGE: dict[str, tuple[Callable[[RawGguf], None], str]] = {
    "wrong magic": (_raw(magic=b"GGML"), "is not a GGUF file"),
    "old version": (_raw(version=1), "GGUF version 1"),
    "future version": (_raw(version=4), "GGUF version 4"),
    "big-endian": (_raw(version=0x03000000), "big-endian"),
    "huge key count": (_raw(n_key_values=HUGE), "claims 4611686018427387904 key-values"),
    "one key too many": (_raw(n_key_values=31), "is "),
    "huge tensor count": (_raw(n_tensors=HUGE), "claims 4611686018427387904 tensors"),
    "one tensor too many": (_raw(n_tensors=4), "is "),
    "many keys that are not there": (_raw(n_key_values=60000), "is "),
    "huge key length": (_raw(extra_key_values=b"\xff" * 8, n_key_values=31), "bytes in a name"),
    "huge string": (_raw(extra_key_values=text("x") + b"\x08\0\0\0" + b"\xff" * 7 + b"\x3f", n_key_values=31),
                    "truncated"),
    "huge array": (_key("x", array(F32, [], HUGE)), "items in an array"),
    "array longer than the file": (_key("x", array(F64, [], 1 << 22)), "truncated"),
    "strings longer than the file": (_key("x", array(STRING, [], 1 << 22)), "is "),
    "array of arrays": (_key("x", array(ARRAY, [], 1)), "array of arrays"),
    "unknown value type": (_key("x", b"\x63\0\0\0"), "unknown type 99"),
    "unknown item type": (_key("x", b"\x09\0\0\0\x63\0\0\0" + bytes(8)), "unknown type 99"),
    "not UTF-8": (_key("name", value(STRING, b"\xff\xfe")), "not UTF-8"),
    "key twice": (_raw(extra_key_values=MODE_AGAIN, n_key_values=31), "twice"),
    "tensor twice": (_tensor(1, name="direction.1"), "occurs twice"),
    "a model": (_key("general.architecture", value(STRING, "llama")), "is a 'llama' model, not"),
    "no architecture": (_key("general.architecture", None), "not a control vector"),
    "architecture is a number": (_key("general.architecture", value(U32, 1)), "wrong type"),
    "foreign control vector": (_foreign, "localsteer did not write"),
    "newer format": (_key("format.major", value(U32, 3)), "newer than 2: upgrade localsteer"),
    "format zero": (_key("format.major", value(U32, 0)), "never existed"),
    "format is text": (_key("format.major", value(STRING, "1")), "format.major has the wrong type"),
    "no mode": (_key("mode", None), "localsteer.mode is missing"),
    "unknown mode": (_key("mode", value(STRING, "rotate")), "unknown mode 'rotate'"),
    "unknown positions": (_key("positions", value(STRING, "first")), "unknown positions 'first'"),
    "strength is NaN": (_key("strength", value(F64, math.nan)), "strength must be a finite number"),
    "strength is infinite": (_key("strength", value(F64, math.inf)), "strength must be a finite number"),
    "strength is float32": (_key("strength", value(F32, 1.0)), "strength has the wrong type"),
    "no strength": (_key("strength", None), "localsteer.strength is missing"),
    "one-sided is text": (_key("one_sided", value(STRING, "no")), "one_sided has the wrong type"),
    "negative cap": (_key("cap", value(F64, -1.0)), "cap must be above 0"),
    "add with a cap": (_both(_key("cap", value(F64, 1.0)), _key("mode", value(STRING, "add"))), "has none"),
    "no layers": (_key("layers", None), "localsteer.layers is missing"),
    "empty layers": (_key("layers", array(U32, [])), "no layer is chosen"),
    "layer out of range": (_key("layers", array(U32, [4])), "layer 4 is out of range"),
    "huge layer": (_key("layers", array(U32, [2**32 - 1])), "layer 4294967295 is out of range"),
    "layers are floats": (_key("layers", array(F32, [2.0])), "layers has the wrong type"),
    "depth of zero": (_key("n_layer", value(U32, 0)), "n_layer is 0"),
    "huge depth": (_key("n_layer", value(U32, 2**32 - 1)), "n_layer is 4294967295"),
    "deeper than its tensors": (_key("n_layer", value(U32, 4096)), "for each of 4096 layers"),
    "shallower than its tensors": (_key("n_layer", value(U32, 3)), "too many ('direction.3')"),
    "no width": (_key("n_embd", value(U32, 0)), "n_embd is 0"),
    "huge width": (_key("n_embd", value(U32, 2**31)), "n_embd is 2147483648"),
    "wider than its tensors": (_key("n_embd", value(U32, 16)), "is 8 wide, not 16"),
    "one row narrower": (_row(1, ROW[:4]), "direction 2 is 4 wide, not 8"),
    "layer 0 narrower": (_key("direction.0", array(F32, ROW[:4])), "direction 0 is 4 wide, not 8"),
    "no layer 0": (_key("direction.0", None), "localsteer.direction.0 is missing"),
    "direction.0 as a tensor": (_add(Tensor.row("direction.0", ROW)), "too many ('direction.0')"),
    "foreign tensor": (_add(Tensor.row("blk.0.attn_q.weight", ROW)), "too many ('blk.0"),
    "missing tensor": (lambda raw: raw.tensors.pop(0), "missing or too many ('direction.1')"),
    "two dimensions": (_tensor(1, dims=(4, 2)), "direction.2 is not one row of F32"),
    "no dimensions": (_tensor(1, dims=()), "direction.2 is not one row of F32"),
    "nine dimensions": (_tensor(1, dims=(1,) * 9), "claims 9 dimensions"),
    "a quantized row": (_tensor(1, type=TENSOR_Q8_0), "direction.2 is not one row of F32"),
    "unknown tensor type": (_tensor(1, type=999), "direction.2 is not one row of F32"),
    "few blocks, one row too many": (_key("blocks", array(U32, [0, 2, 3])), "the layers that it names"),
    "few blocks, one row missing": (_both(_key("blocks", array(U32, [0, 1, 2, 3])), _pop), "('direction.1')"),
    "blocks out of order": (_key("blocks", array(U32, [0, 2, 1, 3])), "must name layers below 4"),
    "blocks twice": (_key("blocks", array(U32, [0, 1, 2, 3, 3])), "must name layers below 4"),
    "blocks out of range": (_key("blocks", array(U32, [0, 1, 2, 4])), "must name layers below 4"),
    "blocks are floats": (_key("blocks", array(F32, [0, 1, 2, 3])), "blocks has the wrong type"),
    "few layers of a huge model": (_few_of_many, "damaged: 1 rows claim 4096 layers, 1048576 wide"),
    "huge tensor": (_tensor(1, dims=(HUGE,)), "truncated"),
    "offset beyond the file": (_tensor(2, offset=1 << 20), "truncated"),
    "huge offset": (_tensor(2, offset=2**64 - 32), "truncated"),
    "overlapping tensors": (_overlap, "overlap"),
    "alignment zero": (_key("general.alignment", value(U32, 0)), "alignment 0"),
    "alignment three": (_key("general.alignment", value(U32, 3)), "alignment 3"),
    "alignment is a byte": (_key("general.alignment", value(U8, 32)), "general.alignment has the wrong type"),
    "huge alignment": (_key("general.alignment", value(U32, 1 << 31)), "truncated"),
    "NaN": (_row(0, [*ROW[1:], math.nan]), "NaN or infinite"),
    "infinite": (_row(0, [*ROW[1:], -math.inf]), "NaN or infinite"),
    "NaN at layer 0": (_key("direction.0", array(F32, [*ROW[1:], math.nan])), "NaN or infinite"),
    "zero direction": (_row(1, [0.0] * N_EMBD), "no direction at layer 2"),
    "NaN projection": (_key("mean_with", array(F32, [1, 2, math.nan, 4])), "mean_with holds NaN"),
    "projections of other depth": (_key("std_with", array(F32, [1, 2, 3])), "per layer (4), not (3,)"),
    "projections in float64": (_key("mean_with", array(F64, [1, 2, 3, 4])), "mean_with has the wrong type"),
    "project without a target": (_key("mean_with", None), "no mean projection"),
    "probes that do not fit": (_key("probes.length", array(U32, [4, 2, 9])), "probe strings"),
    "probes without lengths": (_key("probes.length", None), "localsteer.probes.length is missing"),
    "broken JSON": (_key("provenance_json.validation", value(STRING, "{")), "is not JSON"),
    "deep JSON": (_key("provenance_json.validation", value(STRING, "[" * 100_000)), "is not JSON"),
}  # fmt: skip


# the same for a good file with gates
GATE_DAMAGE: dict[str, tuple[Callable[[RawGguf], None], str]] = {
    "gate without readers": (_both(_key("reader.1", None), _key("reader.2", None)), "one is missing"),
    "gate without biases": (_key("biases", None), "one is missing"),
    "gate at another layer": (_key("layers", array(U32, [3])), "no gate at layer 3"),
    "gate without anything": (
        _both(_key("reader.1", None), _key("reader.2", None), _key("biases", None)), "has no learned gate",
    ),
    "reader narrower": (_key("reader.2", array(F32, ROW[:4])), "reader 2 is 4 wide, not 8"),
    "reader wider": (_key("reader.1", array(F32, [*ROW, 1.0])), "reader 1 is 9 wide, not 8"),
    "reader is a number": (_key("reader.1", value(F32, 1.0)), "reader.1 has the wrong type"),
    "reader in float64": (_key("reader.1", array(F64, ROW)), "reader.1 has the wrong type"),
    "NaN reader": (_key("reader.2", array(F32, [*ROW[1:], math.nan])), "readers holds NaN"),
    "infinite bias": (_key("biases", array(F32, [0, math.inf, 1, 0])), "biases holds NaN or infinite"),
    "biases of other depth": (_key("biases", array(F32, [0, 1])), "per layer (4), not (2,)"),
    "gate without a direction": (_row(1, [0.0] * N_EMBD), "no direction at layer 2"),
}  # fmt: skip


def hostile(name: str) -> tuple[bytes, str]:
    """The bytes of a file, and a piece of the message that opening it should give."""
    damage, said = (GATE_DAMAGE | DAMAGE)[name]
    raw = good_gate() if name in GATE_DAMAGE else good()
    damage(raw)
    return raw.to_bytes(), said


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for each in (*DAMAGE, *GATE_DAMAGE):
        (folder / f"{each.replace(' ', '-')}.gguf").write_bytes(hostile(each)[0])
