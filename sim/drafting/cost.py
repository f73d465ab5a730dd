"""How long a task holds its slot, in nanoseconds.

A tile of a matrix product takes the longest of three: its padded operations over the slot's share of the tensor cores,
the weights that it must bring from memory over the slot's share of that bandwidth, and all that it reads over its share
of the L2's; and a fixed latency beside, for filling and draining its pipeline. Few tiles have more of the memory each,
as far as one multiprocessor's part of the L2's bandwidth goes. Fewer slots than multiprocessors are that many of them,
the others being somebody else's.
A processor that cannot load operands while it multiplies takes the sum of products and reading instead of the longest.

A tile's share of the memory is fixed before it runs: the memory is shared by as many tiles as run at a time on average,
which are `tiles` over the waves that they take. So a stage streams its weights in the time that the memory needs,
whatever is left for its last wave, and one tile more costs one tile. The error: where stages overlap that are no
multiple of a wave, the memory gives up to that much more at a time than it has; a schedule in one kernel counts the
tiles of both products together, which leaves less than a wave in all of them.

Weights come from memory once per wave: row blocks of one expert that run at the same time read them from the L2. If an
expert's matrix fits into half of the L2, all its row blocks are one wave.

The share of the tensor peak that a system's tiles reach (`rate`) is fitted to measurements, see `rates.py`. Everything
else here is the hardware's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..world.world import World

MOST_NS = 2.0**40  # of a task: what is summed over a schedule, and multiplied by its slots, still fits 64 bits
L2_SHARE = 0.5  # of the L2 that weights may keep, the rest is rows and results in flight


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """Durations on a GPU whose multiprocessors are cut into `slots` equal slots.

    Args:
        rate: share of the tensor peak that a tile's products reach.
        tile_latency_ns: fixed part of a tile.
        cluster: multiprocessors side by side that read a row tile from the L2 once for all of them.
        async_loads: reading goes on beside the products; False on processors without a way to do so, such as CPUs.
    """

    world: World
    slots: int
    rate: float
    tile_latency_ns: int
    cluster: int = 1
    async_loads: bool = True

    def tile(
        self,
        rows: ArrayLike,
        columns: float,
        depth: float | Array,
        tiles: ArrayLike,
        reuse: ArrayLike = 1,
        read: float | None = None,
    ) -> Array:
        """A tile of `[rows, depth] @ [depth, columns]`.

        Args:
            read: columns of weights that there are to read, if the tile has others for padding.
            tiles: of this stage on the GPU, over the whole call.
            reuse: row blocks that share one reading of the tile's weights from memory.
        """
        precision, hardware = self.world.precision, self.world.hardware
        active, per_sm = self._sharing(tiles)
        rows = np.asarray(rows, np.float64)
        tensor = 2 * rows * columns * depth / (hardware.tflops[precision.mma_type] * 1e3 * self.rate)
        weights = (columns if read is None else read) * depth * precision.weight_bytes
        memory = weights / np.asarray(reuse) / (hardware.hbm_gbps * hardware.hbm_achieved)
        cache = (weights + rows * depth * precision.token_bytes / self.cluster) / hardware.l2_gbps
        reading = np.maximum(cache * per_sm, memory * active)
        time = np.maximum(tensor * per_sm, reading) if self.async_loads else tensor * per_sm + reading
        return _whole(time) + self.tile_latency_ns

    def reuse(self, row_blocks: ArrayLike, columns: int, depth: ArrayLike, tile_columns: int) -> Array:
        """Row blocks that share one reading of a `[depth, columns]` matrix; `row_blocks` are those of its expert."""
        blocks = np.maximum(1, np.asarray(row_blocks))
        matrix_bytes = columns * np.asarray(depth) * self.world.precision.weight_bytes
        wave = max(1, self.slots // -(-columns // tile_columns))
        in_cache = matrix_bytes <= self.world.hardware.l2_mb * 1e6 * L2_SHARE
        return np.asarray(np.where(in_cache, blocks, blocks / -(-blocks // wave)))

    def _sharing(self, tasks: ArrayLike) -> tuple[Array, Array]:
        """How many of a stage's tasks share the memory, and how many the multiprocessors: a lone one has one."""
        sms, number = self.world.hardware.sms, np.maximum(1, np.asarray(tasks, np.int64))
        return number / -(-number // self.slots), np.clip(number, sms, max(sms, self.slots))

    def stream(self, nbytes: ArrayLike, tasks: ArrayLike | None = None) -> Array:
        """Moving bytes within the GPU, read and written: each byte crosses the memory twice.

        Args:
            tasks: of this stage on the GPU, over the whole call; None: enough for all slots.
        """
        hardware = self.world.hardware
        active, per_sm = self._sharing(self.slots if tasks is None else tasks)
        per_slot = np.minimum(hardware.hbm_gbps * hardware.hbm_achieved / active, hardware.l2_gbps / per_sm)
        return _whole(2 * np.asarray(nbytes, np.float64) / per_slot)

    def store(self, nbytes: ArrayLike, local: ArrayLike) -> Array:
        """Storing bytes to a peer from one slot, or moving them within the rank where `local`."""
        per_slot = self.world.hardware.sm_write_gbps * min(1.0, self.world.hardware.sms / self.slots)
        remote = _whole(np.asarray(nbytes, np.float64) / per_slot)
        return np.where(local, self.stream(nbytes), remote)

    def combine(self, tokens: ArrayLike, rows: ArrayLike, tasks: ArrayLike) -> Array:
        """Reading this many result rows and writing the sums of this many tokens, one of `tasks` on the GPU."""
        nbytes = (np.asarray(tokens) + np.asarray(rows)) * self.world.config.hidden * self.world.precision.result_bytes
        return self.stream(nbytes / 2, tasks) + self.tile_latency_ns


def _whole(nanoseconds: Array) -> Array:
    longest = np.max(nanoseconds, initial=0.0)
    if not longest < MOST_NS:
        raise ValueError(f"a task must take less than {MOST_NS / 1e9:.0f} s, got {longest / 1e9:.3g} s")
    result: Array = np.ceil(nanoseconds).astype(np.int64)
    return result
