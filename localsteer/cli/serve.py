"""`localsteer serve`: the OpenAI API over HTTP."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import LocalsteerError

from . import interrupt, options
from .console import note, print_json
from .models import is_named, load_engine, model_file, set_variables

if TYPE_CHECKING:
    from localsteer.runtime.scheduler import Scheduler
    from localsteer.server.run import Running

EXTRA = ("fastapi", "uvicorn", "prometheus_client")
MAX_PORT = 65535
SWITCH_SECONDS = 0.0005


@click.command("serve", short_help="Serve the OpenAI API, each request with its own steering.")
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
    help="Clients must send it; required for any address but this machine's own. Also LOCALSTEER_API_KEY.",
)
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="A name that this server is reached by."
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
    help="Tokens of a reply where the request says nothing; -1 = until the context is full. [default: 1024]",
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
    help="One KV cache for all replies, or one of the whole context for each: faster with long "
    "conversations, for more memory. [default: one]",
)
@click.option(
    "--reproducible",
    is_flag=True,
    help="The same reply to the same request each time, whatever was asked before or beside it: one reply "
    "at a time, and no beginning of a prompt from the cache.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 100_000),
    default=64,
    metavar="N",
    help="Requests that may wait for a place. [default: 64]",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    default=10.0,
    metavar="SECONDS",
    help="For replies under way when the server is told to end. [default: 10]",
)
@click.option(
    "--max-connections",
    type=click.IntRange(2, 100_000),
    default=512,
    metavar="N",
    help="At one time, half of them from one address; those that ask nothing make room. [default: 512]",
)
@click.option(
    "--body-memory",
    type=click.IntRange(1, 1 << 20),
    default=64,
    metavar="MIB",
    help="For the bodies of all requests that are here at one time. [default: 64]",
)
@click.option(
    "--ignore-field",
    "ignored_fields",
    multiple=True,
    metavar="NAME",
    help="A field of requests that is unknown here, to be ignored in the place of an error.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(0.1, 86_400),
    default=600.0,
    metavar="SECONDS",
    help="For one request, waiting and writing included; then it ends with status 504. [default: 600]",
)
@options.template_variables
@options.engine
@options.rpc
@options.as_json
def command(models: tuple[str, ...], folder: str | None, as_json: bool, **params: Any) -> int:
    """Serve models over the OpenAI API, with a page to try them at /.

    A request chooses its steering by the field `steering`, or by the model's name: MODEL+json+lowercase.
    GET /v1/models lists these names, GET /v1/steering the vectors with their figures. SIGTERM and Ctrl-C let
    replies finish for --grace seconds; a few seconds later the process ends in any case. A second Ctrl-C does
    not wait.

    \b
    Examples:
      localsteer serve --vectors vectors/
      localsteer serve -m instruct.gguf -m base.gguf --vectors vectors/ --port 9000
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Tell me about foxes."}], "steering": ["json"]}'
    """
    _check_extra()
    from localsteer.server.security import Access

    _log_failures()
    origins = [origin.rstrip("/") for origin in params["origins"]]
    access = Access(params["host"], params["api_key"] or None, params["hosts"], origins)
    access.check()
    with _opened(models, params) as schedulers:
        running = _application(schedulers, folder, access, params)
        _share_the_interpreter()
        ended = running.serve(on_ready=lambda: _tell(running, as_json))
    return interrupt.EXIT_STATUS if ended == 2 else 0  # 2: SIGINT


def _share_the_interpreter() -> None:
    """So that the event loop has its turn in time, whatever other threads do."""
    # what is here now stays: the collector would go through it all, a quarter of a second each time, alone
    gc.collect()
    gc.freeze()
    # each of the half dozen system calls of an answer has to get the interpreter back from a busy thread
    sys.setswitchinterval(SWITCH_SECONDS)


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalsteerError(f'serve needs {missing[0]}: pip install "localsteer[serve]".')


def _log_failures() -> None:
    """A bug's traceback goes to stderr, never into a reply; the program's own notices have no room for it."""
    logger = logging.getLogger("localsteer.server")
    logger.handlers[:], logger.propagate = [logging.StreamHandler()], False


def model_names(models: Sequence[str]) -> dict[str, str]:
    """{name in the API: what -m said}. Raises LocalsteerError for two models of one name."""
    names: dict[str, str] = {}
    for model in models:
        name = model if is_named(model) else Path(model).stem
        if name in names:
            raise LocalsteerError(f"two models are named {name!r}: rename a file, its name is the model's.")
        names[name] = model
    return names


@contextmanager
def _opened(models: Sequence[str], params: dict[str, Any]) -> Iterator[dict[str, Scheduler]]:
    from localsteer.runtime.scheduler import Scheduler

    loading = {name: params[name] for name in (*options.LOADING, "kv_unified")}
    names = model_names(models)
    for model in models:
        model_file(model)  # a slip in the second name should not wait for the first model
    with ExitStack() as stack:
        schedulers = {}
        for name, model in names.items():
            n_seq_max = 1 if params["reproducible"] else params["parallel"]
            opener = partial(load_engine, model, **loading, n_seq_max=n_seq_max)
            limits = {"max_queue": params["max_queue"], "reuse": not params["reproducible"]}
            schedulers[name] = stack.enter_context(Scheduler(opener, **limits))
            set_variables(schedulers[name].engine, params["variables"])
            schedulers[name].engine.check_template()  # before a client asks
        yield schedulers


def _application(
    schedulers: dict[str, Scheduler], folder: str | None, access: Any, params: dict[str, Any]
) -> Running:
    from localsteer.server.app import create_app
    from localsteer.server.limits import Limits
    from localsteer.server.run import Running

    application = create_app(
        schedulers,
        folder=Path(folder) if folder is not None else None,
        access=access,
        limits=Limits(
            predict=None if params["predict"] < 0 else params["predict"],
            request_seconds=params["request_timeout"],
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
        print_json({"url": running.url, "models": names, "vectors": list(state.vectors.entries)})
    for entry in state.vectors.entries.values():
        if not any(entry.fits(model) for model in state.models):
            why = entry.error or next(iter(entry.misfits.values()))
            note(f"{entry.name} is not offered: {why}")
    note(f"{', '.join(state.models)} at {running.url} (Ctrl-C ends it); the API is at {running.url}/v1")
