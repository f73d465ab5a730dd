"""COMET: two fused kernels, in which tiles are ordered so that rows which arrive late and results due early fit.

Layer 0: a copy stream per rank fetches the tokens of the other ranks, one rank after the other and the own ones first,
while the kernel multiplies: rows of an expert are sorted by source in that order, and a row block runs when the last
of its sources has arrived. Copy engines move the tokens, so no multiprocessor is spent, but the host issues every copy
and waits for the counts before it can launch the kernel. A barrier and an activation kernel follow. Layer 1: tiles go
column block by column block; `num_comm_blocks` of the kernel's blocks sum the results of a finished column block over
the experts of their rank, one row per token, and store them at the token's rank, which adds up what the ranks sent.

A shared expert is three kernels before the gate, as in Megatron-LM, of which COMET replaces the routed experts.

With `tensor_parallel`, a group of that many ranks owns together what its ranks own by blocked placement: each computes
ffn / tensor_parallel columns of all rows of the group's experts.

Source: COMET (arXiv 2502.19811) and the public code bytedance/flux: src/moe_ag_scatter (copies, sort by source, counts
read back by the host), src/moe_gather_rs (column blocks, communication blocks), docs/tuning_guide.md (tiles, blocks).
Knobs: see `Knobs`. Leaves out: two hops for results between nodes, tiles that wait in their slot for rows instead of
letting others run, and the tuning of tiles and `num_comm_blocks` for each shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.hops import relay, token_copies
from ..drafting.knobs import PolicyKnobs
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import COMBINE, ELEMENTWISE, GEMM0, GEMM1, JOIN, SEND
from ..world.routing import SimRouting
from ..world.world import World

INDEX_BYTES = 4  # of a row, in the sorted order


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product. Default: those of flux's tuned kernels for Hopper.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    tensor_parallel: ranks that share each expert's ffn columns; must divide the number of ranks, and ffn. Default:
        choice: experts are whole.
    stages: "layer", or "layer0": up to the barrier after the first product, as flux measures it (no gate). Default:
        choice.
    gather: "all" tokens go to every rank, or only those "routed" to it. Default: as in flux.
    column_blocks: column blocks of layer 1, at most one per tile. Default: flux's n_split.
    num_comm_blocks: blocks of layer 1 that communicate; the paper has 18 to 46. Default: flux's tuning.
    gate: simulate the gate. Default: choice.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 256
    tensor_parallel: int = 1
    stages: str = "layer"
    gather: str = "all"
    column_blocks: int = 4
    num_comm_blocks: int = 26
    gate: bool = True

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"stages": ("layer", "layer0"), "gather": ("all", "routed")}


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph.

    Raises:
        ValueError: `tensor_parallel` or `num_comm_blocks` does not fit the world.
    """
    sms = world.hardware.sms
    if knobs.num_comm_blocks >= sms:
        raise ValueError(f"num_comm_blocks must be less than the {sms} SMs of a GPU, got {knobs.num_comm_blocks}")
    world = shared_experts(world, knobs.tensor_parallel)
    draft = Draft(world, knobs, "comet", sms)
    routing = world.routing
    order = fetch_order(world)[:, routing.owner]
    blocks = tuned_blocks(routing.counts, knobs.tile_m, knobs.least_tile_m, order)
    met = _layer0(draft, blocks, knobs)
    if knobs.stages == "layer":
        _layer1(draft, blocks, _activate(draft, met), knobs)
    return draft.builder.build()


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


def _layer0(draft: Draft, blocks: Blocks, knobs: Knobs) -> Array:
    """`[num_ranks]`: all ranks are through with layer 0."""
    world = draft.world
    shared = shared_kernels(draft, None, (knobs.tile_m, knobs.tile_n)) if knobs.stages == "layer" else None
    gated = draft.gate(draft.begin(shared)) if knobs.gate and knobs.stages == "layer" else shared
    own_bytes = np.full(world.num_ranks, world.routing.num_tokens * world.config.hidden * world.precision.token_bytes)
    ready = draft.barrier(draft.stream(draft.begin(gated), own_bytes))  # the own rows are where peers fetch them
    arrived = _gather(draft, ready, knobs)
    rows_sorted = draft.stream(draft.begin(ready), INDEX_BYTES * world.rows)
    draft.sync(rows_sorted)  # the host needs the counts to set the products up
    owner = world.routing.owner[blocks.expert]
    turn = arrival_turn(world, blocks)
    width = draft.tuned_width(GEMM0, blocks, knobs.tile_m, knobs.tile_n)
    products = draft.gemm(GEMM0, blocks, width, priority=turn)
    draft.builder.edge(arrived[blocks.piece_source, owner[blocks.piece_block]], products[blocks.piece_block])
    order = np.argsort(turn, kind="stable")  # also of those that are ready when the kernel begins
    done = draft.kernel(draft.begin(rows_sorted), products[order], owner[order])
    return draft.barrier(np.concatenate([done, arrived.ravel()]))


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


def _layer1(draft: Draft, blocks: Blocks, activated: Array, knobs: Knobs) -> None:
    world, sms = draft.world, draft.world.hardware.sms
    owner = world.routing.owner[blocks.expert]
    width = draft.tuned_width(GEMM1, blocks, knobs.tile_m, knobs.tile_n, sms - knobs.num_comm_blocks)
    tiles = draft.column_tiles(GEMM1, width)
    column = np.arange(min(knobs.column_blocks, tiles))[:, None]  # column blocks
    count = np.diff(np.arange(len(column) + 1) * tiles // len(column))[:, None]
    compute = draft.on(draft.servers("compute blocks", sms - knobs.num_comm_blocks), sms)  # a slot is still one SM
    products = compute.gemm(GEMM1, blocks, width, priority=column, count=count)
    begun = draft.begin(activated)
    draft.builder.edge(begun[owner], products)
    complete = draft.after(begun, draft.builder.add(JOIN, draft.ranks, m=column))
    draft.builder.edge(products, complete[:, owner])
    comm = draft.on(draft.servers("communication blocks", knobs.num_comm_blocks), knobs.num_comm_blocks)
    _reduce(comm, complete, count / tiles)


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
