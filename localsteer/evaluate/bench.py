"""One model under evaluation, for suites, studies and `demo`: what is asked of it, its vectors, the controls,
and the runner.

    with open_bench(path, catalog, Path("run"), n=10) as bench:
        report = suite("format").run(bench)

Vectors are files that the user gave or that ship for the model, or are extracted from it on extraction
queries and picked on validation queries; figures come from test queries. Replies are kept in
out/replies.jsonl and vectors in out/vectors: a run that was stopped is started again from its beginning and
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from localsteer.cache import file_hash
from localsteer.catalog import Catalog, Instruction, Query
from localsteer.errors import ModelFileError
from localsteer.evaluate.cells import CONDITIONS, Arm, Cell, Experiment, applied, arms_of
from localsteer.evaluate.controls import BenchControls
from localsteer.evaluate.kept_vectors import KeptVectors
from localsteer.evaluate.model_info import model_info
from localsteer.evaluate.outcomes import Outcome, Outcomes, report
from localsteer.evaluate.page import Section, SuiteReport
from localsteer.evaluate.runner import Runner
from localsteer.evaluate.scope import BUNDLED_LIMITS, BenchOptions, BenchScope, EvalLimits
from localsteer.evaluate.vectors import BenchVectors
from localsteer.runtime.journal import Journal
from localsteer.vector import ControlVector, check_model
from localsteer.workers import Workers

if TYPE_CHECKING:
    from localsteer.evaluate.model_judge import ModelJudge

__all__ = ["BUNDLED_LIMITS", "Bench", "BenchOptions", "EvalLimits", "open_bench", "open_judge"]

BASE = "base"  # folder of the base model's run, within the model's
SMALL_MODEL = 256 << 20  # bytes of a file; below, an engine for each core, above, one with all cores


class Bench(BenchScope):
    """out: where vectors are kept; None: nowhere. options: of BenchOptions. base: the base model's bench, if
    the run has one. max_tokens: of a reply, for every Cell. results: all that `run` has found since they were
    last taken."""

    def __init__(self, workers: Workers, catalog: Catalog, out: Path | None, **options: Any) -> None:
        asked = BenchOptions(**options)
        self.workers, self.out, self.stage, self.limits = workers, out, asked.stage, asked.limits
        self.model = workers.map(lambda engine, _: model_info(engine), [None])[0]
        for _, vector in (*asked.given, *asked.shipped):
            check_model(vector, self.model["n_layer"], self.model["n_embd"], self.model["architecture"])
            # the tokenizer too, before any work is done
            workers.map(lambda engine, vector: engine.plan(vector), [vector])
        super().__init__(catalog, asked)
        self.max_tokens = self.limits.max_tokens
        self.runner = Runner(workers, self.limits.must_end, asked.batch)
        self.folder = KeptVectors(self, out, self.model["sha256"], self.max_tokens)
        self.vectors = BenchVectors(self, workers, self.folder, asked.checkpoint, self.stage)
        self.controls = BenchControls(self.vectors)
        self.base: Bench | None = None
        self.results: list[Outcome] = []

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

    def compare(
        self,
        asked: Instruction | Sequence[Instruction],
        steers: Mapping[str, Sequence[ControlVector]],
        conditions: Sequence[str] | None = None,
        queries: Sequence[Query] | None = None,
        **options: Any,
    ) -> Experiment:
        """The same by what steers in each condition, in the order of `conditions` where they are named."""
        return self.experiment(asked, arms_of(steers, conditions or list(steers)), queries, **options)

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
            steers |= self.controls.of([instruction], [vector])
        return self.compare(instruction, steers, conditions, **options)

    def run(
        self,
        asked: Iterable[Experiment | Cell],
        *,
        what: str = "asking",
        score: bool | Collection[str] = True,
    ) -> Outcomes:
        """Outcomes in the order of the cells. score: as of `Runner.run`."""
        cells: list[Cell] = []
        for one in asked:
            cells += [one] if isinstance(one, Cell) else one.cells(self.max_tokens)
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
        hashes = {vector.name: self.folder.hash_of(name) for name, vector in self.vectors.used.items()}
        return structs.replace(report(title, rows, conditions, hashes), sections=list(sections))


# --- opened ------------------------------------------------------------------------------------------------


@contextmanager
def open_bench(
    path: Path,
    catalog: Catalog,
    out: Path,
    *,
    n_threads: int | None = None,
    base: Path | None = None,
    **options: Any,
) -> Iterator[Bench]:
    """A Bench on a GGUF, closed when the block ends. base: its base model, for cross-model: a bench of its
    own in out/base. options: of BenchOptions.

    Raises LocalsteerError when `out` holds another model's run.
    """
    limits = options.get("limits", EvalLimits())
    with ExitStack() as stack:
        workers = _open_workers(stack, path, out, limits, n_threads)
        bench = Bench(workers, catalog, out, **options)
        if base is not None:
            # a base model is asked as the paper asks one
            workers = _open_workers(stack, base, out / BASE, limits, n_threads, plain_prompts=True)
            bench.base = Bench(workers, catalog, out / BASE, **{**options, "given": (), "shipped": ()})
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


def _identity(path: Path, limits: EvalLimits) -> dict[str, str | int | None]:
    """What replies in a journal were given by: another version may give others, and a smaller context cuts
    them short, so that a report would say of its replies what is not true."""
    from importlib.metadata import version

    from localsteer import __version__

    versions = {"version": __version__, "llama_cpp": version("llama-cpp-python")}
    return {"model": file_hash(path), **versions, "n_ctx": limits.n_ctx}
