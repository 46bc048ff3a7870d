"""The user's cache folder: hashes of model files, vectors made on first use, and converted models.

    <folder>/hashes.json                     path, size and time of a model file -> sha256, identity
    <folder>/vectors/<model hash>/<name>.gguf
    <folder>/models/<name>.gguf
    <folder>/tried/<fingerprint>.json        how the first load of a model file went (bridge/guard.py)
    <folder>/.../<file>.sha256               the seal of the file beside it: what was written (`seal`)

Everything in it can be deleted at any time, and nothing in it is trusted unread: a file that differs from
what was sealed is made again. LOCALSTEER_CACHE overrides its location.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .errors import LocalsteerError, ModelFileError

HASH_CHARS = 16  # of a model's sha256 in folder names: 64 bits, far from any collision on one disk
NEW_SECONDS = 10.0  # a temporary file is not swept before that, locked or not
ABANDONED_SECONDS = 86400.0  # where there are no locks, it is after that
_PART = re.compile(r"\.(.+)\.[0-9a-f]{16}\.part")
SEAL = ".sha256"  # added to a file's name
SUM = "crc32"  # of an entry of the index, without it
_READ_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_ADVICE = "choose another folder, or set LOCALSTEER_CACHE for cached files."


def cache_folder() -> Path:
    """The path of the cache, which is not created here: XDG on Linux, Library/Caches, LOCALAPPDATA.

    Raises LocalsteerError if there is no home folder for it.
    """
    chosen = os.environ.get("LOCALSTEER_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else _usual_folder()
    except RuntimeError:
        what = f"LOCALSTEER_CACHE={chosen}" if chosen else "this user"
        raise LocalsteerError(
            f"{what} has no home folder: set LOCALSTEER_CACHE to a folder for cached files."
        ) from None


def _usual_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "localsteer"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "localsteer" / "Cache"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification: a relative path is invalid and ignored
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "localsteer"


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raise LocalsteerError unless the folder of a file to be written exists. For files named by the user,
    for which a new folder would hide a mistake."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise LocalsteerError(f"{os.fspath(path)} can't be written: there is no folder {folder}.")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it if the `with` block succeeds, and is deleted otherwise.

    Two processes that write one file at once both succeed, and a reader sees one complete file or the other.
    A pipe or a device is written directly. Raises LocalsteerError if the folder can't be written, has no
    room, or `path` is a folder.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with _room_for(path):
            yield path
        return
    with ExitStack() as stack:
        with _one_line_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(temporary_beside(path))
        with _room_for(path):
            yield temporary
        with _one_line_for(path):
            os.replace(temporary, path)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which is deleted when the `with` block ends unless it was renamed.

    This process holds a lock on it. What a killed run left has no lock, and is deleted here: files for the
    same target, or in the cache folder for any target. Raises OSError.
    """
    _sweep(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
    # not by mkstemp, whose files only their owner can read: a model or vector is not a secret
    with temporary.open("xb") as file:
        if fcntl is None:
            file.close()  # Windows renames no open file
        else:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    with suppress(OSError, LocalsteerError):
        ours = path.parent.resolve().is_relative_to(cache_folder().resolve())
        for part in path.parent.glob(".*.part"):
            match = _PART.fullmatch(part.name)
            if match and (ours or match[1] == path.name) and _is_abandoned(part):
                part.unlink(missing_ok=True)


def _is_abandoned(part: Path) -> bool:
    """Whether no running process writes a temporary file. A new one may be about to be locked."""
    age = time.time() - part.stat().st_mtime
    if fcntl is None or age < NEW_SECONDS:
        return age > ABANDONED_SECONDS
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@contextmanager
def _one_line_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalsteerError(f"can't write {path} ({error.strerror or error}): {_ADVICE}") from error


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # any other may be about a file that is read
        if error.errno not in _NO_ROOM:
            raise
        raise LocalsteerError(
            f"can't write {path} ({error.strerror}): make room, or choose another folder."
        ) from error


def seal(path: Path) -> None:
    """Record the current content of a file in the cache, for `is_intact`."""
    with atomic_path(_seal_of(path)) as temporary:
        temporary.write_text(file_sha256(path), "ascii")


def is_intact(path: Path) -> bool:
    """Whether a file is unchanged since it was sealed. It is read at the first use in a process, and again
    when its size or time changes. False for a file that was never sealed, or can't be read."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):  # reading a pipe may never end
            return False
        stamp = (stat.st_size, stat.st_mtime_ns)
        if _intact.get(path) != stamp:
            if file_sha256(path) != _seal_of(path).read_text("ascii").strip():
                return False
            _intact[path] = stamp
    except (OSError, ValueError):
        return False
    return True


def is_sealed(path: Path) -> bool:
    return _seal_of(path).is_file()


def unlink_sealed(path: Path) -> None:
    """Delete a file and its seal. A missing file is no error."""
    for file in (path, _seal_of(path)):
        file.unlink(missing_ok=True)


_intact: dict[Path, tuple[int, int]] = {}  # size and time of what was found intact


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + SEAL)


def file_hash(path: str | os.PathLike[str]) -> str:
    """sha256 of a file as hex. Raises ModelFileError for a file that can't be read."""
    return remembered(path, "sha256", file_sha256)


def remembered(path: str | os.PathLike[str], what: str, compute: Callable[[Path], str]) -> str:
    """The text that `compute` makes from a file, remembered as long as path, size and time do not change.

    Raises ModelFileError for a file that can't be read, and what `compute` raises.
    """
    path = Path(path)
    try:
        stat = path.stat()
        key = str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = _known(key, stamp)
        if isinstance(known.get(what), str):
            return known[what]
        text = compute(path)
    except OSError as error:
        raise ModelFileError(f"can't read {path} ({error.strerror or error}).") from error
    _remember(key, {**known, "stamp": stamp, what: text})
    return text


def _known(key: str, stamp: list[int]) -> dict[str, object]:
    """What the index says about a file as it is now; nothing if the entry itself is damaged."""
    known = _read_index().get(key)
    if not isinstance(known, dict) or known.get("stamp") != stamp:
        return {}
    return known if known.pop(SUM, None) == _sum(known) else {}


def _sum(entry: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def vector_folder(model_hash: str) -> Path:
    return cache_folder() / "vectors" / model_hash[:HASH_CHARS]


def vector_path(model_hash: str, name: str) -> Path:
    """The path of the vector of this name for this model. Any text can be a name (`file_name`)."""
    return vector_folder(model_hash) / f"{file_name(name)}.gguf"


def model_path(name: str) -> Path:
    """The path of a model that localsteer converts or quantizes."""
    return cache_folder() / "models" / f"{file_name(name)}.gguf"


def cached_vectors(model_hash: str | None = None) -> list[Path]:
    """Files of every cached vector, or of one model's; sorted by path."""
    folder = f"{model_hash[:HASH_CHARS]}" if model_hash else "*"
    return sorted((cache_folder() / "vectors").glob(f"{folder}/*.gguf"))


def remove_vector(path: Path) -> None:
    """Delete one cached vector, and its model's folder with the last one. A missing file is no error."""
    unlink_sealed(path)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def file_name(name: str) -> str:
    """A name that every file system accepts. A name that had to be changed gets a hash, and so stays
    unique."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:48]
    if plain and plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")


def _index_path() -> Path:
    return cache_folder() / "hashes.json"


def _read_index() -> dict[str, object]:
    try:
        index = json.loads(_index_path().read_text("utf-8"))
    except (OSError, ValueError, RecursionError, LocalsteerError):
        return {}  # missing or damaged: everything in it can be computed again
    return index if isinstance(index, dict) else {}


def _remember(key: str, entry: dict[str, object]) -> None:
    try:
        with atomic_path(_index_path()) as temporary:
            index = _read_index() | {key: {**entry, SUM: _sum(entry)}}
            temporary.write_text(json.dumps(index, indent=1), "utf-8")
    except (OSError, LocalsteerError):
        pass  # if the folder can't be written, the only price is another reading


def file_sha256(path: Path) -> str:
    """The sha256, read now, whatever is remembered. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
