"""The bridge on real llama.cpp: tiny random models, F32, exact settings, one thread."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp.llama_cpp as lc
import numpy as np
import pytest

from localsteer.constrain import Constraint, TokenBytes
from localsteer.errors import (
    LocalsteerError,
    MismatchError,
    ModelFileError,
    PromptError,
    UnsupportedModelError,
)
from localsteer.plan import Plan, PositionClass
from localsteer.runtime import bridge
from localsteer.runtime.bridge import Context, Model, Sampler, check_llama_grammar, library
from localsteer.runtime.bridge.hook import Accessors, Hook
from localsteer.steering import steer
from localsteer.terms import MODES, POSITIONS
from localsteer.vector import ControlVector

PROMPT, LAST, GENERATION, _FORM = PositionClass
N_PROMPT, N_REPLY = 6, 4
TOKENS = np.array([5, 9, 300, 41, 77, 130, 8, 211, 64, 90])
CLASSES = [PROMPT] * (N_PROMPT - 1) + [LAST] + [GENERATION] * N_REPLY
N = len(TOKENS)


def vector(model: Model, layer: int = 1, *, seed: int = 0, **settings) -> ControlVector:
    """A random direction of about the residual stream's size, a mean projection far from 0, and a gate."""
    rng = np.random.default_rng(seed)
    shape = (model.n_layer, model.n_embd)
    return ControlVector(
        directions=rng.standard_normal(shape).astype(np.float32),
        mean_with=(4 + rng.random(model.n_layer)).astype(np.float32),
        mean_without=np.zeros(model.n_layer, np.float32),
        std_with=np.ones(model.n_layer, np.float32),
        std_without=np.ones(model.n_layer, np.float32),
        layers=(layer,),
        provenance={},
        readers=rng.standard_normal(shape) / model.n_embd**0.5,
        biases=np.ones(model.n_layer),
        **settings,
    )


def run(
    context: Context, plan: Plan | None = None, *, outputs: Sequence[bool] | None = None, **kwargs
) -> bridge.Rows:
    """TOKENS as one fresh sequence, one decode."""
    context.clear()
    plans = None if plan is None else [plan] * N
    outputs = [True] * N if outputs is None else outputs
    return context.decode(TOKENS, range(N), [0] * N, outputs, plans, CLASSES, **kwargs)


@pytest.fixture(scope="module")
def model(tiny_llama) -> Iterator[Model]:
    with Model(tiny_llama.gguf_path) as model:
        yield model


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_ctx=256, n_seq_max=4, n_threads=1, exact=True) as context:
        yield context


# --- steering: what the oracle says ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1, -1], ids=["first layer", "middle layer", "last layer"])
def test_steered_rows_are_the_oracles(model: Model, context: Context, mode: str, layer: int) -> None:
    layer %= model.n_layer
    plan = Plan.from_vectors([vector(model, layer, mode=mode, strength=0.8)])
    before = run(context, capture=[layer]).states[layer]
    after = run(context, plan, capture=[layer]).states[layer]
    expected = steer(before, plan, layer, CLASSES)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_kind_of_position(model: Model, context: Context, positions: str) -> None:
    plan = Plan.from_vectors([vector(model, positions=positions)])
    before = run(context, capture=[1]).states[1]
    after = run(context, plan, capture=[1]).states[1]
    touched = (before != after).any(axis=1)
    first, end = {
        "all": (0, N),
        "prompt": (0, N_PROMPT),
        "last": (N_PROMPT - 1, N),
        "generation": (N_PROMPT, N),
    }[positions]
    assert touched.tolist() == [first <= i < end for i in range(N)]
    np.testing.assert_allclose(
        after, steer(before, plan, 1, CLASSES), rtol=1e-5, atol=1e-5 * np.abs(after).max()
    )


@pytest.mark.parametrize(
    "settings",
    [{"one_sided": True}, {"cap": 0.5}, {"one_sided": True, "cap": 0.5}],
    ids=["one-sided", "capped", "both"],
)
def test_several_vectors_at_one_layer(model: Model, context: Context, settings: dict) -> None:
    vectors = [
        vector(model, 2, seed=1, **settings),
        vector(model, 2, seed=2, strength=-0.7, **settings),
        vector(model, 2, seed=3, mode="ablate"),
        vector(model, 2, seed=4, mode="add", strength=0.3),
        vector(model, 2, seed=5, mode="gate", strength=0.5, **settings),
    ]
    plan = Plan.from_vectors(vectors)
    before = run(context, capture=[2]).states[2]
    after = run(context, plan, capture=[2]).states[2]
    expected = steer(before, plan, 2, CLASSES)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_edits_at_all_layers_at_once(model: Model, context: Context) -> None:
    everywhere = tuple(range(model.n_layer))
    plan = Plan.from_vectors([vector(model).at(layer=everywhere)])
    states = run(context, plan, capture=everywhere).states
    for layer in everywhere:
        (edit,) = (edit for edit in plan.edits if edit.layer == layer)
        np.testing.assert_allclose(states[layer] @ edit.writer, edit.target, rtol=1e-4)


def test_steering_moves_the_logits_and_leaves_nothing_behind(model: Model, context: Context) -> None:
    plain = run(context).logits
    steered = run(context, Plan.from_vectors([vector(model)])).logits
    assert np.abs(plain - steered).max() > 0.01
    assert (run(context).logits == plain).all()


def test_no_plan_strength_0_and_no_hook_give_the_same_bits(model: Model, context: Context) -> None:
    with Context(model, n_ctx=256, n_seq_max=4, n_threads=1, exact=True, steering=False) as bare:
        plain = run(bare).logits
    assert (run(context).logits == plain).all()
    assert (run(context, Plan.none()).logits == plain).all()
    assert (run(context, Plan.from_vectors([vector(model, strength=0.0)])).logits == plain).all()
    generation = Plan.from_vectors([vector(model, positions="generation")])
    assert (run(context, generation).logits[:N_PROMPT] == plain[:N_PROMPT]).all()


def test_reading_changes_nothing(model: Model, context: Context) -> None:
    plain = run(context).logits
    assert (run(context, capture=range(model.n_layer)).logits == plain).all()


def test_one_token_at_a_time_is_one_batch(model: Model, context: Context) -> None:
    plan = Plan.from_vectors([vector(model, positions="last"), vector(model, 3, seed=5)])
    at_once = run(context, plan).logits
    context.clear()
    for i in range(N):
        logits = context.decode([TOKENS[i]], [i], [0], [True], [plan], [CLASSES[i]]).logits[0]
        np.testing.assert_allclose(logits, at_once[i], atol=1e-3)


def test_four_interleaved_sequences_with_four_plans_are_four_runs(tiny_model) -> None:
    with (
        Model(tiny_model.gguf_path) as model,
        Context(model, n_ctx=256, n_seq_max=4, n_threads=1, exact=True) as context,
    ):
        plans = [
            Plan.none(),
            Plan.from_vectors([vector(model, 0, seed=1)]),
            Plan.from_vectors([vector(model, 2, seed=2, positions="last"), vector(model, 3, seed=3)]),
            Plan.from_vectors([vector(model, 2, seed=4, mode="add", positions="generation")]),
        ]
        alone = [run(context, plan).logits for plan in plans]
        order = [(token, seq) for token in range(N) for seq in range(4)]
        context.clear()
        together = context.decode(
            [(TOKENS[token]) for token, _ in order],
            [token for token, _ in order],
            [seq for _, seq in order],
            [True] * len(order),
            [plans[seq] for _, seq in order],
            [CLASSES[token] for token, _ in order],
        ).logits
        for row, (token, seq) in enumerate(order):
            np.testing.assert_allclose(together[row], alone[seq][token], atol=1e-3)


# --- capture and outputs ---


def test_the_last_layer_has_rows_for_outputs_only(model: Model, context: Context) -> None:
    last = model.n_layer - 1
    whole = run(context, capture=[0, last]).states
    some = [i in (3, 9) for i in range(N)]
    rows = run(context, outputs=some, capture=[0, last])
    assert rows.logits.shape == (2, model.n_vocab)
    assert rows.states[0].shape == (N, model.n_embd)
    np.testing.assert_allclose(rows.states[last], whole[last][[3, 9]], atol=1e-4)


def test_plans_in_the_last_layer_follow_the_outputs(model: Model, context: Context) -> None:
    plan = Plan.from_vectors([vector(model, model.n_layer - 1)])
    context.clear()
    some = [i in (3, 9) for i in range(N)]
    plans = [plan if i in (0, 9) else None for i in range(N)]
    logits = context.decode(TOKENS, range(N), [0] * N, some, plans, CLASSES).logits
    np.testing.assert_allclose(logits[0], run(context).logits[3], atol=1e-3)
    np.testing.assert_allclose(logits[1], run(context, plan).logits[9], atol=1e-3)


def test_capture_of_chosen_tokens(model: Model, context: Context) -> None:
    every = range(model.n_layer)
    whole = run(context, capture=every).states
    chosen = [i == N_PROMPT - 1 for i in range(N)]
    states = run(context, capture=every, capture_tokens=chosen).states
    for layer in every:
        assert (states[layer] == whole[layer][[N_PROMPT - 1]]).all()


def test_a_batch_without_outputs(model: Model, context: Context) -> None:
    plan = Plan.from_vectors([vector(model, model.n_layer - 1), vector(model, 0)])
    rows = run(context, plan, outputs=[False] * N, capture=[1, model.n_layer - 1])
    assert rows.logits.shape == (0, model.n_vocab)
    assert rows.states[1].shape == (N, model.n_embd)
    assert rows.states[model.n_layer - 1].shape == (0, model.n_embd)


def test_logits_are_read_before_the_next_decode_or_not_at_all(context: Context) -> None:
    early, late = run(context), None
    kept = early.logits
    late = run(context)
    context.clear()
    context.decode([1], [0], [0], [True])
    assert kept.shape[0] == N
    with pytest.raises(LocalsteerError, match="earlier decode"):
        _ = late.logits


def test_memory_of_one_sequence_is_forgotten_and_shared(model: Model, context: Context) -> None:
    whole = run(context).logits
    context.seq_cp(0, 2)
    assert context.seq_rm(0, 4, -1)
    rest = context.decode(TOKENS[4:], range(4, N), [0] * (N - 4), [True] * (N - 4)).logits
    np.testing.assert_allclose(rest, whole[4:], atol=1e-3)
    context.seq_rm(2, N - 1)
    again = context.decode(TOKENS[-1:], [N - 1], [2], [True]).logits
    np.testing.assert_allclose(again[0], whole[-1], atol=1e-3)


def test_with_separate_caches_a_decode_is_one_sequence_or_one_token_each(model: Model) -> None:
    """Anything else comes in an order of llama.cpp's own, and a row would get another token's steering."""
    with Context(model, n_ctx=1024, n_seq_max=4, n_threads=1, exact=True, kv_unified=False) as context:
        assert context.n_ctx_seq == 256
        whole = run(context).logits
        context.seq_cp(0, 2, 4)
        rest = context.decode(TOKENS[4:], range(4, N), [2] * (N - 4), [True] * (N - 4)).logits
        np.testing.assert_allclose(rest, whole[4:], atol=1e-3)
        each = context.decode([TOKENS[0]] * 2, [0, N], [1, 2], [True, True], capture=[1]).states[1]
        alone = context.decode([TOKENS[0]], [0], [3], [True], capture=[1]).states[1]
        np.testing.assert_allclose(each[0], alone[0], atol=1e-4)
        assert abs(each[1] - alone[0]).max() > 1e-2
        for seq_ids in ([0, 2], [1, 0], [0, 0, 1]):
            n = len(seq_ids)
            with pytest.raises(LocalsteerError, match="separate caches"):
                context.decode([1] * n, [99] * n, seq_ids, [True] * n)
        with pytest.raises(PromptError, match="256 tokens"):
            context.decode([1], [256], [0], [True])


# --- refusals ---


def test_every_layer_of_the_tiny_models_is_steerable(tiny_model) -> None:
    with Model(tiny_model.gguf_path) as model, Context(model, n_ctx=64, n_threads=1) as context:
        assert context.probe(range(model.n_layer)) == set(range(model.n_layer))


def test_width_and_depth_are_checked(model: Model, context: Context) -> None:
    wide = Plan.from_vectors([_reshaped(vector(model), n_embd=80)])
    with pytest.raises(MismatchError, match=r"80 wide .* 64 wide"):
        run(context, wide)
    deep = Plan.from_vectors([_reshaped(vector(model), n_layer=9).at(layer=7)])
    with pytest.raises(MismatchError, match=r"layer 7 does not exist.* 4 layers"):
        run(context, deep)
    with pytest.raises(MismatchError, match="layer -1"):
        context.probe([-1])


def test_ctrl_c_leaves_no_hook_at_work(model: Model, context: Context, monkeypatch) -> None:
    plain = run(context).logits
    begin = Hook.begin

    def interrupted(hook, *arguments):
        begin(hook, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Hook, "begin", interrupted)
        run(context, Plan.from_vectors([vector(model)]))
    assert (run(context).logits == plain).all()


def _reshaped(vector: ControlVector, n_layer: int | None = None, n_embd: int | None = None) -> ControlVector:
    from dataclasses import replace

    n_layer, n_embd = n_layer or vector.n_layer, n_embd or vector.n_embd
    statistics = {
        name: np.resize(getattr(vector, name), n_layer)
        for name in ("mean_with", "mean_without", "std_with", "std_without", "biases")
    }
    rows = {name: np.resize(getattr(vector, name), (n_layer, n_embd)) for name in ("directions", "readers")}
    return replace(vector, **rows, **statistics)


def test_a_context_without_steering_refuses_plans(model: Model) -> None:
    with Context(model, n_ctx=64, n_threads=1, steering=False) as context:
        assert (run(context).logits == run(context, Plan.none()).logits).all()
        with pytest.raises(UnsupportedModelError, match="steering is off"):
            run(context, Plan.from_vectors([vector(model)]))


def test_a_layer_without_rows_is_refused_at_attach(model: Model, monkeypatch) -> None:
    """As in a model without l_out: here the hook is told that nothing is one."""
    monkeypatch.setattr(Accessors, "of_loaded_library", _nameless_accessors)
    with Context(model, n_ctx=64, n_threads=1) as context:
        assert context.probe() == set()
        run(context)
        with pytest.raises(UnsupportedModelError, match="layer 1: layer 0 gave no residual stream"):
            run(context, Plan.from_vectors([vector(model)]))


def _nameless_accessors() -> Accessors:
    lib = lc._lib
    names = [name for name, _ in Accessors._fields_]
    addresses = {name: ctypes.cast(getattr(lib, name), ctypes.c_void_p) for name in names}
    # any function of a tensor that gives text, but not the name of a node
    addresses["ggml_get_name"] = ctypes.cast(lib.ggml_op_desc, ctypes.c_void_p)
    return Accessors(**addresses)


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_models_that_mix_rows_take_one_sequence_at_a_time(model: Model, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(lc, f"llama_model_is_{kind}", lambda _: True)
    plan = Plan.from_vectors([vector(model)])
    with Context(model, n_ctx=64, n_threads=1) as context:
        run(context, plan)
    with Context(model, n_ctx=64, n_seq_max=2, n_threads=1) as context:
        run(context)
        with pytest.raises(UnsupportedModelError, match=f"layer 1: {kind} models mix the rows"):
            run(context, plan)


def test_models_with_an_encoder_are_refused(model: Model, monkeypatch) -> None:
    monkeypatch.setattr(lc, "llama_model_has_encoder", lambda _: True)
    with pytest.raises(UnsupportedModelError, match="not a decoder-only model"):
        Context(model, n_ctx=64, n_threads=1)


def test_a_misfire_in_a_decode_raises(model: Model, context: Context, monkeypatch) -> None:
    begin = Hook.begin

    def one_token_too_many(hook, outputs, *rest):
        begin(hook, np.append(outputs, np.uint8(1)), None, *rest[1:])

    monkeypatch.setattr(Hook, "begin", one_token_too_many)
    with pytest.raises(UnsupportedModelError, match="gave 10 rows for 11 tokens"):
        context.clear()
        context.decode(TOKENS, range(N), [0] * N, [True] * N, capture=[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "a batch of 0 tokens"),
        ({"tokens": [1] * 257}, "a batch of 257 tokens"),
        ({"tokens": [512]}, "outside the vocabulary of 512"),
        ({"tokens": [-1]}, "outside the vocabulary of 512"),
        ({"tokens": [1], "positions": [256]}, "context of 256"),
        ({"tokens": [1], "positions": [-1]}, "context of 256"),
        ({"tokens": [1], "seq_ids": [4]}, "sequence 4 does not exist"),
        ({"tokens": [1, 1]}, "one entry per token"),
    ],
)
def test_impossible_batches_raise_instead_of_ending_the_process(context: Context, change, message) -> None:
    n = len(change["tokens"])
    if n > 2:
        change = {**change, "positions": range(n), "seq_ids": [0] * n, "outputs": [1] * n}
    context.clear()
    with pytest.raises(LocalsteerError, match=message):
        context.decode(**{"positions": [0], "seq_ids": [0], "outputs": [1], **change})


def test_a_hole_in_the_positions_is_reported(context: Context) -> None:
    run(context)
    with pytest.raises(LocalsteerError, match="could not decode"):
        context.decode([1], [200], [0], [True])
    run(context)


def test_a_full_context_is_a_prompt_error(model: Model) -> None:
    with Context(model, n_ctx=256, n_seq_max=2, n_threads=1) as context:
        context.decode([1] * 256, range(256), [0] * 256, [0] * 255 + [1])
        with pytest.raises(PromptError, match="context of 256 tokens is full"):
            context.decode([1], [0], [1], [True])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_ctx": 0}, "context of 0 tokens"),
        ({"n_ctx": 10**10}, "GiB and this machine"),
        ({"n_seq_max": 1000}, "n_seq_max must be"),
    ],
)
def test_impossible_contexts(model: Model, size: dict, message: str) -> None:
    with pytest.raises(LocalsteerError, match=message):
        Context(model, n_threads=1, **size)


def test_a_context_of_one_token(model: Model) -> None:
    with Context(model, n_ctx=1, n_batch=0, n_threads=1) as context:
        assert context.probe() == {0, 1, 2, 3}


def test_sequences_that_do_not_exist(context: Context) -> None:
    for call in (lambda: context.seq_rm(4), lambda: context.seq_cp(0, 9)):
        with pytest.raises(LocalsteerError, match="does not exist"):
            call()


# --- model files ---


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        Model(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="can't be read"):
        Model(tmp_path)
    for content in (b"", b"GGU", b"PK\x03\x04" * 100):
        (tmp_path / "foreign.gguf").write_bytes(content)
        with pytest.raises(ModelFileError, match="not a GGUF file"):
            Model(tmp_path / "foreign.gguf")


@pytest.mark.parametrize("part", [0.0001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_files_are_one_line_and_no_abort(tiny_llama, tmp_path: Path, part: float) -> None:
    whole = tiny_llama.gguf_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: max(4, int(len(whole) * part))])
    with pytest.raises(ModelFileError, match=r"cut\.gguf (can't be loaded:|is) ") as error:
        Model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n_layers", [513, 2**32 - 1])
def test_too_many_layers_are_one_line_and_no_abort(tiny_llama, tmp_path: Path, n_layers: int) -> None:
    whole, key = tiny_llama.gguf_path.read_bytes(), b".block_count\x04\0\0\0"
    at = whole.index(key) + len(key)
    path = tmp_path / "deep.gguf"
    path.write_bytes(whole[:at] + n_layers.to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelFileError, match=r"block_count is .* \(1 to 512\)"):
        bridge.check_gguf(path)  # Model does this first; without it llama.cpp would end this very process
    path.write_bytes(whole[:at] + (512).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelFileError, match="can't be loaded"):
        Model(path)  # no tensors for so many


def test_a_control_vector_is_no_model(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    vector(model).save(path)
    with pytest.raises(ModelFileError, match="is a control vector: name a model"):
        Model(path)


def test_another_version_of_llama_cpp_is_refused(tiny_llama, monkeypatch) -> None:
    monkeypatch.setattr(library.importlib.metadata, "version", lambda _: "0.4.1")
    with pytest.raises(
        LocalsteerError, match=r"0\.4\.1 is installed.*pip install llama-cpp-python==0\.3\.36"
    ):
        Model(tiny_llama.gguf_path)


# --- owners ---


def test_use_after_close_raises_and_close_twice_does_not(tiny_llama) -> None:
    model = Model(tiny_llama.gguf_path)
    context, sampler = Context(model, n_ctx=64, n_threads=1), Sampler(model)
    model.close()  # takes context and sampler with it, in the right order
    for use in (
        lambda: run(context),
        context.clear,
        lambda: model.tokenize("a", add_special=False, parse_special=False),
        lambda: sampler.sample(context),
    ):
        with pytest.raises(LocalsteerError, match="closed"):
            use()
    for handle in (model, context, sampler, model):
        handle.close()


def test_dropped_objects_are_freed(tiny_llama) -> None:
    context = Context(Model(tiny_llama.gguf_path), n_ctx=64, n_threads=1)
    free_context, free_model = context._free, context.model._free
    del context
    assert not free_context.alive
    assert not free_model.alive


def test_a_cycle_is_freed_in_the_right_order(tiny_llama, monkeypatch) -> None:
    """The garbage collector takes a cycle's objects in any order; a context frees parts of its model."""
    gc.collect()  # what earlier tests have left
    freed = []
    for name in ("llama_sampler_free", "llama_free", "llama_model_free"):
        free = getattr(lc, name)
        monkeypatch.setattr(
            lc, name, lambda pointer, name=name, free=free: (freed.append(name), free(pointer))
        )
    model = Model(tiny_llama.gguf_path)
    handles = [model, Context(model, n_ctx=64, n_threads=1), Sampler(model)]
    handles.append(handles)
    del model, handles
    gc.collect()
    assert sorted(freed) == ["llama_free", "llama_model_free", "llama_sampler_free"]
    assert freed[-1] == "llama_model_free"


def test_one_llama_and_one_ggml_in_the_process(tiny_llama) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps on this system")
    code = f"""if True:
        from localsteer.runtime.bridge import Context, Model
        context = Context(Model({str(tiny_llama.gguf_path)!r}), n_ctx=64, n_threads=1)
        assert context.probe()
        print(*{{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}, sep="\\n")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mapped = [Path(line).name for line in result.stdout.split()]
    for name in ("libllama", "libggml", "libggml-base", "libggml-cpu", "liblocalsteer_native"):
        assert len([file for file in mapped if file.startswith(f"{name}.so")]) == 1, name
    assert result.stderr == "", "llama.cpp is quiet"


# --- text ---


def test_tokens_and_text(model: Model) -> None:
    text = "Tell me about foxes — 狐, 🦊.\n"
    tokens = model.tokenize(text, add_special=False, parse_special=True)
    assert b"".join(model.token_to_piece(token) for token in tokens) == text.encode()
    assert model.tokenize("", add_special=False, parse_special=False) == []
    assert model.is_eog(model.eos)
    assert not model.is_eog(tokens[0])
    assert model.token_to_piece(model.eos) == b""
    assert model.token_to_piece(model.eos, special=True) != b""
    with pytest.raises(PromptError, match="not a Unicode"):
        model.tokenize("\ud800", add_special=False, parse_special=False)
    with pytest.raises(PromptError, match="vocabulary"):
        model.token_to_piece(512)


def test_a_character_that_the_vocabulary_can_not_spell_is_refused(real_data) -> None:
    # llama.cpp alone ends the process here: a SentencePiece vocabulary without byte tokens
    with Model(real_data / "tinystories-656k" / "tinystories-656k-f32.gguf") as model:
        assert model.tokenize("Once upon", add_special=False, parse_special=True)
        for text in ("café", "café " * 100_000):  # one so long has its tokens counted first
            with pytest.raises(PromptError, match="no token for 'é'"):
                model.tokenize(text, add_special=False, parse_special=True)


def test_what_a_model_says_of_itself(model: Model, tiny_llama) -> None:
    assert (model.n_layer, model.n_embd, model.n_vocab) == (4, 64, 512)
    assert model.architecture == model.metadata["general.architecture"] == "llama"
    assert model.chat_template is not None
    assert "tokenizer.ggml.model" in model.metadata


# --- sampling ---


def test_greedy_takes_the_largest_logit(model: Model, context: Context) -> None:
    logits = run(context).logits
    with Sampler(model, temp=0) as sampler:
        assert [sampler.sample(context, i) for i in range(N)] == logits.argmax(axis=1).tolist()
        assert sampler.sample(context) == logits[-1].argmax()


def test_seeds_repeat(model: Model, context: Context) -> None:
    run(context)

    def draw(seed: int | None) -> list[int]:
        with Sampler(model, temp=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed) as sampler:
            return [sampler.sample(context) for _ in range(20)]

    assert draw(7) == draw(7) != draw(8)


def test_repeat_penalty_moves_on(model: Model, context: Context) -> None:
    run(context)
    with Sampler(model, temp=0, repeat_penalty=1e6) as sampler:
        drawn = [sampler.sample(context) for _ in range(5)]
    assert len(set(drawn)) == 5


def test_grammar_is_kept_to_its_end(model: Model, context: Context) -> None:
    run(context)
    text = b""
    matcher = TokenBytes(model.pieces(), model.ends()).matcher(Constraint.gbnf('root ::= "ab" [0-9]'))
    with Sampler(model, temp=1.0, seed=1, matcher=matcher) as sampler:
        for _ in range(10):
            token = sampler.sample(context)
            if model.is_eog(token):
                break
            text += model.token_to_piece(token)
        assert re.fullmatch(rb"ab[0-9]", text)
        assert model.is_eog(sampler.sample(context)), "nothing but the end is left"


def test_a_broken_grammar_is_one_line(model: Model, capfd) -> None:
    for grammar in ("root ::= [", 'other ::= "a"', "root ::= thing", ""):
        with pytest.raises(LocalsteerError, match="grammar can't be parsed") as error:
            check_llama_grammar(model, grammar)
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_grammars_in_two_threads_leave_stderr_where_it_was() -> None:
    from localsteer.runtime.bridge.sampler import _stderr_kept

    before = os.fstat(2).st_ino
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with _stderr_kept():
            first_in.set()
            second_in.wait(0.2)  # in vain: the second has to wait for us
        first_out.set()

    def second() -> None:
        first_in.wait()
        with _stderr_kept():
            second_in.set()
            first_out.wait(0.2)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.fstat(2).st_ino == before


def test_broken_logits_are_an_error(model: Model, context: Context, monkeypatch) -> None:
    run(context)
    monkeypatch.setattr(context, "logits", lambda _: np.full(model.n_vocab, np.nan, np.float32))
    with Sampler(model) as sampler, pytest.raises(LocalsteerError, match="lower the strength"):
        sampler.sample(context)


# --- the machine ---


@pytest.mark.parametrize(
    ("info", "asked", "expected"),
    [
        ("CPU : AVX2 = 1 | AMX_INT8 = 1 | ", None, False),
        ("CPU : AVX2 = 1 | AMX_INT8 = 0 | ", None, True),
        ("CPU : AVX2 = 1 | REPACK = 1 | ", None, True),
        ("CPU : AMX_INT8 = 1 | ", True, True),
        ("CPU : AVX2 = 1 | ", False, False),
    ],
)
def test_amx_builds_get_the_safe_setting(info: str, asked: bool | None, expected: bool) -> None:
    assert bridge.choose_extra_bufts(info, asked) is expected


def test_system_info_has_versions_and_features() -> None:
    info = bridge.system_info()
    assert info["llama-cpp-python"]
    assert any(key.startswith("CPU.") for key in info)


# --- quantizing ---


@pytest.mark.parametrize("ftype", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_quantized_models_load_and_are_smaller(tiny_llama, tmp_path: Path, ftype: str) -> None:
    path = tmp_path / "small.gguf"
    bridge.quantize(tiny_llama.gguf_path, path, ftype.lower(), n_threads=1)
    assert path.stat().st_size < tiny_llama.gguf_path.stat().st_size
    with Model(path) as model, Context(model, n_ctx=64, n_threads=1) as context:
        assert np.isfinite(run(context, Plan.from_vectors([vector(model)])).logits).all()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_quantized_model_has_the_permissions_of_any_other_file(tiny_llama, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    bridge.quantize(tiny_llama.gguf_path, tmp_path / "small.gguf", "Q8_0", n_threads=1)
    modes = {stat.S_IMODE(os.stat(path).st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_quantizing_fails_cleanly(tiny_llama, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="unknown quantization 'Q5_X'"):
        bridge.quantize(tiny_llama.gguf_path, tmp_path / "a.gguf", "Q5_X")
    (tmp_path / "cut.gguf").write_bytes(tiny_llama.gguf_path.read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="is truncated"):
        bridge.quantize(tmp_path / "cut.gguf", tmp_path / "b.gguf", "Q8_0", n_threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


# --- real models, where they are at hand ---


def test_what_an_rwkv_vocabulary_cant_spell_is_refused_and_not_looked_for_without_end(
    real_data: Path,
) -> None:
    with Model(real_data / "craftgpt-chat-5m-f16.gguf") as model:
        for text in ("a < b", "<", " hello <<a new day>>", "a < b" * 100_000):
            with pytest.raises(PromptError, match="has no token for '<'"):
                model.tokenize(text, add_special=False, parse_special=True)
        tokens = model.tokenize(" [inst] how are you<unused0> [/inst]", add_special=False, parse_special=True)
        assert tokens[0] == 0 and tokens[-1] == 1
        with pytest.raises(PromptError, match="has no token for 'é'"):
            model.tokenize(" [inst] é [/inst]", add_special=False, parse_special=True)


def test_a_real_model_tells_its_story(real_data: Path) -> None:
    with (
        Model(real_data / "stories260K.gguf") as model,
        Context(model, n_threads=1) as context,
        Sampler(model, temp=0) as sampler,
    ):
        tokens = model.tokenize("Once upon a time", add_special=True, parse_special=False)
        n = len(tokens)
        context.decode(tokens, range(n), [0] * n, [i == n - 1 for i in range(n)])
        text = b""
        for i in range(n, n + 12):
            token = sampler.sample(context)
            text += model.token_to_piece(token)
            context.decode([token], [i], [0], [True])
        assert text.startswith(b", there was a little girl named")


def test_a_table_of_positions_bounds_the_context(real_data: Path) -> None:
    """Past its 64 learned positions this model would end the process."""
    with Model(real_data / "craftgpt-chat-5m-f16.gguf") as model, Context(model, n_ctx=512) as context:
        assert context.n_ctx == 64
        with pytest.raises(PromptError, match="context of 64"):
            context.decode([1], [64], [0], [True])
