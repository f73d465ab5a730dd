"""Blocks as operating-system threads that run the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig

from ..device.compilation import compile_for
from ..device.cpu import reset_float_control
from ..heap.host import HostMemory
from ..kernel import leave, persistent
from ..kernel.control import FAILED
from ..kernel.state import Problem, Segments
from ..tile_gemm import Panels, Scratch, pack_matrices
from ..tile_gemm.cpu import MICRO_ROWS, ROW_STRIDE, panel_width

MOST_BLOCKS = 1 << 20


class CpuBackend(HostMemory):
    """One thread per block; threads are kept between calls."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(  # made as they are needed
            MOST_BLOCKS, thread_name_prefix="flashmoe", initializer=reset_float_control
        )

    def pack(
        self,
        matrices: Sequence[np.ndarray],
        biases: Sequence[np.ndarray | None],
        tile_n: int,
        accumulator: np.dtype,
        rows: np.ndarray | None,
    ) -> Panels:
        return pack_matrices(matrices, biases, tile_n, panel_width(accumulator), accumulator)

    def make_scratch(self, config: MoEConfig) -> Scratch:
        """Room for the tallest tile and the widest panels, and for one row of a combine."""
        rows = -(-max(config.tile_m, min(config.token_block, config.num_tokens)) // MICRO_ROWS) * MICRO_ROWS
        width = panel_width(config.accumulator)
        padded = [-(-columns // width) * width for columns in (config.tile_ffn, config.tile_n)]
        columns = max(config.expert_kind.num_ups * padded[0], padded[1])
        sums = max(rows * columns, config.hidden)
        return Scratch(np.empty(rows * ROW_STRIDE, config.accumulator), np.empty(sums, config.accumulator))

    def prepare(self, arguments: Sequence[tuple[Any, ...]], folder: Path) -> None:
        """Compile the kernel for arguments of the types of the first rank's, or load it from `folder`."""
        compile_for(reset_float_control, (), folder)
        compile_for(persistent, arguments[0], folder)
        compile_for(leave, (*arguments[0][1:3], FAILED), folder)

    def leave(self, problem: Problem, segments: Segments, why: int = FAILED) -> None:
        """Stop every rank, from outside of a kernel."""
        leave(problem, segments, why)

    def run(self, blocks: Sequence[tuple[str, tuple[Any, ...]]], stop: Callable[[], None]) -> None:
        """Run all blocks to their end. `stop` makes them leave early; it is called if this thread is interrupted."""
        futures: list[Future[None]] = []
        try:
            for _, arguments in blocks:
                futures.append(self._threads.submit(persistent, *arguments))
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.result()
        finally:  # also when a block failed or could not start, or at Ctrl-C: no block may outlive the call
            if not all(future.done() for future in futures):
                stop()
                wait(futures)

    def deadline_ns(self, deadline_s: float) -> int:
        return int(deadline_s * 1e9)

    def close(self) -> None:
        self._threads.shutdown()
