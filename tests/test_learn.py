"""Learned vectors: examples, steps and their check, on the bundled model in F32."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="learning needs PyTorch")
pytest.importorskip("accelerate", reason="transformers reads a GGUF with it")

import torch
from cli_runs import invoke
from click.testing import CliRunner

from localsteer.catalog import Instruction, load_catalog
from localsteer.cli import learn as learn_command
from localsteer.cli.main import localsteer as program
from localsteer.errors import LocalsteerError
from localsteer.learn import Kept, PlainReplies, Recipe, learn
from localsteer.learn import examples as gathering
from localsteer.learn import training as training_module
from localsteer.learn import weights as loading
from localsteer.learn.examples import Example, of_pairs, rewritten, shared
from localsteer.learn.gate import Gate
from localsteer.learn.learning import layers_to_try
from localsteer.learn.training import Training, prepare
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.vector import ControlVector

CATALOG = load_catalog("bundled")
TITLE = CATALOG.get("title")
QUERIES = CATALOG.queries_for(TITLE, "extraction")
VALIDATION = CATALOG.queries_for(TITLE, "validation")
ALL_FOLLOW = gathering.all_follow
FEW = Recipe(layers=(3,), n_steps=20, rate=0.02, seed=1)


@pytest.fixture(scope="module", autouse=True)
def exact_weights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "fast_dtype", lambda: torch.float32)
        # title is learned in fewer steps than a test of the second round needs
        patch.setattr(gathering, "all_follow", lambda *_rest, **_options: False)
        yield


@pytest.fixture(scope="module")
def lesson(exact_bundled, exact_weights):
    return learn(exact_bundled, TITLE, QUERIES[:24], VALIDATION, FEW)


@pytest.fixture(scope="module")
def weights(exact_bundled, exact_weights):
    return loading.Weights.load(exact_bundled, n_tokens=256)


def an_example(engine, text: str = "Tell me about foxes.", reply: str = "Foxes hunt at night.") -> Example:
    tokens = tuple(engine.model.tokenize(reply, add_special=False, parse_special=False))
    return Example(tuple(engine.prompt_tokens(text)), tokens, np.zeros(len(tokens), bool), "given")


# Examples ----------------------------------------------------------------------------------------------


def test_what_is_said_to_several_questions_is_no_example(exact_bundled):
    """Learned from, an excuse would become the likeliest reply to everything."""
    silent = replace(TITLE, phrasings=())  # so that it is not told
    texts = [query.text for query in QUERIES[:6]]
    replies = exact_bundled.generate_batch(texts, max_tokens=24, sampling=GREEDY)
    sorry = replace(replies[0], text="I'm sorry, but I can't assist with that.")

    def examples(plain):
        return gathering.of_instruction(exact_bundled, silent, QUERIES[:6], plain=lambda *_: plain)

    assert len(examples(replies)) == 6
    kept = examples([sorry, *replies[1:5], sorry])
    assert [example.prompt for example in kept] == [tuple(exact_bundled.prompt_tokens(t)) for t in texts[1:5]]


# What is learned ----------------------------------------------------------------------------------------


def test_the_vector_makes_the_quantized_model_follow(lesson):
    scores = lesson.record["scores"]
    assert lesson.helps and scores["none"] == 0 and scores["steered"] >= 0.75
    assert lesson.vector.mode == "gate" and lesson.vector.layers == (3,)
    assert lesson.record["examples"]["n"] == 24 and lesson.record["search"] == "learned"


def test_the_loss_falls_on_examples_and_on_those_held_out(lesson):
    first, last = lesson.curve[0], lesson.curve[-1]
    assert last.loss < first.loss and last.held_out < first.held_out


def test_a_vector_survives_its_file(lesson, tmp_path):
    lesson.vector.save(tmp_path / "title.gguf")
    again = ControlVector.load(tmp_path / "title.gguf")
    for name in ("directions", "readers", "biases"):
        assert np.array_equal(getattr(again, name), getattr(lesson.vector, name)), name
    assert again.strength == lesson.vector.strength
    assert again.provenance["validation"] == lesson.record


@pytest.mark.parametrize(("round_", "at"), [("the examples", 10), ("its own replies", 10)])
def test_a_run_that_was_killed_goes_on_to_the_same_vector(lesson, exact_bundled, tmp_path, round_, at):
    class Killed(BaseException):
        pass

    def die(what: str, done: int, _total: int) -> None:
        if what.startswith("learning at") and f"from {round_}" in what and done == at:
            raise Killed

    steps = []
    kept = Kept(tmp_path / "kept", "title")
    with pytest.raises(Killed):
        learn(exact_bundled, TITLE, QUERIES[:24], VALIDATION, FEW, kept=kept, report=die)

    def count(what: str, done: int, _total: int) -> None:
        if what.startswith("learning at"):
            steps.append((what.partition("from ")[2].partition(",")[0], done))

    again = learn(exact_bundled, TITLE, QUERIES[:24], VALIDATION, FEW, kept=kept, report=count)
    # steps before the last state that was kept are not taken again; the same seed gives the same vector
    assert steps[0] == (round_, at) and not (tmp_path / "kept").exists()
    np.testing.assert_allclose(again.vector.directions, lesson.vector.directions, rtol=1e-4, atol=1e-6)


def test_the_second_round_learns_from_the_models_own_replies(lesson):
    assert FEW.n_steps < lesson.record["steps"] <= FEW.n_steps * 3 // 2
    assert lesson.curve[-1].step == lesson.record["steps"]


def test_a_constant_is_an_ordinary_control_vector(exact_bundled):
    recipe = replace(FEW, n_steps=10, constant=True)
    vector = learn(exact_bundled, TITLE, QUERIES[:12], VALIDATION[:4], recipe).vector
    assert vector.mode == "add" and vector.usable_layers == (3,) and vector.readers is None


# The steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(3,), (1, 3, 5)])
def test_torch_and_llama_cpp_apply_the_same_gates(exact_bundled, weights, layers):
    """The layers above the edit alone, on states that were computed once, give the engine's logits."""
    engine, example = exact_bundled, an_example(exact_bundled)
    (one,) = prepare(weights, [example], layers)
    training = Training(weights, layers, [one], [one], Recipe(positions="all", rate=0.1, n_steps=3))
    training.run(3)
    training.look()
    gates = {
        layer: (gate.reader, gate.bias, gate.writer, gate.mean) for layer, gate in training.learned().items()
    }
    vector = ControlVector.from_gates(gates, n_layer=weights.n_layer)
    with torch.inference_mode():
        ours = weights.logits(training._last([one], training.best_gates())[0])
    theirs = engine.logits(list(example.tokens), steer=[vector], n_prompt=len(example.prompt))
    assert np.abs(ours.numpy() - theirs).max() < 1e-3  # float32 in two orders; 6e-6 was seen
    plain = engine.logits(list(example.tokens))
    assert np.abs(plain - theirs).max() > 0.1  # it does something


@pytest.mark.parametrize("positions", ["prompt", "last", "generation"])
def test_only_the_tokens_of_the_positions_are_changed(exact_bundled, weights, positions):
    (one,) = prepare(weights, [an_example(exact_bundled)], [3])
    training = Training(weights, [3], [one], [one], Recipe(positions=positions, rate=0.1, n_steps=9))
    *_, where = training._padded([one])
    n_prompt, n = len(one.example.prompt), len(one.example.tokens)
    expected = {"prompt": range(n_prompt), "last": range(n_prompt - 1, n), "generation": range(n_prompt, n)}
    assert where[0].nonzero()[:, 0].tolist() == list(expected[positions])


def test_a_gate_starts_by_changing_nothing():
    gate = Gate(8, 1.0, constant=False, seed=0)
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(gate(hidden, torch.ones(2, 3, dtype=torch.bool)), hidden)


def test_a_rate_that_is_far_too_high_is_halved_and_the_best_is_kept(exact_bundled, weights):
    """The model's own greedy reply, which any change makes less likely."""
    text = VALIDATION[0].text
    reply = exact_bundled.generate(text, max_tokens=20, sampling=GREEDY).text
    (one,) = prepare(weights, [an_example(exact_bundled, text, reply)], [3])
    training = Training(weights, [3], [one], [one], Recipe(positions="all", rate=1e3, n_steps=30))
    first = training.look()
    for _ in range(6):
        training.run(5)
        training.look()
    assert training._rate < 1e3 and training.best <= first


def test_small_batches_of_like_length_give_the_gradient_of_the_whole(exact_bundled, weights, monkeypatch):
    replies = ["Foxes hunt.", "Foxes hunt at night, and sleep by day.", "Foxes hunt at night.", "Yes."]
    prepared = prepare(weights, [an_example(exact_bundled, reply=reply) for reply in replies], [3])
    gradients, widths = [], []
    for size in (4, training_module.MICRO_BATCH):
        monkeypatch.setattr(training_module, "MICRO_BATCH", size)
        training = Training(weights, [3], prepared, prepared, Recipe())
        training._backward(prepared)
        gradients.append(training.gates[3].writer.grad)
        widths.append(
            [len(one.example.tokens) for batch in training_module._alike(prepared) for one in batch]
        )
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert widths[1] == sorted(widths[1]) == sorted(len(one.example.tokens) for one in prepared)


# Examples -----------------------------------------------------------------------------------------------


def test_plain_replies_are_asked_for_once_and_again_where_the_file_is_damaged(exact_bundled, tmp_path):
    prompts = [query.text for query in QUERIES[:2]]
    first = PlainReplies(tmp_path).of(exact_bundled, prompts, 8)
    (path,) = tmp_path.glob("plain-*.json")
    written = path.stat().st_mtime_ns
    again = PlainReplies(tmp_path).of(exact_bundled, prompts, 8)
    assert again == [replace(reply, timings=again[0].timings) for reply in first]
    assert path.stat().st_mtime_ns == written
    path.write_text("[]")
    assert [reply.text for reply in PlainReplies(tmp_path).of(exact_bundled, prompts, 8)] == [
        reply.text for reply in first
    ]
    PlainReplies(tmp_path).of(exact_bundled, prompts, 9)
    assert len(list(tmp_path.glob("plain-*.json"))) == 2


def test_steps_end_where_every_reply_follows(exact_bundled, monkeypatch, tmp_path):
    verdicts = []

    def all_follow(*rest, **options):
        verdicts.append(ALL_FOLLOW(*rest, **options))
        return verdicts[-1]

    monkeypatch.setattr(gathering, "all_follow", all_follow)
    kept = Kept(tmp_path / "title", "title")
    lesson = learn(exact_bundled, TITLE, QUERIES[:24], VALIDATION[:4], FEW, kept=kept)
    assert verdicts[-1] and lesson.record["steps"] == lesson.curve[-1].step == len(verdicts) * 10
    # what the model says by itself stays for the next instruction, and nothing of this one
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"plain"}


def test_whether_all_follow_is_asked_in_few_replies_first(exact_bundled, lesson):
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gathering, "replies_to", lambda _e, _i, some, **_o: asked.append(len(some)) or replies(some)
        )

        def replies(some):
            follows = len(asked) < 2
            return [Reply("<<Foxes>>\n\nThey hunt." if follows else "They hunt.", [1], "stop")] * len(some)

        assert not ALL_FOLLOW(exact_bundled, TITLE, QUERIES, lesson.vector)
        assert asked == [8, 8]
        assert not ALL_FOLLOW(exact_bundled, TITLE, QUERIES, lesson.vector)
        assert asked == [8, 8, 8]


def test_what_the_plain_reply_has_as_well_is_kept_but_for_the_first_of_each_run():
    kept = shared([9, 1, 2, 3, 4, 9, 9, 7, 8], [1, 2, 3, 4, 5, 7, 8])
    assert kept.tolist() == [False, False, True, True, True, False, False, False, False]


def test_a_reply_that_was_cut_stays_open_unless_its_form_has_an_end(exact_bundled):
    query = VALIDATION[0]
    text = "Foxes hunt at night. They live in woods. They eat"
    cut = Reply(text, [], "length")
    lower = rewritten(exact_bundled, CATALOG.get("lowercase"), query, cut, 0)
    braces = rewritten(exact_bundled, CATALOG.get("json"), query, cut, 0)
    eos = exact_bundled.model.eos
    assert lower.reply[-1] != eos and braces.reply[-1] == eos
    whole = rewritten(exact_bundled, CATALOG.get("lowercase"), query, Reply(text + " mice.", [], "stop"), 0)
    assert whole.reply[-1] == eos


def write_pairs(tmp_path, lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


PAIR = json.dumps({"prompt": "Tell me about foxes.", "reply": "Foxes hunt at night."})


def test_pairs_of_the_user_are_examples(exact_bundled, tmp_path):
    examples, queries = of_pairs(exact_bundled, write_pairs(tmp_path, [PAIR] * 4))
    assert len(examples) == 4 and queries[0].text == "Tell me about foxes."
    assert exact_bundled.text(examples[0].reply[:-1]) == "Foxes hunt at night."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([PAIR] * 3, "holds 3 examples: at least 4"),
        ([PAIR, "{"], "line 2: not JSON"),
        ([PAIR] * 3 + ['{"prompt": "Tell me."}'], "line 4: 'reply' must be a text"),
        ([PAIR] * 3 + ['{"prompt": " ", "reply": "x"}'], "line 4: 'prompt' must be a text"),
        ([PAIR] * 3 + ["[1]"], "line 4: 'prompt' must be a text"),
        (
            [PAIR] * 3 + [json.dumps({"prompt": "Tell me.", "reply": "fox " * 5000})],
            "line 4: prompt and reply",
        ),
    ],
)
def test_pairs_that_can_not_be_learned_from_are_named(exact_bundled, tmp_path, lines, message):
    with pytest.raises(LocalsteerError, match=message):
        of_pairs(exact_bundled, write_pairs(tmp_path, lines))


def test_layers_are_edited_together_or_race_and_the_last_is_not_among_them():
    assert layers_to_try(None, 30, together=True) == [(8, 14, 19, 24)]
    assert layers_to_try(None, 30, together=False) == [(19,), (24,)]
    assert layers_to_try(None, 2, together=True) == layers_to_try(None, 2, together=False) == [(0,)]
    assert layers_to_try((4, 2), 30, together=True) == [(2, 4)]
    assert layers_to_try((4, 2), 30, together=False) == [(2,), (4,)]
    with pytest.raises(LocalsteerError, match="a vector can't be learned at layer 29: choose 0 to 28"):
        layers_to_try((29,), 30, together=True)


def test_a_style_without_words_is_learned_from_a_few_pairs(exact_bundled, tmp_path):
    """Nothing judges it, so it is judged here: every reply of the pairs is in lowercase."""
    prompts = [query.text for query in QUERIES[:8]]
    plain = exact_bundled.generate_batch(prompts, max_tokens=60, sampling=GREEDY)
    lines = [
        json.dumps({"prompt": prompt, "reply": reply.text.lower()})
        for prompt, reply in zip(prompts, plain, strict=True)
    ]
    examples, queries = of_pairs(exact_bundled, write_pairs(tmp_path, lines))
    style = Instruction("quiet", (), literal=True)
    recipe = Recipe((2, 4), n_steps=30)
    lesson = learn(exact_bundled, style, queries, VALIDATION[:4], recipe, examples=examples)
    assert lesson.vector.layers == (2, 4)
    lesson.vector.save(tmp_path / "quiet.gguf")
    assert ControlVector.load(tmp_path / "quiet.gguf").provenance["validation"] == lesson.record
    replies = exact_bundled.generate_batch(
        [query.text for query in VALIDATION[:8]], steer=[lesson.vector], max_tokens=20, sampling=GREEDY
    )
    assert lesson.helps and sum(reply.text == reply.text.lower() for reply in replies) >= 6
    assert lesson.record["scores"]["instructed"] is None


# The command --------------------------------------------------------------------------------------------


def test_what_is_to_be_learned_must_be_said():
    result = CliRunner().invoke(program, ["learn", "-m", "bundled"])
    assert result.exit_code == 2 and "--instruction ID, or --examples FILE.jsonl" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "json", "--layer", "7"], "a vector can't be learned at layer 7: choose 0 to 6"),
        (["-i", "language_de"], "no rule can rewrite a plain reply"),
        (["--examples", "none.jsonl"], "none.jsonl can't be read"),
        (["-i", "json", "-o", "no/such/folder/json.gguf"], "no/such/folder"),
        (["-i", "json", "--checkpoint", "no-such-folder"], "transformers can't load no-such-folder"),
    ],
)
def test_what_can_not_be_learned_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = invoke("learn", "-m", "bundled", "--catalog", "general", *arguments)
    lines = [line for line in done.err.splitlines() if line.startswith("localsteer:")]
    assert done.status == 2 and message in lines[-1], done.err
    assert "Traceback" not in done.err and not list(tmp_path.glob("*.gguf"))


def test_without_pytorch_the_command_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(learn_command, "find_spec", lambda name: None if name == "torch" else object())
    result = CliRunner().invoke(program, ["learn", "-m", "bundled", "-i", "json"])
    assert isinstance(result.exception, LocalsteerError)
    assert "pip install 'localsteer[torch]'" in str(result.exception)
