"""NanoFlow: the tokens are cut into nano-batches, and the kernels of one run beside the transfers of another.

Each nano-batch has a chain of kernels of its own: gate, all-to-all, first product, second product, all-to-all, combine.
The multiprocessors are divided for the whole call: a share computes, a share transfers, so that kernels of both kinds
run at once. What a share is worth follows from the hardware: products slow down as they lose multiprocessors, while a
few fill the links. The cost of it: every nano-batch reads the expert weights again, and its tiles are emptier.
A shared expert's three kernels run beside the transfers of its nano-batch's rows.

Source: NanoFlow (arXiv 2408.12757) sections 4 and 5, for dense models; the chain is that of an MoE layer.
Knobs: see `Knobs`. Rows of an expert are packed over all sources. Collectives are barriers over ranks. Leaves out: the
search for sizes, orders and shares, shares that change between stages, and attention, which is what NanoFlow gains from
most; contention for the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import GEMM0, GEMM1, SEND
from ..world.world import World


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product. Default: assumption: the usual tile of large products.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    nano_batches: 1 to 4; at most one for each token of a rank. Default: assumption: the fewest that overlap.
    overlap: nano-batches run beside each other; if not, one after the other, with all multiprocessors for each kernel.
        Default: as in NanoFlow.
    compute_share, transfer_share: of the multiprocessors, where nano-batches overlap; together at most 1. Default:
        assumption: few fill the links.
    send_rows: rows that one block stores at a time. Default: assumption.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 128
    nano_batches: int = 2
    overlap: bool = True
    compute_share: float = 0.9
    transfer_share: float = 0.1
    send_rows: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nano_batches > 4:
            raise ValueError(f"nano_batches must be in [1, 4], got {self.nano_batches}")
        for name in ("compute_share", "transfer_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.compute_share + self.transfer_share > 1 + 1e-9:
            total = f"{self.compute_share} and {self.transfer_share}"
            raise ValueError(f"compute_share and transfer_share must be at most 1 together, got {total}")


@dataclass(frozen=True)
class _Batch:
    """A nano-batch: the draft of its kernels and that of its transfers, its row blocks, its place."""

    compute: Draft
    transfer: Draft
    blocks: Blocks
    index: int


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    batches = _batches(world, knobs)
    stages = (_gate, _dispatch, partial(_product, GEMM0), partial(_product, GEMM1), _return, _combine)
    done: list[Array | None] = [None] * len(batches)
    if knobs.overlap:
        for stage in stages:
            done = [stage(batch, after, knobs) for batch, after in zip(batches, done, strict=True)]
    else:
        after = None
        for batch in batches:
            for stage in stages:
                after = stage(batch, after, knobs)
    return batches[0].compute.builder.build()


def _batches(world: World, knobs: Knobs) -> list[_Batch]:
    sms = world.hardware.sms
    slots = max(1, int(sms * knobs.compute_share)) if knobs.overlap else sms
    draft = Draft(world, knobs, "nanoflow", slots)
    transfer = draft
    if knobs.overlap:
        sending = max(1, int(sms * knobs.transfer_share))
        transfer = draft.on(draft.servers("transfer SMs", sending), sending)
    number = min(knobs.nano_batches, world.routing.num_tokens)
    parts = zip(draft.parts(number), transfer.parts(number), strict=True)
    return [
        _Batch(part, sends, tuned_blocks(part.world.routing.counts, knobs.tile_m, knobs.least_tile_m), index)
        for index, (part, sends) in enumerate(parts)
    ]


def _gate(batch: _Batch, after: Array | None, knobs: Knobs) -> Array:
    return batch.compute.gate(batch.compute.begin(after))


def _dispatch(batch: _Batch, after: Array | None, knobs: Knobs) -> Array:
    world, tile = batch.transfer.world, (knobs.tile_m, knobs.tile_n)
    shared = shared_kernels(batch.compute, after, tile, priority=batch.index)
    sent = _all_to_all(batch, after, world.traffic, world.precision.token_bytes, knobs)
    return sent if shared is after else batch.compute.after(shared, batch.compute.all_of(sent))


def _return(batch: _Batch, after: Array | None, knobs: Knobs) -> Array:
    world = batch.transfer.world
    return _all_to_all(batch, after, world.traffic.T, world.precision.result_bytes, knobs)


def _all_to_all(batch: _Batch, after: Array | None, rows: Array, element_bytes: float, knobs: Knobs) -> Array:
    """`[num_ranks]`: blocks of every rank stored `rows` `[num_ranks, num_ranks]` from each rank to each."""
    draft = batch.transfer
    met = draft.barrier(draft.begin(after))
    source, target = np.nonzero(rows)
    tasks = -(-rows[source, target] // knobs.send_rows)
    nbytes = rows[source, target] / tasks * draft.world.config.hidden * element_bytes
    sends = draft.store(SEND, source, target, nbytes, count=tasks, priority=batch.index)
    return draft.kernel(met, sends, target)


def _product(kind: int, batch: _Batch, after: Array | None, knobs: Knobs) -> Array:
    draft = batch.compute
    width = draft.tuned_width(kind, batch.blocks, knobs.tile_m, knobs.tile_n)
    nodes = draft.gemm(kind, batch.blocks, width, priority=batch.index)
    return draft.kernel(draft.begin(after), nodes, draft.world.routing.owner[batch.blocks.expert])


def _combine(batch: _Batch, after: Array | None, knobs: Knobs) -> Array:
    return batch.compute.combine_kernel(batch.compute.begin(after))
