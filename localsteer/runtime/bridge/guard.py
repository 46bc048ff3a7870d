"""Checks a model file before it is loaded into this process.

llama.cpp ends the process for many faults of a file. Its header is therefore checked (model_header.py), and a
file that is new here is first loaded in a separate process (trial.py). The outcome is kept in the cache
folder, under a fingerprint of the file; the second time, the check takes a few milliseconds.
LOCALSTEER_MODEL_CHECK=header skips the trial, =off the header as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from ... import errors
from ...cache import atomic_path, cache_folder, file_sha256, is_intact
from ...errors import LocalsteerError, ModelFileError
from ..broken import OTHER_CPU, is_illegal_instruction

VARIABLE = "LOCALSTEER_MODEL_CHECK"
FULL, HEADER, OFF = "full", "header", "off"
# Files that were tried before the release: size, and sha256 of the whole file
KNOWN = {98362432: ("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",)}
WHOLE_BYTES = 16 << 20  # a file up to this size is hashed completely
N_SAMPLES, SAMPLE_BYTES, EDGE_BYTES = 64, 4096, 1 << 20
# a trial may take this long, plus the time to read its file at this speed
SECONDS, BYTES_PER_SECOND = 60.0, 20e6
_SHOWN = 300  # characters of llama.cpp's message
_ADVICE = "the file is damaged or hostile: copy or download it again, or use another model."
logger = logging.getLogger("localsteer")


@dataclass(frozen=True)
class Load:
    """How a model is loaded, as far as it affects whether the load succeeds."""

    n_gpu_layers: int
    use_extra_bufts: bool
    system: str  # what llama.cpp was compiled for


class TrialError(Exception):
    """A trial that says nothing about the file: it could not begin, or ran out of time or memory."""


def check_file(path: Path, load: Load, *, again: bool = False, can_try: bool = True) -> None:
    """Raise ModelFileError, one line, for a file that llama.cpp can't load, or for which it would end the
    process.

    again: try the file even if it is known, or trials are off. can_try: False for a file that is too large
    for this machine; then only its header is checked.
    """
    mode = _mode()
    _check_magic(path)
    if mode == OFF:
        return
    if (mode == HEADER and not again) or not can_try:
        _header_length(path)
        return
    stamp = _stamp(path, load)
    if stamp in _passed and not again:
        return
    if not (_is_ours(path) and not again):
        _check_unknown(path, load, again)
    _passed.add(stamp)


_passed: set[tuple[Any, ...]] = set()  # files that this process has found good


def _mode() -> str:
    mode = os.environ.get(VARIABLE, "").strip().lower() or FULL
    if mode not in (FULL, HEADER, OFF):
        raise LocalsteerError(f"{VARIABLE}={mode} is not known: choose {FULL}, {HEADER} or {OFF}.")
    return mode


def _check_magic(path: Path) -> None:
    """Raise ModelFileError for files whose message from llama.cpp would be about its internals."""
    try:
        if path.is_fifo() or path.is_char_device():
            raise ModelFileError(f"{path} is a pipe or a device: name a file.")
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}.") from None
    except ValueError:  # a NUL in the name
        raise ModelFileError(f"{str(path)!r} can't be the name of a file.") from None
    if magic != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file: use a model in llama.cpp's format.")


def _header_length(path: Path) -> int:
    from ...model_header import check_header

    return check_header(path)


def _stamp(path: Path, load: Load) -> tuple[Any, ...]:
    try:
        stat = path.stat()
        return (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, load)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}.") from None


def _is_ours(path: Path) -> bool:
    """Whether localsteer made the file itself, and it is unchanged."""
    try:
        ours = path.resolve().is_relative_to((cache_folder() / "models").resolve())
    except LocalsteerError:
        return False
    return ours and is_intact(path)


def _check_unknown(path: Path, load: Load, again: bool) -> None:
    try:
        fingerprint = _fingerprint(path, load)
        outcome = None if again else _read_outcome(fingerprint, path)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}.") from None
    if outcome is None:
        length = _header_length(path)
        outcome = {"header": length, "digest": _digest(path, length), "refused": None}
        if again or not _is_known(path):
            try:
                outcome["refused"] = _try(path, load)
            except TrialError as error:
                raise ModelFileError(f"{path} can't be loaded: {error}") from None
        _keep_outcome(fingerprint, outcome)
    if outcome["refused"]:
        raise ModelFileError(f"{path} can't be loaded: {outcome['refused']}")


# --- what is known of files ---


def _fingerprint(path: Path, load: Load) -> str:
    """A fingerprint of a file and of how it is loaded. A large file counts by its size, time, ends and
    samples: a copy that was cut short or overwritten has another fingerprint, and so has a file changed by
    any program that does not set the time back."""
    versions = [importlib.metadata.version("llama-cpp-python"), asdict(load), _trial_digest()]
    digest = hashlib.blake2b(json.dumps(versions).encode(), digest_size=20)
    for part in _parts(path):
        stat = part.stat()
        digest.update(f"\n{part.name if part != path else ''} {stat.st_size}\n".encode("utf-8", "replace"))
        with part.open("rb", buffering=0) as file:
            if stat.st_size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(f"{stat.st_mtime_ns}\n".encode())
            digest.update(file.read(EDGE_BYTES))
            for k in range(1, N_SAMPLES + 1):
                file.seek(stat.st_size * k // N_SAMPLES - SAMPLE_BYTES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _trial_digest() -> str:
    """The version of the trial and of the check before it: with another one, every file is tried again."""
    folder = Path(__file__).parent
    sources = (folder / "trial.py", Path(errors.__file__).with_name("model_header.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _parts(path: Path) -> list[Path]:
    """All files of a model that is split into several, which llama.cpp finds by their names."""
    match = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    if not match:
        return [path]
    files = path.parent.glob(f"{_escaped(match[1])}[0-9][0-9][0-9][0-9][0-9]{_escaped(match[2])}")
    return sorted({path, *files})


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _digest(path: Path, length: int) -> str:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(length), digest_size=20).hexdigest()


def _outcome_path(fingerprint: str) -> Path:
    return cache_folder() / "tried" / f"{fingerprint}.json"


class _Outcome(TypedDict):
    """How a trial went. header, digest: how many bytes of the file were looked at, and their hash. refused:
    why it can't be used, or None."""

    header: int
    digest: str
    refused: str | None


def _read_outcome(fingerprint: str, path: Path) -> _Outcome | None:
    """The outcome of an earlier trial; None if there was none, or the header has changed since."""
    try:
        outcome = json.loads(_outcome_path(fingerprint).read_text("utf-8"))
        length, digest, refused = outcome["header"], outcome["digest"], outcome["refused"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, LocalsteerError):
        return None
    whole = type(length) is int and 0 < length <= 1 << 30 and (refused is None or isinstance(refused, str))
    return outcome if whole and digest == _digest(path, length) else None


def _keep_outcome(fingerprint: str, outcome: _Outcome) -> None:
    # if the folder can't be written, the only price is another trial
    with contextlib.suppress(OSError, LocalsteerError), atomic_path(_outcome_path(fingerprint)) as temporary:
        temporary.write_text(json.dumps(outcome), "utf-8")


def _is_known(path: Path) -> bool:
    return file_sha256(path) in KNOWN.get(path.stat().st_size, ())


# --- the trial ---


def _try(path: Path, load: Load) -> str | None:
    """Load a file in a separate process. Returns why it can't be used, according to how llama.cpp ended, or
    None.

    Raises TrialError, and the localsteer error with which the file was refused there.
    """
    if not sys.executable:  # Python embedded in another program
        return None
    seconds = SECONDS + path.stat().st_size / BYTES_PER_SECOND
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("trial.py")), _job(path, load)],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, env=_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TrialError(f"llama.cpp has not finished loading it after {seconds:.0f} s; {_ADVICE}") from None
    except OSError as error:
        logger.warning(
            f"{path.name} is loaded without a trial: no process could be started ({error.strerror or error})."
        )
        return None
    stage, _, said = done.stdout.decode("utf-8", "replace").rstrip("\n").rpartition("\n")[2].partition(" ")
    if done.returncode == 0 and stage == "done":
        return None
    if stage == "error":
        name, message = json.loads(said)
        raise getattr(errors, name)(message)
    stderr = done.stderr.decode("utf-8", "replace")
    if not stage:
        logger.warning(f"{path.name} is loaded without a trial: {_one_line(stderr)[-_SHOWN:]}")
        return None
    if done.returncode == -getattr(signal, "SIGKILL", 9):
        raise TrialError("the system killed llama.cpp while it loaded it (no memory?): use a smaller model.")
    if is_illegal_instruction(done.returncode):
        raise TrialError(OTHER_CPU)  # not the fault of the file
    if done.returncode > 0 and "Traceback" in stderr:
        return f"{_one_line(stderr.splitlines()[-1])}; {_ADVICE}"
    return f"llama.cpp ends the process with {_last_words(stderr, done.returncode)}; {_ADVICE}"


def _job(path: Path, load: Load) -> str:
    """The command for the other process. It finds packages where this one does, without importing all of
    them."""
    package = __package__ or "localsteer.runtime.bridge"
    parts = package.split(".")
    stubs = [".".join(parts[: n + 1]) for n in range(len(parts))]
    from .library import default_threads

    return json.dumps(
        {
            "model": os.fspath(path.resolve()),
            "stubs": {name: list(sys.modules[name].__path__) for name in (*stubs, "llama_cpp")},
            "package": package,
            "root": parts[0],
            "sys_path": [entry for entry in sys.path if entry],
            "n_gpu_layers": load.n_gpu_layers,
            "use_extra_bufts": load.use_extra_bufts,
            "n_threads": default_threads(),
            "file_size": path.stat().st_size,
        }
    )


def _environment() -> dict[str, str]:
    # without a backtrace, for which ggml would start a debugger if there is one
    ours = {VARIABLE: OFF, "GGML_NO_BACKTRACE": "1", "PYTHONIOENCODING": "utf-8"}
    return {"GOMP_SPINCOUNT": "1000", **os.environ, **ours}


def _last_words(stderr: str, status: int) -> str:
    """What llama.cpp said as it ended: an assertion, an uncaught exception, or otherwise the signal."""
    lines = [line.strip() for line in stderr.splitlines()]
    for pattern in (r"GGML_(?:ASSERT|ABORT)", r"\.(?:c|cpp|h|cc):\d+: ", r"^what\(\):", "^terminate called"):
        last_words = next((line for line in lines if re.search(pattern, line)), None)
        if last_words:
            words = re.sub(r"^what\(\): *|^\S*?\.(?:c|cpp|h|cc):\d+: ", "", last_words)
            return f'"{_one_line(words)[:_SHOWN]}"'
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"status {status}"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
