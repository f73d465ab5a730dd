"""What a simulation says: how long, how busy, what was waited for, and how much was carried.

T is the makespan, R the number of ranks, P the GPU's tensor peak for the precision's arithmetic. A GPU has S slots:
those of its "SM slots", at least one per multiprocessor. All its servers but the OS block and the host are parts of the
multiprocessors, so the tasks on them hold slots; where a schedule lets engines of a multiprocessor run beside each
other, more than S tasks hold S. Slot time is T R S.

Idle by cause. Free slots idle until the next task starts on the GPU's multiprocessors. What made that one ready is the
predecessor that was complete last; joins and the OS block's receiving are passed over to what they waited for. So all
slot time is held by tasks, or has one of the `IDLE_CAUSES`:

    launch      the host's start of a kernel
    barrier     a meeting of ranks
    waiting     rows, results or a signal that came over a link, or work on another rank
    dependency  work on the same GPU
    tail        nothing more starts on the GPU

Leaves out: all but the last of what a task waited for; tasks that are ready, but whose server has no slot while others
have; multiprocessors that a schedule sets aside without tasks on them, which count as idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..drafting.machine import HOST, OS_BLOCK, SM_SLOTS, link_names
from ..drafting.rates import fitted_rate, is_fitted
from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import BARRIER, DENSE, DISPATCH, GEMM0, GEMM1, JOIN, LAUNCH, RECEIVE, SEND
from ..simulation import Simulation
from .steps import Steps, levels

OFF_SM = (OS_BLOCK, HOST)  # servers that are no part of the multiprocessors
LAUNCHED, MET, WAITING, DEPENDENCY, TAIL = range(5)
IDLE_CAUSES = ("launch", "barrier", "waiting", "dependency", "tail")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers of one simulation; `dataclasses.asdict` of it is JSON.

    Args:
        policy, hardware, precision, routing: names.
        knobs: of the policy, by name.
        ranks, tokens: R, and tokens of each rank.
        latency_us: T, from the start of the first task to the completion of the last on any rank, in microseconds.
        tokens_per_s: tokens R / T.
        tensor_busy: operations of all tasks with padding / (P R T), a share of 1.
        useful: the same of real rows only.
        resident: slot time in which tasks hold slots / slot time, a share of 1.
        idle: the rest of the slot time, by `IDLE_CAUSES`; with `resident` the shares sum to 1.
        exposed_communication_us: mean over ranks of the time in which none of GEMM0, GEMM1 and DENSE runs on the rank
            while it is at either end of a transfer. A transfer begins when a DISPATCH or SEND starts, or another task
            that has a path ends, and ends when all its bytes and its signal are there.
        nvlink_bytes_max, nvlink_bytes_mean, nic_bytes_max, nic_bytes_mean: bytes carried by one link, over the links
            within nodes and those between them, whatever their names; each rank has one out and one in, or shares it.
            Where both are one link, it counts as one within nodes.
        node_link, network_link: what the machine calls these links.
        buffer_bytes: rows that the busiest rank holds, see `World.row_bytes`.
        queue_peak: most nodes (groups of equal tasks) that waited at a time at one server.
        num_tasks: tasks of all ranks.
        rate: share of the tensor peak that tiles reach, the one fitted number.
        rate_fitted: it was fitted to measurements of this policy on this GPU; otherwise it is given by a knob, the mean
            over other GPUs, or a guess.
        overlap_efficiency: T on 2 ranks / T, tokens and experts per rank the same; None if it was not asked for.
        simulated: always true, for whoever finds the numbers alone.
    """

    policy: str
    hardware: str
    precision: str
    routing: str
    knobs: Mapping[str, Any]
    ranks: int
    tokens: int
    latency_us: float
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
    overlap_efficiency: float | None = None
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
        knobs=asdict(knobs),
        ranks=world.num_ranks,
        tokens=world.routing.num_tokens,
        latency_us=simulation.latency_us,
        tokens_per_s=world.num_ranks * world.routing.num_tokens / (horizon_ns(simulation) / 1e9),
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
    )


def horizon_ns(simulation: Simulation) -> int:
    """The makespan, and 1 where nothing takes time, so that it can be divided by."""
    return max(1, simulation.timeline.makespan_ns)


def check_runs(simulation: Simulation) -> None:
    if simulation.graph.num_tasks and not len(simulation.timeline.run_node):
        raise ValueError("simulation must have runs: simulate with keep_runs=True")


def _tensor_share(simulation: Simulation, field: str) -> float:
    nodes, world = simulation.graph.nodes, simulation.world
    operations = float((nodes["count"] * nodes[field]).sum())
    peak = world.hardware.tflops[world.precision.arithmetic] * 1e3  # per ns
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


# ---- slots


def places(graph: TaskGraph) -> Array:
    """`[num_nodes]`: the rank on which each node runs: that of its server, which for a pull is not the node's own."""
    server, rank = graph.nodes["server"], graph.nodes["rank"]
    return np.where(server == NONE, rank, np.array([*(of.rank for of in graph.servers), NONE])[server])


def sm_runs(simulation: Simulation) -> Array:
    """Indices of the runs that hold slots of multiprocessors."""
    graph = simulation.graph
    on_sm = [server.name not in OFF_SM for server in graph.servers]
    server = graph.nodes["server"][simulation.timeline.run_node]
    return np.flatnonzero(np.array([*on_sm, False])[server])  # the last is NONE


def num_slots(simulation: Simulation) -> int:
    """S of the module's docstring."""
    slots = [server.slots for server in simulation.graph.servers if server.name == SM_SLOTS]
    return max([simulation.world.hardware.sms, *slots])


def slot_shares(simulation: Simulation) -> dict[str, float]:
    """Shares of the slot time: `resident`, and the `IDLE_CAUSES`."""
    graph, time, horizon = simulation.graph, simulation.timeline, horizon_ns(simulation)
    runs, slots, num_ranks = sm_runs(simulation), num_slots(simulation), simulation.world.num_ranks
    rank, start = places(graph)[time.run_node[runs]], time.run_start_ns[runs]
    steps = levels(rank, start, time.run_end_ns[runs], time.run_count[runs], num_ranks, horizon)
    passed = (steps.right - steps.left).astype(np.float64)  # times slots, it may be more than 64 bits hold
    held = np.minimum(steps.level, slots)
    following = _next_runs(rank, start, steps, horizon)
    nodes = np.append(time.run_node[runs], NONE)[following]
    cause = np.where(nodes == NONE, TAIL, idle_cause(simulation, nodes))
    total = num_ranks * slots * horizon
    idle = np.bincount(cause, (slots - held) * passed, minlength=len(IDLE_CAUSES)) / total
    resident = float((held * passed).sum()) / total
    return {"resident": resident, **dict(zip(IDLE_CAUSES, idle.tolist(), strict=True))}


def _next_runs(rank: Array, start: Array, steps: Steps, horizon: int) -> Array:
    """`[num_steps]`: the first of the runs `[num_runs]` that starts on the step's rank when it ends or later, or -1."""
    order = np.lexsort((start, rank))
    clock = horizon + 1  # rank and time as one number
    place = np.searchsorted((rank * np.int64(clock) + start)[order], steps.group * clock + steps.left, side="right")
    found = np.append(order, NONE)[place]
    return np.where(np.append(rank, NONE)[found] == steps.group, found, NONE)


def idle_cause(simulation: Simulation, nodes: Array) -> Array:
    """What made each of these nodes ready, by its index in `IDLE_CAUSES`."""
    cause, fields = simulation.timeline.cause, simulation.graph.nodes
    last = cause[nodes]
    while True:
        passed = np.isin(fields["kind"][last], (JOIN, RECEIVE)) & (last != NONE) & (cause[last] != NONE)
        if not passed.any():
            break
        last = np.where(passed, cause[last], last)
    over_link = (fields["egress"][last] != NONE) | (fields["ingress"][last] != NONE)
    place = places(simulation.graph)
    elsewhere = place[last] != place[nodes]
    kind = fields["kind"][last]
    known = [last == NONE, kind == LAUNCH, kind == BARRIER, over_link | elsewhere]
    return np.select(known, [DEPENDENCY, LAUNCHED, MET, WAITING], DEPENDENCY)


# ---- communication


def transfers(simulation: Simulation) -> tuple[Array, Array, Array]:
    """Rank, start and end of each transfer, once for each of its two ends."""
    graph, time = simulation.graph, simulation.timeline
    nodes = {name: graph.nodes[name][time.run_node] for name in ("kind", "rank", "peer", "egress", "ingress")}
    sends = np.flatnonzero((nodes["egress"] != NONE) | (nodes["ingress"] != NONE))
    nodes = {name: values[sends] for name, values in nodes.items()}
    source = _end(graph, nodes["egress"], nodes["rank"])
    target = _end(graph, nodes["ingress"], nodes["peer"])
    whole = np.isin(nodes["kind"], (DISPATCH, SEND))
    start = np.where(whole, time.run_start_ns[sends], time.run_end_ns[sends])
    return np.concatenate([source, target]), np.tile(start, 2), np.tile(time.run_arrive_ns[sends], 2)


def _end(graph: TaskGraph, link: Array, rank: Array) -> Array:
    """`[num_sends]`: this rank, if there is no link or the link is also its; else the link's first."""
    first = np.array([*(of.rank for of in graph.links), NONE], np.int64)[link]  # the last is NONE
    number = np.array([*(of.num_ranks for of in graph.links), NONE], np.int64)[link]
    return np.where((link == NONE) | ((first <= rank) & (rank < first + number)), rank, first)


def exposed_communication_us(simulation: Simulation) -> float:
    """See `Report`."""
    graph, time = simulation.graph, simulation.timeline
    computes = np.flatnonzero(np.isin(graph.nodes["kind"][time.run_node], (GEMM0, GEMM1, DENSE)))
    rank, start, end = transfers(simulation)
    transfer = np.int64(2**32)  # more than there are computing tasks: one number counts both
    num_ranks = simulation.world.num_ranks
    steps = levels(
        np.concatenate([places(graph)[time.run_node[computes]], rank]),
        np.concatenate([time.run_start_ns[computes], start]),
        np.concatenate([time.run_end_ns[computes], end]),
        np.repeat([np.int64(1), transfer], [len(computes), len(rank)]),
        num_ranks,
        horizon_ns(simulation),
    )
    exposed = (steps.level >= transfer) & (steps.level % transfer == 0)
    return float((steps.right - steps.left)[exposed].sum()) / num_ranks / 1000
