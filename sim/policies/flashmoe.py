"""FlashMoE: one persistent kernel per rank, and nothing waits for more than its own inputs.

Gate tiles first; when a rank has gated all its tokens, blocks store each (source, expert) packet into the memory of its
owner and signal. The owner's OS block sees the signal and cuts row blocks, whose GEMM0 tiles it queues; the last GEMM0
tile of a row block frees its GEMM1 tiles, whose results go straight into the memory of the rows' sources; a block of
tokens is combined when all its results are there. One queue per rank, first come first served, no barrier anywhere.
A shared expert's tiles (`drafting/shared.py`) are in the same queue, most of them behind the rank's packets.

Packed as rows arrive, as the kernel of this project does it: a full tile is cut at once; other rows wait for more of
their expert, and are cut when its last packet is here, or when processors are idle and no packet of it came for a while
(`drafting/owner.py`). What is idle when depends on the schedule, so a schedule is drawn, run, cut anew by what happened
in it, and drawn again, until nothing changes. It may go to and fro between two, or on for `MOST_ROUNDS`: then the last
one is taken, and some rows are held back a little longer or shorter than by the rule.

In the published kernels the OS block hands tiles out, a processor at a time, and each waits before a tile for a round
of that. Their times say so: they are a sum of products and of a time per tile that is the same for tiles of any depth.

A backward is the same kernel with other tasks: rows of dy go the way of the tokens, into the same slots, each as it is
needed for its weight; GEMM0 multiplies by the down matrices, GEMM1 by the up matrices, and rows of dx go the way of the
results. Gradients of an expert's weights are tiles of the same queue, once all its packets and all its GEMM0 are done;
those of the router are behind the rank's last COMBINE, those of the shared expert behind all its SHARED0.

Source: FlashMoE (arXiv 2506.04667) sections 3 and 4, and its public code, v0.1.2, whose tiles are per source and of one
height; this project's kernel, whose backward it is (flashmoe_numba/kernel/backward).
Knobs: see `Knobs`. Leaves out: the doorbells between scheduler and processors (their cost is in `schedule_ns`), slots
that idle while a block looks for work, and the signals of empty packets, which the OS block has to see as well. Results
of a tile with rows of several sources leave when its last column tile is done, and not column tile by column tile. Of a
backward: the factors of rows and their gradients on their way, a word each, and rows that SHARED0 keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np

from reference.layout import SAVES

from ..drafting.arrived import SHORTEST, hold_back, row_blocks_at_once, told_by_chunks
from ..drafting.backward import GradientTile, reduce_gradients
from ..drafting.backward_tiles import (
    expert_tiles,
    reopen_gate,
    router_product,
    router_tiles,
    shared_gradient_tiles,
)
from ..drafting.blocks import Blocks, blocks_per_expert, blocks_per_source, ladder
from ..drafting.cuts import CutBlocks, as_if_at_once, cut_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.owner import Rules, cuts_of_all
from ..drafting.passes import UP, Pass, backward_pass, forward_pass
from ..drafting.rates import SCHEDULE, fitted_values
from ..drafting.shared import shared_tiles
from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import GEMM0, GEMM1, RECEIVE
from ..world.world import BACKWARD, FORWARD, TRAINING, World
from ..world.world import PASSES as PASSES

FIRST = -1  # rows go before tiles, which wait for nothing else
MOST_ROUNDS = 8
TICKET_NS = 10  # assumption: warps of the OS block write the tiles of a row block into the queue side by side


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    blocks_per_sm: resident blocks, each of which runs one tile at a time. Default: of version 0.1.2's, with three
        stages of 128 x 128 tiles, one fits an H100's multiprocessor; two fit an A100's, but share its tensor cores, and
        one slot of the whole is nearer than two halves. The paper's version had two.
    tile_m, tile_n: of a tile of either product. Default: version 0.1.2's.
    ladder: tiles take the lowest of tile_m, half of it, ... (16 at least) that holds their packet, or where tiles are
        packed all rows of their expert or, as they arrive, their own, instead of always tile_m; None: where they
        arrive. Default: as in this project's kernel; the published ones had 128 at all measured batches.
    packing: "arrived": rows of all sources of an expert share tiles, as they come, nobody waits for counts.
        "per_source": a packet has tiles of its own, as in the published kernels. "per_expert": tiles as if all counts
        were known before. Default: as in this project's kernel.
    settle_ns: with packing="arrived", a tile that is not full goes to an idle processor when no packet of its expert
        came for so long. Default: this project's kernel on GPUs.
    gate: simulate the gate, and its gradients; the published v0.1.2 benchmark leaves it out. Default: choice.
    dispatch_rows: rows of a packet that one block stores at a time. Default: assumption.
    row_unit: rows that are multiplied together: a tile computes its real rows, rounded up to whole units; None: all of
        its height, padding included. Default: as tensor cores do.
    async_loads: a tile's operands are read while products run; False: before them, as on CPUs. Default: as on GPUs.
    poll_ns: the OS block's time per packet. Default: assumption: a round trip to the L2.
    scheduler: "tickets": processors take the next tile themselves; "os_block": a processor waits before each tile until
        the OS block has handed one to all, as in the published kernels. Default: as in this project's kernel.
    schedule_ns: the OS block's time per tile; None: with tickets `TICKET_NS`, for which it has only to write the tile
        down, else the fitted one of the published kernel. Default: assumption with tickets, else fitted to published
        tables.
    save: what a forward keeps for its backward (`drafting/passes.py`): "rows+up", "rows" or "nothing". Default: as in
        this project's layer.
    """

    blocks_per_sm: int = 1
    tile_m: int = 128
    tile_n: int = 128
    ladder: bool | None = None
    packing: str = "arrived"
    settle_ns: int = 10_000
    gate: bool = True
    dispatch_rows: int = 32
    row_unit: int | None = None
    async_loads: bool = True
    poll_ns: int = 300
    scheduler: str = "tickets"
    schedule_ns: int | None = None
    save: str = UP

    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "packing": ("arrived", "per_source", "per_expert"),
        "scheduler": ("tickets", "os_block"),
        "save": SAVES,
    }

    def in_world(self, world: World) -> Self:
        return replace(self, ladder=self.packing == "arrived" if self.ladder is None else self.ladder)


class _Drawn(NamedTuple):
    """A pass of the layer."""

    draft: Draft
    received: Array  # [num_ranks, num_experts], the node of each packet that has rows
    ended: Array  # [num_ranks], all tasks of a rank; nobody asks of a forward alone


class _Schedule(NamedTuple):
    graph: TaskGraph
    drawn: list[_Drawn]


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    if knobs.packing == "arrived":
        return _packed_as_rows_arrive(world, knobs)
    return _draw(world, knobs, [_blocks(world, knobs)] * len(world.directions)).graph


def _draw(world: World, knobs: Knobs, blocks: Sequence[Blocks]) -> _Schedule:
    """With the row blocks of each pass."""
    wait_ns = _wait_ns(world, knobs)
    draft = Draft(
        world,
        knobs,
        "flashmoe",
        _slots(world, knobs),
        async_loads=knobs.async_loads,
        wait_ns=wait_ns,
        fixed_shares=wait_ns > 0 or not knobs.async_loads,  # a slot does other things before or after it reads
    )
    drawn: list[_Drawn] = []
    for direction, of_pass in zip(world.directions, blocks, strict=True):
        before = drawn[-1].ended if drawn else None
        drawn.append(_draw_pass(draft.turned(_pass(world, knobs, direction)), knobs, of_pass, direction, before))
    if world.passes == TRAINING:
        reduce_gradients(draft, drawn[-1].ended)
    return _Schedule(draft.builder.build(), drawn)


def _pass(world: World, knobs: Knobs, direction: str) -> Pass:
    if direction == BACKWARD:
        return backward_pass(world, knobs.save)
    return forward_pass(world, knobs.save if world.passes == TRAINING else None)


def _draw_pass(draft: Draft, knobs: Knobs, blocks: Blocks, direction: str, before: Array | None) -> _Drawn:
    world, back = draft.world, direction == BACKWARD
    launched = draft.launch() if before is None else draft.begin(before)
    gated = launched
    if knobs.gate:
        gated = reopen_gate(draft, launched) if back else draft.gate(launched, split=False)
    named = {"peer": blocks.first_source} if isinstance(blocks, CutBlocks) else {}
    hidden = draft.gemm(GEMM0, blocks, knobs.tile_n, **named)
    told, results = _results(draft, blocks, hidden, knobs)
    packets = np.nonzero(world.routing.counts)
    received = np.full(world.routing.counts.shape, NONE, np.int32)
    sent = draft.dispatch(gated, packets, knobs.dispatch_rows, FIRST)
    received[packets] = _receive(draft, sent, packets, blocks, knobs)
    if before is not None:  # a peer may be ahead
        draft.builder.edge(launched[world.routing.owner[packets[1]]], received[packets])
    draft.builder.edge(received[blocks.piece_source, blocks.expert[blocks.piece_block]], hidden[blocks.piece_block])
    if isinstance(blocks, CutBlocks):
        hold_back(draft, received, blocks, hidden)
    combined = draft.combine(told, results, gated, **(router_product(draft) if back and knobs.gate else {}))
    shared: list[Array] = []
    if world.config.shared_ffn:
        tile = min(knobs.tile_m, world.config.num_tokens), knobs.tile_n
        shared = shared_tiles(draft, launched, gated, combined, tile)
    ended = launched
    if world.passes != FORWARD:
        ended = draft.after(launched, draft.after(combined.T, draft.idle()))
        draft.builder.edge(results, ended[world.routing.owner[told.expert[told.piece_block]]])
    if back:
        gradient = GradientTile(knobs.tile_m, knobs.tile_n)
        expert_tiles(draft, gradient, blocks, hidden, received, ended)
        if knobs.gate:
            router_tiles(draft, gradient, combined, ended)
        if shared:
            shared_gradient_tiles(draft, gradient, shared, ended)
    return _Drawn(draft, received, ended)


def _slots(world: World, knobs: Knobs) -> int:
    blocks = world.hardware.sms * knobs.blocks_per_sm
    if blocks < 2:
        raise ValueError(f"blocks_per_sm times the {world.hardware.sms} SM must be at least 2, one is the OS block")
    return blocks - 1


def _blocks(world: World, knobs: Knobs) -> Blocks:
    counts = world.routing.counts
    if knobs.packing == "per_expert":
        blocks = blocks_per_expert(counts, _ladder(counts.sum(axis=0), knobs))
    else:
        blocks = blocks_per_source(counts, _ladder(counts, knobs))
    return replace(blocks, height=_computed(blocks.rows, blocks.height, knobs))


def _ladder(rows: Array, knobs: Knobs) -> Array:
    return ladder(rows, SHORTEST if knobs.ladder else knobs.tile_m, knobs.tile_m)


def _computed(rows: Array, height: Array, knobs: Knobs) -> Array:
    """The rows that a tile of this height computes."""
    return height if knobs.row_unit is None else -(-rows // knobs.row_unit) * knobs.row_unit


def _receive(draft: Draft, sent: Array, packets: tuple[Array, ...], blocks: Blocks, knobs: Knobs) -> Array:
    """The OS block of the owner sees each packet's signal and queues its tiles, or its share of those it is part of."""
    world, (source, expert) = draft.world, packets
    owner = world.routing.owner[expert]
    work = row_blocks_at_once(blocks)[source, expert] * _hand_ns(draft, knobs)
    nodes = draft.builder.add(
        RECEIVE,
        owner,
        peer=source,
        expert=draft.local[expert],
        server=draft.machine.os[owner],
        duration_ns=knobs.poll_ns + np.ceil(work),
    )
    return draft.after(sent, nodes)


def _wait_ns(world: World, knobs: Knobs) -> int:
    """What a processor waits for its next tile: a round of the OS block, in which each processor gets one."""
    return _slots(world, knobs) * _schedule_ns(world, knobs) if knobs.scheduler == "os_block" else 0


def _hand_ns(draft: Draft, knobs: Knobs) -> int:
    """The OS block's time for the tiles of a row block, before any is multiplied."""
    if knobs.scheduler == "os_block":
        return 0
    tiles = sum(draft.column_tiles(kind, knobs.tile_n) for kind in (GEMM0, GEMM1))
    return tiles * _schedule_ns(draft.world, knobs)


def _schedule_ns(world: World, knobs: Knobs) -> int:
    if knobs.schedule_ns is not None:
        return knobs.schedule_ns
    return TICKET_NS if knobs.scheduler == "tickets" else int(fitted_values("flashmoe", world.hardware.chip)[SCHEDULE])


def _results(draft: Draft, blocks: Blocks, hidden: Array, knobs: Knobs) -> tuple[Blocks, Array]:
    """What sources are told of, and of each piece of that the node with which its results are there."""
    if isinstance(blocks, CutBlocks):
        return told_by_chunks(draft, blocks, hidden, knobs.tile_m, knobs.tile_n)
    if knobs.packing == "per_source":  # pieces are blocks
        source = blocks.piece_source
        return blocks, draft.after(hidden, draft.gemm(GEMM1, blocks, knobs.tile_n, source=source))
    return blocks, draft.send_pieces(blocks, draft.after(hidden, draft.gemm(GEMM1, blocks, knobs.tile_n)))


# ---- packed as rows arrive


def _packed_as_rows_arrive(world: World, knobs: Knobs) -> TaskGraph:
    from ..engine.compiled import run

    counts = world.routing.counts
    rows = np.arange(min(knobs.tile_m, counts.sum(axis=0).max(initial=0)) + 1)
    height = _computed(rows, _ladder(rows, knobs), knobs)
    order = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
    at_once = cut_blocks(counts, order, as_if_at_once(counts, knobs.tile_m), height)
    before = blocks = [at_once] * len(world.directions)
    for _ in range(MOST_ROUNDS):
        schedule = _draw(world, knobs, blocks)
        timeline, found = run(schedule.graph, keep_runs=False), []
        for (draft, received, _), of_pass in zip(schedule.drawn, blocks, strict=True):
            rules = _rules(draft, of_pass, height, rows, knobs)
            cuts = cuts_of_all(world.routing, schedule.graph, timeline, received, draft.machine.sm, rules)
            found.append(cut_blocks(counts, *cuts, height))
        if any(all(map(CutBlocks.equals, found, others)) for others in (blocks, before)):
            break
        before, blocks = blocks, found
    return schedule.graph


def _rules(draft: Draft, blocks: CutBlocks, height: Array, rows: Array, knobs: Knobs) -> Rules:
    experts = np.arange(draft.world.routing.num_experts)[:, None]
    up_ns, down_ns = (
        draft.tile_ns(kind, experts, height, rows, blocks, knobs.tile_n).tolist() for kind in (GEMM0, GEMM1)
    )
    return Rules(
        slots=_slots(draft.world, knobs),
        tile_m=knobs.tile_m,
        tiles=(draft.column_tiles(GEMM0, knobs.tile_n), draft.column_tiles(GEMM1, knobs.tile_n)),
        tile_ns=(up_ns, down_ns),
        poll_ns=knobs.poll_ns,
        settle_ns=knobs.settle_ns,
        hand_ns=_hand_ns(draft, knobs),
    )
