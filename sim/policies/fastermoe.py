"""FasterMoE, and Tutel: the layer cut into steps, so that one step's sends run beside another's products.

The host reads the counts first. Then a stream of sends and one of products: S_0, S_1, ... S_n-1, R_0, ... R_n-1 on the
one, C_0, ... C_n-1 on the other, each stream in order; C_j (the experts on the rows that came with S_j) waits for S_j,
and R_j (their results go back) for C_j. A send needs both sides to have come to it. FasterMoE's step j is between each
group of ranks and the j-th group after it, each local expert by kernels of its own; Tutel's is an equal part of every
packet between all ranks, all local experts in one. FasterMoE may shadow busy experts: after the last S their weights
go to all ranks, which compute their own rows of them after the last C.
A shared expert, which neither has, is three kernels before the gate.

Source: FasterMoE (PPoPP 2022) sections 4 and 5 and laekov/fastmoe; Tutel (arXiv 2206.03382) section 4.2; the floor of a
send from data/nccl_nvshmem.csv: 4.7 to 8.9 us for small NCCL calls within a node.
Knobs: see `Knobs`. Leaves out: capacity factors and their padding, Tutel's search for the number of parts and its
two-level all-to-all, that multiprocessors which send are free for products when nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..drafting.blocks import Blocks, tuned_blocks
from ..drafting.draft import Draft
from ..drafting.knobs import PolicyKnobs
from ..drafting.shadow import choose_shadows, shadowed
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..engine.kinds import SEND
from ..world.world import World


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    tile_m, tile_n: of a tile of either product; rows are packed over the sources of a step. Default: assumption: the
        usual tile of large products.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves. Default: assumption:
        as tuners and libraries' heuristics choose them.
    cut: "groups" of ranks (FasterMoE) or "rows" (Tutel). Default: choice.
    group_size: ranks of a group; more than there are is all of them. Default: laekov/fastmoe's.
    degree: parts into which "rows" cuts each packet. Default: assumption: the fewest that overlap.
    shadow: shadow busy experts, as many as `sim.drafting.shadow` predicts to pay. Default: choice.
    comm_sms: multiprocessors that send, and that products cannot have. Default: the fewest of the 16 to 32 that NCCL
        takes.
    send_ns: floor of one call that sends; a step of groups makes one for each local expert. Default: the slowest of
        small NCCL calls within a node, 4.7 to 8.9 us (data/nccl_nvshmem.csv).
    collective_ns: floor of the exchange of counts. Default: 30 to 41 us for few tokens on 8 H100
        (data/nccl_nvshmem.csv).
    """

    tile_m: int = 128
    least_tile_m: int = 16
    tile_n: int = 256
    cut: str = "groups"
    group_size: int = 4
    degree: int = 2
    shadow: bool = False
    comm_sms: int = 16
    send_ns: int = 9000
    collective_ns: int = 30_000

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"cut": ("groups", "rows")}


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph.

    Raises:
        ValueError: groups of unequal size, or no multiprocessor left for products.
    """
    _check(world, knobs)
    slots = world.hardware.sms - knobs.comm_sms
    draft = Draft(world, knobs, "fastermoe", slots)
    shadows = choose_shadows(world, draft.cost.rate) if knobs.shadow else np.empty(0, np.int64)
    if shadows.size:
        draft = Draft(shadowed(world, shadows), knobs, "fastermoe", slots)
    _fill(draft, shadows, knobs)
    return draft.builder.build()


def _check(world: World, knobs: Knobs) -> None:
    if knobs.comm_sms >= world.hardware.sms:
        raise ValueError(f"comm_sms must be less than the {world.hardware.sms} of the GPU, got {knobs.comm_sms}")
    if knobs.cut == "groups" and world.num_ranks % min(knobs.group_size, world.num_ranks):
        raise ValueError(f"group_size must divide num_ranks={world.num_ranks}, got {knobs.group_size}")


def _fill(draft: Draft, shadows: Array, knobs: Knobs) -> None:
    """All nodes, in the order in which the host launches them."""
    world = draft.world
    counts, precision, owner = world.routing.counts, world.precision, world.routing.owner
    is_copy = np.arange(len(owner)) >= len(owner) - len(shadows) * world.num_ranks
    steps = _steps(world, np.where(is_copy, 0, counts), knobs)
    packed = _pack(draft, knobs)
    sends = _Sends(draft, knobs, packed)
    arrived = [sends.swap(None, world.routing.traffic(step), precision.token_bytes) for step in steps]
    for rank in owner[shadows]:
        sends.broadcast(rank)
    weights, computed, results = sends.last, packed, []
    for step, rows in zip(steps, arrived, strict=True):
        computed = _compute(draft, step, computed, rows, knobs)
        results.append(computed)
    if shadows.size:
        computed = _compute(draft, np.where(is_copy, counts, 0), computed, weights, knobs)
    for step, ready in zip(steps, results, strict=True):
        sends.swap(ready, world.routing.traffic(step).T, precision.result_bytes)
    draft.combine_kernel(draft.begin([sends.last, computed]))


def _steps(world: World, counts: Array, knobs: Knobs) -> list[Array]:
    """The part of `counts` `[num_ranks, num_experts]` that is sent in each step."""
    if knobs.cut == "rows":
        ends = np.arange(knobs.degree + 1)[:, None, None] * counts // knobs.degree
        return list(np.diff(ends, axis=0))
    size = min(knobs.group_size, world.num_ranks)
    group, groups = np.arange(world.num_ranks) // size, world.num_ranks // size
    distance = (group[world.routing.owner] - group[:, None]) % groups
    return [np.where(distance == step, counts, 0) for step in range(groups)]


def _pack(draft: Draft, knobs: Knobs) -> Array:
    """`[num_ranks]`: counts are known, and the rows lie in the order of their experts."""
    world = draft.world
    gated = draft.gate(draft.begin(shared_kernels(draft, None, (knobs.tile_m, knobs.tile_n))))
    counted = draft.exchange_counts(draft.begin(gated), knobs.collective_ns)
    rows = world.routing.counts.sum(axis=1)
    return draft.stream(draft.begin(counted), rows * world.config.hidden * world.precision.token_bytes)


def _compute(draft: Draft, counts: Array, before: Array, rows: Array, knobs: Knobs) -> Array:
    """`[num_ranks]`: the experts have done the rows of `counts`, which are there after `rows`."""
    done = draft.all_of(before, rows)
    for blocks in _kernels(draft, counts, knobs):
        _, done = draft.ffn(done, blocks, knobs.tile_n, knobs.tile_m)
    return done


def _kernels(draft: Draft, counts: Array, knobs: Knobs) -> list[Blocks]:
    """Row blocks of each local expert's kernels, or of those of all experts."""
    if knobs.cut == "rows":
        return [tuned_blocks(counts, knobs.tile_m, knobs.least_tile_m)]
    busy = np.unique(draft.local[counts.any(axis=0)])
    return [
        tuned_blocks(np.where(draft.local == expert, counts, 0), knobs.tile_m, knobs.least_tile_m) for expert in busy
    ]


class _Sends:
    """The stream of sends: a call begins on a rank when the one before is complete; `last` is that, `[num_ranks]`."""

    def __init__(self, draft: Draft, knobs: Knobs, after: Array) -> None:
        self.draft = draft
        self.last = after
        self.calls = 1 if knobs.cut == "rows" else draft.world.config.num_experts_per_rank
        self.send_ns = knobs.send_ns

    def swap(self, ready: Array | None, rows: Array, element_bytes: float) -> Array:
        """`rows` `[num_ranks, num_ranks]`, from and to, are exchanged as soon as both sides are `ready` and here."""
        source, target = np.nonzero(rows)
        nbytes = rows[source, target] * self.draft.world.config.hidden * element_bytes
        return self._call(ready, source, target, nbytes, self.calls)

    def broadcast(self, owner: int) -> Array:
        """An expert's weights go from its owner around the ring of ranks, in pieces so small that all send at once."""
        ranks = self.draft.world.num_ranks
        ring = (owner + np.arange(ranks)) % ranks
        nbytes = self.draft.world.weight_bytes / self.draft.world.experts_per_rank
        return self._call(None, ring[:-1], ring[1:], np.full(ranks - 1, nbytes), 1)

    def _call(self, ready: Array | None, source: Array, target: Array, nbytes: Array, calls: int) -> Array:
        draft = self.draft
        begun = draft.begin(self.last, calls * draft.world.hardware.launch_ns)
        draft.after(ready, begun)
        sends = draft.send(SEND, source, target, nbytes, duration_ns=calls * self.send_ns)
        draft.builder.edge(begun[target], sends)
        self.last = draft.kernel(begun, sends, source)
        draft.builder.edge(sends, self.last[target])
        return self.last
