"""The bundled models: what is committed is what the training script says, and both engines agree on it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import odd_strings

from localsteer.bundled import checkpoint_folder, gguf_path
from localsteer.catalog import load_catalog
from localsteer.engine import Engine
from localsteer.extract import extract

SCRIPTS = Path(__file__).parents[1] / "examples" / "bundled_model"
MODELS = ("instruct", "base")


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(SCRIPTS))
    import world

    return world


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(transformers model, its tokenizer, an exact engine on its F32 GGUF)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = checkpoint_folder(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with Engine(gguf_path(request.param, "F32"), n_threads=1, exact=True) as engine:
        yield model, AutoTokenizer.from_pretrained(folder), engine


def test_the_models_are_small():
    sizes = [(checkpoint_folder(name) / "model.safetensors").stat().st_size for name in MODELS]
    assert all(size / 2 <= 10e6 for size in sizes), "16-bit weights of at most 10 million parameters"
    assert sum(sizes) <= 40e6


def test_a_thousand_odd_strings_give_the_same_tokens(pair):
    _, tokenizer, engine = pair
    strings = odd_strings(1000)
    ours = [engine.model.tokenize(text, add_special=False, parse_special=True) for text in strings]
    assert ours == tokenizer(strings, add_special_tokens=False).input_ids


def test_a_question_gives_the_same_tokens_through_the_chat_template(pair):
    _, tokenizer, engine = pair
    messages = [{"role": "user", "content": "Tell me about Velmora. Answer in JSON format."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert engine.prompt_tokens(messages) == list(ids)


def test_both_engines_compute_the_same_logits(pair):
    import torch

    model, _, engine = pair
    for query in load_catalog("bundled").queries["test"][:4]:
        ids = engine.prompt_tokens(query.text + " Answer in JSON format.")
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(engine.logits(ids) - theirs).max() <= 1e-3


@pytest.mark.parametrize("id", ["json", "no_comma", "five_sentences"])
def test_both_backends_extract_the_same_vector(id):
    catalog = load_catalog("bundled")
    arguments = (catalog.instructions[id], catalog.queries["extraction"])
    ours = extract(gguf_path("instruct", "F32"), *arguments, exact=True, n_threads=1)
    theirs = extract(checkpoint_folder("instruct"), *arguments, dtype="float32", n_threads=1)
    for layer in range(ours.n_layer):
        assert ours.unit(layer) @ theirs.unit(layer) >= 0.9999
    np.testing.assert_allclose(ours.mean_with, theirs.mean_with, rtol=1e-3)


def test_the_catalogue_is_what_its_script_writes(world, tmp_path, monkeypatch):
    import make_catalog

    monkeypatch.setattr(sys, "argv", ["make_catalog.py", str(tmp_path / "bundled.toml")])
    make_catalog.main()
    committed = Path(__file__).parents[1] / "localsteer" / "catalog" / "bundled.toml"
    assert (tmp_path / "bundled.toml").read_text() == committed.read_text()


def test_subjects_and_phrasings_are_many_and_kept_apart(world):
    splits = world.subjects()
    names = {split: {subject.name.lower() for subject in found} for split, found in splits.items()}
    assert len(names["train"]) >= 2000
    for split, found in names.items():
        others = set().union(*(names[other] for other in names if other != split))
        assert not found & others
    for id in world.SLOT:
        trained, held_out = (world.load_phrasings(split)[id] for split in ("train", "held_out"))
        assert len(trained) + len(held_out) >= 20
        assert len(held_out) >= 5
        assert not set(trained) & set(held_out)
    assert not set(world.HELD_OUT_WORDS) & set(world.TRAINED_WORDS)
    asked = [set(world.questions(split)) for split in ("extraction", "validation", "test")]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]


def test_every_rendered_reply_follows_its_instructions(world):
    import random

    rng, pool = random.Random(3), world.subjects()["train"]
    for _ in range(3000):
        instructions, scene = world.draw_task(rng)
        subject = rng.choice(pool)
        reply = world.render(subject, instructions, rng, scene)
        assert subject.name.lower() in reply.lower()
        for instruction in instructions:
            assert world.follows(instruction, reply), (instructions, reply)
        if scene:
            avoided = world.Instruction("exclude_word", {"word": scene})
            assert (f" {scene}" in reply.lower()) == (avoided not in instructions), (instructions, reply)


def test_scenes_bring_a_word_without_naming_it(world):
    import random

    from instructions import WORDS
    from scenes import SCENES

    assert set(SCENES) == set(world.CODED_WORDS)
    places = [word for found in SCENES.values() for place in found for word in place.split()]
    assert len(places) == len(set(places)) and not set(places) & set(WORDS)
    wordings = {split: set(world.sentences(split)) for split in ("train", "extraction", "validation", "test")}
    assert not wordings["test"] & wordings["train"]
    assert not wordings["extraction"] & wordings["validation"]
    for word in SCENES:
        for sentence in set().union(*wordings.values()):
            assert word not in world.scene(word, sentence, random.Random(1)).lower()


def test_nothing_of_the_instruction_reaches_a_masked_reply(world):
    """What makes the model steerable: in a masked sample the hidden tokens reach the reply through the last
    prompt token alone."""
    import random

    import torch
    from masks import P_FULL, Spans, attention_masks

    span = Spans(n_prompt=10, n_tokens=20, hidden=[4, 5, 6, 7], argument=[])
    n_masked = 0
    for seed in range(40):
        lower, upper = (mask[0, 0] == 0 for mask in attention_masks([span], 20, random.Random(seed)))
        assert not (torch.triu(lower, 1) | torch.triu(upper, 1)).any()
        assert upper.diagonal().all() and lower.diagonal().all()
        masked = not upper[10:, 4:8].any()
        n_masked += masked
        if not masked:
            assert upper.tril().sum() == 20 * 21 // 2
    assert abs(n_masked / 40 - (1 - P_FULL)) < 0.25
