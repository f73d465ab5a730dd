"""Why a simulation took as long as it did: the chain of nodes that led to its end, and where their time went.

The path is walked back from the node that was complete last. Of a node the task counts that arrived last: its node was
ready when the last predecessor was complete (`Timeline.cause`, the next node of the path), and then the task waited for
a slot, ran, had its bytes on a path, and its signal under way. These four times fill the time from ready to complete,
so those of the whole path fill the makespan, to the nanosecond.

Categories: running is `compute`, but for LAUNCH and BARRIER, which are their own, DISPATCH and SEND, whose slots move
rows (`transfer`), and RECEIVE, a SEND without slots and a JOIN that holds something back, which run for the cost of a
signal, of a call and for others to come (`latency`). A wait for a slot means that the server was full; `behind` says of
what. Leaves out: other paths that are nearly as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import BARRIER, DISPATCH, JOIN, KIND_NAMES, LAUNCH, RECEIVE, SEND
from ..engine.timeline import Timeline

CATEGORIES = ("compute", "waiting for a slot", "transfer", "latency", "launch", "barrier")
COMPUTE, SLOT, TRANSFER, LATENCY, LAUNCHING, MEETING = CATEGORIES
LONGEST_CYCLE = 8  # rows of a path that are looked for again right behind them
HEADINGS = "     ready   complete  nodes for a slot    running      bytes    latency  what"
RUNNING = {LAUNCH: LAUNCHING, BARRIER: MEETING, DISPATCH: TRANSFER, RECEIVE: LATENCY, SEND: TRANSFER, JOIN: LATENCY}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node of the critical path, or several of one kind and rank that follow each other.

    Args:
        node: the last one.
        run: the run of it that arrived last.
        freed_by: the run whose end gave that run its slot; -1 if it did not wait.
        count: nodes.
        ready_ns, done_ns: of the first node and of the last.
        slot_ns, run_ns, transfer_ns, latency_ns: waiting for a slot, running, bytes on the path, signal under way.
    """

    node: int
    run: int
    freed_by: int
    count: int
    ready_ns: int
    done_ns: int
    slot_ns: int
    run_ns: int
    transfer_ns: int
    latency_ns: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Args:
    steps: the critical path from first to last, one for each node, those included that took no time.
    totals_ns: the makespan by `CATEGORIES`.
    behind: the time waited for slots, by the kind of what held them, in ns.
    """

    steps: tuple[Step, ...]
    totals_ns: dict[str, int]
    behind: dict[str, float]


def explain(graph: TaskGraph, timeline: Timeline) -> Explanation:
    """The critical path of a run whose runs were kept."""
    steps = tuple(reversed(list(_walk_back(graph, timeline))))
    totals = dict.fromkeys(CATEGORIES, 0)
    behind = np.zeros(len(KIND_NAMES))
    for step in steps:
        totals[running(graph, step.node)] += step.run_ns
        totals[SLOT] += step.slot_ns
        totals[TRANSFER] += step.transfer_ns
        totals[LATENCY] += step.latency_ns
        behind += step.slot_ns * held_by(graph, timeline, step)
    named = {KIND_NAMES[kind]: float(behind[kind]) for kind in np.argsort(-behind, kind="stable") if behind[kind]}
    return Explanation(steps=steps, totals_ns=totals, behind=named)


def running(graph: TaskGraph, node: int) -> str:
    """The category of a node's running time."""
    kind = int(graph.nodes["kind"][node])
    if kind == SEND and graph.nodes["server"][node] == NONE:
        return LATENCY
    return RUNNING.get(kind, COMPUTE)


def held_by(graph: TaskGraph, timeline: Timeline, step: Step) -> Array:
    """`[num_kinds]`: shares of the busy slot time of the step's server while it waited, by kind; zeros if not."""
    shares = np.zeros(len(KIND_NAMES))
    if not step.slot_ns:
        return shares
    runs = np.flatnonzero(graph.nodes["server"][timeline.run_node] == graph.nodes["server"][step.node])
    until = timeline.run_start_ns[step.run]
    overlap = np.minimum(timeline.run_end_ns[runs], until) - np.maximum(timeline.run_start_ns[runs], step.ready_ns)
    weight = np.maximum(overlap, 0) * timeline.run_count[runs]
    np.add.at(shares, graph.nodes["kind"][timeline.run_node[runs]], weight)
    result: Array = shares / shares.sum()
    return result


def merged(graph: TaskGraph, steps: Sequence[Step]) -> list[Step]:
    """Steps that took time, those of one kind and rank that follow each other as one."""
    rank, kind = graph.nodes["rank"], graph.nodes["kind"]
    spent = [step for step in steps if step.done_ns > step.ready_ns]
    return [_sum(list(group)) for _, group in groupby(spent, key=lambda step: (rank[step.node], kind[step.node]))]


def folded(graph: TaskGraph, steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    """The rows of a path, and how often each of them is there: of those that repeat in the same order, the sums."""
    rows = merged(graph, steps)
    names = [_what(graph, row) for row in rows]
    first = 0
    while first < len(rows):
        period, times = _cycle(names[first:])
        for place in range(first, first + period):
            yield _sum(rows[place : first + period * times : period]), times
        first += period * times


def _cycle(names: Sequence[str]) -> tuple[int, int]:
    """How many of the first names come again right behind, and how often all in all; (1, 1) if none do."""
    best = (1, 1)
    for period in range(1, min(LONGEST_CYCLE, len(names) // 2) + 1):
        times = 1
        while names[times * period : (times + 1) * period] == names[:period]:
            times += 1
        if times > 1 and times * period > best[0] * best[1]:
            best = (period, times)
    return best


def _sum(steps: Sequence[Step]) -> Step:
    times = ("count", "slot_ns", "run_ns", "transfer_ns", "latency_ns")
    totals = {name: sum(getattr(step, name) for step in steps) for name in times}
    return replace(steps[-1], ready_ns=steps[0].ready_ns, **totals)


def _walk_back(graph: TaskGraph, timeline: Timeline) -> Iterator[Step]:
    """From the node that was complete last to one that waited for nothing."""
    by_node = np.argsort(timeline.run_node, kind="stable")
    first = np.searchsorted(timeline.run_node[by_node], np.arange(graph.num_nodes + 1))
    by_end = np.argsort(timeline.run_end_ns, kind="stable")
    node = int(timeline.done_ns.argmax()) if graph.num_nodes else NONE
    while node != NONE:
        runs = by_node[first[node] : first[node + 1]]
        run = int(runs[timeline.run_arrive_ns[runs].argmax()])
        yield _step(graph, timeline, node, run, by_end)
        node = int(timeline.cause[node])


def _step(graph: TaskGraph, timeline: Timeline, node: int, run: int, by_end: Array) -> Step:
    ready, done = int(timeline.ready_ns[node]), int(timeline.done_ns[node])
    start, end = int(timeline.run_start_ns[run]), int(timeline.run_end_ns[run])
    latency = int(graph.nodes["latency_ns"][node])
    return Step(
        node=node,
        run=run,
        freed_by=_freed_by(graph, timeline, node, start, by_end) if start > ready else NONE,
        count=1,
        ready_ns=ready,
        done_ns=done,
        slot_ns=start - ready,
        run_ns=end - start,
        transfer_ns=done - latency - end,
        latency_ns=latency,
    )


def _freed_by(graph: TaskGraph, timeline: Timeline, node: int, start: int, by_end: Array) -> int:
    """A run that ended on the node's server at `start`: what starts late starts when a slot is given back."""
    low, high = (np.searchsorted(timeline.run_end_ns, start, side, sorter=by_end) for side in ("left", "right"))
    ended = by_end[low:high]
    server = graph.nodes["server"]
    return int(ended[server[timeline.run_node[ended]] == server[node]][0])


# ---- words


def lines(graph: TaskGraph, explanation: Explanation) -> Iterator[str]:
    """The path and the totals, for people; times in microseconds."""
    yield "critical path, first to last, simulated, in us: when ready, when complete, and the time in between;"
    yield "x N: rows that come N times in this order, from the first to the last of them"
    yield HEADINGS
    for step, times in folded(graph, explanation.steps):
        spent = (step.slot_ns, step.run_ns, step.transfer_ns, step.latency_ns)
        cells = "".join(f"{_us(time):>11}" for time in spent)
        begins, ends = f"{step.ready_ns / 1000:>10.1f}", f"{step.done_ns / 1000:>11.1f}"
        yield f"{begins}{ends}{step.count:>7}{cells}  {_what(graph, step)}{f' x {times}' if times > 1 else ''}"
    makespan = sum(explanation.totals_ns.values())
    yield f"totals of the path, which are the simulated {makespan / 1000:.1f} us"
    for category, time in explanation.totals_ns.items():
        because = _behind(explanation) if category == SLOT else ""
        yield f"  {category:20}{time / 1000:>10.1f} us {time / max(1, makespan):>7.1%}{because}"


def _us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.1f}" if nanoseconds else "-"


def _what(graph: TaskGraph, step: Step) -> str:
    """ "GEMM1 on rank 3, to rank 0"."""
    rank, peer = int(graph.nodes["rank"][step.node]), int(graph.nodes["peer"][step.node])
    to = f", to rank {peer}" if step.transfer_ns + step.latency_ns and peer != rank else ""
    return f"{KIND_NAMES[graph.nodes['kind'][step.node]]} on rank {rank}{to}"


def _behind(explanation: Explanation) -> str:
    waited = explanation.totals_ns[SLOT]
    shares = [f"{kind} {time / waited:.0%}" for kind, time in explanation.behind.items() if time / waited >= 0.005]
    return f"  behind {', '.join(shares)}" if shares else ""
