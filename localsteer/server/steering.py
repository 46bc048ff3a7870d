"""The folder of vectors, by name, while the server runs: read, added to, reloaded, removed from.

A request takes its vectors at its start, as immutable objects, and later changes to the folder do not affect
it. A name is looked up in memory and never becomes a path, so it can't lead out of the folder.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from localsteer.cache import atomic_path
from localsteer.errors import LocalsteerError, PlanError
from localsteer.vector import ControlVector

from .errors import ApiError, shown
from .limits import Limits
from .loaded import Loaded
from .shipped import shipped_vectors

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.tune.record import TuningRecord

    from .pool import Pool
    from .schemas import SteeringItem

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # no plus: it joins names in MODEL+json+lowercase
SUFFIX = ".gguf"

logger = logging.getLogger("localsteer")


class VectorFolder:
    """folder: None = there is none, and no upload is taken. A vector is tried on each model of the pool when
    that is loaded; what is known of one stays known when it is unloaded.

    entries: of the folder, by name. shipped: vectors that come with localsteer, by model and name; one of the
    folder with the same name goes before them.
    """

    def __init__(self, folder: Path | None, pool: Pool, limits: Limits) -> None:
        self.folder, self.pool, self.limits = folder, pool, limits
        self._lock = threading.Lock()  # held by who writes; readers take `entries` as it is
        self.entries: Mapping[str, Loaded] = {}
        self.shipped: Mapping[str, Mapping[str, Loaded]] = {}
        self.reload()
        for model, served in pool.served.items():
            self.judge(model, served.engine)

    # -- what is there ------------------------------------------------------------------------------

    def of_model(self, model: str) -> list[str]:
        """Names of the vectors that this model can be steered by."""
        own = [entry.name for entry in self.entries.values() if entry.fits(model)]
        shipped = self.shipped.get(model, {}).values()
        return own + [entry.name for entry in shipped if entry.name not in self.entries and entry.fits(model)]

    def all(self) -> list[Loaded]:
        """Of the folder, then those that ship; of these several may have one name, each for its own model."""
        return [
            *self.entries.values(),
            *(entry for entries in self.shipped.values() for entry in entries.values()),
        ]

    def named(self, name: str) -> Loaded:
        """Raises ApiError, status 404."""
        entry = next((entry for entry in self.all() if entry.name == name), None)
        if entry is None:
            raise ApiError(f"name: there is no vector {shown(name)}.", status=404, param="name")
        return entry

    def vector(self, name: str, model: str, param: str) -> ControlVector:
        """Raises ApiError, which names the vectors there are."""
        entry = self.entries.get(name) or self.shipped.get(model, {}).get(name)
        if entry is None:
            known = ", ".join(self.of_model(model))
            hint = f"choose one of {known}" if known else f"{model} has none"
            raise ApiError(
                f"{param}: there is no vector {shown(name)}: {hint}.",
                param=param,
                code="unknown_vector",
            )
        why = entry.error or entry.misfits.get(model)
        if why:
            raise ApiError(f"{param}: {name} can't steer {model}: {why}", param=param, code="unfit_vector")
        return entry.vector

    def chosen(
        self, model: str, names: Sequence[str], items: Sequence[SteeringItem]
    ) -> dict[str, ControlVector]:
        """Vectors of the model's name and of the field `steering`; the field wins where both name one."""
        found = {name: self.vector(name, model, "model") for name in names}
        for i, item in enumerate(items):
            param = f"steering.{i}"
            settings = item.model_dump(exclude={"name"}, exclude_none=True)
            try:
                found[item.name] = self.vector(item.name, model, f"{param}.name").at(**settings)
            except PlanError as error:
                raise ApiError(f"{param}: {error}", param=param) from None
        return found

    # -- what changes it ----------------------------------------------------------------------------

    def judge(self, model: str, engine: Engine) -> None:
        """Try all vectors on a model that has been loaded; those that it was tried on before are left."""
        with self._lock:
            self.entries = {
                name: entry if model in entry.judged else entry.judge(model, engine)
                for name, entry in self.entries.items()
            }
            if model not in self.shipped:
                found = shipped_vectors(engine.path)
                judged = {name: entry.judge(model, engine) for name, entry in found.items()}
                self.shipped = {**self.shipped, model: judged}

    def reload(self) -> list[Loaded]:
        """Read what is new or changed, forget what is gone. Raises LocalsteerError for a missing folder."""
        if self.folder is None:
            return []
        with self._lock:
            found: dict[str, Loaded] = {}
            for path in self._files():
                before = self.entries.get(path.stem)
                entry = before if before and before.stamp == _stamp(path) else self._read(path)
                found[entry.name] = entry
            self.entries = found
        return list(found.values())

    def add(self, name: str, data: bytes, *, replace: bool) -> Loaded:
        """Write DIR/name.gguf in one step, once it has been read well and fits a model. Raises ApiError."""
        path = self._writable(name) / f"{name}{SUFFIX}"
        with self._lock, _changing_the_folder():
            # a file that came after the last reload is somebody's too
            if (name in self.entries or path.exists()) and not replace:
                raise ApiError(
                    f"name: there already is a vector {name!r}: send replace=true to replace it.",
                    status=409, param="name", code="exists",
                )  # fmt: skip
            if name not in self.entries and len(self.entries) >= self.limits.max_files:
                raise ApiError(f"the folder already holds {len(self.entries)} vectors: remove some.")
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
                entry = self._read(temporary, name)
                self._check(entry)
            entry = self._read(path)
            self.entries = dict(sorted({**self.entries, name: entry}.items()))
        return entry

    def remove(self, name: str) -> Loaded:
        """Delete a vector's file. Raises ApiError for a name that is not there."""
        with self._lock:
            entry = self.entries.get(name) or self.named(name)
            if entry.ships_for or self.folder is None:
                raise ApiError(
                    f"name: {name} ships with localsteer, for {entry.ships_for}, and can't be removed: start "
                    "the server with LOCALSTEER_PACKS=off to leave such vectors out.",
                    status=409, param="name", code="shipped",
                )  # fmt: skip
            with _changing_the_folder():
                (self.folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
            self.entries = {key: entry for key, entry in self.entries.items() if key != name}
        return entry

    def _writable(self, name: str) -> Path:
        if self.folder is None:
            raise ApiError("this server has no folder of vectors: start it with --vectors DIR.", status=409)
        if not NAME.fullmatch(name):
            raise ApiError(
                f"name: must be letters, digits, dots, dashes and underscores, not {shown(name)}.",
                param="name",
            )
        return self.folder

    def _check(self, entry: Loaded) -> None:
        if entry.error:
            raise ApiError(f"the upload is refused: {entry.error}", code="invalid_vector")
        if entry.misfits and set(self.pool.names) <= set(entry.misfits):
            why = next(iter(entry.misfits.values()))
            raise ApiError(f"the upload is refused, no model here can use it: {why}", code="invalid_vector")

    # -- files --------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        assert self.folder is not None
        try:
            found = sorted(path for path in self.folder.iterdir() if path.suffix == SUFFIX)
        except OSError as error:
            raise LocalsteerError(
                f"the folder of vectors {self.folder} can't be read: {error.strerror or error}."
            ) from None
        for path in found:
            if not NAME.fullmatch(path.stem):
                logger.warning("%s is left out: a vector's name has no %r.", path.name, _odd(path.stem))
        return [path for path in found if NAME.fullmatch(path.stem)][: self.limits.max_files]

    def _read(self, path: Path, name: str | None = None) -> Loaded:
        """An entry in any case: a file that can't be read is listed with the reason."""
        shown_as = f"{name or path.stem}{SUFFIX}"
        try:
            stamp = _stamp(path)
            if stamp[0] > self.limits.max_upload:
                raise LocalsteerError(f"{path} has {stamp[0]} bytes: too large for a vector.")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            vector = ControlVector.load(path)
        except (OSError, LocalsteerError) as error:
            why = str(error).replace(str(path), shown_as)
            return Loaded(name or path.stem, "", 0, error=why)
        entry = Loaded(name or path.stem, digest, stamp[0], vector, stamp=stamp)
        for model, served in list(self.pool.served.items()):
            entry = entry.judge(model, served.engine)
        return entry


class SteeringSettings(TypedDict):
    layer: list[int]
    mode: str
    positions: str
    strength: float
    one_sided: bool
    cap: float | None


class SteeringDocument(TypedDict, total=False):
    """A vector that can be steered by, or `error`: why it can't be read. misfits: why it does not fit, by
    model. text, instruction: what it was made of. validation: the TuningRecord of its file."""

    object: str
    name: str
    models: list[str]
    error: str | None
    misfits: dict[str, str]
    settings: SteeringSettings
    instruction: str | None
    text: str | None
    ships_for: str | None
    can_ensure: bool
    validation: TuningRecord | None
    n_layer: int
    n_embd: int
    sha256: str
    bytes: int


def document(entry: Loaded, models: Sequence[str]) -> SteeringDocument:
    """What GET /v1/steering says of one vector: settings, and the figures that tuning left in the file."""
    if entry.vector is None:
        return {"object": "steering.vector", "name": entry.name, "models": [], "error": entry.error}
    vector = entry.vector
    provenance = vector.provenance
    return {
        "object": "steering.vector",
        "name": entry.name,
        "models": [model for model in models if entry.fits(model)],
        "misfits": dict(entry.misfits),
        "settings": {
            "layer": list(vector.layers),
            "mode": vector.mode,
            "positions": vector.positions,
            "strength": vector.strength,
            "one_sided": vector.one_sided,
            "cap": vector.cap,
        },
        "instruction": plain(provenance.get("instruction_id")),
        "text": next(iter(vector.phrasings), None),
        "ships_for": entry.ships_for,
        "can_ensure": bool(provenance.get("verifier")),
        "validation": plain(provenance.get("validation")),
        "n_layer": vector.n_layer,
        "n_embd": vector.n_embd,
        "sha256": entry.sha256,
        "bytes": entry.size,
    }


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@contextmanager
def _changing_the_folder() -> Iterator[None]:
    """A disk that is full, or a folder that can't be written, becomes an ApiError, without its path."""
    try:
        yield
    except (OSError, LocalsteerError) as error:  # atomic_path has made the one of the other
        cause = error.__cause__ or error
        why = getattr(cause, "strerror", None) or type(cause).__name__
        raise ApiError(f"the folder of vectors can't be changed ({why}).", status=409) from None


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _odd(name: str) -> str:
    return next((character for character in name if not re.match(r"[A-Za-z0-9._-]", character)), name[:1])
