"""The only place that touches llama.cpp (through llama-cpp-python's C bindings) and native pointers.

Owners: `Model` owns a llama_model, `Context` a llama_context with its steering hook, `Sampler` a chain of
samplers. Each has close() and `with`; a context is freed before its model whatever the order of the calls.
"""

from .context import Context, Rows
from .library import choose_extra_bufts, default_threads, has_amx, system_info
from .model import Model, quantization_types, quantize
from .sampler import Sampler

__all__ = [
    "Context",
    "Model",
    "Rows",
    "Sampler",
    "choose_extra_bufts",
    "default_threads",
    "has_amx",
    "quantization_types",
    "quantize",
    "system_info",
]
