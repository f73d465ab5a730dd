"""Ranks as processes of any hosts: those of one share memory, those of others are reached by MPI messages.

Of a rank on another host there is an *image* here, a segment of which only the control words are kept fresh.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from reference.arrays import Array
from reference.hosts import Hosts

from ..kernel.peers import SHOWN_PER_DEADLINE
from ..kernel.wire import FIRST, PUT_WORDS
from ..processes.meeting import CLOSE_DEADLINE_S, SETUP_DEADLINE_S
from ..processes.netmod import netmod, require_saved
from .carrier import Carrier, most_messages
from .carrier_thread import CarrierThread
from .mpi import MpiHeap
from .protocols import Memory


class HostsHeap(MpiHeap):
    """Segments of the ranks of this host, and images of the others'.

    Args:
        comm: an mpi4py communicator.
        ranks_per_host: pretend that only so many ranks share a host, in their order. For tests.

    Raises:
        ValueError: MPI cannot do it, and why.
    """

    def __init__(
        self, comm: Any, setup_deadline_s: float = SETUP_DEADLINE_S, ranks_per_host: int | None = None
    ) -> None:
        self._comms: list[Any] = []  # for letters, and for rows
        self._carrier: CarrierThread | None = None
        super().__init__(comm, setup_deadline_s)
        if ranks_per_host is not None:
            self.hosts = Hosts.even(self.num_ranks, ranks_per_host)
        if self.hosts.is_one:
            return
        self.together(_require_threads)
        if comm.rank == 0:
            _warn_of_losses()
        self._comms = [self._duplicate(self._comm) for _ in range(2)]

    def allocate(self, num_bytes: int, memory: Memory | None = None) -> None:
        """Take zeroed segments of `num_bytes` each. The system gives memory as it is touched.

        Raises:
            ValueError: not enough shared memory.
        """
        rank_idx = self.rank_indices[0]
        here = self.hosts.sharing(rank_idx)
        shared = dict(zip(here, self._share(len(here), num_bytes), strict=True))
        self.segments = [
            shared[rank] if rank in shared else np.zeros(num_bytes, np.uint8) for rank in range(self.num_ranks)
        ]
        self.barrier()

    def carry(self, control_at: int, wires: Sequence[Array], most_bytes: int) -> None:
        if self.hosts.is_one:
            return
        _require_saved(wires[0], most_bytes, self.hosts)
        rank_idx = self.rank_indices[0]
        others = [rank for rank in range(self.num_ranks) if self.hosts.are_apart(rank, rank_idx)]
        letters, rows = self._comms
        carrier = Carrier(letters, rows, rank_idx, self.segments, others, control_at, wires[0])
        self._carrier = CarrierThread(carrier)
        weakref.finalize(self, self._carrier.stop)  # at the latest before the interpreter, and MPI with it, ends

    def carrying(self, deadline_s: float) -> AbstractContextManager[None]:
        if self._carrier is None:
            return super().carrying(deadline_s)
        return self._carrier.carrying(deadline_s, deadline_s / SHOWN_PER_DEADLINE)

    def close(self, check: Callable[[], None] | None) -> None:
        try:
            super().close(check)
        finally:
            self._stop()

    def _come_to_close(self, check: Callable[[], None]) -> None:
        if self._carrier is None:
            super()._come_to_close(check)
            return
        with self._carrier.carrying(CLOSE_DEADLINE_S):
            super()._come_to_close(check)
            self._carrier.part(CLOSE_DEADLINE_S)
        self._stop()

    def _stop(self) -> None:
        if self._carrier is not None:
            self._carrier.stop()

    def _free(self) -> None:
        for comm in self._comms:
            comm.Free()
        super()._free()


def _require_threads() -> None:
    from mpi4py import MPI

    if (level := MPI.Query_thread()) != MPI.THREAD_MULTIPLE:
        names = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED"}
        rule = "comm must be of an MPI that threads may call where its ranks lie on several hosts (THREAD_MULTIPLE"
        raise ValueError(f"{rule}, mpi4py's default), got THREAD_{names[level]}")


def _require_saved(wire: Array, most_bytes: int, hosts: Hosts) -> None:
    """That MPI keeps all messages of a call to a rank, whose puts have room in the ring, and so many bytes of rows."""
    from mpi4py import MPI

    puts_to_all = (wire.size - FIRST) // PUT_WORDS
    require_saved(MPI, most_messages(-(-puts_to_all // hosts.most_apart), most_bytes))


def _warn_of_losses() -> None:
    """What becomes of the other ranks where one is lost, if MPI's network layer does not let them live on."""
    from mpi4py import MPI

    if warning := netmod(MPI).warning():
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
