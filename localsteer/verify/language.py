"""The language of a text, as IFEval tells it: langdetect, which carries its profiles.

langdetect draws random numbers and IFEval leaves it unseeded, so IFEval's own verdict on a mixed text
differs from run to run. Ours is the likelier one: a text that the draws disagree on has a chance between 0
and 1, from draws with fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langdetect.detector_factory import DetectorFactory

# What langdetect 1.0.9 can answer. Chinese is zh-cn or zh-tw: it never answers "zh".
_CODES = """
af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa
pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
LANGUAGES = tuple(_CODES.split())

_DRAWS = 25  # a draw takes about 15 ms; the standard error of a chance is at most 0.1
# One draw is the mean of seven trials that each settle on one language: above this all seven agreed, and no
# further draw is needed.
_UNANIMOUS = 0.99


def chance(text: str, language: str) -> float:
    """How often IFEval would tell the text to be in the language (ISO 639-1), 0 to 1.

    A text with nothing to tell a language by (digits, punctuation, emoji) counts as every language, as in
    IFEval.
    """
    answers = _answers(text)
    return answers.get(language, 0.0) if answers else 1.0


def detect_language(text: str) -> str | None:
    """The likeliest language, or None when the text holds nothing to tell it by."""
    answers = _answers(text)
    return max(answers, key=answers.__getitem__) if answers else None


@lru_cache(maxsize=64)  # loose verdicts ask for the same text more than once
def _answers(text: str) -> Mapping[str, float]:
    """Each language that a draw answers, with its share of the draws; empty when there is none."""
    first = _draw(text, 0)
    if first is None:
        return {}
    language, certainty = first
    if certainty > _UNANIMOUS:
        return {language: 1.0}
    drawn = Counter(found[0] for seed in range(_DRAWS) if (found := _draw(text, seed)))
    return {language: number / _DRAWS for language, number in drawn.items()}


def _draw(text: str, seed: int) -> tuple[str, float] | None:
    """langdetect's answer and its certainty."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _factory().create()
    detector.seed = seed
    detector.append(text)
    try:
        found = detector.get_probabilities()
    except LangDetectException:  # "No features in text"
        return None
    return (found[0].lang, found[0].prob) if found else ("unknown", 1.0)


@cache
def _factory() -> DetectorFactory:
    """The profiles of all languages, read once (a third of a second).

    A factory of our own: langdetect's shared one takes its seed from a class attribute, which another user of
    langdetect in the same process may set too.
    """
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
