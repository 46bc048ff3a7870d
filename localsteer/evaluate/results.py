"""results.json: everything that one evaluation found, with every setting, file hash and version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from localsteer.cache import atomic_path, file_hash
from localsteer.errors import LocalsteerError
from localsteer.evaluate.page import FORMAT, Facts, Results, SuiteReport, loaded, plain
from localsteer.jsonable import finite

if TYPE_CHECKING:
    from localsteer.evaluate.bench import Bench

NAME = "results.json"


def document(
    bench: Bench,
    suites: Mapping[str, SuiteReport],
    *,
    command: str,
    seconds: float,
    settings: Facts,
    files: Mapping[str, Path],
) -> Results:
    """The whole file. files: what was read, by what it is; their hashes are recorded."""
    return Results(
        **versions(),
        command=command,
        seconds=round(seconds, 1),
        model=bench.model,
        base=bench.base.model if bench.base else None,
        settings=settings,
        files={name: file_hash(path) for name, path in files.items()},
        vectors=bench.vectors.records(),
        suites=dict(suites),
    )


def versions() -> Facts:
    """What results are of, and by what they were made."""
    import platform

    from localsteer import __version__
    from localsteer.runtime.bridge import system_info

    return {
        "format": FORMAT,
        "localsteer": __version__,
        "llama_cpp": system_info()["llama-cpp-python"],
        "machine": f"{platform.machine()} {platform.system()}",
    }


def write(results: Results, folder: Path) -> None:
    """`results.json` in a folder, in one step. Raises LocalsteerError when the disk takes no more."""
    text = json.dumps(finite(plain(results)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / NAME, text)


def write_text(path: Path, text: str) -> None:
    """In one step. Raises LocalsteerError when the disk takes no more."""
    with atomic_path(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> LocalsteerError:
    """Of a run that is given again and goes on."""
    return LocalsteerError(
        f"{path} can't be written ({error.strerror or error}): what is done is kept; make room and run the "
        "same command again."
    )


def read(path: str | Path) -> Results:
    """The results of a run's folder, or of a file. Raises LocalsteerError for what is none."""
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LocalsteerError(
            f"{file} can't be read ({error.strerror or error}): give the folder of a run, or its {NAME}."
        ) from error
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise LocalsteerError(f"{file} is no {NAME} ({error}): run the evaluation again.") from None
    try:
        return loaded(content)
    except LocalsteerError as error:
        raise LocalsteerError(f"{file}: {error}") from None


def refuse_others(folder: Path, study: str | None) -> None:
    """Raise LocalsteerError where `folder` holds the results of something else, which would be replaced.

    study: the study that will write there, None for an evaluation.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # none, or damaged: nothing to lose
    other = content.get("study") if isinstance(content, dict) else None
    if other != study:
        raise LocalsteerError(
            f"{folder / NAME} holds the results of {_called(other)}: choose another folder for "
            f"{_called(study)}."
        )


def _called(study: str | None) -> str:
    return "an evaluation" if study is None else f"study {study}"
