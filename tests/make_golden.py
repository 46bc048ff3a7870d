"""Write the golden files of tests/data: `python tests/make_golden.py`. test_convert pins their bytes.

Ours must never change within a format version. Those of other tools are written by the calls that the tools
make: vgel/repeng `ControlVector.export_gguf`, llama.cpp `tools/cvector-generator` `export_gguf`, jukofyork's
`export_gguf`; the arrays have the names of the paper's code (microsoft/llm-steer-instruct).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from vector_cases import exact_directions, exact_vector, gated_vector

from localsteer.convert import export_static

DATA = Path(__file__).parent / "data"
N_LAYER, N_EMBD = 4, 8


def repeng(path: Path) -> None:
    """Layers n-1 down to 1, each under its own number, counted as UINT32."""
    rows = exact_directions(N_LAYER, N_EMBD)
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", N_LAYER - 1)
    _finish(writer, {il: rows[il] for il in range(N_LAYER - 1, 0, -1)})


def cvector_generator(path: Path) -> None:
    """Layers 0 to n-2, each one number too high, counted as INT32."""
    rows = exact_directions(N_LAYER, N_EMBD)
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", N_LAYER - 1)
    _finish(writer, {il + 1: rows[il] for il in range(N_LAYER - 1)})


def jukofyork(path: Path) -> None:
    """One number too high, counted as UINT32: only the user can tell it from a sorted repeng file."""
    rows = exact_directions(N_LAYER, N_EMBD)
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", N_LAYER)
    _finish(writer, {il + 1: rows[il] for il in (1, 2)})


def _finish(writer: gguf.GGUFWriter, rows: dict[int, np.ndarray]) -> None:
    for number, row in rows.items():
        writer.add_tensor(f"direction.{number}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def states() -> dict[str, np.ndarray]:
    """Last-token states of 3 pairs: hs - hs_no_instr averages to `exact_directions()` exactly."""
    rows = exact_directions(N_LAYER, N_EMBD)
    plain = np.stack([np.roll(rows, shift, axis=1) for shift in (1, 2, 3)])
    return {
        "hs_instr": plain + rows + np.array([-0.25, 0, 0.25], np.float32)[:, None, None],
        "hs_no_instr": plain,
    }


def safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(array.astype("<f4").tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_all(folder: Path) -> None:
    exact_vector().save(folder / "json.gguf")
    gated_vector(one_sided=True).save(folder / "gate.gguf")
    export_static(exact_vector(), folder / "static.gguf", strength=0.5)
    repeng(folder / "repeng.gguf")
    cvector_generator(folder / "cvector-generator.gguf")
    jukofyork(folder / "jukofyork.gguf")
    np.savez(folder / "paper.npz", **states())
    safetensors(folder / "paper.safetensors", states())


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    write_all(DATA)
