"""CuPy's RawModule, and the functions in it, whose launches go to a callable."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CUDARuntimeError, Status
from .queues import Queues

# (text of the PTX, entry, blocks, threads of each, 64-bit arguments, dynamic shared bytes): returns when the grid has
# ended, and raises what went wrong
Launch = Callable[[str, str, int, int, tuple[int, ...], int], None]
FIRST_LIMIT = 48 << 10  # dynamic shared bytes that a kernel may have unless more is asked for


def text_beside(path: str) -> str:
    """The linked PTX beside a cubin."""
    return Path(path).with_suffix(".ptx").read_text(encoding="utf-8")


class Grids:
    """What a device can run at a time, and where it is run.

    Args:
        launch: runs a grid.
        resident: blocks that a device holds, by threads and dynamic shared bytes of each.
        most_shared_bytes: of a block.
    """

    def __init__(
        self, launch: Launch, queues: Queues, resident: Callable[[int, int], int], most_shared_bytes: int
    ) -> None:
        self.queues, self.resident, self.most_shared_bytes = queues, resident, most_shared_bytes
        self._launch = launch

    def run(self, *grid: Any) -> None:
        try:
            self._launch(*grid)
        except Exception as error:
            self.queues.broken = f"a launch has failed before ({type(error).__name__}: {error})"
            raise


class Kernel:
    """A function as the driver knows it."""

    def __init__(self, pointer: int) -> None:
        self.ptr = pointer


class Function:
    """A kernel, of which everybody on a device gets the same."""

    def __init__(self, grids: Grids, text: str, entry: str) -> None:
        self._grids, self._text, self._entry, self._limit = grids, text, entry, FIRST_LIMIT
        self.kernel = Kernel(id(self))

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, num_bytes: int) -> None:
        most = self._grids.most_shared_bytes
        if not 0 <= num_bytes <= most:
            why = f"dynamic shared memory must be in [0, {most}] bytes, got {num_bytes}"
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, why)
        self._limit = num_bytes

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[np.int64, ...], *, shared_mem: int = 0) -> None:
        """Launch on the current stream; grids and blocks have one dimension, arguments are np.int64."""
        (blocks,), (threads,) = grid, block
        if not all(isinstance(argument, np.int64) for argument in args):
            raise TypeError(f"arguments must be np.int64, got {[type(argument).__name__ for argument in args]}")
        self._check(blocks, threads, shared_mem)
        words = tuple(int(argument) for argument in args)
        queues = self._grids.queues
        launched = self._text, self._entry, blocks, threads, words, shared_mem
        queues.enqueue(queues.stream, lambda: self._grids.run(*launched))

    def _check(self, blocks: int, threads: int, shared: int) -> None:
        if shared > self._limit:
            why = f"shared_mem must be at most max_dynamic_shared_size_bytes={self._limit}, got {shared}"
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, why)
        most = self._grids.resident(threads, shared)
        if blocks > most:
            why = f"{blocks} blocks must be resident at the same time, and the device holds {most}"
            raise CUDARuntimeError(Status.cudaErrorCooperativeLaunchTooLarge, why)


class Modules:
    """Functions by device, file and name.

    Args:
        texts: the linked PTX of a cubin, by its path.
    """

    def __init__(self, grids: Grids, texts: Callable[[str], str]) -> None:
        self._grids, self._texts = grids, texts
        self._functions: dict[tuple[int, str, str], Function] = {}

    def load(self, path: str, enable_cooperative_groups: bool = False) -> RawModule:
        """CuPy's RawModule."""
        if not enable_cooperative_groups:
            raise NotImplementedError("the stand-in has cooperative launches only: enable_cooperative_groups=True")
        return RawModule(self, path)

    def function(self, path: str, entry: str) -> Function:
        key = self._grids.queues.device, path, entry
        if key not in self._functions:
            text = self._texts(path)
            if re.search(rf"\.entry\s+{re.escape(entry)}\b", text) is None:
                raise CUDARuntimeError(Status.cudaErrorSymbolNotFound, f"the text of {path} has no entry {entry!r}")
            self._functions[key] = Function(self._grids, text, entry)
        return self._functions[key]


class RawModule:
    """A cubin."""

    def __init__(self, modules: Modules, path: str) -> None:
        self._modules, self._path = modules, path

    def get_function(self, name: str) -> Function:
        return self._modules.function(self._path, name)
