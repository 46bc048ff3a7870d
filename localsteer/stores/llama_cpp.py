"""llama.cpp's own cache: `llama.cpp:ORG/REPO:TAG` as llama-cli -hf names a model, or a file's name.

Until early 2026 it kept files flat (common/arg.cpp and common/common.cpp, fs_get_cache_directory):

    ORG_REPO_file.gguf              a file of a repository, with the slashes turned into `_`
    manifest=ORG=REPO=TAG.json      which file -hf ORG/REPO:TAG means ("ggufFile": {"rfilename": ...})
    ....gguf.downloadInProgress     a download that is not done

Since then it uses the hub's layout (common/hf-cache.cpp), in the hub's cache, which is `hf:` here, or in the
folder that LLAMA_CACHE names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from . import folders, hub
from .stored import StoredModel, checked, only

PREFIX = "llama.cpp:"
TITLE = "llama.cpp"
EXAMPLE = "llama.cpp:ORG/REPO:Q4_K_M"
MAX_MANIFEST = 4 << 20  # bytes; one holds a model card's data
UNFINISHED = ".downloadInProgress"


def find(rest: str) -> StoredModel:
    return only(PREFIX + checked(rest, PREFIX, EXAMPLE), list(one_by_one()), "llama.cpp's cache")


def one_by_one() -> Iterator[StoredModel]:
    folder = cache_folder()
    if folder is None or not os.path.isdir(folder):
        return
    told: set[Path] = set()
    for model in _flat(folder):
        told.update(model.files)
        yield model
    yield from _files(folder, told)
    yield from hub.models_in(folder, PREFIX)


def cache_folder() -> Path | None:
    """Rules of fs_get_cache_directory: LLAMA_CACHE, else the user's cache folder."""
    named = folders.from_environment("LLAMA_CACHE")
    if named is not None:
        return named
    home = folders.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) / "llama.cpp" if local else None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "llama.cpp" if home else None
    base = folders.from_environment("XDG_CACHE_HOME") or (home / ".cache" if home else None)
    return base / "llama.cpp" if base else None


def _flat(folder: Path) -> Iterator[StoredModel]:
    """The models that manifests name."""
    for manifest in folders.walk(folder, 0):
        pieces = manifest.name.removesuffix(".json").split("=")
        if manifest.suffix != ".json" or len(pieces) != 4 or pieces[0] != "manifest":
            continue
        _, org, repo, tag = pieces
        name = f"{PREFIX}{org}/{repo}:{tag}"
        file = _file_of(manifest)
        if not file:
            yield StoredModel(name, fault=f"its manifest can't be read ({manifest.name}): a newer format?")
            continue
        # as arg.cpp does: what was a path in the repository becomes a part of one name
        first = f"{org}_{repo}_{file}".replace("/", "_").replace("\\", "_")
        yield _model(name, folder / first)


def _file_of(manifest: Path) -> str:
    try:
        file = json.loads(folders.read(manifest, MAX_MANIFEST))["ggufFile"]["rfilename"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return file if isinstance(file, str) and "\0" not in file else ""


def _files(folder: Path, told: set[Path]) -> Iterator[StoredModel]:
    """Files that no manifest names: of -hff, of -mu, or copied there by hand."""
    for file in folders.walk(folder, 0):
        name = file.name.removesuffix(UNFINISHED)
        split = folders.split_of(name)
        if not hub.is_model_file(name) or file in told or (split and split[1] != 1):
            continue
        if name != file.name:
            if folder / name not in told:
                yield StoredModel(PREFIX + name, fault=_unfinished(file))
            continue
        yield _model(PREFIX + file.name, file)


def _model(name: str, first: Path) -> StoredModel:
    files = tuple(first.with_name(part) for part in folders.parts(first.name))
    size, fault = folders.measured(files)
    started = next((part for part in files if os.path.exists(f"{part}{UNFINISHED}")), None)
    if fault and started:
        fault = _unfinished(started.with_name(started.name + UNFINISHED))
    return StoredModel(name, files, size, fault)


def _unfinished(part: Path) -> str:
    try:
        there = f"{part.stat().st_size / 1e6:.1f} MB are present"
    except OSError:
        there = "its file can't be read"
    return f"its download was never finished ({there}): llama-cli -hf continues it"
