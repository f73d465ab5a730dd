"""What every block did and when, read from the kernel's buffers, and the same as a Chrome trace.

A lane is one block of one rank. The clock is the machine's monotonic one, which all processes share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reference import DISPATCH, GEMM0
from reference.task_kinds import RECEIVE
from reference.traces import Event, Slice, flow_events, name_events, slice_events, write_events

from ..kernel.trace import EVENT_WORDS


def filled(buffer: np.ndarray) -> np.ndarray:
    """The part of a block's buffer that holds its counter and its records.

    Raises:
        ValueError: the block did more than its buffer holds.
    """
    count, room = int(buffer[0]), buffer.size // EVENT_WORDS - 1
    if count > room:
        raise ValueError(f"a trace buffer for {room} records must hold {count}")
    return buffer[: (1 + count) * EVENT_WORDS]


def decode(buffers: Mapping[tuple[int, int], np.ndarray]) -> list[Slice]:
    """The slices of `FlashMoE.traces`, ordered by rank, block and time."""
    slices = []
    for (rank, block), buffer in sorted(buffers.items()):
        rows = filled(buffer).reshape(-1, EVENT_WORDS)[1:, : EVENT_WORDS - 1].tolist()
        slices += [Slice(rank, block, *row) for row in rows]
    return sorted(slices, key=lambda task: (task.rank, task.lane, task.start_ns))


def from_zero(slices: Sequence[Slice]) -> list[Slice]:
    """The same with times since the first of them began."""
    origin = min((task.start_ns for task in slices), default=0)
    return [task._replace(start_ns=task.start_ns - origin, end_ns=task.end_ns - origin) for task in slices]


def block_name(block: int, num_processors: int) -> str:
    return "OS block" if block == num_processors else f"processor {block}"


def write_chrome_trace(slices: Sequence[Slice], num_processors: int, file: Path) -> None:
    """Write `chrome_trace(...)`, one event per line."""
    write_events(chrome_trace(slices, num_processors), file)


def chrome_trace(slices: Sequence[Slice], num_processors: int) -> list[Event]:
    """Events: names of ranks (pid) and blocks (tid), a slice per record, an arrow per packet with rows.

    Times are microseconds since the first slice began. An arrow goes from a packet's DISPATCH to the first GEMM0 of a
    tile with its rows; those of the earliest packets are drawn.
    """
    slices = from_zero(slices)
    ranks = {rank: f"rank {rank}" for rank in sorted({task.rank for task in slices})}
    lanes = sorted({(task.rank, task.lane) for task in slices})
    names = name_events(ranks, {(rank, block): block_name(block, num_processors) for rank, block in lanes})
    return [*names, *slice_events(slices), *flow_events(_packets(slices))]


def _packets(slices: Sequence[Slice]) -> Iterator[tuple[Slice, Slice]]:
    """(DISPATCH, first GEMM0 of a tile with its rows) of each packet that has rows, in the order of dispatch."""
    by_time = sorted(slices, key=lambda task: (task.start_ns, task.rank, task.lane))
    used = _first_gemms(by_time)
    for task in by_time:
        packet = (task.rank, task.peer, task.expert)  # source, owner, expert
        if task.kind == DISPATCH and packet in used:
            yield task, used[packet]


def _first_gemms(by_time: Sequence[Slice]) -> dict[tuple[int, int, int], Slice]:
    """By (source, owner, expert): of the first tile that begins in the packet, else of the last one before it.

    Tiles are cut in the order in which an expert's packets arrive, so the rows of a packet in which none begins are all
    in the tile that began last.
    """
    tiles: dict[tuple[int, int, int], dict[int, Slice]] = {}
    for task in by_time:
        if task.kind == GEMM0:
            tiles.setdefault((task.peer, task.rank, task.expert), {}).setdefault(task.m, task)
    first: dict[tuple[int, int, int], Slice] = {}
    last: dict[tuple[int, int], Slice] = {}  # by (owner, expert)
    for task in by_time:
        if task.kind == RECEIVE and task.n > 0:
            packet, stream = (task.peer, task.rank, task.expert), (task.rank, task.expert)
            begun = tiles.get(packet, {})
            if begun or stream in last:
                first[packet] = begun[min(begun)] if begun else last[stream]
                last[stream] = begun[max(begun)] if begun else last[stream]
    return first
