"""Fills the hub's cache, resuming after a cut connection, Ctrl-C or a kill, and checking by sha256.

huggingface_hub handles the API, the token and the cache. Its own download starts from the beginning if the
program was stopped (since 1.x it deletes what it had), so the bytes of a file are fetched here, under the
name from which older versions resumed (blobs/SHA256.incomplete). Once the blob is complete, `hf_hub_download`
finds it and makes the links.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from localsteer.errors import ModelFileError
from localsteer.jsonable import JsonObject

from . import folders, hub

if TYPE_CHECKING:
    from . import Progress
    from .stored import StoredModel

SECONDS = 15.0  # of silence in an answer
ANSWER_SECONDS, MAX_ANSWER = 60.0, 32 << 20  # of the API: time for all of it, and bytes
NO_LIST = "{url:.120} answers with no list of files: check HF_ENDPOINT, or try again later."
MAX_OVER_HTTP = 50 * 1000**3  # bytes, beyond that Xet alone (huggingface_hub/constants.py)
TRIES = 4  # without a single byte
RETRY_SECONDS = 1.0
READ_BYTES = 1 << 20
PARTIAL, NO_SUCH_RANGE = 206, 416  # HTTP
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9]{1,128}")


def find(rest: str, *, allowed: bool, on_progress: Progress | None = None) -> StoredModel:
    """The model of `hf:REST`, from the cache, or from the hub if that is allowed. Raises ModelFileError."""
    repo, wanted = hub.parsed(rest)
    try:
        model = hub.find(rest)
        if not (model.fault and allowed):
            return model
    except ModelFileError:
        if not allowed:
            raise
    repo, file = download(repo, wanted, on_progress=on_progress)
    return hub.find(f"{repo}:{file}")


def download(repo: str, wanted: str, *, on_progress: Progress | None = None) -> tuple[str, str]:
    """Fetch the model of a name with all its parts. Returns (repository as the hub spells it, file).

    Raises ModelFileError, one line, for anything that goes wrong; what was fetched until then stays.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelFileError(
            f"{hub.PREFIX}{repo} is not in the cache, and fetching it needs huggingface_hub: "
            'pip install "localsteer[hub]".'
        )
    if is_offline():
        raise ModelFileError(
            f"{hub.PREFIX}{repo}{':' * bool(wanted)}{wanted} is not in the cache, and HF_HUB_OFFLINE is set: "
            "unset it, or use a model that `localsteer models` lists."
        )
    with _one_line(repo), _quiet_hub():
        repository = _Repository(repo)
        file = hub.chosen(repository.name, wanted, repository.sizes)
        parts = folders.parts(file)
        missing = next((part for part in parts if part not in repository.sizes), None)
        if missing:
            raise ModelFileError(f"{hub.PREFIX}{repo} lacks {missing}: {file} is incomplete there.")
        for part in parts:
            repository.fetch(part, on_progress)
        return repository.name, file


def is_offline() -> bool:
    values = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any((value or "").upper() in ("1", "ON", "YES", "TRUE") for value in values)


class _Repository:
    """sizes: bytes of each file. name: the repository's as the hub spells it."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import HfApi

        # as it is now: the package reads it when it is imported
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self.api = HfApi(endpoint=self.endpoint)
        self.name: str = repo
        self.folder = hub.cache_folder() / hub.folder_name(repo)
        self.sizes = _sizes(_told(f"{self.api.endpoint}/api/models/{repo}?blobs=true"))

    def fetch(self, file: str, on_progress: Progress | None) -> None:
        from huggingface_hub import hf_hub_download

        if self.sizes[file] <= MAX_OVER_HTTP:
            self._fetch_blob(file, on_progress)
        hf_hub_download(self.name, file, endpoint=self.endpoint, cache_dir=self.folder.parent)

    def _fetch_blob(self, file: str, on_progress: Progress | None) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import WeakFileLock

        url = hf_hub_url(self.name, file, endpoint=self.endpoint)
        metadata = get_hf_file_metadata(url, token=self.api.token, timeout=SECONDS, endpoint=self.endpoint)
        if not metadata.etag or not _ETAG.fullmatch(metadata.etag) or not metadata.size:
            raise ModelFileError(
                f"{hub.PREFIX}{self.name}: the server does not state size and hash of {file}."
            )
        blob = self.folder / "blobs" / metadata.etag
        lock = self.folder.parent / ".locks" / self.folder.name / f"{metadata.etag}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # another process may be fetching the same
            if not blob.exists():
                _fetch(url, metadata, blob, file, on_progress)


def _told(url: str) -> JsonObject:
    """The API's answer about a repository. `HfApi.model_info` would read an endless answer."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    ends, text = time.monotonic() + ANSWER_SECONDS, bytearray()
    with get_session().stream(
        "GET", url, headers=build_hf_headers(), timeout=SECONDS, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        for data in response.iter_bytes():
            text += data
            if len(text) > MAX_ANSWER or time.monotonic() > ends:
                raise ModelFileError(NO_LIST.format(url=url))
    try:
        info = json.loads(text)
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict) or not isinstance(info.get("siblings"), list):
        raise ModelFileError(NO_LIST.format(url=url))
    return info


def _sizes(info: JsonObject) -> dict[str, int]:
    """The size of each file. Names are checked, since a server other than the hub might try to lead out of
    the cache."""
    files = {}
    for sibling in info["siblings"]:
        file = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if isinstance(file, str) and file.isprintable() and not {"", ".", ".."} & {*re.split(r"[/\\]", file)}:
            size = sibling.get("size")
            files[file] = size if isinstance(size, int) else 0
    return files


def _fetch(url: str, found: Any, blob: Path, file: str, on_progress: Progress | None) -> None:
    """Fetch one blob. A part that turns out to belong to another file is fetched again, once."""
    part = blob.with_name(f"{blob.name}.incomplete")
    begun = part.exists()
    for attempt in (1, 2):
        try:
            _fetch_rest(url, found, part, lambda done: on_progress and on_progress(file, done, found.size))
            _check(part, found)
        except _Mismatch as error:
            part.unlink(missing_ok=True)
            if attempt == 2 or not begun:
                raise ModelFileError(f"{file} can't be fetched: {error}: try again.") from None
            continue
        os.replace(part, blob)
        return


class _Mismatch(Exception):
    """What was fetched is not the file."""


def _fetch_rest(url: str, found: Any, part: Path, on_bytes: Callable[[int], object]) -> None:
    """Append what is missing of a blob, and resume after a cut connection as long as that makes progress."""
    with part.open("ab") as file:
        if file.tell() > found.size:
            raise _Mismatch("what is there is longer than the file")
        _check_room(part, found.size - file.tell())
        on_bytes(file.tell())
        tries = TRIES
        while file.tell() < found.size:
            before, cut = file.tell(), None
            try:
                _append(url, found, file, on_bytes)
            except Exception as error:
                if not _is_of_the_network(error):
                    raise
                cut = error
            tries = TRIES if file.tell() > before else tries - 1
            if not tries:
                raise cut or _Mismatch("the server sends nothing")
            if file.tell() < found.size:
                time.sleep(RETRY_SECONDS)


def _append(url: str, found: Any, file: BinaryIO, on_bytes: Callable[[int], object]) -> None:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # a signed address elsewhere must not get the token
    is_own = _host(found.location) == _host(url)
    headers = build_hf_headers() if is_own else build_hf_headers(token=False)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
    if not file.tell():
        del headers["Range"]
    with get_session().stream("GET", found.location, headers=headers, timeout=SECONDS) as response:
        if response.status_code == NO_SUCH_RANGE:
            raise _Mismatch("what is there is longer than the file")
        hf_raise_for_status(response)
        if response.status_code != PARTIAL and file.tell():  # this server always sends the whole file
            file.seek(0)
            file.truncate()
        for data in response.iter_raw():
            file.write(data)
            file.flush()  # so that a kill loses nothing
            if file.tell() > found.size:  # so that a server can't fill the disk
                raise _Mismatch(f"it has more than its {found.size} bytes")
            on_bytes(file.tell())


def _is_of_the_network(error: Exception) -> bool:
    """The HTTP library is another one in each version of huggingface_hub (httpx, httpx2)."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _check(part: Path, found: Any) -> None:
    size = part.stat().st_size
    if size != found.size:
        raise _Mismatch(f"only {size} of {found.size} bytes arrived")
    if not _SHA256.fullmatch(found.etag):
        return  # small files have git's own hash; no model is one
    digest = hashlib.sha256()
    with part.open("rb") as opened:
        while piece := opened.read(READ_BYTES):
            digest.update(piece)
    if digest.hexdigest() != found.etag:
        raise _Mismatch("it arrived damaged: its sha256 does not match")


def _check_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise ModelFileError(
            f"there is no room for the download: {needed / 1e6:.0f} MB are needed in {part.parent}, and "
            f"{free / 1e6:.0f} MB are free. Make room, or set HF_HOME to another disk."
        )


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


# -- what can go wrong --------------------------------------------------------------------------------------


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    try:
        yield
    except ModelFileError:
        raise
    except Exception as error:  # of the HTTP library too, which is another one in each version of the package
        _refuse(repo, error)


def _refuse(repo: str, error: Exception) -> NoReturn:
    name, kept = f"{hub.PREFIX}{repo}", "what was fetched is kept"
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = f"the disk is full, {kept}: make room, or set HF_HOME to another disk"
    elif kind == "GatedRepoError" or status == 403:
        why = "its authors ask for consent: accept it on the repository's page, then set HF_TOKEN"
    elif kind == "RepositoryNotFoundError" or status == 401:
        why = "there is no such repository, or it is private: check the name, and HF_TOKEN (`hf auth login`)"
    elif status == 404:
        why = "the hub has no such file or version"
    elif status == 429:
        why = f"the hub accepts no more requests for now, {kept}: try again later"
    elif status is not None:
        why = f"the hub answered with status {status}, {kept}: try again later"
    elif isinstance(error, OSError) and error.errno and error.filename:
        why = f"{error.filename} can't be written ({error.strerror}): set HF_HOME to another folder"
    elif kind in ("LocalEntryNotFoundError", "UnsupportedProtocol") or _is_of_the_network(error):
        why = f"the hub can't be reached, {kept}: check the network, or use what `localsteer models` lists"
    else:
        why = f"{kind}: {' '.join(str(error).split()):.160}"
    raise ModelFileError(f"{name} can't be fetched: {why}.") from None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The progress and the words are ours."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, disabled = logging.get_verbosity(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if not disabled:
                enable_progress_bars()
