"""What the studies share: their settings, the benches they run on, and the page that each ends in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsteer.cache import atomic_path
from localsteer.catalog import Catalog, Instruction, Query
from localsteer.errors import CatalogError, LocalsteerError
from localsteer.evaluate.conditions import alike, applied_like
from localsteer.evaluate.results import refuse_others
from localsteer.evaluate.studies import study
from localsteer.evaluate.study import Stage, silent
from localsteer.evaluate.suites.bench import Bench, EvalLimits, open_bench
from localsteer.evaluate.suites.cells import Cell, Result, checks_of, figures, share_cell
from localsteer.jsonable import finite
from localsteer.vector import ControlVector

PICTURES = "plots"
RESULTS = "results.json"
FORMAT = 1


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
        options = {"n": self.n, "seed": self.seed, "stage": self.stage}
        limits, n_threads = self.limits, self.n_threads
        with open_bench(
            path or self.model, self.catalog, self.out / folder, limits=limits, n_threads=n_threads, **options
        ) as bench:
            yield bench

    def instructions(self, usual: Sequence[str]) -> list[Instruction]:
        """The wanted ones, or those of `usual` that the catalogue has; each with a verifier.

        Raises CatalogError for an unknown one, or one without a verifier."""
        ids = self.wanted or [each for each in usual if each in self.catalog.instructions]
        ids = ids[:2] if self.quick and self.wanted is None else ids
        found = [self.catalog.get(each) for each in dict.fromkeys(ids)]
        for each in found:
            if each.verifier is None:
                raise CatalogError(f"{each.id!r} has no verifier: nothing tells whether a reply follows it")
        if not found:
            raise CatalogError(f"{self.catalog.source} has none of {', '.join(usual)}: name --instructions")
        return found


def run_study(name: str, job: StudyJob, *, command: str = "") -> dict[str, Any]:
    """Run it, and write OUT/results.json, OUT/NAME.md and its pictures. Returns results.json's content.

    Raises CatalogError, ModelFileError, LocalsteerError for an OUT of another run or a full disk.
    """
    module = study(name)
    refuse_others(job.out, name)
    started = time.perf_counter()
    found = module.run(job)
    document = _document(name, module.TITLE, found, job)
    document |= {"command": command, "seconds": round(time.perf_counter() - started, 1)}
    document = finite(document)
    write(document, job.out, name)
    return document


def _document(name: str, title: str, found: Mapping[str, Any], job: StudyJob) -> dict[str, Any]:
    import platform

    from localsteer import __version__
    from localsteer.runtime.bridge import system_info

    return {
        "format": FORMAT,
        "study": name,
        "title": title,
        "localsteer": __version__,
        "llama_cpp": system_info()["llama-cpp-python"],
        "machine": f"{platform.machine()} {platform.system()}",
        "model": found["model"],
        # a study that asks no test queries says which it asks
        "settings": {"n": job.n, "seed": job.seed, "quick": job.quick} | dict(found.get("settings", {})),
        "sections": found["sections"],
        "figures": found["figures"],
    }


def write(document: Mapping[str, Any], out: Path, name: str) -> None:
    """Raises LocalsteerError when the disk takes no more; replies that were made are kept."""
    import json

    from localsteer.evaluate.report import markdown, plots
    from localsteer.evaluate.report.document import document as page_of

    pictures = list(markdown.all_plots(page_of(document))) if plots.available() else []
    page = markdown.render(document, pictures=PICTURES if pictures else None)
    try:
        for plot in pictures:
            path = out / PICTURES / f"{plot.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            plots.draw(plot.spec, path)
            page = page.replace(f"{PICTURES}/{plot.name}.svg", f"{PICTURES}/{plot.name}.png")
        _write_text(out / f"{name}.md", page)
        _write_text(out / RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise LocalsteerError(
            f"{out} can't be written ({error.strerror or error}): what is done is kept; make room and run "
            "the same command again."
        ) from error


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- cells -------------------------------------------------------------------------------------------------


def cells_for(
    bench: Bench,
    instruction: Instruction,
    condition: str,
    vectors: Sequence[ControlVector] = (),
    *,
    told: bool = False,
    queries: Sequence[Query] | None = None,
) -> list[Cell]:
    """A cell for each test query. told: the instruction in words, its phrasings in turn."""
    queries = bench.queries(instruction, "test") if queries is None else queries
    wordings = instruction.phrasings
    return [
        Cell(
            instruction=instruction.id,
            condition=condition,
            query=query,
            prompt=f"{query.text} {wordings[i % len(wordings)]}" if told else query.text,
            steer=tuple(vectors),
            checks=checks_of(instruction, query),
            max_tokens=bench.max_tokens,
        )
        for i, query in enumerate(queries)
    ]


def grouped(results: Sequence[Result], *keys: str) -> dict[tuple[str, ...], list[Result]]:
    """Results by fields of their cells, in order of appearance."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result.cell, key) for key in keys), []).append(result)
    return groups


def share_of(results: Sequence[Result]) -> dict[str, float | None]:
    """How many follow, with the interval, as a table's cell."""
    return share_cell(figures(results))


def accuracy_of(results: Sequence[Result]) -> float | None:
    return share_of(results)["share"]


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
    kept = [each for each in instructions if vectors[each.id].strength]
    left = [each.id for each in instructions if not vectors[each.id].strength]
    if not kept:
        raise CatalogError(
            f"steering helps none of {', '.join(left)} on this model: name other --instructions"
        )
    said = f"No setting helped {', '.join(left)} on validation queries; left out." if left else ""
    return kept, said


# --- pages -------------------------------------------------------------------------------------------------


def section(
    title: str, text: str = "", tables: Sequence[Any] = (), plots: Sequence[Any] = ()
) -> dict[str, Any]:
    return {"title": title, "text": text, "tables": list(tables), "plots": list(plots)}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def lines(
    title: str, x_label: str, y_label: str, x: Sequence[Any], series: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    labels = {"title": title, "x_label": x_label, "y_label": y_label}
    return {
        "kind": "lines",
        **labels,
        "x": list(x),
        "series": {key: list(each) for key, each in series.items()},
    }


def heatmap(
    title: str,
    x_label: str,
    y_label: str,
    rows: Sequence[Any],
    columns: Sequence[Any],
    values: Sequence[Sequence[Any]],
) -> dict[str, Any]:
    labels = {"title": title, "x_label": x_label, "y_label": y_label}
    grid = {"rows": list(map(str, rows)), "columns": list(map(str, columns))}
    return {"kind": "heatmap", **labels, **grid, "values": [list(row) for row in values]}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
