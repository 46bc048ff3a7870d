"""The folder of control-vector files, by name. A name never becomes a path that leads out of it."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from localsteer.errors import LocalsteerError, PlanError, VectorFileError
from localsteer.vector import ControlVector

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SUFFIX = ".gguf"
MOST_SHOWN = 20  # names in a message
MOST_KEPT = 512  # vectors in memory


class VectorShelf:
    """The folder's vectors. Files are read when first named, and again when they change. Any thread may ask.

    Raises LocalsteerError for a folder that does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise LocalsteerError(f"LOCALSTEER_VECTORS={folder}: there is no such folder.")
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[tuple[int, int], ControlVector]] = {}

    def names(self) -> list[str]:
        stems = (path.stem for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(stem for stem in stems if NAME.fullmatch(stem))

    def vector(self, name: str) -> ControlVector:
        """Raises PlanError for a name that is none, or unknown, and VectorFileError."""
        if not NAME.fullmatch(name):
            raise PlanError(
                f"steer: {name!r:.80} is not the name of a vector: letters, digits, dots and dashes."
            )
        path = self.folder / f"{name}{SUFFIX}"
        try:
            stat = path.stat()
        except OSError:
            known = self.names()
            shown = ", ".join(known[:MOST_SHOWN]) + (", ..." if len(known) > MOST_SHOWN else "")
            raise PlanError(f"steer: there is no vector {name!r}: choose one of {shown or 'none'}.") from None
        stamp = (stat.st_mtime_ns, stat.st_size)
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or kept[0] != stamp:
                kept = self._kept[name] = (stamp, self._read(path, name))
                if len(self._kept) > MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
            return kept[1]

    def _read(self, path: Path, name: str) -> ControlVector:
        try:
            return ControlVector.load(path)
        except VectorFileError as error:  # without the folder, which is nobody's business
            raise VectorFileError(f"steer: {name}: {str(error).replace(str(path), path.name)}") from None
