"""Verdicts on texts, and rewritten texts, without an engine or torch.

    verify("startend:quotation", reply)                        # does a reply follow its instruction?
    is_degenerate(reply), subject_kept(reply, "foxes")         # is it still a reply, and about its subject?
    rewrite("startend:quotation", "Foxes hunt mice.", {})      # '"Foxes hunt mice."': made to follow

Imports numpy and the standard library only; langdetect is loaded by the first verdict on a language.
"""

from __future__ import annotations

from localsteer.verify.quality import (
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
from localsteer.verify.rewriters import REWRITERS, can_rewrite, rewrite
from localsteer.verify.rewriters.sentences import (
    trim_before_loop,
    trim_to_paragraph,
    trim_to_sentence,
)
from localsteer.verify.verdicts import INSTRUCTION_IDS, check_arguments, loose_variants, verify

__all__ = [
    "EMPTY",
    "INSTRUCTION_IDS",
    "LOCKED",
    "LOOPING",
    "REWRITERS",
    "can_rewrite",
    "check_arguments",
    "is_degenerate",
    "length_words",
    "loose_variants",
    "perplexity",
    "perplexity_ratio",
    "repetition",
    "rewrite",
    "subject_kept",
    "trim_before_loop",
    "trim_to_paragraph",
    "trim_to_sentence",
    "verify",
]
