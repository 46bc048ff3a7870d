"""The sections of the report on words: a table and a curve for each kind of word, and how alike the vectors
are."""

from __future__ import annotations

from collections.abc import Sequence

from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Lines, Section, Table, Value
from localsteer.evaluate.suites.word_vectors import ASKED, CONTEXT, EXCLUDE, INCLUDE, Task, mean_cosines
from localsteer.evaluate.texts import said, section
from localsteer.extract.recipes import WORD_PAIRS

SWEEP = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the picked strength's layer and positions
# the sections, each with its passage in texts.toml
SECTIONS = {INCLUDE: "include", CONTEXT: "context", EXCLUDE: "exclude", ASKED: "asked"}


def of_kind(
    kind: str, tasks: Sequence[Task], conditions: Sequence[str], rows: Outcomes, sweep: Outcomes
) -> Section:
    """tasks: at least one of this kind. conditions: in the order of the columns. sweep: rows at each
    strength."""
    names = {task.instruction.id for task in tasks}
    own = Outcomes(row for row in rows if row.cell.instruction in names)
    conditions = [name for name in conditions if own.of(name)]
    table: list[list[Value]] = [
        [task.word, _settings(task), *own.of(None, task.instruction.id).shares(conditions)] for task in tasks
    ]
    table.append(["all", "", *own.shares(conditions)])
    series = {task.word: curve(task, own, sweep) for task in tasks if task.vector.strength}
    idle = ", ".join(task.word for task in tasks if not task.vector.strength)
    made = section(
        f"words.{SECTIONS[kind]}",
        Table(["word", "layer, positions, strength", *conditions], table),
        pairs=WORD_PAIRS,
        conditions=said("words.conditions", pairs=WORD_PAIRS),
        more=said("words.idle", words=idle) if idle else "",
    )
    if series:
        title, x = f"{made.title} against strength", [0.0, *SWEEP]
        made.plots.append(Lines(title, "strength (c / |v|)", "share of replies", x=x, series=series))
    return made


def _settings(task: Task) -> str:
    vector = task.vector
    return f"{vector.layers[0]}, {vector.positions}, {vector.strength:g}" if vector.strength else "none"


def curve(task: Task, rows: Outcomes, sweep: Outcomes) -> list[float | None]:
    """Shares at strength 0 (the plain model) and at each of SWEEP."""
    name = task.instruction.id
    return [rows.of("none", name).followed, *(sweep.of(f"{step:g}", name).followed for step in SWEEP)]


def cosines(tasks: Sequence[Task]) -> list[Section]:
    if len(tasks) < 2:
        return []
    means, title = mean_cosines(tasks), "Mean cosine between the vectors of two words"
    plot = Lines(title, "layer", "cosine", x=list(means), series={"words": list(means.values())})
    return [section("words.cosines", plot)]
