"""The native hook by itself, on tensors that this file makes up: arithmetic against the oracle; misfires."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.errors import LocalsteerError
from localsteer.plan import PositionClass, Program
from localsteer.runtime.bridge import hook as hook_module
from localsteer.runtime.bridge.hook import Accessors, Hook
from localsteer.steering import apply_program

NATIVE = Path(__file__).parents[1] / "native"

_SIGNATURES = {
    "ggml_get_name": ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p),
    "ggml_nelements": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p),
    "ggml_nrows": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p),
    "ggml_nbytes": ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p),
    "ggml_is_contiguous": ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p),
    "ggml_backend_tensor_get": ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2),
    "ggml_backend_tensor_set": ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2),
}


class FakeGraph:
    """Stands for ggml: a tensor is a key into `tensors`; counts the bytes that cross the accessors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[int, ctypes.Array] = {}
        self.arrays: dict[int, np.ndarray] = {}
        self.bytes_read = self.bytes_written = 0
        functions = {
            "ggml_get_name": lambda t: ctypes.addressof(self.names[t]),
            "ggml_nelements": lambda t: self.arrays[t].size,
            "ggml_nrows": lambda t: self.arrays[t].size // self.arrays[t].shape[-1],
            "ggml_nbytes": lambda t: self.arrays[t].nbytes,
            "ggml_is_contiguous": lambda t: self.arrays[t].flags.c_contiguous,
            "ggml_backend_tensor_get": self._get,
            "ggml_backend_tensor_set": self._set,
        }
        self._callbacks = {name: _SIGNATURES[name](function) for name, function in functions.items()}
        addresses = {n: ctypes.cast(c, ctypes.c_void_p) for n, c in self._callbacks.items()}
        monkeypatch.setattr(Accessors, "of_loaded_library", lambda: Accessors(**addresses))

    def _get(self, tensor: int, data: int, offset: int, size: int) -> None:
        self.bytes_read += size
        ctypes.memmove(data, self.arrays[tensor].ctypes.data + offset, size)

    def _set(self, tensor: int, data: int, offset: int, size: int) -> None:
        self.bytes_written += size
        ctypes.memmove(self.arrays[tensor].ctypes.data + offset, data, size)

    def compute(self, hook: Hook, name: str, array: np.ndarray) -> bool:
        """One node of the graph, as ggml's scheduler runs it: ask, compute, and call again if wanted."""
        tensor = len(self.names) + 1
        self.names[tensor] = ctypes.create_string_buffer(name.encode())
        self.arrays[tensor] = array
        wanted = hook.callback(tensor, True, hook.pointer)
        if wanted:
            assert hook.callback(tensor, False, hook.pointer), "false makes llama.cpp give up the graph"
        return wanted


class OneProgram:
    """A plan of one program at one layer, whatever the class."""

    is_empty = False

    def __init__(self, layer: int, program: Program, key: bytes = b"one") -> None:
        self.layers, self.key, self._program = (layer,), key, program

    def program(self, layer: int, cls: PositionClass) -> Program | None:
        return self._program if layer in self.layers else None


def random_program(rng: np.random.Generator, k: int, n_embd: int, **kwargs) -> Program:
    """k projections of random targets and strengths; kwargs replace what makes them so."""
    writers = rng.standard_normal((k, n_embd))
    writers /= np.linalg.norm(writers, axis=1, keepdims=True)
    strengths = rng.uniform(-1, 2, k)
    fields = {
        "readers": (-strengths[:, None] * writers).astype(np.float32),
        "biases": 3 * strengths * rng.standard_normal(k),
        "writers": writers.astype(np.float32),
        "normalised": np.zeros(k, dtype=bool),
        "one_sided": np.zeros(k, dtype=bool),
        "caps": np.full(k, np.inf, dtype=np.float32),
        "n_solved": k if k > 1 else 0,
        "ridge": 0.0,
    }
    return Program(**{**fields, **kwargs})


def mixed_program(rng: np.random.Generator, n_solved: int, k: int, n_embd: int, ridge: float) -> Program:
    """Rows of every kind behind those that are solved jointly: gates, constants, clipped or capped or not."""
    n_solved = n_solved if n_solved > 1 else 0
    program = random_program(rng, n_solved + k, n_embd)
    readers, writers = program.readers.copy(), program.writers.copy()
    writers[n_solved:] *= rng.uniform(0.1, 20, (k, 1))
    readers[n_solved:][rng.random(k) < 0.4] = 0
    return replace(
        program,
        readers=readers,
        writers=writers.astype(np.float32),
        normalised=(np.arange(n_solved + k) >= n_solved) & (rng.random(n_solved + k) < 0.5),
        one_sided=rng.random(n_solved + k) < 0.4,
        caps=np.where(rng.random(n_solved + k) < 0.4, 0.7, np.inf).astype(np.float32),
        n_solved=n_solved,
        ridge=ridge,
    )


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> FakeGraph:
    return FakeGraph(monkeypatch)


@pytest.fixture
def hook(graph: FakeGraph):
    """Three layers, 48 wide."""
    hook = Hook(3, 48)
    yield hook
    hook.close()


def begin(hook, n_tokens, plans=None, outputs=None, capture=(), tokens=None) -> None:
    outputs = np.ones(n_tokens, np.uint8) if outputs is None else np.asarray(outputs, np.uint8)
    routes = None if plans is None else hook.routes(plans, [PositionClass.PROMPT] * n_tokens)
    hook.begin(outputs, routes, capture, tokens)


def rows(rng: np.random.Generator, n: int, n_embd: int = 48) -> np.ndarray:
    return (10 * rng.standard_normal((n, n_embd))).astype(np.float32)


def native(x: np.ndarray, program: Program) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        graph = FakeGraph(patch)
        hook = Hook(2, x.shape[1])
        begin(hook, len(x), [OneProgram(1, program)] * len(x))
        steered = x.copy()
        graph.compute(hook, "l_out-1", steered)
        assert hook.end(), hook.error()
        hook.close()
    return steered


def tolerance(x: np.ndarray, expected: np.ndarray, program: Program) -> float:
    """float32 sums of n_embd products of size ~10, times writers of any length; the joint solve stretches the
    error of these by the condition of the Gram matrix."""
    writers = program.writers[: program.n_solved].astype(np.float64)
    gram = writers @ writers.T + program.ridge * np.eye(len(writers))
    condition = np.linalg.cond(gram) if len(gram) else 1.0
    lengths = [
        np.linalg.norm(r) * np.linalg.norm(w) for r, w in zip(program.readers, program.writers, strict=True)
    ]
    scale = np.abs(x).max() + np.abs(expected).max()
    return 1e-6 * scale * max(condition, 10, *lengths)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_solved=st.integers(0, 4),
    k=st.integers(1, 4),
    n_embd=st.integers(9, 100),
    ridge=st.sampled_from([0.0, 0.3]),
)
def test_native_arithmetic_is_the_oracle_for_any_mix_of_rows(seed, n_solved, k, n_embd, ridge) -> None:
    rng = np.random.default_rng(seed)
    program = mixed_program(rng, n_solved, k, n_embd, ridge)
    x = rows(rng, 6, n_embd)
    expected = apply_program(x, program)
    np.testing.assert_allclose(native(x, program), expected, rtol=0, atol=tolerance(x, expected, program))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_pytorch_computes_any_mix_of_rows_as_well(seed) -> None:
    torch = pytest.importorskip("torch", reason="the PyTorch hook is what is tested")
    from localsteer.extract import torch_steering

    rng = np.random.default_rng(seed)
    program = mixed_program(rng, int(rng.integers(0, 5)), int(rng.integers(1, 5)), 40, 0.3)
    x = rows(rng, 6, 40)
    x[0, 3] = np.nan
    theirs = torch_steering.apply_program(torch.from_numpy(x), program).numpy()
    np.testing.assert_allclose(theirs, apply_program(x, program), rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(x)))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_token_that_gets_nothing_keeps_its_bits_in_native_too(normalised) -> None:
    program = random_program(
        np.random.default_rng(11), 1, 48, biases=np.array([-1e6]), one_sided=np.ones(1, bool),
        normalised=np.array([normalised]),
    )  # fmt: skip
    x = rows(np.random.default_rng(12), 3)
    x[0, :4] = -0.0
    assert native(x, program).tobytes() == apply_program(x, program).tobytes() == x.tobytes()


def test_a_broken_row_is_broken_alike_in_native() -> None:
    rng = np.random.default_rng(13)
    for program in (mixed_program(rng, i % 4, 1 + i % 3, 48, 0.3) for i in range(20)):
        x = rows(rng, 2)
        x[0, 5] = np.nan
        assert np.array_equal(np.isnan(native(x, program)), np.isnan(apply_program(x, program)))


def test_rows_go_to_the_plan_of_their_token(graph, hook) -> None:
    rng = np.random.default_rng(1)
    a, b = (OneProgram(1, random_program(rng, 1, 48), key) for key in (b"a", b"b"))
    x = rows(rng, 5)
    steered = x.copy()
    begin(hook, 5, [a, None, b, b, None])
    graph.compute(hook, "l_out-1", steered)
    assert hook.end()
    np.testing.assert_allclose(steered[0], apply_program(x[:1], a._program)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(steered[2:4], apply_program(x[2:4], b._program), rtol=1e-5, atol=1e-5)
    assert (steered[[1, 4]] == x[[1, 4]]).all()
    assert graph.bytes_read == graph.bytes_written == 3 * 48 * 4, "only touched rows cross the accessors"


def test_last_layer_with_output_rows_only(graph, hook) -> None:
    rng = np.random.default_rng(2)
    a, b = (OneProgram(2, random_program(rng, 1, 48), key) for key in (b"a", b"b"))
    x = rows(rng, 2)
    steered = x.copy()
    begin(hook, 4, [a, a, b, b], outputs=[0, 1, 0, 1], capture=[2])
    graph.compute(hook, "l_out-2", steered)
    assert hook.end(), hook.error()
    np.testing.assert_allclose(steered[0], apply_program(x[:1], a._program)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(steered[1], apply_program(x[1:], b._program)[0], rtol=1e-5, atol=1e-5)
    assert (hook.captured(2) == steered).all()


def test_nothing_is_asked_for_without_a_reason(graph, hook) -> None:
    rng = np.random.default_rng(3)
    x = rows(rng, 2)
    assert not graph.compute(hook, "l_out-1", x), "no batch yet"
    begin(hook, 2, [OneProgram(1, random_program(rng, 1, 48)), None])
    for name in ("l_out-0", "l_out-2", "l_out-3", "l_out-", "l_out-1 (view)", "CUDA0#l_out-1#0", "ffn_out-1"):
        assert not graph.compute(hook, name, x), name
    assert graph.compute(hook, "l_out-1", x)
    assert hook.end()
    assert not graph.compute(hook, "l_out-1", x), "the batch is over"


def test_capture_takes_the_chosen_tokens_after_steering(graph, hook) -> None:
    rng = np.random.default_rng(4)
    plan = OneProgram(0, random_program(rng, 1, 48))
    x, y = rows(rng, 3), rows(rng, 3)
    begin(hook, 3, [plan] * 3, capture=[0, 1], tokens=np.array([1, 0, 1], np.uint8))
    steered = x.copy()
    graph.compute(hook, "l_out-0", steered)
    graph.compute(hook, "l_out-1", y)
    assert hook.end()
    assert (hook.captured(0) == steered[[0, 2]]).all()
    assert (hook.captured(1) == y[[0, 2]]).all()
    assert hook.captured(2).shape == (0, 48)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 48), np.float32), "3 rows for 4 tokens"),
        (np.zeros((4, 4, 48), np.float32), "16 rows for 4 tokens"),
        (np.zeros((4, 40), np.float32), "plain rows of 48"),
        (np.zeros((4, 48), np.float16), "plain rows of 48"),
        (np.zeros((4, 96), np.float32)[:, ::2], "plain rows of 48"),
    ],
    ids=["too few rows", "several streams", "other width", "half precision", "not contiguous"],
)
def test_rows_that_cannot_be_matched_to_tokens_raise_the_flag(graph, hook, array, message) -> None:
    before = array.copy()
    begin(hook, 4, [OneProgram(1, random_program(np.random.default_rng(5), 1, 48))] * 4)
    graph.compute(hook, "l_out-1", array)
    assert not hook.end()
    assert message in hook.error()
    assert (array == before).all(), "and nothing is written"
    assert not hook.fired(1)


def test_a_split_batch_raises_the_flag(graph, hook) -> None:
    begin(hook, 4, [OneProgram(1, random_program(np.random.default_rng(6), 1, 48))] * 4)
    graph.compute(hook, "l_out-1", np.zeros((4, 48), np.float32))
    graph.compute(hook, "l_out-1", np.zeros((4, 48), np.float32))
    assert not hook.end()
    assert "more than once" in hook.error()


def test_a_layer_that_never_comes_raises_the_flag(graph, hook) -> None:
    begin(hook, 1, [OneProgram(1, random_program(np.random.default_rng(7), 1, 48))])
    graph.compute(hook, "l_out-0", np.zeros((1, 48), np.float32))
    assert not hook.end()
    assert hook.error() == "layer 1 gave no residual stream (no graph node l_out-1)"


def test_the_next_batch_starts_clean(graph, hook) -> None:
    begin(hook, 1, [OneProgram(1, random_program(np.random.default_rng(8), 1, 48))])
    assert not hook.end()
    begin(hook, 1, capture=[0])
    graph.compute(hook, "l_out-0", np.ones((1, 48), np.float32))
    assert hook.end()
    assert hook.error() == ""
    assert (hook.captured(0) == 1).all()


def test_many_plans_do_not_pile_up(graph, hook, monkeypatch) -> None:
    monkeypatch.setattr(hook_module, "MAX_ROUTES", 3)
    rng = np.random.default_rng(9)
    x = rows(rng, 1)
    for i in range(10):
        plan = OneProgram(1, random_program(rng, 1, 48), b"%d" % i)
        steered = x.copy()
        begin(hook, 1, [plan])
        graph.compute(hook, "l_out-1", steered)
        assert hook.end()
        np.testing.assert_allclose(steered, apply_program(x, plan._program), rtol=1e-5, atol=1e-5)
        assert len(hook._routes) <= 4


def test_dependent_directions_are_an_error_not_a_crash(hook) -> None:
    writers = np.zeros((2, 48), np.float32)
    writers[:, 0] = 1
    program = random_program(np.random.default_rng(10), 2, 48, writers=writers)
    with pytest.raises(LocalsteerError, match="depend on each other"):
        begin(hook, 1, [OneProgram(0, program)])


def test_cpp_test_of_the_arithmetic(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here to build native/tests with")
    sources = [NATIVE / "tests" / "test-steer.cpp", NATIVE / "steer.cpp"]
    program = tmp_path / "test-steer"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{NATIVE}",
            *sources,
            "-o",
            program,
        ],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
