"""What a simulation says: how long, how busy, what was waited for, what was computed, and how much was carried.

T is the makespan, R the number of ranks, P the GPU's tensor peak for the precision's MMA type; `measures` says what
slots are, and what idles why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..drafting.machine import link_names
from ..drafting.rates import fitted_rate, is_fitted
from ..drafting.trust import trust
from ..engine.graph import Array
from ..simulation import Simulation
from ..world.world import FORWARD, World
from .measures import IDLE_CAUSES, check_runs, dense_us, exposed_communication_us, horizon_ns, host_us, slot_shares


@dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers of one simulation; `dataclasses.asdict` of it is JSON.

    Args:
        policy, hardware, precision, routing: names.
        passes: one of `world.PASSES`.
        knobs: of the policy, by name.
        ranks, tokens: R, and tokens of each rank.
        capacity: most rows from one rank to one expert; None: no limit.
        rows: choices that were computed, over all ranks: those of experts that are not zero-computation ones (of which
            scmoe's knob zero_share makes some more).
        dropped, added: choices that the capacity or the rounding of tokens took away, and that rounding added.
        computed_tokens: tokens of all ranks with at least one choice that was computed or is a zero-computation expert.
        rank_imbalance, expert_imbalance: most rows of a rank, and of an expert (of a copy, where experts have some),
            over the mean; 1 where there is no row.
        latency_us: T, from the start of the first task to the completion of the last on any rank, in microseconds.
        tokens_per_s: computed_tokens / T: a token that lost all its choices is none.
        host_us: mean over ranks of the time in which the host works, and nothing else does: no task runs on the GPU,
            no transfer is under way at either end, no ranks meet.
        dense_us: mean over ranks of the time in which the model's dense work runs, and no task of the layer.
        tensor_busy: operations of all tasks with padding / (P R T), a share of 1.
        useful: the same of real rows only.
        resident: slot time in which tasks hold slots / slot time, a share of 1.
        idle: the rest of the slot time, by `IDLE_CAUSES`; with `resident` the shares sum to 1.
        exposed_communication_us: mean over ranks of the time in which no product runs on the rank (GEMM0, GEMM1,
            SHARED0, SHARED1, gradients of weights, DENSE) while it is at either end of a transfer, see
            `measures.exposed_communication_us`.
        nvlink_bytes_max, nvlink_bytes_mean, nic_bytes_max, nic_bytes_mean: bytes carried by one link, over the links
            within nodes and those between them, whatever their names; each rank has one out and one in, or shares it.
            Where both are one link, it counts as one within nodes.
        node_link, network_link: what the machine calls these links.
        buffer_bytes: rows that the busiest rank holds, see `World.row_bytes`.
        queue_peak: most nodes (groups of equal tasks) that waited at a time at one server.
        num_tasks: tasks of all ranks.
        rate: share of the tensor peak that tiles reach, the one fitted number.
        rate_fitted: it was fitted to measurements of this policy on this GPU, all of forwards; otherwise it is given by
            a knob, the mean over other GPUs, or a guess.
        left_out_error: mean relative error, without its sign, of published measurements of this policy's system on this
            GPU with about as many tokens, by fits that had not seen them (`drafting.trust`); None: there are none, or
            the rate is given by a knob, or a backward is simulated.
        overlap_efficiency: T on 2 ranks / T, with the same tokens and experts per rank and the same share of their rows
            in a capacity; None if it was not asked for.
        spread: over several seeds of the routing, see `studies.seeds`: these, and median, min and max of some numbers;
            None where there is one seed.
        simulated: always true, for whoever finds the numbers alone.
    """

    policy: str
    hardware: str
    precision: str
    routing: str
    passes: str
    knobs: Mapping[str, Any]
    ranks: int
    tokens: int
    capacity: int | None
    rows: int
    dropped: int
    added: int
    computed_tokens: int
    rank_imbalance: float
    expert_imbalance: float
    latency_us: float
    host_us: float
    dense_us: float
    tokens_per_s: float
    tensor_busy: float
    useful: float
    resident: float
    idle: Mapping[str, float]
    exposed_communication_us: float
    nvlink_bytes_max: int
    nvlink_bytes_mean: float
    nic_bytes_max: int
    nic_bytes_mean: float
    buffer_bytes: int
    queue_peak: int
    num_tasks: int
    rate: float
    rate_fitted: bool
    left_out_error: float | None
    overlap_efficiency: float | None = None
    spread: Mapping[str, Any] | None = None
    node_link: str = "NVLink"
    network_link: str = "NIC"
    simulated: bool = True


def report(simulation: Simulation) -> Report:
    """The report of a simulation.

    Raises:
        ValueError: its timeline has no runs, because they were not kept.
    """
    check_runs(simulation)
    world, knobs, graph = simulation.world, simulation.knobs, simulation.graph
    policy, hardware = simulation.policy, world.hardware.name
    shares = slot_shares(simulation)
    return Report(
        policy=policy,
        hardware=hardware,
        precision=world.precision.name,
        routing=world.routing.name,
        passes=world.passes,
        knobs=asdict(knobs),
        ranks=world.num_ranks,
        tokens=world.routing.num_tokens,
        **_computed(world),
        latency_us=simulation.latency_us,
        host_us=host_us(simulation),
        dense_us=dense_us(simulation),
        tokens_per_s=_computed_tokens(world) / (horizon_ns(simulation) / 1e9),
        tensor_busy=_tensor_share(simulation, "flops"),
        useful=_tensor_share(simulation, "useful_flops"),
        resident=shares["resident"],
        idle={cause: shares[cause] for cause in IDLE_CAUSES},
        exposed_communication_us=exposed_communication_us(simulation),
        **_link_bytes(simulation),
        buffer_bytes=world.row_bytes,
        queue_peak=int(simulation.timeline.queue_peak.max(initial=0)),
        num_tasks=graph.num_tasks,
        rate=fitted_rate(policy, world.hardware.chip) if knobs.rate is None else knobs.rate,
        node_link=world.hardware.node_link,
        network_link=world.hardware.network_link,
        rate_fitted=knobs.rate is None and is_fitted(policy, world.hardware.chip),
        left_out_error=left_out_error(simulation),
    )


def left_out_error(simulation: Simulation) -> float | None:
    """See `Report`."""
    world = simulation.world
    if simulation.knobs.rate is not None or world.passes != FORWARD:
        return None
    return trust(simulation.policy, world.hardware.chip, world.routing.num_tokens)


def _tensor_share(simulation: Simulation, field: str) -> float:
    nodes, world = simulation.graph.nodes, simulation.world
    operations = float((nodes["count"] * nodes[field]).sum())
    peak = world.hardware.tflops[world.precision.mma_type] * 1e3  # per ns
    return operations / (peak * world.num_ranks * horizon_ns(simulation))


def _link_bytes(simulation: Simulation) -> dict[str, Any]:
    result: dict[str, Any] = {}
    hardware = simulation.world.hardware
    for kind, name in (("nvlink", hardware.node_link), ("nic", hardware.network_link)):
        both = () if kind == "nic" and hardware.is_one_link else link_names(name)
        mine = [index for index, link in enumerate(simulation.graph.links) if link.name in both]
        carried = simulation.timeline.link_bytes[mine]
        result[f"{kind}_bytes_max"] = int(carried.max(initial=0))
        result[f"{kind}_bytes_mean"] = float(carried.mean()) if mine else 0.0
    return result


def _computed(world: World) -> dict[str, Any]:
    """What of the routing was computed, and how unevenly."""
    counts = world.routing.counts
    return {
        "capacity": world.config.capacity,
        "rows": int(counts.sum()),
        "dropped": world.routing.dropped,
        "added": world.routing.added,
        "computed_tokens": _computed_tokens(world),
        "rank_imbalance": imbalance(world.rows),
        "expert_imbalance": imbalance(counts.sum(axis=0)),
    }


def _computed_tokens(world: World) -> int:
    return int((world.routing.topk_idx != -1).any(axis=2).sum())


def imbalance(rows: Array) -> float:
    """The most rows over the mean; 1 where there is none."""
    return float(rows.max() / rows.mean()) if rows.any() else 1.0
