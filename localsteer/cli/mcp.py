"""`localsteer mcp`: models and steering as tools of the Model Context Protocol, on stdin and stdout."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import click

from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject

from . import options
from .console import note, print_json


@click.command("mcp", short_help="Serve steering as tools of the Model Context Protocol, on stdio.")
@options.model
@click.option(
    "--max-models",
    type=click.IntRange(min=1),
    default=2,
    metavar="N",
    help="Models that may be open at once; the least recently used one is closed. [default: 2]",
)
@options.engine
@click.option("--json", "as_json", is_flag=True, help="Print the settings that clients take, and exit.")
def command(model: str, max_models: int, as_json: bool, **loading: Any) -> None:
    """Speak the Model Context Protocol on stdin and stdout with the program that starts this one: list models
    and vectors, complete with steering, trace, verify. It ends when stdin does.

    Calls that name no model use MODEL; the first of them opens it. Needs pip install "localsteer[mcp]".

    \b
    Examples:
      localsteer mcp -m smol
      localsteer mcp -m MODEL.gguf --json
    """
    if importlib.util.find_spec("mcp") is None:
        raise LocalsteerError('mcp needs the package mcp: pip install "localsteer[mcp]".')
    from .models import is_named, model_file

    path = model_file(model)
    if as_json:
        print_json(_settings(str(path.resolve()) if not is_named(model) else model))
        return
    if not path.is_file():  # before a client waits for an answer about it
        raise LocalsteerError(
            f"{model} does not exist: name a GGUF file, or a model listed by `localsteer models`."
        )
    if sys.stdin.isatty():
        note("speaking the Model Context Protocol on standard input; end it with Ctrl-D.")
    from localsteer.plugins.mcp_tools import serve_stdio

    serve_stdio(model, max_models=max_models, **loading)


def _settings(model: str) -> JsonObject:
    """The settings in the form that most clients take. They name the interpreter, since a client may have
    another PATH."""
    arguments = ["-m", "localsteer", "mcp", "-m", model]
    return {"mcpServers": {"localsteer": {"command": sys.executable, "args": arguments}}}
