"""The program `localsteer`: its list of commands, and the one place where errors become exit statuses.

0: done; 1: a check failed (doctor, verify) or the reader of stdout went away; 2: bad input, or no room for
the answer; 130: Ctrl-C. A traceback is a bug, never an answer to user input.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from localsteer import __version__
from localsteer.errors import LocalsteerError

from . import interrupt
from .console import NoticeHandler, in_one_line, prepare_streams

# Title -> commands, in the order of `localsteer --help`. Command `x` is `command` in localsteer/cli/x.py.
COMMANDS = {
    "Start here": ("demo", "doctor", "models", "rpc", "completion"),
    "Steer": ("run", "chat", "serve", "mcp", "trace"),
    "Vectors": ("extract", "learn", "tune", "calibrate", "transfer", "inspect", "vectors", "pack", "convert"),
    "Measure": ("eval", "verify", "similarity", "study", "states"),
}
# click 8.2 and newer: a group without a command is an error, and its message is the help
NO_COMMAND = getattr(click.exceptions, "NoArgsIsHelpError", ())
HELP_WIDTH = 100  # columns, if the terminal has as many


class Commands(click.Group):
    """Imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in COMMANDS.values() for name in names]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        return import_module(f"{__package__}.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in COMMANDS.items():
            with formatter.section(title):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl(
                    [(name, command.get_short_help_str(limit=80)) for name, command in commands]
                )


@click.group(
    cls=Commands,
    name="localsteer",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
)
@click.version_option(__version__, "-V", "--version", message="localsteer %(version)s")
def localsteer() -> None:
    """Steer quantized GGUF models inside llama.cpp: get replies in JSON, in lowercase or in one sentence
    without asking for it in the prompt.

    \b
    Start with the model that comes with localsteer:
      localsteer demo
      localsteer run --instruction json "Tell me about foxes."

    \b
    Then use your own:
      localsteer run -m MODEL.gguf --instruction json "Tell me about foxes."
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the program and exit. args: the words after the program's name (default: the real ones)."""
    prepare_streams()
    logger = logging.getLogger("localsteer")
    logger.handlers[:], logger.propagate = [NoticeHandler()], False
    with interrupt.handled():
        status = _run(args)
    sys.exit(status)


def _run(args: Sequence[str] | None) -> int:
    try:
        status = localsteer.main(args=args, prog_name="localsteer", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return interrupt.EXIT_STATUS
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except OSError as error:
        reason = error.strerror or error
        if error.filename is not None:
            _complain(f"{error.filename} can't be used: {reason}.")
            return 2
        _drop_stdout()
        _complain(f"standard output can't be written: {reason}.")
        return 2
    except NO_COMMAND as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except (click.ClickException, LocalsteerError) as error:
        if interrupt.pressed():  # a load that Ctrl-C cut short reports an error of its own
            return interrupt.EXIT_STATUS
        _complain(_one_line(error, sys.argv[1:] if args is None else args))
        return error.exit_code
    return status if isinstance(status, int) else 0


def _complain(message: str) -> None:
    click.echo(f"localsteer: {in_one_line(message)}", err=True)


def _drop_stdout() -> None:
    """Discard further output, which nobody reads: otherwise Python complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: click.ClickException | LocalsteerError, args: Sequence[str]) -> str:
    if not isinstance(error, click.ClickException):
        return " ".join(str(error).split())
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    # the option parser passes no context
    known = [name for names in COMMANDS.values() for name in names]
    command = " ".join(["localsteer", *(name for name in args[:1] if name in known)])
    where = context.command_path if context else command
    return f"{message} See `{where} --help`."
