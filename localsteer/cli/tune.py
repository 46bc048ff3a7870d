"""`localsteer tune`: choose layer, positions, mode and strength of a vector, and write them into its file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from localsteer.errors import CatalogError, LocalsteerError, VectorFileError
from localsteer.jsonable import JsonObject
from localsteer.terms import MODES, POSITIONS

from . import interrupt, options
from .console import note, print_json, progress
from .extract import check_folder, check_output, output_path, refuse_to_replace
from .models import catalog_of, extraction_queries, find_instruction, open_engine
from .options import Params
from .tune_shown import draw, show

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.runtime.journal import Journal
    from localsteer.tune import Tuned
    from localsteer.tune.check import TrialRow
    from localsteer.tune.record import TargetCounts
    from localsteer.vector import ControlVector

N_SEQ_MAX = 32  # sequences in one decode; those that are scored are short


class Names(click.ParamType):
    """`all,prompt`: a choice among known words, as a tuple."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is not one of {', '.join(self.known)}.", param, ctx)
        return tuple(dict.fromkeys(names))


class Numbers(click.ParamType):
    """`0.5,1,2`, none of them 0, as a tuple."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(dict.fromkeys(float(part) for part in value.split(",")))
        except ValueError:
            numbers = (math.nan,)
        if not all(math.isfinite(number) and number for number in numbers):
            self.fail(f"{value!r} is not a list of strengths: write 0.5,1,2 (0 steers nothing).", param, ctx)
        return numbers


@click.command("tune", short_help="Find a vector's settings, and measure what they achieve.")
@click.argument("vectors", nargs=-1, metavar="VECTOR...", type=click.Path())
@options.model
@click.option(
    "-i",
    "--instruction",
    "text",
    metavar="ID_OR_TEXT",
    help="Instead of a file: extract the vector of this instruction, then tune it.",
)
@click.option(
    "--exhaustive",
    is_flag=True,
    help="Generate under every setting instead: the reference, many times slower; it resumes where it was "
    "stopped.",
)
@click.option(
    "-n",
    "n",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Queries on which a setting is checked.",
)
@options.layers_to_try("Layers to try: 12, 3,4 or 3-5. [default: all]")
@click.option(
    "--positions",
    type=Names(POSITIONS),
    default="prompt,last,all",
    show_default=True,
    metavar="LIST",
    help="Positions to try.",
)
@click.option("--modes", type=Names(MODES), metavar="LIST", help="Modes to try. [default: the vector's own]")
@click.option(
    "--strengths",
    type=Numbers(),
    metavar="LIST",
    help="Strengths to try, negative ones for less of it. [default: a line search up to 3; exhaustive 1,2,3]",
)
@click.option("--verifier", metavar="ID", help="How to judge replies if the file does not say: an "
              "IFEval id, as keywords:existence.")  # fmt: skip
@click.option("--kwargs", metavar="JSON", help="The verifier's arguments, as IFEval writes them.")
@click.option(
    "--catalog",
    metavar="TOML",
    help="Instructions and queries: your own file, `general` or `bundled`. "
    "[default: bundled for the bundled model, else general]",
)
@click.option(
    "--queries", type=click.Path(), metavar="TXT", help="Your own validation queries, one per line."
)
@click.option(
    "--max-tokens",
    default=192,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest reply, in tokens.",
)
@click.option(
    "-o", "--output", type=click.Path(), metavar="PATH", help="Write to this file or folder, not in place."
)
@click.option("--dry-run", is_flag=True, help="Write no vector file.")
@click.option("--plot", type=click.Path(), metavar="PNG", help="Also draw the heat maps into a picture.")
@options.engine
@options.as_json
def command(vectors: tuple[str, ...], model: str, as_json: bool, **params: Any) -> None:
    """Find layer, positions, mode and strength for each VECTOR, and write them INTO its file, with figures.

    The model is told to follow the instruction, and the search looks for settings that make those of its
    replies which follow likely without telling. The model then answers other queries under the best few
    settings, plain, and told, and that decides. A reply counts if the file's verifier passes it, it is not
    degenerate (empty, looping, without end, or far less probable than anything the model says by itself), and
    it names the query's subject. An instruction without a verifier is tuned by likelihood only, and the file
    says so.

    Ctrl-C keeps the best so far.

    \b
    Examples:
      localsteer tune -m MODEL.gguf json.gguf
      localsteer tune -m MODEL.gguf json.gguf lowercase.gguf -o tuned/
      localsteer tune -m MODEL.gguf --instruction "Answer in rhyme." -o rhyme.gguf
      localsteer tune -m MODEL.gguf rhyme.gguf --verifier keywords:existence --kwargs '{"keywords": ["moon"]}'
      localsteer tune -m MODEL.gguf json.gguf --exhaustive --layer 8-20 --plot json.png
    """
    jobs = _jobs(vectors, model, params)
    if params["plot"]:
        from localsteer.heatmap import check_picture

        check_picture(params["plot"])
    documents = []
    done: list[tuple[TuneJob, Tuned]] = []
    loading = {name: params[name] for name in ("ctx_size", "threads", "gpu_layers")}
    with open_engine(model, n_seq_max=N_SEQ_MAX, **loading) as engine:
        jobs = [_with_vector(engine, job) for job in jobs]
        for job in jobs:
            engine.plan(job.vector)  # of all of them, before the first search
        for job in jobs:
            tuned, document = _tune(engine, job, params)
            if not as_json:
                show(job.label, tuned)
            document["written"] = _write(job, tuned, params["dry_run"])
            documents.append(document)
            done.append((job, tuned))
    if params["plot"]:
        draw([(job.label, tuned) for job, tuned in done], params["plot"])
        note(f"drew {params['plot']}")
    if as_json:
        print_json({"model": model, "vectors": documents})


# --- what is asked for -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneJob:
    """One vector to tune. path: None for one that is extracted here, whose vector is None until then.
    queries: for validation. extraction: the queries it is extracted from."""

    path: Path | None
    target: Path
    vector: ControlVector | None
    instruction: Instruction
    queries: tuple[Query, ...] = ()
    extraction: tuple[Query, ...] = ()

    @property
    def label(self) -> str:
        return self.instruction.id


def _jobs(vectors: Sequence[str], model: str, params: Params) -> list[TuneJob]:
    """The vectors to tune. Refuses everything that can be refused without opening the model."""
    if bool(vectors) == (params["text"] is not None):
        raise click.UsageError("name vector files, or --instruction ID to make one.")
    catalog = catalog_of(model, params["catalog"])
    rule = _rule(params["verifier"], params["kwargs"])
    if params["text"] is not None:
        instruction = find_instruction(catalog, params["text"], ())
        target = output_path(params["output"], instruction)
        extraction = extraction_queries(catalog, instruction, None)
        job = TuneJob(None, target, None, replace(instruction, **rule), extraction=extraction)
        return [_checked(job, catalog, params)]
    files = [Path(name) for name in dict.fromkeys(vectors)]
    targets = _targets(files, params["output"], params["dry_run"])
    jobs = [_loaded_job(path, target, catalog, rule) for path, target in zip(files, targets, strict=True)]
    return [_checked(job, catalog, params) for job in jobs]


def _loaded_job(path: Path, target: Path, catalog: Catalog, rule: JsonObject) -> TuneJob:
    from localsteer.catalog import Instruction
    from localsteer.extract.vector_instruction import instruction_of
    from localsteer.vector import ControlVector

    vector = ControlVector.load(path)
    try:
        instruction = instruction_of(vector, catalog, path)
    except CatalogError:
        if not rule:
            raise _no_verifier(str(path)) from None
        # its wording is not known, so it can't be put into a prompt
        instruction = Instruction(vector.name or path.stem, (), literal=True)
    return TuneJob(path, target, vector, replace(instruction, **rule))


def _checked(job: TuneJob, catalog: Catalog, params: Params) -> TuneJob:
    """A job with its queries. Raises CatalogError, PlanError for what the search can't work with."""
    from localsteer.tune.exhaustive import grid
    from localsteer.verify.verdicts import check_arguments

    instruction = job.instruction
    what = str(job.path or instruction.id)
    if instruction.verifier is None and (params["exhaustive"] or not instruction.phrasings):
        raise _no_verifier(what)
    if not instruction.phrasings and not params["exhaustive"]:
        raise _no_wording(what)
    queries = _validation(catalog, instruction, params)
    if instruction.verifier is not None:
        check_arguments(instruction.verifier, instruction.kwargs_for(queries[0].text), prompt=queries[0].text)
    if job.vector is not None:
        grid(job.vector, **_grid_options(job.vector, params))
    return replace(job, queries=queries)


def _grid_options(vector: ControlVector, params: Params) -> JsonObject:
    options = {name: params[name] for name in ("layers", "positions", "modes", "strengths")}
    return options | {"modes": params["modes"] or (vector.mode,)}


def _no_wording(what: str) -> CatalogError:
    return CatalogError(
        f"{what} does not hold its instruction in words, so the model can't be told: --exhaustive "
        "tries every "
        "setting by generation."
    )


def _no_verifier(what: str) -> CatalogError:
    return CatalogError(
        f"{what} names no verifier, so nothing can judge whether a reply follows it: add "
        "--verifier ID --kwargs "
        """JSON, as --verifier keywords:existence --kwargs '{"keywords": ["moon"]}'."""
    )


def _rule(verifier: str | None, kwargs: str | None) -> JsonObject:
    """The verifier and arguments from --verifier and --kwargs, which replace the file's."""
    if verifier is None:
        if kwargs is not None:
            raise click.UsageError("--kwargs are the arguments of --verifier: give both options.")
        return {}
    try:
        arguments = json.loads(kwargs or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise click.UsageError(
            f"""--kwargs {kwargs} is not a JSON object: write it as '{{"keywords": ["moon"]}}'."""
        )
    return {"verifier": verifier, "kwargs": arguments}


def _validation(catalog: Catalog, instruction: Instruction, params: Params) -> tuple[Query, ...]:
    """All queries; for the exhaustive search `n`, evenly spaced, so that a few still cover every kind."""
    from localsteer.catalog import load_queries, spread

    if params["queries"] is None:
        queries = catalog.queries_for(instruction, "validation")
    else:
        queries = load_queries(params["queries"])
        _refuse_overlap(queries, catalog, instruction, params["queries"])
    if len(queries) < params["n"]:
        note(f"there are {len(queries)} validation queries for {instruction.id}, not {params['n']}.")
    return tuple(spread(queries, min(params["n"], len(queries)))) if params["exhaustive"] else tuple(queries)


def _refuse_overlap(queries: Sequence[Query], catalog: Catalog, instruction: Instruction, path: str) -> None:
    """Raise LocalsteerError for queries of another split: settings chosen on test queries would flatter the
    test, and extraction queries would flatter the choice."""
    for split in ("extraction", "test"):
        own = (*catalog.queries.get(split, ()), *instruction.queries.get(split, ()))
        known = {_plain(query.text) for query in own}
        for query in queries:
            if _plain(query.text) in known:
                raise CatalogError(
                    f"{path}: {query.text!r} is among the {split} queries of {catalog.source}: tune with "
                    "others."
                )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _targets(files: Sequence[Path], output: str | None, dry_run: bool) -> list[Path]:
    """Where each vector is written, checked before the search rather than after it."""
    if output is None:
        for path in () if dry_run else filter(Path.exists, files):
            check_folder(path)
        return list(files)
    folder = Path(output)
    if len(files) == 1 and not folder.is_dir() and not output.endswith(("/", os.sep)):
        targets = [folder]
    else:
        if not dry_run:
            _make_folder(folder)
        targets = [folder / path.name for path in files]
    if len(set(targets)) < len(targets):
        raise VectorFileError(f"two of the files would have the same name in {folder}: rename one.")
    for target in targets:
        (refuse_to_replace if dry_run else check_output)(target)
    return targets


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VectorFileError(
            f"can't make {folder} ({error.strerror or error}): choose another -o."
        ) from error


# --- the work ----------------------------------------------------------------------------------------------


def _with_vector(engine: Engine, job: TuneJob) -> TuneJob:
    if job.vector is not None:
        return job
    from localsteer.extract import extract

    with progress(f"extracting {job.label}") as on_progress:
        vector = extract(engine, job.instruction, job.extraction, on_progress=on_progress)
    return replace(job, vector=vector)


def _tune(engine: Engine, job: TuneJob, params: Params) -> tuple[Tuned, JsonObject]:
    from localsteer.evaluate.model_info import model_info
    from localsteer.tune import tune

    model = {key: model_info(engine)[key] for key in ("name", "sha256", "quantization")}
    choices = _grid_options(job.vector, params) | {
        "max_tokens": params["max_tokens"],
        "source": {"model": model},
    }
    with progress(f"tuning {job.label}") as advance:
        choices["report"] = lambda what, done, total: advance(done, total, what)
        replies = {}
        if params["exhaustive"]:
            tuned, n_new = _exhaustively(engine, job, choices)
            replies = {"replies": {"asked": tuned.record["replies"], "new": n_new}}
        else:
            tuned = tune(engine, job.vector, job.instruction, job.queries, n=params["n"], **choices)
    if tuned.stopped:
        interrupt.forgive()  # Ctrl-C ended the search: what was found is written
    return tuned, _document(job, tuned) | replies


def _exhaustively(engine: Engine, job: TuneJob, choices: JsonObject) -> tuple[Tuned, int]:
    """The result, and how many replies were new rather than from an earlier run."""
    from localsteer.runtime.journal import Remembered
    from localsteer.tune import tune_exhaustively

    with _journal(job.vector, choices["source"]["model"]["sha256"]) as journal:
        if len(journal):
            note(f"continuing from {journal.path}.")
        remembered = Remembered(engine, journal)
        tuned = tune_exhaustively(remembered, job.vector, job.instruction, job.queries, **choices)
        return tuned, remembered.n_decoded


def _journal(vector: ControlVector, model_hash: str) -> Journal:
    """The journal of this search, only in memory if the cache folder can't be written. Raises LocalsteerError
    for a damaged file."""
    from localsteer.runtime.journal import Journal

    identity = {"model": model_hash}
    try:
        return Journal(journal_path(vector, model_hash), identity)
    except LocalsteerError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        note(f"this search can't be resumed if it is stopped: {error}")
        return Journal(None, identity)


def journal_path(vector: ControlVector, model_hash: str) -> Path:
    """One file for each vector and model, so that a later search finds the replies of an earlier one.

    The name holds the versions, since another llama.cpp gives other replies.
    """
    import importlib.metadata

    from localsteer import __version__
    from localsteer.cache import HASH_CHARS, cache_folder, file_name

    digest = hashlib.sha256(f"{__version__} {importlib.metadata.version('llama-cpp-python')}".encode())
    digest.update(vector.directions.tobytes())
    for column in (vector.mean_with, vector.mean_without, vector.readers, vector.biases):
        digest.update(b"" if column is None else column.tobytes())
    name = f"{file_name(vector.label)}-{digest.hexdigest()[:8]}.jsonl"
    return cache_folder() / "tune" / model_hash[:HASH_CHARS] / name


class TuneDocument(TypedDict):
    """table: the settings that were checked, the plain model last. scored: those ranked by likelihood.
    Between them, what the vector's file keeps."""

    file: str | None
    instruction: str
    verifier: str | None
    helps: bool
    stopped: bool
    setting: dict[str, int | str | float] | None
    search: str
    n: int
    scores: dict[str, float | None]
    judged_by: str
    recovered_gap: float | None
    with_instruction: str | None
    targets: TargetCounts
    seconds: float | None
    advice: list[str]
    table: list[TrialRow]
    scored: list[dict[str, int | str | float | None]]
    model: str


def _document(job: TuneJob, tuned: Tuned) -> TuneDocument:
    kept = ("search", "n", "scores", "judged_by", "recovered_gap", "with_instruction", "targets", "seconds")
    return {
        "file": None if job.path is None else str(job.path),
        "instruction": job.label,
        "verifier": job.instruction.verifier,
        "helps": tuned.helps,
        "stopped": tuned.stopped,
        "setting": None if tuned.setting is None else vars(tuned.setting),
        **{key: tuned.record[key] for key in kept},
        "advice": list(tuned.advice),
        "table": [trial.row() for trial in (*tuned.trials, tuned.plain)],
        "scored": [vars(setting) | {"recovered_gap": gap} for setting, gap in tuned.ranking],
        "model": tuned.record["model"],
    }


def _write(job: TuneJob, tuned: Tuned, dry_run: bool) -> str | None:
    if dry_run:
        note("nothing is written (--dry-run).")
        return None
    tuned.vector.save(job.target)
    note(f"written to {job.target}.")
    return str(job.target)
