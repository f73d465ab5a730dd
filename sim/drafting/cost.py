"""How long a task holds its slot, in nanoseconds.

A tile of a matrix product takes the longest of three: its padded operations over the slot's share of the tensor cores,
the weights that it must bring from memory, and all that it reads over its share of the L2's bandwidth; and a fixed
latency beside, for filling and draining its pipeline. Padding rows are multiplied, not read. Fewer slots than
multiprocessors are that many of them, the others being somebody else's. What a tile moves in memory beside the
operands of its products, as those of backwards do, comes on top of its weights.
A processor that cannot load operands while it multiplies takes the sum of products and reading instead of the longest.

Tiles that stream (`streaming_tile`) share the memory as they run: the engine's memory is shared by tasks, and each
gets what one multiprocessor can draw at most. Tiles whose products hide their weights even where all slots stream are
left off it, and so is their traffic. The L2's share is fixed, by as many tiles as run at a time on average: tiles over
the waves that they take. With `fixed_shares` the memory's is, too, where a slot does something else before its tile
reads, or after it: the error is that where stages overlap, the memory gives up to a part of a wave more than it has.

Weights come from memory once per wave: row blocks of one expert that run at the same time read them from the L2. If an
expert's matrix fits into half of the L2, all its row blocks are one wave.

The share of the tensor peak that a system's tiles reach (`rate`) is fitted to measurements, see `rates.py`. Everything
else here is the hardware's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..world.world import World

MOST_NS = 2.0**40  # of a task: what is summed over a schedule, and multiplied by its slots, still fits 64 bits
PORT_BYTES = 64  # that a multiprocessor draws from the L2 in a clock
WEIGHTS_SHARE = 0.89  # of plain streaming: DeepGEMM's products on H800 reach 0.80 of the datasheet's bandwidth
L2_SHARE = 0.5  # of the L2 that weights may keep, the rest is rows and results in flight


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """Durations on a GPU whose multiprocessors are cut into `slots` equal slots.

    Args:
        rate: share of the tensor peak that a tile's products reach.
        tile_latency_ns: fixed part of a tile.
        cluster: multiprocessors side by side that read a row tile from the L2 once for all of them.
        fixed_shares: of the memory, by `tile`; see above.
        async_loads: reading goes on beside the products; False on processors without a way to do so, such as CPUs.
        wait_ns: that a slot is held before each tile of a product.
    """

    world: World
    slots: int
    rate: float
    tile_latency_ns: int
    cluster: int = 1
    async_loads: bool = True
    wait_ns: int = 0
    fixed_shares: bool = False

    def tile(
        self,
        rows: ArrayLike,
        columns: float,
        depth: float | Array,
        tiles: ArrayLike,
        reuse: ArrayLike = 1,
        read: float | None = None,
        real: ArrayLike | None = None,
        moved: ArrayLike = 0,
    ) -> Array:
        """A tile of `[rows, depth] @ [depth, columns]`, at a fixed share of the memory.

        Args:
            read: columns of weights that there are to read, if the tile has others for padding.
            real: rows that are no padding; None: all.
            tiles: of this stage on the GPU, over the whole call.
            reuse: row blocks that share one reading of the tile's weights from memory.
            moved: bytes that it reads and writes in memory beside its operands.
        """
        tensor, memory, cache = self._parts(rows, columns, depth, tiles, reuse, read, real, moved)
        gbps = self.weights_gbps if self.async_loads else self.memory_gbps
        reading = np.maximum(memory * self._active(tiles) / gbps, cache)
        time = np.maximum(tensor, reading) if self.async_loads else tensor + reading
        return _whole(time) + self.tile_latency_ns + self.wait_ns

    def node_of_tile(self, *args: Any, **named: Any) -> dict[str, Array]:
        """The arguments of `tile`: how long it holds its slot and what it streams meanwhile, as fields of a node."""
        if self.fixed_shares:
            return {"duration_ns": self.tile(*args, **named), "streamed": np.zeros((), np.int64)}
        duration_ns, streamed = self.streaming_tile(*args, **named)
        return {"duration_ns": duration_ns, "streamed": streamed}

    def streaming_tile(self, *args: Any, **named: Any) -> tuple[Array, Array]:
        """The arguments of `tile`: how long it takes at least, and the bytes that it streams in that time or longer.

        None, if its products hide them even where all slots stream: so most tiles of full batches ask no memory.
        """
        tensor, memory, cache = self._parts(*args, **named)
        time, slots = np.maximum(tensor, cache), max(self.slots, self.world.hardware.sms)
        hidden = memory * slots / self.weights_gbps <= time
        return _whole(time) + self.tile_latency_ns + self.wait_ns, np.where(hidden, 0, np.ceil(memory)).astype(np.int64)

    def _parts(
        self,
        rows: ArrayLike,
        columns: float,
        depth: float | Array,
        tiles: ArrayLike,
        reuse: ArrayLike = 1,
        read: float | None = None,
        real: ArrayLike | None = None,
        moved: ArrayLike = 0,
    ) -> tuple[Array, Array, Array]:
        """A tile's time for products, its bytes from memory, and its time for reading the L2."""
        precision, hardware = self.world.precision, self.world.hardware
        rows = np.asarray(rows, np.float64)
        real = rows if real is None else np.asarray(real, np.float64)
        tensor = 2 * rows * columns * depth / (hardware.tflops[precision.mma_type] * 1e3 * self.rate)
        weights = (columns if read is None else read) * depth * precision.weight_bytes
        tokens = real * depth * precision.token_bytes / self.cluster
        moved = np.asarray(moved)
        memory = weights / np.asarray(reuse) + moved
        cache = (weights + tokens + moved) * self._cache_pace(tiles)
        return np.asarray(tensor * self._per_sm(tiles)), np.asarray(memory), np.asarray(cache)

    def reuse(self, row_blocks: ArrayLike, columns: int, depth: ArrayLike, tile_columns: int) -> Array:
        """Row blocks that share one reading of a `[depth, columns]` matrix; `row_blocks` are those of its expert."""
        blocks = np.maximum(1, np.asarray(row_blocks))
        matrix_bytes = columns * np.asarray(depth) * self.world.precision.weight_bytes
        wave = max(1, self.slots // -(-columns // tile_columns))
        in_cache = matrix_bytes <= self.world.hardware.l2_mb * 1e6 * L2_SHARE
        return np.asarray(np.where(in_cache, blocks, blocks / -(-blocks // wave)))

    def _per_sm(self, tasks: ArrayLike) -> Array:
        """How many of a stage's tasks share all multiprocessors: a lone one has one of them."""
        sms = self.world.hardware.sms
        return np.clip(np.asarray(tasks, np.int64), sms, max(sms, self.slots))

    def _active(self, tasks: ArrayLike) -> Array:
        """How many of a stage's tasks run at a time, on average over its waves."""
        number = np.maximum(1, np.asarray(tasks, np.int64))
        return np.asarray(number / -(-number // self.slots))

    def _cache_pace(self, tasks: ArrayLike) -> Array:
        """Nanoseconds in which one of a stage's tasks reads a byte of the L2."""
        active, hardware = self._active(tasks), self.world.hardware
        return np.maximum(active / hardware.l2_gbps, 1 / self.task_gbps)

    @property
    def memory_gbps(self) -> float:
        """What the memory gives."""
        return self.world.hardware.hbm_gbps * self.world.hardware.hbm_achieved

    @property
    def weights_gbps(self) -> float:
        """What the memory gives to the weights of products."""
        return self.memory_gbps * WEIGHTS_SHARE

    @property
    def task_gbps(self) -> float:
        """The most that one slot draws from the L2, or through it from the memory."""
        hardware = self.world.hardware
        port = hardware.l2_gbps / hardware.sms
        if hardware.clock_ghz is not None:
            port = max(port, PORT_BYTES * hardware.clock_ghz)
        return port * min(1.0, hardware.sms / self.slots)

    def stream(self, nbytes: ArrayLike, tasks: ArrayLike | None = None) -> Array:
        """Moving bytes within the GPU, read and written: each byte crosses the memory twice.

        Args:
            tasks: of this stage on the GPU, over the whole call; None: enough for all slots.
        """
        tasks = self.slots if tasks is None else tasks
        pace = np.maximum(self._active(tasks) / self.memory_gbps, self._cache_pace(tasks))
        return _whole(2 * np.asarray(nbytes, np.float64) * pace)

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
