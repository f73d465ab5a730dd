"""`flashmoe doctor` says what MPI would use between hosts, and what to do where that ends ranks or forbids threads."""

import importlib.util
import json
import subprocess
from types import SimpleNamespace

import pytest

from flashmoe_numba.commands.doctor import host, hosts
from flashmoe_numba.commands.doctor.host import OK, WARN

CURE = "set MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp FI_TCP_MAX_SAVED=4096"


@pytest.mark.parametrize(("status", "said", "expected"), [
    (0, json.dumps(["ofi/tcp", True, True]), (OK, "ofi/tcp, outlives a lost rank, threads may call it", "")),
    (0, json.dumps(["ucx", False, True]), (WARN, "ucx, may not outlive a lost rank, threads may call it", CURE)),
    (0, json.dumps(["ofi/tcp", True, False]),
     (WARN, "ofi/tcp, outlives a lost rank, without threads", "an MPI that gives THREAD_MULTIPLE")),
    (1, "no fabric", (WARN, "MPI does not begin: no fabric", "see mpirun")),
])  # fmt: skip
def test_what_is_between_hosts(monkeypatch, status, said, expected):
    asked = []

    def run(command, env, **_):
        asked.append(env)
        return SimpleNamespace(returncode=status, stdout=said, stderr=said)

    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    check = host.check_network()
    assert (check.status, check.found, check.fix) == expected
    assert check.needed_for == () and "PMI_RANK" not in asked[0]  # one host can do without


def test_without_mpi4py_there_is_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check = host.check_network()
    assert (check.status, check.fix) == (WARN, "pip install 'flashmoe-numba[mpi]'")


@pytest.mark.mpi
def test_here_it_outlives_a_lost_rank(monkeypatch):
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    for name in ("MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER"):
        monkeypatch.delenv(name, raising=False)
    assert host.check_network().found == "ofi/tcp, outlives a lost rank, threads may call it"


@pytest.mark.parametrize(("threads", "line"), [
    (True, "ok    threads         may call it"),
    (False, "warn  threads         may not call it"),
])  # fmt: skip
def test_the_table_between_hosts_says_whether_threads_may_call_mpi(threads, line):
    report = {"survives_a_lost_rank": True, "netmod": "ofi/tcp", "fix": "", "threads": threads}
    assert line in hosts.lines(report | {"hosts": [], "links": [], "core_gbps": 0.5})
