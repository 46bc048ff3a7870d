"""Words that replies should hold, and words that they should not.

The paper's section 5: a vector of each word from 20 examples, added; minus the vector of including a word
excludes it. A word can be excluded only where replies hold it, so three kinds of words are tried: words that
the catalogue has queries for, which bring the word without naming it; the words that this model's own replies
to validation queries use most; and words that can be included, in replies to prompts that ask for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Arm, Experiment, applied, arms_of
from localsteer.evaluate.controls import controls_of
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Lines, Section, SuiteReport, Table, Value
from localsteer.evaluate.suites.word_choice import INCLUDED, contexts, words_to_exclude, words_to_include
from localsteer.evaluate.suites.word_vectors import ASKED, CONTEXT, EXCLUDE, INCLUDE, Task, tasks_of
from localsteer.extract.recipes import WORD_PAIRS, exclude_word

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME = "words"
TITLE = "Words: included and excluded"
OWN = "own"
CONDITIONS = (
    "none",
    "steered",
    "random",
    "other",
    OWN,
    f"{OWN} random",
    f"{OWN} other",
    "instructed",
    "both",
)
SWEEP = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the picked strength's layer and positions


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
    rows = bench.run(
        [conditions_of(bench, task, tasks) for task in tasks], what="including and excluding words"
    )
    sweep = bench.run([sweep_of(bench, task) for task in tasks], what="sweeping strengths", score=False)
    by_kind = {kind: [task for task in tasks if task.kind == kind] for kind in TEXTS}
    sections = [section(kind, own, rows, sweep) for kind, own in by_kind.items() if own]
    return bench.report(TITLE, rows, CONDITIONS, [*sections, *cosines(by_kind[INCLUDE])])


# --- experiments ------------------------------------------------------------------------------------------


def conditions_of(bench: Bench, task: Task, tasks: Sequence[Task]) -> Experiment:
    """The conditions of one word. other: another word's vector of the same kind in its place, `own`: the
    vector of telling the model to avoid the word, with controls of its own; all where there is one. A prompt
    that asks for a word is not told to avoid it as well."""
    others = [each for each in tasks if each.kind == task.kind and each.word != task.word][:1]
    steers = {"none": (), "steered": applied(task.vector)}
    if task.vector.strength:
        raw = [other.raw for other in others]
        steers |= controls_of([task.vector], raw, bench.plain_mean(), bench.seed)
    if task.own is not None:
        steers[OWN] = applied(task.own)
        if task.own.strength:
            raw = [other.own for other in others if other.own is not None]
            controls = controls_of([task.own], raw, bench.plain_mean(), bench.seed)
            steers |= {f"{OWN} {name}": steer for name, steer in controls.items()}
    if task.kind != ASKED:
        steers |= {"instructed": (), "both": steers["steered"]}
    return _asked(bench, task, arms_of(steers, CONDITIONS))


def sweep_of(bench: Bench, task: Task) -> Experiment:
    strengths = SWEEP if task.vector.strength else ()
    return _asked(bench, task, [Arm(f"{each:g}", (task.vector.at(strength=each),)) for each in strengths])


def _asked(bench: Bench, task: Task, arms: Sequence[Arm]) -> Experiment:
    return bench.experiment(task.instruction, arms, wordings=task.instruction.phrasings[:1])


# --- sections ----------------------------------------------------------------------------------------------


_CONDITIONS = (
    f"`steered` is minus the vector of including the word ({WORD_PAIRS} examples), `other` minus that of "
    "another word, `own` the vector of telling the model to avoid the word, with the same two controls. A "
    "random direction that changes replies avoids words too: only what is beyond `random` and `other` is "
    "about this word."
)
TEXTS = {
    INCLUDE: (
        "Inclusion",
        f"Share of replies that hold the word. A vector of each word from {WORD_PAIRS} examples, added at "
        "the layer, positions and strength that did best on validation queries. `other` is another word's "
        "vector in its place: where it does as well, steering asks for some word and not for this one.",
    ),
    CONTEXT: (
        "Exclusion of a word that the question's context brings",
        "Share of replies WITHOUT the word, to the catalogue's own queries for this word: those that do not "
        f"name it and whose unsteered reply holds it. {_CONDITIONS} The include vectors come from queries "
        "that do not bring the word.",
    ),
    EXCLUDE: (
        "Exclusion of the words that replies use most",
        f"Share of replies WITHOUT the word, to queries whose unsteered reply holds it. {_CONDITIONS}",
    ),
    ASKED: (
        "Exclusion of a word that the prompt asks for",
        "Share of replies WITHOUT the word, to queries that ask for it in words, for the words that can be "
        "included by steering. `none` is what the prompt makes the model say; `steered` is minus the vector "
        "of including the word, `other` minus that of another word: where it does as well, steering undoes "
        "being asked for a word at all and not for this one.",
    ),
}


def section(kind: str, tasks: Sequence[Task], rows: Outcomes, sweep: Outcomes) -> Section:
    """tasks: at least one of this kind. sweep: rows at each strength."""
    title, text = TEXTS[kind]
    idle = [task.word for task in tasks if not task.vector.strength]
    if idle:
        text += f" No setting did better than the model alone for {', '.join(idle)}: nothing was applied."
    names = {task.instruction.id for task in tasks}
    own = Outcomes(row for row in rows if row.cell.instruction in names)
    present = own.by("condition")
    conditions = [name for name in CONDITIONS if name in present]
    table: list[list[Value]] = [
        [task.word, _settings(task), *_shares(own.of(None, task.instruction.id), conditions)]
        for task in tasks
    ]
    table.append(["all", "", *_shares(own, conditions)])
    series = {task.word: curve(task, own, sweep) for task in tasks if task.vector.strength}
    plot = Lines(
        title=f"{title} against strength",
        x_label="strength (c / |v|)",
        y_label="share of replies",
        x=[0.0, *SWEEP],
        series=series,
    )
    columns = ["word", "layer, positions, strength", *conditions]
    return Section(title, text, [Table(columns, table)], [plot] if series else [])


def _shares(rows: Outcomes, conditions: Sequence[str]) -> list[Value]:
    by_condition = rows.by("condition")
    return [by_condition[name].share if name in by_condition else None for name in conditions]


def _settings(task: Task) -> str:
    vector = task.vector
    return f"{vector.layers[0]}, {vector.positions}, {vector.strength:g}" if vector.strength else "none"


def curve(task: Task, rows: Outcomes, sweep: Outcomes) -> list[float | None]:
    """Shares at strength 0 (the model alone) and at each of SWEEP."""
    name = task.instruction.id
    return [rows.of("none", name).followed, *(sweep.of(f"{each:g}", name).followed for each in SWEEP)]


def cosines(tasks: Sequence[Task]) -> list[Section]:
    """Whether the vectors of two words differ at all: mean cosine between words, by layer. Of two or more."""
    raw = [task.raw for task in tasks]
    if len(raw) < 2:
        return []
    layers = [il for il in range(raw[0].n_layer) if all(il in vector.usable_layers for vector in raw)]
    means = []
    for il in layers:
        units = np.stack([vector.unit(il).astype(np.float64) for vector in raw])
        means.append(float((units @ units.T)[np.triu_indices(len(raw), 1)].mean()))
    plot = Lines(
        title="Mean cosine between the vectors of two words",
        x_label="layer",
        y_label="cosine",
        x=layers,
        series={"words": means},
    )
    text = (
        "What the vectors of including different words have in common. At 1 they are one vector, that of "
        "being asked for a word at all; what makes the one word come is in what is left."
    )
    return [Section("How much of a vector is about its word", text, [], [plot])]
