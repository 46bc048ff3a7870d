"""Hugging Face's hub: `hf:ORG/REPO`, `hf:ORG/REPO:Q4_K_M`, `hf:ORG/REPO:folder/file.gguf`.

What is in the hub's cache is used from there, without a package or the network. What is missing is fetched by
download.py, if the caller allows it. The cache's layout, according to huggingface_hub's guide
"Understand caching" (common/hf-cache.cpp of llama.cpp has the same):

    models--ORG--REPO/refs/main                     the commit that a branch is at
    models--ORG--REPO/snapshots/COMMIT/file.gguf    a link to
    models--ORG--REPO/blobs/SHA256                  beside SHA256.incomplete, SHA256.XXXX.incomplete

Which file a name means is chosen as llama.cpp's -hf does (common/download.cpp, find_best_model): the
quantization that is named, else Q4_K_M, else Q8_0, else the first; never what belongs to a model that sees
(mmproj), or drafts for another.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from localsteer.errors import ModelFileError

from . import folders
from .stored import StoredModel, checked, nearest, unknown

PREFIX = "hf:"
TITLE = "Hugging Face"
EXAMPLE = "hf:ORG/REPO, hf:ORG/REPO:Q4_K_M or hf:ORG/REPO:file.gguf"
DEFAULT_TAGS = ("Q4_K_M", "Q8_0")
HELPERS = (
    "mmproj",
    "imatrix",
    "mtp-",
    "eagle3-",
    "dflash-",
    "dspark-",
)  # in names of files that are no model
MAX_REF = 4096  # bytes
MAX_FILES = 500  # of a repository that are listed: the name of each is chosen among all
DEPTH = 4  # folders inside a repository
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_FOLDER = re.compile(r"models--(?:(?!--).)+--(?:(?!--).)+")  # no name holds two dashes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)$")  # get_gguf_split_info


def find(rest: str) -> StoredModel:
    """The model from the cache. Raises ModelFileError if it is not there."""
    repo, wanted = parsed(rest)
    folder = _folder_of(repo)
    repo, here = (repo, {}) if folder is None else (_repo_of(folder), cached_files(folder))
    if not any(map(is_first, here)):
        error = str(unknown(PREFIX + rest, [model.name for model in one_by_one()], "the hub's cache"))
        raise ModelFileError(
            f"{error.removesuffix('.')}; `localsteer models pull {PREFIX}{rest}` fetches it."
        )
    file = chosen(repo, wanted, here)
    return _model(PREFIX, repo, file, here, sorted({file, *filter(is_first, here)})[:MAX_FILES])


def one_by_one(until: float = math.inf) -> Iterator[StoredModel]:
    folder = cache_folder()
    return iter(()) if folder is None else models_in(folder, PREFIX, until)


def models_in(folder: Path, prefix: str, until: float = math.inf) -> Iterator[StoredModel]:
    """Of any folder in the hub's layout: llama.cpp's may have it too. until: by time.monotonic, after which
    no further repository is looked into; many hold no GGUF."""
    for repo_folder in repositories(folder):
        if time.monotonic() > until:
            return
        repo = _repo_of(repo_folder)
        here = cached_files(repo_folder)
        firsts = sorted(filter(is_first, here))[:MAX_FILES]
        yield from (_model(prefix, repo, file, here, firsts) for file in firsts)
        n_bytes = _unfinished(repo_folder)
        if n_bytes is not None:  # of which file nothing tells
            what = f"a download was never finished ({n_bytes / 1e6:.1f} MB are present)"
            name = f"{prefix}{repo}{':?' if firsts else ''}"
            fault = f"{what}: `localsteer models pull {PREFIX}{repo}` continues it"
            yield StoredModel(name, fault=fault)


def cache_folder() -> Path | None:
    """Rules of huggingface_hub/constants.py: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME."""
    for name, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        named = folders.from_environment(name)
        if named is not None:
            return named / below
    home = folders.home()
    return home / ".cache" / "huggingface" / "hub" if home else None


def folder_name(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


def _repo_of(repo_folder: Path) -> str:
    return repo_folder.name.removeprefix("models--").replace("--", "/", 1)


def _folder_of(repo: str) -> Path | None:
    """The folder of a repository in the cache. The hub ignores case."""
    folder = cache_folder()
    if folder is None or os.path.isdir(folder / folder_name(repo)):
        return None if folder is None else folder / folder_name(repo)
    wanted = folder_name(repo).casefold()
    return next((path for path in repositories(folder) if path.name.casefold() == wanted), None)


def repositories(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))
    except OSError:
        return []


# -- names --------------------------------------------------------------------------------------------------


def parsed(rest: str) -> tuple[str, str]:
    """(ORG/REPO, what is wanted of it: a quantization, a file, or nothing). Raises ModelFileError."""
    text = checked(rest, PREFIX, EXAMPLE)
    repo, _, wanted = text.partition(":")
    if not wanted and repo.count("/") > 1 and repo.lower().endswith(".gguf"):  # as its address has it
        org, name, wanted = repo.split("/", 2)
        repo = f"{org}/{name}"
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or text.endswith(":"):
        raise ModelFileError(f"{PREFIX + rest!r:.120} is not a repository: write {EXAMPLE}.")
    return repo, wanted


def is_model_file(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not any(helper in name for helper in HELPERS)


def is_first(path: str) -> bool:
    """Whether a file is one that a name may mean: a model, and of a split one the first part."""
    split = folders.split_of(path)
    return is_model_file(path) and (split is None or split[1] == 1)


def chosen(repo: str, wanted: str, files: Iterable[str]) -> str:
    """The file of a repository that a name means. Raises ModelFileError, which lists the choices."""
    firsts = sorted(filter(is_first, files))
    if not firsts:
        raise ModelFileError(f"{PREFIX}{repo} holds no GGUF file of a model: choose another repository.")
    if wanted.lower().endswith(".gguf"):
        exact = [file for file in firsts if wanted in (file, file.rpartition("/")[2])]
        same_part = folders.parts(wanted)[0]  # any part of a split file means it
        exact = exact or [file for file in firsts if same_part in (file, file.rpartition("/")[2])]
        if len(exact) == 1:
            return exact[0]
    else:
        for tag in [wanted] if wanted else DEFAULT_TAGS:
            # Q4_0 is not IQ4_0; it may be the name of a folder
            named = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}[./-]", re.IGNORECASE)
            meant = [file for file in firsts if named.search(file)]
            if meant:
                return meant[0]
        if not wanted:
            return firsts[0]
    raise _no_such_file(repo, wanted, firsts[:MAX_FILES])


def name_of(prefix: str, repo: str, file: str, files: Sequence[str]) -> str:
    """The shortest name that means this file."""
    split = folders.split_of(file)
    stem = split[0] if split else file.removesuffix(".gguf")
    match = _TAG.search(stem)
    if match:
        try:
            if chosen(repo, match[1].upper(), files) == file:
                return f"{prefix}{repo}:{match[1].upper()}"
        except ModelFileError:
            pass
    return f"{prefix}{repo}:{file}"


def _no_such_file(repo: str, wanted: str, firsts: Sequence[str]) -> ModelFileError:
    names = [name_of(PREFIX, repo, file, firsts) for file in firsts]
    near = nearest(f"{PREFIX}{repo}:{wanted}", names) or names[:6]
    return ModelFileError(f"{PREFIX}{repo} has no {wanted:.80}: choose one of {', '.join(near)}.")


# -- the cache ----------------------------------------------------------------------------------------------


def cached_files(repo_folder: Path) -> dict[str, Path]:
    """Every GGUF file of a repository, by its path there: of the newest commit that has it."""
    files: dict[str, Path] = {}
    for snapshot in _snapshots(repo_folder):
        for path in folders.walk(snapshot, DEPTH):
            if path.name.lower().endswith(".gguf"):
                key = path.relative_to(snapshot).as_posix()
                # of a split model the parts must come from one folder, and a dead link is no file
                if key not in files or (not os.path.exists(files[key]) and os.path.exists(path)):
                    files[key] = path
    return files


def _snapshots(repo_folder: Path) -> list[Path]:
    """The snapshots: that of refs/main first, then the latest."""
    try:
        snapshots = [path for path in (repo_folder / "snapshots").iterdir() if _COMMIT.fullmatch(path.name)]
    except OSError:
        return []
    snapshots = [
        path for path in snapshots if os.path.isdir(path)
    ]  # a link that leads nowhere hides no other
    snapshots.sort(key=os.path.getmtime, reverse=True)
    try:
        main = folders.read(repo_folder / "refs" / "main", MAX_REF).decode("ascii").strip()
    except (OSError, ValueError):
        main = ""
    return sorted(snapshots, key=lambda path: path.name != main)


def _model(prefix: str, repo: str, file: str, here: dict[str, Path], firsts: Sequence[str]) -> StoredModel:
    first = here.get(file)
    name = name_of(prefix, repo, file, firsts)
    if first is None:
        return StoredModel(name, fault="its first part is missing")
    files = tuple(first.with_name(part.rpartition("/")[2]) for part in folders.parts(file))
    size, fault = folders.measured(files)
    return StoredModel(name, files, size, fault)


def _unfinished(repo_folder: Path) -> int | None:
    """The size of the unfinished downloads."""
    sizes = []
    for path in folders.walk(repo_folder / "blobs", 0):
        if path.name.endswith(".incomplete"):
            try:
                sizes.append(path.stat().st_size)
            except OSError:
                continue
    return sum(sizes) if sizes else None
