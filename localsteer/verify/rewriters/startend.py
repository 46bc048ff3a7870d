"""startend:* and punctuation:* - how the reply ends, quotation marks, commas."""

from __future__ import annotations

import re

from localsteer.verify.rewriters.plain import Plain

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_CLAUSE_END = re.compile(r"([.;:!?\n])")
_CONJUNCTION = re.compile(r"\b(?:and|or)\b")
# "However, red, green and blue ...": what opens a sentence is no item of the list after it.
_OPENING = re.compile(
    r"(?:however|therefore|also|then|yes|no|well|so|when|if|while|as|although|because|since|after|before|in|on|at"
    r"|for|from|with|to|by|\w+ly)\b",
    re.IGNORECASE,
)
_MAX_LISTED_WORDS = 4  # of an item between commas; longer ones are clauses


def end_checker(plain: Plain, *, end_phrase: str) -> str:
    return f"{plain.text}\n\n{end_phrase}"


def quotation(plain: Plain) -> str:
    """In quotation marks; those inside become single ones."""
    return '"' + plain.text.replace('"', "'") + '"'


def no_comma(plain: Plain) -> str | None:
    """Lists are joined by their own "and" or "or"; elsewhere the comma goes. Code can't spare its commas."""
    if plain.has_code:
        return None
    return "".join(map(_without_commas, _CLAUSE_END.split(_THOUSANDS.sub("", plain.text))))


def _without_commas(clause: str) -> str:
    parts = clause.split(",")
    if len(parts) == 1:
        return clause
    parts = [parts[0].rstrip(), *map(str.strip, parts[1:-1]), parts[-1].lstrip()]
    last_opening = len(parts) - 3
    n_openings = next((n for n, part in enumerate(parts) if n >= last_opening or not _opens(part)), 0)
    first, *others = parts[n_openings:]
    listed = _enumeration(others)
    return (
        "".join(f"{part} " for part in parts[:n_openings])
        + first
        + "".join(
            f" {listed} {part}" if listed and not _CONJUNCTION.match(part) else f" {part}" for part in others
        )
    )


def _opens(part: str) -> bool:
    return _OPENING.match(part.lstrip("*_# ")) is not None


def _enumeration(parts: list[str]) -> str | None:
    """The conjunction of "red, green, and blue", or None where the commas part clauses."""
    *middle, last = parts
    conjunction = _CONJUNCTION.search(last)
    short = all(part and len(part.split()) <= _MAX_LISTED_WORDS for part in middle)
    if conjunction is None or not middle or not short:
        return None
    return conjunction[0] if len(last[: conjunction.start()].split()) <= _MAX_LISTED_WORDS else None
