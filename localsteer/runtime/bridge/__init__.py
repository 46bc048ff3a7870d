"""The only place that touches llama.cpp (through llama-cpp-python's C bindings) and native pointers.

`Model` owns a llama_model, `Context` a llama_context with its steering hook, `Sampler` a chain of samplers.
Each has close() and works with `with`; a context is freed before its model whatever the order of the calls.
`BorrowedModel` and `BorrowedContext` belong to a llama_cpp.Llama, which frees them.
"""

from .openmp import spinning  # must come first: it decides how llama.cpp's threads wait

# isort: split
from .borrowed import BorrowedContext, BorrowedModel, batch_arrays, install, our_log, set_extra_bufts
from .context import Context, Rows
from .embedding import Embedder, pooling_of
from .hook import Hook
from .last_resort import end_after
from .library import check_threads, check_version, choose_extra_bufts, default_threads, has_amx, system_info
from .model import Model, check_gguf, quantization_types, quantize
from .sampler import Sampler, check_llama_grammar

__all__ = [
    "BorrowedContext",
    "BorrowedModel",
    "Context",
    "Embedder",
    "Hook",
    "Model",
    "Rows",
    "Sampler",
    "batch_arrays",
    "check_gguf",
    "check_llama_grammar",
    "check_threads",
    "check_version",
    "choose_extra_bufts",
    "default_threads",
    "end_after",
    "has_amx",
    "install",
    "our_log",
    "pooling_of",
    "quantization_types",
    "quantize",
    "set_extra_bufts",
    "spinning",
    "system_info",
]
