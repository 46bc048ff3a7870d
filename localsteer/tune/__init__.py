"""Finds where, how and how strongly to steer by one vector: by likelihood, then checked by generation.

    tuned = tune(engine, vector, instruction, queries)
    tuned.vector.save("json.gguf")

targets.py: replies of the told model that follow. score.py: how much likelier a setting makes them without
being told. search.py: which settings are scored. check.py: replies under the best settings, beside plain and
told ones, which decide. tuning.py combines them; exhaustive.py generates under every setting, as a reference.
docs/tuning.md says how well it works.
"""

from .check import Check, Trial
from .exhaustive import tune_exhaustively
from .setting import MAX_TOKENS, POSITIONS, Setting
from .tuning import DEFAULT_N, N_SEQ_MAX, Tuned, tune

__all__ = [
    "DEFAULT_N",
    "MAX_TOKENS",
    "N_SEQ_MAX",
    "POSITIONS",
    "Check",
    "Setting",
    "Trial",
    "Tuned",
    "tune",
    "tune_exhaustively",
]
