"""What is evaluated: instructions of a catalogue, and which of its queries. Asks no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localsteer.catalog import Catalog, Instruction, Query, spread
from localsteer.errors import CatalogError, LocalsteerError, VectorFileError
from localsteer.evaluate.runner import Key, Stage, silent
from localsteer.extract.levels import DIRECTIONS, length
from localsteer.extract.vector_instruction import instruction_of
from localsteer.vector import ControlVector


@dataclass(frozen=True)
class EvalLimits:
    """How long prompts and replies may be, in tokens. must_end: a reply that is cut at max_tokens is
    degenerate, because the limit leaves ample room."""

    n_ctx: int | None = None
    max_tokens: int = 512
    must_end: bool = False
    n_seq_max: int = 8


BUNDLED_LIMITS = EvalLimits(
    n_ctx=256,  # the longest prompt and reply of the bundled model together stay below 160
    max_tokens=112,  # the longest reply in its training has 80
    must_end=True,
    n_seq_max=8,  # more sequences pay more for each other's cells in the shared cache than they save
)


@dataclass(frozen=True)
class BenchOptions:
    """n: test queries. given: vectors of the user, with their settings. shipped: vectors with settings that
    are used for their instructions, and leave open which are evaluated. wanted: ids to evaluate (None: the
    suite's own choice). test: queries in place of the catalogue's. checkpoint: a transformers folder to
    extract from with PyTorch, in place of the model itself. batch: of the Runner. stage: gives a progress bar
    for a piece of work."""

    n: int = 20
    seed: int = 0
    limits: EvalLimits = field(default_factory=EvalLimits)
    given: Sequence[tuple[Path, ControlVector]] = ()
    shipped: Sequence[tuple[Path, ControlVector]] = ()
    wanted: Sequence[str] | None = None
    test: Sequence[Query] | None = None
    checkpoint: Path | None = None
    batch: Key | None = None
    stage: Stage = silent


class BenchScope:
    """validation, test: queries of the catalogue; `queries(instruction, split)` knows an instruction's own.
    all_test: the test queries that `test` is n of. given: vectors of the user by instruction id. ready: these
    and the shipped ones. files: of all those. known: instructions that are not the catalogue's, or are
    varied, by id."""

    def __init__(self, catalog: Catalog, options: BenchOptions) -> None:
        self.catalog, self.n, self.seed = catalog, options.n, options.seed
        self.wanted = None if options.wanted is None else list(dict.fromkeys(options.wanted))
        self.validation = tuple(catalog.queries.get("validation", ()))
        self.all_test = self._test_queries(options.test)
        self.test = tuple(spread(self.all_test, self.n))
        self.known: dict[str, Instruction] = {}
        self.given: dict[str, ControlVector] = {}
        self.files: dict[str, Path] = {}
        for path, vector in options.given:
            instruction = instruction_of(vector, catalog, path)
            if instruction.id in self.given:
                raise VectorFileError(
                    f"two vectors of {instruction.id!r} are given, {path} the second: give one."
                )
            self.given[instruction.id], self.files[instruction.id] = vector, path
            self.known[instruction.id] = instruction
        self.ready = dict(self.given)
        for path, vector in options.shipped:
            name = instruction_of(vector, catalog, path).id
            self.ready.setdefault(name, vector)
            self.files.setdefault(name, path)

    def instruction(self, wanted: str | Instruction) -> Instruction:
        """By id: of a given vector, a direction of length, else of the catalogue, slots at their defaults.
        Raises CatalogError."""
        if isinstance(wanted, Instruction):
            return wanted
        if wanted in DIRECTIONS and wanted not in self.known:
            return length(self.catalog, wanted).target
        return self.known.get(wanted) or self.catalog.get(wanted)

    @property
    def asked(self) -> list[str] | None:
        """The ids that were asked for, else those of the given vectors; None: a suite's own choice."""
        return self.wanted if self.wanted is not None else list(self.given) or None

    def wording(self, label: str) -> str | None:
        """The instruction of a row in words, for a judge: `json + one_sentence` is two of them."""
        try:
            return " ".join(self.instruction(name).phrasings[0] for name in label.split(" + "))
        except CatalogError:
            return None

    def instructions(self, groups: Sequence[str]) -> list[Instruction]:
        """The ones asked for; else those of the given vectors; else the catalogue's of these groups that have
        a verifier and need no slot. Raises CatalogError for one without a verifier, and for none."""
        if self.asked is None:
            known = (one for one in self.catalog.instructions.values() if one.group in groups)
            usable = [one.fill() for one in known if one.verifier and not lacks_slots(one)]
            if not usable:
                raise CatalogError(
                    f"no instruction of {self.catalog.source} in {' or '.join(groups)} has a verifier, so "
                    "nothing tells whether replies follow: give one (`verifier = ...`), or another --catalog."
                )
            return usable
        return [verifiable(self.instruction(name)) for name in self.asked]

    def queries(self, instruction: Instruction, split: str) -> tuple[Query, ...]:
        """Validation or test queries of an instruction: its own, or those of all. Test: at most n."""
        own = instruction.queries.get(split, ())
        if not own:
            return self.test if split == "test" else self.validation
        return tuple(spread(own, min(self.n, len(own)))) if split == "test" else tuple(own)

    def _test_queries(self, given: Sequence[Query] | None) -> tuple[Query, ...]:
        queries = tuple(given if given is not None else self.catalog.queries.get("test", ()))
        for split, own in (("validation", self.validation), ("test", queries)):
            if not own:
                raise CatalogError(f"{self.catalog.source} has no {split} queries: add some.")
        if not 1 <= self.n <= len(queries):
            raise LocalsteerError(
                f"n must be 1 to {len(queries)}, the number of test queries, not {self.n}: give a smaller "
                "one, or more queries."
            )
        if given is not None:
            _refuse_overlap(queries, self.catalog)
        return queries


def verifiable(instruction: Instruction) -> Instruction:
    """The same. Raises CatalogError for one without a verifier."""
    if instruction.verifier is None:
        raise CatalogError(
            f"{instruction.id!r} has no verifier, so nothing tells whether a reply follows it: name one in "
            "the catalogue (`verifier = ...`), or leave it out."
        )
    return instruction


def lacks_slots(instruction: Instruction) -> bool:
    """Whether there is a slot without a default."""
    return any(slot not in instruction.slots for slot in instruction.open_slots)


def _refuse_overlap(queries: Sequence[Query], catalog: Catalog) -> None:
    """Figures on queries that a vector or its settings were made with are worthless."""
    seen = {
        _plain_text(query.text): split
        for split in ("extraction", "validation")
        for query in catalog.queries.get(split, ())
    }
    for query in queries:
        if _plain_text(query.text) in seen:
            raise CatalogError(
                f"query {query.text!r} is to be a test query and is in {seen[_plain_text(query.text)]} of "
                f"{catalog.source} too: leave it out."
            )


def _plain_text(text: str) -> str:
    return " ".join(text.casefold().split())
