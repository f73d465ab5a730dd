"""How fast messages are between machines: a small one there and back, and many large ones in one direction.

One rank of each machine takes part, and one pair of machines at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from reference.arrays import Array

from ..errors import FlashMoEError

SMALL_BYTES, CHUNK_BYTES = 8, 2**20
ROUNDS, WARM_UP = 200, 20
REPEATS = 3
LEAST_S = 0.1  # of a measured stream: what buffers swallow at its begin counts for little then
MOST_CHUNKS = 4096
IN_FLIGHT = 4
PATIENCE_S = 30.0


class Link(NamedTuple):
    """Between two machines, which are named by their place in the list: half of a round trip, and 1e9 bytes/s."""

    source: int
    target: int
    latency_ns: float
    gbps: float


def measure_links(comm: Any, machines: Sequence[int]) -> list[Link]:
    """Both directions of every pair of machines, on the first rank of the first machine; empty on all others.

    Args:
        comm: an mpi4py communicator, all of whose ranks call this.
        machines: a rank of each.

    Raises:
        FlashMoEError: a message did not come within `PATIENCE_S`.
    """
    found: list[Link] = []
    for i, j in combinations(range(len(machines)), 2):
        pair = machines[i], machines[j]
        mine: list[Link] = []
        if comm.rank in pair:
            talk = _Talk(comm, pair[comm.rank == pair[0]])
            latency_ns = talk.latency_ns(comm.rank == pair[0])
            there, back = talk.gbps(comm.rank == pair[0]), talk.gbps(comm.rank == pair[1])
            mine = [Link(i, j, latency_ns, there), Link(j, i, latency_ns, back)]
        everybody = comm.allgather(mine if comm.rank == pair[0] else [])
        found += [link for part in everybody for link in part]
    return found if comm.rank == machines[0] else []


class _Talk:
    """One rank's side of a pair."""

    def __init__(self, comm: Any, peer: int) -> None:
        self._comm, self._peer = comm, peer
        self._chunk = np.zeros(CHUNK_BYTES, np.uint8)
        self._small = np.zeros(SMALL_BYTES, np.uint8)

    def latency_ns(self, begins: bool) -> float:
        """The median of half round trips."""
        times = []
        for _ in range(WARM_UP + ROUNDS):
            start = time.perf_counter_ns()
            for sends in (begins, not begins):
                self._move(self._small, sends)
            times.append((time.perf_counter_ns() - start) / 2)
        return median(times[WARM_UP:])

    def gbps(self, sends: bool) -> float:
        """The median over streams that are long enough; the sender's watch decides for both."""
        chunks = 1
        while self._agreed(self._stream(chunks, sends), sends) < LEAST_S and chunks < MOST_CHUNKS:
            chunks *= 2
        times = [self._agreed(self._stream(chunks, sends), sends) for _ in range(REPEATS)]
        return chunks * CHUNK_BYTES / median(times) / 1e9

    def _stream(self, chunks: int, sends: bool) -> float:
        """Seconds from the first chunk until the receiver has said that all are there."""
        start, moving = time.perf_counter(), []
        for _ in range(chunks):
            moving.append(self._start(self._chunk, sends))
            if len(moving) == IN_FLIGHT:
                self._finish(moving.pop(0))
        for request in moving:
            self._finish(request)
        self._move(self._small, not sends)
        return time.perf_counter() - start

    def _agreed(self, seconds: float, sends: bool) -> float:
        """The sender's."""
        word = np.array([seconds])
        self._move(word, sends)
        return float(word[0])

    def _move(self, data: Array, sends: bool) -> None:
        self._finish(self._start(data, sends))

    def _start(self, data: Array, sends: bool) -> Any:
        return self._comm.Isend(data, self._peer) if sends else self._comm.Irecv(data, self._peer)

    def _finish(self, request: Any) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not request.Test():
            if time.monotonic() > limit:
                raise FlashMoEError(f"no message between ranks {self._comm.rank} and {self._peer} for {PATIENCE_S:g} s")
