"""One oracle, three implementations: numpy (steering.py), PyTorch hooks, the native hook.

Logits of transformers under `steer_hooks` and of llama.cpp under the native hook may differ by 1e-3 plus
twice what the two engines differ by unsteered (llama.cpp's GELU table: 2.5e-3 for gemma2, 1e-5 elsewhere).
"""

from __future__ import annotations

import numpy as np
import pytest
from engines import open_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer import ControlVector, Plan, PositionClass
from localsteer.steering import apply_program as oracle
from localsteer.steering import steer
from localsteer.terms import MODES

torch = pytest.importorskip("torch", reason="the PyTorch hook is what is tested")

from localsteer.extract.torch_backend import observe_layers  # noqa: E402
from localsteer.extract.torch_steering import apply_program, cache_argument, greedy_tokens, steer_hooks  # noqa: E402

PROMPT = PositionClass.PROMPT
N_PROMPT = 12
IDS = np.random.default_rng(3).integers(4, 512, 20).tolist()


def random_vector(seed: int = 0, n_layer: int = 4, n_embd: int = 64, **settings) -> ControlVector:
    draw = np.random.default_rng(seed)
    return ControlVector(
        directions=draw.normal(size=(n_layer, n_embd)),
        mean_with=draw.normal(2.0, 1.0, size=n_layer),
        mean_without=None, std_with=None, std_without=None,
        readers=draw.normal(size=(n_layer, n_embd)) / n_embd**0.5, biases=np.ones(n_layer),
        **{"layers": (1,), "name": f"random-{seed}", **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tiny):
    """(transformers model, engine) by architecture, both loaded once."""
    from transformers import AutoModelForCausalLM

    opened = {}

    def models(arch: str):
        if arch not in opened:
            model = AutoModelForCausalLM.from_pretrained(tiny(arch).hf_dir, attn_implementation="eager")
            opened[arch] = (model.float().eval(), open_engine(tiny(arch).gguf_path))
        return opened[arch]

    yield models
    for _, engine in opened.values():
        engine.close()


def torch_logits(model, plan: Plan, n_prompt: int | None = None) -> np.ndarray:
    with torch.no_grad(), steer_hooks(model, plan, n_prompt):
        return model(torch.tensor([IDS])).logits[0].numpy()


# numpy and PyTorch


@st.composite
def vector_lists(draw):
    n = draw(st.integers(1, 4))
    chosen = []
    for seed in range(n):
        mode = draw(st.sampled_from(MODES))
        bounded = mode != "add"
        chosen.append(
            random_vector(
                seed, n_layer=1, n_embd=16, layers=(0,), mode=mode,
                strength=draw(st.floats(-2, 2)),
                one_sided=bounded and draw(st.booleans()),
                cap=draw(st.one_of(st.none(), st.floats(0.01, 5))) if bounded else None,
            )
        )  # fmt: skip
    return chosen


@settings(max_examples=60, deadline=None)
@given(vectors=vector_lists(), seed=st.integers(0, 1000))
def test_pytorch_computes_what_numpy_computes(vectors, seed):
    program = Plan.from_vectors(vectors, ridge=0.1).program(0, PositionClass.PROMPT)
    if program is None:
        return
    x = np.random.default_rng(seed).normal(0, 3, size=(7, 16)).astype(np.float32)
    assert np.abs(apply_program(torch.from_numpy(x), program).numpy() - oracle(x, program)).max() < 1e-5


def test_a_broken_row_is_broken_alike():
    program = Plan.from_vectors([random_vector(layers=(0,), one_sided=True, cap=1.0)]).program(0, PROMPT)
    x = np.ones((2, 64), dtype=np.float32)
    x[0, 5] = np.nan
    ours, theirs = apply_program(torch.from_numpy(x), program).numpy(), oracle(x, program)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs)) and np.isnan(theirs[0]).all()


def test_other_types_keep_their_type_and_shape():
    program = Plan.from_vectors([random_vector(layers=(0,))]).program(0, PositionClass.LAST)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    steered = apply_program(x, program)
    assert (steered.shape, steered.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generation"])
def test_the_hook_edits_the_rows_that_the_oracle_edits(pair, positions):
    model, _ = pair("llama")
    plan = Plan.from_vectors([random_vector(positions=positions)])
    seen: dict[str, dict[int, torch.Tensor]] = {"plain": {}, "steered": {}}
    with torch.no_grad(), observe_layers(model, seen["plain"].__setitem__):
        model(torch.tensor([IDS]))
    with (
        torch.no_grad(),
        steer_hooks(model, plan, N_PROMPT),
        observe_layers(model, seen["steered"].__setitem__),
    ):
        model(torch.tensor([IDS]))
    classes = [PositionClass.PROMPT] * (N_PROMPT - 1) + [PositionClass.LAST]
    classes += [PositionClass.GENERATION] * (len(IDS) - N_PROMPT)
    expected = steer(seen["plain"][1][0].numpy(), plan, 1, classes)
    assert np.abs(seen["steered"][1][0].numpy() - expected).max() < 1e-5
    assert torch.equal(seen["steered"][0], seen["plain"][0])


def test_a_cached_pass_is_steered_like_a_whole_one(pair):
    """generate() feeds one token at a time: classes follow positions, not places in the batch."""
    from transformers import DynamicCache

    model, _ = pair("llama")
    plan = Plan.from_vectors(
        [random_vector(positions="last"), random_vector(1, layers=(2,), positions="prompt")]
    )
    whole = torch_logits(model, plan, N_PROMPT)
    cache = {cache_argument(model): DynamicCache()}
    with torch.no_grad(), steer_hooks(model, plan, N_PROMPT):
        parts = [IDS[:N_PROMPT], *([token] for token in IDS[N_PROMPT:])]
        rows = [model(torch.tensor([part]), use_cache=True, **cache).logits[0] for part in parts]
    assert np.abs(torch.cat(rows).numpy() - whole).max() < 1e-4


def test_hooks_are_gone_afterwards(pair):
    model, _ = pair("llama")
    before = torch_logits(model, Plan.none())
    torch_logits(model, Plan.from_vectors([random_vector()]))
    assert np.array_equal(torch_logits(model, Plan.none()), before)


def test_hooks_are_gone_after_an_error(pair):
    model, _ = pair("llama")
    before = torch_logits(model, Plan.none())
    with pytest.raises(KeyError), steer_hooks(model, Plan.from_vectors([random_vector()])):
        raise KeyError
    assert np.array_equal(torch_logits(model, Plan.none()), before)


def test_strength_zero_changes_no_bit(pair):
    model, _ = pair("llama")
    none = Plan.from_vectors([random_vector(strength=0.0)])
    assert np.array_equal(torch_logits(model, none), torch_logits(model, Plan.none()))


def test_a_reply_of_a_hybrid_model_is_that_without_a_cache():
    """Its recurrent layers keep a state of their own, which only the config tells the cache of."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    model = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
        )
    ).eval()  # fmt: skip
    plan = Plan.from_vectors([random_vector(n_layer=3, n_embd=32)])
    ids, ends = [5, 9, 41, 7], lambda token: False
    reply = greedy_tokens(model, ids, [plan], max_tokens=6, ends=ends)
    tokens = list(ids)
    with torch.no_grad(), steer_hooks(model, plan, len(ids)):
        while len(tokens) < len(ids) + 6:
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert tokens[len(ids) :] == reply


# PyTorch and native

CASES = {
    "project": [random_vector()],
    "first layer": [random_vector(layers=(0,))],
    "last layer": [random_vector(layers=(3,))],
    "every layer": [random_vector(layers=(0, 1, 2, 3), strength=0.5)],
    "add": [random_vector(mode="add", strength=0.7)],
    "ablate": [random_vector(mode="ablate")],
    "gate": [random_vector(mode="gate")],
    "clipped gate": [random_vector(mode="gate", one_sided=True, strength=-0.7)],
    "one-sided": [random_vector(one_sided=True)],
    "capped": [random_vector(cap=0.5)],
    "joint": [
        random_vector(0),
        random_vector(1, strength=0.6),
        random_vector(2, mode="ablate", one_sided=True),
    ],
    "project, add and gate": [random_vector(0), random_vector(1, mode="add"), random_vector(2, mode="gate")],
    "two layers, two classes": [
        random_vector(0, layers=(0,), positions="prompt"),
        random_vector(1, layers=(2,), positions="generation"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_native_logits_are_those_of_pytorch(tiny_model, pair, case):
    model, engine = pair(tiny_model.arch)
    unsteered = np.abs(torch_logits(model, Plan.none()) - engine.logits(IDS)).max()
    plan = Plan.from_vectors(CASES[case])
    ours = engine.logits(IDS, steer=CASES[case], n_prompt=N_PROMPT)
    theirs = torch_logits(model, plan, N_PROMPT)
    assert np.abs(ours - theirs).max() <= 1e-3 + 2 * unsteered
    assert np.abs(theirs - torch_logits(model, Plan.none())).max() > 0.1  # steering did something


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generation"])
def test_native_positions_are_those_of_pytorch(pair, positions):
    model, engine = pair("qwen2")
    vector = random_vector(positions=positions)
    theirs = torch_logits(model, Plan.from_vectors([vector]), N_PROMPT)
    ours = engine.logits(IDS, steer=[vector], n_prompt=N_PROMPT)
    assert np.abs(ours - theirs).max() < 1e-3


def test_without_n_prompt_all_is_prompt(pair):
    model, engine = pair("qwen2")
    vector = random_vector(positions="prompt")
    theirs = torch_logits(model, Plan.from_vectors([vector]))
    assert np.abs(engine.logits(IDS, steer=[vector]) - theirs).max() < 1e-3


def test_an_extracted_vector_steers_both_alike(tiny_model, pair):
    from localsteer.extract import extract

    model, engine = pair(tiny_model.arch)
    vector = extract(engine, "Answer in rhyme.", ["Who?", "Why?", "What is a fox?"])
    unsteered = np.abs(torch_logits(model, Plan.none()) - engine.logits(IDS)).max()
    theirs = torch_logits(model, Plan.from_vectors([vector]))
    assert np.abs(engine.logits(IDS, steer=[vector]) - theirs).max() <= 1e-3 + 2 * unsteered


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generation"])
def test_greedy_replies_are_the_same(pair, positions):
    """A whole reply, token by token with the cache, on both engines."""
    from engines import GREEDY

    model, engine = pair("llama")
    vector = random_vector(layers=(2,), strength=0.5, positions=positions)
    ids = engine.prompt_tokens("Tell me about the fox.")
    reply = engine.generate("Tell me about the fox.", steer=[vector], max_tokens=24, sampling=GREEDY)
    with torch.no_grad(), steer_hooks(model, Plan.from_vectors([vector]), len(ids)):
        generated = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[
            0, len(ids) :
        ].tolist()
    assert len(reply.tokens) > 5, "too short a reply to compare"
    assert generated[: len(reply.tokens)] == list(reply.tokens)
    plan = Plan.from_vectors([vector])
    assert greedy_tokens(model, ids, [plan], max_tokens=24, ends=engine.ends) == list(reply.tokens)
