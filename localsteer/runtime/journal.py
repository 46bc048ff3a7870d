"""What a long run has done so far: one JSON line for each piece of work, read again when the run is resumed.

    journal = Journal(Path("run/replies.jsonl"), {"model": sha256})
    engine = Remembered(engine, journal)   # an Engine whose greedy replies and scores are kept

A run that was killed starts again from its beginning and finds its replies here. No other state needs
keeping, because everything between two replies is quick and always gives the same result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject
from localsteer.runtime.ask import asks_for
from localsteer.runtime.generate import generate_batch, new_requests, stream_requests
from localsteer.runtime.loop import stops_of
from localsteer.runtime.reply import Reply

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.plan import Plan
    from localsteer.runtime.ask import Prompt
    from localsteer.runtime.attach import Steer
    from localsteer.runtime.sampling import Sampling

FORMAT = 1
SUM = "crc32"  # key of the checksum, taken over the record's line without it
logger = logging.getLogger("localsteer")


class _Edit(TypedDict):
    name: str
    layer: int
    mode: str
    positions: str
    strength: float


class ReplyRecord(TypedDict):
    """A reply, and what was asked. steer: the edits of its plan."""

    kind: str
    prompt: str | list[int]
    steer: list[_Edit]
    text: str
    tokens: list[int]
    finish_reason: str


# What a record of each kind must hold to be of use; one that lacks it is made again.
_TYPES = {
    "reply": {"text": str, "tokens": list, "finish_reason": str},
    "score": {"score": (int, float)},
    "torch": {"replies": list},
}


class Journal:
    """Records by key, in a file that only grows. Thread-safe; one process at a time.

    path: created, with its folder, if need be; None keeps everything in memory. identity: what the records
    are valid for, above all the model's sha256; a file whose records have another identity is refused. Half a
    line at the end, which a killed run leaves, is dropped. A record that has changed, or lacks what its kind
    must hold, counts as missing and is made again; a notice says so. A file to which nothing was added, for
    instance by a run that was refused, is removed on closing. Raises LocalsteerError for any other line that
    can't be read.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, JsonObject] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            self._folder = next((parent for parent in path.parents if not parent.exists()), None)
            header = {"localsteer": "journal", "format": FORMAT, **identity}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._read(path, header)
                # unbuffered: a write that failed must not be retried when the file is closed
                self._file = path.open("ab", buffering=0)
            except OSError as error:
                raise LocalsteerError(
                    f"{path} can't be used ({error.strerror or error}): choose another folder."
                ) from error
            if not path.stat().st_size:
                self._append(header)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> JsonObject | None:
        return self._records.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record. Raises LocalsteerError if the disk is full; what was kept stays."""
        with self._lock:
            if key not in self._records:
                self._append(_sealed({"key": key, **record}))
                self._records[key] = dict(record)

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        if not self._records:
            with contextlib.suppress(OSError):
                self.path.unlink()
                if self._folder is not None:
                    self._remove_empty(self._folder)

    def _remove_empty(self, folder: Path) -> None:
        """Remove the file's folder and those above it, up to this one, all of which this class made."""
        for parent in self.path.parents:
            parent.rmdir()
            if parent == folder:
                return

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write a line, which then survives a kill of this process."""
        if self._file is None:
            return
        line, before = _line(record), self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)  # half a line would corrupt the next one
            raise LocalsteerError(
                f"{self.path} can't be written ({error.strerror or error}): what is done is kept; make room "
                "and run the same command again."
            ) from error

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if not whole and not _line(header).startswith(content):
            raise LocalsteerError(f"{path} is not a journal of a run: choose another folder, or delete it.")
        lines = content[:whole].splitlines()
        damaged = set()
        for number, line in enumerate(lines, 1):
            record = _parsed(line, path, number)
            if len(lines) == 1 and record.get("localsteer") == header["localsteer"]:
                # nothing was kept, for instance by a run that was refused: another run may use the file
                whole = 0
            elif number == 1:
                self._check(record, header)
            elif _is_unchanged(record) and _is_whole(record):
                self._records[record.pop("key")] = record
            else:
                damaged.add(record["key"])
        if again := damaged - self._records.keys():  # a later line may hold the same record made again
            logger.warning(f"{path}: {len(again)} records are damaged and will be made again.")
        # only now: a file that is not a journal stays unchanged
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for name, wanted in header.items():
            if found.get(name) != wanted:
                raise LocalsteerError(
                    f"{self.path} belongs to another run ({name} {found.get(name)!r}, now {wanted!r}): "
                    "choose another folder, or delete this one to start again."
                )


def _sealed(record: Mapping[str, Any]) -> JsonObject:
    return {**record, SUM: zlib.crc32(_line(record))}


def _is_unchanged(record: JsonObject) -> bool:
    """Whether a record's checksum, which is removed from it, is right; a record of an earlier version has
    none."""
    checksum = record.pop(SUM, None)
    return checksum is None or checksum == zlib.crc32(_line(record))


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record holds what its readers need."""
    kind = record.get("kind")
    types = _TYPES.get(kind, {}) if isinstance(kind, str) else None
    if types is None or not all(isinstance(record.get(name), type_) for name, type_ in types.items()):
        return False
    if kind == "reply":
        return all(type(token) is int for token in record["tokens"])
    return kind != "torch" or all(_is_torch_reply(reply) for reply in record["replies"])


def _is_torch_reply(reply: Any) -> bool:
    types = (str, list, str)  # as studies/layers.py keeps a Reply
    return isinstance(reply, list) and [*map(type, reply)] == [*types]


def _line(record: Mapping[str, Any]) -> bytes:
    # surrogatepass: json.loads reads them so
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _parsed(line: bytes, path: Path, number: int) -> JsonObject:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also UnicodeDecodeError and JSONDecodeError
        record = None
    if not isinstance(record, dict) or not (number == 1 or isinstance(record.get("key"), str)):
        raise LocalsteerError(f"{path}, line {number}: this is not a record of a run; remove the line.")
    return record


class Remembered:
    """An Engine that answers from a journal what it has answered before; everything else goes to the engine.

    Only greedy replies are kept, since others differ each time. Equal requests in one call are decoded once.
    A call that was cut short is decoded again as a whole: neighbours in a batch slightly change a reply, and
    a resumed run must end like one that was never stopped.

    check: called after each reply and each score; an exception from it ends the call. n_decoded: greedy
    replies that were not in the journal.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._journal, self._check = engine, journal, check
        self.n_decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        steer: Steer | Sequence[Steer] = (),
        sampling: Sampling | Sequence[Sampling] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **fields: Any,
    ) -> list[Reply]:
        """Like Engine.generate_batch; known replies count as done at once."""
        asks = asks_for(prompts, steer=steer, sampling=sampling, **fields)
        if not getattr(sampling, "is_argmax", False):
            return generate_batch(self._engine, asks, on_progress=on_progress)
        requests = new_requests(self._engine, asks)
        keys = [
            _key(
                "reply", request.prompt, _plan_key(request.plan), ask.max_tokens, stops_of(self._engine, ask)
            )
            for ask, request in zip(asks, requests, strict=True)
        ]
        call = _key(keys)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        missing = sorted(first[key] for key in self._missing(keys, call))
        ended = stream_requests(self._engine, [requests[i] for i in missing])
        with contextlib.closing(ended):  # however it ends, no sequence may stay in the engine
            for left, (k, reply) in zip(range(len(missing) - 1, -1, -1), ended, strict=True):
                i = missing[k]
                self.n_decoded += self._journal.get(keys[i]) is None
                record = _reply_record(prompts[i], requests[i].plan, reply)
                self._journal.put(keys[i], record | {"call": call})
                self._check()
                if on_progress:
                    on_progress(len(prompts) - left, len(prompts))
        return [_reply(self._journal.get(key)) for key in keys]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Like Engine.score."""
        keys = [_key("score", list(map(int, prompt)), list(map(int, reply))) for prompt, reply in pairs]
        call = _key(keys)
        missing = set(self._missing(keys, call))
        new = [i for i, key in enumerate(keys) if key in missing]
        asked = [pairs[i] for i in new]
        scores = self._engine.score(asked, on_progress=lambda *_: self._check()) if new else []
        for i, value in zip(new, scores, strict=True):
            self._journal.put(keys[i], {"kind": "score", "score": value, "call": call})
        return [self._journal.get(key)["score"] for key in keys]

    def _missing(self, keys: Sequence[str], call: str) -> list[str]:
        """What this call has to ask: everything new to it, or nothing if all of that is known by now."""
        records = {key: self._journal.get(key) for key in dict.fromkeys(keys)}
        new = [key for key, record in records.items() if record is None or record.get("call") == call]
        return new if any(records[key] is None for key in new) else []


def _key(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _plan_key(plan: Plan | None) -> str:
    return "" if plan is None else plan.key.hex()


def _reply_record(prompt: Prompt, plan: Plan | None, reply: Reply) -> ReplyRecord:
    keys = ("name", "layer", "mode", "positions", "strength")
    edits = [{key: getattr(edit, key) for key in keys} for edit in (plan.edits if plan else ())]
    return {
        "kind": "reply",
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "steer": edits,
        "text": reply.text,
        "tokens": list(reply.tokens),
        "finish_reason": reply.finish_reason,
    }


def _reply(record: ReplyRecord) -> Reply:
    return Reply(record["text"], list(record["tokens"]), record["finish_reason"])
