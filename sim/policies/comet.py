"""COMET: two fused kernels, in which tiles are ordered so that rows which arrive late and results due early fit.

Layer 0: a copy stream per rank fetches the tokens of the other ranks, one rank after the other and the own ones first,
while the kernel multiplies: rows of an expert are sorted by source in that order, and a row block runs when the last
of its sources has arrived. Copy engines move the tokens, so no multiprocessor is spent, but the host issues every copy
and waits for the counts before it can launch the kernel. A barrier and an activation kernel follow. Layer 1: tiles go
column block by column block; `num_comm_blocks` of the kernel's blocks sum the results of a finished column block over
the experts of their rank, one row per token, and store them at the token's rank, which adds up what the ranks sent.

On Ampere, layer 1 is another kernel: three blocks beside its products hand the sums of all tokens round a ring of ranks
(`drafting/ring.py`), and tiles are narrower.

A shared expert is three kernels before the gate, as in Megatron-LM, of which COMET replaces the routed experts.

With `tensor_parallel`, a group of that many ranks owns together what its ranks own by blocked placement: each computes
ffn / tensor_parallel columns of all rows of the group's experts.

Source: COMET (arXiv 2502.19811) and the public code bytedance/flux: src/moe_ag_scatter (copies, sort by source, counts
read back by the host), src/moe_gather_rs (column blocks, communication blocks; on Ampere FLUX_RS_BLOCKS of
ths_op/gemm_grouped_v2_gather_rs.cc), docs/tuning_guide.md (tiles, blocks). Kernels of a layer as FlashMoE's authors
counted them: 33 (arXiv 2506.04667, table 1).
Knobs: see `Knobs`. Leaves out: two hops for results between nodes, tiles that wait in their slot for rows instead of
letting others run, and the tuning of tiles and `num_comm_blocks` for each shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np

from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.hops import relay, token_copies
from ..drafting.knobs import PolicyKnobs
from ..drafting.ring import TILE_COLUMNS, ring_sums
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import COMBINE, ELEMENTWISE, GEMM0, GEMM1, JOIN, SEND
from ..world.routing import SimRouting
from ..world.world import World

INDEX_BYTES = 4  # of a row, in the sorted order
NUM_INDEX = 3  # kernels and copies of layer 0 that make indices of choices, beside the sort
NUM_STAGES = 16  # of all on 8 ranks: those, a gate, 8 copies of tokens, the sort, the products, the activation


class _Sizes(NamedTuple):
    """What is chosen by the GPU, unless it is set."""

    tile_n: int
    num_comm_blocks: int


HOPPER, AMPERE = _Sizes(256, 26), _Sizes(128, 3)


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product; None: 256 columns, on Ampere 128. Default: those of flux's tuned
        kernels for Hopper, on Ampere flux's default.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    tensor_parallel: ranks that share each expert's ffn columns; must divide the number of ranks, and ffn. Default:
        choice: experts are whole.
    stages: "layer", or "layer0": up to the barrier after the first product, as flux measures it (no gate). Default:
        choice.
    gather: "all" tokens go to every rank, or only those "routed" to it. Default: as in flux.
    column_blocks: column blocks of layer 1, at most one per tile. Default: flux's n_split.
    num_comm_blocks: blocks of layer 1 that communicate; the paper has 18 to 46; None: 26, on Ampere 3. Default: flux's
        tuning, on Ampere flux's default.
    num_ops: kernels and copies of the layer on 8 ranks. Those beyond its stages are small: half come before layer 0,
        half before layer 1. Default: as FlashMoE's authors counted them.
    framework_ns: host time of a small one beside its launch; its time on the GPU does not matter. Default:
        assumption, as in `bulk.py`.
    read_ns: until what a communicating block on Ampere reads from memory is there, beside products. Default:
        assumption.
    gate: simulate the gate. Default: choice.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int | None = None
    tensor_parallel: int = 1
    stages: str = "layer"
    gather: str = "all"
    column_blocks: int = 4
    num_comm_blocks: int | None = None
    num_ops: int = 33
    framework_ns: int = 5000
    read_ns: int = 700
    gate: bool = True

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"stages": ("layer", "layer0"), "gather": ("all", "routed")}

    def in_world(self, world: World) -> Self:
        sizes = _sizes(world, self)
        return replace(self, tile_n=sizes.tile_n, num_comm_blocks=sizes.num_comm_blocks)


def is_ampere(world: World) -> bool:
    """Whether the GPU has no fp8, and flux only its older kernels for it."""
    return "fp8" not in world.hardware.tflops


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph.

    Raises:
        ValueError: `tensor_parallel` or `num_comm_blocks` does not fit the world.
    """
    sms, sizes = world.hardware.sms, _sizes(world, knobs)
    if sizes.num_comm_blocks >= sms:
        raise ValueError(f"num_comm_blocks must be less than the {sms} SMs of a GPU, got {sizes.num_comm_blocks}")
    world = shared_experts(world, knobs.tensor_parallel)
    draft = Draft(world, knobs, "comet", sms)
    routing = world.routing
    order = fetch_order(world)[:, routing.owner]
    blocks = tuned_blocks(routing.counts, knobs.tile_m, knobs.least_tile_m, order)
    met = _layer0(draft, blocks, knobs, sizes.tile_n)
    if knobs.stages == "layer":
        _layer1(draft, blocks, _activate(draft, met), knobs, sizes)
    return draft.builder.build()


def _sizes(world: World, knobs: Knobs) -> _Sizes:
    usual = AMPERE if is_ampere(world) else HOPPER
    return _Sizes(knobs.tile_n or usual.tile_n, knobs.num_comm_blocks or usual.num_comm_blocks)


def shared_experts(world: World, size: int) -> World:
    """The world in which each expert is cut into `size` experts of ffn / size, one on each rank of its group."""
    if world.num_ranks % size:
        raise ValueError(f"tensor_parallel must divide num_ranks={world.num_ranks}, got {size}")
    if world.config.ffn % size:
        raise ValueError(f"tensor_parallel must divide ffn={world.config.ffn}, got {size}")
    routing, part = world.routing, np.arange(size)
    choices = routing.topk_idx[..., None]
    topk_idx = np.where(choices < 0, choices, choices * size + part).reshape(*choices.shape[:2], -1)
    owner = routing.owner[:, None] // size * size + part
    owner = owner.ravel().astype(np.int32)
    cut = replace(routing, num_experts=owner.size, topk_idx=topk_idx.astype(np.int32), owner=owner)
    return replace(world, config=replace(world.config, ffn=world.config.ffn // size), routing=cut)


def routed_tokens(routing: SimRouting) -> Array:
    """`[num_ranks, num_ranks]`: tokens of each source with at least one expert on each rank, each counted once."""
    source, _, rank = token_copies(routing)
    ranks = routing.num_ranks
    return np.bincount(source * ranks + rank, minlength=ranks**2).reshape(ranks, ranks)


# ---- layer 0


def _layer0(draft: Draft, blocks: Blocks, knobs: Knobs, tile_n: int) -> Array:
    """`[num_ranks]`: all ranks are through with layer 0."""
    world = draft.world
    prepared = _prepare(draft, knobs, tile_n) if knobs.stages == "layer" else None
    own_bytes = np.full(world.num_ranks, world.routing.num_tokens * world.config.hidden * world.precision.token_bytes)
    ready = draft.barrier(draft.stream(draft.begin(prepared), own_bytes))  # the own rows are where peers fetch them
    arrived = _gather(draft, ready, knobs)
    indexed = _small_kernels(draft, ready, NUM_INDEX, knobs)
    rows_sorted = draft.stream(draft.begin(indexed), INDEX_BYTES * world.rows)
    draft.sync(rows_sorted)  # the host needs the counts to set the products up
    owner = world.routing.owner[blocks.expert]
    turn = arrival_turn(world, blocks)
    width = draft.tuned_width(GEMM0, blocks, knobs.tile_m, tile_n)
    products = draft.gemm(GEMM0, blocks, width, priority=turn)
    draft.builder.edge(arrived[blocks.piece_source, owner[blocks.piece_block]], products[blocks.piece_block])
    order = np.argsort(turn, kind="stable")  # also of those that are ready when the kernel begins
    done = draft.kernel(draft.begin(rows_sorted), products[order], owner[order])
    return draft.barrier(np.concatenate([done, arrived.ravel()]))


def _prepare(draft: Draft, knobs: Knobs, tile_n: int) -> Array | None:
    """`[num_ranks]`, what comes before layer 0: the shared expert, the gate, and half of the small kernels."""
    last = shared_kernels(draft, None, (knobs.tile_m, tile_n))
    if knobs.gate:
        last = draft.gate(draft.begin(last))
    return _small_kernels(draft, last, _num_small(knobs) // 2, knobs)


def _num_small(knobs: Knobs) -> int:
    return max(0, knobs.num_ops - NUM_STAGES)


def _small_kernels(draft: Draft, last: Array | None, number: int, knobs: Knobs) -> Array | None:
    """`[num_ranks]`: so many are through, one after the other behind `last`."""
    for _ in range(number):
        last = draft.begin(last, draft.world.hardware.launch_ns + knobs.framework_ns)
    return last


def fetch_order(world: World) -> Array:
    """`[num_ranks, num_ranks]`, turn and rank: whose tokens each rank has first, second, ... last.

    The own node comes first, then the others in a circle; in each, the rank in the own place, and then its next ones.
    """
    node, place = np.divmod(np.arange(world.num_ranks), world.hardware.gpus_per_node)
    nodes_on = (node[:, None] - node) % (node[-1] + 1)  # [source, rank]
    return np.lexsort(((place[:, None] - place) % world.hardware.gpus_per_node, nodes_on), axis=0)


def arrival_turn(world: World, blocks: Blocks) -> Array:
    """`[num_blocks]`: in which turn the last source of each row block is fetched; the own rows are there in turn 0."""
    turn = np.zeros(len(blocks.expert), np.int64)
    owner = world.routing.owner[blocks.expert[blocks.piece_block]]
    turn_of = np.argsort(fetch_order(world), axis=0)  # [source, rank]
    np.maximum.at(turn, blocks.piece_block, turn_of[blocks.piece_source, owner])
    return turn


def _gather(draft: Draft, ready: Array, knobs: Knobs) -> Array:
    """`[num_ranks, num_ranks]`, source and rank: that rank has the source's tokens.

    Two streams of each rank copy one after the other: one from its node, one from other nodes. All tokens of a source
    in another node are fetched by the rank in its place, and from there by the others; routed ones by each on its own.
    """
    world, rank = draft.world, draft.ranks
    source = fetch_order(world)[1:]  # [turn, rank]
    turn = np.arange(1, world.num_ranks)[:, None]
    tokens = np.full(source.shape, world.routing.num_tokens)
    node = rank // world.hardware.gpus_per_node
    holder = relay(world, source, node)  # who in the rank's node has these tokens first
    if knobs.gather == "routed":
        tokens, holder = routed_tokens(world.routing)[source, rank], source
    sender = np.where(holder == rank, source, holder)
    copies = draft.send(SEND, sender, rank, tokens * world.config.hidden * world.precision.token_bytes, m=turn)
    draft.builder.edge(draft.begin(ready, world.hardware.launch_ns * len(turn)), copies)
    arrived = np.empty((world.num_ranks, world.num_ranks), np.int32)
    arrived[rank, rank] = ready
    arrived[source, rank] = copies
    relayed = (sender != source).nonzero()
    draft.builder.edge(arrived[source, sender][relayed], copies[relayed])
    far = sender // world.hardware.gpus_per_node != node
    for stream in (far, ~far):
        of, turns = stream.T.nonzero()  # by rank, then by turn
        draft.in_window(copies[turns, of], of, 1)
    return arrived


# ---- layer 1


def _activate(draft: Draft, met: Array) -> Array:
    """`[num_ranks]`: the activation kernel."""
    world = draft.world
    nbytes = world.rows * (world.up_columns + world.config.ffn) / 2 * world.precision.hidden_bytes
    return draft.stream(draft.begin(met), nbytes, ELEMENTWISE)


def _layer1(draft: Draft, blocks: Blocks, activated: Array, knobs: Knobs, sizes: _Sizes) -> None:
    world, sms, num_comm = draft.world, draft.world.hardware.sms, sizes.num_comm_blocks
    owner = world.routing.owner[blocks.expert]
    width = draft.tuned_width(GEMM1, blocks, knobs.tile_m, sizes.tile_n, sms - num_comm)
    tiles = draft.column_tiles(GEMM1, width)
    column = np.arange(_column_blocks(world, knobs, tiles))[:, None]
    count = np.diff(np.arange(len(column) + 1) * tiles // len(column))[:, None]
    compute = draft.on(draft.servers("compute blocks", sms - num_comm), sms)  # a slot is still one SM
    products = compute.gemm(GEMM1, blocks, width, priority=column, count=count)
    begun = draft.begin(_small_kernels(draft, activated, _num_small(knobs) - _num_small(knobs) // 2, knobs))
    draft.builder.edge(begun[owner], products)
    complete = draft.after(begun, draft.builder.add(JOIN, draft.ranks, m=column))
    draft.builder.edge(products, complete[:, owner])
    comm = draft.on(draft.servers("communication blocks", num_comm), num_comm)
    if is_ampere(world):
        ring_sums(comm, complete, knobs.read_ns)
    else:
        _reduce(comm, complete, count / tiles)


def _column_blocks(world: World, knobs: Knobs, tiles: int) -> int:
    """How many; on Ampere of whole tiles of the ring."""
    number = knobs.column_blocks
    if is_ampere(world) and world.config.hidden % (number * TILE_COLUMNS):
        number = max(1, world.config.hidden // TILE_COLUMNS)
    return min(number, tiles)


def _reduce(draft: Draft, complete: Array, share: Array) -> None:
    """Sums over a rank's experts go to the token's rank, which adds up those of all ranks; by column block.

    `complete` is `[column_blocks, num_ranks]`, `share` of the columns `[column_blocks, 1]`.
    """
    world = draft.world
    row_bytes = world.config.hidden * world.precision.result_bytes * share
    tokens = routed_tokens(world.routing)
    source, owner = np.nonzero(tokens)
    sends = _send_sums(draft, tokens, source, owner, row_bytes)
    draft.builder.edge(complete[:, owner], sends)
    own = world.routing.num_tokens * (2 if world.config.shared_ffn else 1)  # written; of the shared expert, read
    added = (tokens.sum(axis=1) + own) * row_bytes
    column = np.arange(len(share))[:, None]
    sums = draft.stream(None, added / 2, COMBINE, m=column, priority=column)
    draft.builder.edge(complete, sums)
    draft.builder.edge(sends, sums[:, source])


def _send_sums(draft: Draft, tokens: Array, source: Array, owner: Array, row_bytes: Array) -> Array:
    """`[column_blocks, num_pairs]`: a rank sums the results of each token over its experts, and stores the sums."""
    world, column = draft.world, np.arange(len(row_bytes))[:, None]
    count = -(-tokens[source, owner] // draft.token_block)
    sent = row_bytes * tokens[source, owner] / count
    read = row_bytes * world.traffic[source, owner] / count
    summed = draft.cost.stream(read / 2)
    return draft.store(SEND, owner, source, sent, first_ns=summed, count=count, m=column, priority=column)
