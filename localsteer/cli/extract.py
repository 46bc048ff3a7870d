"""`localsteer extract`: from an instruction and base queries to a control-vector file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.cache import require_folder
from localsteer.errors import VectorFileError

from . import options
from .console import note, print_json, progress, shown
from .inspect import settings_line
from .models import catalog_of, extraction_queries, find_instruction, model_file, open_engine

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction
    from localsteer.extract.recipes import Extracted
    from localsteer.vector import ControlVector

# localsteer.extract.levels has these too, but importing it brings in numpy; a test keeps the two equal
LENGTHS = (
    "extremely_concise",
    "concise",
    "moderate",
    "verbose",
    "extremely_verbose",
    "conciseness",
    "verbosity",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")  # as localsteer.extract.torch_backend has them


@click.command("extract", short_help="Make a control vector of an instruction.")
@click.option("-i", "--instruction", metavar="ID_OR_TEXT", help="An id of the catalogue, or your own words.")
@click.option("--include-word", metavar="WORD", help="Replies that hold this word.")
@click.option("--exclude-word", metavar="WORD", help="Replies without it: minus the vector of including it.")
@click.option(
    "--length",
    type=click.Choice(LENGTHS),
    metavar="LEVEL",
    help="Replies of this length: extremely_concise, concise, moderate, verbose, extremely_verbose; or the "
    "directions conciseness and verbosity, whose --strength says how far to go.",
)
@click.option("--language", metavar="NAME", help="Replies in this language: es, Spanish, ...")
@click.option(
    "--gguf", metavar="GGUF", help="Extract with llama.cpp from this GGUF, or a name: bundled, smol."
)
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
@options.rpc
@options.as_json
def command(
    instruction: str | None,
    include_word: str | None,
    exclude_word: str | None,
    length: str | None,
    language: str | None,
    gguf: str | None,
    checkpoint: str | None,
    output: str | None,
    catalog: str | None,
    slots: tuple[tuple[str, Any], ...],
    queries: str | None,
    pairs: int | None,
    as_json: bool,
    **params: Any,
) -> None:
    """Extract the control vector of an instruction: the difference that it makes to the model's state at the
    last prompt token, on average over prompts with and without it.

    From a GGUF with nothing but llama.cpp, or from a transformers model with PyTorch. --layer, --mode,
    --positions and --strength are stored in the file, and can be changed whenever it is used. Lengths and
    words are added to the state (mode add, where a strength of 2 goes twice as far), everything else is
    projected.

    \b
    Examples:
      localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
      localsteer extract --gguf MODEL.gguf --instruction bullets --slot n=5 --pairs 100
      localsteer extract --gguf MODEL.gguf --instruction "Answer in rhyme." --queries my.txt -o rhyme.gguf
      localsteer extract --gguf MODEL.gguf --include-word fox
      localsteer extract --gguf MODEL.gguf --length conciseness --strength 0.5
      localsteer extract --gguf MODEL.gguf --language es
      localsteer extract --gguf MODEL.gguf --catalog my.toml --instruction pirate
      localsteer extract --model Qwen/Qwen2.5-0.5B-Instruct --instruction json -o json.gguf
    """
    from localsteer.vector import describe

    if (gguf is None) == (checkpoint is None):
        raise click.UsageError("give either --gguf MODEL.gguf or --model HF_FOLDER_OR_NAME.")
    _refuse_idle(params, gguf is not None)
    wanted = {
        "--instruction": instruction,
        "--include-word": include_word,
        "--exclude-word": exclude_word,
        "--length": length,
        "--language": language,
    }
    found = catalog_of(gguf, catalog)
    recipe = recipe_of(found, wanted, slots)
    base_queries = extraction_queries(found, recipe.instruction, queries)
    path = output_path(output, recipe.target)
    source = checkpoint if gguf is None else _gguf_file(gguf)
    vector = _extract(source, recipe, base_queries, pairs, params)
    vector = vector.at(strength=params["strength"])
    vector.save(path)
    described = describe(vector)
    if as_json:
        print_json({"file": str(path), **described})
    else:
        click.echo(shown(str(path)))
        n_pairs = vector.provenance["n_pairs"]
        note(f"{n_pairs} pair{'s' * (n_pairs != 1)}; {settings_line(described)}.")


def _refuse_idle(params: Mapping[str, Any], is_gguf: bool) -> None:
    """Raise click.UsageError for an option of the other backend, which would do nothing."""
    if is_gguf and (params["device"] is not None or params["dtype"] != "auto"):
        name = "--dtype" if params["device"] is None else "--device"
        raise click.UsageError(
            f"{name} is for PyTorch: give --model in the place of --gguf, or leave it out."
        )
    if params["exact"] and not is_gguf:
        raise click.UsageError("--exact is for llama.cpp: give --gguf in the place of --model, or --dtype.")
    if params["rpc"] and not is_gguf:
        raise click.UsageError("--rpc is for llama.cpp: give --gguf in the place of --model.")
    if params["rpc_seconds"] is not None and not params["rpc"]:
        raise click.UsageError("--rpc-timeout needs --rpc.")


def recipe_of(
    catalog: Catalog, wanted: Mapping[str, str | None], slots: tuple[tuple[str, Any], ...]
) -> Extracted:
    """wanted: by option, None where it was not given. Raises click.UsageError unless exactly one was."""
    named = {option: text for option, text in wanted.items() if text is not None}
    if len(named) != 1:
        raise click.UsageError(f"give exactly one of {', '.join(wanted)}: it says what to extract.")
    ((option, text),) = named.items()
    if slots and option != "--instruction":
        raise click.UsageError(f"--slot belongs to --instruction, and {option} fills its own.")
    from localsteer.extract import levels, recipes

    made = {
        "--include-word": recipes.include_word,
        "--exclude-word": recipes.exclude_word,
        "--length": levels.length,
        "--language": recipes.language,
    }
    if option in made:
        return made[option](catalog, text)
    return recipes.Extracted(find_instruction(catalog, text, slots))


def _gguf_file(gguf: str) -> Path:
    """Raises ModelFileError for a file that is none: it would be taken for a checkpoint's name."""
    from localsteer.runtime.bridge import check_gguf

    path = model_file(gguf)
    check_gguf(path)
    return path


def output_path(output: str | None, instruction: Instruction) -> Path:
    """Where the vector goes. A file that is there and no vector, a model say, is not overwritten."""
    path = Path(output or f"{re.sub(r'[^a-z0-9._-]+', '-', instruction.id.lower())}.gguf")
    check_output(path)
    return path


def check_output(path: Path) -> None:
    """Raise LocalsteerError now where a vector can't or shouldn't be written after the work."""
    refuse_to_replace(path)
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise LocalsteerError where no file can be written beside `path`."""
    require_folder(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # permissions do not tell: a file system may be read-only
    except OSError as error:
        reason = error.strerror or error
        raise VectorFileError(f"{path} can't be written ({reason}): choose another folder.") from None


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


def refuse_source(path: Path, source: str) -> None:
    """Raise VectorFileError where what is made from `source` would take its place: it holds less."""
    if path.exists() and path.samefile(source):
        raise VectorFileError(f"{path} is the vector itself, which would be lost: choose another name.")


def _extract(
    source: Any, recipe: Extracted, queries: Any, n_pairs: int | None, params: dict[str, Any]
) -> ControlVector:
    with _opened(source, params) as opened, progress(f"extracting {recipe.target.id}") as on_progress:
        return recipe.extract(
            opened,
            queries,
            n_pairs=n_pairs,
            layer=params["layer"],
            mode=params["mode"],
            positions=params["positions"] or "all",
            dtype=params["dtype"],
            device=params["device"],
            exact=params["exact"],
            n_threads=params["threads"],
            on_progress=on_progress,
        )


@contextmanager
def _opened(source: Any, params: dict[str, Any]) -> Iterator[Any]:
    """A model on several hosts is opened here, as --rpc says; any other by the extraction."""
    if not params["rpc"]:
        yield source
        return
    settings = {name: params[name] for name in ("rpc", "rpc_seconds", "threads", "exact")}
    with open_engine(str(source), **settings) as engine:
        yield engine
