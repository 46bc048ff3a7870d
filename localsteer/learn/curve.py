"""Draws the loss of a lesson, step by step, with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localsteer.cache import atomic_path

if TYPE_CHECKING:
    from .learning import Lesson


def draw(lesson: Lesson, path: str) -> None:
    """Draw training and held-out loss, in nats per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [look.step for look in lesson.curve]
    axes.plot(steps, [look.loss for look in lesson.curve], label="examples")
    axes.plot(steps, [look.held_out for look in lesson.curve], label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=lesson.vector.name)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
