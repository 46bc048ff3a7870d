"""The engine: prompts, plans that are checked, and the numbers of one forward pass."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import GREEDY, open_engine, random_vector

import localsteer
from localsteer import steering
from localsteer.errors import (
    LocalsteerError,
    MismatchError,
    ModelFileError,
    PlanError,
    PromptError,
    VectorFileError,
)
from localsteer.plan import Plan, PositionClass, position_classes
from localsteer.runtime.forward import Piece, pack

POSITIONS = ("all", "prompt", "last", "generation")
# F32 weights, cache and sums; chunks and batches take other kernels. States are of order 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokens(engine):
    return engine.prompt_tokens("Tell me about the fox and the rivers of a quiet village.")


def with_provenance(vector, **provenance):
    return localsteer.ControlVector(
        **{name: getattr(vector, name) for name in vector.__dataclass_fields__ if name != "provenance"},
        provenance=provenance,
    )


# --- prompts -----------------------------------------------------------------------------------------------


def test_a_question_goes_through_the_chat_template_once(engine):
    text = engine.model.tokenize("<|user|>Hello<|end|><|assistant|>", add_special=False, parse_special=True)
    assert engine.prompt_tokens("Hello") == text
    assert engine.prompt_tokens([{"role": "user", "content": "Hello"}]) == text


def test_token_ids_are_those_of_transformers(engine, tiny_llama):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama.hf_dir)
    messages = [{"role": "user", "content": "Tell me about «foxes» 🙂."}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert engine.prompt_tokens(messages) == list(theirs)


def test_a_raw_prompt_is_sent_as_it_is(engine):
    ids = engine.model.tokenize("Hello", add_special=True, parse_special=True)
    assert engine.prompt_tokens("Hello", raw=True) == ids


@pytest.mark.parametrize("prompt, raw", [("", False), (" \n", False), ("", True), ([], False)])
def test_an_empty_prompt_is_refused(engine, prompt, raw):
    with pytest.raises(PromptError, match="empty"):
        engine.prompt_tokens(prompt, raw=raw)


def test_messages_cannot_be_raw(engine):
    with pytest.raises(PromptError, match="raw"):
        engine.prompt_tokens([{"role": "user", "content": "Hello"}], raw=True)


def test_a_model_without_template_gets_questions_and_answers_and_says_so_once(real_data, caplog):
    with open_engine(real_data / "stories260K.gguf") as engine, caplog.at_level(logging.WARNING):
        ids = engine.prompt_tokens("Who?")
        engine.prompt_tokens("Why?")
    assert sum("no chat template" in record.message for record in caplog.records) == 1
    assert ids[0] == engine_bos(real_data) and ids.count(ids[0]) == 1


def engine_bos(real_data):
    with open_engine(real_data / "stories260K.gguf") as engine:
        return engine.model.bos


def test_bos_is_written_once_whoever_writes_it(real_data):
    with open_engine(real_data / "stories260K.gguf") as engine:
        plain = engine.prompt_tokens("Once", raw=True)
        assert plain[0] == engine.model.bos
        engine.template = localsteer.ChatTemplate(
            "{{ bos_token }}{{ messages[0].content }}", bos=engine.template.bos
        )
        assert engine.template.bos
        ids = engine.prompt_tokens("Once")
        assert ids.count(engine.model.bos) == 1 and ids[0] == engine.model.bos


# --- numbers -----------------------------------------------------------------------------------------------


def test_logits_are_one_row_for_each_token(engine, tokens):
    logits = engine.logits(tokens)
    assert logits.shape == (len(tokens), engine.model.n_vocab) and logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_chunks_of_n_batch_change_nothing(engine, tiny_llama, tokens):
    vector = random_vector(engine, positions="last")
    with open_engine(tiny_llama.gguf_path, n_batch=5) as small:
        assert small.context.n_batch == 5 < len(tokens)
        for steer in ((), [vector]):
            n = len(tokens) - 4
            np.testing.assert_allclose(
                small.logits(tokens, steer=steer, n_prompt=n),
                engine.logits(tokens, steer=steer, n_prompt=n),
                **CLOSE,
            )
            np.testing.assert_allclose(
                small.hidden_states(tokens, [0, 1, 3], steer=steer, n_prompt=n),
                engine.hidden_states(tokens, [0, 1, 3], steer=steer, n_prompt=n),
                **CLOSE,
            )
        np.testing.assert_allclose(
            small.last_hidden_states([tokens, tokens[:3]]),
            engine.last_hidden_states([tokens, tokens[:3]]),
            **CLOSE,
        )
        pairs = [(tokens[:4], tokens[4:]), (tokens[:7], tokens[7:9])]
        np.testing.assert_allclose(small.score(pairs), engine.score(pairs), **CLOSE)


def test_hidden_states_are_those_that_transformers_has(engine, tiny_llama, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama.hf_dir, dtype=torch.float32)
    seen = {}
    for il, module in enumerate(model.model.layers):
        module.register_forward_hook(
            lambda _, __, out, il=il: seen.update(
                {il: (out[0] if isinstance(out, tuple) else out).squeeze(0)}
            )
        )
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    states = engine.hidden_states(tokens, [2, 0, 3])
    assert states.shape == (len(tokens), 3, engine.model.n_embd) and states.dtype == np.float32
    for i, layer in enumerate((2, 0, 3)):
        np.testing.assert_allclose(states[:, i], seen[layer].numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(engine.logits(tokens), logits, rtol=1e-3, atol=1e-3)


def test_last_hidden_states_are_the_last_rows_of_each_prompt_alone(engine, tokens):
    prompts = [tokens[:n] for n in (1, 5, len(tokens), 3, 2, 7)]
    done = []
    together = engine.last_hidden_states(prompts, on_progress=lambda n, of: done.append((n, of)))
    assert together.shape == (6, engine.model.n_layer, engine.model.n_embd)
    assert done == [(n, 6) for n in range(1, 7)]
    for prompt, states in zip(prompts, together, strict=True):
        alone = engine.hidden_states(prompt, range(engine.model.n_layer))[-1]
        np.testing.assert_allclose(states, alone, **CLOSE)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", ["project", "add", "ablate"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_steered_layer_holds_what_the_oracle_says(engine, tokens, layer, mode, positions):
    vector = random_vector(engine, layers=(layer,), mode=mode, positions=positions)
    plan = Plan.from_vectors([vector])
    n_prompt = len(tokens) - 3
    plain = engine.hidden_states(tokens, [layer])[:, 0]
    steered = engine.hidden_states(tokens, [layer], steer=[vector], n_prompt=n_prompt)[:, 0]
    classes = [PositionClass(c) for c in position_classes(np.arange(len(tokens)), n_prompt)]
    np.testing.assert_allclose(steered, steering.steer(plain, plan, layer, classes), **CLOSE)
    changed = np.abs(steered - plain).max(axis=1) > 1e-3
    expected = {
        "all": np.ones(len(tokens), bool),
        "prompt": np.arange(len(tokens)) < n_prompt,
        "last": np.arange(len(tokens)) >= n_prompt - 1,
        "generation": np.arange(len(tokens)) >= n_prompt,
    }
    assert (changed == expected[positions]).all()


def test_strength_zero_is_the_model_alone_bit_for_bit(engine, tokens):
    vector = random_vector(engine, strength=0.0)
    assert engine.plan([vector]) is None
    assert (engine.logits(tokens, steer=[vector]) == engine.logits(tokens)).all()


def test_a_score_is_the_mean_log_probability_of_the_reply(engine, tokens):
    prompt, reply = tokens[:6], tokens[6:]
    logits = engine.logits([*prompt, *reply]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.mean([logs[len(prompt) - 1 + i, token] for i, token in enumerate(reply)])
    scores = engine.score([(prompt, reply), (prompt, reply[:1]), (prompt, reply)])
    assert scores[0] == pytest.approx(expected, abs=1e-4)
    assert scores[2] == pytest.approx(expected, abs=1e-4)
    assert scores[1] == pytest.approx(logs[len(prompt) - 1, reply[0]], abs=1e-4)


def test_a_story_scores_better_than_the_same_tokens_shuffled(real_data):
    with open_engine(real_data / "stories260K.gguf") as engine:
        prompt = engine.prompt_tokens("Once upon a time", raw=True)
        story = engine.generate("Once upon a time", raw=True, sampling=GREEDY, max_tokens=40).tokens
        shuffled = list(np.random.default_rng(0).permutation(story))
        good, bad = engine.score([(prompt, story), (prompt, shuffled)])
    assert -1.5 < good < 0 and bad < good - 2


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_a_score_of_nothing_is_refused(engine, pair):
    with pytest.raises(PromptError, match="at least one token"):
        engine.score([pair])


def test_no_sequences_give_empty_answers(engine):
    assert engine.score([]) == []
    assert engine.last_hidden_states([]).shape == (0, engine.model.n_layer, engine.model.n_embd)
    assert engine.generate_batch([]) == []


@pytest.mark.parametrize(
    "ids, said", [([], "empty"), ([-1], "0 to 511"), ([512], "0 to 511"), ([[1]], "empty")]
)
def test_token_ids_are_checked(engine, ids, said):
    with pytest.raises(PromptError, match=said):
        engine.logits(ids)


def test_more_tokens_than_the_context_are_refused_with_both_numbers(tiny_llama):
    with open_engine(tiny_llama.gguf_path, n_ctx=16) as engine:
        assert engine.logits([5] * 16).shape[0] == 16
        for call in (
            engine.logits,
            lambda ids: engine.hidden_states(ids, [0]),
            lambda i: engine.last_hidden_states([i]),
        ):
            with pytest.raises(PromptError, match=r"17 .* 16"):
                call([5] * 17)


@pytest.mark.parametrize("n_prompt", [-1, 4])
def test_a_prompt_longer_than_its_tokens_is_refused(engine, n_prompt):
    with pytest.raises(PromptError, match="n_prompt"):
        engine.logits([5, 6, 7], n_prompt=n_prompt)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_refused(engine, layer):
    with pytest.raises(PlanError, match="layers 0 to 3"):
        engine.hidden_states([5], [layer])


# --- vectors and plans -------------------------------------------------------------------------------------


def test_steer_takes_vectors_a_plan_or_nothing(engine, tokens):
    vector = random_vector(engine)
    expected = engine.logits(tokens, steer=[vector])
    assert not np.allclose(expected, engine.logits(tokens), atol=0.1)
    for steer in (vector, (vector,), Plan.from_vectors([vector])):
        assert (engine.logits(tokens, steer=steer) == expected).all()
    for steer in ((), [], None, Plan.none()):
        assert (engine.logits(tokens, steer=steer) == engine.logits(tokens)).all()
    with pytest.raises(PlanError, match="not str"):
        engine.plan(["json.gguf"])


def test_a_vector_of_another_width_or_depth_is_refused(engine):
    def sized(n_layer, n_embd):
        rows = np.ones((n_layer, n_embd))
        return localsteer.ControlVector(rows, rows[:, 0], None, None, None, layers=(1,), name="other")

    for vector in (sized(4, 65), sized(5, 64)):
        with pytest.raises(MismatchError, match="other"):
            engine.generate("Hello", steer=[vector])
    with pytest.raises(MismatchError, match="65 wide"):
        engine.plan(Plan.from_vectors([sized(4, 65)]))


def test_a_vector_whose_probes_give_other_tokens_is_refused(engine):
    text = engine.render([{"role": "user", "content": "Tell me about foxes."}])
    ids = engine.rendered_tokens(text)
    right = with_provenance(random_vector(engine), probes=[[text, ids]])
    assert engine.plan([right]) is not None
    wrong = with_provenance(random_vector(engine), probes=[[text, ids], [text, [*ids[:-1], 7]]])
    with pytest.raises(MismatchError, match="another tokenizer") as caught:
        engine.plan([wrong])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("probes", [3, ["text"], [["text", ["x"]]], [["text", 3]], [["text"]]])
def test_probes_that_cannot_be_read_are_refused(engine, probes):
    with pytest.raises(VectorFileError, match="probes"):
        engine.plan([with_provenance(random_vector(engine), probes=probes)])


def test_another_chat_template_is_told_once_and_allowed(tiny_llama, caplog):
    with open_engine(tiny_llama.gguf_path) as engine, caplog.at_level(logging.WARNING):
        same = with_provenance(random_vector(engine), template_hash=engine.template.template_hash)
        engine.plan([same])
        assert not caplog.records
        other = with_provenance(random_vector(engine), template_hash="0" * 64)
        engine.plan([other])
        engine.plan([other.at(strength=0.5)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a different chat template" in caplog.text


# --- opening and closing -----------------------------------------------------------------------------------


def test_a_closed_engine_says_so_and_closes_twice(tiny_llama):
    engine = open_engine(tiny_llama.gguf_path)
    with engine:
        stream = engine.stream("Hello", sampling=GREEDY)
        next(stream)
    engine.close()
    for call in (
        lambda: engine.generate("Hello"),
        lambda: next(stream),
        lambda: engine.logits([5]),
        lambda: engine.plan([]),
        lambda: engine.generate_batch(["Hello"]),
    ):
        with pytest.raises(LocalsteerError, match="closed"):
            call()


def test_a_context_beyond_what_the_model_was_trained_for_is_refused(tiny_llama):
    with pytest.raises(LocalsteerError, match=r"n_ctx 513 .* 512"):
        open_engine(tiny_llama.gguf_path, n_ctx=513)


def test_a_model_that_mixes_sequences_is_decoded_one_at_a_time(tiny_llama, monkeypatch, caplog):
    # hybrid and recurrent models: none is small enough to write here
    monkeypatch.setattr(
        "localsteer.runtime.bridge.Model.why_not_steerable", lambda _, n: "rows are mixed" if n > 1 else None
    )
    with caplog.at_level(logging.WARNING), open_engine(tiny_llama.gguf_path, n_seq_max=8) as engine:
        assert engine.n_seq_max == engine.context.n_seq_max == 1
        replies = engine.generate_batch(["Hello", "Who?"], steer=random_vector(engine), max_tokens=3)
    assert [len(reply.tokens) for reply in replies] == [3, 3]
    assert "one sequence at a time: rows are mixed" in caplog.text


@pytest.mark.parametrize("option", ["n_ctx", "n_seq_max", "n_batch", "n_cells"])
def test_sizes_below_one_are_refused(tiny_llama, option):
    with pytest.raises(LocalsteerError, match=f"{option} must be at least 1"):
        open_engine(tiny_llama.gguf_path, **{option: 0})


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        localsteer.Engine(tmp_path / "none.gguf")


# --- small parts -------------------------------------------------------------------------------------------


def test_position_classes_have_one_last_prompt_token():
    assert position_classes(np.arange(5), 3).tolist() == [0, 0, 1, 2, 2]
    assert position_classes(np.arange(3), 3).tolist() == [0, 0, 1]
    assert position_classes(np.arange(2), 0).tolist() == [2, 2]
    assert position_classes(np.arange(3, 5), 4).tolist() == [1, 2]


def test_packing_keeps_sequences_together_and_in_order():
    assert list(pack([3, 4, 5], size=8, n_seq_max=4)) == [[Piece(0, 0, 3), Piece(1, 0, 4)], [Piece(2, 0, 5)]]
    assert list(pack([1] * 5, size=8, n_seq_max=2)) == [
        [Piece(0, 0, 1), Piece(1, 0, 1)],
        [Piece(2, 0, 1), Piece(3, 0, 1)],
        [Piece(4, 0, 1)],
    ]
    assert list(pack([2, 9, 1], size=4, n_seq_max=4)) == [
        [Piece(0, 0, 2)],
        [Piece(1, 0, 4)],
        [Piece(1, 4, 8)],
        [Piece(1, 8, 9)],
        [Piece(2, 0, 1)],
    ]
    assert list(pack([], size=4, n_seq_max=4)) == []


def test_importing_localsteer_loads_nothing_heavy():
    code = (
        "import sys, localsteer; dir(localsteer);"
        "print(sorted({'numpy', 'llama_cpp', 'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    for name in localsteer.__all__:
        if name != "extract":  # a package of its own, with tests of its own
            assert getattr(localsteer, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = localsteer.nonsense


def test_a_model_without_a_tokenizer_takes_token_ids_and_refuses_text(tmp_path, monkeypatch):
    """llama.cpp ends the process when it is asked for the text of a token that has none."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import decode_overhead

    for name, value in {"N_LAYER": 2, "N_EMBD": 64, "N_FF": 128, "N_HEAD": 2, "N_VOCAB": 96}.items():
        monkeypatch.setattr(decode_overhead, name, value)
    decode_overhead.write_random_model(tmp_path / "ids.gguf")
    with open_engine(tmp_path / "ids.gguf") as engine:
        assert engine.logits([1, 2, 3]).shape == (3, 96)
        assert engine.piece(5) == b""
        with pytest.raises(PromptError, match="no tokenizer"):
            engine.generate("hi")
