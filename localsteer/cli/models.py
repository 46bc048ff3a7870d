"""Opening models for commands: the bundled ones by name, files by path, with a bar while they load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import CatalogError, ModelFileError

from .console import loading, note

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine

_BUNDLED = re.compile(r"bundled(-base)?(?::(\w+))?")


def is_bundled(model: str) -> bool:
    """Whether `-m MODEL` means a model of the package; a file of that name wins."""
    return _BUNDLED.fullmatch(model) is not None and not Path(model).exists()


def model_file(model: str) -> Path:
    """The GGUF of `-m MODEL`; a bundled one is made now, if need be. Raises ModelFileError."""
    if is_bundled(model):
        from localsteer import bundled

        base, quant = _BUNDLED.fullmatch(model).groups()
        return bundled.gguf_path(
            "base" if base else "instruct", quant or bundled.DEFAULT_QUANT, on_making=note
        )
    if not model:
        raise ModelFileError("no model is named: give a GGUF file, or `bundled`.")
    path = Path(model)
    if path.is_dir():
        raise ModelFileError(
            f"{path} is a folder: give a GGUF file (`localsteer convert model {path} ...` makes one)."
        )
    return path


def load_engine(
    model: str, *, ctx_size: int = 0, threads: int | None = None, gpu_layers: int = 0, **settings: Any
) -> Engine:
    """The engine of `-m MODEL`, to be closed by the caller. settings: as Engine has them."""
    from localsteer.engine import Engine

    path = model_file(model)
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
    from localsteer.evaluate.verify import check_arguments

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
