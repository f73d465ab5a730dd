"""Stand-ins for a GPU in tests: a plain arena, and launches of the layer's kernel that are interpreted on fibers."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe_numba.build import build
from flashmoe_numba.build.likeness import like_arguments
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler, memory_view
from flashmoe_numba.kernel.state import BOX_WORDS
from flashmoe_numba.ptx.stand_in import StandIn, installed
from flashmoe_numba.ptx.stand_in.errors import CUDARuntimeError
from flashmoe_numba.tile_gemm import Scratch
from flashmoe_numba.tile_gemm.matrices import STAGE_ELEMENTS, SUMS_ELEMENTS

LANES = 32
ENTRY = "kernel"
TEXT = f".visible .entry {ENTRY}( .visible .entry {ENTRY}_backward("
ALIGNMENT, RED_ZONE, POISON = 256, 64, 0xFF  # bytes; floats of the poison are NaN


class PlainArena:
    """Memory that is handed out once, and what the host wrote of it."""

    def __init__(self, num_bytes=8 << 20):
        self.bytes, self.written = np.full(num_bytes, POISON, np.uint8), np.zeros(num_bytes, bool)
        self.base, self._next = self.bytes.ctypes.data, 0
        self.taken, self.granules = {}, {}

    def allocate(self, num_bytes, granule, name):
        address = -(-(self.base + self._next) // ALIGNMENT) * ALIGNMENT
        if address + num_bytes > self.base + self.bytes.size:
            raise MemoryError(f"no room for {name}")
        self._next = address + num_bytes + RED_ZONE - self.base
        self.taken[address], self.granules[address] = num_bytes, granule
        return address

    def free(self, address):
        self.bytes[address - self.base :][: self.taken.pop(address)] = POISON

    def view(self, address, num_bytes):
        for start, length in self.taken.items():
            if start <= address and address + num_bytes <= start + length:
                return self.bytes[address - self.base :][:num_bytes]
        raise ValueError(f"{num_bytes} bytes at {address:#x} are not of one allocation")

    def wrote(self, address, num_bytes):
        self.view(address, num_bytes)
        self.written[address - self.base :][:num_bytes] = True

    def is_written(self, array):
        at = array.data.ptr - self.base
        return self.written[at : at + array.nbytes]


def nothing(*_):
    """A launch that does nothing."""


def entry_of(backward):
    return f"{ENTRY}_backward" if backward else ENTRY


def make_stand_in(launch=nothing, arena=None, **how):
    arena = PlainArena() if arena is None else arena
    return StandIn(arena, launch, texts=lambda path: TEXT, **how)


def refused(name):
    """What raises the runtime's error of this name."""
    return pytest.raises(CUDARuntimeError, match=f"^{name}: ")


def pinned(cupy, size, dtype=np.int64):
    """So many numbers from 0 on, in page-locked memory."""
    values = np.frombuffer(cupy.cuda.PinnedMemoryPool().malloc(size * np.dtype(dtype).itemsize), dtype, size)
    values[:] = np.arange(size)
    return values


class InterpretedGrid:
    """Launches of a layer's kernel on a table at arguments[0] with arguments[1] words; the n-th by seed + n.

    `patience`: of the scheduler, where other processes write, too.
    """

    def __init__(self, config, seed=0, heap="ipc", **patience):
        self.config, self.seed, self.launches, self.patience = config, seed, 0, patience
        variant = Variant(dtype=config.dtype, architecture="sm_80", tensor_cores=False, heap=heap)
        variants = {entry_of(backward): replace(variant, backward=backward) for backward in (False, True)}
        self.like = {entry: like_arguments(variant) for entry, variant in variants.items()}

    def __call__(self, text, entry, num_blocks, threads, arguments, shared):
        table, kernel = memory_view(*arguments, np.dtype(np.int64)), interpreted("flashmoe_numba.kernel")
        run_block = kernel.grid_block if entry == ENTRY else kernel.grid_block_backward
        scheduler = Scheduler(self.seed + self.launches, **self.patience)
        self.launches += 1
        for index in range(num_blocks):
            block = (index, table, self.like[entry], self._scratch(), np.zeros(BOX_WORDS, np.int64))
            scheduler.add_block(f"block {index}", run_block, block, LANES)
        scheduler.run()

    def _scratch(self):
        shared = np.full(SUMS_ELEMENTS + STAGE_ELEMENTS, np.nan, self.config.accumulator)
        return Scratch(shared[SUMS_ELEMENTS:], shared)


def build_nothing(variant, folder):
    """In place of build.build: no compiler is there."""
    facts = dict(registers=0, spill_bytes=0, stack_bytes=0, shared_bytes=0, warnings=())
    return build.Kernel(variant=variant, path=Path(folder, "none.cubin"), entry=entry_of(variant.backward), **facts)


@contextlib.contextmanager
def without_gpu(monkeypatch, launch, **how):
    """A machine on which `FlashMoE(..., backend="cuda")` runs without a GPU."""
    monkeypatch.setattr(build, "build", build_nothing)
    with installed(make_stand_in(launch, **({"capability": (8, 0)} | how))) as cupy:
        yield cupy
