"""Blocks as operating-system threads that run the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig
from reference.arrays import Array

from ..device.compilation import compile_for
from ..device.cpu import reset_float_control
from ..kernel import leave, persistent, persistent_backward
from ..kernel.control import FAILED
from ..kernel.grid import RankArguments
from ..kernel.state import Problem, Segments
from ..processes.cores import count_cores
from ..tile_gemm import Panels, Scratch, pack_matrices, unpack_matrices
from ..tile_gemm.arithmetic import ARITHMETICS, AUTO, PAIRED_DTYPE, choose
from ..tile_gemm.cpu import ROW_STEP, panel_width
from ..tile_gemm.cpu_gradients import ROW_BUFFERS, gradient_elements
from ..tile_gemm.micro_kernel import DEPTH_BLOCK, MICRO_ROWS, ROW_STRIDE
from ..tile_gemm.packing import fill_compiled
from .host import BACKWARD, FORWARD, Block, HostBackend
from .threads import Threads


class CpuBackend(HostBackend):
    """One thread per block; threads are kept between calls.

    Args:
        arithmetic: of bfloat16 weights (tile_gemm/arithmetic.py); others have only one.
    """

    def __init__(self, arithmetic: str = AUTO) -> None:
        super().__init__()
        self._form = ARITHMETICS[choose(arithmetic, PAIRED_DTYPE)].form
        # what `compile` has made of them, once it has
        self._entries: dict[str, Callable[..., None]] = {FORWARD: persistent, BACKWARD: persistent_backward}
        self._threads = Threads()
        self._packers = count_cores()

    def pack(
        self,
        matrices: Sequence[Array],
        biases: Sequence[Array | None],
        tile_n: int,
        accumulator: np.dtype[Any],
        rows: Array | None,
        into: Panels | None = None,
    ) -> Panels:
        form = self._form if matrices[0].dtype.name == PAIRED_DTYPE else Panels  # a router has float32 weights
        width = panel_width(accumulator)
        return pack_matrices(matrices, biases, tile_n, width, accumulator, form, into, fill_compiled, self._packers)

    def unpack(self, packed: Panels, out: Sequence[Array]) -> None:
        unpack_matrices(packed, out, panel_width(packed.bias.dtype))

    def make_scratch(self, config: MoEConfig) -> Scratch:
        """Room for the tallest tile and the widest panels, for few rows as deep as they are, and one row of a combine.

        See `multiply` of tile_gemm/cpu.py, and cpu_gradients.py for what a backward needs.
        """
        rows = max(config.tile_m, min(config.token_block, config.num_tokens))
        rows = -(-rows // ROW_STEP) * ROW_STEP
        blocks = -(-max(config.hidden, config.ffn, config.shared_ffn) // DEPTH_BLOCK)
        width = panel_width(config.accumulator)
        padded = [-(-columns // width) * width for columns in (config.tile_ffn, config.tile_n)]
        columns = max(config.expert_kind.num_ups * padded[0], padded[1])
        copied = max(rows, min(rows, max(MICRO_ROWS, ROW_STEP)) * blocks) * ROW_STRIDE
        backward = max((rows + ROW_BUFFERS) * max(padded), gradient_elements(config.accumulator))
        sums = max(rows * columns, config.hidden, backward)
        return Scratch(np.empty(copied, config.accumulator), np.empty(sums, config.accumulator))

    def prepare(self, config: MoEConfig, of_ranks: Sequence[RankArguments], folder: Path) -> None:
        if len(of_ranks) > 1 and any(of_rank.segments.remote.any() for of_rank in of_ranks):
            rule = "heap must have all ranks of this process on one host, unless blocks are fibers"
            raise ValueError(f"{rule}: nothing carries their puts")
        super().prepare(config, of_ranks, folder)

    def compile(self, block: Block, folder: Path) -> None:
        compile_for(reset_float_control, (), folder)
        self._entries[block.entry] = compile_for(self._entries[block.entry], block.arguments, folder)
        compile_for(leave, (*block.arguments[1:3], FAILED), folder)

    def leave(self, problem: Problem, segments: Segments, why: int = FAILED) -> None:
        leave(problem, segments, why)

    def run_blocks(self, blocks: Sequence[Block], stop: Callable[[], None]) -> None:
        of_blocks = reversed(blocks)  # a rank's OS block first: its processors wait for it
        self._threads.run([partial(_run_block, self._entries[b.entry], b.arguments) for b in of_blocks], stop)

    def deadline_ns(self, deadline_s: float) -> int:
        return int(deadline_s * 1e9)

    def close(self) -> None:
        super().close()
        self._threads.close()


def _run_block(enter: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    reset_float_control()
    enter(*arguments)
