"""One model of a store, and how a name is matched against those that are there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localsteer.errors import ModelFileError

MAX_SHOWN = 4  # names in a message
MAX_NAME = 512  # characters of a name that anybody may ask for


@dataclass(frozen=True)
class AskedFor:
    """How a store says that its model is to be asked; the user's own settings come first.

    stop: texts that end a reply. system: the message where a conversation has none. sampling: by the names
    of Sampling. n_ctx: tokens of prompt and reply.
    """

    stop: tuple[str, ...] = ()
    system: str | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    n_ctx: int | None = None

    @property
    def shown(self) -> str:
        """`system message, 2 stop strings, temp 0.7, context 8192`; empty where there is nothing."""
        words = ["system message"] if self.system else []
        words += [f"{len(self.stop)} stop string{'s' * (len(self.stop) > 1)}"] if self.stop else []
        words += [f"{name} {value:g}" for name, value in self.sampling.items()]
        words += [f"context {self.n_ctx}"] if self.n_ctx else []
        return ", ".join(words)


@dataclass(frozen=True)
class StoredModel:
    """name: for -m. files: all parts, the first is the one to open. size: bytes of all. fault: why it can't
    be used, without a full stop. remark: what of it is left out here."""

    name: str
    files: tuple[Path, ...] = ()
    size: int | None = None
    fault: str = ""
    remark: str = ""
    asked: AskedFor = field(default_factory=AskedFor)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fault", one_line(self.fault))  # which quotes names from foreign files

    @property
    def path(self) -> Path:
        return self.files[0]


def one_line(text: str) -> str:
    """With U+FFFD for what can't be shown: line breaks, control characters, halves of characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def is_whole(text: str) -> bool:
    """Whether no half of a character is in it, as JSON may have it and no reply ever has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def checked(rest: str, prefix: str, example: str) -> str:
    """What stands behind a prefix. Raises ModelFileError for what can be no name anywhere: a path out of the
    store, control characters, nothing at all."""
    parts = rest.replace("\\", "/").split("/")
    odd = next((character for character in rest if not character.isprintable()), None)
    if not rest.strip() or len(rest) > MAX_NAME or odd or ".." in parts or "" in parts or "." in parts:
        raise ModelFileError(f"{prefix + rest!r:.120} is not the name of a model: write it like {example}.")
    return rest


def unknown(name: str, known: Iterable[str], where: str) -> ModelFileError:
    """The error for a name that means nothing, with the nearest of those there are."""
    near = nearest(name, known)
    hint = f"the nearest: {', '.join(near)}" if near else "`localsteer models` lists what is there"
    return ModelFileError(f"{name:.120} is not in {where}: {hint}.")


def ambiguous(name: str, meant: Sequence[str]) -> ModelFileError:
    shown = ", ".join(meant[:MAX_SHOWN]) + (f" and {len(meant) - MAX_SHOWN} more" * (len(meant) > MAX_SHOWN))
    return ModelFileError(f"{name:.120} means {len(meant)} models: choose one of {one_line(shown)}.")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The names that somebody may have meant, the likeliest first: those that contain it, then those that are
    spelt nearly so."""
    names = {other.casefold(): other for other in known if other.isprintable()}  # others can't be asked for
    wanted = name.casefold()
    bare = wanted.partition(":")[2] or wanted
    holding = sorted((key for key in names if bare in key), key=len)
    spelt = difflib.get_close_matches(wanted, names, MAX_SHOWN, 0.6)
    return [names[key] for key in dict.fromkeys([*holding, *spelt])][:MAX_SHOWN]


def only(name: str, models: Sequence[StoredModel], where: str) -> StoredModel:
    """The model that a name, or an unambiguous part of one, means. Raises ModelFileError.

    The whole name goes before whole parts of it (a repository, a file with or without its ending), these
    before any other piece.
    """
    rest = name.partition(":")[2]
    wanted = rest.casefold().removesuffix(".gguf")
    keys = {id(model): model.name.partition(":")[2].casefold().removesuffix(".gguf") for model in models}

    def whole(model: StoredModel) -> bool:
        return keys[id(model)] == wanted

    def part(model: StoredModel) -> bool:
        return f"/{wanted}/" in f"/{keys[id(model)]}/" or keys[id(model)].startswith(f"{wanted}:")

    def piece(model: StoredModel) -> bool:
        return wanted in keys[id(model)]

    for fits in (whole, part, piece):
        meant = [model for model in models if fits(model)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise ambiguous(name, [model.name for model in meant])
    raise unknown(name, [model.name for model in models], where)
