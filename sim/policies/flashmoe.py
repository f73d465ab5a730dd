"""FlashMoE: one persistent kernel per rank, and nothing waits for more than its own inputs.

Gate tiles first; when a rank has gated all its tokens, blocks store each (source, expert) packet into the memory of its
owner and signal. The owner's OS block sees the signal and queues the packet's GEMM0 tiles; the last GEMM0 tile of a row
block frees its GEMM1 tiles, whose results go straight into the source's memory; a block of tokens is combined when all
its results are there. One queue per rank, first come first served, no barrier anywhere.

Source: FlashMoE (arXiv 2506.04667) sections 3 and 4, and its public code, v0.1.2.
Knobs: see `Knobs`. Leaves out: the doorbells between scheduler and processors (their cost is in `schedule_ns`), slots
that idle while a block looks for work, and the signals of empty packets, which the OS block has to see as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..drafting.blocks import Blocks, blocks_per_expert, blocks_per_source, ladder
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import GEMM0, GEMM1, RECEIVE
from ..world.world import World

FIRST = -1  # rows go before tiles, which wait for nothing else


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    blocks_per_sm: resident blocks, each of which runs one tile at a time. Of version 0.1.2's, with three stages of
        128 x 128 tiles, one fits an H100's multiprocessor; two fit an A100's, but share its tensor cores, and one slot
        of the whole is nearer than two halves. The paper's version had two.
    tile_m, tile_n: of a tile of either product.
    ladder: packets take the lowest of tile_m, half of it, ... (16 at least) that holds them, instead of always tile_m.
    packing: "per_source", or "per_expert": rows of all sources of an expert share tiles.
    gate: simulate the gate; the published v0.1.2 benchmark leaves it out.
    dispatch_rows: rows of a packet that one block stores at a time.
    row_unit: rows that are multiplied together: a tile computes its real rows, rounded up to whole units; None: all of
        its height, padding included.
    async_loads: a tile's operands are read while products run; False: before them, as on CPUs.
    poll_ns, schedule_ns: the OS block's time per packet, and per tile that it hands out; assumptions.
    """

    blocks_per_sm: int = 1
    tile_m: int = 128
    tile_n: int = 128
    ladder: bool = False
    packing: str = "per_source"
    gate: bool = True
    dispatch_rows: int = 32
    row_unit: int | None = None
    async_loads: bool = True
    poll_ns: int = 300
    schedule_ns: int = 10

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"packing": ("per_source", "per_expert")}


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    slots = world.hardware.sms * knobs.blocks_per_sm - 1  # one is the OS block
    draft = Draft(world, knobs, "flashmoe", slots, async_loads=knobs.async_loads)
    blocks = _blocks(world, knobs)
    launched = draft.launch()
    gated = draft.gate(launched) if knobs.gate else launched
    hidden, results = _experts(draft, blocks, knobs)
    packets = np.nonzero(world.routing.counts)
    received = np.full(world.routing.counts.shape, NONE, np.int32)
    sent = draft.dispatch(gated, packets, knobs.dispatch_rows, FIRST)
    received[packets] = _receive(draft, sent, packets, blocks, knobs)
    draft.builder.edge(received[blocks.piece_source, blocks.expert[blocks.piece_block]], hidden[blocks.piece_block])
    draft.combine(blocks, results, gated)
    return draft.builder.build()


def _blocks(world: World, knobs: Knobs) -> Blocks:
    counts = world.routing.counts
    shortest = 16 if knobs.ladder else knobs.tile_m
    if knobs.packing == "per_expert":
        blocks = blocks_per_expert(counts, ladder(counts.sum(axis=0), shortest, knobs.tile_m))
    else:
        blocks = blocks_per_source(counts, ladder(counts, shortest, knobs.tile_m))
    if knobs.row_unit is None:
        return blocks
    return replace(blocks, height=-(-blocks.rows // knobs.row_unit) * knobs.row_unit)


def _receive(draft: Draft, sent: Array, packets: tuple[Array, ...], blocks: Blocks, knobs: Knobs) -> Array:
    """The OS block of the owner sees each packet's signal and queues its tiles, or its share of those it is part of."""
    world, (source, expert) = draft.world, packets
    owner = world.routing.owner[expert]
    share = 1 / np.bincount(blocks.piece_block)[blocks.piece_block]
    row_blocks = np.diff(np.append(0, np.cumsum(share))[np.append(blocks.piece_start.ravel(), len(share))])
    tiles = sum(-(-columns // knobs.tile_n) for columns in (world.up_columns, world.config.hidden))
    work = row_blocks.reshape(world.routing.counts.shape)[source, expert] * tiles * knobs.schedule_ns
    nodes = draft.builder.add(
        RECEIVE,
        owner,
        peer=source,
        expert=draft.local[expert],
        server=draft.machine.os[owner],
        duration_ns=knobs.poll_ns + np.ceil(work),
    )
    return draft.after(sent, nodes)


def _experts(draft: Draft, blocks: Blocks, knobs: Knobs) -> tuple[Array, Array]:
    """GEMM0 of each row block, and of each piece the node with which its results are at their source."""
    hidden = draft.gemm(GEMM0, blocks, knobs.tile_n)
    if knobs.packing == "per_source":  # pieces are blocks
        source = blocks.piece_source
        return hidden, draft.after(hidden, draft.gemm(GEMM1, blocks, knobs.tile_n, source=source))
    return hidden, draft.send_pieces(blocks, draft.after(hidden, draft.gemm(GEMM1, blocks, knobs.tile_n)))
