"""DeepEP with grouped products: dispatch, experts and combine as kernels, of which few multiprocessors communicate.

Normal mode: ranks exchange their counts, which the host waits for; then a dispatch kernel on `comm_sms` multiprocessors
sends each token's row once to each rank it goes to, over NVLink, and once to each node, over the network, where a relay
forwards it (`sim.drafting.hops`). The rows are spread out by expert, and multiplied in row blocks packed over all
sources, with the activation between the products; the results of a token on one rank are summed, sent back the same way
by a combine kernel, summed at the relay and at the source. With two micro-batches, communication of one runs beside the
experts of the other, which then have `comm_sms` multiprocessors less.

A shared expert is three kernels beside the dispatch, where SGLang has them when it decodes (beside the combine else).

A backward is normal mode with dispatch and combine in each other's places: gradients of results are dispatched by the
forward's layout, which is kept, so nothing is counted and no host waits; each product becomes two, of gradients of rows
and of weights; gradients of tokens are combined. The shared expert and the router come last.

Low-latency mode: a row goes straight to each of its experts, and each result straight back; kernels are nodes of a CUDA
graph, no host waits, and no multiprocessor is needed while rows are on their way (DeepEP's receiving hook), so that
two micro-batches take nothing from each other. Results go back when all are there, or row block by row block.

Source: deepseek-ai/DeepEP: docs/legacy.md (V1), tests/test_internode.py, and for the number of multiprocessors
`comm_sms.py` beside this file (V2); DeepGEMM's contiguous layout with row blocks of 128.
Knobs: see `Knobs`. Leaves out: the copy from a receive buffer to its place, queues of the NIC, quantising of rows,
multiprocessors that communicate and are free again while the other micro-batch still computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from ..drafting.backward import GradientTile, backward_kernels, dense_kernels, reduce_gradients
from ..drafting.blocks import tuned_blocks
from ..drafting.comm_sms import analytic_comm_sms
from ..drafting.draft import Draft
from ..drafting.hop_kernels import HopKernels
from ..drafting.knobs import PolicyKnobs
from ..drafting.passes import backward_pass
from ..drafting.shared import shared_kernels
from ..engine.graph import Array, TaskGraph
from ..world.world import BACKWARD, FORWARD, TRAINING, World
from ..world.world import PASSES as PASSES

FEW_TOKENS = 256
MASKED_TILE_M = 64  # DeepGEMM's lowest on Hopper


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """Args:
    mode: "normal" or "low_latency"; None: low_latency below 256 tokens of a rank. A backward has the normal mode only.
        Default: the batches that DeepEP means its low-latency kernels for.
    stages: what is simulated: the whole "layer", or "dispatch" or "combine" alone, as DeepEP's tests time them, with a
        layout that is known and kernels that are launched already. Default: choice.
    comm_sms: multiprocessors of normal mode's kernels; None: see `analytic_comm_sms`. Default: DeepEP V2's count.
    micro_batches: 1, or 2 halves of the tokens. Default: choice.
    combine: "kernel", or "row_block": results leave as soon as their row block is done (low-latency mode only).
        Default: as in DeepEP.
    chunk_rows: rows that one multiprocessor sends at a time. Default: assumption.
    window_rows: rows under way between two ranks. Default: DeepEP's receive buffers hold 128 to 512.
    tile_m, tile_n: of a tile of either product. Default: row blocks of DeepGEMM's contiguous layout; that they are as
        wide is an assumption.
    least_tile_m: where rows are few, tiles are lower, this at least, and as wide as fills waves; None: 64 with
        low_latency, else tile_m. Default: DeepGEMM's masked products, and what its contiguous layout is aligned to.
    cluster: multiprocessors side by side that share the reading of a row tile. Default: as DeepGEMM's multicast.
    gate: simulate the gate, and its gradients; published figures of layers leave it out. Default: choice.
    """

    mode: str | None = None
    stages: str = "layer"
    comm_sms: int | None = None
    micro_batches: int = 1
    combine: str = "kernel"
    chunk_rows: int = 16
    window_rows: int = 256
    tile_m: int = 128
    least_tile_m: int | None = None
    tile_n: int = 128
    cluster: int = 2
    gate: bool = True

    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "mode": ("normal", "low_latency"),
        "stages": ("layer", "dispatch", "combine"),
        "combine": ("kernel", "row_block"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batches > 2:
            raise ValueError(f"micro_batches must be 1 or 2, got {self.micro_batches}")
        if self.window_rows < self.chunk_rows:
            raise ValueError(f"window_rows must be at least chunk_rows={self.chunk_rows}, got {self.window_rows}")
        if self.combine == "row_block" and self.mode == "normal":
            raise ValueError("combine must be kernel in mode normal, which sums results before it sends; got row_block")

    def in_world(self, world: World) -> Self:
        few = world.routing.num_tokens < FEW_TOKENS and world.passes == FORWARD
        mode = self.mode or ("low_latency" if few else "normal")
        least = MASKED_TILE_M if mode == "low_latency" else self.tile_m
        return replace(self, mode=mode, least_tile_m=least if self.least_tile_m is None else self.least_tile_m)


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph.

    Raises:
        ValueError: communication leaves no multiprocessor, there are too few tokens to cut, or a backward is asked for
            in low-latency mode, or in parts.
    """
    if world.passes != FORWARD and (knobs.mode, knobs.stages) != ("normal", "layer"):
        got = f"mode={knobs.mode} and stages={knobs.stages}"
        raise ValueError(f"mode must be normal, and stages layer, where passes is {world.passes}; got {got}")
    if knobs.micro_batches > world.routing.num_tokens:
        raise ValueError(
            f"micro_batches must be at most num_tokens={world.routing.num_tokens}, got {knobs.micro_batches}"
        )
    if knobs.mode == "normal" and knobs.stages == "layer":
        return _passes(world, knobs)
    batches: Sequence[_Normal | _LowLatency] = (
        _low_latency(world, knobs) if knobs.mode == "low_latency" else _normal(world, knobs)
    )
    if knobs.stages == "layer":
        _layer(batches, knobs)
    else:
        last = batches[0].draft.idle()
        for batch in batches:
            last = batch.dispatch(batch.meet(last)) if knobs.stages == "dispatch" else batch.combine(last)
    return batches[0].draft.builder.build()


def _passes(world: World, knobs: Knobs) -> TaskGraph:
    """Normal mode, one pass after the other."""
    batches = _normal(world, knobs)
    draft = batches[0].draft
    last: Array | None = None
    if FORWARD in world.directions:
        last = _layer(batches, knobs)
    if BACKWARD in world.directions:
        ended = _layer_back(batches, last, knobs)
        if world.passes == TRAINING:
            reduce_gradients(draft, ended)
    return draft.builder.build()


def _layer_back(batches: Sequence[_Normal], last: Array | None, knobs: Knobs) -> Array:
    """Two streams, as in a forward."""
    first = batches[0].draft.idle() if last is None else last
    computed, sent = [first], first
    for batch in batches:
        batch.turn_back()
        sent = batch.dispatch(batch.meet(batch.draft.begin(sent)))
        computed.append(batch.experts_back([computed[-1], sent], knobs))
    for batch, ready in zip(batches, computed[1:], strict=True):
        sent = batch.combine(batch.draft.begin([sent, ready]))
    tile = GradientTile(knobs.tile_m, knobs.tile_n)
    for batch in batches:
        sent = dense_kernels(batch.draft, sent, (knobs.tile_m, knobs.tile_n), tile, router=knobs.gate)
    return sent


def _layer(batches: Sequence[_Normal | _LowLatency], knobs: Knobs) -> Array:
    """Two streams: the gates and experts of all micro-batches, and their dispatches, then their combines."""
    gated = [batches[0].draft.idle()]
    for batch in batches:
        gated.append(batch.draft.gate(batch.draft.begin(gated[-1])) if knobs.gate else gated[-1])
    computed, sent = gated[-1:], gated[0]
    for batch, ready in zip(batches, gated[1:], strict=True):
        sent = batch.dispatch(batch.notify([ready, sent]))
        shared = shared_kernels(batch.draft, computed[-1], (knobs.tile_m, knobs.tile_n))
        computed.append(batch.experts([shared, sent]))
    for batch, ready in zip(batches, computed[1:], strict=True):
        sent = batch.combine(batch.draft.begin([sent, batch.results(ready)]))
    return sent


def _normal(world: World, knobs: Knobs) -> list[_Normal]:
    comm_sms = analytic_comm_sms(world) if knobs.comm_sms is None else knobs.comm_sms
    if comm_sms >= world.hardware.sms:
        raise ValueError(f"comm_sms must be less than the {world.hardware.sms} of the GPU, got {comm_sms}")
    beside = comm_sms if knobs.micro_batches > 1 else 0
    draft = Draft(world, knobs, "deepep", world.hardware.sms - beside, cluster=knobs.cluster)
    comm = draft.servers("communicating SMs", comm_sms)
    return [_Normal(part, comm, knobs) for part in draft.parts(knobs.micro_batches)]


def _low_latency(world: World, knobs: Knobs) -> list[_LowLatency]:
    draft = Draft(world, knobs, "deepep", world.hardware.sms, cluster=knobs.cluster, cuda_graph=True)
    return [_LowLatency(part, knobs) for part in draft.parts(knobs.micro_batches)]


class _Normal(HopKernels):
    """Kernels of normal mode for one micro-batch; methods take and give what is complete, `[num_ranks]`."""

    def __init__(self, draft: Draft, comm: Array, knobs: Knobs) -> None:
        super().__init__(draft, comm, knobs.chunk_rows, knobs.window_rows // knobs.chunk_rows)
        self.blocks = tuned_blocks(draft.world.routing.counts, knobs.tile_m, knobs.least_tile_m or knobs.tile_m)
        self.tile = knobs.tile_n, knobs.tile_m

    def notify(self, after: ArrayLike) -> Array:
        """Choices are counted, the counts exchanged and read by the host, and the dispatch kernel begins."""
        choices = self.world.routing.topk_idx[0].nbytes
        counted = self.draft.stream(self.draft.begin(after), np.full(self.world.num_ranks, choices / 2))
        met = self.meet(self.draft.begin(counted))
        self.draft.sync(met)
        return self.draft.begin(met)

    def turn_back(self) -> None:
        """What follows is of a backward."""
        self.draft = self.draft.turned(backward_pass(self.world, in_tiles=False))

    def experts(self, after: ArrayLike) -> Array:
        """Rows are spread out by expert, multiplied, and the results of each token summed."""
        _, done = self.draft.ffn(self._spread(after), self.blocks, *self.tile)
        return self._sum_copies(done)

    def experts_back(self, after: ArrayLike, knobs: Knobs) -> Array:
        """The same with gradients of rows, and those of weights between the products."""
        tile = GradientTile(knobs.tile_m, knobs.tile_n)
        return self._sum_copies(backward_kernels(self.draft, self._spread(after), self.blocks, tile))

    def _spread(self, after: ArrayLike) -> Array:
        nbytes = self.world.rows * self.world.config.hidden * self.world.precision.token_bytes
        return self.draft.stream(self.draft.begin(after), nbytes)

    def _sum_copies(self, done: Array) -> Array:
        """The results of each token on this rank are summed."""
        draft, hops, precision = self.draft, self.hops, self.world.precision
        hidden, rows = self.world.config.hidden, self.world.rows
        copies = np.bincount(hops.share_rank, hops.share_rows, self.world.num_ranks)
        return draft.stream(draft.begin(done), (rows + copies) / 2 * hidden * precision.result_bytes)

    def results(self, computed: Array) -> Array:
        """What combine waits for."""
        return computed


class _LowLatency:
    """Kernels of low-latency mode for one micro-batch; methods take and give what is complete, `[num_ranks]`."""

    def __init__(self, draft: Draft, knobs: Knobs) -> None:
        self.draft = draft
        self.world = draft.world
        self.blocks = tuned_blocks(draft.world.routing.counts, knobs.tile_m, knobs.least_tile_m or knobs.tile_m)
        self.owner = draft.world.routing.owner[self.blocks.expert]
        self.knobs = knobs
        self.products: Array | None = None  # [num_blocks], the second ones, if they say when they are done

    def meet(self, begun: Array) -> Array:
        """No barrier."""
        return begun

    def notify(self, after: ArrayLike) -> Array:
        """The dispatch kernel begins; counts go with the rows."""
        return self.draft.begin(after)

    def dispatch(self, begun: Array) -> Array:
        """Each row to each of its experts."""
        packets = np.nonzero(self.world.routing.counts)
        sent = self.draft.dispatch(begun, packets, self.knobs.chunk_rows)
        return self.draft.after(begun, self.draft.gather(sent, self.world.routing.owner[packets[1]]))

    def experts(self, after: ArrayLike) -> Array:
        """Rows lie by expert already."""
        products, done = self.draft.ffn(after, self.blocks, self.knobs.tile_n, self.knobs.tile_m)
        self.products = products if self.knobs.combine == "row_block" else None
        return done

    def results(self, computed: Array) -> Array:
        """What the combine kernel waits for, if its rows do not."""
        return computed if self.products is None else self.draft.idle()

    def combine(self, begun: Array) -> Array:
        """Each result to its source, which sums the tokens when all are there."""
        draft = self.draft
        sends = draft.send_pieces(self.blocks, begun[self.owner])
        if self.products is not None:
            draft.after(self.products[self.blocks.piece_block], sends)
        return draft.combine_kernel(draft.after(begun, draft.gather(sends, self.blocks.piece_source)))
