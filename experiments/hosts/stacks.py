"""What processes on hosts are at, where they should have gone on: their states, and the Python stacks of ranks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path

from .namespaces import Hosts

STACK_PATIENCE_S = 2.0


def tell_stacks(folder: Path) -> None:
    """In a rank, before anything else: on a signal write the stacks of all threads into the folder."""
    file = (folder / f"{os.getpid()}.stack").open("w")
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def at_what(hosts: Hosts, folder: Path) -> str:
    """Lines about each process of the hosts, and the stacks of those that tell them."""
    lines = [f"load {os.getloadavg()[0]:.1f}"]
    for i, name in enumerate(hosts.names):
        for pid in hosts.processes(i):
            with contextlib.suppress(OSError):
                lines.append(f"{name}: {_describe(pid)}")
                if (folder / f"{pid}.stack").exists():
                    os.kill(pid, signal.SIGUSR2)
    time.sleep(STACK_PATIENCE_S)
    stacks = {file.stem: file.read_text() for file in sorted(folder.glob("*.stack"))}
    return "\n".join(lines + [f"stacks of process {pid}:\n{text}" for pid, text in stacks.items() if text])


def _describe(pid: int) -> str:
    folder = Path(f"/proc/{pid}")
    command = " ".join((folder / "cmdline").read_text().split("\0")[:4])
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return f"process {pid}, state {fields[0]}, {cpu_s:.1f} s of CPU: {command}"
