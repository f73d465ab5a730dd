"""A GPU that is none: the cuda backend's launches interpreted on fibers, with NumPy's arrays."""

import numpy as np

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cuda import CudaBackend
from flashmoe_numba.build.likeness import like_arguments
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler, memory_view
from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.gpu.arrays import GpuTokens
from flashmoe_numba.heap.gpus import GpuHeap
from flashmoe_numba.heap.host import HostMemory
from flashmoe_numba.kernel.state import BOX_WORDS
from flashmoe_numba.tile_gemm import Scratch
from flashmoe_numba.tile_gemm.matrices import PASS_ROWS, SUMS_STRIDE, scratch_elements

LANES = 32


class Event:
    done = True


class InterpretedGpu(HostMemory):
    """What `gpu.Gpu` does, by the host: arrays are NumPy's, and a launch runs the grid on fibers.

    `log` has what was put on a stream, as (verb, stream), `synchronized` how often somebody waited for the device.
    """

    name, capability, shared_bytes, device, stream = "no GPU", (8, 0), 1 << 18, 0, 7

    def __init__(self, config, seed):
        self.config, self.seed, self.launches = config, seed, 0
        self.log, self.synchronized, self.capturing = [], 0, False
        self.like = like_arguments(Variant(dtype=config.dtype, architecture="sm_80", tensor_cores=False))

    def to_device(self, array):
        return np.ascontiguousarray(array)

    def resident_blocks(self, function, threads, dynamic_shared_bytes):
        return 9

    def pinned(self, size, dtype):
        return np.full(size, -1, dtype)

    def to_host(self, array):
        self.synchronize()
        return array.copy()

    def current_stream(self):
        return self.stream

    def copy_in(self, address, values, stream):
        self.log.append(("copy_in", stream))
        memory_view(address, values.size, values.dtype)[:] = values

    def copy_out(self, values, address, stream):
        self.log.append(("copy_out", stream))
        values[:] = memory_view(address, values.size, values.dtype)

    def read_now(self, address, num_words):
        return memory_view(address, num_words, np.dtype(np.int64)).copy()

    def write_word(self, address, value):
        memory_view(address, 1, np.dtype(np.int64))[0] = value

    def copy_rows(self, target, rows, skip, stream):
        self.log.append(("copy_rows", stream))
        target.reshape(rows.shape)[:, skip:] = rows[:, skip:]

    def launch(self, function, num_blocks, threads, arguments, shared, stream):
        self.log.append(("launch", stream))
        table, kernel = memory_view(*arguments, np.dtype(np.int64)), interpreted("flashmoe_numba.kernel")
        scheduler = Scheduler(self.seed + self.launches)
        self.launches += 1
        for index in range(num_blocks):
            staged, sums = scratch_elements(self.config.hidden)
            shared = np.full(max(PASS_ROWS * SUMS_STRIDE + staged, sums), np.nan, self.config.accumulator)
            scratch = Scratch(shared[PASS_ROWS * SUMS_STRIDE :], shared)
            block = (index, table, self.like, scratch, np.zeros(BOX_WORDS, np.int64))
            scheduler.add_block(f"block {index}", kernel.grid_block, block, LANES)
        scheduler.run()

    def record(self, stream):
        assert not self.capturing, "an event in a graph can be asked nothing"
        self.log.append(("record", stream))
        return Event()

    def is_capturing(self, stream):
        return self.capturing

    def wait_for(self, event, stream):
        assert not self.capturing, "a captured stream cannot wait for what is outside of the graph"
        self.log.append(("wait_for", stream))

    def synchronize(self):
        assert not self.capturing, "to wait for the device breaks a capture"
        self.synchronized += 1


class InterpretedCuda(CudaBackend):
    """The backend itself, but for the kernel's build and the frameworks' arrays."""

    join = HostMemory.join

    def check_tokens(self, name, x, config):
        x = HostMemory.check_tokens(self, name, x, config)
        return GpuTokens(x, as_storage(x).reshape(x.shape))

    def adopt(self, tokens):
        return HostMemory.adopt(self, tokens.original)

    def load(self, folder):
        self._function = None


def make_layer(config, weights, seed=0, **how):
    backend = InterpretedCuda(config, InterpretedGpu(config, seed))
    return FlashMoE.from_parts(config, weights, GpuHeap(config.num_ranks), backend, **how)
