"""What is wrong with a llama.cpp that can't be loaded, in one line. This module does not import it."""

from __future__ import annotations

REINSTALL = "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python==0.3.36"
OTHER_CPU = (
    "llama.cpp was compiled for another processor (illegal instruction): "
    f"`{REINSTALL}` on this machine compiles it for this one."
)
_ILLEGAL = (-4, 132, 0xC000001D, 0xC000001D - 2**32)  # SIGILL, SIGILL through a shell, and the two of Windows


def is_illegal_instruction(status: int) -> bool:
    """Whether a process with this exit status met an instruction that this processor does not have."""
    return status in _ILLEGAL


def why_not_loaded(error: Exception) -> str:
    """The message for a library of llama.cpp, or one that it needs, that is missing or damaged."""
    text = " ".join(str(error).split())
    why = text.rpartition("': ")[2] or text  # what follows the path of the library
    if "libgomp" in why or "libomp" in why:
        advice = "install OpenMP's library (Debian, Ubuntu: apt install libgomp1; Fedora: libgomp)."
    else:
        advice = REINSTALL
    return f"llama.cpp can't be loaded ({why:.300}): {advice}"
