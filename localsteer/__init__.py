"""Activation steering on quantized GGUF models, inside llama.cpp.

    import localsteer
    vector = localsteer.ControlVector.load("json.gguf")
    with localsteer.Engine("model.gguf") as engine:
        print(engine.generate("Tell me about foxes.", steer=[vector]).text)

Names load at first use (PEP 562): `import localsteer` itself imports neither numpy, torch nor llama_cpp, and
every `--help` therefore answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine as Engine
    from .errors import LocalsteerError as LocalsteerError
    from .llama import SteeredLlama as SteeredLlama
    from .plan import Plan as Plan
    from .plan import PositionClass as PositionClass
    from .runtime.ask import Ask as Ask
    from .runtime.reply import Chunk as Chunk
    from .runtime.reply import Reply as Reply
    from .runtime.sampling import Sampling as Sampling
    from .runtime.scheduler import Scheduler as Scheduler
    from .templates import ChatTemplate as ChatTemplate
    from .vector import ControlVector as ControlVector

__version__ = "0.1.0"

_HOMES = {
    "ControlVector": "vector",
    "Plan": "plan",
    "PositionClass": "plan",
    "Engine": "engine",
    "Ask": "runtime.ask",
    "Scheduler": "runtime.scheduler",
    "SteeredLlama": "llama",
    "Sampling": "runtime.sampling",
    "Reply": "runtime.reply",
    "Chunk": "runtime.reply",
    "ChatTemplate": "templates",
    "LocalsteerError": "errors",
    "VectorFileError": "errors",
    "ModelFileError": "errors",
    "MismatchError": "errors",
    "PlanError": "errors",
    "PromptError": "errors",
    "UnsupportedModelError": "errors",
    "CatalogError": "errors",
    "HostError": "errors",
}
# Some names, `extract` for instance, are modules: a function of that name here would vanish if the module
# were imported first, because the import system sets the attribute too. Call localsteer.extract.extract(...).
_MODULES = ("ensure", "errors", "extract", "states", "trace")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'localsteer' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
