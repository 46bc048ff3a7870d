"""Reply languages by code or English name, as `--language es` and `--language Spanish` write them."""

from __future__ import annotations

from localsteer.catalog import Catalog, Instruction
from localsteer.errors import CatalogError

VERIFIER = "language:response_language"
# English names of the codes that catalogues use; another code in your own catalogue needs no name here.
NAMES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
}


def languages(catalog: Catalog) -> dict[str, Instruction]:
    """The catalogue's reply languages by their code (ISO 639-1)."""
    by_name = {
        str(instruction.kwargs.get("language")): instruction
        for instruction in catalog.instructions.values()
        if instruction.verifier == VERIFIER and not instruction.open_slots
    }
    return dict(sorted(by_name.items()))


def find_language(catalog: Catalog, wanted: str) -> Instruction:
    """Upper and lower case are alike. Raises CatalogError, with the languages that there are."""
    known = languages(catalog)
    text = wanted.strip().lower()
    code = next((code for code, name in NAMES.items() if name.lower() == text), text)
    if code not in known:
        listed = ", ".join(f"{code} ({NAMES[code]})" if code in NAMES else code for code in known)
        raise CatalogError(f"unknown language {wanted!r}: {catalog.source} has {listed or 'none'}")
    return known[code].fill()
