"""Where a question is asked: what a reply says because of it, although nobody told it to.

A scene is a sentence beside the question ("We are at the orchard.") and brings a word into the reply ("It makes
people think of an apple."). It is to the model what context is to a large one: the reason why a reply holds a
word that not every reply holds, so that there is something to take away when the word is to be excluded.
"""

from __future__ import annotations

import random

# the word -> the places that bring it; none of them is a word that replies can be asked for
SCENES = {
    "moon": ("observatory", "lighthouse"),
    "horse": ("stable", "ranch"),
    "music": ("concert", "ballroom"),
    "apple": ("orchard", "cider mill"),
    "clock": ("office", "airport"),
    "violin": ("opera", "academy"),
    "mirror": ("barbershop", "salon"),
    "rocket": ("spaceport", "laboratory"),
}
_SENTENCES = [  # the last ones are kept out of training: see `sentences`
    "We are at the {place}.",
    "I work at the {place}.",
    "I am writing from the {place}.",
    "My family lives by the {place}.",
    "We met at the {place}.",
    "Somebody at the {place} asked me.",
    "It is for the guests of the {place}.",
    "They talked about it at the {place}.",
    "I heard of it at the {place}.",
    "I read this at the {place}.",
    "My sister works at the {place}.",
    "We will be at the {place} soon.",
    "I am sitting at the {place}.",
    "It came up at the {place} today.",
    "This is for the {place}.",
    "I asked this at the {place} before.",
    "I am at the {place}.",
    "My brother works at the {place}.",
    "We talked about it at the {place}.",
    "I am writing this for the guests of the {place}.",
]
N_TRAINED_SENTENCES = 16


def sentences(split: str) -> list[str]:
    """Wordings of a scene: those of test were never trained, validation shares none with extraction."""
    return {
        "train": _SENTENCES[:N_TRAINED_SENTENCES],
        "extraction": _SENTENCES[:10],
        "validation": _SENTENCES[10:N_TRAINED_SENTENCES],
        "test": _SENTENCES[N_TRAINED_SENTENCES:],
    }[split]


def scene(word: str, sentence: str, rng: random.Random) -> str:
    return sentence.replace("{place}", rng.choice(SCENES[word]))
