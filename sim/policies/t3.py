"""T3: hardware counts the stores of the second product, and copy engines send what is complete.

Gate, an all-to-all of the rows by copy engines, the first product, then the second: a tracker of each GPU counts the
stores into every part of a row block, and the last one triggers a copy that was programmed before. It costs no slot and
the product goes on meanwhile. The memory at the destination adds what arrives ("op and store"), so there is no COMBINE.
So that ranks do not all send to the same one, rank r begins with the row blocks whose rows came from rank r + 1.

A shared expert is three kernels before the gate; its results are what the others are added to.

Source: T3 (arXiv 2401.16677) sections 4 and 5, which has it for the reduce-scatter of tensor parallelism; here what is
sent goes straight to the source of its rows. Rows of an expert are packed over all sources.
Knobs: see `Knobs`. Leaves out: the memory's arbitration between products and copies (here copies cost products
nothing), the number of copy engines, and the time that memory takes to add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import GEMM0, GEMM1
from ..world.world import World


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product. Default: assumption: the usual tile of large products.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    trigger_tiles: column tiles of a row block that are sent at once. Default: assumption.
    tracker_entries: parts of row blocks that a rank can have under way; an entry is free when its copy is triggered.
        Default: assumption.
    op_and_store: results are added where they arrive; if not, a COMBINE kernel sums them when all are there. Default:
        as in T3.
    stagger: ranks begin with different destinations; if not, all with rank 0. Default: as in T3.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 128
    trigger_tiles: int = 4
    tracker_entries: int = 256
    op_and_store: bool = True
    stagger: bool = True


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    draft = Draft(world, knobs, "t3", world.hardware.sms)
    blocks = tuned_blocks(world.routing.counts, knobs.tile_m, knobs.least_tile_m)
    owner = world.routing.owner[blocks.expert]
    gated = draft.gate(draft.begin(shared_kernels(draft, None, (knobs.tile_m, knobs.tile_n))))
    arrived = draft.collective(draft.begin(gated), world.dispatch_bytes)
    up, down = (draft.tuned_width(kind, blocks, knobs.tile_m, knobs.tile_n) for kind in (GEMM0, GEMM1))
    hidden = draft.kernel(draft.begin(arrived), draft.gemm(GEMM0, blocks, up), owner)
    tiles, columns = _parts(world.config.hidden, down, knobs.trigger_tiles)
    turn = _turn(world, blocks, knobs)
    parts = draft.gemm(GEMM1, blocks, down, priority=turn, count=tiles)
    rank = np.broadcast_to(owner, parts.shape).ravel()
    by_turn = np.lexsort((parts.ravel(), np.broadcast_to(turn, parts.shape).ravel(), rank))
    in_turn, rank = parts.ravel()[by_turn], rank[by_turn]  # a kernel starts its tasks in the order given
    draft.in_window(in_turn, rank, knobs.tracker_entries)  # an entry is free when the part that had it is complete
    produced = draft.kernel(draft.begin(hidden), in_turn, rank)
    sent = draft.send_pieces(blocks, parts, columns)
    returned = draft.gather(sent, np.broadcast_to(blocks.piece_source, sent.shape))
    if not knobs.op_and_store:
        draft.combine_kernel(draft.after(returned, draft.begin(produced)))
    return draft.builder.build()


def _parts(hidden: int, width: int, trigger_tiles: int) -> tuple[Array, Array]:
    """`[num_parts, 1]`: column tiles, and columns, of each part of a row block of results."""
    step = trigger_tiles * width
    start = np.arange(0, hidden, step)
    columns = np.minimum(step, hidden - start)[:, None]
    return -(-columns // width), columns


def _turn(world: World, blocks: Blocks, knobs: Knobs) -> Array:
    """`[num_blocks]`: which turn a block has on its rank: by the source of its first row."""
    first = np.full(len(blocks.expert), world.num_ranks)
    np.minimum.at(first, blocks.piece_block, blocks.piece_source)
    own = world.routing.owner[blocks.expert] if knobs.stagger else -1
    turn: Array = (first - own - 1) % world.num_ranks
    return turn
