"""What every block did and when, read from the kernel's buffers, and the same as a Chrome trace.

A lane is one block of one rank; a block does one thing at a time, so the slices of a lane do not overlap. The clock is
the machine's monotonic one, which all processes share. Open the file at https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import DISPATCH, GEMM0, KIND_NAMES

from ..kernel.trace import RECEIVE, RECORD_WORDS

TRACE_KIND_NAMES = (*KIND_NAMES, "RECEIVE")
assert TRACE_KIND_NAMES.index("RECEIVE") == RECEIVE
MAX_FLOWS = 4096  # arrows in a Chrome trace, those of the earliest packets; viewers get slow with more


class TraceRecord(NamedTuple):
    """One slice of a lane: a task with the indices of `reference.Task`, or the OS block's RECEIVE of a packet.

    `expert` is an index among its owner's experts, `n` of a RECEIVE the packet's rows. Unused indices are 0.
    """

    rank: int
    block: int
    kind: int
    peer: int
    expert: int
    m: int
    n: int
    start_ns: int
    end_ns: int

    @property
    def name(self) -> str:
        return TRACE_KIND_NAMES[self.kind]


def filled(buffer: np.ndarray) -> np.ndarray:
    """The part of a block's buffer that holds its counter and its records.

    Raises:
        ValueError: the block did more than its buffer holds.
    """
    count, room = int(buffer[0]), buffer.size // RECORD_WORDS - 1
    if count > room:
        raise ValueError(f"a trace buffer for {room} records must hold {count}")
    return buffer[: (1 + count) * RECORD_WORDS]


def decode(buffers: Mapping[tuple[int, int], np.ndarray]) -> list[TraceRecord]:
    """The records of `FlashMoE.traces`, ordered by rank, block and time."""
    records = []
    for (rank, block), buffer in sorted(buffers.items()):
        rows = filled(buffer).reshape(-1, RECORD_WORDS)[1:, : RECORD_WORDS - 1].tolist()
        records += [TraceRecord(rank, block, *row) for row in rows]
    return sorted(records, key=lambda record: (record.rank, record.block, record.start_ns))


def block_name(block: int, num_processors: int) -> str:
    return "OS block" if block == num_processors else f"processor {block}"


def write_chrome_trace(records: Sequence[TraceRecord], num_processors: int, file: Path) -> None:
    """Write `chrome_trace(...)`, one event per line."""
    events = ",\n".join(json.dumps(event) for event in chrome_trace(records, num_processors))
    file.write_text(f'{{"displayTimeUnit": "ns", "traceEvents": [\n{events}\n]}}\n', encoding="utf-8")


def chrome_trace(records: Sequence[TraceRecord], num_processors: int) -> list[dict[str, Any]]:
    """Events: names of ranks (pid) and blocks (tid), a slice per record, an arrow per packet with rows.

    Times are microseconds since the first slice began. An arrow goes from a packet's DISPATCH to its first GEMM0; at
    most `MAX_FLOWS` are drawn.
    """
    origin = min((record.start_ns for record in records), default=0)
    slices = [_slice(record, origin) for record in records]
    return [*_names(records, num_processors), *slices, *_flows(records, origin)]


def _names(records: Sequence[TraceRecord], num_processors: int) -> Iterator[dict[str, Any]]:
    for rank in sorted({record.rank for record in records}):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for rank, block in sorted({(record.rank, record.block) for record in records}):
        lane = {"ph": "M", "pid": rank, "tid": block}
        yield lane | {"name": "thread_name", "args": {"name": block_name(block, num_processors)}}
        yield lane | {"name": "thread_sort_index", "args": {"sort_index": block}}


def _slice(record: TraceRecord, origin: int) -> dict[str, Any]:
    args = {"peer": record.peer, "expert": record.expert, "m": record.m, "n": record.n}
    duration = {"dur": (record.end_ns - record.start_ns) / 1000, "args": args}
    return {"ph": "X", "name": record.name, "cat": "task", **_at(record, origin), **duration}


def _at(record: TraceRecord, origin: int) -> dict[str, Any]:
    return {"pid": record.rank, "tid": record.block, "ts": (record.start_ns - origin) / 1000}


def _flows(records: Sequence[TraceRecord], origin: int) -> Iterator[dict[str, Any]]:
    """Two events per packet: the arrow's start in the DISPATCH slice and its end at the GEMM0 slice."""
    for number, (sent, used) in enumerate(islice(_packets(records), MAX_FLOWS)):
        flow = {"name": "packet", "cat": "packet", "id": number}
        yield {"ph": "s", **flow, **_at(sent, origin)}
        yield {"ph": "f", "bp": "e", **flow, **_at(used, origin)}


def _packets(records: Sequence[TraceRecord]) -> Iterator[tuple[TraceRecord, TraceRecord]]:
    """(DISPATCH, first GEMM0) of each packet that has rows, in the order of dispatch."""
    by_time = sorted(records, key=lambda record: (record.start_ns, record.rank, record.block))
    first: dict[tuple[int, int, int], TraceRecord] = {}
    for record in by_time:
        if record.kind == GEMM0:
            first.setdefault((record.peer, record.rank, record.expert), record)  # source, owner, expert
    for record in by_time:
        packet = (record.rank, record.peer, record.expert)
        if record.kind == DISPATCH and packet in first:
            yield record, first[packet]
