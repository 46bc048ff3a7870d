"""`localsteer pack`: one model's vectors with their figures, in a folder where first use finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import LocalsteerError

from . import options
from .console import answer, note, print_json, progress, table
from .models import catalog_of, model_file, open_engine
from .shipped import SHARES, setting_of, shares_of

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction
    from localsteer.engine import Engine
    from localsteer.packs.making import PackFolder
    from localsteer.vector import ControlVector

N_SEQ_MAX = 32  # sequences in one decode while settings are tried


@click.command("pack", short_help="Make a pack: a model's vectors with their figures, ready to ship.")
@click.argument("vectors", nargs=-1, metavar="VECTOR...", type=click.Path())
@options.model
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    metavar="DIR",
    help="The pack's folder, made if need be.",
)
@click.option(
    "-i",
    "--instruction",
    "ids",
    multiple=True,
    metavar="ID",
    help="An instruction of the catalogue; repeat for several. [default: all that have a verifier]",
)
@click.option("--name", metavar="NAME", help="The model's published name. [default: the name in its file]")
@click.option("--licence", metavar="TEXT", help="The model's licence. [default: the licence in its file]")
@click.option(
    "--catalog",
    metavar="NAME",
    help="The catalogue of instructions. [default: bundled for the bundled model, else general]",
)
@click.option(
    "-n",
    "n",
    default=12,
    show_default=True,
    type=click.IntRange(min=1),
    help="Queries on which a setting is checked.",
)
@click.option(
    "--pairs", type=click.IntRange(min=1), metavar="N", help="Prompt pairs to extract from. [default: 50]"
)
@options.engine
@options.as_json
def command(vectors: tuple[str, ...], model: str, output: str, as_json: bool, **params: Any) -> None:
    """Extract and tune the catalogue's instructions on a model, and keep only the chosen layer of each
    vector, with its settings and figures, in the folder DIR. Vectors that exist are kept, so the same command
    continues a run that was stopped. With VECTOR files written by `localsteer tune`, the pack is made from
    these.

    First use takes its vectors from the packs that ship with localsteer, and from those named by
    LOCALSTEER_PACKS: DIR itself, or a folder of packs. LOCALSTEER_PACKS=off makes every vector again. See
    docs/packs.md.

    \b
    Examples:
      localsteer pack -m smol -o SmolLM2-135M-Instruct
      localsteer pack -m MODEL.gguf -o packs/my-model --name My-Model-1B-Instruct -i json -i lowercase
      localsteer pack -m MODEL.gguf -o packs/my-model tuned/*.gguf
      LOCALSTEER_PACKS=packs localsteer run -m MODEL.gguf -i json "Tell me about foxes."
    """
    if vectors and (params["ids"] or params["pairs"]):
        raise click.UsageError("VECTOR files have been made already: leave out --instruction and --pairs.")
    catalog = catalog_of(model, params["catalog"])
    pack = _folder(model, Path(output), catalog, params)
    loading = {name: params[name] for name in ("ctx_size", "threads", "gpu_layers")}
    jobs = _of_files(vectors, model, catalog) if vectors else _of_catalog(catalog, params["ids"], pack)
    failed: dict[str, str] = {}
    if jobs:
        with open_engine(model, n_seq_max=N_SEQ_MAX, **loading) as engine:
            failed = _make(engine, jobs, pack, catalog, params)
    _show(pack, failed, as_json)
    if failed:
        click.get_current_context().exit(1)


@dataclass(frozen=True)
class PackJob:
    """An entry of the pack. vector: None if it is yet to be extracted and tuned."""

    instruction: Instruction
    vector: ControlVector | None = None


def _folder(model: str, output: Path, catalog: Catalog, params: Mapping[str, Any]) -> PackFolder:
    from localsteer.model_list import read_shape
    from localsteer.packs.making import PackFolder

    path = model_file(model)
    name, licence = _published(model, path)
    return PackFolder.open(
        output,
        path,
        model=params["name"] or name,
        licence=params["licence"] or licence,
        catalog=catalog.source,
        quantization=read_shape(path).quantization,
    )


def _published(model: str, path: Path) -> tuple[str, str]:
    """Name and licence, from the list of named models or from the file's header."""
    from localsteer.convert.gguf_file import open_gguf
    from localsteer.model_names import PACKAGED

    if model in PACKAGED:
        return PACKAGED[model].title, PACKAGED[model].licence
    with open_gguf(path) as file:
        name, licence = (file.keys.get(f"general.{key}") for key in ("name", "license"))
    return str(name.value if name else path.stem), str(licence.value if licence else "")


def _of_files(vectors: Sequence[str], model: str, catalog: Catalog) -> list[PackJob]:
    from localsteer.packs.making import check_measured
    from localsteer.vector import ControlVector

    path = model_file(model)
    jobs: dict[str, PackJob] = {}
    for file in dict.fromkeys(vectors):
        vector = ControlVector.load(file)
        instruction = check_measured(vector, Path(file), catalog, path)
        if instruction.id in jobs:
            raise click.UsageError(f"two of the files are for {instruction.id!r}: name only one of them.")
        jobs[instruction.id] = PackJob(instruction, vector)
    return list(jobs.values())


def _of_catalog(catalog: Catalog, ids: Sequence[str], pack: PackFolder) -> list[PackJob]:
    from localsteer.packs.making import instructions_for_a_pack

    chosen = instructions_for_a_pack(catalog, ids)
    missing = [instruction for instruction in chosen if instruction.id not in pack]
    if len(missing) < len(chosen):
        note(f"{len(chosen) - len(missing)} of {len(chosen)} exist already.")
    return [PackJob(instruction) for instruction in missing]


def _make(
    engine: Engine, jobs: Sequence[PackJob], pack: PackFolder, catalog: Catalog, params: Mapping[str, Any]
) -> dict[str, str]:
    """Make the missing vectors; returns why some could not be made, by instruction."""
    for job in jobs:
        if job.vector is not None:
            engine.plan(job.vector)  # checks tokenizer and shape of all of them before the first is written
    failed = {}
    for number, job in enumerate(jobs, 1):
        name = job.instruction.id
        try:
            vector = job.vector or _measured(engine, job.instruction, catalog, params)
            row = pack.add(vector, job.instruction)
        except LocalsteerError as error:
            failed[name] = " ".join(str(error).split())
            note(f"{name} is left out: {failed[name]}")
            continue
        note(f"{number} of {len(jobs)}, {name}: {setting_of(row)}, {_figures(row)}.")
    return failed


def _measured(
    engine: Engine, instruction: Instruction, catalog: Catalog, params: Mapping[str, Any]
) -> ControlVector:
    """The vector, extracted and tuned. Ctrl-C ends the program rather than the search: half a search gives no
    figure."""
    from localsteer.extract import extract
    from localsteer.tune import tune

    name = instruction.id
    queries = catalog.queries_for(instruction, "extraction")
    with progress(f"extracting {name}") as on_progress:
        vector = extract(engine, instruction, queries, n_pairs=params["pairs"], on_progress=on_progress)
    validation = catalog.queries_for(instruction, "validation")
    with progress(f"tuning {name}") as advance:

        def report(what: str, done: int, total: int) -> None:
            advance(done, total, f"{name}: {what}")

        tuned = tune(engine, vector, instruction, validation, n=params["n"], report=report)
    if tuned.stopped:
        raise KeyboardInterrupt
    return tuned.vector


def _show(pack: PackFolder, failed: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        document = {"folder": str(pack.folder), "model": pack.model, "instructions": dict(pack.rows)}
        print_json(document | {"failed": dict(failed)})
        return
    rows = table("instruction", "setting", *SHARES, "n", "seconds", numbers=(*SHARES, "n", "seconds"))
    for name, row in pack.rows.items():
        # not known for a search that was interrupted
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        rows.add_row(name, setting_of(row), *shares_of(row), str(row["n"]), seconds)
    answer().print(rows)
    note(f"{len(pack.rows)} instructions of {pack.model} in {pack.folder}.")


def _figures(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {share}" for key, share in zip(SHARES, shares_of(row), strict=True))
