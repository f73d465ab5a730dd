"""How often MPI tries to send to a rank that does not answer: by itself, over libfabric, without an end.

MPICH has a control variable for it, which the tools interface of MPI writes at any time. It counts for all
communicators, so it is set for single calls only; a rank whose connection is just being made needs many attempts.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = b"MPIR_CVAR_CH4_OFI_MAX_EAGAIN_RETRY"
ATTEMPTS = 64  # some ms, if each is a connection that is refused
THREAD_MULTIPLE = 3  # what a tool's `MPI_T_init_thread` is asked for; the number is the same in every MPI of this kind


class SendLimit:
    """While it is entered, a send that MPI cannot begin raises. With another MPI than MPICH nothing changes."""

    def __init__(self) -> None:
        self._library: Any = None
        self._handle, self._before = ctypes.c_void_p(), ctypes.c_int()
        library = _library()
        if library is not None and self._find(library):
            self._library = library

    def _find(self, library: Any) -> bool:
        """The variable and its value."""
        index, number, given = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        steps: tuple[Callable[[], int], ...] = (
            lambda: library.MPI_T_init_thread(THREAD_MULTIPLE, ctypes.byref(given)),
            lambda: library.MPI_T_cvar_get_index(NAME, ctypes.byref(index)),
            lambda: library.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(self._handle), ctypes.byref(number)),
            lambda: library.MPI_T_cvar_read(self._handle, ctypes.byref(self._before)),
        )
        return all(step() == 0 for step in steps)

    def _write(self, attempts: ctypes.c_int) -> None:
        if self._library is not None:
            self._library.MPI_T_cvar_write(self._handle, ctypes.byref(attempts))

    def __enter__(self) -> None:
        self._write(ctypes.c_int(ATTEMPTS))

    def __exit__(self, *_: object) -> None:
        self._write(self._before)


def _library() -> Any:
    """The MPI that this process has loaded, if it is MPICH's."""
    from mpi4py import MPI

    maps = Path("/proc/self/maps")
    if MPI.get_vendor()[0] != "MPICH" or not maps.exists():
        return None
    found = re.search(r"/\S*/libmpi\.so\S*", maps.read_text())
    return ctypes.CDLL(found[0]) if found else None
