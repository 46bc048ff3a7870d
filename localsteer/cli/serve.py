"""`localsteer serve`: models over HTTP, by the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import LocalsteerError

from . import interrupt, options
from .console import note, print_json
from .models import is_named, load_engine, model_file, set_variables
from .options import Params

if TYPE_CHECKING:
    from localsteer.runtime.scheduler import Scheduler
    from localsteer.server.pool import Loadable, Pool
    from localsteer.server.run import Running

HEADER_SECONDS = 20.0  # for the headers that --all-models has to read
ALL_MODELS_AT_ONCE = 3  # as in Ollama without a GPU
EXTRA = ("fastapi", "uvicorn", "prometheus_client")
MAX_PORT = 65535
SWITCH_SECONDS = 0.0005


@click.command(
    "serve", short_help="Serve OpenAI's, Anthropic's and Ollama's APIs, with steering per request."
)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    default=("bundled",),
    metavar="GGUF",
    help="A model: a GGUF file, or a name (see `localsteer models`); repeat for several. [default: bundled]",
)
@click.option(
    "--vectors", "folder", type=click.Path(), metavar="DIR", help="The folder of the vector files to offer."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, MAX_PORT),
    default=8080,
    metavar="N",
    help="0 takes a free one. [default: 8080]",
)
@click.option(
    "--api-key",
    envvar="LOCALSTEER_API_KEY",
    metavar="KEY",
    help="Key that clients must send; required unless --host is this machine only. Also LOCALSTEER_API_KEY.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A host name under which clients reach this server.",
)
@click.option(
    "--cors", "origins", multiple=True, metavar="ORIGIN", help="A site whose pages may call this server."
)
@click.option(
    "-n",
    "--predict",
    type=click.IntRange(min=-1),
    default=1024,
    metavar="N",
    help="Tokens of a reply if the request sets no limit; -1 = until the context is full. [default: 1024]",
)
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1, 256),
    default=8,
    metavar="N",
    help="Replies that are decoded together. [default: 8]",
)
@click.option(
    "--kv-unified/--no-kv-unified",
    default=True,
    help="One KV cache for all replies, or a whole context for each, which is faster with long "
    "conversations and takes more memory. [default: one]",
)
@click.option(
    "--reproducible",
    is_flag=True,
    help="Give the same request the same reply every time, whatever else is asked: decode one reply "
    "at a time, and take no part of a prompt from the cache.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 100_000),
    default=64,
    metavar="N",
    help="Requests that may wait for a slot. [default: 64]",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    default=10.0,
    metavar="SECONDS",
    help="Time for replies under way to finish when the server is stopped. [default: 10]",
)
@click.option(
    "--max-connections",
    type=click.IntRange(2, 100_000),
    default=512,
    metavar="N",
    help="Open connections, at most half of them from one address; idle ones make room. [default: 512]",
)
@click.option(
    "--body-memory",
    type=click.IntRange(1, 1 << 20),
    default=64,
    metavar="MIB",
    help="Memory for the bodies of all requests together. [default: 64]",
)
@click.option(
    "--ignore-field",
    "ignored_fields",
    multiple=True,
    metavar="NAME",
    help="Ignore this unknown field of requests instead of refusing it.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(0.1, 86_400),
    default=600.0,
    metavar="SECONDS",
    help="Time for one request, including waiting and writing; then it ends with status 504. [default: 600]",
)
@click.option(
    "--job-minutes",
    type=click.FloatRange(0, 10_080),
    default=60.0,
    metavar="MINUTES",
    help="Time for making a vector on request, in the folder of --vectors (the page, /v1/jobs); 0 = make "
    "none. [default: 60]",
)
@click.option(
    "--all-models",
    is_flag=True,
    help="Offer every model that `localsteer models` lists, loaded on first request, and any other "
    "named model that is on this machine by then.",
)
@click.option(
    "--download",
    is_flag=True,
    help="With --all-models: fetch what clients name as hf:ORG/REPO from Hugging Face.",
)
@click.option(
    "--max-models",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Models in memory at one time; the least recently used one makes room, never during a request. "
    "[default: all that -m names; 3 with --all-models]",
)
@click.option(
    "--max-memory",
    type=click.FloatRange(0.001, 1e6),
    metavar="GB",
    help="Memory for models, weights and caches together, estimated from their headers.",
)
@options.template_variables
@options.engine
@options.rpc
@options.as_json
def command(models: tuple[str, ...], folder: str | None, as_json: bool, **params: Any) -> int:
    """Serve models over the APIs of OpenAI, Anthropic and Ollama, with a page at / to try them.

    A request chooses its steering by the field `steering`, or by the model's name: MODEL+json+lowercase. GET
    /v1/models lists these names, GET /v1/steering the vectors with their figures. After SIGTERM or Ctrl-C,
    replies have --grace seconds to finish; a few seconds later the process ends in any case. A second Ctrl-C
    ends it at once.

    \b
    Examples:
      localsteer serve --vectors vectors/
      localsteer serve -m instruct.gguf -m base.gguf --vectors vectors/ --port 9000
      localsteer serve -m ollama:llama3.2:1b -m hf:ORG/REPO:Q4_K_M --max-models 1
      localsteer serve --all-models --max-memory 12
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Tell me about foxes."}], "steering": ["json"]}'
    """
    if params["download"] and not params["all_models"]:
        raise click.UsageError("--download needs --all-models: without it no other names are served.")
    _check_extra()
    from localsteer.server.security import Access

    _log_failures()
    origins = [origin.rstrip("/") for origin in params["origins"]]
    access = Access(params["host"], params["api_key"] or None, params["hosts"], origins)
    access.check()
    with _opened(models, params) as pool:
        running = _application(pool, folder, access, params)
        _share_the_interpreter()
        ended = running.serve(on_ready=lambda: _tell(running, as_json))
    return interrupt.EXIT_STATUS if ended == 2 else 0  # 2: SIGINT


def _share_the_interpreter() -> None:
    """Let the event loop run in time, whatever other threads do."""
    # what exists now stays: the collector would scan all of it, for a quarter of a second each time
    gc.collect()
    gc.freeze()
    # after each of an answer's half dozen system calls, the interpreter has to come back from a busy thread
    sys.setswitchinterval(SWITCH_SECONDS)


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalsteerError(f'serve needs {missing[0]}: pip install "localsteer[serve]".')


def _log_failures() -> None:
    """Log a bug's traceback to stderr, never into a reply; the program's one-line notices have no room for
    it."""
    logger = logging.getLogger("localsteer.server")
    logger.handlers[:], logger.propagate = [logging.StreamHandler()], False


def model_names(models: Sequence[str]) -> dict[str, str]:
    """{name in the API: what -m said}. Raises LocalsteerError for two models of one name."""
    names: dict[str, str] = {}
    for model in models:
        name = model if is_named(model) else Path(model).stem
        if name in names:
            raise LocalsteerError(
                f"two models are named {name!r}: rename one of the files, since "
                "a model is named after its file."
            )
        names[name] = model
    return names


@contextmanager
def _opened(models: Sequence[str], params: Params) -> Iterator[Pool]:
    """A pool in which the models of -m are loaded as far as there is room for them."""
    from localsteer.server.pool import Pool

    names = model_names(models)
    # a mistake in the options should not wait for a load
    files = {name: model_file(model) for name, model in names.items()}
    loadables = {name: _loadable(name, model, files[name], params) for name, model in names.items()}
    if params["all_models"]:
        loadables = {**_all_models(params), **loadables}
        loadables = {name: loadables[name] for name in (*names, *loadables)}  # those of -m first
    limits = {
        "max_models": params["max_models"] or (ALL_MODELS_AT_ONCE if params["all_models"] else None),
        "max_bytes": params["max_memory"] and round(params["max_memory"] * 1e9),
    }
    resolve = partial(_resolved, params=params) if params["all_models"] else None
    with Pool(loadables.values(), **limits, resolve=resolve) as pool:
        for name in names:
            pool.load_now(name)
        yield pool


def _loadable(name: str, model: str, file: Path, params: Params) -> Loadable:
    """One model. file: its first part."""
    from localsteer.model_names import asked_of
    from localsteer.server.pool import Loadable

    opener = partial(_scheduler, model, params)
    return Loadable(name, opener, _memory(file, params), file, asked_of(model).sampling)


def _memory(file: Path, params: Params) -> int:
    """Bytes that a model takes; 0 if no limit is set or the header does not say."""
    from localsteer.model_list import memory_needed
    from localsteer.stores import parts_of

    if params["max_memory"] is None:
        return 0
    try:
        n_seq_max = 1 if params["reproducible"] else params["parallel"]
        return memory_needed(parts_of(file), params["ctx_size"], n_seq_max)
    except (LocalsteerError, OSError):  # opening it reports why
        return 0


def _scheduler(model: str, params: Params, stop: threading.Event) -> Scheduler:
    """stop: ends the loading."""
    from localsteer.runtime.scheduler import Scheduler

    loading = {name: params[name] for name in (*options.LOADING, "kv_unified")}
    n_seq_max = 1 if params["reproducible"] else params["parallel"]
    opener = partial(
        load_engine, model, **loading, n_seq_max=n_seq_max, as_asked=True, download=False, stop=stop
    )
    scheduler = Scheduler(opener, max_queue=params["max_queue"], reuse=not params["reproducible"])
    try:
        set_variables(scheduler.engine, params["variables"])
        scheduler.engine.check_template()  # before the first request
    except BaseException:
        scheduler.close()
        raise
    return scheduler


def _all_models(params: Params) -> dict[str, Loadable]:
    """The models in `localsteer models` that are complete and can be steered."""
    from localsteer.model_list import all_models

    models = all_models(HEADER_SECONDS).models
    usable = [model for model in models if model.path and model.shape and not model.note and model.steers]
    return {model.name: _loadable(model.name, model.name, model.path, params) for model in usable}


def _resolved(name: str, params: Params) -> Loadable | None:
    """The model for a name that was unknown at the start; never a path. Raises ModelFileError."""
    from localsteer.stores import find, is_stored_name

    if not is_stored_name(name):
        return None
    model = find(name, download=params["download"], on_progress=_tell_of_download())
    return _loadable(model.name, model.name, model.path, params)


def _tell_of_download() -> Callable[[str, int, int], None]:
    told = set()

    def on_progress(file: str, _done: int, total: int) -> None:
        if file not in told:
            told.add(file)
            note(f"fetching {file} ({total / 1e6:.1f} MB), requested by a client")

    return on_progress


def _application(pool: Pool, folder: str | None, access: Any, params: Params) -> Running:
    from localsteer.server.app import create_app
    from localsteer.server.limits import Limits
    from localsteer.server.run import Running

    application = create_app(
        pool,
        folder=Path(folder) if folder is not None else None,
        access=access,
        limits=Limits(
            predict=None if params["predict"] < 0 else params["predict"],
            request_seconds=params["request_timeout"],
            job_seconds=60 * params["job_minutes"],
            max_connections=params["max_connections"],
            ignored_fields=frozenset(params["ignored_fields"]),
            max_held=params["body_memory"] << 20,
        ),
    )
    return Running(application, params["host"], params["port"], params["grace"])


def _tell(running: Running, as_json: bool) -> None:
    state = running.state
    if as_json:
        names = [entry["id"] for entry in state.listed()]
        print_json(
            {
                "url": running.url,
                "models": names,
                "vectors": list(dict.fromkeys(entry.name for entry in state.vectors.all())),
            }
        )
    for entry in state.vectors.entries.values():
        is_judged = entry.error or entry.judged.issuperset(state.pool.names)
        if is_judged and not any(entry.fits(model) for model in state.models):
            why = entry.error or next(iter(entry.misfits.values()))
            note(f"{entry.name} is not offered: {why}")
    for model in state.models:
        shipped = [name for name in state.vectors.of_model(model) if name not in state.vectors.entries]
        if shipped:
            note(f"{model} comes with vectors: {', '.join(shipped)}; ask for {model}+{shipped[0]}.")
    more = len(state.pool.names) - len(state.models)
    others = f" and {more} that load on request" if more else ""
    note(
        f"{', '.join(state.models)}{others} at {running.url} (Ctrl-C ends it); the API is at {running.url}/v1"
    )
