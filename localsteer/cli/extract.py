"""`localsteer extract`: from an instruction and base queries to a control-vector file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.cache import require_folder
from localsteer.errors import VectorFileError
from localsteer.jsonable import JsonObject
from localsteer.token_choice import FORMS

from . import options
from .console import note, print_json, progress, shown
from .inspect import settings_line
from .models import catalog_of, extraction_queries, find_instruction, model_file, open_engine
from .options import Params

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction
    from localsteer.extract.recipes import Extracted
    from localsteer.vector import ControlVector

    Make = Callable[..., ControlVector]

# a copy of those in localsteer.extract.levels, whose import brings in numpy; a test keeps the two equal
LENGTHS = (
    "extremely_concise",
    "concise",
    "moderate",
    "verbose",
    "extremely_verbose",
    "conciseness",
    "verbosity",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")  # those of localsteer.extract.torch_backend


@click.command("extract", short_help="Extract a control vector for an instruction.")
@click.option(
    "-i",
    "--instruction",
    metavar="ID_OR_TEXT",
    help="An instruction: an id of the catalogue, or your own words.",
)
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
    "--pairs-file",
    type=click.Path(),
    metavar="FILE",
    help='Pairs of texts, JSONL or a JSON array: {"with": TEXT, "without": TEXT}, or as in published sets '
    "(docs/pairs.md).",
)
@click.option(
    "--raw", is_flag=True, help="With --pairs-file: use its texts as they are, without the chat template."
)
@click.option(
    "--tokens",
    default="last",
    metavar="WHICH",
    help=f"Tokens whose state counts: {FORMS}. The mean is taken of several. [default: last]",
)
@click.option("--name", metavar="TEXT", help="The vector's name. [default: the instruction's id, or FILE's]")
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
    "--dtype", type=click.Choice(DTYPES), default="auto", help="PyTorch: type of the weights. [default: auto]"
)
@click.option("--device", metavar="NAME", help="PyTorch: cpu, cuda, ... [default: a GPU, if there is one]")
@click.option("--exact", is_flag=True, help="llama.cpp: F32 cache, no flash attention; slower.")
@options.threads
@options.rpc
@options.as_json
def command(
    gguf: str | None, checkpoint: str | None, output: str | None, as_json: bool, **params: Any
) -> None:
    """Extract the control vector of an instruction: the average difference that it makes to the model's state
    at the last prompt token, over prompts with and without it. From pairs of texts (--pairs-file): the
    difference between their sides, at the last token or at others (--tokens).

    This works on a GGUF with only llama.cpp, or on a transformers model with PyTorch. --layer, --mode,
    --positions and --strength are stored in the file, and can be overridden whenever it is used. Lengths and
    words are added to the state (mode add, where a strength of 2 goes twice as far); everything else is
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
      localsteer extract --gguf MODEL.gguf --pairs-file sycophancy.json --tokens -2 -o sycophancy.gguf
      localsteer extract --gguf MODEL.gguf --pairs-file happy.jsonl --raw --layer 14
      localsteer extract --model Qwen/Qwen2.5-0.5B-Instruct --instruction json -o json.gguf
    """
    from localsteer.vector import describe

    if (gguf is None) == (checkpoint is None):
        raise click.UsageError("name the model with either --gguf MODEL.gguf or --model HF_FOLDER_OR_NAME.")
    _refuse_idle(params, gguf is not None)
    settings = _settings(params) | {"n_pairs": params["pairs"]}
    name, make = _what_is_extracted(gguf, params)
    path = named_path(output, name)
    source = checkpoint if gguf is None else _gguf_file(gguf)
    with _opened(source, params) as opened, progress(f"extracting {name}") as on_progress:
        vector = make(opened, on_progress=on_progress, **settings)
    vector = replace(vector.at(strength=params["strength"]), name=params["name"] or vector.name)
    vector.save(path)
    described = describe(vector)
    if as_json:
        print_json({"file": str(path), **described})
    else:
        click.echo(shown(str(path)))
        n_pairs = vector.provenance["n_pairs"]
        note(f"{n_pairs} pair{'s' * (n_pairs != 1)}; {settings_line(described)}.")


def _what_is_extracted(gguf: str | None, params: Mapping[str, Any]) -> tuple[str, Make]:
    """The vector's name, and the function that makes it. Raises click.UsageError for options that exclude
    each other."""
    names = ("instruction", "include_word", "exclude_word", "length", "language")
    wanted = {f"--{name.replace('_', '-')}": params[name] for name in names}
    if params["pairs_file"] is not None:
        idle = {"catalog": "--catalog", "slots": "--slot", "queries": "--queries"}
        idle = {option: params[name] or None for name, option in idle.items()}
        return _from_texts(params["pairs_file"], params, wanted | idle)
    catalog = catalog_of(gguf, params["catalog"])
    recipe = recipe_of(catalog, wanted, params["slots"])
    return _from_instruction(catalog, recipe, params["queries"], params)


def _refuse_idle(params: Mapping[str, Any], is_gguf: bool) -> None:
    """Raise click.UsageError for an option of the other backend, which would do nothing."""
    if is_gguf and (params["device"] is not None or params["dtype"] != "auto"):
        name = "--dtype" if params["device"] is None else "--device"
        raise click.UsageError(f"{name} is for PyTorch: use --model instead of --gguf, or leave it out.")
    if params["exact"] and not is_gguf:
        raise click.UsageError("--exact is for llama.cpp: use --gguf instead of --model, or --dtype.")
    if params["rpc"] and not is_gguf:
        raise click.UsageError("--rpc is for llama.cpp: use --gguf instead of --model.")
    if params["rpc_seconds"] is not None and not params["rpc"]:
        raise click.UsageError("--rpc-timeout needs --rpc.")


def recipe_of(
    catalog: Catalog, wanted: Mapping[str, str | None], slots: tuple[tuple[str, Any], ...]
) -> Extracted:
    """What to extract. wanted: values by option, None if not given. Raises click.UsageError unless
    exactly one was given."""
    named = {option: text for option, text in wanted.items() if text is not None}
    if len(named) != 1:
        raise click.UsageError(f"give exactly one of {', '.join(wanted)}: it says what to extract.")
    ((option, text),) = named.items()
    if slots and option != "--instruction":
        raise click.UsageError(f"--slot belongs to --instruction; {option} fills its own slots.")
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
    """The path of a GGUF. Raises ModelFileError if it is missing, as it would be taken for a checkpoint's
    name."""
    from localsteer.runtime.bridge import check_gguf

    path = model_file(gguf)
    check_gguf(path)
    return path


def output_path(output: str | None, instruction: Instruction) -> Path:
    """The path for the vector of an instruction; see `named_path`."""
    return named_path(output, instruction.id)


def named_path(output: str | None, name: str) -> Path:
    """The path for a vector. An existing file that is not a vector, such as a model, is not overwritten."""
    if output == "":  # for instance from an unset shell variable
        raise VectorFileError("-o names no file: write the path of the vector file, or leave -o out.")
    path = Path(output or f"{re.sub(r'[^a-z0-9._-]+', '-', name.lower())}.gguf")
    check_output(path)
    return path


def check_output(path: Path) -> None:
    """Raise LocalsteerError now if a vector can't, or shouldn't, be written there after the work."""
    refuse_to_replace(path)
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise LocalsteerError if no file can be written beside `path`."""
    require_folder(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # permissions are not enough: the file system may be read-only
    except OSError as error:
        reason = error.strerror or error
        raise VectorFileError(f"{path} can't be written ({reason}): choose another folder.") from None


def refuse_to_replace(path: Path) -> None:
    """Raise VectorFileError for an existing file that is not a localsteer vector."""
    from localsteer.vector import ControlVector

    if not path.exists():
        return
    try:
        ControlVector.load(path)
    except VectorFileError:
        raise VectorFileError(
            f"{path} already exists and is not a vector file of localsteer: choose another name."
        ) from None


def refuse_source(path: Path, source: str) -> None:
    """Raise VectorFileError if the result would replace `source`, from which it is made and which holds
    more."""
    if path.exists() and path.samefile(source):
        raise VectorFileError(f"{path} is the vector itself, which would be lost: choose another name.")


@contextmanager
def _opened(source: Any, params: Params) -> Iterator[Any]:
    """Opens a model on several hosts (--rpc); the extraction opens any other model itself."""
    if not params["rpc"]:
        yield source
        return
    settings = {name: params[name] for name in ("rpc", "rpc_seconds", "threads", "exact")}
    with open_engine(str(source), **settings) as engine:
        yield engine


def _from_texts(path: str, params: Mapping[str, Any], idle: Mapping[str, Any]) -> tuple[str, Make]:
    """The vector's name, and the function that makes it. idle: the options that otherwise say what to
    extract."""
    from localsteer.extract import extract_from_texts, read_text_pairs

    for option, value in idle.items():
        if value is not None:
            raise click.UsageError(
                f"{option} and --pairs-file exclude each other: the file holds whole texts."
            )
    name = params["name"] or Path(path).stem
    return name, partial(extract_from_texts, pairs=read_text_pairs(path, raw=params["raw"]), name=name)


def _from_instruction(
    catalog: Catalog, recipe: Extracted, queries: str | None, params: Mapping[str, Any]
) -> tuple[str, Make]:
    if params["raw"]:
        raise click.UsageError("--raw belongs to --pairs-file: an instruction is asked as a question.")
    base_queries = extraction_queries(catalog, recipe.instruction, queries)
    return params["name"] or recipe.target.id, partial(recipe.extract, queries=base_queries)


def _settings(params: Mapping[str, Any]) -> JsonObject:
    """The settings of an extraction, from any source."""
    from localsteer.token_choice import TokenChoice

    settings = {"tokens": TokenChoice.parse(params["tokens"])}
    settings |= {key: params[key] for key in ("layer", "dtype", "device", "exact")}
    settings |= {"positions": params["positions"] or "all", "n_threads": params["threads"]}
    return settings if params["mode"] is None else settings | {"mode": params["mode"]}
