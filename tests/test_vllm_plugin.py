"""The parts of the vLLM plugin that need no vLLM; tests/vllm/ runs it in a real one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from localsteer import ControlVector, steering
from localsteer.errors import LocalsteerError, MismatchError, PlanError, VectorFileError
from localsteer.plan import Plan, PositionClass, position_classes
from localsteer.vllm import asked, carried
from localsteer.vllm.shelf import VectorShelf

N_LAYER, N_EMBD = 4, 8


def made(name: str, seed: int = 0, **settings) -> ControlVector:
    draw = np.random.default_rng(seed)
    ones = np.ones(N_LAYER)
    statistics = (3 * ones, 0 * ones, ones, ones)
    directions = draw.standard_normal((N_LAYER, N_EMBD))
    return ControlVector(directions, *statistics, **{"layers": (1,), "name": name, **settings})


def gated(name: str) -> ControlVector:
    reader, writer = np.random.default_rng(5).standard_normal((2, N_EMBD))
    options = {"mean_gate": 1.0, "n_layer": N_LAYER, "one_sided": True, "cap": 2.0, "name": name}
    return ControlVector.from_gate(2, reader, 0.5, writer, **options)


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "vectors"
    folder.mkdir()
    for vector in (made("json"), made("title", 1, positions="prompt"), gated("gate")):
        vector.save(folder / f"{vector.name}.gguf")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    made("outside").save(tmp_path / "outside.gguf")
    return VectorShelf(folder)


def plan_of(extra, shelf):
    return asked.plan_of(extra, shelf, n_layer=N_LAYER, n_embd=N_EMBD)


# --- what is asked -----------------------------------------------------------------------------------------


def test_a_request_without_steering_has_no_plan(shelf):
    assert plan_of({}, shelf) is None
    assert plan_of({"kv_transfer_params": {"a": 1}}, shelf) is None
    assert plan_of({"steer": "json", "strength": 0}, shelf) is None


def test_settings_are_those_of_the_file_unless_the_request_says_otherwise(shelf):
    assert plan_of({"steer": "json"}, shelf).key == Plan.from_vectors([made("json")]).key
    asking = {"steer": "json", "strength": 0.5, "positions": "last", "layer": [0, 3], "mode": "add"}
    expected = made("json").at(strength=0.5, positions="last", layer=(0, 3), mode="add")
    assert plan_of(asking, shelf).key == Plan.from_vectors([expected]).key


def test_several_vectors_have_a_setting_each_or_one_for_all(shelf):
    expected = [made("json").at(strength=0.5), made("title", 1, positions="prompt").at(strength=2)]
    assert (
        plan_of({"steer": ["json", "title"], "strength": [0.5, 2]}, shelf).key
        == Plan.from_vectors(expected).key
    )
    both = plan_of({"steer": ["json", "title"], "positions": "generation"}, shelf)
    assert {edit.positions for edit in both.edits} == {"generation"}


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/b", "..", ".", "", "json\n", "json\0", "a" * 65, "json.gguf/", "~"],
)
def test_a_name_never_leads_out_of_the_folder(shelf, name):
    with pytest.raises(PlanError, match="steer"):
        plan_of({"steer": name}, shelf)


def test_an_unknown_name_lists_those_there_are(shelf):
    with pytest.raises(PlanError, match="no vector 'jsn': choose one of broken, gate, json, title"):
        plan_of({"steer": "jsn"}, shelf)


def test_a_file_that_is_none_is_named_without_its_folder(shelf):
    with pytest.raises(VectorFileError, match=r"broken\.gguf") as caught:
        plan_of({"steer": "broken"}, shelf)
    assert str(shelf.folder) not in str(caught.value)


def test_a_vector_of_another_model_is_refused(shelf):
    with pytest.raises(MismatchError, match="embedding width 8 but this model has 16"):
        asked.plan_of({"steer": "json"}, shelf, n_layer=N_LAYER, n_embd=16)
    with pytest.raises(MismatchError, match="number of layers 4 but this model has 5"):
        asked.plan_of({"steer": "json"}, shelf, n_layer=5, n_embd=N_EMBD)


@pytest.mark.parametrize(
    "value", [True, "1", None.__class__, [], {}, float("nan"), float("inf"), -1001, 1e39, 10**400, [1, 2]]
)
def test_a_strength_that_is_none(shelf, value):
    with pytest.raises(LocalsteerError):
        plan_of({"steer": "json", "strength": value}, shelf)


@pytest.mark.parametrize("extra", [{"strength": 1}, {"positions": "all"}, {"layer": 0}, {"mode": "add"}])
def test_a_setting_without_a_vector_is_not_ignored(shelf, extra):
    with pytest.raises(PlanError, match="needs steer"):
        plan_of(extra, shelf)


def test_a_file_that_changes_is_read_again(shelf):
    before = shelf.vector("json")
    assert shelf.vector("json") is before
    made("json", 7, layers=(0, 1)).save(shelf.folder / "json.gguf")
    assert shelf.vector("json").layers == (0, 1)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(LocalsteerError, match="there is no such folder"):
        VectorShelf(tmp_path / "none")


# --- on its way --------------------------------------------------------------------------------------------


def test_a_plan_arrives_as_it_was_sent():
    vectors = [made("a"), made("b", 1, mode="ablate", one_sided=True), gated("c").at(strength=-0.3)]
    vectors.append(made("d", 2, mode="add", strength=0.1, layers=(1, 2), positions="last"))
    plan = Plan.from_vectors(vectors, ridge=0.2)
    there = carried.unpacked(carried.packed(plan))
    assert there.key == plan.key and there.n_embd == plan.n_embd
    x = np.random.default_rng(3).standard_normal((9, N_EMBD)).astype(np.float32)
    classes = position_classes(np.arange(9), 5)
    for layer in range(N_LAYER):
        ours, theirs = (steering.steer(x, each, layer, classes) for each in (plan, there))
        assert np.array_equal(ours, theirs)


# --- in the workers ----------------------------------------------------------------------------------------


def torch_parts():
    pytest.importorskip("torch")
    from localsteer.vllm import layers, workers

    return layers, workers


def toy_runner(torch, *, tuples: bool):
    """A stack of layers as vLLM has them: of one output, or of two that add up to the stream."""

    class Layer(torch.nn.Module):
        def forward(self, hidden, before=None):
            return (hidden + 0.5, before) if tuples else hidden + 0.5

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = torch.nn.Module()
            self.vision.layers = torch.nn.ModuleList(Layer() for _ in range(N_LAYER))
            self.layers = torch.nn.ModuleList(Layer() for _ in range(N_LAYER))

    config = SimpleNamespace(
        get_hidden_size=lambda: N_EMBD, hf_text_config=SimpleNamespace(num_hidden_layers=N_LAYER)
    )
    return SimpleNamespace(model=Model(), model_config=config, device=torch.device("cpu"))


@pytest.mark.parametrize("tuples", [False, True])
def test_rows_of_a_batch_get_the_edits_of_their_request_and_position(tuples):
    """Chunks of three requests, one of them plain, in one batch: as the numpy reference has it."""
    _, workers = torch_parts()
    import torch

    runner = toy_runner(torch, tuples=tuples)
    batches = workers.Batches(runner)
    plans = {
        "a": Plan.from_vectors([made("a"), made("b", 1, positions="last")]),
        "c": Plan.from_vectors([gated("c"), made("d", 2, layers=(1,), mode="add", positions="prompt")]),
    }
    lengths = {"a": 5, "b": 4, "c": 3}
    new = [
        SimpleNamespace(
            req_id=name,
            prompt_token_ids=list(range(length)),
            sampling_params=SimpleNamespace(
                extra_args={carried.KEY: carried.packed(plans[name])} if name in plans else None
            ),
        )
        for name, length in lengths.items()
    ]
    batches.take(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new))
    spans = [("a", 0, 4, 2), ("b", 4, 6, 0), ("c", 6, 11, 0)]  # (request, rows, its position there)
    batches.begin(spans)
    x = torch.randn(11, N_EMBD, generator=torch.Generator().manual_seed(0))
    before = torch.randn(11, N_EMBD, generator=torch.Generator().manual_seed(1)) if tuples else None
    stream = x if before is None else x + before
    for layer, module in enumerate(runner.model.layers):
        expected = (stream + 0.5).numpy()
        for name, first, after, position in spans:
            if name in plans:
                classes = position_classes(np.arange(position, position + after - first), lengths[name])
                expected[first:after] = steering.steer(expected[first:after], plans[name], layer, classes)
        out = module(x, before) if tuples else module(x)
        x = out[0] if tuples else out
        stream = x + before if tuples else x
        assert np.allclose(stream.numpy(), expected, atol=1e-6)
    batches.end()
    plain = runner.model.layers[1](torch.zeros(2, N_EMBD))
    assert torch.equal(plain[0] if tuples else plain, torch.full((2, N_EMBD), 0.5))
    batches.take(SimpleNamespace(finished_req_ids={"a", "c"}, scheduled_new_reqs=[]))
    batches.begin(spans)
    assert not batches.edits


def test_position_classes_of_a_chunk():
    _, workers = torch_parts()
    for n_prompt in range(1, 6):
        for position in range(7):
            for n in range(1, 6):
                expected = position_classes(np.arange(position, position + n), n_prompt)
                found = np.full(n, -1)
                for cls, start, end in workers._classes(position, n, n_prompt):
                    found[start:end] = int(cls)
                assert np.array_equal(found, expected)


def test_a_model_without_one_list_of_layers_is_refused():
    layers, _ = torch_parts()
    import torch

    model = toy_runner(torch, tuples=False).model
    assert list(layers.decoder_layers(model, N_LAYER)) == list(range(N_LAYER))
    with pytest.raises(LocalsteerError, match="finds 0 lists of 9 decoder layers in Model"):
        layers.decoder_layers(model, 9)
    hook = layers.LayerHook(0, N_EMBD, {})
    for output in (torch.zeros(1, 2, N_EMBD), torch.zeros(2, 5), (torch.zeros(2, N_EMBD), None), "text"):
        with pytest.raises(LocalsteerError, match="can't steer Model"):
            hook(model, (), output)


def test_the_salt_is_that_of_the_edits_and_where_they_apply():
    from localsteer.vllm.front import salt_of

    everywhere = [Plan.from_vectors([made("a").at(strength=s)]) for s in (1, 1, 0.5)]
    salts = [salt_of(plan, n) for plan, n in zip(everywhere, (10, 20, 10), strict=True)]
    assert salts[0] == salts[1] != salts[2]
    prompt = Plan.from_vectors([made("a", positions="prompt")])
    assert salt_of(prompt, 10) != salt_of(prompt, 11)
    assert int(PositionClass.LAST) == 1


def test_the_plugin_imports_neither_llama_cpp_nor_torch_nor_vllm_before_it_is_asked_to():
    code = (
        "import sys, localsteer.vllm, localsteer.vllm.asked, localsteer.vllm.carried, localsteer.vllm.front; "
        "localsteer.vllm.register(); "
        "print([name for name in ('llama_cpp', 'torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
