"""A layer on the stand-in for a GPU, its launches interpreted on fibers; it takes and gives NumPy's arrays, too."""

import contextlib

import numpy as np
from stand_ins import InterpretedGrid, entry_of, make_stand_in

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cuda import CudaBackend
from flashmoe_numba.gpu.gpu import Gpu
from flashmoe_numba.heap.gpus import GpuHeap
from flashmoe_numba.ptx.stand_in import installed

LOGGED = {  # where the stream is
    "copy_in": 2, "copy_out": 2, "copy_rows": 3, "copy_on_device": 2, "launch": 5, "record": 0, "wait_for": 1,
}  # fmt: skip


def logged(verb):
    """The verb, which first writes to the log which stream it is given."""

    def log_and_do(self, *arguments):
        self.log.append((verb, arguments[LOGGED[verb]]))
        return getattr(Gpu, verb)(self, *arguments)

    return log_and_do


class LoggedGpu(Gpu):
    """`log` has what was put on a stream, as (verb, stream); `caller` is the caller's stream."""

    copy_in, copy_out, copy_rows, copy_on_device, launch, record, wait_for = map(logged, LOGGED)

    def __init__(self, config, seed, heap="ipc"):
        grid = InterpretedGrid(config, seed, heap)
        with installed(make_stand_in(grid, capability=(8, 0), multiprocessors=5)):
            super().__init__(0)
        self.log, self.caller = [], self.cupy.cuda.Stream(non_blocking=True)

    def current_stream(self):
        return self.caller.ptr

    @contextlib.contextmanager
    def captured(self):
        """The caller's stream is recorded meanwhile; then this list has the graph."""
        graph = []
        self.caller.begin_capture()
        yield graph
        graph.append(self.caller.end_capture())


class InterpretedCuda(CudaBackend):
    """The backend itself, but for the kernel's build, and for tokens that are still on the host."""

    def check_tokens(self, name, x, config):
        return super().check_tokens(name, self.array(x), config)

    def join(self, x, parts):
        return [part.get() for part in parts] if isinstance(x[0], np.ndarray) else super().join(x, parts)

    def load(self, folder, backward):
        for which in (False, True) if backward else (False,):
            self._functions[which] = self.gpu.load("none.cubin", entry_of(which), self.shared_bytes)


def make_layer(config, weights, seed=0, **how):
    backend = InterpretedCuda(config, LoggedGpu(config, seed))
    return FlashMoE.from_parts(config, weights, GpuHeap(config.num_ranks), backend, **how)
