"""`localsteer completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from localsteer.errors import LocalsteerError

from . import options
from .console import print_json

PROGRAM = "localsteer"
VARIABLE = "_LOCALSTEER_COMPLETE"  # the shell's name -> click's name for it
SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the completion script for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(SHELLS))
@options.as_json
@click.pass_context
def command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script with which SHELL completes commands, options, models, vector files and instructions.

    \b
    Examples:
      localsteer completion bash >> ~/.bashrc
      localsteer completion zsh >> ~/.zshrc
      localsteer completion fish > ~/.config/fish/completions/localsteer.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise LocalsteerError(f"the installed click has no completion for {shell}: pip install -U click")
    template, names = kind.source_template, kind(ctx.find_root().command, {}, PROGRAM, VARIABLE)
    # not with `source()`, which runs the installed bash for its version
    script = template % names.source_vars()
    print_json({"shell": shell, "script": script}) if as_json else click.echo(script)
