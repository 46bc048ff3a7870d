"""The vector of each word, with settings picked on validation queries, and the queries it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.cells import Arm
from localsteer.evaluate.suites.word_choice import FORBIDDEN, contexts
from localsteer.extract.recipes import Extracted, exclude_word, include_word
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

STRENGTHS = (0.5, 1.0, 2.0)  # tried on validation queries
POSITIONS = ("prompt", "all")
MIN_HELD = 5  # queries whose reply holds a word; with fewer there is nothing to exclude, and all are asked
INCLUDE, CONTEXT, EXCLUDE, ASKED = "include", "exclude, in context", "exclude", "exclude, asked for"  # tasks


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


def tasks_of(bench: Bench, kind: str, words: Sequence[str]) -> list[Task]:
    """A vector for each word: from 20 examples, layer, positions and strength picked on validation."""
    recipes = [RECIPES[kind](bench, word) for word in words]
    told = [Extracted(_own(recipe.target)) for recipe in recipes if kind in (CONTEXT, EXCLUDE)]
    raw = bench.vectors.extract([*recipes, *told])
    picked = _pick(bench, [recipe.target for recipe in (*recipes, *told)], raw)
    tasks = []
    for word, recipe in zip(words, recipes, strict=True):
        name, own = recipe.target.id, picked.get(_own(recipe.target).id)
        tasks.append(Task(kind, word, recipe.target, raw[name], picked[name], own))
    return tasks


def mean_cosines(tasks: Sequence[Task]) -> dict[int, float]:
    """Whether the vectors of two words differ at all: mean cosine between words, by layer. Of two or more."""
    raw = [task.raw for task in tasks]
    layers = [il for il in range(raw[0].n_layer) if all(il in vector.usable_layers for vector in raw)]
    means = {}
    for il in layers:
        units = np.stack([vector.unit(il).astype(np.float64) for vector in raw])
        means[il] = float((units @ units.T)[np.triu_indices(len(raw), 1)].mean())
    return means


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
    replies = zip(queries, bench.plain(queries), strict=True)
    return [query for query, row in replies if not verify(FORBIDDEN, row.reply.text, target.kwargs)]


def asked_for(bench: Bench, word: str) -> Extracted:
    """Minus the vector of including a word, for queries that ask for it: these make a model use a word that
    it would not use by itself, and steering has to win against the prompt."""
    recipe = exclude_word(bench.catalog, word)
    queries = {"validation": bench.validation, "test": bench.test}
    told = [Arm("told", told=True)]
    asking = {
        split: tuple(
            replace(cell.query, text=cell.prompt)
            for cell in bench.experiment(recipe.instruction, told, plain).cells(bench.max_tokens)
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
    picked = _pick(bench, [recipe.target], bench.vectors.extract([recipe]))
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
    picks = bench.vectors.tune([(each, raw[each.id]) for each in new], by_generation=True, **modes)
    used = {each.id: bench.vectors.use(each, tuned.vector) for each, tuned in zip(new, picks, strict=True)}
    return {name: vector for name, vector in raw.items() if name in bench.given} | used
