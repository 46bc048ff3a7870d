"""What a shell offers where an option takes a model, a vector file or an instruction. Asked at every Tab, so
nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem


def models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names that -m takes, and files."""
    from localsteer.model_names import NAMES

    return [*_beginning(NAMES, incomplete), *files(_ctx, _param, incomplete)]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell completes the path itself."""
    return [CompletionItem(incomplete, type="file")]


def instructions(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the general catalogue."""
    from localsteer.catalog import load_catalog

    return _beginning(load_catalog().instructions, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
