"""Commands over several hosts: they start there, meet there, measure what is between, and say which host is wrong."""

import ast
import contextlib
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from meeting_worker import DEADLINE_S, SILENT, VICTIM
from running_on_hosts import ROOT

from flashmoe_numba.processes.launch import TERMINAL_VARIABLE, find_mpirun
from sim import load_hardware
from sim.world.machine_files import to_toml

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

WORKER = ROOT / "tests/hosts/meeting_worker.py"
GRACE_S = 15  # guards, a busy machine


def meet(hosts, how, num_ranks=4, started=lambda: None):
    """What four ranks on the last two of three hosts did: mpirun is on the first, where no rank is."""
    command = [find_mpirun(), *hosts.hosts.where(num_ranks, hosts=[1, 2]), sys.executable, WORKER, how]
    process = hosts.start(command)
    started()
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ranks_of_several_hosts_meet_and_collect(hosts_of):
    code, out, err = meet(hosts_of(3), "well")
    assert (code, err) == (7, ""), err  # what rank 0 has said to all
    assert ast.literal_eval(out) == [{"rank": rank, "here": 2, "machines": (0, 2)} for rank in range(4)]


def test_a_rank_that_is_at_work_is_waited_for(hosts_of):
    assert meet(hosts_of(3), "slow")[0] == 7


@pytest.mark.parametrize(("how", "reason"), [
    ("raise", f"rank {VICTIM} left because of an error of its own"),
    ("silent", f"no rank made progress for {DEADLINE_S:g} s"),
    ("die", f"no rank made progress for {DEADLINE_S:g} s"),
])  # fmt: skip
def test_who_does_not_come_is_named_by_all_others(hosts_of, how, reason):
    began = time.monotonic()
    code, _, err = meet(hosts_of(3), how)
    assert code != 0 and time.monotonic() - began < DEADLINE_S + GRACE_S
    said = who_waited(err)
    assert set(said) == {0, 1, 2}, err
    assert reason in said.values() and set(said.values()) <= {reason, *(f"rank {rank} gave up" for rank in said)}, err
    assert ("planted" in err) == (how == "raise") and (f"rank {VICTIM} was killed" in err) == (how == "die")


def who_waited(err):
    """rank -> why it ended, of those that say they waited for the victim, and maybe for others on their way.

    Who hears why the victim left may still be on its way to where that was.
    """
    said = (
        r"rank (\d) (?:gave up|stopped) before step \d, while it waited for rank ([\d, ]+) to come to meeting \d: (.*)"
    )
    named = {int(rank): (late, why) for rank, late, why in re.findall(said, err)}
    return {rank: why for rank, (late, why) in named.items() if str(VICTIM) in late or f"rank {VICTIM}" in why}


def is_silent(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == SILENT


def test_a_host_without_power_is_named_by_the_other(hosts_of):
    hosts = hosts_of(3)

    def switch_off():
        while not any(is_silent(pid) for pid in hosts.hosts.processes(2)):
            time.sleep(0.05)
        hosts.hosts.power_off(2)

    began = time.monotonic()
    code, _, err = meet(hosts, "silent", started=switch_off)
    assert code != 0 and time.monotonic() - began < DEADLINE_S + GRACE_S
    assert set(who_waited(err)) == {0, 1}, err


def test_doctor_measures_the_limits_of_cables_and_writes_them(hosts_of, tmp_path):
    hosts, file, mbit = hosts_of(3), tmp_path / "my.toml", 100
    file.write_text(to_toml(load_hardware("2xH100")))
    hosts.hosts.limit(mbit)
    flags = ["--hosts", "host-2,host-3", "--json", str(tmp_path / "doctor.json"), "--machine-file", str(file)]
    done = hosts.flashmoe("doctor", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert (report["netmod"], report["survives_a_lost_rank"], report["threads"]) == ("ofi/tcp", True, True)
    assert report["hosts"] == ["host-2", "host-3"]
    assert [(link["source"], link["target"]) for link in report["links"]] == [(0, 1), (1, 0)]
    for link in report["links"]:  # what buffers take at the begin is some percent of a stream
        assert 0.25 * mbit / 8e3 < link["gbps"] < 1.15 * mbit / 8e3
    assert 0.01 < report["core_gbps"] < 100
    assert "host-2 to host-3" in done.stdout and "ofi/tcp, outlives a lost rank" in done.stdout
    machine = load_hardware(str(file))
    assert (machine.num_nodes, machine.gpus_per_nic) == (2, 2)
    assert min(link["gbps"] for link in report["links"]) <= machine.nic_gbps * 1.001
    assert machine.nic_gbps <= max(link["gbps"] for link in report["links"]) * 1.001


def test_another_netmod_is_named(hosts_of):
    hosts = hosts_of(2)
    hosts.environment["MPIR_CVAR_CH4_NETMOD"] = "ucx"
    done = hosts.flashmoe("doctor", "--hosts", "host-1,host-2")
    assert done.returncode == 0, done.stderr
    fix = "fix: set MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp"
    assert f"warn  MPI uses        ucx, may not outlive a lost rank; {fix}" in done.stdout


@pytest.mark.parametrize("command", [["doctor"], ["run", "--preset", "laptop-tiny", "--ranks", "2", "--experts", "4"]])
def test_a_host_that_cannot_be_reached_is_named(hosts_of, command):
    hosts = hosts_of(2)
    done = hosts.flashmoe(*command, "--hosts", "host-2,host-9")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    reason = f"host-9 cannot be reached by {hosts.hosts.launcher}: there is no host host-9"
    assert done.stderr == f"flashmoe {command[0]}: error: argument --hosts: {reason}\n"


@pytest.mark.parametrize(("cut", "on", "said"), [
    (1, 0, "host-2 does not reach host-3 at 10.77.0.3"),
    (0, 0, "host-2 does not reach this machine at 10.77.0.1"),
])  # fmt: skip
def test_hosts_without_a_common_network_are_named_before_anything_starts(hosts_of, cut, on, said):
    """The launcher still gets there: it is none of the network's."""
    hosts = hosts_of(3)
    hosts.hosts.cut(cut)
    command = ["run", "--preset", "laptop-tiny", "--ranks", "2", "--experts", "4", "--hosts", "host-2,host-3"]
    done = hosts.flashmoe(*command, on=on)
    assert (done.returncode, done.stdout) == (2, "")
    rule = "MPI and mpirun need all TCP ports between all of them"
    assert done.stderr == f"flashmoe run: error: argument --hosts: {said}: {rule}\n"


def test_an_interrupted_run_on_hosts_says_only_that(hosts_of, tmp_path):
    hosts, said = hosts_of(2), tmp_path / "stderr"
    hosts.environment[TERMINAL_VARIABLE] = "1"  # shows when the ranks are at work
    command = ["run", "--preset", "laptop-tiny", "--ranks", "2", "--experts", "4", "--iterations", "1000000"]
    where = ["--hosts", "host-1,host-2", "--launcher", hosts.hosts.launcher]
    with said.open("w") as stderr:
        process = hosts.start([sys.executable, "-m", "flashmoe_numba", *command, *where], stderr=stderr)
    limit = time.monotonic() + 60
    while "layer and BLAS" not in said.read_text():
        assert process.poll() is None and time.monotonic() < limit, said.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    *_, last, end = re.split("[\r\n]", said.read_text().replace("\x1b[K", ""))
    assert (process.returncode, out, last, end) == (130, "", "flashmoe: interrupted", "")
    assert not re.search(r"mpiexec|proxy|Abort|Traceback", said.read_text())
