"""`localsteer vectors`: the vectors that `run --instruction` made on first use, and those that ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from localsteer.errors import VectorFileError
from localsteer.jsonable import JsonObject

from . import options
from .console import answer, note, print_json, table
from .options import Params
from .shipped import SHARES, setting_of, shares_of


@dataclass(frozen=True)
class Cached:
    """One cached vector. key: MODEL/NAME, short and unique; settings: None for a file that can't be read."""

    path: Path
    key: str
    name: str
    model: str
    settings: Params | None


@click.group(
    "vectors", invoke_without_command=True, short_help="List and remove the vectors on this machine."
)
@options.as_json
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List and remove the vectors that `run --instruction` made on first use. Without a subcommand, list
    them; `shipped` lists the vectors that come with localsteer.

    \b
    Examples:
      localsteer vectors
      localsteer vectors shipped
      localsteer vectors remove json
      localsteer vectors remove --all
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list", short_help="List them.")
@options.as_json
def list_command(as_json: bool) -> None:
    """List the cached vectors with their models and settings.

    \b
    Example:
      localsteer vectors list --json
    """
    _list(as_json or _group_as_json())


@command.command("shipped", short_help="List the vectors that come with localsteer, with their figures.")
@click.argument("model", required=False)
@options.as_json
def shipped_command(model: str | None, as_json: bool) -> None:
    """List the vectors in packs, for all models or for one MODEL (a file or a name), with their settings and
    the share of replies that follow: plain, steered, told in words, and both.

    \b
    Examples:
      localsteer vectors shipped
      localsteer vectors shipped smol
    """
    from localsteer.packs import all_packs, pack_for

    from .models import model_file

    match = pack_for(model_file(model)) if model else None
    packs = ([match.pack] if match else []) if model else all_packs()
    if as_json or _group_as_json():
        print_json({"packs": [pack.to_dict() for pack in packs]})
    elif not packs:
        note(f"no vectors ship for {model}." if model else "no packs are used: LOCALSTEER_PACKS is off.")
    for pack in () if as_json or _group_as_json() else packs:
        rows = table("instruction", "setting", *SHARES, "n", "file", numbers=(*SHARES, "n"), title=pack.title)
        for entry in pack.instructions.values():
            row = {**entry.settings, "scores": entry.scores}
            rows.add_row(entry.id, setting_of(row), *shares_of(row), str(entry.n), entry.file)
        answer().print(rows)
        answer().print(f"files in {pack.folder}", soft_wrap=True)


@command.command("remove", short_help="Delete some or all cached vectors.")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Delete all cached vectors.")
@options.as_json
def remove_command(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Delete cached vectors by NAME, or by their key in the list if several have that name.

    They are made again when needed.

    \b
    Examples:
      localsteer vectors remove json
      localsteer vectors remove 3f2a9c1d04b7e586/json-1c2d3e4f
    """
    from localsteer.cache import remove_vector

    if bool(names) == everything:
        raise click.UsageError("name the vectors to delete, or use --all.")
    found = _cached()
    chosen = found if everything else [_choose(found, name) for name in dict.fromkeys(names)]
    for cached in chosen:
        remove_vector(cached.path)
    if as_json or _group_as_json():
        print_json({"removed": [cached.key for cached in chosen]})
    else:
        note(f"{len(chosen)} removed.")


def _group_as_json() -> bool:
    """Whether `--json` was given before the subcommand: `vectors --json list`."""
    return click.get_current_context().parent.params["as_json"]


def _list(as_json: bool) -> None:
    from localsteer.cache import cache_folder

    found = _cached()
    if as_json:
        print_json(
            {"folder": str(cache_folder() / "vectors"), "vectors": [_document(cached) for cached in found]}
        )
        return
    if not found:
        note(f"no vectors yet in {cache_folder()}: `localsteer run --instruction ID` makes them.")
        return
    rows = table("name", "model", "layers", "mode", "positions", "strength", "key", numbers=("strength",))
    rows.columns[-1].no_wrap = True  # users copy it
    for cached in found:
        values = cached.settings or {}
        layers = ",".join(map(str, values.get("layers", ())))
        strength = f"{values['strength']:g}" if values else ""
        mode = values.get("mode", "unreadable")
        rows.add_row(
            cached.name, cached.model, layers, mode, values.get("positions", ""), strength, cached.key
        )
    answer().print(rows)


def _document(cached: Cached) -> JsonObject:
    head = {"name": cached.name, "key": cached.key, "model": cached.model, "file": str(cached.path)}
    return head | (cached.settings or {"error": "unreadable"})


def _cached() -> list[Cached]:
    from localsteer.cache import cached_vectors

    return [_read(path) for path in cached_vectors()]


def _read(path: Path) -> Cached:
    from localsteer.vector import ControlVector

    key = f"{path.parent.name}/{path.stem}"
    try:
        vector = ControlVector.load(path)
    except VectorFileError:
        return Cached(path, key, path.stem, "", None)
    names = ("mode", "positions", "strength")
    settings = {"layers": list(vector.layers)} | {name: getattr(vector, name) for name in names}
    return Cached(path, key, vector.name or path.stem, str(vector.provenance.get("model_name", "")), settings)


def _choose(found: list[Cached], name: str) -> Cached:
    """The cached vector of that name. Raises VectorFileError if there is none, or more than one."""
    matches = [cached for cached in found if name in (cached.key, cached.name)]
    if not matches:
        known = ", ".join(dict.fromkeys(cached.name for cached in found)) or "there is none"
        raise VectorFileError(f"no cached vector {name!r}: {known}.")
    if len(matches) > 1:
        keys = ", ".join(cached.key for cached in matches)
        raise VectorFileError(f"{name!r} names {len(matches)} cached vectors: choose one of {keys}.")
    return matches[0]
