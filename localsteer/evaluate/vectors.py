"""The vectors of a bench: given, shipped, or extracted from its model, with settings picked on validation
queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, spread
from localsteer.evaluate.extraction import extract_all
from localsteer.evaluate.kept_vectors import KeptVectors
from localsteer.evaluate.outcomes import setting_of
from localsteer.evaluate.page import VectorRecord
from localsteer.evaluate.runner import Stage, told_replies
from localsteer.evaluate.scope import BenchScope
from localsteer.tune import DEFAULT_N as TUNE_QUERIES
from localsteer.tune import MAX_TOKENS as TUNE_TOKENS
from localsteer.tune import Tuned, tune, tune_exhaustively
from localsteer.tune.setting import grid_layers
from localsteer.vector import ControlVector
from localsteer.workers import Workers

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.extract.recipes import Extracted
    from localsteer.runtime.reply import Reply

N_TOLD = 6  # validation queries that show which instructions make a fair control


class BenchVectors:
    """source: what vectors are extracted from, the workers' own model or a checkpoint. all_raw, used: as
    extracted, and with settings, by instruction id. told: what the model says when told to follow them, to
    the first validation queries."""

    def __init__(
        self, scope: BenchScope, workers: Workers, folder: KeptVectors, checkpoint: Path | None, stage: Stage
    ) -> None:
        self.scope, self.workers, self.folder, self.stage = scope, workers, folder, stage
        self.source = checkpoint or workers
        self.max_tokens = folder.max_tokens
        self.all_raw, self.used = dict(scope.given), dict(scope.ready)
        self.told: dict[str, list[Reply]] = {}

    def tuned(self, instructions: Sequence[str | Instruction]) -> dict[str, ControlVector]:
        """With settings applied, by id: given or shipped, or else extracted, tuned and kept.

        Strength 0 where no setting did better than the plain model.
        """
        chosen = self.prepare(instructions)
        new = [instruction for instruction in chosen if instruction.id not in self.used]
        kept = {instruction.id: self.folder.tuned(instruction) for instruction in new}
        self.used |= {name: vector for name, vector in kept.items() if vector is not None}
        untuned = [instruction for instruction in new if kept[instruction.id] is None]
        results = self.tune([(instruction, self.all_raw[instruction.id]) for instruction in untuned])
        for instruction, result in zip(untuned, results, strict=True):
            self.used[instruction.id] = self.folder.save(instruction, result.vector)
        return {instruction.id: self.used[instruction.id] for instruction in chosen}

    def tune(
        self,
        pairs: Sequence[tuple[Instruction, ControlVector]],
        *,
        by_generation: bool = False,
        **options: Any,
    ) -> list[Tuned]:
        """Settings for this model of any vectors of these instructions, found on validation queries.
        options: of `localsteer.tune.tune`. by_generation: every setting of the paper's grid generates
        replies, where the likelihood of what the told model says tells little."""
        self.prepare([instruction for instruction, _ in pairs])
        options |= {
            "max_tokens": min(self.max_tokens, TUNE_TOKENS),
            "source": {"seconds": None},  # a run that goes on ends with the same files as an unbroken one
            "report": lambda _what, _done, _total: self.workers.check(),  # raises where the run is ended
        }

        def work(engine: Engine, pair: tuple[Instruction, ControlVector]) -> Tuned:
            instruction, vector = pair
            queries = self.scope.queries(instruction, "validation")
            if not by_generation:
                return tune(engine, vector, instruction, queries, seed=self.scope.seed, **options)
            few, layers = spread(queries, TUNE_QUERIES), grid_layers(vector.n_layer)
            return tune_exhaustively(engine, vector, instruction, few, layers=layers, **options)

        with self.stage("finding settings") as advance:
            return self.workers.map(work, pairs, advance) if pairs else []

    def raw(self, instructions: Sequence[str | Instruction]) -> dict[str, ControlVector]:
        """As extracted, no setting chosen. A given file comes with its own settings."""
        chosen = [self.scope.instruction(instruction) for instruction in instructions]
        missing = [instruction for instruction in chosen if instruction.id not in self.all_raw]
        vectors = {instruction.id: self.folder.raw(instruction) for instruction in missing}
        new = [instruction for instruction in missing if vectors[instruction.id] is None]
        with self.stage("extracting vectors") as advance:
            extracted = extract_all(self.source, new, self.scope.catalog, advance) if new else {}
        vectors |= {one.id: self.folder.save(one, extracted[one.id]) for one in new}
        self.all_raw |= vectors
        return {instruction.id: self.all_raw[instruction.id] for instruction in chosen}

    def extract(self, recipes: Sequence[Extracted]) -> dict[str, ControlVector]:
        """As `raw`, of lengths and words, by the id of what a vector makes the model do."""
        new = [recipe for recipe in recipes if recipe.target.id not in self.all_raw]

        def work(engine: Engine, recipe: Extracted) -> ControlVector:
            return recipe.extract(engine, self.scope.catalog.queries_for(recipe.instruction, "extraction"))

        with self.stage("extracting vectors") as advance:
            vectors = self.workers.map(work, new, advance) if new else []
        for recipe, vector in zip(new, vectors, strict=True):
            self.scope.known[recipe.target.id], self.all_raw[recipe.target.id] = recipe.target, vector
        return {recipe.target.id: self.all_raw[recipe.target.id] for recipe in recipes}

    def use(self, instruction: Instruction, vector: ControlVector) -> ControlVector:
        """Keep a vector with settings that a suite chose by itself; it is in `records` from now on."""
        self.scope.known[instruction.id] = instruction
        # its pairs may be another number than `raw` takes, so no later run may mistake it for its own
        self.used[instruction.id] = self.folder.save(instruction, vector, resumable=False)
        return self.used[instruction.id]

    def prepare(self, instructions: Sequence[str | Instruction]) -> list[Instruction]:
        """Raw vectors of these, and what the model says when told to follow them."""
        chosen = [self.scope.instruction(instruction) for instruction in instructions]
        self.scope.known |= {instruction.id: instruction for instruction in chosen}
        self.raw(chosen)
        new = [instruction for instruction in chosen if instruction.id not in self.told]

        def work(engine: Engine, instruction: Instruction) -> list[Reply]:
            queries = self.scope.validation[:N_TOLD]
            return told_replies(engine, instruction, queries, max_tokens=self.max_tokens)

        with self.stage("asking in words") as advance:
            told = self.workers.map(work, new, advance) if new else []
        self.told |= {instruction.id: replies for instruction, replies in zip(new, told, strict=True)}
        return chosen

    def records(self) -> dict[str, VectorRecord]:
        """For results.json: file hash and settings of every vector that was used, by instruction id."""
        return {
            name: VectorRecord(
                **setting_of(vector),
                sha256=self.folder.hash_of(name),
                source_sha256=vector.provenance.get("source_hash"),
                given=name in self.scope.ready,
            )
            for name, vector in self.used.items()
        }
