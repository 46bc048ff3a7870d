"""What the studies share: their settings, the benches they run on, and the page that each ends in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localsteer.catalog import Catalog, Instruction, alike
from localsteer.errors import CatalogError
from localsteer.evaluate.bench import Bench, EvalLimits, open_bench
from localsteer.evaluate.cells import Experiment
from localsteer.evaluate.controls import applied_like
from localsteer.evaluate.page import Heatmap, Results, Share, StudyReport, loaded, plain
from localsteer.evaluate.report import markdown, plots
from localsteer.evaluate.report.document import document
from localsteer.evaluate.results import refuse_others, unwritable, versions, write, write_text
from localsteer.evaluate.runner import Stage, silent
from localsteer.evaluate.scope import verifiable
from localsteer.evaluate.studies import study
from localsteer.jsonable import finite
from localsteer.vector import ControlVector

PICTURES = "plots"


@dataclass(frozen=True)
class StudyJob:
    """wanted: instruction ids in place of the study's own choice. n: test queries. quick: everything smaller,
    to see that it works. files: for `quantization`, (label, file) of one checkpoint, the most exact first.
    checkpoint: for `layers`, the transformers folder that the model was made from."""

    catalog: Catalog
    out: Path
    model: Path
    limits: EvalLimits
    n: int = 20
    seed: int = 0
    wanted: tuple[str, ...] | None = None
    quick: bool = False
    n_threads: int | None = None
    files: tuple[tuple[str, Path], ...] = ()
    checkpoint: Path | None = None
    stage: Stage = silent

    @contextmanager
    def bench(self, path: Path | None = None, folder: str = "") -> Iterator[Bench]:
        """On the study's model, or on another one with a folder of its own inside OUT."""
        options = {"n": self.n, "seed": self.seed, "stage": self.stage, "limits": self.limits}
        path, out = path or self.model, self.out / folder
        with open_bench(path, self.catalog, out, n_threads=self.n_threads, **options) as bench:
            yield bench

    def instructions(self, usual: Sequence[str]) -> list[Instruction]:
        """The wanted ones, or those of `usual` that the catalogue has; each with a verifier.

        Raises CatalogError for an unknown one, or one without a verifier."""
        ids = self.wanted or [name for name in usual if name in self.catalog.instructions]
        ids = ids[:2] if self.quick and self.wanted is None else ids
        instructions = [verifiable(self.catalog.get(name)) for name in dict.fromkeys(ids)]
        if not instructions:
            raise CatalogError(f"{self.catalog.source} has none of {', '.join(usual)}: name --instructions")
        return instructions


def run_study(name: str, job: StudyJob, *, command: str = "") -> Results:
    """Run it, and write OUT/results.json, OUT/NAME.md and its pictures. Returns what results.json holds.

    Raises CatalogError, ModelFileError, LocalsteerError for an OUT of another run or a full disk.
    """
    module = study(name)
    refuse_others(job.out, name)
    started = time.perf_counter()
    report: StudyReport = module.run(job)
    results = Results(
        **versions(),
        study=name,
        title=module.TITLE,
        model=report.model,
        # a study that asks no test queries says which it asks
        settings={"n": job.n, "seed": job.seed, "quick": job.quick} | report.settings,
        sections=report.sections,
        figures=report.figures,
        command=command,
        seconds=round(time.perf_counter() - started, 1),
    )
    results = loaded(finite(plain(results)))
    _write_page(results, job.out, name)
    write(results, job.out)
    return results


def _write_page(results: Results, out: Path, name: str) -> None:
    """Raises LocalsteerError when the disk takes no more; replies that were made are kept."""
    pictures = list(markdown.all_plots(document(results))) if plots.available() else []
    page = markdown.render(results, pictures=PICTURES if pictures else None)
    for picture in pictures:
        path = out / PICTURES / f"{picture.name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        plots.draw(picture.plot, path)
        page = page.replace(f"{PICTURES}/{picture.name}.svg", f"{PICTURES}/{picture.name}.png")
    write_text(out / f"{name}.md", page)


# --- instructions ------------------------------------------------------------------------------------------


def other_vector(
    instruction: Instruction, instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> ControlVector | None:
    """Another instruction's vector, applied as this one's is: the next in the list that is not alike."""
    k = [each.id for each in instructions].index(instruction.id)
    for each in [*instructions[k + 1 :], *instructions[:k]]:
        if not alike(instruction, each):
            return applied_like(vectors[each.id], vectors[instruction.id])
    return None


def working(
    instructions: Sequence[Instruction], vectors: Mapping[str, ControlVector]
) -> tuple[list[Instruction], str]:
    """The instructions that steering helps on validation queries, and a sentence on those that it does not.

    Raises CatalogError when it helps none: then there is nothing to compare."""
    kept = [instruction for instruction in instructions if vectors[instruction.id].strength]
    left = [each.id for each in instructions if not vectors[each.id].strength]
    if not kept:
        raise CatalogError(
            f"steering helps none of {', '.join(left)} on this model: name other --instructions"
        )
    said = f"No setting helped {', '.join(left)} on validation queries; left out." if left else ""
    return kept, said


# --- figures -----------------------------------------------------------------------------------------------


def by_layer(
    bench: Bench, pairs: Sequence[tuple[Instruction, ControlVector]], positions: Sequence[str], n: int
) -> list[Experiment]:
    """Each instruction on n validation queries, with an arm for each of the positions and each layer:
    projected with strength 1."""
    asked = []
    for instruction, vector in pairs:
        steers = {
            f"{where} {il}": (vector.at(layer=il, positions=where, mode="project", strength=1.0),)
            for where in positions
            for il in range(vector.n_layer)
        }
        queries = bench.queries(instruction, "validation")[:n]
        asked.append(bench.compare(instruction, steers, queries=queries))
    return asked


def profile(bench: Bench, asked: Sequence[Experiment], what: str) -> list[float | None]:
    """The share that follows of each instruction and arm."""
    rows = bench.run(asked, what=what, score=False)
    return [part.followed for part in rows.by("instruction", "condition").values()]


def shares(values: Iterable[float]) -> list[Share]:
    """Of numpy's numbers, without intervals."""
    return [Share(float(value)) for value in values]


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def layer_map(title: str, rows: Sequence[str], values: Iterable[Iterable[float]], **labels: str) -> Heatmap:
    """A column for each layer. values: a row of numbers for each of `rows`."""
    rounded = [[round(float(value), 3) for value in row] for row in values]
    columns = list(map(str, range(len(rounded[0]))))
    return Heatmap(title=title, x_label="layer", rows=list(rows), columns=columns, values=rounded, **labels)
