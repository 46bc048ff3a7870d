"""LM Studio's folder: `lmstudio:publisher/repository/file.gguf`, or any part of it that means one model.

The home folder is what ~/.lmstudio-home-pointer says, else ~/.cache/lm-studio where that exists, else
~/.lmstudio (lmstudio-js, packages/lms-common-server, findLMStudioHome.ts). Models lie in `models/` there, or
in the folder that the user chose, which settings.json calls `downloadsFolder`; in it, by LM Studio's page
"Import models", publisher/model/file.gguf.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from . import folders
from .stored import StoredModel, checked, only

PREFIX = "lmstudio:"
TITLE = "LM Studio"
EXAMPLE = "lmstudio:publisher/repository/file.gguf"
DEPTH = 3  # publisher, repository, and one folder more
MAX_SETTINGS, MAX_POINTER = 4 << 20, 4096  # bytes


def find(rest: str) -> StoredModel:
    return only(PREFIX + checked(rest, PREFIX, EXAMPLE), list(one_by_one()), f"{TITLE}'s folder")


def one_by_one() -> Iterator[StoredModel]:
    return (model for folder in model_folders() for model in _models_in(folder))


def model_folders() -> list[Path]:
    home = _home()
    if home is None:
        return []
    chosen = _chosen(home / "settings.json")
    return [folder for folder in dict.fromkeys([chosen, home / "models"]) if folder and os.path.isdir(folder)]


def _home() -> Path | None:
    home = folders.home()
    if home is None:
        return None
    try:
        text = folders.read(home / ".lmstudio-home-pointer", MAX_POINTER).decode("utf-8").strip()
    except (OSError, ValueError):
        text = ""
    if text and "\0" not in text:
        return Path(text)
    older = home / ".cache" / "lm-studio"
    return older if os.path.isdir(older) else home / ".lmstudio"


def _chosen(settings: Path) -> Path | None:
    try:
        chosen = json.loads(folders.read(settings, MAX_SETTINGS))
    except (OSError, ValueError, RecursionError):
        return None
    text = chosen.get("downloadsFolder") if isinstance(chosen, dict) else None
    return Path(text) if isinstance(text, str) and text and "\0" not in text else None


def _models_in(folder: Path) -> Iterator[StoredModel]:
    found = [file for file in folders.walk(folder, DEPTH) if is_model_file(file.name)]
    for file in found:
        split = folders.split_of(file.name)
        if split and split[1] != 1 and file.with_name(folders.parts(file.name)[0]) in found:
            continue  # told with the first part
        name = PREFIX + file.relative_to(folder).as_posix()
        if unfinished(file.name):
            yield StoredModel(name, fault="its download was never finished: continue it in LM Studio")
            continue
        files = tuple(file.with_name(part) for part in folders.parts(file.name))
        size, fault = folders.measured(files)
        yield StoredModel(name, files, size, fault)


def unfinished(name: str) -> bool:
    return not name.lower().endswith(".gguf")


def is_model_file(name: str) -> bool:
    """A GGUF, or the beginning of one; not what belongs to a model that sees."""
    lower = name.lower()
    return "mmproj" not in lower and (lower.endswith((".gguf", ".gguf.part", ".gguf.downloading")))
