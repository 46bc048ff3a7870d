"""Ends the process without Python's help: see native/last_resort.cpp."""

from __future__ import annotations

import ctypes
import math

from .hook import load_native


def end_after(number: int, seconds: float, again: float) -> bool:
    """End the process with status 1 if it has not ended `seconds` after the signal `number`, or `again`
    seconds after a further one. Call this once Python's handler of the signal is in place.

    Returns False if this is not possible: on Windows, and for a signal that Python does not handle.
    """
    arm = load_native().localsteer_end_after
    arm.restype, arm.argtypes = ctypes.c_int32, [ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint32]
    return arm(number, math.ceil(seconds), math.ceil(again)) == 0
