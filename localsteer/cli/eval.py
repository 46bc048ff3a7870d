"""`localsteer eval`: does steering help on this model? All conditions, controls and intervals in one
report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from localsteer.errors import LocalsteerError

from . import options
from .console import answer, note, print_json, progress
from .models import catalog_of, is_bundled, model_file
from .options import Params

if TYPE_CHECKING:
    from types import ModuleType

    from localsteer.catalog import Query
    from localsteer.evaluate.bench import Bench, EvalLimits
    from localsteer.evaluate.model_judge import ModelJudge
    from localsteer.evaluate.page import Results, SuiteReport
    from localsteer.vector import ControlVector

# those of localsteer.evaluate.suites
SUITES = ("format", "length", "words", "composition", "cross-model", "ifeval")
MAX_TOKENS = 512
N_TEST = 20


@click.command("eval", short_help="Measure whether steering helps on a model, with controls.")
@click.argument("vectors", nargs=-1, metavar="[VECTOR]...")
@options.model
@click.option(
    "--shipped",
    is_flag=True,
    help="Use the vectors that ship for MODEL, and make only those that it lacks.",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME",
    help=f"{', '.join(SUITES)}, or all; repeat for several. [default: format]",
)
@click.option(
    "-i",
    "--instructions",
    metavar="ID,ID",
    help="Instructions to evaluate. [default: those of the vectors, or all]",
)
@click.option(
    "-n",
    type=click.IntRange(min=1),
    help=f"Test queries for each instruction; suite ifeval asks every line. [default: {N_TEST}, or all that "
    "--queries has]",
)
@click.option(
    "-o", "--out", type=click.Path(), metavar="DIR", help="The folder for all results. [default: eval-MODEL]"
)
@click.option(
    "--ifeval", type=click.Path(), metavar="JSONL", help="Prompts for suite ifeval, in IFEval's form."
)
@click.option("--base", metavar="GGUF", help="The base model, for suite cross-model.")
@click.option("--judge", metavar="GGUF", help="A local model that judges each reply as well.")
@click.option(
    "--catalog", metavar="TOML", help="Instructions and queries. [default: that of the model, or `general`]"
)
@click.option("--queries", type=click.Path(), metavar="TXT", help="Your own test queries, one per line.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Longest reply, in tokens. [default: {MAX_TOKENS}; less for the bundled model]",
)
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of a prompt and its reply together.",
)
@options.threads
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the random controls.")
@click.option("--no-paraphrases", is_flag=True, help="Skip the search for wordings that are badly followed.")
@click.option(
    "--diff", nargs=2, type=click.Path(), metavar="A B", help="Compare two runs: folders or results.json."
)
@click.option(
    "--report",
    type=click.Path(),
    metavar="RUN",
    help="Write a run's pages again from its results.json, beside it or in --out, without asking the model.",
)
@options.as_json
def command(
    vectors: tuple[str, ...],
    model: str,
    suites: tuple[str, ...],
    diff: tuple[str, str] | None,
    report: str | None,
    as_json: bool,
    **params: Any,
) -> None:
    """Compare a model's replies without an instruction, steered, instructed, and both, with a random
    direction and another instruction's vector as controls: by the strict and the loose rule, with quality
    figures and 95% intervals over the queries.

    VECTORs are files for this model, used as they were tuned. Without any, vectors are extracted from the
    model and their settings picked on validation queries, or taken from those that ship (--shipped). --out
    gets everything: report.html, report.md, results.json, the replies in replies.jsonl, the vectors. The same
    command continues a run that was stopped.

    \b
    Examples:
      localsteer eval --instructions json,lowercase
      localsteer eval -m MODEL.gguf json.gguf lowercase.gguf -o run-q4
      localsteer eval -m MODEL.gguf --suite ifeval --ifeval ifeval_input_data.jsonl
      localsteer eval -m smol --shipped
      localsteer eval -m MODEL.gguf --suite cross-model --base BASE.gguf --instructions json
      localsteer eval --suite all
      localsteer eval --diff run-q8 run-q4
      localsteer eval --report docs/results/eval-q8_0 --out page
    """
    if diff:
        _show(_diff(*diff, params["out"]), as_json)
        return
    if report is not None:
        _show(_reported(report, params["out"]), as_json)
        return
    names = _suites(suites, bundled=is_bundled(model), params=params)
    results = _evaluate(vectors, model, names, params, leave_out="all" in _listed(suites))
    _show(results, as_json)


def _diff(a: str, b: str, out: str | None) -> Results:
    from localsteer.evaluate import report
    from localsteer.evaluate.diff import compare
    from localsteer.evaluate.results import NAME, read

    comparison = compare(read(a), read(b))
    if out and (Path(out) / NAME).exists():
        raise LocalsteerError(
            f"{out} already holds a run, whose report would be replaced: choose another folder."
        )
    if out:
        report.write(comparison, out)
    return comparison


def _reported(run: str, out: str | None) -> Results:
    from localsteer.evaluate import report
    from localsteer.evaluate.results import read

    results = read(run)
    folder = Path(out) if out else Path(run) if Path(run).is_dir() else Path(run).parent
    for path in report.write(results, folder):
        note(f"written to {path}.")
    return results


def _show(results: Results, as_json: bool) -> None:
    if as_json:
        from localsteer.evaluate.page import plain

        print_json(plain(results))
        return
    from localsteer.evaluate.report.terminal import print_report

    print_report(results, answer())


def _suites(asked: Sequence[str], *, bundled: bool, params: Params) -> list[str]:
    """The names of the suites, checked before anything is loaded. `all`: those that have what they need."""
    names = _listed(asked)
    for name in names:
        if name not in (*SUITES, "all"):
            raise LocalsteerError(f"unknown suite {name!r}: choose from {', '.join(SUITES)}, or all.")
    ready = {"cross-model": bundled or params["base"], "ifeval": params["ifeval"]}
    if "all" in names:
        return [name for name in SUITES if ready.get(name, True)]
    wanted = {"cross-model": "--base MODEL.gguf", "ifeval": "--ifeval FILE.jsonl"}
    for name in names:
        if not ready.get(name, True):
            raise LocalsteerError(f"suite {name} needs {wanted[name]}.")
    return names


def _listed(asked: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part.strip() for names in asked or ("format",) for part in names.split(",")))


# --- one evaluation ----------------------------------------------------------------------------------------


def _evaluate(
    vectors: Sequence[str], model: str, names: Sequence[str], params: Params, *, leave_out: bool
) -> Results:
    from localsteer.evaluate import report, results
    from localsteer.evaluate.bench import open_bench
    from localsteer.evaluate.suites import suite

    started = time.perf_counter()
    params = params | {"test": _test_queries(params["queries"])}
    params["n"] = params["n"] or min(N_TEST, len(params["test"] or range(N_TEST)))
    modules = {name: suite(name) for name in names}
    files = _files(model, params)
    catalog = catalog_of(model, params["catalog"])
    loaded = _load_vectors(vectors)
    _check_names(catalog, loaded, params["instructions"])
    path = model_file(model)
    base = _base_of(model, params["base"]) if "cross-model" in names else None
    out = Path(params["out"] or f"eval-{path.stem}")
    results.refuse_others(out, None)
    extra = {"ifeval": params["ifeval"], "paraphrases": not params["no_paraphrases"]}
    reports: dict[str, SuiteReport] = {}
    asked = _bench_options(params) | {
        "limits": _limits(is_bundled(model), params),
        "base": base,
        "given": loaded,
        "shipped": _shipped(path, catalog.source) if params["shipped"] else (),
    }
    with open_bench(path, catalog, out, **asked) as bench, _judge(bench, params) as judge:
        ready = _ready(bench, modules, extra, leave_out=leave_out)
        settings = _settings(list(ready), model, params)
        for name, module in ready.items():
            reports[name] = module.run(bench, **extra)
            taken = bench.take_results()
            if judge:
                reports[name].sections.append(judge.section(taken))
            document = results.document(
                bench,
                reports,
                command=shlex.join(["localsteer", *sys.argv[1:]]),
                seconds=time.perf_counter() - started,
                settings=settings,
                files=files,
            )
            # after each suite, so that finished ones can be read while the next runs
            results.write(document, out)
    report.write(document, out)
    note(f"kept in {out}: report.html, report.md, results.json, replies.jsonl, vectors.")
    return document


def _ready(
    bench: Bench, modules: dict[str, ModuleType], extra: Params, leave_out: bool
) -> dict[str, ModuleType]:
    """The suites that have something to do, checked before the first one runs. leave_out: name the others in
    a notice instead of raising."""
    ready = {}
    for name, module in modules.items():
        reason = module.missing(bench, **extra)
        if reason and not leave_out:
            raise LocalsteerError(reason)
        if reason:
            note(f"suite {name} is left out: {reason}")
        else:
            ready[name] = module
    return ready


def _bench_options(params: Params) -> Mapping[str, Any]:
    """The options that concern a bench."""
    return {
        "n_threads": params["threads"],
        "n": params["n"],
        "seed": params["seed"],
        "wanted": _ids(params["instructions"]),
        "test": params["test"],
        "stage": progress,
    }


@contextmanager
def _judge(bench: Bench, params: Params) -> Iterator[ModelJudge | None]:
    from localsteer.evaluate.bench import open_judge

    if params["judge"] is None:
        yield None
        return
    with open_judge(model_file(params["judge"]), bench, n_threads=params["threads"]) as judge:
        yield judge


def _limits(bundled: bool, params: Params) -> EvalLimits:
    from dataclasses import replace

    from localsteer.evaluate.bench import BUNDLED_LIMITS, EvalLimits

    asked = {"max_tokens": params["max_tokens"], "n_ctx": params["ctx_size"]}
    asked = {key: value for key, value in asked.items() if value is not None}
    limits = replace(BUNDLED_LIMITS if bundled else EvalLimits(max_tokens=MAX_TOKENS), **asked)
    if limits.n_ctx is not None and limits.max_tokens >= limits.n_ctx:
        raise LocalsteerError(
            f"--max-tokens {limits.max_tokens} leaves no room for a prompt in a context of {limits.n_ctx}: "
            "lower it, or raise --ctx-size."
        )
    return limits


def _ids(text: str | None) -> list[str] | None:
    """The names in a list. Raises LocalsteerError if it has none."""
    if text is None:
        return None
    ids = [name.strip() for name in text.split(",") if name.strip()]
    if not ids:
        raise LocalsteerError("--instructions is empty: leave it out for all instructions.")
    return ids


def _check_names(catalog: Any, vectors: Sequence[tuple[Path, Any]], instructions: str | None) -> None:
    """Refuse unknown instructions before a model is loaded."""
    from localsteer.extract.levels import DIRECTIONS
    from localsteer.extract.vector_instruction import instruction_of

    known = {instruction_of(vector, catalog, path).id for path, vector in vectors}
    for name in _ids(instructions) or ():
        if name not in known and name not in DIRECTIONS:
            catalog.get(name)


def _test_queries(path: str | None) -> tuple[Query, ...] | None:
    from localsteer.catalog import load_queries

    return None if path is None else load_queries(path)


def _load_vectors(texts: Sequence[str]) -> list[tuple[Path, ControlVector]]:
    from .vector_spec import VectorSpec

    specs = [VectorSpec.parse(text) for text in texts]
    return [(Path(spec.path), spec.load()) for spec in specs]


def _shipped(path: Path, catalog: str) -> list[tuple[Path, ControlVector]]:
    from localsteer.packs import pack_for

    match = pack_for(path)
    if match is None or match.pack.catalog != catalog:
        why = "there is none" if match is None else f"the pack is for catalogue {match.pack.catalog}"
        raise LocalsteerError(
            f"no vectors ship for {path.name} with catalogue {catalog} ({why}): leave out --shipped."
        )
    pack = match.pack
    return [(pack.path(name), pack.vector(name)) for name in pack.instructions]


def _base_of(model: str, base: str | None) -> Path:
    """The base model; that of a bundled model is bundled too, in the same quantization."""
    if base is None:
        base = model.replace("bundled", "bundled-base", 1)
    return model_file(base)


def _files(model: str, params: Params) -> dict[str, Path]:
    """The files that a run reads beside models and vectors; their hashes are recorded."""
    from localsteer.catalog import catalog_file

    paths = {"catalog": catalog_file(catalog_of(model, params["catalog"]).source)}
    paths |= {name: Path(params[name]) for name in ("ifeval", "queries") if params[name]}
    for path in paths.values():
        if path.exists() and not path.is_file():
            raise LocalsteerError(
                f"{path} is not a regular file, so it can't be hashed: save it to one first."
            )
        if not path.is_file():
            raise LocalsteerError(f"there is no file {path}.")
    return paths | ({"judge": model_file(params["judge"])} if params["judge"] else {})


class EvalSettings(TypedDict):
    """Of an evaluation's results.json. n: test queries, None where each line of a file is one."""

    suites: list[str]
    n: int | None
    seed: int
    max_tokens: int
    n_ctx: int | None
    instructions: list[str] | None
    paraphrases: bool


def _settings(names: Sequence[str], model: str, params: Params) -> EvalSettings:
    limits = _limits(is_bundled(model), params)
    return {
        "suites": list(names),
        "n": None if list(names) == ["ifeval"] else params["n"],  # it asks all of its own queries
        "seed": params["seed"],
        "max_tokens": limits.max_tokens,
        "n_ctx": limits.n_ctx,
        "instructions": _ids(params["instructions"]),
        "paraphrases": not params["no_paraphrases"],
    }
