"""Vectors that are learned by likelihood, for instructions that the model does not follow when it is told to.

    from localsteer.learn import learn
    lesson = learn(engine, instruction, queries, validation)
    lesson.vector.save("json.gguf")

Difference in means (extract/) finds what telling does to a state. Where telling does nothing there is nothing
to find, and a rank-1 edit is learned that makes replies likely which follow: the model's own, rewritten.
PyTorch is needed here, and not to run what is learned.
"""

from __future__ import annotations

from .kept import Kept, PlainReplies
from .learning import Lesson, Look, learn
from .training import Recipe

__all__ = ["Kept", "Lesson", "Look", "PlainReplies", "Recipe", "learn"]
