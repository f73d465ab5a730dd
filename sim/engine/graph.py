"""A schedule as arrays: what must be done, on which resource, for how long, and after what.

A node is `count` equal tasks (say, the column tiles of one row block): they become ready together, when every
predecessor is complete, and each takes one slot of the node's server for `duration_ns`. A task that is done puts
`nbytes` on its path, if it has one: up to two links, that of the sender and that of the receiver. A task whose bytes
have arrived is complete `latency_ns` later, and a node when all its tasks are. A task that streams bytes of its rank's
memory holds its slot until these are through, too.

Grouping equal tasks is what makes 100 million of them fit: arrays are as long as the nodes, and tasks that start
together are one event. A node of one task each describes any graph there is.

Leaves out: tasks that hold two servers at once, and durations that depend on what else runs (bandwidth aside).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from reference.arrays import Array as Array

from .kinds import KIND_NAMES

NONE = -1  # no server, no link
MOST_BYTES = 2**53  # at once on a link: exact as a float
MOST_NS = 2**62
FIELDS: dict[str, tuple[Any, Any]] = {  # of a node: dtype and default
    "kind": (np.int8, None),
    "rank": (np.int32, None),
    "peer": (np.int32, 0),
    "expert": (np.int32, 0),
    "m": (np.int32, 0),
    "count": (np.int32, 1),
    "server": (np.int32, NONE),
    "priority": (np.int32, 0),
    "duration_ns": (np.int64, 0),
    "streamed": (np.int64, 0),
    "nbytes": (np.int64, 0),
    "egress": (np.int32, NONE),
    "ingress": (np.int32, NONE),
    "latency_ns": (np.int64, 0),
    "flops": (np.float64, 0.0),
    "useful_flops": (np.float64, 0.0),
}
_DEFAULTS = {name: np.array(default, dtype) for name, (dtype, default) in FIELDS.items() if default is not None}


class Server(NamedTuple):
    """`slots` tasks at a time; next is the one of the lowest priority number, and of those the first to be ready.

    `name` says what it is, and is the same on all ranks.
    """

    name: str
    rank: int
    slots: int


class Link(NamedTuple):
    """`gbps` GB/s (bytes per ns) shared evenly by the transfers on it, each of which gets at most `flow_gbps`.

    It belongs to `num_ranks` ranks from `rank` on; engines know it by the first.
    """

    name: str
    rank: int
    gbps: float
    flow_gbps: float
    num_ranks: int = 1


class Memory(NamedTuple):
    """`gbps` GB/s of each rank's memory, shared evenly by tasks that stream, each of which gets at most `task_gbps`.

    Not by runs of tasks, as a link: of a row block's tiles each has as much as a tile that is alone.
    """

    gbps: float
    task_gbps: float


@dataclass(frozen=True, eq=False)
class TaskGraph:
    """Nodes, resources and dependencies; made by a `GraphBuilder`.

    Args:
        servers, links: the resources; nodes name them by index, `NONE` for none.
        nodes: arrays `[num_nodes]` by name, see `FIELDS`. `kind`, `peer`, `expert` and `m` are those of
            `reference.Task`, whose `n` is the task's index within its node. `priority`: lower goes first.
            `streamed`, `nbytes`, `flops` (of padded tiles) and `useful_flops` (of real rows) are per task.
        succ_start, succ: the successors of node i are `succ[succ_start[i]:succ_start[i + 1]]`.
        num_preds: `[num_nodes]`.
        memory: of each rank; None: nothing is streamed.
    """

    servers: tuple[Server, ...]
    links: tuple[Link, ...]
    nodes: dict[str, Array]
    succ_start: Array
    succ: Array
    num_preds: Array
    memory: Memory | None = None

    @property
    def num_memories(self) -> int:
        """Ranks whose memory the engines keep: none, if nothing is streamed."""
        streams = self.nodes["streamed"] > 0
        return int(self.nodes["rank"][streams].max(initial=NONE)) + 1

    @property
    def num_nodes(self) -> int:
        return len(self.num_preds)

    @property
    def num_tasks(self) -> int:
        return int(self.nodes["count"].sum(dtype=np.int64))

    def successors(self, node: int) -> Array:
        return self.succ[self.succ_start[node] : self.succ_start[node + 1]]

    def predecessors(self, node: int) -> Array:
        """Slow (a pass over all edges): for reports and messages."""
        edges = np.flatnonzero(self.succ == node)
        return np.searchsorted(self.succ_start, edges, side="right") - 1

    def describe(self, node: int) -> str:
        """The node in words: "GEMM0 on rank 3, peer 1, expert 2, m 0"."""
        kind, rank, peer, expert, m = (int(self.nodes[name][node]) for name in ("kind", "rank", "peer", "expert", "m"))
        return f"{KIND_NAMES[kind]} on rank {rank}, peer {peer}, expert {expert}, m {m}"


class GraphBuilder:
    """Collects resources, nodes and edges in whole arrays, and checks them once, in `build`."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.links: list[Link] = []
        self.memory: Memory | None = None
        self._parts: list[dict[str, Array]] = []
        self._edges: list[tuple[Array, Array]] = []
        self._num_nodes = 0

    def add_server(self, name: str, rank: int, slots: int) -> int:
        """A server with this many slots; returns its index."""
        if slots < 1:
            raise ValueError(f"slots of server {name} of rank {rank} must be at least 1, got {slots}")
        self.servers.append(Server(name, rank, slots))
        return len(self.servers) - 1

    def add_link(self, name: str, rank: int, gbps: float, flow_gbps: float | None = None, num_ranks: int = 1) -> int:
        """A link of `gbps` GB/s, of which one transfer gets at most `flow_gbps` (default: all); returns its index."""
        cap = gbps if flow_gbps is None else flow_gbps
        if not (0 < gbps < float("inf") and cap > 0):
            raise ValueError(f"gbps and flow_gbps of link {name} of rank {rank} must be positive, got {gbps} and {cap}")
        self.links.append(Link(name, rank, float(gbps), float(min(cap, gbps)), num_ranks))
        return len(self.links) - 1

    def set_memory(self, gbps: float, task_gbps: float) -> None:
        """Give each rank a memory of `gbps` GB/s, of which one task gets at most `task_gbps`."""
        if not (0 < gbps < float("inf") and task_gbps > 0):
            raise ValueError(f"gbps and task_gbps of the memory must be positive, got {gbps} and {task_gbps}")
        self.memory = Memory(float(gbps), float(min(gbps, task_gbps)))

    def add(self, kind: int, rank: ArrayLike, **values: ArrayLike) -> Array:
        """Nodes of one kind: arguments are fields of a node, arrays of one shape or scalars. Returns their indices.

        The result has the shape of the broadcast arguments.
        """
        unknown = set(values) - set(FIELDS)
        if unknown:
            raise TypeError(f"a node has the fields {', '.join(FIELDS)}; got {', '.join(sorted(unknown))}")
        given = {"kind": kind, "rank": rank, **values}
        shape = np.broadcast_shapes(*(np.shape(value) for value in given.values()))
        size = int(np.prod(shape, dtype=np.int64))
        part = {}
        for name, (dtype, _) in FIELDS.items():
            array = _cast(name, given[name], dtype) if name in given else _DEFAULTS[name]
            part[name] = (array if array.shape == shape else np.broadcast_to(array, shape)).reshape(size)
        self._parts.append(part)
        first = self._num_nodes
        self._num_nodes += size
        return np.arange(first, first + size, dtype=np.int32).reshape(shape)

    def edge(self, before: ArrayLike, after: ArrayLike) -> None:
        """`before[i]` must be complete before `after[i]` is ready; the arguments are broadcast."""
        pred, succ = np.broadcast_arrays(np.asarray(before, np.int32), np.asarray(after, np.int32))
        self._edges.append((pred.ravel(), succ.ravel()))

    def build(self) -> TaskGraph:
        """The graph.

        Raises:
            ValueError: naming the field, the node and the rule.
        """
        nodes = {
            name: np.concatenate([part[name] for part in self._parts] or [np.empty(0, dtype)])
            for name, (dtype, _) in FIELDS.items()
        }
        pred = np.concatenate([edge[0] for edge in self._edges] or [np.empty(0, np.int32)])
        succ = np.concatenate([edge[1] for edge in self._edges] or [np.empty(0, np.int32)])
        _check(nodes, pred, succ, self.servers, self.links, self.memory)
        order = np.argsort(pred, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(pred, minlength=self._num_nodes))]).astype(np.int64)
        num_preds = np.bincount(succ, minlength=self._num_nodes).astype(np.int32)
        return TaskGraph(tuple(self.servers), tuple(self.links), nodes, start, succ[order], num_preds, self.memory)


def _cast(name: str, value: Any, dtype: Any) -> Array:
    """Checked, because NumPy wraps integers that are too large for a type without a word."""
    given = np.asarray(value)
    made = given.astype(dtype, copy=False)
    if given.dtype.kind in "iu" and (made != given).any():
        raise ValueError(f"{name} must fit into {made.dtype}, got {given.flat[(made != given).argmax()]}")
    return made


def _check(
    nodes: dict[str, Array],
    pred: Array,
    succ: Array,
    servers: Sequence[Server],
    links: Sequence[Link],
    memory: Memory | None,
) -> None:
    num_nodes = len(nodes["kind"])
    bounds = {
        "kind": (0, len(KIND_NAMES)),
        "rank": (0, 2**23),  # the engines pack it beside a sequence number
        "count": (1, 2**31 - 1),
        "server": (NONE, len(servers)),
        "priority": (-(2**20), 2**20),
        "duration_ns": (0, 2**62),
        "streamed": (0, MOST_BYTES),
        "nbytes": (0, MOST_BYTES),
        "egress": (NONE, len(links)),
        "ingress": (NONE, len(links)),
        "latency_ns": (0, 2**62),
    }
    for name, (low, high) in bounds.items():
        _check_range(name, nodes[name], low, high)
    for name, ends in (("before", pred), ("after", succ)):
        _check_range(f"edge {name}", ends, 0, num_nodes)
    _check_paths(nodes)
    if memory is None and nodes["streamed"].any():
        raise ValueError(f"streamed must be 0 without a memory, got {nodes['streamed'].max()}")
    _check_total(nodes, links, memory or Memory(1.0, 1.0))


def _check_total(nodes: dict[str, Array], links: Sequence[Link], memory: Memory) -> None:
    """No schedule is longer than all tasks one after the other: if that fits the engines' clock, all times do."""
    pace = np.array([*(1 / link.flow_gbps for link in links), 0.0])  # the last is NONE
    each = nodes["duration_ns"] + nodes["latency_ns"].astype(np.float64)
    each += nodes["nbytes"] * (pace[nodes["egress"]] + pace[nodes["ingress"]])
    each += nodes["streamed"] / memory.task_gbps
    total = float((nodes["count"] * each).sum())
    if not total < MOST_NS:
        raise ValueError(f"all tasks one after the other must take less than {MOST_NS} ns, got {total:.3g}")


def _check_paths(nodes: dict[str, Array]) -> None:
    _check_range("nbytes of all tasks of a node", nodes["nbytes"] * nodes["count"].astype(np.float64), 0, MOST_BYTES)
    lonely = np.flatnonzero((nodes["nbytes"] > 0) & (nodes["egress"] < 0) & (nodes["ingress"] < 0))
    if lonely.size:
        raise ValueError(f"node {lonely[0]} has nbytes={nodes['nbytes'][lonely[0]]} but neither egress nor ingress")
    looped = np.flatnonzero((nodes["egress"] >= 0) & (nodes["egress"] == nodes["ingress"]))
    if looped.size:
        raise ValueError(
            f"egress and ingress of node {looped[0]} must be two links, got {nodes['egress'][looped[0]]} twice"
        )


def _check_range(name: str, values: Array, low: int, high: int) -> None:
    bad = np.flatnonzero((values < low) | (values >= high))
    if bad.size:
        raise ValueError(f"{name} must be in [{low}, {high}), got {values[bad[0]]} at {bad[0]}")
