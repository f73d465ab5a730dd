"""Where sweeps and explorations run: in processes of this machine, or in the other ranks of an mpirun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reference.cache_folder import VARIABLE, usable_cache_folder

SAFE_PATH = "PYTHONSAFEPATH"


class Pool(Executor):
    """An executor that Ctrl-C does not tear, and the number of its processes. Only the main thread may submit."""

    def __init__(self, executor: Executor, processes: int) -> None:
        self._executor, self.processes = executor, processes

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with _ctrl_c_held(), _safe_path():  # processes begin here
            return self._executor.submit(fn, *args, **kwargs)


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Ctrl-C comes when the block ends: within, it may leave a lock taken for which this process then waits for ever.

    A process that begins within does not hear it either until `_begin_worker`: it would end with a traceback.
    """
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


@contextmanager
def _safe_path() -> Iterator[None]:
    """A Python that begins within does not look for modules in the current folder, say for signal in its signal.py.

    What it needs from there all the same it finds by the path that this process hands to it.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


@contextmanager
def process_pool(jobs: int) -> Iterator[Pool]:
    """`jobs` processes, which end with the block and with this process, however these end."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the lock on the sweep's file
    alive, end = context.Pipe(duplex=False)
    given = alive, usable_cache_folder()
    with _safe_path():  # for the resource tracker
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=given)
    try:
        yield Pool(pool, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        end.close()


@contextmanager
def mpi_pool() -> Iterator[Pool | None]:
    """All ranks come here: rank 0 gets a pool of the others, which work in it until rank 0 leaves and get None."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    _hear_ctrl_c(MPI.COMM_WORLD.rank)
    pool: Any  # by its methods an Executor
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        try:
            yield None if pool is None else Pool(pool, pool.num_workers)
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


def _begin_worker(alive: Connection, folder: Path) -> None:
    """Ctrl-C ends a worker without a word, and so does the end of the other end of `alive`.

    Compiled code is in `folder`, also where that is a temporary one: one for all workers.
    """
    os.environ[VARIABLE] = str(folder)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)
