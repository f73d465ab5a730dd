"""Where a sweep's points run: in processes of this machine, or in the other ranks of an mpirun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any


@contextmanager
def process_pool(jobs: int) -> Iterator[Executor]:
    """`jobs` processes, which end with the block and with this process, however these end."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the lock on the sweep's file
    alive, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(alive,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        end.close()


@contextmanager
def mpi_pool() -> Iterator[Executor | None]:
    """All ranks come here: rank 0 gets a pool of the others, which work in it until rank 0 leaves and get None."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    _hear_ctrl_c(MPI.COMM_WORLD.rank)
    pool: Any  # by its methods an Executor
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        try:
            yield pool
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


def _hear_ctrl_c(rank: int) -> None:
    """Rank 0 hears Ctrl-C once, though the terminal and mpirun both send it; it then tells the others to leave."""
    left = [KeyboardInterrupt] if rank == 0 else []

    def hear(*_: object) -> None:
        if left:
            raise left.pop()

    signal.signal(signal.SIGINT, hear)


def _begin_worker(alive: Connection) -> None:
    """Ctrl-C ends a worker without a word, and so does the end of the other end of `alive`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)
