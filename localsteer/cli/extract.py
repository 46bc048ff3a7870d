"""`localsteer extract`: from an instruction and base queries to a control-vector file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import VectorFileError

from . import options
from .console import note, print_json, progress
from .inspect import settings_line
from .models import catalog_of, extraction_queries, find_instruction, model_file

if TYPE_CHECKING:
    from localsteer.catalog import Instruction
    from localsteer.vector import ControlVector

DTYPES = ("auto", "float32", "bfloat16", "float16")  # as localsteer.extract.torch_backend has them


@click.command("extract", short_help="Make a control vector of an instruction.")
@click.option(
    "-i",
    "--instruction",
    "text",
    required=True,
    metavar="ID_OR_TEXT",
    help="An id of the catalogue, or your own words.",
)
@click.option("--gguf", metavar="GGUF", help="Extract with llama.cpp from this GGUF, or from `bundled`.")
@click.option(
    "--model", "checkpoint", metavar="HF", help="Extract with PyTorch from this transformers folder or name."
)
@click.option("-o", "--output", type=click.Path(), metavar="GGUF", help="The vector file. [default: ID.gguf]")
@options.settings
@options.instruction_data
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", help="PyTorch: of the weights. [default: auto]"
)
@click.option("--device", metavar="NAME", help="PyTorch: cpu, cuda, ... [default: a GPU, if there is one]")
@click.option("--exact", is_flag=True, help="llama.cpp: F32 cache, no flash attention; slower.")
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@options.as_json
def command(
    text: str,
    gguf: str | None,
    checkpoint: str | None,
    output: str | None,
    catalog: str | None,
    slots: tuple[tuple[str, Any], ...],
    queries: str | None,
    pairs: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Extract the control vector of an instruction: the difference that it makes to the model's state at the
    last prompt token, on average over prompts with and without it.

    From a GGUF with llama.cpp alone, or from a transformers model with PyTorch. --layer, --mode, --positions
    and --strength are stored in the file, and can be changed whenever it is used.

    \b
    Examples:
      localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
      localsteer extract --gguf MODEL.gguf --instruction bullets --slot n=5 --pairs 100
      localsteer extract --gguf MODEL.gguf --instruction "Answer in rhyme." --queries my.txt -o rhyme.gguf
      localsteer extract --gguf MODEL.gguf --catalog my.toml --instruction pirate
      localsteer extract --model Qwen/Qwen2.5-0.5B-Instruct --instruction json -o json.gguf
    """
    from localsteer.vector import describe

    if (gguf is None) == (checkpoint is None):
        raise click.UsageError("give either --gguf MODEL.gguf or --model HF_FOLDER_OR_NAME.")
    found = catalog_of(gguf, catalog)
    instruction = find_instruction(found, text, slots)
    base_queries = extraction_queries(found, instruction, queries)
    path = output_path(output, instruction)
    source = checkpoint if gguf is None else model_file(gguf)
    vector = _extract(source, instruction, base_queries, pairs, given)
    vector = vector.at(layer=given["layer"], strength=given["strength"])
    vector.save(path)
    described = describe(vector)
    if as_json:
        print_json({"file": str(path), **described})
    else:
        click.echo(path)
        note(f"{vector.provenance['n_pairs']} pairs; {settings_line(described)}.")


def output_path(output: str | None, instruction: Instruction) -> Path:
    """Where the vector goes. A file that is there and no vector, a model say, is not overwritten."""
    path = Path(output or f"{re.sub(r'[^a-z0-9._-]+', '-', instruction.id.lower())}.gguf")
    refuse_to_replace(path)
    if not path.parent.is_dir():
        raise VectorFileError(f"{path} can't be written: there is no folder {path.parent}.")
    return path


def refuse_to_replace(path: Path) -> None:
    """Raise VectorFileError for a file that is something other than a vector of ours."""
    from localsteer.vector import ControlVector

    if not path.exists():
        return
    try:
        ControlVector.load(path)
    except VectorFileError:
        raise VectorFileError(
            f"{path} is there already and is no vector file of localsteer: choose another name."
        ) from None


def _extract(
    source: Any, instruction: Instruction, queries: Any, n_pairs: int | None, given: dict[str, Any]
) -> ControlVector:
    from localsteer.extract import extract

    with progress(f"extracting {instruction.id}") as on_progress:
        return extract(
            source,
            instruction,
            queries,
            n_pairs=n_pairs,
            mode=given["mode"],
            positions=given["positions"] or "all",
            dtype=given["dtype"],
            device=given["device"],
            exact=given["exact"],
            n_threads=given["threads"],
            on_progress=on_progress,
        )
