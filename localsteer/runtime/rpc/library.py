"""Finds and builds llama.cpp's RPC backend.

The stock llama-cpp-python has none. The backend must match the installed ggml exactly, which every user
compiles differently, so no wheel can contain it. `localsteer rpc build` compiles its two source files against
the installed ggml, from the source in llama-cpp-python's sdist.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ...cache import cache_folder
from ...errors import LocalsteerError

VARIABLE = "LOCALSTEER_RPC"  # a folder with the library and the server, instead of the one in the cache
SERVER = "ggml-rpc-server.exe" if sys.platform == "win32" else "ggml-rpc-server"
LIBRARY = {"win32": "ggml-rpc.dll", "darwin": "libggml-rpc.dylib"}.get(sys.platform, "libggml-rpc.so")
_SHOWN = 300  # characters of a failing program's output
_SOURCES = ("ggml/src/ggml-rpc/ggml-rpc.cpp", "tools/rpc/rpc-server.cpp")

Say = Callable[[str], None]


def rpc_folder() -> Path:
    """The folder for the library and the server that belong to the installed ggml."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = next((path for path in sorted(ggml_folder().iterdir()) if "ggml-base" in path.name), None)
    digest = hashlib.sha256(base.read_bytes() if base else b"").hexdigest()[:16]
    return cache_folder() / "rpc" / f"{_version()}-{digest}"


def built_library() -> Path:
    """The path of the library. Raises LocalsteerError if it has not been built."""
    path = rpc_folder() / LIBRARY
    if not path.is_file():
        where = f"{VARIABLE}={os.environ[VARIABLE]} holds no {LIBRARY}" if os.environ.get(VARIABLE) else ""
        raise LocalsteerError(
            f"--rpc needs llama.cpp's RPC backend, which llama-cpp-python does not include"
            f"{f' ({where})' if where else ''}: build it once with `localsteer rpc build`."
        )
    return path


def ggml_folder() -> Path:
    """The folder of llama-cpp-python's libraries, found without loading them."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or not package.submodule_search_locations:
        raise LocalsteerError("llama-cpp-python is not installed: pip install llama-cpp-python.")
    return Path(package.submodule_search_locations[0]) / "lib"


def build(source: Path | None = None, *, say: Say = lambda _text: None, again: bool = False) -> Path:
    """Build the library and the server unless they exist; returns their folder.

    source: a tree of llama.cpp, or of llama-cpp-python's sdist, in the installed version; None: pip downloads
    the sdist. say: called with what is being done. Raises LocalsteerError, one line.
    """
    folder = rpc_folder()
    if not again and all((folder / name).is_file() for name in (LIBRARY, SERVER)):
        return folder
    cmake = _program("cmake")
    with tempfile.TemporaryDirectory(prefix="localsteer-rpc-") as name:
        work = Path(name)
        tree = _checked(source) if source else _downloaded(work, say)
        say("compiling llama.cpp's RPC backend against the installed ggml")
        settings = [f"-DLLAMA_CPP={tree.resolve()}", f"-DGGML_LIB={ggml_folder()}"]
        build_folder = work / "build"
        _run([cmake, "-S", _project(), "-B", build_folder, "-DCMAKE_BUILD_TYPE=Release", *settings])
        _run([cmake, "--build", build_folder, "--config", "Release"])
        _run([cmake, "--install", build_folder, "--config", "Release", "--prefix", work / "done"])
        _put(work / "done", folder)
    return folder


def _put(made: Path, folder: Path) -> None:
    """Replace the files one by one, each in one step: a program that has an old one open keeps it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, SERVER):
            beside = folder / f".{name}.{os.getpid()}"
            shutil.copy2(made / name, beside)
            os.replace(beside, folder / name)
    except OSError as error:
        raise LocalsteerError(f"can't write to {folder} ({error.strerror or error}).") from None


def _version() -> str:
    return importlib.metadata.version("llama-cpp-python")


def _downloaded(work: Path, say: Say) -> Path:
    requirement = f"llama-cpp-python=={_version()}"
    if importlib.util.find_spec("pip") is None:
        raise LocalsteerError(f"this Python has no pip: name the source of {requirement} with --source.")
    say(f"downloading the source of {requirement} with pip")
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-python",
         "--disable-pip-version-check", "--dest", work, requirement],
    )  # fmt: skip
    archive = next(work.glob("llama_cpp_python-*.tar.gz"), None)
    if archive is None:
        raise LocalsteerError(f"pip finds no sdist of {requirement}: name llama.cpp's source with --source.")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # nothing is written outside the folder; not in Python 3.10.11
            tar.extraction_filter = tarfile.data_filter
        for member in tar:  # most of it is not needed
            if "/vendor/llama.cpp/ggml/" in member.name or "/vendor/llama.cpp/tools/rpc/" in member.name:
                tar.extract(member, work)
    return _checked(work / archive.name.removesuffix(".tar.gz"))


def _checked(source: Path) -> Path:
    """The llama.cpp in a source tree. Raises LocalsteerError if its version is not the installed one."""
    for tree in (source, source / "vendor" / "llama.cpp"):
        if all((tree / name).is_file() for name in _SOURCES):
            break
    else:
        raise LocalsteerError(f"{source} holds no source of llama.cpp: it has no {_SOURCES[0]}.")
    installed = ggml_folder().parents[1] / "include"
    for header in ("ggml.h", "ggml-backend.h", "ggml-rpc.h"):
        ours, theirs = installed / header, tree / "ggml" / "include" / header
        if ours.is_file() and (not theirs.is_file() or ours.read_bytes() != theirs.read_bytes()):
            raise LocalsteerError(
                f"{source} is not the llama.cpp of the installed llama-cpp-python {_version()} ({header} "
                "differs): leave out --source, and pip downloads the right one."
            )
    return tree


def _project() -> Path:
    package = sys.modules[__package__.partition(".")[0]]
    for root in package.__path__:  # an editable install spreads the package over two folders
        if (Path(root) / "_native" / "rpc" / "CMakeLists.txt").is_file():
            return Path(root) / "_native" / "rpc"
    raise LocalsteerError(
        "this copy of localsteer lacks the build files of the RPC backend: pip install it again."
    )


def _program(name: str) -> str:
    """A program on the path, or among this Python's scripts, where `pip install cmake` puts it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not path:
        raise LocalsteerError(
            f"{name} is not installed: pip install {name} (a C++ compiler is needed as well)."
        )
    return path


def _run(words: Sequence[object]) -> None:
    done = subprocess.run([*map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).decode("utf-8", "replace").split("\n") if line]
        telling = [line for line in lines if "error" in line.lower()] or lines
        why = " ".join(" ".join(telling[:2]).split())[:_SHOWN] or f"status {done.returncode}"
        raise LocalsteerError(f"{Path(str(words[0])).name} failed: {why}")
