"""What ranks did and when, as slices in lanes, and those as a Chrome trace: of the kernel and of simulations alike.

A process of the trace is a rank, a lane is whatever does one thing at a time there; slices of a lane do not overlap.
Open a file at https://ui.perfetto.dev or chrome://tracing. Leaves out: arrows beyond `MAX_FLOWS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .task_kinds import (
    BACKWARD_NAMES,
    COMBINE,
    DISPATCH,
    GATE,
    GEMM0,
    GEMM1,
    KIND_NAMES,
    NORM_WEIGHTS,
    RECEIVE,
    ROUTER_WEIGHTS,
    SHARED0,
    SHARED1,
    SHARED_WEIGHTS,
    WEIGHTS,
)

TRACE_KIND_NAMES = (*KIND_NAMES, "RECEIVE", *BACKWARD_NAMES.values())
MAX_FLOWS = 4096  # arrows; viewers get slow with more

# Okabe and Ito's colours, told apart by everybody.
COLOURS = {
    GATE: "#CC79A7",
    DISPATCH: "#E69F00",
    GEMM0: "#0072B2",
    GEMM1: "#56B4E9",
    COMBINE: "#009E73",
    RECEIVE: "#D55E00",
    SHARED0: "#F0E442",
    SHARED1: "#999999",
    WEIGHTS: "#332288",
    ROUTER_WEIGHTS: "#882255",
    SHARED_WEIGHTS: "#DDCC77",
    NORM_WEIGHTS: "#117733",
}

Event = dict[str, Any]


class Slice(NamedTuple):
    """One slice of a rank's lane: a task with the indices of `Task`, or the OS block's RECEIVE of a packet.

    `expert` is an index among its owner's experts, `n` of the kernel's RECEIVE the packet's rows. Unused indices are 0.
    """

    rank: int
    lane: int
    kind: int
    peer: int
    expert: int
    m: int
    n: int
    start_ns: int
    end_ns: int


# ---- events; their times are microseconds


def name_events(processes: Mapping[int, str], lanes: Mapping[tuple[int, int], str]) -> Iterator[Event]:
    """Names of ranks, and of the lanes (rank, lane)."""
    for rank, name in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for (rank, lane), name in lanes.items():
        about = {"ph": "M", "pid": rank, "tid": lane}
        yield about | {"name": "thread_name", "args": {"name": name}}
        yield about | {"name": "thread_sort_index", "args": {"sort_index": lane}}


def slice_events(slices: Iterable[Slice], kind_names: Sequence[str] = TRACE_KIND_NAMES) -> Iterator[Event]:
    for task in slices:
        args = {"peer": task.peer, "expert": task.expert, "m": task.m, "n": task.n}
        duration = {"dur": (task.end_ns - task.start_ns) / 1000, "args": args}
        yield {"ph": "X", "name": kind_names[task.kind], "cat": "task", **_at(task), **duration}


def _at(task: Slice) -> Event:
    return {"pid": task.rank, "tid": task.lane, "ts": task.start_ns / 1000}


def counter_event(rank: int, name: str, unit: str, at_ns: int, value: int) -> Event:
    return {"ph": "C", "name": f"{name}: {unit}", "pid": rank, "ts": at_ns / 1000, "args": {unit: value}}


def flow_events(packets: Iterable[tuple[Slice, Slice]]) -> Iterator[Event]:
    """Arrows of the first packets: two events each, in the slice that sent it and in the first that used it."""
    for number, (sent, used) in enumerate(islice(packets, MAX_FLOWS)):
        flow = {"name": "packet", "cat": "packet", "id": number}
        yield {"ph": "s", **flow, **_at(sent)}
        yield {"ph": "f", "bp": "e", **flow, **_at(used)}


# ---- the file


def write_events(events: Iterable[Event], file: Path | str, about: Mapping[str, Any] | None = None) -> None:
    """Write a Chrome trace, one event per line; `about` is what its `otherData` says."""
    head = json.dumps({"displayTimeUnit": "ns", **({"otherData": about} if about else {})}).removesuffix("}")
    lines = ",\n".join(map(json.dumps, events))
    Path(file).write_text(f'{head}, "traceEvents": [\n{lines}\n]}}\n', encoding="utf-8")
