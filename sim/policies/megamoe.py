"""MegaMoE: one kernel that pulls rows while it multiplies, expert after expert, and pushes results to their tokens.

Ranks tell each other how many rows each expert gets, and meet in a barrier. Then every multiprocessor runs two engines
side by side: one pulls the rows of the local experts into a pool, expert by expert, the sources in turn; the other
multiplies, in waves of experts: the first products of a wave, then its second ones, whose results go to the token's
rank, into a slot of their own for each choice. A second barrier, and each rank adds up its slots in fixed order.
Row tiles hold rows of all sources of an expert, and are as high as the expected rows per expert ask for.

A shared expert is three kernels before: the fused one takes all multiprocessors.

Split in two kernels (Hopper): the second products begin when the first are all done; tiles have 64 rows always.
Fused, on Blackwell: two multiprocessors work on neighbouring tiles and share the reading of their rows. On Hopper each
has a tile of its own, of more rows or columns, as results are in registers, and one wave mostly has all experts.

Source: DeepGEMM, the public code deepseek-ai/DeepGEMM: MegaMoE's kernels, its heuristics for tiles and experts per wave
(pull requests 304 and 316; 383 for Hopper, whose kernels are split, and as one kernel pull request 36 of
sgl-project/DeepGEMM).
Knobs: see `Knobs`. Leaves out: the pool's size (a ring whose slots are used again), results that leave tile by tile
instead of row block by row block, that tiles wait in their slot for rows, and the
exceptions in Hopper's table of tile shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..drafting.blocks import Blocks, blocks_per_expert, ladder
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import DISPATCH, GEMM0, GEMM1
from ..world.world import World

TILE_HEIGHTS = ((8.5, 16), (16.5, 32), (32.5, 64), (64.5, 96), (96.5, 128), (float("inf"), 192))  # up to so many rows
HOPPER_HEIGHT = 64  # of a tile: a warp group's product
TALL_FROM = 64  # expected rows, from which on Hopper's fused tiles have 128 rows of 256 columns
SHARED_TILE_HEIGHT = 128  # the shared expert has all tokens of a rank
WIDE_FFN = 2560  # from here on, the first of two kernels on Hopper has tiles of 512 columns
BLACKWELL_UNIT = 16  # rows, as a product's instruction takes as many columns as there are, in steps of 16
MOST_SWAPPED, LEAST_SWAPPED = (
    128,
    8,
)  # on Hopper: tokens of a rank up to which it has such instructions, and rows of one
LARGE_FFN = 3072  # from here on, Hopper's fused tiles are wide, too, where rows are few
FEW_ROWS = 0.25  # expected, but not so few
MOST_IN_WAVES = 4  # expected rows, up to which Hopper's fused kernel has waves of some of the experts


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    split: two kernels instead of one. Default: choice: published tables are of either.
    tile_m: rows of a tile; None: 64 split, else by the expected rows per expert: 16 to 192, on Hopper 64 or 128.
        Default: DeepGEMM's heuristics.
    pad: tiles multiply their padding. None: not where products' instructions have rows for columns, so that as many
        are multiplied as there are, in steps of 16 on Blackwell, and of 8, 16, 32 or 64 on Hopper, up to 128 tokens of
        a rank; but where `tile_m` is set. Default: as in DeepGEMM.
    tile_n: columns of a tile of either product; None: by `tile_columns`. Default: DeepGEMM's heuristics.
    cluster: multiprocessors side by side that share the reading of a row tile; None: 2 on Blackwell, else 1. Default:
        as in DeepGEMM.
    experts_per_wave: None: the fewest local experts whose first products fill the GPU twice; on Hopper all, but for a
        few expected rows. Default: DeepGEMM's heuristics.
    pull_rows: rows that one multiprocessor pulls at a time. Default: one per pulling warp of DeepGEMM's kernel.
    reduce: "slots": results are summed when all are there; "add": they are added to their token where they arrive.
        Default: as in DeepGEMM.
    exchange_ns, tail_ns: until all ranks know what comes, beside the way of the counts; and from a rank's last result
        until all are published (8 us) and drained (15 to 18). Default: of FlashInfer's kernel on eight B200, by its
        markers (data/moe_ep_2026.csv); an assumption for DeepGEMM's and on other GPUs.
    cuda_graph: the host's launches are hidden, as where kernels are timed back to back. Default: choice.
    gate: simulate the gate; the published figures leave it out. Default: choice.
    """

    split: bool = False
    tile_m: int | None = None
    pad: bool | None = None
    tile_n: int | None = None
    cluster: int | None = None
    experts_per_wave: int | None = None
    pull_rows: int = 4
    reduce: str = "slots"
    exchange_ns: int = 14_000
    tail_ns: int = 24_500
    cuda_graph: bool = False
    gate: bool = True

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"reduce": ("slots", "add")}


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    cluster = knobs.cluster or (2 if is_blackwell(world) and not knobs.split else 1)
    draft = Draft(
        world,
        knobs,
        "megamoe",
        world.hardware.sms,
        cuda_graph=knobs.cuda_graph,
        cluster=cluster,
    )
    height = tile_height(world, knobs)
    routing = world.routing
    order = (routing.owner + draft.ranks[:, None]) % world.num_ranks  # the own rows first
    blocks = blocks_per_expert(routing.counts, height, order)
    blocks = replace(blocks, height=multiplied_rows(world, blocks.rows, height, knobs))
    gated = draft.gate(draft.begin()) if knobs.gate else None
    shared = shared_kernels(draft, gated, (SHARED_TILE_HEIGHT, tile_columns(world, knobs)[1]))
    met = draft.barrier(draft.exchange(draft.begin(shared), draft.count_bytes(), 0), knobs.exchange_ns)
    results = _experts(draft, blocks, met, height, knobs)
    arrived = draft.barrier(np.concatenate([results, met]), knobs.tail_ns)
    if knobs.reduce == "slots":
        draft.combine_kernel(arrived)
    return draft.builder.build()


def expected_rows(world: World) -> float:
    """Rows per expert, if they are spread evenly."""
    return world.num_ranks * world.routing.num_tokens * world.config.num_topk / world.routing.num_experts


def tile_height(world: World, knobs: Knobs) -> int:
    """Rows of every tile."""
    if knobs.tile_m is not None:
        return knobs.tile_m
    if knobs.split:
        return HOPPER_HEIGHT
    if not is_blackwell(world):
        return 2 * HOPPER_HEIGHT if expected_rows(world) >= TALL_FROM else HOPPER_HEIGHT
    return next(height for most, height in TILE_HEIGHTS if expected_rows(world) <= most)


def is_blackwell(world: World) -> bool:
    """Whether the GPU is a Blackwell: Hopper has no fp4."""
    return "fp4" in world.hardware.tflops


def multiplied_rows(world: World, rows: Array, height: int, knobs: Knobs) -> Array:
    """Rows that tiles of `height` multiply, of which `rows` are real."""
    few = height == HOPPER_HEIGHT and world.routing.num_tokens <= MOST_SWAPPED
    pad = knobs.tile_m is not None or not (is_blackwell(world) or few) if knobs.pad is None else knobs.pad
    if pad:
        return np.full_like(rows, height)
    return -(-rows // BLACKWELL_UNIT) * BLACKWELL_UNIT if is_blackwell(world) else ladder(rows, LEAST_SWAPPED, height)


def tile_columns(world: World, knobs: Knobs) -> tuple[int, int]:
    """Columns of a tile of the first and of the second product.

    Fused: 128, on Hopper also 256. Split: few rows take narrow tiles, whose products swap rows and columns; a large
    ffn takes wide ones.
    """
    if knobs.tile_n is not None:
        return knobs.tile_n, knobs.tile_n
    if not knobs.split:
        columns = 256 if _is_wide(world) else 128
        return columns, columns
    wide = world.config.ffn >= WIDE_FFN
    if expected_rows(world) <= (8 if wide else 12):
        return 128, 128
    return (512 if wide else 256), 256


def _is_wide(world: World) -> bool:
    """Whether fused tiles have 256 columns."""
    rows = expected_rows(world)
    return not is_blackwell(world) and (rows >= TALL_FROM or (world.config.ffn >= LARGE_FFN and rows >= FEW_ROWS))


def experts_per_wave(world: World, height: int, slots: int, knobs: Knobs) -> int:
    """The fewest local experts whose first products fill the slots twice, as they may get fewer rows than expected."""
    local = world.experts_per_rank
    if knobs.experts_per_wave is not None:
        return min(knobs.experts_per_wave, local)
    if expected_rows(world) < 1 or not (is_blackwell(world) or knobs.split or expected_rows(world) <= MOST_IN_WAVES):
        return local
    row_blocks = -(-int(np.ceil(expected_rows(world))) // height)
    tiles = row_blocks * -(-world.up_columns // tile_columns(world, knobs)[0])
    fewest = min(local, -(-2 * slots // tiles))
    return next(number for number in range(fewest, local + 1) if local % number == 0)


def _experts(draft: Draft, blocks: Blocks, met: Array, height: int, knobs: Knobs) -> Array:
    """`[num_pieces]`: results of each piece are at their source."""
    local, owner = draft.local[blocks.expert], draft.world.routing.owner[blocks.expert]
    wave = local // experts_per_wave(draft.world, height, draft.cost.slots, knobs)
    columns = tile_columns(draft.world, knobs)
    first = draft.gemm(GEMM0, blocks, columns[0], priority=2 * wave)
    second = draft.gemm(GEMM1, blocks, columns[1], priority=2 * wave + 1)
    draft.builder.edge(_pull(draft, blocks, met, knobs), first[blocks.piece_block])
    before = first
    if knobs.split:
        begun = draft.begin(draft.after(met, draft.gather(first, owner)))  # launched while the first kernel runs
        before = draft.gap(begun)[owner]
    return draft.send_pieces(blocks, draft.after(before, second))


def _pull(draft: Draft, blocks: Blocks, met: Array, knobs: Knobs) -> Array:
    """`[num_pieces]`: pull engines fetch the rows of each piece, in the order of the owner's experts and row blocks."""
    world = draft.world
    engines = draft.servers("pull engines", world.hardware.sms)
    block, source = blocks.piece_block, blocks.piece_source
    local, owner = draft.local[blocks.expert[block]], world.routing.owner[blocks.expert[block]]
    tasks = -(-blocks.piece_rows // knobs.pull_rows)
    nbytes = blocks.piece_rows / tasks * world.config.hidden * world.precision.token_bytes
    order = local * (blocks.m.max(initial=0) + 1) + blocks.m[block]
    pulls = draft.send(
        DISPATCH,
        source,
        owner,
        nbytes,
        expert=local,
        m=blocks.m[block],
        count=tasks,
        server=engines[owner],
        priority=np.minimum(order, 2**20 - 1),
        duration_ns=np.ceil(nbytes / world.hardware.sm_read_gbps),
    )
    return draft.after(met[owner], pulls)
