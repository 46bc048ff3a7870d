"""Shell completion of models, vector files and instructions. It runs at every Tab, so it imports nothing
heavy."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem


def models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes names that -m takes, and files."""
    from localsteer.model_names import NAMES

    return [*_beginning(NAMES, incomplete), *files(_ctx, _param, incomplete)]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete the path."""
    return [CompletionItem(incomplete, type="file")]


def instructions(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes ids of the general catalogue."""
    from localsteer.catalog import load_catalog

    return _beginning(load_catalog().instructions, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
