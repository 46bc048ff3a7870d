"""Judging replies without a judge: does a reply follow its instruction, and is it still a reply?

Imports the standard library only; langdetect is loaded by the first verdict that asks for a language.
"""

from __future__ import annotations

from localsteer.evaluate.verify import INSTRUCTION_IDS, check_arguments, loose_variants, verify

__all__ = ["INSTRUCTION_IDS", "check_arguments", "loose_variants", "verify"]
