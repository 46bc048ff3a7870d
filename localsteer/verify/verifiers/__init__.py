"""One function per instruction of IFEval, by the name and with the arguments that IFEval gives it.

Each follows what the official checker does, its quirks included, since people compare numbers; the
docstrings name the quirks. Source: google-research/instruction_following_eval, as of 2025 (Zhou et al.,
arXiv 2311.07911).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from localsteer.verify.verifiers import (
    case,
    combination,
    content,
    formats,
    keywords,
    length,
    parameters,
    startend,
)
from localsteer.verify.verifiers.parameters import Checker


@dataclass(frozen=True)
class Verifier:
    """`check(reply, **arguments)` and what each argument may be; all are required.

    A check answers with a bool, or with the chance that IFEval's would pass where that one draws random
    numbers (language detection).
    """

    check: Callable[..., float]
    parameters: Mapping[str, Checker] = field(default_factory=dict)


def _verifier(check: Callable[..., float], **checkers: Checker) -> Verifier:
    return Verifier(check, checkers)


_count, _relation = parameters.count, parameters.relation
_pattern, _patterns = parameters.pattern, parameters.patterns

VERIFIERS: Mapping[str, Verifier] = {
    "keywords:existence": _verifier(keywords.existence, keywords=_patterns),
    "keywords:frequency": _verifier(
        keywords.frequency, keyword=_pattern, frequency=_count, relation=_relation
    ),
    "keywords:forbidden_words": _verifier(keywords.forbidden_words, forbidden_words=_patterns),
    "keywords:letter_frequency": _verifier(
        keywords.letter_frequency, letter=parameters.letter, let_frequency=_count, let_relation=_relation
    ),
    "language:response_language": _verifier(case.response_language, language=parameters.language),
    "length_constraints:number_sentences": _verifier(
        length.number_sentences, num_sentences=_count, relation=_relation
    ),
    "length_constraints:number_paragraphs": _verifier(length.number_paragraphs, num_paragraphs=_count),
    "length_constraints:number_words": _verifier(length.number_words, num_words=_count, relation=_relation),
    "length_constraints:nth_paragraph_first_word": _verifier(
        length.nth_paragraph_first_word,
        num_paragraphs=_count,
        nth_paragraph=parameters.position,
        first_word=parameters.lower_text,
    ),
    "detectable_content:number_placeholders": _verifier(content.number_placeholders, num_placeholders=_count),
    "detectable_content:postscript": _verifier(content.postscript, postscript_marker=_pattern),
    "detectable_format:number_bullet_lists": _verifier(formats.number_bullet_lists, num_bullets=_count),
    "detectable_format:constrained_response": _verifier(formats.constrained_response),
    "detectable_format:number_highlighted_sections": _verifier(
        formats.number_highlighted_sections, num_highlights=_count
    ),
    "detectable_format:multiple_sections": _verifier(
        formats.multiple_sections, section_spliter=_pattern, num_sections=_count
    ),
    "detectable_format:json_format": _verifier(formats.json_format),
    "detectable_format:title": _verifier(formats.title),
    "combination:two_responses": _verifier(combination.two_responses),
    "combination:repeat_prompt": _verifier(combination.repeat_prompt, prompt_to_repeat=parameters.lower_text),
    "startend:end_checker": _verifier(startend.end_checker, end_phrase=parameters.lower_text),
    "change_case:capital_word_frequency": _verifier(
        case.capital_word_frequency, capital_frequency=_count, capital_relation=_relation
    ),
    "change_case:english_capital": _verifier(case.english_capital),
    "change_case:english_lowercase": _verifier(case.english_lowercase),
    "punctuation:no_comma": _verifier(startend.no_comma),
    "startend:quotation": _verifier(startend.quotation),
}
