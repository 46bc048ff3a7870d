"""Verdicts while a reply is still being written: can it ever pass?

    hopeless("punctuation:no_comma", "Foxes, hares", {})       # True: whatever follows, it has failed

A test answers True only where NO continuation of the text passes the final verifier, its quirks included, so
that stopping there never loses a reply that would have been accepted (tests/test_early.py looks for one).
Verifiers that a later word can always satisfy (a title, a postscript, `at least`) have no test here.
Only strict verdicts are tested: a loose one may forgive a first line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from localsteer.verify.sentences import count_sentences
from localsteer.verify.verifiers import formats
from localsteer.verify.words import count_words

_LESS = "less than"
# Python's own reading of JSON: NaN and the infinities are values
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BLANKS = re.compile(r"[ \t\n\r]*")
_CHARACTERS = r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*'
_STRING = re.compile(rf'"{_CHARACTERS}"')
_OPEN_STRING = re.compile(rf'"{_CHARACTERS}(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?\Z')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_OPEN_NUMBER = re.compile(
    r"-?(?:(?:0|[1-9][0-9]*)(?:\.|(?:\.[0-9]+)?[eE][-+]?|(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)?)?\Z"
)
_END = re.compile(r"\s*(?:`{1,3}\s*)?\Z")


def hopeless(instruction_id: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether no reply that begins with `text` can pass. arguments: as check_arguments returns them."""
    test = EARLY.get(instruction_id)
    return test is not None and test(text, **arguments)


def _english_lowercase(text: str) -> bool:
    return any(c.isupper() or c.istitle() for c in text)


def _english_capital(text: str) -> bool:
    return any(c.islower() or (c.istitle() and not c.isupper()) for c in text)


def _no_comma(text: str) -> bool:
    return "," in text


def _quotation(text: str) -> bool:
    opening = text.lstrip()
    return opening != "" and not opening.startswith('"')


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    if "\u03a3" in text:  # a capital sigma is lowered by what follows it
        return False
    said = text.lstrip().lower()
    return not (said.startswith(prompt_to_repeat) or prompt_to_repeat.startswith(said))


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    return not all(part.strip() for part in parts[1:-1]) or _filled(parts) > 2


def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*{3}\s?", text)
    return not all(part.strip() for part in parts[1:-1]) or _filled(parts) > num_paragraphs


def _filled(parts: list[str]) -> int:
    """The parts that hold text; asterisks at the end may yet become a divider."""
    return sum(bool(part.strip()) for part in parts[:-1]) + bool(parts[-1].strip().strip("*"))


def _nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    return sum(bool(part.strip()) for part in text.split("\n\n")) > num_paragraphs


def _number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    # a bullet that has begun stays one, whatever its line goes on with
    return len(formats._STAR_BULLET.findall(text)) + len(formats._DASH_BULLET.findall(text)) > num_bullets


def _number_words(text: str, *, num_words: int, relation: str) -> bool:
    return relation == _LESS and count_words(text) >= num_words


def _number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """Of the text without its last two words, what follows a mark decides whether a sentence ends there; one
    more is given away for brackets that a later text moves to the sentence before."""
    known = without_last_words(text) if relation == _LESS else None
    return known is not None and count_sentences(known, at_most=num_sentences + 1) > num_sentences


def without_last_words(text: str) -> str | None:
    """The text without its last two words and the blanks before each; None where there are no two. After a
    blank that ends the text the last word is an empty one, and between two blanks there is one as well."""
    before_last = _without_last_word(text)
    bare = before_last.rstrip()
    before = _without_last_word(bare)
    if before:
        return before.rstrip()
    return bare if len(before_last) - len(bare) > 1 else None


def _without_last_word(text: str) -> str:
    ends_in_word = text[-1:].strip() != ""
    return text[: len(text) - len(text.rsplit(None, 1)[-1])] if ends_in_word else text


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    if letter in "\u03c3\u03c2":
        return False
    return let_relation == _LESS and text.lower().count(letter) >= let_frequency


def _keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    if relation != _LESS or not _is_plain(keyword):
        return False
    return sum(1 for _ in re.finditer(keyword, text, re.IGNORECASE)) >= frequency


def _forbidden_words(text: str, *, forbidden_words: tuple[str, ...]) -> bool:
    # "cat" at the end of the text may become "cats", so one character more has to stand behind it
    plain = [word for word in forbidden_words if _is_plain(word)]
    return any(re.search(rf"\b{word}\b(?=[\s\S])", text, re.IGNORECASE) for word in plain)


def _is_plain(word: str) -> bool:
    """Whether a text holds only letters, digits and single blanks, so that as a regular expression (IFEval's
    reading) it means itself."""
    return re.fullmatch(r"\w+(?: \w+)*", word) is not None


# --- JSON ---


def _json_format(text: str) -> bool:
    body = text.lstrip()
    for fence in formats._FENCES:
        if fence.startswith(body):
            return False  # nothing is said yet, or the fence is still being written
        body = body.removeprefix(fence)
    return not _may_become_json(body.lstrip())


def _may_become_json(text: str) -> bool:
    """Whether some continuation of the text is JSON, with or without a closing fence."""
    at, closers, wanted = 0, [], "value"
    while True:
        if wanted == "end" and not closers:
            return _END.match(text, at) is not None
        at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return True
        mark = text[at]
        if wanted == "colon":
            if mark != ":":
                return False
            at, wanted = at + 1, "value"
        elif wanted == "end" and mark == ",":
            at, wanted = at + 1, "key" if closers[-1] == "}" else "value"
        elif closers and mark == closers[-1] and wanted in ("end", "first"):
            closers.pop()
            at, wanted = at + 1, "end"
        elif wanted == "end":
            return False
        elif wanted == "key" or (wanted == "first" and closers[-1] == "}"):
            end = _after_string(text, at)
            if end is None or end == len(text):
                return end is not None
            at, wanted = end, "colon"
        elif mark in "{[":
            closers.append("}" if mark == "{" else "]")
            at, wanted = at + 1, "first"
        else:
            end = _after_scalar(text, at)
            if end is None or end == len(text):
                return end is not None
            at, wanted = end, "end"


def _after_string(text: str, at: int) -> int | None:
    """Where a string that opens here ends; the text's end if it may go on; None if no string opens here."""
    if match := _STRING.match(text, at):
        return match.end()
    return len(text) if _OPEN_STRING.match(text, at) else None


def _after_scalar(text: str, at: int) -> int | None:
    """Like `_after_string`, for a string, a number or a word."""
    if text[at] == '"':
        return _after_string(text, at)
    for word in _WORDS:
        if text.startswith(word, at):
            return at + len(word)
        if len(text) - at < len(word) and word.startswith(text[at:]):
            return len(text)
    if _OPEN_NUMBER.match(text, at):
        return len(text)
    match = _NUMBER.match(text, at)
    return match.end() if match else None


EARLY: Mapping[str, Callable[..., bool]] = {
    "change_case:english_lowercase": _english_lowercase,
    "change_case:english_capital": _english_capital,
    "punctuation:no_comma": _no_comma,
    "startend:quotation": _quotation,
    "detectable_format:json_format": _json_format,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_sentences": _number_sentences,
    "keywords:letter_frequency": _letter_frequency,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
}
