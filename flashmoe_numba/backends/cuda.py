"""Blocks as thread blocks of a GPU: all of this process's ranks in one cooperative launch.

A call writes the table (kernel/grid.py) and launches, both in the caller's stream, and does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig

from ..device.records import record_words
from ..gpu.arrays import GpuTokens, check_gpu_tokens, current_stream, empty_like, stack
from ..gpu.variants import Variant, architecture_of, choose_variant
from ..kernel.grid import HEADER_WORDS, Record
from ..kernel.signals import ABORT, CLOSED_FLAG, COMPLETE, HOST, RECORD, RECORD_EPOCH, RECORD_FLAG, RECORD_ROLE
from ..kernel.state import Problem, Segments
from ..tile_gemm import as_matrices
from ..tile_gemm.hopper import DEPTH_BYTES, HALF_COLUMNS, ROWS, SHARED_BYTES, tma_matrices
from ..tile_gemm.matrices import MAX_TILE_COLUMNS, PASS_ROWS, SUMS_STRIDE, scratch_elements

THREADS = 128


class CudaBackend:
    """The blocks of some ranks on one GPU.

    Args:
        config: of the layer.
        gpu: the device (gpu/gpu.py).
        tf32: multiply float32 as TF32 on tensor cores.

    Raises:
        ValueError: the layer does not fit this kind of kernel.
    """

    def __init__(self, config: MoEConfig, gpu: Any, tf32: bool = False) -> None:
        if config.tile_n > MAX_TILE_COLUMNS:
            raise ValueError(f"tile_n must be at most {MAX_TILE_COLUMNS} on a GPU, got {config.tile_n}")
        self.gpu, self._config = gpu, config
        self.variant: Variant = choose_variant(config, architecture_of(gpu.capability), tf32)
        self.shared_bytes = shared_bytes(config, self.variant)
        if self.shared_bytes > gpu.shared_bytes:
            raise ValueError(
                f"hidden={config.hidden} needs {self.shared_bytes} bytes of shared memory for the sums of a row, and "
                f"{gpu.name} has {gpu.shared_bytes} for a block"
            )
        self._table: Any = None
        self._last: Any = None  # an event behind the last launch
        self._kept: list[np.ndarray] = []  # what captured copies will read again
        self._stream = 0
        self.zeros, self.empty, self.address, self.to_host = gpu.zeros, gpu.empty, gpu.address, gpu.to_host
        self.store = gpu.store

    # setting up

    def load(self, folder: Path) -> None:
        """Build the kernel or find it in `folder`, and load it."""
        from ..gpu.build import build

        kernel = build(self.variant, folder)
        self._function = self.gpu.load(kernel.path, kernel.entry, self.shared_bytes)
        self._left = self.zeros(self._config.num_ranks, np.int64)

    def default_processors(self, num_ranks_here: int, num_ranks: int) -> int:
        """All blocks that can be resident, shared out among the ranks here, but for an OS block each."""
        return max(1, self.resident_blocks() // num_ranks_here - 1)

    def resident_blocks(self) -> int:
        return int(self.gpu.resident_blocks(self._function, THREADS, self.shared_bytes))

    def check_grid(self, num_ranks_here: int, num_processors: int) -> None:
        """Raise a ValueError if not all blocks can be resident: they wait for each other, so all must be."""
        wanted, most = num_ranks_here * (num_processors + 1), self.resident_blocks()
        if wanted > most:
            rule = f"num_processors must be at most {most // num_ranks_here - 1} for {num_ranks_here} ranks"
            why = f"{self.gpu.name} holds {most} blocks of this kernel at a time"
            raise ValueError(f"{rule}, because {why}; got {num_processors}")

    def pack(
        self,
        matrices: Sequence[Any],
        biases: Sequence[np.ndarray | None],
        tile_n: int,
        accumulator: np.dtype,
        rows: Any,
    ) -> Any:
        packed = as_matrices(matrices, biases, tile_n, accumulator, self.gpu.to_device)
        if rows is None or not self.variant.tensor_cores:
            return packed
        return tma_matrices(packed, self._maps(packed, rows))

    def _maps(self, packed: Any, rows: Any) -> Any:
        """Maps of the weights, and of the rows that they multiply for each height of a tile (hopper.py)."""
        depth, columns, block = packed.depth, packed.columns, DEPTH_BYTES // packed.first.dtype.itemsize
        experts = packed.first.size // (depth * columns)
        second = packed.second if packed.parts == 2 else packed.first
        weights = [((depth, columns, experts), (block, HALF_COLUMNS, 1), array) for array in (packed.first, second)]
        of_rows = [((depth, rows.size // depth), (block, height), rows) for height in ROWS]
        data = b"".join(self.gpu.tensor_map(array, shape, box) for shape, box, array in [*weights, *of_rows])
        return self.gpu.to_device(np.frombuffer(data, np.int64))

    def make_scratch(self, config: MoEConfig) -> None:
        """It is shared memory, which the kernel's entry makes."""

    def prepare(self, arguments: tuple[Any, ...], folder: Path) -> None:
        """Everything was compiled by `load`; wait until weights and segments are where they belong."""
        self.gpu.synchronize()

    def deadline_ns(self, deadline_s: float) -> int:
        return int(deadline_s * 1e9)

    # calls

    def check_tokens(self, name: str, x: Any, config: MoEConfig) -> GpuTokens:
        return check_gpu_tokens(name, x, config, self.gpu)

    def adopt(self, tokens: GpuTokens) -> tuple[Any, Any, Any]:
        """(x as the kernel sees it, room for y likewise, y)."""
        self._stream = current_stream(tokens.original, self.gpu)
        y = empty_like(tokens.original, self.gpu)
        return tokens.storage.reshape(-1), self.check_tokens("y", y, self._config).storage.reshape(-1), y

    def join(self, x: Any, parts: list[Any]) -> Any:
        return stack(x, parts, self.gpu)

    def run(self, blocks: Sequence[tuple[str, tuple[Any, ...]]], stop: Callable[[], None]) -> None:
        """Launch all blocks in the caller's stream, behind the last call, and return."""
        first = [arguments for _, arguments in blocks if arguments[0] == 0]
        rows = np.array([self._words(arguments, len(blocks) // len(first)) for arguments in first], np.int64)
        if self._table is None:
            self._make_table(rows, len(blocks) // len(first))
        capturing = self.gpu.is_capturing(self._stream)
        if capturing:
            self._kept.append(rows)
        elif self._last is not None:
            self.gpu.wait_for(self._last, self._stream)
        self.gpu.copy_rows(self._table[HEADER_WORDS:], rows, 1, self._stream)  # the kernel counts the epoch itself
        arguments = (self.address(self._table), self._table.size)
        self.gpu.launch(self._function, len(blocks), THREADS, arguments, self.shared_bytes, self._stream)
        if not capturing:  # an event in a graph can be asked nothing
            self._last = self.gpu.record(self._stream)

    def _words(self, arguments: tuple[Any, ...], num_blocks: int) -> list[int]:
        """A rank's record, from the arguments of its first block."""
        _, problem, segments, experts, tokens, packets, queue, _, _, trace = arguments
        left = self._left[problem.rank_idx : problem.rank_idx + 1]
        record = Record(problem, segments, experts, tokens, packets, queue, trace, left)
        words = record_words(record, self.address)
        words[-3] *= num_blocks  # the blocks' buffers lie one after the other: all of them are one array
        return words

    def _make_table(self, rows: np.ndarray, num_blocks: int) -> None:
        header = np.array([num_blocks, rows.shape[1]], np.int64)
        self._table = self.gpu.to_device(np.concatenate([header, rows.reshape(-1)]))
        self.gpu.synchronize()

    def finished(self) -> bool:
        """Has the last call's kernel ended? Once calls were captured, nobody tells when they are replayed."""
        return not self._kept and (self._last is None or bool(self._last.done))

    def synchronize(self) -> None:
        """Wait for the last call."""
        self.gpu.synchronize()

    def epoch(self, position: int, counted: int) -> int:
        """Calls that a rank has finished: more than were `counted`, if a captured one was replayed."""
        if self._table is None:
            return counted
        words = self.to_host(self._table)
        return int(words[HEADER_WORDS + position * words[1]]) - 1

    def leave(self, problem: Problem, segments: Segments) -> None:
        """Stop every rank, from outside of a kernel."""
        own = self.gpu.read_now(segments.control)
        if own[RECORD] == 0:
            at = self.address(segments.control)
            words = {RECORD_ROLE: HOST, RECORD_FLAG: CLOSED_FLAG, RECORD_EPOCH: problem.epoch, RECORD: COMPLETE}
            for word, value in words.items():
                self.gpu.write_word(at + 8 * word, value)
        for address in self.gpu.read_now(segments.address).tolist():
            self.gpu.write_word(address + problem.control_at + 8 * ABORT, problem.rank_idx + 1)

    def close(self) -> None:
        """Wait for the last call; memory goes with the arrays."""
        self.synchronize()
        self._table = self._last = None


def shared_bytes(config: MoEConfig, variant: Variant) -> int:
    """Dynamic shared memory of a block: for its tile GEMM, and for the sums of a row in a combine."""
    staged, sums = scratch_elements(config.hidden)
    elements = max(PASS_ROWS * SUMS_STRIDE + staged, sums)
    return max(elements * config.accumulator.itemsize, SHARED_BYTES if variant.tensor_cores else 0)
