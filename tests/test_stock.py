"""Our files in stock llama.cpp: its own loader and its own adapter, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import make_hostile
import numpy as np
import pytest
from vector_cases import exact_directions, exact_vector

from localsteer.convert import export_static, static_vector
from localsteer.plan import Plan, PositionClass
from localsteer.vector import ControlVector

DATA = Path(__file__).parent / "data"
SOURCE = Path(__file__).parent / "stock_cvec.cpp"
TOKENS = [5, 9, 300, 41, 77, 130, 8, 211, 64, 90]
Stock = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Runs tests/stock_cvec.cpp, compiled against the libraries that llama-cpp-python installed."""
    site = Path(pytest.importorskip("llama_cpp").__file__).parents[1]
    compiler = shutil.which("g++") or shutil.which("c++")
    if not (site / "lib" / "libllama-common.so").exists():
        pytest.skip("this llama-cpp-python comes without libllama-common.so")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("stock") / "stock_cvec"
    libraries = [f"-L{site / 'lib'}", "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    # the same C++ ABI as llama.cpp's own build: std::string and std::vector cross this border
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        f"-I{site / 'include'}",
        str(SOURCE),
        "-o",
        str(program),
        *libraries,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    env = os.environ | {"LD_LIBRARY_PATH": str(site / "lib")}
    return lambda *args: subprocess.run([program, *map(str, args)], capture_output=True, env=env, timeout=120)


def loaded(stock: Stock, path: Path) -> tuple[int, np.ndarray]:
    """(n_embd, rows): what llama.cpp's loader made of the file; row 0 is for layer 1."""
    done = stock("load", path)
    assert done.returncode == 0, done.stderr.decode()
    numbers = np.frombuffer(done.stdout, dtype="<f4")
    n_embd = int(numbers[0])
    return n_embd, numbers[1:].reshape(-1, n_embd)


def stock_logits(
    stock: Stock, model: Path, vector: Path | str, n_vocab: int, scale: float = 1.0
) -> np.ndarray:
    done = stock("logits", model, vector, scale, *TOKENS)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return np.frombuffer(done.stdout, dtype="<f4").reshape(len(TOKENS), n_vocab)


def our_logits(model: Path, vectors: list[ControlVector]) -> np.ndarray:
    bridge = pytest.importorskip("localsteer.runtime.bridge")
    n, plan = len(TOKENS), Plan.from_vectors(vectors)
    with bridge.Model(model) as owner, bridge.Context(owner, n_ctx=512, exact=True, n_threads=1) as context:
        classes = [PositionClass.PROMPT] * (n - 1) + [PositionClass.LAST]
        return context.decode(TOKENS, range(n), [0] * n, [True] * n, [plan] * n, classes).logits.copy()


def random_vector(model, **settings) -> ControlVector:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((model.n_layer, model.n_embd))
    return ControlVector(rows, np.full(model.n_layer, 4.0), None, None, None, **{"layers": (2,)} | settings)


# --- the loader


def test_the_stock_loader_reads_our_file(stock):
    n_embd, rows = loaded(stock, DATA / "json.gguf")
    assert n_embd == 8 and rows.tobytes() == exact_directions()[1:].tobytes()


def test_the_stock_loader_reads_a_static_export(stock):
    _, rows = loaded(stock, DATA / "static.gguf")
    assert rows.tobytes() == static_vector(exact_vector(), strength=0.5).directions[1:].tobytes()


def test_the_stock_loader_takes_any_provenance(stock, tmp_path):
    odd = {"text": "ä" * 5000, "empty": "", "nested": {"a": [1, None]}, "probes": [["", []]]}
    exact_vector(provenance=odd, name="").save(tmp_path / "v.gguf")
    assert loaded(stock, tmp_path / "v.gguf")[1].shape == (3, 8)


@pytest.mark.parametrize("name", ["direction.0", "localsteer.mean_with"])
def test_the_stock_loader_rejects_other_tensors_which_is_why_the_rest_travels_in_key_values(
    stock, tmp_path, name
):
    raw = make_hostile.good()
    raw.tensors.append(make_hostile.Tensor.row(name, [1.0] * 8))
    (tmp_path / "v.gguf").write_bytes(raw.to_bytes())
    assert stock("load", tmp_path / "v.gguf").returncode == 3


# --- the adapter


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_static_export_in_stock_llama_cpp_is_our_add(stock, tiny_model, tmp_path, layer, strength):
    vector = random_vector(tiny_model)
    export_static(vector, tmp_path / "v.gguf", layer=layer, strength=strength)
    theirs = stock_logits(stock, tiny_model.gguf_path, tmp_path / "v.gguf", tiny_model.n_vocab)
    ours = our_logits(tiny_model.gguf_path, [vector.at(layer=layer, strength=strength, mode="add")])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    plain = stock_logits(stock, tiny_model.gguf_path, "-", tiny_model.n_vocab)
    assert np.abs(theirs - plain).max() > 0.1


def test_a_static_export_of_two_layers_is_our_add_at_both(stock, tiny_llama, tmp_path):
    vector = random_vector(tiny_llama, layers=(1, 3), strength=0.5)
    export_static(vector, tmp_path / "v.gguf")
    theirs = stock_logits(stock, tiny_llama.gguf_path, tmp_path / "v.gguf", tiny_llama.n_vocab)
    np.testing.assert_allclose(our_logits(tiny_llama.gguf_path, [vector.at(mode="add")]), theirs, atol=1e-3)


def test_the_scale_of_stock_llama_cpp_is_our_strength(stock, tiny_llama, tmp_path):
    vector = random_vector(tiny_llama)
    export_static(vector, tmp_path / "v.gguf")
    theirs = stock_logits(stock, tiny_llama.gguf_path, tmp_path / "v.gguf", tiny_llama.n_vocab, scale=0.7)
    ours = our_logits(tiny_llama.gguf_path, [vector.at(mode="add", strength=0.7)])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_static_export_read_back_is_the_same_for_us(tiny_llama, tmp_path):
    vector = random_vector(tiny_llama, strength=0.5)
    export_static(vector, tmp_path / "v.gguf")
    again = ControlVector.load(tmp_path / "v.gguf")
    ours = our_logits(tiny_llama.gguf_path, [vector.at(mode="add")])
    np.testing.assert_allclose(our_logits(tiny_llama.gguf_path, [again]), ours, atol=1e-5)
