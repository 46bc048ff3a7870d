"""The instruction of a vector file, with the verifier and the queries by which it is tuned and evaluated.

`calibrate.instruction_of` differs: it uses only what the file says, to rebuild its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from localsteer.catalog import Catalog, Instruction, Query
from localsteer.errors import CatalogError
from localsteer.vector import ControlVector


def instruction_of(vector: ControlVector, catalog: Catalog, path: Path) -> Instruction:
    """The instruction of a vector file: the catalogue's instruction of that id, with slots filled as in the
    file.

    Raises CatalogError for a vector that names no instruction, or one that the catalogue lacks if the file
    does not hold its wording.
    """
    origin = vector.provenance
    name = str(origin.get("instruction_id") or vector.name)
    known = catalog.instructions.get(name.partition(":")[0]) or catalog.instructions.get(name)
    phrasings = vector.phrasings
    if phrasings:
        group, verifier, kwargs = origin.get("group"), origin.get("verifier"), origin.get("kwargs")
        instruction = known or Instruction(name, phrasings, group=str(group or "format"))
        if known and known.id == name and not known.open_slots:
            return known.fill()
        return replace(
            instruction,
            id=name,
            phrasings=phrasings,
            verifier=verifier,
            kwargs=dict(kwargs or {}),
            literal=True,
            held_out_phrasings=(),
            queries=instruction.queries or _queries_for(catalog, verifier, kwargs),
        )
    if known is None:
        raise CatalogError(
            f"{path} does not say which instruction it is for, and {catalog.source} has no {name!r}: name it "
            "after an instruction (`localsteer convert import --name ID`), or extract it from this model."
        )
    return known.fill()


def _queries_for(catalog: Catalog, verifier: Any, kwargs: Any) -> Mapping[str, tuple[Query, ...]]:
    """The queries of the catalogue's instruction that asks for the same, if it has its own: replies to other
    queries contain no `moon` that `exclude_word:moon` could avoid."""
    same = (
        instruction
        for instruction in catalog.instructions.values()
        if instruction.verifier == verifier and dict(instruction.kwargs) == dict(kwargs or {})
    )
    return next((instruction.queries for instruction in same if instruction.queries), {})
