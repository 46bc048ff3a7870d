"""Where models of transformers differ, on tiny random ones: heads, caches, how they tell their layers apart.

benchmarks/architectures.py compares every architecture that llama.cpp shares with the engine; what it showed
to be wrong has a test here, which needs no file of llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engines import open_engine
from tiny_models import write_checkpoint

torch = pytest.importorskip("torch", reason="the PyTorch side is what is tested")
transformers = pytest.importorskip("transformers")

from localsteer import ControlVector, Plan  # noqa: E402
from localsteer.errors import MismatchError, UnsupportedModelError  # noqa: E402
from localsteer.extract.torch_backend import (  # noqa: E402
    GGUF_ARCHITECTURES,
    config_architecture,
    decoder_layers,
    layer_output,
)
from localsteer.extract.torch_steering import cache_argument, greedy_tokens, reply_cache, steer_hooks  # noqa: E402
from localsteer.learn import weights as weights_module  # noqa: E402
from localsteer.learn.weights import Weights  # noqa: E402
from localsteer.runtime.bridge import Model  # noqa: E402

N_EMBD, N_VOCAB = 32, 64
IDS = [5, 9, 41, 7, 33, 12, 60, 3, 18, 22, 47, 8]
SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": N_EMBD, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {
    "vocab_size": N_VOCAB, "hidden_size": N_EMBD, "num_hidden_layers": 4, "state_size": 8,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
RECURRENT = {
    "mamba": {**MAMBA, "time_step_rank": 4},
    "mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
}
# A window shorter than IDS, heads that scale or cap, embeddings that are scaled, outputs that are tuples.
SEEN_BY_NUMBER = {
    "gemma2": {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "cohere2": {**SIZES, "sliding_window": 4, "logit_scale": 0.1},
    "granite": {**SIZES, "embedding_multiplier": 5.0, "logits_scaling": 4.0},
    "smollm3": {**SIZES, "no_rope_layers": [0, 1, 1, 0]},
    "falcon": {
        "vocab_size": N_VOCAB, "hidden_size": N_EMBD, "num_hidden_layers": 4, "num_attention_heads": 4,
        "bos_token_id": None, "eos_token_id": None,
    },
    "mamba": RECURRENT["mamba"],
}  # fmt: skip


def stack(n: int, width: int) -> torch.nn.Module:
    layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(n))
    return torch.nn.ModuleDict({"layers": layers})


def random_model(kind: str, sizes: dict):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def plan(positions: str = "all", layer: int = 1) -> Plan:
    draw = np.random.default_rng(0)
    vector = ControlVector(
        directions=draw.normal(size=(4, N_EMBD)), mean_with=draw.normal(2.0, 1.0, size=4),
        mean_without=None, std_with=None, std_without=None,
        layers=(layer,), name="random", positions=positions,
    )  # fmt: skip
    return Plan.from_vectors([vector])


def without_cache(model, steering: Plan, n: int) -> list[int]:
    tokens = list(IDS)
    with torch.no_grad(), steer_hooks(model, steering, len(IDS)):
        while len(tokens) < len(IDS) + n:
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(IDS) :]


@pytest.mark.parametrize("positions", ["all", "prompt", "generation"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_reply_of_a_recurrent_model_is_that_without_a_cache(kind, positions):
    """Its cache does not count tokens, and what position a token has decides about its steering."""
    model, steering = random_model(kind, RECURRENT[kind]), plan(positions)
    whole = without_cache(model, steering, 8)
    assert greedy_tokens(model, IDS, [steering], max_tokens=8, ends=lambda token: False) == whole
    with torch.no_grad(), steer_hooks(model, steering, len(IDS)):
        generated = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False)
    assert generated[0, len(IDS) :].tolist() == whole


def test_a_recurrent_cache_that_has_seen_tokens_before_is_refused():
    model = random_model("mamba", RECURRENT["mamba"])
    cache = {cache_argument(model): reply_cache(model)}
    with torch.no_grad():
        model(torch.tensor([IDS]), use_cache=True, **cache)
        with steer_hooks(model, plan(), len(IDS)), pytest.raises(UnsupportedModelError, match="empty"):
            model(torch.tensor([[4]]), use_cache=True, **cache)


@pytest.mark.parametrize("kind", SEEN_BY_NUMBER)
def test_learning_sees_the_logits_and_the_layers_of_the_whole_model(kind):
    model = random_model(kind, SEEN_BY_NUMBER[kind])
    weights, ids = Weights(model), torch.tensor([IDS])
    attention = torch.ones_like(ids)
    states, last = weights.states(ids, attention, (0, 1, 2))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
        assert torch.allclose(weights.logits(last[0]), logits, atol=1e-5)
        for layer, hidden in states.items():
            assert torch.allclose(weights.after(layer, hidden, ids, attention), last, atol=1e-5), layer
        assert torch.equal(model(ids, use_cache=False).logits[0], logits)  # all is back in its place


def test_gradients_pass_the_layers_above_and_the_head():
    model = random_model("gemma2", SEEN_BY_NUMBER["gemma2"])
    weights, ids = Weights(model), torch.tensor([IDS])
    states, _ = weights.states(ids, torch.ones_like(ids), (1,))
    hidden = states[1].clone().requires_grad_(True)
    weights.logits(weights.after(1, hidden, ids, torch.ones_like(ids))[0]).square().sum().backward()
    assert hidden.grad.abs().sum() > 0


class Seeing(torch.nn.Module):
    """A model with a tower for pictures that is as deep as its decoder, and larger."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(num_hidden_layers=3)
        self.tower, self.text = stack(3, 64), stack(3, 8)

    def get_decoder(self) -> torch.nn.Module:
        return self.text


def test_the_layers_are_those_of_the_decoder():
    model = Seeing()
    assert decoder_layers(model) == list(model.text["layers"])


def test_several_residual_streams_are_refused():
    with pytest.raises(UnsupportedModelError, match="several residual streams"):
        layer_output((torch.zeros(4, 1, 5, 8), None))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "mlp"]}, "nemotron_h"),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe"]}, "nemotron_h_moe"),
        ({"model_type": "exaone", "architectures": ["ExaoneForCausalLM"]}, "exaone"),
        ({"model_type": "exaone", "architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"model_type": "sarvam_moe", "architectures": ["SarvamMoEForCausalLM"]}, "bailingmoe2"),
        ({"model_type": "deepseek_v3"}, "deepseek2"),
        ({"model_type": "laguna"}, "laguna"),  # newer than the gguf package
        ({"model_type": "x"}, None),
    ],
)
def test_a_checkpoint_has_the_name_that_the_converter_gives_it(settings, expected):
    assert config_architecture(SimpleNamespace(**settings)) == expected


def test_every_architecture_that_was_compared_has_the_engines_name():
    path = Path(__file__).resolve().parents[1] / "docs" / "results" / "architectures.json"
    if not path.exists():
        pytest.skip("not run from a checkout")
    rows = json.loads(path.read_text("utf-8"))["rows"]
    compared = {row["type"]: row["architecture"] for row in rows.values() if "architecture" in row}
    named = {kind: GGUF_ARCHITECTURES.get(kind, kind) for kind in compared}
    special = {
        "exaone",
        "granitemoehybrid",
        "nemotron_h",
        "sarvam_moe",
        "sarvam_mla",
    }  # by more than the type
    assert len(compared) >= 30
    assert {kind: compared[kind] for kind in named if kind not in special} == {
        kind: name for kind, name in named.items() if kind not in special
    }


def test_a_model_that_hides_its_residual_stream_is_refused():
    """At its MLP layers l_out is what is added: a projection would be taken of something else."""
    for architecture in ("nemotron_h", "nemotron_h_moe"):
        assert "not the stream" in Model.why_not_steerable(SimpleNamespace(architecture=architecture), 1)


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(weights_module, "fast_dtype", lambda: torch.float32)


def test_another_checkpoint_of_the_same_shape_is_refused(tiny_llama, tmp_path, in_float32):
    write_checkpoint("llama", tmp_path / "other", seed=1)
    with open_engine(tiny_llama.gguf_path) as engine:
        Weights.load(engine, str(tiny_llama.hf_dir), n_tokens=32)
        with pytest.raises(MismatchError, match="other is not the model of"):
            Weights.load(engine, str(tmp_path / "other"), n_tokens=32)


def test_a_gguf_that_transformers_reads_as_another_model_is_refused(tiny, in_float32):
    """It does not read from the file how a Gemma 2 scales its queries."""
    pytest.importorskip("accelerate", reason="transformers reads a GGUF with it")
    with (
        open_engine(tiny("gemma2").gguf_path) as engine,
        pytest.raises(MismatchError, match="name the model's checkpoint"),
    ):
        Weights.load(engine, n_tokens=32)
