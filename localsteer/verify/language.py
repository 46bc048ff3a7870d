"""The language of a text, detected as in IFEval with langdetect, which contains its profiles.

langdetect draws random numbers and IFEval leaves it unseeded, so IFEval's own verdict on a mixed text differs
from run to run. The verdict here is the likelier one: a text on which the draws disagree has a chance between
0 and 1, estimated from draws with fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
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

_READ = 10_000  # characters; twice as many where two make one, letters of Vietnamese and their accents
_LONGEST_ADDRESS = 2100  # characters that langdetect takes for one, at most
_DRAWS = 25  # the standard error of a chance is at most 0.1
# One draw is the mean of seven trials that each settle on one language: above this all seven agreed, and no
# further draw is needed.
_UNANIMOUS = 0.99


def chance(text: str, language: str) -> float:
    """How often IFEval would find the text to be in the language (ISO 639-1), 0 to 1.

    A text without any sign of a language (digits, punctuation, emoji) counts as every language, as in IFEval.
    """
    answers = _answers(text)
    return answers.get(language, 0.0) if answers else 1.0


def detect_language(text: str) -> str | None:
    """The likeliest language, or None if the text has no sign of one."""
    answers = _answers(text)
    return max(answers, key=answers.__getitem__) if answers else None


@lru_cache(maxsize=64)  # loose verdicts ask for the same text more than once
def _answers(text: str) -> Mapping[str, float]:
    """The languages that draws return, with their shares of the draws; empty if there are none."""
    draw = _drawer(text)
    first = draw(0)
    if first is None:
        return {}
    language, certainty = first
    if certainty > _UNANIMOUS:
        return {language: 1.0}
    drawn = Counter(answer[0] for seed in range(_DRAWS) if (answer := draw(seed)))
    return {language: number / _DRAWS for language, number in drawn.items()}


def _drawer(text: str) -> Callable[[int], tuple[str, float] | None]:
    """langdetect's answer and certainty for a seed; None if the text has no sign of a language."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _factory().create()
    detector.append(_what_is_read(text))
    detector.cleaning_text()
    features = detector._extract_ngrams()
    detector._extract_ngrams = lambda: features  # the same for every seed, and most of the time of a draw

    def draw(seed: int) -> tuple[str, float] | None:
        detector.seed, detector.langprob = seed, None
        try:
            probabilities = detector.get_probabilities()
        except LangDetectException:  # "No features in text"
            return None
        return (probabilities[0].lang, probabilities[0].prob) if probabilities else ("unknown", 1.0)

    return draw


def _what_is_read(text: str) -> str:
    """As much of the text as langdetect looks at: 10,000 characters, once it has taken out web and mail
    addresses. It looks for those in all of the text, anew for each draw, and takes seconds for a megabyte."""
    from langdetect.detector import Detector

    n = 4 * _READ
    while n < len(text):
        # an address that the cut may have shortened is dropped with all that stands near the end
        webless = Detector.URL_RE.sub(" ", text[:n])[:-_LONGEST_ADDRESS]
        plain = Detector.MAIL_RE.sub(" ", webless)[:-_LONGEST_ADDRESS]
        if len(plain) > 2 * _READ:
            return plain
        n *= 2
    return text


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
