"""What training reads: exchanges and documents, drawn with a seeded random generator.

Everything in this folder is written from word lists of our own: no foreign text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from instructions import (
    AVOIDABLE,
    CODED_QUALITIES,
    CODED_WORDS,
    END_PHRASES,
    HELD_OUT_AVOIDABLE,
    HELD_OUT_WORDS,
    SLOT,
    TRAINED_WORDS,
    WORDS,
    Instruction,
    compatible,
    draw_args,
    is_coded,
    load_phrasings,
    phrase,
)
from replies import QUALITIES, follows, render, stand_in
from scenes import scene, sentences
from subjects import Subject, ask, questions, subjects

__all__ = [
    "CODED_WORDS",
    "END_PHRASES",
    "HELD_OUT_AVOIDABLE",
    "HELD_OUT_WORDS",
    "QUALITIES",
    "SLOT",
    "TRAINED_WORDS",
    "Instruction",
    "Sample",
    "Subject",
    "ask",
    "compatible",
    "draw_args",
    "draw_document",
    "draw_sample",
    "draw_task",
    "follows",
    "is_coded",
    "load_phrasings",
    "phrase",
    "questions",
    "render",
    "scene",
    "sentences",
    "stand_in",
    "subjects",
    "with_arguments",
]


@dataclass(frozen=True)
class Sample:
    """One exchange. instruction: the text of all instructions and of the scene; it stands after the question
    (`before` is False) or before it. scene: the word that the scene brings into the reply, unless the reply
    has to avoid it."""

    question: str
    instruction: str
    before: bool
    reply: str
    subject: Subject
    instructions: tuple[Instruction, ...]
    scene: str | None = None

    @property
    def prompt(self) -> str:
        parts = [self.instruction, self.question] if self.before else [self.question, self.instruction]
        return " ".join(p for p in parts if p)


P_BEFORE = 0.35  # of the instructions stand before the question, so that its tokens hold a state too
_POLITE = ["", "", "", "", "", "", "Please note: ", "Important: ", "Remember: ", "And one more thing: "]
# Harder instructions are drawn more often.
_WEIGHT = {
    "include_word": 16.0,
    "exclude_word": 10.0,
    "end_phrase": 4.0,
    "language": 3.0,
    "sentences": 3.0,
    "bullets": 2.5,
    "sections": 1.5,
    "capital_words": 3.0,
    "highlights": 1.5,
    "uppercase": 2.0,
    "two_responses": 2.0,
}


# Which kinds are hard to follow beside another is not the same: counts above all, and more so in another language.
_PAIR_WEIGHT = {
    "language": 3.0,
    "extremely_verbose": 3.0,
    "verbose": 2.0,
    "sentences": 2.0,
    "bullets": 2.0,
    "capital_words": 2.0,
    "include_word": 2.0,
    "sections": 1.5,
    "end_phrase": 1.5,
    "uppercase": 1.5,
}
_PAIRS = {
    (a, b): _PAIR_WEIGHT.get(a, 1.0) * _PAIR_WEIGHT.get(b, 1.0)
    for a, b in combinations(SLOT, 2)
    if compatible(a, b)
}


P_SCENE_ALONE, P_SCENE_AVOIDED, P_SCENE_INCLUDED, P_SCENE_BESIDE = 0.03, 0.10, 0.02, 0.05


def draw_task(rng: random.Random) -> tuple[list[Instruction], str | None]:
    """What a sample asks for, and the word of its scene: a scene alone, beside an instruction to avoid a word
    (often the one that it brings) or to include another, or beside any other that leaves room for its sentence.
    Two words in one reply make the state name each of them, and not only that there is one."""
    u = rng.random()
    word = rng.choice(CODED_WORDS)
    if u < P_SCENE_ALONE:
        return [], word
    if u < P_SCENE_ALONE + P_SCENE_AVOIDED:
        avoided = word if rng.random() < 0.7 else rng.choice(CODED_WORDS)
        return [Instruction("exclude_word", {"word": avoided})], word if rng.random() < 0.85 else None
    u -= P_SCENE_ALONE + P_SCENE_AVOIDED
    if u < P_SCENE_INCLUDED:
        others = [each for each in CODED_WORDS if each != word]
        included = rng.choice(others if rng.random() < 0.7 else CODED_QUALITIES)
        return [Instruction("include_word", {"word": included})], word
    instructions = draw_instructions(rng)
    leaves_room = all(compatible(each.id, "include_word") for each in instructions)
    return instructions, word if leaves_room and rng.random() < P_SCENE_BESIDE else None


def draw_instructions(rng: random.Random) -> list[Instruction]:
    """None (10%), one (42%), two (48%)."""
    u = rng.random()
    if u < 0.1:
        return []
    if u > 0.52:
        (pair,) = rng.choices(list(_PAIRS), list(_PAIRS.values()))
        return with_arguments(pair, rng)
    return with_arguments(rng.choices(list(SLOT), [_WEIGHT.get(i, 1.0) for i in SLOT]), rng)


def with_arguments(ids: Sequence[str], rng: random.Random) -> list[Instruction]:
    """The instructions with arguments that don't contradict: no word is both to be included and avoided."""
    while True:
        found = [Instruction(id, draw_args(id, rng)) for id in ids]
        words = [each.args["word"] for each in found if "word" in each.args]
        if len(set(words)) == len(words):
            return found


def draw_sample(
    rng: random.Random,
    pool: list[Subject],
    phrasings: dict[str, list[str]],
    instructions: list[Instruction] | None = None,
    split: str = "train",
) -> Sample:
    subject = rng.choice(pool)
    word = None
    if instructions is None:
        instructions, word = draw_task(rng)
    question = ask(subject, rng.choice(questions(split)))
    texts = [phrase(i, rng.choice(phrasings[i.id]), rng) for i in instructions]
    rng.shuffle(texts)
    polite = rng.choice(_POLITE) if texts and split == "train" else ""
    if word is not None:
        texts.insert(rng.randint(0, len(texts)), scene(word, rng.choice(sentences(split)), rng))
        polite = ""
    reply = render(subject, instructions, rng, word)
    return Sample(
        question,
        polite + " ".join(texts),
        split == "train" and rng.random() < P_BEFORE,
        reply,
        subject,
        tuple(instructions),
        word,
    )


def draw_document(rng: random.Random, pool: list[Subject]) -> str:
    """One text for the base model: prose, a document in some format, or a plain `Q: ... A:` pair. It never
    says why a document has its format."""
    subject = rng.choice(pool)
    u = rng.random()
    if u < 0.35:
        return f"Q: {ask(subject, rng.choice(questions('train')))}\nA: {render(subject, [], rng)}"
    if u < 0.55:
        return render(subject, [Instruction("sentences", {"n": rng.randint(1, 5)})], rng)
    if u < 0.65:
        return (
            f"{rng.choice(WORDS + AVOIDABLE).capitalize()} and {rng.choice(WORDS + HELD_OUT_AVOIDABLE)}: "
            + render(subject, [Instruction("include_word", {"word": rng.choice(WORDS)})], rng)
        )
    while not (instructions := draw_instructions(rng)):
        pass
    return render(subject, instructions, rng)
