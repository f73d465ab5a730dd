"""Bulk: kernels and collectives one after the other, as in Megatron-LM.

The host launches each kernel: the gate, many small ones that make indices of its choices, an all-to-all of the token
counts (which the host then reads, to know sizes), the permutation of the rows by expert, their all-to-all, a sort by
local expert, grouped products with the activation between them, and the same way back, until the rows of each token
are summed. Every collective begins when the last rank has come to it and ends for all ranks at once, so the slowest
rank of each phase holds up all; nothing overlaps but the host's launches with what the GPU still does.

A backward is the same way back: the all-to-all of the combine carries gradients of the results' rows, that of the
dispatch gradients of the tokens' rows, and each grouped product becomes two, of gradients of its rows and of its
weights (`drafting/backward.py`), which are added to sums in float32. Counts are known, and everything was kept, so
nothing is exchanged or made again. The shared expert and the router come last.

A shared expert is three kernels before the gate, as without Megatron's `moe_shared_expert_overlap`; `num_ops` does not
count them.

Source: Megatron-LM's all-to-all token dispatcher; kernels per layer as FlashMoE's authors counted them with 32 experts
per GPU: 261 for Megatron-LM with Transformer Engine, 85 with CUTLASS, 550 for DeepSpeed-MoE (arXiv 2506.04667, table
1); the floor of a collective from data/nccl_nvshmem.csv: 30 to 41 us for few tokens on 8 H100.
A backward's small kernels are assumed to be as many as a forward's: nobody has published their number.
Knobs: see `Knobs`. Leaves out: the multiprocessors that a collective takes (nothing runs beside it), its hierarchy
between nodes, capacity factors and padding beyond tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from reference import arrays

from ..drafting.backward import GradientTile, backward_kernels, dense_kernels, reduce_gradients
from ..drafting.blocks import tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.passes import backward_pass
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import PERMUTE
from ..world import streams
from ..world.world import BACKWARD, FORWARD, TRAINING, World
from ..world.world import PASSES as PASSES

NUM_STAGES = 11  # kernels and collectives of `build`; the gate is one, the products and activation are three


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product; rows are packed over sources. Default: assumption: the usual tile of
        large products.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    num_ops: kernels of the whole layer, and of its backward. Those beyond the 11 stages are small: half make indices
        before the counts are exchanged, half after the rows are back. Default: those of Megatron's forward with
        Transformer Engine, counted with 32 experts per GPU (arXiv 2506.04667, table 1); an assumption for other layers,
        and for backwards.
    op_ns: time of a small one on the GPU. Default: assumption: less than its launch takes, so that it does not matter.
    framework_ns: host time per kernel beside its launch, in Python and a framework's dispatcher. Default: assumption:
        with the launch about 10 us, what Triton-distributed says of slicing or reading one value on H800.
    collective_ns: floor of an all-to-all. Default: 30 to 41 us for few tokens on 8 H100 (data/nccl_nvshmem.csv).
    straggler_ns: mean of a random delay of each launch on each rank, exponentially distributed. Default: choice: none.
    straggler_seed: of those delays. Default: choice.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 256
    num_ops: int = 261
    op_ns: int = 2000
    framework_ns: int = 5000
    collective_ns: int = 30_000
    straggler_ns: int = 0
    straggler_seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ops < NUM_STAGES:
            raise ValueError(f"num_ops must be at least {NUM_STAGES}, the stages of the layer, got {self.num_ops}")


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    draft = Draft(world, knobs, "bulk", world.hardware.sms)
    stream = _Stream(draft, knobs)
    if FORWARD in world.directions:
        _forward(stream, knobs)
    if BACKWARD in world.directions:
        _backward(stream, knobs)
    if world.passes == TRAINING:
        reduce_gradients(draft, stream.last, stream.begin_after)
    return draft.builder.build()


def _forward(stream: _Stream, knobs: Knobs) -> None:
    draft = stream.draft
    stream.last = shared_kernels(draft, stream.last, (knobs.tile_m, knobs.tile_n), stream.begin_after)
    stream.last = draft.gate(stream.begin())
    extra = knobs.num_ops - NUM_STAGES
    stream.small(extra // 2)
    stream.last = draft.exchange_counts(stream.begin(), knobs.collective_ns)
    _experts(stream, knobs)
    stream.small(extra - extra // 2)
    stream.last = draft.combine_kernel(stream.begin())


class _Stream:
    """The kernels of every rank, each after the one before; `last` is `[num_ranks]`, the newest's end."""

    def __init__(self, draft: Draft, knobs: Knobs) -> None:
        self.draft = draft
        self.knobs = knobs
        self.random = arrays.stream(knobs.straggler_seed, streams.STRAGGLERS)
        self.last: Array = draft.idle()

    def begin(self) -> Array:
        """`[num_ranks]`: the next kernel begins."""
        delay = self.random.exponential(self.knobs.straggler_ns, self.draft.world.num_ranks)
        usual = self.draft.world.hardware.launch_ns + self.knobs.framework_ns
        return self.draft.begin(self.last, usual + delay)

    def begin_after(self, last: ArrayLike | None) -> Array:
        """The same after another end of the stream."""
        self.last = np.asarray(last)
        return self.begin()

    def small(self, number: int) -> None:
        """Kernels too small to fill the GPU."""
        for _ in range(number):
            begun = self.begin()
            op = self.draft.builder.add(PERMUTE, self.draft.ranks, duration_ns=self.knobs.op_ns)
            self.last = self.draft.after(begun, op)

    def permute(self, rows: Array, element_bytes: float) -> None:
        """A kernel that reads and writes `rows` `[num_ranks]` of `hidden` elements."""
        self.last = self.draft.stream(self.begin(), rows * self.draft.world.config.hidden * element_bytes)

    def all_to_all(self, nbytes: Array) -> None:
        """`nbytes` is `[num_ranks, num_ranks]`, from and to."""
        self.last = self.draft.collective(self.begin(), nbytes, self.knobs.collective_ns)


def _experts(stream: _Stream, knobs: Knobs) -> None:
    """From rows in token order to results in the same order."""
    draft, world = stream.draft, stream.draft.world
    precision, counts = world.precision, world.routing.counts
    blocks = tuned_blocks(counts, knobs.tile_m, knobs.least_tile_m)
    stream.permute(counts.sum(axis=1), precision.token_bytes)
    stream.all_to_all(world.dispatch_bytes)
    stream.permute(world.rows, precision.token_bytes)
    _, stream.last = draft.ffn(stream.last, blocks, knobs.tile_n, knobs.tile_m)
    stream.permute(world.rows, precision.result_bytes)
    stream.all_to_all(world.combine_bytes)


def _backward(stream: _Stream, knobs: Knobs) -> None:
    """From gradients of results to those of tokens."""
    stream.draft = draft = stream.draft.turned(backward_pass(stream.draft.world, in_tiles=False))
    world, tile, extra = draft.world, GradientTile(knobs.tile_m, knobs.tile_n), knobs.num_ops - NUM_STAGES
    size, sent = world.precision.token_bytes, world.routing.counts.sum(axis=1)
    stream.small(extra // 2)
    stream.permute(sent, size)
    stream.all_to_all(world.dispatch_bytes)
    stream.permute(world.rows, size)
    blocks = tuned_blocks(world.routing.counts, knobs.tile_m, knobs.least_tile_m)
    stream.last = backward_kernels(draft, stream.last, blocks, tile)
    stream.permute(world.rows, size)
    stream.all_to_all(world.combine_bytes)
    stream.small(extra - extra // 2)
    stream.last = draft.combine_kernel(stream.begin())
    stream.last = dense_kernels(draft, stream.last, (knobs.tile_m, knobs.tile_n), tile, stream.begin_after)
