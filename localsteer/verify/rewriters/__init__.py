"""A model's own reply, rewritten so that it follows an instruction: one function per id of IFEval.

A learned vector is trained towards these texts, so that they must stay what the model would say: its words,
its order, its language and, where the format can keep it, its length. Nothing is invented. docs/rewriters.md
has the table of what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from localsteer.jsonable import JsonObject
from localsteer.verify.rewriters import case, combination, content, formats, keywords, length, startend
from localsteer.verify.rewriters.plain import Plain
from localsteer.verify.rewriters.sentences import trim_to_sentence
from localsteer.verify.verdicts import check_arguments, verify

# `rewriter(plain, **arguments)`: a candidate, which `rewrite` verifies, or None where it knows none
Rewriter = Callable[..., "str | None"]

# language:response_language is missing: a translation is not the model's own reply.
REWRITERS: Mapping[str, Rewriter] = {
    "keywords:existence": keywords.existence,
    "keywords:frequency": keywords.frequency,
    "keywords:forbidden_words": keywords.forbidden_words,
    "keywords:letter_frequency": keywords.letter_frequency,
    "length_constraints:number_sentences": length.number_sentences,
    "length_constraints:number_paragraphs": length.number_paragraphs,
    "length_constraints:number_words": length.number_words,
    "length_constraints:nth_paragraph_first_word": length.nth_paragraph_first_word,
    "detectable_content:number_placeholders": content.number_placeholders,
    "detectable_content:postscript": content.postscript,
    "detectable_format:number_bullet_lists": formats.number_bullet_lists,
    "detectable_format:constrained_response": formats.constrained_response,
    "detectable_format:number_highlighted_sections": formats.number_highlighted_sections,
    "detectable_format:multiple_sections": formats.multiple_sections,
    "detectable_format:json_format": formats.json_format,
    "detectable_format:title": formats.title,
    "combination:two_responses": combination.two_responses,
    "combination:repeat_prompt": combination.repeat_prompt,
    "startend:end_checker": startend.end_checker,
    "change_case:capital_word_frequency": case.capital_word_frequency,
    "change_case:english_capital": case.english_capital,
    "change_case:english_lowercase": case.english_lowercase,
    "punctuation:no_comma": startend.no_comma,
    "startend:quotation": startend.quotation,
}


def can_rewrite(instruction_id: str) -> bool:
    """Whether there is a rewriter for the id; on one text or another it may still know no honest way."""
    return instruction_id in REWRITERS


def rewrite(
    instruction_id: str,
    reply: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    prompt: str | None = None,
    seed: int = 0,
    cut: bool = False,
) -> str | None:
    """The reply as it would read if it followed the instruction, or None where no honest rewriting is known.

    The result passes `verify(instruction_id, result, kwargs, prompt=prompt)`. A reply that passes already is
    returned as it is. The same text and seed give the same result; other seeds may give another shape of it.

    prompt: what was asked, without the instruction. A title and a JSON question are taken from it.
    cut: the reply ended at a token limit; its unfinished last sentence is dropped first.
    Raises CatalogError on an unknown id or arguments that make no sense, as `verify` does.
    """
    arguments = check_arguments(instruction_id, kwargs, prompt=prompt)
    said = trim_to_sentence(reply) if cut else reply
    if not _says_something(said):
        return None
    if verify(instruction_id, said, kwargs, prompt=prompt):
        return said
    rewriter = REWRITERS.get(instruction_id)
    if rewriter is None:
        return None
    written = rewriter(Plain(said, prompt, seed), **_in_own_case(arguments, kwargs, prompt))
    if written is None or not _says_something(written):
        return None
    return written if verify(instruction_id, written, kwargs, prompt=prompt) else None


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def _in_own_case(
    arguments: Mapping[str, Any], kwargs: Mapping[str, Any] | None, prompt: str | None
) -> JsonObject:
    """The arguments with the capitals of phrases to write, which a verifier has no use for."""
    given = {"prompt_to_repeat": prompt, **{n: v for n, v in (kwargs or {}).items() if v is not None}}
    return {
        name: given[name].strip() if isinstance(value, str) else value for name, value in arguments.items()
    }
