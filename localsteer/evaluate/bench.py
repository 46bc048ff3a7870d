"""One model under evaluation, for suites, studies and `demo`: its vectors, queries, controls, and the runner.

    with open_bench(path, catalog, out=Path("run")) as bench:
        report = suite("format").run(bench)

Vectors are the files that the user gave, or are extracted from this model on extraction queries and picked on
validation queries; figures come from test queries. Replies are kept in out/replies.jsonl and vectors in
out/vectors: a run that was stopped is started again from its beginning and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from localsteer.cache import file_hash, file_name
from localsteer.catalog import Catalog, Instruction, Query, alike
from localsteer.errors import (
    CatalogError,
    LocalsteerError,
    ModelFileError,
    PromptError,
    VectorFileError,
)
from localsteer.evaluate.cells import CONDITIONS, Arm, Cell, Experiment, applied, arms_of
from localsteer.evaluate.controls import choose_others, controls_of, mean_state
from localsteer.evaluate.outcomes import Outcome, Outcomes, report, setting_of
from localsteer.evaluate.page import Facts, Section, SuiteReport, VectorRecord
from localsteer.evaluate.results import unwritable
from localsteer.evaluate.runner import Key, Runner, Stage, plain_replies, silent, told_replies
from localsteer.evaluate.vectors import extract_all, find_setting, spread
from localsteer.extract.levels import DIRECTIONS, length
from localsteer.extract.vector_instruction import instruction_of
from localsteer.perplexity import log_scores
from localsteer.runtime.journal import Journal
from localsteer.vector import ControlVector, check_model
from localsteer.workers import Workers

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.model_judge import ModelJudge
    from localsteer.extract.recipes import Extracted
    from localsteer.runtime.reply import Reply
    from localsteer.tune import Tuned

PARTNERS = ("json", "lowercase", "title")  # a control needs other instructions, also where few are wanted
N_TOLD = 6  # validation queries that show which instructions make a fair control
N_CANDIDATES = 2  # of other instructions that the control `other` is drawn from, at least
BASE = "base"  # folder of the base model's run, within the model's
SMALL_MODEL = 256 << 20  # bytes of a file; below, an engine for each core, above, one with all cores
DIGEST = "eval_digest"  # of a kept vector's provenance: what it was extracted from


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


@contextmanager
def open_bench(
    path: Path,
    catalog: Catalog,
    out: Path,
    *,
    limits: EvalLimits | None = None,
    n_threads: int | None = None,
    base: Path | None = None,
    **options: Any,
) -> Iterator[Bench]:
    """A Bench on a GGUF, closed when the layer ends. base: its base model, for cross-model: a bench of its
    own in out/base. options: of Bench.

    Raises LocalsteerError when `out` holds another model's run.
    """
    limits = limits or EvalLimits()
    with ExitStack() as stack:
        workers = _open_workers(stack, path, out, limits, n_threads)
        bench = Bench(workers, catalog, out, limits=limits, **options)
        if base is not None:
            # a base model is asked as the paper asks one
            workers = _open_workers(stack, base, out / BASE, limits, n_threads, plain_prompts=True)
            bench.base = Bench(workers, catalog, out / BASE, limits=limits, **{**options, "given": ()})
        yield bench


@contextmanager
def open_judge(path: Path, bench: Bench, *, n_threads: int | None = None) -> Iterator[ModelJudge]:
    """Another local model, to judge this bench's replies; what it says is kept in out/judge-NAME.

    Raises PromptError, before anything is asked, for one whose vocabulary can't spell the question."""
    from localsteer.evaluate.model_judge import ModelJudge, check_judge

    with ExitStack() as stack:
        workers = _open_workers(stack, path, bench.out / f"judge-{path.stem}", EvalLimits(), n_threads)
        workers.map(lambda engine, _: check_judge(engine), [None])
        name = workers.map(lambda engine, _: model_info(engine), [None])[0]["name"]
        yield ModelJudge(workers, name, bench.wording)


def _open_workers(
    stack: ExitStack, path: Path, out: Path, limits: EvalLimits, n_threads: int | None, **more: Any
) -> Workers:
    from localsteer.runtime.bridge import default_threads

    if not path.is_file():
        raise ModelFileError(f"there is no model {path}.")
    journal = stack.enter_context(Journal(out / "replies.jsonl", _identity(path, limits)))
    n = n_threads or default_threads()
    small = path.stat().st_size <= SMALL_MODEL
    more |= {"n_ctx": limits.n_ctx, "n_seq_max": limits.n_seq_max, "journal": journal}
    return stack.enter_context(Workers(path, n if small else 1, n_threads=1 if small else n, **more))


def _identity(path: Path, limits: EvalLimits) -> Facts:
    """What replies in a journal were given by: another version may give others, and a smaller context cuts
    them short, so that a report would say of its replies what is not true."""
    from importlib.metadata import version

    from localsteer import __version__

    versions = {"version": __version__, "llama_cpp": version("llama-cpp-python")}
    return {"model": file_hash(path), **versions, "n_ctx": limits.n_ctx}


class Bench:
    """What the suites share.

    out: where vectors are kept; None: nowhere. validation, test: queries of the catalogue;
    `queries(instruction, split)` knows an instruction's own. all_test: the test queries that `test` is n of.
    base: the bench of the base model, if the run has one. max_tokens: of a reply, for every Cell. given:
    vectors of the user by instruction id, with their settings. wanted: ids to evaluate (None: the suite's own
    choice). test: queries in place of the catalogue's. checkpoint: a transformers folder to extract from with
    PyTorch, in place of the model itself. batch: of the Runner. stage: gives a progress bar for a piece of
    work. results: all that `run` has found since they were last taken.
    """

    def __init__(
        self,
        workers: Workers,
        catalog: Catalog,
        out: Path | None,
        *,
        n: int = 20,
        seed: int = 0,
        limits: EvalLimits | None = None,
        given: Sequence[tuple[Path, ControlVector]] = (),
        wanted: Sequence[str] | None = None,
        test: Sequence[Query] | None = None,
        checkpoint: Path | None = None,
        batch: Key | None = None,
        stage: Stage = silent,
    ) -> None:
        self.workers, self.catalog, self.out = workers, catalog, out
        self.n, self.seed, self.checkpoint, self.stage = n, seed, checkpoint, stage
        self.limits = limits or EvalLimits()
        self.runner = Runner(workers, self.limits.must_end, batch)
        self.max_tokens = self.limits.max_tokens
        self.base: Bench | None = None
        self.results: list[Outcome] = []
        self.model = workers.map(lambda engine, _: model_info(engine), [None])[0]
        self.validation = tuple(catalog.queries.get("validation", ()))
        self.all_test = self._test_queries(test)
        self.test = tuple(spread(self.all_test, n))
        self.files: dict[str, Path] = {}
        self._instructions: dict[str, Instruction] = {}
        self._raw: dict[str, ControlVector] = {}
        self._told: dict[str, list[Reply]] = {}
        self._others: dict[tuple[str, ...], list[Instruction]] = {}
        self._picked: dict[str, ControlVector] = {}
        self._mean: Any = None
        self.given = self._take(given)
        self.wanted = None if wanted is None else list(dict.fromkeys(wanted))

    # -- what is evaluated ---------------------------------------------------------------------------

    def instruction(self, wanted: str | Instruction) -> Instruction:
        """By id: of a given vector, a direction of length, else of the catalogue, slots at their defaults.
        Raises CatalogError."""
        if isinstance(wanted, Instruction):
            return wanted
        if wanted in DIRECTIONS and wanted not in self._instructions:
            return length(self.catalog, wanted).target
        return self._instructions.get(wanted) or self.catalog.get(wanted)

    @property
    def asked(self) -> list[str] | None:
        """The ids that were asked for, else those of the given vectors; None: a suite's own choice."""
        return self.wanted if self.wanted is not None else list(self.given) or None

    def wording(self, label: str) -> str | None:
        """The instruction of a row in words, for a judge: `json + one_sentence` is two of them."""
        try:
            return " ".join(self.instruction(each).phrasings[0] for each in label.split(" + "))
        except CatalogError:
            return None

    def instructions(self, groups: Sequence[str]) -> list[Instruction]:
        """The ones asked for; else those of the given vectors; else the catalogue's of these groups that have
        a verifier and need no slot. Raises CatalogError for one without a verifier, and for none."""
        if self.asked is None:
            known = (one for one in self.catalog.instructions.values() if one.group in groups)
            usable = [one.fill() for one in known if one.verifier and not _lacks_slots(one)]
            if not usable:
                raise CatalogError(
                    f"no instruction of {self.catalog.source} in {' or '.join(groups)} has a verifier, so "
                    "nothing tells whether replies follow: give one (`verifier = ...`), or another --catalog."
                )
            return usable
        chosen = [self.instruction(each) for each in self.asked]
        for each in chosen:
            if each.verifier is None:
                raise CatalogError(
                    f"{each.id!r} has no verifier, so nothing tells whether a reply follows it: name one "
                    "in the catalogue (`verifier = ...`), or leave it out."
                )
        return chosen

    def queries(self, instruction: Instruction, split: str) -> tuple[Query, ...]:
        """Validation or test queries of an instruction: its own, or those of all. Test: at most n."""
        own = instruction.queries.get(split, ())
        if not own:
            return self.test if split == "test" else self.validation
        return tuple(spread(own, min(self.n, len(own)))) if split == "test" else tuple(own)

    # -- vectors -------------------------------------------------------------------------------------

    def vectors(self, instructions: Sequence[str | Instruction]) -> dict[str, ControlVector]:
        """With settings applied, by id: the user's files, or extracted, picked and kept in out/vectors.

        Strength 0 where no setting did better than the model alone.
        """
        chosen = [self.instruction(instruction) for instruction in instructions]
        new = [each for each in chosen if each.id not in self._picked]
        self.prepare(chosen)
        kept = {each.id: self._tuned_before(each) for each in new}
        self._picked |= {name: vector for name, vector in kept.items() if vector is not None}
        untuned = [each for each in new if kept[each.id] is None]
        all_tuned = self.tune([(each, self._raw[each.id]) for each in untuned])
        for each, tuned in zip(untuned, all_tuned, strict=True):
            self._picked[each.id] = self._save(each, tuned.vector)
        return {each.id: self._picked[each.id] for each in chosen}

    def tune(self, pairs: Sequence[tuple[Instruction, ControlVector]], **options: Any) -> list[Tuned]:
        """Settings for this model of any vectors of these instructions, found on validation queries.
        options: of find_setting."""
        self.prepare([instruction for instruction, _ in pairs])
        options |= {"seed": self.seed, "max_tokens": self.max_tokens, "check": self.workers.check}

        def work(engine: Engine, pair: tuple[Instruction, ControlVector]) -> Tuned:
            instruction, vector = pair
            queries = self.queries(instruction, "validation")
            return find_setting(engine, vector, instruction, queries, **options)

        with self.stage("finding settings") as advance:
            return self.workers.map(work, pairs, advance) if pairs else []

    def raw(self, instructions: Sequence[str | Instruction]) -> dict[str, ControlVector]:
        """As extracted, no setting chosen. A given file comes with its own settings."""
        chosen = [self.instruction(instruction) for instruction in instructions]
        missing = [each for each in chosen if each.id not in self._raw]
        vectors = {each.id: self._kept(each) for each in missing}
        new = [each for each in missing if vectors[each.id] is None]
        with self.stage("extracting vectors") as advance:
            vectors |= extract_all(self.checkpoint or self.workers, new, self.catalog, advance) if new else {}
        for each in missing:
            self._raw[each.id] = self._save(each, vectors[each.id]) if each in new else vectors[each.id]
        return {each.id: self._raw[each.id] for each in chosen}

    def extract(self, recipes: Sequence[Extracted]) -> dict[str, ControlVector]:
        """As `raw`, of lengths and words, by the id of what a vector makes the model do."""
        new = [each for each in recipes if each.target.id not in self._raw]

        def work(engine: Engine, recipe: Extracted) -> ControlVector:
            return recipe.extract(engine, self.catalog.queries_for(recipe.instruction, "extraction"))

        with self.stage("extracting vectors") as advance:
            vectors = self.workers.map(work, new, advance) if new else []
        for recipe, vector in zip(new, vectors, strict=True):
            self._instructions[recipe.target.id], self._raw[recipe.target.id] = recipe.target, vector
        return {each.target.id: self._raw[each.target.id] for each in recipes}

    def use(self, instruction: Instruction, vector: ControlVector) -> ControlVector:
        """Keep a vector with settings that a suite chose by itself; it is in `vector_records` from now on."""
        self._instructions[instruction.id] = instruction
        # its pairs may be another number than `raw` takes: no digest, so that no later run mistakes it
        self._picked[instruction.id] = self._save(instruction, vector, digest="")
        return self._picked[instruction.id]

    def prepare(self, instructions: Sequence[str | Instruction]) -> None:
        """Raw vectors of these, and what the model says when told to follow them."""
        chosen = [self.instruction(each) for each in instructions]
        self._instructions |= {each.id: each for each in chosen}
        self.raw(chosen)
        new = [each for each in chosen if each.id not in self._told]

        def work(engine: Engine, instruction: Instruction) -> list[Reply]:
            queries = self.validation[:N_TOLD]
            return told_replies(engine, [instruction], queries, max_tokens=self.max_tokens)[instruction.id]

        with self.stage("asking in words") as advance:
            told = self.workers.map(work, new, advance) if new else []
        self._told |= {each.id: replies for each, replies in zip(new, told, strict=True)}

    def controls(
        self, instructions: Sequence[Instruction], vectors: Sequence[ControlVector]
    ) -> dict[str, tuple[ControlVector, ...]]:
        """As `controls_of`, with the vectors of other instructions."""
        others = self.others(*instructions, n=len(vectors))
        raw = self.raw(others)
        return controls_of(vectors, [raw[other.id] for other in others], self.plain_mean(), self.seed)

    def others(self, *instructions: Instruction, n: int = 1) -> list[Instruction]:
        """Whose vectors the control `other` is drawn from: evaluated ones and, where they are few, PARTNERS.
        The same ones whenever they are asked for again."""
        key = (str(n), *(instruction.id for instruction in instructions))
        if key not in self._others:
            self.prepare(instructions)
            missing = max(n, N_CANDIDATES) - len(_unlike(self._candidates(), instructions))
            if missing > 0:
                self.prepare(self._partners(instructions, missing))
            queries = self.validation[:N_TOLD]
            self._others[key] = choose_others(
                instructions, self._candidates(), self._told, queries, n=n, seed=self.seed
            )
        return self._others[key]

    def _candidates(self) -> tuple[Instruction, ...]:
        """Not of words: which suites ran before should not matter, and a word changes little of a reply. Not
        an import that can't be applied as any vector is, at any layer and in mode project."""
        known = (self._instructions[each] for each in self._told)
        usable = (each for each in known if each.verifier and each.group != "word")
        return tuple(each for each in usable if _is_whole(self._raw[each.id]))

    def _partners(self, instructions: Sequence[Instruction], n: int) -> list[Instruction]:
        """At most n of PARTNERS, or else of the catalogue's formats, that are not known yet, alike to none of
        these, and that the model's vocabulary can spell."""
        known = self.catalog.instructions
        formats = [each.id for each in known.values() if each.group == "format" and each.verifier]
        names = [each for each in dict.fromkeys([*PARTNERS, *formats]) if each in known]
        usable = [known[name].fill() for name in names if not _lacks_slots(known[name])]
        candidates = [each for each in _unlike(usable, instructions) if each.id not in self._told]
        return [one for one in candidates if self.readable(one.phrasings) == [*one.phrasings]][:n]

    def readable(self, texts: Sequence[str]) -> list[str]:
        """Those that the model's vocabulary can spell."""

        def can_spell(engine: Engine, text: str) -> bool:
            try:
                return bool(engine.prompt_tokens(text))
            except PromptError:
                return False

        spelled = self.workers.map(can_spell, texts)
        return [text for text, can in zip(texts, spelled, strict=True) if can]

    def told(self, instructions: Sequence[Instruction]) -> dict[str, list[Reply]]:
        """What the model says when told to follow these, to the first validation queries, by id."""
        self.prepare(instructions)
        return {instruction.id: self._told[instruction.id] for instruction in instructions}

    def plain_mean(self) -> Any:
        """(n_layer, n_embd) float64: mean state of plain validation prompts at their last token."""

        def work(engine: Engine, _: None) -> Any:
            # its own replies first, and scored by themselves: what else is asked should change none of them
            plain = plain_replies(engine, self.test, max_tokens=self.max_tokens)
            log_scores(
                engine, [(query.text, reply.tokens) for query, reply in zip(self.test, plain, strict=True)]
            )
            return mean_state(engine, self.validation)

        if self._mean is None:
            (self._mean,) = self.workers.map(work, [None])
        return self._mean

    # -- experiments ---------------------------------------------------------------------------------

    def experiment(
        self,
        asked: Instruction | Sequence[Instruction],
        arms: Iterable[Arm],
        queries: Sequence[Query] | None = None,
        **options: Any,
    ) -> Experiment:
        """On test queries unless others are named. options: of Experiment."""
        asked = [asked] if isinstance(asked, Instruction) else asked
        queries = self.queries(asked[0], "test") if queries is None else queries
        return Experiment(asked, list(arms), queries, **options)

    def conditions(
        self,
        instruction: Instruction,
        vector: ControlVector,
        conditions: Sequence[str] = CONDITIONS,
        **options: Any,
    ) -> Experiment:
        """The usual ones for a vector with settings; without controls where it does nothing (strength 0).
        options: of Experiment."""
        steers = {"none": (), "steered": applied(vector), "instructed": (), "both": applied(vector)}
        if vector.strength and {"random", "other"} & set(conditions):
            steers |= self.controls([instruction], [vector])
        return self.experiment(instruction, arms_of(steers, conditions), **options)

    def run(
        self,
        asked: Iterable[Experiment | Cell],
        *,
        what: str = "asking",
        score: bool | Collection[str] = True,
    ) -> Outcomes:
        """Outcomes in the order of the cells. score: as of `Runner.run`."""
        cells = [
            cell
            for each in asked
            for cell in ([each] if isinstance(each, Cell) else each.cells(self.max_tokens))
        ]
        with self.stage(what) as advance:
            rows = self.runner.run(cells, score=score, advance=advance) if cells else Outcomes()
        self.results += rows
        return rows

    def plain(self, queries: Sequence[Query], *steer: ControlVector, what: str = "asking") -> Outcomes:
        """Replies to queries without any instruction. steer: nothing for the model's own."""
        cells = [
            Cell("plain", "none", query, query.text, steer, max_tokens=self.max_tokens) for query in queries
        ]
        return self.run(cells, what=what, score=False)

    def take_results(self) -> Outcomes:
        """All that this bench and its base have run since the last time."""
        taken, self.results = self.results, []
        return Outcomes([*taken, *(self.base.take_results() if self.base else ())])

    def report(
        self, title: str, rows: Outcomes, conditions: Sequence[str], sections: Iterable[Section]
    ) -> SuiteReport:
        """Figures with the file hashes of their vectors, and sections of the suite's own."""
        hashes = {vector.name: file_hash(self.files[name]) for name, vector in self._picked.items()}
        return structs.replace(report(title, rows, conditions, hashes), sections=list(sections))

    # -- records -------------------------------------------------------------------------------------

    def vector_records(self) -> dict[str, VectorRecord]:
        """For results.json: file hash and settings of every vector that was used, by instruction id."""
        return {
            name: VectorRecord(
                **setting_of(vector),
                sha256=file_hash(self.files[name]),
                source_sha256=vector.provenance.get("source_hash"),
                given=name in self.given,
            )
            for name, vector in self._picked.items()
        }

    # -- within --------------------------------------------------------------------------------------

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

    def _take(self, given: Sequence[tuple[Path, ControlVector]]) -> dict[str, ControlVector]:
        vectors: dict[str, ControlVector] = {}
        for path, vector in given:
            check_model(vector, self.model["n_layer"], self.model["n_embd"], self.model["architecture"])
            # the tokenizer too, before any work is done
            self.workers.map(lambda engine, each: engine.plan(each), [vector])
            instruction = instruction_of(vector, self.catalog, path)
            if instruction.id in vectors:
                raise VectorFileError(
                    f"two vectors of {instruction.id!r} are given, {path} the second: give one."
                )
            vectors[instruction.id] = vector
            self._instructions[instruction.id], self.files[instruction.id] = instruction, path
        self._raw |= vectors
        self._picked |= vectors
        return vectors

    def _path(self, instruction: Instruction) -> Path:
        return self.out / "vectors" / f"{file_name(instruction.id)}.gguf"

    def _save(
        self, instruction: Instruction, vector: ControlVector, digest: str | None = None
    ) -> ControlVector:
        if self.out is None:
            return vector
        digest = self._digest(instruction) if digest is None else digest
        vector = replace(vector, provenance={**vector.provenance, DIGEST: digest})
        path = self.files[instruction.id] = self._path(instruction)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            vector.save(path)
        except OSError as error:
            raise unwritable(path, error) from error
        return vector

    def _kept(self, instruction: Instruction) -> ControlVector | None:
        """The vector of an earlier, stopped run, without its settings."""
        vector = self._of_earlier_run(instruction)
        if vector is None:
            return None
        return vector.at(layer=vector.n_layer // 2, positions="all", mode="project", strength=1.0)

    def _tuned_before(self, instruction: Instruction) -> ControlVector | None:
        """The same with its settings, if that run had chosen them: the search is in no journal."""
        vector = self._of_earlier_run(instruction)
        return vector if vector is not None and vector.provenance.get("validation") else None

    def _of_earlier_run(self, instruction: Instruction) -> ControlVector | None:
        path = self.out and self._path(instruction)
        if path is None or not path.is_file():
            return None
        try:
            vector = ControlVector.load(path)
        except VectorFileError:
            return None
        if vector.provenance.get(DIGEST) != self._digest(instruction):
            return None
        self.files[instruction.id] = path
        return vector

    def _digest(self, instruction: Instruction) -> str:
        """Of what a vector and its settings come from."""
        extraction = [query.text for query in self.catalog.queries_for(instruction, "extraction")]
        validation = [query.text for query in self.queries(instruction, "validation")]
        rule = [instruction.verifier, dict(instruction.kwargs)]
        content = [self.model["sha256"], list(instruction.phrasings), extraction, validation, rule]
        content += [self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def model_info(engine: Engine) -> Facts:
    """What results.json says of a model."""
    model = engine.model
    return {
        "name": model.metadata.get("general.name") or engine.path.stem,
        "sha256": file_hash(engine.path),
        "architecture": model.architecture,
        "quantization": quantization(model.metadata),
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
    }


def quantization(metadata: Mapping[str, str]) -> str | None:
    """llama.cpp's name of a file's quantization, as `Q4_K_M`; None where the file does not say."""
    import gguf

    try:
        name = gguf.LlamaFileType(int(metadata["general.file_type"])).name
    except (KeyError, ValueError):
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


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


def _unlike(candidates: Sequence[Instruction], instructions: Sequence[Instruction]) -> list[Instruction]:
    return [candidate for candidate in candidates if not any(alike(mine, candidate) for mine in instructions)]


def _is_whole(vector: ControlVector) -> bool:
    return vector.mean_with is not None and len(vector.usable_layers) == vector.n_layer


def _lacks_slots(instruction: Instruction) -> bool:
    return any(slot not in instruction.slots for slot in instruction.open_slots)
