"""Text in, verdict or text out: no engine, no torch.

    rewrite("startend:quotation", "Foxes hunt mice.", {})      # '"Foxes hunt mice."'

`localsteer.verify.rewriters` makes a reply follow an instruction; whether it does is for
`localsteer.evaluate.verify` to say.
"""

from __future__ import annotations

from localsteer.verify.rewriters import REWRITERS, can_rewrite, rewrite
from localsteer.verify.rewriters.sentences import (
    trim_before_loop,
    trim_to_paragraph,
    trim_to_sentence,
)

__all__ = ["REWRITERS", "can_rewrite", "rewrite", "trim_before_loop", "trim_to_paragraph", "trim_to_sentence"]
