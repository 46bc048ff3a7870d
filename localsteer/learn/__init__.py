"""Vectors learned by likelihood, for instructions that the model does not follow when told to.

    from localsteer.learn import learn
    lesson = learn(engine, instruction, queries, validation)
    lesson.vector.save("json.gguf")

Difference in means (extract/) finds what telling does to a state. If telling does nothing, there is nothing
to find. Instead, a rank-1 edit is learned that makes replies which follow likely: the model's own, rewritten.
This needs PyTorch; running the learned vector does not.
"""

from __future__ import annotations

from .kept import Kept, PlainReplies
from .learning import Lesson, Look, learn
from .training import Recipe

__all__ = ["Kept", "Lesson", "Look", "PlainReplies", "Recipe", "learn"]
