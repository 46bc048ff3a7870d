"""What is asked: an experiment compares arms, and is asked as cells, one reply each.

arms = [Arm("none"), Arm("steered", (vector,)), Arm("instructed", told=True)]
cells = Experiment([json], arms, queries).cells(max_tokens=64)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localsteer.catalog import Instruction, Query
from localsteer.vector import ControlVector

CONDITIONS = ("none", "steered", "random", "other", "instructed", "both")
TOLD = ("told", "instructed", "both", "best and told")  # conditions with the instruction in the prompt


@dataclass(frozen=True)
class Rule:
    """One verifier with its arguments, ids and names as IFEval writes them."""

    verifier: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One reply that is wanted.

    instruction: label of its row, an id or `json + one_sentence`. condition: its column. query: the base
    query, without any instruction; a perplexity is that of the reply after it. prompt: what is sent. steer:
    vectors with their settings applied. checks: the reply follows when all of them pass; none: nothing can
    be said. wording: the instruction in words, for a judge.
    """

    instruction: str
    condition: str
    query: Query
    prompt: str
    steer: tuple[ControlVector, ...] = ()
    checks: tuple[Rule, ...] = ()
    max_tokens: int = 512
    wording: str = ""

    @property
    def request(self) -> tuple[int, str, tuple[ControlVector, ...]]:
        """Cells of the same one have the same reply."""
        return self.max_tokens, self.prompt, self.steer


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment. told: the instruction stands in the prompt, its phrasings in turn."""

    condition: str
    steer: tuple[ControlVector, ...] = ()
    told: bool = False


@dataclass(frozen=True)
class Experiment:
    """Instructions that are asked for together (mostly one), and the arms that are compared on the queries.

    phrasings: in place of the instruction's own, for one. wordings: what a judge is asked by, in turn, in
    place of the phrasings. by_query: all arms of a query together, not all queries of an arm.
    """

    instructions: Sequence[Instruction]
    arms: Sequence[Arm]
    queries: Sequence[Query]
    phrasings: Sequence[str] | None = None
    wordings: Sequence[str] | None = None
    by_query: bool = False

    @property
    def label(self) -> str:
        """`json + one_sentence`."""
        return label_of(self.instructions)

    def cells(self, max_tokens: int) -> list[Cell]:
        """One for each arm and query. Of several instructions all have to be followed."""
        told = self._told()
        wordings = self.wordings or told
        places = [(arm, i) for arm in self.arms for i in range(len(self.queries))]
        if self.by_query:
            places.sort(key=lambda place: place[1])
        return [
            Cell(
                instruction=self.label,
                condition=arm.condition,
                query=query,
                prompt=f"{query.text} {told[i]}" if arm.told else query.text,
                steer=arm.steer,
                checks=tuple(rule for each in self.instructions for rule in checks_of(each, query)),
                max_tokens=max_tokens,
                wording=wordings[i % len(wordings)],
            )
            for arm, i in places
            for query in [self.queries[i]]
        ]

    def _told(self) -> list[str]:
        """What stands after each query, in the arms that are told."""
        turns = [self.phrasings] if self.phrasings else [each.phrasings for each in self.instructions]
        return [" ".join(texts[i % len(texts)] for texts in turns) for i in range(len(self.queries))]


def arms_of(steers: Mapping[str, Sequence[ControlVector]], conditions: Sequence[str]) -> list[Arm]:
    """Of the conditions that have an entry in `steers`, in order. Those in TOLD are told."""
    return [Arm(name, tuple(steers[name]), told=name in TOLD) for name in conditions if name in steers]


def label_of(instructions: Sequence[Instruction]) -> str:
    return " + ".join(instruction.id for instruction in instructions)


def checks_of(instruction: Instruction, query: Query) -> tuple[Rule, ...]:
    """The instruction's verifier for replies to this query; none where it has none."""
    if instruction.verifier is None:
        return ()
    return (Rule(instruction.verifier, instruction.kwargs_for(query.text)),)


def applied(vector: ControlVector) -> tuple[ControlVector, ...]:
    """An arm's `steer`: nothing where no setting was better than the plain model (strength 0)."""
    return (vector,) if vector.strength else ()
