"""ScMoE, as in LongCat-Flash: the MoE layer runs beside the dense work of its block, which does not need its result.

A block is attention, dense FFN, attention, dense FFN; by a shortcut, the MoE layer takes what the first attention gives
and its result is added at the end. So the dispatch of the rows runs beside the first dense FFN and the projection to
queries, keys and values, the expert products run alone, and the return of the results runs beside the rest of the
second attention and its FFN. Some experts are zero-computation: a choice of them adds weight times the token where it
is, without dispatch or product, so tokens have different numbers of rows. A shared expert, which LongCat-Flash has
none of, is three kernels beside the dispatch, before the products. What is simulated starts after the first
attention; its makespan is the latency of the rest of the block.

Source: LongCat-Flash technical report (arXiv 2509.01322), and "LongCat-Flash: Deploying Meituan's Agentic Model with
SGLang" (lmsys.org, 2025-09-01) for the order; 256 of its 768 experts are zero-computation.
Knobs: see `Knobs`. Choices become zero experts at random, by a seed. Transfers take no slots. Leaves out: the attention
over the sequence (its projections are those of plain attention), tensor parallelism of the dense work, norms, sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from reference.arrays import stream

from ..drafting.blocks import tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import DENSE, GEMM0, GEMM1
from ..world import streams
from ..world.routing import SimRouting
from ..world.world import World

DENSE_STAGES = ("ffn", "qkv", "output", "ffn")


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of any product. Default: assumption: the usual tile of large products.
    least_tile_m: where rows of experts are few, their tiles are lower, this at least, and as wide as fills waves.
        Default: assumption: as tuners and libraries' heuristics choose them.
    zero_share: share of the choices, in [0, 1], that are of zero-computation experts. Default: choice: none, so that
        all policies compute the same; LongCat-Flash has about a third.
    zero_seed: which ones. Default: choice.
    dense_ffn: inner size of the dense FFNs; None: twice the hidden size. Default: as in LongCat-Flash.
    overlap: the dense work runs beside the MoE layer; if not, after it. Default: as in ScMoE.
    order: "staged", as above; "free": neither waits for the other. Default: as in LongCat-Flash with SGLang.
    stages_beside_dispatch: of `DENSE_STAGES`, how many run beside the dispatch where staged; the rest come later.
        Default: as in LongCat-Flash with SGLang.
    first: "moe" or "dense", whose tiles take free slots first; the other has those that are idle. Default: assumption.
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 128
    zero_share: float = 0.0
    zero_seed: int = 1
    dense_ffn: int | None = None
    overlap: bool = True
    order: str = "staged"
    stages_beside_dispatch: int = 2
    first: str = "moe"

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"order": ("staged", "free"), "first": ("moe", "dense")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.zero_share <= 1:
            raise ValueError(f"zero_share must be in [0, 1], got {self.zero_share}")
        if self.stages_beside_dispatch > len(DENSE_STAGES):
            rule = f"must be in [1, {len(DENSE_STAGES)}]"
            raise ValueError(f"stages_beside_dispatch {rule}, got {self.stages_beside_dispatch}")


def with_zero_experts(routing: SimRouting, share: float, seed: int) -> SimRouting:
    """The routing in which each choice is, with probability `share`, of a zero-computation expert: -1."""
    zero = stream(seed, streams.ZERO_EXPERTS).random(routing.topk_idx.shape) < share
    return replace(routing, topk_idx=np.where(zero, np.int32(-1), routing.topk_idx))


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph."""
    routing = with_zero_experts(world.routing, knobs.zero_share, knobs.zero_seed)
    draft = Draft(replace(world, routing=routing), knobs, "scmoe", world.hardware.sms)
    copies = (routing.topk_idx != world.routing.topk_idx).any(axis=2).sum(axis=1)  # tokens with a zero expert
    if not knobs.overlap:
        experts = _experts(draft, _dispatch(draft, draft.gate(_begin(draft)), knobs), knobs)
        _dense(draft, _combine(draft, experts, copies), DENSE_STAGES, knobs)
        return draft.builder.build()
    staged = knobs.order == "staged"
    beside, later = DENSE_STAGES[: knobs.stages_beside_dispatch], DENSE_STAGES[knobs.stages_beside_dispatch :]
    begun = _begin(draft)
    gated = draft.gate(begun)
    sent = _dispatch(draft, gated, knobs)
    dense = _dense(draft, gated if staged else begun, beside, knobs)
    experts = _experts(draft, draft.all_of(sent, dense) if staged else sent, knobs)
    _dense(draft, draft.all_of(dense, experts) if staged else dense, later, knobs)
    _combine(draft, experts, copies)
    return draft.builder.build()


def _begin(draft: Draft, after: ArrayLike | None = None) -> Array:
    """A kernel of a CUDA graph begins."""
    return draft.begin(after, draft.world.hardware.graph_launch_ns)


def _dispatch(draft: Draft, gated: Array, knobs: Knobs) -> Array:
    """`[num_ranks]`: the rows are there, and the shared expert is done."""
    sent = draft.collective(_begin(draft, gated), draft.world.dispatch_bytes)
    shared = shared_kernels(draft, gated, (knobs.tile_m, knobs.tile_n), partial(_begin, draft))
    return sent if shared is gated else draft.all_of(sent, shared)


def _experts(draft: Draft, after: Array, knobs: Knobs) -> Array:
    """`[num_ranks]`: both products, a kernel each."""
    routing = draft.world.routing
    blocks = tuned_blocks(routing.counts, knobs.tile_m, knobs.least_tile_m)
    owner = routing.owner[blocks.expert]
    up, down = (draft.tuned_width(kind, blocks, knobs.tile_m, knobs.tile_n) for kind in (GEMM0, GEMM1))
    hidden = draft.kernel(_begin(draft, after), draft.gemm(GEMM0, blocks, up), owner)
    return draft.kernel(_begin(draft, hidden), draft.gemm(GEMM1, blocks, down), owner)


def _combine(draft: Draft, experts: Array, copies: Array) -> Array:
    returned = draft.collective(_begin(draft, experts), draft.world.combine_bytes)
    return draft.combine_kernel(_begin(draft, returned), copies)


def _dense(draft: Draft, after: Array, stages: tuple[str, ...], knobs: Knobs) -> Array:
    """`[num_ranks]`: these stages of dense work on all tokens of a rank."""
    config = draft.world.config
    inner = 2 * config.hidden if knobs.dense_ffn is None else knobs.dense_ffn
    up = inner * config.expert_kind.num_ups
    products = {  # columns and depth
        "ffn": ((up, config.hidden), (config.hidden, inner)),
        "qkv": ((3 * config.hidden, config.hidden),),
        "output": ((config.hidden, config.hidden),),
    }
    for stage in stages:
        for columns, depth in products[stage]:
            after = _product(draft, _begin(draft, after), columns, depth, knobs)
    return after


def _product(draft: Draft, begun: Array, columns: int, depth: int, knobs: Knobs) -> Array:
    tokens = draft.world.routing.num_tokens
    tile_m, tile_n = min(knobs.tile_m, tokens), min(knobs.tile_n, columns)
    row_blocks = -(-tokens // tile_m)
    count = row_blocks * -(-columns // tile_n)
    nodes = draft.builder.add(
        DENSE,
        draft.ranks,
        count=count,
        server=draft.machine.sm,
        priority=1 if knobs.first == "moe" else -1,
        duration_ns=draft.cost.tile(tile_m, tile_n, depth, count, draft.cost.reuse(row_blocks, columns, depth, tile_n)),
        flops=2 * tile_m * tile_n * depth,
        useful_flops=2 * tokens * columns * depth / count,
    )
    return draft.after(begun, nodes)
