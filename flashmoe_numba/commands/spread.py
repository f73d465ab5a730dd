"""How a command spreads its work over cores or the ranks of an mpirun, and what it says if that ends early."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from ..errors import UsageError
from ..processes import launch
from ..processes.cores import count_cores
from ..processes.mpi_environment import begin_mpi
from ..processes.pools import Pool, mpi_pool, process_pool
from .flags import integer
from .patience import ticking

STOPS = (KeyboardInterrupt, BrokenExecutor, MemoryError)  # end the work early; what was done till then counts
T = TypeVar("T")


def add_jobs_argument(add: Any) -> None:
    """`--jobs`; `add` is the add_argument of a parser or a group."""
    add("--jobs", type=integer(1), metavar="N", help="processes [cores]; not under mpirun")


def open_pool(jobs: int | None) -> AbstractContextManager[Pool | None]:
    """None instead of a pool of one process; under mpirun also in ranks other than 0, which work before they get it.

    Under mpirun this process begins again, once, as the child of a guard that says so if it is killed.

    Raises:
        UsageError: jobs under mpirun, or no mpi4py there.
    """
    if not launch.inside_mpirun():
        jobs = jobs or count_cores()
        return nullcontext() if jobs == 1 else process_pool(jobs)
    if jobs is not None:
        raise UsageError("argument --jobs: under mpirun its ranks are the processes")
    if not importlib.util.find_spec("mpi4py"):
        raise UsageError("under mpirun this needs mpi4py, not found here: pip install 'flashmoe-numba[mpi]'")
    launch.guard_this_rank(0)
    begin_mpi()
    return mpi_pool()


def num_processes(pool: Pool | None) -> int:
    """That work."""
    return 1 if pool is None else pool.processes


def progress(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items, with their number, their rate, the time so far and the time left where stderr ends at a terminal."""
    from tqdm import tqdm

    disable = None if not os.environ.get(launch.TERMINAL_VARIABLE) else False
    bar = tqdm(items, total=total, unit=f" {unit}", disable=disable, dynamic_ncols=True, leave=False)
    with bar, ticking(bar):
        yield from bar


def why_stopped(error: BaseException) -> str:
    """One of STOPS in words."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    reason = "out of memory" if isinstance(error, MemoryError) else "a process died, maybe for lack of memory"
    return f"{reason}: try fewer --jobs"


def stopped_status(error: BaseException) -> int:
    """The exit status after one of STOPS."""
    return 130 if isinstance(error, KeyboardInterrupt) else 1
