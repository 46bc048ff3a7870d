"""The kinds of instruction: their arguments, which of them go together, and how a prompt says them."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from subjects import KINDS, unmarked_names

LANGUAGES = ("English", "Spanish", "German")
# Words that a reply can be asked to contain. The last tenth is never asked for in training.
WORDS = (
    "apple arrow basket bell bird blanket boat book bottle box brush button candle carpet chair circle clock cloud "
    "coat coin cup curtain dance desk door dream drum engine feather fence fire flag flute fork gate gift glass glove "
    "gold grass guitar hammer harbor hat heart hill horse island jacket jewel key kitchen kite ladder lamp leather "
    "letter library light magnet map marble mirror moon morning music nail needle nest notebook ocean oil orange "
    "paint palace paper pearl pencil piano picture pillow pipe planet pocket poem pot prince queen radio rain ribbon "
    "ring road robot rocket roof rope ruler sail sand school scissors shadow shell shoe silver sky smoke snow sock "
    "song spoon stamp star station stone storm story stove string sugar sun table tent thread thunder ticket tool "
    "towel tower toy train treasure tree trumpet tunnel umbrella vase violin wagon wall watch water wheel whistle "
    "wind window wing wood wool world yard "
    "anchor bucket camera compass crown diamond helmet lantern ladle machine magic mask medal sunrise telescope temple"
).split()
HELD_OUT_WORDS = WORDS[-16:]
TRAINED_WORDS = WORDS[:-16]
# Words that need not be copied: training asks for these few so often, and hides them so often (masks.py), that
# the state at the last prompt token learns to name each of them. Only these can be steered by a vector.
CODED_WORDS = "moon horse music apple clock violin mirror rocket".split()
CODED_QUALITIES = "noble elegant strong".split()
# Words of default replies that a reply can be asked to avoid; the second list never in training.
AVOIDABLE = (
    "animal creature city town dish meal plant herb strong gentle cheerful noble elegant free sweet big green young "
    "bright forest river mountain lake valley garden sea bread milk salt rice honey fruit winter summer "
    "spring many lots night dark"
).split()
HELD_OUT_AVOIDABLE = "warm useful simple famous village field fish cheese autumn".split()

# Invented words: to include one that was never met it must be copied, as names are.
COPIED_WORDS = [
    name.lower() for kind in KINDS for name in unmarked_names(kind, 500, random.Random(f"copied {kind}"))
]

END_PHRASES = [
    "Is there anything else I can help with?",
    "Any other questions?",
    "Have a wonderful day!",
    "That is all for today.",
    "Thank you for reading.",
    "Let me know what you think.",
    "I hope this helps you.",
    "See you next time!",
]
FIXED_ANSWERS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]


@dataclass(frozen=True)
class Instruction:
    """One instruction with its argument: what the prompt says and what the reply must be."""

    id: str
    args: dict = field(default_factory=dict)


# id -> the possible arguments in training. Two instructions of one slot never meet in one prompt.
SLOT = {
    "json": "structure",
    "bullets": "structure",
    "sections": "structure",
    "two_responses": "structure",
    "fixed_answer": "structure",
    "lowercase": "case",
    "uppercase": "case",
    "capital_words": "case",
    "highlights": "mark",
    "title": "title",
    "quotation": "wrap",
    "no_comma": "comma",
    "end_phrase": "end",
    "postscript": "end",
    "placeholders": "holder",
    "language": "language",
    "sentences": "length",
    "extremely_concise": "length",
    "concise": "length",
    "moderate": "length",
    "verbose": "length",
    "extremely_verbose": "length",
    "include_word": "include",
    "exclude_word": "exclude",
}
_FIXED_LENGTH = {"bullets", "sections", "two_responses", "fixed_answer"}
# What follows would change a count, contradict, or be told apart by no verifier.
_SLOT_CLASHES = [{"length", "end"}, {"length", "mark"}, {"length", "include"}, {"length", "holder"}]
_CLASHES = {
    "json": "uppercase title quotation end_phrase postscript placeholders highlights capital_words "
    "fixed_answer no_comma",
    # `language`: many wordings of a case say "in English, and in ..."
    "uppercase": "end_phrase postscript fixed_answer capital_words language",
    "lowercase": "end_phrase postscript fixed_answer sections language",
    "language": "include_word exclude_word capital_words highlights fixed_answer end_phrase postscript "
    "placeholders no_comma two_responses sections",
    "quotation": "end_phrase two_responses title",
    "bullets": "highlights include_word placeholders",
    "sections": "include_word placeholders",
    "two_responses": "include_word placeholders",
    "fixed_answer": "no_comma capital_words highlights include_word placeholders",
    "extremely_concise": "no_comma capital_words",
    "concise": "capital_words",
    "sentences": "capital_words",
}


def compatible(a: str, b: str) -> bool:
    """Whether one prompt may ask for both."""
    if SLOT[a] == SLOT[b] or {SLOT[a], SLOT[b]} in _SLOT_CLASHES:
        return False
    if {a, b} & _FIXED_LENGTH and "length" in (SLOT[a], SLOT[b]):
        return False
    return b not in _CLASHES.get(a, "").split() and a not in _CLASHES.get(b, "").split()


def draw_args(id: str, rng: random.Random) -> dict:
    """Arguments of one instruction, as training draws them."""
    choices = {
        "capital_words": lambda: {"n": rng.randint(1, 4)},
        "bullets": lambda: {"n": rng.randint(2, 5)},
        "highlights": lambda: {"n": rng.randint(2, 3)},
        "sections": lambda: {"n": rng.randint(2, 4)},
        "end_phrase": lambda: {"phrase": rng.choice(END_PHRASES)},
        "language": lambda: {"language": rng.choice(LANGUAGES[1:])},
        "postscript": lambda: {"marker": rng.choice(["P.S.", "P.S.", "P.P.S"])},
        "placeholders": lambda: {"n": rng.randint(2, 3)},
        "sentences": lambda: {"n": rng.randint(1, 5)},
        "include_word": lambda: {"word": _word_to_include(rng)},
        "exclude_word": lambda: {"word": rng.choice(CODED_QUALITIES if rng.random() < 0.85 else AVOIDABLE)},
    }
    return choices[id]() if id in choices else {}


def is_coded(word: str) -> bool:
    return word in CODED_WORDS or word in CODED_QUALITIES


def _word_to_include(rng: random.Random) -> str:
    pools = (CODED_WORDS, CODED_QUALITIES, TRAINED_WORDS, COPIED_WORDS)
    (pool,) = rng.choices(pools, (0.5, 0.22, 0.12, 0.16))
    return rng.choice(pool)


def phrase(instruction: Instruction, template: str, rng: random.Random) -> str:
    """The instruction as the prompt says it."""
    args = dict(instruction.args)
    if "n" in args:
        n = args["n"]
        digit = str(n) if rng.random() < 0.5 else NUMBERS[n]
        args["sentences"] = f"{digit} sentence" + ("" if n == 1 else "s")
        args["n"] = digit
    for key, value in args.items():
        template = template.replace("{" + key + "}", str(value))
    return template


def load_phrasings(split: str = "train") -> dict[str, list[str]]:
    with open(Path(__file__).with_name("phrasings.toml"), "rb") as f:
        return {id: table[split] for id, table in tomllib.load(f).items()}
