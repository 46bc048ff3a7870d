"""The evaluation of steering: conditions with their controls, suites, studies, and their reports.

What judges a single reply lives in `localsteer.verify`; its names are here, too, where they once were.
"""

from __future__ import annotations

from localsteer.verify import (
    EMPTY,
    INSTRUCTION_IDS,
    LOCKED,
    LOOPING,
    check_arguments,
    is_degenerate,
    length_words,
    loose_variants,
    perplexity,
    perplexity_ratio,
    repetition,
    subject_kept,
    verify,
)

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
