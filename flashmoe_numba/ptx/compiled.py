"""How the machine's functions are compiled."""

from __future__ import annotations

from typing import Any

import numba


def njit(function: Any) -> Any:
    """Without reference counts, which would cost most of the time: the machine allocates nothing while it runs."""
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=False, _nrt=False)(function)
