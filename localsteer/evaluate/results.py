"""results.json: everything that one evaluation found, with every setting, file hash and version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localsteer.cache import atomic_path, file_hash
from localsteer.errors import LocalsteerError
from localsteer.jsonable import finite

FORMAT = 1
NAME = "results.json"


def document(
    bench: Any,
    suites: Mapping[str, Any],
    *,
    command: str,
    seconds: float,
    settings: Mapping[str, Any],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """The whole file. files: what was read, by what it is; their hashes are recorded."""
    import platform

    from localsteer import __version__
    from localsteer.runtime.bridge import system_info

    return {
        "format": FORMAT,
        "localsteer": __version__,
        "llama_cpp": system_info()["llama-cpp-python"],
        "machine": f"{platform.machine()} {platform.system()}",
        "command": command,
        "seconds": round(seconds, 1),
        "model": bench.model,
        "base": bench.base.model if bench.base else None,
        "settings": dict(settings),
        "files": {name: file_hash(path) for name, path in files.items()},
        "vectors": bench.vector_records(),
        "suites": dict(suites),
    }


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """`results.json` in a folder, in one step. Raises LocalsteerError when the disk takes no more."""
    text = json.dumps(finite(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / NAME
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LocalsteerError(
            f"{path} can't be written ({error.strerror or error}): what is done is kept; make room and run "
            "the same command again."
        ) from error
    return path


def read(path: str | Path) -> dict[str, Any]:
    """The results of a run's folder, or of a file. Raises LocalsteerError for what is none."""
    from localsteer.evaluate.report import shape

    path = Path(path)
    file = path / NAME if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LocalsteerError(
            f"{file} can't be read ({error.strerror or error}): give the folder of a run, or its {NAME}."
        ) from error
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise LocalsteerError(f"{file} is no {NAME} ({error}): run the evaluation again.") from None
    try:
        shape.check(found)
    except LocalsteerError as error:
        raise LocalsteerError(f"{file}: {error}") from None
    return found


def refuse_others(folder: Path, study: str | None) -> None:
    """Raise LocalsteerError where `folder` holds the results of something else, which would be replaced.

    study: the study that will write there, None for an evaluation.
    """
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # none, or damaged: nothing to lose
    other = found.get("study") if isinstance(found, dict) else None
    if other != study:
        raise LocalsteerError(
            f"{folder / NAME} holds the results of {_called(other)}: choose another folder for "
            f"{_called(study)}."
        )


def _called(study: str | None) -> str:
    return "an evaluation" if study is None else f"study {study}"
