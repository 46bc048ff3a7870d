"""`localsteer rpc`: builds what --rpc needs, and checks hosts."""

from __future__ import annotations

from pathlib import Path

import click

from . import options
from .console import answer, note, print_json, shown, table


@click.group("rpc", short_help="Build what --rpc needs, and check hosts.")
def command() -> None:
    """Run one model on several hosts: `run`, `chat`, `serve` and `extract` take --rpc HOST:PORT,...

    \b
    Examples:
      localsteer rpc build
      "$(localsteer rpc build)/ggml-rpc-server" -H 127.0.0.1 -p 50052
      localsteer rpc check 127.0.0.1:50052
      localsteer run -m MODEL.gguf --rpc 127.0.0.1:50052,127.0.0.1:50053 "Tell me about foxes."
    """


@command.command("build", short_help="Build llama.cpp's RPC backend and server beside llama-cpp-python.")
@click.option(
    "--source",
    type=click.Path(),
    metavar="DIR",
    help="The source of llama.cpp or llama-cpp-python, in the installed version. [default: from pip]",
)
@click.option("--again", is_flag=True, help="Build even if it exists.")
@options.as_json
def build_command(source: str | None, again: bool, as_json: bool) -> None:
    """Compile llama.cpp's RPC backend against the installed ggml, and print the folder with the backend and
    the program `ggml-rpc-server`, for this machine and hosts like it. This needs CMake and a C++ compiler and
    takes half a minute; if it has been built already, the folder is printed at once.

    The source comes from llama-cpp-python's sdist, which pip downloads.

    \b
    Examples:
      localsteer rpc build
      localsteer rpc build --source llama_cpp_python-0.3.36
    """
    from localsteer.runtime.rpc.library import LIBRARY, SERVER, build

    tree = Path(source) if source is not None else None
    folder = build(tree, say=lambda text: note(f"{text} ..."), again=again)
    if as_json:
        print_json({"folder": str(folder), "library": str(folder / LIBRARY), "server": str(folder / SERVER)})
    else:
        click.echo(shown(str(folder)))


@command.command("check", short_help="Check whether hosts answer, and what memory they have.")
@click.argument("hosts", nargs=-1, required=True, metavar="HOST:PORT...")
@options.as_json
@click.pass_context
def check_command(ctx: click.Context, hosts: tuple[str, ...], as_json: bool) -> None:
    """Greet every host as --rpc would, and show the memory of its devices. The exit status is 1 if any of
    them can't be used.

    \b
    Examples:
      localsteer rpc check 192.168.1.7:50052 192.168.1.8:50052
    """
    from localsteer.runtime.rpc import parse_endpoints
    from localsteer.runtime.rpc.checking import checked

    rows = [checked(endpoint) for endpoint in parse_endpoints(hosts)]
    if as_json:
        print_json({"hosts": rows})
    else:
        made = table("host", "version", "devices", "memory free", "")
        for row in rows:
            memory = ", ".join(f"{device['free'] / 2**30:.1f} GiB" for device in row["devices"])
            known = (row["host"], row["version"], str(len(row["devices"])), memory, row["error"])
            made.add_row(*(text or "" for text in known))
        answer().print(made)
    ctx.exit(1 if any(row["error"] for row in rows) else 0)
