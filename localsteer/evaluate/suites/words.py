"""Words that replies should hold, and words that they should not.

The paper's section 5: a vector of each word from 20 examples, added; minus the vector of including a word
excludes it. A word can be excluded only where replies hold it, so three kinds of words are tried: words that
the catalogue has queries for, which bring the word without naming it; the words that this model's own replies
to validation queries use most; and words that can be included, in replies to prompts that ask for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError
from localsteer.evaluate.conditions import arms_of, controls_of, told_prompts
from localsteer.evaluate.page import Lines, Section, SuiteReport, Table, Value
from localsteer.evaluate.suites.cells import (
    Arm,
    Cell,
    Result,
    accuracy_of,
    applied,
    grouped,
    select,
    share_of,
)
from localsteer.extract.recipes import WORD_PAIRS, Extracted, exclude_word, include_word
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.evaluate.suites.bench import Bench

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
STRENGTHS = (0.5, 1.0, 2.0)  # tried on validation queries
SWEEP = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the picked strength's block and positions
POSITIONS = ("prompt", "all")
INCLUDED = ("music", "river", "winter", "garden", "mirror")  # where the catalogue names no words
N_EXCLUDED = 4
MIN_LETTERS = 3
EXISTENCE, FORBIDDEN = "keywords:existence", "keywords:forbidden_words"
MIN_HELD = 5  # queries whose reply holds a word; with fewer there is nothing to exclude, and all are asked
INCLUDE, CONTEXT, EXCLUDE, ASKED = "include", "exclude, in context", "exclude", "exclude, asked for"  # tasks
_COMMON = """
about after also and any are because been before being between but can could did does each for from
get had has have her here him his how into its just like made make many may more most much must not
now off one only other our out over own she should some such than that the their them then there
these they this those through too under upon use used very was were what when where which while who
will with would you your near often every
"""
COMMON = frozenset(_COMMON.split())  # words of grammar: a reply without one of them is another kind of text


@dataclass(frozen=True)
class Task:
    """One word, with the vector that was picked for it. kind: INCLUDE; EXCLUDE; CONTEXT, where the catalogue
    has queries that bring the word; ASKED, where the prompts ask for the word that replies should not hold.
    own: the vector of the instruction in its own words, for a word to exclude, or None."""

    kind: str
    word: str
    instruction: Instruction
    raw: ControlVector
    vector: ControlVector
    own: ControlVector | None = None


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
    cells = [cell for task in tasks for cell in task_cells(bench, task, tasks)]
    results = bench.run(cells, what="including and excluding words")
    cells = [cell for task in tasks for cell in sweep_cells(bench, task)]
    sweep = bench.run(cells, what="sweeping strengths", score=False)
    by_kind = {kind: [task for task in tasks if task.kind == kind] for kind in TEXTS}
    sections = [section(kind, own, results, sweep) for kind, own in by_kind.items() if own]
    return bench.report(TITLE, results, CONDITIONS, [*sections, *cosines(by_kind[INCLUDE])])


# --- which words -------------------------------------------------------------------------------------------


def words_to_include(bench: Bench) -> list[str]:
    """Those asked for; else those of the catalogue's instructions to include a word, or those of INCLUDED
    that the model's own replies do not use anyway."""
    named = _named(bench, EXISTENCE, "keywords")
    if named or bench.asked is not None:
        return named
    used = dict(words_used(bench))
    return [word for word in INCLUDED if word not in used]


def words_to_exclude(bench: Bench) -> list[str]:
    """Those asked for, else the words that the model's own replies use most; none of `contexts`."""
    brought = contexts(bench)
    if bench.asked is not None:
        return [word for word in _named(bench, FORBIDDEN, "forbidden_words") if word not in brought]
    return [word for word, _ in words_used(bench) if word not in brought][:N_EXCLUDED]


def contexts(bench: Bench) -> dict[str, Instruction]:
    """The instructions to avoid one word for which the catalogue has queries of their own, by word: these
    queries bring the word into replies. Those asked for, if any were."""
    avoided = _of_one_word(bench, FORBIDDEN, "forbidden_words")
    return {word: each for word, each in avoided if {"validation", "test"} <= each.queries.keys()}


def words_used(bench: Bench, *steer: ControlVector) -> list[tuple[str, float]]:
    """(word, share of the validation replies that use it), the most used first; no words of grammar, of the
    queries, or of less than three letters. steer: nothing for the model's own replies."""
    cells = [
        Cell("plain", "none", query, query.text, steer, max_tokens=bench.max_tokens)
        for query in bench.validation
    ]
    counts: Counter[str] = Counter()
    for result in bench.run(cells, what="asking", score=False):
        counts.update(set(_words(result.reply.text)) - set(_words(result.cell.query.text)))
    return [
        (word, n / len(cells)) for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _words(text: str) -> list[str]:
    return [
        word
        for word in re.findall(r"[^\W\d_]+", text.lower())
        if len(word) >= MIN_LETTERS and word not in COMMON
    ]


def _named(bench: Bench, verifier: str, argument: str) -> list[str]:
    return list(dict.fromkeys(word for word, _ in _of_one_word(bench, verifier, argument)))


def _of_one_word(bench: Bench, verifier: str, argument: str) -> list[tuple[str, Instruction]]:
    """The instructions asked for, or those of the catalogue that are ready for use, with their word."""
    if bench.asked is not None:
        known = [bench.instruction(each) for each in bench.asked]
    else:
        known = [
            instruction for instruction in bench.catalog.instructions.values() if not instruction.open_slots
        ]
    of_one = [each for each in known if each.verifier == verifier and len(each.kwargs[argument]) == 1]
    return [(each.kwargs[argument][0], each) for each in of_one]


# --- vectors -----------------------------------------------------------------------------------------------


def tasks_of(bench: Bench, kind: str, words: Sequence[str]) -> list[Task]:
    """A vector for each word: from 20 examples, block, positions and strength picked on validation."""
    recipes = [RECIPES[kind](bench, word) for word in words]
    told = [Extracted(_own(recipe.target)) for recipe in recipes if kind in (CONTEXT, EXCLUDE)]
    raw = bench.extract([*recipes, *told])
    picked = _pick(bench, [recipe.target for recipe in (*recipes, *told)], raw)
    tasks = []
    for word, recipe in zip(words, recipes, strict=True):
        name, own = recipe.target.id, picked.get(_own(recipe.target).id)
        tasks.append(Task(kind, word, recipe.target, raw[name], picked[name], own))
    return tasks


def in_replies(bench: Bench, word: str) -> Extracted:
    """Minus the vector of including a word, for the queries whose unsteered reply holds it."""
    return _where_held(bench, exclude_word(bench.catalog, word), bench.validation, bench.all_test)


def in_context(bench: Bench, word: str) -> Extracted:
    """As `in_replies`, for the queries that the catalogue has for this word. The vector itself is the given
    one, or comes from the queries that are everybody's: none of these brings the word."""
    recipe, own = exclude_word(bench.catalog, word), contexts(bench)[word]
    name = recipe.target.id
    target = replace(
        recipe.target, id=name if name in bench.given else f"{name}:context", queries=own.queries
    )
    recipe = replace(recipe, excludes=target)
    return _where_held(bench, recipe, own.queries["validation"], own.queries["test"])


def _where_held(
    bench: Bench, recipe: Extracted, validation: Sequence[Query], test: Sequence[Query]
) -> Extracted:
    held = {"validation": validation, "test": test}
    kept = {split: _holding(bench, recipe.target, queries) for split, queries in held.items()}
    if min(map(len, kept.values())) >= MIN_HELD:
        held = kept
    extraction = bench.catalog.queries_for(recipe.target, "extraction")
    queries = {"extraction": extraction, **{split: tuple(kept) for split, kept in held.items()}}
    return replace(recipe, excludes=replace(recipe.target, queries=queries))


def _holding(bench: Bench, target: Instruction, queries: Sequence[Query]) -> list[Query]:
    """Those of the queries whose unsteered reply holds the word."""
    cells = [Cell("plain", "none", query, query.text, max_tokens=bench.max_tokens) for query in queries]
    replies = zip(queries, bench.run(cells, what="asking", score=False), strict=True)
    return [query for query, result in replies if not verify(FORBIDDEN, result.reply.text, target.kwargs)]


def asked_for(bench: Bench, word: str) -> Extracted:
    """Minus the vector of including a word, for queries that ask for it: these make a model use a word that
    it would not use by itself, and steering has to win against the prompt."""
    recipe = exclude_word(bench.catalog, word)
    queries = {"validation": bench.validation, "test": bench.test}
    asking = {
        split: tuple(
            replace(query, text=text)
            for query, text in zip(plain, told_prompts(plain, recipe.instruction.phrasings), strict=True)
        )
        for split, plain in queries.items()
    }
    return replace(recipe, excludes=replace(recipe.target, id=f"{recipe.target.id}:asked", queries=asking))


RECIPES: dict[str, Callable[[Bench, str], Extracted]] = {
    INCLUDE: lambda bench, word: include_word(bench.catalog, word),
    CONTEXT: in_context,
    EXCLUDE: in_replies,
    ASKED: asked_for,
}


def excluding(bench: Bench, word: str) -> tuple[Instruction, ControlVector]:
    """The instruction to avoid one word and minus the vector of including it, picked as the suite does."""
    recipe = (in_context if word in contexts(bench) else in_replies)(bench, word)
    picked = _pick(bench, [recipe.target], bench.extract([recipe]))
    return recipe.target, picked[recipe.target.id]


def _own(instruction: Instruction) -> Instruction:
    """The instruction to avoid a word, under another name than minus the vector of including it."""
    return replace(instruction, id=f"told_{instruction.id}")


def _pick(
    bench: Bench, instructions: Sequence[Instruction], raw: Mapping[str, ControlVector]
) -> dict[str, ControlVector]:
    new = [instruction for instruction in instructions if instruction.id not in bench.given]
    # nearly any reply avoids a word, so the likelihood of one that does tells little: hence by_generation
    modes = {"modes": ("add",), "positions": POSITIONS, "strengths": STRENGTHS}
    picks = bench.tune([(each, raw[each.id]) for each in new], by_generation=True, **modes)
    used = {each.id: bench.use(each, tuned.vector) for each, tuned in zip(new, picks, strict=True)}
    return {name: vector for name, vector in raw.items() if name in bench.given} | used


# --- cells -------------------------------------------------------------------------------------------------


def task_cells(bench: Bench, task: Task, tasks: Sequence[Task]) -> list[Cell]:
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
    return bench.cells(task.instruction, arms_of(steers, CONDITIONS), wordings=task.instruction.phrasings[:1])


def sweep_cells(bench: Bench, task: Task) -> list[Cell]:
    strengths = SWEEP if task.vector.strength else ()
    arms = [Arm(f"{strength:g}", (task.vector.at(strength=strength),)) for strength in strengths]
    return bench.cells(task.instruction, arms, wordings=task.instruction.phrasings[:1])


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
        "the block, positions and strength that did best on validation queries. `other` is another word's "
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


def section(kind: str, tasks: Sequence[Task], results: Sequence[Result], sweep: Sequence[Result]) -> Section:
    """tasks: at least one of this kind. sweep: results at each strength."""
    title, text = TEXTS[kind]
    idle = [task.word for task in tasks if not task.vector.strength]
    if idle:
        text += f" No setting did better than the model alone for {', '.join(idle)}: nothing was applied."
    names = {task.instruction.id for task in tasks}
    own = [result for result in results if result.cell.instruction in names]
    present = {result.cell.condition for result in own}
    conditions = [name for name in CONDITIONS if name in present]
    rows: list[list[Value]] = [
        [task.word, _settings(task), *_shares(select(own, None, task.instruction.id), conditions)]
        for task in tasks
    ]
    rows.append(["all", "", *_shares(own, conditions)])
    series = {task.word: curve(task, results, sweep) for task in tasks if task.vector.strength}
    plot = Lines(
        title=f"{title} against strength",
        x_label="strength (c / |v|)",
        y_label="share of replies",
        x=[0.0, *SWEEP],
        series=series,
    )
    table = Table(["word", "block, positions, strength", *conditions], rows)
    return Section(title, text, [table], [plot] if series else [])


def _shares(results: Sequence[Result], conditions: Sequence[str]) -> list[Value]:
    by_condition = grouped(results, "condition")
    return [share_of(by_condition[name,]) if (name,) in by_condition else None for name in conditions]


def _settings(task: Task) -> str:
    vector = task.vector
    return f"{vector.layers[0]}, {vector.positions}, {vector.strength:g}" if vector.strength else "none"


def curve(task: Task, results: Sequence[Result], sweep: Sequence[Result]) -> list[float | None]:
    """Shares at strength 0 (the model alone) and at each of SWEEP."""
    name = task.instruction.id
    swept = (accuracy_of(select(sweep, f"{strength:g}", name)) for strength in SWEEP)
    return [accuracy_of(select(results, "none", name)), *swept]


def cosines(tasks: Sequence[Task]) -> list[Section]:
    """Whether the vectors of two words differ at all: mean cosine between words, by block. Of two or more."""
    raw = [task.raw for task in tasks]
    if len(raw) < 2:
        return []
    blocks = [il for il in range(raw[0].n_layer) if all(il in vector.usable_layers for vector in raw)]
    means = []
    for il in blocks:
        units = np.stack([vector.unit(il).astype(np.float64) for vector in raw])
        means.append(float((units @ units.T)[np.triu_indices(len(raw), 1)].mean()))
    plot = Lines(
        title="Mean cosine between the vectors of two words",
        x_label="block",
        y_label="cosine",
        x=blocks,
        series={"words": means},
    )
    text = (
        "What the vectors of including different words have in common. At 1 they are one vector, that of "
        "being asked for a word at all; what makes the one word come is in what is left."
    )
    return [Section("How much of a vector is about its word", text, [], [plot])]
