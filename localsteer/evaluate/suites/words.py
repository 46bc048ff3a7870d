"""Words that replies should hold, and words that they should not.

The paper's section 5: a vector of each word from 20 examples, added; minus the vector of including a word
excludes it. A word can be excluded only where replies hold it, so three kinds of words are tried: words that
the catalogue has queries for, which bring the word without naming it; the words that this model's own replies
to validation queries use most; and words that can be included, in replies to prompts that ask for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Experiment, applied
from localsteer.evaluate.page import SuiteReport
from localsteer.evaluate.suites.word_choice import INCLUDED, contexts, words_to_exclude, words_to_include
from localsteer.evaluate.suites.word_sections import SECTIONS, SWEEP, cosines, of_kind
from localsteer.evaluate.suites.word_vectors import ASKED, CONTEXT, EXCLUDE, INCLUDE, Task, tasks_of
from localsteer.extract.recipes import exclude_word

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME, TITLE = "words", "Words: included and excluded"
OWN = "own"
CONDITIONS = (
    "none", "steered", "random", "other", OWN, f"{OWN} random", f"{OWN} other", "instructed", "both",
)  # fmt: skip


def missing(bench: Bench, **_options: Any) -> str:
    if bench.asked is not None and not (
        words_to_include(bench) or contexts(bench) or words_to_exclude(bench)
    ):
        return (
            f"none of {', '.join(bench.asked)} is a word to include or to exclude: make its vector with "
            "`localsteer extract --include-word WORD` and give that."
        )
    try:
        exclude_word(bench.catalog, INCLUDED[0])
    except CatalogError as error:
        return str(error)
    return ""


def run(
    bench: Bench,
    *,
    include: Sequence[str] | None = None,
    context: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **_options: Any,
) -> SuiteReport:
    """include, context, exclude: words in place of the suite's own choice of each kind."""
    tasks = tasks_of(bench, INCLUDE, include if include is not None else words_to_include(bench))
    can_be_included = [task.word for task in tasks if task.vector.strength]
    tasks += tasks_of(bench, CONTEXT, context if context is not None else list(contexts(bench)))
    tasks += tasks_of(bench, EXCLUDE, exclude if exclude is not None else words_to_exclude(bench))
    tasks += tasks_of(bench, ASKED, can_be_included)
    compared = [conditions_of(bench, task, tasks) for task in tasks]
    rows = bench.run(compared, what="including and excluding words")
    sweep = bench.run([sweep_of(bench, task) for task in tasks], what="sweeping strengths", score=False)
    by_kind = {kind: [task for task in tasks if task.kind == kind] for kind in SECTIONS}
    sections = [of_kind(kind, own, CONDITIONS, rows, sweep) for kind, own in by_kind.items() if own]
    return bench.report(TITLE, rows, CONDITIONS, [*sections, *cosines(by_kind[INCLUDE])])


def conditions_of(bench: Bench, task: Task, tasks: Sequence[Task]) -> Experiment:
    """The conditions of one word. other: another word's vector of the same kind in its place, `own`: the
    vector of telling the model to avoid the word, with controls of its own; all where there is one. A prompt
    that asks for a word is not told to avoid it as well."""
    others = [other for other in tasks if other.kind == task.kind and other.word != task.word][:1]
    steers = {"none": (), "steered": applied(task.vector)}
    if task.vector.strength:
        steers |= bench.controls.like([task.vector], [other.raw for other in others])
    if task.own is not None:
        steers[OWN] = applied(task.own)
        if task.own.strength:
            controls = bench.controls.like(
                [task.own], [other.own for other in others if other.own is not None]
            )
            steers |= {f"{OWN} {name}": steer for name, steer in controls.items()}
    if task.kind != ASKED:
        steers |= {"instructed": (), "both": steers["steered"]}
    wordings = task.instruction.phrasings[:1]
    return bench.compare(task.instruction, steers, CONDITIONS, wordings=wordings)


def sweep_of(bench: Bench, task: Task) -> Experiment:
    strengths = SWEEP if task.vector.strength else ()
    steers = {f"{strength:g}": (task.vector.at(strength=strength),) for strength in strengths}
    return bench.compare(task.instruction, steers, wordings=task.instruction.phrasings[:1])
