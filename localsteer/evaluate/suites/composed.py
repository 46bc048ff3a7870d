"""Two instructions that are steered together: which two, and the layers that their vectors are put at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.cells import Arm, Experiment, label_of
from localsteer.evaluate.controls import is_possible
from localsteer.evaluate.outcomes import Outcome, Outcomes
from localsteer.evaluate.suites.word_choice import contexts, words_to_exclude, words_used
from localsteer.evaluate.suites.word_vectors import excluding
from localsteer.tune.setting import FEW_LAYERS
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

PAIRS = (
    ("json", "one_sentence"), ("lowercase", "one_sentence"), ("uppercase", "one_sentence"),
    ("title", "five_sentences"), ("lowercase", "no_comma"),
)  # fmt: skip
CASE = "lowercase"  # goes with the word to avoid
POSITIONS = ("prompt", "all")
N_TRIED = 6  # validation queries for each arrangement
Way = tuple[ControlVector, ControlVector]  # two vectors, each where it is applied


@dataclass(frozen=True)
class Composed:
    """Two instructions, and their vectors as each was picked alone. layers: the arrangements chosen."""

    instructions: tuple[Instruction, Instruction]
    alone: tuple[ControlVector, ControlVector]
    same: tuple[ControlVector, ...] = ()
    different: tuple[ControlVector, ...] = ()

    @property
    def label(self) -> str:
        return label_of(self.instructions)

    def queries(self, bench: Bench, split: str) -> tuple[Query, ...]:
        """Those of an instruction that has its own, else those of all."""
        first, second = self.instructions
        return bench.queries(second if split in second.queries else first, split)

    def experiment(self, bench: Bench, arms: Sequence[Arm], queries: Sequence[Query]) -> Experiment:
        wording = " ".join(instruction.phrasings[0] for instruction in self.instructions)
        return bench.experiment(self.instructions, arms, queries, wordings=[wording])


# --- which pairs -------------------------------------------------------------------------------------------


def pairs_of(bench: Bench) -> list[Composed]:
    """`named_pairs`, and a case with a word to exclude."""
    named = named_pairs(bench)
    vectors = bench.vectors.tuned(list(dict.fromkeys(name for pair in named for name in pair)))
    pairs = [
        Composed((bench.instruction(a), bench.instruction(b)), (_on(vectors[a]), _on(vectors[b])))
        for a, b in named
    ]
    return [*pairs, *_case_and_word(bench)]


def named_pairs(bench: Bench) -> list[tuple[str, str]]:
    """PAIRS of which the catalogue, or what was asked for, has both."""
    known = set(bench.catalog.instructions if bench.asked is None else bench.asked)
    return [pair for pair in PAIRS if set(pair) <= known]


def case_words(bench: Bench) -> list[str] | None:
    """The words that may go with the case: those asked for, or that the catalogue's own queries bring. Empty:
    there is no such pair. None: one that the model's own replies use."""
    known = bench.catalog.instructions
    if CASE not in (known if bench.asked is None else bench.asked) or "exclude_word" not in known:
        return []
    brought = list(contexts(bench))
    if bench.asked is not None:
        return [*brought, *words_to_exclude(bench)]
    return brought or None


def _case_and_word(bench: Bench) -> Iterator[Composed]:
    """Of words that replies use, one that they use without the case and with it: a case may change what is
    said."""
    words = case_words(bench)
    if words == []:
        return
    case = bench.instruction(CASE)
    cased = _on(bench.vectors.tuned([case])[CASE])
    if words is None:
        steered = dict(words_used(bench, cased))
        plain = sorted(words_used(bench), key=lambda item: -min(item[1], steered.get(item[0], 0.0)))
        words = [word for word, _ in plain]
    for used in words[:1]:
        word, vector = excluding(bench, used)
        yield Composed((case, word), (cased, _on(vector)))


def _on(vector: ControlVector) -> ControlVector:
    """A vector that did nothing alone is tried at full strength beside another."""
    return vector if vector.strength else vector.at(strength=1.0)


# --- arrangements ------------------------------------------------------------------------------------------


def choose(bench: Bench, pairs: Sequence[Composed]) -> list[Composed]:
    """Each pair with the arrangements of both kinds whose replies to validation queries are best."""
    ways = {pair.label: arrangements(*pair.alone) for pair in pairs}
    asked = [
        pair.experiment(
            bench,
            [Arm("tried", way) for way in ways[pair.label]],
            pair.queries(bench, "validation")[:N_TRIED],
        )
        for pair in pairs
    ]
    rows = bench.run(asked, what="choosing layers", score=False)
    best = {
        label: [_best(own, rows.of(None, label), same) for same in (True, False)]
        for label, own in ways.items()
    }
    return [
        replace(pair, same=same, different=different)
        for pair in pairs
        for same, different in [best[pair.label]]
    ]


def _best(ways: Sequence[Way], rows: Outcomes, same: bool) -> Way | tuple[()]:
    """Of those at one layer (same) or at two; rows: of each way, equally many."""
    size = len(rows) // max(len(ways), 1)
    scores = {
        way: sum(map(_is_good, rows[k * size : (k + 1) * size]))
        for k, way in enumerate(ways)
        if (way[0].layers == way[1].layers) == same
    }
    return max(scores, key=scores.__getitem__, default=())


def arrangements(a: ControlVector, b: ControlVector) -> list[Way]:
    """The layers around those that each was tuned to, in all combinations, at the same positions; without
    what a plan refuses (nearly parallel directions at one layer). At their own strengths and at 1: one that
    suits a vector alone may be too much beside another."""
    usable = set(a.usable_layers) & set(b.usable_layers)
    layers = [(il, il) for il in sorted({*_around(a), *_around(b)}) if il in usable]
    layers += [(i, j) for i, j in product(_around(a), _around(b)) if i != j]
    pairs = [
        (a.at(layer=i, positions=positions, strength=s), b.at(layer=j, positions=positions, strength=t))
        for s, t in dict.fromkeys([(a.strength, b.strength), (1.0, 1.0)])
        for positions in POSITIONS
        for i, j in layers
    ]
    return [pair for pair in pairs if is_possible(pair)]


def _around(vector: ControlVector) -> list[int]:
    step = 1 if vector.n_layer <= FEW_LAYERS else 2
    return [il for il in (vector.layers[0] + k * step for k in (-1, 0, 1)) if il in vector.usable_layers]


def _is_good(row: Outcome) -> bool:
    return bool(row.strict) and row.subject_kept is not False
