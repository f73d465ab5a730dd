"""SonicMoE: kernels one after the other, whose tiles hide their ends behind the products of other tiles.

Gate, up projection with activation, down projection, and a kernel in which each token gathers and sums its results.
The rows of an expert are packed over all sources; they are gathered while a tile loads, so no kernel permutes them.
Two tiles share a multiprocessor and alternate ("ping-pong"): while one multiplies, the other writes its results, and a
third loads. A stage of many tiles takes as long as the longest of LOAD, product and EPILOGUE, not as long as their sum.
A shared expert is three plain kernels before the gate, as in Megatron-LM.
A backward has four products: dA' = dy W2, whose tiles make at their end, of the up-products that the forward wrote out,
their gradients dh, the activation times its weight, A', and the weight's gradient; dW2 = dy^T A'; rows of dx = dh W1;
and dW1 = dh^T x. Rows are gathered as tiles load, and no result is kept. Then each token sums its rows of dx.
On more than one GPU an all-to-all brings the rows before the up projection, and another the results back.

Source: SonicMoE (arXiv 2512.14080) section 4 and its public code; token rounding is `sim.world.rounding`, for any
policy. Knobs: see `Knobs`. Leaves out: the kernels that sort the routing, that a multiprocessor has room for only two
tiles, that an EPILOGUE need not wait for the other tiles of its row block, and that loads and stores share the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from numpy.typing import ArrayLike

from ..drafting.backward import DOWN, UP, GradientTile, dense_kernels, gradient_kernel, reduce_gradients
from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.passes import backward_pass
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import EPILOGUE, GEMM0, GEMM1, LOAD
from ..world.world import BACKWARD, FORWARD, TRAINING, World
from ..world.world import PASSES as PASSES

PRODUCT, LAST = -1, -2  # priorities, for stages that share slots: a tile is finished before another is begun


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product. Default: assumption: the usual tile of large products.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    ping_pong: the stages of a tile run beside those of others; if not, one after the other in its slot. Default: as in
        SonicMoE.
    save_up: the first product is written out too, beside the activation, as it always is for a backward. Default:
        choice.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 256
    ping_pong: bool = True
    save_up: bool = False


class _Stages(NamedTuple):
    """Servers `[num_ranks]` of the parts of a tile around its product."""

    load: Array
    epilogue: Array


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    draft = Draft(world, knobs, "sonic", world.hardware.sms, tile_latency_ns=0)  # it is the time of LOAD
    stages = _stages(draft, knobs)
    last: Array | None = None
    if FORWARD in world.directions:
        last = _forward(draft, stages, knobs)
    if BACKWARD in world.directions:
        ended = _backward(draft, stages, last, knobs)
        if world.passes == TRAINING:
            reduce_gradients(draft, ended)
    return draft.builder.build()


def _forward(draft: Draft, stages: _Stages, knobs: Knobs) -> Array:
    world = draft.world
    blocks = tuned_blocks(world.routing.counts, knobs.tile_m, knobs.least_tile_m)
    gated = draft.gate(draft.begin(shared_kernels(draft, None, (knobs.tile_m, knobs.tile_n))))
    arrived = _exchange(draft, gated, world.dispatch_bytes)
    saves = knobs.save_up or world.passes == TRAINING
    saved_bytes = world.up_columns * world.precision.result_bytes if saves else 0
    hidden_bytes = world.config.ffn * world.precision.hidden_bytes + saved_bytes
    hidden = _kernel(draft, stages, arrived, blocks, GEMM0, hidden_bytes, knobs)
    result_bytes = world.config.hidden * world.precision.result_bytes
    results = _kernel(draft, stages, hidden, blocks, GEMM1, result_bytes, knobs)
    returned = _exchange(draft, results, world.combine_bytes)
    return draft.combine_kernel(draft.begin(returned))


def _backward(draft: Draft, stages: _Stages, last: Array | None, knobs: Knobs) -> Array:
    world = draft.world
    draft = draft.turned(backward_pass(world, in_tiles=False))
    blocks = tuned_blocks(world.routing.counts, knobs.tile_m, knobs.least_tile_m)
    size = world.precision.token_bytes
    tile = GradientTile(knobs.tile_m, knobs.tile_n, size)  # written in the weights' format
    arrived = _exchange(draft, draft.idle() if last is None else last, world.dispatch_bytes)
    between = (2 * world.up_columns + world.config.ffn) * size  # up-products in, their gradients and A' out
    hidden = _kernel(draft, stages, arrived, blocks, GEMM0, between, knobs)
    down = gradient_kernel(draft, draft.begin(hidden), tile, (DOWN,))
    rows = _kernel(draft, stages, down, blocks, GEMM1, world.config.hidden * size, knobs)
    up = gradient_kernel(draft, draft.begin(rows), tile, (UP,))
    summed = draft.combine_kernel(draft.begin(_exchange(draft, up, world.combine_bytes)))
    return dense_kernels(draft, summed, (knobs.tile_m, knobs.tile_n), tile)


def _stages(draft: Draft, knobs: Knobs) -> _Stages:
    if knobs.ping_pong:
        return _Stages(draft.servers("loads", draft.cost.slots), draft.servers("epilogues", draft.cost.slots))
    return _Stages(draft.machine.sm, draft.machine.sm)


def _exchange(draft: Draft, after: Array, nbytes: Array) -> Array:
    return after if draft.world.num_ranks == 1 else draft.collective(draft.begin(after), nbytes)


def _kernel(
    draft: Draft, stages: _Stages, after: Array, blocks: Blocks, kind: int, row_bytes: float, knobs: Knobs
) -> Array:
    """`[num_ranks]`: a kernel of these products is complete, each tile loaded before and written after.

    `row_bytes` are what the tiles of a row block write for each row.
    """
    width = draft.tuned_width(kind, blocks, knobs.tile_m, knobs.tile_n)
    products = draft.gemm(kind, blocks, width, priority=PRODUCT)
    begun, owner = draft.begin(after), draft.world.routing.owner[blocks.expert]
    tiles = draft.column_tiles(kind, width)
    names: dict[str, ArrayLike] = {"expert": draft.local[blocks.expert], "m": blocks.m, "count": tiles}
    loads = draft.builder.add(LOAD, owner, server=stages.load[owner], duration_ns=knobs.tile_latency_ns, **names)
    draft.builder.edge(begun[owner], loads)
    written = blocks.rows * row_bytes / tiles
    ends = draft.builder.add(
        EPILOGUE,
        owner,
        server=stages.epilogue[owner],
        priority=LAST,
        duration_ns=draft.cost.stream(written / 2),  # written, but not read
        **names,
    )
    draft.after(draft.after(loads, products), ends)
    return draft.kernel(begun, ends, owner)
