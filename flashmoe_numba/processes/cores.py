"""How many cores this process may use: those that it may run on, and no more than its containers' quota pays for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


def count_cores(proc: Path = PROC) -> int:
    """Cores for threads that are at work all the time; at least one.

    A quota of 1.5 cores counts as 1: threads here wait by looking at memory, and when together they have used up the
    quota of a period, the system stops all of them until the next one. What is left serves OS blocks and the rest.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *quotas(proc)])))


def quotas(proc: Path = PROC) -> Iterator[float]:
    """In cores, of the control groups that hold this process, cgroup v1 and v2, each with all groups around it."""
    for controllers, group in _groups(proc):
        for folder in _folders(proc, controllers, group):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or not of this kind
                yield _quota(folder)


def _quota(folder: Path) -> float:
    """Of one group.

    Raises:
        OSError, ValueError: it has none.
    """
    file = folder / "cpu.max"  # of v2: "150000 100000", or "max 100000"
    if file.exists():
        quota, period = file.read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) <= 0:  # v1 has -1 for no quota
        raise ValueError(f"{folder} has no quota")
    return int(quota) / int(period)


def _groups(proc: Path) -> Iterator[tuple[set[str], str]]:
    """(controllers, path of this process's group) of each hierarchy; v2 has no controllers there."""
    with contextlib.suppress(OSError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                yield set(filter(None, controllers.split(","))), group


def _folders(proc: Path, controllers: set[str], group: str) -> Iterator[Path]:
    """Of the group and those around it, as far as this container sees them."""
    with contextlib.suppress(OSError):
        for line in (proc / "mountinfo").read_text().splitlines():
            fields, _, kind = line.partition(" - ")
            root, point = fields.split()[3:5]
            name, _, options = kind.split(maxsplit=2)
            if name == ("cgroup" if controllers else "cgroup2") and controllers <= set(options.split(",")):
                inside = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
                yield from (Path(point, part) for part in (inside, *inside.parents))


def default_processors(num_ranks: int) -> int:
    """Cores of this process, shared out among the ranks; at least one."""
    return max(1, count_cores() // num_ranks)
