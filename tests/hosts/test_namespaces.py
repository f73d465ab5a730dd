"""The hosts that other tests here stand on: apart, joined by what can be cut, and gone without a trace."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_on_hosts import ROOT, namespaces, require_hosts

SCRIPT = ROOT / "experiments/hosts/namespaces.py"
APART = "hostname; readlink /proc/self/ns/net /proc/self/ns/ipc; ls /dev/shm; touch /dev/shm/$0; ls /dev/shm"
# Asks a port where nobody listens: refused at once by a host that is there.
CALL = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=1.0)
except ConnectionRefusedError:
    print("there")
except OSError:
    print("silence")
"""


def call(hosts, source, target):
    return hosts.run([sys.executable, "-c", CALL, target], on=source).stdout.strip()


def test_hosts_are_apart(hosts_of):
    hosts = hosts_of(2)
    first, second = (hosts.run(["sh", "-c", APART, f"file-{i}"], on=i).stdout.split() for i in range(2))
    assert first[0] == "host-1" and second[0] == "host-2"
    assert first[3:] == ["file-0"] and second[3:] == ["file-1"]  # and nothing before
    here = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "ipc")]
    assert len({*first[1:3], *second[1:3], *here}) == 6


def test_what_one_command_leaves_on_a_host_the_next_one_finds(hosts_of):
    hosts = hosts_of(1)
    hosts.run(["touch", "/dev/shm/note"])
    assert hosts.run(["ls", "/dev/shm"]).stdout.split() == ["note"]
    assert not Path("/dev/shm/note").exists()


def test_hosts_reach_each_other_and_nothing_else(hosts_of):
    hosts = hosts_of(3)
    assert [call(hosts, a, f"host-{b + 1}") for a in range(3) for b in range(3) if a != b] == ["there"] * 6
    seen = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "10.77.0." not in seen and "bridge0" not in links
    assert hosts.run(["ip", "route"]).stdout.split()[0] == "10.77.0.0/24"
    assert hosts.run(["ip", "route"]).stdout.count("\n") == 1  # no way out


def test_a_cable_can_be_cut_and_mended(hosts_of):
    hosts = hosts_of(2)
    hosts.hosts.cut(1)
    assert call(hosts, 0, "host-2") == "silence"
    hosts.hosts.mend(1)
    limit = time.monotonic() + 20
    while call(hosts, 0, "host-2") != "there":
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_processes_of_one_host_are_stopped_and_killed(hosts_of):
    hosts = hosts_of(2)
    running = [hosts.start(["sleep", "100"], on=i) for i in range(2)]
    while [len(hosts.hosts.processes(i)) for i in range(2)] != [1, 1] or not all(map(sleeps, hosts.hosts.processes(0))):
        time.sleep(0.01)

    def await_states(*wanted):
        """A signal comes when a process is next on a core."""
        limit, states = time.monotonic() + 20, []
        while states != [*wanted]:
            assert time.monotonic() < limit, states
            time.sleep(0.01)
            pids = [pid for i in range(2) for pid in hosts.hosts.processes(i)]
            states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids]

    await_states("S", "S")
    hosts.hosts.stop(0)
    await_states("T", "S")
    hosts.hosts.go_on(0)
    hosts.hosts.kill(1)
    assert running[1].wait(10) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    await_states("S")
    assert running[0].poll() is None


def sleeps(pid):
    return "sleep" in Path(f"/proc/{pid}/comm").read_text()


def test_the_launcher_is_called_as_ssh_is(hosts_of):
    hosts = hosts_of(2)
    done = hosts.run([hosts.hosts.launcher, "-x", "host-2", "hostname;", "pwd;", "echo", "'a  b'"])
    assert done.stdout.splitlines() == ["host-2", os.getcwd(), "a  b"]
    done = hosts.run([hosts.hosts.launcher, "host-7", "true"])
    assert (done.returncode, done.stderr) == (255, "there is no host host-7\n")


@pytest.mark.parametrize("signum", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(tmp_path, signum):
    require_hosts(bool(os.environ.get("CI")))
    told = tmp_path / "told"
    line = f"echo $HOSTS_LAUNCHER $(readlink /proc/self/ns/net) > {told}; " + (
        "true" if signum is None else "sleep 100"
    )
    process = subprocess.Popen([sys.executable, str(SCRIPT), "2", "--", "sh", "-c", line], start_new_session=True)
    limit = time.monotonic() + 20
    while not (told.exists() and told.read_text().endswith("\n")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    if signum is not None:
        os.kill(process.pid, signum)
    process.wait(20)
    launcher, space = told.read_text().split()
    while (found := inside(space)) or Path(launcher).parent.exists():
        assert time.monotonic() < limit + 20, found
        time.sleep(0.05)


def inside(space):
    """Commands of the processes that are in this network."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns/net") == space:
                found.append((folder / "cmdline").read_text().split("\0")[:2])
        except OSError:
            continue
    return found


@pytest.mark.parametrize(("why", "missing", "on_ci", "outcome"), [
    ("not root", "", True, "skipped"),
    ("", "ip, tc", False, "skipped"),
    ("", "ip, tc", True, "failed"),
    ("", "", True, "passed"),
])  # fmt: skip
def test_where_hosts_can_be_ci_wants_them(monkeypatch, why, missing, on_ci, outcome):
    monkeypatch.setattr(namespaces, "why_not", lambda: why)
    monkeypatch.setattr(namespaces, "missing_tools", lambda: missing)
    try:
        require_hosts(on_ci)
        seen = "passed"
    except pytest.skip.Exception as error:
        seen, said = "skipped", str(error)
    except pytest.fail.Exception as error:
        seen, said = "failed", str(error)
    assert seen == outcome
    assert outcome == "passed" or re.search(why or "need ip, tc: apt-get install iproute2", said)
