"""What carriers take of cores: puts between hosts as a layer makes them, by the carriers that it has.

Each rank puts rows to all ranks of other hosts, and the next ones when theirs have come: one by one, as results come.
The time is that of all threads but the one that waits.

Leaves out: what processors lose that share caches with carriers.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from reference.layout import CONTROL_WORDS

from ..errors import FlashMoEError
from ..heap.hosts import HostsHeap
from ..kernel.wire import FIRST, PEER, PUT_WORDS, STAMP, WORD, Put

PUT_BYTES = 2**17  # 32 rows of 4 KB
NUM_PUTS = 32  # of a rank to each other in a stream
REPEATS = 5
PATIENCE_S = 30.0
LOOK_S = 1e-3


def measure_carrying(comm: Any, ranks_per_host: int | None = None) -> float:
    """Bytes between hosts over the time of cores at both ends, in 1e9 bytes/s: the median of some streams.

    Args:
        comm: an mpi4py communicator, all of whose ranks call this.
        ranks_per_host: as `HostsHeap` has it.

    Raises:
        FlashMoEError: a put did not come within `PATIENCE_S`.
    """
    stream = Stream(comm, ranks_per_host)
    spent_s: list[float] = [comm.allreduce(stream.run(number)) for number in range(REPEATS + 1)]
    stream.heap.close(lambda: None)
    num_bytes: int = comm.allreduce(len(stream.others)) * NUM_PUTS * PUT_BYTES
    return num_bytes / median(spent_s[1:]) / 1e9  # the first connects


class Stream:
    """One rank's segment: what it sends, room for what each rank may send here, a flag of each, control words.

    Attributes:
        others: ranks of other hosts.
        received: `[num_ranks, bytes of a stream]`, what each has sent.
    """

    def __init__(self, comm: Any, ranks_per_host: int | None) -> None:
        self.heap = HostsHeap(comm, ranks_per_host=ranks_per_host)
        self._rank_idx, num_bytes = comm.rank, NUM_PUTS * PUT_BYTES
        self._room_at = num_bytes * (1 + comm.rank)  # in others' segments
        self._flag_at = num_bytes * (1 + comm.size)
        control_at = self._flag_at + 8 * comm.size
        self.heap.allocate(control_at + 8 * CONTROL_WORDS)
        hosts = self.heap.hosts
        self.others = [rank for rank in range(comm.size) if hosts.are_apart(rank, comm.rank)]
        self._ring = np.zeros(FIRST + PUT_WORDS * NUM_PUTS * len(self.others), np.int64)
        self.heap.carry(control_at, [self._ring], num_bytes)
        words = self.heap.segments[comm.rank].view(np.int64)
        self._flags = words[self._flag_at // 8 : control_at // 8]
        self.received = self.heap.segments[comm.rank][num_bytes : self._flag_at].reshape(comm.size, num_bytes)
        self._sent = self.heap.segments[comm.rank][:num_bytes]

    def run(self, number: int) -> float:
        """Seconds that this rank's carrier worked until all puts of all others were here; streams count from 0."""
        self._sent[:] = number + self._rank_idx
        self.heap.barrier()  # so that nothing lands where it is still read
        with self.heap.carrying(PATIENCE_S):
            start_s = time.process_time() - time.thread_time()
            for i in range(NUM_PUTS):
                word = number * NUM_PUTS + i + 1
                for peer in self.others:
                    at, flag_at = i * PUT_BYTES, self._flag_at + 8 * self._rank_idx
                    self._post(Put(peer, at, self._room_at + at, PUT_BYTES, flag_at, word))
                self._await(word)
            return time.process_time() - time.thread_time() - start_s

    def _post(self, put: Put) -> None:
        """As the kernel does it (kernel/wire.py)."""
        number, places = int(self._ring[0]), NUM_PUTS * len(self.others)
        at = FIRST + number % places * PUT_WORDS
        self._ring[0] = number + 1
        self._ring[at + PEER : at + WORD + 1] = put
        self._ring[at + STAMP] = number + 1

    def _await(self, word: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while (self._flags[self.others] < word).any():  # some may be ahead by one
            if time.monotonic() > until:
                late = [rank for rank in self.others if self._flags[rank] < word]
                raise FlashMoEError(f"rows of ranks {late} did not come to rank {self._rank_idx} for {PATIENCE_S:g} s")
            time.sleep(LOOK_S)
