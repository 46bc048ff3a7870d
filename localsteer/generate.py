"""The old address of `localsteer.Sampling` and its like, kept for programs that import them from here."""

import warnings

from .runtime.reply import Chunk, Reply, Timings
from .runtime.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Chunk", "Reply", "Sampling", "Timings"]

warnings.warn("import Sampling, Reply and Chunk from localsteer", DeprecationWarning, stacklevel=2)
