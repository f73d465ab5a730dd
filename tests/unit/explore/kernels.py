"""Small hand-written kernels on watched memory, to see what the detectors say of them."""

import contextlib

import numpy as np

from flashmoe_numba.device.fibers import Scheduler, current
from flashmoe_numba.explore.run.memory import Actor, Memory
from flashmoe_numba.explore.run.reports import Stopped


class Bench:
    """Watched arrays, and a run of one kernel in several blocks; arrays are given by name and size.

    `history` has (who, verb, array, index, value) of each atomic access of the last run, unless another one listens.

    Args:
        empty: names of arrays that begin unwritten.
    """

    def __init__(self, lanes=1, blocks=2, empty=(), writers=0, **sizes):
        self.lanes, self.blocks, self.initial = lanes, blocks, sizes
        self.memory = Memory(lanes * blocks)
        self.memory.listener = self._hear
        self.arrays = [
            self.memory.region(name, np.zeros(size, np.int64), initialised=name not in empty, num_writers=writers)
            for name, size in sizes.items()
        ]

    def run(self, kernel, strategy, late_seed=None):
        """Kinds of the reports; `kernel(block, *arrays)` runs in every lane of every block."""
        self.memory.begin(late_seed=late_seed)
        self.history = []
        for region in self.arrays:
            region.array[:] = 0
        scheduler = Scheduler(strategy=strategy, max_switches=100_000)
        for block in range(self.blocks):
            scheduler.add_block(f"block {block}", self._enter, (kernel, block), self.lanes)
        with contextlib.suppress(Stopped):
            scheduler.run()
        return sorted({report.kind for report in self.memory.reports})

    def _hear(self, actor, verb, region, i, value):
        self.history.append((actor.name, verb, region.name, i, value))

    def _enter(self, kernel, block):
        fiber = current()
        name = f"block {block} lane {fiber.lane}"
        index = block * self.lanes + fiber.lane
        fiber.actor = Actor(self.memory, index, name, block, 1, [0] * self.memory.num_actors)
        kernel(block, *self.arrays)
