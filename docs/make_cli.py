"""Writes docs/cli.md from the live command line: python docs/make_cli.py

The text is put together here, not by click's own help formatter, whose layout differs between versions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from localsteer.cli import localsteer

HEAD = """# Command line

Made by `python docs/make_cli.py` from the program itself: change the help texts, not this file.

The answer goes to stdout, notices and progress to stderr. `--json` gives one JSON document on stdout. The
exit status is 0, 1 where a check failed (`doctor`, `verify`), 2 for bad input, with one line on stderr that
says what to do, and 130 after Ctrl-C.
"""


def reference() -> str:
    """The whole of docs/cli.md."""
    return "\n".join([HEAD, *_sections(localsteer, "localsteer")])


def _sections(command: click.Command, path: str) -> Iterator[str]:
    yield f"{'#' * (1 + len(path.split()))} {path}\n"
    yield f"`{_usage(command, path)}`\n"
    yield _body(command.help or "")
    rows = [_row(param) for param in command.params if isinstance(param, click.Option)]
    if rows:
        yield "\n".join(["| Option | |", "|---|---|", *rows]) + "\n"
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                yield from _sections(command.get_command(context, name), f"{path} {name}")


def _usage(command: click.Command, path: str) -> str:
    arguments = [_argument(param) for param in command.params if isinstance(param, click.Argument)]
    if isinstance(command, click.Group):
        arguments.append("COMMAND ...")
    return " ".join([path, "[OPTIONS]", *arguments])


def _argument(argument: click.Argument) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _body(text: str) -> str:
    """The help text: paragraphs joined, and those that click prints as they are (after \\b) as code."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            title, *lines = paragraph[1:].strip("\n").split("\n")
            parts += [title, "\n".join(["```sh", *(line.strip() for line in lines), "```"])]
        else:
            parts.append(" ".join(paragraph.split("\n")))
    return "\n\n".join(parts) + "\n"


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        value = "|".join(option.type.choices) if isinstance(option.type, click.Choice) else option.metavar
        names += f" `{value or option.type.name.upper()}`"
    help_text = re.sub(r"\[default: (.*)\]", r"Default: \1.", option.help or "")
    if option.show_default:
        help_text += f" Default: {option.default}."
    if option.required:
        help_text += " Required."
    return "| {} | {} |".format(*(text.strip().replace("|", "\\|") for text in (names, help_text)))


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
