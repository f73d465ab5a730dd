"""Blocks as thread blocks of a GPU: all of this process's ranks in one cooperative launch, forwards and backwards.

A call is, in the caller's stream: wait for the last call, copy a routing from outside and the table (kernel/grid.py)
from page-locked memory, launch, copy the abort word back. Nobody waits for it. Where the stream is being captured into
a graph the same is recorded, except the wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reference import Layout, MoEConfig
from reference.arrays import Array
from reference.layout import CONTROL_BYTES

from ..build.variants import HEAPS, TMA_ALIGNMENT, Variant, architecture_of, choose_variant
from ..device.records import record_words
from ..gpu.arrays import GpuTokens, check_gpu_tokens, current_stream, empty_like, stack
from ..gpu.gpu import Gpu
from ..gpu.nvshmem import Nvshmem
from ..heap.nvshmem import IMAGE_AT, OWN, wire_words
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.control import ABORT, FAILED, RECORD, departure, record_stores
from ..kernel.grid import HEADER_WORDS, RankArguments
from ..kernel.state import Problem, Segments
from ..tile_gemm.hopper import SHARED_BYTES, THREADS
from ..tile_gemm.matrices import MAX_TILE_COLUMNS, STAGE_ELEMENTS, SUMS_ELEMENTS
from .cuda_weights import CudaWeights
from .protocols import Arguments

CALLS_AHEAD = 64  # calls for which page-locked memory is taken before the first one: taking more may wait for the GPU


class CudaBackend(CudaWeights):
    """The blocks of some ranks on one GPU.

    Arrays that a call takes are made in CuPy's current stream, which may be another one than the call's.

    Args:
        config: of the layer.
        gpu: the device (gpu/gpu.py).
        tf32: multiply float32 as TF32 on tensor cores.
        heap: one of HEAPS: are there ranks on other hosts?

    Raises:
        ValueError: the layer does not fit this kind of kernel.
    """

    def __init__(self, config: MoEConfig, gpu: Gpu, tf32: bool = False, heap: str = HEAPS[0]) -> None:
        if config.tile_n > MAX_TILE_COLUMNS:
            raise ValueError(f"tile_n must be at most {MAX_TILE_COLUMNS} on a GPU, got {config.tile_n}")
        super().__init__(gpu, choose_variant(config, architecture_of(gpu.capability), tf32, heap))
        self._config = config
        self.shared_bytes = shared_bytes(config, self.variant)
        self._functions: dict[bool, Any] = {}  # the kernels: of forwards, and of backwards (True) if there are any
        self._table: Any = None
        self._nvshmem: Nvshmem | None = None
        self._num_words = 0  # of a rank's arguments in the table
        self._aborted = gpu.pinned(1, np.int64)  # an abort word of this process, as the last copy found it
        self._aborted[0] = 0
        self._last: Any = None  # an event behind the last call
        self._staged: list[np.ndarray] = []  # what copies of this call read
        self._under_way: deque[tuple[Any, list[np.ndarray]]] = deque()  # the same of others, and an event behind each
        self._captured: list[Any] = []  # all that replays of captured calls use again and nobody else may hold
        self._stream, self._capturing = 0, False
        self.zeros, self.empty, self.address, self.to_host = gpu.zeros, gpu.empty, gpu.address, gpu.to_host
        self.array, self.grows = gpu.to_device, False

    def lend(self, array: Any, give_back: Callable[[Any], None]) -> Any:
        return array

    # setting up

    def load(self, folder: Path, backward: bool) -> None:
        """Build the kernels or find them in `folder`, and load them."""
        from ..build.build import build

        for which in (False, True) if backward else (False,):
            kernel = build(replace(self.variant, backward=which), folder)
            self._functions[which] = self.gpu.load(kernel.path, kernel.entry, self.shared_bytes)

    def make_wire(self, num_words: int, own: Any, layout: Layout, rank_idx: int) -> Any:
        """What the kernel needs to reach ranks of other hosts itself; it has no ring of puts."""
        if self.variant.heap == HEAPS[0]:
            return self.array(np.empty(0, np.int64))
        return self.array(wire_words(self.address(own), layout, rank_idx))

    def join_network(self, nvshmem: Nvshmem) -> None:
        """Let the kernels reach the ranks that have met by it.

        Raises:
            ValueError: they were built to reach none.
        """
        if self.variant.heap != "nvshmem":
            raise ValueError(f"heap must be 'nvshmem' in a CudaBackend of several hosts, got {self.variant.heap!r}")
        for function in self._functions.values():
            nvshmem.admit(self.gpu.module_of(function))
        self._nvshmem = nvshmem

    def default_processors(self, num_ranks_here: int, num_ranks_sharing: int) -> int:
        """All blocks that can be resident, shared out among the ranks here, but for an OS block each."""
        return max(1, self.resident_blocks() // num_ranks_here - 1)

    def resident_blocks(self) -> int:
        """Of each kernel."""
        return min(self.gpu.resident_blocks(each, THREADS, self.shared_bytes) for each in self._functions.values())

    def check_grid(self, num_ranks_here: int, num_processors: int) -> None:
        """Raise a ValueError if not all blocks can be resident: they wait for each other, so all must be."""
        wanted, most = num_ranks_here * (num_processors + 1), self.resident_blocks()
        if wanted > most:
            rule = f"num_processors must be at most {most // num_ranks_here - 1} for {num_ranks_here} ranks"
            why = f"{self.gpu.name} holds {most} blocks of this kernel at a time"
            raise ValueError(f"{rule}, because {why}; got {num_processors}")

    def prepare(self, config: MoEConfig, of_ranks: Sequence[RankArguments], folder: Path) -> None:
        """Make the table, and wait until weights and segments are where they belong."""
        self._make_table(len(of_ranks), of_ranks[0])

    def prepare_backward(self, of_rank: BackwardArguments, folder: Path) -> None:
        """Make a table of wider rows, whose first words are those of forwards."""
        self._make_table((self._table.size - HEADER_WORDS) // self._num_words, of_rank)

    def _make_table(self, num_ranks: int, of_rank: Arguments) -> None:
        """For ranks with such arguments, which every call brings; only epochs are never copied (`run`)."""
        self._num_words = len(record_words(of_rank, self.address))
        rows = np.zeros((num_ranks, self._num_words), np.int64)
        rows[:, 0] = 1  # the epoch of the first call; the kernel counts it up
        header = np.array([of_rank.problem.num_processors + 1, self._num_words], np.int64)
        self._table = self.gpu.to_device(np.concatenate([header, rows.reshape(-1)]))
        [self.gpu.pinned(rows.size, np.int64) for _ in range(CALLS_AHEAD)]  # a pool has them from now on
        self.gpu.synchronize()

    def deadline_ns(self, deadline_s: float) -> int:
        return int(deadline_s * 1e9)

    # calls

    def check_tokens(self, name: str, x: Any, config: MoEConfig) -> GpuTokens:
        return check_gpu_tokens(name, x, config, self.gpu)

    def no_tokens(self, config: MoEConfig) -> GpuTokens:
        with self.gpu.here:
            none = self.gpu.cupy.empty((0, config.hidden), config.format.exchanged)
        return self.check_tokens("x", none, config)

    def check_keeping(self, tokens: Sequence[GpuTokens]) -> None:
        """Raise a ValueError if the caller's stream is being captured: each call keeps in, or begins from, memory of
        its own, which replays would share.
        """
        if self.gpu.is_capturing(current_stream(tokens[0].original, self.gpu)):
            raise ValueError("forward() and backward() must not be captured in a CUDA graph: call the layer itself")

    def begin(self, tokens: Sequence[GpuTokens]) -> None:
        """Learn the call's stream, and let it wait for the last call, which uses the same arrays."""
        self._stream = current_stream(tokens[0].original, self.gpu)
        self._capturing = self.gpu.is_capturing(self._stream)
        if self._capturing:  # then no event may be asked or waited for
            return
        while self._under_way and self._under_way[0][0].done:
            self._under_way.popleft()
        if self._last is not None:
            self.gpu.wait_for(self._last, self._stream)
        self._wait_for_cupy()

    def _wait_for_cupy(self) -> None:
        """Arrays that were made in CuPy's stream, or given back to its pool there, are this call's from now on."""
        own = self.gpu.current_stream()
        if own != self._stream and not self._capturing:
            self.gpu.wait_for(self.gpu.record(own), self._stream)

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array into another, in the order of the call's stream."""
        if source.size > 0:
            self.gpu.copy_on_device(target, source, self._stream)

    def store(self, target: Any, values: np.ndarray) -> None:
        """Copy values from the host into an array, in the order of the call's stream."""
        if values.size > 0:
            self.gpu.copy_in(self.address(target), self._stage(values, target.dtype), self._stream)

    def _stage(self, values: np.ndarray, dtype: Any) -> np.ndarray:
        """The values in page-locked memory that lives as long as a copy of this call may read it."""
        staged = self.gpu.pinned(values.size, dtype)
        staged[:] = values.reshape(-1)
        self._staged.append(staged)
        return staged

    def adopt(self, tokens: GpuTokens) -> tuple[Any, Any, Any]:
        """(x as the kernel sees it, room for y likewise, y)."""
        y, x = empty_like(tokens.original, self.gpu), tokens.storage
        if self._config.shared_ffn and self.variant.tensor_cores and self.address(x) % TMA_ALIGNMENT:
            with self.gpu.here:
                unaligned, x = x, self.gpu.cupy.empty(x.shape, x.dtype)  # a map cannot begin there: `aim`
            self.copy(x, unaligned)
        if self._capturing:  # a copy of tokens, and what `join` puts together: a pool would give them to others
            self._captured += [x, y]
        return x.reshape(-1), self.check_tokens("y", y, self._config).storage.reshape(-1), y

    def join(self, x: Any, parts: list[Any]) -> Any:
        return stack(x, parts, self.gpu)

    def run(self, of_ranks: Sequence[Arguments], stop: Callable[[], None]) -> None:
        """Launch all blocks in the caller's stream, behind the last call, and return."""
        self._wait_for_cupy()
        rows = self._rows(of_ranks)
        staged = self._stage(rows, np.int64).reshape(rows.shape)
        self.gpu.copy_rows(self._table[HEADER_WORDS:], staged, 1, self._stream)  # the kernel counts the epoch itself
        num_blocks = len(of_ranks) * (of_ranks[0].problem.num_processors + 1)
        function = self._functions[isinstance(of_ranks[0], BackwardArguments)]
        arguments = (self.address(self._table), self._table.size)
        self.gpu.launch(function, num_blocks, THREADS, arguments, self.shared_bytes, self._stream)
        control = self.address(of_ranks[0].segments.control)  # who gives up sets the abort words of all ranks
        self.gpu.copy_out(self._aborted, control + 8 * ABORT, self._stream)
        self._keep_staged()

    def _keep_staged(self) -> None:
        if self._capturing:  # an event in a graph can be asked nothing
            self._captured += self._staged
        else:
            self._last = self.gpu.record(self._stream)
            self._under_way.append((self._last, self._staged))
        self._staged = []

    def _rows(self, of_ranks: Sequence[Arguments]) -> Array:
        """int64 `[ranks here, words of a rank's arguments]`: the table without its header."""
        rows = np.zeros((len(of_ranks), self._num_words), np.int64)
        for row, of_rank in zip(rows, of_ranks, strict=True):
            words = record_words(of_rank, self.address)
            row[: len(words)] = words
        return rows

    def may_have_failed(self) -> bool:
        """Could a call have been given up, as far as is known without waiting? No time to ask while capturing."""
        return not self._capturing and bool(self._aborted[0])

    def synchronize(self) -> None:
        """Wait for the last call."""
        self.gpu.synchronize()

    def epoch(self, position: int, counted: int) -> int:
        """Calls that a rank has finished: more than were `counted`, if a captured one was replayed."""
        words = self.to_host(self._table)
        return int(words[HEADER_WORDS + position * words[1]]) - 1

    def leave(self, problem: Problem, segments: Segments, why: int = FAILED) -> None:
        """Stop every rank, from outside of a kernel; as `give_up` does inside, but without a cas."""
        control = self.address(segments.control)
        own = self.gpu.read_now(control, segments.control.size)
        if own[ABORT] != 0:  # somebody stopped all ranks before
            return
        if own[RECORD] == 0:
            record = departure(problem.rank_idx, problem.epoch, why, problem.deadline_ns)
            for word, value in record_stores(record):
                self.gpu.write_word(control + 8 * word, value)
        address, remote = self._words_now(segments.address), self._words_now(segments.remote)
        culprit, decided = problem.rank_idx + 1, False
        for rank_idx in np.flatnonzero(remote == 0).tolist():  # those of this host
            word = int(address[rank_idx]) + problem.control_at + 8 * ABORT
            before = int(self.gpu.read_now(word, 1)[0])
            if before == 0:
                self.gpu.write_word(word, culprit)
            elif not decided and not remote[before - 1]:  # the first one decides whom all name
                culprit = before
            decided = True
        if self._nvshmem is not None and own[RECORD] == 0:  # else the kernel tells them
            wire = self._words_now(segments.wire)
            image = int(wire[OWN] + wire[IMAGE_AT])
            for peer in np.flatnonzero(remote).tolist():
                abort_at = control + 8 * ABORT
                self._nvshmem.put_signal(image, control, CONTROL_BYTES, abort_at, problem.rank_idx + 1, peer)

    def _words_now(self, array: Any) -> Array:
        """An array of a few int64 as it is at this moment."""
        return self.gpu.read_now(self.address(array), array.size)

    def close(self) -> None:
        """Wait for the last call; memory goes with the arrays."""
        try:
            self.synchronize()
        finally:
            self._table = self._last = None
            self._under_way.clear()
            self._captured.clear()


def shared_bytes(config: MoEConfig, variant: Variant) -> int:
    """Dynamic shared memory of a block: for its tile GEMM."""
    elements = SUMS_ELEMENTS + STAGE_ELEMENTS
    return max(elements * config.accumulator.itemsize, SHARED_BYTES if variant.tensor_cores else 0)
