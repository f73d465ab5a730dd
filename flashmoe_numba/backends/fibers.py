"""Blocks as fibers that interpret the kernel's source, interleaved by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig
from reference.arrays import Array, check_seed
from reference.scalars import is_whole, number

from ..device.compilation import interpreted
from ..device.fibers import Fiber, Scheduler
from ..kernel.control import FAILED
from ..kernel.grid import RankArguments
from ..kernel.state import Problem, Segments
from ..tile_gemm import Panels, Scratch, pack_matrices, unpack_matrices
from ..tile_gemm.stub import INTERPRETED_PANEL_WIDTH
from .host import Block, HostBackend
from .network import add_channels


class FiberBackend(HostBackend):
    """Every call runs under a scheduler with the next seed, in the caller's thread, and rounds as that does.

    Where ranks are on several hosts, which are pretended, it carries their puts.

    Args:
        seed: of the first call.
        lanes: threads per block.
        preempt: probability of a switch at an atomic access.
    """

    def __init__(self, seed: int = 0, lanes: int = 2, preempt: float = 0.3) -> None:
        super().__init__()
        seed = check_seed(seed)
        if not is_whole(lanes) or lanes < 1:
            raise ValueError(f"lanes must be an integer of at least 1, got {lanes!r}")
        if not 0 <= number("preempt", preempt) <= 1:
            raise ValueError(f"preempt must be in [0, 1], got {preempt!r}")
        self.seed, self.lanes, self.preempt = seed, lanes, preempt
        self._of_ranks: list[RankArguments] = []

    def pack(
        self,
        matrices: Sequence[Array],
        biases: Sequence[Array | None],
        tile_n: int,
        accumulator: np.dtype[Any],
        rows: Array | None,
        into: Panels | None = None,
    ) -> Panels:
        return pack_matrices(matrices, biases, tile_n, INTERPRETED_PANEL_WIDTH, accumulator, into=into)

    def unpack(self, packed: Panels, out: Sequence[Array]) -> None:
        unpack_matrices(packed, out, INTERPRETED_PANEL_WIDTH)

    def make_scratch(self, config: MoEConfig) -> Scratch:
        return Scratch(np.empty(0, config.accumulator), np.empty(0, config.accumulator))

    def prepare(self, config: MoEConfig, of_ranks: Sequence[RankArguments], folder: Path) -> None:
        super().prepare(config, of_ranks, folder)
        self._of_ranks = list(of_ranks)

    def leave(self, problem: Problem, segments: Segments, why: int = FAILED) -> None:
        scheduler = Scheduler(self.seed, self.preempt)
        host = scheduler.add_block("host", interpreted("flashmoe_numba.kernel").leave, (problem, segments, why))
        self._run(scheduler, host)

    def run_blocks(self, blocks: Sequence[Block], stop: Callable[[], None]) -> None:
        """Run these to their end.

        Raises:
            Deadlock: nobody can go on; names where every thread waits.
        """
        scheduler = Scheduler(self.seed, self.preempt)
        fibers = []
        for block in blocks:
            entry = getattr(interpreted("flashmoe_numba.kernel"), block.entry)
            fibers += scheduler.add_block(block.name, entry, block.arguments, self.lanes)
        self._run(scheduler, fibers)
        self.seed += 1

    def _run(self, scheduler: Scheduler, fibers: Sequence[Fiber]) -> None:
        """Run these to their end, and what carries their puts."""
        draw = random.Random(self.seed).random
        add_channels(scheduler, self._of_ranks, draw, lambda: all(fiber.dead for fiber in fibers))
        scheduler.run()

    def close(self) -> None:
        super().close()
        self._of_ranks = []

    def deadline_ns(self, deadline_s: float) -> int:
        """None in effect: the clock counts switches, and the scheduler finds a deadlock by itself."""
        return 1 << 62
