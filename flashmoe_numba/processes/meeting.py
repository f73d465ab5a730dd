"""Ranks as processes, of one machine or several: how they agree while a layer is set up and taken down, not in calls.

MPI's own collectives wait without a limit, so the ones here poll a non-blocking request until a deadline.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from reference import Hosts
from reference.arrays import Array

from .machine import machine_name
from .ownership import Owned

T = TypeVar("T")
SETUP_DEADLINE_S = 600.0  # a rank may compile the kernel meanwhile
CLOSE_DEADLINE_S = 3600.0  # a rank may do much between its last call and its close


class Meeting(Owned):
    """The ranks of `comm`, an mpi4py communicator or a `GroupCommunicator`.

    Args:
        setup_deadline_s: a rank that waits for the others longer than that raises a TimeoutError.
    """

    all_here = False

    def __init__(self, comm: Any, setup_deadline_s: float) -> None:
        self.segments: list[Array] = []
        self.num_ranks = comm.size
        self.rank_indices = range(comm.rank, comm.rank + 1)
        self._setup_deadline_s = setup_deadline_s
        self._comm = self._duplicate(comm)  # its messages cannot meet the caller's
        self.barrier()
        self.hosts = self._find_hosts()
        if comm.rank == self.first_here:
            unlink_startup_segment()

    def agree(self, error: Exception | None, same: Mapping[str, Any] | None = None) -> None:
        """Raise on every rank if any rank brings an error, or if values by name are not the `same` on all ranks.

        Raises:
            Exception: this rank's own error.
            RuntimeError: another rank's error, quoted.
            ValueError: names of values that differ, and which rank has which.
        """
        everybody = self._gather(f"rank {self._comm.rank}: {error}" if error is not None else "")
        values = self._gather(json.dumps({name: repr(value) for name, value in (same or {}).items()}))
        failed = [text for text in everybody if text]
        different = list(differences([json.loads(text) for text in values]))
        if failed or different:
            with contextlib.suppress(Exception):  # the error that is raised next is the one to tell
                self._free()  # as all ranks do now
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"another rank could not start: {failed[0]}")
        if different:
            raise ValueError(f"all ranks must be given the same: {'; '.join(different)}")

    def segments_of(self, rank_idx: int) -> list[Array]:
        return self.segments

    def together(self, step: Callable[[], T]) -> T:
        """What this rank's step returns; if it fails on any rank, raise on all as `agree` does."""
        error = None
        try:
            result = step()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result

    @property
    def first_here(self) -> int:
        """The lowest rank of this one's host."""
        return self.hosts.sharing(self._comm.rank)[0]

    def from_first(self, make: Callable[[], str]) -> str:
        """The text of this host's first rank, on all of its ranks; if one cannot be made, raise on all as `agree`."""
        is_first = self._comm.rank == self.first_here
        return self._gather(self.together(lambda: make() if is_first else ""))[self.first_here]

    def require_one_machine(self) -> None:
        """Raise a ValueError on every rank, if the ranks do not share a machine."""
        num_local = len(self.hosts.sharing(self._comm.rank))
        where = f"{argument_of(self._comm)} must lie on one machine"
        rule = f"{where}, but {num_local} of {self.num_ranks} ranks share this one, {platform.node()}"
        self.agree(ValueError(rule) if num_local != self.num_ranks else None)

    def _find_hosts(self) -> Hosts:
        """By machines, which are numbered by their first ranks."""
        machines = self._gather(machine_name())
        return Hosts(tuple(machines.index(machine) for machine in machines))

    def _duplicate(self, comm: Any) -> Any:
        """A communicator of the same ranks for messages of other kinds."""
        made, request = comm.Idup()
        self._wait_for_all(request)
        return made

    def _gather(self, text: str) -> list[str]:
        """Everybody's text."""
        data = np.frombuffer(text.encode(errors="replace"), np.uint8)
        sizes = self._gather_rows(np.array([data.size], np.int64))[:, 0]
        mine = np.zeros(sizes.max(), np.uint8)
        mine[: data.size] = data
        return [bytes(row[:size]).decode() for row, size in zip(self._gather_rows(mine), sizes, strict=True)]

    def _gather_rows(self, mine: Array) -> Array:
        """Everybody's array, `[num_ranks, mine.size]`; all are of one size."""
        everybody = np.empty((self.num_ranks, mine.size), mine.dtype)
        self._wait_for_all(self._comm.Iallgather(mine, everybody))
        return everybody

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            TimeoutError: some rank did not come.
        """
        self._wait_for_all(self._comm.Ibarrier())

    def _wait_for_all(self, request: Any) -> None:
        """Wait for a collective of setting up."""
        try:
            wait_for(request, self._setup_deadline_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"{error} (setup_deadline_s): a rank failed before it made its layer, or does not make this one; "
                "`mpirun -n N python -m mpi4py SCRIPT` and torchrun end all ranks when one fails"
            ) from None

    def carry(self, control_at: int, wires: Sequence[Array], most_bytes: int) -> None:
        """Nothing is carried between ranks that share memory."""

    def carrying(self, deadline_s: float) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self, check: Callable[[], None] | None) -> None:
        """Give everything back, which takes all ranks, or with `check=None` leave it to the end of the process.

        Args:
            check: called while waiting for the others; raises if one of them will not come.
        """
        if check is not None and self.segments:
            self._come_to_close(check)
            self._free()
        self.segments = []

    def _come_to_close(self, check: Callable[[], None]) -> None:
        """Wait until all ranks close."""
        wait_for(self._comm.Ibarrier(), CLOSE_DEADLINE_S, check)

    def _free(self) -> None:
        """Give back what this rank holds, as all ranks do now."""
        self._comm.Free()


def argument_of(comm: Any) -> str:
    """What the user gave this communicator as, for messages."""
    return str(getattr(comm, "argument", "comm"))


def wait_for(request: Any, deadline_s: float, check: Callable[[], None] = lambda: None) -> None:
    """Until a non-blocking collective has ended; `check` is called meanwhile.

    Raises:
        TimeoutError: it has not for so long.
    """
    start, nap = time.monotonic(), 1e-5
    while not request.Test():
        check()
        if time.monotonic() - start > deadline_s:
            raise TimeoutError(f"not all ranks came to a collective of the layer within {deadline_s:g} s")
        time.sleep(nap)
        nap = min(2 * nap, 0.01)


def differences(values: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """For each name whose value is not the same on all ranks: rank 0's value, and the first other one.

    Args:
        values: by rank, then by name.
    """
    for name in dict.fromkeys(name for of_rank in values for name in of_rank):
        found = [of_rank.get(name, "nothing") for of_rank in values]
        other = next((rank_idx for rank_idx, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            yield f"rank 0 has {name}={found[0]}, rank {other} has {name}={found[other]}"


def unlink_startup_segment() -> None:
    """Take the name off mpich's own segment once all ranks have it, so that no death leaves it behind."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for name in set(re.findall(r"/dev/shm/mpich_shm_\w+", maps)):
            Path(name).unlink()
