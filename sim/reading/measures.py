"""What the times of a simulation add up to: slots held and idle by cause, communication and other work that is exposed.

T is the makespan, R the number of ranks, P the GPU's tensor peak for the precision's MMA type. A GPU has S slots:
those of its "SM slots", at least one per multiprocessor. All its servers but the OS block and the host are parts of the
multiprocessors, so the tasks on them hold slots; where a schedule lets engines of a multiprocessor run beside each
other, more than S tasks hold S. Slot time is T R S.

Idle by cause. Free slots idle until the next task starts on the GPU's multiprocessors. What made that one ready is the
predecessor that was complete last; joins, gaps between kernels of a CUDA graph and the OS block's receiving are passed
over to what they waited for. So all slot time is held by tasks, or has one of the `IDLE_CAUSES`:

    launch      the host's start of a kernel
    barrier     a meeting of ranks
    waiting     rows, results or a signal that came over a link, or work on another rank
    dependency  work on the same GPU
    tail        nothing more starts on the GPU

Leaves out: all but the last of what a task waited for; tasks that are ready, but whose server has no slot while others
have; multiprocessors that a schedule sets aside without tasks on them, which count as idle.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..drafting.machine import HOST, OS_BLOCK, SM_SLOTS
from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import (
    BARRIER,
    DENSE,
    DISPATCH,
    GEMM0,
    GEMM1,
    JOIN,
    LAUNCH,
    RECEIVE,
    ROUTER_WEIGHTS,
    SEND,
    SHARED0,
    SHARED1,
    SHARED_WEIGHTS,
    WEIGHTS,
)  # fmt: skip
from ..simulation import Simulation
from .steps import Steps, levels

OFF_SM = (OS_BLOCK, HOST)  # servers that are no part of the multiprocessors
LAUNCHED, MET, WAITING, DEPENDENCY, TAIL = range(5)
IDLE_CAUSES = ("launch", "barrier", "waiting", "dependency", "tail")
MANY = np.int64(2**32)  # more than runs at a time: one number counts two kinds of them
WEIGHT_GRADIENTS = (WEIGHTS, ROUTER_WEIGHTS, SHARED_WEIGHTS)
COMPUTES = (GEMM0, GEMM1, SHARED0, SHARED1, *WEIGHT_GRADIENTS, DENSE)  # products, beside which a transfer costs nothing


def horizon_ns(simulation: Simulation) -> int:
    """The makespan, and 1 where nothing takes time, so that it can be divided by."""
    return max(1, simulation.timeline.makespan_ns)


def check_runs(simulation: Simulation) -> None:
    if simulation.graph.num_tasks and not len(simulation.timeline.run_node):
        raise ValueError("simulation must have runs: simulate with keep_runs=True")


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
        gap = (fields["kind"][last] == LAUNCH) & (fields["server"][last] == NONE)
        passed = (np.isin(fields["kind"][last], (JOIN, RECEIVE)) | gap) & (last != NONE) & (cause[last] != NONE)
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
    """Mean over ranks of the time in which no product runs on the rank while it is at either end of a transfer.

    A transfer begins when a DISPATCH or SEND starts, or another task that has a path ends, and ends when all its bytes
    and its signal are there.
    """
    graph, time = simulation.graph, simulation.timeline
    computes = np.flatnonzero(np.isin(graph.nodes["kind"][time.run_node], COMPUTES))
    rank, start, end = transfers(simulation)
    num_ranks = simulation.world.num_ranks
    steps = levels(
        np.concatenate([places(graph)[time.run_node[computes]], rank]),
        np.concatenate([time.run_start_ns[computes], start]),
        np.concatenate([time.run_end_ns[computes], end]),
        np.repeat([np.int64(1), MANY], [len(computes), len(rank)]),
        num_ranks,
        horizon_ns(simulation),
    )
    exposed = (steps.level >= MANY) & (steps.level % MANY == 0)
    return float((steps.right - steps.left)[exposed].sum()) / num_ranks / 1000


# ---- what is not the layer's


class _Busy(NamedTuple):
    """Intervals `[num_intervals]` of ranks."""

    rank: Array
    start: Array
    end: Array


def dense_us(simulation: Simulation) -> float:
    """Mean over ranks of the time in which dense work of the model runs on the rank, and no task of the layer."""
    runs = sm_runs(simulation)
    dense = simulation.graph.nodes["kind"][simulation.timeline.run_node[runs]] == DENSE
    return _alone_us(simulation, _busy(simulation, runs[dense]), [_busy(simulation, runs[~dense])])


def host_us(simulation: Simulation) -> float:
    """Mean over ranks of the time in which the host works, and nothing else: no task, no transfer, no meeting."""
    graph, time, ranks = simulation.graph, simulation.timeline, np.arange(simulation.world.num_ranks)
    kind, server = graph.nodes["kind"][time.run_node], graph.nodes["server"][time.run_node]
    on_host = np.array([*(of.name == HOST for of in graph.servers), False])[server]
    met = np.flatnonzero(kind == BARRIER)
    meetings = _Busy(
        np.tile(ranks, len(met)), *(np.repeat(at[met], len(ranks)) for at in (time.run_start_ns, time.run_end_ns))
    )
    others = [_busy(simulation, sm_runs(simulation)), _Busy(*transfers(simulation)), meetings]
    return _alone_us(simulation, _busy(simulation, np.flatnonzero(on_host)), others)


def _busy(simulation: Simulation, runs: Array) -> _Busy:
    time = simulation.timeline
    return _Busy(places(simulation.graph)[time.run_node[runs]], time.run_start_ns[runs], time.run_end_ns[runs])


def _alone_us(simulation: Simulation, busy: _Busy, others: list[_Busy]) -> float:
    """Time in which some of `busy` is open and none of the `others`, as a mean over ranks."""
    if not len(busy.rank):
        return 0.0
    rank, start, end = (np.concatenate(column) for column in zip(busy, *others, strict=True))
    weight = np.where(np.arange(len(rank)) < len(busy.rank), 1, MANY)
    num_ranks = simulation.world.num_ranks
    steps = levels(rank, start, end, weight, num_ranks, horizon_ns(simulation))
    alone = (steps.level > 0) & (steps.level < MANY)
    return float((steps.right - steps.left)[alone].sum()) / num_ranks / 1000
