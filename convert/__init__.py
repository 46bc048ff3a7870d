"""Control-vector files: read, write, import from other tools, export for stock llama.cpp.

Format only: no torch, no llama_cpp. docs/format.md is normative.
"""

from __future__ import annotations

from .exports import FORMATS, export_vector
from .imports import CONVENTIONS, import_vector
from .read import read_vector
from .static import export_static, static_vector
from .write import write_vector

__all__ = [
    "CONVENTIONS",
    "FORMATS",
    "export_static",
    "export_vector",
    "import_vector",
    "read_vector",
    "static_vector",
    "write_vector",
]
