"""keywords:* - words that must, may or must not stand in the reply."""

from __future__ import annotations

import re

from localsteer.verify.patterns import expression
from localsteer.verify.rewriters.markdown import HEADING
from localsteer.verify.rewriters.plain import Plain
from localsteer.verify.verifiers.parameters import WHOLE_WORD

# They claim nothing of the subject, so that any word fits.
_MENTIONS = (
    "One could also mention {}.",
    "This also brings {} to mind.",
    "The word {} comes to mind here.",
    "A word that belongs here is {}.",
)
_OF_SEVERAL = _MENTIONS[:2]
_MAX_MENTIONS = 2  # more of the same word is no longer a reply
_MIN_KEPT = 0.3  # of the characters; what is left of a reply must still be one
_PLAIN_WORD = re.compile(r"[\w' -]+")


def existence(plain: Plain, *, keywords: tuple[str, ...]) -> str | None:
    """Words that are missing are named in one sentence that claims nothing. A pattern can't be."""
    missing = [word.strip() for word in keywords if not expression(word, re.IGNORECASE).search(plain.text)]
    mention = plain.pick(_OF_SEVERAL if len(missing) > 1 else _MENTIONS)
    return _with(plain, [mention.format(_listed(missing))], missing)


def frequency(plain: Plain, *, keyword: str, frequency: int, relation: str) -> str | None:
    """Less than: the last sentences that hold the word go. At least: it is named once or twice more."""
    pattern = expression(keyword, re.IGNORECASE)
    if relation == "less than":
        return _enough(plain, plain.within(pattern.count, frequency - 1))
    missing = frequency - pattern.count(plain.text)
    if missing > _MAX_MENTIONS:
        return None
    first = plain.pick(range(len(_MENTIONS)))
    chosen = [_MENTIONS[(first + at) % len(_MENTIONS)] for at in range(missing)]
    return _with(plain, [mention.format(f'"{keyword}"') for mention in chosen], [keyword])


def forbidden_words(plain: Plain, *, forbidden_words: tuple[str, ...]) -> str | None:
    """The sentences and list items that hold one of the words go."""
    patterns = [expression(word, re.IGNORECASE, WHOLE_WORD) for word in forbidden_words]
    return _enough(plain, plain.without(lambda text: any(word.search(text) for word in patterns)))


def letter_frequency(plain: Plain, *, letter: str, let_frequency: int, let_relation: str) -> str | None:
    """Less than: sentences with the letter go where it is one too many; ! turns into a full stop.

    At least: full stops turn into !, and a title gets the # that are missing; letters would be invented.
    """
    letter = letter.lower()
    if let_relation == "less than":
        text = plain.text.replace("!", ".") if letter == "!" else None
        return text or _enough(
            plain, plain.within(lambda part: part.lower().count(letter), let_frequency - 1)
        )
    missing = let_frequency - plain.text.lower().count(letter)
    if letter == "!":
        return re.sub(r"(?<=[^\W\d_]{3})\.(?=\s|\Z)", "!", plain.text, count=missing)
    if letter == "#" and missing <= 6 and plain.subject and plain.blocks[0].kind != HEADING:
        return f"{'#' * missing} {plain.subject}\n\n{plain.text}"
    return None


def _with(plain: Plain, mentions: list[str], words: list[str]) -> str | None:
    """The mentions after the reply, or after its first paragraph where it has several."""
    if not all(map(_PLAIN_WORD.fullmatch, words)):
        return None
    first, *rest = plain.parts(min(2, len(plain.paragraphs))) or [plain.text]
    if rest and plain.seed % 2 and not plain.has_code:
        return "\n\n".join([first, " ".join(mentions), *rest])
    return f"{plain.text}\n\n{' '.join(mentions)}"


def _listed(words: list[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _enough(plain: Plain, kept: str) -> str | None:
    return kept if len(kept) >= _MIN_KEPT * len(plain.text) else None
