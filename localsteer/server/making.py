"""Makes vectors on request: one at a time, each in a separate process, as by `localsteer tune` or `learn`.

The process has its own engine and the lowest priority (cli/piped.py), so replies continue meanwhile. It does
not depend on the served model staying loaded, nor on the client. It ends when this process does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from localsteer.errors import LocalsteerError
from localsteer.interpreter import python_command
from localsteer.vector import ControlVector

from . import holding
from .errors import ApiError
from .limits import Limits
from .pool import without_folders
from .threads import aside

if TYPE_CHECKING:
    from localsteer.catalog import Instruction

    from .pool import Pool
    from .steering import VectorFolder

Method = Literal["search", "learn"]
MAX_WAITING = 4  # jobs beside the one that runs
MAX_KEPT = 32  # jobs that have ended and can still be queried
STOPPING_SECONDS = 300.0  # for a job that was told to stop to check and write its best
ENDED = ("succeeded", "cancelled", "failed")
BEST = ", best so far "  # in the progress of a search
_PROGRESS = b"\x1e"  # begins a line of progress, see cli/piped.py
_TALK = "localsteer: "  # begins a line for people
_REFUSED = 2  # exit status: the last line says why
_CODE = "from localsteer.cli.piped import run; run()"
_PRIVATE = ("LOCALSTEER_API_KEY",)  # environment variables that the process does not need

logger = logging.getLogger("localsteer.server")


class PipedCommand:
    """A localsteer command in a separate process. `run` is for one thread, the other methods for any."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killer: threading.Timer | None = None
        self.is_stopped = self.is_killed = False

    def run(self, on_progress: Callable[[str, int, int], None]) -> tuple[int, str]:
        """Run it; returns its exit status, and its last line for people. on_progress: called with (what is
        being done, done, total or 0)."""
        with self._lock:
            if self.is_stopped:
                return 130, ""
            self._process = process = _started(self._words)
        last = ""
        try:
            for data in process.stderr:  # type: ignore[union-attr]
                line = data.decode("utf-8", "replace").strip()
                if data.startswith(_PROGRESS):
                    with suppress(ValueError, KeyError):  # a library may write into the middle of a line
                        event = json.loads(data[len(_PROGRESS) :])
                        on_progress(event["what"], event["done"], event["total"])
                elif line.startswith(_TALK):
                    last = line.removeprefix(_TALK)
            return process.wait(), last
        finally:
            with self._lock:
                self._close(process)

    def stop(self, seconds: float) -> None:
        """Make it end with the best so far, and kill it if that takes longer than this many seconds."""
        with self._lock:
            again, self.is_stopped = self.is_stopped, True
            if self._process is None or self._process.poll() is not None:
                return
            if not again:
                with suppress(OSError):
                    self._process.stdin.write(b"stop\n")  # type: ignore[union-attr]
                    self._process.stdin.flush()  # type: ignore[union-attr]
            if self._killer is not None:
                self._killer.cancel()
            self._killer = threading.Timer(seconds, self.kill)
            self._killer.daemon = True
            self._killer.start()

    def kill(self) -> None:
        with self._lock:
            self.is_stopped = True
            if self._process is not None and self._process.poll() is None:
                self.is_killed = True
                self._process.kill()

    def _close(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stderr):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        if self._killer is not None:
            self._killer.cancel()


def _started(words: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        python_command(_CODE),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name not in _PRIVATE},
    )
    with suppress(OSError):  # it has ended: `run` sees why
        process.stdin.write(json.dumps(list(words)).encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return process


class JobResult(TypedDict):
    """What the check found (a TuningRecord, shortened), and where nothing helps what learning would do."""

    helps: bool
    setting: JobSetting | None
    n: int | None
    scores: dict[str, float | None] | None
    degenerate: dict[str, float | None] | None
    judged_by: str | None
    recovered_gap: float | None
    with_instruction: str | None
    advice: list[str] | None
    stopped: bool | None
    seconds: float | None
    learning: str | None


class JobSetting(TypedDict):
    layer: list[int]
    positions: str
    mode: str
    strength: float


class _JobPlace(TypedDict, total=False):
    """How many jobs come before it."""

    before: int | None


class JobDocument(_JobPlace):
    """A VectorJob as the API and the page have it."""

    object: str
    created: int
    id: str
    model: str
    name: str
    method: str
    status: str
    doing: str
    best: str
    done: int
    total: int
    vector: str | None
    instruction: str
    text: str | None
    seconds: float
    stopped_by: str | None
    error: str | None
    result: JobResult | None


@dataclass(eq=False)
class VectorJob:
    """One vector being made. words: arguments of the command, without its output. vector: the name under
    which it is offered, or None. stopped_by: `request`, `deadline` or `closing`."""

    model: str
    instruction: Instruction
    method: Method
    name: str
    replace: bool
    words: Sequence[str]
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(8)}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"
    doing: str = ""
    best: str = ""
    done: int = 0
    total: int = 0
    vector: str | None = None
    stopped_by: str | None = None
    error: str | None = None
    result: JobResult | None = None
    _began: float | None = None
    _took: float = 0.0

    def __post_init__(self) -> None:
        self.command = PipedCommand(())

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def seconds(self) -> float:
        """Seconds since it began to run, until its end."""
        return self._took if self._began is None else time.monotonic() - self._began

    def hear(self, what: str, done: int, total: int) -> None:
        """Take in the progress that its process reports."""
        self.doing, _, best = what.partition(BEST)
        self.best, self.done, self.total = best or self.best, done, total

    def make(self, seconds: float) -> bytes | None:
        """Make the vector, in a thread; returns its file, or None. Raises LocalsteerError with the reason of
        a refusal."""
        with tempfile.TemporaryDirectory(prefix="localsteer-job-") as folder:
            target = Path(folder) / f"{self.name}.gguf"
            self.command = PipedCommand([*self.words, "-o", str(target)])
            if self.stopped_by:  # from here on, stopping the job stops this command
                return None
            alarm = threading.Timer(seconds, self.stop, ("deadline", STOPPING_SECONDS))
            alarm.daemon = True
            alarm.start()
            try:
                status, last = self.command.run(self.hear)
            finally:
                alarm.cancel()
            if target.is_file() and not self.command.is_killed:
                return target.read_bytes()
            if self.stopped_by:
                return None
            if status == _REFUSED and last:
                raise LocalsteerError(without_folders(last))
            raise LocalsteerError(
                f"the process that made the vector ended with status {status}, perhaps for lack of memory."
            )

    def stop(self, by: str, seconds: float) -> None:
        """Stop the job, from any thread: it keeps the best so far, and has this many seconds for that."""
        self.stopped_by = self.stopped_by or by
        if self.status == "running":
            self.status = "stopping"
        self.command.stop(seconds)

    def begin(self) -> None:
        self.status, self._began = "running", time.monotonic()

    def end(self, status: str, error: str | None = None) -> None:
        self._took, self._began = self.seconds, None
        self.status, self.error = status, error

    def document(self) -> JobDocument:
        return {
            "object": "steering.job",
            "created": self.created,
            "id": self.id,
            "model": self.model,
            "name": self.name,
            "method": self.method,
            "status": self.status,
            "doing": self.doing,
            "best": self.best,
            "done": self.done,
            "total": self.total,
            "vector": self.vector,
            "instruction": self.instruction.id,
            "text": next(iter(self.instruction.phrasings), None),
            "seconds": round(self.seconds, 1),
            "stopped_by": self.stopped_by,
            "error": self.error,
            "result": self.result,
        }


class Jobs:
    """Jobs that wait, run, and have ended. Everything here runs in the event loop."""

    def __init__(self, pool: Pool, vectors: VectorFolder, limits: Limits) -> None:
        self.pool, self.vectors, self.limits = pool, vectors, limits
        self.known: dict[str, VectorJob] = {}  # by id, in the order in which they were asked for
        self._waiting: deque[VectorJob] = deque()
        self._running: VectorJob | None = None
        self._worker: asyncio.Task[None] | None = None
        self._closing = False
        self._threads = ThreadPoolExecutor(1, "localsteer-making")

    def add(self, job: VectorJob) -> None:
        """Raise ApiError if too many jobs wait, and while the server is closing."""
        if self._closing:
            raise ApiError("the server is closing: no new jobs.", status=503, code="closing")
        if len(self._waiting) >= MAX_WAITING:
            raise ApiError(
                f"one vector is made at a time, and {MAX_WAITING} more wait: try again later.",
                status=429,
                code="queue_full",
            )
        self.known[job.id] = job
        self._waiting.append(job)
        self._forget()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def active(self, name: str) -> VectorJob | None:
        """The job that is making a vector of this name."""
        under_way = (job for job in self.known.values() if not job.has_ended)
        return next((job for job in under_way if job.name == name), None)

    def place(self, job: VectorJob) -> int:
        """How many jobs are ahead of it."""
        if job not in self._waiting:
            return 0
        return self._waiting.index(job) + (self._running is not None)

    def cancel(self, job: VectorJob) -> None:
        """Stop a job. A running one keeps the best so far, and ends at once the second time; an ended one
        stays listed."""
        if job in self._waiting:
            self._waiting.remove(job)
            job.stopped_by = "request"
            job.end("cancelled")
        elif job.status == "stopping":
            job.command.kill()
        elif not job.has_ended:
            job.stop("request", STOPPING_SECONDS)

    def stop(self, grace: float) -> None:
        """Stop when the server ends: waiting jobs are dropped, a running one has the grace period to keep its
        best."""
        self._closing = True
        while self._waiting:
            job = self._waiting.popleft()
            job.stopped_by = "closing"
            job.end("cancelled")
        if self._running is not None:
            self._running.stop("closing", grace)

    async def settle(self) -> None:
        """Wait until nothing runs any more."""
        if not self._closing:
            self.stop(0.0)
        if self._worker is not None:
            await asyncio.wait({self._worker})
        self._threads.shutdown(wait=False)

    def _forget(self) -> None:
        ended = [job for job in self.known.values() if job.has_ended]
        for job in ended[: max(0, len(ended) - MAX_KEPT)]:
            del self.known[job.id]

    async def _work(self) -> None:
        while self._waiting:
            self._running = job = self._waiting.popleft()
            job.begin()
            try:
                await self._one(job)
            except (ApiError, LocalsteerError) as error:
                job.end("failed", str(error))
            except Exception:
                logger.exception("a job failed")
                job.end("failed", "the server failed to handle this job: its log says why.")
            finally:
                self._running = None

    async def _one(self, job: VectorJob) -> None:
        with self.pool.room_for_another(job.model):
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._threads, job.make, self.limits.job_seconds)
        if data is not None:
            await self._take(job, data)
            job.end("succeeded")
        elif job.stopped_by == "deadline":
            minutes = self.limits.job_seconds / 60
            job.end("failed", f"nothing was found within {minutes:g} minutes (--job-minutes).")
        else:
            job.end("cancelled")

    async def _take(self, job: VectorJob, data: bytes) -> None:
        """Offer the vector if it helps, and keep the figures in its file."""
        with holding.held():
            vector = await aside(_loaded, data)
            job.result = result_of(vector, job)
            if not vector.strength:
                return
            self.pool.take_loaded()
            try:
                entry = await aside(self.vectors.add, job.name, data, replace=job.replace)
            except ApiError as error:
                if error.code != "exists":
                    raise
                # another vector was put there meanwhile: keep both
                name = f"{job.name[:50]}-{job.id[-6:]}"
                entry = await aside(self.vectors.add, name, data, replace=False)
        job.vector = entry.name


def _loaded(data: bytes) -> ControlVector:
    with tempfile.TemporaryDirectory(prefix="localsteer-job-") as folder:
        path = Path(folder) / "made.gguf"
        path.write_bytes(data)
        return ControlVector.load(path)


def result_of(vector: ControlVector, job: VectorJob) -> JobResult:
    record = vector.provenance.get("validation") or {}
    kept = (
        "n", "scores", "degenerate", "judged_by", "recovered_gap", "with_instruction", "advice", "stopped",
        "seconds",
    )  # fmt: skip
    helps = bool(vector.strength)
    setting = {
        "layer": list(vector.layers),
        "positions": vector.positions,
        "mode": vector.mode,
        "strength": vector.strength,
    }
    learning = None if helps or job.method == "learn" else what_learning_does(job.instruction)
    found = {name: record.get(name) for name in kept}
    return {"helps": helps, "setting": setting if helps else None, **found, "learning": learning}


def what_learning_does(instruction: Instruction) -> str:
    """What to say about learning after a search that found nothing."""
    from localsteer.verify import can_rewrite

    if instruction.verifier is not None and can_rewrite(instruction.verifier):
        return (
            "Learning does not need a model that does what it is told: it takes the model's own plain "
            "replies, rewrites them to follow, and fits an edit of one layer to them, in several "
            "minutes. It needs PyTorch (the extra `torch`)."
        )
    return (
        "Learning needs replies that follow: the told model's, if at least half of them do, or examples "
        "of your own (`localsteer learn --examples FILE.jsonl`); no rule can rewrite a plain reply to "
        "follow this. It needs PyTorch (the extra `torch`)."
    )
