"""Judging replies without a judge: does a reply follow its instruction, and is it still a reply?

Imports numpy and the standard library only; langdetect is loaded by the first verdict on a language.
"""

from __future__ import annotations

from localsteer.evaluate.quality import (
    EMPTY,
    LOCKED,
    LOOPING,
    is_degenerate,
    length_words,
    perplexity,
    perplexity_ratio,
    repetition,
    subject_kept,
)
from localsteer.evaluate.verify import INSTRUCTION_IDS, check_arguments, loose_variants, verify

__all__ = [
    "EMPTY",
    "INSTRUCTION_IDS",
    "LOCKED",
    "LOOPING",
    "check_arguments",
    "is_degenerate",
    "length_words",
    "loose_variants",
    "perplexity",
    "perplexity_ratio",
    "repetition",
    "subject_kept",
    "verify",
]
