"""Several "hosts" on one machine, made of Linux namespaces, for tests of what hosts do to each other.

    python experiments/hosts/namespaces.py 2 -- COMMAND    # run a command on the first of two

Each has a host name, network, System V IPC and /dev/shm of its own; they see each other's processes and files. Their
networks are joined by a bridge that lies in a network of its own, without a way out, so that nothing of it is seen
outside. A host lives as long as one process, its keeper, which ends when ours does, however that dies, and takes all
processes of the host along: nothing is left behind.

Needs root and Debian's iproute2. Not real about them: one clock, one kernel, one disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SEPARATE = ("--net", "--uts", "--ipc", "--mount")
TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv")
WITH_PARENT = ("setpriv", "--pdeathsig")
LAUNCHER = """#!/bin/sh
# mpirun calls it as it calls ssh: [options] HOST COMMAND..., the command in words for a shell.
while case "$1" in -*) ;; *) false ;; esac; do shift; done
host=$1
shift
keeper=$(cat "${0%/*}/$host.keeper" 2>/dev/null) || { echo "there is no host $host" >&2; exit 255; }
exec nsenter --target "$keeper" --net --uts --ipc --mount sh -c "cd '$PWD' && $*"
"""
PATIENCE_S = 10.0


def why_not() -> str:
    """What this machine lacks for it; "" if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts made of namespaces need Linux and root"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", *SEPARATE, "true"], capture_output=True).returncode
    ):
        return "this system does not let root make namespaces"
    return ""


def missing_tools() -> str:
    """Programs that are not installed, where `why_not` has nothing to say; "" if none."""
    return ", ".join(tool for tool in TOOLS if shutil.which(tool) is None)


def lacking() -> str:
    """What this machine lacks for it, programs included; "" if nothing."""
    return why_not() or missing_tools()


class Hosts:
    """`num_hosts` hosts called host-1, host-2, ...; they are numbered from 0.

    Attributes:
        launcher: an executable that stands in for ssh: mpirun's -launcher-exec, or `flashmoe run --launcher`.
    """

    def __init__(self, num_hosts: int) -> None:
        self.names = [f"host-{i + 1}" for i in range(num_hosts)]
        self._folder = Path(tempfile.mkdtemp(prefix="flashmoe_hosts_"))
        self._keepers: list[subprocess.Popen[str]] = []
        self.launcher = self._folder / "launcher"
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        lines = [f"10.77.0.{i + 1} {name}" for i, name in enumerate(self.names)]
        (self._folder / "table").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self.launcher.write_text(LAUNCHER)
        self.launcher.chmod(0o755)
        for name in (*self.names, "switch"):
            self._keepers.append(self._keep(name))
        self._run("ip", "link", "add", "name", "bridge0", "type", "bridge", on=-1)
        self._run("ip", "link", "set", "bridge0", "up", on=-1)
        for i, name in enumerate(self.names):
            (self._folder / f"{name}.keeper").write_text(str(self._keepers[i].pid))
            self._join(i)

    def _keep(self, name: str) -> subprocess.Popen[str]:
        """The process that holds one host's namespaces."""
        keep = [sys.executable, "-IS", __file__, "--keep", name, str(self._folder)]
        command = [*WITH_PARENT, "TERM", "unshare", *SEPARATE, *keep]
        keeper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # a session of its own: a terminal's Ctrl-C is for us
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "ready\n":
            keeper.kill()
            keeper.wait()
            raise OSError(f"host {name} could not be made: see what its commands said on stderr")
        return keeper

    def _join(self, i: int) -> None:
        """A cable from host `i` to the switch."""
        port, keeper = f"port{i}", str(self._keepers[i].pid)
        self._run("ip", "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", keeper, on=-1)
        self._run("ip", "link", "set", port, "master", "bridge0", "up", on=-1)
        self._run("ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0", on=i)
        self._run("ip", "link", "set", "eth0", "up", on=i)

    def on(self, i: int) -> list[str]:
        """What to put before a command so that it runs on host `i`, and dies with who started it."""
        there = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]  # a host has the root folder as its own
        return [*WITH_PARENT, "KILL", "nsenter", "--target", str(self._keepers[i].pid), *SEPARATE, *there]

    def _run(self, *command: str, on: int) -> None:
        done = subprocess.run([*self.on(on), *command], capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def where(self, num_ranks: int, hosts: Sequence[int] | None = None) -> list[str]:
        """Flags of an mpirun on any of them, for the same number of ranks on each of `hosts` (all)."""
        names = [self.names[i] for i in (range(len(self.names)) if hosts is None else hosts)]
        counts = ["-ppn", str(num_ranks // len(names)), "-n", str(num_ranks)]
        return ["-launcher", "ssh", "-launcher-exec", str(self.launcher), "-hosts", ",".join(names), *counts]

    # ---- what can happen to a host

    def processes(self, i: int) -> list[int]:
        """Of host `i`, without its keeper's own."""
        return processes_beside(self._keepers[i].pid)

    def networks(self) -> set[str]:
        """Names of the hosts' networks, by which their processes are known."""
        return {os.readlink(f"/proc/{keeper.pid}/ns/net") for keeper in self._keepers}

    def shared_memory(self, i: int) -> list[str]:
        """What lies in the /dev/shm of host `i`."""
        return os.listdir(f"/proc/{self._keepers[i].pid}/root/dev/shm")

    def kill(self, i: int) -> None:
        """All processes die; the system goes on, and tells their peers so."""
        kill_beside(self._keepers[i].pid)

    def power_off(self, i: int) -> None:
        """All dies at once, and nobody is told."""
        self.cut(i)
        self.kill(i)

    def stop(self, i: int) -> None:
        """All processes stand still."""
        send(self.processes(i), signal.SIGSTOP)

    def go_on(self, i: int) -> None:
        send(self.processes(i), signal.SIGCONT)

    def cut(self, i: int) -> None:
        """The cable of host `i`."""
        self._run("ip", "link", "set", f"port{i}", "down", on=-1)

    def mend(self, i: int) -> None:
        self._run("ip", "link", "set", f"port{i}", "up", on=-1)

    def limit(self, mbit: float) -> None:
        """What every cable carries in each direction from now on, in 1e6 bits per second."""
        for i in range(len(self.names)):
            for device, on in (("eth0", i), (f"port{i}", -1)):
                rate = ("rate", f"{mbit:g}mbit", "burst", "128k", "latency", "100ms")
                self._run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate, on=on)

    def close(self) -> None:
        """End everything that runs there, and the hosts."""
        for keeper in self._keepers:
            keeper.terminate()
        for keeper in self._keepers:
            keeper.wait()
            if keeper.stdout is not None:
                keeper.stdout.close()
        self._keepers = []
        shutil.rmtree(self._folder, ignore_errors=True)


# ---- keepers


def keep(name: str, folder: Path) -> None:
    """Be the keeper of the namespaces that this process has, until it is told to end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    socket.sethostname(name)
    for command in (
        ["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", "/dev/shm"],
        ["mount", "--bind", str(folder / "table"), "/etc/hosts"],
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    kill_beside(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)


def processes_beside(keeper: int) -> list[int]:
    """All of a keeper's host but itself."""
    return [pid for pid in processes_in({os.readlink(f"/proc/{keeper}/ns/net")}) if pid != keeper]


def processes_in(networks: set[str]) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or a zombie
            if os.readlink(folder / "ns/net") in networks:
                found.append(int(folder.name))
    return found


def kill_beside(keeper: int) -> None:
    """Until none is left: one may have begun another meanwhile."""
    limit = time.monotonic() + PATIENCE_S
    while found := processes_beside(keeper):
        send(found, signal.SIGKILL)
        if time.monotonic() > limit:
            raise TimeoutError(f"processes {found} do not die")
        time.sleep(0.01)


def send(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@contextlib.contextmanager
def some(num_hosts: int) -> Iterator[Hosts]:
    """Hosts, for who wants an error in words where they cannot be."""
    if lack := lacking():
        raise OSError(lack)
    with Hosts(num_hosts) as hosts:
        yield hosts


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--keep"]:
        keep(argv[1], Path(argv[2]))
        return 0
    if len(argv) < 3 or not argv[0].isdecimal() or int(argv[0]) < 1 or argv[1] != "--":
        print("usage: python experiments/hosts/namespaces.py NUM_HOSTS -- COMMAND...", file=sys.stderr)
        return 2
    with some(int(argv[0])) as hosts:
        environment = os.environ | {"HOSTS": ",".join(hosts.names), "HOSTS_LAUNCHER": str(hosts.launcher)}
        try:
            return subprocess.run([*hosts.on(0), *argv[2:]], env=environment).returncode
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
