"""An end of the process that needs no Python: see native/last_resort.cpp."""

from __future__ import annotations

import ctypes
import math

from .hook import load_native


def end_after(number: int, seconds: float, again: float) -> bool:
    """From the signal `number` on the process has `seconds` to end, and `again` from a further one; then it
    is ended with status 1. Call it when Python's handler of the signal is in place.

    False where there is no such thing: on Windows, and for a signal that Python does not handle.
    """
    arm = load_native().localsteer_end_after
    arm.restype, arm.argtypes = ctypes.c_int32, [ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint32]
    return arm(number, math.ceil(seconds), math.ceil(again)) == 0
