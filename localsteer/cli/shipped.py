"""Vectors that ship for a model (localsteer/packs): how first use finds one, and what it prints about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .console import note
from .models import model_file

SHARES = ("none", "steered", "instructed", "both")

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.packs import Entry, Match
    from localsteer.vector import ControlVector


def shipped_vector(
    model: str, instruction: Instruction, catalog: Catalog, queries: tuple[Query, ...]
) -> ControlVector | None:
    """The vector that a pack has for this instruction, announced in one line; None if none fits.

    It was measured with the catalogue's words, queries and slots: with others, a new vector is needed. Raises
    LocalsteerError for a damaged pack, or a pack named by the user that is for another model.
    """
    from localsteer.packs import pack_for

    if queries != (instruction.queries or catalog.queries).get("extraction"):
        return None
    match = pack_for(model_file(model))
    if match is None or match.pack.catalog != catalog.source:
        return None
    entry = match.pack.instructions.get(instruction.id)
    if entry is None:
        return None
    vector = match.pack.vector(instruction.id)
    if vector.phrasings != instruction.phrasings:
        return None
    note(told(match, entry))
    return vector


def told(match: Match, entry: Entry) -> str:
    """A sentence on where the vector comes from and what it achieves."""
    line = f"{entry.id}: shipped for {match.pack.model}: {figures(entry)}"
    if match.exact:
        return line
    return (
        f"{line} Measured on its {match.pack.quantization or 'own'} file; this is a different one: "
        "LOCALSTEER_PACKS=off makes a vector for it."
    )


def figures(entry: Entry) -> str:
    """`steered 92% of 12, told in words 33%, the plain model 0%.`, or why nothing is applied."""
    if not entry.helps:
        return " ".join(entry.advice[:1]) or "nothing is applied, because nothing was found that helps."
    scores = {key: "-" if share is None else f"{share:.0%}" for key, share in entry.scores.items()}
    return (
        f"steered {scores['steered']} of {entry.n}, told in words {scores['instructed']}, the plain model "
        f"{scores['none']}."
    )


def shares_of(row: Mapping[str, Any]) -> list[str]:
    """The shares of SHARES as text, `-` for one that was not measured."""
    return ["-" if row["scores"][key] is None else f"{row['scores'][key]:.0%}" for key in SHARES]


def setting_of(row: Mapping[str, Any]) -> str:
    """The settings, as a search writes them: `project at layer 12, prompt, strength 2`."""
    if not row["strength"]:
        return "nothing helps"
    layers = ", ".join(map(str, row["layers"]))
    return f"{row['mode']} at layer {layers}, {row['positions']}, strength {row['strength']:g}"
