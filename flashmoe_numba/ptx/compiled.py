"""How the machine's functions are compiled."""

from __future__ import annotations

from typing import Any

import numba

from ..device.parts import PartCompiler

# Without reference counts, which would cost most of the time: the machine allocates nothing while it runs.
OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}


def njit(function: Any = None, *, entry: bool = False) -> Any:
    """Only an `entry` can be called from Python: the others are parts of it (device/parts.py)."""
    if function is None:
        return lambda function: njit(function, entry=entry)
    part = {} if entry else {"pipeline_class": PartCompiler}
    return numba.njit(**OPTIONS, **part, no_cpython_wrapper=not entry)(function)
