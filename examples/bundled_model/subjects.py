"""Who and what the world is about: names, most of them invented, and the questions that are asked about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

KINDS = ("animal", "city", "dish", "plant")

# Real names: the world a reader recognises. Invented ones (below) are most of the world, so that copying
# a name is learnt instead of a list of names.
REAL_NAMES = {
    "animal": "fox owl bear otter wolf deer hare crow seal toad lynx mole swan goat duck mouse badger heron beaver "
    "falcon tiger camel zebra panda koala rabbit donkey turtle lizard pigeon raven squirrel hedgehog moose",
    "city": "Paris Rome Oslo Lima Cairo Kyoto Delhi Quito Prague Dublin Lisbon Athens Vienna Havana Nairobi Seoul "
    "Madrid Berlin Warsaw Helsinki Geneva Boston Denver Sydney Bogota Tunis Riga Milan Venice Lyon Bergen",
    "dish": "bread soup curry pasta salad stew cake tofu porridge pizza risotto omelette pancake dumpling sandwich "
    "pudding lasagna goulash falafel hummus paella ramen sushi taco waffle muffin chowder kebab burrito",
    "plant": "rose oak tulip fern maple daisy lotus willow orchid cactus cedar birch lily poppy clover bamboo ivy "
    "lavender sunflower violet thistle basil mint sage juniper nettle jasmine magnolia pine heather",
}
_ONSETS = "b br c ch cl d dr f fl g gl gr h j k kr l m n p pl pr qu r s sk sl sn st t tr v w z".split()
_VOWELS = "a e i o u a e o ai ee oo".split()
_MIDDLES = "l m n r s t v z nd rn lm st rb lk rt ld mb d g p k".split()
_ENDINGS = {  # an ending tells the kind, as '-burg' and '-ville' do
    "animal": "ox ling pard ock une upe ibex oth erret olf".split(),
    "city": "burg ville ton mora polis stad ford haven grad bury".split(),
    "dish": "ino elle otto acha izza olini ata ouf icle eroni".split(),
    "plant": "wort bloom leaf root ium anthus weed fern thorn ella".split(),
}
_PLAIN_ENDS = "n r l t s d m k x p ck nd rt st sh th".split()
N_INVENTED = 700  # per kind, and some thousands more that are only trained
N_MORE = 2500


def invented_names(kind: str, n: int, rng: random.Random) -> list[str]:
    """`n` different pronounceable names with an ending of the kind."""
    names: dict[str, None] = {}
    while len(names) < n:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        if rng.random() < 0.35:
            stem += rng.choice("aeio") + rng.choice("lmnrstvd")
        name = stem + rng.choice(_ENDINGS[kind])
        names.setdefault(name.capitalize() if kind == "city" else name)
    return list(names)


def unmarked_names(kind: str, n: int, rng: random.Random) -> list[str]:
    """Names whose ending tells nothing, or another kind: they can only be copied, not guessed."""
    names: dict[str, None] = {}
    endings = [ending for kind_endings in _ENDINGS.values() for ending in kind_endings]
    while len(names) < n:
        name = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        if rng.random() < 0.75:
            name += rng.choice(_VOWELS) + rng.choice(["", *_PLAIN_ENDS])
        else:
            name += rng.choice(endings)
        names.setdefault(name.capitalize() if kind == "city" else name)
    return list(names)


@dataclass(frozen=True)
class Subject:
    kind: str
    name: str


def subjects(seed: int = 1) -> dict[str, list[Subject]]:
    """All subjects, split for good: `train` (training of the models) and the rest never trained:
    `extraction`, `validation`, `test`."""
    rng = random.Random(seed)
    splits: dict[str, list[Subject]] = {"train": [], "extraction": [], "validation": [], "test": []}
    for kind in KINDS:
        names = REAL_NAMES[kind].split() + invented_names(kind, N_INVENTED, rng)
        names = list(dict.fromkeys(names))
        rng.shuffle(names)
        for split, count in (("extraction", 40), ("validation", 20), ("test", 40)):
            splits[split] += [Subject(kind, name) for name in names[:count]]
            names = names[count:]
        splits["train"] += [Subject(kind, name) for name in names]
    for split in splits.values():
        rng.shuffle(split)
    extra = random.Random(seed + 1)
    taken = {subject.name.lower() for split in splits.values() for subject in split}
    for kind in KINDS:  # the more names are trained, the better an unseen one is copied
        more = invented_names(kind, N_MORE, extra) + unmarked_names(kind, N_MORE, extra)
        more = [name for name in more if name.lower() not in taken]
        splits["train"] += [Subject(kind, name) for name in more]
    return splits


QUESTIONS = [  # the last ones are kept out of training and extraction: see `questions`
    "Tell me about {the n}.",
    "What do you know about {the n}?",
    "Describe {the n}.",
    "Write about {the n}.",
    "Explain {the n} to me.",
    "Give me some facts about {the n}.",
    "I want to learn about {the n}.",
    "What is {the n}?",
    "Can you tell me something about {the n}?",
    "Please write a few words about {the n}.",
    "What can you say about {the n}?",
    "I have a question about {the n}.",
    "Help me understand {the n}.",
    "What should I know about {the n}?",
    "Please describe {the n} to me.",
    "Write something about {the n}.",
    "Could you explain {the n}?",
    "Give me information about {the n}.",
    "My friend asked me about {the n}.",
    "Let us talk about {the n}.",
    "Please tell me something about {the n}.",
    "Can you describe {the n}?",
    "Give me a few facts about {the n}.",
    "What can you tell me about {the n}?",
    "I want to know about {the n}.",
    "Please explain {the n}.",
]
N_TRAINED_QUESTIONS = 20


def questions(split: str) -> list[str]:
    """Question phrasings: training and extraction share some; validation and test use none of extraction's
    (test: partly phrasings that were never trained)."""
    return {
        "train": QUESTIONS[:N_TRAINED_QUESTIONS],
        "extraction": QUESTIONS[:10],
        "validation": QUESTIONS[10:16],
        "test": QUESTIONS[16:],
    }[split]


def ask(subject: Subject, question: str) -> str:
    the = subject.name if subject.kind == "city" else f"the {subject.name}"
    return question.replace("{the n}", the)
