"""Walks through other programs' folders, with limits on depth and number, whatever links they hold."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_ENTRIES = 50_000  # of one store; a loop of links ends at the depth that its layout has
MAX_PARTS = 1000  # of a model; a name that tells of more would be looked for in as many places
# llama.cpp's gguf-split: MODEL-00001-of-00003.gguf
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def home() -> Path | None:
    """The user's home folder, or None."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def from_environment(name: str) -> Path | None:
    """The folder named by a variable, or None if it is not set or empty."""
    text = os.path.expandvars(os.environ.get(name, "").strip("\"' "))
    return Path(os.path.expanduser(text)) if text else None


def read(path: Path, most: int) -> bytes:
    """The content of a small file. Raises OSError, and ValueError for a larger one, and for anything but a
    regular file, since a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} has more than {most} bytes")
    return data


def walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yields every file up to `depth` folders below, sorted within each folder. Links count as what they lead
    to, and a dead link as a file. What can't be read is skipped."""
    left = [MAX_ENTRIES]
    yield from _walk(folder, depth, left)


def _walk(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            sorted_entries = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in sorted_entries:
        left[0] -= 1
        if left[0] < 0:
            return
        try:
            is_folder = entry.is_dir()
        except OSError:  # a loop of links
            is_folder = False
        if not is_folder:
            yield Path(entry.path)
        elif depth:
            yield from _walk(Path(entry.path), depth - 1, left)


def split_of(name: str) -> tuple[str, int, int] | None:
    """(beginning, number of this part, number of parts) from a split file's name, or None for any other name,
    such as part 5 of 3.
    """
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= MAX_PARTS:
        return None
    return match[1], int(match[2]), int(match[3])


def parts(name: str) -> list[str]:
    """The names of all parts of a file; only its own name if it is not split."""
    split = split_of(name)
    if split is None:
        return [name]
    head, _, n = split
    return [f"{head}-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]


def measured(files: Sequence[Path]) -> tuple[int | None, str]:
    """Returns (size of all parts together, why they can't be used): a part may be missing, empty or
    unreadable."""
    size = 0
    for number, file in enumerate(files, 1):
        which = f"part {number} of {len(files)}" if len(files) > 1 else "its file"
        try:
            status = file.stat()
        except PermissionError:
            return None, f"{which} can't be read by this user ({file.name})"
        except (OSError, ValueError):  # a manifest may name what no file can be called
            what = "is a link that leads nowhere" if os.path.islink(file) else "is missing"
            return None, f"{which} {what} ({file.name:.120})"
        if not stat.S_ISREG(status.st_mode):
            return None, f"{which} is a folder, a pipe or a device ({file.name})"
        if not status.st_size:
            return None, f"{which} is empty ({file.name})"
        size += status.st_size
    return size, ""
