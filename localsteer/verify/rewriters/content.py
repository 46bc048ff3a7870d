"""detectable_content:* - placeholders and a postscript."""

from __future__ import annotations

from localsteer.verify.rewriters.markdown import CODE, parse, prose
from localsteer.verify.rewriters.plain import Plain, joined

# Closings that say nothing of the subject. Each may end early, at any of its placeholders.
_CLOSINGS = (
    ("For more, contact [name]", " at [email address]", " or [phone number]"),
    ("Written by [author]", " on [date]", " in [place]"),
    ("Please send questions to [contact person]", " at [address]", " in [city]"),
    ("See also [title]", " by [writer]", " on [website]"),
)
_FIELDS = 3  # placeholders of a closing


def number_placeholders(plain: Plain, *, num_placeholders: int) -> str | None:
    """A closing with what a reader would fill in. It is English, and so is a reply that may have it."""
    missing = num_placeholders - plain.text.count("[")
    if missing > _FIELDS * len(_CLOSINGS) or not _is_latin(plain.text):
        return None
    first = plain.pick(range(len(_CLOSINGS)))
    closings = [*_CLOSINGS[first:], *_CLOSINGS[:first]]
    counts = [min(_FIELDS, missing - at) for at in range(0, missing, _FIELDS)]
    said = ["".join(closing[:n]) + "." for closing, n in zip(closings, counts, strict=False)]
    return f"{plain.text}\n\n{' '.join(said)}"


def postscript(plain: Plain, *, postscript_marker: str) -> str | None:
    """The last sentence or item moves behind the marker; a single one can't."""
    *before, (_, last) = plain.pieces
    if not before or plain.blocks[-1].kind == CODE:
        return None
    marker = postscript_marker + "." if postscript_marker[-1].isalnum() else postscript_marker
    return f"{joined(before)}\n\n{marker} {' '.join(prose(parse(last)))}"


def _is_latin(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    return sum(character < "\u0250" for character in letters) > len(letters) / 2
